"""Who may call: where keys are looked for, what makes one unusable, and what a refusal says."""

from __future__ import annotations

import time
from typing import Any

import attrs
import pytest

from penstock import ConfigurationError, Exchange, Principal, Secret, Services, hash_key, hookimpl, new_key
from penstock.gateway import Gateway
from penstock.testing import FakeUpstream, Harness, Reply, http_reply
from penstock.testing.harness import PEPPER
from penstock_plugins.virtual_keys import ConfiguredKeys, KeyConfig, KeysConfig, VirtualKeys

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
HEADERS = ("Authorization", "x-api-key", "api-key", "x-goog-api-key")
Pairs = list[tuple[bytes, bytes]]


def with_keys(*keys: dict[str, Any], namespace: str = "penstock") -> Harness:
    config = {"virtual_keys": {"pepper": PEPPER, "keys": list(keys)}}
    upstream = FakeUpstream([[http_reply()]], repeat=True)
    return Harness(config=config, upstream=upstream, gateway={"namespace": namespace})


def presented(name: str, secret: str) -> tuple[bytes, bytes]:
    value = f"Bearer {secret}" if name == "Authorization" else secret
    return name.encode(), value.encode()


async def call(harness: Harness, *fields: tuple[bytes, bytes], path: str = CHAT) -> Reply:
    """Call with these credentials and no others."""
    given = fields or ((b"x-none", b"1"), (b"Authorization", b""))
    return await harness.request("POST", path, [*given], {"model": "claude-m" if "messages" in path else "m"})


def caller(harness: Harness) -> str | None:
    principal = harness.exchanges[-1].principal
    return None if principal is None else principal.key_name


# --- where a key is looked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
@pytest.mark.parametrize("header", HEADERS)
async def test_key_is_taken_from_each_header_on_each_route(header: str, path: str) -> None:
    secret = new_key()
    async with with_keys({"name": "k", "secret": secret}) as harness:
        assert (await call(harness, presented(header, secret), path=path)).status == 200
        assert caller(harness) == "k"
        sent = harness.upstreams[0].requests[0].raw
        assert secret.encode() not in sent


@pytest.mark.parametrize("first", range(4))
async def test_first_header_of_the_order_wins_wherever_it_stands(first: int) -> None:
    secrets = [new_key() for _ in HEADERS]
    keys = [{"name": name, "secret": secret} for name, secret in zip(HEADERS, secrets, strict=True)]
    fields = [presented(name, secret) for name, secret in zip(HEADERS, secrets, strict=True)][first:]
    async with with_keys(*keys) as harness:
        assert (await call(harness, *reversed(fields))).status == 200
        assert caller(harness) == HEADERS[first]


@pytest.mark.parametrize("empty", [b"", b"Bearer", b"Bearer   ", b"Basic dXNlcjpwYXNz"])
async def test_empty_bearer_and_other_schemes_leave_it_to_the_next_header(empty: bytes) -> None:
    secret = new_key()
    async with with_keys({"name": "k", "secret": secret}) as harness:
        fields = [(b"Authorization", empty), (b"x-api-key", b""), (b"api-key", secret.encode())]
        assert (await call(harness, *fields)).status == 200


@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER   "])
async def test_scheme_is_read_in_any_case(scheme: bytes) -> None:
    secret = new_key()
    async with with_keys({"name": "k", "secret": secret}) as harness:
        assert (await call(harness, (b"Authorization", scheme + secret.encode()))).status == 200


@pytest.mark.parametrize("bad", ["nonsense", "sk-ant-abc", "ps_vk_live_", "é"])
async def test_wrong_first_credential_is_refused_and_never_replaced_by_the_next(bad: str) -> None:
    secret = new_key()
    async with with_keys({"name": "k", "secret": secret}) as harness:
        reply = await call(harness, (b"Authorization", b"Bearer " + bad.encode()), presented("x-api-key", secret))
        assert (reply.status, reply.header("X-Penstock-Error")) == (401, "invalid_api_key")
        assert harness.upstreams[0].requests == []


# --- Gemini's query parameter ---------------------------------------------------------------------------------------

GEMINI = "/v1beta/models/gemini-x:generateContent"


def gemini(key: dict[str, Any]) -> Harness:
    config: dict[str, Any] = {
        "virtual_keys": {"pepper": PEPPER, "keys": [key]},
        "routing": {"bindings": [{"name": "m", "type": "mock"}]},
    }
    return Harness(["mock"], config, FakeUpstream([[http_reply()]], repeat=True))


@pytest.mark.parametrize("query", ["?key={}", "?alt=sse&key={}", "?key=&key={}&a=b"])
async def test_key_in_the_query_is_taken_on_gemini_paths(query: str) -> None:
    secret = new_key()
    async with gemini({"name": "k", "secret": secret}) as harness:
        reply = await harness.request(
            "POST", GEMINI + query.format(secret), [(b"x-api-key", b"")], {"contents": [{"parts": [{"text": "Hi"}]}]}
        )
        assert reply.status == 200
        assert caller(harness) == "k"


