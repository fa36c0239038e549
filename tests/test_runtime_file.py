"""Runtime files: written whole and private, found while their process lives, removed after it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.runtime_file import RuntimeFile, local_url, running_gateways, runtime_folders

WRITE = """
import sys
from penstock.runtime_file import RuntimeFile
kept = RuntimeFile()
assert kept.put(sys.argv[1], "ps_at_x")
print("written", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "HOME": str(tmp_path / "home")}


@pytest.fixture
def kept() -> Iterator[RuntimeFile]:
    file = RuntimeFile()
    yield file
    file.remove()


def only_here(environment: dict[str, str]) -> list[str]:
    """Return the addresses found in the folders of the test; a real gateway of this user may run beside it."""
    folder = environment["XDG_RUNTIME_DIR"]
    found = running_gateways(environment)
    assert Path(folder, "penstock", "run").is_dir()
    return [gateway.url for gateway in found if gateway.token == "ps_at_x"]


def test_what_is_written_is_found_and_gone_after_removal(environment: dict[str, str], kept: RuntimeFile) -> None:
    path = kept.put("http://127.0.0.1:8080", "ps_at_x", environment)
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert json.loads(path.read_text())["pid"] == os.getpid()
    found = [gateway for gateway in running_gateways(environment) if gateway.token == "ps_at_x"]
    assert [(gateway.url, gateway.port, gateway.pid) for gateway in found] == [
        ("http://127.0.0.1:8080", 8080, os.getpid())
    ]
    assert "ps_at_x" not in repr(found)
    kept.remove()
    assert not path.exists()
    assert only_here(environment) == []


def test_a_file_written_again_takes_the_place_of_the_first(environment: dict[str, str], kept: RuntimeFile) -> None:
    kept.put("http://127.0.0.1:1", "ps_at_x", environment)
    kept.put("http://127.0.0.1:2", "ps_at_x", environment)
    assert only_here(environment) == ["http://127.0.0.1:2"]


def test_the_newest_gateway_comes_first_and_a_killed_one_is_forgotten(
    environment: dict[str, str], kept: RuntimeFile
) -> None:
    command = [sys.executable, "-c", WRITE, "http://127.0.0.1:1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env={**os.environ, **environment}, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == b"written\n"
        kept.put("http://127.0.0.1:2", "ps_at_x", environment)
        assert only_here(environment) == ["http://127.0.0.1:2", "http://127.0.0.1:1"]
        other.kill()
        other.wait(30)
    left = Path(environment["XDG_RUNTIME_DIR"], "penstock", "run", f"{other.pid}.json")
    assert left.exists()
    assert only_here(environment) == ["http://127.0.0.1:2"]
    assert not left.exists()


def test_a_file_open_to_others_is_not_trusted(environment: dict[str, str], kept: RuntimeFile) -> None:
    path = kept.put("http://127.0.0.1:8080", "ps_at_x", environment)
    assert path is not None
    path.chmod(0o644)
    assert only_here(environment) == []


def test_a_link_is_not_followed(environment: dict[str, str], kept: RuntimeFile, tmp_path: Path) -> None:
    path = kept.put("http://127.0.0.1:8080", "ps_at_x", environment)
    assert path is not None
    elsewhere = tmp_path / "elsewhere.json"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert only_here(environment) == []


def test_a_folder_that_cannot_be_made_leaves_it_to_the_next(tmp_path: Path, kept: RuntimeFile) -> None:
    (tmp_path / "file").write_text("")
    environment = {"XDG_RUNTIME_DIR": str(tmp_path / "file"), "HOME": str(tmp_path)}
    path = kept.put("http://127.0.0.1:8080", "ps_at_x", environment)
    assert path == tmp_path / ".local" / "state" / "penstock" / "run" / f"{os.getpid()}.json"


def test_relative_folders_are_passed_over() -> None:
    folders = list(runtime_folders({"XDG_RUNTIME_DIR": "run", "XDG_STATE_HOME": "/state", "HOME": ""}))
    assert folders[0] == Path("/state/penstock/run")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:1"),
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("::", "http://[::1]:1"),
        ("example.org", "http://example.org:1"),
    ],
)
def test_url_is_one_that_a_client_here_can_use(host: str, url: str) -> None:
    assert local_url(host, 1) == url
