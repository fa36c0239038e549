"""What of a client's request goes upstream: header lines, query, body, trace, credential; to the byte."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from typing import Any

import brotli
import pytest
import zstandard

from penstock import (
    Candidate,
    ConfigurationError,
    ProviderBinding,
    Secret,
    address_of,
    bearer,
    forward,
    header_fields,
    new_key,
)
from penstock.gateway import Gateway
from penstock.inspection import INSPECTION_LIMIT
from penstock.testing import FakeUpstream, Harness, RecordedRequest, Reply, Sample, http_reply, sample_exchange
from penstock.testing.harness import PEPPER

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
BODY = b'{ "model" : "m" , "n":1.0, "messages":[{"content":"Gr\xc3\xbc\\u00dfe"}]}'
Pairs = list[tuple[bytes, bytes]]


def gateway(
    namespace: str = "penstock", key: Mapping[str, Any] | None = None, credential: str | None = "sk-up", **binding: Any
) -> Harness:
    upstream = FakeUpstream([[http_reply(b'{"id":"x"}')]], repeat=True)
    table = {"name": "up", "type": "openai_compatible", "base_url": upstream.base_url, **binding}
    if credential is not None:
        table["credential"] = credential
    secret = new_key(namespace)
    config: dict[str, Any] = {
        "routing": {"bindings": [table]},
        "virtual_keys": {"pepper": PEPPER, "keys": [{"name": "k", "secret": secret, **(key or {})}]},
    }
    harness = Harness(["openai", "openai_compatible", "anthropic", "mock"], config, upstream,
                      gateway={"namespace": namespace})  # fmt: skip
    harness.key = secret
    return harness


async def sent(harness: Harness, fields: Pairs | None = None, path: str = CHAT, body: bytes = BODY) -> RecordedRequest:
    """Return what a request becomes upstream."""
    reply = await harness.request("POST", path, [*(fields or [])], body)
    assert reply.status == 200, reply.body
    return harness.upstreams[0].requests[-1]


def lines(request: RecordedRequest) -> list[bytes]:
    return request.head.split(b"\r\n")[:-2]


def names(request: RecordedRequest) -> list[bytes]:
    return [name.lower() for name, _ in request.headers]


# --- header lines ---------------------------------------------------------------------------------------------------


async def test_ordinary_request_goes_upstream_line_by_line() -> None:
    async with gateway(extra_headers={"X-Tenant": "blue"}) as harness:
        request = await sent(harness, [(b"USER-agent", b"t/1"), (b"Accept", b"*/*"), (b"Accept-Encoding", b"gzip")])
        assert lines(request) == [
            b"POST /v1/chat/completions HTTP/1.1",
            b"host: " + harness.upstreams[0].host.encode(),
            b"Content-Type: application/json",
            b"USER-agent: t/1",
            b"Accept: */*",
            b"accept-encoding: gzip",
            b"authorization: Bearer sk-up",
            b"X-Tenant: blue",
            b"content-length: %d" % len(BODY),
        ]
        assert request.body == BODY


PASSES = [
    (b"anthropic-beta", b"made-up-2031-01-01, other"),
    (b"Anthropic-Beta", b"second-line"),
    (b"openai-beta", b"assistants=v9"),
    (b"OpenAI-Organization", b"org-1"),
    (b"x-stainless-lang", b"python"),
    (b"X-VENDOR-thing", b"caf\xc3\xa9"),
    (b"idempotency-key", b"abc"),
    (b"x-api-version", b"7"),
    (b"Via", b"1.1 proxy"),
    (b"X-Penstockish", b"near"),
    (b"X-Empty", b""),
]


async def test_everything_unknown_passes_in_order_and_spelling() -> None:
    async with gateway() as harness:
        request = await sent(harness, PASSES)
        kept = [b"%b: %b" % field for field in PASSES]
        assert [line for line in lines(request) if line in kept] == kept


STAYS: Pairs = [
    (b"x-api-key", b"no"),
    (b"Api-Key", b"no"),
    (b"X-GOOG-API-KEY", b"no"),
    (b"Cookie", b"session=1"),
    (b"Forwarded", b"for=192.0.2.1"),
    (b"X-Forwarded-For", b"192.0.2.1"),
    (b"x-forwarded-anything", b"1"),
    (b"X-Penstock-Metadata", b"{}"),
    (b"x-penstock-cache", b"respect"),
    (b"traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"),
    (b"tracestate", b"v=1"),
    (b"baggage", b"user=secret"),
    (b"Keep-Alive", b"timeout=5"),
    (b"Proxy-Connection", b"keep-alive"),
    (b"Proxy-Authorization", b"Basic x"),
    (b"TE", b"trailers"),
    (b"Trailer", b"x-sum"),
]


@pytest.mark.parametrize("field", STAYS, ids=[name.decode() for name, _ in STAYS])
async def test_field_stays_here(field: tuple[bytes, bytes]) -> None:
    async with gateway() as harness:
        fields = [(b"Authorization", b"Bearer " + harness.key.encode()), field, (b"X-Last", b"1")]
        request = await sent(harness, fields)
        assert field[0].lower() not in names(request)
        assert lines(request)[-3:-2] == [b"X-Last: 1"]
        assert harness.key.encode() not in request.raw


async def test_fields_named_by_connection_stay_here() -> None:
    async with gateway() as harness:
        fields = [(b"Connection", b"X-One, x-TWO , keep-alive"), (b"x-one", b"1"), (b"X-Two", b"2"), (b"x-three", b"3")]
        request = await sent(harness, fields)
        assert {b"x-one", b"x-two", b"connection"}.isdisjoint(names(request))
        assert b"x-three" in names(request)


async def test_upgrade_is_not_passed_on() -> None:
    async with gateway() as harness:
        request = await sent(harness, [(b"Connection", b"Upgrade"), (b"Upgrade", b"h2c"), (b"x-three", b"3")])
        assert {b"upgrade", b"connection"}.isdisjoint(names(request))


async def test_chunked_request_is_sent_with_its_length() -> None:
    async with gateway() as harness:
        chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
        client = await harness.raw()
        head = harness.request_bytes("POST", CHAT, [(b"Transfer-Encoding", b"chunked")])
        await client.send(head.replace(b"Content-Length: 0\r\n", b"") + chunks)
        assert (await client.receive_reply()).status == 200
        request = harness.upstreams[0].requests[0]
        assert request.body == BODY
        assert b"transfer-encoding" not in names(request)
        assert request.headers.get_all(b"content-length") == [b"%d" % len(BODY)]


ENCODINGS = [
    (b"gzip, deflate, br, zstd", b"gzip, deflate, br, zstd"),
    (b"gzip;q=0.5, dcb, br;q=1", b"gzip;q=0.5, br;q=1"),
    (b"*", b"identity"),
    (b"compress", b"identity"),
]


@pytest.mark.parametrize(("offered", "asked"), ENCODINGS)
async def test_accept_encoding_is_cut_down_to_what_can_be_read(offered: bytes, asked: bytes) -> None:
    async with gateway() as harness:
        request = await sent(harness, [(b"Accept-Encoding", offered)])
        assert request.headers.get_all(b"accept-encoding") == [asked]


async def test_no_accept_encoding_stays_none() -> None:
    async with gateway() as harness:
        assert b"accept-encoding" not in names(await sent(harness))


# --- trace ----------------------------------------------------------------------------------------------------------

TRACE_ID = b"0af7651916cd43dd8448eb211c80319c"
TRACE: Pairs = [
    (b"traceparent", b"00-" + TRACE_ID + b"-b7ad6b7169203331-00"),
    (b"tracestate", b"vendor=1,other=2"),
    (b"baggage", b"user=1"),
    (b"Baggage", b"tier=2"),
]


async def test_trace_is_sent_on_under_the_span_of_the_attempt() -> None:
    async with gateway(propagate_trace=True) as harness:
        request = await sent(harness, TRACE)
        span = harness.exchanges[0].attempts[0].span_id
        assert span != harness.exchanges[0].trace.span_id
        assert request.headers.get_all(b"traceparent") == [b"00-" + TRACE_ID + b"-" + span + b"-00"]
        assert request.headers.get_all(b"tracestate") == [b"vendor=1,other=2"]
        assert request.headers.get_all(b"baggage") == [b"user=1", b"tier=2"]


async def test_new_trace_is_sent_on_where_the_client_brings_none() -> None:
    async with gateway(propagate_trace=True) as harness:
        request = await sent(harness, [(b"traceparent", b"garbage"), (b"tracestate", b"v=1")])
        exchange = harness.exchanges[0]
        expected = b"00-%b-%b-01" % (exchange.trace.trace_id, exchange.attempts[0].span_id)
        assert request.headers.get_all(b"traceparent") == [expected]
        assert b"tracestate" not in names(request)


# --- base URL and credential ----------------------------------------------------------------------------------------

PLACES = [
    ("openai_compatible", "/v1", CHAT, "/v1/chat/completions"),
    ("openai_compatible", "/v1/", CHAT, "/v1/chat/completions"),
    ("openai_compatible", "", CHAT, "/chat/completions"),
    ("openai_compatible", "/api/openai/v1", CHAT, "/api/openai/v1/chat/completions"),
    ("openai_compatible", "/v1", "/v1/responses?include=a&include=b", "/v1/responses?include=a&include=b"),
    ("openai_compatible", "/v1", CHAT + "?key=kept&x=%20", "/v1/chat/completions?key=kept&x=%20"),
    ("anthropic", "/v1", "/v1/messages?beta=true", "/v1/messages?beta=true"),
    ("anthropic", "", "/v1/messages?beta=true", "/v1/messages?beta=true"),
    ("anthropic", "/", "/v1/messages", "/v1/messages"),
    ("anthropic", "/anthropic", "/v1/messages/count_tokens", "/anthropic/v1/messages/count_tokens"),
    ("anthropic", "/anthropic/v1/", "/v1/messages/count_tokens", "/anthropic/v1/messages/count_tokens"),
]


@pytest.mark.parametrize(("kind", "base", "path", "target"), PLACES)
async def test_path_follows_the_base_url_and_the_query_passes(kind: str, base: str, path: str, target: str) -> None:
    harness = gateway(type=kind)
    tables = harness._config["routing"]["bindings"]
    tables[0]["base_url"] = harness.upstreams[0].origin + base
    async with harness:
        assert (await sent(harness, path=path)).target == target.encode()


KEY_HEADERS = [
    ("openai_compatible", None, (b"authorization", b"Bearer sk-up")),
    ("anthropic", None, (b"x-api-key", b"sk-up")),
    ("anthropic", "Authorization", (b"authorization", b"Bearer sk-up")),
    ("openai_compatible", "api-key", (b"api-key", b"sk-up")),
    ("openai_compatible", "Ocp-Apim-Subscription-Key", (b"ocp-apim-subscription-key", b"sk-up")),
]


@pytest.mark.parametrize(("kind", "setting", "field"), KEY_HEADERS)
async def test_credential_goes_into_the_key_header_alone(
    kind: str, setting: str | None, field: tuple[bytes, bytes]
) -> None:
    settings = {} if setting is None else {"key_header": setting}
    async with gateway(type=kind, settings=settings) as harness:
        path = "/v1/messages" if kind == "anthropic" else CHAT
        own = [(b"Ocp-Apim-Subscription-Key", b"the client's")] if setting and setting.startswith("Ocp") else []
        request = await sent(harness, own, path=path)
        credentials = {b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key", b"ocp-apim-subscription-key"}
        assert [pair for pair in request.headers if pair[0].lower() in credentials] == [field]


async def test_binding_without_a_credential_sends_none() -> None:
    async with gateway(credential=None) as harness:
        assert {b"authorization", b"x-api-key"}.isdisjoint(names(await sent(harness)))


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"extra_headers": {"X-A": "1\r\nX-B: 2"}}, "printable ASCII"),
    ({"extra_headers": {"X-A": "é"}}, "printable ASCII"),
    ({"extra_headers": {"X-A\r\nX-B": "1"}}, "no header name"),
    ({"extra_headers": {"X A": "1"}}, "no header name"),
    ({"extra_headers": {"": "1"}}, "no header name"),
    ({"extra_headers": {"Content-Length": "1"}}, "set by the gateway itself"),
    ({"extra_headers": {"transfer-encoding": "chunked"}}, "set by the gateway itself"),
    ({"extra_headers": {"HOST": "x"}}, "set by the gateway itself"),
    ({"settings": {"key_header": "x\r\ny"}}, "key_header: .* is no header name"),
    ({"settings": {"key_header": ""}}, "is no header name"),
    ({"settings": {"key_header": 7, "other": 1}}, r"settings\.other: unknown"),
    ({"settings": {"key_header": "Content-Length"}}, "set by the gateway itself"),
    ({"credential": "sk-secret\r\nx: y"}, "credential: may hold printable ASCII only"),
    ({"credential": "sk-secret-é"}, "credential: may hold printable ASCII only"),
    ({"base_url": ""}, "base_url: is missing"),
    ({"base_url": "ftp://h/v1"}, "must be http://"),
    ({"base_url": "http:///v1"}, "must be http://"),
    ({"base_url": "http://h:x/v1"}, "the port is no number"),
    ({"base_url": "http://user:pw-secret@h/v1"}, "takes no user"),
    ({"base_url": "http://:pw-secret@h/v1"}, "takes no user"),
    ({"base_url": "http://h/v1?a=b"}, "takes no user, query"),
    ({"base_url": "http://h/v1#a"}, "takes no user, query"),
    ({"base_url": "http://h/a b"}, "percent-encode"),
    ({"base_url": "http://h/é"}, "percent-encode"),
    ({"base_url": "http://h o/v1"}, "percent-encode"),
]


@pytest.mark.parametrize(("binding", "message"), FAULTS)
async def test_binding_that_would_break_a_head_is_refused_before_traffic(binding: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        async with gateway(**binding):
            pass
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://api.example", b"api.example"),
        ("https://api.example:443/v1", b"api.example"),
        ("https://api.example:8443/v1", b"api.example:8443"),
        ("http://api.example:443", b"api.example:443"),
        ("http://[::1]:8080/v1", b"[::1]:8080"),
        ("http://b\u00fccher.example:81/v1", b"xn--bcher-kva.example:81"),
    ],
)
def test_host_is_spelled_as_rfc_9110_wants(url: str, host: bytes) -> None:
    binding = ProviderBinding("gpc_x", "x", "openai", url, Secret("sk"))
    address = address_of(binding, None, bearer(binding), "penstock")
    assert address.first_fields == b"host: %b\r\n" % host
    assert address.last_fields == b"authorization: Bearer sk\r\n"
    assert "Bearer" not in repr(address)


def test_extra_headers_keep_their_spelling_and_order() -> None:
    table = {"X-B": "2", "x_a": "1"}
    assert header_fields(table, where="here") == ((b"X-B", b"2"), (b"x_a", b"1"))


# --- namespace ------------------------------------------------------------------------------------------------------


async def test_langwatch_namespace_names_headers_in_both_directions() -> None:
    async with gateway("langwatch") as harness:
        fields = [(b"X-LangWatch-Cache", b"respect"), (b"X-Penstock-Note", b"somebody else's")]
        reply = await harness.request("POST", CHAT, fields, BODY)
        request = harness.upstreams[0].requests[0]
        assert b"x-langwatch-cache" not in names(request)
        assert b"x-penstock-note" in names(request)
        own = ("Request-Id", "Trace-Id", "Span-Id", "Provider", "Model", "Fallback-Count", "Cache", "Cache-Mode")
        assert all(b"X-LangWatch-%b: " % name.encode() in reply.raw for name in own)
        assert b"X-Penstock" not in reply.raw


# --- bodies with a content coding -----------------------------------------------------------------------------------

CODINGS = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("coding", CODINGS)
async def test_coded_body_passes_as_it_came_unless_it_is_edited(coding: str) -> None:
    coded: bytes = CODINGS[coding](BODY)
    async with gateway() as harness:
        request = await sent(harness, [(b"Content-Encoding", coding.encode())], body=coded)
        assert request.body == coded
        assert request.headers.get_all(b"content-encoding") == [coding.encode()]
        assert harness.exchanges[0].candidate is not None
        assert harness.exchanges[0].candidate.model == "m"


@pytest.mark.parametrize("coding", CODINGS)
async def test_edited_body_is_sent_decoded_without_its_coding(coding: str) -> None:
    coded: bytes = CODINGS[coding](BODY)
    async with gateway(key={"model_aliases": {"m": "real"}}) as harness:
        request = await sent(
            harness, [(b"X-A", b"1"), (b"Content-Encoding", coding.encode()), (b"X-B", b"2")], body=coded
        )
        assert request.body == BODY.replace(b'"m"', b'"real"')
        assert b"content-encoding" not in names(request)
        assert request.headers.get_all(b"content-length") == [b"%d" % len(request.body)]
        assert [line for line in lines(request) if line.startswith(b"X-")] == [b"X-A: 1", b"X-B: 2"]


async def test_coded_stream_request_is_asked_for_usage_decoded() -> None:
    body = b'{"model":"m","stream":true,"messages":[]}'
    async with gateway() as harness:
        request = await sent(harness, [(b"Content-Encoding", b"gzip")], body=gzip.compress(body))
        assert json.loads(request.body) == {**json.loads(body), "stream_options": {"include_usage": True}}
        assert b"content-encoding" not in names(request)


async def refused(harness: Harness, coding: bytes, body: bytes) -> Reply:
    reply = await harness.request("POST", CHAT, [(b"Content-Encoding", coding)], body)
    assert harness.upstreams[0].requests == []
    return reply


@pytest.mark.parametrize("coding", ["gzip", "zstd", "br"])
async def test_bomb_is_413(coding: str) -> None:
    async with gateway() as harness:
        reply = await refused(harness, coding.encode(), CODINGS[coding](bytes(INSPECTION_LIMIT + 1)))
        assert (reply.status, reply.header("X-Penstock-Error")) == (413, "payload_too_large")


@pytest.mark.parametrize("coding", [b"compress", b"x-secret", b"gzip, exi"])
async def test_unknown_coding_is_415(coding: bytes) -> None:
    async with gateway() as harness:
        reply = await refused(harness, coding, BODY)
        assert (reply.status, reply.header("X-Penstock-Error")) == (415, "unsupported_encoding")


@pytest.mark.parametrize("body", [b"not gzip", gzip.compress(BODY)[:-9], b""], ids=["text", "cut", "empty"])
async def test_corrupt_coding_is_400(body: bytes) -> None:
    async with gateway() as harness:
        assert (await refused(harness, b"gzip", body)).status == 400


# --- Gemini's key parameter -----------------------------------------------------------------------------------------

GEMINI = "/v1beta/models/gemini-x:generateContent"
QUERIES = [
    ("key={}", b""),
    ("key={}&alt=sse", b"?alt=sse"),
    ("a=1&key={}&b=%20&key=other", b"?a=1&b=%20"),
    ("%6Bey={}&keys=1&monkey=2&key", b"?keys=1&monkey=2"),
]


@pytest.mark.parametrize(("query", "kept"), QUERIES)
def test_key_parameter_never_goes_upstream(query: str, kept: bytes) -> None:
    binding = ProviderBinding("gpc_x", "x", "mock", "http://h/v1")
    harness = Harness(["mock"], upstream=FakeUpstream())
    provider = Gateway(harness.configuration()).generation.services.providers.types["mock"]
    exchange = sample_exchange(Sample("POST", f"{GEMINI}?{query.format('canary')}", b"{}"))
    address = address_of(binding, None, (), "penstock")
    path = exchange.request.path.removeprefix(b"/v1")
    request = forward(exchange, Candidate(binding, provider, None), address, path=path)
    assert request.path == GEMINI.encode() + kept
    assert b"canary" not in request.path + request.fields + request.body
    built = provider.build(exchange, Candidate(binding, provider, "gemini-y"))
    assert built.path == b"/v1beta/models/gemini-y:generateContent" + kept
