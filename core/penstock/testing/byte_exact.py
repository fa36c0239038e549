"""Check that plugins change no byte they have not declared they change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from penstock.testing.client import request_bytes
from penstock.testing.harness import BINDINGS, Harness
from penstock.testing.strategies import (
    WireResponse,
    chat_bodies,
    chunked_bodies,
    http_responses,
    segmentations,
)
from penstock.testing.upstream import Close, FakeUpstream, RecordedRequest, Step

_PATHS = {"/v1/chat/completions": "gpt-4o-mini", "/v1/responses": "gpt-4o-mini", "/v1/messages": "claude-x"}


@attrs.frozen
class ByteCase:
    """One request and one response, each with a segmentation."""

    path: str
    body: bytes
    request: list[bytes] = attrs.field(repr=False)
    response: WireResponse
    segments: list[bytes] = attrs.field(repr=False)


@st.composite
def byte_cases(draw: st.DrawFn, key: str) -> ByteCase:
    """Draw requests to every kind of endpoint, in either framing, and responses in any."""
    path = draw(st.sampled_from(sorted(_PATHS)))
    is_stream = draw(st.booleans())
    body = draw(chat_bodies(model=_PATHS[path], stream=is_stream))
    fields = [(b"Accept-Encoding", b"gzip, br, zstd")]
    if draw(st.booleans()):
        head = request_bytes("POST", path, [*fields, (b"Transfer-Encoding", b"chunked")], b"", key=key)
        wire = head + draw(chunked_bodies(body, extensions=False))
    else:
        wire = request_bytes("POST", path, fields, body, key=key)
    response = draw(http_responses(is_stream=is_stream))
    return ByteCase(path, body, draw(segmentations(wire)), response, draw(segmentations(response.raw)))


@contextmanager
def portal_to(harness: Harness) -> Iterator[BlockingPortal]:
    """Run a harness on an event loop in another thread, so that a plain function can drive it."""
    with start_blocking_portal("asyncio") as portal, portal.wrap_async_context_manager(harness):
        yield portal


def check_byte_exact(
    *plugins: Any,
    config: Mapping[str, Mapping[str, Any]] | None = None,
    gateway: Mapping[str, Any] | None = None,
    max_examples: int | None = None,
) -> None:
    """Check that with these plugins every byte arrives as it was sent, for any segmentation of both sockets.

    ``plugins`` and ``config`` are a Harness's. Not compared: requests if a plugin declares ``edits_body``,
    responses if one declares ``edits_chunks``, and what a plugin refuses or answers itself; if that is
    everything, the check fails. Call it from a plain test function. Raises AssertionError.
    """
    carried = count_carried(plugins, config, gateway=gateway, max_examples=max_examples)
    assert carried, "no request reached the upstream: the plugins refused or answered every one"


def count_carried(
    plugins: Sequence[Any],
    config: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    gateway: Mapping[str, Any] | None = None,
    bindings: Sequence[Mapping[str, Any]] = BINDINGS,
    max_examples: int | None = None,
) -> int:
    """Do what check_byte_exact does; returns how many requests reached the upstream."""
    script = _Script()
    upstream = FakeUpstream([script], repeat=True)
    harness = Harness(plugins, config, upstream, gateway=gateway, bindings=bindings)
    carried = 0
    with portal_to(harness) as portal:
        edits = {need for plugin in harness.gateway.generation.plugins for need in plugin.needs}

        def check(case: ByteCase) -> None:
            nonlocal carried
            carried += portal.call(_carry, harness, upstream, script, case, edits)

        run_property(check, byte_cases(harness.key), max_examples=max_examples)
    return carried


class _Script:
    """Answer with the response of the case under test."""

    def __init__(self) -> None:
        self.steps: Sequence[Step] = ()

    def __call__(self, request: RecordedRequest) -> Sequence[Step]:  # noqa: ARG002 - the answer is drawn
        return self.steps


async def _carry(harness: Harness, upstream: FakeUpstream, script: _Script, case: ByteCase, edits: set[str]) -> bool:
    """Carry one case; returns whether it reached the upstream."""
    script.steps = [*case.segments, Close()] if case.response.is_close_delimited else case.segments
    seen = len(upstream.requests)
    client = await harness.raw()
    settled = harness.settled
    try:
        await client.send(*case.request)
        reply = await client.receive_reply()
        await harness.wait_settled(settled + 1)
    finally:
        client.close()
    assert not harness.faults, f"a plugin failed: {harness.faults[0]!r}, {harness.faults[0].__cause__!r}"
    if len(upstream.requests) == seen:
        return False
    if "edits_body" not in edits:
        same_bytes(upstream.requests[-1].body, case.body, "the request body", "edits_body")
    if "edits_chunks" not in edits:
        assert reply.status == case.response.status
        assert reply.is_complete, "the client's answer was cut short"
        # A body that chunk hooks see is decoded for them and reaches the client without its content codings.
        is_decoded = harness.exchanges[-1].chunk_watchers is not None and b"content-encoding" not in reply.headers
        sent = case.response.content if is_decoded else case.response.body
        same_bytes(reply.body, sent, "the response body", "edits_chunks")
    return True


def same_bytes(found: bytes, sent: bytes, what: str, need: str) -> None:
    """Raise AssertionError naming the first byte that differs."""
    if found == sent:
        return
    at = next((at for at, (left, right) in enumerate(zip(found, sent, strict=False)) if left != right), None)
    at = min(len(found), len(sent)) if at is None else at
    raise AssertionError(
        f"{what} changed at byte {at}: {sent[max(0, at - 20) : at + 20]!r} became "
        f"{found[max(0, at - 20) : at + 20]!r}; a plugin that means to edit it declares {need} = True"
    )


def run_property(check: Callable[..., None], *strategies: SearchStrategy[Any], max_examples: int | None = None) -> None:
    """Run ``check`` on drawn values, under the profile in force; outside pytest too."""
    profile = settings()
    chosen = settings(
        profile,
        max_examples=max_examples or profile.max_examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )

    @chosen
    @given(st.tuples(*strategies))
    def run(values: tuple[Any, ...]) -> None:
        check(*values)

    run()
