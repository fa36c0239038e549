"""What a prompt says, whatever its dialect, and the answer that follows from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from penstock_plugins.providers.mock.replies import RefusedError, encode
from penstock_plugins.providers.mock.schemas import JSON, value_for

BYTES_PER_TOKEN = 4
_MAX_ECHO = 400
_MAX_CALLS = 8
_JSON_PART = 12
_FILLER = "water runs through the gate and down the pipe "
_REMINDER = re.compile(r"<system-reminder>.*?</system-reminder>", re.DOTALL)
_ASKS_FOR_A_TOOL = re.compile(r"\buse (?:the|a) tool\b", re.IGNORECASE)


@attrs.frozen
class Tool:
    """A function the client offers."""

    name: str
    schema: JSON


@attrs.frozen
class Piece:
    """A part of the prompt that a cached prefix may end at; ``mark`` is its cache_control's ttl."""

    data: bytes
    mark: str | None = None

    @property
    def tokens(self) -> int:
        return count_bytes(len(self.data))


@attrs.frozen(kw_only=True)
class Prompt:
    """Hold what matters of a request for an answer in text."""

    model: str
    pieces: tuple[Piece, ...]
    text: str
    """What the user said last."""
    tool_result: str | None = None
    """What tools answered, where the conversation ends with that."""
    tools: tuple[Tool, ...] = ()
    choice: str = "auto"
    """``auto``, ``none``, ``any``, or ``=`` and the name of the tool to call."""
    is_parallel: bool = True
    schema: JSON = None
    """What a structured answer must fit."""
    max_tokens: int | None = None
    tokens: int | None = None
    """How long the answer shall be."""

    @property
    def input_tokens(self) -> int:
        return sum([piece.tokens for piece in self.pieces])


@attrs.frozen
class ToolCall:
    """Call a tool."""

    name: str
    arguments: Any

    @property
    def json(self) -> str:
        return encode(self.arguments).decode()


@attrs.frozen
class Answer:
    """Say something, or call tools."""

    text: str
    calls: tuple[ToolCall, ...] = ()
    is_cut: bool = False
    """The answer was longer than the request allows."""

    @property
    def output_tokens(self) -> int:
        size = len(self.text.encode()) + sum([len(call.name) + len(call.json) for call in self.calls])
        return max(1, count_bytes(size))

    def words(self) -> Iterator[str]:
        """Yield the text in the parts a stream sends it in."""
        return split_text(self.text)


def count_bytes(size: int) -> int:
    """Return how many tokens so many bytes make."""
    return -(-size // BYTES_PER_TOKEN)


def split_text(text: str) -> Iterator[str]:
    """Yield a text word by word, blanks included, so that the parts joined are the text."""
    for found in re.finditer(r"\s*\S+|\s+$", text):
        yield found[0]


def answer_to(prompt: Prompt) -> Answer:
    """Answer with tool calls if the prompt asks for them, with text that fits the schema, or an echo."""
    calls = tuple(ToolCall(tool.name, _object(value_for(tool.schema))) for tool in _tools_asked_for(prompt))
    if calls:
        return Answer("", calls)
    text = _echo(prompt) if prompt.schema is None else encode(value_for(prompt.schema)).decode()
    if prompt.tokens is not None and prompt.schema is None:
        text = _stretched(text, prompt.tokens)
    if prompt.max_tokens is not None and count_bytes(len(text.encode())) > prompt.max_tokens:
        return Answer(_shortened(text, prompt.max_tokens), is_cut=True)
    return Answer(text)


def _tools_asked_for(prompt: Prompt) -> list[Tool]:
    if prompt.tool_result is not None or prompt.choice == "none":
        return []
    if prompt.choice.startswith("="):
        wanted = [tool for tool in prompt.tools if tool.name == prompt.choice[1:]]
        if not wanted:
            raise RefusedError(400, "tool_choice names a tool that tools does not hold.", param="tool_choice")
        return wanted[:1]
    found = [tool for tool in prompt.tools if _is_named(tool.name, prompt.text)]
    if not found and (prompt.choice == "any" or _ASKS_FOR_A_TOOL.search(prompt.text)):
        found = list(prompt.tools[:1])
    return found[:_MAX_CALLS] if prompt.is_parallel else found[:1]


def _is_named(name: str, text: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


def _object(value: JSON) -> JSON:
    return value if isinstance(value, dict) else {}


def _echo(prompt: Prompt) -> str:
    if prompt.tool_result is not None:
        return f"The tool answered: {_quoted(prompt.tool_result)} That is all {prompt.model} needed to know."
    if not prompt.text:
        return f"Hello from {prompt.model}. You said nothing, and the mock provider heard it."
    return f"Hello from {prompt.model}. You said: {_quoted(prompt.text)} The mock provider heard every word."


def _quoted(text: str) -> str:
    text = " ".join(text.split())
    return f'"{text if len(text) <= _MAX_ECHO else text[:_MAX_ECHO] + "..."}".'


def _stretched(text: str, tokens: int) -> str:
    size = tokens * BYTES_PER_TOKEN
    missing = size - len(text.encode())
    if missing <= 0:
        return _shortened(text, tokens)
    return text + (" " + _FILLER * (missing // len(_FILLER) + 1))[:missing]


def _shortened(text: str, tokens: int) -> str:
    return text.encode()[: tokens * BYTES_PER_TOKEN].decode(errors="ignore")


def split_json(text: str) -> Iterator[str]:
    """Yield JSON in the parts a stream sends it in."""
    for start in range(0, len(text), _JSON_PART):
        yield text[start : start + _JSON_PART]


# --- reading requests -------------------------------------------------------------------------------------


def without_reminders(text: str) -> str:
    """Return a text without what coding assistants put around the user's words."""
    return _REMINDER.sub("", text).strip() if "<system-reminder>" in text else text


def text_of(content: JSON) -> str:
    """Return the last text of a message's content: a string, or parts with a ``text``."""
    if isinstance(content, str):
        return without_reminders(content)
    found = [part["text"] for part in rows(content) if isinstance(part.get("text"), str)]
    texts = [text for text in map(without_reminders, found) if text]
    return texts[-1] if texts else ""


def all_text_of(content: JSON) -> str:
    """Return all texts of a tool's result."""
    if isinstance(content, str):
        return content
    found = [part["text"] for part in rows(content) if isinstance(part.get("text"), str)]
    return " ".join(found) or encode(content).decode()


def rows(value: JSON) -> list[dict[str, Any]]:
    """Return the objects of a list; nothing for what is no list."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def member(value: JSON, *names: str) -> JSON:
    """Return a member of nested objects, None where one is missing."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def number(value: JSON) -> int | None:
    """Return a bound on output tokens; None where there is none."""
    return value if type(value) is int and value > 0 else None
