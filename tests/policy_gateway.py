"""A gateway on a store with every plugin that keeps a policy, keys that come under one each, and ways to a provider."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, cast

import attrs

from governed_gateway import RATES, Clock, Governed
from guarded_gateway import GeminiPlugin
from penstock import GuardrailAttachment, PatternRules, PolicyRules, RateLimits, new_key
from penstock.governance import Vault, new_id
from penstock.governance.objects import Binding, Evaluator, Guardrail, RoutingPolicy
from penstock.testing import FakeUpstream, Harness, Reply, http_reply
from penstock_plugins.store.counters import MemoryCounters
from policy_routes import MODELS, WORD, Offence, Route, answer

PLUGINS = (
    "store", "virtual_keys", "rate_limits", "routing", "caching", "policy_rules", "prices", "budgets", "guardrails",
    "fallback", "dialects", "openai_compatible", "anthropic", ("gemini_fake", GeminiPlugin)
)  # fmt: skip
"""In the order of the documentation."""
NATIVE = {"openai": "openai_compatible", "anthropic": "anthropic", "gemini": "gemini_fake"}
"""Which provider type speaks the dialects of a family."""
KINDS = (*NATIVE.values(), "openai_chat")
RENAMED = "renamed"
"""What every model is called at some bindings."""
OVERSIZE = b"40000000"
"""Bytes a request says it has, and never sends: more than are taken."""
Side = Literal["request", "answer", "edit"]
Way = str
"""``native``, ``second`` behind a candidate that fails, or the provider type that is asked by translation."""
TRANSLATED: dict[str, tuple[str, ...]] = {
    "openai.chat": ("anthropic",),
    "anthropic.messages": ("openai_chat",),
    "openai.responses": ("openai_chat", "anthropic"),
}
"""Which provider types a dialect is translated for."""


@attrs.define(eq=False)
class Run:
    """A running gateway, and what its keys and bindings are called."""

    governed: Governed
    working: FakeUpstream
    failing: FakeUpstream
    bindings: dict[tuple[str, str], str] = attrs.field(factory=dict)
    """Ids by provider type, and by what it is like."""
    guardrails: dict[str, str] = attrs.field(factory=dict)
    """Ids by direction."""
    routing_policy: str = ""
    """Id of one with rules about tools."""
    secrets: dict[tuple[tuple[str, ...], str], str] = attrs.field(factory=dict)
    """Of keys, by their bindings and policy."""
    roomy: dict[str, Any] = attrs.field(factory=dict)
    """Members of every key: limits that none of them reaches, so that all of them reserve something."""

    @property
    def harness(self) -> Harness:
        return self.governed.harness

    @property
    def asked(self) -> int:
        """Return how many requests any upstream has seen."""
        return len(self.working.requests) + len(self.failing.requests)

    @property
    def reserved(self) -> dict[Any, int]:
        """Return what is reserved now, by counter."""
        accounts = cast("MemoryCounters", self.governed.counters).accounts
        return {name: account.reserved for name, account in accounts.items() if account.reserved}

    def chain(self, route: Route, way: Way) -> tuple[str, ...]:
        """Return the bindings of a key that asks this route in this way."""
        kind = NATIVE[route.endpoint.family]
        if way == "native":
            return (self.bindings[kind, "works"],)
        if way == "second":
            return self.bindings[kind, "fails"], self.bindings[kind, "declares"]
        return (self.bindings[way, "declares"],)

    async def key(self, route: Route, way: Way, policy: Policy | None = None) -> str:
        """Return the secret of a key that asks this route in this way, and comes under this policy alone."""
        chain = self.chain(route, way)
        name = chain, "" if policy is None else policy.name
        if policy is not None and policy.name == "unknown_key":
            return UNKNOWN_KEY
        if name not in self.secrets or (policy is not None and policy.uses_up):
            members = {**self.roomy, **({} if policy is None else policy.members(self))}
            key_id, self.secrets[name] = await self.governed.key(
                self.governed.user_id, provider_bindings=chain, **members
            )
            if policy is not None and policy.prepare is not None:
                await policy.prepare(self, key_id)
        return self.secrets[name]

    async def send(self, route: Route, secret: str, offence: Offence | None, *fields: tuple[bytes, bytes]) -> Reply:
        """Ask; returns the answer once the exchange has settled."""
        credential = (b"Authorization", b"Bearer " + secret.encode())
        given = [credential, *route.fields, *fields]
        if fields != OVERSIZED:
            return await self.harness.request(route.method, route.path, given, route.request(offence))
        settled = self.harness.settled
        client = await self.harness.raw()
        await client.send(self.harness.request_bytes(route.method, route.path, given))
        reply = await client.receive_reply()
        await self.harness.wait_settled(settled + 1)
        return reply


OVERSIZED = ((b"Content-Length", OVERSIZE),)


@asynccontextmanager
async def governed_by_all(
    folder: Path, plugins: Sequence[Any] = PLUGINS, *, socket: bool = False
) -> AsyncIterator[Run]:
    """Run a gateway with a provider that works, and one that fails, of each type."""
    working = FakeUpstream([answer], repeat=True)
    failing = FakeUpstream([[http_reply(b'{"error":{"message":"down"}}', 503)]], repeat=True)
    tables: dict[str, Any] = {"store": {"url": f"sqlite:///{folder}/penstock.db"}, "virtual_keys": {}, "routing": {}}
    if "fallback" in plugins:
        tables["fallback"] = {"failures": 1_000_000}  # the one that fails is asked every time
    async with Harness(plugins, tables, [working, failing], socket=socket, bare=True) as harness:
        governed = Governed(harness, harness.gateway.generation.services, Clock())
        kinds = ("organization", "team", "project", "user")
        ids = await governed.store.read(lambda reading: [reading.list(kind)[0].id for kind in kinds])
        governed.organization_id, governed.team_id, governed.project_id, governed.user_id = ids
        run = Run(governed, working, failing)
        if "rate_limits" in plugins:
            run.roomy["rate_limits"] = RateLimits(concurrency=9, tpm=10**9)
        await governed.budget(10**15, "organization")
        for kind in KINDS:
            await _bind(run, kind)
            if "prices" in plugins:
                await governed.price(kind, "*", RATES)
        for direction in ("request", "response", "stream_chunk"):
            run.guardrails[direction] = await _guard(governed, direction)
        rules = PolicyRules(tools=PatternRules(allow=("^get_",)))
        policy = RoutingPolicy(name="strict", scope_id=governed.organization_id, policy_rules=rules)
        run.routing_policy = await governed.insert("routing_policy", policy)
        yield run


async def _bind(run: Run, kind: str) -> None:
    vault = run.governed.get(Vault)
    members: dict[str, dict[str, Any]] = {
        "works": {},
        "fails": {"models": MODELS, "base_url": run.failing.base_url},
        "declares": {"models": MODELS},
        "renames": {"model_map": dict.fromkeys(MODELS, RENAMED)},
        "limited": {"models": MODELS, "rate_limits": RateLimits(rpm=0)},
    }
    for name, own in members.items():
        binding_id = new_id("gpc_")
        credential = vault.seal("sk-upstream", context=f"provider_binding:{binding_id}")
        given = {"base_url": run.working.base_url, "scope_id": run.governed.organization_id, "credential": credential}
        binding = Binding(name=f"{kind} {name}", type=kind, **{**given, **own})
        await run.governed.insert("provider_binding", binding, binding_id)
        run.bindings[kind, name] = binding_id


async def _guard(governed: Governed, direction: Any) -> str:
    scope_id = governed.organization_id
    evaluator = Evaluator(name=f"of {direction}", scope_id=scope_id, type="regex", settings={"patterns": [WORD]})
    evaluator_id = await governed.insert("evaluator", evaluator)
    guardrail = Guardrail(name=direction, scope_id=scope_id, evaluator_id=evaluator_id, directions=(direction,))
    return await governed.insert("guardrail", guardrail)


# --- policies ---------------------------------------------------------------------------------------------------------

Members = Callable[[Run], Mapping[str, Any]]


@attrs.frozen
class Policy:
    """One thing a key may come under, and a request that runs into it."""

    name: str
    status: int
    code: str
    members: Members = lambda run: {}
    """What its key is like."""
    offence: Offence | None = None
    """What of the request offends."""
    fields: tuple[tuple[bytes, bytes], ...] = ()
    """Header fields that do."""
    side: Side = "request"
    """Whether a provider is asked before it holds, and whether it refuses or edits."""
    prepare: Callable[[Run, str], Awaitable[Any]] | None = None
    """What else there has to be; gets the key's id."""
    is_known: bool = True
    """Whether the refused request has authenticated."""
    uses_up: bool = False
    """Whether the first request is answered, and the second refused."""

    def __str__(self) -> str:
        return self.name


