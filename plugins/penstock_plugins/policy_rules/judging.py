"""Judge a request by compiled rules: contents before anything is sent, models candidate by candidate; pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from penstock import Candidate, RequestError
from penstock.peek import PeekError, peek_request
from penstock.splice import SpliceError
from penstock_plugins.policy_rules.contents import DepthError, declared, place_of, urls_in
from penstock_plugins.policy_rules.patterns import Refusal, RuleSet, Side

_SHOWN = 200
"""Characters of a value that a refusal shows."""
_CODES = {"tools": "tool_not_allowed", "mcp": "tool_not_allowed", "urls": "url_not_allowed"}
_NOUNS = {"tools": "tool", "mcp": "MCP server", "urls": "URL", "models": "model"}


class ViolationError(RequestError):
    """Refuse what a policy rule does not admit."""

    def __init__(self, code: str, message: str, *, param: str | None, rule_set: RuleSet, refusal: Refusal) -> None:
        meta = {
            "rule": refusal.rule,
            "pattern": refusal.pattern,
            "value": refusal.value[:_SHOWN],
            "place": param,
            rule_set.noun.replace(" ", "_"): rule_set.owner,
        }
        super().__init__(code, message, param=param, meta=meta)


def violation(rule_set: RuleSet, kind: str, refusal: Refusal, param: str | None) -> ViolationError:
    """Return the refusal of one value."""
    noun = _NOUNS[kind]
    why = "is not among those allowed" if refusal.pattern is None else "is denied"
    message = (
        f"The {noun} {refusal.value[:_SHOWN]!r} {why} by {refusal.rule} of this {rule_set.noun}"
        f"{'' if rule_set.noun == 'virtual key' else ' (' + rule_set.owner + ')'}; "
        f"leave it out, or ask whoever owns the key."
    )
    code = _CODES.get(kind, "model_not_allowed")
    return ViolationError(code, message, param=param, rule_set=rule_set, refusal=refusal)


def judge_body(body: bytes, rule_sets: Sequence[RuleSet]) -> None:
    """Raise RequestError for a JSON body that holds what some rules do not admit, or that cannot be judged."""
    try:
        peek_request(body)  # whatever is read below is JSON, whole and to the end
        if any(rule_set.tools or rule_set.mcp for rule_set in rule_sets):
            _judge_declared(body, rule_sets)
    except DepthError:
        raise RequestError("bad_request", "The tools are nested too deeply to be judged.", param="tools") from None
    except (PeekError, SpliceError, ValueError):
        raise RequestError(
            "bad_request", "The request body cannot be read, so policy rules cannot judge it: it is no JSON object."
        ) from None
    if any(rule_set.urls for rule_set in rule_sets):
        _judge_urls(body, rule_sets)


def _judge_declared(body: bytes, rule_sets: Sequence[RuleSet]) -> None:
    admitted: set[tuple[str, str]] = set()
    for found in declared(body):
        if (found.kind, found.value) in admitted:
            continue
        for rule_set in rule_sets:
            side: Side | None = getattr(rule_set, found.kind)
            refusal = None if side is None else side.refusal(found.value)
            if refusal is not None:
                raise violation(rule_set, found.kind, refusal, found.place)
        admitted.add((found.kind, found.value))


def _judge_urls(body: bytes, rule_sets: Sequence[RuleSet]) -> None:
    sides = [(rule_set, rule_set.urls) for rule_set in rule_sets if rule_set.urls is not None]
    admitted: set[tuple[str, ...]] = set()
    for url in urls_in(body):
        if url.spellings in admitted:
            continue
        for rule_set, side in sides:
            denials = (side.denial(spelling) for spelling in url.spellings)
            refusal = next((found for found in denials if found is not None), None) or side.omission(url.plain)
            if refusal is not None:
                raise violation(rule_set, "urls", refusal, place_of(body, refusal.value))
        admitted.add(url.spellings)


@attrs.frozen
class NamedModel:
    """The names under which rules judge one candidate."""

    upstream: tuple[str, ...]
    """What it is asked for, bare and ``type/model``."""
    declared: tuple[str, ...]
    """What its binding calls the same model, where that renames it: a deployment's model."""

    @classmethod
    def of(cls, candidate: Candidate, model: str) -> NamedModel:
        """Return the names of a model at a candidate."""
        binding = candidate.binding
        others = [name for name, upstream in binding.model_map.items() if upstream == model]
        return cls(_spelled(binding.type, [model]), _spelled(binding.type, others))


def _spelled(provider: str, models: Iterable[str]) -> tuple[str, ...]:
    return tuple(spelling for model in models for spelling in (model, f"{provider}/{model}"))


def judge_model(model: NamedModel, rule_set: RuleSet) -> ViolationError | None:
    """Return the refusal of a model: some name is denied, or none is allowed."""
    side = rule_set.models
    if side is None:
        return None
    names = (*model.upstream, *model.declared)
    for name in names:
        denial = side.denial(name)
        if denial is not None:
            return violation(rule_set, "models", denial, "model")
    omissions = [side.omission(name) for name in names]
    refusal = None if None in omissions else omissions[0]
    return None if refusal is None else violation(rule_set, "models", refusal, "model")
