"""The grammar of Responses streams as code, and what the SDK makes of an answer."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterable, Sequence
from typing import Any

import pydantic
from openai import omit
from openai._models import construct_type_unchecked
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent

from penstock.sse import EventSplitter, parse_event

ENDS = ("response.completed", "response.incomplete", "response.failed")


def _models() -> dict[str, type[pydantic.BaseModel]]:
    union = typing.get_args(ResponseStreamEvent)[0]
    return {typing.get_args(each.model_fields["type"].annotation)[0]: each for each in typing.get_args(union)}


MODELS = _models()
"""The SDK's class of each event."""
_DELTAS = {
    "response.output_text.delta": "output_text",
    "response.refusal.delta": "refusal",
    "response.reasoning_summary_text.delta": "summary_text",
    "response.function_call_arguments.delta": "arguments",
    "response.custom_tool_call_input.delta": "input",
}
_DONE = {
    "response.output_text.done": ("output_text", "text"),
    "response.refusal.done": ("refusal", "refusal"),
    "response.reasoning_summary_text.done": ("summary_text", "text"),
    "response.function_call_arguments.done": ("arguments", "arguments"),
    "response.custom_tool_call_input.done": ("input", "input"),
}


def events_of(stream: bytes) -> list[dict[str, Any]]:
    """Return the payloads of a stream, whose names must be their types; comments are passed over."""
    splitter = EventSplitter()
    found = []
    for raw in [*splitter.feed(stream), *splitter.finish()]:
        event = parse_event(raw)
        if event.is_comment_only:
            continue
        payload = json.loads(event.payload)
        assert event.name == payload["type"]
        found.append(payload)
    assert splitter.pending == b""
    return found


class _Item:
    """Follow one output item."""

    def __init__(self, item: dict[str, Any]) -> None:
        self.id = item["id"]
        self.kind = item["type"]
        self.texts: list[str] = []
        self.parts: list[dict[str, Any]] = []
        self.open: str | None = None if self.kind in ("message", "reasoning") else self.kind
        self.is_said = False
        """Whether its arguments have been said in full."""

    def take(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        assert event["item_id"] == self.id
        index = event.get("content_index", event.get("summary_index"))
        assert index in (None, len(self.parts))
        if kind in ("response.content_part.added", "response.reasoning_summary_part.added"):
            assert self.open is None
            self.open, self.texts = event["part"]["type"], []
        elif kind in _DELTAS:
            assert event["delta"]
            assert not self.is_said
            assert self.open == (self.kind if self.kind.endswith("_call") else _DELTAS[kind])
            self.texts.append(event["delta"])
        elif kind in _DONE:
            assert self.open is not None
            assert event[_DONE[kind][1]] == "".join(self.texts)
            self.is_said = self.kind.endswith("_call")
        else:
            assert kind in ("response.content_part.done", "response.reasoning_summary_part.done")
            part = event["part"]
            assert part["type"] == self.open
            assert part.get("text", part.get("refusal")) == "".join(self.texts)
            self.parts.append(part)
            self.open = None

    def finish(self, item: dict[str, Any]) -> None:
        assert (item["id"], item["type"]) == (self.id, self.kind)
        if self.kind == "message":
            assert self.open is None
            assert item["content"] == self.parts
            assert self.parts
        elif self.kind == "reasoning":
            assert item["summary"] == self.parts
        else:
            assert self.is_said
            assert item["arguments" if self.kind == "function_call" else "input"] == "".join(self.texts)


def check_events(events: Sequence[dict[str, Any]], *, is_cut: bool = False) -> dict[str, Any]:
    """Assert that events are a well-formed stream, or the beginning of one; returns the last response object."""
    open_items: dict[int, _Item] = {}
    done: dict[int, dict[str, Any]] = {}
    for number, event in enumerate(events):
        MODELS[event["type"]].model_validate(event)
        assert event["sequence_number"] == number
        kind = event["type"]
        assert (kind == "response.created") == (number == 0)
        assert (kind == "response.in_progress") == (number == 1)
        assert kind not in ENDS or number == len(events) - 1
        if kind == "response.output_item.added":
            assert event["output_index"] == len(open_items) + len(done)
            open_items[event["output_index"]] = _Item(event["item"])
        elif kind == "response.output_item.done":
            open_items.pop(event["output_index"]).finish(event["item"])
            done[event["output_index"]] = event["item"]
        elif "item_id" in event:
            open_items[event["output_index"]].take(event)
    ids = [item["id"] for item in done.values()]
    assert len(set(ids)) == len(ids)
    responses = [event["response"] for event in events if "response" in event]
    assert len({response["id"] for response in responses}) == 1
    if is_cut:
        assert events[-1]["type"] not in ENDS
        return dict(responses[-1])
    last = responses[-1]
    assert events[-1]["type"] == f"response.{last['status']}"
    assert last["output"] == [done[index] for index in sorted(done)]
    assert open_items == {} or last["status"] == "failed"
    check_response(last)
    return dict(last)


def check_response(response: dict[str, Any]) -> Response:
    """Assert that a response object is what the SDK's types say; returns it."""
    return Response.model_validate(response)


def accumulated(events: Iterable[dict[str, Any]]) -> Response:
    """Return what the accumulator behind ``client.responses.stream`` makes of events."""
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in events:
        state.handle_event(construct_type_unchecked(value=event, type_=typing.cast("Any", ResponseStreamEvent)))
    assert state._completed_response is not None
    return state._completed_response


def said(response: dict[str, Any]) -> dict[str, Any]:
    """Return what an answer holds, by kind."""
    found: dict[str, Any] = {"text": "", "reasoning": "", "calls": [], "refusal": ""}
    for item in response["output"]:
        if item["type"] == "message":
            for part in item["content"]:
                found["text"] += part.get("text", "")
                found["refusal"] += part.get("refusal", "")
        elif item["type"] == "reasoning":
            found["reasoning"] += "".join(part["text"] for part in item["summary"])
        else:
            found["calls"].append((item["call_id"], item["name"], item.get("arguments", item.get("input"))))
    return found
