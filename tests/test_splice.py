"""Splice against a reference parser that keeps duplicates, order and the spelling of numbers."""

import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from penstock import splice
from penstock.splice import Span, SpliceError

SPACE = st.sampled_from(["", "", "", " ", "\n", "\t", "\r\n  "])
NAMES = st.sampled_from(["model", "a", "b", "stream_options", "", "é", "\U0001f600", 'q"', "\\", "x" * 90])
NUMBERS = st.sampled_from(["0", "-0.0", "1E400", "1e-7", str(10**40), "12.50", "true", "false", "null", "NaN"])


def spell(text: str, escaped: frozenset[int]) -> str:
    """Spell a JSON string with the characters at the given positions as \\u escapes."""
    spelled = (
        "".join(f"\\u{int.from_bytes(pair, 'big'):04X}" for pair in utf16(char))
        if index in escaped
        else json.dumps(char, ensure_ascii=False)[1:-1]
        for index, char in enumerate(text)
    )
    return '"' + "".join(spelled) + '"'


def utf16(char: str) -> list[bytes]:
    raw = char.encode("utf-16-be", "surrogatepass")
    return [raw[i : i + 2] for i in range(0, len(raw), 2)]


def strings(texts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(spell, texts, st.frozensets(st.integers(0, 8), max_size=4))


TEXTS = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(
    ['say "hi"', "C:\\", "{[,:]}", '\\"' * 60, "long " * 40, "\\" * 101, 'tail"', '"model":"x"']
)


@st.composite
def objects(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    members = draw(st.lists(st.tuples(SPACE, strings(NAMES), SPACE, SPACE, values, SPACE), max_size=5))
    inner = ",".join(f"{a}{name}{b}:{c}{value}{d}" for a, name, b, c, value, d in members)
    return "{" + (inner or draw(SPACE)) + "}"


@st.composite
def arrays(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    elements = draw(st.lists(st.tuples(SPACE, values, SPACE), max_size=5))
    return "[" + (",".join(map("".join, elements)) or draw(SPACE)) + "]"


VALUES = st.recursive(NUMBERS | strings(TEXTS), lambda inner: objects(inner) | arrays(inner), max_leaves=25)
BODIES = st.builds(
    lambda head, value, tail: (head + value + tail).encode(), SPACE, objects(VALUES) | arrays(VALUES), SPACE
)
PATHS = st.lists(NAMES | st.integers(-3, 3), min_size=1, max_size=3).map(tuple)


def parse(body: bytes) -> Any:
    return json.loads(
        body,
        object_pairs_hook=lambda pairs: ("object", pairs),
        parse_float=lambda text: ("number", text),
        parse_int=lambda text: ("number", text),
        parse_constant=lambda text: ("number", text),
    )


def steps(node: Any, step: str | int) -> list[int]:
    if isinstance(node, tuple) and node[0] == "object" and isinstance(step, str):
        return [i for i, (name, _) in enumerate(node[1]) if name == step]
    if isinstance(node, list) and isinstance(step, int) and -len(node) <= step < len(node):
        return [step % len(node)]
    return []


def child(node: Any, index: int) -> Any:
    return node[index] if isinstance(node, list) else node[1][index][1]


def select(node: Any, path: tuple[str | int, ...]) -> list[Any]:
    nodes = [node]
    for step in path:
        nodes = [child(parent, index) for parent in nodes for index in steps(parent, step)]
    return nodes


def change(node: Any, path: tuple[str | int, ...], change_parent: Any) -> Any:
    """Rebuild the tree with every container at path[:-1] passed through change_parent."""
    if len(path) == 1:
        return change_parent(node, path[0])
    for index in steps(node, path[0]):
        new = change(child(node, index), path[1:], change_parent)
        if isinstance(node, list):
            node = [*node[:index], new, *node[index + 1 :]]
        else:
            pairs = node[1]
            node = ("object", [*pairs[:index], (pairs[index][0], new), *pairs[index + 1 :]])
    return node


def replaced(node: Any, step: str | int) -> Any:
    hits = steps(node, step)
    if isinstance(node, list):
        return ["NEW" if i in hits else value for i, value in enumerate(node)]
    if isinstance(node, tuple) and node[0] == "object":
        return "object", [(name, "NEW" if i in hits else value) for i, (name, value) in enumerate(node[1])]
    return node


def removed(node: Any, step: str | int) -> Any:
    hits = steps(node, step)
    if isinstance(node, list):
        return [value for i, value in enumerate(node) if i not in hits]
    if isinstance(node, tuple) and node[0] == "object":
        return "object", [pair for i, pair in enumerate(node[1]) if i not in hits]
    return node


def purged(node: Any, name: str) -> Any:
    if isinstance(node, list):
        return [purged(value, name) for value in node]
    if isinstance(node, tuple) and node[0] == "object":
        return "object", [(key, purged(value, name)) for key, value in node[1] if key != name]
    return node


def existing_path(body: bytes, data: st.DataObject) -> tuple[str | int, ...]:
    node, path = parse(body), []
    while True:
        if isinstance(node, list) and node:
            step: str | int = data.draw(st.integers(-len(node), len(node) - 1))
        elif isinstance(node, tuple) and node[0] == "object" and node[1]:
            step = data.draw(st.sampled_from([name for name, _ in node[1]]))
        else:
            break
        path.append(step)
        node = child(node, steps(node, step)[-1])
        if data.draw(st.booleans()):
            break
    assume(path)
    return tuple(path)


@given(BODIES, PATHS)
def test_look_up_agrees_with_the_reference_parser(body: bytes, path: tuple[str | int, ...]) -> None:
    spans = splice.find_all(body, path)
    assert [parse(body[start:end]) for start, end in spans] == select(parse(body), path)


@given(BODIES, st.data())
def test_find_takes_the_last_duplicate_at_every_level(body: bytes, data: st.DataObject) -> None:
    path = existing_path(body, data)
    node = parse(body)
    for step in path:
        node = child(node, steps(node, step)[-1])
    span = splice.find(body, path)
    assert span is not None
    assert parse(body[span.start : span.end]) == node


@given(BODIES, st.data())
def test_replace_changes_every_duplicate_and_no_other_byte(body: bytes, data: st.DataObject) -> None:
    path = existing_path(body, data)
    edited = splice.replace(body, path, b'"NEW"')
    assert parse(edited) == change(parse(body), path, replaced)
    rest = edited
    for start, end in reversed(splice.find_all(edited, path)):
        rest = rest[:start] + rest[end:]
    untouched = body
    for start, end in reversed(splice.find_all(body, path)):
        untouched = untouched[:start] + untouched[end:]
    assert rest == untouched


@given(BODIES, st.data())
def test_remove_leaves_valid_json_without_the_member(body: bytes, data: st.DataObject) -> None:
    path = existing_path(body, data)
    edited = splice.remove(body, path)
    assert parse(edited) == change(parse(body), path, removed)


@given(BODIES, NAMES)
def test_remove_everywhere_leaves_no_member_of_that_name(body: bytes, name: str) -> None:
    edited = splice.remove_everywhere(body, name)
    assert parse(edited) == purged(parse(body), name)
    if parse(edited) == parse(body):
        assert edited == body


@given(st.builds(str.encode, objects(VALUES)), SPACE, NAMES)
def test_insert_adds_one_member_at_the_end_and_keeps_every_byte(body: bytes, space: str, name: str) -> None:
    body += space.encode()
    edited = splice.insert(body, (), name, b"[1]")
    kind, pairs = parse(body)
    assert parse(edited) == (kind, [*pairs, (name, [("number", "1")])])
    assert edited == splice.append_member(body, name, b"[1]")
    member = splice.quote(name) + b":[1]"
    at = edited.rindex(member)
    assert edited[:at].removesuffix(b"," if pairs else b"") + edited[at + len(member) :] == body


@given(st.text(st.characters()))
def test_quote_is_read_back_as_the_same_text(text: str) -> None:
    assert json.loads(splice.quote(text)) == text


@pytest.mark.parametrize(
    ("body", "path", "expected"),
    [
        (b'{"a":1, "b":2, "c":3}', ("b",), b'{"a":1, "c":3}'),
        (b'{ "a":1, "b":2 }', ("a",), b'{ "b":2 }'),
        (b'{\n  "a": 1,\n  "b": 2\n}', ("b",), b'{\n  "a": 1\n}'),
        (b'{ "a":1 }', ("a",), b"{  }"),
        (b'{"a":1,"b":2,"a":3}', ("a",), b'{"b":2}'),
        (b'{"a":1,"a":2}', ("a",), b"{}"),
        (b'{"b":[1, 2, 3]}', ("b", -1), b'{"b":[1, 2]}'),
        (b'{"b":0}', ("a",), b'{"b":0}'),
    ],
)
def test_remove_takes_one_comma_and_the_white_space_of_the_member(
    body: bytes, path: tuple[str | int, ...], expected: bytes
) -> None:
    assert splice.remove(body, path) == expected
    if isinstance(path[-1], str):
        reread = json.loads(splice.remove_everywhere(body, path[-1]))
        assert reread == json.loads(expected)


def test_put_replaces_what_is_there_and_adds_what_is_not() -> None:
    body = b'{"stream_options": {"x":1 } }'
    assert splice.put(body, ("stream_options", "x"), b"2") == b'{"stream_options": {"x":2 } }'
    assert splice.put(body, ("stream_options", "y"), b"2") == b'{"stream_options": {"x":1,"y":2 } }'
    with pytest.raises(SpliceError):
        splice.put(body, ("absent", "y"), b"2")
    with pytest.raises(SpliceError):
        splice.put(body, (0,), b"2")


def test_edits_of_several_places_go_in_one_pass_and_must_not_overlap() -> None:
    body = b'{"a":1,"b":2}'
    edits = [(Span(11, 12), b"22"), (Span(5, 6), b"11")]
    assert splice.edit(body, edits) == b'{"a":11,"b":22}'
    assert splice.edit(body, []) is body
    with pytest.raises(SpliceError, match="overlap"):
        splice.edit(body, [(Span(0, 6), b""), (Span(5, 7), b"")])


def test_children_name_their_keys() -> None:
    body = b'{"mod\\u0065l":"x", "l":[1,2]}'
    found = list(splice.children(body, Span(0, len(body))))
    assert [splice.key_of(body, item) for item in found] == ["model", "l"]
    elements = list(splice.children(body, found[1].value))
    assert [body[item.value.start : item.value.end] for item in elements] == [b"1", b"2"]
    assert splice.key_of(body, elements[0]) == ""
    assert list(splice.children(body, elements[0].value)) == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  ",
        b"{",
        b'{"a"',
        b'{"a" 1}',
        b'{"a":}',
        b'{"a":1',
        b'{"a":1]',
        b'{"a":1,}',
        b'{"a":[1}',
        b'{"a":[1}}',
        b'{"a":"x}',
        b'{"a":1 "b":2}',
        b'{"a":1} x',
        b'{"a":1}}',
        b"{a:1}",
        b"[1,]",
        b"1 2",
        b'{"\\z":1}',
    ],
)
def test_malformed_json_on_the_way_is_reported_with_its_offset(body: bytes) -> None:
    with pytest.raises(SpliceError, match=r"offset \d+: expected"):
        splice.find_all(body, ("m",) if not body.startswith(b"[") else (0,))
    with pytest.raises(SpliceError, match=r"offset \d+: expected"):
        splice.replace(body, ("m",), b"1")


@pytest.mark.parametrize("body", [b'[{"a":1}', b'{"a":{"b":1]}', b'{"a":1,"b":"x}', b'{"a":1}]'])
def test_remove_everywhere_reports_brackets_that_do_not_match(body: bytes) -> None:
    with pytest.raises(SpliceError, match=r"offset \d+: expected"):
        splice.remove_everywhere(body, "a")


def test_absent_paths_are_refused_by_replace_and_insert() -> None:
    with pytest.raises(SpliceError, match="/a/0"):
        splice.replace(b'{"a":[]}', ("a", 0), b"1")
    with pytest.raises(SpliceError, match="object"):
        splice.insert(b'{"a":[]}', ("a",), "b", b"1")
    with pytest.raises(SpliceError, match="object"):
        splice.insert(b"{}", ("a",), "b", b"1")
    with pytest.raises(SpliceError, match="end of an object"):
        splice.append_member(b"[]", "b", b"1")


def test_a_byte_order_mark_and_lax_spellings_elsewhere_do_not_stop_an_edit() -> None:
    body = b'\xef\xbb\xbf{"x":[NaN,-Infinity,"\x01\xff\\ud800"],"model":"a"}'
    assert splice.replace(body, ("model",), b'"b"') == body.replace(b'"a"', b'"b"')


@pytest.mark.parametrize("depth", [100_000])
def test_deep_nesting_needs_no_recursion(depth: int) -> None:
    deep = b'{"d":' + b'[{"k":' * depth + b'"x"' + b"}]" * depth + b',"model":"a"}'
    assert splice.replace(deep, ("model",), b"1").endswith(b',"model":1}')
    assert splice.remove_everywhere(deep, "model").endswith(b"]}")
    assert splice.remove_everywhere(deep, "d") == b'{"model":"a"}'


class Counted(bytes):
    """Body bytes that count the searches made for a closing quote and how far they look."""

    looked = 0

    def find(self, *args: Any) -> int:
        found = super().find(*args)
        self.looked += (len(self) if found < 0 else found) - (args[1] if len(args) > 1 else 0)
        return found


@pytest.mark.parametrize(
    "unit",
    [
        b'{"role":"user","content":"' + b"w" * 600 + b'"}',
        b'[["' + b"w" * 600 + b'"]]',
        b'"' + b"w" * 600 + b'"',
    ],
)
def test_work_grows_linearly_with_the_body(unit: bytes) -> None:
    looked = []
    for count in (200, 400):
        body = Counted(b'{"m":[' + b",".join([unit] * count) + b'],"model":"a"}')
        assert splice.find(body, ("model",)) is not None
        looked.append(body.looked)
    assert looked[0] > 200 * 200
    assert looked[1] <= looked[0] * 2.1
