"""What is attached to a key: guardrails of the store or of the configuration file, with checks made once per key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from penstock import (
    ALL_DIRECTIONS,
    Check,
    ConfigurationError,
    Direction,
    EvaluatorRegistry,
    GuardrailAttachment,
    KeyDirectory,
    Principal,
    Services,
    suggest,
)
from penstock.governance import PolicyDirectory
from penstock_plugins.guardrails.judging import Rail

_REMEMBERED = 10_000
DEFAULT_SECONDS = 5.0
CHUNK_SECONDS = 0.05


@attrs.frozen(kw_only=True)
class GuardrailConfig:
    """One ``[[plugins.guardrails.guardrails]]`` table."""

    name: str
    """What keys attach it by."""
    evaluator: str
    """Type of evaluator, such as ``pii``."""
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    """What the evaluator understands."""
    directions: tuple[str, ...] = ("request",)
    """When it runs: ``request``, ``response``, ``stream_chunk``."""
    fail_open: bool | None = None
    """Let pass where the check fails; by default requests and answers are refused, and streams flow on."""
    timeout_ms: int | None = None
    """How long a check may take, by default 5000. Calls on a stream have 50, unless that is its only direction."""
    sample_rate: float = 1.0
    """Share of exchanges that are checked."""


@attrs.frozen(kw_only=True)
class GuardrailsConfig:
    """The ``[plugins.guardrails]`` table."""

    guardrails: tuple[GuardrailConfig, ...] = ()
    """Guardrails of gateways without a store; ``[[plugins.virtual_keys.keys]]`` attach them by name."""


@attrs.frozen(eq=False)
class Plan:
    """Hold the guardrails of one key, by direction, in order of attachment."""

    request: tuple[Rail, ...] = ()
    response: tuple[Rail, ...] = ()
    stream: tuple[Rail, ...] = ()

    @property
    def answer(self) -> tuple[Rail, ...]:
        """Return who judges an answer that is no stream: the same text gets the same verdict either way."""
        others = [rail for rail in self.stream if rail not in self.response]
        return self.response + tuple(attrs.evolve(rail, fail_open=rail.opens_streams) for rail in others)


class Rails:
    """Find the guardrails of keys."""

    def __init__(self, config: GuardrailsConfig, services: Services) -> None:
        self._services = services
        self._configured = {entry.name: entry for entry in config.guardrails}
        self._checks: dict[str, Check] = {}
        self._plans: dict[Principal, Plan] = {}
        self._revision: int | None = None
        self._directory: PolicyDirectory | None = None

    def open(self) -> None:
        """Find the store's guardrails, and make the checks of the file's. Raises ConfigurationError."""
        self._directory = self._services.find(PolicyDirectory)  # type: ignore[type-abstract]
        registry = self._services.evaluators
        for number, entry in enumerate(self._configured.values()):
            self._checks[entry.name] = checked(registry, entry, f"guardrails[{number}] ({entry.name})")
        keys = self._services.find(KeyDirectory)  # type: ignore[type-abstract]
        if self._directory is None and keys is not None:
            faults = self._unknown(keys.all_principals())
            if faults:
                raise ConfigurationError(*faults)

    def _unknown(self, principals: Iterable[Principal]) -> list[str]:
        names = list(self._configured)
        return [
            f"key {principal.key_name!r}: there is no guardrail {name!r}{suggest(name, names)}"
            for principal in principals
            for name in [each.guardrail_id for each in principal.guardrails]
            if name not in self._configured
        ]

    def of(self, principal: Principal) -> Plan:
        """Return the plan of a key. Raises RequestError where the store's policies cannot be read."""
        revision = 0 if self._directory is None else self._directory.revision
        if revision != self._revision or len(self._plans) > _REMEMBERED:
            self._plans.clear()
            self._revision = revision
        plan = self._plans.get(principal)
        if plan is None:
            rails = [self._rail(principal, each) for each in principal.guardrails]
            plan = self._plans[principal] = Plan(
                tuple(rail for rail in rails if "request" in rail.directions),
                tuple(rail for rail in rails if "response" in rail.directions),
                tuple(rail for rail in rails if "stream_chunk" in rail.directions),
            )
        return plan

    def _rail(self, principal: Principal, attachment: GuardrailAttachment) -> Rail:
        entry = self._configured.get(attachment.guardrail_id)
        if entry is not None:
            own = _rail_of(entry, self._checks[entry.name])
            return own if attachment.fail_open is None else _opened(own, is_open=attachment.fail_open)
        found = None if self._directory is None else self._directory.guardrail(attachment.guardrail_id, principal)
        if found is None:
            missing = Rail(attachment.guardrail_id, None, ALL_DIRECTIONS, fault="there is no such guardrail any more")
            return _opened(missing, is_open=bool(attachment.fail_open))
        document = found.guardrail
        check, fault = None, ""
        try:
            check = self._services.evaluators.prepare(found.evaluator, found.settings, document.directions)
        except ConfigurationError as error:
            fault = str(error)
        table = GuardrailConfig(
            name=document.name,
            evaluator=found.evaluator,
            directions=document.directions,
            fail_open=document.fail_open or None,  # false is the default there, and leaves streams to theirs
            timeout_ms=document.timeout_ms,
            sample_rate=document.sample_rate,
        )
        rail = _rail_of(table, check, fault)
        if attachment.fail_open is not None:
            return _opened(rail, is_open=attachment.fail_open)
        return rail if check is not None else _opened(rail, is_open=document.fail_open)


def checked(registry: EvaluatorRegistry, entry: GuardrailConfig, where: str) -> Check:
    """Return the check of a guardrail of the file. Raises ConfigurationError."""
    for direction in entry.directions:
        if direction not in ALL_DIRECTIONS:
            hint = suggest(direction, sorted(ALL_DIRECTIONS))
            raise ConfigurationError(f"{where}.directions: there is no direction {direction!r}{hint}")
    if not 0 <= entry.sample_rate <= 1:
        raise ConfigurationError(f"{where}.sample_rate: must be from 0 to 1")
    if entry.timeout_ms is not None and entry.timeout_ms < 1:
        raise ConfigurationError(f"{where}.timeout_ms: must be at least 1")
    return registry.prepare(entry.evaluator, entry.settings, _directions(entry.directions), where=where)


def _directions(names: Sequence[str]) -> tuple[Direction, ...]:
    return tuple(direction for direction in sorted(ALL_DIRECTIONS) if direction in names)


def _rail_of(entry: GuardrailConfig, check: Check | None, fault: str = "") -> Rail:
    seconds = None if entry.timeout_ms is None else entry.timeout_ms / 1000
    return Rail(
        name=entry.name,
        check=check,
        directions=frozenset(_directions(entry.directions)),
        fail_open=bool(entry.fail_open),
        opens_streams=entry.fail_open is not False,
        timeout=DEFAULT_SECONDS if seconds is None else seconds,
        chunk_timeout=CHUNK_SECONDS if seconds is None or len(entry.directions) > 1 else seconds,
        sample_rate=entry.sample_rate,
        fault=fault,
    )


def _opened(rail: Rail, *, is_open: bool) -> Rail:
    return attrs.evolve(rail, fail_open=is_open, opens_streams=is_open)
