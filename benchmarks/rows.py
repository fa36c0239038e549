"""Rows about traffic: each is one function that measures and compares."""

from __future__ import annotations

from benchmarks.bench import Bench, Measured
from benchmarks.generator import Load, LoadResult
from benchmarks.prompts import Prompt
from benchmarks.report import Goal, Row, Spread, added_ratio, difference, ratio

GOVERNED_GOALS = {
    "1": Goal(0.24, is_least=True),
    "2": Goal(2.4),
    "3": Goal(2.5),
    "4": Goal(0.38, is_least=True),
    "5": Goal(0.5),
    "6": Goal(0.5),
    "7": Goal(80),
    "8": Goal(10),
    "9": Goal(60),
    "10": Goal(0.9),
    "11": Goal(3.0, is_least=True),
    "12": Goal(0.3, is_least=True),
    "13": Goal(0.95, is_least=True),
}
"""By row: what to reach with store, budgets, limits and ledger on."""
MOCK_HEADROOM = 3.0
CHAT = Prompt()
LONG_CHAT = Prompt(body_size=100_000)
STREAM = Prompt(streams=True)
MANY_STREAMS = 1000
EVENTS_PER_SECOND = 20


def per_second(result: LoadResult) -> float:
    """Return requests per second."""
    return result.per_second


def _throughput(
    bench: Bench, prompt: Prompt, connections: int, *, number: str, name: str, title: str, goal: Goal | None
) -> Row:
    load = Load(connections=connections, warmup=bench.seconds(0.25, 1), seconds=bench.seconds(0.8, 3))
    measured = bench.interleave(prompt, load, per_second)
    return Row(
        number=number,
        name=name,
        title=title,
        unit="per second",
        figures=measured.spreads,
        compared=measured.compare(ratio, "gateway", "nginx"),
        compared_unit="x nginx",
        goal=goal,
        errors=measured.errors,
        notes=(*_headroom_notes(measured), *size_notes(measured, prompt)),
    )


def _headroom_notes(measured: Measured) -> tuple[str, ...]:
    headroom = measured.compare(ratio, "direct", "nginx").median
    if headroom >= MOCK_HEADROOM:
        return (f"the mock alone is {headroom:.1f} times as fast as nginx",)
    return (f"the mock alone is only {headroom:.1f} times as fast as nginx: the machine is the bottleneck",)


def size_notes(measured: Measured, prompt: Prompt, right: str = "direct") -> tuple[str, ...]:
    """Say when answers through the gateway have another size than those of a named subject."""
    if prompt.streams and not prompt.wants_usage:
        return ()
    sizes = {name: list_[0].bytes_per_answer for name, list_ in measured.results.items()}
    if sizes["gateway"] == sizes[right]:
        return ()
    return (f"answers hold {sizes['gateway']:,.1f} bytes instead of {sizes[right]:,.1f}",)


def requests(bench: Bench) -> Row:
    """Measure requests per second with 64 connections."""
    return _throughput(
        bench, CHAT, 64,
        number="1", name="requests", title="requests, 64 connections", goal=Goal(0.28, is_least=True),
    )  # fmt: skip


def added_p50(bench: Bench) -> Row:
    """Measure what is added to a single call at a time."""
    load = Load(connections=1, warmup=bench.seconds(0.1, 0.5), seconds=bench.seconds(0.4, 2))
    measured = bench.interleave(CHAT, load, lambda result: result.latency_us.p50, slices=2)
    return Row(
        number="2",
        name="added-p50",
        title="p50 at 1 connection",
        unit="µs in all",
        figures=measured.spreads,
        compared=added_ratio(*(measured.values[name] for name in ("gateway", "nginx", "direct"))),
        compared_unit="x what nginx adds",
        goal=Goal(2.0),
        errors=measured.errors,
    )


