"""Find plugins, build them with typed configuration, register them: only those named, in the order named.

Finding reads entry points of the group ``penstock`` or a Python file; building runs no I/O.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pluggy

from penstock import hookspecs
from penstock.config import Configuration
from penstock.errors import ConfigurationError
from penstock.hooks import ONCE, PER_EXCHANGE, new_plugin_manager
from penstock.services import GROUP, Services
from penstock.structuring import structure

NEEDS = ("reads_body", "edits_body", "sees_chunks", "edits_chunks")
"""What a plugin class may declare about itself; each defaults to False."""
ENFORCES = "enforces"
"""What else it may declare: names of a principal's members that hold because of it, such as ``policy_rules``."""


@attrs.frozen(eq=False)
class Plugin:
    """A plugin that was built: its name in the configuration, its class and its object."""

    name: str
    instance: Any
    distribution: str

    @property
    def hooks(self) -> tuple[str, ...]:
        return hooks_of(type(self.instance))

    @property
    def enforces(self) -> tuple[str, ...]:
        return tuple(getattr(self.instance, ENFORCES, ()))

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(need for need in NEEDS if getattr(self.instance, need, False))


def installed() -> dict[str, importlib.metadata.EntryPoint]:
    """Return every installed plugin by name; installed is not enabled."""
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


Installed = Callable[[], Mapping[str, importlib.metadata.EntryPoint]]


