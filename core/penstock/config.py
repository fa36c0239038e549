"""The configuration file: TOML read strictly into typed values, every fault one line with a way out.

Precedence, for the process: command line > environment (``PENSTOCK_LISTEN`` …) > file > default.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs

from penstock.errors import ConfigurationError
from penstock.hooks import HOOK_SECONDS
from penstock.pipeline import Drain
from penstock.server import ServerLimits
from penstock.structuring import describe, read_secret, shown, structure, suggest
from penstock.upstream.store import Limits as UpstreamLimits

__all__ = [
    "Configuration",
    "GatewayConfig",
    "TLSConfig",
    "describe",
    "read_document",
    "read_file",
    "read_secret",
    "structure",
]

NAMESPACE = re.compile(r"[a-z][a-z0-9_]{0,31}")
MAX_WORKERS = 256
_PORT = re.compile(r"[0-9]{1,5}")
_HOST = re.compile(r"[^\[\]:\s]*")


@attrs.frozen
class TLSConfig:
    """Serve HTTPS."""

    certificate: str
    """PEM file with the certificate chain."""
    key: str
    """PEM file with the private key."""


@attrs.frozen
class GatewayConfig:
    """The ``[gateway]`` table."""

    listen: str = "127.0.0.1:8080"
    """Host and port; IPv6 hosts in brackets; port 0 picks a free one."""
    plugins: tuple[str, ...] = ()
    """Names of entry points, or ``./file.py`` / ``./file.py:Class``, in the order their hooks run."""
    namespace: str = "penstock"
    """Names response headers, span attributes and key prefixes."""
    anonymous: bool = False
    """Serve without any plugin that authenticates."""
    workers: int = 1
    """Processes that share the port."""
    loop: Literal["auto", "uvloop", "asyncio"] = "auto"
    """Event loop; auto is uvloop where it is installed."""
    log: Literal["auto", "json", "console", "off"] = "auto"
    """How the line per exchange is written; auto is console on a terminal, else json."""
    spans: Literal["off", "console", "otlp"] = "off"
    """Where OpenTelemetry spans go."""
    usage_frame: Literal["strip", "forward"] = "strip"
    """Whether the usage frame the gateway asks a chat stream for is taken out again; a binding's and a key's win."""
    limits: ServerLimits = attrs.Factory(ServerLimits)
    """What clients may take."""
    upstream: UpstreamLimits = attrs.Factory(UpstreamLimits)
    """Connections to providers."""
    tls: TLSConfig | None = None
    """Serve HTTPS; unset serves HTTP."""
    hook_timeout: float = HOOK_SECONDS
    """Seconds that one call of a plugin's hook may await; post_response has five."""
    drain_after_disconnect: Drain | None = None
    """Read a stream on after its client has gone, within these bounds, to learn its usage; unset cancels."""

    @property
    def address(self) -> tuple[str, int]:
        """Return host and port of ``listen``. Raises ValueError."""
        host, colon, port = self.listen.rpartition(":")
        if not colon or not _PORT.fullmatch(port) or int(port) > 65535:
            raise ValueError(f"{self.listen!r} is not HOST:PORT")
        if host.startswith("[") and host.endswith("]"):
            return host[1:-1], int(port)
        if not _HOST.fullmatch(host):
            raise ValueError(f"{self.listen!r} is not HOST:PORT; an IPv6 host is written in brackets")
        return host or "0.0.0.0", int(port)  # noqa: S104 - an empty host means every interface


@attrs.frozen
class Configuration:
    """A configuration file, read: the gateway's own table typed, the plugins' still raw."""

    gateway: GatewayConfig
    plugins: Mapping[str, Mapping[str, Any]]
    source: str
    """What messages call the file."""
    folder: Path
    """What relative paths are relative to."""
    origins: Mapping[str, str] = attrs.field(factory=dict)
    """Where each key of ``[gateway]`` came from: file, environment, command line."""
    given: Mapping[str, Any] = attrs.field(factory=dict)
    """Plugin classes or objects an embedding program or a test brings, by their name in ``plugins``."""

    def plugin_table(self, name: str) -> Mapping[str, Any]:
        return self.plugins.get(name, {})


