"""What holds for the members of every kind: sizes, slugs, ranges, times and patterns."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from penstock import Fallback, PatternRules
from penstock_plugins.management.documents import MAX_INTEGER, MAX_ITEMS
from penstock_plugins.management.faults import bad_field
from penstock_plugins.management.resources import Draft, kind_of_id
from penstock_plugins.management.times import normal_time

MAX_NAME = 200
MAX_TEXT = 4096
MAX_METADATA = 40
MAX_PATTERN = 1000
_slug = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}").fullmatch
_printable = re.compile(r"[^\x00-\x1f\x7f]*").fullmatch
_TIMES = ("expires_at", "cycle_anchor_at", "effective_at")
_AT_LEAST = {
    "weight": 0, "fallback_priority": -MAX_INTEGER, "priority": -MAX_INTEGER, "ttl": 1, "timeout_ms": 1,
    "max_attempts": 1, "same_binding_retries": 0, "rpm": 1, "tpm": 1, "rpd": 1, "concurrency": 1,
}  # fmt: skip
_AT_MOST = {
    "max_attempts": 100,
    "same_binding_retries": 100,
    "timeout_ms": 86_400_000,
    "ttl": 86_400,
    "weight": 1_000_000,
}


def check_bounds(draft: Draft) -> None:
    """Raise RefusedError for a member beyond what any kind may hold; bring times into their normal form."""
    document = draft.document
    for field in attrs.fields(type(document)):
        value = getattr(document, field.name)
        if value is None:
            continue
        _check(value, field.name, field.name)
        if field.name in ("name", "slug", "external_id"):
            _check_label(field.name, value, required=field.default is attrs.NOTHING)
        if field.name in _TIMES:
            draft.set(**{field.name: _time(field.name, value)})
    metadata = getattr(document, "metadata", None)
    if metadata is not None and len(metadata) > MAX_METADATA:
        raise bad_field("metadata", f"holds at most {MAX_METADATA} pairs, not {len(metadata)}")


def _check_label(name: str, value: str, *, required: bool) -> None:
    if name == "slug":
        if not _slug(value):
            raise bad_field(name, "must be 1 to 63 lower-case letters, digits, - and _, beginning with no - or _")
        if kind_of_id(value) is not None:
            raise bad_field(name, "must not look like an id")
        return
    if len(value) > MAX_NAME:
        raise bad_field(name, f"has at most {MAX_NAME} characters, not {len(value)}")
    if not _printable(value) or value != value.strip():
        raise bad_field(name, "must not hold control characters, or begin or end with a blank")
    if not value and (required or name == "external_id"):
        raise bad_field(name, "must not be empty")
    if kind_of_id(value) is not None and name == "name":
        raise bad_field(name, "must not look like an id")


def _time(where: str, value: str) -> str:
    try:
        return normal_time(value)
    except ValueError as error:
        raise bad_field(where, str(error)) from None


def _check(value: Any, where: str, name: str) -> None:
    """Walk what a member holds."""
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise bad_field(where, f"has at most {MAX_TEXT} characters, not {len(value)}")
    elif isinstance(value, bool):
        return
    elif isinstance(value, int):
        _check_integer(value, where, name)
    elif isinstance(value, Mapping):
        _check_size(value, where)
        for key, each in value.items():
            _check(key, where, "")
            _check(each, f"{where}.{key[:80]}", "")
    elif isinstance(value, list | tuple):
        _check_size(value, where)
        for number, each in enumerate(value):
            _check(each, f"{where}[{number}]", "")
    elif attrs.has(type(value)):
        for field in attrs.fields(type(value)):
            _check(getattr(value, field.name), f"{where}.{field.name}", field.name)


def _check_integer(value: int, where: str, name: str) -> None:
    limit = 2**63 - 1 if name.endswith("_nano_usd") else MAX_INTEGER
    least, most = _AT_LEAST.get(name, -limit), _AT_MOST.get(name, limit)
    if not least <= value <= most:
        raise bad_field(where, f"must be from {least} to {most}")


def _check_size(value: Mapping[Any, Any] | Sequence[Any], where: str) -> None:
    if len(value) > MAX_ITEMS:
        raise bad_field(where, f"holds at most {MAX_ITEMS}, not {len(value)}")


def check_positive(where: str, value: float | None) -> None:
    """Raise RefusedError for a duration that is none."""
    if value is not None and not 0 < value <= 86_400:
        raise bad_field(where, "must be over 0 and at most 86400 seconds")


def check_fallback(fallback: Fallback | None, where: str = "fallback") -> None:
    """Raise RefusedError for what is listed twice."""
    if fallback is not None and len(set(fallback.on)) != len(fallback.on):
        raise bad_field(f"{where}.on", "lists the same twice")


def check_unique(where: str, values: Sequence[str]) -> None:
    """Raise RefusedError for a list that holds the same twice."""
    if len(set(values)) != len(values):
        raise bad_field(where, "lists the same twice")


def check_rules(rules: Any, where: str = "policy_rules") -> None:
    """Raise RefusedError for a pattern that RE2 does not compile."""
    for field in attrs.fields(type(rules)):
        patterns: PatternRules | None = getattr(rules, field.name)
        if patterns is None:
            continue
        for side in ("deny", "allow"):
            for number, pattern in enumerate(getattr(patterns, side) or ()):
                _check_pattern(pattern, f"{where}.{field.name}.{side}[{number}]")


def _check_pattern(pattern: str, where: str) -> None:
    if len(pattern) > MAX_PATTERN:
        raise bad_field(where, f"a pattern has at most {MAX_PATTERN} characters")
    import re2  # noqa: PLC0415 - only who writes patterns pays

    options = re2.Options()
    options.log_errors = False
    try:
        re2.compile(pattern, options)
    except UnicodeEncodeError:
        raise bad_field(where, "is no pattern RE2 compiles: it holds text that is no Unicode") from None
    except re2.error as error:
        reason = error.args[0] if error.args else ""
        text = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        raise bad_field(where, f"is no pattern RE2 compiles: {text}; it says {pattern[:200]!r}") from None


@functools.cache
def zone_names() -> frozenset[str]:
    """Return every time zone there is."""
    import zoneinfo  # noqa: PLC0415 - reading the list takes a while

    return frozenset(zoneinfo.available_timezones())


def check_zone(where: str, name: str) -> None:
    """Raise RefusedError for a time zone that is none."""
    if name not in zone_names():
        raise bad_field(where, f"{name[:80]!r} is no time zone of the IANA data base, such as Europe/Amsterdam")
