"""The commands of docs/guardrails.md against a running gateway."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_process import PATIENCE_SECONDS, demo
from test_management_cli_commands import Shell

FOLLOWED = 5.0
"""Seconds within which a change is seen by traffic; the contract says two."""


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with demo(tmp_path, "--format", "json") as running:
        yield Shell(tmp_path, running.facts())


def wait_for(shell: Shell, key: str, status: int) -> str:
    """Ask until the answer has a status; returns its error code."""
    ends = time.monotonic() + min(FOLLOWED, PATIENCE_SECONDS)
    while True:
        found, body = shell.call(key, "mock/gpt-5-mini")
        if found == status or time.monotonic() > ends:
            assert found == status, body
            return str(body.get("error", {}).get("code", ""))


def test_guardrail_is_made_attached_judges_and_is_detached(shell: Shell) -> None:
    made = shell.json("virtual-keys", "create", "--name", "app")
    words = '{"patterns": ["Say hello"]}'
    shell.json("evaluators", "create", "--name", "words", "--type", "regex", "--settings", words)
    line = "guardrails create --name no-hello --evaluator words --direction request --direction stream_chunk"
    guardrail = shell.json(*line.split())
    assert wait_for(shell, made["secret"], 200) == ""
    attached = shell.json("guardrails", "attach", "no-hello", "--to", "app", "--fail-closed")
    assert attached["guardrails"] == [{"guardrail_id": guardrail["id"], "fail_open": False}]
    assert wait_for(shell, made["secret"], 403) == "guardrail_blocked"
    again = shell.json("guardrails", "attach", "no-hello", "--to", "app", "--fail-open")
    assert again["guardrails"] == [{"guardrail_id": guardrail["id"], "fail_open": True}]
    assert shell.json("guardrails", "detach", "no-hello", "--from", "app")["guardrails"] == []
    assert wait_for(shell, made["secret"], 200) == ""
    assert shell.run("guardrails", "detach", "no-hello", "--from", "app").status == 2
    assert shell.run("guardrails", "attach", "nothing", "--to", "app").status == 1
    refused = shell.run("evaluators", "create", "--name", "odd", "--type", "piii")
    assert (refused.status, "type" in refused.err) == (1, True)
