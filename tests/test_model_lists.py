"""GET /v1/models: what a key may call, in the shape of its client, however the providers behave."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from penstock import FetchedResponse, UpstreamError, UpstreamRequest, new_key
from penstock.testing import FakeUpstream, Harness, RecordedRequest, Reply, Stall, http_reply
from penstock.testing.harness import PEPPER
from penstock.testing.upstream import Close, Step
from penstock_plugins.routing.models import (
    CACHE_SECONDS,
    FAILURE_SECONDS,
    MAX_BYTES,
    MAX_PAGES,
    TIMEOUT_SECONDS,
    ModelLists,
)

pytestmark = pytest.mark.anyio

INCOMPLETE = "X-Penstock-Models-Incomplete"
ANTHROPIC = {"anthropic-version": "2023-06-01"}
Table = dict[str, Any]


def listing(*models: str, **members: Any) -> bytes:
    return json.dumps({"object": "list", "data": [{"id": model, **members} for model in models]}).encode()


def binding(name: str, upstream: FakeUpstream, kind: str = "openai_compatible", **settings: Any) -> Table:
    return {"name": name, "type": kind, "base_url": upstream.base_url, "credential": f"sk-{name}", **settings}


def gateway(*tables: Table, upstreams: list[FakeUpstream], **key: Any) -> Harness:
    secret = new_key()
    config: dict[str, Any] = {
        "routing": {"bindings": list(tables)},
        "virtual_keys": {"pepper": PEPPER, "keys": [{"name": "k", "secret": secret, **key}]},
    }
    harness = Harness(["openai", "openai_compatible", "anthropic"], config, upstreams)
    harness.key = secret
    return harness


def lister(*models: str, **members: Any) -> FakeUpstream:
    return FakeUpstream([[http_reply(listing(*models, **members))]], repeat=True)


async def ids(harness: Harness, headers: dict[str, str] | None = None) -> list[str]:
    reply = await harness.request("GET", "/v1/models", headers or {})
    assert reply.status == 200, reply.body
    return [entry["id"] for entry in reply.json()["data"]]


# --- what is listed -------------------------------------------------------------------------------------------------


async def test_aliases_declared_and_listed_models_are_one_sorted_list() -> None:
    upstream = lister("live-b", "live-a")
    declared = binding("d", upstream, models=["m-2", "m-1"], model_map={"mapped": "m-1"})
    aliases = {"nick": "m-1", "far": "live-a", "broken": "openai/x"}
    async with gateway(declared, binding("l", upstream), upstreams=[upstream], model_aliases=aliases) as harness:
        assert await ids(harness) == ["far", "live-a", "live-b", "m-1", "m-2", "mapped", "nick"]
        assert [request.target for request in upstream.requests] == [b"/v1/models"]


async def test_list_is_what_models_allowed_lets_the_key_call() -> None:
    upstream = lister("live-a", "live-b", "vendor/live-a")
    declared = binding("d", upstream, "anthropic", models=["claude-1", "claude-2"])
    allowed = ["*live-a", "anthropic/claude-2"]
    aliases = {"yes": "claude-2", "no": "claude-1"}
    tables = (declared, binding("l", upstream))
    async with gateway(*tables, upstreams=[upstream], models_allowed=allowed, model_aliases=aliases) as harness:
        assert await ids(harness) == ["claude-2", "live-a", "vendor/live-a", "yes"]


async def test_list_holds_the_keys_own_bindings_only() -> None:
    upstream, other = lister("mine"), lister("not mine")
    tables = (binding("a", upstream), binding("b", other), binding("c", other, models=["nor this"]))
    async with gateway(*tables, upstreams=[upstream, other], bindings=["a"]) as harness:
        assert await ids(harness) == ["mine"]
        assert other.requests == []


async def test_declared_bindings_are_not_asked() -> None:
    upstream = FakeUpstream()
    async with gateway(binding("d", upstream, models=["m"]), upstreams=[upstream]) as harness:
        assert await ids(harness) == ["m"]


# --- in which shape -------------------------------------------------------------------------------------------------


async def test_openai_clients_get_openais_shape() -> None:
    upstream = lister("real", object="model", created=7, owned_by="somebody", more={"x": 1})
    tables = (binding("d", upstream, models=["m"]), binding("l", upstream))
    async with gateway(*tables, upstreams=[upstream]) as harness:
        reply = await harness.request("GET", "/v1/models")
        known = {"id": "m", "object": "model", "created": 1735689600, "owned_by": "openai_compatible"}
        listed = {"id": "real", "object": "model", "created": 7, "owned_by": "somebody", "more": {"x": 1}}
        assert reply.json() == {"object": "list", "data": [known, listed]}
        assert reply.header("content-type") == "application/json"
        assert reply.header(INCOMPLETE) is None


@pytest.mark.parametrize("version", ["2023-06-01", "2026-10-21"])
async def test_anthropic_clients_get_anthropics_shape(version: str) -> None:
    upstream = lister("claude-live", type="model", display_name="Live", created_at="2031-01-01T00:00:00Z")
    tables = (binding("d", upstream, models=["m"]), binding("l", upstream, "anthropic"))
    async with gateway(*tables, upstreams=[upstream]) as harness:
        reply = await harness.request("GET", "/v1/models", {"anthropic-version": version})
        page = reply.json()
        assert (page["has_more"], page["first_id"], page["last_id"]) == (False, "claude-live", "m")
        assert page["data"][0]["display_name"] == "Live"
        assert (page["data"][1]["type"], page["data"][1]["display_name"]) == ("model", "m")
        assert upstream.requests[0].headers.get_all(b"anthropic-version") == [version.encode()]


async def test_empty_list_has_its_shape_too() -> None:
    upstream = FakeUpstream()
    tables = binding("d", upstream, models=["m"])
    async with gateway(tables, upstreams=[upstream], models_allowed=["none"]) as harness:
        assert (await harness.request("GET", "/v1/models")).json() == {"object": "list", "data": []}
        page = (await harness.request("GET", "/v1/models", ANTHROPIC)).json()
        assert page == {"data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.parametrize("path", ["vendor/m:free", "vendor%2Fm%3Afree", "vendor/m%3afree"])
async def test_one_model_is_found_by_an_id_with_slashes(path: str) -> None:
    upstream = lister("vendor/m:free")
    async with gateway(binding("l", upstream), upstreams=[upstream]) as harness:
        assert (await harness.request("GET", f"/v1/models/{path}")).json()["id"] == "vendor/m:free"
        anthropic = await harness.request("GET", f"/v1/models/{path}", ANTHROPIC)
        assert (anthropic.json()["type"], anthropic.json()["id"]) == ("model", "vendor/m:free")


async def test_model_the_key_may_not_call_is_not_found() -> None:
    upstream = lister("a", "b")
    async with gateway(binding("l", upstream), upstreams=[upstream], models_allowed=["a"]) as harness:
        assert (await harness.request("GET", "/v1/models/a")).status == 200
        reply = await harness.request("GET", "/v1/models/b")
        assert (reply.status, reply.json()["error"]["code"]) == (404, "not_found")


async def test_list_needs_a_key_and_takes_get_only() -> None:
    upstream = lister("a")
    async with gateway(binding("l", upstream), upstreams=[upstream]) as harness:
        assert (await harness.request("GET", "/v1/models", {"x-api-key": "bad"})).status == 401
        reply = await harness.request("POST", "/v1/models", body={"model": "a"})
        assert (reply.status, reply.header("Allow")) == (405, "GET")
        assert upstream.requests == []


# --- asking providers -----------------------------------------------------------------------------------------------


async def test_provider_is_asked_with_its_own_credential_and_a_plain_request() -> None:
    upstream = lister("a")
    async with gateway(binding("l", upstream, extra_headers={"X-T": "1"}), upstreams=[upstream]) as harness:
        headers = {"User-Agent": "t/1", "If-None-Match": "etag", "Accept-Encoding": "gzip", "Range": "bytes=0-1"}
        reply = await harness.request("GET", "/v1/models?limit=1&after_id=x", headers)
        assert reply.status == 200
        request = upstream.requests[0]
        assert request.target == b"/v1/models"
        assert [name.lower() for name, _ in request.headers] == [b"host", b"user-agent", b"authorization", b"x-t"]
        assert request.headers.get(b"authorization") == b"Bearer sk-l"
        assert harness.key.encode() not in request.raw


async def test_anthropic_is_asked_with_a_version_whoever_asks() -> None:
    upstream = lister("claude-a")
    async with gateway(binding("l", upstream, "anthropic"), upstreams=[upstream]) as harness:
        assert await ids(harness) == ["claude-a"]
        assert upstream.requests[0].headers.get(b"anthropic-version") == b"2023-06-01"
        assert upstream.requests[0].headers.get(b"x-api-key") == b"sk-l"


FAILURES: dict[str, list[Step]] = {
    "status": [http_reply(b'{"error":{}}', 500)],
    "unauthorized": [http_reply(b"{}", 401)],
    "no JSON": [http_reply(b"<html>")],
    "no list": [http_reply(b'{"data":{"id":"a"}}')],
    "list of strings": [http_reply(b'{"data":["a"]}')],
    "cut off": [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", Close()],
    "no HTTP": [b"SSH-2.0-x\r\n\r\n"],
    "too large": [http_reply(b" " * (MAX_BYTES + 1) + b'{"data":[]}')],
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_provider_that_fails_is_named_and_the_others_are_listed(failure: str) -> None:
    bad, good = FakeUpstream([FAILURES[failure]], repeat=True), lister("good")
    async with gateway(binding("bad", bad), binding("good", good), upstreams=[bad, good]) as harness:
        reply = await harness.request("GET", "/v1/models")
        assert (reply.status, reply.header(INCOMPLETE)) == (200, "bad")
        assert [entry["id"] for entry in reply.json()["data"]] == ["good"]


async def test_every_failed_provider_is_named_and_asked_again_after_a_moment() -> None:
    first, second = (
        FakeUpstream([[http_reply(b"", 503)], [http_reply(listing(name))]]) for name in ("from a", "from b")
    )
    async with gateway(binding("a", first), binding("b", second), upstreams=[first, second]) as harness:
        clock = Clock()
        lists_of(harness)._clock = clock
        for clock.now in (0.0, FAILURE_SECONDS - 0.001):
            failed = await harness.request("GET", "/v1/models")
            assert (failed.header(INCOMPLETE), failed.json()["data"]) == ("a, b", [])
            assert len(first.requests) == len(second.requests) == 1
        clock.now = FAILURE_SECONDS
        assert await ids(harness) == ["from a", "from b"]


async def test_entries_without_an_id_are_left_out() -> None:
    body = b'{"data":[{"id":"a"},{"id":7},{"name":"b"},{}],"more":1}'
    upstream = FakeUpstream([[http_reply(body)]])
    async with gateway(binding("l", upstream), upstreams=[upstream]) as harness:
        assert await ids(harness) == ["a"]


async def test_providers_are_asked_at_the_same_time() -> None:
    arrived: list[RecordedRequest] = []
    both = anyio.Event()

    class Meeting:
        """Answer once both have been asked."""

        async def __call__(self, request: UpstreamRequest, *, timeout: float, max_bytes: int) -> FetchedResponse:
            arrived.append(RecordedRequest())
            if len(arrived) == 2:
                both.set()
            await both.wait()
            return FetchedResponse(200, listing("m"))

    upstream = FakeUpstream()
    async with gateway(binding("a", upstream), binding("b", upstream), upstreams=[upstream]) as harness:
        lists_of(harness)._fetch = Meeting()
        with anyio.fail_after(10):
            assert await ids(harness) == ["m"]


# --- what is kept ---------------------------------------------------------------------------------------------------


def lists_of(harness: Harness) -> ModelLists:
    plugins = harness.gateway.generation.plugins
    routing = next(each.instance for each in plugins if each.name == "routing")
    lists = routing._lists
    assert isinstance(lists, ModelLists)
    return lists


class Clock:
    """Show the time a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_list_of_a_provider_is_kept_for_a_minute() -> None:
    upstream = FakeUpstream([[http_reply(listing("old"))], [http_reply(listing("new"))]])
    async with gateway(binding("l", upstream), upstreams=[upstream]) as harness:
        clock = Clock()
        lists_of(harness)._clock = clock
        assert await ids(harness) == ["old"]
        clock.now = CACHE_SECONDS - 0.001
        assert await ids(harness, ANTHROPIC) == ["old"]
        assert len(upstream.requests) == 1
        clock.now = CACHE_SECONDS
        assert await ids(harness) == ["new"]


