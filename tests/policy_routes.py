"""Every route of the data plane, with requests that may offend any policy, and answers that may offend guardrails.

What a request is to offend with is put in wherever its form admits it, whether a provider would understand it there or
not: text where a model reads it, and in whatever is a JSON object tools, MCP servers, URLs and cache markers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs

from guarded_gateway import SHAPES, Shape, event
from penstock import Endpoint
from penstock.endpoints import find_endpoint
from penstock.testing import RecordedRequest, http_reply, stream_reply
from penstock.testing.upstream import Step

Offence = Literal["text", "tools", "mcp", "urls", "marker"]
Body = Callable[[str], dict[str, Any]]
PROMPT = "Greetings"
WORD = "bluebird"
"""What guardrails look for."""
TEXT_IN = f"say {WORD} twice"
TEXT_OUT = f"it is {WORD}, no other"
HARMLESS = "it is fine"
MODELS = ("gpt-4o-mini", "claude-x", "gemini-x")
_TYPED = {"gemini": b'{"functionDeclarations": [{"name": "shell_exec"}]}', "anthropic": b'{"name": "shell_exec"}'}
_PLACED: dict[Offence, bytes] = {
    "mcp": b'"mcp_servers": [{"type": "url", "name": "evil", "url": "https://mcp.example"}], ',
    "urls": b'"metadata": {"seen": "at https://evil.example/a"}, ',
    "marker": b'"cache_control": {"type": "ephemeral"}, ',
}
OFFENDING: dict[Offence, bytes] = {
    "text": WORD.encode(), "tools": b"shell_exec", "mcp": b"evil", "urls": b"evil.example", "marker": b"cache_control"
}  # fmt: skip
"""What of an offence is in the bytes of a request that has it."""
_CHAT, _COMPLETIONS, _RESPONSES, _MESSAGES, _GEMINI = SHAPES
_USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "input_tokens": 3, "output_tokens": 2}
_FORM_TYPE = b"multipart/form-data; boundary=seam"


def _named(model: str, **members: Any) -> Body:
    """Return a body with the prompt as the member that has no value yet."""
    return lambda text: {"model": model, **{name: text if value is None else value for name, value in members.items()}}


def _of(shape: Shape, model: str | None, *, stream: bool = False) -> Body:
    def made(text: str) -> dict[str, Any]:
        body = shape.body(text, stream=stream)
        return body if model is None else {**body, "model": model}

    return made


@attrs.frozen
class Route:
    """One way to ask one endpoint, and what is answered."""

    name: str
    path: str
    body: Body | None
    says: Shape | Literal["transcript", "picture"] | None
    """How the answer holds text a model wrote; None where it holds none."""
    answer: bytes | Sequence[bytes] = b"{}"
    """A whole answer without text, or the events of a stream."""
    method: str = "POST"
    is_form: bool = False
    is_stream: bool = False
    """Whether the answer is an event stream."""
    is_gathered: bool = False
    """Whether a stream is answered as one JSON array."""

    @property
    def endpoint(self) -> Endpoint:
        found = find_endpoint(self.path.partition("?")[0].encode())
        assert found is not None
        return found

    @property
    def fields(self) -> list[tuple[bytes, bytes]]:
        if self.body is None:
            return []
        return [(b"Content-Type", _FORM_TYPE if self.is_form else b"application/json")]

    def request(self, offence: Offence | None = None) -> bytes:
        """Return the body, with an offence where it has a place for that."""
        if self.body is None:
            return b""
        members = self.body(TEXT_IN if offence == "text" else PROMPT)
        if self.is_form:
            return _form(members)
        body = json.dumps(members).encode()
        placed = b""
        if offence == "tools":
            tool = b'{"type": "function", "name": "shell_exec", "function": {"name": "shell_exec", "parameters": {}}}'
            placed = b'"tools": [%b], ' % _TYPED.get(self.endpoint.family, tool)
        elif offence is not None and offence != "text":
            placed = _PLACED[offence]
        if offence == "marker" and self.endpoint.family == "gemini":
            placed += b'"cachedContent": "cachedContents/a", '
        return b"{" + placed + body[1:]

    def reply(self, text: str) -> list[Step]:
        """Return the steps of an answer that says this, where it says anything."""
        if self.is_stream:
            return stream_reply(*self.events(text))
        return [http_reply(self.whole(text))]

    def whole(self, text: str) -> bytes:
        if self.says is None:
            assert isinstance(self.answer, bytes)
            return self.answer
        if self.says == "transcript":
            return json.dumps({"text": text}).encode()
        if self.says == "picture":
            return json.dumps({"created": 1, "data": [{"b64_json": "aGk=", "revised_prompt": text}]}).encode()
        found = json.loads(self.says.whole(text))
        if self.name == "response_items":
            found = {"object": "list", "data": found["output"]}
        elif self.is_gathered:
            found = [found]
        elif self.says is not _GEMINI:
            found |= {"usage": _USAGE}
        return json.dumps(found).encode()

    def events(self, text: str) -> Sequence[bytes]:
        if self.says is None:
            assert not isinstance(self.answer, bytes)
            return self.answer
        pieces = [text[start : start + 5] for start in range(0, len(text), 5)]
        if self.says == "transcript":
            middle = [event({"type": "transcript.text.delta", "delta": piece}) for piece in pieces]
            return [*middle, event({"type": "transcript.text.done", "text": text})]
        assert isinstance(self.says, Shape)
        return self.says.events(pieces)

    def __str__(self) -> str:
        return self.name


def _form(fields: Mapping[str, Any]) -> bytes:
    parts = [f'--seam\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{fields[name]}\r\n' for name in fields]
    file = b'--seam\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n\r\n\x00\xff\r\n--seam--\r\n'
    return "".join(parts).encode() + file


_GPT, _CLAUDE, _GEMINI_X = MODELS
_PICTURES = (event({"type": "image_generation.completed", "b64_json": "aGk="}),)
_SOUNDS = (event({"type": "speech.audio.delta", "audio": "aGk="}), event({"type": "speech.audio.done"}))
_NUMBERS = b'{"object":"list","data":[{"index":0,"embedding":[0.25]}],"usage":{"prompt_tokens":3,"total_tokens":3}}'
_CACHED = b'{"name":"cachedContents/a"}'
_STORED = "/v1/responses/resp_1"
_GEMINI_PATH = "/v1beta/models/gemini-x:"
_OF_GEMINI = _of(_GEMINI, None)


def _cached(text: str) -> dict[str, Any]:
    return {"model": "models/gemini-x", **_OF_GEMINI(text)}


ROUTES = (
    Route("chat", "/v1/chat/completions", _of(_CHAT, _GPT), _CHAT),
    Route("chat_stream", "/v1/chat/completions", _of(_CHAT, _GPT, stream=True), _CHAT, is_stream=True),
    Route("responses", "/v1/responses", _of(_RESPONSES, _GPT), _RESPONSES),
    Route("responses_stream", "/v1/responses", _of(_RESPONSES, _GPT, stream=True), _RESPONSES, is_stream=True),
    Route("messages", "/v1/messages?beta=true", _of(_MESSAGES, _CLAUDE), _MESSAGES),
    Route("messages_stream", "/v1/messages", _of(_MESSAGES, _CLAUDE, stream=True), _MESSAGES, is_stream=True),
    Route("count_tokens", "/v1/messages/count_tokens", _of(_MESSAGES, _CLAUDE), None, b'{"input_tokens":3}'),
    Route("completions", "/v1/completions", _of(_COMPLETIONS, _GPT), _COMPLETIONS),
    Route("completions_stream", "/v1/completions", _of(_COMPLETIONS, _GPT, stream=True), _COMPLETIONS, is_stream=True),
    Route("embeddings", "/v1/embeddings", _named(_GPT, input=None), None, _NUMBERS),
    Route("moderations", "/v1/moderations", _named(_GPT, input=None), None, b'{"results":[{"flagged":false}]}'),
    Route("images", "/v1/images/generations", _named(_GPT, prompt=None), "picture"),
    Route(
        "images_stream", "/v1/images/generations", _named(_GPT, prompt=None, stream=True), None, _PICTURES,
        is_stream=True,
    ),
    Route("edits", "/v1/images/edits", _named(_GPT, prompt=None), "picture", is_form=True),
    Route(
        "edits_stream", "/v1/images/edits", _named(_GPT, prompt=None, stream="true"), None, _PICTURES,
        is_form=True, is_stream=True,
    ),
    Route("speech", "/v1/audio/speech", _named(_GPT, input=None), None, b"ID3\x00\xff"),
    Route(
        "speech_stream", "/v1/audio/speech", _named(_GPT, input=None, stream_format="sse"), None, _SOUNDS,
        is_stream=True,
    ),
    Route("transcriptions", "/v1/audio/transcriptions", _named(_GPT, prompt=None), "transcript", is_form=True),
    Route(
        "transcriptions_stream", "/v1/audio/transcriptions", _named(_GPT, prompt=None, stream="true"), "transcript",
        is_form=True, is_stream=True,
    ),
    Route("models", "/v1/models", None, None, b'{"data":[{"id":"gpt-4o-mini","object":"model"}]}', method="GET"),
    Route("model", "/v1/models/gpt-4o-mini", None, None, b'{"data":[{"id":"gpt-4o-mini"}]}', method="GET"),
    Route("response", _STORED, None, _RESPONSES, method="GET"),
    Route("response_stream", _STORED + "?stream=true", None, _RESPONSES, method="GET", is_stream=True),
    Route("response_delete", _STORED, None, None, b'{"id":"resp_1","deleted":true}', method="DELETE"),
    Route("response_cancel", _STORED + "/cancel", None, _RESPONSES),
    Route("response_items", _STORED + "/input_items", None, _RESPONSES, method="GET"),
    Route("gemini", _GEMINI_PATH + "generateContent", _OF_GEMINI, _GEMINI),
    Route("gemini_stream", _GEMINI_PATH + "streamGenerateContent?alt=sse", _OF_GEMINI, _GEMINI, is_stream=True),
    Route("gemini_array", _GEMINI_PATH + "streamGenerateContent", _OF_GEMINI, _GEMINI, is_gathered=True),
    Route("gemini_count", _GEMINI_PATH + "countTokens", _OF_GEMINI, None, b'{"totalTokens":3}'),
    Route("gemini_embed", _GEMINI_PATH + "embedContent", _OF_GEMINI, None, b'{"embedding":{"values":[0.25]}}'),
    Route("gemini_cache", "/v1beta/cachedContents", _cached, None, _CACHED),
    Route("gemini_patch", "/v1beta/cachedContents/a", _cached, None, _CACHED, method="PATCH"),
    Route("gemini_put", "/v1beta/cachedContents/a", _cached, None, _CACHED, method="PUT"),
    Route("gemini_get", "/v1beta/cachedContents/a", None, None, _CACHED, method="GET"),
    Route("gemini_delete", "/v1beta/cachedContents/a", None, None, method="DELETE"),
)  # fmt: skip
"""Each endpoint and method; streaming too where it can."""
BY_NAME = {route.name: route for route in ROUTES}


def answer(request: RecordedRequest) -> Sequence[Step]:
    """Answer as the route that is asked, in whatever dialect; a header says whether that offends, or is an error."""
    if b"x-fail" in request.headers:
        return [http_reply(b'{"type":"error","error":{"type":"invalid_request_error","message":"no"}}', 400)]
    target = request.target.decode()
    path, _, query = target.replace("/v1/v1beta", "/v1beta").partition("?")
    said = TEXT_OUT if b"x-offend" in request.headers else HARMLESS
    body = request.body.replace(b" ", b"")
    is_stream = (
        b'"stream":true' in body or b'name="stream"' in request.body or b'"stream_format":"sse"' in body
    ) or query in ("alt=sse", "stream=true")
    method = request.method.decode()
    found = [route for route in ROUTES if (route.method, route.path.partition("?")[0]) == (method, path)]
    return next(route for route in found if route.is_stream == is_stream).reply(said)
