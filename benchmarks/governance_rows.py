"""Ask about a ledger of a million rows, and admit exchanges beside it, over the API of a governed gateway.

    python benchmarks/governance_rows.py [--rows 1000000] [--rounds 5]

Needs Linux, a C compiler and about a kilobyte of disk for each row.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType
from urllib.parse import urlencode

import attrs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.build import Programs, compile_programs
from benchmarks.gateway import Served, governed
from benchmarks.generator import Generator, Load, LoadResult
from benchmarks.machine import CorePlan, plan_cores, read_facts, usable_cores
from benchmarks.nginx import find_nginx
from benchmarks.processes import free_port, pinned, running, running_mock, wait_for_answer
from benchmarks.prompts import Prompt, build_requests, write_requests
from benchmarks.report import Goal, Spread, difference, format_facts, format_spread, paired

from penstock import Usage
from penstock.governance import Debit, LedgerEntry
from penstock_plugins.store.commits import Books
from penstock_plugins.store.database import Database
from penstock_plugins.store.totals import seed_of_budget

DAY = 86_400
DAYS = 30
KEYS, PROJECTS, MODELS, END_USERS = 200, 20, 12, 2_000
BATCH = 1000
TO_REACH = Goal(200)
HEADINGS = ("measured, ms", "rows", "empty ledger", "full ledger", "compared", "to reach", "reached")


@attrs.frozen
class Ids:
    """What the gateway's own objects are called; what else the rows name exists in the ledger only."""

    organization: str
    team: str
    project: str
    key: str
    budget: str

    @classmethod
    def read(cls, database: Path) -> Ids:
        """Read them from a store."""
        with closing(sqlite3.connect(database)) as connection:
            rows = connection.execute("SELECT kind, id FROM objects ORDER BY kind, id DESC").fetchall()
        first = dict(rows)  # the one made first, of each kind
        kinds = ("organization", "team", "project", "virtual_key", "budget")
        return cls(*(first[kind] for kind in kinds))


def make_entries(ids: Ids, rows: int, start: int) -> Iterator[LedgerEntry]:
    """Yield exchanges of a month: each key uses two models, one in ten names its end user."""
    random_ = random.Random(1)
    for number in range(rows):
        key = min(int(random_.expovariate(0.02)), KEYS - 1)
        model = f"model-{(key + random_.randrange(2)) % MODELS}"
        yield LedgerEntry(
            request_id=f"req_{number:012x}{random_.getrandbits(72):018x}",  # in the order of time, as the gateway's
            started_at_ns=start * 10**9 + number * DAYS * DAY * 10**9 // rows,
            duration_ns=10**9,
            organization_id=ids.organization,
            team_id=ids.team,
            project_id=f"proj_{key % PROJECTS:026}" if key % PROJECTS else ids.project,
            virtual_key_id=f"vk_{key:026}" if key else ids.key,
            principal_id=f"user_{key // 4:026}",
            end_user=f"user-{random_.randrange(END_USERS)}" if random_.random() < 0.1 else None,
            binding_id="gpc_01M80CRQAH6DBDJ0PD51FJE0ZF",
            provider="openai",
            model_asked=model,
            model_served=model,
            usage=Usage(input=random_.randrange(4000), cache_read=random_.randrange(4000), output=500),
            cost_nano_usd=random_.randrange(10**7),
            cost_source="priced",
            price_version="benchmark 2026-11-01",
            status=200,
            outcome="success",
            error=None,
            is_stream=bool(number % 2),
            fallback_count=0,
            debits=tuple(Debit(counter=f"budget:bud_{each}", period=0, reserved=10**7) for each in range(3)),
            tags=(f"tag-{key % 5}",),
        )


def fill(database: Path, entries: Iterator[LedgerEntry]) -> None:
    """Commit entries, and print what a row costs."""
    open_ = Database(f"sqlite:///{database}")
    books = Books(seed_of_budget)
    count, wall, processor = 0, 0.0, 0.0
    while batch := [entry for _, entry in zip(range(BATCH), entries, strict=False)]:
        began, used = time.perf_counter(), time.thread_time()
        with open_.writer.begin() as connection:
            receipt = books.append(connection, batch)
        books.remember(receipt)
        count, wall, processor = count + len(batch), wall + time.perf_counter() - began, processor + time.thread_time()
        processor -= used
    open_.close()
    size = sum(path.stat().st_size for path in database.parent.glob(f"{database.name}*") if path.is_file())
    _say(f"{count:,} rows: {wall / count * 1e6:.0f} us to commit a row, {processor / count * 1e6:.0f} us of CPU; "
         f"{size / count:.0f} bytes a row")  # fmt: skip


