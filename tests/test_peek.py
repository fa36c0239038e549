"""The early look agrees with a full parse, and never refuses what a lenient parser accepts."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.peek import PeekError, RequestPeek, peek_multipart, peek_request, replace_form_field

BOUNDARY = b"X-bound"
FORM = b'multipart/form-data; boundary="X-bound"'


def test_ordinary_request_is_read_in_full() -> None:
    body = (
        b'{"model":"gpt-5","messages":[{"role":"user","content":"hi"}],"stream":true,'
        b'"stream_options":{"include_usage": false},"user":"u","safety_identifier":"s",'
        b'"metadata":{"user_id":"m","x":[1]},"max_completion_tokens":7,"max_tokens":9}'
    )
    peek = peek_request(body)
    assert (peek.model, peek.stream, peek.user, peek.safety_identifier) == ("gpt-5", True, "u", "s")
    assert (peek.stream_options, peek.include_usage) == (b'{"include_usage": false}', False)
    assert (peek.metadata_user_id, peek.max_tokens, peek.wrong_types) == ("m", 7, ())


@pytest.mark.parametrize("body", [b"{}", b'{"model":null,"stream":null,"stream_options":null,"metadata":null}'])
def test_absent_and_null_members_are_none(body: bytes) -> None:
    peek = peek_request(body)
    assert (peek.model, peek.stream, peek.stream_options, peek.include_usage) == (None, False, None, None)
    assert (peek.metadata_user_id, peek.max_tokens, peek.wrong_types) == (None, None, ())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("{}", None),
        ('{"include_usage":true}', True),
        ('{"include_usage":null}', None),
        ('{"include_usage":1}', None),
        ("[]", None),
        ("5", None),
        ('{"include_usage":true,"x":NaN}', True),
        ('{"include_usage":0,"x":NaN}', None),
    ],
)
def test_include_usage_has_three_states(options: str, expected: bool | None) -> None:
    assert peek_request(f'{{"stream_options":{options}}}'.encode()).include_usage is expected


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_token_bound_is_read_under_each_of_its_names(name: str) -> None:
    assert peek_request(b'{"%s":42}' % name.encode()).max_tokens == 42


def test_wrong_types_are_flagged_and_the_rest_is_read() -> None:
    peek = peek_request(b'{"model":5,"stream":"yes","user":"u","max_tokens":"1","metadata":{"user_id":1}}')
    assert (peek.model, peek.stream, peek.user, peek.max_tokens) == (None, False, "u", None)
    assert peek.wrong_types == ("model", "stream", "max_tokens")
    assert peek.metadata_user_id is None


@pytest.mark.parametrize("metadata", [b"5", b"[]", b'"x"', b'{"user_id":"\\ud800"}', b"{}"])
def test_odd_metadata_has_no_user(metadata: bytes) -> None:
    assert peek_request(b'{"metadata":' + metadata + b"}").metadata_user_id is None


@pytest.mark.parametrize(
    "unknown",
    [
        b"NaN",
        b"-Infinity",
        b"1" * 10000,
        b"1E400",
        b'"\\ud800"',
        b'"\xff"',
        b'"\x01"',
        b'{"a":1,"a":2}',
        b"[" * 50000 + b"]" * 50000,
        b'{"model":"inner"}',
    ],
    ids=lambda value: value[:12].decode("latin-1"),
)
def test_odd_unknown_members_never_make_it_refuse(unknown: bytes) -> None:
    for body in (
        b'{"x":' + unknown + b',"model":"a","stream":true}',
        b'{"model":"a","stream":true,"x":' + unknown + b"}",
        b'\xef\xbb\xbf{"model":"a","stream":true,"x":' + unknown + b"}\n",
    ):
        peek = peek_request(body)
        assert (peek.model, peek.stream, peek.wrong_types) == ("a", True, ())


def test_lone_surrogates_in_known_members_count_as_wrong_types() -> None:
    peek = peek_request(b'{"model":"\\ud800","user":"tab\there","\\ud801":1}')
    assert (peek.model, peek.user, peek.wrong_types) == (None, "tab\there", ("model",))


@pytest.mark.parametrize("extra", [b"", b',"x":NaN'])
def test_last_duplicate_wins_on_both_routes(extra: bytes) -> None:
    peek = peek_request(b'{"model":"a","stream":true,"mod\\u0065l":"b","stream":false' + extra + b"}")
    assert (peek.model, peek.stream) == ("b", False)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"model":"a"',
        b'{"model":"a"} x',
        b"{'model':1}",
        b'{"a":[1 2]}',
        b'{"a":01}',
        b'{"model":5,"x":nope nope}',
        b'{"\\q":1}',
    ],
)
def test_what_is_not_json_is_refused_with_a_place(body: bytes) -> None:
    with pytest.raises(PeekError, match=r"not valid JSON: (offset|character) \d+"):
        peek_request(body)


@pytest.mark.parametrize("body", [b"[]", b' "x"', b"5", b"null", b"[NaN]", b"model=a", b"\xff\xfe{\x00}\x00"])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(PeekError, match=r"expected a JSON object at offset \d"):
        peek_request(body)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["model", "stream", "user", "max_tokens", "metadata", "x"]) | st.text(max_size=3)


@given(st.dictionaries(NAMES, VALUES, max_size=6), st.booleans())
def test_every_object_python_can_write_is_read_as_python_reads_it(tree: dict[str, Any], ascii_only: bool) -> None:
    text = json.dumps(tree, ensure_ascii=ascii_only)
    peek = peek_request(text.encode("utf-8", "surrogatepass"))
    assert peek.stream is (tree.get("stream") is True)
    if peek.model is not None:
        assert peek.model == tree["model"]
    elif isinstance(tree.get("model"), str):
        assert "model" in peek.wrong_types
    assert isinstance(peek, RequestPeek)


def form(*parts: tuple[bytes, bytes]) -> bytes:
    lines = b"".join(b"--X-bound\r\n%s\r\n\r\n%s\r\n" % part for part in parts)
    return lines + b"--X-bound--\r\n"


def field(name: bytes, extra: bytes = b"") -> bytes:
    return b'Content-Disposition: form-data; name="%s"%s' % (name, extra)


def test_form_fields_are_read_around_files() -> None:
    fake = b'\r\n--X-boundary\r\nContent-Disposition: form-data; name="model"\r\n\r\nevil'
    body = b"preamble\r\n" + form(
        (
            field(b"file", b'; filename="a.wav"') + b"\r\nContent-Type: audio/wav",
            b"\x00\xff\r\n\r\n" * 1000 + fake,
        ),
        (field(b"model"), b"whisper-1"),
        (b"content-disposition:form-data;name=stream", b"True"),
        (field(b"user"), "é".encode()),
        (field(b"model", b'; filename="model"'), b"not-this"),
        (b"X-Other: 1", b"nameless"),
    )
    peek = peek_multipart(body, FORM)
    assert (peek.model, peek.stream, peek.user, peek.wrong_types) == ("whisper-1", True, "é", ())


def test_last_form_field_of_a_name_wins_and_odd_streams_are_flagged() -> None:
    body = form((field(b"model"), b"a"), (field(b"model"), b"b"), (field(b"stream"), b"maybe"))
    peek = peek_multipart(body, b"Multipart/Form-Data;boundary=X-bound")
    assert (peek.model, peek.stream, peek.wrong_types) == ("b", False, ("stream",))


def test_long_fields_and_cut_forms_are_not_read() -> None:
    body = form((field(b"model"), b"x" * 70_000), (field(b"user"), b"u"))
    peek = peek_multipart(body, FORM)
    assert (peek.model, peek.user) == (None, "u")
    assert peek_multipart(b"--X-bound\r\n" + field(b"model") + b"\r\n\r\nabc", FORM).model is None


@pytest.mark.parametrize("content_type", [b"multipart/form-data", b"application/json; boundary=X-bound", b""])
def test_form_without_a_boundary_is_refused(content_type: bytes) -> None:
    with pytest.raises(PeekError, match="boundary"):
        peek_multipart(form(), content_type)


def test_form_that_lacks_its_boundary_is_refused() -> None:
    with pytest.raises(PeekError, match="boundary"):
        peek_multipart(b"--Other\r\n", FORM)


def test_form_fields_are_replaced_and_no_other_byte() -> None:
    body = form((field(b"model"), b"a"), (field(b"f", b"; filename=x"), b"\x00model"), (field(b"model"), b""))
    edited = replace_form_field(body, FORM, "model", b"longer")
    assert edited == form(
        (field(b"model"), b"longer"),
        (field(b"f", b"; filename=x"), b"\x00model"),
        (field(b"model"), b"longer"),
    )
    with pytest.raises(PeekError, match="absent"):
        replace_form_field(body, FORM, "absent", b"x")
    with pytest.raises(PeekError, match="boundary"):
        replace_form_field(body, FORM, "model", b"\r\n--X-bound--")
