"""The Anthropic dialect: usage of messages, whole and streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.dialects.anthropic import read_usage
from penstock.dialects.estimate import estimate_usage
from penstock.metering import HEAD_BYTES, TAIL_BYTES, BodyWindow
from penstock.models import Usage

RECORDINGS = Path(__file__).parents[2] / "shared" / "recordings"


def whole(body: bytes) -> BodyWindow:
    return BodyWindow(body, b"", len(body), is_whole=True)


def cut(body: bytes) -> BodyWindow:
    return BodyWindow(
        body[:HEAD_BYTES],
        body[HEAD_BYTES:][-TAIL_BYTES:],
        len(body),
        is_whole=len(body) <= HEAD_BYTES + TAIL_BYTES,
    )


def stream(*payloads: dict[str, Any]) -> bytes:
    return b"".join(f"event: {payload['type']}\ndata: {json.dumps(payload)}   \n\n".encode() for payload in payloads)


def start(**usage: object) -> dict[str, Any]:
    return {"type": "message_start", "message": {"content": [], "usage": usage}}


def delta(**usage: object) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}


def read(*payloads: dict[str, Any]) -> Usage | None:
    return read_usage(whole(stream(*payloads)), is_stream=True)


@pytest.mark.parametrize("kind", ["streaming", "json"])
def test_recorded_replies_are_metered_as_on_the_wire(kind: str) -> None:
    if not RECORDINGS.is_dir():
        pytest.skip(f"no recordings at {RECORDINGS}: real replies are NOT checked")
    for meta_file in sorted((RECORDINGS / kind / "anthropic").glob("*.meta.json")):
        meta = json.loads(meta_file.read_bytes())
        body = meta_file.with_name(meta["file"]).read_bytes()
        counted: dict[str, Any] = {}
        for found in meta["usage_on_wire"]:
            counted.update({name: value for name, value in found["usage"].items() if value is not None})
        rows = [counted, *[row for row in counted.get("iterations", ()) if row["type"] == "compaction"]]
        for window in (whole(body), cut(body)):
            usage = read_usage(window, is_stream=kind == "streaming")
            if not counted:
                assert usage is None, meta_file
                continue
            assert usage is not None, meta_file
            written = usage.cache_write_5m + usage.cache_write_1h
            assert (usage.input, usage.cache_read, written, usage.output) == (
                sum(row["input_tokens"] for row in rows),
                sum(row.get("cache_read_input_tokens", 0) for row in rows),
                sum(row.get("cache_creation_input_tokens", 0) for row in rows),
                sum(row["output_tokens"] for row in rows),
            ), meta_file


def test_json_message_counts_are_already_disjoint() -> None:
    body = (
        b'{"type":"message","content":[],"usage":{"input_tokens":4,"cache_read_input_tokens":9,'
        b'"cache_creation_input_tokens":7,"cache_creation":{"ephemeral_5m_input_tokens":2,'
        b'"ephemeral_1h_input_tokens":5},"output_tokens":11,"output_tokens_details":{"thinking_tokens":3}}}'
    )
    expected = Usage(4, 9, 2, 5, 11, 3)
    assert read_usage(whole(body), is_stream=False) == expected
    assert read_usage(BodyWindow(body[:20], body[25:], 10**6, is_whole=False), is_stream=False) == expected


def test_cache_writes_without_a_split_are_of_five_minutes() -> None:
    assert read(start(input_tokens=1, cache_creation_input_tokens=7)) == Usage(1, cache_write_5m=7)


def test_message_delta_overrides_what_it_names_and_nothing_else() -> None:
    usage = read(
        start(input_tokens=5, cache_read_input_tokens=6, output_tokens=1),
        delta(output_tokens=20),
        delta(output_tokens=30, input_tokens=None, cache_read_input_tokens=8),
    )
    assert usage == Usage(5, 8, output=30)


def test_later_total_of_cache_writes_keeps_the_hour_part() -> None:
    split = {"ephemeral_5m_input_tokens": 2, "ephemeral_1h_input_tokens": 5}
    opened = start(input_tokens=1, cache_creation_input_tokens=7, cache_creation=split)
    assert read(opened, delta(cache_creation_input_tokens=9)) == Usage(1, 0, 4, 5)
    assert read(opened, delta(cache_creation_input_tokens=3)) == Usage(1, 0, 0, 3)


def test_stream_cut_early_gives_what_message_start_said() -> None:
    body = stream(start(input_tokens=5, output_tokens=1), delta(output_tokens=20))
    for end in range(body.index(b"message_delta"), body.rindex(b"}}")):
        assert read_usage(whole(body[:end]), is_stream=True) == Usage(5, output=1)


def test_compaction_is_added_since_the_top_level_leaves_it_out() -> None:
    usage = read(
        start(input_tokens=100, cache_read_input_tokens=900),
        delta(
            input_tokens=18,
            cache_read_input_tokens=0,
            output_tokens=8,
            iterations=[
                {
                    "type": "compaction",
                    "input_tokens": 100,
                    "cache_read_input_tokens": 900,
                    "output_tokens": 83,
                },
                {"type": "message", "input_tokens": 18, "output_tokens": 8},
            ],
        ),
    )
    assert usage == Usage(118, 900, output=91)


def test_count_tokens_has_no_usage() -> None:
    assert read_usage(whole(b'{"input_tokens":12}'), is_stream=False) is None


SPOOF = {"usage": {"input_tokens": 1, "output_tokens": 1}, "type": "message_delta"}


def test_tool_input_cannot_spoof_usage() -> None:
    block = {"type": "tool_use", "input": SPOOF}
    message = {"content": [block], "usage": {"input_tokens": 50, "output_tokens": 60}, "container": SPOOF}
    body = json.dumps(message).encode()
    assert read_usage(whole(body), is_stream=False) == Usage(50, output=60)
    for at in range(1, len(body) - 1):
        window = BodyWindow(body[: at - 1], body[at:], 10**6, is_whole=False)
        assert read_usage(window, is_stream=False) in {Usage(50, output=60), None}
    partial = {"type": "input_json_delta", "partial_json": json.dumps(SPOOF)}
    usage = read(
        start(input_tokens=50),
        {"type": "content_block_start", "content_block": block, "usage": SPOOF["usage"]},
        {"type": "content_block_delta", "delta": partial},
        {
            "type": "content_block_delta",
            "delta": {"type": "text_delta", "text": f"\ndata: {json.dumps(SPOOF)}\n"},
        },
        delta(output_tokens=60),
        {"type": "message_stop", "message": {"usage": {"input_tokens": 1}}},
    )
    assert usage == Usage(50, output=60)


def test_payload_spread_over_several_data_lines_is_read() -> None:
    body = b'data: {"type":"message_start","message":\r\ndata: {"usage":\r\ndata: {"input_tokens":5}}}\r\n\r\n'
    assert read_usage(whole(body), is_stream=True) == Usage(5)


@pytest.mark.parametrize("junk", [None, 7, "x", [], {}, {"input_tokens": "x"}, {"input_tokens": -4}])
def test_odd_values_count_nothing(junk: object) -> None:
    body = json.dumps({"usage": junk}).encode()
    assert read_usage(whole(body), is_stream=False) in {None, Usage()}
    assert read({"type": "message_delta", "usage": junk}) in {None, Usage()}


@given(st.binary(max_size=200), st.binary(max_size=200), st.booleans(), st.booleans())
def test_junk_never_raises(head: bytes, tail: bytes, is_stream: bool, is_whole: bool) -> None:
    for junk in (head, b'data: {"type":"message_delta","usage":' + head, b'{"usage":' + head):
        window = BodyWindow(junk, tail, 10**6, is_whole=is_whole)
        found = read_usage(window, is_stream=is_stream)
        assert found is None or found.all_input >= 0


def test_estimate_counts_text_thinking_and_tool_input_of_a_stream() -> None:
    body = stream(
        *[
            {"type": "content_block_delta", "delta": {"type": "x", name: "abcd" * 5}}
            for name in ("text", "thinking", "partial_json")
        ]
    )
    request = b'{"system":"be brief","messages":[{"role":"user","content":"hello there"}]}'
    usage = estimate_usage(request, whole(body), is_stream=True)
    assert (usage.output, usage.source) == (15, "estimated")
    assert 5 <= usage.input <= 15
