"""What no client may do to the gateway over a raw connection, and how it is told."""

from __future__ import annotations

import anyio.lowlevel
import pytest

from abused_gateway import BODY, CHAT, CHUNKED, SMUGGLED, abused, assert_envelope, head, refused, send
from penstock.testing import FakeUpstream, Pause, http_reply

pytestmark = pytest.mark.anyio

# --- heads ----------------------------------------------------------------------------------------------------

BAD_LINES = {
    "length_and_coding": (400, [b"Content-Length: 4", CHUNKED]),
    "coding_and_length": (400, [CHUNKED, b"Content-Length: 4"]),
    "length_and_unknown_coding": (400, [b"Content-Length: 4", b"Transfer-Encoding: xchunked"]),
    "zero_length_and_coding": (400, [b"Content-Length: 0", CHUNKED]),
    "coding_xchunked": (501, [b"Transfer-Encoding: xchunked"]),
    "coding_list_with_identity": (501, [b"Transfer-Encoding: chunked, identity"]),
    "coding_identity": (501, [b"Transfer-Encoding: identity"]),
    "coding_gzip_chunked": (501, [b"Transfer-Encoding: gzip, chunked"]),
    "coding_twice_in_one_line": (501, [b"Transfer-Encoding: chunked, chunked"]),
    "coding_quoted": (501, [b'Transfer-Encoding: "chunked"']),
    "coding_with_parameter": (501, [b"Transfer-Encoding: chunked;a=b"]),
    "coding_empty": (501, [b"Transfer-Encoding:"]),
    "coding_behind_vertical_tab": (400, [b"Transfer-Encoding:\x0bchunked"]),
    "coding_before_vertical_tab": (400, [b"Transfer-Encoding: chunked\x0b"]),
    "coding_twice": (400, [CHUNKED, CHUNKED]),
    "coding_twice_second_unknown": (400, [CHUNKED, b"Transfer-encoding: cow"]),
    "coding_folded": (400, [b"Transfer-Encoding:\r\n chunked"]),
    "coding_folded_with_tab": (400, [b"Transfer-Encoding: chunked\r\n\t, identity"]),
    "coding_space_before_colon": (400, [b"Transfer-Encoding : chunked"]),
    "coding_tab_before_colon": (400, [b"Transfer-Encoding\t: chunked"]),
    "coding_name_behind_space": (400, [b" Transfer-Encoding: chunked"]),
    "coding_bare_cr_inside": (400, [b"X-A: b\rTransfer-Encoding: chunked"]),
    "length_twice_equal": (400, [b"Content-Length: 4", b"Content-Length: 4"]),
    "length_twice_different": (400, [b"Content-Length: 4", b"content-length: 5"]),
    "length_list_equal": (400, [b"Content-Length: 4, 4"]),
    "length_list_different": (400, [b"Content-Length: 4, 5"]),
    "length_plus": (400, [b"Content-Length: +4"]),
    "length_minus": (400, [b"Content-Length: -4"]),
    "length_hexadecimal": (400, [b"Content-Length: 0x4"]),
    "length_underscore": (400, [b"Content-Length: 1_0"]),
    "length_inner_space": (400, [b"Content-Length: 1 0"]),
    "length_empty": (400, [b"Content-Length:"]),
    "length_fraction": (400, [b"Content-Length: 4.0"]),
    "length_17_digits": (400, [b"Content-Length: 00000000000000004"]),
    "length_other_digits": (400, ["Content-Length: ٤".encode()]),
    "folded_line": (400, [b"X-A: b", b" c"]),
    "nul_in_value": (400, [b"X-A: b\x00c"]),
    "nul_in_name": (400, [b"X\x00A: b"]),
    "control_byte_in_value": (400, [b"X-A: b\x01c"]),
    "escape_in_value": (400, [b"X-A: \x1b[31m"]),
    "delete_in_value": (400, [b"X-A: \x7f"]),
    "space_before_colon": (400, [b"X-A : b"]),
    "no_colon": (400, [b"X-A"]),
    "empty_name": (400, [b": b"]),
    "name_with_space": (400, [b"X A: b"]),
    "name_with_bracket": (400, [b"X[A]: b"]),
    "bare_lf_between_lines": (400, [b"X-A: b\nX-B: c"]),
    "other_expectation": (417, [b"Expect: 200-ok", b"Content-Length: 4"]),
    "two_expectations": (417, [b"Expect: 100-continue", b"Expect: 100-continue", b"Content-Length: 4"]),
    "second_host": (400, [b"Host: other.test"]),
    "second_equal_host": (400, [b"host: gateway.test"]),
}