async def test_lists_are_kept_per_binding_and_filtered_per_key() -> None:
    upstream = lister("a", "b")
    one, two = new_key(), new_key()
    keys = [
        {"name": "one", "secret": one, "models_allowed": ["a"]},
        {"name": "two", "secret": two, "models_allowed": ["b"]},
    ]
    config: dict[str, Any] = {"virtual_keys": {"pepper": PEPPER, "keys": keys}}
    bindings = [{"name": "up", "type": "openai_compatible"}]
    async with Harness(config=config, upstream=upstream, bindings=bindings) as harness:
        assert await ids(harness, {"x-api-key": one}) == ["a"]
        assert await ids(harness, {"x-api-key": two}) == ["b"]
        assert len(upstream.requests) == 1


class Slow:
    """Time out as a provider that is asked for longer than allowed."""

    def __init__(self) -> None:
        self.bounds: list[tuple[float, int]] = []

    async def __call__(self, request: UpstreamRequest, *, timeout: float, max_bytes: int) -> FetchedResponse:
        self.bounds.append((timeout, max_bytes))
        raise UpstreamError("timeout", "no whole answer in time")


async def test_provider_gets_five_seconds_and_a_bound() -> None:
    upstream, slow = FakeUpstream(), Slow()
    async with gateway(binding("l", upstream, models=["m"]), binding("s", upstream), upstreams=[upstream]) as harness:
        lists_of(harness)._fetch = slow
        reply: Reply = await harness.request("GET", "/v1/models")
        assert slow.bounds == [(TIMEOUT_SECONDS, MAX_BYTES)] == [(5.0, 4 * 1024 * 1024)]
        assert (reply.header(INCOMPLETE), [entry["id"] for entry in reply.json()["data"]]) == ("s", ["m"])


