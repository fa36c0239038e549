"""What routing must hold against: other plugins, misspelled names, bodies that say two things, ids of one account."""

from __future__ import annotations

import gzip
import json
from typing import Any

import attrs
import pytest

from penstock import (
    BindingDirectory,
    Candidate,
    ConfigurationError,
    Exchange,
    Principal,
    ProviderBinding,
    Services,
    hookimpl,
    new_key,
)
from penstock.gateway import Gateway
from penstock.models import MAX_MODEL_CHARACTERS
from penstock.providers import missing_members
from penstock.testing import FakeUpstream, Harness, RecordedRequest, http_reply
from penstock.testing.harness import PEPPER
from penstock.testing.upstream import Step

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
TYPES = ("openai", "openai_compatible", "anthropic", "mock")
Table = dict[str, Any]


def binding(name: str, kind: str = "openai_compatible", **settings: Any) -> Table:
    return {"name": name, "type": kind, "credential": f"sk-{name}", **settings}


def gateway(upstream: FakeUpstream, tables: list[Table], *plugins: Any, **key: Any) -> Harness:
    secret = new_key()
    config: dict[str, Any] = {
        "routing": {"bindings": [{"base_url": upstream.base_url, **table} for table in tables]},
        "virtual_keys": {"pepper": PEPPER, "keys": [{"name": "test", "secret": secret, **key}]},
    }
    harness = Harness((*plugins, *TYPES), config, upstream)
    harness.key = secret
    return harness


def answering(status: int = 200, body: bytes = b'{"id":"x"}') -> FakeUpstream:
    return FakeUpstream([[http_reply(body, status)]], repeat=True)


def dialled(harness: Harness) -> list[str]:
    return [attempt.binding_id.removeprefix("gpc_") for attempt in harness.exchanges[-1].attempts]


# --- beside other plugins -------------------------------------------------------------------------------------------


class First:
    """Choose the first binding by name and leave the rest to others."""

    def __init__(self, services: Services) -> None:
        self.services = services

    @hookimpl(tryfirst=True)
    def select_provider(self, exchange: Exchange) -> Candidate | None:
        if exchange.attempts:
            return None
        found = self.services.get(BindingDirectory).find_binding("c")  # type: ignore[type-abstract]
        assert found is not None
        return Candidate(found, self.services.provider_of(found), exchange.peek.model)


@pytest.mark.parametrize("order", [["a", "b"], ["a", "b", "c"], ["c", "a", "b"]])
async def test_routing_goes_on_after_a_choice_of_another_plugin(order: list[str]) -> None:
    tables = [binding(name) for name in ("a", "b", "c")]
    async with gateway(answering(503), tables, First, bindings=order) as harness:
        assert (await harness.request("POST", CHAT, body={"model": "m"})).status == 503
        assert dialled(harness) == ["c", "a", "b"]


async def test_answer_of_another_plugins_choice_outlives_a_refusal_of_routing() -> None:
    async with gateway(answering(503, b"theirs"), [binding("a"), binding("c")], First) as harness:
        reply = await harness.request("POST", CHAT, body={"messages": []})
        assert (reply.status, reply.body, dialled(harness)) == (503, b"theirs", ["c"])


class Counted:
    """Be a directory that counts how often it is asked."""

    revision = 0

    def __init__(self, services: Services) -> None:
        self.asked = 0
        self.binding = ProviderBinding("gpc_a", "a", "openai_compatible", "http://127.0.0.1:1", models=("m",))
        services.provide(BindingDirectory, self)  # type: ignore[type-abstract]

    def find_binding(self, name: str) -> ProviderBinding | None:
        return self.binding if name in ("a", "gpc_a") else None

    def all_bindings(self) -> list[ProviderBinding]:
        return [self.binding]

    def bindings_of(self, principal: Principal) -> list[ProviderBinding]:
        self.asked += 1
        return [self.binding, attrs.evolve(self.binding, id="gpc_b", name="b")]


async def test_refused_model_is_resolved_once() -> None:
    async with Harness((Counted, *TYPES), {"routing": {}}) as harness:
        (directory,) = (each.instance for each in harness.gateway.generation.plugins if each.name == "counted")
        asked = []
        for model in ("m", "unknown"):
            before = directory.asked
            reply = await harness.request("POST", CHAT, body={"model": model})
            asked.append(directory.asked - before)
        assert (reply.status, reply.header("X-Penstock-Error")) == (400, "model_not_recognized")
        assert asked[0] == asked[1] > 0


