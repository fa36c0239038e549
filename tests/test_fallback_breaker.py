"""The plugin ``fallback`` over sockets: what its breakers count, when, and what outlives a reload."""

from __future__ import annotations

import logging

import anyio
import pytest

from fallback_chain import GOOD, STREAM, WHOLE, chain, failing, good
from fault_upstream import OPENAI
from penstock import ConfigurationError, Exchange, RequestError, hookimpl, server
from penstock.testing import LAST_CHUNK, STREAM_HEAD, FakeUpstream, Harness, Pause, Stall, check_plugin, chunk
from penstock.testing.upstream import Step
from penstock_plugins.fallback import FallbackChains

pytestmark = pytest.mark.anyio

LONG = {"connect": 5.0, "first_byte": 5.0, "idle": 5.0}


@pytest.fixture(autouse=True)
def frequent_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SWEEP_SECONDS", 0.01)


def down() -> FakeUpstream:
    return FakeUpstream([failing()], repeat=True)


def up() -> FakeUpstream:
    return FakeUpstream([good(is_stream=False)], repeat=True)


async def test_ten_failures_within_thirty_seconds_open_it_for_sixty_then_one_probe() -> None:
    async with chain(FakeUpstream([*[failing()] * 10, good(is_stream=False)]), up()) as run:
        for count in range(1, 11):
            assert run.state("a") == "closed"
            await run.ask()
            assert run.dials == [count, count]
            run.clock.now += 3
        assert run.state("a") == "open"
        run.clock.now += 56
        await run.ask()
        assert run.dials == [10, 11]
        run.clock.now += 1
        assert run.state("a") == "half_open"
        reply = await run.ask()
        assert (reply.header("X-Penstock-Fallback-Count"), run.dials) == ("0", [11, 11])
        assert run.states() == {}


async def test_failures_further_apart_than_the_window_do_not_open_it() -> None:
    async with chain(down(), up()) as run:
        for _ in range(30):
            await run.ask()
            run.clock.now += 3.4
        assert (run.dials, run.states()["a"].failures) == ([30, 30], 8)


@pytest.mark.parametrize("status", [400, 404, 429])
async def test_refusals_of_a_provider_never_open_it(status: int) -> None:
    async with chain(FakeUpstream([failing(status=status)], repeat=True), breaker={"failures": 1}) as run:
        for _ in range(5):
            assert (await run.ask()).status == status
        assert run.states() == {}


async def test_client_that_leaves_says_nothing_of_the_provider() -> None:
    stall = Stall()
    async with chain(FakeUpstream([[stall]]), breaker={"failures": 1}, timeouts=LONG) as run:
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", OPENAI.path, body=WHOLE))
        await stall.reached.wait()
        client.close()
        await run.harness.wait_settled(1)
        assert run.last.attempts[0].reason == "client_gone"
        assert run.states() == {}


async def test_failure_counts_while_its_exchange_goes_on_with_the_next() -> None:
    pause = Pause()
    slow = FakeUpstream([[pause, *good(is_stream=False)], good(is_stream=False)])
    async with chain(down(), slow, breaker={"failures": 1}, timeouts=LONG) as run:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.ask)
            await pause.reached.wait()
            assert run.state("a") == "open"
            assert (await run.ask()).status == 200
            assert run.dials == [1, 2]
            pause.release()
        assert run.states()["a"].failures == 1


async def test_one_exchange_at_a_time_probes_and_the_others_go_elsewhere() -> None:
    pause = Pause()
    first = FakeUpstream([failing(), [pause, *good(is_stream=False)], good(is_stream=False)])
    async with chain(first, up(), breaker={"failures": 1}, timeouts=LONG) as run:
        await run.ask()
        run.clock.now += 60
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.ask)
            await pause.reached.wait()
            for _ in range(5):
                assert (await run.ask()).header("X-Penstock-Fallback-Count") == "1"
            assert run.dials == [2, 6]
            assert run.state("a") == "half_open"
            pause.release()
        assert run.state("a") == "closed"
        assert (await run.ask()).header("X-Penstock-Fallback-Count") == "0"


async def test_streamed_probe_closes_it_with_its_first_event() -> None:
    pause = Pause()
    stream: list[Step] = [STREAM_HEAD, chunk(OPENAI.events[0]), pause, chunk(OPENAI.events[1]), LAST_CHUNK]
    first = FakeUpstream([failing(), stream, good(is_stream=False)])
    async with chain(first, up(), breaker={"failures": 1}, timeouts=LONG) as run:
        await run.ask()
        run.clock.now += 60
        async with run.harness.stream("POST", OPENAI.path, body=STREAM) as reply:
            assert await anext(aiter(reply)) == OPENAI.events[0]
            assert (await run.ask()).header("X-Penstock-Fallback-Count") == "0"
            assert run.state("a") == "closed"
            pause.release()
            assert (await reply.read()).is_complete


