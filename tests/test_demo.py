"""``penstock demo`` as a user runs it: a process, its output, its exit status."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import stat
import subprocess
import tomllib
from pathlib import Path

import openai
import pytest

from demo_process import PATIENCE_SECONDS, PENSTOCK, PLAIN, demo, run_shell, user
from penstock import display_prefix, hash_key, new_key


def test_table_prints_lines_that_work_when_pasted(tmp_path: Path) -> None:
    assert shutil.which("curl"), "this test pastes the printed curl line"
    with demo(tmp_path) as running:
        text = running.text_until("Ctrl-C")
        curl = re.search(r"^curl .*$", text, re.MULTILINE)
        assert curl is not None
        answer = run_shell(curl[0])
        assert "Say hello." in answer["choices"][0]["message"]["content"]
        made = re.search(r"openai\.OpenAI\(.*\)", text)
        assert made is not None
        with eval(made[0], {"openai": openai}) as client:
            assert client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}]).id
        assert re.search(r"^ *export ANTHROPIC_BASE_URL=http://127.0.0.1:\d+$", text, re.MULTILINE)
        assert re.search(r"^ *export ANTHROPIC_AUTH_TOKEN=ps_vk_live_\w+$", text, re.MULTILINE)
        assert running.stop() == (0, "")


def test_json_is_one_line_and_the_folder_is_gone_afterwards(tmp_path: Path) -> None:
    with demo(tmp_path, "--format", "json") as running:
        facts = running.facts()
        config = Path(facts["config"])
        assert {"base_url", "virtual_key", "model", "config"} <= facts.keys()
        assert facts["providers"] == {"openai": "mock", "anthropic": "mock"}
        assert stat.S_IMODE(config.stat().st_mode) == 0o600
        assert run_shell(facts["curl"])["model"] == facts["model"]
        assert running.stop() == (0, "")
        assert not config.parent.exists()
        assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_interrupt_ends_the_demo_cleanly(tmp_path: Path) -> None:
    with demo(tmp_path, "--format", "json") as running:
        running.facts()
        assert running.stop(signal.SIGINT) == (0, "")


def test_a_given_folder_keeps_key_token_and_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    seen = []
    for _ in range(2):
        with demo(tmp_path, "--format", "json", "--folder", str(folder)) as running:
            facts = running.facts()
            assert run_shell(facts["curl"])["object"] == "chat.completion"
            seen.append((facts["virtual_key"], facts["admin_token"], (folder / "penstock.toml").read_bytes()))
            assert running.stop() == (0, "")
    assert seen[0] == seen[1]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o600}
    assert {"penstock.toml", "virtual-key", "penstock.db"} <= {path.name for path in folder.iterdir()}
    assert seen[0][0].encode() not in seen[0][2]


def test_a_kept_folder_is_served_by_serve_as_well(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with demo(tmp_path, "--format", "json", "--folder", str(folder)) as running:
        running.facts()
        assert running.stop() == (0, "")
    command = [str(PENSTOCK), "check", "-c", str(folder / "penstock.toml")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=user(tmp_path), check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_lost_key_file_is_made_anew_and_the_new_key_works(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    keys = []
    for _ in range(2):
        with demo(tmp_path, "--format", "json", "--folder", str(folder)) as running:
            facts = running.facts()
            keys.append(facts["virtual_key"])
            assert run_shell(facts["curl"])["model"] == facts["model"]
            assert running.stop() == (0, "")
        (folder / "virtual-key").unlink()
    assert keys[0] != keys[1]


def test_keys_in_the_environment_bind_providers_and_are_not_written_in_clear(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    secret = {"OPENAI_API_KEY": "sk-not-in-clear-on-disk"}
    with demo(tmp_path, "--format", "json", "--folder", str(folder), env=secret) as running:
        facts = running.facts()
        assert facts["providers"] == {"openai": "openai", "anthropic": "mock"}
        mocked = facts["curl"].replace('"model":"', '"model":"mock/')
        assert run_shell(mocked)["model"] == facts["model"]
        assert running.stop() == (0, "")
    for path in folder.rglob("*"):
        assert not path.is_file() or b"sk-not-in-clear" not in path.read_bytes()
    with demo(tmp_path, "--format", "json", "--folder", str(folder)) as running:
        assert running.facts()["providers"] == {"openai": "openai", "anthropic": "mock"}
        assert running.stop() == (0, "")


def test_a_stand_in_becomes_the_provider_when_its_key_comes_with_a_later_start(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    seen = []
    for env in ({}, {"ANTHROPIC_API_KEY": "sk-ant-of-a-later-start"}):
        with demo(tmp_path, "--format", "json", "--folder", str(folder), env=env) as running:
            seen.append(running.facts()["providers"])
            assert running.stop() == (0, "")
    assert seen == [{"openai": "mock", "anthropic": "mock"}, {"openai": "mock", "anthropic": "anthropic"}]


def test_a_key_that_differs_from_the_stored_one_is_pointed_out(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    for key, says in (("sk-the-first-of-two", "openai, anthropic"), ("sk-the-second-of-two", "holds another")):
        with demo(tmp_path, "--folder", str(folder), env={"OPENAI_API_KEY": key}) as running:
            text = running.text_until("Ctrl-C")
            assert says in text
            assert key not in text
            assert running.stop() == (0, "")


OLD = """\
[gateway]
plugins = ["virtual_keys", "routing", "mock", "openai", "anthropic"]

