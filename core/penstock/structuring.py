"""Turn tables into typed values, strictly: every fault one line that names the place, never a value.

cattrs does the walking; what is accepted, and how a fault reads, is decided here.
"""

from __future__ import annotations

import copy
import difflib
import functools
import operator
import os
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
from cattrs.gen import make_mapping_structure_fn

from penstock.errors import ConfigurationError
from penstock.models import Secret

_SHOWN_CHARACTERS = 80
"""Of a name nobody knows: who writes documents must not decide how long a line is."""


def structure(table: Mapping[str, Any], kind: type[Any], *, where: str, folder: Path = Path()) -> Any:
    """Turn a table into ``kind``, an attrs class. Raises ConfigurationError; ``where`` begins each line.

    ``folder`` is what paths and the files of secrets are relative to.
    """
    try:
        return _converter(folder, folder.absolute()).structure(table, kind)
    except (BaseValidationError, ForbiddenExtraKeysError) as error:
        raise ConfigurationError(*(f"{where} {_line(*fault)}" for fault in faults_of(error))) from None


@functools.lru_cache(maxsize=4)  # making one takes as long as reading a whole file with it
def _converter(folder: Path, here: Path) -> cattrs.Converter:
    # Paths are put in ``here``, which is absolute, so that doing it twice changes nothing; messages say ``folder``.
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    for kind, word in ((str, "a string"), (int, "a whole number"), (bool, "true or false")):
        converter.register_structure_hook(kind, _strict(kind, word))
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook(Secret, lambda value, _: read_secret(value, folder=folder))
    converter.register_structure_hook(Path, lambda value, _: _path_in(here, value))
    converter.register_structure_hook_factory(
        attrs.has, lambda kind: _table(_placing_defaults(converter.gen_structure_attrs_fromdict(kind), kind, here))
    )
    converter.register_structure_hook_factory(
        _is_mapping, lambda kind: _table(make_mapping_structure_fn(kind, converter))
    )
    converter.register_structure_hook_func(_is_tuple, _list_of(converter))
    converter.register_structure_hook_func(_is_string_tuple, _strings)
    converter.register_structure_hook_func(_is_literal, _choice)
    return converter


def _path_in(folder: Path, value: Any) -> Path:
    path = value if isinstance(value, Path) else Path(_strict(str, "a path")(value, str))
    try:
        return folder / path.expanduser()
    except RuntimeError:  # what it says is no use to who wrote ~somebody/…
        raise ValueError("the home folder it begins with is not known") from None


def _placing_defaults(structure_table: Any, kind: type[Any], folder: Path) -> Any:
    """Have paths that are defaults resolved like those that are given; where they can be, before validators look."""

    def build(table: Mapping[str, Any], _: Any) -> Any:
        unset = [field for field in attrs.fields(kind) if field.name not in table]
        for field in unset:
            default = _default_of(field)
            placed = _placed(default, folder)
            if placed is not default:
                table = {**table, field.name: placed}
        built = structure_table(table, kind)
        for field in unset:  # those that are known only now: made from others, converted, no arguments at all
            value = getattr(built, field.name)
            placed = _placed(value, folder)
            if placed is not value:
                object.__setattr__(built, field.name, placed)
        return built

    return build


def _default_of(field: attrs.Attribute[Any]) -> Any:
    """Return what an argument is if it is not given; None where only the object could tell."""
    default: Any = field.default
    if not field.init or default is attrs.NOTHING:
        return None
    if hasattr(default, "takes_self"):
        return None if default.takes_self else default.factory()
    return default


def _placed(value: Any, folder: Path) -> Any:
    """Return a default with the paths in it resolved; the same object where there is none."""
    if isinstance(value, Path):
        path = _path_in(folder, value)
        return value if path == value else path
    if isinstance(value, tuple):
        items = tuple(_placed(item, folder) for item in value)
        return value if all(map(operator.is_, items, value)) else items
    if isinstance(value, Mapping):
        table = {name: _placed(item, folder) for name, item in value.items()}
        return value if all(table[name] is item for name, item in value.items()) else table
    if not isinstance(value, type) and attrs.has(type(value)):
        changed = {field.name: _placed(getattr(value, field.name), folder) for field in attrs.fields(type(value))}
        changed = {name: item for name, item in changed.items() if item is not getattr(value, name)}
        if changed:
            value = copy.copy(value)
            for name, item in changed.items():
                object.__setattr__(value, name, item)
    return value


def _is_mapping(kind: Any) -> bool:
    return get_origin(kind) in (dict, Mapping)


def _is_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple and get_args(kind)[1:] == (...,)


