"""Policy rules over a real socket: what is refused on which endpoint, before any upstream byte, and what is entered."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from governed_gateway import Governed, answer, governed
from penstock import (
    Candidate,
    ConfigurationError,
    Exchange,
    PatternRules,
    PolicyRules,
    ProviderBinding,
    Services,
    hookimpl,
)
from penstock.governance.objects import RoutingPolicy
from penstock.testing import FakeUpstream, Harness, Reply, check_plugin, http_reply
from penstock.testing.harness import BINDINGS, PEPPER
from penstock.testing.samples import SAMPLES, Sample
from penstock_plugins.policy_rules import Policies

pytestmark = pytest.mark.anyio
BODIES = tuple(sample for sample in SAMPLES if sample.body)
JSON = tuple(sample for sample in BODIES if sample.content_type == b"application/json")
FORMS = tuple(sample for sample in BODIES if sample.content_type != b"application/json")
CHAT = "/v1/chat/completions"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def harness(
    rules: Mapping[str, Any],
    *,
    key: Mapping[str, Any] | None = None,
    upstream: FakeUpstream | Sequence[FakeUpstream] | None = None,
    bindings: Sequence[Mapping[str, Any]] = BINDINGS,
    plugins: Sequence[Any] = (),
) -> Harness:
    """Return a gateway whose key has these rules."""
    given = FakeUpstream([answer], repeat=True) if upstream is None else upstream
    names = ["virtual_keys", "routing", ("policy_rules", Policies), *plugins]
    made = Harness(names, upstream=given, socket=True, bindings=bindings)
    table = {"name": "test", "secret": made.key, "policy_rules": rules, **(key or {})}
    made._config["virtual_keys"] = {"pepper": PEPPER, "keys": [table]}
    return made


def sent(gateway: Harness) -> int:
    return sum(len(upstream.requests) for upstream in gateway.upstreams)


async def send(gateway: Harness, sample: Sample, body: bytes | None = None, *fields: tuple[bytes, bytes]) -> Reply:
    given = [(b"Content-Type", sample.content_type), *fields]
    return await gateway.request(sample.method, sample.path, given, sample.body if body is None else body)


async def ask(gateway: Harness, members: Mapping[str, Any], path: str = CHAT) -> Reply:
    body = json.dumps({"model": "gpt-x", **members}).encode()
    return await gateway.request("POST", path, [(b"Content-Type", b"application/json")], body)


def refused(reply: Reply) -> tuple[int, str | None]:
    return reply.status, reply.header("X-Penstock-Error")


def error_of(reply: Reply) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(reply.body)["error"]
    return found


# --- every endpoint ---------------------------------------------------------------------------------------------------


def with_members(sample: Sample, members: bytes) -> bytes:
    return sample.body.rstrip()[:-1] + b"," + members + b"}"


TOOL = b'"tools":[{"name":"get_time"},{"type":"function","function":{"name":"shell.exec"},"name":"shell.exec"}]'
VIOLATIONS = {
    "tools": (TOOL, "tool_not_allowed"),
    "mcp": (b'"mcp_servers":[{"name":"evil","url":"https://mcp.example"}]', "tool_not_allowed"),
    "urls": (b'"x":["see ht\\u0074ps:\\/\\/evil.example/a"]', "url_not_allowed"),
}
DENY = {"tools": {"deny": ["^shell\\.exec$"]}, "mcp": {"deny": ["^evil$"]}, "urls": {"deny": ["evil\\.example"]}}


@pytest.mark.parametrize("coding", ["identity", "gzip"])
@pytest.mark.parametrize("kind", VIOLATIONS)
@pytest.mark.parametrize("sample", JSON, ids=str)
async def test_contents_are_refused_on_every_endpoint(sample: Sample, kind: str, coding: str) -> None:
    members, code = VIOLATIONS[kind]
    body = with_members(sample, members)
    body = gzip.compress(body) if coding == "gzip" else body
    fields = [(b"Content-Encoding", b"gzip")] if coding == "gzip" else []
    async with harness(DENY) as gateway:
        reply = await send(gateway, sample, body, *fields)
        assert refused(reply) == (403, code)
        assert reply.header("x-should-retry") == "false"
        assert sent(gateway) == 0


@pytest.mark.parametrize("sample", [sample for sample in BODIES if "gemini" not in sample.path], ids=str)
async def test_what_is_admitted_passes_byte_for_byte(sample: Sample) -> None:
    rules = {**DENY, "models": {"deny": ["^o1"], "allow": ["."]}}
    async with harness(rules) as gateway:
        assert (await send(gateway, sample)).status == 200
        assert gateway.upstreams[0].requests[0].body == sample.body


@pytest.mark.parametrize("sample", [sample for sample in BODIES if "gemini" not in sample.path], ids=str)
async def test_models_are_refused_on_every_endpoint_forms_included(sample: Sample) -> None:
    for rules in ({"deny": ["(gpt|claude|davinci|embed|moder|dall|tts|whisper)"]}, {"allow": ["^nothing$"]}):
        async with harness({"models": rules}) as gateway:
            reply = await send(gateway, sample)
            assert refused(reply) == (403, "model_not_allowed")
            assert sent(gateway) == 0


@pytest.mark.parametrize("sample", FORMS, ids=str)
async def test_of_forms_only_the_model_is_judged(sample: Sample) -> None:
    body = sample.body.replace(b"a.bin", b"https://evil.example")
    async with harness(DENY) as gateway:
        assert (await send(gateway, sample, body)).status == 200
        assert gateway.upstreams[0].requests[0].body == body


async def test_envelope_is_the_dialect_s_own() -> None:
    async with harness(DENY) as gateway:
        tools = {"tools": [{"name": "x"}, {"name": "shell.exec"}]}
        anthropic = json.loads((await ask(gateway, {"model": "claude-x", **tools}, "/v1/messages")).body)
        assert (anthropic["type"], anthropic["error"]["code"]) == ("error", "tool_not_allowed")
        error = error_of(await ask(gateway, tools))
        assert (error["code"], error["param"]) == ("tool_not_allowed", "tools[1].name")
        assert error["meta"] == {
            "rule": "policy_rules.tools.deny[0]",
            "pattern": "^shell\\.exec$",
            "value": "shell.exec",
            "place": "tools[1].name",
            "virtual_key": "vk_test",
        }
        gemini = Sample(
            "POST", "/v1beta/models/g:generateContent", b'{"tools":[{"functionDeclarations":[{"name":"shell.exec"}]}]}'
        )
        details = json.loads((await send(gateway, gemini)).body)["error"]
        assert details["status"] == "PERMISSION_DENIED"
        assert "tools[0].functionDeclarations[0].name" in json.dumps(details)


async def test_refusal_holds_no_prompt_text() -> None:
    async with harness(DENY) as gateway:
        message = {"role": "user", "content": "my secret diary https://evil.example/x and more"}
        reply = await ask(gateway, {"messages": [message]})
        assert error_of(reply)["param"] == "messages[0].content"
        assert error_of(reply)["meta"]["value"] == "https://evil.example/x"
        assert b"diary" not in reply.body


async def test_body_that_cannot_be_judged_is_refused() -> None:
    async with harness(DENY) as gateway:
        for sample in (
            Sample("POST", CHAT, b'{"model":"gpt-x"'),
            Sample("POST", "/v1beta/models/g:generateContent", b"no"),
        ):
            assert refused(await send(gateway, sample)) == (400, "bad_request")
        assert refused(await send(gateway, JSON[0], b"x", (b"Content-Encoding", b"gzip"))) == (400, "bad_request")
        assert refused(await send(gateway, JSON[0], b"x", (b"Content-Encoding", b"odd"))) == (
            415,
            "unsupported_encoding",
        )
        assert sent(gateway) == 0


async def test_large_body_is_judged_beside_the_event_loop() -> None:
    async with harness(DENY) as gateway:
        filler = [{"role": "user", "content": "x" * 300_000}]
        assert (await ask(gateway, {"messages": filler})).status == 200
        late = [*filler, {"role": "user", "content": "https://evil.example"}]
        reply = await ask(gateway, {"messages": late})
        assert (refused(reply), error_of(reply)["param"]) == ((403, "url_not_allowed"), "messages[1].content")
        assert sent(gateway) == 1


# --- models -----------------------------------------------------------------------------------------------------------

TWO = (
    {"name": "a", "type": "openai_compatible", "model_map": {"gpt-x": "deployed-1"}},
    {"name": "b", "type": "openai_compatible", "model_map": {"gpt-x": "claude-y"}},
)


@pytest.mark.parametrize(
    ("rules", "answered"),
    [
        ({"deny": ["^deployed"]}, "claude-y"),
        ({"deny": ["^claude"]}, "deployed-1"),
        ({"deny": ["^openai_compatible/deployed"]}, "claude-y"),
        ({"allow": ["^openai_compatible/claude"]}, "claude-y"),
        ({"allow": ["^gpt-x$"]}, "deployed-1"),
        ({"deny": ["^gpt-x$"]}, None),
        ({"allow": ["^gpt-y"]}, None),
        ({"allow": ["."], "deny": ["1$", "^claude"]}, None),
    ],
)
async def test_models_are_judged_candidate_by_candidate(rules: dict[str, list[str]], answered: str | None) -> None:
    async with harness({"models": rules}, bindings=TWO) as gateway:
        reply = await ask(gateway, {})
        if answered is None:
            assert refused(reply) == (403, "model_not_allowed")
            assert error_of(reply)["param"] == "model"
            assert sent(gateway) == 0
        else:
            assert (reply.status, reply.header("X-Penstock-Model")) == (200, answered)


async def test_fallback_never_reaches_a_model_that_is_denied() -> None:
    upstream = FakeUpstream([[http_reply(b"{}", 500)]], repeat=True)
    async with harness({"models": {"deny": ["^claude"]}}, bindings=TWO, upstream=upstream) as gateway:
        reply = await ask(gateway, {})
        assert reply.status == 500
        assert [b"deployed-1" in request.body for request in gateway.upstreams[0].requests] == [True]


async def test_alias_is_judged_by_what_it_stands_for() -> None:
    key = {"model_aliases": {"fast": "gpt-5-mini", "gpt-ok": "o1-pro"}}
    async with harness({"models": {"deny": ["^o1"], "allow": ["^gpt"]}}, key=key) as gateway:
        assert (await ask(gateway, {"model": "fast"})).status == 200
        assert refused(await ask(gateway, {"model": "gpt-ok"})) == (403, "model_not_allowed")
        assert refused(await ask(gateway, {"model": "openai_compatible/o1"})) == (403, "model_not_allowed")


class Chooser:
    """Select a binding that routing knows nothing of."""

    def __init__(self, services: Services) -> None:
        self._services = services

    @hookimpl
    def select_provider(self, exchange: Exchange) -> Candidate | None:
        if exchange.attempts:
            return None
        binding = ProviderBinding("gpc_own", "own", "openai_compatible", "http://up.invalid")
        return Candidate(binding, self._services.provider_of(binding), "o1-own")


@pytest.mark.parametrize("rules", [{"deny": ["^o1"]}, {"deny": ["^o1", "^gpt"]}])
async def test_candidate_of_another_plugin_is_judged_too(rules: dict[str, list[str]]) -> None:
    made = harness({"models": rules})
    made._plugins = (("chooser", Chooser), *made._plugins)
    async with made as gateway:
        reply = await ask(gateway, {})
        skipped = gateway.exchanges[0].attempts[:1]
        if "^gpt" in rules["deny"]:
            assert refused(reply) == (403, "model_not_allowed")
            assert sent(gateway) == 0
        else:
            assert (reply.status, reply.header("X-Penstock-Model")) == (200, "gpt-x")
            assert [(each.reason, each.is_skipped) for each in skipped] == [("model_not_allowed", True)]


# --- what keys come under ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "side"), [("tools", "deny"), ("urls", "allow")])
async def test_key_of_the_file_with_a_broken_pattern_stops_the_start(kind: str, side: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"'test'.*policy_rules\.{kind}\.{side}\[1\].*'\(\?=x\)'"):
        async with harness({kind: {side: ["ok", "(?=x)"]}}):
            raise AssertionError("it started")


def rules_of(**kinds: PatternRules) -> dict[str, Any]:
    return {name: {"deny": each.deny, "allow": each.allow} for name, each in kinds.items()}


async def asked(gateway: Governed, *tools: str) -> Reply:
    body = {"model": "gpt-x", "tools": [{"type": "function", "function": {"name": name}} for name in tools]}
    return await gateway.ask(body)


async def test_rules_of_key_and_policy_must_both_admit(tmp_path: Path) -> None:
    async with governed(tmp_path, first=[("policy_rules", Policies)], socket=True) as gateway:
        assert (await asked(gateway, "shell", "read")).status == 200
        key_rules = rules_of(tools=PatternRules(deny=("^shell$",)))
        await gateway.change("virtual_key", gateway.key_id, policy_rules=key_rules)
        assert refused(await asked(gateway, "shell")) == (403, "tool_not_allowed")
        policy = RoutingPolicy(
            name="p",
            scope_id=gateway.project_id,
            policy_rules=PolicyRules(tools=PatternRules(allow=("^read$", "shell"))),
        )
        policy_id = await gateway.insert("routing_policy", policy)
        await gateway.change("virtual_key", gateway.key_id, routing_policy_id=policy_id)
        assert refused(await asked(gateway, "shell")) == (403, "tool_not_allowed")
        reply = await asked(gateway, "read", "write")
        assert error_of(reply)["meta"] == {
            "rule": "policy_rules.tools.allow", "pattern": None, "value": "write", "place": "tools[1].function.name",
            "routing_policy": policy_id,
        }  # fmt: skip
        assert (await asked(gateway, "read")).status == 200
        await gateway.change("routing_policy", policy_id, policy_rules=rules_of(tools=PatternRules(deny=("^read$",))))
        assert refused(await asked(gateway, "read")) == (403, "tool_not_allowed")
        await gateway.change("virtual_key", gateway.key_id, routing_policy_id=None, policy_rules={})
        assert (await asked(gateway, "shell", "read", "write")).status == 200


async def test_rules_that_do_not_compile_at_run_time_let_nothing_pass(tmp_path: Path) -> None:
    async with governed(tmp_path, first=[("policy_rules", Policies)], socket=True) as gateway:
        broken = rules_of(urls=PatternRules(deny=("(",)))
        await gateway.change("virtual_key", gateway.key_id, policy_rules=broken)
        for _ in range(2):
            reply = await asked(gateway)
            assert refused(reply) == (503, "policy_rules_invalid")
            assert "policy_rules.urls.deny[0]" in error_of(reply)["message"]
        assert gateway.harness.upstreams[0].requests == []


async def test_key_whose_policy_is_archived_is_let_through_by_nobody(tmp_path: Path) -> None:
    async with governed(tmp_path, first=[("policy_rules", Policies)], socket=True) as gateway:
        policy_id = await gateway.insert("routing_policy", RoutingPolicy(name="p", scope_id=gateway.project_id))
        await gateway.change("virtual_key", gateway.key_id, routing_policy_id=policy_id)
        assert (await asked(gateway)).status == 200
        await gateway.archive("routing_policy", policy_id)
        assert refused(await asked(gateway)) == (503, "policy_rules_invalid")


def test_re2_is_loaded_with_the_first_rule_only() -> None:
    program = (
        "import sys\n"
        "from penstock import PatternRules, PolicyRules\n"
        "from penstock_plugins.caching import Caching\n"
        "from penstock_plugins.policy_rules import Policies\n"
        "from penstock_plugins.policy_rules.patterns import compile_rules\n"
        "assert compile_rules(PolicyRules(tools=PatternRules()), 'vk', 'virtual key') is None\n"
        "before = 're2' in sys.modules\n"
        "compile_rules(PolicyRules(tools=PatternRules(deny=('x',))), 'vk', 'virtual key')\n"
        "print(before, 're2' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "True"]


# --- the audit --------------------------------------------------------------------------------------------------------


async def entries(gateway: Governed, count: int) -> list[Any]:
    """Return the violations of the audit, oldest first, once there are so many."""
    with anyio.fail_after(10):
        while True:
            found = await gateway.store.read(
                lambda reading: reading.audit_entries(
                    scope=gateway.scope, where={"action": "policyRules:refuse"}, after=None, limit=100
                )
            )
            if len(found) >= count:
                return list(reversed(found))


async def test_violation_is_entered_into_the_audit_and_nothing_else_is(tmp_path: Path) -> None:
    async with governed(tmp_path, first=[("policy_rules", Policies)], socket=True) as gateway:
        rules = rules_of(tools=PatternRules(deny=("^shell$",)), urls=PatternRules(deny=("evil",)))
        await gateway.change("virtual_key", gateway.key_id, policy_rules=rules)
        revision = gateway.store.revision
        await asked(gateway, "read")
        first = await asked(gateway, "read", "shell")
        url = "https://user:pw@evil.example/path?token=s3cret#frag"
        await gateway.ask({"model": "gpt-x", "input": url})
        tool, address = await entries(gateway, 2)
        assert (tool.actor, tool.kind, tool.object_id) == (gateway.key_id, "virtual_key", gateway.key_id)
        assert (tool.scope, tool.request_id) == (gateway.scope, first.header("X-Penstock-Request-Id"))
        assert tool.after == {
            "code": "tool_not_allowed", "place": "tools[1].function.name", "rule": "policy_rules.tools.deny[0]",
            "pattern": "^shell$", "value": "shell", "virtual_key": gateway.key_id,
        }  # fmt: skip
        assert (address.after["value"], address.after["place"]) == ("https://evil.example/path", "input")
        assert gateway.store.revision == revision  # what everybody keeps in memory is not read anew for it


async def test_violations_of_the_last_moment_are_entered_before_the_end(tmp_path: Path) -> None:
    async with governed(tmp_path, first=[("policy_rules", Policies)], socket=True) as gateway:
        await gateway.change("virtual_key", gateway.key_id, policy_rules=rules_of(tools=PatternRules(deny=("x",))))
        for _ in range(20):
            await asked(gateway, "x")
    async with governed(tmp_path, first=[("policy_rules", Policies)], is_fresh=False) as gateway:
        assert len(await entries(gateway, 20)) == 20


def test_policy_rules_keep_the_contract_of_plugins() -> None:
    check_plugin(Policies)
