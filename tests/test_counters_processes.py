"""Several processes that share counters: together they spend what there is, to the last unit, and never more."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from accounting_process import COUNTER, START, accounting

PROGRAM = Path(__file__).with_name("accounting_process.py")
IS_FULL = os.environ.get("PENSTOCK_TESTS") == "full"

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run the program beside this one, and end it whatever happens."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def rows_of(database: Path, statement: str) -> list[tuple[int, ...]]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(statement).fetchall()


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize(("limit", "amount"), [(0, 1), (7, 1), (997, 1), (1000, 7)])
async def test_processes_spend_exactly_what_there_is(tmp_path: Path, processes: int, limit: int, amount: int) -> None:
    database = tmp_path / "penstock.db"
    with ExitStack() as stack:
        running = [
            stack.enter_context(started("spend", database, f"p{number}", limit, amount, 4))
            for number in range(processes)
        ]
        assert [line_of(process) for process in running] == ["ready"] * processes
        for process in running:
            tell(process)
        found = [json.loads(line_of(process)) for process in running]
        for process in running:
            tell(process)
            assert process.wait(20) == 0
    assert sum(each["granted"] for each in found) == limit // amount * amount
    async with accounting(database) as accounts:
        spent = await accounts.reader.spent([(COUNTER, START)])
        assert spent[COUNTER, START] == limit // amount * amount
        assert [each async for each in accounts.reader.verify()] == []
    assert rows_of(database, "SELECT * FROM leases") == []
    slowest = max(second for each in found for second in each["refusals"])
    assert slowest < 1.5