def find(
    entry: str, folder: Path, *, source: str = "configuration", look_up: Installed = installed
) -> tuple[str, type[Any], str]:
    """Return name, class and distribution of a plugin entry. Raises ConfigurationError."""
    if entry.startswith(("./", "../", "/")) or entry.partition(":")[0].endswith(".py"):
        return _find_in_file(entry, folder, source)
    points = look_up()
    point = points.get(entry)
    if point is None:
        close = difflib.get_close_matches(entry, points, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"installed: {', '.join(sorted(points)) or 'none'}"
        raise ConfigurationError(f"{source}: [gateway] plugins: no plugin {entry!r} is installed; {hint}")
    try:
        kind = point.load()
    except Exception as error:
        raise ConfigurationError(
            f"{source}: [gateway] plugins: {entry!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(kind, type) or not _marked(kind):
        raise ConfigurationError(
            f"{source}: [gateway] plugins: {entry!r} ({point.value}) is no class with @hookimpl methods"
        )
    return entry, kind, point.dist.name if point.dist is not None else "unknown"


def _find_in_file(entry: str, folder: Path, source: str) -> tuple[str, type[Any], str]:
    place, _, class_name = entry.partition(":")
    path = (folder / place).resolve()
    name = path.stem
    spec = importlib.util.spec_from_file_location(f"penstock_file_{name}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigurationError(f"{source}: [gateway] plugins: there is no file {place}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where annotations written as strings are looked up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module.__name__]
        raise ConfigurationError(
            f"{source}: [gateway] plugins: {place} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    kinds = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__ and _marked(kind)
    ]
    if class_name:
        kinds = [kind for kind in kinds if kind.__name__ == class_name]
    if len(kinds) != 1:
        found = ", ".join(kind.__name__ for kind in kinds) or "none"
        raise ConfigurationError(
            f"{source}: [gateway] plugins: {place} must hold one class with @hookimpl methods, found "
            f"{found}; name one as {place}:ClassName"
        )
    return name, kinds[0], place


def hooks_of(kind: type[Any]) -> tuple[str, ...]:
    """Return the hooks a class implements, in the order of the specification."""
    marked = _marked(kind)
    return tuple(name for name in (*ONCE, *PER_EXCHANGE) if name in marked)


def _marked(kind: type[Any]) -> dict[str, Any]:
    """Return every member that carries @hookimpl, whether there is such a hook or not."""
    members = inspect.getmembers(kind)
    return {name: member for name, member in members if getattr(member, "penstock_impl", None) is not None}


def build(name: str, kind: type[Any], configuration: Configuration, services: Services) -> object:
    """Make one plugin object: ``kind(config=…, services=…, name=…)``, each only where the class takes it."""
    table = configuration.plugin_table(name)
    where = f"{configuration.source}: [plugins.{name}]"
    fault = _fault_of_constructor(kind)
    if fault is not None:
        raise ConfigurationError(f"{where}: {fault}")
    parameters = inspect.signature(kind).parameters
    arguments: dict[str, Any] = {}
    config_class = getattr(kind, "Config", None)
    if config_class is not None:
        arguments["config"] = structure(table, config_class, where=where, folder=configuration.folder)
    elif table:
        raise ConfigurationError(f"{where} {', '.join(table)}: this plugin has no settings")
    if "services" in parameters:
        arguments["services"] = services
    if "name" in parameters:
        arguments["name"] = name
    try:
        return kind(**arguments)
    except ConfigurationError as error:
        raise ConfigurationError(*(f"{where} {fault}" for fault in error.faults)) from error
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{where} {error}") from error
    except Exception as error:
        raise ConfigurationError(f"{where} cannot be built: {type(error).__name__}: {error}") from error


def _fault_of_constructor(kind: type[Any]) -> str | None:
    """Say why a class cannot be built by the arguments there are: config, services, name; by name, all optional."""
    parameters = inspect.signature(kind).parameters
    config_class = getattr(kind, "Config", None)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if config_class is not None and not attrs.has(config_class):
        return f"{kind.__qualname__}.Config must be an attrs class"
    if config_class is not None and "config" not in parameters and not takes_any:
        return (
            f"{kind.__qualname__} has a class Config and nowhere to put it: add the attribute 'config: Config' "
            "under @attrs.define, or a parameter config to __init__"
        )
    given = {"services", "name"} | ({"config"} if config_class is not None else set())
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    missing = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty and parameter.kind not in variadic and parameter.name not in given
    ]
    if "config" in missing:
        return f"{kind.__qualname__} takes config and has no class Config that says what its table holds"
    if missing:
        return (
            f"{kind.__qualname__} takes {', '.join(missing)}, which nobody gives it; a plugin may ask for config, "
            "services and name, by these names, and finds all else through services"
        )
    return None


def load(configuration: Configuration, services: Services) -> tuple[Any, tuple[Plugin, ...]]:
    """Find, build and register every plugin the configuration names; returns plugin manager and plugins."""
    manager = new_plugin_manager()
    entries = configuration.gateway.plugins
    _refuse_twice(entries, configuration.source)
    plugins = []
    faults: list[str] = []
    look_up = functools.cache(installed)  # reading every distribution's metadata once is slow enough
    for entry in entries:
        try:
            plugins.append(_make(entry, configuration, services, look_up))
        except ConfigurationError as error:
            faults += error.faults
    if faults:
        raise ConfigurationError(*faults)
    _refuse_twice([plugin.name for plugin in plugins], configuration.source)
    # pluggy runs the last registered first; the configuration's order is meant the other way round.
    for plugin in reversed(plugins):
        try:
            manager.register(plugin.instance, plugin.name)
        except (pluggy.PluginValidationError, ValueError) as error:
            raise ConfigurationError(f"{configuration.source}: plugin {plugin.name!r}: {error}") from error
    return manager, tuple(plugins)


def _make(entry: str, configuration: Configuration, services: Services, look_up: Installed) -> Plugin:
    """Find and build one plugin; what an embedding program gives is not looked for, an object not built."""
    given = configuration.given.get(entry)
    if given is None:
        name, kind, distribution = find(entry, configuration.folder, source=configuration.source, look_up=look_up)
    else:
        name, kind, distribution = entry, given if isinstance(given, type) else type(given), "given"
    _refuse_strangers(name, kind, configuration.source)
    if given is not None and not isinstance(given, type):
        return Plugin(name, given, distribution)
    return Plugin(name, build(name, kind, configuration, services), distribution)


def _refuse_twice(names: Sequence[str], source: str) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ConfigurationError(f"{source}: [gateway] plugins: {name!r} is named twice")


def _refuse_strangers(name: str, kind: type[Any], source: str) -> None:
    """Refuse what looks like a hook or a declared need and would silently do nothing."""
    faults = [f"{source}: plugin {name!r}: {fault}" for fault in faults_of(kind)]
    if faults:
        raise ConfigurationError(*faults)


def faults_of(kind: type[Any]) -> Iterator[str]:
    """Yield what is wrong with a class's hooks and declared needs."""
    for member_name, member in _marked(kind).items():
        for fault in _faults_of_hook(kind, member_name, member):
            yield f"{member_name} {fault}"
    arguments = {field.name: field.default for field in attrs.fields(kind)} if attrs.has(kind) else {}
    for name, value in (dict(inspect.getmembers(kind)) | arguments).items():
        close = difflib.get_close_matches(name, NEEDS, n=1, cutoff=0.8) if isinstance(value, bool) else ()
        if close and name not in NEEDS:
            yield f'{name} is no declared need; did you mean "{close[0]}"?'
    for need in NEEDS:
        if need in arguments:
            yield (
                f"{need} has an annotation, so @attrs.define takes it for an argument of the constructor; "
                f"drop the annotation: {need} = True"
            )


def _faults_of_hook(kind: type[Any], name: str, member: Any) -> Iterator[str]:
    known = (*ONCE, *PER_EXCHANGE)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        yield "is no hook" + (f'; did you mean "{close[0]}"?' if close else f"; hooks are {', '.join(known)}")
        return
    if member.penstock_impl.get("wrapper") or member.penstock_impl.get("hookwrapper"):
        yield "cannot be a hook wrapper; implement the hook itself"
    elif inspect.isgeneratorfunction(member) or inspect.isasyncgenfunction(member):
        hint = " with @asynccontextmanager under @hookimpl" if name == "lifespan" else ""
        yield f"is a generator function, so nothing in it would run; return the value{hint}"
    elif name in ONCE and inspect.iscoroutinefunction(member):
        yield "runs while the gateway is built and cannot be async def"
    expected = tuple(inspect.signature(getattr(hookspecs, name)).parameters)
    taken = tuple(inspect.signature(member).parameters)
    if not isinstance(inspect.getattr_static(kind, name), staticmethod | classmethod):
        taken = taken[1:]
    if taken != expected:
        yield f"must take ({', '.join(('self', *expected))}), takes ({', '.join(('self', *taken))})"