class Renamed:
    """Ask for another model than the client, after routing has looked."""

    @hookimpl(trylast=True)
    def pre_request(self, exchange: Exchange) -> None:
        exchange.request = attrs.evolve(exchange.request, body=b'{"model":"m"}')


async def test_model_changed_after_a_refusal_is_resolved_anew() -> None:
    tables = [binding("a", models=["m"]), binding("b", models=["n"])]
    async with gateway(answering(), tables, Renamed) as harness:
        assert (await harness.request("POST", CHAT, body={"model": "unknown"})).status == 200
        assert dialled(harness) == ["a"]


# --- names in keys and bindings -------------------------------------------------------------------------------------


async def test_names_no_binding_has_and_handles_given_twice_are_told_line_by_line() -> None:
    tables = [binding("azure", handle="h"), binding("openai"), binding("spare", handle="h")]
    harness = gateway(answering(), tables, bindings=["opnai", "gpc_azure", "spare", "zzz"])
    with pytest.raises(ConfigurationError) as raised:
        async with harness:
            pytest.fail("the gateway started")
    assert raised.value.faults == (
        "harness: [plugins.routing] binding 'spare': handle: 'h' is that of binding 'azure'",
        "harness: [plugins.routing] key 'test': bindings: there is no binding 'opnai'; did you mean 'openai'?",
        "harness: [plugins.routing] key 'test': bindings: there is no binding 'zzz'; there are azure, openai, spare",
    )


def test_provider_must_have_every_member_of_the_protocol() -> None:
    class Partial:
        type = "partial"
        dialects = frozenset[str]()
        build = 7

        def read_usage(self) -> None:
            """Read nothing."""

    assert missing_members(Partial()) == ["model_prefixes", "default_base_url", "check", "build"]


def test_plugin_of_an_unfinished_provider_is_named() -> None:
    class Half:
        @hookimpl
        def register_providers(self) -> list[Any]:
            return [object()]

    with pytest.raises(
        ConfigurationError, match=r"\[plugins.half\] registers a provider without type, dialects, model_"
    ):
        Gateway(gateway(answering(), [binding("a")], ("half", Half)).configuration())


# --- which binding --------------------------------------------------------------------------------------------------


async def test_the_only_binding_takes_what_it_does_not_declare() -> None:
    upstream = answering()
    async with gateway(upstream, [binding("a", models=["gpt-5"], model_map={"x": "y"})]) as harness:
        assert (await harness.request("POST", CHAT, body={"model": "gpt-9"})).status == 200
        candidate = harness.exchanges[-1].candidate
        assert candidate is not None
        assert (candidate.model, candidate.model_source) == ("gpt-9", "only")


async def test_models_allowed_restricts_the_only_binding() -> None:
    tables = [binding("a", models=["gpt-5"])]
    async with gateway(answering(), tables, models_allowed=["gpt-5"]) as harness:
        reply = await harness.request("POST", CHAT, body={"model": "gpt-9"})
        assert (reply.status, reply.header("X-Penstock-Error")) == (403, "model_not_allowed")


async def test_binding_that_does_not_serve_the_endpoint_is_not_said_to_be_missing() -> None:
    tables = [binding("a"), binding("claude", "anthropic", handle="c")]
    async with gateway(answering(), tables) as harness:
        for model in ("anthropic/claude-x", "c/claude-x"):
            reply = await harness.request("POST", CHAT, body={"model": model})
            error = reply.json()["error"]
            assert (reply.status, error["code"]) == (400, "provider_not_bound")
            assert error["message"].endswith("which does not serve this endpoint.")
        missing = await harness.request("POST", CHAT, body={"model": "mock/x"})
        assert "this virtual key has no binding for" in missing.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path"), [("POST", CHAT), ("GET", "/v1/responses/resp_1")])
async def test_key_whose_bindings_serve_other_endpoints_is_told_so(method: str, path: str) -> None:
    body = {"model": "m"} if method == "POST" else b""
    async with gateway(answering(), [binding("claude", "anthropic")]) as harness:
        reply = await harness.request(method, path, body=body)
        assert reply.json()["error"]["message"] == "No provider binding of this virtual key serves this endpoint."


