"""Collect hook implementations with pluggy once, and call compiled tuples ever after.

pluggy validates and orders; it cannot await, and its ``firstresult`` is silently wrong for coroutines. So each hook is
compiled, at start, into a tuple of calls that know whether they must be awaited. This module and ``plugins`` are the
only ones that know pluggy.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import anyio
import attrs
import pluggy

from penstock import hookspecs
from penstock.editing import NO_EDITS, Chunk, Edits
from penstock.errors import ConfigurationError, PluginError, RequestError
from penstock.models import Exchange

if TYPE_CHECKING:
    from penstock.providers import ResponseFilter

PER_EXCHANGE = (
    "authenticate", "pre_request", "select_provider", "admit_attempt", "on_response", "on_stream_chunk",
    "post_response",
)  # fmt: skip
BEFORE_THE_ANSWER = ("authenticate", "pre_request", "select_provider", "admit_attempt")
"""The hooks whose response fields still reach the client."""
_MORE_ARGUMENTS = {"on_stream_chunk": ("chunk",), "on_response": ("body",)}
HOOK_SECONDS = 30.0
"""How long a hook may await, unless the configuration says otherwise."""
ONCE = (
    "register_providers", "register_translators", "register_evaluators", "register_routes", "register_commands",
    "lifespan",
)  # fmt: skip


@attrs.define(eq=False)
class Call:
    """One plugin's implementation of one hook, timed."""

    plugin: str
    hook: str
    function: Callable[..., Any]
    is_async: bool
    is_always: bool = True
    """For on_stream_chunk: whether the plugin sees every exchange's chunks."""
    timeout: float = HOOK_SECONDS
    """How long one call may await, in seconds."""
    calls: int = 0
    total_ns: int = 0
    errors: int = 0

    def run(self, exchange: Exchange) -> Any:
        """Call the plugin; what it returns may have to be awaited (``wait``)."""
        started = perf_counter_ns()
        try:
            return self.function(exchange)
        except RequestError:
            raise
        except Exception as error:
            raise self.failed() from error
        finally:
            self.calls += 1
            self.total_ns += perf_counter_ns() - started

    async def wait(self, pending: Awaitable[Any]) -> Any:
        """Await what ``run`` returned. Raises PluginError for whatever goes wrong, and once the time is up."""
        started = perf_counter_ns()
        try:
            with anyio.move_on_after(self.timeout):
                return await pending
        except RequestError:
            raise
        except Exception as error:
            raise self.failed() from error
        finally:
            self.total_ns += perf_counter_ns() - started
        raise self.failed() from TimeoutError(f"it awaited for more than {self.timeout:g} s")

    async def response(self, exchange: Exchange, body: bytes) -> bytes:
        """Show a whole answer to the plugin; returns the body to go on with."""
        started = perf_counter_ns()
        try:
            edited = self.function(exchange, body)
        except RequestError:
            raise
        except Exception as error:
            raise self.failed() from error
        finally:
            self.count(started)
        if inspect.isawaitable(edited):
            edited = await self.wait(edited)
        return body if edited is None else self._checked(edited)

    def chunk(self, exchange: Exchange, chunk: Chunk) -> bytes:
        """Run a synchronous chunk hook; returns the bytes to pass on."""
        started = perf_counter_ns()
        try:
            edited = self.function(exchange, chunk)
        except RequestError:
            raise
        except Exception as error:
            raise self.failed() from error
        finally:
            self.count(started)
        return chunk.data if edited is None else self._checked(edited)

    async def chunk_async(self, exchange: Exchange, chunk: Chunk) -> bytes:
        """Run a chunk hook of either kind; returns the bytes to pass on."""
        if not self.is_async:
            return self.chunk(exchange, chunk)
        self.calls += 1
        edited = await self.wait(self.function(exchange, chunk))
        return chunk.data if edited is None else self._checked(edited)

    def _checked(self, edited: object) -> bytes:
        if isinstance(edited, bytes):
            return edited
        if inspect.iscoroutine(edited):
            edited.close()
            problem = "it returned a coroutine; a chunk hook that awaits is declared async def"
        else:
            problem = f"it returned {type(edited).__name__}, not bytes or None"
        raise self.failed() from TypeError(problem)

    def count(self, started: int) -> None:
        self.calls += 1
        self.total_ns += perf_counter_ns() - started

    def failed(self) -> PluginError:
        self.errors += 1
        return PluginError(self.plugin, self.hook)


