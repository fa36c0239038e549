"""Wire configuration, plugins, transports and listener together; start, reload, drain, stop.

A *generation* is one loaded configuration. Every exchange runs in the generation that was current when it began;
a reload builds the next one completely, swaps it in, and closes the old one once its exchanges have ended. A file that
cannot be used changes nothing. Each generation has a task of its own that enters its plugins' lifespans and leaves them
again, so that a plugin may keep a task group open in one, and generations may end in any order.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import anyio
import anyio.abc
import attrs

from penstock import plugins as plugin_loader
from penstock.asgi import Mount
from penstock.config import Configuration, TLSConfig
from penstock.errors import ConfigurationError
from penstock.fetch import Fetcher
from penstock.hooks import collect, compile_hooks, faults_named
from penstock.http_providers import HTTPProvider
from penstock.inner import GatewayCall, InnerCalls
from penstock.pipeline import SETTLE_SECONDS, Pipeline
from penstock.plugins import Plugin
from penstock.policies import ENFORCED
from penstock.providers import missing_members
from penstock.server import Server
from penstock.services import Fetch, Services
from penstock.shared import Shared
from penstock.telemetry import Telemetry
from penstock.upstream import UpstreamTransports

_RESERVED_PREFIXES = ("/v1", "/v1beta", "/healthz", "/readyz")


@attrs.define(eq=False)
class Generation:
    """One loaded configuration and what was built of it."""

    configuration: Configuration
    services: Services
    plugins: tuple[Plugin, ...]
    pipeline: Pipeline
    mounts: tuple[Mount, ...]
    lifespans: list[tuple[str, Any]]
    in_flight: int = 0
    is_ending: bool = False
    _begun: anyio.Event = attrs.Factory(anyio.Event)
    """Set once every lifespan is entered, or none will be."""
    _fault: ConfigurationError | None = None
    """Why not."""
    _end: anyio.Event = attrs.Factory(anyio.Event)
    _ended: anyio.Event = attrs.Factory(anyio.Event)

    async def begin(self, tasks: anyio.abc.TaskGroup, report: Callable[[Exception], None]) -> None:
        """Enter the plugins' lifespans in order; they are left in reverse once ``stop`` is called.

        What was entered is left again if one fails, or nobody waits any more. Raises ConfigurationError.
        """
        entering = anyio.CancelScope()
        tasks.start_soon(self._live, entering, report)
        try:
            await self._begun.wait()
        except BaseException:  # not TaskGroup.start: that waits for a task which waits to be stopped
            if not self._begun.is_set():
                entering.cancel()
            with anyio.CancelScope(shield=True):
                await self.stop()
            raise
        if self._fault is not None:
            raise self._fault

    async def _live(self, entering: anyio.CancelScope, report: Callable[[Exception], None]) -> None:
        fault: ConfigurationError | None = None
        try:
            with entering as scope:
                async with AsyncExitStack() as stack:
                    fault = await self._enter(stack)
                    if fault is None:
                        # Exchanges settle in shielded scopes, and need what the lifespans hold until then.
                        scope.shield = True
                        self._begun.set()
                        await self._end.wait()
        except Exception as error:
            # A plugin that fails on its way out takes nothing with it; one whose tasks die under traffic must be seen.
            if not self.is_ending:
                raise
            report(error)
        finally:
            self._fault = fault
            self._begun.set()
            self._ended.set()

    async def rehearse(self) -> None:
        """Enter the lifespans and leave them at once. Raises ConfigurationError."""
        self.services.is_rehearsal = True
        async with self.services.shared.running(), AsyncExitStack() as stack:
            fault = await self._enter(stack)
        if fault is not None:
            raise fault

    async def _enter(self, stack: AsyncExitStack) -> ConfigurationError | None:
        """Return the fault rather than raise it: those entered before must not see, or wrap, another's exception."""
        for name, lifespan in self.lifespans:
            try:
                await stack.enter_async_context(lifespan)
            except ConfigurationError as error:
                return self._placed(name, error)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin does not decide when the gateway ends
                fault = ConfigurationError(f"did not start: {type(error).__name__}: {error}")
                fault = self._placed(name, fault)
                fault.__cause__ = error
                return fault
        return None

    def _placed(self, plugin: str, error: ConfigurationError) -> ConfigurationError:
        """Return the faults with file and table before those that do not say where they are."""
        return _placed(f"{self.configuration.source}: ", f"[plugins.{plugin}] ", error)

    async def stop(self) -> None:
        """Have the lifespans left; returns once they are."""
        self.is_ending = True
        self._end.set()
        await self._ended.wait()


