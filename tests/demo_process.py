"""Run ``penstock demo`` as a user runs it, and other commands from another terminal of the same user."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PENSTOCK = Path(sys.executable).with_name("penstock")
PATIENCE_SECONDS = 30
PLAIN = {
    name: value
    for name, value in os.environ.items()
    if name not in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_BASE_URL")
    and not name.startswith(("PENSTOCK_", "XDG_"))
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


def user(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a user whose home is ``tmp_path``; what runs elsewhere is not found from there."""
    return {**PLAIN, "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}


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
            env={**user(tmp_path), "TMPDIR": str(temporary), **(env or {})},
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
