"""Several processes on one port: announced once all listen, replaced when they crash, ended together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from signal import SIGHUP, SIGKILL, SIGTERM
from typing import Any

import anyio
import pytest

from abused_gateway import BODY, CHAT
from penstock.testing.client import request_bytes
from test_health import Process, children, greet, greeting, write_file

pytestmark = pytest.mark.anyio

PROGRAM = """
import json, os, sys
from pathlib import Path

from penstock.config import read_file
from penstock.serving import serve_forever


def say(event, **fields):
    print(json.dumps({"event": event, **fields}), file=sys.stderr, flush=True)


def read():
    return read_file(Path(sys.argv[1]), {"workers": int(sys.argv[2])})


status = serve_forever(read, lambda port: say("announced", port=port))
pid = os.getpid()
say("returned", children=Path(f"/proc/{pid}/task/{pid}/children").read_text())
sys.exit(status)
"""


@asynccontextmanager
async def supervising(file: Path, workers: int = 2) -> AsyncIterator[Process]:
    """Run a program that serves with workers and says when it was told that they listen."""
    command = [sys.executable, "-c", PROGRAM, str(file), str(workers)]
    async with await anyio.open_process(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as opened:
        process = Process(opened)
        try:
            yield process
        finally:
            await process.close_clients()
            if opened.returncode is None:
                opened.terminate()


def plugged(folder: Path, backend: Any, code: str) -> Path:
    """Write a configuration with one plugin, whose source this is; ``HERE`` is its folder."""
    (folder / "own.py").write_text(IMPORTS + code)
    return write_file(folder, backend, '["./own.py"]')


IMPORTS = """
import json, os, signal, sys
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from penstock import ConfigurationError, Response, hookimpl

HERE = Path(__file__).parent


