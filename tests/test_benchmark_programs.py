"""The benchmark's C programs: what the mock upstream says, what the load generator counts."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import attrs
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.build import Programs, compile_programs, find_compiler
from benchmarks.gateway import SECRET
from benchmarks.generator import Generator, Load
from benchmarks.processes import (
    MeasurementError,
    free_port,
    running_mock,
    tree,
)
from benchmarks.prompts import Prompt, build_requests, write_requests

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CORES = frozenset(os.sched_getaffinity(0))


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    if find_compiler() is None:
        pytest.skip("NO C COMPILER: the benchmark's mock and load generator are not tested")
    return compile_programs(tmp_path_factory.mktemp("build"))


@pytest.fixture
def mock_port(programs: Programs) -> Iterator[int]:
    with running_mock(programs.mock, CORES) as port:
        yield port


@attrs.define
class ScriptedServer:
    """Answers each request on its connection with what `answer(number)` returns, numbers counting from 0."""

    answer: Callable[[int], bytes]
    piece: int = 65536  # bytes per write
    listener: socket.socket = attrs.field(factory=lambda: socket.create_server(("127.0.0.1", 0), backlog=64))
    requests: list[bytes] = attrs.field(factory=list)
    lock: threading.Lock = attrs.field(factory=threading.Lock)
    threads: list[threading.Thread] = attrs.field(factory=list)

    @property
    def port(self) -> int:
        port: int = self.listener.getsockname()[1]
        return port

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self.converse, args=(connection,))
            thread.start()
            self.threads.append(thread)

    def converse(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, connection.makefile("rb") as stream:
            try:
                while request := self.read_request(stream.readline, stream.read):
                    with self.lock:
                        number = len(self.requests)
                        self.requests.append(request)
                    answer = self.answer(number)
                    for start in range(0, len(answer), self.piece):
                        connection.sendall(answer[start : start + self.piece])
                    if b"Connection: close" in answer:
                        return
            except OSError:
                return

    def read_request(self, readline: Callable[[], bytes], read: Callable[[int], bytes]) -> bytes:
        head = b""
        while line := readline():
            head += line
            if line == b"\r\n":
                break
        if not head:
            return b""
        length = re.search(rb"\r\nContent-Length: (\d+)\r\n", head)
        return head + read(int(length[1]) if length else 0)

    def __enter__(self) -> ScriptedServer:
        self.threads.append(threading.Thread(target=self.serve))
        self.threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join(10)


def ask(port: int, body: dict[str, object], path: str = "/v1/chat/completions") -> tuple[str, bytes]:
    with closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("POST", path, json.dumps(body))
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.getheader("Content-Type", ""), answer.read()


def events_of(content: bytes) -> list[bytes]:
    assert content.endswith(b"\n\n")
    return [event.removeprefix(b"data: ") for event in content.split(b"\n\n")[:-1]]


def requests_for(folder: Path, port: int, count: int = 32) -> Path:
    return write_requests(folder / "requests", build_requests(Prompt(), port, SECRET, count))


# The mock upstream


def test_mock_answers_json_of_about_the_stated_size(mock_port: int) -> None:
    kind, content = ask(mock_port, {"model": "m", "messages": []})
    assert kind == "application/json"
    assert 1000 <= len(content) <= 1400
    answer = json.loads(content)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["total_tokens"] == 339


def test_mock_answers_messages_where_they_are_asked_for(mock_port: int) -> None:
    kind, content = ask(mock_port, {"model": "m", "messages": []}, "/v1/messages")
    assert kind == "application/json"
    assert 1000 <= len(content) <= 1400
    answer = json.loads(content)
    assert (answer["type"], answer["content"][0]["type"]) == ("message", "text")
    assert (answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]) == (219, 120)


@pytest.mark.parametrize("wants_usage", [False, True])
def test_mock_streams_200_events_and_usage_only_when_asked(mock_port: int, wants_usage: bool) -> None:
    body = {"stream": True, "stream_options": {"include_usage": wants_usage}}
    kind, content = ask(mock_port, body)
    assert kind.startswith("text/event-stream")
    *chunks, done = events_of(content)
    assert done == b"[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    texts = [chunk["choices"][0]["delta"]["content"] for chunk in parsed[:200]]
    assert texts == [f" token{number}" for number in range(200)]
    assert parsed[200]["choices"][0]["finish_reason"] == "stop"
    assert [bool(chunk.get("usage")) for chunk in parsed[201:]] == ([True] if wants_usage else [])


def test_mock_stamps_paced_events_in_order_and_not_before_their_time(mock_port: int) -> None:
    before = time.monotonic_ns()
    _, content = ask(mock_port, {"stream": True, "metadata": {"pace_ms": "5", "events": "4"}})
    *chunks, _stop, _done = events_of(content)
    texts = [json.loads(chunk)["choices"][0]["delta"]["content"] for chunk in chunks]
    stamps = [int(text.strip("@")) for text in texts]
    assert len(stamps) == 4
    assert stamps == sorted(stamps)
    assert stamps[0] >= before
    assert all(stamp - stamps[0] >= 5_000_000 * number for number, stamp in enumerate(stamps))


def test_mock_answers_long_pipelined_and_chunked_requests_on_one_connection(mock_port: int) -> None:
    long = build_requests(Prompt(body_size=100_000), mock_port, SECRET, 2)
    chunked = b'POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nf\r\n{"stream": false\r\n1\r\n}\r\n0\r\n\r\n'
    with socket.create_connection(("127.0.0.1", mock_port), timeout=10) as connection:
        connection.sendall(b"".join([*long, chunked]))
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while received.count(b"HTTP/1.1 200 OK") < 3 or not received.endswith(b"}\n"):
            piece = connection.recv(65536)
            assert piece, "the connection ended before three answers"
            received += piece
    assert received.count(b'"chat.completion"') == 3


# The load generator


@pytest.mark.parametrize("load", [Load(connections=7, count=100), Load(connections=3, rate=500, count=40)])
def test_generator_sends_exactly_the_requests_asked_for(programs: Programs, tmp_path: Path, load: Load) -> None:
    with ScriptedServer(lambda _: OK) as server:
        result = Generator(programs.load, CORES).run(server.port, requests_for(tmp_path, server.port), load)
    assert (result.requests, result.started, result.errors) == (load.count, load.count, 0)
    assert len(server.requests) == load.count
    assert result.latency_us.count == load.count
    assert result.content_bytes == 2 * load.count


def test_generator_rotates_among_all_prepared_requests(programs: Programs, tmp_path: Path) -> None:
    with ScriptedServer(lambda _: OK) as server:
        path = requests_for(tmp_path, server.port, 16)
        Generator(programs.load, CORES).run(server.port, path, Load(count=32))
        prepared = build_requests(Prompt(), server.port, SECRET, 16)
    assert server.requests == prepared * 2


def test_generator_percentiles_are_those_of_known_delays(programs: Programs, tmp_path: Path) -> None:
    """Events stamped 1 s … 100 s in the past have known ages; the half second is for a slow machine."""

    def answer(_: int) -> bytes:
        now = time.monotonic_ns()
        content = b"".join(b"data: @%d@\n\n" % (now - age * 10**9) for age in range(1, 101))
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)

    with ScriptedServer(answer) as server:
        path = requests_for(tmp_path, server.port)
        delay = Generator(programs.load, CORES).run(server.port, path, Load(count=1, reads_events=True))
    seen = delay.event_delay_us
    assert seen.count == 100
    for measured, expected in [
        (seen.p50, 50),
        (seen.p90, 90),
        (seen.p99, 99),
        (seen.min, 1),
        (seen.max, 100),
    ]:
        assert expected * 0.992 <= measured / 1e6 <= expected * 1.008 + 0.5


def test_generator_latency_includes_the_servers_delay_and_only_where_it_was(programs: Programs, tmp_path: Path) -> None:
    def answer(number: int) -> bytes:
        if number % 4 == 0:
            time.sleep(0.05)  # the delay to be measured
        return OK

    with ScriptedServer(answer) as server:
        path = requests_for(tmp_path, server.port)
        result = Generator(programs.load, CORES).run(server.port, path, Load(count=40))
    assert result.latency_us.p90 >= 49_000
    assert result.latency_us.min < result.latency_us.p90
    assert result.latency_us.p50 <= result.latency_us.p90 <= result.latency_us.p99 <= result.latency_us.max


def test_open_loop_latency_counts_from_the_scheduled_time(programs: Programs, tmp_path: Path) -> None:
    """One connection, due every 10 ms, answered after 30 ms: the fifth is at least 110 ms late."""

    def answer(_: int) -> bytes:
        time.sleep(0.03)  # the delay to be measured
        return OK

    with ScriptedServer(answer) as server:
        path = requests_for(tmp_path, server.port)
        result = Generator(programs.load, CORES).run(server.port, path, Load(rate=100, count=5))
    assert result.latency_us.max >= 109_000
    assert result.started_late >= 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\ntoo long",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n2\r\nokX\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n2\r\nok\r\n",
    ],
    ids=["status", "cut short", "too long", "broken chunk", "no last chunk"],
)
def test_generator_counts_wrong_answers_as_errors(programs: Programs, tmp_path: Path, answer: bytes) -> None:
    with ScriptedServer(lambda number: answer if number % 2 else OK) as server:
        path = requests_for(tmp_path, server.port)
        result = Generator(programs.load, CORES).run(server.port, path, Load(count=10))
    assert (result.errors, result.requests) == (5, 5)


def test_generator_reads_every_framing_cut_anywhere(programs: Programs, tmp_path: Path) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nA: b\r\n\r\n"
    until_close = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabcde"
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcde"
    answers = [chunked, until_close, interim]
    with ScriptedServer(lambda number: answers[number % 3], piece=1) as server:
        path = requests_for(tmp_path, server.port)
        result = Generator(programs.load, CORES).run(server.port, path, Load(count=9))
    assert (result.errors, result.requests, result.content_bytes) == (0, 9, 45)


def test_generator_reports_a_server_that_is_not_there(programs: Programs, tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(MeasurementError, match="refused"):
        Generator(programs.load, CORES).run(port, requests_for(tmp_path, port), Load(count=3))


def test_generator_holds_streams_open_until_told_otherwise(programs: Programs, mock_port: int, tmp_path: Path) -> None:
    prompt = Prompt(streams=True, pace_ms=1000, events=100)
    path = write_requests(tmp_path / "requests", build_requests(prompt, mock_port, SECRET))
    generator = Generator(programs.load, CORES)
    with generator.holding(mock_port, path, Load(connections=20, seconds=60)):
        members = tree(os.getpid())
    assert len(members) > len(tree(os.getpid()))


def test_generator_and_mock_agree_on_streams(programs: Programs, mock_port: int, tmp_path: Path) -> None:
    prompt = Prompt(streams=True, pace_ms=1, events=10)
    path = write_requests(tmp_path / "requests", build_requests(prompt, mock_port, SECRET))
    load = Load(connections=4, count=12, reads_events=True)
    result = Generator(programs.load, CORES).run(mock_port, path, load)
    assert (result.requests, result.errors) == (12, 0)
    assert result.event_delay_us.count == 120
    assert result.first_byte_us.count == 12
    assert result.latency_us.min >= 10_000