@pytest.mark.parametrize(("status", "lines"), BAD_LINES.values(), ids=BAD_LINES)
async def test_bad_field_is_refused_and_nothing_goes_upstream(status: int, lines: list[bytes]) -> None:
    upstream = FakeUpstream()
    async with abused(upstream) as gateway:
        client = await send(gateway, head(gateway, *lines) + b"0\r\n\r\n" + SMUGGLED)
        await refused(client, status, "bad_request")
        assert upstream.connection_count == 0
        assert gateway.settled == 0


BAD_STARTS = {
    "absolute_form": (400, b"GET http://gateway.test/v1/models HTTP/1.1"),
    "absolute_form_elsewhere": (400, b"POST https://evil.test/v1/chat/completions HTTP/1.1"),
    "userinfo": (400, b"GET http://me:secret@gateway.test/v1/models HTTP/1.1"),
    "authority_form": (400, b"GET gateway.test:80 HTTP/1.1"),
    "connect": (501, b"CONNECT api.openai.com:443 HTTP/1.1"),
    "connect_to_path": (501, b"CONNECT /v1/models HTTP/1.1"),
    "trace": (501, b"TRACE /v1/models HTTP/1.1"),
    "asterisk_without_options": (400, b"GET * HTTP/1.1"),
    "fragment": (400, b"GET /v1/models#a HTTP/1.1"),
    "relative_path": (400, b"GET v1/models HTTP/1.1"),
    "space_in_path": (400, b"GET /v1/ models HTTP/1.1"),
    "two_spaces": (400, b"GET  /v1/models HTTP/1.1"),
    "tabs": (400, b"GET\t/v1/models\tHTTP/1.1"),
    "high_byte_in_path": (400, b"GET /v1/\xe9 HTTP/1.1"),
    "nul_in_path": (400, b"GET /v1/\x00 HTTP/1.1"),
    "lower_case_version": (400, b"GET /v1/models http/1.1"),
    "version_1.2": (505, b"GET /v1/models HTTP/1.2"),
    "version_2": (505, b"GET /v1/models HTTP/2"),
    "version_0.9": (505, b"GET /v1/models HTTP/0.9"),
    "http_0.9": (400, b"GET /v1/models"),
    "method_with_bracket": (400, b"GE[T /v1/models HTTP/1.1"),
    "leading_space": (400, b" GET /v1/models HTTP/1.1"),
    "reply": (400, b"HTTP/1.1 200 OK"),
}


@pytest.mark.parametrize(("status", "start"), BAD_STARTS.values(), ids=BAD_STARTS)
async def test_bad_request_line_is_refused_and_nothing_goes_upstream(status: int, start: bytes) -> None:
    upstream = FakeUpstream()
    async with abused(upstream) as gateway:
        client = await send(gateway, head(gateway, start=start) + SMUGGLED)
        await refused(client, status, "bad_request")
        assert upstream.connection_count == 0


@pytest.mark.parametrize(
    "host",
    [
        b"",
        b"\r\nHost: a\r\nHost: b",
        b"\r\nHost: a b",
        b"\r\nHost: a/b",
        b"\r\nHost: me@a",
        b"\r\nHost: a, b",
        b"\r\nHost: a:b",
        b"\r\nHost: http://a",
        b"\r\nHost: [::1",
        b"\r\nHost: a?b",
    ],
)
async def test_missing_doubled_or_odd_host_is_refused(host: bytes) -> None:
    upstream = FakeUpstream()
    async with abused(upstream) as gateway:
        client = await send(gateway, b"GET /v1/models HTTP/1.1" + host + b"\r\n\r\n")
        await refused(client, 400, "bad_request")
        assert upstream.connection_count == 0