class Api:
    """Ask a gateway's management API on one connection."""

    def __init__(self, folder: Path, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        token = (folder / "penstock.db.admin-token").read_text().strip()
        self._headers = {"Authorization": f"Bearer {token}"}

    def ask(self, path: str, query: Mapping[str, str]) -> bytes:
        """Return an answer. Raises RuntimeError for one that is not 200."""
        self._connection.request("GET", f"/api/v1{path}?{urlencode(query)}", headers=self._headers)
        answer = self._connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {body.decode()}")
        return body


def questions(ids: Ids, start: int) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield name, path and query of what is asked."""
    month = {"since": _time(start), "until": _time(start + DAYS * DAY - 1)}
    of_key = {"virtual_key_id": ids.key}
    sums: dict[str, dict[str, str]] = {
        "month": {},
        "month by model": {"group_by": "model"},
        "month by key, model, tag": {"group_by": "key,model,tag"},
        "days by model": {"group_by": "model", "bucket": "day"},
        "days in New York by key, model": {"group_by": "key,model", "bucket": "day", "timezone": "America/New_York"},
        "days in New York of a key": {"bucket": "day", "timezone": "America/New_York", **of_key},
        "days in Kolkata by model": {"group_by": "model", "bucket": "day", "timezone": "Asia/Kolkata"},
        "days in Kathmandu by model": {"group_by": "model", "bucket": "day", "timezone": "Asia/Kathmandu"},
        "hours by project": {"group_by": "project", "bucket": "hour"},
        "hours in Kathmandu by key": {"group_by": "key", "bucket": "hour", "timezone": "Asia/Kathmandu"},
        "hours in Kathmandu": {"bucket": "hour", "timezone": "Asia/Kathmandu"},
        "month by end user": {"group_by": "end_user"},
        "month by end user, key, model": {"group_by": "end_user,key,model"},
        "month of a key by end user": {"group_by": "end_user", **of_key},
        "days in New York by end user": {"group_by": "end_user", "bucket": "day", "timezone": "America/New_York"},
        "days in Kolkata of an end user by model": {
            "group_by": "model", "end_user": "user-7", "bucket": "day", "timezone": "Asia/Kolkata",
        },
        "month of a tag by project": {"group_by": "project", "tag": "tag-3"},
    }  # fmt: skip
    for name, query in sums.items():
        yield f"usage, {name}", "/usage", {**month, **query}
    yield "spend of a key", "/virtual-keys/bench/spend", month
    yield "spend of a budget", f"/budgets/{ids.budget}/spend", {}
    rows = {"all": {}, "of a key": of_key, "of a model": {"model": "model-3"}, "of a tag": {"tag": "tag-3"},
            "of an end user": {"end_user": "user-7"}}  # fmt: skip
    for name, query in rows.items():
        yield f"50 events, {name}", "/spend-events", {**month, **query}


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def ask_all(api: Api, ids: Ids, start: int, rounds: int) -> Iterator[tuple[str, ...]]:
    """Yield a line for each question: the first page of its answer, as a client gets it."""
    for name, path, query in questions(ids, start):
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            body = api.ask(path, query)
            times.append((time.perf_counter() - began) * 1e3)
        spread = Spread.of(times)
        answer = json.loads(body)
        rows = str(len(answer["data"])) if "data" in answer else "1"
        more = "+" if answer.get("next_cursor") else ""
        yield (name, rows + more, "-", format_spread(spread), f"{spread.median:.0f} ms", f"{TO_REACH} ms",
               "yes" if TO_REACH.is_reached(spread.median) else "NO")  # fmt: skip


@attrs.frozen
class Gateways:
    """Two gateways that differ in their ledgers only, and what measures them."""

    programs: Programs
    plan: CorePlan
    folder: Path
    ports: Mapping[str, int]
    secrets: Mapping[str, str]

    def measure(self, name: str, load: Load) -> LoadResult:
        """Call one of them."""
        path = self.folder / f"requests-{name}"
        write_requests(path, build_requests(Prompt(), self.ports[name], self.secrets[name]))
        return Generator(self.programs.load, self.plan.load).run(self.ports[name], path, load)

    def interleave(self, load: Load, rounds: int) -> dict[str, list[LoadResult]]:
        """Measure one after the other, each first in every second round."""
        found: dict[str, list[LoadResult]] = {"empty": [], "full": []}
        for number in range(rounds):
            for name in ("empty", "full") if number % 2 else ("full", "empty"):
                found[name].append(self.measure(name, load))
                _say(f"    {number + 1} {name}: {found[name][-1].latency_us}")
        return found


def admit(gateways: Gateways, title: str, load: Load, rounds: int) -> Iterator[tuple[str, ...]]:
    """Yield lines of p50 and p99 of a call, with an empty ledger and with a full one."""
    found = gateways.interleave(load, rounds)
    if errors := sum(result.errors for list_ in found.values() for result in list_):
        raise RuntimeError(f"{title}: {errors} failed answers")
    figures: dict[str, Callable[[LoadResult], float]] = {
        "p50": lambda result: result.latency_us.p50 / 1000,
        "p99": lambda result: result.latency_us.p99 / 1000,
    }
    for name, figure in figures.items():
        empty, full = ([figure(result) for result in found[ledger]] for ledger in ("empty", "full"))
        compared = f"{format_spread(paired(difference, full, empty))} ms more"
        yield (f"{name} of {title}", "-", format_spread(Spread.of(empty)), format_spread(Spread.of(full)), compared,
               "-", "-")  # fmt: skip


@contextmanager
def asking(folder: Path, port: int, ids: Ids, start: int) -> Iterator[None]:
    """Ask one question after the other for the time of the block."""
    ended = threading.Event()

    def ask() -> None:
        api = Api(folder, port)
        while not ended.is_set():
            for _, path, query in questions(ids, start):
                if not ended.is_set():
                    api.ask(path, query)
                    ended.wait(0.05)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def measure(folder: Path, programs: Programs, plan: CorePlan, rows: int, rounds: int) -> Sequence[tuple[str, ...]]:
    """Fill one of two gateways' ledgers, ask it everything, and call both. Return the lines of the table."""
    start = int(time.time()) - DAYS * DAY
    with ExitStack() as stack:
        stack.enter_context(pinned(plan.runner))
        upstream = stack.enter_context(running_mock(programs.mock, plan.mock))
        ports = {name: free_port() for name in ("empty", "full")}
        served = {name: governed(folder / name, port, upstream, 1) for name, port in ports.items()}
        database = folder / "full" / "penstock.db"
        ids = Ids.read(database)
        fill(database, make_entries(ids, rows, start))
        for name, port in ports.items():
            _run(stack, folder / name, served[name], plan, port)
        gateways = Gateways(programs, plan, folder, ports, {name: each.secret for name, each in served.items()})
        lines = list(ask_all(Api(folder / "full", ports["full"]), ids, start, rounds))
        alone, paced = Load(seconds=3), Load(connections=32, rate=200, seconds=5)
        lines += admit(gateways, "a call, 1 connection", alone, rounds)
        lines += admit(gateways, "a call, 200 per second", paced, rounds)
        with asking(folder / "full", ports["full"], ids, start):
            lines += admit(gateways, "a call, 200 per second, the full ledger being asked", paced, rounds)
        return lines


def _run(stack: ExitStack, folder: Path, served: Served, plan: CorePlan, port: int) -> None:
    log = folder / "output.log"
    program = stack.enter_context(running(served.command, plan.gateway, log))
    wait_for_answer(program, port, build_requests(Prompt(), port, served.secret, 1)[0], log)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _on_terminate)
    gc.set_threshold(10_000, 50, 50)  # as the gateway does
    facts = format_facts(read_facts(find_nginx() or "nginx"))
    with tempfile.TemporaryDirectory(prefix="penstock-rows-") as folder:
        plan = plan_cores(usable_cores())
        lines = measure(Path(folder), compile_programs(), plan, options.rows, options.rounds)
    print(f"{facts}\n{options.rows:,} rows, {options.rounds} rounds, median [least..greatest]\n")
    for line in (HEADINGS, ("---",) * len(HEADINGS), *lines):
        print(f"| {' | '.join(line)} |")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _on_terminate(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)


if __name__ == "__main__":
    main()
