"""The benchmark's runner: what it configures, starts, compares and prints."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import sys
import tomllib
from pathlib import Path

import attrs
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import rows, run
from benchmarks.gateway import ALIAS_SECRET, SECRET, GatewayCommand, write_configuration
from benchmarks.machine import CorePlan, order_cores, plan_cores
from benchmarks.nginx import write_nginx_command
from benchmarks.processes import (
    MeasurementError,
    free_port,
    pinned,
    running,
    start,
    stop,
    tree,
    tree_memory,
    wait_for_answer,
)
from benchmarks.prompts import Prompt, build_requests
from benchmarks.report import (
    Goal,
    Row,
    Spread,
    added_ratio,
    difference,
    format_markdown,
    format_number,
    format_spread,
    format_text,
    paired,
    ratio,
)

from penstock import is_well_formed

CORES = frozenset(os.sched_getaffinity(0))


# Requests


def test_requests_differ_in_head_body_and_length_and_are_well_formed() -> None:
    requests = build_requests(Prompt(), 80, SECRET)
    assert len(set(requests)) == len(requests) >= 16
    bodies = []
    for request in requests:
        head, _, body = request.partition(b"\r\n\r\n")
        assert b"Content-Length: %d" % len(body) in head
        assert f"Authorization: Bearer {SECRET}".encode() in head
        bodies.append(body)
    assert len({len(body) for body in bodies}) > 8
    assert all(900 <= len(body) <= 1100 for body in bodies)
    assert {next(iter(json.loads(body))) for body in bodies} == {"model", "messages"}


def test_long_prompts_have_the_stated_size() -> None:
    for request in build_requests(Prompt(body_size=100_000), 80, SECRET, 4):
        assert 98_000 <= len(request) <= 102_000


def test_messages_are_written_as_anthropics_sdk_writes_them() -> None:
    prompt = Prompt(dialect="messages", has_markers=True, streams=True)
    for request in build_requests(prompt, 80, SECRET):
        head, _, body = request.partition(b"\r\n\r\n")
        assert head.startswith(b"POST /v1/messages HTTP/1.1\r\n")
        assert b"anthropic-version: 2023-06-01" in head
        assert f"x-api-key: {SECRET}".encode() in head
        assert b"Content-Length: %d" % len(body) in head
        assert 900 <= len(body) <= 1100
        assert json.loads(body)["stream"] is True
        assert body.count(b'"cache_control"') == 2
    assert b"cache_control" not in build_requests(Prompt(dialect="messages"), 80, SECRET, 1)[0]


def test_bodies_with_tools_have_the_stated_size_and_a_link() -> None:
    for request in build_requests(Prompt(has_tools=True), 80, SECRET):
        body = request.partition(b"\r\n\r\n")[2]
        assert 900 <= len(body) <= 1100
        assert len(json.loads(body)["tools"]) == 2
        assert b"https://" in body


# Configuration


def test_gateway_configuration_names_listener_upstream_and_keys(tmp_path: Path) -> None:
    written = tomllib.loads(write_configuration(tmp_path, 1234, 5678).read_text())
    assert written["gateway"]["listen"] == "127.0.0.1:1234"
    keys = written["plugins"]["virtual_keys"]["keys"]
    assert [key["secret"] for key in keys] == [SECRET, ALIAS_SECRET]
    assert keys[1]["model_aliases"] == {"fast": "gpt-4o-mini"}
    assert written["plugins"]["routing"]["bindings"][0]["base_url"] == "http://127.0.0.1:5678/v1"


@pytest.mark.parametrize("secret", [SECRET, ALIAS_SECRET], ids=["key", "alias"])
def test_keys_have_the_documented_form(secret: str) -> None:
    assert re.fullmatch(r"ps_vk_test_[0-9A-HJKMNP-TV-Z]{26}[0-9A-Za-z]{38}", secret)


def test_gateway_command_fills_in_a_command_of_ones_own(tmp_path: Path) -> None:
    own = GatewayCommand("serve-it --at {port} --to {upstream} 'a b'")
    assert own.write(tmp_path, 1, 2).command == ["serve-it", "--at", "1", "--to", "2", "a b"]
    assert not own.can_choose_workers
    assert GatewayCommand().write(tmp_path, 1, 2, workers=4).command[-2:] == ["--workers", "4"]


def test_governed_gateway_has_budgets_limits_and_prices_on_its_key(tmp_path: Path) -> None:
    served = GatewayCommand(is_governed=True).write(tmp_path, free_port(), free_port())
    assert set(served.secrets) == {"bench", "alias"}
    assert all(is_well_formed(secret.encode()) for secret in served.secrets.values())
    config = tmp_path / "penstock.toml"
    assert served.command[-2:] == ["--config", str(config)]
    for name in ("store", "rate_limits", "prices", "budgets"):
        assert f'"{name}"' in config.read_text()
    with sqlite3.connect(tmp_path / "penstock.db") as database:
        kinds = dict(database.execute("SELECT kind, count(*) FROM objects GROUP BY kind"))
    database.close()
    assert (kinds["budget"], kinds["virtual_key"], kinds["provider_binding"]) == (4, 2, 1)


def test_nginx_is_configured_without_buffering(tmp_path: Path) -> None:
    command = write_nginx_command(tmp_path, "nginx", 1234, 5678)
    written = Path(command[-1]).read_text()
    for line in (
        "listen 127.0.0.1:1234 ",
        "server 127.0.0.1:5678;",
        "proxy_buffering off;",
        "access_log off;",
    ):
        assert line in written
    assert written.count("{") == written.count("}")


# Programs and cores


def test_stop_ends_the_program_and_what_it_started(tmp_path: Path) -> None:
    shell = shutil.which("sh")
    assert shell is not None
    program = start([shell, "-c", "sleep 60 & echo started; wait"], CORES, tmp_path / "log")
    try:
        while not (tmp_path / "log").read_bytes():
            assert program.poll() is None
        members = tree(program.pid)
        assert tree_memory(program.pid).rss > 0
    finally:
        stop(program)
    assert len(members) == 2
    assert program.poll() is not None
    while any(_is_alive(member) for member in members):
        os.sched_yield()  # the kernel ends the group in its own time; the test's time-out bounds it


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_program_that_ends_instead_of_answering_is_reported_with_its_output(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", "import sys; sys.exit('no such setting: listne')"]
    request = build_requests(Prompt(), 1, SECRET, 1)[0]
    with running(command, CORES, log) as program, pytest.raises(MeasurementError, match="listne"):
        wait_for_answer(program, free_port(), request, log)


def test_pinning_ends_with_its_block() -> None:
    core = min(CORES)
    with pinned({core}):
        assert os.sched_getaffinity(0) == {core}
    assert frozenset(os.sched_getaffinity(0)) == CORES


def cores_of(plan: CorePlan) -> list[list[int]]:
    return [sorted(cores) for cores in (plan.gateway, plan.mock, plan.load, plan.runner)]


def test_core_plans_separate_what_they_can() -> None:
    assert cores_of(plan_cores([5])) == [[5], [5], [5], [5]]
    assert cores_of(plan_cores([0, 1])) == [[0], [1], [1], [1]]
    assert cores_of(plan_cores([0, 1, 2])) == [[0], [1], [2], [2]]
    assert cores_of(plan_cores([0, 1, 2, 3])) == [[0], [1], [2], [3]]
    assert cores_of(plan_cores([0, 1, 2, 3], workers=4)) == [[0, 1], [2], [3], [3]]
    assert cores_of(plan_cores(range(8), workers=4)) == [[0, 1, 2, 3], [4], [5], [6, 7]]
    assert [plan_cores(range(count)).is_shared for count in (1, 2, 3, 4)] == [True, True, False, False]


def test_second_threads_of_a_core_come_last() -> None:
    assert order_cores({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}) == [0, 1, 3, 2]


# Figures and tables


def test_comparisons_are_made_within_each_round() -> None:
    spread = paired(ratio, [10, 20, 90], [100, 100, 300])
    assert (spread.median, spread.least, spread.greatest, spread.rounds) == (0.2, 0.1, 0.3, 3)
    assert paired(difference, [5, 7], [1, 1]) == Spread(5, 4, 6, 2)
    assert ratio(1, 0) == float("inf")


def test_added_ratio_compares_medians_and_survives_a_window_without_difference() -> None:
    spread = added_ratio([300, 320, 310], [200, 100, 210], [100, 100, 110])
    assert spread == Spread(2.0, 2.0, 2.0, 3)
    assert added_ratio([300.0], [90.0], [100.0]).median == float("inf")


def test_goals_hold_at_their_limit_and_never_for_infinity() -> None:
    assert Goal(0.28, is_least=True).is_reached(0.28)
    assert not Goal(0.28, is_least=True).is_reached(0.27)
    assert not Goal(0.28, is_least=True).is_reached(float("inf"))
    assert Goal(2.0).is_reached(2.0)
    assert not Goal(2.0).is_reached(2.1)


def test_failed_answers_mean_not_reached() -> None:
    row = Row("1", "n", "t", "u", compared=Spread.of([0.5]), goal=Goal(0.4, is_least=True))
    assert row.is_reached
    assert attrs.evolve(row, errors=1).is_reached is False
    assert attrs.evolve(row, compared=None).is_reached is None
    assert attrs.evolve(row, goal=None).is_reached is None


def test_numbers_are_written_with_three_digits() -> None:
    assert [format_number(value) for value in (31100.4, 99.94, 7.126, -0.2)] == [
        "31,100",
        "99.9",
        "7.13",
        "-0.20",
    ]
    assert format_spread(Spread.of([3, 1, 2])) == "2.00 [1.00..3.00]"
    assert format_spread(Spread.of([3])) == "3.00"


def test_tables_hold_every_figure_and_note() -> None:
    row = Row(
        number="1",
        name="requests",
        title="requests",
        unit="per second",
        figures={"gateway": Spread.of([10_000]), "nginx": Spread.of([30_000])},
        compared=Spread.of([1 / 3]),
        compared_unit="x nginx",
        goal=Goal(0.28, is_least=True),
        notes=("quiet machine",),
    )
    markdown = format_markdown([row]).splitlines()
    assert markdown[2] == "| 1 | requests, per second | 10,000 | 30,000 | - | 0.33 x nginx | ≥ 0.28 x nginx | yes |"
    assert markdown[-1] == "- row 1: quiet machine"
    text = format_text([row])
    assert "0.33 x nginx" in text
    assert text.endswith("  1: quiet machine")


def test_an_unknown_row_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--only", "nonsense"])
    assert "12b alias-splice" in capsys.readouterr().err


def test_rows_about_plugins_are_refused_without_plugins(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--only", "unused-plugins"])
    assert "with --governed also 13 unused-plugins" in capsys.readouterr().err


def test_the_manual_lists_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--help"])
    manual = "".join(capsys.readouterr().out.split())  # lines may end within a name
    assert [name for name in (*run.ROWS, *run.PLUGIN_ROWS) if name.replace(" ", "") not in manual] == []


def test_every_goal_is_for_a_row_of_a_governed_gateway() -> None:
    numbers = {name.partition(" ")[0] for name in (*run.ROWS, *run.PLUGIN_ROWS)}
    assert set(rows.GOVERNED_GOALS) <= numbers
