"""The OpenAI dialect: usage read, asked for, and taken out again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.dialects.estimate import estimate_usage
from penstock.dialects.openai import MAX_EVENT_BYTES, UsageFrameFilter, ask_for_usage, read_usage
from penstock.metering import HEAD_BYTES, TAIL_BYTES, BodyWindow
from penstock.models import Usage
from penstock.peek import peek_multipart, peek_request

RECORDINGS = Path(__file__).parents[2] / "shared" / "recordings"
PROVIDERS = ("openai", "azure-openai", "groq", "deepseek", "openrouter", "mistral", "together")


def whole(body: bytes) -> BodyWindow:
    return BodyWindow(body, b"", len(body), is_whole=True)


def cut(body: bytes, head: int = HEAD_BYTES, tail: int = TAIL_BYTES) -> BodyWindow:
    return BodyWindow(body[:head], body[head:][-tail:], len(body), is_whole=len(body) <= head + tail)


def read(body: bytes, *, is_stream: bool = False) -> Usage | None:
    return read_usage(whole(body), is_stream=is_stream)


def stream(*payloads: bytes) -> bytes:
    return b"".join(b"data: " + payload + b"\n\n" for payload in payloads)


def classes_on_wire(counted: dict[str, Any]) -> tuple[int, int, int, int]:
    """All input, cache reads, cache writes and output, told from a recorded usage object."""
    details = (
        counted.get("prompt_tokens_details")
        or counted.get("prompt_token_details")
        or counted.get("input_tokens_details")
        or {}
    )
    return (
        counted.get("prompt_tokens", counted.get("input_tokens", 0)),
        details.get("cached_tokens", counted.get("num_cached_tokens", 0)),
        details.get("cache_write_tokens", 0),
        counted.get("completion_tokens", counted.get("output_tokens", 0)),
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kind", ["streaming", "json"])
def test_recorded_replies_are_metered_as_on_the_wire(kind: str, provider: str) -> None:
    if not RECORDINGS.is_dir():
        pytest.skip(f"no recordings at {RECORDINGS}: real replies are NOT checked")
    for meta_file in sorted((RECORDINGS / kind / provider).glob("*.meta.json")):
        meta = json.loads(meta_file.read_bytes())
        body = meta_file.with_name(meta["file"]).read_bytes()
        usages = [next(iter(found.values())) for found in meta["usage_on_wire"]]
        for window in (whole(body), cut(body), cut(body, 1000, 3000)):
            usage = read_usage(window, is_stream=kind == "streaming")
            if not usages:
                assert usage is None, meta_file
                continue
            expected = classes_on_wire(usages[-1 if kind == "streaming" else 0])
            if usage is None and window.total_bytes > 4000 and len(window.tail) == 3000:
                continue  # the small window may really have lost it
            assert usage is not None, meta_file
            found = (usage.all_input, usage.cache_read, usage.cache_write_5m, usage.output)
            assert found == expected, meta_file


@pytest.mark.parametrize(
    ("counted", "expected"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}, Usage(9, output=4)),
        (
            {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 5}},
            Usage(4, 5, output=4),
        ),
        (  # DeepSeek
            {"prompt_tokens": 563, "prompt_cache_hit_tokens": 512, "prompt_cache_miss_tokens": 51},
            Usage(51, 512),
        ),
        ({"prompt_tokens": 100, "completion_tokens": 29, "num_cached_tokens": 99}, Usage(1, 99, output=29)),
        (  # OpenRouter
            {"prompt_tokens": 90, "prompt_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 50}},
            Usage(10, 30, 50),
        ),
        (  # Responses
            {
                "input_tokens": 20,
                "input_tokens_details": {"cached_tokens": 8},
                "output_tokens": 7,
                "output_tokens_details": {"reasoning_tokens": 3},
            },
            Usage(12, 8, output=7, reasoning=3),
        ),
        (  # xAI counts reasoning beside the output
            {
                "prompt_tokens": 10,
                "completion_tokens": 4,
                "total_tokens": 20,
                "completion_tokens_details": {"reasoning_tokens": 6},
            },
            Usage(10, output=10, reasoning=6),
        ),
        ({"prompt_tokens": 21, "total_tokens": 21}, Usage(21)),  # embeddings
        (  # images and transcriptions
            {"type": "tokens", "input_tokens": 14, "output_tokens": 45, "input_token_details": {"x": 1}},
            Usage(14, output=45),
        ),
        ({"total_tokens": 21}, Usage(21)),
        ({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 8}}, Usage(0, 8)),
        ({"prompt_tokens": -5, "completion_tokens": 3}, Usage(0, output=3)),
        ({"prompt_tokens": 5.0, "completion_tokens": "x", "prompt_tokens_details": [1]}, Usage(5)),
        ({"prompt_tokens": 10**40, "completion_tokens": None}, Usage(10**12)),
        ({"type": "duration", "seconds": 7}, None),
        ({}, None),
        (None, None),
        ("junk", None),
        ([1], None),
    ],
)
def test_every_token_is_in_one_class(counted: object, expected: Usage | None) -> None:
    raw = json.dumps(counted).encode()
    assert read(b'{"id":"x","usage":' + raw + b"}") == expected
    assert read(stream(b'{"choices":[],"usage":' + raw + b"}", b"[DONE]"), is_stream=True) == expected


@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed"])
def test_responses_stream_reports_usage_in_its_last_event(kind: str) -> None:
    body = (
        b'event: response.created\ndata: {"type":"response.created","response":{"usage":null}}\n\n'
        b"event: response.%(k)b\n"
        b'data: {"type":"response.%(k)b","response":{"usage":{"input_tokens":3,"output_tokens":4}}}\n\n'
    ) % {b"k": kind.encode()}
    assert read(body, is_stream=True) == Usage(3, output=4)
    assert read(body.replace(b"\n", b"\r\n"), is_stream=True) == Usage(3, output=4)


def test_groq_stream_reports_usage_in_x_groq() -> None:
    body = stream(b'{"choices":[{}],"x_groq":{"usage":{"prompt_tokens":3,"completion_tokens":4}}}', b"[DONE]")
    assert read(body, is_stream=True) == Usage(3, output=4)


def test_last_usage_of_a_stream_counts_and_later_null_does_not() -> None:
    body = stream(
        b'{"usage":{"prompt_tokens":3,"completion_tokens":1}}',
        b'{"usage":{"prompt_tokens":3,"completion_tokens":2}}',
        b'{"choices":[],"usage":null}',
    )
    assert read(body, is_stream=True) == Usage(3, output=2)


def test_payload_spread_over_several_data_lines_is_read() -> None:
    body = b'data: {"choices":[],\ndata: "usage":{"prompt_tokens":3,\ndata: "completion_tokens":4}}\n\n'
    assert read(body, is_stream=True) == Usage(3, output=4)


SPOOF = b'{"usage":{"prompt_tokens":1,"completion_tokens":1}}'
REAL = b'"usage":{"prompt_tokens":700,"completion_tokens":80}'


@pytest.mark.parametrize(
    "body",
    [
        b'{"choices":[{"message":{"tool_calls":[{"function":{"arguments":%b}}]}}],' + REAL + b"}",
        b"{" + REAL + b',"metadata":%b}',
        b"{" + REAL + b',"choices":[{"x":%b}]}',
        b'{"x":[%b],' + REAL + b',"usage_breakdown":{"models":[%b]},"y":"\\"usage\\":{}"}',
        b'{"x\\"usage":{"prompt_tokens":1},' + REAL + b',"a\\"usage":{"prompt_tokens":1}}',
    ],
)
def test_json_usage_is_not_spoofed_by_what_a_model_or_user_wrote(body: bytes) -> None:
    expected = Usage(700, output=80)
    for inner in (SPOOF, json.dumps(SPOOF.decode()).encode()):
        filled = body.replace(b"%b", inner)
        assert read(filled) == expected
        at = filled.index(REAL)
        for head in range(1, len(filled) - 1):
            gap = BodyWindow(filled[:head], filled[head:], len(filled), is_whole=True)
            assert read_usage(gap, is_stream=False) == expected
            lost = BodyWindow(filled[: head - 1], filled[head:], 10**6, is_whole=False)
            assert read_usage(lost, is_stream=False) in {expected, None}
            if not at <= head <= at + len(REAL):  # else the name or the count itself is not whole
                assert read_usage(lost, is_stream=False) == expected


def test_stream_usage_is_not_spoofed_by_what_a_model_or_user_wrote() -> None:
    spoofs = [
        b'{"choices":[{"delta":{"tool_calls":[{"function":{"arguments":%b}}]}}]}',
        b'{"type":"response.output_item.done","item":{"arguments":%b}}',
        b'{"type":"response.created","response":{"metadata":%b,"tools":[%b]}}',
    ]
    for spoof in spoofs:
        for inner in (SPOOF, json.dumps(SPOOF.decode()).encode()):
            event = spoof.replace(b"%b", inner)
            assert read(stream(event), is_stream=True) is None
            for start in range(len(event)):  # only the end of the event is in the window
                window = BodyWindow(b"data: {}\n\n", event[start:] + b"\n\n", 10**6, is_whole=False)
                assert read_usage(window, is_stream=True) is None


def test_event_larger_than_the_window_is_read_from_its_end() -> None:
    last = (
        b'{"type":"response.completed","response":{"output":[{"text":"' + b"x" * 70_000 + b'"}],'
        b'"usage":{"input_tokens":3,"output_tokens":4},"metadata":' + SPOOF + b'},"sequence_number":7}'
    )
    assert read_usage(cut(stream(b"{}", last)), is_stream=True) == Usage(3, output=4)


def test_usage_ahead_of_a_long_body_is_read_from_the_head() -> None:
    body = b'{"object":"list","usage":{"prompt_tokens":3},"data":[' + b"0.5," * 40_000 + b"1]}"
    assert read_usage(cut(body), is_stream=False) == Usage(3)


@given(st.binary(max_size=200), st.binary(max_size=200), st.booleans(), st.booleans())
def test_junk_never_raises(head: bytes, tail: bytes, is_stream: bool, is_whole: bool) -> None:
    for junk in (head, b'data: {"usage":' + head, b'{"usage":' + head, head + b'"usage":{}'):
        window = BodyWindow(junk, tail, 10**6, is_whole=is_whole)
        found = read_usage(window, is_stream=is_stream)
        assert found is None or found.all_input >= 0
        fed = UsageFrameFilter()
        assert isinstance(fed.feed(junk) + fed.feed(tail) + fed.finish(), bytes)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"stream":true}', '{"stream":true,"stream_options":{"include_usage":true}}'),
        (' { "stream" : true } \n', ' { "stream" : true,"stream_options":{"include_usage":true} } \n'),
        (
            '{"stream":true,"stream_options":{}}',
            '{"stream":true,"stream_options":{"include_usage":true}}',
        ),
        (
            '{"stream_options" : { "a":1 } ,"stream":true}',
            '{"stream_options" : { "a":1,"include_usage":true } ,"stream":true}',
        ),
        (
            '{"stream_options": null,"stream":true}',
            '{"stream_options": {"include_usage":true},"stream":true}',
        ),
        (
            '{"stream_options":{"include_usage": null, "b":2},"stream":true}',
            '{"stream_options":{"include_usage": true, "b":2},"stream":true}',
        ),
        (
            '{"stream_options":{"a":1},"stream":true,"stream_options":null}',
            ('{"stream_options":{"a":1,"include_usage":true},"stream":true,"stream_options":{"include_usage":true}}'),
        ),
        (
            '{"stream":true,"messages":[{"stream_options":{"include_usage":true}}]}',
            (
                '{"stream":true,"messages":[{"stream_options":{"include_usage":true}}],'
                '"stream_options":{"include_usage":true}}'
            ),
        ),
    ],
)
def test_usage_is_asked_for_by_a_splice(before: str, after: str) -> None:
    body = before.encode()
    assert ask_for_usage(body, peek_request(body)) == after.encode()


@pytest.mark.parametrize(
    "body",
    [
        b'{"stream":false}',
        b"{}",
        b'{"stream":true,"stream_options":{"include_usage":true}}',
        b'{"stream":true,"stream_options":{"include_usage":false}}',
        b'{"stream":true,"stream_options":{"include_usage":"yes"}}',
        b'{"stream":true,"stream_options":[]}',
        b'{"stream":true,"stream_options":7}',
    ],
)
def test_request_that_decided_or_is_wrong_stays_as_it_is(body: bytes) -> None:
    assert ask_for_usage(body, peek_request(body)) is None


def test_form_is_never_spliced() -> None:
    form = b'--b\r\ncontent-disposition: form-data; name="stream"\r\n\r\ntrue\r\n--b--\r\n'
    assert ask_for_usage(form, peek_multipart(form, b"multipart/form-data; boundary=b")) is None


space = st.text(" \t\n\r", max_size=3)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@st.composite
def request_bodies(draw: st.DrawFn) -> bytes:
    members: list[tuple[str, Any]] = [("stream", True)]
    members += draw(st.lists(st.tuples(st.sampled_from(["messages", "model", "x", "usage"]), json_value)))
    if draw(st.booleans()):
        members.append(("stream_options", draw(st.dictionaries(st.sampled_from("abc"), json_value))))
    members = draw(st.permutations(members))
    pieces = [
        draw(space) + json.dumps(name) + draw(space) + ":" + draw(space) + json.dumps(value) + draw(space)
        for name, value in members
    ]
    return (draw(space) + "{" + ",".join(pieces) + "}" + draw(space)).encode()


@given(request_bodies())
def test_asking_inserts_one_run_of_bytes_and_touches_no_other(body: bytes) -> None:
    asked = ask_for_usage(body, peek_request(body))
    assert asked is not None
    added = len(asked) - len(body)
    prefix = next((i for i, (a, b) in enumerate(zip(body, asked, strict=False)) if a != b), len(body))
    assert body[prefix:] == asked[prefix + added :]
    expected = json.loads(body)
    expected["stream_options"] = {**(expected.get("stream_options") or {}), "include_usage": True}
    assert json.loads(asked) == expected


def filtered(*pieces: bytes) -> bytes:
    usage_filter = UsageFrameFilter()
    return b"".join([usage_filter.feed(piece) for piece in pieces]) + usage_filter.finish()


FRAME = b'{"id":"x","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}'


@st.composite
def paired_streams(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A stream as it is without include_usage, and the same with it."""
    newline = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    plain: list[str] = []
    asked: list[str] = []
    for _ in range(draw(st.integers(0, 5))):
        comma, colon = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " : ")]))
        text = draw(st.sampled_from(["a", "usage", '"usage":null', ',"usage": null}', "\\", "é", "{[", "\n"]))
        members = [
            '"id"' + colon + '"x"',
            '"choices"' + colon + json.dumps([{"delta": {"content": text, "usage": None}}]),
            '"obfuscation"' + colon + '"abc"',
        ][: draw(st.integers(1, 3))]
        at = draw(st.integers(0, len(members)))
        more = [*members[:at], '"usage"' + colon + "null", *members[at:]]
        shape = draw(st.sampled_from(["data: {}", "data:{}", ": note\ndata: {}", "id: 7\ndata: {}\nevent: x"]))
        for events, parts in ((plain, members), (asked, more)):
            lines = shape.replace("{}", "{" + comma.join(parts) + "}") + "\n\n"
            events.append(lines.replace("\n", newline))
        if draw(st.booleans()):
            other = draw(st.sampled_from([": keep-alive\n\n", "\n", 'data: {"usage":7}\n\n', "data: usage\n\n"]))
            plain.append(other.replace("\n", newline))
            asked.append(other.replace("\n", newline))
    frame = "data: " + FRAME.decode() + "\n\n"
    asked.append(frame.replace("\n", newline))
    end = draw(st.sampled_from(["data: [DONE]\n\n", "", "data: [DO", "\n"])).replace("\n", newline)
    return ("".join(plain) + end).encode(), ("".join(asked) + end).encode()


