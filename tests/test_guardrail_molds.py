"""Events that fit a mold are read as walking them would: the same texts at the same places, under the same paths."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_plugins.guardrails.holding import Holder
from penstock_plugins.guardrails.molds import MOST_LEARNED, Found, Molds

TEXT = st.text(max_size=6)
SCALAR = st.one_of(TEXT, st.integers(-9, 9), st.none(), st.booleans())
INDEX = st.integers(0, 2)


@st.composite
def chat(draw: st.DrawFn) -> dict[str, Any]:
    """Draw an event of chat completions, odd ones too."""
    delta: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(["role", "content", "reasoning_content", "tool_calls", "refusal"]))):
        call = {"index": draw(INDEX), "id": draw(TEXT), "function": {"name": draw(TEXT), "arguments": draw(TEXT)}}
        delta[name] = [call] if name == "tool_calls" else draw(st.one_of(TEXT, st.none()))
    choice = {"index": draw(INDEX), "delta": delta, "finish_reason": draw(st.sampled_from([None, "stop", "length"]))}
    event = {"id": draw(TEXT), "created": draw(st.integers(0, 99)), "choices": [choice], "obfuscation": draw(TEXT)}
    return {**event, **draw(st.dictionaries(st.sampled_from(["usage", "model", "x"]), SCALAR))}


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Any]:
    """Draw an event of Anthropic's."""
    kind = draw(st.sampled_from(["content_block_start", "content_block_delta", "content_block_stop", "message_stop"]))
    delta = {"type": draw(st.sampled_from(["text_delta", "thinking_delta"])), "text": draw(TEXT), "x": draw(SCALAR)}
    return {"type": kind, "index": draw(INDEX), "delta": delta}


@st.composite
def responses(draw: st.DrawFn) -> dict[str, Any]:
    """Draw an event of the Responses API."""
    kinds = ["response.output_text.delta", "response.output_text.done", "response.output_item.done"]
    kind = draw(st.sampled_from([*kinds, "response.completed"]))
    places = {"output_index": draw(INDEX), "content_index": draw(INDEX), "sequence_number": draw(st.integers(0, 99))}
    own = {"delta": draw(TEXT), "text": draw(TEXT), "item": {"type": "message", "content": [{"text": draw(TEXT)}]}}
    names = draw(st.lists(st.sampled_from(sorted(own)), unique=True))
    return {"type": kind, "item_id": draw(TEXT), **places, **{name: own[name] for name in names}}


def shown(found: Found) -> Any:
    parts, wholes, ended = found
    return [[(text.path, text.span, text.text) for text in texts] for texts in (parts, wholes)], ended


DIALECTS = {"openai.chat": chat(), "anthropic.messages": messages(), "openai.responses": responses()}


@pytest.mark.parametrize("dialect", DIALECTS)
@given(data=st.data())
def test_mold_reads_what_walking_finds_or_nothing(dialect: str, data: st.DataObject) -> None:
    holder, molds = Holder(dialect), Molds()
    for event in data.draw(st.lists(DIALECTS[dialect], min_size=2, max_size=8)):
        payload = json.dumps(event, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "surrogatepass")
        walked = holder._walked(payload)
        read = molds.read(payload)
        assert read is None or shown(read) == shown(walked)
        molds.learn(payload, walked)
        again = molds.read(payload)
        assert again is None or shown(again) == shown(walked)


def test_events_of_a_stream_fit_the_mold_of_the_first() -> None:
    holder, molds = Holder("openai.chat"), Molds()
    for number, text in enumerate(["a", "\\n\\u00e4", "", '\\"x\\"']):
        payload = (
            b'{"id":"c%d","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}],"obfuscation":"%b"}'
        )
        event = payload % (number, text.encode(), b"x" * number)
        found = molds.read(event)
        assert (found is None) == (number == 0)
        walked = holder._walked(event)
        assert shown(found or walked) == shown(walked)
        molds.learn(event, walked)


@pytest.mark.parametrize(
    "other",
    [
        b'{"choices":[{"index":1,"delta":{"content":"b"},"finish_reason":null}]}',
        b'{"choices":[{"index":0,"delta":{"content":"b"},"finish_reason":"stop"}]}',
        b'{"choices":[{"index":0,"delta":{"content":"b","refusal":"c"},"finish_reason":null}]}',
        b'{"choices":[{"index":0,"delta":{"content":"\\q"},"finish_reason":null}]}',
        b'{"choices":[{"index":0,"delta":{"content":null},"finish_reason":null}]}',
        b'{"choices":[{"index":0,"delta":{"content":"b"},"finish_reason":null}]} ',
    ],
)
def test_event_that_differs_in_more_than_its_values_is_walked(other: bytes) -> None:
    holder, molds = Holder("openai.chat"), Molds()
    first = b'{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}'
    molds.learn(first, holder._walked(first))
    assert molds.read(first) is not None
    assert molds.read(other) is None


def test_name_that_is_escaped_makes_no_mold() -> None:
    holder, molds = Holder("anthropic.messages"), Molds()
    event = b'{"\\u0074ype":"content_block_delta","index":0,"delta":{"text":"a"}}'
    molds.learn(event, holder._walked(event))
    assert molds.read(event) is None


def test_stream_whose_events_have_nothing_in_common_is_not_learned_for_ever() -> None:
    holder, molds = Holder("openai.chat"), Molds()
    for number in range(MOST_LEARNED + 1):
        event = b'{"x%d":1,"choices":[]}' % number
        molds.learn(event, holder._walked(event))
    assert molds.read(event) is None
