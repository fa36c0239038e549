"""The command line: what it prints where, and with which status it exits."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import NamedTuple

import pytest

from penstock import __version__, hash_key, is_well_formed, new_key
from penstock import cli as command_line

COMMAND = str(Path(sys.executable).with_name("penstock"))
PEPPER = "0123456789abcdef0123456789abcdef"
CONFIG = f"""
[gateway]
listen = "127.0.0.1:0"
plugins = ["virtual_keys", "routing", "mock"]

[plugins.virtual_keys]
pepper = "{PEPPER}"

[[plugins.routing.bindings]]
name = "mock"
type = "mock"
"""
PLUGIN = '''
import click
from penstock import hookimpl

class Greeter:
    """Greet."""

    edits_body = True

    @hookimpl
    def register_commands(self, cli):
        @cli.command()
        def greet():
            """Say hello."""
            click.echo("hello")

    @hookimpl
    def pre_request(self, exchange): ...
'''


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("PENSTOCK_")]:
        monkeypatch.delenv(name)

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


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "penstock.toml"
    file.write_text(CONFIG)
    return file


def test_version(run: Run) -> None:
    assert run("--version").out == f"penstock, version {__version__}\n"


def test_help_lists_commands_of_installed_distributions(run: Run) -> None:
    outcome = run("--help")
    assert outcome.status == 0
    for name in ("check", "demo", "hash-key", "new-key", "plugins", "serve"):
        assert f"\n  {name} " in outcome.out


@pytest.mark.parametrize(
    "arguments",
    [["nope"], ["serve", "--nope"], ["serve", "--workers", "0"], ["plugins", "nope"], ["new-key", "--env", "x"]],
)
def test_wrong_usage_exits_2_and_prints_nothing_on_standard_output(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert "Error: " in outcome.err


@pytest.mark.parametrize("arguments", [["serve"], ["check"], ["plugins", "list"], ["plugins", "show", "routing"]])
def test_missing_file_exits_2_with_one_line(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments, "-c", "none.toml")
    assert outcome == Outcome(2, "", "penstock: none.toml: cannot be read: No such file or directory\n")


# --- check --------------------------------------------------------------------------------------------------


def test_check_accepts_a_good_file(run: Run, config: Path) -> None:
    assert run("check") == Outcome(0, "", "penstock.toml: ok, 3 plugins\n")


def test_check_prints_every_fault_on_a_line_of_its_own(run: Run, config: Path) -> None:
    config.write_text(CONFIG.replace('"mock"]', '"mocks", "./x.py"]').replace("pepper", "peper"))
    outcome = run("check")
    assert (outcome.status, outcome.out) == (2, "")
    lines = outcome.err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("penstock: penstock.toml: [") for line in lines)


@pytest.mark.parametrize(
    ("wrong", "right", "fault"),
    [
        ('"virtual_keys", ', "", "the plugin is not in [gateway] plugins"),
        (PEPPER, "short", "[plugins.virtual_keys] pepper: must be at least 16 characters"),
        (f'pepper = "{PEPPER}"', "", '[plugins.virtual_keys] pepper: is missing; set it, or enable "store"'),
        ('type = "mock"', 'type = "mocc"', "no enabled plugin brings provider type 'mocc'"),
    ],
)
def test_check_finds_what_only_starting_finds(run: Run, config: Path, wrong: str, right: str, fault: str) -> None:
    config.write_text(CONFIG.replace(wrong, right))
    outcome = run("check")
    assert outcome.status == 2
    assert fault in outcome.err
    assert "Traceback" not in outcome.err


def test_nobody_authenticating_is_refused_unless_it_is_meant(run: Run, config: Path) -> None:
    config.write_text('[gateway]\nplugins = ["routing"]\n')
    assert "none of them authenticates" in run("check").err
    config.write_text('[gateway]\nanonymous = true\nplugins = ["routing"]\n')
    assert run("check").status == 0


def test_explain_says_where_each_setting_comes_from(run: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_LOG", "off")
    lines = run("check", "--explain").out.splitlines()
    assert "listen = '127.0.0.1:0'  (file)" in lines
    assert "log = 'off'  (environment)" in lines
    assert "namespace = 'penstock'  (default)" in lines


# --- keys ---------------------------------------------------------------------------------------------------


def test_new_key_prints_one_key(run: Run) -> None:
    outcome = run("new-key", "--env", "test")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith("ps_vk_test_")
    assert is_well_formed(outcome.out.strip().encode())
    assert run("new-key", "--namespace", "langwatch").out.startswith("lw_vk_live_")


def test_new_key_refuses_a_namespace_that_no_gateway_can_have(run: Run) -> None:
    assert run("new-key", "--namespace", "Our Gate").status == 2


def test_hash_key_prints_the_hash_under_the_pepper(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    key = new_key()
    monkeypatch.setenv("PENSTOCK_PEPPER", PEPPER)
    outcome = run("hash-key", stdin=f"{key}\n")
    assert outcome == Outcome(0, hash_key(PEPPER.encode(), key.encode()).hex() + "\n", "")


def test_hash_key_refuses_a_typo_without_repeating_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    key = new_key()[:-1] + "-"
    monkeypatch.setenv("OTHER", PEPPER)
    outcome = run("hash-key", "--pepper-env", "OTHER", stdin=key)
    assert (outcome.status, outcome.out) == (2, "")
    assert key not in outcome.err


def test_hash_key_without_a_pepper_names_the_variable(run: Run) -> None:
    assert "PENSTOCK_PEPPER is not set" in run("hash-key", stdin=new_key()).err


# --- plugins ------------------------------------------------------------------------------------------------


def test_plugins_list_tells_enabled_from_installed(run: Run, config: Path) -> None:
    rows = {row["name"]: row for row in json.loads(run("plugins", "list", "--format", "json").out)}
    assert [name for name in rows if rows[name]["enabled"]] == ["virtual_keys", "routing", "mock"]
    assert rows["routing"]["enabled"] == 2
    assert rows["openai"]["enabled"] is None
    assert rows["virtual_keys"]["hooks"] == ["lifespan", "authenticate"]


def test_plugins_list_works_without_a_configuration(run: Run) -> None:
    outcome = run("plugins", "list")
    assert outcome.status == 0
    assert "virtual_keys" in outcome.out


def test_one_broken_plugin_does_not_hide_the_others(run: Run, config: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    config.write_text(CONFIG.replace('"mock"]', '"mock", "./broken.py"]'))
    rows = {row["name"]: row for row in json.loads(run("plugins", "list", "--format", "json").out)}
    assert "no_such_module" in rows["./broken.py"]["fault"]
    assert rows["routing"]["fault"] is None
    assert "no_such_module" in run("plugins", "list").out.replace("\n", "").replace(" ", "")


def test_plugins_show_prints_hooks_needs_and_settings(run: Run, tmp_path: Path) -> None:
    shown = json.loads(run("plugins", "show", "virtual_keys", "--format", "json").out)
    assert shown["hooks"] == ["lifespan", "authenticate"]
    assert shown["settings"]["pepper"] == "secret"
    assert shown["untouched_path"] is True
    (tmp_path / "greeter.py").write_text(PLUGIN)
    shown = json.loads(run("plugins", "show", "./greeter.py", "--format", "json").out)
    assert (shown["about"], shown["needs"], shown["untouched_path"]) == ("Greet.", ["edits_body"], False)


def test_plugins_show_and_list_say_what_would_never_run(run: Run, config: Path, tmp_path: Path) -> None:
    (tmp_path / "greeter.py").write_text(PLUGIN.replace("pre_request", "pre_reqest"))
    shown = json.loads(run("plugins", "show", "./greeter.py", "--format", "json").out)
    assert shown["fault"] == 'pre_reqest is no hook; did you mean "pre_request"?'
    config.write_text(CONFIG.replace('"mock"]', '"mock", "./greeter.py"]'))
    listed = json.loads(run("plugins", "list", "--format", "json").out)
    assert [row["fault"] for row in listed if row["name"] == "greeter"] == [shown["fault"]]
    assert {row["fault"] for row in listed if row["name"] != "greeter"} == {None}


def test_plugins_show_is_readable_as_text(run: Run) -> None:
    outcome = run("plugins", "show", "routing")
    assert outcome.status == 0
    assert "bindings: list of table" in outcome.out


def test_unknown_plugin_exits_2_with_a_suggestion(run: Run) -> None:
    outcome = run("plugins", "show", "virtual_key")
    assert (outcome.status, outcome.out) == (2, "")
    assert 'did you mean "virtual_keys"?' in outcome.err


def test_enabled_plugin_adds_its_commands(run: Run, config: Path, tmp_path: Path) -> None:
    (tmp_path / "greeter.py").write_text(PLUGIN)
    config.write_text(CONFIG.replace('"mock"]', '"mock", "./greeter.py"]'))
    assert run("greet") == Outcome(0, "hello\n", "")
    config.write_text(CONFIG)
    assert run("greet").status == 2


@pytest.mark.parametrize("value", ["no_such_module:command", "penstock:Secret"])
def test_command_that_cannot_be_loaded_says_so_and_spares_the_others(
    run: Run, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    point = EntryPoint("broken", value, command_line.COMMAND_GROUP)

    def entry_points(*, group: str, name: str | None = None) -> list[EntryPoint]:
        return [point] if group == point.group and name in (None, point.name) else []

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    assert "(cannot be loaded)" in run("--help").out
    outcome = run("broken", "--port", "1")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("penstock: command 'broken'")


# --- serve --------------------------------------------------------------------------------------------------


def test_serve_says_which_address_is_taken(config: Path, tmp_path: Path) -> None:
    with _serving(config, tmp_path) as first:
        port = _port_of(first)
        second = subprocess.run(
            [COMMAND, "serve", "-c", str(config), "--listen", f"127.0.0.1:{port}"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (second.returncode, second.stdout) == (2, "")
        assert f"cannot listen on 127.0.0.1:{port}" in second.stderr
        assert "Traceback" not in second.stderr
        _stop(first)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_answers_and_leaves_with_0_on_a_signal(config: Path, tmp_path: Path, number: int) -> None:
    with _serving(config, tmp_path) as server:
        connection = http.client.HTTPConnection("127.0.0.1", _port_of(server), timeout=30)
        connection.request("GET", "/readyz")
        assert connection.getresponse().status == 200
        connection.close()
        _stop(server, number)


def test_bad_reload_keeps_the_last_good_configuration(config: Path, tmp_path: Path) -> None:
    with _serving(config, tmp_path) as server:
        port = _port_of(server)
        config.write_text("[gateway]\nplugins = 3\n")
        server.send_signal(signal.SIGHUP)
        refused = _wait_for(server, "reload refused")
        assert "must be a list of strings" in str(refused["faults"])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/readyz")
        assert connection.getresponse().status == 200
        connection.close()
        _stop(server)


def _serving(config: Path, folder: Path) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    return subprocess.Popen(
        [COMMAND, "serve", "-c", str(config)], cwd=folder, stderr=subprocess.PIPE,
        env=environment | {"PENSTOCK_LOG": "json"},
    )  # fmt: skip


def _port_of(server: subprocess.Popen[bytes]) -> int:
    return int(str(_wait_for(server, "listening")["port"]))


def _wait_for(server: subprocess.Popen[bytes], event: str) -> dict[str, object]:
    assert server.stderr is not None
    for line in server.stderr:
        found: dict[str, object] = json.loads(line)
        if str(found["event"]).startswith(event):
            return found
    raise AssertionError(f"the gateway ended without {event!r}")


def _stop(server: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
    server.send_signal(number)
    assert server.wait(timeout=60) == 0


BRINGING = """
import attrs
from penstock import OpenAIProvider, Services, hookimpl

