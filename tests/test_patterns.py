"""Patterns of regular expressions that some supported interpreter matches wrongly.

CPython before 3.11.5 (Debian 12 has 3.11.2) matches a possessively repeated group wrongly where the group has
choices of its own: ``(?:ab?c)*+`` takes four bytes of ``abcabx``, not three. Possessive single characters and
classes (``[^"]*+``) are right, and so are atomic groups, ``(?>(?:...)*)``. These keep memory for each repetition
until they end, so where a client chooses the count, the count is bounded; the last tests here watch over that.
"""

import ast
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import splice
from penstock.dialects.estimate import estimate_usage
from penstock.metering import BodyWindow
from penstock.splice import SpliceError

MEBIBYTE = 1 << 20
ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")])

_possessive_group = re.compile(r"(?<!\\)(?:\\\\)*\)(?:[*+?]|\{[0-9]*,?[0-9]*\})\+")


def possessive_groups(source: str) -> Iterator[str]:
    """Yield the string and bytes literals in which a closing parenthesis is repeated possessively."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, (str, bytes)):
            continue
        text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
        if _possessive_group.search(text):
            yield text


@pytest.mark.parametrize("literal", ["(?:a)*+", "(a|b)++", "(?:a)?+", "(?:a){2,3}+", ")*+", r"(\\)*+"])
def test_the_search_knows_possessive_groups(literal: str) -> None:
    assert list(possessive_groups(f"x = {literal!r}")) == [literal]
    assert list(possessive_groups(f"x = {literal.encode()!r}")) == [literal]


@pytest.mark.parametrize("literal", [r"[^\"]*+", r"\)++", "(?>(?:a)*)", "[a]{0,9}+", "(a)+", "(a)*"])
def test_the_search_lets_sound_patterns_be(literal: str) -> None:
    assert list(possessive_groups(f"x = {literal!r}")) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_group_is_repeated_possessively(path: Path) -> None:
    assert list(possessive_groups(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("pattern", "text", "end"),
    [
        (r"(?>(?:ab?c)*)", "abcabx", 3),
        (r"(?>(?:a|ab)*)c", "aabc", None),
        (r'(?>(?:[^"{}]++|"[^"]{0,9}+(?<!\\)")*)(["{}])', 'x"a\\" q" }', 2),
        (r'[^"\\]*+(?>(?:(?>(?:\\.[^"\\]*+){1,2}))*)"', 'a\\"b\\\\\\"c\\n"', 12),
        (r"(?>(?:(?>(?:ab?c){1,2}))*)", "abcacabcabx", 8),
    ],
)
def test_atomic_groups_are_right_on_this_interpreter(pattern: str, text: str, end: int | None) -> None:
    found = re.match(pattern, text)
    assert (found and found.end()) == end


def test_an_escaped_quote_does_not_hide_the_members_behind_it() -> None:
    body = b'{"messages":[{"role":"user","content":"hello \\"q\\" "}],"model":"fast"}'
    span = splice.find(body, ("model",))
    assert span is not None
    assert body[span.start : span.end] == b'"fast"'


def end_by_hand(body: bytes, position: int) -> int:
    position += 1
    while position < len(body) and body[position] != ord('"'):
        position += 2 if body[position] == ord("\\") else 1
    return position + 1


PIECES = st.sampled_from(
    [b"\\" * 2, b'\\"', b'\\\\\\"', b"\\" * 5 + b'"', b"\\" * 4, b"\\n", b"x", b"{[,:", b"w" * 300]
)


@given(st.lists(PIECES, max_size=12).map(b"".join))
def test_a_string_ends_where_an_automaton_of_two_states_says(inside: bytes) -> None:
    body = b'["' + inside + b'",""]'
    span = splice.find(body, (0,))
    assert span == (1, end_by_hand(body, 1))


@given(st.lists(PIECES, max_size=12).map(b"".join), st.sampled_from([b"", b"\\", b"\\" * 3, b"\\" * 5]))
def test_a_string_that_does_not_end_is_reported(inside: bytes, tail: bytes) -> None:
    with pytest.raises(SpliceError, match="string that ends"):
        splice.find(b'["' + inside + tail, (0,))


def test_estimates_read_strings_to_their_ends() -> None:
    content = b'say \\"hi\\" C:\\\\ ' * 5000
    body = b'{"messages":[{"role":"user","content":"' + content + b'"}]}'
    seen: list[str] = []

    def counter(text: str) -> int:
        seen.append(text)
        return 1

    estimate_usage(body, BodyWindow(b"", b"", 0), is_stream=False, token_counter=counter)
    assert seen == ["\n".join(["role", "user", "content", 'say "hi" C:\\ ' * 5000])]


def test_an_estimate_keeps_no_memory_per_escape() -> None:
    content = b"\\n" * (MEBIBYTE // 2)
    answer = b'{"content":"' + content + b'"}'
    window = BodyWindow(answer, b"", len(answer))
    peak = peak_bytes(lambda: estimate_usage(b"", window, is_stream=False, token_counter=len))
    assert peak <= 8 * MEBIBYTE


def peak_bytes(work: Callable[[], object]) -> int:
    """Measure the most memory that work holds at a time; the regex engine's own is counted too."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


