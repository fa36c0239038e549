"""The TLS listener, on both event loops: what holds for plain connections holds behind TLS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trustme

from abused_gateway import BODY, CHAT, assert_envelope, empty
from penstock.errors import ConfigurationError
from penstock.testing import LAST_CHUNK, STREAM_HEAD, FakeUpstream, Harness, Pause, RawClient, chunk, http_reply

pytestmark = pytest.mark.anyio

PROBE = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert("localhost")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    return {"certificate": str(certificate), "key": str(key)}


@pytest.fixture
def trust(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


@asynccontextmanager
async def serving(
    files: dict[str, str], upstream: FakeUpstream | None = None, **limits: float
) -> AsyncIterator[Harness]:
    gateway = {"tls": files, "limits": limits}
    async with Harness(upstream=upstream or FakeUpstream(), gateway=gateway, socket=True) as harness:
        yield harness
        for client in harness._clients:
            client.close()
        await empty(harness.gateway.server)


async def connect(gateway: Harness, trust: ssl.SSLContext) -> RawClient:
    client = RawClient()
    assert gateway.port is not None
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: client, "127.0.0.1", gateway.port, ssl=trust, server_hostname="localhost")
    gateway._clients.append(client)
    return client


async def test_requests_are_served_on_one_connection(files: dict[str, str], trust: ssl.SSLContext) -> None:
    upstream = FakeUpstream([[http_reply(b"1")], [http_reply(b"2")]])
    async with serving(files, upstream) as gateway:
        client = await connect(gateway, trust)
        for expected in (b"1", b"2"):
            await client.send(gateway.request_bytes("POST", CHAT, body=BODY))
            assert (await client.receive_reply()).body == expected
        assert client._transport.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"


async def test_large_bodies_pass_whole_both_ways(files: dict[str, str], trust: ssl.SSLContext) -> None:
    upstream = FakeUpstream([[http_reply(b"y" * 3_000_000)]])
    async with serving(files, upstream) as gateway:
        client = await connect(gateway, trust)
        body = b'{"model":"m","prompt":"' + b"x" * 3_000_000 + b'"}'
        await client.send(gateway.request_bytes("POST", CHAT, body=body))
        assert (await client.receive_reply()).body == b"y" * 3_000_000
        assert upstream.requests[0].body == body


async def test_stream_arrives_as_it_is_sent(files: dict[str, str], trust: ssl.SSLContext) -> None:
    pause = Pause()
    upstream = FakeUpstream([[STREAM_HEAD, chunk(b"data: 1\n\n"), pause, chunk(b"data: 2\n\n"), LAST_CHUNK]])
    async with serving(files, upstream) as gateway:
        client = await connect(gateway, trust)
        await client.send(gateway.request_bytes("POST", CHAT, body=b'{"model":"m","stream":true}'))
        assert await client.receive_until(b"data: 1\n\n\r\n")
        pause.release()
        assert await client.receive_until(LAST_CHUNK) == chunk(b"data: 2\n\n") + LAST_CHUNK


async def test_client_that_leaves_settles_its_exchange(files: dict[str, str], trust: ssl.SSLContext) -> None:
    pause = Pause()
    async with serving(files, FakeUpstream([[STREAM_HEAD, chunk(b"data: 1\n\n"), pause]])) as gateway:
        client = await connect(gateway, trust)
        await client.send(gateway.request_bytes("POST", CHAT, body=b'{"model":"m","stream":true}'))
        await client.receive_until(b"data: 1\n\n\r\n")
        client.close()
        await gateway.wait_settled(1)
        assert gateway.exchanges[0].stream_end == "client_gone"


@pytest.mark.parametrize("request_line", [b"GET / HTTP/1.2", b"GET http://a/ HTTP/1.1"])
async def test_refusal_is_readable_and_ends_the_connection(
    files: dict[str, str], trust: ssl.SSLContext, request_line: bytes
) -> None:
    async with serving(files) as gateway:
        client = await connect(gateway, trust)
        await client.send(request_line + b"\r\nHost: a\r\n\r\n")
        reply = await client.receive_reply()
        assert reply.status in (400, 505)
        assert_envelope(reply, "bad_request")
        (connection,) = gateway.gateway.server.connections
        connection.sweep(gateway.gateway.server.now() + 3600)
        await ended(client)


async def test_refusal_of_a_long_body_is_readable(files: dict[str, str], trust: ssl.SSLContext) -> None:
    async with serving(files, max_body_bytes=1000) as gateway:
        client = await connect(gateway, trust)
        await client.send(gateway.request_bytes("POST", CHAT, body=b"x" * 2_000_000))
        reply = await client.receive_reply()
        assert (reply.status, reply.header("connection")) == (413, "close")
        assert_envelope(reply, "payload_too_large")


async def test_slow_head_is_refused(files: dict[str, str], trust: ssl.SSLContext) -> None:
    async with serving(files, head_timeout=1.0) as gateway:
        client = await connect(gateway, trust)
        await client.send(b"GET / HT")
        (connection,) = gateway.gateway.server.connections
        while not connection._buffer:
            await anyio.lowlevel.checkpoint()
        connection.sweep(gateway.gateway.server.now() + 3600)
        assert (await client.receive_reply()).status == 408


async def test_idle_connection_is_closed_silently(files: dict[str, str], trust: ssl.SSLContext) -> None:
    async with serving(files, keep_alive_timeout=0.2) as gateway:
        client = await connect(gateway, trust)
        await client.send(PROBE)
        assert (await client.receive_reply(b"GET")).status == 200
        assert await client.receive_all() == b""


async def test_client_that_never_reads_is_cut(files: dict[str, str], trust: ssl.SSLContext) -> None:
    upstream = FakeUpstream([[http_reply(b"x" * (16 * 1024 * 1024))]])
    async with serving(files, upstream, write_timeout=0.2) as gateway:
        client = await connect(gateway, trust)
        client.pause()
        await client.send(gateway.request_bytes("POST", CHAT, body=BODY))
        await gateway.wait_settled(1)
        await empty(gateway.gateway.server)


async def test_plain_request_on_the_tls_port_gets_nothing(files: dict[str, str], trust: ssl.SSLContext) -> None:
    async with serving(files) as gateway:
        plain = await gateway.raw()
        await plain.send(PROBE)
        await ended(plain)
        assert b"HTTP/" not in bytes(plain.received)
        client = await connect(gateway, trust)
        await client.send(PROBE)
        assert (await client.receive_reply(b"GET")).status == 200


async def test_handshake_that_does_not_end_in_time_is_cut(files: dict[str, str]) -> None:
    async with serving(files, head_timeout=0.2) as gateway:
        await ended(await gateway.raw())


async def test_old_protocol_versions_are_refused(files: dict[str, str], authority: trustme.CA) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    async with serving(files) as gateway:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await connect(gateway, limited_to_tls_1_1(context))


def limited_to_tls_1_1(context: ssl.SSLContext) -> ssl.SSLContext:
    """Limit a client to TLS 1.1, which this test is about and the standard library rightly deprecates."""
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


@pytest.mark.parametrize("fault", ["missing", "not_a_key"])
async def test_unusable_files_are_one_line_for_the_operator(files: dict[str, str], tmp_path: Path, fault: str) -> None:
    other = tmp_path / "other.pem"
    if fault == "not_a_key":
        other.write_text("no key")
    harness = Harness(gateway={"tls": {**files, "key": str(other)}}, socket=True)
    with pytest.raises(ConfigurationError, match=r"\[gateway.tls\].*other.pem"):
        await enter(harness)


async def enter(harness: Any) -> None:
    async with harness:
        pass


async def ended(client: RawClient) -> None:
    """Return once the connection has ended in whatever way."""
    with anyio.fail_after(5):
        try:
            await client.receive_all()
        except ConnectionError:
            return