async def test_client_that_leaves_abandons_the_asking() -> None:
    stall = Stall()
    upstream = FakeUpstream([[stall]])
    async with gateway(binding("l", upstream), upstreams=[upstream]) as harness:
        client = await harness.raw()
        await client.send(harness.request_bytes("GET", "/v1/models"))
        await upstream.wait_requests(1)
        client.close()
        with anyio.fail_after(10):
            await stall.gone.wait()
        await harness.wait_settled(1)
        assert harness.exchanges[0].stream_end == "client_gone"


# --- pages, and many who ask at once --------------------------------------------------------------------------------


def page(request: RecordedRequest) -> list[Step]:
    """Answer with the page behind ``after_id``; there is always another one."""
    after = request.target.partition(b"after_id=")[2]
    number = int(after.removeprefix(b"claude%2F")) + 1 if after else 0
    return [http_reply(listing(f"claude/{number}")[:-1] + b',"has_more":true,"last_id":"claude/%d"}' % number)]


async def test_anthropics_listing_is_read_page_by_page_up_to_a_bound() -> None:
    upstream = FakeUpstream([page], repeat=True)
    async with gateway(binding("l", upstream, "anthropic"), upstreams=[upstream]) as harness:
        assert await ids(harness) == [f"claude/{number}" for number in range(MAX_PAGES)]
        targets = [request.target for request in upstream.requests]
        assert targets[:2] == [b"/v1/models?limit=1000", b"/v1/models?limit=1000&after_id=claude%2F0"]
        assert len(targets) == MAX_PAGES


