"""Measure the gateway against nginx and against no proxy at all, in one run.

    python benchmarks/run.py [--quick] [--governed | --all-plugins] [--only ROW ...] [--markdown] [--json FILE]

Needs Linux, a C compiler and nginx. Mock upstream, load generator and gateway get cores of their own.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import attrs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import footprint, plugin_rows, rows
from benchmarks.bench import Bench
from benchmarks.build import compile_programs
from benchmarks.gateway import GatewayCommand
from benchmarks.machine import Facts, plan_cores, read_facts, usable_cores
from benchmarks.nginx import find_nginx
from benchmarks.processes import MeasurementError, pinned
from benchmarks.report import Row, format_facts, format_markdown, format_text

ROWS: dict[str, Callable[[Bench], Row]] = {
    "1 requests": rows.requests,
    "2 added-p50": rows.added_p50,
    "3 added-p99": rows.added_p99,
    "4 streams": rows.streams,
    "4b streams-edited": rows.streams_without_usage,
    "5 paced-streams": rows.paced_streams,
    "6 first-byte": rows.first_byte,
    "7 idle-memory": footprint.idle_memory,
    "8 memory-growth": footprint.memory_growth,
    "9 stream-memory": footprint.stream_memory,
    "10 start": footprint.start,
    "11 workers": footprint.workers,
    "12 long-prompts": rows.long_prompts,
    "12b alias-splice": rows.alias_splice,
}
PLUGIN_ROWS: dict[str, Callable[[Bench], Row]] = {
    "13 unused-plugins": plugin_rows.unused_plugins,
    "14 translated": plugin_rows.translated,
    "14b translated-streams": plugin_rows.translated_streams,
    "15 streams-guarded": plugin_rows.guarded_streams,
    "15b policy-rules": plugin_rows.policy_rules,
    "16 cache-disabled": plugin_rows.cache_disabled,
}
"""Rows that need a store and every plugin, measured only with `--governed` or `--all-plugins`."""
BUSY_LOAD = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, or 1 when a row could not be measured or answers failed."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _on_terminate)
    nginx = find_nginx()
    if nginx is None:
        print("the benchmarks need nginx to compare with", file=sys.stderr)
        return 2
    try:
        programs = compile_programs()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    facts, cores = read_facts(nginx), usable_cores()
    _say(format_facts(facts))
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        bench = Bench(
            programs=programs,
            gateway_command=GatewayCommand(options.gateway, options.governed, options.all_plugins),
            nginx=nginx,
            folder=Path(folder),
            plan=plan_cores(cores),
            cores=cores,
            rounds=options.rounds or (3 if options.quick else 5),
            is_quick=options.quick,
            say=_say,
        )
        if facts.load_average > BUSY_LOAD:
            _say("warning: something else keeps this machine busy: expect noise")
        if bench.plan.is_shared:
            _say("warning: too few cores, so load, mock and gateway share them: expect noise")
        measured = _measure(
            bench, {name: row for name, row in _rows(options).items() if _is_chosen(name, options.only)}
        )
    _print(facts, measured, bench, options)
    return 0 if all(row.errors == 0 for row in measured) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the gateway against nginx and a direct call.")
    names, further = ", ".join(ROWS), ", ".join(PLUGIN_ROWS)
    parser.add_argument("--quick", action="store_true", help="three short rounds, under four minutes")
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", help=f"rows by number or name: {names}; with --governed also {further}"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds per row (5, with --quick 3)")
    parser.add_argument(
        "--gateway",
        metavar="CMD",
        help="command with {port}, {upstream}, {config}, {workers} instead of penstock serve",
    )
    parser.add_argument(
        "--governed", action="store_true", help="with store, rate limits, budgets and ledger on, and the goals for that"
    )
    parser.add_argument(
        "--all-plugins", action="store_true", help="as --governed, with every bundled plugin, unused by the key"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to a file")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    options.governed |= options.all_plugins
    if unknown := set(options.only or ()) - {part for name in _rows(options) for part in name.split()}:
        wanting = "" if options.governed else f"; with --governed also {further}"
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(_rows(options))}{wanting}")
    if options.rounds is not None and not 1 <= options.rounds <= 100:
        parser.error("--rounds must be from 1 to 100")
    return options


def _rows(options: argparse.Namespace) -> dict[str, Callable[[Bench], Row]]:
    return {**ROWS, **PLUGIN_ROWS} if options.governed else ROWS


def _is_chosen(name: str, only: Sequence[str] | None) -> bool:
    return not only or any(part in only for part in name.split())


def _measure(bench: Bench, chosen: Mapping[str, Callable[[Bench], Row]]) -> list[Row]:
    measured = []
    with pinned(bench.plan.runner), bench.open():
        for name, measure in chosen.items():
            started = time.monotonic()
            _say(f"row {name}")
            try:
                row = measure(bench)
            except MeasurementError as error:
                number, _, word = name.partition(" ")
                _say(f"    failed: {error}")
                first_line = str(error).partition("\n")[0]
                row = Row(number, word, word, "not measured", errors=1, notes=(f"failed: {first_line}",))
            _say(f"    {time.monotonic() - started:.1f} s")
            if bench.gateway_command.is_governed and row.goal is not None:
                row = attrs.evolve(row, goal=rows.GOVERNED_GOALS[row.number])
            measured.append(row)
    return measured


def _print(facts: Facts, measured: Sequence[Row], bench: Bench, options: argparse.Namespace) -> None:
    method = (
        f"{'quick run, ' if bench.is_quick else ''}{bench.rounds} interleaved rounds, "
        f"median [least..greatest]; comparisons are made within each round"
    )
    table = format_markdown(measured) if options.markdown else format_text(measured)
    print(f"{format_facts(facts)}\n{method}\n\n{table}")
    if options.json:
        lines = [{**attrs.asdict(row), "is_reached": row.is_reached} for row in measured]
        whole = {"facts": attrs.asdict(facts), "rounds": bench.rounds, "quick": bench.is_quick, "rows": lines}
        options.json.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _on_terminate(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
