"""Start, pin, watch and end the programs of a benchmark run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import attrs

STOP_SECONDS = 5.0
POLL_SECONDS = 0.001


class MeasurementError(Exception):
    """Something under measurement did not start, answer or finish."""


@attrs.frozen
class Memory:
    """Resident memory of a process tree in bytes; pages shared between processes count once in `pss`."""

    rss: int
    pss: int


@contextmanager
def pinned(cores: Set[int]) -> Iterator[None]:
    """Let programs started inside inherit these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def start(command: Sequence[str], cores: Set[int], log: Path) -> subprocess.Popen[bytes]:
    """Start a program in its own process group, with its output in the log file."""
    with pinned(cores), log.open("ab") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)


def stop(program: subprocess.Popen[bytes]) -> None:
    """End a program and whatever is left of its process group."""
    program.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            program.wait(STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.wait(STOP_SECONDS)


@contextmanager
def running(command: Sequence[str], cores: Set[int], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the time of the block."""
    program = start(command, cores, log)
    try:
        yield program
    finally:
        stop(program)


@contextmanager
def running_mock(program: Path, cores: Set[int]) -> Iterator[int]:
    """Run the mock upstream for the time of the block; yield its port."""
    with (
        pinned(cores),
        subprocess.Popen([program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as mock,
    ):
        try:
            assert mock.stdout is not None
            yield int(mock.stdout.readline())
        finally:
            mock.kill()


def free_port() -> int:
    """Find a port on the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_answer(
    program: subprocess.Popen[bytes], port: int, request: bytes, log: Path, seconds: float = 20.0
) -> None:
    """Ask again and again until the answer is 200.

    Args:
        request: a whole POST request, head and body.

    Raises:
        MeasurementError: the program ended or gave no 200 in time; the text ends with its last output.
    """
    end = time.monotonic() + seconds
    last = "no connection"
    while time.monotonic() < end:
        if program.poll() is not None:
            last = f"it ended with {program.returncode}"
            break
        try:
            status, body = _ask(port, request)
        except (OSError, HTTPException) as error:
            last = str(error)
        else:
            if status == 200:
                return
            last = f"it answered {status}: {body[:300].decode(errors='replace')}"
        time.sleep(POLL_SECONDS)
    output = log.read_text(errors="replace")[-1500:] if log.exists() else ""
    raise MeasurementError(f"not ready: {last}\n{output}")


def wait_for_listeners(port: int, count: int, seconds: float = 10.0) -> None:
    """Wait until as many sockets listen on a port: workers that share it share the connections made from then on.

    Raises:
        MeasurementError: they did not in time.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if _listeners(port) >= count:
            return
        time.sleep(POLL_SECONDS)
    raise MeasurementError(f"{count} workers do not listen")


def _listeners(port: int) -> int:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


def _ask(port: int, request: bytes) -> tuple[int, bytes]:
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    method, path, _ = lines[0].split(" ")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def tree_memory(pid: int) -> Memory:
    """Add up the resident memory of a process and all its descendants (from smaps_rollup)."""
    rss = pss = 0
    for member in tree(pid):
        try:
            text = Path(f"/proc/{member}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        values = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
        rss += int(values["Rss"]) * 1024
        pss += int(values["Pss"]) * 1024
    return Memory(rss=rss, pss=pss)


def tree(pid: int) -> list[int]:
    """List a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # The second field is the program's name in parentheses and may hold anything.
        parent = int(text.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(path.parent.name))
    members = [pid]
    for member in members:
        members.extend(children.get(member, ()))
    return members