@pytest.mark.parametrize("members", [{}, {"has_more": False, "last_id": "x"}, {"has_more": True, "last_id": None}])
async def test_last_page_ends_the_asking(members: Table) -> None:
    body = json.dumps({"data": [{"id": "x"}], **members}).encode()
    upstream = FakeUpstream([[http_reply(body)]], repeat=True)
    async with gateway(binding("l", upstream, "anthropic"), upstreams=[upstream]) as harness:
        assert await ids(harness) == ["x"]
        assert len(upstream.requests) == 1


async def test_page_that_fails_makes_the_listing_incomplete() -> None:
    upstream = FakeUpstream([page, [http_reply(b"", 500)]])
    async with gateway(binding("l", upstream, "anthropic"), upstreams=[upstream]) as harness:
        reply = await harness.request("GET", "/v1/models")
        assert (reply.header(INCOMPLETE), reply.json()["data"]) == ("l", [])


class Gate:
    """Answer when a test says so."""

    def __init__(self) -> None:
        self.asked = 0
        self.arrived = anyio.Event()
        self.opened = anyio.Event()

    async def __call__(self, request: UpstreamRequest, *, timeout: float, max_bytes: int) -> FetchedResponse:
        self.asked += 1
        self.arrived.set()
        await self.opened.wait()
        return FetchedResponse(200, listing("m"))


async def test_clients_that_ask_together_ask_a_provider_once() -> None:
    upstream, gate = FakeUpstream(), Gate()
    found: list[list[str]] = []
    async with gateway(binding("l", upstream), upstreams=[upstream]) as harness:
        lists_of(harness)._fetch = gate

        async def one() -> None:
            found.append(await ids(harness))

        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(one)
                await gate.arrived.wait()
                gate.opened.set()
        assert (found, gate.asked) == ([["m"]] * 5, 1)


async def test_who_waits_for_a_client_that_leaves_asks_anew() -> None:
    upstream, gate = FakeUpstream(), Gate()
    async with gateway(binding("l", upstream), upstreams=[upstream]) as harness:
        lists_of(harness)._fetch = gate
        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                client = await harness.raw()
                await client.send(harness.request_bytes("GET", "/v1/models"))
                await gate.arrived.wait()
                gate.arrived = anyio.Event()
                tasks.start_soon(ids, harness)
                client.close()
                await gate.arrived.wait()
                gate.opened.set()
        assert gate.asked == 2
        assert await ids(harness) == ["m"]
