"""Check a plugin class in one call: what it declares, how it is built, what it does to exchanges."""

from __future__ import annotations

import difflib
import inspect
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import anyio
import attrs

from penstock.config import structure
from penstock.errors import ConfigurationError, PluginError
from penstock.hooks import ONCE, PER_EXCHANGE
from penstock.models import ProviderBinding
from penstock.plugins import NEEDS, faults_of, hooks_of
from penstock.testing.byte_exact import count_carried, portal_to
from penstock.testing.habits import check_chunks_asked_for, check_peek, watch_late_fields
from penstock.testing.harness import BINDINGS, Harness, snake_case
from penstock.testing.provider_checks import check_provider
from penstock.testing.samples import ODD, SAMPLES, Sample
from penstock.testing.upstream import (
    STREAM_HEAD,
    Close,
    FakeUpstream,
    RecordedRequest,
    Reset,
    Stall,
    Step,
    chunk,
    http_reply,
)

_PARAMETERS: dict[str, tuple[str, ...]] = {
    "register_providers": (),
    "register_routes": (),
    "register_commands": ("cli",),
    "lifespan": (),
    "on_stream_chunk": ("exchange", "chunk"),
}
_NEEDED_HOOKS = {
    "reads_body": ("authenticate", "pre_request", "select_provider", "register_providers", "post_response"),
    "edits_body": ("authenticate", "pre_request", "select_provider", "register_providers"),
    "sees_chunks": ("on_stream_chunk",),
    "edits_chunks": ("on_stream_chunk", "register_providers"),
}


def check_plugin(
    kind: type[Any],
    config: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    plugins: Collection[Any] = (),
    other_config: Mapping[str, Mapping[str, Any]] | None = None,
    bindings: Collection[ProviderBinding] = (),
    translates: Collection[str] = (),
) -> None:
    """Check that a plugin class keeps the contract. Raises AssertionError saying what to mend.

    ``config``: its table, if the defaults are not enough. ``name``: what the configuration calls it, else the
    class in snake case. ``plugins`` and ``other_config``: what else it needs to run. ``bindings``: accounts
    its providers can work with, one per type. ``translates``: dialects whose request bodies they rewrite.
    """
    plugin = name or snake_case(kind.__name__)
    check_hooks(kind)
    check_needs(kind)
    _check_config(kind, config)
    tables = {**(other_config or {}), **({plugin: config} if config is not None else {})}
    harness = Harness([(plugin, kind), *plugins], tables)
    try:
        bound = _check_providers(harness, plugin, bindings, translates)
    except ConfigurationError as error:
        raise AssertionError(f"a gateway with the plugin cannot be built: {error}") from error
    _check_exchanges(kind, [(plugin, kind), *plugins], tables, bound)
    if not (translates or any(getattr(kind, need, False) for need in ("edits_body", "edits_chunks"))):
        count_carried([(plugin, kind), *plugins], tables, bindings=bound)


def check_hooks(kind: type[Any]) -> None:
    """Check that each hook is a real one with the right arguments, and that none was left unmarked."""
    known = (*ONCE, *PER_EXCHANGE)
    for name, member in inspect.getmembers(kind, callable):
        is_marked = getattr(member, "penstock_impl", None) is not None
        where = f"{kind.__name__}.{name}"
        if not is_marked:
            assert name not in known, f"{where} has the name of a hook but no @hookimpl, so it would never run"
            continue
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"hooks are {', '.join(known)}"
        assert name in known, f"{where} is no hook; {hint}"
        expected = _PARAMETERS.get(name, ("exchange",))
        taken = tuple(inspect.signature(member).parameters)[1:]
        assert taken == expected, f"{where} must take ({', '.join(expected)}) after self, takes ({', '.join(taken)})"
        is_async = inspect.iscoroutinefunction(member)
        assert not (is_async and name in ONCE), f"{where} runs while the gateway is built and must not be async"
        is_generator = inspect.isgeneratorfunction(member) or inspect.isasyncgenfunction(member)
        assert not is_generator, f"{where} is a generator function: nothing in it would run as a hook"
    assert hooks_of(kind), f"{kind.__name__} has no method marked @hookimpl"


def check_needs(kind: type[Any]) -> None:
    """Check that declared needs are booleans and fit the hooks."""
    hooks = hooks_of(kind)
    for fault in faults_of(kind):
        raise AssertionError(f"{kind.__name__}: {fault}")
    for need in NEEDS:
        value = getattr(kind, need, False)
        assert isinstance(value, bool), f"{kind.__name__}.{need} must be True or False, is {value!r}"
        possible = _NEEDED_HOOKS[need]
        has_one = any(hook in hooks for hook in possible)
        assert not value or has_one, f"{kind.__name__} declares {need} but implements none of {', '.join(possible)}"


