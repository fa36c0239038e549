"""Coded and large request bodies are looked into at a bounded cost."""

from __future__ import annotations

import gzip

import pytest

from penstock import Exchange, RequestError, hookimpl
from penstock.dialects.estimate import estimate_usage
from penstock.inspection import INSPECTION_LIMIT, editable_body
from penstock.metering import Meter
from penstock.models import Request
from penstock.testing import FakeUpstream, Harness, http_reply
from penstock.testing.samples import SAMPLES, sample_exchange

PLAIN = b'{"model":"m","stream":true,"messages":[]}'


def coded(body: bytes) -> Request:
    request = sample_exchange(SAMPLES[0], ((b"Content-Encoding", b"gzip"),)).request
    return request.with_body(gzip.compress(body))


@pytest.mark.anyio
async def test_coded_body_is_decoded_once_an_exchange() -> None:
    kept: list[bytes | None] = []

    class Looking:
        @hookimpl
        def pre_request(self, exchange: Exchange) -> None:
            assert exchange.peek.model == "m"
            kept.append(exchange.request.decoded)

    upstream = FakeUpstream([[http_reply(b'{"id":"x"}')]], repeat=True)
    async with Harness([Looking], upstream=upstream) as harness:  # peeked at, edited for the usage frame, estimated
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        assert (await harness.request("POST", "/v1/chat/completions", headers, gzip.compress(PLAIN))).status == 200
        await harness.wait_settled(1)
        exchange = harness.exchanges[0]
        assert exchange.usage is not None
        assert exchange.usage.source == "estimated"
        assert b"include_usage" in upstream.requests[0].body
        assert kept == [PLAIN]
        assert editable_body(exchange.request) is kept[0]


def test_another_body_is_decoded_anew() -> None:
    request = coded(PLAIN)
    assert editable_body(request) is editable_body(request)
    assert editable_body(request) == PLAIN
    assert editable_body(request.with_body(gzip.compress(b"{}"))) == b"{}"


def test_body_that_decodes_to_more_than_the_limit_is_refused() -> None:
    assert INSPECTION_LIMIT == 32 * 1024 * 1024
    request = coded(b" " * (INSPECTION_LIMIT + 1))
    with pytest.raises(RequestError) as raised:
        editable_body(request)
    assert raised.value.code == "payload_too_large"
    assert request.decoded is None


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (b'{"messages":"' + b"word " * 100_000 + b'"}', 125_003),
        (b'{"messages":"' + b"A0b/" * 100_000 + b'"}', 3),
        (b'{"tools":"' + b'\\"a' * 100_000 + b'"}', 75_003),
        (b"not JSON " * 40_000, 90_000),
        (b"--seam\r\n" + b"x" * 300_000, 1),
    ],
)
def test_large_request_counts_by_its_length_without_files(body: bytes, tokens: int) -> None:
    assert len(body) > 256 * 1024
    window = Meter(None, None).window()
    usage = estimate_usage(body, window, is_stream=False, token_counter=lambda _: pytest.fail("was read as text"))
    assert (usage.input, usage.output) == (tokens, 0)
