"""The checkers shipped to plugin authors: what is right passes, and what is wrong is told what to mend."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest

from penstock import (
    BodyWindow,
    Candidate,
    Chunk,
    Exchange,
    OpenAIProvider,
    RequestError,
    UpstreamRequest,
    hookimpl,
)
from penstock.testing import check_byte_exact, check_plugin, check_provider


class RefuseAll:
    """Refuse every request."""

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        raise RequestError("permission_denied", "No.")


class Quiet:
    """Watch without touching."""

    sees_chunks = True

    @hookimpl
    def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes | None:
        return None

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        exchange.reply_fields.append((b"x", b"y"))

    @hookimpl
    async def post_response(self, exchange: Exchange) -> None: ...


class EditsRequests:
    """Put a blank behind each request's body."""

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        exchange.request = exchange.request.with_body(exchange.request.body + b" ")


class DeclaresEdits(EditsRequests):
    """Do the same openly."""

    edits_body = True


class EditsChunks:
    """Shout."""

    sees_chunks = True

    @hookimpl
    def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes | None:
        return chunk.data + b" "


def test_plugin_that_only_watches_passes_every_check() -> None:
    check_plugin(Quiet)


def test_declared_edits_are_not_held_against_a_plugin() -> None:
    check_byte_exact(DeclaresEdits, max_examples=10)


@pytest.mark.parametrize(("plugin", "message"), [(EditsRequests, "request body"), (EditsChunks, "response body")])
def test_undeclared_edits_are_found(plugin: type[Any], message: str) -> None:
    with pytest.raises(AssertionError, match=f"{message} changed at byte"):
        check_byte_exact(plugin)


def test_plugin_that_refuses_everything_cannot_be_called_byte_exact() -> None:
    with pytest.raises(AssertionError, match="no request reached the upstream"):
        check_byte_exact(RefuseAll, max_examples=3)


class Unmarked:
    def pre_request(self, exchange: Exchange) -> None: ...
    @hookimpl
    def post_response(self, exchange: Exchange) -> None: ...


class Misspelt:
    @hookimpl
    def pre_requests(self, exchange: Exchange) -> None: ...


class WrongArguments:
    @hookimpl
    def pre_request(self, request: Exchange) -> None: ...


class Generates:
    @hookimpl
    def pre_request(self, exchange: Exchange) -> Any:
        yield


class NeedsWhatItCannotHave:
    edits_chunks = True

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None: ...


class MutableConfig:
    @attrs.define
    class Config:
        limit: int = 1

    def __init__(self, config: Config) -> None: ...
    @hookimpl
    def pre_request(self, exchange: Exchange) -> None: ...


class StumblesOverOddBodies:
    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        json.loads(exchange.request.body)


class PeeksAtListings:
    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        assert exchange.peek.model != "forbidden"


class PeeksWhileAuthenticating:
    @hookimpl
    async def authenticate(self, exchange: Exchange) -> None:
        assert exchange.peek.model != "forbidden"


class AddsTooLate:
    sees_chunks = True

    @hookimpl
    def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes | None:
        exchange.reply_fields.append((b"x-seen", b"1"))
        return None


class AddsTooLateAwaiting:
    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        exchange.watch_chunks("adds_too_late_awaiting")

    @hookimpl
    async def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes | None:
        exchange.reply_fields = [*exchange.reply_fields, (b"x-seen", b"1")]
        return None


class AddsAtTheEnd:
    @hookimpl
    def post_response(self, exchange: Exchange) -> None:
        exchange.reply_fields.append((b"x-seen", b"1"))


class NeverAsksForChunks:
    @hookimpl
    def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes | None:
        return None