@given(paired_streams(), st.data())
def test_filtered_stream_is_the_stream_without_include_usage(pair: tuple[bytes, bytes], choice: st.DataObject) -> None:
    reference, asked = pair
    cuts = sorted(choice.draw(st.lists(st.integers(0, len(asked)), max_size=12)))
    edges = [0, *cuts, len(asked)]
    pieces = [asked[start:end] for start, end in itertools.pairwise(edges)]
    assert filtered(*pieces) == reference
    assert filtered(*[asked[i : i + 1] for i in range(len(asked))]) == reference


def test_recorded_chat_streams_lose_only_what_asking_added() -> None:
    if not RECORDINGS.is_dir():
        pytest.skip(f"no recordings at {RECORDINGS}: real replies are NOT checked")
    for file in sorted((RECORDINGS / "streaming" / "openai").glob("chat*.sse")):
        events = file.read_bytes().split(b"\n\n")
        kept = [
            event.replace(b',"usage":null', b"")
            for event in events
            if b'"choices":[],"usage":{' not in event or b'"usage":null' in event
        ]
        assert filtered(file.read_bytes()) == b"\n\n".join(kept), file


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[{"delta":{}}],"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"choices":[{"delta":{"content":"usage \\"usage\\":null,"}}]}\n\n',
        b'data: {"choices":[{"usage":null}]}\n\n',
        b'data: {"choices":[{"usage":null,"a":"b"}],"c":1}\n\n',
        b'data: {"x":{"usage":null}}\n\n',
        b'data: {"choices":[],"prompt_filter_results":[]}\n\n',
        b'data: {"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"choices":[],"usage":{"a":1}\n\n',
        b'data: "usage":null}\n\n',
        b'data: {"usage":null,"usage":7}\n\n',
    ],
)
def test_event_that_asking_did_not_change_stays(event: bytes) -> None:
    assert filtered(event, stream(b"[DONE]")) == event + stream(b"[DONE]")


