"""Provider bindings in memory, their credentials opened; and what of them one generation of plugins can use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs

from penstock import ConfigurationError, Principal, ProviderBinding, Secret, Services, Timeouts, header_fields
from penstock.governance import StoredObject, Vault
from penstock_plugins.store.keys import limits_of

REMEMBERED_KEYS = 50_000
"""For how many keys an answer is kept at hand; keys come and go."""
_log = logging.getLogger("penstock.store")


@attrs.frozen(eq=False)
class Entry:
    """Hold a binding that is enabled, and which keys may use it."""

    binding: ProviderBinding
    scope_id: str
    priority: int


class BindingTable:
    """Follow the bindings of the store."""

    kinds = ("provider_binding",)

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self.entries: dict[str, Entry] = {}
        """By id; those that are enabled."""
        self.revision = 0
        """Grows with every change."""

    def plan(self, changed: Sequence[StoredObject]) -> Callable[[], None]:
        following = {stored.id: self._entry(stored) for stored in changed}

        def swap() -> None:
            if following:
                merged: dict[str, Entry | None] = {**self.entries, **following}
                self.entries = {binding_id: entry for binding_id, entry in merged.items() if entry is not None}
                self.revision += 1

        return swap

    def _entry(self, stored: StoredObject) -> Entry | None:
        document = stored.document
        if stored.archived_at_ms is not None or not document.get("enabled", True):
            return None
        try:
            binding = self._binding(stored)
        except (ConfigurationError, KeyError, TypeError, ValueError) as error:
            _log.error("provider binding %s cannot be used: %s", stored.id, error)
            return None
        return Entry(binding, document["scope_id"], document.get("fallback_priority") or 0)

    def _binding(self, stored: StoredObject) -> ProviderBinding:
        document = stored.document
        sealed = document.get("credential")
        credential = None
        if sealed is not None:
            credential = Secret(self._vault.open(sealed, context=f"{stored.kind}:{stored.id}"))
        return ProviderBinding(
            id=stored.id,
            name=document["name"],
            type=document["type"],
            base_url=document.get("base_url") or "",
            credential=credential,
            handle=document.get("handle"),
            models=tuple(document.get("models", ())),
            model_map=document.get("model_map") or {},
            extra_headers=header_fields(document.get("extra_headers") or {}, where="extra_headers"),
            timeouts=Timeouts(**_given(document.get("timeouts"))),
            usage_frame=document.get("usage_frame"),
            propagate_trace=document.get("propagate_trace", False),
            proxy=document.get("proxy"),
            http2=document.get("http2", False),
            settings={
                **_given({name: document.get(name) for name in ("region", "api_version")}),
                **(document.get("settings") or {}),
            },
            rate_limits=limits_of(document),
            organization_id=stored.scope.organization_id,
        )


def _given(table: dict[str, Any] | None) -> dict[str, Any]:
    """Return what is not None."""
    return {name: value for name, value in (table or {}).items() if value is not None}


class StoredBindings:
    """Answer one generation of plugins: the BindingDirectory of what its providers accept.

    A binding whose type no enabled plugin brings, or that its provider refuses, is left out and logged: the others
    work all the same.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._table: BindingTable | None = None
        self._seen = -1
        self._accepted: dict[str, Entry | None] = {}
        self._checked: dict[str, Entry] = {}
        self._ordered: tuple[Entry, ...] = ()
        self._by_name: dict[str, ProviderBinding] = {}
        self._answers: dict[str, tuple[Principal, tuple[ProviderBinding, ...]]] = {}

    def open(self, table: BindingTable) -> None:
        """Begin to answer."""
        self._table = table
        self.refresh()

    def refresh(self) -> None:
        """Take what has changed: providers keep the address of a binding, so each change is shown to them."""
        table = self._opened()
        if table.revision == self._seen:
            return
        for binding_id, entry in table.entries.items():
            if self._checked.get(binding_id) is not entry:
                self._accepted[binding_id] = entry if self._is_accepted(entry.binding) else None
        self._checked = dict(table.entries)
        self._accepted = {binding_id: self._accepted[binding_id] for binding_id in table.entries}
        entries = [entry for entry in self._accepted.values() if entry is not None]
        self._ordered = tuple(sorted(entries, key=lambda entry: (entry.priority, entry.binding.id)))
        self._by_name = {entry.binding.name: entry.binding for entry in reversed(self._ordered)}
        self._by_name |= {entry.binding.id: entry.binding for entry in self._ordered}
        self._answers.clear()
        self._seen = table.revision

    def _is_accepted(self, binding: ProviderBinding) -> bool:
        provider = self._services.providers.get(binding.type)
        if provider is None:
            _log.warning("provider binding %r is left out: no enabled plugin brings %r", binding.name, binding.type)
            return False
        try:
            provider.check(binding)
        except Exception as error:  # noqa: BLE001 - a provider is somebody else's code
            _log.error("provider binding %r is left out: %s", binding.name, error)
            return False
        return True

    def _opened(self) -> BindingTable:
        if self._table is None:
            raise not_open()
        return self._table

    def find_binding(self, name: str) -> ProviderBinding | None:
        self._opened()
        return self._by_name.get(name)

    def all_bindings(self) -> Iterable[ProviderBinding]:
        self._opened()
        return [entry.binding for entry in self._ordered]

    def bindings_of(self, principal: Principal) -> Sequence[ProviderBinding]:
        known = self._answers.get(principal.virtual_key_id)
        if known is not None and known[0] is principal:
            return known[1]
        self._opened()
        found = self._find(principal)
        if len(self._answers) >= REMEMBERED_KEYS:
            self._answers.clear()
        self._answers[principal.virtual_key_id] = principal, found
        return found

    def _find(self, principal: Principal) -> tuple[ProviderBinding, ...]:
        scopes = (principal.organization_id, principal.team_id, principal.project_id)
        in_sight = [entry.binding for entry in self._ordered if entry.scope_id in scopes]
        if not principal.bindings:
            return tuple(in_sight)
        by_id = {binding.id: binding for binding in in_sight}
        return tuple(by_id[binding_id] for binding_id in principal.bindings if binding_id in by_id)

    @property
    def revision(self) -> int:
        return self._opened().revision


def not_open() -> ConfigurationError:
    """Return what is raised where the store is used before its lifespan is entered."""
    return ConfigurationError('the store is not open yet; name "store" first in [gateway] plugins')