NESTED = 100_000
SHAPES = {
    "quotes": b'{"m":[' + b'"' * MEBIBYTE + b'],"model":1}',
    "short strings": b'{"m":[' + b'"",' * (MEBIBYTE // 3) + b'1],"model":1}',
    "short strings, then a fold that fails": b'{"m":[[[' + b'"",' * (MEBIBYTE // 3) + b'"\\""]]],"model":1}',
    "short arrays": b'{"m":[[' + b"[1]," * (MEBIBYTE // 4) + b'1]],"model":1}',
    "backslashes": b'{"m":"' + b"\\" * MEBIBYTE + b'","model":1}',
    "escaped quotes": b'{"m":"' + b'\\"' * (MEBIBYTE // 2) + b'","model":1}',
    "quotes behind three": b'{"m":"' + b'\\\\\\"' * (MEBIBYTE // 4) + b'","model":1}',
    "quotes behind five": b'{"m":"' + b'\\\\\\\\\\"' * (MEBIBYTE // 6) + b'","model":1}',
    "escaped quotes, then two": b'{"m":"' + b'\\"' * (MEBIBYTE // 2) + b'\\\\","model":1}',
    "strings with escaped quotes": b'{"m":[' + b'"a\\"b",' * (MEBIBYTE // 7) + b'1],"model":1}',
    "deep": b'{"m":' + b"[" * NESTED + b"]" * NESTED + b',"model":1}',
    "deep members": b'{"m":' + b'{"a":[1,' * NESTED + b"2" + b"]}" * NESTED + b',"model":1}',
    "unterminated": b'{"m":"' + b'\\"' * (MEBIBYTE // 2),
    "unterminated behind two": b'{"m":"' + b'\\\\\\"' * (MEBIBYTE // 4),
    "unterminated strings": b'{"m":[' + b'"\\",' * (MEBIBYTE // 4),
    "open brackets": b'{"m":' + b"[" * NESTED,
    "open members": b'{"m":' + b'{"a":' * NESTED,
}


def find_model(body: bytes) -> object:
    """Look for the member; the span, or where the walk ended."""
    try:
        return splice.find(body, ("model",))
    except SpliceError as error:
        return str(error)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_of_a_mebibyte_costs_memory_per_token_or_more_than_linear_work(shape: str) -> None:
    """Quadratic matching of a mebibyte would take hours: that this test ends is half of what it shows."""
    body = SHAPES[shape]
    has_end = not shape.startswith(("unterminated", "open"))
    assert peak_bytes(lambda: find_model(body)) <= 3 * MEBIBYTE
    found = find_model(body)
    assert found == (len(body) - 2, len(body) - 1) if has_end else "expected" in str(found)