def test_payload_over_several_lines_is_filtered_too() -> None:
    assert filtered(b'data: {"a":1,\ndata: "usage":null}\n\n') == b'data: {"a":1}\n\n'
    assert filtered(b'data: {"choices":[],\ndata: "usage":{}}\n\n') == b""


def test_events_reach_the_client_at_once() -> None:
    usage_filter = UsageFrameFilter()
    event = stream(b'{"choices":[{}]}')
    assert usage_filter.feed(event) == event
    assert usage_filter.feed(stream(b'{"choices":[{}],"usage":null}')) == event
    assert usage_filter.feed(event + event[:5]) == event
    assert usage_filter.feed(event[5:]) == event
    assert usage_filter.feed(event) == event
    assert usage_filter.finish() == b""


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("step", [1000, 4099, 10**6])
def test_oversized_event_passes_and_the_next_ones_are_filtered(newline: bytes, step: int) -> None:
    oversized = b'data: {"a":"' + b"x" * (MAX_EVENT_BYTES + 9) + b'","usage":null}\n\n'
    body = (oversized + stream(FRAME) + oversized).replace(b"\n", newline)
    assert filtered(*[body[i : i + step] for i in range(0, len(body), step)]) == (oversized * 2).replace(b"\n", newline)


PROMPT = b'{"model":"m","messages":[{"role":"user","content":"' + b"word " * 400 + b'"}],"stream":true}'


