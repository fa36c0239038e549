"""From the model a client asks for to the candidates that can serve it; pure.

First match wins: alias of the key; ``handle/model``; ``type/model``; a model some binding declares or maps; the vendor
guessed from the name; bindings that declare nothing; the key's only binding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import attrs

from penstock import Candidate, Principal, Provider, ProviderBinding, RequestError

_SHOWN_MODELS = 10


@attrs.frozen(eq=False)
class Reachable:
    """A binding the key may use, with its provider."""

    binding: ProviderBinding
    provider: Provider

    def declares(self, model: str) -> bool:
        return model in self.binding.models or model in self.binding.model_map

    @property
    def declares_any(self) -> bool:
        return bool(self.binding.models or self.binding.model_map)

    def candidate(self, model: str | None, source: str) -> Candidate:
        """Return the candidate, the model renamed by the binding's map."""
        upstream = self.binding.model_map.get(model, model) if model is not None else None
        return Candidate(self.binding, self.provider, upstream, source)


def resolve(
    asked: str,
    principal: Principal,
    reachable: Sequence[Reachable],
    known_names: frozenset[str],
    elsewhere: frozenset[str] = frozenset(),
) -> list[Candidate]:
    """Return the candidates in order.

    ``known_names`` are types and handles, this key's or not; ``elsewhere`` those of its bindings that do not speak
    the dialect of the endpoint.

    Raises RequestError ``model_not_recognized``, ``provider_not_bound``, ``model_not_allowed``.
    """
    model = principal.model_aliases.get(asked, asked)
    if not reachable:
        raise not_bound(elsewhere)
    found = _find(model, reachable, known_names, elsewhere)
    if not found:
        raise _not_recognized(asked, principal, reachable, known_names)
    if asked in principal.model_aliases:
        found = [attrs.evolve(candidate, model_source="alias") for candidate in found]
    allowed = [candidate for candidate in found if is_allowed(principal, candidate, model)]
    if not allowed:
        raise RequestError(
            "model_not_allowed",
            f"This virtual key may not call the model {asked[:200]!r}; its models_allowed does not match it.",
            param="model",
            meta={"rule": "models_allowed", "value": asked[:200]},
        )
    return allowed


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
    head, slash, rest = model.partition("/")
    if slash and rest:
        by_handle = [found.candidate(rest, "handle") for found in reachable if found.binding.handle == head]
        if by_handle:
            return by_handle
        by_type = [found.candidate(rest, "type") for found in reachable if found.binding.type == head]
        if by_type:
            return by_type
        if head in known_names and not any(found.declares(model) for found in reachable):
            why = "does not serve this endpoint" if head in elsewhere else "this virtual key has no binding for"
            raise RequestError(
                "provider_not_bound", f"The model names the provider {head!r}, which {why}.", param="model"
            )
    steps: tuple[tuple[str, Callable[[Reachable], bool]], ...] = (
        ("declared", lambda found: found.declares(model)),
        ("guessed", lambda found: not found.declares_any and model.startswith(found.provider.model_prefixes)),
        ("undeclared", lambda found: not found.declares_any and not found.provider.model_prefixes),
    )
    for source, fits in steps:
        chosen = [found.candidate(model, source) for found in reachable if fits(found)]
        if chosen:
            return chosen
    if len(reachable) == 1:
        return [reachable[0].candidate(model, "only")]
    return [found.candidate(model, "undeclared") for found in reachable if not found.declares_any]


def callable_models(
    principal: Principal, reachable: Sequence[Reachable], known_names: frozenset[str]
) -> list[tuple[str, str]]:
    """Return (model, provider type) of aliases and declared models this key may call, without duplicates."""
    names: dict[str, str] = {}
    for found in reachable:
        for model in (*found.binding.models, *found.binding.model_map):
            if model not in names and is_allowed(principal, found.candidate(model, "declared"), model):
                names[model] = found.binding.type
    for alias, model in principal.model_aliases.items():
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
    asked: str, principal: Principal, reachable: Sequence[Reachable], known_names: frozenset[str]
) -> RequestError:
    models = [model for model, _ in callable_models(principal, reachable, known_names)][:_SHOWN_MODELS]
    hint = f"; it can call {', '.join(models)}" if models else "; name one as handle/model or type/model"
    return RequestError(
        "model_not_recognized",
        f"No provider binding of this virtual key serves the model {asked[:200]!r}{hint}.",
        param="model",
        meta={"models": models},
    )
