"""Every policy with every route, whole and streamed, asked natively, behind a failing candidate and by translation.

A cell is one policy on one route: without the policy the request is answered, with it the request is refused before any
upstream byte (or its answer before the client has a byte of what offends), told in the client's dialect, settled once,
entered once, and nothing stays reserved. What cannot be is listed in ``IMPOSSIBLE``, and held to be impossible.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest

from penstock import Exchange, PatternRules, PolicyRules
from penstock.endpoints import ALL, EXACT
from penstock.testing import Reply
from penstock_plugins.dialects.plugin import Dialects, DialectsConfig
from policy_gateway import (
    FREE,
    KINDS,
    NATIVE,
    PLUGINS,
    POLICIES,
    RENAMED,
    TRANSLATED,
    UNENFORCED,
    Policy,
    Run,
    Way,
    governed_by_all,
)
from policy_routes import BY_NAME, OFFENDING, ROUTES, WORD, Route

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# --- what cannot be -------------------------------------------------------------------------------------------------

BODYLESS = (
    "models model response response_stream response_delete response_cancel response_items gemini_get gemini_delete"
)
FORMS = "edits edits_stream transcriptions transcriptions_stream"
STREAMS = (
    "chat_stream responses_stream messages_stream completions_stream transcriptions_stream response_stream "
    "gemini_stream"
)
WORDLESS = (
    "count_tokens embeddings moderations images_stream edits_stream speech speech_stream models model "
    "response_delete gemini_count gemini_embed gemini_cache gemini_patch gemini_put gemini_get gemini_delete"
)


@attrs.frozen
class Impossible:
    """Policies that have nothing to judge on some routes."""

    policies: str
    routes: str
    why: str
    is_so: Callable[[Route], bool]
    """Whether that holds for a route, found out from the route alone."""

    @property
    def cells(self) -> list[tuple[str, str]]:
        return [(policy, route) for policy in self.policies.split() for route in self.routes.split()]


def _has_no_words(route: Route) -> bool:
    said = b"".join(route.events(WORD)) if route.is_stream else route.whole(WORD)
    return route.says is None and WORD.encode() not in said


IMPOSSIBLE = (
    Impossible(
        "tools tools_of_policy mcp urls cache_disable guardrail_request", BODYLESS,
        "the request has no body", lambda route: route.body is None,
    ),
    Impossible(
        "tools tools_of_policy mcp urls cache_disable", FORMS,
        "a form has no JSON, and so neither tools nor servers nor JSON strings", lambda route: route.is_form,
    ),
    Impossible(
        "models models_allowed", BODYLESS,
        "neither path nor body names a model to call", lambda route: route.body is None and ":" not in route.path,
    ),
    Impossible(
        "budget end_user", BODYLESS + " count_tokens gemini_count gemini_patch gemini_put",
        "providers charge nothing for it",
        lambda route: route.body is None or "count" in route.name or route.method in ("PATCH", "PUT"),
    ),
    Impossible("guardrail_response guardrail_stream", WORDLESS, "the answer holds no words of a model", _has_no_words),
    Impossible(
        "guardrail_response", STREAMS,
        "a stream is judged as a whole after its end, when it can only be flagged",
        lambda route: route.is_stream and route.says is not None,
    ),
    Impossible(
        "cache_override", "models model",
        "routing answers listings before anybody asks how to cache",
        lambda route: route.endpoint.dialect == "openai.models",
    ),
)  # fmt: skip
UNTRANSLATABLE = {("mcp", "anthropic.messages", "openai_chat")}
"""Requests no translation can express: where no policy refuses them, that does."""
EXCEPT = {cell for each in IMPOSSIBLE for cell in each.cells}


# --- ways to a provider ---------------------------------------------------------------------------------------------


def goes_on(route: Route) -> bool:
    """Tell whether there is a second candidate: what is stored with one binding is nowhere else."""
    names_model = route.endpoint.family != "gemini" or ":" in route.path
    return route.endpoint.has_model and names_model


def ways_of(route: Route) -> list[Way]:
    ways: list[Way] = ["native"]
    if goes_on(route):
        ways.append("second")
    if route.endpoint.operation in ("chat", "messages", "responses"):
        ways += TRANSLATED[route.endpoint.dialect]
    return ways


CELLS = [(route, way) for route in ROUTES for way in ways_of(route)]


def cells_of(policy: Policy) -> list[tuple[Route, Way]]:
    return [(route, way) for route, way in CELLS if (policy.name, route.name) not in EXCEPT]


def test_every_endpoint_and_method_has_a_route() -> None:
    needed = {(endpoint.path, method.decode()) for endpoint in ALL for method in endpoint.methods}
    assert needed == {(route.endpoint.path, route.method) for route in ROUTES}
    assert len(BY_NAME) == len(ROUTES)


def test_every_pair_of_dialects_is_among_the_ways() -> None:
    speaks = {"anthropic": "anthropic.messages", "openai_chat": "openai.chat"}
    translators = Dialects(DialectsConfig()).register_translators()
    asked = {(source, speaks[kind]) for source, kinds in TRANSLATED.items() for kind in kinds}
    assert asked == {(translator.source, translator.target) for translator in translators}
    assert set(speaks) <= set(KINDS)
    assert {EXACT[path].dialect for path in EXACT if EXACT[path].dialect in TRANSLATED} == set(TRANSLATED)


def test_what_cannot_be_is_listed_once_with_a_reason_that_holds() -> None:
    listed = [cell for each in IMPOSSIBLE for cell in each.cells]
    assert len(listed) == len(set(listed))
    assert {policy for policy, _ in listed} <= {policy.name for policy in POLICIES}
    for each in IMPOSSIBLE:
        holds = {route.name for route in ROUTES if each.is_so(route)}
        assert holds == set(each.routes.split()), each.why
    for policy in POLICIES:
        if policy.offence is None:
            continue
        for route in ROUTES:
            has_place = OFFENDING[policy.offence] in route.request(policy.offence)
            assert has_place == ((policy.name, route.name) not in EXCEPT), (policy.name, route.name)


# --- one cell -------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Books:
    """Remember what the ledger has to say of each exchange."""

    run: Run
    expected: dict[str, tuple[str, str | None]] = attrs.field(factory=dict)

    def note(self, exchange: Exchange, outcome: str, error: str | None = None) -> None:
        if exchange.request.endpoint.has_model and exchange.principal is not None:
            self.expected[exchange.request_id.decode()] = outcome, error

    async def close(self) -> None:
        rows = await self.run.governed.rows()
        assert {row.request_id: (row.outcome, row.error) for row in rows} == self.expected
        assert len(rows) == len(self.expected)
        assert await self.run.governed.discrepancies() == []


def envelope_code(route: Route, reply: Reply) -> Any:
    """Return the code a refusal is told with; its shape is the dialect's own."""
    told = json.loads(reply.body)
    error = told["error"]
    family = route.endpoint.family
    if family == "anthropic":
        assert told["type"] == "error"
        assert error["type"] not in ("", error["code"])
        assert told["request_id"] == reply.header("request-id")
    elif family == "gemini":
        assert (error["code"], error["status"].isupper()) == (reply.status, True)
        return error["details"][0]["reason"]
    else:
        assert error["type"] == error["code"]
        assert {"message", "param", "meta"} <= set(error)
    assert error["message"]
    return error["code"]


