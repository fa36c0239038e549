"""What a key says is enforced, or its requests are refused: a plugin left out must not mean that anything goes."""

from __future__ import annotations

from typing import Any

import pytest

from penstock import Principal, RateLimits, hookimpl, new_key
from penstock.testing import FakeUpstream, Harness, http_reply
from penstock.testing.harness import PEPPER

pytestmark = pytest.mark.anyio

RULES: dict[str, Any] = {
    "policy_rules": {"tools": {"deny": ["^shell$"]}},
    "guardrails": [{"guardrail_id": "pii"}],
}


class Limited:
    """Authenticate everybody as a key with a rate limit."""

    @hookimpl
    def authenticate(self, exchange: Any) -> Principal:
        assert exchange is not None
        return Principal("vk_limited", "limited", "ps_vk_live_limited", rate_limits=RateLimits(rpm=1))


class Keeper:
    """Say that rate limits are kept here."""

    enforces = ("rate_limits",)

    @hookimpl
    def pre_request(self, exchange: Any) -> None:
        assert exchange.principal is not None


@pytest.mark.parametrize("member", RULES)
async def test_key_whose_rules_nobody_enforces_is_refused_and_reaches_nobody(member: str) -> None:
    upstream = FakeUpstream([])
    secret = new_key()
    keys = [{"name": "test", "secret": secret, member: RULES[member]}]
    harness = Harness(config={"virtual_keys": {"pepper": PEPPER, "keys": keys}}, upstream=upstream)
    harness.key = secret
    async with harness:
        reply = await harness.request("POST", "/v1/chat/completions", body={"model": "m", "messages": []})
        assert (reply.status, reply.header("X-Penstock-Error")) == (503, "policy_rules_invalid")
        assert f'"{member}" to [gateway] plugins' in reply.json()["error"]["message"]
        assert upstream.requests == []


@pytest.mark.parametrize("plugins", [(Limited,), (Limited, Keeper)])
async def test_plugin_that_enforces_what_a_key_says_lets_it_through(plugins: tuple[Any, ...]) -> None:
    upstream = FakeUpstream([[http_reply()]] if Keeper in plugins else [])
    async with Harness((*plugins, "routing", "openai_compatible"), upstream=upstream, bare=True) as harness:
        reply = await harness.request("POST", "/v1/chat/completions", body={"model": "m", "messages": []})
        assert reply.status == (200 if Keeper in plugins else 503)
