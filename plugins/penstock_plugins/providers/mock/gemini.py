"""Gemini's generateContent, streamGenerateContent, countTokens and embedContent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import attrs
import msgspec

from penstock import Usage
from penstock_plugins.providers.mock.calls import Call
from penstock_plugins.providers.mock.conversation import (
    Answer,
    Piece,
    Prompt,
    Tool,
    answer_to,
    member,
    number,
    rows,
    text_of,
)
from penstock_plugins.providers.mock.memory import Counts
from penstock_plugins.providers.mock.models import NAMES
from penstock_plugins.providers.mock.others import vector
from penstock_plugins.providers.mock.replies import RefusedError, Reply, encode, json_reply, stream_reply
from penstock_plugins.providers.mock.schemas import JSON

if TYPE_CHECKING:
    from penstock import BodyWindow

_DIMENSIONS = 768
_MODEL_PATH = re.compile(r"beta/models/(.+):([A-Za-z]+)").fullmatch
_USAGE = re.compile(rb'"usageMetadata":(\{[^{}]*\})')
_METHODS = "generateContent, streamGenerateContent, countTokens, embedContent, batchEmbedContents"


def generate(call: Call) -> Reply:
    """Answer a call by the method its path ends with; list models without one."""
    path = unquote(call.path)
    if path == "beta/models" and call.method == b"GET":
        return json_reply({"models": [{"name": f"models/{name}", "displayName": name} for name in NAMES]})
    found = _MODEL_PATH(path)
    method = found[2] if found is not None and call.method == b"POST" else None
    if method == "countTokens":
        nested = call.document.get("generateContentRequest")
        inner = attrs.evolve(call, document=nested) if isinstance(nested, dict) else call
        return json_reply({"totalTokens": _read(inner).input_tokens})
    if method == "embedContent":
        return json_reply({"embedding": {"values": _embed(call.document)}})
    if method == "batchEmbedContents":
        asked = rows(call.document.get("requests"))
        return json_reply({"embeddings": [{"values": _embed(one)} for one in asked]})
    if method not in ("generateContent", "streamGenerateContent"):
        raise RefusedError(404, f"The mock knows the methods {_METHODS}.")
    return _answer(call, is_stream=method == "streamGenerateContent")


def _answer(call: Call, *, is_stream: bool) -> Reply:
    prompt = _read(call)
    answer = answer_to(prompt)
    usage = _usage(call.memory.count_automatic(prompt), answer)
    if not is_stream:
        return json_reply(_document(call, _parts(answer), _finish(answer), usage))
    documents = _documents(call, answer, usage)
    if call.query.get("alt") == "sse":
        return stream_reply(b"data: %b\r\n\r\n" % encode(document) for document in documents)
    return json_reply(list(documents))


def _read(call: Call) -> Prompt:
    document = call.document
    contents = rows(document.get("contents"))
    if not contents:
        raise RefusedError(400, "contents is not specified")
    offered = rows(document.get("tools"))
    functions = [one for tool in offered for one in rows(tool.get("functionDeclarations"))]
    config = document.get("generationConfig")
    parts = rows(contents[-1].get("parts"))
    results = [part["functionResponse"] for part in parts if "functionResponse" in part]
    users = [one.get("parts") for one in contents if one.get("role", "user") == "user"]
    head = [document[name] for name in ("tools", "systemInstruction", "system_instruction") if document.get(name)]
    wants_json = member(config, "responseMimeType") == "application/json"
    schema = member(config, "responseSchema") or member(config, "responseJsonSchema") or {"type": "object"}
    return Prompt(
        model=call.model,
        pieces=tuple(Piece(encode(part)) for part in (*head, *contents)),
        text=text_of(users[-1]) if users else "",
        tool_result=encode(member(results[-1], "response")).decode() if results else None,
        tools=tuple(
            Tool(one["name"], one.get("parameters") or one.get("parametersJsonSchema"))
            for one in functions
            if isinstance(one.get("name"), str)
        ),
        choice=_choice(member(document.get("toolConfig"), "functionCallingConfig")),
        schema=schema if wants_json else None,
        max_tokens=number(member(config, "maxOutputTokens")),
        tokens=call.behaviour.tokens,
    )


def _choice(config: JSON) -> str:
    mode = str(member(config, "mode") or "AUTO").upper()
    names = member(config, "allowedFunctionNames")
    if mode == "ANY" and isinstance(names, list) and names:
        return f"={names[0]}"
    return {"ANY": "any", "NONE": "none"}.get(mode, "auto")


def _parts(answer: Answer) -> list[dict[str, Any]]:
    if answer.calls:
        return [{"functionCall": {"name": found.name, "args": found.arguments}} for found in answer.calls]
    return [{"text": answer.text}]


def _finish(answer: Answer) -> str:
    return "MAX_TOKENS" if answer.is_cut else "STOP"


def _usage(counts: Counts, answer: Answer) -> dict[str, Any]:
    output = answer.output_tokens
    cached = {"cachedContentTokenCount": counts.cache_read} if counts.cache_read else {}
    total = counts.all_input + output
    return {
        "promptTokenCount": counts.all_input,
        "candidatesTokenCount": output,
        "totalTokenCount": total,
        **cached,
    }


def _document(call: Call, parts: list[dict[str, Any]], finish: str | None, usage: dict[str, Any]) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"parts": parts, "role": "model"}, "index": 0}
    if finish is not None:
        candidate["finishReason"] = finish
    identity = {"modelVersion": call.model, "responseId": call.new_id("")}
    return {"candidates": [candidate], "usageMetadata": usage, **identity}


def _documents(call: Call, answer: Answer, usage: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the answer in parts; counts of what is still to come grow with it, the last ones are whole."""
    words = [] if answer.calls else list(answer.words())
    begun = {**usage, "candidatesTokenCount": 0, "totalTokenCount": usage["promptTokenCount"]}
    for word in words[:-1]:
        yield _document(call, [{"text": word}], None, begun)
    parts = [{"text": words[-1]}] if words else _parts(answer)
    yield _document(call, parts, _finish(answer), usage)


def _embed(document: dict[str, Any]) -> list[float]:
    size = number(document.get("outputDimensionality")) or _DIMENSIONS
    return vector(text_of(member(document, "content", "parts")), size)


def read_usage(window: BodyWindow) -> Usage | None:
    """Read the last usageMetadata of a body; None when it holds none."""
    found = _USAGE.findall(window.text)
    if not found:
        return None
    counts = msgspec.json.decode(found[-1], type=dict[str, int])
    cached = counts.get("cachedContentTokenCount", 0)
    return Usage(counts["promptTokenCount"] - cached, cached, output=counts["candidatesTokenCount"])
