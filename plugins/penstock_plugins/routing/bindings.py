"""Provider bindings as the configuration file lists them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import attrs

from penstock import ConfigurationError, Principal, ProviderBinding, Secret, Timeouts, header_fields


@attrs.frozen(kw_only=True)
class BindingConfig:
    """One ``[[plugins.routing.bindings]]`` table."""

    name: str
    """What keys name it by; its id is ``gpc_`` and this name."""
    type: str
    """A provider type that an enabled plugin brings."""
    base_url: str = ""
    """Empty takes the type's own."""
    credential: Secret | None = None
    """The provider's key."""
    handle: str | None = None
    """Lets clients ask for ``handle/model``."""
    models: tuple[str, ...] = ()
    """Models declared; empty leaves the choice to the name."""
    model_map: Mapping[str, str] = attrs.field(factory=dict)
    """What a model is called upstream."""
    extra_headers: Mapping[str, str] = attrs.field(factory=dict)
    """Header fields added to every request."""
    timeouts: Timeouts = Timeouts()
    """Bounds of an attempt."""
    usage_frame: Literal["strip", "forward"] | None = None
    """Whether the usage frame the gateway asks a chat stream for is taken out again; the key's wins."""
    propagate_trace: bool = False
    """Send ``traceparent`` and ``tracestate`` upstream."""
    proxy: str | None = None
    """``http://…`` or ``socks5://…``."""
    http2: bool = False
    """Speak HTTP/2 to an https:// address."""
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    """What the provider type alone understands, such as ``key_header``."""


@attrs.frozen(kw_only=True)
class RoutingConfig:
    """The ``[plugins.routing]`` table."""

    bindings: tuple[BindingConfig, ...] = ()
    """Provider bindings, in the order keys without a list of their own try them."""


class ConfiguredBindings:
    """Hold the bindings of the configuration file, in its order."""

    def __init__(self, config: RoutingConfig) -> None:
        self._by_name: dict[str, ProviderBinding] = {}
        for number, entry in enumerate(config.bindings):
            if entry.name in self._by_name:
                raise ConfigurationError(f"bindings[{number}].name: {entry.name!r} is taken by another binding")
            self._by_name[entry.name] = _binding_of(entry, f"bindings[{number}]")

    def find_binding(self, name: str) -> ProviderBinding | None:
        return self._by_name.get(name) or self._by_name.get(name.removeprefix("gpc_"))

    def all_bindings(self) -> Iterable[ProviderBinding]:
        return self._by_name.values()

    def bindings_of(self, principal: Principal) -> Sequence[ProviderBinding]:
        if not principal.bindings:
            return tuple(self._by_name.values())
        found = [self.find_binding(name) for name in principal.bindings]
        return [binding for binding in found if binding is not None]

    @property
    def revision(self) -> int:
        return 0


def faults_of(bindings: Sequence[ProviderBinding], principals: Iterable[Principal]) -> list[str]:
    """Return a line for each handle an organization has twice, and for each name in a key that no binding has."""
    faults = []
    handles: dict[tuple[str | None, str], str] = {}
    for binding in bindings:
        if binding.handle is not None:
            first = handles.setdefault((binding.organization_id, binding.handle), binding.name)
            if first != binding.name:
                faults.append(f"binding {binding.name!r}: handle: {binding.handle!r} is that of binding {first!r}")
    names = [binding.name for binding in bindings]
    known = {*names, *(binding.id for binding in bindings)}
    for principal in principals:
        for name in principal.bindings:
            if name not in known:
                near = get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names) or 'none'}"
                faults.append(f"key {principal.key_name!r}: bindings: there is no binding {name!r}{hint}")
    return faults


def _binding_of(entry: BindingConfig, where: str) -> ProviderBinding:
    return ProviderBinding(
        id=f"gpc_{entry.name}",
        name=entry.name,
        type=entry.type,
        base_url=entry.base_url,
        credential=entry.credential,
        handle=entry.handle,
        models=entry.models,
        model_map=entry.model_map,
        extra_headers=header_fields(entry.extra_headers, where=f"{where}.extra_headers"),
        timeouts=entry.timeouts,
        usage_frame=entry.usage_frame,
        propagate_trace=entry.propagate_trace,
        proxy=entry.proxy,
        http2=entry.http2,
        settings=entry.settings,
    )
