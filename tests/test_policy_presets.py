"""The presets of policy rules: what they refuse and what they leave, on the command line too."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from click.testing import CliRunner

from penstock import PatternRules, PolicyRules, RequestError
from penstock_plugins.management.rules import check_rules
from penstock_plugins.management_cli.keys import virtual_keys
from penstock_plugins.management_cli.presets import PRESETS, rules_of
from penstock_plugins.policy_rules.judging import judge_body
from penstock_plugins.policy_rules.patterns import compile_rules

REFUSED = {
    "no-shell": ["shell.exec", "bash", "Bash", "run_command", "local_shell", "shell_command", "code_interpreter",
                 "bash_20250124", "mcp__desktop__execute_command", "codeExecution", "terminal"],
    "no-file-writes": ["filesystem.write", "write_file", "Edit", "Write", "MultiEdit", "str_replace_based_edit_tool",
                       "text_editor_20250728", "apply_patch", "delete_file"],
    "no-web": ["web_search", "web_search_20250305", "WebFetch", "googleSearch", "url_context", "browser_navigate",
               "web_search_options", "computer_use_preview", "fetch"],
    "no-tools": ["anything"],
    "read-only": ["bash", "Write"],
}  # fmt: skip
ADMITTED = {
    "no-shell": ["get_weather", "Read", "shelf_life", "execution_report", "Write", "publish"],
    "no-file-writes": ["read_file", "Read", "bash", "credit_check", "list_directory"],
    "no-web": ["get_weather", "prefetch_rows", "Read", "bash"],
    "read-only": ["Read", "Grep", "get_weather"],
    "no-mcp": ["bash"],
}
INTERNAL = ["http://localhost:8000/x", "https://169.254.169.254/latest", "http://10.1.2.3", "http://user@127.0.0.1/",
            "http://192.168.0.1?x", "http://172.20.1.1/", "http://[::1]/", "http://2130706433/", "https://db.internal/",
            "http://LOCALHOST./"]  # fmt: skip
EXTERNAL = ["https://example.com/10.0.0.1", "https://localhost.example.com/", "http://172.32.0.1/", "https://1.1.1.1/"]


def judge(preset: str, body: dict[str, Any]) -> None:
    kinds = {
        kind: PatternRules(**{side: tuple(patterns) for side, patterns in sides.items()})
        for kind, sides in rules_of([preset]).items()
    }
    compiled = compile_rules(PolicyRules(**kinds), "vk_1", "virtual key")
    assert compiled is not None
    judge_body(json.dumps(body).encode(), [compiled])


@pytest.mark.parametrize(("preset", "tool"), [(name, tool) for name, tools in REFUSED.items() for tool in tools])
def test_preset_refuses(preset: str, tool: str) -> None:
    with pytest.raises(RequestError):
        judge(preset, {"tools": [{"name": tool}]})


@pytest.mark.parametrize(("preset", "tool"), [(name, tool) for name, tools in ADMITTED.items() for tool in tools])
def test_preset_admits(preset: str, tool: str) -> None:
    judge(preset, {"tools": [{"type": "function", "function": {"name": tool}}]})


@pytest.mark.parametrize("url", INTERNAL)
def test_internal_urls_are_refused(url: str) -> None:
    with pytest.raises(RequestError):
        judge("no-internal-urls", {"x": f"look at {url} please"})


@pytest.mark.parametrize("url", EXTERNAL)
def test_external_urls_are_admitted(url: str) -> None:
    judge("no-internal-urls", {"x": f"look at {url} please"})


def test_no_mcp_refuses_every_server() -> None:
    with pytest.raises(RequestError):
        judge("no-mcp", {"mcp_servers": [{"name": "a"}]})


@pytest.mark.parametrize("name", PRESETS)
def test_preset_can_be_saved(name: str) -> None:
    kinds = {kind: PatternRules(**sides) for kind, sides in PRESETS[name].rules.items()}  # type: ignore[arg-type]
    rules = PolicyRules(**kinds)
    check_rules(rules)
    assert attrs.asdict(rules) != attrs.asdict(PolicyRules())


def test_presets_together_refuse_what_each_refuses() -> None:
    both = rules_of(["no-shell", "no-web", "no-mcp"])
    assert both["tools"]["deny"] == [
        *PRESETS["no-shell"].rules["tools"]["deny"],
        *PRESETS["no-web"].rules["tools"]["deny"],
    ]
    assert both["mcp"] == {"allow": []}


def test_presets_are_listed_without_a_gateway() -> None:
    listed = CliRunner().invoke(virtual_keys, ["presets", "--format", "json"])
    assert listed.exit_code == 0
    assert {row["name"] for row in json.loads(listed.output)["data"]} == set(PRESETS)
    assert "no-shell" in CliRunner().invoke(virtual_keys, ["presets"]).output
    refused = CliRunner().invoke(virtual_keys, ["update", "k", "--policy-preset", "no-such"])
    assert refused.exit_code == 2
