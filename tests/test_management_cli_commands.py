"""The commands of the quick start and all others, from another terminal of the user who runs a demo."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from demo_process import PATIENCE_SECONDS, PENSTOCK, demo, user
from penstock import cli as command_line
from penstock.runtime_file import running_gateways


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


class Shell:
    """Another terminal of the same user."""

    def __init__(self, home: Path, facts: dict[str, Any]) -> None:
        self.home = home
        self.facts = facts
        self.environment = user(home)

    def run(self, *arguments: str, stdin: str = "", **environment: str) -> Outcome:
        """Run a command in this process, which spares a start of the interpreter."""
        out, err, status = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch:
            for name in os.environ:
                patch.delenv(name)
            for name, value in (self.environment | environment).items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["penstock", *arguments])
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    command_line.main()
                except SystemExit as stop:
                    status = int(stop.code or 0)
        return Outcome(status, out.getvalue(), err.getvalue())

    def run_alone(self, *arguments: str, stdin: str = "", **environment: str) -> Outcome:
        """Run a command as its user does: a process of its own."""
        done = subprocess.run(
            [str(PENSTOCK), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            env={**self.environment, **environment},
            check=False,
        )
        assert "Traceback" not in done.stderr
        return Outcome(done.returncode, done.stdout, done.stderr)

    def json(self, *arguments: str, stdin: str = "", **environment: str) -> Any:
        """Return the JSON a command prints, which has nothing to say beside it."""
        outcome = self.run(*arguments, "--format", "json", stdin=stdin, **environment)
        assert outcome.status == 0, outcome.err
        return json.loads(outcome.out)

    def call(self, key: str, model: str = "gpt-5-mini") -> tuple[int, dict[str, Any]]:
        """Return status and body of one chat completion through the gateway."""
        body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}]}
        url = f"{self.facts['openai_base_url']}/chat/completions"
        head = ["-H", f"Authorization: Bearer {key}", "-H", "Content-Type: application/json"]
        done = subprocess.run(
            ["curl", "-sS", "-w", "\n%{http_code}", url, *head, "-d", json.dumps(body)],
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=True,
        )
        text, _, status = done.stdout.rpartition("\n")
        return int(status), json.loads(text)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with demo(tmp_path, "--format", "json") as running:
        yield Shell(tmp_path, running.facts())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """One demo for tests that disturb nobody."""
    home = tmp_path_factory.mktemp("home")
    with demo(home, "--format", "json") as running:
        yield Shell(home, running.facts())


# --- the quick start, as written ----------------------------------------------------------------------------


def test_quick_start_works_as_written_and_ends_in_a_refusal(shell: Shell) -> None:
    line = "providers create --name openai --type openai --api-key-env OPENAI_API_KEY"
    outcome = shell.run_alone(*line.split(), OPENAI_API_KEY="sk-of-the-quick-start-1234")
    assert outcome.status == 0, outcome.err
    assert "gpc_" in outcome.out
    assert "sk-of-the" not in outcome.out + outcome.err

    line = "virtual-keys create --name my-first-vk --env live --provider openai --provider anthropic --format json"
    outcome = shell.run_alone(*line.split())
    assert outcome.status == 0, outcome.err
    made = json.loads(outcome.out)
    assert made["secret"].startswith("ps_vk_live_")
    assert len(made["provider_bindings"]) == 2

    line = "budgets create --scope project --project default --window month --limit 100 --on-breach block"
    outcome = shell.run_alone(*line.split())
    assert outcome.status == 0, outcome.err
    assert "bud_" in outcome.out
    line = (
        "budgets create --scope team --team engineering --window month --limit 5000 --on-breach block "
        "--name engineering-monthly-cap"
    )
    outcome = shell.run_alone(*line.split())
    assert outcome.status == 0, outcome.err

    rules = '{"policy_rules":{"tools":{"deny":["^shell\\\\.exec$","^filesystem\\\\.write$"],"allow":null}}}'
    outcome = shell.run_alone("virtual-keys", "update", made["id"], "--config-json", rules)
    assert outcome.status == 0, outcome.err
    shown = shell.json("virtual-keys", "get", made["id"])
    assert shown["policy_rules"]["tools"]["deny"] == ["^shell\\.exec$", "^filesystem\\.write$"]
    assert "secret" not in shown
    assert shell.run_alone("virtual-keys", "get", made["id"]).status == 0

    line = "budgets create --scope project --project default --window month --limit 0.00001 --on-breach block"
    assert shell.run_alone(*line.split()).status == 0
    key = shell.facts["virtual_key"]
    answers = [shell.call(key, "mock/gpt-5-mini") for _ in range(2)]
    assert answers[-1][0] == 402
    assert answers[-1][1]["error"]["code"] == "budget_exceeded"


def test_secret_of_a_key_comes_out_of_jq_and_works(shell: Shell) -> None:
    jq = shutil.which("jq")
    command = f"'{PENSTOCK}' virtual-keys create --name a --provider anthropic --format json"
    pipe = "jq -r .secret" if jq else "python3 -c 'import json,sys; print(json.load(sys.stdin)[\"secret\"])'"
    done = subprocess.run(
        ["sh", "-c", f"{command} | {pipe}"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=shell.environment,
        check=True,
    )
    assert shell.call(done.stdout.strip())[0] == 200


def test_the_demos_stand_in_gives_way_to_the_real_provider_for_keys_that_name_it(shell: Shell) -> None:
    key = shell.json("virtual-keys", "create", "--name", "k", "--provider", "openai", "--provider", "anthropic")
    line = ("providers", "create", "--name", "openai", "--type", "openai", "--api-key-env", "KEY")
    real = shell.json(*line, "--base-url", "http://127.0.0.1:1/v1", KEY="sk-of-this-test-0001")
    assert (real["name"], real["type"], real["credential_last4"]) == ("openai", "openai", "0001")
    again = shell.json("virtual-keys", "get", key["id"])
    assert again["provider_bindings"] == [real["id"], key["provider_bindings"][1]]
    names = [row["name"] for row in shell.json("providers", "list")["data"]]
    assert sorted(names) == ["anthropic", "mock", "openai"]

    same = shell.run(*line, KEY="sk-of-this-test-0001")
    assert same.status == 0
    assert "is there already" in same.err
    other = shell.run(*line, KEY="sk-of-this-test-0002")
    assert (other.status, other.out) == (1, "")
    assert other.err.count("\n") == 1
    assert "providers update openai" in other.err
    assert "sk-of" not in other.err


def test_a_binding_made_from_the_environment_does_not_fail_the_quick_start(tmp_path: Path) -> None:
    key = {"OPENAI_API_KEY": "sk-in-the-environment-7777"}
    with demo(tmp_path, "--format", "json", env=key) as running:
        shell = Shell(tmp_path, running.facts())
        assert shell.facts["providers"] == {"openai": "openai", "anthropic": "mock"}
        line = "providers create --name openai --type openai --api-key-env OPENAI_API_KEY"
        outcome = shell.run(*line.split(), **key)
        assert outcome.status == 0, outcome.err
        assert "gpc_" in outcome.out


# --- everything else ----------------------------------------------------------------------------------------


def test_whoami_says_who_and_how_the_gateway_was_found(shared: Shell) -> None:
    outcome = shared.run("whoami")
    assert outcome.status == 0
    assert shared.facts["base_url"] in outcome.err
    assert shared.facts["admin_token"] not in outcome.out + outcome.err


def test_login_keeps_address_and_token_for_later(shared: Shell, tmp_path: Path) -> None:
    elsewhere = user(tmp_path)
    url, token = shared.facts["base_url"], shared.facts["admin_token"]
    assert shared.run("whoami", **elsewhere).status == 2
    outcome = shared.run("login", "--url", url, stdin=f"{token}\n", **elsewhere)
    assert outcome.status == 0, outcome.err
    assert token not in outcome.out + outcome.err
    assert shared.run("whoami", **elsewhere).status == 0
    refused = shared.run("login", "--url", url, stdin="ps_at_wrong\n", **elsewhere)
    assert (refused.status, refused.out) == (1, "")
    assert shared.run("whoami", **elsewhere).status == 0


@pytest.mark.parametrize(
    ("group", "create", "change"),
    [
        ("organizations", ["--slug", "o1"], ["--name", "n"]),
        ("teams", ["--slug", "t1"], ["--name", "n"]),
        ("projects", ["--slug", "p1", "--team", "default"], ["--name", "n"]),
        ("users", ["--slug", "u1", "--email", "u@example.org"], ["--name", "n"]),
        ("service-accounts", ["--slug", "s1", "--project", "default"], ["--name", "n"]),
        ("groups", ["--slug", "g1", "--member", "default"], ["--name", "n"]),
        ("providers", ["--name", "b1", "--type", "mock", "--rpm", "5"], ["--priority", "7"]),
        (
            "virtual-keys",
            ["--name", "v1", "--tag", "a", "--budget-limit", "1", "--budget-window", "day"],
            ["--rpm", "3"],
        ),
        (
            "budgets",
            ["--scope", "project", "--project", "default", "--window", "day", "--limit", "1"],
            ["--limit", "2"],
        ),
        ("routing-policies", ["--name", "r1", "--entry", "mock:2"], ["--strategy", "weighted"]),
        ("cache-rules", ["--name", "c1", "--mode", "force", "--ttl", "300"], ["--priority", "3"]),
        ("evaluators", ["--name", "e1", "--type", "pii", "--settings", "{}"], ["--settings", '{"kinds": ["email"]}']),
        ("webhooks", ["--name", "w1", "--post-to", "https://example.org/hook"], ["--no-enabled"]),
    ],
)
def test_objects_are_made_listed_changed_and_archived(
    shared: Shell, group: str, create: list[str], change: list[str]
) -> None:
    made = shared.json(group, "create", *create)
    assert made["id"] in shared.run(group, "get", made["id"]).out
    assert made["id"] in [row["id"] for row in shared.json(group, "list", "--all")["data"]]
    assert made["id"] in shared.run(group, "list", "--all").out
    changed = shared.json(group, "update", made["id"], *change, "--if-match", str(made["version"]))
    assert changed["version"] == made["version"] + 1
    stale = shared.run(group, "update", made["id"], *change, "--if-match", "77")
    assert (stale.status, stale.out, stale.err.count("\n")) == (1, "", 1)
    assert shared.run(group, "archive", made["id"]).status == 2
    assert shared.run(group, "archive", made["id"], "--yes").status == 0
    assert made["id"] not in [row["id"] for row in shared.json(group, "list", "--all")["data"]]


def test_guardrails_name_their_evaluator(shared: Shell) -> None:
    evaluator = shared.json("evaluators", "create", "--name", "e2", "--type", "pii")
    made = shared.json("guardrails", "create", "--name", "g2", "--evaluator", "e2", "--direction", "request")
    assert made["evaluator_id"] == evaluator["id"]


def test_a_key_is_disabled_enabled_rotated_and_revoked(shared: Shell) -> None:
    made = shared.json("virtual-keys", "create", "--name", "life")
    assert shared.json("virtual-keys", "disable", "life")["status"] == "disabled"
    assert shared.json("virtual-keys", "enable", "life")["status"] == "active"
    rotated = shared.json("virtual-keys", "rotate", "life")
    assert rotated["id"] == made["id"]
    assert rotated["secret"] != made["secret"]
    assert shared.run("virtual-keys", "rotate", "life", "--grace", "0").status == 2
    table = shared.run("virtual-keys", "rotate", "life", "--grace", "0", "--yes")
    assert table.status == 0
    assert "Keep the secret now" in table.err
    assert shared.run("virtual-keys", "revoke", "life").status == 2
    assert shared.json("virtual-keys", "revoke", "life", "--yes")["status"] == "revoked"
    assert shared.json("virtual-keys", "spend", "life")["virtual_key_id"] == made["id"]


def test_a_team_that_is_not_there_is_one_line_with_a_way_out(shared: Shell) -> None:
    outcome = shared.run("budgets", "create", "--scope", "team", "--team", "nobody", "--window", "day", "--limit", "1")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == (
        "penstock: --team: there is no team 'nobody' in sight; 'penstock teams list' shows those there are, "
        "'penstock teams create' makes one\n"
    )


def test_a_path_stands_wherever_a_slug_does(shared: Shell) -> None:
    for team in ("paths-a", "paths-b"):
        shared.json("teams", "create", "--slug", team)
        project = shared.json("projects", "create", "--slug", "same", "--team", team)
        where = ("--project", f"{team}/same")
        bot = shared.json("service-accounts", "create", "--slug", "bot", *where)
        key = shared.json("virtual-keys", "create", "--name", "same", *where, "--principal", f"{team}/same/bot")
        assert (key["project_id"], key["principal_id"]) == (project["id"], bot["id"])
        assert [found["id"] for found in shared.json("virtual-keys", "list", *where)["data"]] == [key["id"]]
        budgets = [
            shared.json("budgets", "create", "--scope", scope, f"--{scope}", path, "--window", "day", "--limit", "1")
            for scope, path in (
                ("project", f"{team}/same"),
                ("virtual-key", f"{team}/same/same"),
                ("principal", f"{team}/same/bot"),
            )
        ]
        assert [found["scope_id"] for found in budgets] == [project["id"], key["id"], bot["id"]]
        binding = shared.json("providers", "create", "--name", "same", "--type", "mock", *where)
        assert binding["scope_id"] == project["id"]
        assert shared.json("projects", "get", f"{team}/same") == project
        assert shared.json("virtual-keys", "disable", f"{team}/same/same")["status"] == "disabled"
        assert shared.run("usage", *where).status == 0
        user = shared.json("users", "create", "--slug", f"{team}-ann", "--role", f"developer:{team}/same")
        assert user["roles"][0]["scope_id"] == project["id"]
    refused = shared.run("projects", "get", "same")
    assert "default/paths-a/same" in refused.err


def test_an_unknown_member_is_refused_by_its_name(shared: Shell) -> None:
    outcome = shared.run("virtual-keys", "create", "--name", "x", "--config-json", '{"tag": ["a"]}')
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (1, "", 1)
    assert 'tag: unknown member; did you mean "tags"?' in outcome.err


def test_spending_is_told_refunded_and_verified(shell: Shell) -> None:
    key = shell.json("virtual-keys", "create", "--name", "spender", "--budget-limit", "1", "--budget-window", "month")
    budget = shell.json("budgets", "list", "--scope", "virtual-key")["data"][0]
    assert shell.call(key["secret"])[0] == 200
    events: list[dict[str, Any]] = []
    while not events:
        events = shell.json("spend-events", "list", "--virtual-key", key["id"])["data"]
    assert events[0]["cost_nano_usd"] > 0
    assert shell.json("spend-events", "get", events[0]["request_id"]) == events[0]
    assert shell.json("budgets", "spend", budget["id"])["spent_usd"] == events[0]["cost_usd"]
    rows = shell.json("usage", "--group-by", "key", "--group-by", "model", "--bucket", "month")["data"]
    assert [row["cost_usd"] for row in rows if row["group"]["key"] == key["id"]] == [events[0]["cost_usd"]]
    assert "gpt-5-mini" in shell.run("usage", "--group-by", "model").out
    assert shell.run("spend-events", "refund", events[0]["request_id"]).status == 2
    given_back = shell.json("spend-events", "refund", events[0]["request_id"], "--yes", "--reason", "test")
    assert given_back["cost_nano_usd"] == -events[0]["cost_nano_usd"]
    assert shell.json("ledger", "verify") == {"ok": True, "discrepancies": []}
    assert shell.run("ledger", "verify").status == 0
    assert shell.run("budgets", "reset", budget["id"], "--yes").status == 0


def test_prices_are_set_and_shown(shared: Shell) -> None:
    line = "prices set --provider mock --model own-* --input 1.5 --output 6 --cache-read 0.15"
    made = shared.json(*line.split())
    assert made["rates_usd"]["input"] == "1.5"
    assert made["id"] in [row["id"] for row in shared.json("prices", "list")["data"]]
    assert (
        shared.json("prices", "list", "--provider", "openai", "--model", "gpt-5-mini")["data"][0]["rates"]["input"] > 0
    )


def test_tokens_are_made_used_and_revoked(shared: Shell) -> None:
    made = shared.json("tokens", "create", "--name", "ci", "--role", "viewer", "--organization", "default")
    token = {"PENSTOCK_URL": shared.facts["base_url"], "PENSTOCK_TOKEN": made["secret"]}
    assert shared.run("virtual-keys", "list", **token).status == 0
    refused = shared.run("virtual-keys", "create", "--name", "no", **token)
    assert (refused.status, refused.out) == (1, "")
    assert "virtualKeys:create" in refused.err
    assert shared.json("tokens", "revoke", "ci", "--yes")["revoked"] is True
    assert shared.json("tokens", "get", "ci")["revoked"] is True
    refused = shared.run("whoami", **token)
    assert refused.status == 1
    assert made["secret"] not in refused.err
    archived = shared.json("tokens", "archive", "ci", "--yes")
    assert archived["revoked"] is True
    assert archived["archived_at"] is not None


def test_audit_is_listed_and_exported_line_by_line(shared: Shell) -> None:
    made = shared.json("virtual-keys", "create", "--name", "audited")
    listed = shared.json("audit", "list", "--object", made["id"])["data"]
    assert [entry["action"] for entry in listed] == ["virtualKeys:create"]
    exported = [json.loads(line) for line in shared.run("audit", "export").out.splitlines()]
    assert listed[0] in exported
    assert made["secret"] not in json.dumps(exported)


def test_pages_follow_one_another_and_say_so(shared: Shell) -> None:
    for number in range(3):
        shared.json("teams", "create", "--slug", f"page-{number}")
    first = shared.run("teams", "list", "--limit", "2", "--format", "json")
    page = json.loads(first.out)
    assert len(page["data"]) == 2
    assert f"--cursor {page['next_cursor']}" in first.err
    second = shared.json("teams", "list", "--limit", "2", "--cursor", page["next_cursor"])
    assert {row["id"] for row in second["data"]}.isdisjoint(row["id"] for row in page["data"])
    everything = shared.json("teams", "list", "--limit", "2", "--all")
    assert len(everything["data"]) >= 4
    assert everything["next_cursor"] is None


def test_what_is_exported_can_be_applied_and_changes_nothing(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "store.json"
    file.write_text(json.dumps(shell.json("export")))
    done = shell.json("apply", "-f", str(file))
    assert {change["action"] for change in done["changes"]} <= {"unchanged"}


def test_apply_shows_a_diff_first_and_then_does_it(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "team.toml"
    file.write_text('[[teams]]\nslug = "applied"\norganization = "default"\n')
    assert "create" in shell.run("apply", "-f", str(file), "--dry-run").out
    assert "applied" not in shell.run("teams", "list").out
    assert shell.run("apply", "-f", str(file)).status == 0
    assert "applied" in shell.run("teams", "list").out
    assert shell.json("apply", "-f", "-", stdin=file.read_text())["changes"][0]["action"] == "unchanged"


def test_apply_shows_the_secret_of_a_key_it_made(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "key.toml"
    file.write_text('[[virtual_keys]]\nname = "applied"\n')
    assert "ps_vk_" not in shell.run("apply", "-f", str(file), "--dry-run").out
    made = shell.run("apply", "-f", str(file))
    assert re.search(r"\bps_vk_live_\w{64}\b", made.out)
    assert "not shown again" in made.err
    assert "ps_vk_" not in shell.run("apply", "-f", str(file)).out


def test_spend_of_an_allowance_each_is_shown_by_subject(shared: Shell) -> None:
    key = shared.json("virtual-keys", "create", "--name", "visited")
    scope = ("--scope", "end-user", "--virtual-key", key["id"], "--window", "day", "--limit", "1")
    budget = shared.json("budgets", "create", *scope)
    assert "subject" in shared.run("budgets", "spend", budget["id"]).err
    assert shared.json("budgets", "spend", budget["id"], "--subject", "ada")["spent_usd"] == "0"


def test_a_test_of_the_mock_reports_that_it_answers(shared: Shell) -> None:
    assert shared.json("providers", "test", "mock")["ok"] is True


def test_creating_twice_under_one_idempotency_key_makes_one(shared: Shell) -> None:
    line = ["virtual-keys", "create", "--name", "once", "--idempotency-key", "k-1"]
    assert shared.json(*line) == shared.json(*line)


def test_nothing_is_left_for_others_to_find_once_the_demo_has_stopped(tmp_path: Path) -> None:
    with demo(tmp_path, "--format", "json") as running:
        shell = Shell(tmp_path, running.facts())
        assert shell.run("whoami").status == 0
        (file,) = (tmp_path / "run" / "penstock" / "run").glob("*.json")
        assert running.stop() == (0, "")
        assert not file.exists()
        outcome = shell.run("whoami")
        assert outcome.status == 2
        assert "penstock demo" in outcome.err


def test_of_several_gateways_the_newest_is_meant_unless_a_port_is_given(tmp_path: Path) -> None:
    with demo(tmp_path, "--format", "json") as first, demo(tmp_path, "--format", "json") as second:
        older, newer = first.facts(), second.facts()
        shell = Shell(tmp_path, older)
        latest = max(running_gateways(shell.environment), key=lambda gateway: gateway.started_at_ns)
        assert latest.url in (older["base_url"], newer["base_url"])
        assert latest.url in shell.run("whoami").err
        for facts in (older, newer):
            port = facts["base_url"].rpartition(":")[2]
            assert facts["base_url"] in shell.run("whoami", "--port", port).err
        outcome = shell.run("whoami", "--port", "1")
        assert outcome.status == 2
        assert "running: " in outcome.err
