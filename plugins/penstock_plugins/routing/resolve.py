"""From the model a client asks for to the candidates that can serve it; pure.

First match wins: alias of the key, then of its routing policy; ``handle/model``; ``type/model``; a model some binding
declares or maps; the vendor guessed from the name; bindings that declare nothing; the key's only binding.

These rules are for bindings that speak the client's dialect. One that needs translation joins them, at its place in
the key's order, where it declares or maps the model, and so does an entry of a routing policy that maps it; a name no
such rule knows goes to whom it can be translated for if the vendor is guessed from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import attrs

from penstock import Candidate, Principal, Provider, ProviderBinding, RequestError

_SHOWN_MODELS = 10


@attrs.frozen(eq=False)
class Reachable:
    """A binding the key may use, with its provider."""

    binding: ProviderBinding
    provider: Provider
    entry_map: Mapping[str, str] = attrs.field(factory=dict)
    """What the entry of a routing policy calls a model; the binding's own map comes after it."""
    is_translated: bool = False
    """Whether the request has to be translated for its provider."""
    is_by_name_only: bool = False
    """Whether it is outside the key's routing policy, so that only ``handle/model`` or ``type/model`` gets there."""

    def declares(self, model: str) -> bool:
        return model in self.binding.models or model in self.binding.model_map

    @property
    def declares_any(self) -> bool:
        return bool(self.binding.models or self.binding.model_map)

    def joins(self, model: str) -> bool:
        """Say whether it serves a model beside whatever the rules choose."""
        return model in self.entry_map or (self.is_translated and self.declares(model))

    def guesses(self, model: str) -> bool:
        return not self.declares_any and model.startswith(self.provider.model_prefixes)

    @property
    def named_models(self) -> tuple[str, ...]:
        """Return the models it is known to serve."""
        return (*self.binding.models, *self.binding.model_map, *self.entry_map)

    def candidate(self, model: str | None, source: str) -> Candidate:
        """Return the candidate, the model renamed by the entry's map and then by the binding's."""
        upstream = model
        if model is not None:
            upstream = self.entry_map.get(model, model)
            upstream = self.binding.model_map.get(upstream, upstream)
        return Candidate(self.binding, self.provider, upstream, source)


def resolve(
    asked: str,
    principal: Principal,
    aliases: Mapping[str, str],
    reachable: Sequence[Reachable],
    *,
    known_names: frozenset[str],
    elsewhere: frozenset[str] = frozenset(),
) -> list[Candidate]:
    """Return the candidates in order.

    ``known_names`` are types and handles, this key's or not; ``elsewhere`` those of its bindings that do not speak
    the dialect of the endpoint.

    Raises RequestError ``model_not_recognized``, ``provider_not_bound``, ``model_not_allowed``.
    """
    model = aliases.get(asked, asked)
    found = _find(model, reachable, known_names, elsewhere) if reachable else []
    if not found and all(each.is_by_name_only for each in reachable):
        raise not_bound(elsewhere)
    if not found:
        raise _not_recognized(asked, principal, aliases, reachable, known_names)
    if asked in aliases:
        found = [attrs.evolve(candidate, model_source="alias") for candidate in found]
    allowed = [candidate for candidate in found if is_allowed(principal, candidate, model)]
    if not allowed:
        raise not_allowed(asked)
    return allowed


def not_allowed(asked: str) -> RequestError:
    """Return the refusal of a model that a key may not call."""
    return RequestError(
        "model_not_allowed",
        f"This virtual key may not call the model {asked[:200]!r}; its models_allowed does not match it.",
        param="model",
        meta={"rule": "models_allowed", "value": asked[:200]},
    )


def is_allowed(principal: Principal, candidate: Candidate, asked: str) -> bool:
    """Judge the resolved model in both spellings, bare and ``type/model``."""
    globs = principal.models_allowed
    if globs is None:
        return True
    bare = _bare(asked, candidate)
    upstream = candidate.model or bare
    spellings = {bare, upstream, f"{candidate.binding.type}/{bare}", f"{candidate.binding.type}/{upstream}"}
    return any(fnmatchcase(spelling, glob) for spelling in spellings for glob in globs)