# --- responses that build on one another ----------------------------------------------------------------------------


def storing(request: RecordedRequest) -> list[Step]:
    account = (request.headers.get(b"authorization") or b"").removeprefix(b"Bearer sk-")
    return [http_reply(b'{"id":"resp_%b","object":"response","model":"m"}' % account)]


async def test_response_that_builds_on_another_goes_to_its_binding_first() -> None:
    upstream = FakeUpstream([[http_reply(b"", 503)], storing, [http_reply(b"", 503)]], repeat=True)
    async with gateway(upstream, [binding("a"), binding("b"), binding("c")]) as harness:
        made = await harness.request("POST", RESPONSES, body={"model": "m"})
        assert (made.json()["id"], dialled(harness)) == ("resp_b", ["a", "b"])
        for previous, order in (("resp_b", ["b", "a", "c"]), ("resp_z", ["a", "b", "c"]), (7, ["a", "b", "c"])):
            await harness.request("POST", RESPONSES, body={"model": "m", "previous_response_id": previous})
            assert dialled(harness) == order


# --- what a client says ---------------------------------------------------------------------------------------------


async def test_name_of_a_model_is_bounded() -> None:
    upstream = answering()
    async with gateway(upstream, [binding("a"), binding("m", "mock", base_url="")]) as harness:
        long = "m" * MAX_MODEL_CHARACTERS
        assert (await harness.request("POST", CHAT, body={"model": "a/" + long[2:]})).status == 200
        for path, body in ((CHAT, {"model": long + "m"}), (f"/v1beta/models/{long}m:generateContent", {})):
            reply = await harness.request("POST", path, body=body)
            assert (reply.status, reply.header("X-Penstock-Error")) == (400, "bad_request")
        assert len(upstream.requests) == 1


TWICE = [
    (b'{"model":"dear","model":"cheap"}', b'{"model":"cheap","model":"cheap"}'),
    (b'{"mod\\u0065l":"dear", "model":"cheap"}', b'{"mod\\u0065l":"cheap", "model":"cheap"}'),
    (b'{"model":7,"model":"cheap"}', b'{"model":"cheap","model":"cheap"}'),
    (b'{ "model" : "cheap" }', b'{ "model" : "cheap" }'),
    (
        b'{"model":"ch\\u0065ap","x":{"model":"dear","Model":1}}',
        b'{"model":"ch\\u0065ap","x":{"model":"dear","Model":1}}',
    ),
]


@pytest.mark.parametrize("coding", [None, "gzip"])
@pytest.mark.parametrize(("body", "sent"), TWICE)
async def test_restricted_key_names_one_model_only(body: bytes, sent: bytes, coding: str | None) -> None:
    upstream = answering()
    async with gateway(upstream, [binding("a")], models_allowed=["cheap"]) as harness:
        headers = {"Content-Type": "application/json", **({"Content-Encoding": coding} if coding else {})}
        wire = gzip.compress(body) if coding else body
        assert (await harness.request("POST", CHAT, headers, wire)).status == 200
        got = upstream.requests[0]
        assert got.body == (wire if body == sent else sent)
        assert got.headers.get(b"content-encoding") == (coding.encode() if coding and body == sent else None)


@pytest.mark.parametrize("name", ["Model", "MODEL", "mo\\u0044el"])
async def test_restricted_key_may_not_spell_the_model_in_another_case(name: str) -> None:
    upstream = answering()
    body = f'{{"{name}":"dear","model":"cheap"}}'.encode()
    async with gateway(upstream, [binding("a")], models_allowed=["cheap"]) as harness:
        reply = await harness.request("POST", CHAT, body=body)
        assert (reply.status, reply.header("X-Penstock-Error")) == (400, "bad_request")
        assert upstream.requests == []
    async with gateway(upstream, [binding("a")]) as harness:
        assert (await harness.request("POST", CHAT, body=body)).status == 200
        assert upstream.requests[0].body == body


FIELD = b'--seam\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'