def blocked_code(reply: Reply) -> Any:
    """Return the code a stream was ended with, in one terminal event."""
    events = reply.body.replace(b"\r\n", b"\n").strip().split(b"\n\n")
    assert events[-1].startswith(b"event: error\ndata: ")
    error = json.loads(events[-1].partition(b"data: ")[2])["error"]
    assert error["type"] == "guardrail_blocked"
    return error["code"]


async def send(run: Run, policy: Policy, route: Route, secret: str, *, is_free: bool = False) -> tuple[Reply, Exchange]:
    """Ask; returns the answer and the exchange, which has settled once."""
    harness = run.harness
    fields = () if is_free and policy.side == "request" else policy.fields
    settled = harness.settled
    reply = await run.send(route, secret, policy.offence, *fields)
    request_id = (reply.header("X-Penstock-Request-Id") or "").encode()
    assert harness.settled == settled + 1
    assert [each.request_id for each in harness.exchanges].count(request_id) == 1
    exchange = harness.exchanges[-1]
    assert exchange.request_id == request_id
    assert run.reserved == {}
    return reply, exchange


def check_answered(run: Run, route: Route, way: Way, reply: Reply, exchange: Exchange) -> None:
    assert (reply.status, reply.is_complete, exchange.error) == (200, True, None), reply.raw
    assert exchange.is_stream == route.is_stream
    if route.endpoint.dialect != "openai.models":
        assert reply.header("X-Penstock-Fallback-Count") == ("1" if way == "second" else "0")
        assert (exchange.upstream_endpoint is not None) == (way not in ("native", "second"))
        assert run.working.requests[-1].method.decode() == route.method