async def test_http2_preface_is_told_which_version_is_spoken() -> None:
    async with abused() as gateway:
        client = await send(gateway, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        await refused(client, 505, "bad_request")


async def test_http09_line_is_refused_at_its_line_feed() -> None:
    async with abused() as gateway:
        await refused(await send(gateway, b"GET /v1/models\n"), 400, "bad_request")


async def test_bare_line_feeds_are_refused_when_the_head_is_whole() -> None:
    upstream = FakeUpstream()
    async with abused(upstream) as gateway:
        data = head(gateway, b"Content-Length: 0").replace(b"\r\n", b"\n")
        await refused(await send(gateway, data), 400, "bad_request")
        assert upstream.connection_count == 0


@pytest.mark.parametrize("socket", [False, True], ids=["memory", "socket"])
async def test_bare_line_feed_is_refused_byte_by_byte_before_the_head_ends(socket: bool) -> None:
    async with abused(socket=socket) as gateway:
        data = b"GET /v1/models HTTP/1.1\r\nHost: a\n"
        client = await send(gateway, *[data[i : i + 1] for i in range(len(data))])
        await refused(client, 400, "bad_request")


async def test_dribbled_head_is_read_as_a_whole_one() -> None:
    upstream = FakeUpstream([[http_reply(b"1")]])
    async with abused(upstream, socket=False) as gateway:
        data = gateway.request_bytes("POST", CHAT, body=BODY)
        client = await send(gateway, *[data[i : i + 1] for i in range(len(data))])
        assert (await client.receive_reply()).body == b"1"
        assert upstream.requests[0].body == BODY


async def test_coding_behind_a_tab_is_chunked() -> None:
    upstream = FakeUpstream([[http_reply()]])
    async with abused(upstream) as gateway:
        data = head(gateway, b"Transfer-Encoding:\tchunked \t") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
        assert (await (await send(gateway, data)).receive_reply()).status == 200
        assert upstream.requests[0].body == BODY


# --- chunks ---------------------------------------------------------------------------------------------------

BAD_CHUNKS = {
    "extension": b"4;a=b\r\nabcd\r\n0\r\n\r\n",
    "extension_without_value": b"4;a\r\nabcd\r\n0\r\n\r\n",
    "extension_with_line_feed": b"4;\n\r\nabcd\r\n0\r\n\r\n",
    "extension_on_last_chunk": b"4\r\nabcd\r\n0;a\r\n\r\n",
    "size_0x": b"0x4\r\nabcd\r\n0\r\n\r\n",
    "size_plus": b"+4\r\nabcd\r\n0\r\n\r\n",
    "size_minus": b"-4\r\nabcd\r\n0\r\n\r\n",
    "size_underscore": b"0_4\r\nabcd\r\n0\r\n\r\n",
    "size_leading_space": b" 4\r\nabcd\r\n0\r\n\r\n",
    "size_trailing_space": b"4 \r\nabcd\r\n0\r\n\r\n",
    "size_trailing_tab": b"4\t\r\nabcd\r\n0\r\n\r\n",
    "size_17_digits": b"00000000000000004\r\nabcd\r\n0\r\n\r\n",
    "size_overflowing": b"fffffffffffffffff\r\nabcd",
    "size_empty": b"\r\nabcd\r\n0\r\n\r\n",
    "size_not_hexadecimal": b"g\r\nabcd\r\n0\r\n\r\n",
    "size_nul": b"4\x00\r\nabcd\r\n0\r\n\r\n",
    "size_line_ends_in_bare_lf": b"4\nabcd\r\n0\r\n\r\n",
    "size_line_ends_in_bare_cr": b"4\rabcd\r\n0\r\n\r\n",
    "no_line_end_after_chunk": b"4\r\nabcd0\r\n\r\n",
    "bare_lf_after_chunk": b"4\r\nabcd\n0\r\n\r\n",
    "chunk_longer_than_its_size": b"4\r\nabcdef\r\n0\r\n\r\n",
    "last_chunk_line_ends_in_bare_lf": b"4\r\nabcd\r\n0\n\n",
    "trailer_without_colon": b"0\r\nabc\r\n\r\n",
    "trailer_space_before_colon": b"0\r\nX-A : b\r\n\r\n",
    "trailer_folded": b"0\r\nX-A: b\r\n c\r\n\r\n",
    "trailer_bare_lf": b"0\r\nX-A: b\n\r\n",
    "trailer_control_byte": b"0\r\nX-A: \x00\r\n\r\n",
    "trailer_with_length": b"0\r\nContent-Length: 5\r\n\r\n",
    "trailer_with_coding": b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "trailer_with_credential": b"0\r\nAuthorization: Bearer x\r\n\r\n",
    "trailers_without_end": b"0\r\n" + b"X-A: b\r\n" * 2000,
}


@pytest.mark.parametrize("body", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
async def test_bad_chunk_is_refused_and_nothing_goes_upstream(body: bytes) -> None:
    upstream = FakeUpstream()
    async with abused(upstream) as gateway:
        client = await send(gateway, head(gateway, CHUNKED) + body + SMUGGLED)
        await refused(client, 400, "bad_request")
        assert upstream.connection_count == 0
        assert gateway.settled == 0


@pytest.mark.parametrize("body", [b"4;", b"x", b"4\r\nabcdX", b"0\r\n:"])
async def test_bad_chunk_is_refused_before_its_line_ends(body: bytes) -> None:
    async with abused() as gateway:
        await refused(await send(gateway, head(gateway, CHUNKED), body), 400, "bad_request")


async def test_bad_body_is_refused_in_the_shape_of_its_endpoint() -> None:
    async with abused() as gateway:
        start = b"POST /v1/messages HTTP/1.1"
        client = await send(gateway, head(gateway, CHUNKED, start=start) + b"x\r\n")
        reply = await client.receive_reply()
        assert reply.json()["type"] == "error"
        assert reply.json()["error"]["code"] == "bad_request"


async def test_harmless_trailers_end_a_body() -> None:
    upstream = FakeUpstream([[http_reply()]])
    async with abused(upstream) as gateway:
        body = b"%x\r\n%b\r\n0\r\nX-Sum: 1\r\n\r\n" % (len(BODY), BODY)
        assert (await (await send(gateway, head(gateway, CHUNKED) + body)).receive_reply()).status == 200
        assert upstream.requests[0].body == BODY
        assert upstream.requests[0].headers.get(b"x-sum") is None


# --- sizes ----------------------------------------------------------------------------------------------------


async def test_head_without_end_is_refused_at_the_limit() -> None:
    async with abused() as gateway:
        client = await send(gateway, b"GET / HTTP/1.1\r\nX-A: " + b"a" * 70_000)
        await refused(client, 431, "bad_request")


async def test_head_is_read_up_to_exactly_the_limit() -> None:
    upstream = FakeUpstream([[http_reply()]])
    async with abused(upstream, max_head_bytes=1024) as gateway:
        length = b"Content-Length: %d" % len(BODY)
        room = 1024 - len(head(gateway, length, b"X-A: "))
        fitting = head(gateway, length, b"X-A: " + b"a" * room)
        assert len(fitting) == 1024
        assert (await (await send(gateway, fitting + BODY)).receive_reply()).status == 200
        longer = head(gateway, length, b"X-A: " + b"a" * (room + 1))
        await refused(await send(gateway, longer + BODY), 431, "bad_request")
        assert len(upstream.requests) == 1


async def test_huge_field_in_small_pieces_is_never_held_beyond_the_limit() -> None:
    async with abused(socket=False, max_head_bytes=4096) as gateway:
        client = await send(gateway, b"GET / HTTP/1.1\r\nX-A: ")
        (connection,) = gateway.gateway.server.connections
        while not client.received:
            await client.send(b"a" * 100)
            assert len(connection._buffer) <= 4096
        await refused(client, 431, "bad_request", b"GET")


async def test_100_000_fields_are_refused_and_not_kept() -> None:
    async with abused() as gateway:
        client = await send(gateway, b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 100_000 + b"\r\n")
        await refused(client, 431, "bad_request", b"GET")


async def test_many_fields_within_the_limit_are_read() -> None:
    async with abused() as gateway:
        client = await send(gateway, b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 10_000 + b"\r\n")
        assert (await client.receive_reply(b"GET")).status == 200


# --- routes ---------------------------------------------------------------------------------------------------


async def test_head_on_an_endpoint_is_refused_without_a_body() -> None:
    async with abused() as gateway:
        client = await send(gateway, head(gateway, start=b"HEAD /v1/models HTTP/1.1"))
        reply = await client.receive_reply(b"HEAD")
        assert (reply.status, reply.header("allow"), reply.body) == (405, "GET", b"")
        assert reply.header("X-Penstock-Error") == "method_not_allowed"
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.receive_reply(b"GET")).body == b"penstock\n"


async def test_unknown_path_is_answered_with_the_endpoints_in_openais_shape() -> None:
    async with abused() as gateway:
        reply = await gateway.request("POST", "/v1/nothing", body=BODY)
        assert reply.status == 404
        assert_envelope(reply, "not_found")
        assert "/v1/chat/completions" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "headers"), [("/v1/messages/batches", {}), ("/v1/nothing", {"anthropic-version": "2023-06-01"})]
)
async def test_unknown_path_is_answered_in_anthropics_shape(path: str, headers: dict[str, str]) -> None:
    async with abused() as gateway:
        reply = await gateway.request("POST", path, headers, BODY)
        envelope = reply.json()
        assert (reply.status, envelope["type"]) == (404, "error")
        assert (envelope["error"]["type"], envelope["error"]["code"]) == ("not_found_error", "not_found")
        assert "/v1/messages" in envelope["error"]["message"]
        assert envelope["request_id"] == reply.header("request-id")


