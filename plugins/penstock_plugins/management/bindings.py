"""Provider bindings: what they may say, their sealed credentials, and the values the data plane uses."""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Any
from urllib.parse import urlsplit

from penstock import ConfigurationError, ProviderBinding, Secret, Timeouts, header_fields, suggest
from penstock.governance import KINDS, StoredObject
from penstock.governance.objects import Binding
from penstock_plugins.management.calls import Call, Means
from penstock_plugins.management.documents import shown, structure
from penstock_plugins.management.faults import RefusedError, bad_field
from penstock_plugins.management.resources import CONTAINERS, Draft, Resource
from penstock_plugins.management.rules import check_positive, check_unique

_handle = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}").fullmatch
_CREDENTIAL_HEADERS = frozenset(
    ("authorization", "proxy-authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie")
)
_DRAFT_ID = "gpc_draft"
"""Under which a provider checks what is not stored yet: what it keeps for bindings in use stays as it is."""


def sealing_place(kind: str, object_id: str) -> str:
    """Return what a sealed secret is bound to."""
    return f"{kind}:{object_id}"


def _check(call: Call, draft: Draft) -> None:
    binding: Binding = draft.document
    providers = call.means.services.providers
    if providers.get(binding.type) is None:
        known = sorted(providers.types)
        hint = suggest(binding.type, known) or f"; there are {', '.join(known)}"
        raise bad_field("type", f"no enabled plugin brings provider type {binding.type[:80]!r}{hint}")
    if binding.handle is not None and not _handle(binding.handle):
        raise bad_field("handle", "must be 1 to 32 lower-case letters, digits, - and _, beginning with no - or _")
    check_url("base_url", binding.base_url)
    if binding.proxy is not None:
        _check_proxy(binding.proxy)
    for name in binding.extra_headers:
        if name.lower().replace("_", "-") in _CREDENTIAL_HEADERS:
            raise bad_field(
                "extra_headers", f"{name} is for credentials, and whoever may look sees it; give credential"
            )
    check_unique("models", binding.models)
    for name in ("connect", "first_byte", "idle"):
        check_positive(f"timeouts.{name}", getattr(binding.timeouts, name))
    credential = _credential(call, draft)
    if "credential" not in draft.extras and credential is not None:
        _check_led(call, draft)
    try:
        made = make_binding(_DRAFT_ID, draft.document, None if credential is None else Secret(credential))
        call.means.services.provider_of(made).check(made)
    except ConfigurationError as error:
        text = str(error).removeprefix(f"binding {binding.name!r}: ")
        field = text.partition(":")[0]
        raise bad_field(field if field.replace("_", "").replace(".", "").isalnum() else "type", text) from None


def _credential(call: Call, draft: Draft) -> str | None:
    """Seal a credential just given; return the one in force."""
    binding: Binding = draft.document
    place = sealing_place("provider_binding", draft.id)
    if "credential" not in draft.extras:
        try:
            return None if binding.credential is None else call.means.vault.open(binding.credential, context=place)
        except ValueError as error:
            raise RefusedError("conflict", f"credential: {error}; give it anew") from None
    given = draft.extras["credential"]
    if given is None:
        draft.set(credential=None, credential_last4=None)
        return None
    if not isinstance(given, str):
        raise bad_field("credential", f"must be a string, not {shown(given)}")
    if not given or len(given) > 8192 or not given.isascii() or not given.isprintable() or given != given.strip():
        raise bad_field("credential", "must be 1 to 8192 characters of printable ASCII, without blanks around them")
    last4 = given[-4:] if len(given) >= 8 else None
    draft.set(credential=call.means.vault.seal(given, context=place), credential_last4=last4)
    return given


def _check_led(call: Call, draft: Draft) -> None:
    """Raise RefusedError where a stored credential would be sent elsewhere by one who could not call with it."""
    before = {} if draft.before is None else draft.before.document
    if any((before.get(name) or "") != (getattr(draft.document, name) or "") for name in ("base_url", "proxy")):
        call.actor.require("gatewayProviders:manage", draft.scope)


def check_url(where: str, url: str) -> None:
    """Raise RefusedError for what is no plain http or https URL; empty is none at all."""
    if not url:
        return
    try:
        parts = urlsplit(url)
        is_fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_fine = False
    if not is_fine or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise bad_field(where, "must be a URL that begins with http:// or https://")
    if "@" in parts.netloc:
        raise bad_field(where, "must not hold a user or password; the credential has a member of its own")
    _check_address(where, parts.hostname or "")


def _check_address(where: str, host: str) -> None:
    """Raise RefusedError for a link-local address written out: that is where a machine's own credentials are given out.

    Names are resolved when they are called, and it is for whoever calls them to look again.
    """
    address = _address_in(host)
    if address is not None and address.is_link_local:
        raise bad_field(where, "must not be a link-local address")


def _address_in(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a host is, in any spelling the system's resolver takes; None for a name."""
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            found = ipaddress.IPv4Address(socket.inet_aton(host))  # 2852039166, 0xa9fea9fe, 169.254.43518
        except (OSError, UnicodeEncodeError):
            return None
    return found if found.version == 4 else found.ipv4_mapped or found


def _check_proxy(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_fine = parts.scheme in ("http", "https", "socks5", "socks5h") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_fine = False
    if not is_fine or not url.isascii() or not url.isprintable():
        raise bad_field("proxy", "must be a URL that begins with http://, https:// or socks5://")
    if "@" in parts.netloc:
        raise bad_field("proxy", "must not hold a user or password")
    _check_address("proxy", parts.hostname or "")


def make_binding(binding_id: str, binding: Binding, credential: Secret | None) -> ProviderBinding:
    """Return what the data plane calls a binding. Raises ConfigurationError."""
    bounds = Timeouts()
    given = binding.timeouts
    return ProviderBinding(
        id=binding_id,
        name=binding.name,
        type=binding.type,
        base_url=binding.base_url,
        credential=credential,
        handle=binding.handle,
        models=binding.models,
        model_map=binding.model_map,
        extra_headers=header_fields(binding.extra_headers, where="extra_headers"),
        timeouts=Timeouts(
            given.connect or bounds.connect, given.first_byte or bounds.first_byte, given.idle or bounds.idle
        ),
        usage_frame=binding.usage_frame,
        propagate_trace=binding.propagate_trace,
        proxy=binding.proxy,
        http2=binding.http2,
        settings=binding.settings,
        rate_limits=binding.rate_limits,
    )


def opened(means: Means, stored: StoredObject, binding_id: str) -> ProviderBinding:
    """Return the binding a stored object describes, its credential opened. Raises ConfigurationError, ValueError."""
    binding: Binding = structure(stored.document, Binding)
    credential = None
    if binding.credential is not None:
        place = sealing_place("provider_binding", stored.id)
        credential = Secret(means.vault.open(binding.credential, context=place))
    return make_binding(binding_id, binding, credential)


def _show(_call: Call, _stored: StoredObject, view: dict[str, Any]) -> None:
    view.pop("credential", None)


PROVIDER_BINDINGS = Resource(
    kind=KINDS["provider_binding"],
    path="provider-bindings",
    grants="gatewayProviders",
    aliases=dict.fromkeys(CONTAINERS, "scope_id"),
    references={"scope_id": CONTAINERS},
    locked=frozenset(("scope_id", "type")),
    readonly=frozenset(("credential_last4",)),
    extras={"credential": str},
    filters=("name", "type", "scope_id", "handle", "external_id"),
    check=_check,
    show=_show,
)