def build_generation(
    configuration: Configuration, transports: UpstreamTransports, telemetry: Telemetry, shared: Shared
) -> Generation:
    """Build everything a configuration asks for, without I/O. Raises ConfigurationError."""
    gateway = configuration.gateway
    services = Services(gateway.namespace, gateway.usage_frame, shared=shared, folder=configuration.folder)
    services.plugins = gateway.plugins
    services.provide(Fetch, Fetcher(transports))  # type: ignore[type-abstract]
    built: list[Pipeline] = []
    services.provide(GatewayCall, InnerCalls(gateway.namespace, lambda: built[0]))  # type: ignore[type-abstract]
    manager, plugins = plugin_loader.load(configuration, services)
    services.enforced = frozenset(name for plugin in plugins for name in plugin.enforces)
    hooks = compile_hooks(manager, gateway.hook_timeout)
    if not hooks.authenticate and not gateway.anonymous:
        raise ConfigurationError(
            f"{configuration.source}: [gateway] plugins: none of them authenticates, so anybody could call; "
            'add "virtual_keys", or set anonymous = true if that is meant'
        )
    pipeline = Pipeline(
        hooks,
        transports,
        telemetry,
        gateway.limits.max_body_bytes,
        gateway.drain_after_disconnect,
        services.translators,
        tuple(name for name in ENFORCED if name not in services.enforced),
    )
    built.append(pipeline)
    with _faults_placed(configuration.source):
        _register(manager, services)
        mounts = tuple(_checked_mounts(collect(manager, "register_routes")))
        lifespans = collect(manager, "lifespan")
    return Generation(configuration, services, plugins, pipeline, mounts, lifespans)


def _register(manager: Any, services: Services) -> None:
    """Have each registry take what plugins offer it."""
    registries: tuple[tuple[str, Callable[[Any], None]], ...] = (
        ("providers", lambda provider: _add_provider(services, provider)),
        ("translators", services.translators.add),
        ("evaluators", services.evaluators.add),
    )
    for what, add in registries:
        hook = f"register_{what}"
        for name, offered in collect(manager, hook):
            with faults_named(name, hook):
                for each in _listed(hook, what, offered):
                    add(each)


@contextmanager
def _faults_placed(source: str) -> Iterator[None]:
    """Put the file before faults that do not say where they are."""
    try:
        yield
    except ConfigurationError as error:
        raise _placed(f"{source}: ", "", error) from error.__cause__


def _placed(source: str, table: str, error: ConfigurationError) -> ConfigurationError:
    return ConfigurationError(*(line if line.startswith(source) else source + table + line for line in error.faults))


def _listed(hook: str, what: str, offered: Any) -> Iterable[Any]:
    """Return what a hook offers, nothing for None. Raises ConfigurationError for what is no list."""
    if offered is None:
        return ()
    if not isinstance(offered, Iterable):
        raise ConfigurationError(f"{hook} must return a list of {what}, returned {type(offered).__name__}")
    return offered


def _add_provider(services: Services, provider: Any) -> None:
    missing = missing_members(provider)
    if missing:
        raise ConfigurationError(f"registers a provider without {', '.join(missing)}")
    services.providers.add(provider)
    if isinstance(provider, HTTPProvider):
        provider.join(services)


def _checked_mounts(found: list[tuple[str, Any]]) -> list[Mount]:
    mounts = []
    for plugin, offered in found:
        with faults_named(plugin, "register_routes"):
            for mount in _listed("register_routes", "mounts", offered):
                _check_prefix(mount.prefix)
                mounts.append(mount)
    return mounts


def _check_prefix(prefix: str) -> None:
    if not prefix.startswith("/") or prefix.endswith("/"):
        raise ConfigurationError(f"mount prefix {prefix!r} must be like '/console'")
    if any(prefix == taken or prefix.startswith(taken + "/") for taken in _RESERVED_PREFIXES):
        raise ConfigurationError(f"mount prefix {prefix!r} belongs to the data plane")


