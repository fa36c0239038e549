"""The commands of the management plane before they ask: options, secrets, where the gateway is, what is printed."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from penstock import ConfigurationError
from penstock import cli as command_line
from penstock.runtime_file import RuntimeFile
from penstock_plugins.management_cli import output
from penstock_plugins.management_cli.budgets import BUDGETS
from penstock_plugins.management_cli.fields import Field, SecretField, body_of, pairs, parameters, usd
from penstock_plugins.management_cli.profile import Access, checked_url, find_access, read_profile, write_profile

TOKEN = "ps_at_of-the-test"


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command as a user to whom no gateway is known."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("PENSTOCK_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))

    def call(*arguments: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["penstock", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = 0
        try:
            command_line.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


def given(fields: tuple[Field | SecretField, ...], verb: str, *arguments: str) -> dict[str, object]:
    """Return the body that options make."""
    command = click.Command(verb, params=parameters(fields, verb))
    with command.make_context(verb, list(arguments)) as context:
        return body_of(fields, context.params)


# --- options ------------------------------------------------------------------------------------------------

FIELDS = (
    Field("--name", "name", is_required=True),
    Field("--limit", "limit_usd", read=usd),
    Field("--rpm", "rate_limits.rpm", type=int),
    Field("--tpm", "rate_limits.tpm", type=int),
    Field("--tag", "tags", is_many=True),
    Field("--metadata", "metadata", is_many=True, read=pairs),
    Field("--enabled", "enabled", type=bool),
    SecretField("api-key", "credential", "the key"),
)


def test_only_what_is_given_is_in_the_body() -> None:
    assert given(FIELDS, "create", "--name", "a") == {"name": "a"}
    assert given(FIELDS, "update") == {}


def test_dotted_members_make_objects_and_repeated_options_lists() -> None:
    body = given(FIELDS, "update", "--rpm", "1", "--tpm", "2", "--tag", "a", "--tag", "b", "--metadata", "k=v=w")
    assert body == {"rate_limits": {"rpm": 1, "tpm": 2}, "tags": ["a", "b"], "metadata": {"k": "v=w"}}


def test_switches_can_be_turned_off() -> None:
    assert given(FIELDS, "update", "--no-enabled") == {"enabled": False}


def test_config_json_is_put_beside_the_options_and_keeps_null() -> None:
    text = '{"policy_rules":{"tools":{"deny":["^shell\\\\.exec$"],"allow":null}},"rate_limits":{"tpm":5}}'
    assert given(FIELDS, "update", "--rpm", "1", "--config-json", text) == {
        "rate_limits": {"rpm": 1, "tpm": 5},
        "policy_rules": {"tools": {"deny": ["^shell\\.exec$"], "allow": None}},
    }


def test_config_json_can_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text('{"a": 1}')
    assert given(FIELDS, "update", "--config-json", f"@{tmp_path / 'more.json'}") == {"a": 1}


def test_clear_sets_null() -> None:
    assert given(FIELDS, "update", "--clear", "expires_at", "--clear", "rate_limits.rpm") == {
        "expires_at": None,
        "rate_limits": {"rpm": None},
    }


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--config-json", "{"], "is no JSON"),
        (["--config-json", "[]"], "must be an object"),
        (["--config-json", "@none"], "cannot be read"),
        (["--rpm", "1", "--config-json", '{"rate_limits":{"rpm":2}}'], "rate_limits.rpm is given by an option too"),
        (["--rpm", "1", "--clear", "rate_limits"], "the same command sets it"),
        (["--limit", "ten"], "--limit: must be an amount in USD"),
        (["--limit", "0.0000000001"], "no more than nine decimal places"),
        (["--metadata", "k"], "'k' is not NAME=VALUE"),
        (["--metadata", "k=1", "--metadata", "k=2"], "'k' is given twice"),
    ],
)
def test_wrong_values_are_usage_errors_that_name_the_option(arguments: list[str], fault: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        given(FIELDS, "update", *arguments)
    assert fault in caught.value.message


# --- secrets ------------------------------------------------------------------------------------------------


def test_secrets_come_from_the_environment_a_file_or_standard_input(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-1\n")
    (tmp_path / "key").write_text("sk-2\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("sk-3\n"))
    assert given(FIELDS, "update", "--api-key-env", "SOME_KEY") == {"credential": "sk-1"}
    assert given(FIELDS, "update", "--api-key-file", str(tmp_path / "key")) == {"credential": "sk-2"}
    assert given(FIELDS, "update", "--api-key-file", "-") == {"credential": "sk-3"}


def test_a_secret_in_place_of_its_variable_is_not_repeated() -> None:
    with pytest.raises(click.UsageError) as caught:
        given(FIELDS, "update", "--api-key-env", "sk-secret")
    assert "sk-secret" not in caught.value.message


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE: that variable is not set here"),
        (["--api-key-file", "/no/such/file"], "cannot be read"),
        (["--api-key-file", os.devnull], "is empty"),
    ],
)
def test_a_secret_that_is_not_there_is_a_line_of_configuration(arguments: list[str], fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault):
        given(FIELDS, "update", *arguments)


# --- where the gateway is -----------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}


def test_options_win_over_environment_over_profile_over_what_runs_here(
    environment: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("ps_at_file\n")
    here = RuntimeFile()
    try:
        here.put("http://127.0.0.1:1", "ps_at_here", environment)
        found = find_access(port=1, environment=environment)
        assert (found.url, found.token) == ("http://127.0.0.1:1", "ps_at_here")
        write_profile("http://127.0.0.1:2", "ps_at_profile", environment)
        assert find_access(environment=environment).token == "ps_at_profile"
        assert find_access(port=1, environment=environment).token == "ps_at_here"
        environment |= {"PENSTOCK_URL": "http://127.0.0.1:3/", "PENSTOCK_TOKEN": "ps_at_env"}
        found = find_access(environment=environment)
        assert (found.url, found.token) == ("http://127.0.0.1:3", "ps_at_env")
        found = find_access(url="http://127.0.0.1:4", token_file=str(file), environment=environment)
        assert (found.url, found.token) == ("http://127.0.0.1:4", "ps_at_file")
    finally:
        here.remove()


def test_a_token_goes_to_no_address_it_was_not_given_for(environment: dict[str, str]) -> None:
    write_profile("http://127.0.0.1:2", "ps_at_profile", environment)
    with pytest.raises(ConfigurationError, match=r"no token for http://127\.0\.0\.1:9"):
        find_access(url="http://127.0.0.1:9", environment=environment)
    assert find_access(url="http://127.0.0.1:2", environment=environment).token == "ps_at_profile"


def test_no_gateway_says_how_to_name_one(run: Run, tmp_path: Path) -> None:
    outcome = run("virtual-keys", "list", "--url", "http://127.0.0.1:9")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("penstock: --url: no token for http://127.0.0.1:9; set PENSTOCK_TOKEN")
    outcome = run("virtual-keys", "list", "--port", "1")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8080", "ftp://x", "http://", "http://u:p@x", "http://x?y=1", "http://x:0", "http://x:port"]
)
def test_what_is_no_address_is_refused_by_the_name_of_its_origin(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^PENSTOCK_URL: "):
        checked_url(url, "PENSTOCK_URL")


def test_the_api_may_be_given_as_address(environment: dict[str, str]) -> None:
    assert checked_url("https://gate.example/sub/api/v1/", "--url") == "https://gate.example/sub"


def test_a_profile_is_private_and_one_open_to_others_is_refused(environment: dict[str, str]) -> None:
    path = write_profile("http://127.0.0.1:2", TOKEN, environment)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_profile(environment) == Access("http://127.0.0.1:2", TOKEN, str(path))
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="is open to other users"):
        read_profile(environment)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"url": 1, "token": "x"}', '{"url": "http://x"}'])
def test_a_spoilt_profile_says_so_without_its_content(environment: dict[str, str], content: str) -> None:
    path = write_profile("http://127.0.0.1:2", TOKEN, environment)
    path.write_text(content)
    with pytest.raises(ConfigurationError, match="is no profile; run 'penstock login' again"):
        read_profile(environment)


@pytest.mark.parametrize("text", ["", "two words", "café", "x" * 5000])
def test_what_is_no_token_is_not_sent(environment: dict[str, str], tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(ConfigurationError, match="holds no api token"):
        find_access(url="http://x", token_file=str(tmp_path / "token"), environment=environment)


# --- usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["budgets", "create", "--window", "month", "--limit", "1"],
        ["budgets", "create", "--scope", "galaxy", "--window", "month", "--limit", "1"],
        ["budgets", "create", "--scope", "project", "--team", "x", "--window", "month", "--limit", "1"],
        ["budgets", "create", "--scope", "end-user", "--team", "x", "--window", "month", "--limit", "1"],
        ["providers", "create", "--name", "x"],
        ["virtual-keys", "update", "vk_1"],
        ["virtual-keys", "archive", "vk_1"],
        ["virtual-keys", "rotate", "vk_1", "--grace", "0"],
        ["virtual-keys", "list", "--limit", "201"],
        ["tokens", "revoke", "tok_1"],
        ["usage", "--group-by", "colour"],
        ["apply"],
    ],
)
def test_wrong_usage_exits_2_before_anything_is_asked(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert "Error: " in outcome.err


def test_what_destroys_needs_yes_where_nobody_can_be_asked(run: Run) -> None:
    assert "add --yes" in run("budgets", "reset", "bud_1").err


def test_an_address_where_nobody_listens_is_one_line_and_status_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_TOKEN", TOKEN)
    outcome = run("whoami", "--url", "http://127.0.0.1:1")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == "penstock: http://127.0.0.1:1 (from --url) cannot be asked: Connection refused\n"


def test_apply_refuses_a_file_that_is_neither_toml_nor_json(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("= 1")
    outcome = run("apply", "-f", "x.toml")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("penstock: x.toml: is no valid TOML")


# --- what is printed ----------------------------------------------------------------------------------------


def test_tables_leave_out_empty_columns_and_say_what_they_cut(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "bud_" + "0" * 80, "name": "x" * 80, "note": None, "models": ["a", "b"]},
        {"id": "bud_1", "name": "[red]y", "note": None, "models": []},
    ]
    output.print_table(rows, output.columns("id", "name", "note", "models"), empty="no budgets")
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["id", "name", "models"]
    assert lines[1].split() == ["bud_" + "0" * 80, "x" * 59 + "…", "a,", "b"]
    assert lines[2].split() == ["bud_1", "[red]y"]
    assert captured.err == "… marks what is cut; --format json shows all of it\n"


def test_an_empty_list_is_a_note_and_no_output(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table([], output.columns("id"), empty="no budgets")
    assert capsys.readouterr() == ("", "no budgets\n")


def test_values_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_facts({"name": "a\x1b[2Jb\rc", "limit_usd": "0.10", "enabled": False, "gone": None})
    assert capsys.readouterr().out.split() == ["name", "a\ufffd[2Jb\ufffdc", "limit_usd", "0.10", "enabled", "no"]


def test_json_is_printed_as_the_api_spelled_it(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json(b'{"limit_nano_usd":9000000000000000001,"rate":1.10,"name":"\xc3\xa9"}')
    text = capsys.readouterr().out
    assert '"limit_nano_usd": 9000000000000000001' in text
    assert '"rate": 1.10' in text
    assert json.loads(text)["name"] == "é"


def test_every_resource_shows_its_id_whole() -> None:
    assert next(column for column in BUDGETS.columns if column.title == "id").is_whole


def test_a_terminal_too_narrow_for_a_line_gets_every_value_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    rows = [{"id": "bud_" + "0" * 26, "name": name * 70} for name in "ab"]
    output.print_table(rows, output.columns("id", "name"), empty="")
    captured = capsys.readouterr()
    assert captured.out.count("bud_" + "0" * 26) == 2
    assert (captured.out.count("a"), captured.out.count("b") - 2) == (70 + 2, 70)
    assert "…" not in captured.out + captured.err


def test_members_that_hold_only_nulls_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_facts({"rate_limits": {"rpm": None}, "policy_rules": {"tools": {"deny": None}}, "count": 0})
    assert capsys.readouterr().out.split() == ["count", "0"]
