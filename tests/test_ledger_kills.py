"""A process that is killed at any moment: what it had opened is in the ledger once, and nothing it held lives on.

The short form kills twelve times; ``PENSTOCK_TESTS=full`` kills two hundred times.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from accounting_process import COUNTER, START, accounting
from test_counters_processes import IS_FULL, line_of, rows_of, started

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextmanager
def loaded(database: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """Run a process that opens and settles, from its first exchange on."""
    with started("load", database, name) as process:
        assert line_of(process) == "ready"
        yield process


def killed(process: subprocess.Popen[str], after: float) -> tuple[set[str], set[str]]:
    """Kill a process, and return what it said it had opened and settled."""
    time.sleep(after)  # the moment is the point: any
    process.kill()
    output, _ = process.communicate(timeout=20)
    words = [line.split() for line in output.splitlines(keepends=True) if line.endswith("\n")]
    return {word[1] for word in words if word[0] == "opened"}, {word[1] for word in words if word[0] == "settled"}


async def check(database: Path, opened: set[str], settled: set[str]) -> None:
    """Recover, and compare the ledger with what the dead had said."""
    async with accounting(database) as accounts:
        found = {
            entry.request_id: entry
            for entry in await accounts.reader.entries({}, since_ns=0, until_ns=2**62, after=None, limit=10**6)
        }
        assert opened - set(found) == set()
        assert {request_id for request_id in settled if found[request_id].outcome != "success"} == set()
        assert {(each.outcome, each.cost_nano_usd) for each in found.values()} <= {("success", 5), ("interrupted", 7)}
        total = sum(entry.cost_nano_usd for entry in found.values())
        assert await accounts.reader.spent([(COUNTER, START)]) == {(COUNTER, START): total}
        assert [each async for each in accounts.reader.verify()] == []
        assert rows_of(database, "SELECT COUNT(*) FROM holders") == [(1,)]
        assert rows_of(database, "SELECT * FROM leases") == []
        assert accounts.counters.used("concurrency:vk_1", 0) == 0
    assert os.listdir(f"{database}.journal") == []
    assert rows_of(database, "SELECT COUNT(*) - COUNT(DISTINCT request_id) FROM ledger") == [(0,)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(50 if IS_FULL else 3))
async def test_killed_processes_leave_every_exchange_in_the_ledger_once(tmp_path: Path, seed: int) -> None:
    random_ = random.Random(seed)
    database = tmp_path / "penstock.db"
    opened: set[str] = set()
    settled: set[str] = set()
    for round_ in range(2):
        with ExitStack() as stack:
            running = [stack.enter_context(loaded(database, f"{round_}-{number}")) for number in range(2)]
            for process in running:
                news = killed(process, random_.uniform(0.0, 0.3))
                opened |= news[0]
                settled |= news[1]
    assert opened
    await check(database, opened, settled)


async def test_survivor_enters_what_the_dead_left_and_gets_their_money(tmp_path: Path) -> None:
    database = tmp_path / "penstock.db"
    async with accounting(database) as accounts:
        with loaded(database, "dead") as process:
            opened, settled = killed(process, 0.3)
        while await accounts.sweeper.sweep():
            pass
        held = rows_of(database, "SELECT COUNT(*) FROM holders")
        found = await accounts.reader.entries({}, since_ns=0, until_ns=2**62, after=None, limit=10**6)
        assert opened <= {entry.request_id for entry in found}
        assert held == [(1,)]
    await check(database, opened, settled)
