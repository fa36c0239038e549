"""``penstock demo`` as a user runs it: a process, its output, its exit status."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

PENSTOCK = Path(sys.executable).with_name("penstock")
PATIENCE_SECONDS = 30
PLAIN = {
    name: value
    for name, value in os.environ.items()
    if name not in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY") and not name.startswith("PENSTOCK_")
}


class Running:
    """A demo that runs; its standard output is read line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def line(self) -> str:
        found = self._lines.get(timeout=PATIENCE_SECONDS)
        assert found is not None, "the demo ended early"
        return found

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.line())
        return found

    def text_until(self, mark: str) -> str:
        text = ""
        while mark not in text:
            text += self.line()
        return text

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Return the exit status, and what else was printed."""
        self.process.send_signal(number)
        status = self.process.wait(PATIENCE_SECONDS)
        self._reader.join()
        rest = []
        while (line := self._lines.get_nowait()) is not None:
            rest.append(line)
        return status, "".join(rest).strip()


@contextmanager
def demo(tmp_path: Path, *arguments: str, env: dict[str, str] | None = None) -> Iterator[Running]:
    command = [str(PENSTOCK), "demo", "--port", "0", *arguments]
    temporary = tmp_path / "tmp"
    temporary.mkdir(exist_ok=True)
    with (
        (tmp_path / "stderr").open("w") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**PLAIN, "TMPDIR": str(temporary), **(env or {})},
        ) as process,
    ):
        running = Running(process)
        try:
            yield running
        finally:
            if process.poll() is None:
                process.kill()
            running._reader.join()


def run_shell(command: str) -> dict[str, Any]:
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


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


def test_a_given_folder_keeps_key_and_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    seen = []
    for _ in range(2):
        with demo(tmp_path, "--format", "json", "--folder", str(folder)) as running:
            facts = running.facts()
            assert run_shell(facts["curl"])["object"] == "chat.completion"
            seen.append((facts["virtual_key"], (folder / "penstock.toml").read_bytes()))
            assert running.stop() == (0, "")
    assert seen[0] == seen[1]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {"penstock.toml": 0o600, "virtual-key": 0o600}
    assert seen[0][0].encode() not in seen[0][1]


def test_keys_in_the_environment_bind_providers_and_are_not_written(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with demo(
        tmp_path, "--format", "json", "--folder", str(folder), env={"OPENAI_API_KEY": "sk-not-on-disk"}
    ) as running:
        facts = running.facts()
        assert facts["providers"] == {"openai": "openai", "anthropic": "mock"}
        mocked = facts["curl"].replace('"model":"', '"model":"mock/')
        assert run_shell(mocked)["model"] == facts["model"]
        assert running.stop() == (0, "")
    text = (folder / "penstock.toml").read_text()
    bindings = tomllib.loads(text)["plugins"]["routing"]["bindings"]
    assert [binding["type"] for binding in bindings] == ["mock", "openai"]
    assert bindings[1]["credential"] == {"env": "OPENAI_API_KEY"}
    assert "sk-not-on-disk" not in text
    with demo(tmp_path, "--format", "json", "--folder", str(folder)) as running:
        facts = running.facts()
        assert facts["providers"] == {"openai": "mock", "anthropic": "mock"}
        assert run_shell(facts["curl"])["model"] == facts["model"]
        assert running.stop() == (0, "")


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
    assert "virtual-key" in line
    (tmp_path / "virtual-key").write_text("not a key\n")
    assert all(line.startswith("penstock: ") for line in refused("--port", "0", "--folder", str(tmp_path)))
