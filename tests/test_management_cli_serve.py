"""A served gateway with an embedded store lets the commands of its own user in, and nobody else's."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from demo_process import PATIENCE_SECONDS, PENSTOCK, user

CONFIG = """
[gateway]
listen = "127.0.0.1:0"
log = "json"
plugins = ["store", "virtual_keys", "routing", "mock", "management"]
"""


class Serving:
    """A gateway that serves; its log is read line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def until(self, event: str) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if json.loads(line)["event"] == event:
                return
        raise AssertionError(f"the gateway ended before it said {event!r}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stderr is not None
        self.process.stderr.read()
        return self.process.wait(PATIENCE_SECONDS)


@contextmanager
def serving(home: Path, *arguments: str) -> Iterator[Serving]:
    config = home / "penstock.toml"
    config.write_text(CONFIG)
    command = [str(PENSTOCK), "serve", "-c", str(config), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=user(home)) as process:
        alarm = threading.Timer(2 * PATIENCE_SECONDS, process.kill)
        alarm.start()
        try:
            yield Serving(process)
        finally:
            alarm.cancel()
            if process.poll() is None:
                process.kill()


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PENSTOCK), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=user(home),
        cwd=home,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def runtime_files(home: Path) -> list[Path]:
    return sorted((home / "run" / "penstock" / "run").glob("*.json"))


def test_commands_reach_a_served_gateway_until_it_stops(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway:
        gateway.until("listening")
        assert run(tmp_path, "virtual-keys", "create", "--name", "a").returncode == 0
        gateway.process.send_signal(signal.SIGHUP)
        gateway.until("reloaded")
        assert run(tmp_path, "virtual-keys", "get", "a").returncode == 0
        assert len(runtime_files(tmp_path)) == 1
        assert gateway.stop() == 0
    assert runtime_files(tmp_path) == []
    assert run(tmp_path, "virtual-keys", "list").returncode == 2


def test_workers_of_one_gateway_are_found_as_one(tmp_path: Path) -> None:
    with serving(tmp_path, "--workers", "2") as gateway:
        gateway.until("listening")
        gateway.until("listening")
        for name in ("a", "b", "c"):
            assert run(tmp_path, "teams", "create", "--slug", name).returncode == 0
        listed = run(tmp_path, "teams", "list", "--format", "json")
        assert {"a", "b", "c"} <= {team["slug"] for team in json.loads(listed.stdout)["data"]}
        assert gateway.stop() == 0
    assert runtime_files(tmp_path) == []


def test_what_a_killed_gateway_left_is_removed_and_a_new_one_found(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway:
        gateway.until("listening")
        gateway.process.kill()
        gateway.process.wait(PATIENCE_SECONDS)
    (left,) = runtime_files(tmp_path)
    assert run(tmp_path, "whoami").returncode == 2
    assert not left.exists()
    with serving(tmp_path) as gateway:
        gateway.until("listening")
        assert run(tmp_path, "whoami").returncode == 0
        assert gateway.stop() == 0


def test_a_lost_admin_token_is_made_anew_offline(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway:
        gateway.until("listening")
        assert gateway.stop() == 0
    (tmp_path / "penstock.db.admin-token").unlink()
    with serving(tmp_path) as gateway:
        gateway.until("listening")
        assert run(tmp_path, "whoami").returncode == 2
        made = run(tmp_path, "store", "admin-token")
        assert made.returncode == 0, made.stderr
        gateway.process.send_signal(signal.SIGHUP)
        gateway.until("reloaded")
        assert run(tmp_path, "whoami").returncode == 0
        assert gateway.stop() == 0
