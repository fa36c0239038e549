"""Hooks as they are compiled: in which order they run, which answer counts, what is counted, what is refused."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import pytest
from anyio.lowlevel import checkpoint

from penstock import Chunk, ConfigurationError, Exchange, Principal, Response, hookimpl
from penstock.gateway import Gateway
from penstock.hooks import PER_EXCHANGE, compile_hooks, new_plugin_manager
from penstock.testing import FakeUpstream, Harness, http_reply, stream_reply

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": []}


def answering() -> FakeUpstream:
    return FakeUpstream([[http_reply()]], repeat=True)


def plugin(name: str, options: dict[str, bool] | None = None, /, **hooks: Any) -> tuple[str, type[Any]]:
    """Return a plugin whose hooks are these functions, marked with these options."""
    mark: Any = hookimpl
    return name, type(name.title(), (), {hook: mark(each, **(options or {})) for hook, each in hooks.items()})


def noting(name: str, notes: list[str], **options: bool) -> tuple[str, type[Any]]:
    """Return a plugin that notes when it is called, and decides nothing."""

    def note(self: Any, exchange: Exchange) -> None:
        notes.append(name)

    return plugin(name, options, pre_request=note, post_response=note)


# --- order ----------------------------------------------------------------------------------------------------------

ORDERS: list[tuple[list[tuple[str, str]], list[str]]] = [
    ([("a", ""), ("b", ""), ("c", "")], ["a", "b", "c"]),
    ([("c", ""), ("a", ""), ("b", "")], ["c", "a", "b"]),
    ([("a", ""), ("b", "tryfirst"), ("c", "")], ["b", "a", "c"]),
    ([("a", "trylast"), ("b", ""), ("c", "")], ["b", "c", "a"]),
    ([("a", "trylast"), ("b", ""), ("c", "tryfirst")], ["c", "b", "a"]),
    ([("a", "tryfirst"), ("b", "tryfirst"), ("c", "")], ["a", "b", "c"]),
    ([("a", "trylast"), ("b", "trylast"), ("c", "")], ["c", "a", "b"]),
]


@pytest.mark.parametrize(("plugins", "order"), ORDERS)
async def test_hooks_run_in_the_order_of_the_configuration_and_settle_in_reverse(
    plugins: list[tuple[str, str]], order: list[str]
) -> None:
    notes: list[str] = []
    found = [noting(name, notes, **({option: True} if option else {})) for name, option in plugins]
    async with Harness(found, upstream=answering()) as harness:
        await harness.request("POST", CHAT, body=BODY)
        assert notes == [*order, *reversed(order)]


# --- the first answer counts ----------------------------------------------------------------------------------------


def kinds(answer: Any) -> dict[str, Any]:
    """Return one function per way a hook can answer."""

    def plain(self: Any, exchange: Exchange) -> Any:
        return answer

    async def waiting(self: Any, exchange: Exchange) -> Any:
        await checkpoint()
        return answer

    def sometimes(self: Any, exchange: Exchange) -> Awaitable[Any]:
        return waiting(self, exchange)

    return {"def": plain, "async def": waiting, "def with an awaitable": sometimes}


KINDS = ["def", "async def", "def with an awaitable"]


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
async def test_none_leaves_it_to_the_next_and_the_first_answer_ends_the_hook(first: str, second: str) -> None:
    late: list[str] = []

    def never(self: Any, exchange: Exchange) -> None:
        late.append("called")

    plugins = [
        plugin("passing", pre_request=kinds(None)[first]),
        plugin("answering", pre_request=kinds(Response(200, b"mine", ()))[second]),
        plugin("late", pre_request=never),
    ]
    async with Harness(plugins, upstream=answering()) as harness:
        reply = await harness.request("POST", CHAT, body=BODY)
        assert (reply.status, reply.body, late) == (200, b"mine", [])
        assert harness.upstreams[0].requests == []


@pytest.mark.parametrize("kind", KINDS)
async def test_first_principal_wins(kind: str) -> None:
    plugins = [
        plugin("nobody", authenticate=kinds(None)[kind]),
        plugin("somebody", authenticate=kinds(Principal("vk_1", "one", "one"))[kind]),
        plugin("other", authenticate=kinds(Principal("vk_2", "two", "two"))[kind]),
        "virtual_keys",
    ]
    async with Harness(plugins, upstream=answering()) as harness:
        assert (await harness.request("POST", CHAT, {"x-api-key": "bad"}, BODY)).status == 200
        assert harness.exchanges[0].principal is not None
        assert harness.exchanges[0].principal.key_name == "one"


@pytest.mark.parametrize("kind", KINDS)
async def test_select_provider_leaves_it_to_the_next_plugin(kind: str) -> None:
    async with Harness([plugin("nothing", select_provider=kinds(None)[kind])], upstream=answering()) as harness:
        assert (await harness.request("POST", CHAT, body=BODY)).status == 200


# --- what is counted ------------------------------------------------------------------------------------------------


async def test_calls_time_and_errors_are_counted_per_plugin_and_hook() -> None:
    def fail(self: Any, exchange: Exchange) -> None:
        if len(harness.exchanges) == 2:
            raise LookupError("third time")

    async def later(self: Any, exchange: Exchange) -> None:
        await checkpoint()
        fail(self, exchange)

    def watch(self: Any, exchange: Exchange, chunk: Chunk) -> None:
        return None

    name, kind = plugin("counted", pre_request=fail, post_response=later, on_stream_chunk=watch)
    kind.sees_chunks = True
    upstream = FakeUpstream([stream_reply(b"data: 1\n\n", b"data: 2\n\n")], repeat=True)
    async with Harness([(name, kind)], upstream=upstream) as harness:
        for _ in range(3):
            await harness.request("POST", CHAT, body={**BODY, "stream": True, "stream_options": {}})
        calls = {
            call.hook: call for call in harness.gateway.generation.pipeline.hooks.all_calls() if call.plugin == name
        }
        assert set(calls) == {"pre_request", "post_response", "on_stream_chunk"}
        counted = {hook: (call.calls, call.errors) for hook, call in calls.items()}
        assert (counted["pre_request"], counted["post_response"]) == ((3, 1), (3, 1))
        assert counted["on_stream_chunk"][0] >= 2
        assert all(call.total_ns > 0 for call in calls.values())


# --- what is compiled -----------------------------------------------------------------------------------------------


def compiled(kind: type[Any]) -> Any:
    manager = new_plugin_manager()
    manager.register(kind(), "p")
    return compile_hooks(manager)


def test_hook_nobody_implements_is_an_empty_tuple() -> None:
    hooks = compile_hooks(new_plugin_manager())
    assert [getattr(hooks, name) for name in PER_EXCHANGE] == [()] * len(PER_EXCHANGE)
    assert not hooks.sees_all_chunks


async def coroutine(self: Any, exchange: Exchange) -> None:
    await checkpoint()


def function(self: Any, exchange: Exchange) -> None:
    return None


def test_compiled_calls_know_their_plugin_and_kind() -> None:
    _, kind = plugin("both", authenticate=coroutine, pre_request=function)
    hooks = compiled(kind)
    assert [(call.plugin, call.hook, call.is_async) for call in hooks.all_calls()] == [
        ("p", "authenticate", True),
        ("p", "pre_request", False),
    ]


@pytest.mark.parametrize("option", ["wrapper", "hookwrapper"])
@pytest.mark.parametrize("hook", ["authenticate", "pre_request", "select_provider", "post_response"])
def test_wrapper_is_refused_by_name(hook: str, option: str) -> None:
    def wrap(self: Any, exchange: Exchange) -> Any:
        yield

    name, kind = plugin("wrapping", {option: True}, **{hook: wrap})
    with pytest.raises(ConfigurationError, match=rf"'wrapping'.*{hook} cannot be a hook wrapper"):
        Gateway(Harness([(name, kind)], upstream=FakeUpstream()).configuration())
    with pytest.raises(ConfigurationError, match=rf"plugin 'p': {hook} cannot be a hook wrapper"):
        compiled(kind)


def test_hook_of_another_signature_is_refused() -> None:
    def short(self: Any) -> None:
        return None

    _, kind = plugin("short", pre_request=short)
    with pytest.raises(ConfigurationError, match=r"pre_request must take \(exchange\)"):
        compiled(kind)


def test_chunk_hook_sees_every_stream_only_where_the_plugin_says_so() -> None:
    def watch(self: Any, exchange: Exchange, chunk: Chunk) -> None:
        return None

    _, kind = plugin("asking", on_stream_chunk=watch)
    assert not compiled(kind).sees_all_chunks
    kind.sees_chunks = True
    assert compiled(kind).sees_all_chunks


@pytest.mark.parametrize(("asked", "others", "there_are"), [("wacther", True, "'watcher'"), ("watcher", False, "none")])
async def test_watching_by_a_wrong_name_says_the_name_and_those_there_are(
    asked: str, others: bool, there_are: str
) -> None:
    def ask(self: Any, exchange: Exchange) -> None:
        exchange.watch_chunks(asked)

    def see(self: Any, exchange: Exchange, chunk: Chunk) -> None: ...

    watcher = plugin("watcher", None, on_stream_chunk=see) if others else plugin("watcher", None, post_response=ask)
    plugins = [plugin("asker", None, pre_request=ask), watcher]
    async with Harness(plugins, upstream=answering()) as gateway:
        reply = await gateway.request("POST", CHAT, body=BODY)
        assert (reply.status, reply.header("X-Penstock-Error")) == (500, "plugin_error")
        assert str(gateway.faults[0]) == (
            f"watch_chunks({asked!r}) was called, and no enabled plugin of that name has on_stream_chunk; "
            f"those that have one: {there_are}"
        )