@pytest.mark.parametrize(("path", "headers"), [("/v1beta", {}), ("/v1/nothing", {"x-goog-api-key": "k"})])
async def test_unknown_path_is_answered_in_geminis_shape(path: str, headers: dict[str, str]) -> None:
    async with abused() as gateway:
        reply = await gateway.request("POST", path, headers, BODY)
        error = reply.json()["error"]
        assert (reply.status, error["code"]) == (404, 404)
        assert error["details"][0]["reason"] == "not_found"
        assert "/v1beta/" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/messages", "POST"),
        ("POST", "/v1/models", "GET"),
        ("POST", "/v1/responses/resp_1", "GET, DELETE"),
        ("OPTIONS", "/v1/embeddings", "POST"),
        ("OPTIONS", "/v1beta/models/g:generateContent", "GET, POST, PUT, PATCH, DELETE"),
    ],
)
async def test_wrong_method_is_refused_with_those_allowed(method: str, path: str, allowed: str) -> None:
    upstream = FakeUpstream()
    async with abused(upstream) as gateway:
        reply = await gateway.request(method, path)
        assert (reply.status, reply.header("allow")) == (405, allowed)
        assert reply.header("X-Penstock-Error") == "method_not_allowed"
        assert reply.json()["error"]["message"]
        assert upstream.connection_count == 0