def check_refused(policy: Policy, route: Route, way: Way, reply: Reply, exchange: Exchange, asked: int) -> None:
    assert exchange.error is not None, reply.raw
    assert exchange.error.code == policy.code
    is_cut = policy.side == "answer" and route.is_stream
    assert (reply.status, reply.header("X-Penstock-Error")) == ((200, None) if is_cut else (policy.status, policy.code))
    assert exchange.status == reply.status
    if policy.side == "request":
        assert asked == 0
        assert exchange.attempts == []
    else:
        assert asked == (2 if way == "second" else 1)
        assert WORD.encode() not in reply.body
    if is_cut:
        assert not reply.is_complete
        assert exchange.stream_end == "blocked"
        assert blocked_code(reply) == "stream_chunk_blocked"
    else:
        assert envelope_code(route, reply) == policy.code
        assert (reply.header("x-should-retry") == "false") == (policy.status != 429)


def check_edited(run: Run, policy: Policy, route: Route, way: Way, reply: Reply) -> None:
    assert (reply.status, reply.header("X-Penstock-Cache-Mode")) == (200, "disable")
    sent = run.working.requests[-1].body
    for marker in (b"cache_control", b"cachedContent"):
        assert marker in route.request(policy.offence) or marker == b"cachedContent"
        assert marker not in sent
    if way in ("native", "second"):
        assert json.loads(sent) == json.loads(route.request())


def check_untranslatable(reply: Reply, asked: int) -> None:
    assert (reply.status, reply.header("X-Penstock-Error"), asked) == (400, "unsupported_parameter", 0)


async def check_cell(run: Run, policy: Policy, route: Route, way: Way, books: Books) -> None:
    before = run.asked
    if policy.offence is not None or policy.side != "request":  # else what is asked is what everybody asks
        reply, exchange = await send(run, policy, route, await run.key(route, way), is_free=True)
        if (policy.name, route.endpoint.dialect, way) in UNTRANSLATABLE:
            check_untranslatable(reply, run.asked - before)
            books.note(exchange, "refused", "unsupported_parameter")
        else:
            check_answered(run, route, way, reply, exchange)
            books.note(exchange, "success")
    secret = await run.key(route, way, policy)
    if policy.uses_up:
        reply, exchange = await send(run, policy, route, secret)
        check_answered(run, route, way, reply, exchange)
        books.note(exchange, "success")
    before = run.asked
    reply, exchange = await send(run, policy, route, secret)
    assert (exchange.principal is not None) == policy.is_known
    if policy.side == "edit":
        check_edited(run, policy, route, way, reply)
        books.note(exchange, "success")
    else:
        check_refused(policy, route, way, reply, exchange, run.asked - before)
        books.note(exchange, "refused", policy.code)


async def check_all(run: Run, policy: Policy, cells: Sequence[tuple[Route, Way]]) -> None:
    books = Books(run)
    for route, way in cells:
        try:
            await check_cell(run, policy, route, way, books)
        except AssertionError as error:
            error.add_note(f"{policy.name} on {route.name}, {way}")
            raise
    await books.close()
    assert run.harness.faults == []