def is_first(name):
    try:
        os.close(os.open(HERE / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

"""

WAITS = """
class Own:
    @hookimpl
    @asynccontextmanager
    async def lifespan(self):
        if not is_first("first"):
            print("waits", file=sys.stderr, flush=True)
            while not (HERE / "free").exists():
                await anyio.sleep(0.01)
        yield
"""


async def test_port_is_announced_once_every_worker_listens(tmp_path: Path, anyio_backend: Any) -> None:
    async with supervising(plugged(tmp_path, anyio_backend, WAITS)) as process:
        await process.log("waits")
        (tmp_path / "free").touch()
        port = (await process.log("announced"))["port"]
        events = [line["event"] for line in process.lines]
        assert events.count("listening") == 2
        assert {line["port"] for line in process.lines if line["event"] == "listening"} == {port}
        process.signal(SIGTERM)
        assert await process.ended() == 0
        assert [line["event"] for line in process.lines].count("announced") == 1


SLOW = """
class Own:
    @hookimpl
    @asynccontextmanager
    async def lifespan(self):
        if is_first("first"):
            while not (HERE / "free").exists():
                await anyio.sleep(0.01)
            await anyio.sleep(0.1)
            os.write(2, b"freed\\n")
        else:
            os.write(2, b"ready\\n")
        yield
"""


async def test_workers_that_are_ready_first_wait_to_listen_for_the_last(tmp_path: Path, anyio_backend: Any) -> None:
    async with supervising(plugged(tmp_path, anyio_backend, SLOW), workers=3) as process:
        for _ in range(2):
            await process.log("ready")
        (tmp_path / "free").touch()
        await process.log("announced")
        events = [line["event"] for line in process.lines]
        assert events.index("listening") > events.index("freed")


async def test_signal_during_the_start_ends_it(tmp_path: Path, anyio_backend: Any) -> None:
    async with supervising(plugged(tmp_path, anyio_backend, WAITS), workers=2) as process:
        await process.log("waits")
        process.signal(SIGTERM)
        assert await process.ended() == 0
        assert "listening" not in [line["event"] for line in process.lines]


SHARES = """
@asynccontextmanager
async def opening():
    print("waits", file=sys.stderr, flush=True)
    while not (HERE / "free").exists():
        await anyio.sleep(0.01)
    yield


class Own:
    def __init__(self, services):
        self.services = services

    @hookimpl
    @asynccontextmanager
    async def lifespan(self):
        async with self.services.shared.use("own", opening):
            yield
"""


@pytest.mark.parametrize("is_freed", [True, False])
async def test_signal_ends_a_start_that_waits_for_what_plugins_share(
    tmp_path: Path, anyio_backend: Any, is_freed: bool
) -> None:
    async with supervising(plugged(tmp_path, anyio_backend, SHARES), workers=2) as process:
        await process.log("waits")
        process.signal(SIGTERM)
        if is_freed:
            (tmp_path / "free").touch()
        assert await process.ended() == 0


STUCK = """
class Own:
    @hookimpl
    @asynccontextmanager
    async def lifespan(self):
        with anyio.CancelScope(shield=True):
            print("waits", file=sys.stderr, flush=True)
            await anyio.sleep_forever()
        yield
"""


async def test_second_signal_ends_a_start_that_does_not_give_way(tmp_path: Path, anyio_backend: Any) -> None:
    async with supervising(plugged(tmp_path, anyio_backend, STUCK), workers=2) as process:
        await process.log("waits")
        process.signal(SIGTERM)
        await anyio.sleep(0.3)  # two signals at once are one
        process.signal(SIGTERM)
        assert await process.ended() == 0


FORKS = """
import time


class Own:
    @hookimpl
    @asynccontextmanager
    async def lifespan(self):
        if is_first("first"):
            if not os.fork():
                os.setsid()
                time.sleep(30)
                os._exit(0)
            os._exit(1)
        yield
"""


async def test_child_of_a_worker_that_ended_holds_nobody_up(tmp_path: Path, anyio_backend: Any) -> None:
    async with supervising(plugged(tmp_path, anyio_backend, FORKS), workers=2) as process:
        await process.log("announced")
        process.signal(SIGTERM)
        await process.log("returned")


REFUSES = """
class Own:
    @hookimpl
    @asynccontextmanager
    async def lifespan(self):
        if is_first("first"):
            raise ConfigurationError("no such database")
        yield
        print("left", file=sys.stderr, flush=True)
"""


async def test_configuration_fault_of_a_worker_ends_all_with_2_and_announces_nothing(
    tmp_path: Path, anyio_backend: Any
) -> None:
    async with supervising(plugged(tmp_path, anyio_backend, REFUSES), workers=3) as process:
        assert (await process.log("returned"))["children"] == ""
        assert await process.ended() == 2
        events = [line["event"] for line in process.lines]
        assert "announced" not in events
        assert any(event.startswith("penstock: ") and event.endswith("no such database") for event in events)
        assert events.count("left") == 2


CRASHES = """
class Own:
    @hookimpl
    @asynccontextmanager
    async def lifespan(self):
        self.asked = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.crash)
            yield
            tasks.cancel_scope.cancel()

    async def crash(self):
        hidden = "sk-secret"
        await self.asked.wait()
        raise ValueError(hidden)

    @hookimpl
    def pre_request(self, exchange):
        self.asked.set()
        return Response(200, b"1")
"""


async def test_worker_that_crashes_says_why_and_is_replaced_after_growing_pauses(
    tmp_path: Path, anyio_backend: Any
) -> None:
    async with supervising(plugged(tmp_path, anyio_backend, CRASHES)) as process:
        port = (await process.log("announced"))["port"]
        pauses = []
        for _ in range(5):
            client = await process.connect(port)
            await client.send(request_bytes("POST", CHAT, body=BODY))
            failed = await process.log("worker failed")
            assert "in crash" in failed["traceback"]
            assert "sk-secret" not in failed["traceback"]
            ended = await process.log("worker ended")
            assert (ended["pid"], ended["status"]) == (failed["pid"], 1)
            pauses.append(ended["restart_seconds"])
            await process.log("listening")
        # Each of the two has pauses of its own.
        assert pauses.count(0.1) <= 2
        assert max(pauses) in (0.4, 0.8, 1.6)
        process.signal(SIGTERM)
        assert await process.ended() == 0


async def test_worker_that_a_signal_kills_is_named(tmp_path: Path, anyio_backend: Any) -> None:
    async with supervising(greeting(tmp_path, anyio_backend)) as process:
        await process.log("announced")
        victim = children(process.pid)[0]
        os.kill(victim, SIGKILL)
        ended = await process.log("worker ended")
        assert (ended["pid"], ended["status"]) == (victim, -SIGKILL)
        process.signal(SIGTERM)
        assert await process.ended() == 0


async def test_worker_replaced_under_a_bad_file_does_not_end_those_that_serve(
    tmp_path: Path, anyio_backend: Any
) -> None:
    file = greeting(tmp_path, anyio_backend)
    async with supervising(file) as process:
        port = (await process.log("announced"))["port"]
        good = file.read_text()
        file.write_text("nonsense")
        os.kill(children(process.pid)[0], SIGKILL)
        await process.log("worker ended")
        assert (await process.log("worker ended"))["status"] == 2
        assert (await process.ask(port, request_bytes("POST", CHAT, body=BODY), b"POST")).body == b"one"
        file.write_text(good)
        await process.log("listening")
        assert len(children(process.pid)) == 2
        process.signal(SIGTERM)
        assert await process.ended() == 0


async def test_workers_end_gracefully_with_a_supervisor_that_is_killed(tmp_path: Path, anyio_backend: Any) -> None:
    async with supervising(greeting(tmp_path, anyio_backend)) as process:
        await process.log("announced")
        process.signal(SIGKILL)
        for _ in range(2):
            await process.log("draining")
        assert await process.ended() == -SIGKILL


ENDS_SUPERVISOR = """
class Own:
    def __init__(self):
        if is_first("supervisor"):
            os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))

    @hookimpl
    def pre_request(self, exchange):
        return None
"""


async def test_sigterm_between_forks_misses_no_worker(tmp_path: Path, anyio_backend: Any) -> None:
    async with supervising(plugged(tmp_path, anyio_backend, ENDS_SUPERVISOR), workers=4) as process:
        assert (await process.log("returned"))["children"] == ""
        assert await process.ended() == 0


HANGS_UP = """
class Own:
    def __init__(self):
        if (HERE / "supervisor").exists() and is_first(str(os.getpid())):
            os.kill(os.getpid(), signal.SIGHUP)
        is_first("supervisor")

    @hookimpl
    def pre_request(self, exchange):
        return None
"""


async def test_sighup_during_a_workers_start_is_kept_for_it(tmp_path: Path, anyio_backend: Any) -> None:
    async with supervising(plugged(tmp_path, anyio_backend, HANGS_UP)) as process:
        for _ in range(2):
            await process.log("reloaded")
        process.signal(SIGTERM)
        assert await process.ended() == 0
        assert "worker ended" not in [line["event"] for line in process.lines]


async def test_sighup_to_the_supervisor_reaches_workers_only(tmp_path: Path, anyio_backend: Any) -> None:
    async with supervising(greeting(tmp_path, anyio_backend)) as process:
        port = (await process.log("announced"))["port"]
        greet(tmp_path, "two")
        before = children(process.pid)
        process.signal(SIGHUP)
        for _ in range(2):
            await process.log("reloaded")
        assert children(process.pid) == before
        assert (await process.ask(port, request_bytes("POST", CHAT, body=BODY), b"POST")).body == b"two"
        process.signal(SIGTERM)
        assert await process.ended() == 0
