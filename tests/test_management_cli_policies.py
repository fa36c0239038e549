"""Cache rules and policy rules from the command line to the refusal, in a gateway as the demo sets it up."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from demo_process import PATIENCE_SECONDS, demo
from test_management_cli_commands import Shell

SHELL = [{"type": "function", "function": {"name": "shell.exec"}}]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    home = tmp_path_factory.mktemp("home")
    with demo(home, "--format", "json") as process:
        yield Shell(home, process.facts())


def call(shell: Shell, secret: str, **members: Any) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Return status, header fields (lower case) and body of a chat completion."""
    body = json.dumps({"model": "gpt-5-mini", "messages": [{"role": "user", "content": "Hi"}], **members})
    done = subprocess.run(
        ["curl", "-sSi", f"{shell.facts['openai_base_url']}/chat/completions", "-H", f"Authorization: Bearer {secret}",
         "-H", "Content-Type: application/json", "-d", body],
        capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True,
    )  # fmt: skip
    head, _, text = done.stdout.partition("\n\n")
    lines = head.splitlines()
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return int(lines[0].split()[1]), fields, json.loads(text)


def test_preset_refuses_within_two_seconds_and_the_audit_says_so(running: Shell) -> None:
    key = running.json("virtual-keys", "create", "--name", "agents")
    assert call(running, key["secret"], tools=SHELL)[0] == 200
    made = running.json("virtual-keys", "update", "agents", "--policy-preset", "no-shell", "--policy-preset", "no-mcp")
    assert made["policy_rules"]["mcp"] == {"allow": [], "deny": None}
    status, fields, body = call(running, key["secret"], tools=SHELL)
    assert (status, fields["x-penstock-error"]) == (403, "tool_not_allowed")
    assert body["error"]["param"] == "tools[0].function.name"
    assert call(running, key["secret"])[0] == 200

    async def entry() -> dict[str, Any]:
        with anyio.fail_after(PATIENCE_SECONDS):
            while not (found := running.json("audit", "list", "--action", "policyRules:refuse")["data"]):
                await anyio.lowlevel.checkpoint()
        return dict(found[0])

    found = anyio.run(entry)
    assert (found["object_id"], found["request_id"]) == (key["id"], fields["x-penstock-request-id"])
    assert found["after"]["value"] == "shell.exec"


@pytest.mark.parametrize("kind", ["virtual-keys", "routing-policies"])
def test_pattern_that_does_not_compile_cannot_be_saved(running: Shell, kind: str) -> None:
    rules = '{"policy_rules":{"urls":{"deny":["ok","(a)\\\\1"]}}}'
    refused = running.run(kind, "create", "--name", "broken", "--config-json", rules)
    assert refused.status == 1
    assert "policy_rules.urls.deny[1]: is no pattern RE2 compiles: invalid escape sequence" in refused.err
    assert "(a)" in refused.err
    assert running.run(kind, "get", "broken").status == 1


def test_cache_rule_takes_hold_and_goes(running: Shell) -> None:
    key = running.json("virtual-keys", "create", "--name", "batch", "--tag", "batch")
    assert call(running, key["secret"])[1]["x-penstock-cache-mode"] == "respect"
    rule = running.json("cache-rules", "create", "--name", "b", "--mode", "disable", "--key-tag", "batch")
    assert call(running, key["secret"])[1]["x-penstock-cache"] == "bypass"
    assert running.run("cache-rules", "archive", rule["id"], "--yes").status == 0
    assert call(running, key["secret"])[1]["x-penstock-cache-mode"] == "respect"
    running.json("virtual-keys", "update", "batch", "--cache-mode", "force")
    assert call(running, key["secret"])[1]["x-penstock-cache"] == "force"
