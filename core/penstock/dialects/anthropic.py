"""Anthropic's Messages dialect: what its replies and streams say about tokens.

Shapes: https://docs.anthropic.com/en/api/messages and /en/api/messages-streaming.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.dialects.windows import Carrier, count, data_lines, joined, usage_in_cut_json, whole_payloads
from penstock.models import Usage

if TYPE_CHECKING:
    from penstock.metering import BodyWindow

_ERRORS = (ValueError, RecursionError)  # msgspec's errors are ValueErrors
_HOUR = "ephemeral_1h_input_tokens"
_MINUTES = "ephemeral_5m_input_tokens"


class _Event(msgspec.Struct):
    type: str = ""
    message: Carrier | None = None
    usage: Any = None


_decode_message = msgspec.json.Decoder(Carrier).decode
_decode_event = msgspec.json.Decoder(_Event).decode


def read_usage(window: BodyWindow, *, is_stream: bool) -> Usage | None:
    """Read token counts out of a Messages response body; None when it holds none (count_tokens has none).

    On a stream ``message_start`` opens the count and each ``message_delta`` overrides what it names: its
    numbers are cumulative. A stream cut early gives what message_start said. Compaction runs on the same
    model and is billed but left out of the top-level numbers, so its iterations are added. Never raises.
    """
    if is_stream:
        return _to_usage(_read_stream(joined(window)))
    if window.is_whole:
        try:
            return _to_usage(_decode_message(window.text).usage)
        except _ERRORS:
            pass
    return _to_usage(usage_in_cut_json(window))


def _read_stream(text: bytes) -> dict[str, Any]:
    counts: dict[str, Any] = {}
    try:
        for payload in data_lines(text):
            _add_event(counts, payload)
    except _ERRORS:  # cut, or spread over several lines
        counts.clear()
        for payload in whole_payloads(text):
            with contextlib.suppress(*_ERRORS):
                _add_event(counts, payload)
    return counts


def _add_event(counts: dict[str, Any], payload: bytes) -> None:
    event = _decode_event(payload)
    if event.type == "message_start" and event.message is not None:
        update = event.message.usage
    elif event.type == "message_delta":
        update = event.usage
    else:
        return
    if type(update) is not dict:
        return
    counts.update({name: value for name, value in update.items() if value is not None})
    split = counts.get("cache_creation")
    written = update.get("cache_creation_input_tokens")
    if written is not None and update.get("cache_creation") is None and type(split) is dict:
        hour = min(count(split.get(_HOUR)), count(written))  # a later total without a split keeps the hour's part
        counts["cache_creation"] = {_HOUR: hour, _MINUTES: count(written) - hour}


def _to_usage(found: object) -> Usage | None:
    if type(found) is not dict or not ("input_tokens" in found or "output_tokens" in found):
        return None
    rows = [_classes(found)]
    iterations = found.get("iterations")
    if type(iterations) is list:
        rows += [_classes(row) for row in iterations if type(row) is dict and row.get("type") == "compaction"]
    cold, read, minutes, hour, output = rows[0] if len(rows) == 1 else map(sum, zip(*rows, strict=True))
    details = found.get("output_tokens_details")
    thinking = count(details.get("thinking_tokens")) if type(details) is dict else 0
    return Usage(cold, read, minutes, hour, output, min(thinking, output), "provider")


def _classes(found: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """Give input, cache read, 5-minute and 1-hour cache writes, and output."""
    get = found.get
    split = get("cache_creation")
    if type(split) is dict and (_MINUTES in split or _HOUR in split):
        minutes, hour = count(split.get(_MINUTES)), count(split.get(_HOUR))
    else:
        minutes, hour = count(get("cache_creation_input_tokens")), 0
    return (
        count(get("input_tokens")),
        count(get("cache_read_input_tokens")),
        minutes,
        hour,
        count(get("output_tokens")),
    )