def build_tls(config: TLSConfig) -> ssl.SSLContext:
    """Return the listener's TLS context. Raises ConfigurationError naming the file at fault."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(config.certificate, config.key)
    except OSError as error:
        raise ConfigurationError(
            f"[gateway.tls]: certificate {config.certificate} and key {config.key} cannot be loaded: "
            f"{error.strerror or 'they do not fit together'}"
        ) from error
    return context


class Gateway:
    """The running process: configuration, plugins, listeners, upstream connections."""

    def __init__(self, configuration: Configuration, telemetry: Telemetry | None = None) -> None:
        """Build everything without I/O. Raises ConfigurationError."""
        gateway = configuration.gateway
        self.configuration = configuration
        self.telemetry = telemetry or Telemetry()
        self.transports = UpstreamTransports(gateway.upstream, gateway.namespace)
        self.shared = Shared(lambda fault: self.telemetry.report_fault(None, fault))
        self.generation = build_generation(configuration, self.transports, self.telemetry, self.shared)
        self._tls = None if gateway.tls is None else build_tls(gateway.tls)
        self.server = Server(gateway.limits, gateway.namespace, scheme="http" if self._tls is None else "https")
        self._tasks: anyio.abc.TaskGroup | None = None
        self._retired: list[Generation] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        """Start plugins and the server's tasks; on leaving, drain and stop. Listen with ``listen``."""
        try:
            async with self.shared.running(), anyio.create_task_group() as tasks:
                self._tasks = tasks
                await self._begin(tasks, self.generation)
                try:
                    self.server.generation = self.generation
                    self.telemetry.start()
                    await self.server.run_until_drained(tasks, [self.transports])
                    self.transports.direct.share_outbox(self.server.outbox)
                    yield self.server
                finally:
                    with anyio.CancelScope(shield=True):
                        await self._stop()
                    tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # A lone fault is raised as itself: an operator's mistake is a line, not a tree.
            raise _only(group) from None

    async def _begin(self, tasks: anyio.abc.TaskGroup, generation: Generation) -> None:
        await generation.begin(tasks, lambda fault: self.telemetry.report_fault(None, fault))

    async def _stop(self) -> None:
        await self.server.drain(self._settle_seconds())
        await self.transports.aclose()
        for generation in (*self._retired, self.generation):
            await generation.stop()
        self.telemetry.stop()

    def _settle_seconds(self) -> float:
        """Return how long exchanges may take to settle once they were cut: each plugin has its own time."""
        calls = max(len(each.pipeline.hooks.post_response) for each in (*self._retired, self.generation))
        drain = self.configuration.gateway.drain_after_disconnect
        return calls * SETTLE_SECONDS + 1.0 + (0.0 if drain is None else drain.seconds)

    async def listen(self, *, reuse_port: bool = False, sock: Any = None) -> int:
        """Open the configured listener; returns its port. Raises OSError."""
        host, port = self.configuration.gateway.address
        return await self.server.listen(host, port, tls=self._tls, reuse_port=reuse_port, sock=sock)

    async def reload(self, read: Callable[[], Configuration]) -> None:
        """Replace the plugins by those of a configuration read anew; all or nothing. Raises ConfigurationError.

        Returns after the swap; the old plugins end by themselves, once their last exchange has.
        """
        assert self._tasks is not None, "only a running gateway can be reloaded"
        configuration = read()
        if configuration.gateway.namespace != self.configuration.gateway.namespace:
            raise ConfigurationError(f"{configuration.source}: [gateway] namespace: needs a restart to change")
        following = build_generation(configuration, self.transports, self.telemetry, self.shared)
        await self._begin(self._tasks, following)
        previous, self.generation = self.generation, following
        self.server.generation = following
        self.configuration = configuration
        self._retired.append(previous)
        self._tasks.start_soon(self._retire, previous)

    async def _retire(self, generation: Generation) -> None:
        while generation.in_flight:  # noqa: ASYNC110 - an event would cost every exchange
            await anyio.sleep(0.05)
        await generation.stop()
        self._retired.remove(generation)


def _only(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