async def test_header_wins_over_the_query() -> None:
    secret = new_key()
    async with gemini({"name": "k", "secret": secret}) as harness:
        reply = await harness.request("POST", f"{GEMINI}?key={secret}", [(b"x-goog-api-key", b"wrong")], {})
        assert (reply.status, reply.json()["error"]["status"]) == (401, "UNAUTHENTICATED")


async def test_key_in_the_query_is_no_credential_elsewhere() -> None:
    secret = new_key()
    async with with_keys({"name": "k", "secret": secret}) as harness:
        assert (await call(harness, path=f"{CHAT}?key={secret}")).status == 401


# --- what makes a key unusable --------------------------------------------------------------------------------------


async def refusal(harness: Harness, secret: str) -> tuple[int, str | None, str | None]:
    reply = await call(harness, presented("Authorization", secret))
    assert harness.upstreams[0].requests == []
    assert secret.encode() not in reply.raw
    return reply.status, reply.header("X-Penstock-Error"), reply.header("x-should-retry")


UNUSABLE = [
    ({"status": "revoked"}, "virtual_key_revoked"),
    ({"status": "disabled"}, "virtual_key_disabled"),
    ({"expires_at": 1.0}, "virtual_key_expired"),
    ({"status": "revoked", "expires_at": 1}, "virtual_key_revoked"),
]


@pytest.mark.parametrize(("settings", "code"), UNUSABLE)
async def test_known_key_that_is_unusable_is_403(settings: dict[str, Any], code: str) -> None:
    secret = new_key()
    async with with_keys({"name": "k", "secret": secret, **settings}) as harness:
        assert await refusal(harness, secret) == (403, code, "false")


async def test_key_works_until_it_expires() -> None:
    secret = new_key()
    async with with_keys({"name": "k", "secret": secret, "expires_at": time.time() + 3600}) as harness:
        assert (await call(harness, presented("x-api-key", secret))).status == 200


async def test_well_formed_key_nobody_made_is_unknown() -> None:
    async with with_keys({"name": "k", "secret": new_key()}) as harness:
        assert await refusal(harness, new_key()) == (401, "invalid_api_key", "false")


@attrs.define
class Counting:
    """A directory that counts its look-ups."""

    inner: ConfiguredKeys
    asked: int = 0

    def find_key(self, key_hash: bytes) -> Any:
        self.asked += 1
        return self.inner.find_key(key_hash)


def mistyped(secret: str) -> list[str]:
    """Return the key with each character in turn replaced, dropped or doubled."""
    replaced = [secret[:at] + ("A" if secret[at] != "A" else "B") + secret[at + 1 :] for at in range(len(secret))]
    return [*replaced, secret[:-1], secret[1:], secret + "0", secret.lower(), f"{secret} {secret}"]


async def test_typo_is_refused_without_a_look_up() -> None:
    secret = new_key()
    async with with_keys({"name": "k", "secret": secret}) as harness:
        plugins = harness.gateway.generation.plugins
        plugin = next(each.instance for each in plugins if each.name == "virtual_keys")
        plugin._directory = directory = Counting(plugin._directory)
        for typo in mistyped(secret):
            assert (await refusal(harness, typo))[:2] == (401, "invalid_api_key")
        assert directory.asked == 0
        assert (await call(harness, presented("x-api-key", secret))).status == 200
        assert directory.asked == 1


async def test_key_configured_by_hash_works_and_its_hash_does_not() -> None:
    secret = new_key()
    hashed = hash_key(PEPPER.encode(), secret.encode()).hex()
    async with with_keys({"name": "k", "hash": hashed, "prefix": "ps_vk_live_SHOWN"}) as harness:
        for text in (hashed, hashed.upper(), f"ps_vk_live_{hashed}"):
            assert (await refusal(harness, text))[0] == 401
        assert (await call(harness, presented("Authorization", secret))).status == 200
        assert harness.records[-1].key_prefix == "ps_vk_live_SHOWN"


async def test_refusals_are_recorded_without_the_key() -> None:
    secret = new_key()
    async with with_keys({"name": "k", "secret": secret, "status": "revoked"}) as harness:
        await refusal(harness, secret)
        record = harness.records[-1]
        assert (record.status, record.error, record.key_prefix) == (403, "virtual_key_revoked", None)
        assert secret not in repr(record)


async def test_langwatch_namespace_takes_its_own_keys_only() -> None:
    ours, theirs = new_key(), new_key("langwatch")
    assert theirs.startswith("lw_vk_live_")
    async with with_keys({"name": "k", "secret": theirs}, namespace="langwatch") as harness:
        reply = await harness.request("POST", CHAT, {"x-api-key": theirs}, {"model": "m"})
        assert reply.status == 200
        assert reply.header("X-LangWatch-Request-Id")
        refused = await harness.request("POST", CHAT, {"x-api-key": ours}, {"model": "m"})
        assert (refused.status, refused.header("X-LangWatch-Error")) == (401, "invalid_api_key")
        assert b"X-Penstock" not in reply.raw + refused.raw


