"""What it takes to ask an Anthropic provider: alternating turns, sources of images, thinking by model. Sans-IO."""

from __future__ import annotations

import base64
import re
from typing import Any, Final

import attrs
import msgspec

from penstock import RequestError
from penstock_plugins.dialects.shared import read_data_url, refuse

DEFAULT_MAX_TOKENS: Final = 8192
"""What ``max_tokens``, which Anthropic requires, is where a client sets no bound; thinking is added to it."""
BUDGETS: Final = {"minimal": 1024, "low": 2048, "medium": 8192, "high": 16384, "xhigh": 32768, "max": 32768}
"""Tokens of thinking for each reasoning effort, for models that are given a budget."""
_EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "max"}
_LEAST_BUDGET = 1024
IMAGE_TYPES: Final = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})
Block = dict[str, Any]


class _Typed(msgspec.Struct):
    type: str = ""


_old_name = re.compile(r"claude-(\d)(?:[-.](\d))?-(?:opus|sonnet|haiku)").search
_new_name = re.compile(r"claude-[a-z]+-(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)").search


def claude_version(model: str | None) -> tuple[int, int] | None:
    """Return the version in a model's name, ``(4, 5)`` for claude-haiku-4-5-20251001; None where there is none."""
    found = _old_name(model or "") or _new_name(model or "")
    return None if found is None else (int(found[1]), int(found[2] or 0))


def thinks_adaptively(model: str | None) -> bool:
    """Tell whether a model chooses itself how much to think: Claude 4.6 and later."""
    version = claude_version(model)
    return version is not None and version >= (4, 6)


def takes_sampling(model: str | None) -> bool:
    """Tell whether a model takes temperature and top_p: Claude up to 4.6, and models of others."""
    version = claude_version(model)
    return version is None or version < (4, 7)


@attrs.frozen
class Thinking:
    """Say what goes into a request for a reasoning effort."""

    members: dict[str, Any] = attrs.field(factory=dict)
    """``thinking``, if any."""
    effort: str | None = None
    """``output_config.effort``, if any."""
    max_tokens: int = DEFAULT_MAX_TOKENS
    is_on: bool = False
    is_dropped: bool = False
    """Whether the effort cannot be met."""


def thinking_for(
    effort: str | None, model: str | None, max_tokens: int | None, default: int, param: str = "reasoning_effort"
) -> Thinking:
    """Return how a model is made to think so hard. ``effort``: OpenAI's words, None leaves the model's default.

    A budget takes at most three quarters of a client's ``max_tokens``; where that leaves less than Anthropic's least
    of 1024, and for models that cannot think, the effort is dropped. Raises RequestError for an effort that is none.
    """
    bound = default if max_tokens is None else max_tokens
    if effort is None:
        return Thinking(max_tokens=bound)
    if effort == "none":
        return Thinking({"thinking": {"type": "disabled"}}, max_tokens=bound)
    if effort not in BUDGETS:
        known = ", ".join(("none", *BUDGETS))
        raise RequestError("bad_request", f"{param} is one of {known}.", param=param)
    budget, version = BUDGETS[effort], claude_version(model)
    if version is not None and version < (3, 7):
        return Thinking(max_tokens=bound, is_dropped=True)
    if max_tokens is None:
        bound += budget
    if thinks_adaptively(model):
        spelled = "high" if effort == "xhigh" and version == (4, 6) else _EFFORTS[effort]
        return Thinking({"thinking": {"type": "adaptive"}}, spelled, bound, is_on=True)
    if max_tokens is not None:
        budget = min(budget, max_tokens * 3 // 4)
    if budget < _LEAST_BUDGET:
        return Thinking(max_tokens=bound, is_dropped=True)
    return Thinking({"thinking": {"type": "enabled", "budget_tokens": budget}}, None, bound, is_on=True)


class Turns:
    """Collect blocks into turns that alternate: what one role says in a row is one turn."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def add(self, role: str, blocks: list[Any]) -> None:
        """Append blocks of ``user`` or ``assistant``; none add no turn. Results of tools come first in a turn."""
        if not blocks:
            return
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": list(blocks)})
            return
        content = self.messages[-1]["content"]
        if isinstance(blocks[0], dict) and blocks[0].get("type") == "tool_result":
            ahead = (index for index, block in enumerate(content) if block.get("type") != "tool_result")
            at = next(ahead, len(content))
            content[at:at] = blocks
        else:
            content += blocks

    @property
    def lacks_thinking(self) -> bool:
        """Tell whether tools have answered a turn that does not begin with thinking: a budget is then refused."""
        if len(self.messages) < 2 or _kind_of(self.messages[-1]["content"][0]) != "tool_result":
            return False
        return _kind_of(self.messages[-2]["content"][0]) not in ("thinking", "redacted_thinking")


def _kind_of(block: Any) -> Any:
    """Return the type of a block, a dict or raw thinking."""
    return block.get("type") if isinstance(block, dict) else msgspec.json.decode(block, type=_Typed).type


def image_block(url: str, param: str) -> Block:
    """Return the block of an image: base64 for a ``data:`` URL, else its http(s) URL. Raises RequestError."""
    return {"type": "image", "source": _source(url, param, IMAGE_TYPES)}


def document_block(url: str, param: str, title: str | None = None) -> Block:
    """Return the block of a PDF or a plain text given by URL. Raises RequestError."""
    source = _source(url, param, frozenset({"application/pdf", "text/plain"}))
    return {"type": "document", "source": source, **({"title": title} if title else {})}


def _source(url: str, param: str, media_types: frozenset[str]) -> Block:
    try:
        inline = read_data_url(url)
    except ValueError as error:
        raise RequestError("bad_request", f"{param}: {error}.", param=param) from None
    if inline is None:
        if url[:8].lower().startswith(("http://", "https://")):
            return {"type": "url", "url": url}
        raise RequestError("bad_request", f"{param} is neither a data: nor an http(s) URL.", param=param)
    media_type = "image/jpeg" if inline.media_type == "image/jpg" else inline.media_type
    if media_type not in media_types:
        known = ", ".join(sorted(media_types))
        raise refuse(param, f"{param}: Anthropic takes {known}, not {media_type[:100]}.")
    if media_type == "text/plain":
        text = _plain_text(inline.data, param)
        return {"type": "text", "media_type": media_type, "data": text}
    return {"type": "base64", "media_type": media_type, "data": inline.data}


def _plain_text(data: str, param: str) -> str:
    try:
        return base64.b64decode(data).decode()
    except ValueError:
        raise RequestError("bad_request", f"{param} is no UTF-8 text in base64.", param=param) from None
