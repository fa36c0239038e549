"""Golden invoices: usage as providers send it, through the dialects' readers, to nano-USD computed by hand."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.dialects import anthropic, openai
from penstock.governance import Price, Rates, Tier
from penstock.metering import BodyWindow
from penstock.models import Usage
from penstock_plugins.prices.plugin import Table
from penstock_plugins.prices.table import shipped

AT = 1_793_000_000.0  # 2026-10-26
"""USD per million tokens times 1,000 are nano-USD a token: what the sums below are made of."""


@pytest.fixture(scope="module")
def table() -> Table:
    return Table(shipped())


def window(body: bytes) -> BodyWindow:
    return BodyWindow(body, b"", len(body), is_whole=True)


def read(dialect: Any, usage: dict[str, Any]) -> Usage:
    found = dialect.read_usage(window(json.dumps({"id": "x", "usage": usage}).encode()), is_stream=False)
    assert isinstance(found, Usage)
    return found


def priced(table: Table, provider: str, model: str, base_url: str = "") -> Price:
    price = table.find(provider, model, AT, base_url=base_url)
    assert price is not None
    return price


def test_chat_counts_cached_tokens_once(table: Table) -> None:
    usage = {
        "prompt_tokens": 2_006,
        "completion_tokens": 300,
        "total_tokens": 2_306,
        "prompt_tokens_details": {"cached_tokens": 1_920, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 250, "audio_tokens": 0},
    }
    # gpt-5-mini: 0.25 in, 0.025 cached, 2 out: 86 * 250 + 1,920 * 25 + 300 * 2,000
    assert priced(table, "openai", "gpt-5-mini").cost(read(openai, usage)) == 21_500 + 48_000 + 600_000


def test_responses_are_charged_as_chat_is(table: Table) -> None:
    usage = {
        "input_tokens": 1_000,
        "input_tokens_details": {"cached_tokens": 400},
        "output_tokens": 100,
        "output_tokens_details": {"reasoning_tokens": 64},
        "total_tokens": 1_100,
    }
    assert priced(table, "openai", "gpt-5-mini").cost(read(openai, usage)) == 600 * 250 + 400 * 25 + 100 * 2_000


def test_messages_charge_both_kinds_of_cache_writes(table: Table) -> None:
    usage = {
        "input_tokens": 10,
        "cache_creation_input_tokens": 3_000,
        "cache_read_input_tokens": 20_000,
        "cache_creation": {"ephemeral_5m_input_tokens": 1_000, "ephemeral_1h_input_tokens": 2_000},
        "output_tokens": 500,
    }
    # claude-opus-4-1: 15 in, 1.5 read, 18.75 written for 5 minutes, 30 for an hour, 75 out
    expected = 10 * 15_000 + 20_000 * 1_500 + 1_000 * 18_750 + 2_000 * 30_000 + 500 * 75_000
    assert priced(table, "anthropic", "claude-opus-4-1-20250805").cost(read(anthropic, usage)) == expected


def test_cache_writes_without_a_split_are_those_of_five_minutes(table: Table) -> None:
    usage = {"input_tokens": 1, "cache_creation_input_tokens": 100, "output_tokens": 1}
    price = priced(table, "anthropic", "claude-opus-4-1")
    assert price.cost(read(anthropic, usage)) == 15_000 + 100 * 18_750 + 75_000


def test_spoken_chat_charges_audio_apart(table: Table) -> None:
    usage = {
        "prompt_tokens": 500,
        "completion_tokens": 800,
        "total_tokens": 1_300,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 300, "text_tokens": 200},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 700, "text_tokens": 100},
    }
    counted = read(openai, usage)
    assert (counted.input, counted.input_audio, counted.output, counted.output_audio) == (500, 300, 800, 700)
    # gpt-realtime: text 4 in and 16 out, audio 32 in and 64 out
    expected = 200 * 4_000 + 300 * 32_000 + 100 * 16_000 + 700 * 64_000
    assert priced(table, "openai", "gpt-realtime").cost(counted) == expected


def test_cached_audio_has_its_own_price(table: Table) -> None:
    usage = {
        "input_tokens": 1_000,
        "output_tokens": 0,
        "input_token_details": {
            "text_tokens": 400,
            "audio_tokens": 600,
            "cached_tokens": 300,
            "cached_tokens_details": {"text_tokens": 100, "audio_tokens": 200},
        },
    }
    counted = read(openai, usage)
    assert counted == Usage(700, 300, 0, 0, 0, 0, "provider", input_audio=400, cache_read_audio=200)
    # gpt-realtime: cached text and cached audio 0.4
    expected = 300 * 4_000 + 400 * 32_000 + 100 * 400 + 200 * 400
    assert priced(table, "openai", "gpt-realtime").cost(counted) == expected


def test_transcriptions_spell_their_details_otherwise() -> None:
    usage = {
        "type": "tokens",
        "input_tokens": 14,
        "input_token_details": {"text_tokens": 4, "audio_tokens": 10},
        "output_tokens": 45,
        "total_tokens": 59,
    }
    assert read(openai, usage) == Usage(14, 0, 0, 0, 45, 0, "provider", input_audio=10)


@pytest.mark.parametrize("odd", [{"text_tokens": "?"}, "none", [1], None])
def test_details_of_odd_types_leave_the_rest_counted(odd: object) -> None:
    details = {"audio_tokens": 6.0, "cached_tokens": 4, "cached_tokens_details": odd}
    found = read(openai, {"prompt_tokens": 8, "completion_tokens": 1, "prompt_tokens_details": details})
    assert (found.input, found.input_audio, found.cache_read) == (4, 4, 4)


def test_embeddings_have_no_output(table: Table) -> None:
    price = priced(table, "openai", "text-embedding-3-small")
    assert price.cost(read(openai, {"prompt_tokens": 8, "total_tokens": 8})) == 8 * 20


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [  # gpt-5.4: 2.5 in, 15 out; above 272,000 tokens 5 and 22.5, for all of them
        (272_000, 272_000 * 2_500 + 10 * 15_000),
        (272_001, 272_001 * 5_000 + 10 * 22_500),
    ],
)
def test_a_long_prompt_is_dearer_as_a_whole(table: Table, prompt: int, expected: int) -> None:
    usage = read(openai, {"prompt_tokens": prompt, "completion_tokens": 10})
    assert priced(table, "openai", "gpt-5.4").cost(usage) == expected


def test_cached_input_counts_towards_the_tier(table: Table) -> None:
    usage = {"input_tokens": 1, "cache_read_input_tokens": 200_000, "output_tokens": 2}
    # claude-sonnet-4-5 above 200,000: 6 in, 0.6 read, 22.5 out
    expected = 6_000 + 200_000 * 600 + 2 * 22_500
    assert priced(table, "anthropic", "claude-sonnet-4-5").cost(read(anthropic, usage)) == expected


def test_groq_streams_its_usage_in_a_member_of_its_own(table: Table) -> None:
    event = {"choices": [], "x_groq": {"id": "r", "usage": {"prompt_tokens": 45, "completion_tokens": 12}}}
    body = b"data: " + json.dumps(event).encode() + b"\n\ndata: [DONE]\n\n"
    usage = openai.read_usage(window(body), is_stream=True)
    assert usage is not None
    price = priced(table, "openai_compatible", "llama-3.3-70b-versatile", "https://api.groq.com/openai/v1")
    assert price.cost(usage) == 45 * 590 + 12 * 790  # 0.59 in, 0.79 out


def test_half_a_nano_dollar_rounds_up_once() -> None:
    price = Price(rates=Rates(input=500_000), version="test")
    assert [price.cost(Usage(input=tokens)) for tokens in (0, 1, 2, 3)] == [0, 1, 1, 2]
    assert [price.cost(Usage(input=tokens), round_up=True) for tokens in (0, 1, 2, 3)] == [0, 1, 1, 2]
    assert Price(rates=Rates(input=1), version="test").cost(Usage(input=1), round_up=True) == 1


# --- properties -----------------------------------------------------------------------------------------------------

counts = st.integers(0, 10**7)
rate = st.integers(0, 10**12)
any_rates = st.builds(
    Rates,
    input=rate,
    cache_read=st.none() | rate,
    cache_write_5m=st.none() | rate,
    cache_write_1h=st.none() | rate,
    output=rate,
    input_audio=st.none() | rate,
    cache_audio_read=st.none() | rate,
    output_audio=st.none() | rate,
    request=st.integers(0, 10**9),
)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    fresh, cached, output = draw(counts), draw(counts), draw(counts)
    return Usage(
        fresh,
        cached,
        draw(counts),
        draw(counts),
        output,
        draw(st.integers(0, output)),
        "provider",
        draw(st.integers(0, fresh)),
        draw(st.integers(0, cached)),
        draw(st.integers(0, output)),
    )


@st.composite
def prices(draw: st.DrawFn) -> Price:
    steps = sorted(draw(st.sets(counts, max_size=2)))
    tiers = tuple(Tier(above=above, rates=draw(any_rates)) for above in steps)
    return Price(rates=draw(any_rates), tiers=tiers, version="test")


def both(one: Usage, other: Usage) -> Usage:
    fields = [name for name in attrs.fields_dict(Usage) if name != "source"]
    return Usage(**{name: getattr(one, name) + getattr(other, name) for name in fields})


@given(any_rates, usages(), usages())
def test_cost_is_additive_but_for_one_rounding(rates: Rates, one: Usage, other: Usage) -> None:
    price = Price(rates=attrs.evolve(rates, request=0), version="test")
    together = price.cost(both(one, other))
    assert abs(together - price.cost(one) - price.cost(other)) <= 1


@given(prices(), usages())
def test_cost_is_never_negative(price: Price, usage: Usage) -> None:
    assert price.cost(usage) >= 0


@given(any_rates, usages(), st.sampled_from(["input", "cache_read", "cache_write_5m", "cache_write_1h", "output"]))
def test_more_tokens_never_cost_less(rates: Rates, usage: Usage, name: str) -> None:
    price = Price(rates=rates, version="test")
    more = attrs.evolve(usage, **{name: getattr(usage, name) + 1})
    assert price.cost(more) >= price.cost(usage)


@given(prices(), usages())
def test_no_split_of_the_same_tokens_costs_more_than_the_dearest(price: Price, usage: Usage) -> None:
    assert price.cost(usage, round_up=True) <= price.dearest(usage.all_input, usage.output)


tokens_on_wire = st.none() | st.integers(0, 3000)


@given(prompt=counts, output=counts, parts=st.tuples(*[tokens_on_wire] * 6))
def test_each_token_is_in_one_class(prompt: int, output: int, parts: tuple[int | None, ...]) -> None:
    cached, written, audio, cached_audio, spoken, reasoning = parts
    usage = {
        "prompt_tokens": prompt + (cached or 0) + (written or 0),
        "completion_tokens": output,
        "prompt_tokens_details": {
            "cached_tokens": cached,
            "cache_write_tokens": written,
            "audio_tokens": audio,
            "cached_tokens_details": None if cached_audio is None else {"audio_tokens": cached_audio},
        },
        "completion_tokens_details": {"audio_tokens": spoken, "reasoning_tokens": reasoning},
    }
    found = read(openai, usage)
    assert (found.all_input, found.output) == (usage["prompt_tokens"], output)
    assert 0 <= found.input_audio <= found.input
    assert 0 <= found.cache_read_audio <= found.cache_read
    assert 0 <= found.output_audio <= found.output
    assert found.input_audio + found.cache_read_audio <= (audio or 0)
