"""The prices plugin: whose price a model has, when, and what an operator puts over it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import pytest

from penstock import ConfigurationError, Services
from penstock.governance import PriceTable, Rates, Scope, StoredObject
from penstock_plugins import prices
from penstock_plugins.prices import Prices, refresh
from penstock_plugins.prices.overrides import read_overrides
from penstock_plugins.prices.plugin import MAX_REMEMBERED, EstimateConfig, PricesConfig, Table
from penstock_plugins.prices.table import PublishedPrices, shipped

FOLDER = Path(prices.__file__).parent
AT = datetime(2026, 11, 1, 12, tzinfo=UTC).timestamp()


@pytest.fixture(scope="module")
def published() -> PublishedPrices:
    return shipped()


@pytest.fixture
def table(published: PublishedPrices) -> Table:
    return Table(published)


def input_rate(table: Table, provider: str, model: str, at: float = AT, base_url: str = "") -> int | None:
    price = table.find(provider, model, at, base_url=base_url)
    return None if price is None else price.rates.input


# --- whose price ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "model", "base_url", "expected"),
    [
        ("openai", "gpt-5-mini", "", 250_000_000),
        ("openai", "GPT-5-mini", "", 250_000_000),
        ("openai", "gpt-5-mini-20250807", "", 250_000_000),
        ("openai", "no-such-model", "", None),
        ("azure", "gpt-5-mini", "", 250_000_000),
        ("anthropic", "claude-opus-4-1-20250805", "", 15_000_000_000),
        ("gemini", "gemini-2.5-pro", "", 1_250_000_000),
        ("vertex", "claude-opus-4-1", "", 15_000_000_000),
        ("openai_compatible", "llama-3.3-70b-versatile", "https://api.groq.com/openai/v1", 590_000_000),
        ("openai_compatible", "gpt-5-mini", "http://127.0.0.1:9999/v1", None),
        ("openai_compatible", "gpt-5-mini", "", None),
        ("openai", "llama-3.3-70b-versatile", "https://api.groq.com/openai/v1", 590_000_000),
        ("openai", "gpt-5-mini", "http://127.0.0.1:9999/v1", 250_000_000),
        ("mock", "gpt-5-mini", "", 250_000_000),
        ("mock", "claude-opus-4-1", "", 15_000_000_000),
        ("mock", "llama-3.3-70b-versatile", "", 590_000_000),
        ("mock", "no-such-model", "", None),
        ("no-such-provider", "gpt-5-mini", "", None),
    ],
)
def test_price_is_that_of_the_provider_asked(
    table: Table, provider: str, model: str, base_url: str, expected: int | None
) -> None:
    assert input_rate(table, provider, model, base_url=base_url) == expected


def test_version_names_source_and_date(table: Table) -> None:
    price = table.find("openai", "gpt-5-mini", AT)
    assert price is not None
    source, date = price.version.split(" ")
    assert (source, datetime.fromisoformat(date).year >= 2026) == ("genai-prices", True)


def test_what_is_charged_by_the_hour_has_no_price(table: Table) -> None:
    assert table.find("groq", "whisper-large-v3", AT) is None


def test_window_bounds_what_a_model_can_put_out(table: Table) -> None:
    price = table.find("openai", "gpt-5-mini", AT)
    assert price is not None
    assert price.max_output_tokens == 400_000


def small(*prices: list[Any], match: object = "m") -> Table:
    models = [[match, list(prices)]]
    provider = {"id": "p", "url": "https://p", "owns": None, "borrows": [], "models": models}
    document = {"source": "test", "version": "1", "date": "2026-01-01", "providers": [provider]}
    return Table(PublishedPrices(json.dumps(document).encode()))


@pytest.mark.parametrize(
    ("clause", "matching", "other"),
    [
        ("m-1", "M-1", "m-10"),
        ({"s": "m-"}, "m-1", "xm-1"),
        ({"e": "-mini"}, "m-mini", "m-minimal"),
        ({"c": "son"}, "claude-sonnet", "claude"),
        ({"r": r"^m-\d{2}$"}, "m-12", "m-1"),
        (["a", {"s": "b"}], "bcd", "c"),
        ({"a": [{"s": "a"}, {"e": "z"}]}, "a-z", "a-y"),
    ],
)
def test_clause_matches(clause: object, matching: str, other: str) -> None:
    table = small([[5]], match=clause)
    assert (input_rate(table, "p", matching), input_rate(table, "p", other)) == (5, None)


def test_last_price_in_force_counts() -> None:
    table = small([[1]], [[2], [], 1000], [[3], [], 2000])
    found = [input_rate(table, "p", "m", at) for at in (0, 999.9, 1000, 1999, 2000)]
    assert found == [1, 1, 2, 2, 3]


def test_hours_of_the_day_have_their_own_price() -> None:
    table = small([[1]], [[2], [], None, 3600, 7200], [[3], [], None, 82_800, 1800])
    day = 20_000 * 86_400
    seconds = (1800, 3599, 3600, 7199.9, 7200, 82_799, 82_800, 0)
    assert [input_rate(table, "p", "m", day + second) for second in seconds] == [1, 1, 2, 2, 1, 1, 3, 3]


def test_before_every_date_the_first_price_counts() -> None:
    assert input_rate(small([[1], [], 5000], [[2], [], 6000]), "p", "m", 0) == 1


def test_memory_of_names_is_bounded(table: Table) -> None:
    for number in range(MAX_REMEMBERED + 10):
        table.find("anthropic", f"model-{number}", AT)
    assert len(table._known) <= MAX_REMEMBERED
    assert input_rate(table, "anthropic", "claude-opus-4-1") == 15_000_000_000


# --- overrides ------------------------------------------------------------------------------------------------------


def override(
    object_id: str, model: str, effective_at: str, rates: Mapping[str, object], provider: str = "openai"
) -> StoredObject:
    document = {
        "provider": provider,
        "model": model,
        "effective_at": effective_at,
        "rates": rates,
        "scope_id": "org_default",
    }
    return StoredObject("price_override", object_id, Scope("org_default"), 1, 0, 0, None, document)


def test_latest_override_before_the_moment_wins(table: Table) -> None:
    stored = [
        override("pr_1", "gpt-5*", "2026-11-01T00:00:00Z", {"input": 1}),
        override("pr_2", "gpt-5-mini", "2026-11-02T00:00:00Z", {"input": 2}),
        override("pr_3", "*", "2026-11-03T01:00:00+01:00", {"input": 3}),
    ]
    table.put_overrides(read_overrides(stored))
    days = [datetime(2026, month, day, tzinfo=UTC).timestamp() for month, day in ((10, 31), (11, 1), (11, 2), (11, 3))]
    assert [input_rate(table, "openai", "gpt-5-mini", day) for day in days] == [250_000_000, 1, 2, 3]
    assert input_rate(table, "openai", "no-such-model", days[-1]) == 3
    assert input_rate(table, "azure", "gpt-5-mini", days[-1]) == 250_000_000


def test_later_made_of_two_for_one_moment_wins(table: Table) -> None:
    both = [override(f"pr_{n}", "m", "2026-01-01T00:00:00Z", {"input": n}) for n in (1, 2)]
    table.put_overrides(read_overrides(both))
    assert input_rate(table, "openai", "m") == 2


def test_override_names_itself_and_keeps_the_model_s_bound(table: Table) -> None:
    table.put_overrides(read_overrides([override("pr_1", "gpt-5-mini", "2026-01-01T00:00:00Z", {"output": 7})]))
    price = table.find("openai", "gpt-5-mini", AT)
    assert price is not None
    assert (price.version, price.rates, price.max_output_tokens) == ("override pr_1", Rates(output=7), 400_000)


def test_overrides_taken_away_give_the_table_s_price_back(table: Table) -> None:
    table.put_overrides(read_overrides([override("pr_1", "gpt-5-mini", "2026-01-01T00:00:00Z", {"input": 7})]))
    assert input_rate(table, "openai", "gpt-5-mini") == 7
    table.put_overrides(())
    assert input_rate(table, "openai", "gpt-5-mini") == 250_000_000


@pytest.mark.parametrize("rates", [{"inptu": 1}, {"input": -1}, {"input": 0.5}, {"input": True}, []])
def test_unreadable_override_is_left_out_and_logged(rates: Any, caplog: pytest.LogCaptureFixture) -> None:
    good = override("pr_2", "m", "2026-01-01T00:00:00Z", {"input": 2, "cache_read": None})
    found = read_overrides([override("pr_1", "m", "2027-01-01T00:00:00Z", rates), good])
    assert [one.id for one in found] == ["pr_2"]
    assert "pr_1" in caplog.text


# --- unknown models -------------------------------------------------------------------------------------------------


def plugin(**settings: Any) -> PriceTable:
    services = Services()
    Prices(PricesConfig(**settings), services)
    return services.get(PriceTable)  # type: ignore[type-abstract]


def test_unknown_models_cost_nothing_and_are_flagged_unless_told_otherwise() -> None:
    found = plugin()
    assert (found.unknown, found.estimate("openai")) == ("zero_and_flag", None)


def test_estimate_stands_in_at_the_rates_configured() -> None:
    found = plugin(unknown="estimate", estimate=EstimateConfig(input="3", output="15.5"))
    price = found.estimate("openai")
    assert price is not None
    assert price.rates == Rates(input=3_000_000_000, output=15_500_000_000)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"unknown": "estimate"}, "estimate: is missing"),
        ({"estimate": EstimateConfig(input="cheap", output="1")}, "estimate.input"),
        ({"estimate": EstimateConfig(input="1", output="0.0000000001")}, "estimate.output"),
    ],
)
def test_estimate_that_cannot_be_used_stops_the_start(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        plugin(**settings)


# --- the table and its maker ----------------------------------------------------------------------------------------


def test_every_model_shipped_can_be_read(published: PublishedPrices) -> None:
    text = (FOLDER / "table.json").read_bytes()
    document = json.loads(text)
    count = 0
    for provider in document["providers"]:
        for match, dated, *_ in provider["models"]:
            assert match
            assert dated
            count += 1
        published.find(provider["id"], "no such model")
    assert count > 2000
    assert len(text) < 400_000
    assert "MIT License" in (FOLDER / "LICENSE.genai-prices").read_text(encoding="utf-8")


def test_shipped_prices_are_plausible(published: PublishedPrices) -> None:
    for name, provider in published._providers.items():
        published.find(name, "no such model")
        for model in published._models[provider.id]:
            for dated in published._dated(model):
                if dated.price is not None:
                    highest = max(value or 0 for value in attrs.astuple(dated.price.rates))
                    assert highest <= 2_000 * 10**9, model.match
                    assert [step.above for step in dated.price.tiers] == sorted(
                        {step.above for step in dated.price.tiers}
                    )


def test_start_loads_no_more_than_the_text() -> None:
    program = (
        "import tracemalloc, time, sys; from penstock_plugins.prices.table import shipped; "
        "starts = [(time.perf_counter(), shipped(), time.perf_counter()) for _ in range(5)]; "
        "took = min(end - begun for begun, _, end in starts); "
        "tracemalloc.start(); kept = shipped(); "
        "print(took < 0.03, tracemalloc.get_traced_memory()[1] < 1_000_000, 'pydantic' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert finished.stdout.split() == ["True", "True", "False"]


@pytest.mark.parametrize(
    ("usd", "expected"),
    [
        ("2.5", 2_500_000_000),
        ("0.000000001", 1),
        ("0", 0),
        ("0.18000000000000002", 180_000_000),
        ("0.0833333333333333", 83_333_333),
    ],
)
def test_rate_is_whole_nano_dollars(usd: str, expected: int) -> None:
    assert refresh.to_rate(Decimal(usd)) == expected


@pytest.mark.parametrize("usd", ["0.0000000001", "-1", "NaN", "1.0000000005"])
def test_rate_that_is_not_exact_is_refused(usd: str) -> None:
    with pytest.raises(ValueError, match=r"USD is no whole number|is no price"):
        refresh.to_rate(Decimal(usd))


class Source:
    """Anything with members, as genai-prices has them."""

    def __init__(self, **members: Any) -> None:
        self.__dict__.update(members)

    def __getattr__(self, name: str) -> None:
        return None


def test_maker_takes_over_tiers_dates_and_hours() -> None:
    step = Source(start=200, price=Decimal(2))
    tiered = Source(base=Decimal(1), tiers=[step])
    base = Source(constraint=None, prices=Source(input_mtok=tiered, output_mtok=Decimal(4)))
    dawn, noon = time(22, 30, tzinfo=UTC), time(12)
    dated = Source(constraint=Source(start_date=datetime(2026, 1, 1, tzinfo=UTC).date()), prices=base.prices)
    hourly = Source(constraint=Source(start_time=dawn, end_time=noon), prices=Source(requests_kcount=Decimal(5)))
    by_hour = Source(constraint=None, prices=Source(audio_hours=Decimal(1)))
    usd = 10**9
    tier = [[200, [2 * usd, 4 * usd]]]
    assert refresh.dated([base, dated, hourly, by_hour]) == [
        [[usd, 4 * usd], tier],
        [[usd, 4 * usd], tier, 1_767_225_600],
        [[None] * 8 + [5_000_000], [], None, 81_000, 43_200],
        [None],
    ]


def test_maker_writes_what_the_table_reads() -> None:
    model = Source(
        match=Source(or_=[Source(equals="M"), Source(and_=[Source(starts_with="A"), Source(regex="z$")])]),
        prices=Source(input_mtok=Decimal("0.5")),
        context_window=9,
    )
    provider = Source(id="p", api_pattern="https://p", models=[model])
    text = "\n".join(refresh.lines([provider], "9", "2026-02-03")).encode()
    table = Table(PublishedPrices(text))
    assert [input_rate(table, "p", name) for name in ("m", "a-z", "a-y")] == [500_000_000, 500_000_000, None]
    price = table.find("p", "m", AT)
    assert price is not None
    assert (price.version, price.max_output_tokens) == ("genai-prices 2026-02-03", 9)
