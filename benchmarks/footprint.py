"""Rows about what the gateway takes: memory, time to start, cores."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import attrs
from benchmarks.bench import PROXIES, Bench, Subject
from benchmarks.generator import Load, LoadResult
from benchmarks.machine import RESERVED, CorePlan, plan_cores
from benchmarks.processes import Memory, tree_memory
from benchmarks.prompts import Prompt
from benchmarks.report import Goal, Row, Spread, ratio

SETTLE_SECONDS = 0.5
"""Time between the last answer and a look at memory."""

CHAT = Prompt()
STREAM = Prompt(streams=True)
OPEN_STREAMS = 1000
WORKERS = 4
MEGABYTE = 1_000_000


def _memory(subject: Subject) -> Memory:
    assert subject.program is not None
    time.sleep(SETTLE_SECONDS)
    return tree_memory(subject.program.pid)


def _each_fresh(bench: Bench, rounds: int, measure: Callable[[Subject], float]) -> dict[str, Spread]:
    """Measure gateway and nginx in turn, each time on a process of its own."""
    values: dict[str, list[float]] = {name: [] for name in PROXIES}
    for number in range(rounds):
        for name in PROXIES:
            with bench.fresh(name) as subject:
                values[name].append(measure(subject))
            bench.say(f"    round {number + 1} {name}: {values[name][-1]:,.3f}")
    return {name: Spread.of(list_) for name, list_ in values.items()}


def idle_memory(bench: Bench) -> Row:
    """Measure the memory of the process tree after start and one request."""
    shared: dict[str, float] = {}

    def measure(subject: Subject) -> float:
        memory = _memory(subject)
        shared[subject.name] = memory.pss / MEGABYTE
        return memory.rss / MEGABYTE

    figures = _each_fresh(bench, bench.rounds, measure)
    return Row(
        number="7",
        name="idle-memory",
        title="memory after start and one request",
        unit="MB",
        figures=figures,
        compared=figures["gateway"],
        compared_unit="MB",
        goal=Goal(45),
        notes=(
            "RSS added up over the process tree",
            f"PSS (shared pages by share): gateway {shared['gateway']:.1f}, nginx {shared['nginx']:.1f} MB",
        ),
    )


def memory_growth(bench: Bench) -> Row:
    """Measure memory after many requests and streams against memory after the first tenth of the requests."""
    part = 10 if bench.is_quick else 1
    early, late, streams = 20_000 // part, 180_000 // part, 20_000 // part
    errors: list[int] = []

    def send(subject: Subject, prompt: Prompt, connections: int, count: int) -> None:
        load = Load(connections=connections, count=count, seconds=600)
        errors.append(bench.measure(subject, prompt, load).errors)

    def measure(subject: Subject) -> float:
        send(subject, CHAT, 64, early)
        before = _memory(subject).rss
        send(subject, CHAT, 64, late)
        send(subject, STREAM, 16, streams)
        return 100 * (_memory(subject).rss / before - 1)

    figures = _each_fresh(bench, 1, measure)
    scale = "a tenth of the full count: " if bench.is_quick else ""
    return Row(
        number="8",
        name="memory-growth",
        title="RSS after all requests and streams over RSS after the first requests",
        unit="% more",
        figures=figures,
        compared=figures["gateway"],
        compared_unit="% more",
        goal=Goal(10),
        errors=sum(errors),
        notes=(
            f"{scale}{early + late:,} requests and {streams:,} streams, against the first {early:,} requests",
            "one run",
        ),
    )


def stream_memory(bench: Bench) -> Row:
    """Measure how much memory each of 1,000 open streams takes."""
    prompt = Prompt(streams=True, pace_ms=500, events=1000)
    load = Load(connections=OPEN_STREAMS, ramp=bench.seconds(0.8, 2), seconds=60, drain=0)
    warm_up = Load(connections=16, count=500, seconds=60)
    errors: list[int] = []

    def measure(subject: Subject) -> float:
        errors.append(bench.measure(subject, STREAM, warm_up).errors)
        before = _memory(subject).rss
        with bench.holding(subject, prompt, load):
            during = _memory(subject).rss
        return (during - before) / OPEN_STREAMS / 1000

    figures = _each_fresh(bench, bench.rounds, measure)
    return Row(
        number="9",
        name="stream-memory",
        title="memory of each of 1,000 open streams",
        unit="kB",
        figures=figures,
        compared=figures["gateway"],
        compared_unit="kB",
        goal=Goal(60),
        errors=sum(errors),
        notes=("RSS with the streams open less RSS after 500 streams, without what the kernel holds",),
    )


def start(bench: Bench) -> Row:
    """Measure the time from starting the program to its first 200."""
    with bench.fresh("gateway"):
        pass  # the first start fills the file cache and compiles modules
    figures = _each_fresh(bench, 5, lambda subject: subject.start_seconds)
    return Row(
        number="10",
        name="start",
        title="start to first 200",
        unit="s",
        figures=figures,
        compared=figures["gateway"],
        compared_unit="s",
        goal=Goal(0.5),
    )


def workers(bench: Bench) -> Row:
    """Measure how requests per second grow with workers, each on a core of its own."""
    fitting = min(WORKERS, len(bench.cores) - RESERVED)
    row = Row(
        number="11",
        name="workers",
        title=f"{min(WORKERS, max(fitting, 2))} workers against 1",
        unit="requests per second",
        compared_unit="x one worker",
        goal=Goal(3.2, is_least=True),
    )
    missing = f"{WORKERS} workers are not measurable on {len(bench.cores)} cores"
    if not bench.gateway_command.can_choose_workers:
        return attrs.evolve(row, notes=("not measured: the gateway's command has no place for {workers}",))
    if fitting < 2:
        return attrs.evolve(row, notes=(missing,))
    plans = {count: plan_cores(bench.cores, count) for count in (1, fitting)}
    rates: dict[int, list[float]] = {count: [] for count in plans}
    errors = 0
    with ExitStack() as stack:
        mocks = {count: stack.enter_context(bench.mock_on(plan)) for count, plan in plans.items()}
        for number in range(bench.rounds):
            for count, plan in plans.items():
                result = _run_workers(bench, count, plan, mocks[count])
                rates[count].append(result.per_second)
                errors += result.errors
                bench.say(f"    round {number + 1} {count} workers: {result.per_second:,.0f}/s")
    scaling = [ratio(many, one) for many, one in zip(rates[fitting], rates[1], strict=True)]
    return attrs.evolve(
        row,
        figures={"gateway": Spread.of(rates[fitting])},
        compared=Spread.of(scaling),
        goal=row.goal if fitting == WORKERS else None,
        errors=errors,
        notes=() if fitting == WORKERS else (f"{missing}; shown: {fitting} against 1, each on its own core",),
    )


def _run_workers(bench: Bench, count: int, plan: CorePlan, mock_port: int) -> LoadResult:
    load = Load(connections=256, warmup=bench.seconds(0.4, 1), seconds=bench.seconds(0.8, 3))
    with bench.fresh("gateway", workers=count, plan=plan, mock_port=mock_port) as subject:
        return bench.measure(subject, CHAT, load, plan)