def _bare(asked: str, candidate: Candidate) -> str:
    head, slash, rest = asked.partition("/")
    return rest if slash and head in (candidate.binding.handle, candidate.binding.type) else asked


def _find(
    model: str,
    reachable: Sequence[Reachable],
    known_names: frozenset[str],
    elsewhere: frozenset[str] = frozenset(),
) -> list[Candidate]:
    members = [found for found in reachable if not found.is_by_name_only]
    head, slash, rest = model.partition("/")
    if slash and rest:
        named = _named(head, rest, members) or _named(head, rest, reachable)
        if named:
            return named
        if head in known_names and not any(found.declares(model) or found.joins(model) for found in members):
            why = "does not serve this endpoint" if head in elsewhere else "this virtual key has no binding for"
            raise RequestError(
                "provider_not_bound", f"The model names the provider {head!r}, which {why}.", param="model"
            )
    return _by_rules(model, members)


def _named(head: str, rest: str, reachable: Sequence[Reachable]) -> list[Candidate]:
    """Return those that ``handle/model`` means, or else ``type/model``."""
    by_handle = [found.candidate(rest, "handle") for found in reachable if found.binding.handle == head]
    return by_handle or [found.candidate(rest, "type") for found in reachable if found.binding.type == head]


def _by_rules(model: str, members: Sequence[Reachable]) -> list[Candidate]:
    native = [found for found in members if not found.is_translated]
    source, chosen = "declared", [found for found in members if found.joins(model)]
    steps: tuple[tuple[str, Callable[[Reachable], bool]], ...] = (
        ("declared", lambda found: found.declares(model)),
        ("guessed", lambda found: found.guesses(model)),
        ("undeclared", lambda found: not found.declares_any and not found.provider.model_prefixes),
    )
    for name, fits in steps:
        fitting = [found for found in native if fits(found)]
        if fitting:
            sources = {id(found): name for found in fitting} | {id(found): source for found in chosen}
            return [found.candidate(model, sources[id(found)]) for found in members if id(found) in sources]
    if not chosen:
        source, chosen = "guessed", [found for found in members if found.guesses(model)]
    if not chosen and len(native) == 1:
        source, chosen = "only", native
    if not chosen:
        source, chosen = "undeclared", [found for found in native if not found.declares_any]
    return [found.candidate(model, source) for found in chosen]


def callable_models(
    principal: Principal, aliases: Mapping[str, str], reachable: Sequence[Reachable], known_names: frozenset[str]
) -> list[tuple[str, str]]:
    """Return (model, provider type) of aliases and declared models this key may call, without duplicates."""
    names: dict[str, str] = {}
    for found in reachable:
        for model in () if found.is_by_name_only else found.named_models:
            if model not in names and is_allowed(principal, found.candidate(model, "declared"), model):
                names[model] = found.binding.type
    for alias, model in aliases.items():
        try:
            candidates = _find(model, reachable, known_names)
        except RequestError:
            continue
        allowed = [candidate for candidate in candidates if is_allowed(principal, candidate, model)]
        if allowed:
            names[alias] = allowed[0].binding.type
    return list(names.items())


def not_bound(elsewhere: frozenset[str]) -> RequestError:
    """Return the refusal of a key none of whose bindings can take the request."""
    if elsewhere:
        message = "No provider binding of this virtual key serves this endpoint."
    else:
        message = "This virtual key has no provider binding."
    return RequestError("provider_not_bound", message, param="model")


def _not_recognized(
    asked: str,
    principal: Principal,
    aliases: Mapping[str, str],
    reachable: Sequence[Reachable],
    known_names: frozenset[str],
) -> RequestError:
    models = [model for model, _ in callable_models(principal, aliases, reachable, known_names)][:_SHOWN_MODELS]
    hint = f"; it can call {', '.join(models)}" if models else "; name one as handle/model or type/model"
    return RequestError(
        "model_not_recognized",
        f"No provider binding of this virtual key serves the model {asked[:200]!r}{hint}.",
        param="model",
        meta={"models": models},
    )
