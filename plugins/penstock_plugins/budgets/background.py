"""Whether a provider works on after its answer: a response in the background, asked for or given; pure.

What it is charged depends on this, so a request that providers may read in more than one way is read in the way that
costs.
"""

from __future__ import annotations

import re

import msgspec

from penstock import BodyWindow
from penstock.splice import children, key_of, root

_UNSET = msgspec.Raw(b"")
_UNFINISHED = frozenset({"queued", "in_progress"})
_OFF = frozenset({b"false", b"null"})
_may_ask = re.compile(rb'"background"|\\u00', re.IGNORECASE).search
_says_background = re.compile(rb'"background"[ \t\r\n]*:[ \t\r\n]*true').search
_says_unfinished = re.compile(rb'"status"[ \t\r\n]*:[ \t\r\n]*"(?:queued|in_progress)"').search
_says_no_usage = re.compile(rb'"usage"[ \t\r\n]*:[ \t\r\n]*null').search


class _Answer(msgspec.Struct):
    """The members of a response object that say whether it is done."""

    status: str | None = None
    usage: msgspec.Raw = _UNSET


_read_answer = msgspec.json.Decoder(_Answer).decode


def is_asked(body: bytes) -> bool:
    """Tell whether a request's JSON may ask for the background, in any spelling of the name, even if only once."""
    if _may_ask(body) is None:
        return False
    try:
        return any(
            key_of(body, child).lower() == "background" and body[child.value.start : child.value.end] not in _OFF
            for child in children(body, root(body))
        )
    except ValueError:
        return True  # odd enough that the provider is likely to refuse it, and may not


def is_given(window: BodyWindow, *, is_stream: bool) -> bool:
    """Tell whether an answer says that the work goes on; ``window`` holds what came of it.

    A stream's first events hold the response as it was when it began, so one says it by being in the background.
    """
    text = window.text
    if is_stream:
        return _says_background(text) is not None
    if window.is_whole:
        try:
            answer = _read_answer(text)
        except (ValueError, RecursionError):
            pass  # the client left in the middle of it, or a member is odd
        else:
            return answer.status in _UNFINISHED and bytes(answer.usage) in (b"", b"null")
    return _says_unfinished(text) is not None and _says_no_usage(text) is not None
