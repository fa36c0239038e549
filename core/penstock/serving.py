"""Run a gateway as a process: event loop, signals, workers, exit status."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable

import anyio
import attrs

from penstock.config import Configuration
from penstock.errors import ConfigurationError
from penstock.gateway import Gateway
from penstock.governance import LocalAdmin
from penstock.log import Log, message_of, taking_library_records, traceback_of
from penstock.logs import LogSink
from penstock.runtime_file import RuntimeFile, local_url
from penstock.telemetry import Sink, Telemetry
from penstock.workers import Place, Supervisor

Read = Callable[[], Configuration]
Announce = Callable[[int], None]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MOST_PATIENCE = 5.0
"""Seconds for which a worker that could listen waits for those that cannot yet."""
_REFUSED = "reload refused, the last good configuration stays"


def serve_forever(read: Read, announce: Announce | None = None) -> int:
    """Serve what ``read`` returns until a signal ends it; returns the exit status."""
    configuration = read()
    if configuration.gateway.workers > 1:
        return _serve_with_workers(configuration, read, announce)
    return _serve_one(configuration, read, announce)


def _serve_one(
    configuration: Configuration, read: Read, announce: Announce | None, *, place: Place | None = None
) -> int:
    """Serve in this process; one of several workers has a ``place``."""
    gateway_config = configuration.gateway
    log = Log(gateway_config.log)
    gateway = Gateway(configuration, Telemetry(_sinks(configuration, log), log))
    options = {"use_uvloop": _wants_uvloop(gateway_config.loop)}
    with taking_library_records(log):
        anyio.run(_run, gateway, read, announce, place, backend_options=options)
    return 0


async def _run(gateway: Gateway, read: Read, announce: Announce | None, place: Place | None) -> None:
    """Serve until a signal; one that comes during the start ends the start, a second one the process."""
    failed: Exception | None = None
    with anyio.open_signal_receiver(*SIGNALS) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a worker is forked with them blocked
        if place is not None:
            _end_with(place.lifeline)
        arrived = _Arrived()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(arrived.take, signals)
            with arrived.start:
                try:
                    await _serve(gateway, read, announce, place, arrived)
                except Exception as error:  # noqa: BLE001 - as itself, not in a group
                    failed = error
            tasks.cancel_scope.cancel()
    if failed is not None:
        raise failed


@attrs.define(eq=False)
class _Arrived:
    """Signals on their way to who serves; before anything is served those that end a process end its start."""

    start: anyio.CancelScope = attrs.Factory(anyio.CancelScope)
    is_started: bool = False
    _numbers: deque[int] = attrs.Factory(deque)
    _event: anyio.Event = attrs.Factory(anyio.Event)

    async def take(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            if number != signal.SIGHUP and not self.is_started:
                if self.start.cancel_called:  # it does not give way: whoever asks twice means it
                    signal.signal(number, signal.SIG_DFL)
                    signal.raise_signal(number)
                self.start.cancel()
            self._numbers.append(number)
            self._event.set()

    async def next(self) -> int:
        while not self._numbers:
            self._event = anyio.Event()
            await self._event.wait()
        return self._numbers.popleft()


async def _serve(
    gateway: Gateway, read: Read, announce: Announce | None, place: Place | None, arrived: _Arrived
) -> None:
    log = gateway.telemetry.log
    async with gateway.running():
        if place is not None:
            await _wait_for_the_others(place)
        try:
            port = await gateway.listen(reuse_port=place is not None)
        except OSError as error:
            raise ConfigurationError(
                f"{gateway.configuration.source}: [gateway] listen: cannot listen on "
                f"{gateway.configuration.gateway.listen}: {error.strerror or error}"
            ) from error
        arrived.is_started = True
        _settle_garbage()
        runtime_file = RuntimeFile()
        try:
            _let_in(gateway, port, runtime_file)
            log.info("listening", address=gateway.configuration.gateway.listen, port=port)
            if announce is not None:
                announce(port)
            while await arrived.next() == signal.SIGHUP:
                await _reload(gateway, read, log, lambda: _let_in(gateway, port, runtime_file))
        finally:
            runtime_file.remove()
        log.info("draining", in_flight=gateway.server.in_flight)


def _let_in(gateway: Gateway, port: int, runtime_file: RuntimeFile) -> None:
    """Let the command line of the same user find this gateway, where its store keeps a token for that."""
    local = gateway.generation.services.find(LocalAdmin)  # type: ignore[type-abstract]
    token = None if local is None else local.admin_token
    if token is None:
        runtime_file.remove()
        return
    config = gateway.configuration.gateway
    url = local_url(config.address[0], port, scheme="http" if config.tls is None else "https")
    if runtime_file.put(url, token) is None:
        gateway.telemetry.log.warning("no folder takes a runtime file, so penstock's commands need --url", url=url)


def _end_with(lifeline: int) -> None:
    """Have this process end as SIGTERM ends it when the supervisor is gone, whatever killed that."""
    loop = asyncio.get_running_loop()

    def end() -> None:
        loop.remove_reader(lifeline)
        signal.raise_signal(signal.SIGTERM)

    loop.add_reader(lifeline, end)


async def _wait_for_the_others(place: Place) -> None:
    place.say_prepared()
    with anyio.move_on_after(_MOST_PATIENCE):
        await anyio.wait_readable(place.doors)


async def _reload(gateway: Gateway, read: Read, log: Log, follow: Callable[[], None]) -> None:
    """Reload, then ``follow``, then say so; a refused reload changes nothing."""
    try:
        await gateway.reload(read)
        follow()
    except ConfigurationError as error:
        log.error(_REFUSED, faults=error.faults)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - no file and no plugin in it ends what runs
        fault = f"{type(error).__name__}: {message_of(error)}"
        log.error(_REFUSED, faults=[fault], traceback=traceback_of(error))
    else:
        log.info("reloaded")


def _settle_garbage() -> None:
    """What was built at start lives for ever: take it out of the collector's way, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 50)
    # The telemetry thread shares the interpreter with traffic: it must not hold it for the default 5 ms.
    sys.setswitchinterval(0.0005)


