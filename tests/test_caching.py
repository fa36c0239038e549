"""Cache modes over a real socket: which one a request runs in, what goes upstream, what the reply says."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from governed_gateway import answer, governed
from penstock import ConfigurationError, new_key
from penstock.governance.objects import CacheMatch, CacheRule
from penstock.testing import FakeUpstream, Harness, Reply, check_plugin, http_reply
from penstock.testing.harness import PEPPER
from penstock.testing.samples import SAMPLES, Sample
from penstock_plugins.caching import Caching

MARKED = (
    b'{"model":"claude-x","tools":[{"name":"t","cache_control":{"type":"ephemeral"}}],'
    b'"system":[{"type":"text","text":"s", "cache_control" : {"type":"ephemeral","ttl":"1h"}}],'
    b'"messages":[{"role":"user","content":[{"type":"text","text":"\\"cache_control\\": {}"}]}]}'
)
UNMARKED = (
    b'{"model":"claude-x","tools":[{"name":"t"}],"system":[{"type":"text","text":"s"}],'
    b'"messages":[{"role":"user","content":[{"type":"text","text":"\\"cache_control\\": {}"}]}]}'
)
PLAIN = b'{"model":"claude-x","messages":[{"role":"user","content":"Hi"}]}'
FORCED = (
    b'{"model":"claude-x","messages":[{"role":"user","content":'
    b'[{"type":"text","text":"Hi","cache_control":{"type":"ephemeral"%b}}]}]}'
)
HOUR = b',"ttl":"1h"'


def harness(
    rules: Sequence[Mapping[str, Any]] = (), key: Mapping[str, Any] | None = None, namespace: str = "penstock"
) -> Harness:
    """Return a gateway with caching on, its key as given, and an upstream that answers each sample."""
    plugins = ["virtual_keys", "routing", ("caching", Caching)]
    made = Harness(
        plugins,
        {"caching": {"rules": rules}},
        FakeUpstream([answer], repeat=True),
        gateway={"namespace": namespace},
        socket=True,
    )
    if key is not None or namespace != "penstock":
        made.key = new_key(namespace)
        table = {"name": "test", "secret": made.key, **(key or {})}
        made._config["virtual_keys"] = {"pepper": PEPPER, "keys": [table]}
    return made


async def ask(gateway: Harness, body: bytes, *fields: tuple[str, str], path: str = "/v1/messages") -> Reply:
    sent = [(b"Content-Type", b"application/json"), *((name.encode(), value.encode()) for name, value in fields)]
    return await gateway.request("POST", path, sent, body)


def outcome(reply: Reply) -> tuple[int, str | None, str | None]:
    return reply.status, reply.header("X-Penstock-Cache"), reply.header("X-Penstock-Cache-Mode")


# --- respect ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [sample for sample in SAMPLES if sample.body], ids=str)
def test_respect_changes_no_byte_on_any_endpoint(sample: Sample) -> None:
    async def main() -> None:
        rules = [{"name": "all", "mode": "respect", "match": {"model": "*"}}]
        async with harness(rules) as gateway:
            reply = await gateway.request("POST", sample.path, [(b"Content-Type", sample.content_type)], sample.body)
            if "gemini" in sample.path:
                assert reply.status == 400  # no provider of its dialect is enabled
                return
            assert reply.status == 200
            assert gateway.upstreams[0].requests[0].body == sample.body
            is_unknown = sample.is_stream or "count_tokens" in sample.path  # which counts none
            assert outcome(reply) == (200, "unknown" if is_unknown else "miss", "respect")

    anyio.run(main)


@pytest.mark.parametrize("fields", [(), (("X-Penstock-Cache", "respect"),)])
def test_respect_is_the_default(fields: tuple[tuple[str, str], ...]) -> None:
    async def main() -> None:
        async with harness() as gateway:
            reply = await ask(gateway, MARKED, *fields)
            assert reply.header("X-Penstock-Cache-Mode") == "respect"
            assert gateway.upstreams[0].requests[0].body == MARKED
            assert gateway.upstreams[0].requests[0].headers.get(b"x-penstock-cache") is None

    anyio.run(main)


def test_a_cache_read_is_a_hit() -> None:
    async def main() -> None:
        usage = b'{"usage":{"input_tokens":3,"cache_read_input_tokens":%d,"output_tokens":2}}'
        upstream = FakeUpstream([[http_reply(usage % 90)], [http_reply(usage % 0)]])
        async with Harness(
            ["virtual_keys", "routing", ("caching", Caching)], upstream=upstream, socket=True
        ) as gateway:
            assert outcome(await ask(gateway, MARKED)) == (200, "hit", "respect")
            assert outcome(await ask(gateway, MARKED)) == (200, "miss", "respect")

    anyio.run(main)


# --- disable and force ------------------------------------------------------------------------------------------------


def test_disable_takes_every_marker_out() -> None:
    async def main() -> None:
        async with harness() as gateway:
            reply = await ask(gateway, MARKED, ("X-Penstock-Cache", "disable"))
            assert outcome(reply) == (200, "bypass", "disable")
            assert gateway.upstreams[0].requests[0].body == UNMARKED

    anyio.run(main)


@pytest.mark.parametrize(
    ("value", "added"),
    [("force", b""), ("force;ttl=300", b""), ("force; ttl=301", HOUR), ("force;ttl=86400", HOUR)],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_force_puts_markers_in(value: str, added: bytes, path: str) -> None:
    async def main() -> None:
        async with harness() as gateway:
            reply = await ask(gateway, PLAIN, ("X-Penstock-Cache", value), path=path)
            assert outcome(reply) == (200, "force", "force")
            assert gateway.upstreams[0].requests[0].body == FORCED % added

    anyio.run(main)


def test_force_changes_nothing_in_other_dialects() -> None:
    async def main() -> None:
        async with harness() as gateway:
            body = b'{"model":"gpt-x", "messages":[{"role":"user","content":"Hi"}]}'
            reply = await ask(gateway, body, ("X-Penstock-Cache", "force"), path="/v1/chat/completions")
            assert outcome(reply) == (200, "force", "force")
            assert gateway.upstreams[0].requests[0].body == body

    anyio.run(main)


@pytest.mark.parametrize("value", ["disable", "force"])
def test_compressed_body_is_sent_plain_once_it_is_edited(value: str) -> None:
    async def main() -> None:
        async with harness() as gateway:
            fields = ("X-Penstock-Cache", value), ("Content-Encoding", "gzip")
            before = {"disable": MARKED, "force": PLAIN}[value]
            await ask(gateway, gzip.compress(before), *fields)
            got = gateway.upstreams[0].requests[0]
            assert got.body == {"disable": UNMARKED, "force": FORCED % b""}[value]
            assert got.headers.get(b"content-encoding") is None
            untouched = gzip.compress(UNMARKED)
            await ask(gateway, untouched, ("X-Penstock-Cache", "disable"), fields[1])
            assert gateway.upstreams[0].requests[1].body == untouched

    anyio.run(main)


def test_disable_leaves_forms_alone() -> None:
    async def main() -> None:
        sample = next(sample for sample in SAMPLES if sample.path == "/v1/images/edits")
        async with harness() as gateway:
            fields = [(b"Content-Type", sample.content_type), (b"X-Penstock-Cache", b"disable")]
            reply = await gateway.request("POST", sample.path, fields, sample.body)
            assert outcome(reply) == (200, "bypass", "disable")
            assert gateway.upstreams[0].requests[0].body == sample.body

    anyio.run(main)


@pytest.mark.parametrize(
    "values",
    [["no"], ["Force"], ["force;ttl=0"], ["force;ttl=86401"], ["force;ttl=-1"], ["respect;ttl=5"], [""],
     ["force;ttl=5;x"], ["disable", "disable"], ["disable, force"]],
)  # fmt: skip
def test_malformed_override_is_refused_before_anything_is_sent(values: list[str]) -> None:
    async def main() -> None:
        async with harness() as gateway:
            reply = await ask(gateway, MARKED, *(("X-Penstock-Cache", value) for value in values))
            assert (reply.status, reply.header("X-Penstock-Error")) == (400, "cache_override_invalid")
            assert json.loads(reply.body)["error"]["code"] == "cache_override_invalid"
            assert gateway.upstreams[0].requests == []

    anyio.run(main)


def test_namespace_names_the_header() -> None:
    async def main() -> None:
        async with harness(namespace="langwatch") as gateway:
            reply = await ask(gateway, MARKED, ("X-LangWatch-Cache", "disable"))
            assert reply.header("X-LangWatch-Cache") == "bypass"
            assert gateway.upstreams[0].requests[0].body == UNMARKED

    anyio.run(main)


@pytest.mark.parametrize("value", ["disable", "force"])
def test_body_that_cannot_be_edited_is_refused(value: str) -> None:
    async def main() -> None:
        async with harness() as gateway:
            reply = await ask(gateway, b'{"model":"claude-x","cache_control"', ("X-Penstock-Cache", value))
            assert (reply.status, reply.header("X-Penstock-Error")) == (400, "bad_request")
            assert gateway.upstreams[0].requests == []

    anyio.run(main)


# --- rules and keys ---------------------------------------------------------------------------------------------------

RULES: list[dict[str, Any]] = [
    {"name": "none-here", "mode": "respect", "priority": 9, "match": {"key": "vk_other"}},
    {"name": "tagged", "mode": "disable", "priority": 8, "match": {"key_tags": ["a", "b"], "model": "claude-y*"}},
    {"name": "by-metadata", "mode": "disable", "priority": 7, "match": {"metadata": {"env": "ci", "n": "1"}}},
    {"name": "typed", "mode": "force", "ttl": 3600, "priority": 6, "match": {"model": "anthropic/claude-z"}},
    {"name": "mine", "mode": "disable", "priority": 5,
     "match": {"key": "vk_test", "principal": "user_default", "key_prefix": "ps_vk_", "model": "claude-q"}},
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "fields", "expected"),
    [
        ('{"model":"claude-y1"}', (), ("disable", "tagged")),
        ('{"model":"claude-y1"}', (("X-Penstock-Cache", "respect"),), ("respect", None)),
        ('{"model":"claude-x","metadata":{"env":"ci","n":1,"more":[]}}', (), ("disable", "by-metadata")),
        ('{"model":"claude-x","metadata":{"env":"prod","n":"1"}}', (("X-Penstock-Metadata", '{"env":"ci"}'),),
         ("disable", "by-metadata")),
        ('{"model":"claude-x","metadata":{"env":"ci"}}', (), ("force", None)),
        ('{"model":"claude-x","metadata":7}', (("X-Penstock-Metadata", "no json"),), ("force", None)),
        ('{"model":"claude-z"}', (), ("force", "typed")),
        ('{"model":"claude-q"}', (), ("disable", "mine")),
        ('{"model":"claude-x"}', (), ("force", None)),
    ],
)  # fmt: skip
def test_header_then_first_matching_rule_then_key(
    body: str, fields: tuple[tuple[str, str], ...], expected: tuple[str, str | None]
) -> None:
    async def main() -> None:
        async with harness(RULES, {"cache_mode": "force", "tags": ["b", "c", "a"]}) as gateway:
            reply = await ask(gateway, body.encode(), *fields)
            assert reply.header("X-Penstock-Cache-Mode") == expected[0]
            exchange = gateway.exchanges[0]
            assert (exchange.cache_mode, exchange.cache_rule_id) == expected

    anyio.run(main)


@pytest.mark.parametrize(
    ("rules", "fault"),
    [
        ([{"name": "a", "mode": "respect", "ttl": 5}], "rules (a).ttl"),
        ([{"name": "a", "mode": "force", "ttl": 0}], "rules (a).ttl"),
        ([{"name": "a", "mode": "no"}], "mode"),
        ([{"name": "a", "mode": "force"}, {"name": "a", "mode": "respect"}], "same name"),
        ([{"name": "a", "mode": "force", "match": {"tags": []}}], "tags"),
    ],
)
def test_rules_that_cannot_hold_stop_the_start(rules: list[dict[str, Any]], fault: str) -> None:
    async def main() -> None:
        async with harness(rules):
            raise AssertionError("it started")

    with pytest.raises(ConfigurationError) as raised:
        anyio.run(main)
    assert fault in str(raised.value)


def test_rules_of_the_store_follow_its_changes(tmp_path: Path) -> None:
    async def main() -> None:
        async with governed(tmp_path, first=[("caching", Caching)], socket=True) as gateway:
            assert outcome(await gateway.ask(MARKED, "/v1/messages"))[2] == "respect"
            low = CacheRule(name="low", scope_id=gateway.organization_id, mode="force", ttl=3600)
            await gateway.insert("cache_rule", low)
            assert outcome(await gateway.ask(MARKED, "/v1/messages"))[2] == "force"
            match = CacheMatch(virtual_key_id=gateway.key_id, model="claude-*")
            high = CacheRule(name="high", scope_id=gateway.project_id, mode="disable", priority=5, match=match)
            high_id = await gateway.insert("cache_rule", high)
            assert outcome(await gateway.ask(MARKED, "/v1/messages")) == (200, "bypass", "disable")
            assert gateway.harness.exchanges[-1].cache_rule_id == high_id
            await gateway.archive("cache_rule", high_id)
            assert outcome(await gateway.ask(MARKED, "/v1/messages"))[2] == "force"
            await gateway.change("virtual_key", gateway.key_id, cache_mode="disable")
            assert outcome(await gateway.ask(MARKED, "/v1/messages"))[2] == "force"  # a rule counts more than its key

    anyio.run(main)


def test_rules_in_the_file_beside_a_store_stop_the_start(tmp_path: Path) -> None:
    async def main() -> None:
        config = {"caching": {"rules": [{"name": "a", "mode": "disable"}]}}
        async with governed(tmp_path, first=[("caching", Caching)], config=config):
            raise AssertionError("it started")

    with pytest.raises(ConfigurationError, match="cache-rules create"):
        anyio.run(main)


def test_caching_keeps_the_contract_of_plugins() -> None:
    check_plugin(Caching)