async def test_probe_whose_client_leaves_makes_room_for_the_next() -> None:
    stall = Stall()
    async with chain(FakeUpstream([failing(), [stall], good(is_stream=False)]), breaker={"failures": 1}) as run:
        await run.ask()
        run.clock.now += 60
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", OPENAI.path, body=WHOLE))
        await stall.reached.wait()
        assert (await run.ask()).header("X-Penstock-Error") == "circuit_open"
        client.close()
        await stall.gone.wait()
        await run.harness.wait_settled(3)
        assert run.state("a") == "half_open"
        assert (await run.ask()).body == GOOD
        assert run.state("a") == "closed"


class Refusing:
    """Refuse every attempt, as a rate limit may, or the whole exchange, while told to."""

    how = ""

    @hookimpl
    def admit_attempt(self, exchange: Exchange) -> RequestError | None:
        refusal = RequestError("rate_limit_exceeded", f"Too many at once, {len(exchange.attempts)}.")
        if self.how == "raise":
            raise refusal
        return refusal if self.how == "skip" else None


@pytest.mark.parametrize("how", ["skip", "raise"])
async def test_probe_another_plugin_refuses_makes_room_for_the_next(how: str) -> None:
    refusing = Refusing()
    first = FakeUpstream([failing(), good(is_stream=False)])
    async with chain(first, breaker={"failures": 1}, later=[("refusing", refusing)]) as run:
        await run.ask()
        run.clock.now += 60
        refusing.how = how
        assert (await run.ask()).status == 429
        assert run.state("a") == "half_open"
        refusing.how = ""
        assert (await run.ask()).body == GOOD


async def test_reload_keeps_what_is_open() -> None:
    async with chain(down(), up(), breaker={"failures": 1}) as run:
        await run.ask()
        assert run.state("a") == "open"
        await run.harness.gateway.reload(run.harness.configuration)
        assert len(run.plugin) == 2
        assert run.state("a") == "open"
        await run.ask()
        assert run.dials == [1, 2]


async def test_deadline_of_the_chain_does_not_blame_whom_it_left_no_time() -> None:
    slow = [{"timeouts": LONG | {"first_byte": 0.5}}]
    upstreams = FakeUpstream([[Stall()]]), FakeUpstream([[Stall()]])
    async with chain(
        *upstreams, fallback={"timeout_ms": 700}, breaker={"failures": 1}, bindings=slow, timeouts=LONG
    ) as run:
        assert (await run.ask()).status == 504
        assert run.dials == [1, 1]
        assert [run.state(name) for name in "ab"] == ["open", "closed"]


async def test_deadline_of_the_chain_blames_whom_it_left_all_the_time() -> None:
    async with chain(
        FakeUpstream([[Stall()]]), fallback={"timeout_ms": 200}, breaker={"failures": 1}, timeouts=LONG
    ) as run:
        assert (await run.ask()).status == 504
        assert run.state("a") == "open"


async def test_opening_and_closing_is_logged_once_each(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "penstock.fallback"):
        first = FakeUpstream([failing(), failing(), good(is_stream=False), good(is_stream=False)])
        async with chain(first, breaker={"failures": 1}) as run:
            for _ in range(3):
                await run.ask()
                await run.ask()
                run.clock.now += 60
    told = [record.getMessage().partition("gpc_a ")[2] for record in caplog.records]
    assert told == [
        "opened: it is skipped for 60 s",
        "stays open for another 60 s: a probe failed",
        "closed: it answers again",
    ]


async def test_healthy_bindings_leave_nothing_behind() -> None:
    async with chain(up(), breaker={"failures": 1}) as run:
        for _ in range(20):
            await run.ask()
        assert run.plugin[0]._breakers.by_binding == {}
        assert all(not any("fallback" in key.name for key in found.state) for found in run.harness.exchanges)


@pytest.mark.parametrize("table", [{"failures": 0}, {"window_seconds": 0.0}, {"open_seconds": -1.0}, {"windows": 3}])
async def test_settings_that_mean_nothing_are_refused(table: dict[str, float]) -> None:
    harness = Harness([("fallback", FallbackChains)], {"fallback": table}, up())
    with pytest.raises(ConfigurationError, match=rf"\[plugins\.fallback\] {next(iter(table))}"):
        async with harness:
            pass


def test_plugin_keeps_the_rules_of_plugins() -> None:
    check_plugin(FallbackChains)
