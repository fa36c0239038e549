"""The gateway's own messages: JSON lines in production, coloured on a terminal, on standard error.

structlog renders for terminals only and is imported only there: with rich, which it brings along, it is a third of a
start and a fifth of the idle memory, and a JSON line needs neither.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import msgspec

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


class Log:
    """Write messages. Fields never hold secrets or prompts."""

    def __init__(self, mode: Mode = "json", stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.is_console = mode == "console" or (mode == "auto" and self.stream.isatty())
        self.is_off = mode == "off"
        self._render: Render | None = None

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
        self.stream.write(line + "\n")
        self.stream.flush()
