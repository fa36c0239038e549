"""Tools to test plugins with: a gateway in a test, scripted upstreams, strategies and checkers.

Names load on first use; only the strategies and checkers need hypothesis (``pip install penstock[testing]``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.testing.client import RawClient, Reply, ReplyReader, ReplyStream, request_bytes
    from penstock.testing.harness import Harness
    from penstock.testing.upstream import (
        LAST_CHUNK,
        STREAM_HEAD,
        Close,
        Expect,
        FakeUpstream,
        Pause,
        RecordedRequest,
        Reset,
        Stall,
        chunk,
        http_reply,
        stream_reply,
    )

_HOMES = {
    "client": ("RawClient", "Reply", "ReplyReader", "ReplyStream", "request_bytes"),
    "harness": ("Harness",),
    "upstream": (
        "LAST_CHUNK",
        "STREAM_HEAD",
        "Close",
        "Expect",
        "FakeUpstream",
        "Pause",
        "RecordedRequest",
        "Reset",
        "Stall",
        "chunk",
        "http_reply",
        "stream_reply",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LAST_CHUNK",
    "STREAM_HEAD",
    "Close",
    "Expect",
    "FakeUpstream",
    "Harness",
    "Pause",
    "RawClient",
    "RecordedRequest",
    "Reply",
    "ReplyReader",
    "ReplyStream",
    "Reset",
    "Stall",
    "chunk",
    "http_reply",
    "request_bytes",
    "stream_reply",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - what a module exports
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'penstock.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"penstock.testing.{home}"), name)