@attrs.define
class Bringing:
    services: Services

    @attrs.frozen
    class Config:
        regions: tuple[str, ...]

    config: Config

    @hookimpl
    def register_providers(self):
        return [OpenAIProvider(type=f"acme-{region}") for region in self.config.regions]
"""


def test_plugins_show_prints_the_provider_types_a_plugin_brings(run: Run, config: Path, tmp_path: Path) -> None:
    for name, types in (("openai", ["openai"]), ("mock", ["mock"]), ("virtual_keys", [])):
        assert json.loads(run("plugins", "show", name, "--format", "json").out)["provider_types"] == types
    (tmp_path / "bringing.py").write_text(BRINGING)
    settings = '\n[plugins.bringing]\nregions = ["eu", "us"]\n'
    config.write_text(CONFIG.replace('"mock"]', '"mock", "./bringing.py"]') + settings)
    shown = json.loads(run("plugins", "show", "./bringing.py", "--format", "json").out)
    assert shown["provider_types"] == ["acme-eu", "acme-us"]


def test_plugins_show_leaves_out_provider_types_that_only_settings_could_tell(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bringing.py").write_text(BRINGING)
    outcome = run("plugins", "show", "./bringing.py", "--format", "json")
    assert outcome.status == 0
    assert json.loads(outcome.out)["provider_types"] is None
