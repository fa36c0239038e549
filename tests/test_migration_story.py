"""A provider's outage crosses vendors unseen, and what is forbidden reaches nobody: official SDKs, over sockets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import attrs
import openai
import pytest

from penstock import new_key
from penstock.testing import FakeUpstream, Harness, http_reply, stream_reply
from penstock.testing.harness import PEPPER
from penstock.testing.upstream import Step

pytestmark = pytest.mark.anyio

TOOL_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": TOOL_PARAMETERS}}
MESSAGES_TOOL: Any = {"name": "weather", "input_schema": TOOL_PARAMETERS}
USER: Any = {"role": "user", "content": "Weather in Oslo?"}


def event(name: str, **members: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), json.dumps({"type": name, **members}).encode())


def chunk(delta: dict[str, Any], finish: str | None = None, **members: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    envelope = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-5-mini"}
    return b"data: %b\n\n" % json.dumps({**envelope, "choices": [choice], **members}).encode()


DOWN: list[Step] = [http_reply(b'{"error":{"message":"try later","type":"server_error"}}', 503)]
CLAUDE = {
    "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-haiku-4-5",
    "content": [
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}},
    ],
    "stop_reason": "tool_use", "stop_sequence": None, "usage": {"input_tokens": 20, "output_tokens": 9},
}  # fmt: skip
CLAUDE_WHOLE: list[Step] = [http_reply(json.dumps(CLAUDE).encode())]
CLAUDE_STREAM: list[Step] = stream_reply(
    event("message_start", message={**CLAUDE, "content": [], "stop_reason": None}),
    event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    event("content_block_delta", index=0, delta={"type": "text_delta", "text": "Let me "}),
    event("content_block_delta", index=0, delta={"type": "text_delta", "text": "look."}),
    event("content_block_stop", index=0),
    event("content_block_start", index=1, content_block={**CLAUDE["content"][1], "input": {}}),  # type: ignore[index, dict-item]
    event("content_block_delta", index=1, delta={"type": "input_json_delta", "partial_json": '{"city":'}),
    event("content_block_delta", index=1, delta={"type": "input_json_delta", "partial_json": ' "Oslo"}'}),
    event("content_block_stop", index=1),
    event("message_delta", delta={"stop_reason": "tool_use", "stop_sequence": None}, usage={"output_tokens": 9}),
    event("message_stop"),
)
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
GPT = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-5-mini",
    "choices": [
        {
            "index": 0, "finish_reason": "tool_calls", "logprobs": None,
            "message": {"role": "assistant", "content": "Let me look.", "refusal": None, "tool_calls": [CALL]},
        }
    ],
    "usage": {"prompt_tokens": 20, "completion_tokens": 9, "total_tokens": 29},
}  # fmt: skip
GPT_WHOLE: list[Step] = [http_reply(json.dumps(GPT).encode())]
GPT_STREAM: list[Step] = stream_reply(
    chunk({"role": "assistant", "content": "Let me "}),
    chunk({"content": "look."}),
    chunk({"tool_calls": [{"index": 0, **CALL, "function": {"name": "weather", "arguments": '{"city"'}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": ': "Oslo"}'}}]}),
    chunk({}, "tool_calls"),
    chunk({}, None, choices=[], usage=GPT["usage"]),
    b"data: [DONE]\n\n",
)


@attrs.define(eq=False)
class Vendors:
    """A gateway whose key may use two vendors, the first of which may be down."""

    harness: Harness
    gpt: FakeUpstream
    claude: FakeUpstream

    @asynccontextmanager
    async def chat(self) -> AsyncIterator[openai.AsyncOpenAI]:
        url = f"{self.harness.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=self.harness.key, max_retries=0) as client:
            yield client

    @asynccontextmanager
    async def messages(self) -> AsyncIterator[anthropic.AsyncAnthropic]:
        url = self.harness.base_url
        async with anthropic.AsyncAnthropic(base_url=url, api_key=self.harness.key, max_retries=0) as client:
            yield client


@asynccontextmanager
async def vendors(first: str, gpt: list[list[Step]], claude: list[list[Step]], **key: Any) -> AsyncIterator[Vendors]:
    """Run both; ``gpt`` and ``claude`` are what they answer."""
    ups = {"openai": FakeUpstream(gpt), "anthropic": FakeUpstream(claude)}
    secret = new_key()
    maps = {"openai": {"claude-haiku-4-5": "gpt-5-mini"}, "anthropic": {"gpt-5-mini": "claude-haiku-4-5"}}
    tables = [
        {"name": name, "type": name, "credential": "sk-x", "base_url": ups[name].base_url}
        | ({} if name == first else {"model_map": maps[name]})
        for name in (first, *(name for name in ups if name != first))
    ]
    config: dict[str, Any] = {
        "routing": {"bindings": tables},
        "virtual_keys": {"pepper": PEPPER, "keys": [{"name": "app", "secret": secret, **key}]},
    }
    plugins = ["virtual_keys", "routing", "caching", "policy_rules", "fallback", "dialects", "openai", "anthropic"]
    harness = Harness(plugins, config, list(ups.values()), socket=True)
    harness.key = secret
    async with harness:
        yield Vendors(harness, ups["openai"], ups["anthropic"])


async def test_openai_client_gets_claudes_answer_while_openai_is_down() -> None:
    async with vendors("openai", [DOWN], [CLAUDE_WHOLE]) as both, both.chat() as client:
        raw = await client.chat.completions.with_raw_response.create(
            model="gpt-5-mini", messages=[USER], tools=[CHAT_TOOL], max_completion_tokens=50
        )
        assert (raw.status_code, raw.headers["X-Penstock-Fallback-Count"]) == (200, "1")
        assert (raw.headers["X-Penstock-Provider"], raw.headers["X-Penstock-Model"]) == (
            "anthropic",
            "claude-haiku-4-5",
        )
        choice = raw.parse().choices[0]
        assert (choice.message.content, choice.finish_reason) == ("Let me look.", "tool_calls")
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
        sent = json.loads(both.claude.requests[0].body)
        assert (sent["model"], sent["max_tokens"], sent["tools"][0]["name"]) == ("claude-haiku-4-5", 50, "weather")


async def test_openai_stream_is_claudes_while_openai_is_down() -> None:
    async with vendors("openai", [DOWN], [CLAUDE_STREAM]) as both, both.chat() as client:
        async with client.chat.completions.stream(model="gpt-5-mini", messages=[USER], tools=[CHAT_TOOL]) as stream:
            final = await stream.get_final_completion()
        choice = final.choices[0]
        assert (choice.message.content, choice.finish_reason) == ("Let me look.", "tool_calls")
        assert choice.message.tool_calls is not None
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Oslo"}
        assert [attempt.outcome for attempt in both.harness.exchanges[0].attempts] == ["status", "answered"]
        usage = both.harness.exchanges[0].usage
        assert usage is not None
        assert (usage.input, usage.output, usage.source) == (20, 9, "provider")


async def test_anthropic_client_gets_gpts_answer_while_anthropic_is_down() -> None:
    async with vendors("anthropic", [GPT_WHOLE], [DOWN]) as both, both.messages() as client:
        raw = await client.messages.with_raw_response.create(
            model="claude-haiku-4-5", max_tokens=50, messages=[USER], tools=[MESSAGES_TOOL]
        )
        assert (raw.status_code, raw.headers["X-Penstock-Fallback-Count"]) == (200, "1")
        message: anthropic.types.Message = await raw.parse()  # of this SDK's raw answers it is a coroutine
        assert message.stop_reason == "tool_use"
        text, call = message.content
        assert text.type == "text"
        assert call.type == "tool_use"
        assert (call.name, call.input) == ("weather", {"city": "Oslo"})
        sent = json.loads(both.gpt.requests[0].body)
        assert (sent["model"], sent["tools"][0]["function"]["name"]) == ("gpt-5-mini", "weather")


async def test_anthropic_stream_is_gpts_while_anthropic_is_down() -> None:
    async with vendors("anthropic", [GPT_STREAM], [DOWN]) as both, both.messages() as client:
        async with client.messages.stream(
            model="claude-haiku-4-5", max_tokens=50, messages=[USER], tools=[MESSAGES_TOOL]
        ) as stream:
            final = await stream.get_final_message()
        assert final.stop_reason == "tool_use"
        text, call = final.content
        assert text.type == "text"
        assert call.type == "tool_use"
        assert (text.text, call.name, call.input) == ("Let me look.", "weather", {"city": "Oslo"})
        assert (final.usage.input_tokens, final.usage.output_tokens) == (20, 9)
        assert b'"include_usage":true' in both.gpt.requests[0].body.replace(b" ", b"")


async def test_forbidden_tool_is_refused_in_both_dialects_and_reaches_nobody() -> None:
    rules = {"tools": {"deny": ["^shell\\.exec$", "^filesystem\\.write$"]}}
    async with vendors("openai", [], [], policy_rules=rules) as both:
        shell: Any = {"type": "function", "function": {"name": "shell.exec", "parameters": {"type": "object"}}}
        async with both.chat() as chat:
            for is_stream in (False, True):
                with pytest.raises(openai.PermissionDeniedError) as refused:
                    await chat.chat.completions.create(
                        model="gpt-5-mini", messages=[USER], tools=[CHAT_TOOL, shell], stream=is_stream
                    )
                assert refused.value.code == "tool_not_allowed"
                assert refused.value.param == "tools[1].function.name"
        async with both.messages() as messages:
            with pytest.raises(anthropic.PermissionDeniedError, match="shell"):
                await messages.messages.create(
                    model="claude-haiku-4-5",
                    max_tokens=9,
                    messages=[USER],
                    tools=[{"name": "shell.exec", "input_schema": {"type": "object"}}],
                )
        assert (both.gpt.requests, both.claude.requests) == ([], [])


async def test_both_vendors_down_is_the_last_answer_in_the_clients_dialect() -> None:
    overloaded = b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'
    async with vendors("openai", [DOWN], [[http_reply(overloaded, 529)]]) as both, both.chat() as client:
        with pytest.raises(openai.InternalServerError, match="Overloaded") as failed:
            await client.chat.completions.create(model="gpt-5-mini", messages=[USER])
        assert failed.value.status_code == 529
        assert "X-Penstock-Error" not in failed.value.response.headers