def read_file(path: Path, overrides: Mapping[str, Any] | None = None) -> Configuration:
    """Read a TOML file. Raises ConfigurationError with one line per fault."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        document = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: is not valid TOML: {error}") from None
    return read_document(document, source=str(path), folder=path.parent, overrides=overrides)


def read_document(
    document: Mapping[str, Any],
    *,
    source: str,
    folder: Path = Path(),
    overrides: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Configuration:
    """Type a parsed document. Raises ConfigurationError with one line per fault."""
    faults = [f"{source}: [{key}]: unknown table{suggest(key, ('gateway', 'plugins'))}"
              for key in document if key not in ("gateway", "plugins")]  # fmt: skip
    file_table = document.get("gateway", {})
    if not isinstance(file_table, dict):
        faults.append(f"{source}: [gateway]: must be a table, not {shown(file_table)}")
    if faults:
        raise ConfigurationError(*faults)
    table = dict(file_table)
    origins = dict.fromkeys(table, "file")
    for key, value in _from_environment(os.environ if environment is None else environment):
        table[key], origins[key] = value, "environment"
    for key, value in (overrides or {}).items():
        table[key], origins[key] = value, "command line"
    gateway = _read_gateway(table, origins, source)
    plugins = document.get("plugins", {})
    _check_plugin_tables(plugins, gateway.plugins, source)
    return Configuration(gateway, plugins, source, folder, origins)


def _read_gateway(table: Mapping[str, Any], origins: Mapping[str, str], source: str) -> GatewayConfig:
    """Type the gateway's own table; what comes from elsewhere is blamed on where it comes from."""

    def place(key: str) -> str:
        origin = origins.get(key)
        if origin == "environment":
            return f"environment: PENSTOCK_{key.upper()}:"
        return f"command line: --{key}:" if origin == "command line" else f"{source}: [gateway] {key}:"

    for key in origins:
        if origins[key] != "file":
            structure({key: table[key]}, GatewayConfig, where=place(key))
    gateway: GatewayConfig = structure(table, GatewayConfig, where=f"{source}: [gateway]")
    faults = []
    if not NAMESPACE.fullmatch(gateway.namespace):
        faults.append(f"{place('namespace')} use lower-case letters, digits and _, a letter first, at most 32")
    if not gateway.hook_timeout > 0:
        faults.append(f"{place('hook_timeout')} must be more than 0")
    if not 1 <= gateway.workers <= MAX_WORKERS:
        faults.append(f"{place('workers')} must be from 1 to {MAX_WORKERS}")
    try:
        _ = gateway.address
    except ValueError as error:
        faults.append(f"{place('listen')} {error}")
    for name in ("limits", "upstream", "drain_after_disconnect"):
        bounds = getattr(gateway, name)
        if bounds is not None:
            faults += [
                f"{source}: [gateway] {name}.{field}: must be more than 0"
                for field, value in attrs.asdict(bounds).items()
                if not value > 0
            ]
    if faults:
        raise ConfigurationError(*faults)
    return gateway


def _check_plugin_tables(plugins: object, entries: Sequence[str], source: str) -> None:
    if not isinstance(plugins, dict) or not all(isinstance(table, dict) for table in plugins.values()):
        raise ConfigurationError(f"{source}: [plugins]: each plugin's settings are a table of their own")
    named = {Path(entry.partition(":")[0]).stem for entry in entries} | set(entries)
    unused = [name for name in plugins if name not in named]
    if unused:
        raise ConfigurationError(
            *(
                f"{source}: [plugins.{name}]: the plugin is not in [gateway] plugins, so this table does "
                f"nothing; add it there or remove the table{suggest(name, sorted(named))}"
                for name in unused
            )
        )


_SIMPLE = {"listen": str, "namespace": str, "workers": int, "loop": str, "log": str, "spans": str}


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for key, kind in _SIMPLE.items():
        value = environment.get(f"PENSTOCK_{key.upper()}")
        if value is not None:
            try:
                yield key, kind(value)
            except ValueError:
                raise ConfigurationError(f"environment: PENSTOCK_{key.upper()}: {value!r} is not a number") from None
