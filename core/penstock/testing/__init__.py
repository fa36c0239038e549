"""Tools to test plugins with: a gateway in a test, scripted upstreams, strategies and checkers.

Names load on first use; only the strategies and checkers need hypothesis (``pip install penstock[testing]``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.testing.byte_exact import check_byte_exact
    from penstock.testing.client import RawClient, Reply, ReplyReader, ReplyStream, request_bytes
    from penstock.testing.harness import Harness
    from penstock.testing.plugin_checks import check_plugin
    from penstock.testing.provider_checks import check_provider
    from penstock.testing.samples import SAMPLES, Sample, sample_exchange
    from penstock.testing.strategies import (
        WireResponse,
        chat_bodies,
        chunked_bodies,
        http_responses,
        json_bodies,
        json_strings,
        json_values,
        segmentations,
        segmented,
        sse_streams,
    )
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
        Step,
        chunk,
        http_reply,
        stream_reply,
    )

_HOMES = {
    "byte_exact": ("check_byte_exact",),
    "client": (
        "RawClient",
        "Reply",
        "ReplyReader",
        "ReplyStream",
        "request_bytes",
    ),
    "harness": ("Harness",),
    "plugin_checks": ("check_plugin",),
    "provider_checks": ("check_provider",),
    "samples": (
        "SAMPLES",
        "Sample",
        "sample_exchange",
    ),
    "strategies": (
        "WireResponse",
        "chat_bodies",
        "chunked_bodies",
        "http_responses",
        "json_bodies",
        "json_strings",
        "json_values",
        "segmentations",
        "segmented",
        "sse_streams",
    ),
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
        "Step",
        "chunk",
        "http_reply",
        "stream_reply",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LAST_CHUNK",
    "SAMPLES",
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
    "Sample",
    "Stall",
    "Step",
    "WireResponse",
    "chat_bodies",
    "check_byte_exact",
    "check_plugin",
    "check_provider",
    "chunk",
    "chunked_bodies",
    "http_reply",
    "http_responses",
    "json_bodies",
    "json_strings",
    "json_values",
    "request_bytes",
    "sample_exchange",
    "segmentations",
    "segmented",
    "sse_streams",
    "stream_reply",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'penstock.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"penstock.testing.{home}"), name)
