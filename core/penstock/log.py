"""The gateway's own messages: JSON lines in production, coloured on a terminal, on standard error.

structlog renders for terminals only and is imported only there: with rich, which it brings along, it is a third of a
start and a fifth of the idle memory, and a JSON line needs neither.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import msgspec

from penstock.errors import PenstockError

Mode = Literal["auto", "json", "console", "off"]
Render = Callable[[dict[str, Any]], str]


def json_text(fields: dict[str, Any]) -> str:
    """Return fields as one line of JSON; what JSON cannot say is said as text."""
    return msgspec.json.encode(fields, enc_hook=str).decode()


def console_renderer() -> Render:
    """Return structlog's terminal renderer. Its tracebacks show no local variables: those hold keys and prompts."""
    import structlog  # noqa: PLC0415 - see above

    render = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    return lambda fields: str(render(None, "info", fields))


_SPEAKING = (PenstockError, OSError, AttributeError, NameError, TypeError, ImportError)
"""Exceptions whose text is about code or the system; that of a KeyError or a ValueError often quotes what was read."""


def message_of(error: BaseException) -> str:
    """Return what an exception says, as far as that can hold neither secret nor prompt."""
    return str(error) if isinstance(error, _SPEAKING) else ""


def traceback_of(error: BaseException) -> str:
    """Return the frames of an exception and of what led to it, without local variables and texts of others."""
    return "".join(_lines_of(error, set()))


def _lines_of(error: BaseException, seen: set[int]) -> Iterator[str]:
    seen.add(id(error))
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if earlier is not None and id(earlier) not in seen:
        yield from _lines_of(earlier, seen)
        yield "\nwhich led to:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    message = message_of(error)
    yield f"{type(error).__qualname__}: {message}\n" if message else f"{type(error).__qualname__}\n"
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _lines_of(part, seen)


class Log:
    """Write messages. Fields never hold secrets or prompts; a stream that cannot take a message loses it."""

    def __init__(self, mode: Mode = "json", stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.is_console = mode == "console" or (mode == "auto" and self.stream.isatty())
        self.is_off = mode == "off"
        self._render: Render | None = None
        self.lost = 0
        """Messages the stream did not take."""

    def info(self, event: str, **fields: Any) -> None:
        if not self.is_off:
            self._write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._write("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._write("error", event, fields)

    def render(self, fields: dict[str, Any]) -> str:
        """Return the line of some fields, without its line end."""
        if self._render is None:
            self._render = console_renderer() if self.is_console else json_text
        return self._render(fields)

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = self.render({"timestamp": at, "level": level, "event": event, **fields})
        try:
            self.stream.write(line + "\n")
            self.stream.flush()
        except (OSError, ValueError):  # a reader that is gone, a full disk, a closed stream: traffic goes on
            self.lost += 1


class LibraryRecords(logging.Handler):
    """Write what plugins and libraries say through ``logging`` as messages of the gateway, warnings and worse."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        write = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        try:
            event = record.getMessage()
        except Exception:  # noqa: BLE001 - somebody else's format and values
            event = str(record.msg)
        fields: dict[str, Any] = {"logger": record.name}
        error = None if record.exc_info is None else record.exc_info[1]
        if error is not None:
            fields["traceback"] = traceback_of(error)
        write(event, **fields)


@contextmanager
def taking_library_records(log: Log) -> Iterator[None]:
    """Have ``logging`` end in ``log`` meanwhile."""
    records, root = LibraryRecords(log), logging.getLogger()
    root.addHandler(records)
    try:
        yield
    finally:
        root.removeHandler(records)
