"""Chains across vendors: which bindings join them by translation, at which place, under which name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import pytest

from penstock import AnthropicProvider, Provider, ReplyTranslation, Translated, Translator, hookimpl, new_key
from penstock.testing import FakeUpstream, Harness, Reply, http_reply
from penstock.testing.harness import PEPPER

pytestmark = pytest.mark.anyio

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
Table = dict[str, Any]


class Boxed:
    """Put whatever is answered into a member that says so."""

    def __init__(self) -> None:
        self._whole = b""

    def begin(self, status: int, *, is_event_stream: bool) -> None:
        assert status
        assert not is_event_stream

    def feed(self, payload: bytes) -> bytes:
        self._whole += payload
        return b""

    def finish(self) -> bytes:
        return b'{"translated":%b}' % self._whole


@attrs.define(eq=False)
class Between:
    """Turn a request into one that says what it was."""

    source: str
    target: str

    def translate(self, body: bytes, model: str | None) -> Translated:
        reply: ReplyTranslation = Boxed()
        return Translated(json.dumps({"model": model, "was": self.source, "of": len(body)}).encode(), reply)


@attrs.define(eq=False)
class Dialects:
    """Bring translators, and a provider that cannot list models."""

    @hookimpl
    def register_translators(self) -> Iterable[Translator]:
        return [
            Between("openai.chat", "anthropic.messages"),
            Between("openai.responses", "anthropic.messages"),
            Between("anthropic.messages", "openai.chat"),
        ]

    @hookimpl
    def register_providers(self) -> Iterable[Provider]:
        dialects = frozenset({"anthropic.messages"})
        return [AnthropicProvider(type="mute", dialects=dialects, default_base_url="https://mute.test")]


def binding(name: str, kind: str, **members: Any) -> Table:
    return {"name": name, "type": kind, "credential": f"sk-{name}", **members}


OPENAI = binding("openai", "openai")
ANTHROPIC = binding("anthropic", "anthropic")
CLAUDE = binding("claude", "anthropic", handle="claude", model_map={"gpt-5-mini": "claude-haiku-4-5"})


def gateway(
    upstream: FakeUpstream, tables: Sequence[Table], *, plugins: Sequence[Any] = (Dialects,), **key: Any
) -> Harness:
    """Return a gateway on sockets with these bindings, all at one upstream, and a key with these settings."""
    secret = new_key()
    config: Mapping[str, Any] = {
        "routing": {"bindings": [{"base_url": upstream.base_url, **table} for table in tables]},
        "virtual_keys": {"pepper": PEPPER, "keys": [{"name": "test", "secret": secret, **key}]},
    }
    harness = Harness([*plugins, "openai", "anthropic", "openai_compatible"], config, upstream, socket=True)
    harness.key = secret
    return harness


def failing() -> FakeUpstream:
    return answering(503)


def answering(status: int = 200) -> FakeUpstream:
    return FakeUpstream([[http_reply(b'{"id":"x"}', status)]], repeat=True)


async def ask(harness: Harness, model: str, path: str = CHAT, **members: Any) -> Reply:
    return await harness.request("POST", path, body={"model": model, "messages": [], **members})


async def tried(harness: Harness, model: str, path: str = CHAT) -> list[tuple[str, str | None]]:
    """Return the bindings dialled for one request and the models they were asked for."""
    await ask(harness, model, path)
    return [(each.binding_id.removeprefix("gpc_"), each.model) for each in harness.exchanges[-1].attempts]


def code_of(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.header("X-Penstock-Error") or ""


HAIKU = "claude-haiku-4-5"
CHAINS: list[tuple[list[Table], str, list[tuple[str, str]]]] = [
    # One that maps the model stands beside those that serve it by guess, in the order of the key.
    ([OPENAI, CLAUDE], "gpt-5-mini", [("openai", "gpt-5-mini"), ("claude", HAIKU)]),
    ([CLAUDE, OPENAI], "gpt-5-mini", [("claude", HAIKU), ("openai", "gpt-5-mini")]),
    ([binding("any", "openai_compatible"), CLAUDE], "gpt-5-mini", [("any", "gpt-5-mini"), ("claude", HAIKU)]),
    # Beside those that declare it too, which shut out those that guess.
    (
        [OPENAI, CLAUDE, binding("sure", "openai_compatible", models=["gpt-5-mini"])],
        "gpt-5-mini",
        [("claude", HAIKU), ("sure", "gpt-5-mini")],
    ),
    # One that neither declares nor maps it does not join.
    ([OPENAI, ANTHROPIC], "gpt-5-mini", [("openai", "gpt-5-mini")]),
    ([OPENAI, CLAUDE], "gpt-5", [("openai", "gpt-5")]),
    # What it declares goes to it and not to the only binding that could not know it.
    ([OPENAI, binding("c", "anthropic", models=["opus"])], "opus", [("c", "opus")]),
    # By name, whatever it declares.
    ([OPENAI, CLAUDE], "claude/claude-x", [("claude", "claude-x")]),
    ([OPENAI, ANTHROPIC], "anthropic/claude-x", [("anthropic", "claude-x")]),
    # The vendor guessed from the name, where no binding of the dialect knows it.
    ([OPENAI, ANTHROPIC], "claude-x", [("anthropic", "claude-x")]),
    ([ANTHROPIC], "claude-x", [("anthropic", "claude-x")]),
    ([binding("any", "openai_compatible"), ANTHROPIC], "claude-x", [("any", "claude-x")]),
]


@pytest.mark.parametrize(("tables", "asked", "expected"), CHAINS)
async def test_chain_across_dialects(tables: list[Table], asked: str, expected: list[tuple[str, str]]) -> None:
    async with gateway(failing(), tables) as harness:
        assert await tried(harness, asked) == expected


async def test_second_vendor_answers_in_the_dialect_of_the_client() -> None:
    upstream = FakeUpstream([[http_reply(b"{}", 503)], [http_reply(b'{"id":"x"}')]])
    async with gateway(upstream, [OPENAI, CLAUDE]) as harness:
        reply = await ask(harness, "gpt-5-mini")
        assert (reply.status, json.loads(reply.body)) == (200, {"translated": {"id": "x"}})
        shown = [reply.header(f"X-Penstock-{name}") for name in ("Provider", "Model", "Fallback-Count")]
        assert shown == ["anthropic", HAIKU, "1"]
        first, second = upstream.requests
        assert (first.target, json.loads(first.body)["model"]) == (b"/v1/chat/completions", "gpt-5-mini")
        assert second.target == b"/v1/messages"
        assert json.loads(second.body)["was"] == "openai.chat"


async def test_bundled_translators_carry_a_chain_across_vendors() -> None:
    said = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": HAIKU, "stop_reason": "end_turn",
        "stop_sequence": None, "content": [{"type": "text", "text": "Hello"}],
        "usage": {"input_tokens": 3, "output_tokens": 2},
    }  # fmt: skip
    upstream = FakeUpstream([[http_reply(b"{}", 529)], [http_reply(json.dumps(said).encode())]])
    async with gateway(upstream, [OPENAI, CLAUDE], plugins=["dialects"]) as harness:
        body = {"model": "gpt-5-mini", "messages": [{"role": "user", "content": "Hi"}]}
        reply = await harness.request("POST", CHAT, body=body)
        assert reply.status == 200
        assert json.loads(reply.body)["choices"][0]["message"]["content"] == "Hello"
        assert json.loads(upstream.requests[1].body)["model"] == HAIKU
        assert [reply.header(f"X-Penstock-{name}") for name in ("Provider", "Fallback-Count")] == ["anthropic", "1"]


async def test_other_way_round_too() -> None:
    spare = binding("spare", "openai", models=[HAIKU])
    async with gateway(failing(), [ANTHROPIC, spare]) as harness:
        assert await tried(harness, HAIKU, MESSAGES) == [("anthropic", HAIKU), ("spare", HAIKU)]


async def test_without_a_translator_nothing_crosses() -> None:
    async with gateway(failing(), [OPENAI, CLAUDE], plugins=()) as harness:
        assert await tried(harness, "gpt-5-mini") == [("openai", "gpt-5-mini")]
        assert code_of(await ask(harness, "claude/claude-x")) == (400, "provider_not_bound")


async def test_model_nobody_knows_is_not_recognized_where_all_is_translated() -> None:
    async with gateway(answering(), [CLAUDE]) as harness:
        reply = await ask(harness, "gpt-9")
        assert code_of(reply) == (400, "model_not_recognized")
        assert json.loads(reply.body)["error"]["meta"] == {"models": ["gpt-5-mini"]}


async def test_models_allowed_judges_translated_candidates() -> None:
    async with gateway(failing(), [OPENAI, CLAUDE], models_allowed=["openai/*"]) as harness:
        assert await tried(harness, "gpt-5-mini") == [("openai", "gpt-5-mini")]


# --- what is never translated ---------------------------------------------------------------------------------------


async def test_tokens_are_counted_by_who_speaks_the_dialect_only() -> None:
    tables = [binding("spare", "openai", models=[HAIKU]), ANTHROPIC]
    async with gateway(failing(), tables) as harness:
        assert await tried(harness, HAIKU, f"{MESSAGES}/count_tokens") == [("anthropic", HAIKU)]
        assert await tried(harness, HAIKU, MESSAGES) == [("spare", HAIKU), ("anthropic", HAIKU)]
    async with gateway(answering(), [OPENAI]) as harness:
        assert code_of(await ask(harness, "gpt-5", f"{MESSAGES}/count_tokens")) == (400, "provider_not_bound")


async def test_stored_responses_stay_with_who_keeps_them() -> None:
    async with gateway(answering(), [CLAUDE]) as harness:
        assert code_of(await harness.request("GET", f"{RESPONSES}/resp_1")) == (400, "provider_not_bound")
        reply = await ask(harness, "gpt-5-mini", RESPONSES, previous_response_id="resp_1")
        assert code_of(reply) == (400, "unsupported_parameter")
        assert json.loads(reply.body)["error"]["param"] == "previous_response_id"
        assert (await ask(harness, "gpt-5-mini", RESPONSES)).status == 200


async def test_continued_response_is_asked_of_native_bindings_only() -> None:
    async with gateway(failing(), [CLAUDE, OPENAI]) as harness:
        await ask(harness, "gpt-5-mini", RESPONSES, previous_response_id="resp_1")
        assert [each.binding_id for each in harness.exchanges[-1].attempts] == ["gpc_openai"]


async def test_translated_response_is_no_stored_one() -> None:
    upstream = FakeUpstream([[http_reply(b'{"id":"resp_made_up"}')], [http_reply(b"{}", 404)]])
    async with gateway(upstream, [CLAUDE, OPENAI]) as harness:
        assert (await ask(harness, "gpt-5-mini", RESPONSES)).status == 200
        await harness.request("GET", f"{RESPONSES}/resp_made_up")
        assert [each.binding_id for each in harness.exchanges[-1].attempts] == ["gpc_openai"]


# --- listings -------------------------------------------------------------------------------------------------------


async def test_listing_holds_what_can_be_called_by_translation() -> None:
    mute = binding("mute", "mute", models=["quiet"], model_map={"gpt-5-mini": "quiet"})
    sure = binding("sure", "openai", models=["gpt-5"])
    async with gateway(answering(), [sure, mute, binding("silent", "mute")]) as harness:
        reply = await harness.request("GET", "/v1/models")
        assert [each["id"] for each in json.loads(reply.body)["data"]] == ["gpt-5", "gpt-5-mini", "quiet"]
        assert reply.header("X-Penstock-Models-Incomplete") is None
        assert (await harness.request("GET", "/v1/models/quiet")).status == 200


async def test_listing_without_a_translator_holds_nothing_of_who_cannot_list() -> None:
    @attrs.define(eq=False)
    class Mute:
        register_providers = Dialects.register_providers

    tables = [binding("mute", "mute", models=["quiet"]), binding("sure", "openai", models=["gpt-5"])]
    async with gateway(answering(), tables, plugins=[Mute]) as harness:
        reply = await harness.request("GET", "/v1/models")
        assert [each["id"] for each in json.loads(reply.body)["data"]] == ["gpt-5"]