@attrs.frozen(eq=False)
class Hooks:
    """Hold every hook as a tuple of calls, in the order they run."""

    authenticate: tuple[Call, ...] = ()
    pre_request: tuple[Call, ...] = ()
    select_provider: tuple[Call, ...] = ()
    admit_attempt: tuple[Call, ...] = ()
    on_response: tuple[Call, ...] = ()
    on_stream_chunk: tuple[Call, ...] = ()
    post_response: tuple[Call, ...] = ()
    sees_all_chunks: bool = False

    def edits_for(self, exchange: Exchange, response_filter: ResponseFilter | None) -> Edits:
        """Return who may change this exchange's response; NO_EDITS where nobody asked."""
        watchers = exchange.chunk_watchers
        if watchers is None and not self.sees_all_chunks:
            return NO_EDITS if response_filter is None else Edits(response_filter)
        names = watchers or ()
        calls = tuple(call for call in self.on_stream_chunk if call.is_always or call.plugin in names)
        _check_watchers(names, "watch_chunks", "on_stream_chunk", self.on_stream_chunk)
        if not calls and response_filter is None:
            return NO_EDITS
        return Edits(response_filter, calls)

    def reviewers_of(self, exchange: Exchange) -> tuple[Call, ...]:
        """Return who asked to see this exchange's whole answer."""
        names = exchange.response_watchers
        if not names:
            return ()
        _check_watchers(names, "watch_response", "on_response", self.on_response)
        return tuple(call for call in self.on_response if call.plugin in names)

    def field_writers(self) -> tuple[str, ...]:
        """Return the plugins with a hook that may add response fields; bundled ones only where there is no other."""
        calls = [call for name in BEFORE_THE_ANSWER for call in getattr(self, name)]
        others = [call for call in calls if not _is_bundled(call.function)]
        return tuple(dict.fromkeys(call.plugin for call in others or calls))

    def all_calls(self) -> Iterable[Call]:
        for name in PER_EXCHANGE:
            yield from getattr(self, name)


def _check_watchers(names: Iterable[str], asked: str, hook: str, calls: Iterable[Call]) -> None:
    """Raise UnknownWatcherError for a name that no plugin with the hook has."""
    known = [call.plugin for call in calls]
    unknown = set(names).difference(known)
    if unknown:
        raise UnknownWatcherError(str(min(unknown, key=str)), asked, hook, known)


def _is_bundled(function: Callable[..., Any]) -> bool:
    return getattr(function, "__module__", "").partition(".")[0] == "penstock_plugins"


def new_plugin_manager() -> pluggy.PluginManager:
    """Return a plugin manager that knows the specification."""
    manager = pluggy.PluginManager("penstock")
    manager.add_hookspecs(hookspecs)
    return manager


def compile_hooks(manager: pluggy.PluginManager, timeout: float = HOOK_SECONDS) -> Hooks:
    """Turn what is registered into tuples. Raises ConfigurationError for what cannot be called.

    ``timeout``: how long a hook may await, in seconds; the pipeline bounds post_response itself.
    """
    compiled = {
        name: tuple(_calls(manager, name, math.inf if name == "post_response" else timeout)) for name in PER_EXCHANGE
    }
    compiled["post_response"] = tuple(reversed(compiled["post_response"]))
    return Hooks(
        **compiled,
        sees_all_chunks=any(call.is_always for call in compiled["on_stream_chunk"]),
    )


def _calls(manager: pluggy.PluginManager, hook: str, timeout: float) -> Iterable[Call]:
    for implementation in _in_order(manager, hook):
        plugin, function = implementation.plugin_name, implementation.function
        if implementation.hookwrapper or implementation.wrapper:
            raise ConfigurationError(f"plugin {plugin!r}: {hook} cannot be a hook wrapper; implement the hook itself")
        parameters = tuple(implementation.argnames)
        expected = ("exchange", *_MORE_ARGUMENTS.get(hook, ()))
        if parameters != expected:
            raise ConfigurationError(f"plugin {plugin!r}: {hook} must take ({', '.join(expected)}), has {parameters}")
        is_always = hook != "on_stream_chunk" or bool(getattr(implementation.plugin, "sees_chunks", False))
        yield Call(plugin, hook, function, inspect.iscoroutinefunction(function), is_always, timeout)


def _in_order(manager: pluggy.PluginManager, hook: str) -> list[pluggy.HookImpl]:
    """Return the implementations as they run: tryfirst, plain, trylast, each in order of the configuration."""
    # pluggy calls from the end of the list, and plugins are registered in reverse order of the configuration. What is
    # trylast it inserts at the front, so of those the order is turned round once more.
    found = list(reversed(getattr(manager.hook, hook).get_hookimpls()))
    last = [implementation for implementation in found if implementation.trylast]
    return [implementation for implementation in found if not implementation.trylast] + last[::-1]


def collect(manager: pluggy.PluginManager, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
    """Call a once-at-start hook on every plugin, in order of the configuration; returns (plugin, result) pairs.

    Raises ConfigurationError naming the plugin for whatever it raises.
    """
    results = []
    for implementation in _in_order(manager, hook):
        values = [arguments[name] for name in implementation.argnames]
        with faults_named(implementation.plugin_name, hook):
            results.append((implementation.plugin_name, implementation.function(*values)))
    return results


@contextmanager
def faults_named(plugin: str, hook: str) -> Iterator[None]:
    """Turn whatever a plugin raises at start into a ConfigurationError that names its table, and the hook."""
    place = f"[plugins.{plugin}]"
    try:
        yield
    except ConfigurationError as error:
        lines = [line if place in line else f"{place} {line}" for line in error.faults]
        raise ConfigurationError(*lines) from error.__cause__
    except Exception as error:
        raise ConfigurationError(f"{place} failed in {hook}: {type(error).__name__}: {error}") from error


class UnknownWatcherError(PluginError):
    """Report a name given to ``watch_chunks`` or ``watch_response`` that no plugin with the hook has."""

    def __init__(self, name: str, asked: str, hook: str, known: Iterable[str]) -> None:
        super().__init__(name, hook)
        told = f"{asked}({name!r}) was called, and no enabled plugin of that name has {hook}"
        self.args = (f"{told}; those that have one: {', '.join(map(repr, known)) or 'none'}",)
