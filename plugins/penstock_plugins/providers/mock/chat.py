"""OpenAI's chat completions and the older completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from penstock_plugins.providers.mock.calls import Call
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
from penstock_plugins.providers.mock.memory import Counts
from penstock_plugins.providers.mock.replies import (
    CREATED,
    RefusedError,
    Reply,
    encode,
    json_reply,
    sse,
    stream_reply,
)
from penstock_plugins.providers.mock.schemas import JSON

_DONE = b"data: [DONE]\n\n"
_MAX_CHOICES = 128


@attrs.frozen(eq=False)
class _Turn:
    """Hold one answered request."""

    call: Call
    answer: Answer
    counts: Counts
    choices: int

    @property
    def finish_reason(self) -> str:
        if self.answer.calls:
            return "tool_calls"
        return "length" if self.answer.is_cut else "stop"

    def usage(self) -> dict[str, Any]:
        prompt, output = self.counts.all_input, self.answer.output_tokens * self.choices
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": self.counts.cache_read, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    def tool_calls(self) -> list[dict[str, Any]]:
        return [
            {
                "id": self.call.new_id("call_", number),
                "type": "function",
                "function": {"name": found.name, "arguments": found.json},
            }
            for number, found in enumerate(self.answer.calls)
        ]


def complete(call: Call) -> Reply:
    """Answer a chat, whole or as a stream."""
    prompt = _read(call)
    choices = number(call.document.get("n")) or 1
    if choices > _MAX_CHOICES:
        raise RefusedError(400, f"n must be at most {_MAX_CHOICES}.", param="n")
    turn = _Turn(call, answer_to(prompt), call.memory.count_automatic(prompt), choices)
    if call.is_stream:
        return stream_reply(_stream(turn))
    message: dict[str, Any] = {
        "role": "assistant",
        "content": turn.answer.text or None,
        "refusal": None,
        "annotations": [],
    }
    if turn.answer.calls:
        message["tool_calls"] = turn.tool_calls()
    finish = turn.finish_reason
    return json_reply(
        {
            "id": call.new_id("chatcmpl-"),
            "object": "chat.completion",
            "created": CREATED,
            "model": call.model,
            "choices": [
                {"index": index, "message": message, "logprobs": None, "finish_reason": finish}
                for index in range(choices)
            ],
            "usage": turn.usage(),
            "service_tier": "default",
            "system_fingerprint": None,
        }
    )


def _read(call: Call) -> Prompt:
    document = call.document
    messages = rows(document.get("messages"))
    if not messages:
        raise RefusedError(400, "messages must be a list with at least one message.", param="messages")
    offered = rows(document.get("tools"))
    functions = [member(tool, "function") for tool in offered]
    tools = [
        Tool(tool["name"], tool.get("parameters")) for tool in rows(functions) if isinstance(tool.get("name"), str)
    ]
    is_result = messages[-1].get("role") == "tool"
    form = document.get("response_format")
    wants_json = member(form, "type") in ("json_schema", "json_object")
    head = [Piece(encode(offered))] if offered else []
    return Prompt(
        model=call.model,
        pieces=(*head, *(Piece(encode(message)) for message in messages)),
        text=next((text_of(one.get("content")) for one in reversed(messages) if one.get("role") == "user"), ""),
        tool_result=all_text_of(messages[-1].get("content")) if is_result else None,
        tools=tuple(tools),
        choice=read_choice(document.get("tool_choice"), member(document.get("tool_choice"), "function", "name")),
        is_parallel=document.get("parallel_tool_calls") is not False,
        schema=member(form, "json_schema", "schema") or {"type": "object"} if wants_json else None,
        max_tokens=number(document.get("max_completion_tokens")) or number(document.get("max_tokens")),
        tokens=call.behaviour.tokens,
    )


def read_choice(value: JSON, name: JSON) -> str:
    """Return a tool_choice in OpenAI's spellings as a Prompt has it."""
    if isinstance(name, str):
        return f"={name}"
    word = value if isinstance(value, str) else member(value, "mode") or member(value, "allowed_tools", "mode")
    return {"required": "any", "none": "none"}.get(str(word), "auto")


def _stream(turn: _Turn) -> Iterator[bytes]:
    call = turn.call
    has_usage = member(call.document, "stream_options", "include_usage") is True
    frame: dict[str, Any] = {
        "id": call.new_id("chatcmpl-"),
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": call.model,
        "service_tier": "default",
        "system_fingerprint": None,
    }
    last = {"usage": None} if has_usage else {}

    def chunk(delta: dict[str, Any], index: int, finish: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return sse({**frame, "choices": [choice], **last})

    for index in range(turn.choices):
        for delta in _deltas(turn):
            yield chunk(delta, index)
        yield chunk({}, index, turn.finish_reason)
    if has_usage:
        yield sse({**frame, "choices": [], "usage": turn.usage()})
    yield _DONE


def _deltas(turn: _Turn) -> Iterator[dict[str, Any]]:
    answer = turn.answer
    yield {"role": "assistant", "content": None if answer.calls else "", "refusal": None}
    for word in answer.words():
        yield {"content": word}
    for index, call in enumerate(turn.tool_calls()):
        function = call["function"]
        yield {"tool_calls": [{"index": index, **call, "function": {"name": function["name"], "arguments": ""}}]}
        for part in split_json(function["arguments"]):
            yield {"tool_calls": [{"index": index, "function": {"arguments": part}}]}


# --- completions ------------------------------------------------------------------------------------------


def complete_prompt(call: Call) -> Reply:
    """Answer a plain prompt; of several prompts each gets a choice."""
    asked = call.document.get("prompt", "")
    texts = [text for text in asked if isinstance(text, str)] if isinstance(asked, list) else [str(asked)]
    prompts = [
        Prompt(
            model=call.model,
            pieces=(Piece(text.encode()),),
            text=text,
            max_tokens=number(call.document.get("max_tokens")),
            tokens=call.behaviour.tokens,
        )
        for text in texts or [""]
    ]
    answers = [answer_to(prompt) for prompt in prompts]
    sizes = sum(prompt.input_tokens for prompt in prompts), sum(answer.output_tokens for answer in answers)
    usage = {"prompt_tokens": sizes[0], "completion_tokens": sizes[1], "total_tokens": sum(sizes)}
    frame = {"id": call.new_id("cmpl-"), "object": "text_completion", "created": CREATED, "model": call.model}
    if call.is_stream:
        return stream_reply(_stream_prompt(call, frame, answers, usage))
    choices = [_choice(index, answer.text, _finish(answer)) for index, answer in enumerate(answers)]
    return json_reply({**frame, "choices": choices, "usage": usage})


def _stream_prompt(call: Call, frame: dict[str, Any], answers: list[Answer], usage: dict[str, int]) -> Iterator[bytes]:
    has_usage = member(call.document, "stream_options", "include_usage") is True
    last = {"usage": None} if has_usage else {}
    for index, answer in enumerate(answers):
        for word in answer.words():
            yield sse({**frame, "choices": [_choice(index, word, None)], **last})
        yield sse({**frame, "choices": [_choice(index, "", _finish(answer))], **last})
    if has_usage:
        yield sse({**frame, "choices": [], "usage": usage})
    yield _DONE


def _choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


def _finish(answer: Answer) -> str:
    return "length" if answer.is_cut else "stop"
