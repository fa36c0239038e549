"""From options to the members of a JSON body.

Each option fills one member, named by a dotted path; ``--config-json`` brings whatever has no option of its own, and
``--clear`` sets members to null. Secrets come from the environment, a file or standard input, never as an argument.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import click

from penstock import ConfigurationError
from penstock.governance import read_usd

_MAX_SECRET = 16_384


@attrs.frozen
class Field:
    """One option and the member it fills."""

    option: str
    """Such as ``--limit``."""
    member: str
    """Dotted path, such as ``rate_limits.rpm``."""
    help: str = ""
    type: Any = str
    is_many: bool = False
    is_required: bool = False
    """On creation."""
    read: Callable[[Any], Any] | None = None
    """From what click gives to the JSON value; raises ValueError."""
    only: Literal["create", "update"] | None = None

    @property
    def key(self) -> str:
        """Return the name click gives the value."""
        return self.option.lstrip("-").replace("-", "_")

    def parameter(self, verb: str) -> click.Option:
        """Return the option; a switch of type bool has a negative form."""
        if self.type is bool:
            return click.Option([f"{self.option}/--no-{self.option[2:]}", self.key], help=self.help, default=None)
        return click.Option(
            [self.option, self.key],
            help=self.help,
            type=self.type,
            multiple=self.is_many,
            required=self.is_required and verb == "create",
        )


@attrs.frozen
class SecretField:
    """A secret: ``--api-key-env NAME`` or ``--api-key-file FILE`` fill one member."""

    stem: str
    """Such as ``api-key``."""
    member: str
    about: str
    only: Literal["create", "update"] | None = None

    def parameters(self) -> list[click.Parameter]:
        """Return the two options."""
        return [
            click.Option([f"--{self.stem}-env"], metavar="NAME", help=f"Environment variable that holds {self.about}."),
            click.Option(
                [f"--{self.stem}-file"], metavar="FILE", help=f"File that holds {self.about}; - for standard input."
            ),
        ]

    def take(self, values: Mapping[str, Any]) -> str | None:
        """Return the secret, None where none was named. Raises UsageError and ConfigurationError, without it."""
        key = self.stem.replace("-", "_")
        variable, file = values.get(f"{key}_env"), values.get(f"{key}_file")
        if variable is not None and file is not None:
            raise click.UsageError(f"--{self.stem}-env and --{self.stem}-file: give one of them")
        if variable is not None:
            return _from_environment(variable, f"--{self.stem}-env")
        return None if file is None else _from_file(file, f"--{self.stem}-file")


def _from_environment(variable: str, option: str) -> str:
    if not variable.isidentifier():
        # What stands here may be the secret itself: it is not repeated.
        raise click.UsageError(f"{option}: give the name of an environment variable, not the secret itself")
    secret = os.environ.get(variable, "").strip()
    if not secret:
        raise ConfigurationError(f"{option} {variable}: that variable is not set here; export it, or give it a file")
    return secret


def _from_file(file: str, option: str) -> str:
    try:
        text = sys.stdin.read(_MAX_SECRET) if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{option} {file}: cannot be read: {getattr(error, 'strerror', 'no text')}") from None
    secret = text.strip()
    if not secret:
        raise ConfigurationError(f"{option} {file}: is empty")
    return secret


AnyField = Field | SecretField


def parameters(fields: Sequence[AnyField], verb: str) -> list[click.Parameter]:
    """Return the options for ``create`` or ``update``, and those that bring anything else."""
    found: list[click.Parameter] = []
    for field in fields:
        if field.only in (None, verb):
            found += field.parameters() if isinstance(field, SecretField) else [field.parameter(verb)]
    found.append(
        click.Option(
            ["--config-json"], metavar="JSON", help="Further members, as the API takes them; @FILE reads a file."
        )
    )
    if verb == "update":
        found.append(click.Option(["--clear"], multiple=True, metavar="MEMBER", help="Set a member to null."))
    return found


def body_of(fields: Sequence[AnyField], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON body of what was given. Raises UsageError."""
    body: dict[str, Any] = {}
    for field in fields:
        if isinstance(field, SecretField):
            secret = field.take(values)
            if secret is not None:
                put(body, field.member, secret)
            continue
        value = values.get(field.key)
        if value is None or (field.is_many and not value):
            continue
        value = list(value) if field.is_many else value
        if field.read is not None:
            try:
                value = field.read(value)
            except ValueError as error:
                raise click.UsageError(f"{field.option}: {error}") from None
        put(body, field.member, value)
    _merge(body, _further(values.get("config_json")), "")
    for member in values.get("clear") or ():
        if member in body:
            raise click.UsageError(f"--clear {member}: the same command sets it")
        put(body, member, None)
    return body


def put(body: dict[str, Any], member: str, value: Any) -> None:
    """Set a member named by a dotted path."""
    *way, last = member.split(".")
    for name in way:
        body = body.setdefault(name, {})
    body[last] = value


def _further(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", "no text")
            raise click.UsageError(f"--config-json {text}: cannot be read: {reason}") from None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"--config-json: is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise click.UsageError('--config-json: must be an object, like {"tags": ["a"]}')
    return found


def _merge(body: dict[str, Any], further: Mapping[str, Any], path: str) -> None:
    for name, value in further.items():
        place = f"{path}.{name}" if path else name
        if isinstance(value, dict) and isinstance(body.get(name), dict):
            _merge(body[name], value, place)
        elif name in body:
            raise click.UsageError(f"--config-json: {place} is given by an option too; give it once")
        else:
            body[name] = value


# --- how values are read ------------------------------------------------------------------------------------


def pairs(texts: Sequence[str]) -> dict[str, str]:
    """Read ``name=value`` pairs. Raises ValueError."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"{text!r} is not NAME=VALUE")
        if name in found:
            raise ValueError(f"{name!r} is given twice")
        found[name] = value
    return found


def usd(text: str) -> str:
    """Check an amount of dollars and leave it as it stands. Raises ValueError."""
    read_usd(text)
    return text