@attrs.define
class NeedsAsArguments:
    sees_chunks: bool = True

    @hookimpl
    def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes | None:
        return None


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (Unmarked, "pre_request has the name of a hook but no @hookimpl"),
        (Misspelt, "pre_requests is no hook; did you mean pre_request"),
        (WrongArguments, r"must take \(exchange\) after self, takes \(request\)"),
        (Generates, "is a generator function"),
        (NeedsWhatItCannotHave, "declares edits_chunks but implements none of"),
        (MutableConfig, "Config must be frozen"),
        (StumblesOverOddBodies, "stumbles_over_odd_bodies.pre_request raised UnicodeDecodeError"),
        (PeeksAtListings, "GET /v1/models, success: refused with 400.*ask only where .*endpoint.has_model"),
        (PeeksWhileAuthenticating, "GET /v1/models, refusal: refused with 400.*ask only where .*endpoint.has_model"),
        (AddsTooLate, "adds_too_late.on_stream_chunk adds to exchange.reply_fields.*x-seen.*too late"),
        (AddsTooLateAwaiting, "adds_too_late_awaiting.on_stream_chunk adds to exchange.reply_fields.*too late"),
        (AddsAtTheEnd, "adds_at_the_end.post_response adds to exchange.reply_fields.*too late"),
        (NeverAsksForChunks, "on_stream_chunk never runs: declare sees_chunks = True, or call exchange.watch_chunks"),
        (NeedsAsArguments, "sees_chunks has an annotation.*drop the annotation: sees_chunks = True"),
    ],
)
def test_broken_plugins_are_told_what_to_mend(plugin: type[Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_plugin(plugin)


class WatchesWhatNoSampleAsksFor:
    """Watch for one tenant only."""

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        if exchange.request.headers.get(b"x-tenant") == b"t1":
            exchange.watch_chunks("watches_what_no_sample_asks_for")

    @hookimpl
    def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes | None:
        return None


class PeeksWhereThereIsAModel:
    """Ask only where there is something to ask."""

    reads_body = True

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        if exchange.request.endpoint.has_model and exchange.peek.model == "forbidden":
            raise RequestError("bad_request", "Not this one.")


@pytest.mark.parametrize("plugin", [WatchesWhatNoSampleAsksFor, PeeksWhereThereIsAModel])
def test_careful_plugins_pass(plugin: type[Any]) -> None:
    check_plugin(plugin)


@attrs.define(eq=False, kw_only=True)
class Provider(OpenAIProvider):
    type: str = "mine"
    default_base_url: str | None = "https://mine.test/v1"


@attrs.define(eq=False, kw_only=True)
class Leaks(Provider):
    def build(self, exchange: Exchange, candidate: Candidate) -> UpstreamRequest:
        built = super().build(exchange, candidate)
        key = exchange.request.headers.get(b"authorization") or b""
        return attrs.evolve(built, fields=built.fields + b"x-client: " + key + b"\r\n")


@attrs.define(eq=False, kw_only=True)
class Counts(Provider):
    built: int = 0

    def build(self, exchange: Exchange, candidate: Candidate) -> UpstreamRequest:
        self.built += 1
        built = super().build(exchange, candidate)
        return attrs.evolve(built, fields=built.fields + b"x-count: %d\r\n" % self.built)


@attrs.define(eq=False, kw_only=True)
class Rewrites(Provider):
    def build(self, exchange: Exchange, candidate: Candidate) -> UpstreamRequest:
        built = super().build(exchange, candidate)
        return attrs.evolve(built, body=built.body.replace(b" ", b""))


@attrs.define(eq=False, kw_only=True)
class TrustsUsage(Provider):
    def read_usage(self, exchange: Exchange, window: BodyWindow) -> None:
        json.loads(window.text)


def test_bundled_kind_of_provider_passes() -> None:
    check_provider(Provider())


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        (Leaks(), "lets the client's credential through"),
        (Counts(), "gives another fields the second time"),
        (Rewrites(), "changes the body although no model changes"),
        (TrustsUsage(), "read_usage raises"),
        (Provider(dialects=frozenset({"openai.chats"})), "openai.chats unknown"),
    ],
)
def test_broken_providers_are_told_what_to_mend(provider: Provider, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_provider(provider)
