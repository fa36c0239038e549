"""Which binding serves a request and what the model is called there: wire rules, over a whole gateway."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from penstock import ConfigurationError, new_key
from penstock.gateway import Gateway
from penstock.testing import FakeUpstream, Harness, RecordedRequest, Reply, http_reply
from penstock.testing.harness import PEPPER
from penstock.testing.upstream import Step

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
TYPES = ("openai", "openai_compatible", "anthropic", "mock")
Table = dict[str, Any]


def binding(name: str, kind: str = "openai_compatible", **settings: Any) -> Table:
    return {"name": name, "type": kind, "credential": f"sk-{name}", **settings}


def gateway(upstream: FakeUpstream, tables: list[Table], /, **key: Any) -> Harness:
    """Return a gateway with these bindings, all at one upstream, and a key with these settings."""
    secret = new_key()
    routing = {"bindings": [{"base_url": upstream.base_url, **table} for table in tables]}
    config: dict[str, Any] = {
        "routing": routing,
        "virtual_keys": {"pepper": PEPPER, "keys": [{"name": "test", "secret": secret, **key}]},
    }
    harness = Harness(TYPES, config, upstream)
    harness.key = secret
    return harness


def answering(status: int = 200, body: bytes = b'{"id":"x"}') -> FakeUpstream:
    return FakeUpstream([[http_reply(body, status)]], repeat=True)


async def ask(harness: Harness, model: object, path: str = CHAT, **members: Any) -> Reply:
    return await harness.request("POST", path, body={"model": model, "messages": [], **members})


def took(harness: Harness) -> tuple[list[str], str | None, str | None]:
    """Return the bindings dialled in order, the model asked for upstream and the rule that chose them."""
    exchange = harness.exchanges[-1]
    dialled = [attempt.binding_id.removeprefix("gpc_") for attempt in exchange.attempts]
    candidate = exchange.candidate
    assert candidate is not None
    return dialled, candidate.model, candidate.model_source


def asked_upstream(request: RecordedRequest) -> Any:
    return json.loads(request.body)["model"]


# --- the seven steps ------------------------------------------------------------------------------------------------

EAST = binding("east", "openai", handle="east")
WEST = binding("west", models=["gpt-5", "east/odd", "llama"], model_map={"fast": "gpt-5-turbo"})
PLAIN = binding("plain")
STEPS = [
    ("nick", "gpt-5", ["west"], "alias"),
    ("east/gpt-5", "gpt-5", ["east"], "handle"),
    ("openai/gpt-5", "gpt-5", ["east"], "type"),
    ("openai_compatible/vendor/gpt-5", "vendor/gpt-5", ["west"], "type"),
    ("gpt-5", "gpt-5", ["west"], "declared"),
    ("fast", "gpt-5-turbo", ["west"], "declared"),
    ("gpt-9", "gpt-9", ["east"], "guessed"),
    ("o3-mini", "o3-mini", ["east"], "guessed"),
    ("ft:gpt-4o:me::1", "ft:gpt-4o:me::1", ["east"], "guessed"),
    ("odd-model", "odd-model", ["plain"], "undeclared"),
    ("vendor/odd-model", "vendor/odd-model", ["plain"], "undeclared"),
]


@pytest.mark.parametrize(("asked", "model", "bindings", "source"), STEPS)
async def test_first_rule_that_matches_decides(asked: str, model: str, bindings: list[str], source: str) -> None:
    upstream = answering()
    async with gateway(upstream, [EAST, WEST, PLAIN], model_aliases={"nick": "gpt-5"}) as harness:
        reply = await ask(harness, asked)
        assert reply.status == 200
        assert took(harness) == (bindings, model, source)
        assert asked_upstream(upstream.requests[0]) == model
        assert reply.header("X-Penstock-Model") == model


@pytest.mark.parametrize("alias", ["gpt-5", "east/gpt-5", "openai/gpt-5"])
async def test_alias_wins_over_every_other_rule_and_is_resolved_once(alias: str) -> None:
    upstream = answering()
    aliases = {alias: "llama", "llama": "gpt-9"}
    async with gateway(upstream, [EAST, WEST, PLAIN], model_aliases=aliases) as harness:
        assert (await ask(harness, alias)).status == 200
        assert took(harness) == (["west"], "llama", "alias")


async def test_alias_may_name_a_handle() -> None:
    async with gateway(answering(), [EAST, WEST], model_aliases={"nick": "east/gpt-9"}) as harness:
        await ask(harness, "nick")
        assert took(harness) == (["east"], "gpt-9", "alias")


async def test_handle_wins_over_type_of_the_same_word() -> None:
    named = binding("named", handle="openai")
    async with gateway(answering(), [EAST, named]) as harness:
        await ask(harness, "openai/gpt-5")
        assert took(harness) == (["named"], "gpt-5", "handle")


async def test_only_the_part_before_the_first_slash_is_the_type() -> None:
    async with gateway(answering(), [EAST, PLAIN]) as harness:
        await ask(harness, "openai/anthropic/claude")
        assert took(harness) == (["east"], "anthropic/claude", "type")


async def test_declared_model_may_begin_with_a_type_the_key_has_no_binding_for() -> None:
    router = binding("router", models=["anthropic/claude-x"])
    async with gateway(answering(), [router, PLAIN]) as harness:
        await ask(harness, "anthropic/claude-x")
        assert took(harness) == (["router"], "anthropic/claude-x", "declared")


async def test_the_only_binding_takes_what_its_type_does_not_guess() -> None:
    async with gateway(answering(), [EAST]) as harness:
        await ask(harness, "odd-model")
        assert took(harness) == (["east"], "odd-model", "only")


async def test_several_bindings_of_guessing_types_take_what_none_of_them_guesses() -> None:
    async with gateway(answering(404), [EAST, binding("second", "openai")]) as harness:
        await ask(harness, "odd-model")
        assert took(harness) == (["east", "second"], "odd-model", "undeclared")


async def test_bindings_of_one_rule_are_tried_in_the_order_of_the_key() -> None:
    tables = [binding(name, models=["gpt-5"]) for name in ("a", "b", "c")]
    upstream = answering(503)
    async with gateway(upstream, tables, bindings=["c", "gpc_a"]) as harness:
        await ask(harness, "gpt-5")
        assert took(harness)[0] == ["c", "a"]
        sent = [request.headers.get(b"authorization") for request in upstream.requests]
        assert sent == [b"Bearer sk-c", b"Bearer sk-a"]


async def test_each_candidate_maps_the_model_its_own_way() -> None:
    tables = [binding("a", model_map={"fast": "a-fast"}), binding("b", models=["fast"])]
    upstream = answering(503)
    async with gateway(upstream, tables) as harness:
        await ask(harness, "fast")
        assert [asked_upstream(request) for request in upstream.requests] == ["a-fast", "fast"]


# --- what is refused ------------------------------------------------------------------------------------------------


async def refused(harness: Harness, model: object, path: str = CHAT) -> tuple[int, str, Mapping[str, Any]]:
    reply = await ask(harness, model, path)
    error = reply.json()["error"]
    assert reply.header("X-Penstock-Error") == error["code"]
    assert reply.header("x-should-retry") == "false"
    assert harness.exchanges[-1].attempts == []
    return reply.status, error["code"], error


async def test_unknown_model_is_refused_naming_at_most_ten_the_key_can_call() -> None:
    many = binding("many", models=[f"m-{number:02}" for number in range(12)])
    allowed = ["m-0*", "m-11", "m-10"]
    async with gateway(answering(), [many, binding("b", models=["x"])], models_allowed=allowed) as harness:
        status, code, error = await refused(harness, "m-99")
        assert (status, code, error["param"]) == (400, "model_not_recognized", "model")
        assert error["meta"]["models"] == [f"m-{number:02}" for number in range(10)]
        assert "m-09" in error["message"]
        assert "m-10" not in error["message"]


async def test_alias_that_leads_nowhere_is_refused_and_not_offered() -> None:
    tables = [binding("a", models=["x"]), binding("b", models=["y"])]
    aliases = {"broken": "no-such", "worse": "openai/x", "fine": "y"}
    async with gateway(answering(), tables, model_aliases=aliases) as harness:
        for asked in ("broken", "m-99"):
            status, code, error = await refused(harness, asked)
            assert (status, code, error["meta"]) == (400, "model_not_recognized", {"models": ["x", "y", "fine"]})


@pytest.mark.parametrize("asked", ["openai/gpt-5", "far/gpt-5"])
async def test_named_binding_the_key_may_not_use_is_not_bound(asked: str) -> None:
    tables = [PLAIN, EAST, binding("far", handle="far")]
    async with gateway(answering(), tables, bindings=["plain"]) as harness:
        status, code, _ = await refused(harness, asked)
        assert (status, code) == (400, "provider_not_bound")


async def test_key_without_any_binding_for_the_endpoint_is_not_bound() -> None:
    async with gateway(answering(), [EAST]) as harness:
        assert (await refused(harness, "claude-x", "/v1/messages"))[:2] == (400, "provider_not_bound")


@pytest.mark.parametrize(
    "body", [b"{}", b'{"model":7}', b'{"model":null}', b'{"model":""}', b'{"model":"a","model":[]}']
)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_body_without_a_model_is_refused(path: str, body: bytes) -> None:
    async with gateway(answering(), [binding("m", "mock", base_url="")]) as harness:
        reply = await harness.request("POST", path, body=body)
        assert (reply.status, reply.json()["error"]["code"]) == (400, "missing_model")


ALLOWED = [
    ("gpt-9", "gpt-9", True),
    ("gpt-9", "openai/gpt-9", True),
    ("openai/gpt-9", "gpt-9", True),
    ("openai/gpt-9", "openai/*", True),
    ("east/gpt-9", "gpt-*", True),
    ("east/gpt-9", "openai/gpt-9", True),
    ("east/gpt-9", "east/gpt-9", False),
    ("gpt-9", "GPT-9", False),
    ("gpt-9", "anthropic/*", False),
    ("nick", "gpt-9", True),
    ("nick", "openai/gpt-9", True),
    ("nick", "nick", False),
]


@pytest.mark.parametrize(("asked", "glob", "passes"), ALLOWED)
async def test_models_allowed_judges_the_resolved_model_in_both_spellings(asked: str, glob: str, passes: bool) -> None:
    settings = {"models_allowed": [glob], "model_aliases": {"nick": "gpt-9"}}
    async with gateway(answering(), [EAST, PLAIN], **settings) as harness:
        if passes:
            assert (await ask(harness, asked)).status == 200
        else:
            status, code, error = await refused(harness, asked)
            assert (status, code) == (403, "model_not_allowed")
            assert error["meta"] == {"rule": "models_allowed", "value": asked}


async def test_candidates_that_are_not_allowed_leave_the_chain() -> None:
    tables = [binding("a", "openai", models=["m"]), binding("b", models=["m"])]
    async with gateway(answering(503), tables, models_allowed=["openai_compatible/*"]) as harness:
        await ask(harness, "m")
        assert took(harness)[0] == ["b"]


async def test_names_of_any_length_are_resolved_and_long_ones_are_not_kept() -> None:
    async with gateway(answering(), [PLAIN]) as harness:
        for model in ("m", "m", "x" * 257):
            assert (await ask(harness, model)).status == 200
        routing = next(each.instance for each in harness.gateway.generation.plugins if each.name == "routing")
        assert [key[1] for key in routing._routes] == ["m"]


def test_two_bindings_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"bindings\[1\]\.name: 'a' is taken"):
        Gateway(gateway(answering(), [binding("a"), binding("a")]).configuration())


# --- where the model stands in a request ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (b'{"model":"no","model":"nick"}', b'{"model":"gpt-5","model":"gpt-5"}'),
        (b'{ "mod\\u0065l" : "ni\\u0063k" , "x":1.0}', b'{ "mod\\u0065l" : "gpt-5" , "x":1.0}'),
        (b'{"x":{"model":"nick"},"model":"nick"}', b'{"x":{"model":"nick"},"model":"gpt-5"}'),
    ],
)
async def test_last_model_decides_and_an_edit_replaces_all_and_nothing_else(body: bytes, sent: bytes) -> None:
    upstream = answering()
    async with gateway(upstream, [WEST], model_aliases={"nick": "gpt-5"}) as harness:
        assert (await harness.request("POST", CHAT, body=body)).status == 200
        assert upstream.requests[0].body == sent


async def test_last_of_two_models_decides_and_both_pass_unedited() -> None:
    upstream = answering()
    body = b'{"model":"other","model":"gpt-5"}'
    async with gateway(upstream, [WEST]) as harness:
        await harness.request("POST", CHAT, body=body)
        assert took(harness)[1:] == ("gpt-5", "declared")
        assert upstream.requests[0].body == body


FORM = (
    b'--seam\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n\r\nnick\x00\xff\r\n'
    b'--seam\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--seam--\r\n'
)


@pytest.mark.parametrize("content_type", ["multipart/form-data; boundary=seam", 'Multipart/Form-Data; Boundary="seam"'])
@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/images/edits"])
@pytest.mark.parametrize(("asked", "sent"), [(b"nick", b"whisper-1"), (b"whisper-1", b"whisper-1")])
async def test_model_of_a_form_is_read_and_replaced(path: str, content_type: str, asked: bytes, sent: bytes) -> None:
    upstream = answering()
    async with gateway(upstream, [EAST], model_aliases={"nick": "whisper-1"}) as harness:
        reply = await harness.request("POST", path, {"Content-Type": content_type}, FORM % asked)
        assert reply.status == 200
        assert upstream.requests[0].body == FORM % sent
        assert upstream.requests[0].headers.get(b"content-type") == content_type.encode()


async def test_form_without_a_model_is_refused() -> None:
    async with gateway(answering(), [EAST]) as harness:
        headers = {"Content-Type": "multipart/form-data; boundary=seam"}
        body = FORM.replace(b'name="model"', b'name="mode"') % b"x"
        reply = await harness.request("POST", "/v1/audio/transcriptions", headers, body)
        assert (reply.status, reply.json()["error"]["code"]) == (400, "missing_model")


# --- models in Gemini's paths ---------------------------------------------------------------------------------------

GEMINI = "/v1beta/models/gemini-x:generateContent"
CONTENTS = {"contents": [{"parts": [{"text": "Hi"}]}]}


@pytest.mark.parametrize("path", [GEMINI, GEMINI.replace("generate", "streamGenerate") + "?alt=sse"])
async def test_model_of_a_path_is_resolved_and_answered(path: str) -> None:
    mock = binding("m", "mock", base_url="", model_map={"nice": "gemini-real"})
    async with gateway(answering(), [mock], model_aliases={"gemini-x": "nice"}) as harness:
        reply = await harness.request("POST", path, body=CONTENTS)
        assert reply.status == 200
        assert b'"modelVersion":"gemini-real"' in reply.body
        assert took(harness) == (["m"], "gemini-real", "alias")


async def test_refusals_on_gemini_paths_have_geminis_shape() -> None:
    mock = binding("m", "mock", base_url="")
    async with gateway(answering(), [mock], models_allowed=["other"]) as harness:
        reply = await harness.request("POST", GEMINI, body=CONTENTS)
        error = reply.json()["error"]
        assert (reply.status, error["status"], error["details"][0]["reason"]) == (
            403, "PERMISSION_DENIED", "model_not_allowed",
        )  # fmt: skip


# --- stored responses -----------------------------------------------------------------------------------------------


def storing(request: RecordedRequest) -> list[Step]:
    """Answer as an account of its own that knows the responses it has made."""
    account = (request.headers.get(b"authorization") or b"").removeprefix(b"Bearer sk-")
    return [http_reply(b'{"id":"resp_%b","object":"response","model":"m"}' % account)]


STORED = [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items?limit=1")]


@pytest.mark.parametrize(("method", "rest"), STORED)
async def test_stored_response_stays_with_the_binding_that_made_it(method: str, rest: str) -> None:
    upstream = FakeUpstream([storing], repeat=True)
    async with gateway(upstream, [binding("a", models=["x"]), binding("b", models=["m"])]) as harness:
        made = await ask(harness, "m", "/v1/responses", input="Hi")
        assert made.json()["id"] == "resp_b"
        reply = await harness.request(method, f"/v1/responses/resp_b{rest}")
        assert reply.status == 200
        assert took(harness) == (["b"], None, "stored")
        sent = upstream.requests[1]
        assert (sent.method, sent.target) == (method.encode(), f"/v1/responses/resp_b{rest}".encode())
        assert sent.headers.get(b"authorization") == b"Bearer sk-b"


async def test_streamed_response_is_remembered_too() -> None:
    body = b'event: response.created\ndata: {"type":"response.created","response":{"id":"resp_s"}}\n\n'
    event_stream = http_reply(body, fields=[(b"Content-Type", b"text/event-stream")])
    upstream = FakeUpstream([[event_stream], [http_reply()]])
    async with gateway(upstream, [binding("a", models=["x"]), binding("b", models=["m"])]) as harness:
        await ask(harness, "m", "/v1/responses", stream=True)
        await harness.request("GET", "/v1/responses/resp_s")
        assert took(harness)[0] == ["b"]


async def test_unknown_stored_response_is_asked_of_the_primary_only() -> None:
    async with gateway(answering(404), [binding("a"), binding("b")], bindings=["b", "a"]) as harness:
        assert (await harness.request("GET", "/v1/responses/resp_x")).status == 404
        assert took(harness)[0] == ["b"]


async def test_stored_response_is_out_of_reach_for_keys_without_its_binding() -> None:
    upstream = FakeUpstream([storing], repeat=True)
    owner, other = new_key(), new_key()
    tables = [{"base_url": upstream.base_url, **binding(name)} for name in ("a", "b")]
    keys = [
        {"name": "owner", "secret": owner, "bindings": ["a"]},
        {"name": "other", "secret": other, "bindings": ["b"]},
    ]
    config: dict[str, Any] = {"routing": {"bindings": tables}, "virtual_keys": {"pepper": PEPPER, "keys": keys}}
    async with Harness(config=config, upstream=upstream) as harness:
        bearer = {"Authorization": f"Bearer {owner}"}
        await harness.request("POST", "/v1/responses", bearer, {"model": "m"})
        for method, rest in STORED:
            reply = await harness.request(method, f"/v1/responses/resp_a{rest}", {"x-api-key": other})
            assert (reply.status, reply.json()["error"]["code"]) == (404, "not_found")
        assert len(upstream.requests) == 1
        assert (await harness.request("GET", "/v1/responses/resp_a", bearer)).status == 200