async def test_websocket_upgrade_is_refused_with_426() -> None:
    async with abused() as gateway:
        upgrade = (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13")
        client = await send(gateway, head(gateway, *upgrade, start=b"GET /v1/responses HTTP/1.1"))
        reply = await client.receive_reply(b"GET")
        assert (reply.status, reply.header("X-Penstock-Error")) == (426, "websocket_unavailable")
        assert_envelope(reply, "websocket_unavailable")


async def test_key_is_asked_for_before_anything_goes_upstream() -> None:
    upstream = FakeUpstream()
    async with abused(upstream) as gateway:
        client = await send(gateway, b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}")
        reply = await client.receive_reply()
        assert reply.status == 401
        assert_envelope(reply, "invalid_api_key")
        assert upstream.connection_count == 0


async def test_fields_that_connection_names_stay_here() -> None:
    upstream = FakeUpstream([[http_reply()]])
    async with abused(upstream) as gateway:
        lines = (b"Connection: keep-alive, X-Inner", b"X-Inner: 1", b"X-Outer: 2", b"Content-Length: %d" % len(BODY))
        assert (await (await send(gateway, head(gateway, *lines) + BODY)).receive_reply()).status == 200
        sent = upstream.requests[0].headers
        assert sent.get(b"x-inner") is None
        assert sent.get(b"x-outer") == b"2"


async def test_noise_does_not_disturb_the_others() -> None:
    pause = Pause()
    async with abused(FakeUpstream([[pause, http_reply(b"1")]])) as gateway:
        client = await send(gateway, gateway.request_bytes("POST", CHAT, body=BODY))
        await pause.reached.wait()
        for noise in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n", b"\x00" * 100_000, b"\r\n\r\n", b"\n"):
            await refused(await send(gateway, noise), 431 if len(noise) > 65536 else 400, "bad_request")
        pause.release()
        assert (await client.receive_reply()).body == b"1"
        await anyio.lowlevel.checkpoint()
        assert gateway.faults == []
