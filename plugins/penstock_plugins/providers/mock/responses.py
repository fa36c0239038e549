"""OpenAI's Responses API: answers, streams of them, and stored responses by id."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from penstock_plugins.providers.mock.calls import Call
from penstock_plugins.providers.mock.chat import read_choice
from penstock_plugins.providers.mock.conversation import (
    Answer,
    Piece,
    Prompt,
    Tool,
    all_text_of,
    answer_to,
    member,
    number,
    rows,
    split_json,
    text_of,
)
from penstock_plugins.providers.mock.memory import Counts, StoredResponse
from penstock_plugins.providers.mock.replies import (
    CREATED,
    RefusedError,
    Reply,
    encode,
    json_reply,
    named,
    stream_reply,
)
from penstock_plugins.providers.mock.schemas import JSON

_ECHOED: dict[str, Any] = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
"""Members of the request that a response repeats, and what they are where the request leaves them out."""


def create(call: Call) -> Reply:
    """Answer, whole or as a stream; a background request is answered at once and finished when asked for."""
    items = _items(call)
    prompt = _read(call, items)
    answer = answer_to(prompt)
    document = _document(call, answer, call.memory.count_automatic(prompt))
    if call.document.get("store") is not False:
        call.memory.store(StoredResponse(document, items))
    if call.is_stream:
        return stream_reply(_stream(document, answer))
    if document["background"]:
        return json_reply({**document, "status": "queued", "output": [], "usage": None})
    return json_reply(document)


def _items(call: Call) -> list[dict[str, Any]]:
    """Return the input as items, those of the previous response in front."""
    given = call.document.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else rows(given)
    previous_id = call.document.get("previous_response_id")
    if not isinstance(previous_id, str):
        return items
    previous = call.memory.stored(previous_id)
    if previous is None:
        raise RefusedError(
            400,
            f"Previous response with id {previous_id[:100]!r} not found.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return [*previous.items, *previous.document["output"], *items]


def _read(call: Call, items: list[dict[str, Any]]) -> Prompt:
    document = call.document
    if not items and not document.get("instructions"):
        raise RefusedError(400, "input must be a text or a list of items.", param="input")
    offered = rows(document.get("tools"))
    tools = [Tool(tool["name"], tool.get("parameters")) for tool in offered if _is_function(tool)]
    last = items[-1] if items else {}
    form = member(document.get("text"), "format")
    wants_json = member(form, "type") in ("json_schema", "json_object")
    head = [document[name] for name in ("tools", "instructions") if document.get(name)]
    choice = document.get("tool_choice")
    return Prompt(
        model=call.model,
        pieces=tuple(Piece(encode(part)) for part in (*head, *items)),
        text=next((text_of(item.get("content")) for item in reversed(items) if item.get("role") == "user"), ""),
        tool_result=all_text_of(last.get("output")) if last.get("type") == "function_call_output" else None,
        tools=tuple(tools),
        choice=read_choice(choice, member(choice, "name")),
        is_parallel=document.get("parallel_tool_calls") is not False,
        schema=member(form, "schema") or {"type": "object"} if wants_json else None,
        max_tokens=number(document.get("max_output_tokens")),
        tokens=call.behaviour.tokens,
    )


def _is_function(tool: dict[str, Any]) -> bool:
    return tool.get("type") == "function" and isinstance(tool.get("name"), str)


def _document(call: Call, answer: Answer, counts: Counts) -> dict[str, Any]:
    output = answer.output_tokens
    asked = {name: call.document.get(name) for name in _ECHOED}
    return {
        "id": call.new_id("resp_"),
        "object": "response",
        "created_at": CREATED,
        "status": "incomplete" if answer.is_cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if answer.is_cut else None,
        "model": call.model,
        "output": _output(call, answer),
        **{name: value if asked[name] is None else asked[name] for name, value in _ECHOED.items()},
        "usage": {
            "input_tokens": counts.all_input,
            "input_tokens_details": {"cached_tokens": counts.cache_read, "cache_write_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts.all_input + output,
        },
    }


def _output(call: Call, answer: Answer) -> list[dict[str, Any]]:
    if answer.calls:
        return [
            {
                "type": "function_call",
                "id": call.new_id("fc_", index),
                "call_id": call.new_id("call_", index),
                "name": found.name,
                "arguments": found.json,
                "status": "completed",
            }
            for index, found in enumerate(answer.calls)
        ]
    part = {"type": "output_text", "text": answer.text, "annotations": [], "logprobs": []}
    status = "incomplete" if answer.is_cut else "completed"
    return [
        {
            "type": "message",
            "id": call.new_id("msg_"),
            "role": "assistant",
            "status": status,
            "content": [part],
        }
    ]


# --- streams ----------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Numbered:
    """Spell events and number them."""

    sequence: int = 0

    def __call__(self, kind: str, **members: JSON) -> bytes:
        event = named({"type": kind, "sequence_number": self.sequence, **members})
        self.sequence += 1
        return event


def _stream(document: dict[str, Any], answer: Answer) -> Iterator[bytes]:
    event = _Numbered()
    begun = {**document, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    for index, item in enumerate(document["output"]):
        is_message = item["type"] == "message"
        empty: dict[str, JSON] = {"content": []} if is_message else {"arguments": ""}
        yield event("response.output_item.added", output_index=index, item={**item, **empty, "status": "in_progress"})
        place = {"item_id": item["id"], "output_index": index}
        yield from (_stream_text(event, place, item, answer) if is_message else _stream_call(event, place, item))
        yield event("response.output_item.done", output_index=index, item=item)
    yield event(f"response.{document['status']}", response=document)


def _stream_text(event: _Numbered, place: dict[str, Any], item: dict[str, Any], answer: Answer) -> Iterator[bytes]:
    place = {**place, "content_index": 0}
    part = item["content"][0]
    yield event("response.content_part.added", **place, part={**part, "text": ""})
    for word in answer.words():
        yield event("response.output_text.delta", **place, delta=word, logprobs=[])
    yield event("response.output_text.done", **place, text=answer.text, logprobs=[])
    yield event("response.content_part.done", **place, part=part)


def _stream_call(event: _Numbered, place: dict[str, Any], item: dict[str, Any]) -> Iterator[bytes]:
    for part in split_json(item["arguments"]):
        yield event("response.function_call_arguments.delta", **place, delta=part)
    yield event("response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"])


# --- stored responses -------------------------------------------------------------------------------------


def _find(call: Call) -> StoredResponse:
    response_id = call.path.removeprefix("/responses/").partition("/")[0]
    found = call.memory.stored(response_id)
    if found is None:
        raise RefusedError(404, f"Response with id {response_id[:100]!r} not found.")
    return found


def get_or_delete(call: Call) -> Reply:
    """Return a stored response, or delete it."""
    found = _find(call)
    if call.method == b"DELETE":
        call.memory.forget(found.document["id"])
        return json_reply({"id": found.document["id"], "object": "response", "deleted": True})
    if call.query.get("stream") == "true":
        raise RefusedError(400, "The mock does not stream stored responses; ask without stream=true.", param="stream")
    return json_reply(found.document)


def cancel(call: Call) -> Reply:
    """Cancel a response that was made in the background."""
    found = _find(call)
    if not found.document["background"]:
        raise RefusedError(400, "Only responses created with background=true can be cancelled.")
    cancelled = {**found.document, "status": "cancelled", "output": [], "usage": None}
    call.memory.store(attrs.evolve(found, document=cancelled))
    return json_reply(cancelled)


def list_items(call: Call) -> Reply:
    """List the items a stored response was made from, the last one first unless ``order=asc``."""
    found = _find(call)
    listed = []
    for index, item in enumerate(found.items):
        content = item.get("content")
        parts = [{"type": "input_text", "text": content}] if isinstance(content, str) else content
        message = {"type": "message", "status": "completed", "content": parts} if "role" in item else {}
        listed.append({"id": f"{found.document['id'].replace('resp_', 'item_')}_{index}", **item, **message})
    if call.query.get("order") != "asc":
        listed.reverse()
    ends = {"first_id": listed[0]["id"], "last_id": listed[-1]["id"]} if listed else {"first_id": None, "last_id": None}
    return json_reply({"object": "list", "data": listed, "has_more": False, **ends})
