"""An agent's conversation over twenty turns: what the provider has cached is, byte for byte, what it is sent again."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from typing import Any

import pytest

from governed_gateway import answer
from penstock.testing import FakeUpstream, Harness
from penstock.testing.harness import PEPPER
from penstock_plugins.caching import Caching
from penstock_plugins.policy_rules import Policies

pytestmark = pytest.mark.anyio
TURNS = 20
MARKER = b'"cache_control":{"type":"ephemeral"}'
SYSTEM = (
    b'[{"type":"text","text":"You are\\u00a0an agent \xe2\x9c\x93"},'
    b'{"type":"text","text":"rules","cache_control" : {"type":"ephemeral","ttl":"1h"} }]'
)
TOOLS = (
    b'[{"name":"read","input_schema":{"type":"object","properties":{"path":{"type":"string"},"n":{"const":1.0}}}},'
    b'{"name":"edit","description":"\\/edits\\/","input_schema":{"required":[],"type":"object"},%b}]' % MARKER
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def turn(number: int) -> list[bytes]:
    """Return the messages of one turn: thinking with its signature, a tool call, its result; odd spellings kept."""
    call = b'{"b":%d, "a":[1e0,1.10,-0], "path":"src\\/f%d.py","a":null}' % (number, number)
    return [
        b'{"role":"assistant","content":[{"type":"thinking","thinking":"step \\u2713 %d","signature":"Eq%d+/=="},'
        b'{"type":"redacted_thinking","data":"ZGF0YQ%d=="},'
        b'{"type":"tool_use","id":"toolu_%d","name":"read","input":%b}]}' % (number, number, number, number, call),
        b'{"role":"user","content":[{"type":"tool_result","tool_use_id":"toolu_%d","content":[{"type":"text",'
        b'"text":"see https://docs.example/%d \\"cache_control\\": {}"}]}' % (number, number),
    ]


def body_of(model: str, turns: int, *, marked: bool) -> tuple[bytes, bytes]:
    """Return a request of so many turns, and the part of it that the next one repeats."""
    messages = [b'{"role":"user","content":"fix it"}']
    for number in range(turns):
        assistant, user = turn(number)
        messages += [assistant, user + b"]}"]
    head = (
        b'{"model": %b,"max_tokens":64000,"thinking":{"type":"enabled","budget_tokens":1},"system":%b,'
        b'"tools":%b,"messages":['
    ) % (json.dumps(model).encode(), SYSTEM, TOOLS)
    prefix = head + b",".join(messages)
    marker = b',{"role":"user","content":[{"type":"text","text":"go on",%b}]}' % MARKER if marked else b""
    return prefix + marker + b'],"stream":true}', prefix


PATHS: list[Any] = [
    pytest.param("claude-x", {}, id="as-asked"),
    pytest.param("smart", {"model_aliases": {"smart": "claude-x"}}, id="alias"),
    pytest.param("anthropic/claude-x", {}, id="by-type"),
    pytest.param("claude-x", {"cache_mode": "respect"}, id="mode-respect"),
    pytest.param(
        "claude-x",
        {"policy_rules": {"tools": {"deny": ["^shell"]}, "urls": {"allow": ["^https://docs\\.example/"]}}},
        id="policy-rules",
    ),
]


async def converse(model: str, key: Mapping[str, Any], *, coding: str, marked: bool) -> list[tuple[bytes, bytes]]:
    """Return what the provider got in each turn, and what the client sent."""
    upstream = FakeUpstream([answer], repeat=True)
    made = Harness(["virtual_keys", "routing", ("caching", Caching), ("policy_rules", Policies)], upstream=upstream,
                   socket=True)  # fmt: skip
    made._config["virtual_keys"] = {"pepper": PEPPER, "keys": [{"name": "test", "secret": made.key, **key}]}
    found = []
    async with made as gateway:
        for number in range(TURNS):
            body, _ = body_of(model, number, marked=marked)
            fields = [(b"Content-Type", b"application/json"), (b"anthropic-beta", b"a,b")]
            if coding == "gzip":
                fields.append((b"Content-Encoding", b"gzip"))
            reply = await gateway.request(
                "POST", "/v1/messages?beta=true", fields, gzip.compress(body) if coding == "gzip" else body
            )
            assert (reply.status, reply.header("X-Penstock-Cache-Mode")) == (200, "respect")
            request = upstream.requests[-1]
            raw = request.body
            found.append((gzip.decompress(raw) if request.headers.get(b"content-encoding") else raw, body))
    return found


@pytest.mark.parametrize("coding", ["identity", "gzip"])
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(("model", "key"), PATHS)
async def test_every_turn_repeats_the_prefix_of_the_turn_before(
    model: str, key: Mapping[str, Any], coding: str, marked: bool
) -> None:
    turns = await converse(model, key, coding=coding, marked=marked)
    assert len(turns) == TURNS
    for number, (got, sent) in enumerate(turns):
        asked, upstream = json.dumps(model).encode(), b'"claude-x"'
        assert got == sent.replace(asked, upstream, 1)
        _, prefix = body_of("claude-x", number, marked=marked)
        assert got.startswith(prefix)
        assert all(later.startswith(prefix) for later, _ in turns[number + 1 :])


async def test_forced_markers_stand_where_the_next_turn_reads_from() -> None:
    upstream = FakeUpstream([answer], repeat=True)
    async with Harness(["virtual_keys", "routing", ("caching", Caching)], upstream=upstream, socket=True) as gateway:
        for number in range(TURNS):
            body, _ = body_of("claude-x", number, marked=False)
            fields = [(b"Content-Type", b"application/json"), (b"X-Penstock-Cache", b"force")]
            assert (await gateway.request("POST", "/v1/messages", fields, body)).status == 200
            got = upstream.requests[-1].body
            assert got.replace(b"," + MARKER, b"").replace(
                b'[{"type":"text","text":"fix it"}]', b'"fix it"'
            ) == body.replace(b"," + MARKER, b"")
            last = json.loads(got)["messages"][-1]["content"][-1]
            assert last["cache_control"] == {"type": "ephemeral"}
            assert got.count(MARKER) == 2
