"""Check what a plugin does to exchanges and nobody would notice: asking, adding and watching where it has no effect."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import Any

from penstock.hooks import BEFORE_THE_ANSWER, Call
from penstock.models import UNREADABLE, Exchange
from penstock.plugins import hooks_of
from penstock.testing.harness import Harness


def check_peek(exchange: Exchange, where: str) -> None:
    """Check that nobody asked what the body of a request without any says."""
    endpoint, error = exchange.request.endpoint, exchange.error
    is_peek = error is not None and error.code == "bad_request" and error.message.startswith(UNREADABLE)
    assert not is_peek or endpoint.has_model or not endpoint.methods, (
        f"{where}: refused with 400, for exchange.peek was asked about a request without a body; "
        "ask only where exchange.request.endpoint.has_model"
    )


def watch_late_fields(harness: Harness, plugin: str) -> list[str]:
    """Have the plugin's late hooks looked at; returns a list that gets what is wrong with them."""
    late: list[str] = []
    hooks = harness.gateway.generation.pipeline.hooks
    for call in (*hooks.on_stream_chunk, *hooks.post_response):
        if call.plugin == plugin:
            call.function = _noting_late_fields(call, late)
    return late


def _noting_late_fields(call: Call, late: list[str]) -> Callable[..., Any]:
    function = call.function

    def note(exchange: Exchange, before: Sequence[Any]) -> None:
        added = [field for field in exchange.reply_fields if field not in before]
        if added:
            late.append(
                f"{call.plugin}.{call.hook} adds to exchange.reply_fields ({added[0]!r}), too late: the head has gone "
                f"to the client; add to it in one of {', '.join(BEFORE_THE_ANSWER)}"
            )

    @functools.wraps(function)
    def run(exchange: Exchange, *chunk: Any) -> Any:
        before = tuple(exchange.reply_fields)
        result = function(exchange, *chunk)
        if inspect.isawaitable(result):
            return finish(exchange, before, result)
        note(exchange, before)
        return result

    async def finish(exchange: Exchange, before: Sequence[Any], result: Any) -> Any:
        returned = await result
        note(exchange, before)
        return returned

    return run


def check_chunks_asked_for(kind: type[Any], plugin: str, exchanges: Sequence[Exchange]) -> None:
    """Check that a chunk hook runs on some exchange; one that watches what no sample asks for is believed."""
    if "on_stream_chunk" not in hooks_of(kind) or getattr(kind, "sees_chunks", False):
        return
    watches = any(plugin in (exchange.chunk_watchers or ()) for exchange in exchanges)
    assert watches or "watch_chunks" in _names_used(kind), (
        f"{kind.__name__}.on_stream_chunk never runs: declare sees_chunks = True, or call "
        "exchange.watch_chunks(name) in pre_request, with the name the configuration gives the plugin"
    )


def _names_used(kind: type[Any]) -> set[str]:
    """Return the attributes and globals that a class and the functions of its module ask for."""
    own = vars(sys.modules[kind.__module__]).values()
    functions = [member for base in kind.__mro__ for member in vars(base).values()]
    functions += [member for member in own if inspect.isfunction(member)]
    found: set[str] = set()
    for member in functions:
        code = getattr(inspect.unwrap(getattr(member, "__func__", member)), "__code__", None)
        for each in _codes(code):
            found |= {*each.co_names}
    return found


def _codes(code: object) -> Iterator[CodeType]:
    if isinstance(code, CodeType):
        yield code
        for constant in code.co_consts:
            yield from _codes(constant)
