"""The configuration file: TOML read strictly into typed values, every fault one line with a way out.

Precedence, for the process: command line > environment (``PENSTOCK_LISTEN`` …) > file > default.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationNote,
)

from penstock.errors import ConfigurationError
from penstock.models import Secret
from penstock.pipeline import Drain
from penstock.server import ServerLimits
from penstock.upstream.store import Limits as UpstreamLimits

NAMESPACE = re.compile(r"[a-z][a-z0-9_]{0,31}")


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
    loop: Literal["auto", "uvloop", "asyncio"] = "auto"
    log: Literal["auto", "json", "console", "off"] = "auto"
    """How the line per exchange is written; auto is console on a terminal, else json."""
    spans: Literal["off", "console", "otlp"] = "off"
    """Where OpenTelemetry spans go."""
    limits: ServerLimits = ServerLimits()
    upstream: UpstreamLimits = UpstreamLimits()
    tls: TLSConfig | None = None
    drain_after_disconnect: Drain | None = None
    """Read a stream on after its client has gone, within these bounds, to learn its usage; unset cancels it."""

    @property
    def address(self) -> tuple[str, int]:
        """Return host and port of ``listen``. Raises ValueError."""
        host, colon, port = self.listen.rpartition(":")
        if not colon or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"{self.listen!r} is not HOST:PORT")
        return host.strip("[]") or "0.0.0.0", int(port)  # noqa: S104 - an empty host means every interface


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
    """Plugin classes or objects an embedding program or a test brings, by the name they have in ``plugins``."""

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
    faults = [f"{source}: [{key}]: unknown table{_suggest(key, ('gateway', 'plugins'))}"
              for key in document if key not in ("gateway", "plugins")]  # fmt: skip
    table = dict(document.get("gateway", {}))
    origins = dict.fromkeys(table, "file")
    for key, value in _from_environment(os.environ if environment is None else environment):
        table[key], origins[key] = value, "environment"
    for key, value in (overrides or {}).items():
        table[key], origins[key] = value, "command line"
    if faults:
        raise ConfigurationError(*faults)
    gateway = structure(table, GatewayConfig, where=f"{source}: [gateway]")
    if not NAMESPACE.fullmatch(gateway.namespace):
        raise ConfigurationError(f"{source}: [gateway] namespace: use lower-case letters, digits and _")
    try:
        _ = gateway.address
    except ValueError as error:
        raise ConfigurationError(f"{source}: [gateway] listen: {error}") from None
    plugins = document.get("plugins", {})
    if not isinstance(plugins, dict) or not all(isinstance(table, dict) for table in plugins.values()):
        raise ConfigurationError(f"{source}: [plugins]: each plugin's settings are a table of their own")
    unused = [name for name in plugins if name not in {Path(entry).stem for entry in gateway.plugins}
              and name not in gateway.plugins]  # fmt: skip
    if unused:
        raise ConfigurationError(*(
            f"{source}: [plugins.{name}]: the plugin is not in [gateway] plugins, so this table does nothing; "
            f"add it there or remove the table{_suggest(name, gateway.plugins)}"
            for name in unused
        ))
    return Configuration(gateway, plugins, source, folder, origins)


_SIMPLE = {"listen": str, "namespace": str, "workers": int, "loop": str, "log": str, "spans": str}


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for key, kind in _SIMPLE.items():
        value = environment.get(f"PENSTOCK_{key.upper()}")
        if value is not None:
            try:
                yield key, kind(value)
            except ValueError:
                raise ConfigurationError(f"environment: PENSTOCK_{key.upper()}: {value!r} is not a number") from None


# --- structuring ------------------------------------------------------------------------------------------------


def structure(table: Mapping[str, Any], kind: type[Any], *, where: str) -> Any:
    """Turn a table into ``kind``. Raises ConfigurationError; ``where`` begins each line."""
    try:
        return _converter().structure(table, kind)
    except (BaseValidationError, ForbiddenExtraKeysError) as error:
        raise ConfigurationError(*(f"{where} {fault}" for fault in _faults(error, ""))) from None


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    for kind, word in ((str, "a string"), (int, "a whole number"), (bool, "true or false")):
        converter.register_structure_hook(kind, _strict(kind, word))
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook(Secret, lambda value, _: read_secret(value))
    converter.register_structure_hook_func(_is_string_tuple, _strings)
    converter.register_structure_hook_func(_is_literal, _choice)
    return converter


def _strict(kind: type, word: str) -> Any:
    def check(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"must be {word}, not {_shown(value)}")
        return value

    return check


def _number(value: Any, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, not {_shown(value)}")
    return float(value)


def _is_string_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple and get_args(kind) == (str, ...)


def _strings(value: Any, _: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"must be a list of strings, not {_shown(value)}")
    return tuple(value)


def _is_literal(kind: Any) -> bool:
    return get_origin(kind) is Literal


def _choice(value: Any, kind: Any) -> Any:
    choices = get_args(kind)
    if value not in choices:
        raise ValueError(f"must be one of {', '.join(map(repr, choices))}, not {_shown(value)}")
    return value


def read_secret(value: Any, environment: Mapping[str, str] | None = None) -> Secret:
    """Read ``"literal"``, ``{ env = "NAME" }`` or ``{ file = "path" }``. Raises ValueError without the value."""
    if isinstance(value, Secret):
        return value
    if isinstance(value, str) and value:
        return Secret(value)
    if isinstance(value, dict) and len(value) == 1:
        ((source, name),) = value.items()
        if source == "env" and isinstance(name, str):
            found = (os.environ if environment is None else environment).get(name)
            if not found:
                raise ValueError(f"the environment variable {name} is not set")
            return Secret(found)
        if source == "file" and isinstance(name, str):
            try:
                return Secret(Path(name).read_text(encoding="utf-8").strip())
            except OSError as error:
                raise ValueError(f"the secret's file {name} cannot be read: {error.strerror}") from None
    raise ValueError('must be a string, { env = "NAME" } or { file = "path" }')


def _shown(value: Any) -> str:
    """Say what was found without repeating a value that may be secret."""
    return {dict: "a table", list: "a list", str: "a string", bool: "true or false", int: "a whole number",
            float: "a number"}.get(type(value), type(value).__name__)  # fmt: skip


def _faults(error: BaseException, path: str) -> Iterator[str]:
    """Walk cattrs' groups down to one line per fault."""
    if isinstance(error, ForbiddenExtraKeysError):
        known = [field.name for field in attrs.fields(error.cl)] if error.cl is not None else []
        for name in sorted(error.extra_fields):
            yield f"{_join(path, name)}: unknown key{_suggest(name, known)}"
    elif isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _faults(inner, _join(path, *_place(inner)))
    elif isinstance(error, KeyError):
        yield f"{_join(path)}: is missing" if path else f"{error}: is missing"
    else:
        yield f"{path}: {error}" if path else str(error)


def _place(error: BaseException) -> Sequence[str]:
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return (note.name,)
        if isinstance(note, IterableValidationNote):
            return (f"[{note.index}]" if isinstance(note.index, int) else str(note.index),)
    return ()


def _join(path: str, *names: str) -> str:
    for name in names:
        path = f"{path}{name}" if name.startswith("[") or not path else f"{path}.{name}"
    return path


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def describe(kind: Any) -> str:
    """Return the word a reference uses for a type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments if argument is not type(None))
    if origin is Literal:
        return ", ".join(f'"{argument}"' for argument in arguments)
    if origin is tuple:
        return f"list of {describe(arguments[0])}"
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return f"table of {describe(arguments[1])}"
    if kind is Secret:
        return "secret"
    names = {str: "string", int: "whole number", float: "number", bool: "true or false", Any: "anything"}
    return names.get(kind) or ("table" if attrs.has(kind) else getattr(kind, "__name__", str(kind)))