def _rules(**sides: Sequence[str]) -> Members:
    rules = PolicyRules(**{name: PatternRules(deny=tuple(patterns)) for name, patterns in sides.items()})
    return lambda run: {"policy_rules": rules}


def _guarded(direction: str) -> Members:
    return lambda run: {"guardrails": (GuardrailAttachment(guardrail_id=run.guardrails[direction]),)}


def _budget(scope: str, limit: int) -> Callable[[Run, str], Awaitable[Any]]:
    return lambda run, key_id: run.governed.budget(limit, scope, scope_id=key_id)


_OFFENDED = ((b"X-Offend", b"1"),)
POLICIES = (
    Policy("unknown_key", 401, "invalid_api_key", is_known=False),
    Policy("revoked_key", 403, "virtual_key_revoked", lambda run: {"status": "revoked"}, is_known=False),
    Policy("size", 413, "payload_too_large", fields=OVERSIZED),
    Policy("rpm", 429, "rate_limit_exceeded", lambda run: {"rate_limits": RateLimits(rpm=1)}, uses_up=True),
    Policy("models_allowed", 403, "model_not_allowed", lambda run: {"models_allowed": ("other-*",)}),
    Policy("cache_override", 400, "cache_override_invalid", fields=((b"X-Penstock-Cache", b"sometimes"),)),
    Policy("cache_disable", 200, "", lambda run: {"cache_mode": "disable"}, "marker", side="edit"),
    Policy("tools", 403, "tool_not_allowed", _rules(tools=["^shell_exec$"]), "tools"),
    Policy("tools_of_policy", 403, "tool_not_allowed", lambda run: {"routing_policy_id": run.routing_policy}, "tools"),
    Policy("mcp", 403, "tool_not_allowed", _rules(mcp=["^evil$"]), "mcp"),
    Policy("urls", 403, "url_not_allowed", _rules(urls=["evil\\.example"]), "urls"),
    Policy("models", 403, "model_not_allowed", _rules(models=["^(gpt|claude|gemini)-"])),
    Policy("budget", 402, "budget_exceeded", prepare=_budget("virtual_key", 1)),
    Policy("end_user", 400, "end_user_required", prepare=_budget("end_user", 10**12)),
    Policy("guardrail_request", 403, "guardrail_blocked", _guarded("request"), "text"),
    Policy("guardrail_response", 403, "guardrail_blocked", _guarded("response"), None, _OFFENDED, "answer"),
    Policy("guardrail_stream", 403, "guardrail_blocked", _guarded("stream_chunk"), None, _OFFENDED, "answer"),
)
FREE = Policy("none", 200, "")
UNKNOWN_KEY = new_key()
UNENFORCED = (
    Policy("policy_rules", 503, "policy_rules_invalid", _rules(tools=["x"])),
    Policy("guardrails", 503, "policy_rules_invalid", _guarded("response")),
    Policy("rate_limits", 503, "policy_rules_invalid", lambda run: {"rate_limits": RateLimits(rpm=9)}),
)
"""By the plugin that would keep it."""
