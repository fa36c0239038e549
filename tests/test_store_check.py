"""``penstock check`` on a configuration with a store: it says what a start would, and leaves nothing behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.cli import main

Check = Callable[..., tuple[int, str]]
CONFIG = """
[gateway]
listen = "127.0.0.1:0"
plugins = ["store", "virtual_keys", "routing", "mock"]

[plugins.store]
url = "sqlite:///{database}"
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    def run(database: str = "penstock.db") -> tuple[int, str]:
        (tmp_path / "penstock.toml").write_text(CONFIG.format(database=database))
        monkeypatch.setattr(sys, "argv", ["penstock", "check", "-c", str(tmp_path / "penstock.toml")])
        status = 0
        try:
            main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, capsys.readouterr().err

    return run


def test_check_makes_no_database(check: Check, tmp_path: Path) -> None:
    status, printed = check()
    assert status == 0
    assert "ok, 4 plugins" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["penstock.toml"]


def test_check_makes_no_folders_either(check: Check, tmp_path: Path) -> None:
    assert check("deep/er/penstock.db")[0] == 0
    assert not (tmp_path / "deep").exists()


def test_check_says_where_no_database_can_be(check: Check, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, complaints = check("file/penstock.db")
    assert status == 2
    assert "[plugins.store] url: " in complaints
    assert f"{os.sep}file is no folder" in complaints
