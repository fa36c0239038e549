"""Prompt-cache markers: taken out or put in, with no other byte changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.splice import SpliceError
from penstock_plugins.caching.markers import LIMIT, LONG, SHORT, with_markers, without_markers

WORDS = st.sampled_from(["cache_control", "cachedContent", "a", "ttl", "text", '"cache_control":', "x\\", "é\n"])
MARKER = st.sampled_from([{"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}, None, 1, "cache_control"])
LEAVES = st.none() | st.booleans() | st.integers() | WORDS


def trees() -> st.SearchStrategy[Any]:
    names = st.sampled_from(["cache_control", "a", "b", "tools", "cachedContent", "c\u00e9"])
    return st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4))


@st.composite
def written(draw: st.DrawFn, tree: Any) -> bytes:
    """Write a tree as some client may: escaped or not, tight or not."""
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:  ")]))
    indent = draw(st.sampled_from([None, None, 1]))
    text = json.dumps(tree, ensure_ascii=draw(st.booleans()), indent=indent, separators=separators)
    if draw(st.booleans()):
        text = text.replace('"cache_control"', '"cache\\u005fcontrol"')
    return text.encode()


def stripped(tree: Any, at_top: bool = True, family: str = "openai") -> Any:
    if isinstance(tree, dict):
        gone = {"cache_control", *(("cachedContent",) if at_top and family == "gemini" else ())}
        return {name: stripped(value, False, family) for name, value in tree.items() if name not in gone}
    return [stripped(each, False, family) for each in tree] if isinstance(tree, list) else tree


def is_subsequence(part: bytes, whole: bytes) -> bool:
    rest = iter(whole)
    return all(byte in rest for byte in part)


@given(st.data(), st.sampled_from(["openai", "anthropic", "gemini"]))
def test_disable_removes_every_marker_and_nothing_else(data: st.DataObject, family: str) -> None:
    tree = data.draw(st.dictionaries(st.sampled_from(["cache_control", "cachedContent", "m"]), trees(), max_size=4))
    body = data.draw(written(tree))
    after = without_markers(body, family)
    assert json.loads(after) == stripped(tree, family=family)
    assert is_subsequence(after, body)
    if json.loads(after) == tree:
        assert after == body


def test_disable_keeps_strings_that_hold_the_word() -> None:
    body = b'{"a":"\\"cache_control\\":{}", "cache_control_x":1, "b":["cache_control"], "input":{"q":"cachedContent"}}'
    assert without_markers(body, "anthropic") is body


def test_disable_removes_gemini_s_cached_content_at_the_top_only() -> None:
    body = b'{"cachedContent":"c/1","contents":[{"cachedContent":2}], "cached_content":"c/2"}'
    assert without_markers(body, "gemini") == b'{"contents":[{"cachedContent":2}]}'
    assert without_markers(body, "openai") == body


# --- force ------------------------------------------------------------------------------------------------------------

BLOCK_TYPES = st.sampled_from(["text", "tool_result", "thinking", "image", "redacted_thinking"])


@st.composite
def blocks(draw: st.DrawFn, markers: st.SearchStrategy[Any]) -> dict[str, Any]:
    kind = draw(BLOCK_TYPES)
    block: dict[str, Any] = {"type": kind, "text": draw(WORDS | st.just(""))}
    if kind == "tool_result":
        block = {"type": kind, "content": [{"type": "text", "text": "r"}]}
    if "thinking" not in kind and draw(st.booleans()):
        block["cache_control"] = draw(markers)
    return block


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    markers = st.sampled_from(
        [{"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}, {"type": "ephemeral", "ttl": "5m"}]
    )
    content = WORDS | st.just("") | st.lists(blocks(markers), max_size=3)
    found: dict[str, Any] = {"model": "claude-x"}
    if draw(st.booleans()):
        found["system"] = draw(content)
    found["messages"] = [{"role": "user", "content": draw(content)} for _ in range(draw(st.integers(0, 3)))]
    if draw(st.booleans()):
        found["tools"] = [{"name": "t", **draw(st.fixed_dictionaries({}, optional={"cache_control": markers}))}]
    return found


def markers_in(tree: Any) -> list[Any]:
    """Return the markers in the order in which they are cached."""
    if isinstance(tree, dict):
        own = [tree["cache_control"]] if tree.get("cache_control") is not None else []
        return [marker for name, value in tree.items() if name != "cache_control" for marker in markers_in(value)] + own
    return [marker for each in tree for marker in markers_in(each)] if isinstance(tree, list) else []


def in_order(tree: dict[str, Any]) -> list[Any]:
    return [marker for name in ("tools", "system", "messages") for marker in markers_in(tree.get(name))]


def plain(tree: Any) -> Any:
    """Return a request without markers, a string as the block it is short for."""
    found = stripped(tree)
    for holder, name in [(found, "system"), *((message, "content") for message in found.get("messages", []))]:
        if isinstance(holder.get(name), str):
            holder[name] = [{"type": "text", "text": holder[name]}]
    return found


def is_valid_order(markers: list[Any]) -> bool:
    durations = [marker.get("ttl") == "1h" for marker in markers]
    return durations == sorted(durations, reverse=True)


@given(st.data(), st.booleans())
def test_force_adds_at_most_what_is_permitted_and_moves_nothing(data: st.DataObject, is_long: bool) -> None:
    tree = data.draw(requests())
    body = data.draw(written(tree))
    after = with_markers(body, is_long=is_long)
    found = json.loads(after)
    before, added = in_order(tree), len(in_order(found)) - len(in_order(tree))
    assert 0 <= added <= 2
    assert len(in_order(found)) <= max(LIMIT, len(before))
    assert plain(found) == plain(tree)
    assert is_subsequence(body, after)
    if is_valid_order(before):
        assert is_valid_order(in_order(found))
    assert with_markers(after, is_long=is_long) == after or len(in_order(found)) == LIMIT or not added


@pytest.mark.parametrize(("is_long", "marker"), [(False, SHORT), (True, LONG)])
def test_force_makes_a_block_of_a_string_and_keeps_its_bytes(is_long: bool, marker: bytes) -> None:
    body = b'{"system": "be\\u0020kind", "messages":[{"role":"user","content":"a"},{"role":"user","content" : "b\\n"}]}'
    assert with_markers(body, is_long=is_long) == (
        b'{"system": [{"type":"text","text":"be\\u0020kind","cache_control":%b}], "messages":'
        b'[{"role":"user","content":"a"},{"role":"user","content" : '
        b'[{"type":"text","text":"b\\n","cache_control":%b}]}]}' % (marker, marker)
    )


def test_force_marks_the_last_block_that_may_be_marked() -> None:
    body = b'{"messages":[{"content":[{"type":"text","text":"q"},{"type":"thinking","thinking":"t","signature":"s"}]}]}'
    assert with_markers(body, is_long=False) == (
        b'{"messages":[{"content":[{"type":"text","text":"q","cache_control":{"type":"ephemeral"}},'
        b'{"type":"thinking","thinking":"t","signature":"s"}]}]}'
    )


def test_force_prefers_the_message_where_one_marker_is_left() -> None:
    tools = b",".join([b'{"name":"t","cache_control":{"type":"ephemeral"}}'] * 3)
    body = b'{"tools":[%b],"system":[{"type":"text","text":"s"}],"messages":[{"content":"m"}]}' % tools
    found = json.loads(with_markers(body, is_long=False))
    assert "cache_control" not in found["system"][0]
    assert found["messages"][0]["content"][0]["cache_control"] == {"type": "ephemeral"}


def test_force_leaves_full_and_marked_requests_alone() -> None:
    marked = (
        b'{"system":[{"text":"s","cache_control":{}}],"messages":[{"content":[{"text":"m","cache_control":null}]}]}'
    )
    assert with_markers(marked, is_long=True) is marked
    full = b'{"tools":[%b],"messages":[{"content":"m"}]}' % b",".join([b'{"cache_control":{"type":"ephemeral"}}'] * 4)
    assert with_markers(full, is_long=True) is full


def test_force_leaves_the_message_to_automatic_caching() -> None:
    body = b'{"cache_control":{"type":"ephemeral"},"system":"s","messages":[{"content":"m"}]}'
    assert with_markers(body, is_long=False) == (
        b'{"cache_control":{"type":"ephemeral"},"system":[{"type":"text","text":"s","cache_control":{"type":"ephemeral"}}],'
        b'"messages":[{"content":"m"}]}'
    )


def test_force_puts_no_hour_behind_five_minutes() -> None:
    body = (
        b'{"system":"s","messages":[{"content":[{"type":"text","text":"a","cache_control":{"type":"ephemeral"}}]},'
        b'{"content":"m"}]}'
    )
    found = json.loads(with_markers(body, is_long=True))
    assert found["system"][0]["cache_control"]["ttl"] == "1h"
    assert found["messages"][1]["content"][0]["cache_control"] == {"type": "ephemeral"}


@pytest.mark.parametrize("body", [b'{"messages":[', b"", b'{"messages" 1}'])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(SpliceError):
        with_markers(body, is_long=False)


@pytest.mark.parametrize(
    "body", [b"[]", b'"s"', b'{"messages":{},"system":7}', b'{"messages":[7]}', b'{"messages":[{}]}']
)
def test_what_has_no_blocks_is_left_alone(body: bytes) -> None:
    assert with_markers(body, is_long=False) is body