# --- without a key --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "kind"), [(CHAT, "invalid_api_key"), ("/v1/messages", "authentication_error")])
async def test_request_without_a_key_is_401_in_the_shape_of_its_route(path: str, kind: str) -> None:
    async with with_keys({"name": "k", "secret": new_key()}) as harness:
        reply = await call(harness, path=path)
        error = reply.json()["error"]
        assert (reply.status, error["type"], error["code"]) == (401, kind, "invalid_api_key")


class Guests:
    """Let in who brings no key at all."""

    @hookimpl
    def authenticate(self, exchange: Exchange) -> Principal | None:
        return Principal("vk_guest", "guest", "guest")


async def test_request_without_a_key_is_left_to_the_next_plugin_a_bad_key_is_not() -> None:
    secret = new_key()
    config = {"virtual_keys": {"pepper": PEPPER, "keys": [{"name": "k", "secret": secret}]}}
    upstream = FakeUpstream([[http_reply()]], repeat=True)
    async with Harness(["virtual_keys", Guests], config, upstream) as harness:
        assert (await call(harness)).status == 200
        assert caller(harness) == "guest"
        assert (await call(harness, presented("x-api-key", "bad"))).status == 401
        assert (await call(harness, presented("x-api-key", secret))).status == 200
        assert caller(harness) == "k"


async def test_anonymous_gateway_serves_anybody_with_every_binding() -> None:
    upstream = FakeUpstream([[http_reply()]], repeat=True)
    routing = {"bindings": [{"name": "up", "type": "openai_compatible", "base_url": upstream.base_url}]}
    plugins = ["routing", "openai_compatible"]
    async with Harness(plugins, {"routing": routing}, upstream, gateway={"anonymous": True}, bare=True) as harness:
        reply = await call(harness, (b"Authorization", b"Bearer whatever"))
        assert reply.status == 200
        assert harness.exchanges[-1].principal is None
        assert b"whatever" not in upstream.requests[0].raw
        assert (harness.records[-1].key_id, harness.records[-1].status) == (None, 200)


# --- configuration --------------------------------------------------------------------------------------------------

FAULTS = [
    ([{"name": "k"}], r"keys\[0\] \(k\): give either secret or hash"),
    ([{"name": "k", "secret": "SECRET", "hash": "00"}], "give either secret or hash"),
    ([{"name": "k", "secret": "sk-mistyped-key"}], r"keys\[0\] \(k\)\.secret: is not a virtual key"),
    ([{"name": "k", "hash": "zz"}], r"\.hash: must be 64 hex digits"),
    ([{"name": "k", "hash": "é"}], r"\.hash: must be 64 hex digits"),
    ([{"name": "k", "secret": "SECRET"}, {"name": "l", "secret": "SECRET"}], r"keys\[1\] \(l\): the same key"),
    ([{"name": "k", "secret": "SECRET", "status": "gone"}], "status"),
    ([{"name": "k", "secret": "SECRET", "alias": {}}], "alias"),
]


@pytest.mark.parametrize(("keys", "message"), FAULTS)
def test_faulty_key_is_named_without_its_secret(keys: list[dict[str, Any]], message: str) -> None:
    secret = new_key()
    tables = [{**key, "secret": secret} if key.get("secret") == "SECRET" else key for key in keys]
    with pytest.raises(ConfigurationError, match=message) as caught:
        Gateway(with_keys(*tables).configuration())
    assert secret not in str(caught.value)
    assert "sk-mistyped-key" not in str(caught.value)


def test_short_pepper_is_refused_without_showing_it() -> None:
    config = {"virtual_keys": {"pepper": "too short"}}
    with pytest.raises(ConfigurationError, match="at least 16 characters") as caught:
        Gateway(Harness(config=config, upstream=FakeUpstream()).configuration())
    assert "too short" not in str(caught.value)


def test_keys_without_a_pepper_are_refused() -> None:
    config = KeysConfig(keys=(KeyConfig(name="k", secret=Secret(new_key())),))
    with pytest.raises(ConfigurationError, match="pepper: is missing; the keys listed here are hashed under it"):
        VirtualKeys(config, Services())


def test_configured_keys_are_found_by_hash_only() -> None:
    secret = new_key()
    config = KeysConfig(pepper=Secret(PEPPER), keys=(KeyConfig(name="k", secret=Secret(secret)),))
    directory = ConfiguredKeys(config, PEPPER.encode(), "penstock")
    found = directory.find_key(hash_key(PEPPER.encode(), secret.encode()))
    assert found is not None
    assert found.principal.virtual_key_id == "vk_k"
    assert directory.find_key(secret.encode()) is None
    assert secret not in repr(found)