[plugins.virtual_keys]
pepper = "{pepper}"

[[plugins.virtual_keys.keys]]
name = "demo"
hash = "{hash}"
prefix = "{prefix}"

[[plugins.routing.bindings]]
name = "mock"
type = "mock"
"""


def test_a_folder_of_the_earlier_layout_works_as_it_did(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    pepper, key = "5" * 64, new_key()
    text = OLD.format(pepper=pepper, hash=hash_key(pepper.encode(), key.encode()).hex(), prefix=display_prefix(key))
    (folder / "penstock.toml").write_text(text)
    (folder / "virtual-key").write_text(key + "\n")
    secret = {"OPENAI_API_KEY": "sk-not-on-disk"}
    for env, openai_by in ((secret, "openai"), ({}, "mock")):
        with demo(tmp_path, "--format", "json", "--folder", str(folder), env=env) as running:
            facts = running.facts()
            assert facts["virtual_key"] == key
            assert facts["providers"] == {"openai": openai_by, "anthropic": "mock"}
            assert (facts["api_url"], facts["admin_token"]) == (None, None)
            assert run_shell(facts["curl"].replace('"model":"', '"model":"mock/'))["model"] == facts["model"]
            assert running.stop() == (0, "")
    bindings = tomllib.loads((folder / "penstock.toml").read_text())["plugins"]["routing"]["bindings"]
    assert [binding["type"] for binding in bindings] == ["mock", "openai"]
    assert bindings[1]["credential"] == {"env": "OPENAI_API_KEY"}
    assert sorted(path.name for path in folder.iterdir()) == ["penstock.toml", "virtual-key"]


def refused(*arguments: str) -> list[str]:
    """Return the lines with which the demo refuses to start."""
    done = subprocess.run(
        [str(PENSTOCK), "demo", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=PLAIN,
        check=False,
    )
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (line,) = refused("--port", str(port))
        assert f"cannot listen on 127.0.0.1:{port}" in line


@pytest.mark.parametrize(
    "content", ["[gateway", "[gateway]\nplugins = 1\n", "plugins = 3\n", "[plugins]\nrouting = []\n"]
)
def test_a_spoilt_folder_is_refused_without_a_traceback(tmp_path: Path, content: str) -> None:
    (tmp_path / "penstock.toml").write_text(content)
    (line,) = refused("--port", "0", "--folder", str(tmp_path))
    assert "virtual-key" in line or "is not valid TOML" in line
    (tmp_path / "virtual-key").write_text("not a key\n")
    assert all(line.startswith("penstock: ") for line in refused("--port", "0", "--folder", str(tmp_path)))
