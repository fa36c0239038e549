"""The rules of resolution hold whatever joins them by translation or by the map of a policy's entry."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock import Candidate, OpenAIProvider, Principal, ProviderBinding, RequestError
from penstock_plugins.routing.resolve import Reachable, callable_models, resolve

MODELS = ("gpt-5", "claude-x", "odd")
PROVIDERS = [
    OpenAIProvider(type="openai", model_prefixes=("gpt-",)),
    OpenAIProvider(type="anthropic", model_prefixes=("claude-",)),
    OpenAIProvider(type="any", model_prefixes=()),
]
KEY = Principal("vk_1", "a", "a")
NAMES = frozenset({"openai", "anthropic", "any", "h"})
maps = st.dictionaries(st.sampled_from(MODELS), st.sampled_from(MODELS), max_size=2)


@st.composite
def reachables(draw: st.DrawFn) -> list[Reachable]:
    found = []
    for number in range(draw(st.integers(1, 5))):
        provider = draw(st.sampled_from(PROVIDERS))
        declared, renamed = tuple(draw(st.sets(st.sampled_from(MODELS), max_size=2))), draw(maps)
        handle = draw(st.sampled_from([None, "h"]))
        binding = ProviderBinding(
            str(number), str(number), provider.type, "", handle=handle, models=declared, model_map=renamed
        )
        is_translated = draw(st.booleans())
        found.append(Reachable(binding, provider, draw(maps), is_translated, is_by_name_only=False))
    return found


def chain(asked: str, reachable: list[Reachable]) -> list[Candidate]:
    try:
        return resolve(asked, KEY, {}, reachable, known_names=NAMES)
    except RequestError:
        return []


def ids(candidates: list[Candidate]) -> list[str]:
    return [candidate.binding.id for candidate in candidates]


asks = st.sampled_from([*MODELS, "h/odd", "openai/gpt-5", "any/odd"])


@given(asks, reachables())
def test_chain_keeps_the_order_of_the_key_and_asks_nobody_twice(asked: str, reachable: list[Reachable]) -> None:
    found = ids(chain(asked, reachable))
    assert found == sorted(set(found))


@given(st.sampled_from(MODELS), reachables())
def test_translation_takes_nobody_away_who_is_found_by_the_first_rules(asked: str, reachable: list[Reachable]) -> None:
    native = [each for each in reachable if not each.is_translated]
    alone = chain(asked, native)
    both = {candidate.binding.id: candidate for candidate in chain(asked, reachable)}
    for candidate in alone:
        if candidate.model_source in ("declared", "guessed") and candidate.binding.id in both:
            assert both[candidate.binding.id].model == candidate.model
        if candidate.model_source in ("declared", "guessed"):
            assert candidate.binding.id in both


@given(st.sampled_from(MODELS), reachables())
def test_translated_binding_joins_where_it_names_the_model(asked: str, reachable: list[Reachable]) -> None:
    found = ids(chain(asked, reachable))
    for each in reachable:
        if each.joins(asked):
            assert each.binding.id in found
        elif each.is_translated and each.binding.id in found:
            assert each.guesses(asked)
            assert not any(other.declares(asked) or other.guesses(asked) for other in reachable if is_native(other))


def is_native(reachable: Reachable) -> bool:
    return not reachable.is_translated


@given(reachables())
def test_every_model_that_is_listed_can_be_called(reachable: list[Reachable]) -> None:
    for model, _ in callable_models(KEY, {}, reachable, NAMES):
        assert chain(model, reachable)
