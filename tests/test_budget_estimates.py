"""What an exchange may cost: likely by averages and length, at most by bytes and limits."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import Exchange, Usage
from penstock.governance import Price, Rates, Tier
from penstock.testing import Sample, sample_exchange
from penstock_plugins.budgets.estimates import Averages, Bounds, input_cost, likely_input

UNSEEN = 1_000_000
ASSUMED = 10_000
PRICE = Price(rates=Rates(input=1_000_000_000, output=4_000_000_000), version="test")
TOKENS = st.integers(0, 5_000)


def exchange_of(
    body: dict[str, Any] | bytes, path: str = "/v1/chat/completions", *fields: tuple[bytes, bytes]
) -> Exchange:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return sample_exchange(Sample("POST", path, raw), fields)


def output_of(body: dict[str, Any] | bytes, path: str = "/v1/chat/completions", limit: int | None = None) -> int:
    """Return the output tokens taken for possible."""
    rates = Rates(input=0, output=1_000_000)
    price = Price(rates=rates, version="test", max_output_tokens=limit)
    return Bounds(exchange_of(body, path), UNSEEN).cost(price, ASSUMED)


@pytest.mark.parametrize(
    ("path", "members"),
    [
        ("/v1/chat/completions", {"max_tokens", "max_completion_tokens"}),
        ("/v1/completions", {"max_tokens"}),
        ("/v1/messages", {"max_tokens"}),
        ("/v1/responses", {"max_output_tokens"}),
        ("/v1/images/generations", set()),
    ],
)
def test_request_bounds_its_output_by_the_names_of_its_dialect(path: str, members: set[str]) -> None:
    for member in ("max_tokens", "max_completion_tokens", "max_output_tokens", "MAX_TOKENS", "maxTokens"):
        assert output_of({"model": "m", member: 7}, path) == (7 if member in members else ASSUMED)
        assert output_of(b'{"\\u006dodel":"m","%b":7}' % member.encode(), path) == (7 if member in members else ASSUMED)


@pytest.mark.parametrize(
    ("body", "limit"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 50}, 50),
        (b'{"max_tokens":50,"max_tokens":5}', 50),
        (b'{"max_tokens":5,"Max_Tokens":50}', 50),
        (b'{"max_tokens":5,"max\\u005ftokens":50}', 50),
        (b'{"max_tokens":null,"max_tokens":5}', ASSUMED),
        (b'{"max_tokens":-1,"max_tokens":5}', ASSUMED),
        (b'{"max_tokens":"all","max_tokens":5}', 128 * ASSUMED),
        (b'{"n":3,"n":1,"max_tokens":5}', 15),
        (b'{"n":3,"n":null,"max_tokens":5}', 15),
        (b'{"tools":[{"n":{"n":128,"max_tokens":9000}}],"max_tokens":5,"n":1}', 5),
    ],
)
def test_largest_of_several_bounds_counts(body: dict[str, Any] | bytes, limit: int) -> None:
    assert output_of(body) == limit


def test_model_limit_counts_where_the_request_sets_none() -> None:
    assert output_of({"model": "m"}, limit=4096) == 4096
    assert output_of({"model": "m", "max_tokens": 0}, limit=4096) == 4096
    assert output_of({"model": "m", "max_tokens": 7}, limit=4096) == 7


def test_setting_counts_where_nobody_knows_a_limit() -> None:
    assert output_of({"model": "m"}) == ASSUMED


@pytest.mark.parametrize(
    ("body", "choices"),
    [
        ({"n": 3}, 3),
        ({"n": 2, "best_of": 5}, 5),
        ({"n": 2, "prompt": ["a", "b", "c"]}, 6),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": []}, 1),
        ({"generationConfig": {"candidateCount": 4}}, 4),
        ({"n": "three"}, 128),
    ],
)
def test_every_answer_asked_for_is_bounded(body: dict[str, Any], choices: int) -> None:
    assert output_of(body, "/v1/completions") == choices * ASSUMED


def test_gemini_names_its_bound_elsewhere() -> None:
    assert output_of({"generationConfig": {"maxOutputTokens": 9}}, "/v1beta/models/g:generateContent") == 9


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/moderations"])
def test_what_answers_without_text_has_no_output(path: str) -> None:
    assert output_of({"input": "x"}, path) == 0


@given(st.text(max_size=400), st.booleans())
def test_input_is_bounded_by_the_decoded_bytes(text: str, is_ascii: bool) -> None:
    body = json.dumps({"messages": [{"content": text}]}, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    assert Bounds(exchange_of(body), 0).input > len(text.encode("utf-8", "surrogatepass"))
    assert Bounds(exchange_of(body), 0).input >= len(body)


def test_compressed_body_counts_as_what_it_decodes_to() -> None:
    body = json.dumps({"messages": [{"content": "a" * 10_000}]}).encode()
    packed = exchange_of(gzip.compress(body), "/v1/chat/completions", (b"Content-Encoding", b"gzip"))
    assert Bounds(packed, 0).input == Bounds(exchange_of(body), 0).input


@pytest.mark.parametrize(
    "body",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"prompt": {"id": "pmpt_1"}},
        {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "https://x.test/a.png"}}]}]},
        {"messages": [{"content": [{"type": "image", "source": {"type": "url", "url": "https://x.test"}}]}]},
        {"messages": [{"content": [{"type": "document", "source": {"type": "file", "file_id": "f"}}]}]},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": [{"type": "file_search", "vector_store_ids": ["v"]}]},
        {"cachedContent": "cachedContents/1"},
        b'{"\\u0070revious_response_id":"resp_1"}',
    ],
)
def test_what_a_request_only_refers_to_is_bounded_by_the_setting(body: dict[str, Any] | bytes) -> None:
    assert Bounds(exchange_of(body), UNSEEN).input >= UNSEEN


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "find the image_url and \"web_search\" in this text: é"}]},
        {"tools": [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]},
        b'{"messages":[{"content":"a \\u0026 b \\u003c c"}]}',
    ],
)  # fmt: skip
def test_plain_text_refers_to_nothing(body: dict[str, Any] | bytes) -> None:
    assert Bounds(exchange_of(body), UNSEEN).input < UNSEEN


@given(
    text=st.text(max_size=200),
    limit=st.integers(1, 5_000),
    parts=st.lists(st.integers(0, 100), min_size=8, max_size=8),
    rates=st.builds(
        Rates,
        input=st.integers(0, 10**10),
        cache_read=st.none() | st.integers(0, 10**10),
        cache_write_5m=st.none() | st.integers(0, 10**10),
        cache_write_1h=st.none() | st.integers(0, 10**10),
        output=st.integers(0, 10**10),
        output_audio=st.none() | st.integers(0, 10**10),
        request=st.integers(0, 10**9),
    ),
    tier=st.none() | st.integers(0, 500),
)
def test_no_usage_within_the_bounds_costs_more(
    text: str, limit: int, parts: list[int], rates: Rates, tier: int | None
) -> None:
    tiers = () if tier is None else (Tier(above=tier, rates=Rates(input=rates.input * 2, output=rates.output * 3)),)
    price = Price(rates=rates, tiers=tiers, version="test")
    bounds = Bounds(exchange_of({"max_tokens": limit, "messages": [{"content": text}]}), UNSEEN)
    whole = sum(parts[:4]) or 1
    share = [part * bounds.input // whole for part in parts[:4]]
    output = min(limit, parts[4] * limit // 100)
    usage = Usage(
        input=share[0],
        cache_read=share[1],
        cache_write_5m=share[2],
        cache_write_1h=share[3],
        output=output,
        output_audio=output * parts[5] // 100,
    )
    assert price.cost(usage) <= bounds.cost(price, ASSUMED)


def test_likely_input_is_a_quarter_of_the_bytes() -> None:
    assert likely_input(exchange_of(b'{"a":"' + b"x" * 392 + b'"}')) == 101


def test_files_in_the_body_do_not_count_by_their_length() -> None:
    body = {"messages": [{"content": [{"image_url": {"url": "data:image/png;base64," + "A" * 400_000}}]}]}
    assert likely_input(exchange_of(body)) < 10_000


@given(TOKENS, st.integers(0, 10**10))
def test_input_costs_no_less_than_its_price(tokens: int, rate: int) -> None:
    price = Price(rates=Rates(input=rate), tiers=(Tier(above=1_000, rates=Rates(input=rate * 2)),), version="test")
    exact = price.cost(Usage(input=tokens))
    assert exact <= input_cost(price, tokens) <= exact + 1


def test_average_follows_what_exchanges_cost() -> None:
    averages = Averages()
    assert averages.of("vk_1", "m") == 0
    averages.add("vk_1", "m", 800)
    assert averages.of("vk_1", "m") == 800
    averages.add("vk_1", "m", 1_600)
    assert averages.of("vk_1", "m") == 900
    assert averages.of("vk_2", "m") == averages.of("vk_1", "n") == 0


@given(st.lists(st.integers(0, 10**12), min_size=1))
def test_average_stays_within_what_was_seen(costs: list[int]) -> None:
    averages = Averages()
    for cost in costs:
        averages.add("vk_1", "m", cost)
    assert min(costs) <= averages.of("vk_1", "m") <= max(costs)