def added_p99(bench: Bench) -> Row:
    """Measure the p99 in an open loop, each latency counted from the time the request was due."""
    load = Load(connections=32, rate=200, warmup=bench.seconds(0.2, 1), seconds=bench.seconds(1.5, 10))
    measured = bench.interleave(CHAT, load, lambda result: result.latency_us.p99 / 1000)
    return Row(
        number="3",
        name="added-p99",
        title="p99 at 200 requests per second, open loop",
        unit="ms",
        figures=measured.spreads,
        compared=measured.compare(difference, "gateway", "direct"),
        compared_unit="ms over direct",
        goal=Goal(2.0),
        errors=measured.errors,
    )


def streams(bench: Bench) -> Row:
    """Measure streams per second, 16 at once, each of 200 events written at once."""
    return _throughput(
        bench, STREAM, 16,
        number="4", name="streams", title="streams of 200 events, 16 at once", goal=Goal(0.40, is_least=True),
    )  # fmt: skip


def streams_without_usage(bench: Bench) -> Row:
    """Measure the same when the request does not ask for usage, so the gateway must ask and take it out."""
    prompt = Prompt(streams=True, wants_usage=False)
    return _throughput(
        bench, prompt, 16,
        number="4b", name="streams-edited", title="streams, usage not asked for by the client", goal=None,
    )  # fmt: skip


def paced_streams(bench: Bench) -> Row:
    """Measure how late events arrive on 1,000 streams of 20 events a second."""
    prompt = Prompt(streams=True, pace_ms=50, events=200)
    load = Load(
        connections=MANY_STREAMS,
        ramp=bench.seconds(0.8, 2),
        warmup=bench.seconds(0.2, 1),
        seconds=bench.seconds(1.2, 6),
        drain=0,
        reads_events=True,
    )
    measured = bench.interleave(prompt, load, lambda result: result.event_delay_us.p99 / 1000)
    return Row(
        number="5",
        name="paced-streams",
        title="p99 event delay, 1,000 streams of 20 events per second",
        unit="ms",
        figures=measured.spreads,
        compared=measured.compare(difference, "gateway", "nginx"),
        compared_unit="ms over nginx",
        goal=Goal(0.5),
        errors=measured.errors,
        notes=_event_rate_notes(measured),
    )


def _event_rate_notes(measured: Measured) -> tuple[str, ...]:
    """Say which subject could not keep up: the delay of events that never came is not in the figure."""
    expected = MANY_STREAMS * EVENTS_PER_SECOND
    rates = {
        name: Spread.of([result.event_delay_us.count / result.seconds for result in list_]).median
        for name, list_ in measured.results.items()
    }
    return tuple(
        f"{name} delivered {rate:,.0f} of {expected:,} events per second"
        for name, rate in rates.items()
        if rate < 0.97 * expected
    )


def first_byte(bench: Bench) -> Row:
    """Measure the time to the first byte of content on one stream after another."""
    prompt = Prompt(streams=True, pace_ms=1, events=5)
    load = Load(connections=1, warmup=0.2, seconds=bench.seconds(0.9, 3))
    measured = bench.interleave(prompt, load, lambda result: result.first_byte_us.p50 / 1000)
    return Row(
        number="6",
        name="first-byte",
        title="p50 time to first byte of a stream",
        unit="ms",
        figures=measured.spreads,
        compared=measured.compare(difference, "gateway", "direct"),
        compared_unit="ms over direct",
        goal=Goal(0.4),
        errors=measured.errors,
    )


def long_prompts(bench: Bench) -> Row:
    """Measure requests per second with bodies of 100 kB."""
    return _throughput(
        bench, LONG_CHAT, 64,
        number="12", name="long-prompts", title="requests of 100 kB, 64 connections",
        goal=Goal(0.35, is_least=True),
    )  # fmt: skip


def alias_splice(bench: Bench) -> Row:
    """Measure the same when the gateway replaces the model's name in every body."""
    return _throughput(
        bench, Prompt(body_size=LONG_CHAT.body_size, model="fast", key="alias"), 64,
        number="12b", name="alias-splice", title="requests of 100 kB, model name replaced", goal=None,
    )  # fmt: skip