async def test_restricted_key_names_one_model_only_in_a_form() -> None:
    upstream = answering()
    headers = {"Content-Type": "multipart/form-data; boundary=seam"}
    async with gateway(upstream, [binding("a")], models_allowed=["cheap"]) as harness:
        body = FIELD % (b"model", b"dear") + FIELD % (b"model", b"cheap") + b"--seam--\r\n"
        assert (await harness.request("POST", "/v1/images/edits", headers, body)).status == 200
        assert upstream.requests[0].body == body.replace(b"dear", b"cheap")
        other = await harness.request("POST", "/v1/images/edits", headers, body.replace(b"model", b"Model", 1))
        assert (other.status, other.header("X-Penstock-Error")) == (400, "bad_request")


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/audio/transcriptions"])
async def test_json_passes_where_forms_are_usual(path: str) -> None:
    upstream = answering()
    async with gateway(upstream, [binding("a", model_map={"nick": "image-1"})]) as harness:
        reply = await harness.request("POST", path, {"Content-Type": "application/json"}, b'{"model":"nick"}')
        assert reply.status == 200
        assert upstream.requests[0].body == b'{"model":"image-1"}'


# --- Gemini's paths without a model ---------------------------------------------------------------------------------

WITHOUT_MODEL = [("GET", "/v1beta/models?pageSize=5"), ("POST", "/v1beta/cachedContents"), ("GET", "/v1beta/files/x")]


class Gemini:
    """Bring a provider that speaks Gemini's dialect by forwarding, as an adapter of somebody else's would."""

    @hookimpl
    def register_providers(self) -> list[Any]:
        from penstock import HTTPProvider, forward  # noqa: PLC0415 - this provider's alone

        class Forwarding(HTTPProvider):
            def build(self, exchange: Exchange, candidate: Candidate) -> Any:
                return forward(exchange, candidate, self.address(candidate.binding), path=exchange.request.path)

            def read_usage(self, exchange: Exchange, window: Any) -> None:
                """Read nothing."""

        return [Forwarding(type="google", dialects=frozenset({"gemini.generate"}))]


@pytest.mark.parametrize("key", [{}, {"models_allowed": ["x"]}])
@pytest.mark.parametrize(("method", "path"), WITHOUT_MODEL)
async def test_geminis_paths_without_a_model_go_to_the_first_binding(method: str, path: str, key: Table) -> None:
    upstream = answering()
    tables = [binding("other"), binding("g", "google"), binding("h", "google")]
    async with gateway(upstream, tables, ("gemini", Gemini), **key) as harness:
        body = json.dumps({"model": "models/x"}).encode() if method == "POST" else b""
        assert (await harness.request(method, path, body=body)).status == 200
        assert dialled(harness) == ["g"]
        assert (upstream.requests[0].target, upstream.requests[0].body) == (b"/v1" + path.encode(), body)


@pytest.mark.parametrize("path", ["/v1beta/tunedModels/dear:generateContent", "/v1beta/%6dodels/dear:generateContent"])
async def test_restricted_key_gets_no_call_whose_model_cannot_be_told(path: str) -> None:
    upstream = answering()
    tables = [binding("g", "google")]
    async with gateway(upstream, tables, ("gemini", Gemini), models_allowed=["cheap"]) as harness:
        reply = await harness.request("POST", path, body=b"{}")
        assert (reply.status, reply.header("X-Penstock-Error")) == (400, "missing_model")
        assert upstream.requests == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"model":"models/dear"}', 403, "model_not_allowed"),
        (b'{"m\\u006fdel":"dear"}', 403, "model_not_allowed"),
        (b'{"model":"models/dear","model":"models/cheap"}', 403, "model_not_allowed"),
        (b'{"model":"models/cheap","model":"models/dear"}', 403, "model_not_allowed"),
        (b'{"model":"models/cheap"', 400, "bad_request"),
        (b"[]", 400, "bad_request"),
        (b'{"model":"models/cheap","contents":[]}', 200, None),
        (b'{"displayName":"dear"}', 200, None),
    ],
)
async def test_restricted_key_caches_contents_for_its_own_models_only(
    body: bytes, status: int, code: str | None
) -> None:
    upstream = answering()
    tables = [binding("g", "google")]
    async with gateway(upstream, tables, ("gemini", Gemini), models_allowed=["cheap"]) as harness:
        reply = await harness.request("POST", "/v1beta/cachedContents", body=body)
        assert (reply.status, reply.header("X-Penstock-Error")) == (status, code)
        assert [request.body for request in upstream.requests] == ([body] if status == 200 else [])