def _table(structure_table: Any) -> Any:
    """Check that there is a table before cattrs looks for keys in what may be anything."""

    def check(value: Any, kind: Any) -> Any:
        if isinstance(kind, type) and attrs.has(kind) and isinstance(value, kind):
            return value  # a default
        if not isinstance(value, Mapping):
            raise ValueError(f"must be a table, not {shown(value)}")
        return structure_table(value, kind)

    return check


def _list_of(converter: cattrs.Converter) -> Any:
    def check(value: Any, kind: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError(f"must be a list, not {shown(value)}")
        return tuple(converter.structure(list(value), list[get_args(kind)[0]]))  # type: ignore[arg-type,misc]

    return check


def _strict(kind: type, word: str) -> Any:
    def check(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"must be {word}, not {shown(value)}")
        return value

    return check


def _number(value: Any, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, not {shown(value)}")
    return float(value)


def _is_string_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple and get_args(kind) == (str, ...)


def _strings(value: Any, _: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list of strings, not {shown(value)}")
    strangers = [shown(item) for item in value if not isinstance(item, str)]
    if strangers:
        raise ValueError(f"must be a list of strings, holds {strangers[0]}")
    return tuple(value)


def _is_literal(kind: Any) -> bool:
    return get_origin(kind) is Literal


def _choice(value: Any, kind: Any) -> Any:
    choices = get_args(kind)
    if value not in choices:
        hint = suggest(value, choices) if isinstance(value, str) else f", not {shown(value)}"
        raise ValueError(f"must be one of {describe(kind)}{hint}")
    return value


def read_secret(value: Any, environment: Mapping[str, str] | None = None, folder: Path = Path()) -> Secret:
    """Read ``"literal"``, ``{ env = "NAME" }`` or ``{ file = "path" }``. Raises ValueError without the value.

    A file is relative to ``folder`` and stripped of surrounding white space.
    """
    if isinstance(value, Secret):
        return value
    if value == "":
        raise ValueError("is empty")
    if isinstance(value, str):
        return Secret(value)
    if isinstance(value, dict) and len(value) == 1:
        ((source, name),) = value.items()
        if source == "env" and isinstance(name, str):
            if not name.isidentifier():  # a secret put where its variable's name belongs must not be repeated
                raise ValueError("env must name an environment variable: letters, digits and _")
            found = (os.environ if environment is None else environment).get(name)
            if not found:
                raise ValueError(f"the environment variable {name} is not set")
            return Secret(found)
        if source == "file" and isinstance(name, str):
            return _secret_in_file(_path_in(folder, name))
    raise ValueError('must be a string, { env = "NAME" } or { file = "path" }')


def _secret_in_file(path: Path) -> Secret:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"the secret's file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the secret's file {path} is not text") from None
    if not text:
        raise ValueError(f"the secret's file {path} is empty")
    return Secret(text)


def shown(value: Any) -> str:
    """Say what was found without repeating a value that may be secret."""
    return {dict: "a table", list: "a list", str: "a string", bool: "true or false", int: "a whole number",
            float: "a number"}.get(type(value), type(value).__name__)  # fmt: skip


def faults_of(
    error: BaseException, *, unknown: str = "unknown key", missing: str = "is missing", known: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """Yield the place and the rule of each fault that cattrs has found.

    ``error`` is a BaseValidationError or ForbiddenExtraKeysError of a converter with detailed validation; the place is
    like ``table.key[0]``, empty for the whole. ``unknown`` and ``missing`` are what the document's language calls it,
    ``known`` other names to suggest at the top.
    """
    yield from _faults(error, "", (unknown, missing), known)


def _faults(error: BaseException, path: str, words: tuple[str, str], known: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Walk cattrs' groups down to one fault each."""
    if isinstance(error, ForbiddenExtraKeysError):
        names = [field.name for field in attrs.fields(error.cl)] if error.cl is not None else []
        for name in sorted(str(name)[:_SHOWN_CHARACTERS] for name in error.extra_fields):
            yield _join(path, name), f"{words[0]}{suggest(name, [*names, *known])}"
    elif isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            place = _place(inner)
            yield from _faults(inner, _join(path, *place), words, () if path or place else known)
    elif isinstance(error, KeyError):
        yield path or str(error.args[0]), words[1]
    else:
        yield path, str(error)


def _line(place: str, rule: str) -> str:
    return f"{place}: {rule}" if place else rule


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


def suggest(name: str, known: Sequence[str]) -> str:
    """Return what a name was probably meant to be, as the end of a sentence; empty where nothing is close."""
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
    names = {str: "string", int: "whole number", float: "number", bool: "true or false", Path: "path", Any: "anything"}
    found = names.get(kind)
    return found if found is not None else ("table" if attrs.has(kind) else getattr(kind, "__name__", str(kind)))