def _wants_uvloop(setting: str) -> bool:
    if setting == "asyncio":
        return False
    found = importlib.util.find_spec("uvloop") is not None
    if setting == "uvloop" and not found:
        raise ConfigurationError('[gateway] loop: uvloop is not installed; install it or set loop = "auto"')
    return found


def _sinks(configuration: Configuration, log: Log) -> list[Sink]:
    sinks: list[Sink] = []
    if configuration.gateway.log != "off":
        sinks.append(LogSink(log))
    if configuration.gateway.spans != "off":
        from penstock.spans import new_span_sink  # noqa: PLC0415 - the SDK is heavy; only who exports pays

        sinks.append(new_span_sink(configuration.gateway.spans, configuration.gateway.namespace))
    return sinks


def check_configuration(configuration: Configuration) -> None:
    """Build everything, start plugins and stop them again, without listening. Raises ConfigurationError."""
    anyio.run(Gateway(configuration).generation.rehearse)


# --- several processes on one port ---------------------------------------------------------------------------------


def _serve_with_workers(configuration: Configuration, read: Read, announce: Announce | None) -> int:
    """Fork workers that share a port by SO_REUSEPORT; one that dies is replaced, signals are passed on."""
    Gateway(configuration)  # refuse bad configuration before forking
    host, port = configuration.gateway.address
    holder = _reserve_port(host, port)
    port = holder.getsockname()[1]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def read_on_port() -> Configuration:
        fresh = read()
        return attrs.evolve(fresh, gateway=attrs.evolve(fresh.gateway, listen=address))

    def serve(place: Place) -> int:
        return _serve_one(read_on_port(), read_on_port, lambda _: place.say_listening(), place=place)

    def all_listen() -> None:
        if announce is not None:
            announce(port)

    return Supervisor(configuration.gateway.workers, serve, all_listen, Log(configuration.gateway.log)).run()


def _reserve_port(host: str, port: int) -> socket.socket:
    """Bind without listening, so that port 0 becomes one port for all workers."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    holder = socket.socket(family, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        holder.bind((host, port))
    except OSError as error:
        raise ConfigurationError(f"[gateway] listen: cannot listen on {host}:{port}: {error.strerror}") from error
    return holder
