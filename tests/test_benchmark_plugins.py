"""The benchmark's rows about plugins: each measures the path it says it does."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPResponse
from importlib.metadata import entry_points
from pathlib import Path

import attrs
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import plugin_rows
from benchmarks.bench import Bench
from benchmarks.build import compile_programs, find_compiler
from benchmarks.gateway import ALL_PLUGINS, ALL_PLUGINS_COMMAND, GOVERNED_PLUGINS, GatewayCommand, Served
from benchmarks.generator import Load, LoadResult
from benchmarks.machine import plan_cores
from benchmarks.nginx import find_nginx
from benchmarks.processes import free_port, running, running_mock, wait_for_answer
from benchmarks.prompts import Prompt, build_requests
from benchmarks.seeding import NEVER

CORES = frozenset(os.sched_getaffinity(0))


@attrs.frozen
class Running:
    """A gateway with every plugin in front of the mock."""

    port: int
    served: Served
    folder: Path

    def ask(self, prompt: Prompt, **members: object) -> tuple[HTTPResponse, bytes]:
        head, _, body = build_requests(prompt, self.port, self.served.secrets[prompt.key], 1)[0].partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if not line.startswith("Content-Length"))
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request("POST", lines[0].split(" ")[1], json.dumps({**json.loads(body), **members}), headers)
            answer = connection.getresponse()
            return answer, answer.read()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if find_compiler() is None:
        pytest.skip("NO C COMPILER: the benchmark's gateway with every plugin is not tested")
    folder = tmp_path_factory.mktemp("all-plugins")
    with running_mock(compile_programs(folder / "build").mock, CORES) as upstream:
        port = free_port()
        served = ALL_PLUGINS_COMMAND.write(folder, port, upstream)
        log = folder / "output.log"
        with running(served.command, CORES, log) as program:
            wait_for_answer(program, port, build_requests(Prompt(), port, served.secret, 1)[0], log)
            yield Running(port, served, folder)


def test_all_plugins_are_those_that_are_bundled() -> None:
    bundled = {each.name for each in entry_points(group="penstock") if each.value.startswith("penstock_plugins.")}
    assert set(ALL_PLUGINS) == bundled
    assert len(ALL_PLUGINS) == len(bundled)


def test_governed_plugins_are_met_in_the_same_order_as_all() -> None:
    assert [name for name in ALL_PLUGINS if name in GOVERNED_PLUGINS] == list(GOVERNED_PLUGINS)


def test_plain_key_has_nothing_of_what_the_other_keys_have(gateway: Running) -> None:
    with closing(sqlite3.connect(gateway.folder / "penstock.db")) as database:
        found = database.execute("SELECT document FROM objects WHERE kind = 'virtual_key'").fetchall()
    keys = {key["name"]: key for key in (json.loads(row[0]) for row in found)}
    assert set(keys) == set(gateway.served.secrets)
    for name in ("bench", "alias", "anthropic"):
        assert not keys[name].get("cache_mode")
        assert not keys[name].get("guardrails")
        assert not any((keys[name].get("policy_rules") or {}).values())


def test_messages_are_translated_there_and_back(gateway: Running) -> None:
    answer, body = gateway.ask(plugin_rows.MESSAGES)
    assert (answer.status, answer.getheader("X-Penstock-Provider")) == (200, "openai")
    message = json.loads(body)
    assert (message["type"], message["stop_reason"]) == ("message", "end_turn")
    assert message["id"].startswith("msg_")
    assert message["model"].startswith("gpt-4o-mini")
    answer, body = gateway.ask(plugin_rows.MESSAGE_STREAM)
    assert answer.status == 200
    assert body.count(b"event: content_block_delta\n") == 200
    assert body.rstrip().endswith(b'data: {"type":"message_stop"}')


def test_guardrail_reads_every_event_and_changes_none(gateway: Running) -> None:
    answer, body = gateway.ask(Prompt(streams=True, key="guarded"))
    assert answer.status == 200
    assert gateway.ask(Prompt(streams=True))[1] == body
    with closing(sqlite3.connect(gateway.folder / "penstock.db")) as database:
        kinds = dict(database.execute("SELECT kind, document FROM objects").fetchall())
    assert json.loads(kinds["guardrail"])["directions"] == ["stream_chunk"]
    assert json.loads(kinds["evaluator"])["settings"] == {"patterns": [NEVER], "action": "redact"}


def test_rules_admit_what_is_measured_and_refuse_what_they_deny(gateway: Running) -> None:
    prompt = Prompt(has_tools=True, key="policed")
    assert gateway.ask(prompt)[0].status == 200
    denied = {"type": "function", "function": {"name": "shell.exec"}}
    answer, _ = gateway.ask(prompt, tools=[denied])
    assert (answer.status, answer.getheader("X-Penstock-Error")) == (403, "tool_not_allowed")
    asked = [{"role": "user", "content": "http://169.example.internal/"}]
    answer, _ = gateway.ask(prompt, messages=asked)
    assert (answer.status, answer.getheader("X-Penstock-Error")) == (403, "url_not_allowed")
    assert gateway.ask(Prompt(has_tools=True), tools=[denied])[0].status == 200


def test_cache_is_disabled_for_one_key_and_respected_for_the_other(gateway: Running) -> None:
    for key, mode in (("uncached", "disable"), ("anthropic", "respect")):
        answer, body = gateway.ask(attrs.evolve(plugin_rows.LONG_MESSAGES, key=key))
        assert (answer.status, answer.getheader("X-Penstock-Cache-Mode")) == (200, mode)
        assert answer.getheader("X-Penstock-Provider") == "anthropic"
        assert json.loads(body)["usage"]["output_tokens"] == 120


# Rows, measured for a moment


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    nginx = find_nginx()
    if nginx is None or find_compiler() is None:
        pytest.skip("NO NGINX OR C COMPILER: rows are not tested")
    cores = sorted(CORES)
    bench = Bench(
        programs=compile_programs(tmp_path / "build"),
        gateway_command=GatewayCommand(is_governed=True),
        nginx=nginx,
        folder=tmp_path,
        plan=plan_cores(cores),
        cores=cores,
        rounds=2,
        is_quick=True,
        say=lambda _line: None,
    )
    with bench.open():
        yield bench


def test_further_gateways_stand_beside_the_one_under_test(bench: Bench) -> None:
    def rate(result: LoadResult) -> float:
        return result.per_second

    assert bench.standing("governed") is bench.standing("gateway")
    assert bench.standing("all-plugins") is not bench.standing("gateway")
    asked = {"policed": ("all-plugins", Prompt(has_tools=True, key="policed")), "plain": ("gateway", Prompt())}
    measured = bench.take_turns(asked, Load(connections=2, count=20), rate)
    assert measured.errors == 0
    assert {name: len(results) for name, results in measured.results.items()} == {"policed": 2, "plain": 2}
    assert {result.requests for results in measured.results.values() for result in results} == {20}
