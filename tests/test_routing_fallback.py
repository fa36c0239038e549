"""What a key of the configuration file says about fallback: after what, how often, how long, and the only binding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import anyio
import attrs
import pytest

from penstock import Exchange, RequestError, hookimpl, new_key
from penstock.testing import Close, FakeUpstream, Harness, Reply, Stall, Step, http_reply
from penstock.testing.harness import PEPPER

pytestmark = pytest.mark.anyio

FAILS: list[Step] = [http_reply(b'{"error":"busy"}', 503)]
ANSWERS: list[Step] = [http_reply(b'{"id":"x"}')]


def gateway(upstream: FakeUpstream, bindings: int, fallback: dict[str, Any], plugins: Sequence[Any] = ()) -> Harness:
    """Return a gateway on sockets with a number of bindings at one upstream, and a key with this fallback."""
    secret = new_key()
    table = {"type": "openai_compatible", "base_url": upstream.base_url, "credential": "sk"}
    config: dict[str, Any] = {
        "routing": {"bindings": [{"name": f"b{number}", **table} for number in range(bindings)]},
        "virtual_keys": {
            "pepper": PEPPER,
            "keys": [{"name": "test", "secret": secret, "fallback": fallback}],
        },
    }
    harness = Harness(plugins, config, upstream, socket=True)
    harness.key = secret
    return harness


async def ask(harness: Harness) -> Reply:
    return await harness.request("POST", "/v1/chat/completions", body={"model": "m", "messages": []})


async def dials(harness: Harness) -> list[str]:
    await ask(harness)
    return [each.binding_id.removeprefix("gpc_") for each in harness.exchanges[-1].attempts]


async def test_no_class_means_no_fallback() -> None:
    async with gateway(FakeUpstream([FAILS]), 2, {"on": []}) as harness:
        reply = await ask(harness)
        assert (reply.status, reply.body) == (503, b'{"error":"busy"}')


async def test_only_the_classes_named_go_on() -> None:
    upstream = FakeUpstream([[Close()], FAILS])
    async with gateway(upstream, 3, {"on": ["network_error"]}) as harness:
        assert await dials(harness) == ["b0", "b1"]


async def test_attempts_are_bounded() -> None:
    async with gateway(FakeUpstream([FAILS], repeat=True), 4, {"max_attempts": 2}) as harness:
        assert await dials(harness) == ["b0", "b1"]
    async with gateway(FakeUpstream([FAILS], repeat=True), 4, {}) as harness:
        assert await dials(harness) == ["b0", "b1", "b2"]


async def test_deadline_ends_the_chain() -> None:
    async with gateway(FakeUpstream([[Stall()]], repeat=True), 3, {"timeout_ms": 200}) as harness:
        with anyio.fail_after(5):
            reply = await ask(harness)
        assert (reply.status, json.loads(reply.body)["error"]["code"]) == (504, "upstream_timeout")
        assert len(harness.exchanges[-1].attempts) == 1


# --- the only binding -----------------------------------------------------------------------------------------------


async def test_only_binding_is_asked_once_unless_retries_are_given() -> None:
    async with gateway(FakeUpstream([FAILS], repeat=True), 1, {}) as harness:
        assert await dials(harness) == ["b0"]


async def test_only_binding_is_asked_again_until_it_answers() -> None:
    async with gateway(FakeUpstream([FAILS, [Close()], ANSWERS]), 1, {"same_binding_retries": 2}) as harness:
        reply = await ask(harness)
        assert (reply.status, reply.body) == (200, b'{"id":"x"}')
        assert reply.header("X-Penstock-Fallback-Count") == "2"


@pytest.mark.parametrize(("retries", "most", "made"), [(1, 3, 2), (9, 3, 3), (2, 1, 1)])
async def test_retries_are_bounded_and_count_as_attempts(retries: int, most: int, made: int) -> None:
    fallback = {"same_binding_retries": retries, "max_attempts": most}
    async with gateway(FakeUpstream([FAILS], repeat=True), 1, fallback) as harness:
        reply = await ask(harness)
        assert (reply.status, reply.body) == (503, b'{"error":"busy"}')
        assert len(harness.exchanges[-1].attempts) == made


async def test_refusal_of_the_only_binding_is_not_retried() -> None:
    upstream = FakeUpstream([[http_reply(b"{}", 400)]])
    async with gateway(upstream, 1, {"same_binding_retries": 3}) as harness:
        assert (await ask(harness)).status == 400


async def test_one_of_several_is_never_asked_twice() -> None:
    fallback = {"same_binding_retries": 3, "max_attempts": 9}
    async with gateway(FakeUpstream([FAILS], repeat=True), 2, fallback) as harness:
        assert await dials(harness) == ["b0", "b1"]


async def test_skipped_binding_is_not_asked_again() -> None:
    @attrs.define(eq=False)
    class Full:
        asked: int = 0

        @hookimpl
        def admit_attempt(self, exchange: Exchange) -> RequestError | None:
            self.asked += 1
            return RequestError("rate_limit_exceeded", f"{exchange.request_id!r} is one too many.")

    full = Full()
    async with gateway(FakeUpstream([]), 1, {"same_binding_retries": 3}, [full]) as harness:
        assert (await ask(harness)).status == 429
        assert full.asked == 1
