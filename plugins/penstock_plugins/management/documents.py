"""JSON to typed documents and back: strict, and every fault one line that names the member and the rule.

cattrs does the walking; what is accepted, and how a fault reads, is decided here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence, Sized
from typing import Any, Literal, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import BaseValidationError, ForbiddenExtraKeysError
from cattrs.gen import make_mapping_structure_fn

from penstock import faults_of, suggest
from penstock_plugins.management.faults import RefusedError, bad_field

MAX_INTEGER = 2**53 - 1
"""What every JSON reader takes exactly."""
MAX_ITEMS = 500
"""How many items a list, and how many members an object, may have."""
MAX_FAULTS = 20
"""How many faults an answer names."""
_WORDS = {dict: "an object", list: "a list", tuple: "a list", str: "a string", bool: "a boolean", int: "an integer",
          float: "a number", type(None): "null"}  # fmt: skip


def structure(table: Mapping[str, Any], kind: type[Any], known: Sequence[str] = ()) -> Any:
    """Turn a JSON object into ``kind``. Raises RefusedError naming every fault.

    ``known`` are other names to suggest.
    """
    try:
        return _converter().structure(table, kind)
    except (BaseValidationError, ForbiddenExtraKeysError) as error:
        found = faults_of(error, unknown="unknown member", missing="is required", known=known)
        faults = list(itertools.islice(found, MAX_FAULTS))
    fields = [field for field, _ in faults]
    message = "; ".join(f"{field}: {rule}" if field else rule for field, rule in faults)
    raise RefusedError("bad_request", message, meta={"field": fields[0], "fields": fields})


def unstructure(document: Any) -> dict[str, Any]:
    """Return a document as JSON values."""
    found: dict[str, Any] = _converter().unstructure(document)
    return found


def merged(document: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with a JSON Merge Patch (RFC 7396) put over it."""
    result = dict(document)
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, Mapping):
            before = result.get(name)
            result[name] = merged(before if isinstance(before, Mapping) else {}, value)
        else:
            result[name] = value
    return result


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise RefusedError naming the members nobody knows, and what each was probably meant to be."""
    for name in given:
        if name not in known:
            raise bad_field(name[:80], f"unknown member{suggest(name[:80], known)}")


@functools.lru_cache(maxsize=1)
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True, unstruct_collection_overrides={})
    converter.register_structure_hook(str, _string)
    converter.register_structure_hook(int, _integer)
    converter.register_structure_hook(bool, _boolean)
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook_factory(
        attrs.has, lambda kind: _object(converter.gen_structure_attrs_fromdict(kind))
    )
    converter.register_structure_hook_factory(
        lambda kind: _origin(kind) in (dict, Mapping),
        lambda kind: _object(make_mapping_structure_fn(kind, converter)),
    )
    converter.register_structure_hook_func(lambda kind: _origin(kind) is tuple, _list_of(converter))
    converter.register_structure_hook_func(lambda kind: _origin(kind) is Literal, _choice)
    converter.register_unstructure_hook_func(
        lambda kind: _origin(kind) is tuple, lambda value: [converter.unstructure(item) for item in value]
    )
    return converter


def _origin(kind: Any) -> Any:
    return get_origin(kind)


def _string(value: Any, _: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a string, not {shown(value)}")
    if "\x00" in value:
        raise ValueError("must not hold NUL characters")
    return value


def _integer(value: Any, _: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"must be an integer, not {shown(value)}")
    return value


def _boolean(value: Any, _: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {shown(value)}")
    return value


def _number(value: Any, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > MAX_INTEGER:
        raise ValueError(f"must be a number, not {shown(value)}")
    return float(value)


def _object(structure_object: Any) -> Any:
    def check(value: Any, kind: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError(f"must be an object, not {shown(value)}")
        _check_size(value)
        return structure_object(value, kind)

    return check


def _check_size(value: Sized) -> None:
    """Raise ValueError for what has too many items, before each of them is looked at."""
    if len(value) > MAX_ITEMS:
        raise ValueError(f"holds at most {MAX_ITEMS}, not {len(value)}")


def _list_of(converter: cattrs.Converter) -> Any:
    def check(value: Any, kind: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError(f"must be a list, not {shown(value)}")
        _check_size(value)
        return tuple(converter.structure(list(value), list[get_args(kind)[0]]))  # type: ignore[arg-type,misc]

    return check


def _choice(value: Any, kind: Any) -> Any:
    choices = get_args(kind)
    if not isinstance(value, str) or value not in choices:
        allowed = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"must be one of {allowed}{suggest(value, choices) if isinstance(value, str) else ''}")
    return value


def shown(value: Any) -> str:
    """Say what was found without repeating a value that may be secret."""
    return _WORDS.get(type(value), type(value).__name__)
