"""Rate limits of keys and bindings, through the whole gateway."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import attrs
import pytest

from counting import MIDNIGHT, MemoryCounters, Setting, setting
from penstock import ConfigurationError, Exchange, RateLimits, RequestError, hookimpl
from penstock.governance import Claim, StoreUnavailableError
from penstock.testing import FakeUpstream, Harness, Pause, Reply, Stall, chunk, http_reply, stream_reply
from penstock.testing.upstream import STREAM_HEAD
from penstock_plugins.rate_limits import RateLimiting

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
USAGE = {"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50}
ANSWER = http_reply(json.dumps({"id": "x", "choices": [], "usage": USAGE}).encode())
ONE_BINDING = ({"name": "up", "type": "openai_compatible"},)
ANTHROPIC = ({"name": "up", "type": "anthropic"},)


def chat(size: int = 0, **members: Any) -> bytes:
    """Return a request body, of ``size`` bytes where that is more than it needs."""
    content = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **members}
    bare = len(json.dumps({**content, "pad": ""}))
    return json.dumps({**content, "pad": "x" * max(0, size - bare)}).encode()


@attrs.define(eq=False)
class Bound:
    """A gateway with limits, its clock and its counters."""

    gateway: Harness
    setting: Setting

    async def ask(self, body: bytes | None = None, path: str = CHAT) -> Reply:
        return await self.gateway.request("POST", path, body=chat() if body is None else body)

    async def statuses(self, count: int) -> list[int]:
        return [(await self.ask()).status for _ in range(count)]


@asynccontextmanager
async def bound(
    key: RateLimits | None = None,
    bindings: dict[str, RateLimits] | None = None,
    upstreams: Sequence[FakeUpstream] | None = None,
    after: Sequence[Any] = (),
    bindings_of: Sequence[dict[str, str]] = ONE_BINDING,
    counters: MemoryCounters | None = None,
    **options: Any,
) -> AsyncIterator[Bound]:
    plugin, made = setting(key=key, bindings=bindings or {}, counters=counters or MemoryCounters())
    upstream = upstreams or [FakeUpstream([[ANSWER]], repeat=True)]
    plugins = [plugin, ("rate_limits", RateLimiting), *after]
    async with Harness(plugins, upstream=upstream, bindings=bindings_of, **options) as gateway:
        yield Bound(gateway, made[0])
    assert made[0].counters.left == {}, "something was never given back"


def refusal(reply: Reply) -> tuple[int, bytes | None, bytes | None]:
    get = reply.headers.get
    return reply.status, get(b"x-penstock-ratelimit-dimension"), get(b"retry-after")


# --- each dimension of a key ----------------------------------------------------------------------------------------


async def test_requests_a_minute_are_bounded_and_refusals_say_when_to_come_back() -> None:
    async with bound(RateLimits(rpm=2)) as it:
        it.setting.now = MIDNIGHT + 15.0
        assert await it.statuses(2) == [200, 200]
        refused = await it.ask()
        # 45 s to the next minute, half a minute in which the two of this one weigh more than one
        assert refusal(refused) == (429, b"rpm", b"75")
        error = json.loads(refused.body)["error"]
        assert error["code"] == "rate_limit_exceeded"
        assert error["meta"] == {"dimension": "rpm", "limit": 2, "subject": "vk_1", "retry_after": 75}
        it.setting.now += 74.9
        assert (await it.ask()).status == 429
        it.setting.now += 0.1
        assert await it.statuses(2) == [200, 429]


async def test_no_burst_of_two_minutes_passes_at_the_turn_of_one() -> None:
    async with bound(RateLimits(rpm=10)) as it:
        it.setting.now = MIDNIGHT + 59.0
        assert await it.statuses(11) == [200] * 10 + [429]
        it.setting.now = MIDNIGHT + 60.0
        assert await it.statuses(1) == [429]
        it.setting.now = MIDNIGHT + 66.0
        assert await it.statuses(2) == [200, 429]
        it.setting.now = MIDNIGHT + 180.0
        assert await it.statuses(11) == [200] * 10 + [429]


async def test_requests_a_day_are_utc_s() -> None:
    async with bound(RateLimits(rpd=1)) as it:
        it.setting.now = MIDNIGHT + 80_000.5
        assert await it.statuses(1) == [200]
        assert refusal(await it.ask()) == (429, b"rpd", b"6400")
        it.setting.now = MIDNIGHT + 86_400.0
        assert await it.statuses(2) == [200, 429]


async def test_tokens_are_reserved_by_estimate_and_corrected_by_usage() -> None:
    hold = Pause()
    upstream = FakeUpstream([[hold, ANSWER], [ANSWER]], repeat=True)
    async with bound(RateLimits(tpm=1000), upstreams=[upstream]) as it, anyio.create_task_group() as tasks:
        tasks.start_soon(it.ask, chat(size=1600, max_tokens=400))  # 400 said and 400 to be answered
        await hold.reached.wait()
        refused = await it.ask(chat(size=400, max_tokens=101))
        assert refusal(refused)[:2] == (429, b"tpm")
        assert (await it.ask(chat(size=400, max_tokens=100))).status == 200
        hold.released.set()
        await it.gateway.wait_settled(3)
        assert it.setting.counters.used("tpm:vk_1", MIDNIGHT + 3600) == 50 + 50
        assert (await it.ask(chat(size=400, max_tokens=800))).status == 200


async def test_request_beyond_the_whole_limit_waits_for_an_empty_minute() -> None:
    async with bound(RateLimits(tpm=100)) as it:
        it.setting.now = MIDNIGHT + 10.0
        assert (await it.ask(chat(max_tokens=100_000))).status == 200
        assert refusal(await it.ask(chat(max_tokens=100_000))) == (429, b"tpm", b"110")
        it.setting.now += 110
        assert (await it.ask(chat(max_tokens=100_000))).status == 200


async def test_a_form_counts_once_it_is_settled() -> None:
    form = b'--s\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--s--\r\n'
    async with bound(RateLimits(tpm=60)) as it:
        fields = [(b"content-type", b"multipart/form-data; boundary=s")]
        path = "/v1/audio/transcriptions"
        replies = [await it.gateway.request("POST", path, fields, form) for _ in range(3)]
        assert [reply.status for reply in replies] == [200, 200, 429]


async def test_what_makes_no_model_work_uses_no_tokens() -> None:
    upstream = FakeUpstream([[http_reply(b'{"input_tokens":900}')]], repeat=True)
    async with bound(RateLimits(tpm=100), upstreams=[upstream], bindings_of=ANTHROPIC) as it:
        replies = [await it.ask(chat(size=50_000), "/v1/messages/count_tokens") for _ in range(5)]
        assert [reply.status for reply in replies] == [200] * 5
        assert it.setting.counters.settled == {}


async def test_no_more_than_the_limit_run_at_once_and_the_next_may_as_one_ends() -> None:
    holds = [Pause(), Pause()]
    upstream = FakeUpstream([[holds[0], ANSWER], [holds[1], ANSWER], [ANSWER]], repeat=True)
    async with bound(RateLimits(concurrency=2), upstreams=[upstream]) as it, anyio.create_task_group() as tasks:
        for hold in holds:
            tasks.start_soon(it.ask)
            await hold.reached.wait()
        assert refusal(await it.ask()) == (429, b"concurrency", b"1")
        holds[1].released.set()
        await it.gateway.wait_settled(2)
        assert (await it.ask()).status == 200
        holds[0].released.set()


# --- whatever ends an exchange --------------------------------------------------------------------------------------


async def test_lease_is_given_back_when_the_client_goes_away() -> None:
    gone = Stall()
    first = b'data: {"choices":[{"index":0,"delta":{"content":"H"}}]}\n\n'
    upstream = FakeUpstream([[STREAM_HEAD, chunk(first), gone], [ANSWER]])
    async with bound(RateLimits(concurrency=1, tpm=10_000), upstreams=[upstream]) as it:
        async with it.gateway.stream("POST", CHAT, body=chat(stream=True, max_tokens=50)) as stream:
            assert stream.status == 200
            await gone.reached.wait()
        await it.gateway.wait_settled(1)
        assert (await it.ask()).status == 200


async def test_lease_is_given_back_when_every_provider_fails() -> None:
    upstream = FakeUpstream([[http_reply(b"{}", 500)], [ANSWER]])
    async with bound(RateLimits(concurrency=1, rpm=5, tpm=500), upstreams=[upstream]) as it:
        assert await it.statuses(2) == [500, 200]
        assert it.setting.counters.used("rpm:vk_1", MIDNIGHT + 3600) == 2
        assert it.setting.counters.used("tpm:vk_1", MIDNIGHT + 3600) == 50


class Refusing:
    """Refuse what stands after the limits, before any provider is asked."""

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        if exchange.peek.user == "nobody":
            raise RequestError("permission_denied", "Not you.")


class Crashing:
    """Fail after the limits, before any provider is asked."""

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        if exchange.peek.user == "nobody":
            raise KeyError("boom")


@pytest.mark.parametrize(("plugin", "status"), [(Refusing, 403), (Crashing, 500)])
async def test_request_refused_later_uses_up_nothing(plugin: type, status: int) -> None:
    async with bound(RateLimits(rpm=1, rpd=1, tpm=60, concurrency=1), after=[plugin]) as it:
        assert (await it.ask(chat(user="nobody"))).status == status
        assert set(it.setting.counters.settled.values()) == {0}
        assert await it.statuses(2) == [200, 429]


async def test_request_refused_in_one_dimension_uses_up_nothing_in_the_others() -> None:
    async with bound(RateLimits(rpm=3, rpd=50, tpm=10_000, concurrency=5)) as it:
        statuses = await it.statuses(5)
        assert statuses == [200] * 3 + [429] * 2
        assert {counter: used for (counter, _), used in it.setting.counters.settled.items()} == {
            "rpm:vk_1": 3,
            "rpd:vk_1": 3,
            "tpm:vk_1": 150,
            "concurrency:vk_1": 0,
        }


async def test_answer_of_a_plugin_counts_as_a_request() -> None:
    async with bound(RateLimits(rpm=1)) as it:
        assert (await it.gateway.request("GET", "/v1/models")).status == 200
        assert await it.statuses(1) == [429]


async def test_key_without_limits_leaves_no_trace() -> None:
    async with bound(RateLimits()) as it:
        assert await it.statuses(2) == [200, 200]
        assert it.setting.counters.settled == {}


# --- bindings -------------------------------------------------------------------------------------------------------


def two_upstreams() -> list[FakeUpstream]:
    return [FakeUpstream([[ANSWER]], repeat=True) for _ in range(2)]


async def test_binding_at_its_limit_is_skipped_for_the_next() -> None:
    upstreams = two_upstreams()
    async with bound(bindings={"gpc_up": RateLimits(rpm=1)}, upstreams=upstreams) as it:
        replies = [await it.ask() for _ in range(2)]
        assert [reply.status for reply in replies] == [200, 200]
        assert [reply.headers.get(b"x-penstock-fallback-count") for reply in replies] == [b"0", b"1"]
        assert [len(upstream.requests) for upstream in upstreams] == [1, 1]
        skipped = it.gateway.exchanges[1].attempts[0]
        assert (skipped.is_skipped, skipped.reason) == (True, "rate_limit_exceeded")


async def test_all_bindings_at_their_limits_answer_with_the_shortest_wait() -> None:
    limits = {"gpc_up": RateLimits(rpd=1), "gpc_up2": RateLimits(rpm=1)}
    async with bound(bindings=limits, upstreams=two_upstreams()) as it:
        assert await it.statuses(2) == [200, 200]
        refused = await it.ask()
        assert refusal(refused) == (429, b"rpm", b"120")
        assert it.setting.counters.used("rpd:gpc_up", MIDNIGHT) == 1


async def test_failed_attempt_gives_its_lease_back_before_the_next_is_dialled() -> None:
    hold = Pause()
    upstreams = [FakeUpstream([[http_reply(b"{}", 503)]] * 2), FakeUpstream([[hold, ANSWER], [ANSWER]])]
    limits = {"gpc_up": RateLimits(concurrency=1, tpm=1000), "gpc_up2": RateLimits(concurrency=2)}
    async with bound(bindings=limits, upstreams=upstreams) as it, anyio.create_task_group() as tasks:
        tasks.start_soon(it.ask)
        await hold.reached.wait()
        assert (await it.ask()).status == 200
        assert len(upstreams[0].requests) == 2
        hold.released.set()
        await it.gateway.wait_settled(2)
        assert it.setting.counters.used("tpm:gpc_up", MIDNIGHT + 3600) == 0


async def test_binding_counts_the_tokens_of_what_it_answered() -> None:
    async with bound(bindings={"gpc_up": RateLimits(tpm=10_000)}) as it:
        assert await it.statuses(1) == [200]
        assert it.setting.counters.used("tpm:gpc_up", MIDNIGHT + 3600) == 50


class Vetoing:
    """Keep every attempt from being made, after the limits have admitted it."""

    @hookimpl(trylast=True)
    def admit_attempt(self, exchange: Exchange) -> RequestError:
        return RequestError("circuit_open", "Not now.")


async def test_attempt_another_plugin_vetoes_uses_up_nothing() -> None:
    async with bound(RateLimits(rpm=1), {"gpc_up": RateLimits(rpm=1, concurrency=1)}, after=[Vetoing]) as it:
        assert await it.statuses(2) == [503, 503]
        assert set(it.setting.counters.settled.values()) == {0}


# --- dialects, streams, starts ----------------------------------------------------------------------------------------


async def test_streams_are_counted_by_the_usage_at_their_end() -> None:
    usage = b'{"id":"x","choices":[],"usage":' + json.dumps(USAGE).encode() + b"}"
    body = [b'data: {"choices":[{"index":0,"delta":{"content":"H"}}]}\n\n', b"data: " + usage + b"\n\n"]
    upstream = FakeUpstream([stream_reply(*body, b"data: [DONE]\n\n")])
    async with bound(RateLimits(tpm=500, concurrency=1), upstreams=[upstream]) as it:
        assert (await it.ask(chat(stream=True, max_tokens=100))).status == 200
        assert it.setting.counters.used("tpm:vk_1", MIDNIGHT + 3600) == 50


async def test_dimension_header_bears_the_namespace() -> None:
    config = {"virtual_keys": {"pepper": "a pepper for tests only", "keys": []}}
    async with bound(RateLimits(rpm=0), gateway={"namespace": "langwatch"}, config=config) as it:
        refused = await it.ask()
        assert refused.headers.get(b"x-langwatch-ratelimit-dimension") == b"rpm"


async def test_without_a_store_the_start_is_refused_in_one_line() -> None:
    async with AsyncExitStack() as stack:
        with pytest.raises(ConfigurationError) as raised:
            await stack.enter_async_context(Harness([("rate_limits", RateLimiting)], upstream=FakeUpstream()))
    assert len(raised.value.faults) == 1
    assert '"store"' in str(raised.value)


class Unreachable(MemoryCounters):
    """Be several processes' counters while their database is away."""

    def reserve(self, claims: Sequence[Claim]) -> Any:
        async def fail() -> None:
            raise StoreUnavailableError("gone")

        return fail()


@pytest.mark.parametrize("of_key", [True, False])
async def test_what_cannot_be_counted_is_not_let_in(of_key: bool) -> None:
    key, bindings = (RateLimits(rpm=9), None) if of_key else (None, {"gpc_up": RateLimits(rpm=9)})
    async with bound(key, bindings, counters=Unreachable()) as it:
        refused = await it.ask()
        assert (refused.status, refused.headers.get(b"retry-after")) == (503, b"1")
        assert it.gateway.faults == []