def test_estimate_counts_the_text_of_prompt_and_deltas() -> None:
    deltas = stream(*[b'{"choices":[{"delta":{"content":"' + b"ab\\n " * 10 + b'"}}]}'] * 10)
    usage = estimate_usage(PROMPT, whole(deltas), is_stream=True)
    assert (usage.source, usage.output) == ("estimated", 100)
    assert 500 <= usage.input <= 510


def test_estimate_of_a_cut_stream_is_scaled_up() -> None:
    deltas = stream(*[b'{"choices":[{"delta":{"content":"abcdefgh"}}]}'] * 5000)
    usage = estimate_usage(PROMPT, cut(deltas), is_stream=True)
    assert usage.output == pytest.approx(10_000, rel=0.01)


def test_estimate_of_a_responses_stream_counts_its_text_once() -> None:
    body = stream(
        b'{"type":"response.output_text.delta","delta":"abcd"}',
        b'{"type":"response.output_text.done","text":"abcd"}',
        b'{"type":"response.completed","response":{"output":[{"content":[{"text":"abcd"}]}]}}',
    )
    assert estimate_usage(b'{"input":"hi"}', whole(body), is_stream=True).output == 1


@pytest.mark.parametrize(
    ("request_body", "least", "most"),
    [
        (b'{"input":"x"}', 1, 1),
        (b'{"input":[[1,2,3],[4]]}', 4, 4),
        (b'{"prompt":"\\"quoted\\\\"}', 2, 3),
        (b'{"messages":[{"content":"' + b"iVBORw0K" * 50_000 + b'"}]}', 1, 9),
        (b'{"messages":[' + b'{"content":"abc"},' * 40_000 + b"{}]}", 120_000, 240_000),
        (b"--b\r\n...", 1, 1),
        (b"\x28\xb5\x2f\xfd" * 10, 10, 10),
        (b'{"model":"m"}', 0, 0),
        (b"", 0, 0),
    ],
)
def test_estimate_of_a_prompt_is_bounded(request_body: bytes, least: int, most: int) -> None:
    usage = estimate_usage(request_body, whole(b'{"error":{"message":"no"}}'), is_stream=False)
    assert least <= usage.input <= most
    assert usage.output == 0


def test_estimate_uses_a_token_counter_where_there_is_one() -> None:
    body = b'{"choices":[{"message":{"content":"one two \\u0074hree"}}]}'
    usage = estimate_usage(
        b'{"prompt":"a b"}', whole(body), is_stream=False, token_counter=lambda text: len(text.split())
    )
    assert (usage.input, usage.output) == (2, 3)
