"""Plugins that keep an exchange from a binding: by excluding it, or by refusing an attempt just before the dial."""

from __future__ import annotations

from typing import Any

import pytest

from penstock import Exchange, RequestError, hookimpl
from penstock.testing import FakeUpstream, Harness, http_reply

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
BODY = b'{"model":"m","messages":[]}'


def answering(body: bytes = b"{}") -> FakeUpstream:
    return FakeUpstream([[http_reply(body=body)]], repeat=True)


def limit(binding: str = "") -> RequestError:
    return RequestError("rate_limit_exceeded", f"Too many requests {binding}.", fields=((b"retry-after", b"7"),))


class Excluding:
    """Exclude bindings by name in pre_request."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.seen: list[Exchange] = []

    @hookimpl
    def post_response(self, exchange: Exchange) -> None:
        self.seen.append(exchange)


class ExcludingEarly(Excluding):
    """Exclude before routing has resolved anything."""

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        for name in self.names:
            exchange.exclude(f"gpc_{name}", limit(name))


class Admitting(Excluding):
    """Refuse attempts by the name of the binding, at once or after waiting."""

    @hookimpl
    def admit_attempt(self, exchange: Exchange) -> Any:
        assert exchange.candidate is not None
        name = exchange.candidate.binding.name
        return limit(name) if name in self.names else None


class AdmittingLate(Admitting):
    @hookimpl
    async def admit_attempt(self, exchange: Exchange) -> Any:
        return super().admit_attempt(exchange)


PLUGINS = [ExcludingEarly, Admitting, AdmittingLate]


@pytest.mark.parametrize("kind", PLUGINS)
async def test_next_binding_answers_and_the_skip_is_counted(kind: type[Excluding]) -> None:
    plugin = kind("up")
    first, second = answering(b'{"from":1}'), answering(b'{"from":2}')
    async with Harness([("keeper", plugin)], upstream=[first, second]) as harness:
        reply = await harness.request("POST", CHAT, body=BODY)
    assert (reply.status, reply.body) == (200, b'{"from":2}')
    assert reply.headers.get(b"x-penstock-fallback-count") == b"1"
    assert first.requests == []
    skipped, answered = plugin.seen[0].attempts
    assert (skipped.is_skipped, skipped.reason, skipped.status) == (True, "rate_limit_exceeded", None)
    assert not answered.is_skipped


@pytest.mark.parametrize("kind", PLUGINS)
async def test_refusal_answers_where_no_other_binding_is_left(kind: type[Excluding]) -> None:
    upstream = answering()
    async with Harness([("keeper", kind("up"))], upstream=upstream) as harness:
        reply = await harness.request("POST", CHAT, body=BODY)
    assert reply.status == 429
    assert reply.headers.get(b"x-penstock-error") == b"rate_limit_exceeded"
    assert reply.headers.get(b"retry-after") == b"7"
    assert upstream.requests == []


@pytest.mark.parametrize("kind", PLUGINS)
async def test_failed_answer_is_relayed_rather_than_the_refusal_of_a_binding_that_was_skipped(
    kind: type[Excluding],
) -> None:
    failing = FakeUpstream([[http_reply(status=503, body=b"down")]], repeat=True)
    async with Harness([("keeper", kind("up2"))], upstream=[failing, answering()]) as harness:
        reply = await harness.request("POST", CHAT, body=BODY)
    assert (reply.status, reply.body) == (503, b"down")


@pytest.mark.parametrize("kind", PLUGINS)
async def test_why_a_provider_gave_no_answer_is_told_though_another_was_skipped_after_it(kind: type[Excluding]) -> None:
    silent = FakeUpstream([[]], repeat=True)
    bindings = [{"name": "up", "type": "openai_compatible", "timeouts": {"first_byte": 0.05}}]
    async with Harness([("keeper", kind("up2"))], upstream=[silent, answering()], bindings=bindings) as harness:
        reply = await harness.request("POST", CHAT, body=BODY)
    assert (reply.status, reply.headers.get(b"x-penstock-error")) == (504, b"upstream_timeout")


async def test_attempt_may_end_the_exchange_instead() -> None:
    class Refusing:
        @hookimpl
        def admit_attempt(self, exchange: Exchange) -> None:
            raise RequestError("budget_exceeded", "No money left.")

    async with Harness([("keeper", Refusing)], upstream=[answering(), answering()]) as harness:
        reply = await harness.request("POST", CHAT, body=BODY)
    assert reply.status == 402


async def test_what_fails_in_the_hook_is_a_plugin_error() -> None:
    class Failing:
        @hookimpl
        def admit_attempt(self, exchange: Exchange) -> None:
            raise ZeroDivisionError

    upstream = answering()
    async with Harness([("keeper", Failing)], upstream=upstream) as harness:
        reply = await harness.request("POST", CHAT, body=BODY)
    assert (reply.status, upstream.requests) == (500, [])


async def test_chain_is_there_for_plugins_after_routing_and_empty_before() -> None:
    found: list[tuple[str, list[str]]] = []

    def looking(name: str, *, is_last: bool) -> tuple[str, type[Any]]:
        def pre_request(self: Any, exchange: Exchange) -> None:
            found.append((name, [candidate.binding.name for candidate in exchange.chain]))

        return name, type(name.title(), (), {"pre_request": hookimpl(pre_request, trylast=is_last)})

    plugins = [looking("before", is_last=False), looking("after", is_last=True)]
    async with Harness(plugins, upstream=[answering(), answering()]) as harness:
        await harness.request("POST", CHAT, body=BODY)
        await harness.request("POST", CHAT, body=b'{"model":7}')
    assert found == [("before", []), ("after", ["up", "up2"]), ("before", []), ("after", [])]