async def test_key_without_policies_is_answered_on_every_route(tmp_path: Path) -> None:
    async with governed_by_all(tmp_path) as run:
        books = Books(run)
        for route, way in CELLS:
            reply, exchange = await send(run, FREE, route, await run.key(route, way))
            check_answered(run, route, way, reply, exchange)
            books.note(exchange, "success")
        await books.close()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
async def test_policy_holds_on_every_route(tmp_path: Path, policy: Policy) -> None:
    async with governed_by_all(tmp_path) as run:
        await check_all(run, policy, cells_of(policy))


async def test_policies_hold_over_sockets(tmp_path: Path) -> None:
    names = ("chat", "messages_stream", "gemini_stream", "transcriptions", "response")
    async with governed_by_all(tmp_path, socket=True) as run:
        books = Books(run)
        for policy in POLICIES:
            for route, way in cells_of(policy):
                if route.name in names:
                    await check_cell(run, policy, route, way, books)
        await books.close()


@pytest.mark.parametrize("policy", UNENFORCED, ids=str)
async def test_key_whose_policy_nobody_keeps_is_refused_on_every_route(tmp_path: Path, policy: Policy) -> None:
    plugins = [plugin for plugin in PLUGINS if plugin != policy.name]
    async with governed_by_all(tmp_path, plugins) as run:
        await check_all(run, policy, CELLS)


SKIPS = {"models": "model_not_allowed", "budget": "budget_exceeded", "limit": "rate_limit_exceeded"}


@pytest.mark.parametrize("kind", SKIPS)
async def test_second_candidate_that_a_policy_excludes_is_never_asked(tmp_path: Path, kind: str) -> None:
    uncharged = {route for policy, route in EXCEPT if policy == "budget"}
    rules = PolicyRules(models=PatternRules(deny=(f"^{RENAMED}$",)))
    second = {"models": "renames", "budget": "declares", "limit": "limited"}[kind]
    async with governed_by_all(tmp_path) as run:
        for route in ROUTES:
            if not goes_on(route) or (kind == "budget" and route.name in uncharged):
                continue
            chain = [run.bindings[NATIVE[route.endpoint.family], name] for name in ("fails", second)]
            given: dict[str, Any] = {"policy_rules": rules} if kind == "models" else {}
            key_id, secret = await run.governed.key(run.governed.user_id, provider_bindings=chain, **given)
            if kind == "budget":
                await run.governed.budget(1, scope_id=key_id, provider=chain[1])
            reply, exchange = await send(run, FREE, route, secret)
            assert (reply.status, reply.body) == (503, b'{"error":{"message":"down"}}'), route
            outcomes = [(attempt.binding_id, attempt.reason, attempt.is_skipped) for attempt in exchange.attempts]
            assert outcomes == [(chain[0], "status", False), (chain[1], SKIPS[kind], True)], route
        assert run.working.requests == []
        assert len(run.failing.requests) == len(run.harness.exchanges) > 20


async def test_what_is_listed_as_impossible_is_answered_as_without_the_policy(tmp_path: Path) -> None:
    async with governed_by_all(tmp_path) as run:
        for policy in POLICIES:
            for route in [route for route in ROUTES if (policy.name, route.name) in EXCEPT]:
                free, _ = await send(run, policy, route, await run.key(route, "native"))
                reply, exchange = await send(run, policy, route, await run.key(route, "native", policy))
                if policy.name == "models_allowed" and route.name == "model":
                    assert reply.status == 404  # it is not in the list this key sees
                elif policy.name == "models_allowed" and route.name == "models":
                    assert (reply.status, reply.json()["data"]) == (200, [])
                else:
                    assert (reply.status, reply.body, exchange.error) == (200, free.body, None), (policy, route)
                if route.endpoint.dialect != "openai.models":
                    sent = [request.body for request in run.working.requests[-2:]]
                    assert sent == [route.request()] * 2, (policy, route)