def _check_config(kind: type[Any], config: Mapping[str, Any] | None) -> None:
    """Check that the Config class is typed and frozen, takes its table, and refuses an unknown key."""
    config_class = getattr(kind, "Config", None)
    if config_class is None:
        assert not config, f"{kind.__name__} has no Config class, so it takes no settings"
        return
    assert attrs.has(config_class), f"{kind.__name__}.Config must be an attrs class"
    is_frozen = getattr(config_class.__setattr__, "__name__", "") == "_frozen_setattrs"
    assert is_frozen, f"{kind.__name__}.Config must be frozen: use @attrs.frozen"
    try:
        structure(config or {}, config_class, where="check_plugin")
    except ConfigurationError as error:
        hint = "" if config is not None else "; give check_plugin a config with what has no default"
        raise AssertionError(f"{kind.__name__}.Config cannot be read: {error}{hint}") from error
    try:
        structure({**(config or {}), "no_such_setting": 1}, config_class, where="check_plugin")
    except ConfigurationError:
        return
    raise AssertionError(f"{kind.__name__}.Config accepts an unknown key")


def _check_providers(
    harness: Harness, plugin: str, bindings: Collection[ProviderBinding], translates: Collection[str]
) -> Sequence[Mapping[str, Any]]:
    """Check the providers the plugin brings; returns bindings that lead through them, or the usual ones."""
    given = {binding.type: binding for binding in bindings}
    bound = []
    with portal_to(harness):
        built = next(each for each in harness.gateway.generation.plugins if each.name == plugin)
        register = getattr(built.instance, "register_providers", tuple)
        for provider in register():
            binding = given.get(provider.type)
            check_provider(provider, binding, translates=translates)
            settings = {} if binding is None else dict(binding.settings)
            bound.append({"name": provider.type, "type": provider.type, "settings": settings})
    return bound or BINDINGS


# --- exchanges ----------------------------------------------------------------------------------------------


class _Script:
    """Let each exchange decide what the upstream does next, and tell when it was asked."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def __call__(self, request: RecordedRequest) -> list[Step]:  # noqa: ARG002 - the outcome under test decides
        return self.steps


def _check_exchanges(
    kind: type[Any],
    plugins: Sequence[Any],
    tables: Mapping[str, Mapping[str, Any]],
    bindings: Sequence[Mapping[str, Any]],
) -> None:
    """Run every sample through every outcome; nothing may raise, everything settles exactly once."""
    script = _Script()
    plugin = plugins[0][0]
    harness = Harness(plugins, tables, FakeUpstream([script], repeat=True), bindings=bindings)
    with portal_to(harness) as portal:
        late = watch_late_fields(harness, plugin)
        for sample in (*SAMPLES, *ODD):
            for outcome, steps in _outcomes(sample).items():
                script.steps = steps
                portal.call(_run_one, harness, sample, outcome, steps[-1])
                where = f"{sample}, {outcome}"
                _check_settled(harness, where)
                check_peek(harness.exchanges[-1], where)
                assert not late, f"{where}: {late[0]}"
        check_chunks_asked_for(kind, plugin, harness.exchanges)


def _outcomes(sample: Sample) -> dict[str, list[Step]]:
    answer = sample.answer()
    cut: list[Step] = (
        [STREAM_HEAD, chunk(sample.events[0]), Close()] if sample.is_stream else [http_reply(b"x" * 9)[:-1], Close()]
    )
    return {
        "success": answer,
        "refusal": answer,
        "upstream error": [http_reply(b'{"error":{"message":"overloaded"}}', 503)],
        "upstream reset": [Reset()],
        "broken off": cut,
        "disconnect": [*answer[:-1], Stall()] if sample.is_stream else [Stall()],
        "disconnect before the head": [Stall()],
    }


async def _run_one(harness: Harness, sample: Sample, outcome: str, last: Step) -> None:
    """Send one request and take it to its settlement."""
    wanted = harness.settled + 1
    client = await harness.raw()
    key = None if outcome == "refusal" else harness.key
    await client.send(sample.wire(key))
    if isinstance(last, Stall):
        # A plugin may refuse or answer by itself, so either the upstream stalls or the exchange settles.
        async with anyio.create_task_group() as tasks:

            async def wait_stall() -> None:
                await last.reached.wait()
                tasks.cancel_scope.cancel()

            async def wait_settled() -> None:
                await harness.wait_settled(wanted)
                tasks.cancel_scope.cancel()

            tasks.start_soon(wait_stall)
            tasks.start_soon(wait_settled)
        client.reset()
    await harness.wait_settled(wanted)
    client.close()


def _check_settled(harness: Harness, where: str) -> None:
    for fault in harness.faults:
        by = f"{fault.plugin}.{fault.hook}" if isinstance(fault, PluginError) else "the gateway"
        raise AssertionError(f"{where}: {by} raised {fault.__cause__ or fault!r}") from fault
    counts = Counter(exchange.request_id for exchange in harness.exchanges)
    twice = [request_id for request_id, count in counts.items() if count != 1]
    assert not twice, f"{where}: post_response ran {counts[twice[0]]} times"
    assert len(counts) == harness.settled, f"{where}: an exchange settled without post_response"
