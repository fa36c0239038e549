"""Keys with a routing policy: whom they reach, in which order, under which names, over sockets and a store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import anyio
import attrs
import pytest

from governed_gateway import BODY, Governed, governed
from penstock import Fallback, PatternRules, PolicyRules
from penstock.governance import Scope, new_id
from penstock.governance.objects import Binding, PolicyEntry, RoutingPolicy
from penstock.testing import FakeUpstream, Reply, http_reply

pytestmark = pytest.mark.anyio


def answering(status: int = 200) -> FakeUpstream:
    return FakeUpstream([[http_reply(b'{"id":"x"}', status)]], repeat=True)


@attrs.frozen(eq=False)
class Policied:
    """A gateway whose first bindings are ``a``, ``b`` and so on, one per upstream."""

    gateway: Governed
    policy_id: str

    def binding(self, letter: str) -> str:
        return self.gateway.bindings[2 * "abc".index(letter)]

    async def key(self, **members: Any) -> tuple[str, str]:
        return await self.gateway.key(self.gateway.user_id, routing_policy_id=self.policy_id, **members)

    async def use_key(self, **members: Any) -> str:
        key_id, self.gateway.harness.key = await self.key(**members)
        return key_id

    async def change(self, **members: Any) -> None:
        await self.gateway.change("routing_policy", self.policy_id, **members)

    async def ask(self, model: str = "gpt-4o-mini") -> Reply:
        return await self.gateway.ask({**BODY, "model": model})

    async def dials(self, model: str = "gpt-4o-mini") -> str:
        """Return the letters of the bindings dialled for one request, in order."""
        await self.ask(model)
        exchange = self.gateway.harness.exchanges[-1]
        made = [attempt.binding_id for attempt in exchange.attempts if not attempt.is_skipped]
        return "".join("abc"[self.gateway.bindings.index(binding_id) // 2] for binding_id in made)

    def random(self, seed: int) -> None:
        """Have the gateway draw by a seed."""
        plugins = self.gateway.harness.gateway.generation.plugins
        routing: Any = next(each.instance for each in plugins if each.name == "routing")
        routing._strategies.source = Random(seed).random


@asynccontextmanager
async def policied(folder: Path, *upstreams: FakeUpstream, entries: str = "", **policy: Any) -> AsyncIterator[Policied]:
    """Run a gateway with a key of one policy; ``entries`` names bindings, such as ``ba``."""
    async with governed(folder, upstreams, socket=True, rates=None) as gateway:
        found = [PolicyEntry(binding_id=gateway.bindings[2 * "abc".index(letter)]) for letter in entries]
        value = RoutingPolicy(**{"name": "p", "scope_id": gateway.organization_id, "entries": tuple(found), **policy})
        run = Policied(gateway, await gateway.insert("routing_policy", value))
        await run.use_key()
        yield run


def entry(binding_id: str, **members: Any) -> dict[str, Any]:
    return attrs.asdict(PolicyEntry(binding_id=binding_id, **members))


def code_of(reply: Reply) -> tuple[int, str]:
    return reply.status, json.loads(reply.body)["error"]["code"]


# --- whom -----------------------------------------------------------------------------------------------------------


async def test_entries_are_asked_in_their_order(tmp_path: Path) -> None:
    async with policied(tmp_path, answering(), answering(503), entries="ba") as run:
        reply = await run.ask()
        assert (reply.status, reply.header("X-Penstock-Fallback-Count")) == (200, "1")
        assert await run.dials() == "ba"


async def test_entries_take_the_place_of_the_bindings_of_the_key_and_extend_them(tmp_path: Path) -> None:
    async with policied(tmp_path, answering(503), answering(503), answering(503), entries="b") as run:
        await run.gateway.change("provider_binding", run.binding("a"), handle="mine")
        await run.use_key(provider_bindings=(run.binding("a"),))
        assert await run.dials() == "b"
        assert await run.dials("mine/gpt-4o-mini") == "a"
        assert await run.dials("openai_compatible/gpt-4o-mini") == "b"


async def test_policy_without_entries_orders_the_bindings_of_the_key(tmp_path: Path) -> None:
    async with policied(tmp_path, answering(503), answering(503), strategy="weighted") as run:
        await run.use_key(provider_bindings=(run.binding("a"), run.binding("b")))
        run.random(1)
        assert {await run.dials() for _ in range(12)} == {"ab", "ba"}


async def test_entry_out_of_sight_of_the_project_is_left_out(tmp_path: Path) -> None:
    upstream = answering()
    async with policied(tmp_path, upstream, entries="a") as run:
        gateway, away = run.gateway, new_id("proj_")
        hidden = Binding(name="hidden", type="openai_compatible", scope_id=away, base_url=upstream.base_url)
        scope = Scope(gateway.organization_id, gateway.team_id, away)
        binding_id, document = new_id("gpc_"), attrs.asdict(hidden)
        await gateway.store.transact(
            lambda change: change.insert("provider_binding", binding_id, scope, document, {"name": [away, "hidden"]})
        )
        await run.change(entries=[entry(binding_id), entry(run.binding("a"))])
        assert (await run.dials(), len(gateway.harness.exchanges[-1].chain)) == ("a", 1)
        await run.change(entries=[entry(binding_id)])
        assert code_of(await run.ask()) == (400, "provider_not_bound")


async def test_archived_binding_drops_out_of_the_chain(tmp_path: Path) -> None:
    async with policied(tmp_path, answering(), answering(), entries="ba") as run:
        assert await run.dials() == "b"
        await run.gateway.archive("provider_binding", run.binding("b"))
        assert await run.dials() == "a"


@pytest.mark.parametrize("how", ["archived", "unknown", "unreadable"])
async def test_policy_that_is_not_there_lets_nothing_through(tmp_path: Path, how: str) -> None:
    upstream = answering()
    async with policied(tmp_path, upstream, entries="a") as run:
        assert (await run.ask()).status == 200
        if how == "archived":
            await run.gateway.archive("routing_policy", run.policy_id)
        elif how == "unreadable":
            await run.change(strategy="best")
        else:
            _, run.gateway.harness.key = await run.gateway.key(run.gateway.user_id, routing_policy_id="rp_nobody")
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/responses/resp_1")):
            reply = await run.gateway.harness.request(method, path, body=BODY if method == "POST" else b"")
            assert code_of(reply) == (503, "policy_rules_invalid")
        assert len(upstream.requests) == 1


async def test_policy_whose_rules_nobody_enforces_lets_nothing_through(tmp_path: Path) -> None:
    rules = PolicyRules(tools=PatternRules(deny=("^shell",)))
    upstream = answering()
    async with policied(tmp_path, upstream, entries="a", policy_rules=rules) as policies:
        await policies.use_key()
        reply = await policies.ask()
        assert (reply.status, reply.header("X-Penstock-Error")) == (503, "policy_rules_invalid")
        assert '"policy_rules" to [gateway] plugins' in reply.json()["error"]["message"]
        assert upstream.requests == []


async def test_changed_policy_is_in_force_at_once_here_and_within_two_seconds_elsewhere(tmp_path: Path) -> None:
    upstreams = answering(), answering()
    async with policied(tmp_path, *upstreams, entries="a") as run:
        harness = run.gateway.harness
        async with governed(tmp_path, [answering()], socket=True, is_fresh=False) as elsewhere:
            elsewhere.harness.key = harness.key
            await elsewhere.ask()
            assert [each.binding.id for each in elsewhere.harness.exchanges[-1].chain] == [run.binding("a")]
            known = anyio.Event()
            elsewhere.store.watch(known.set)
            await run.change(entries=[entry(run.binding("b"))])
            assert await run.dials() == "b"
            with anyio.fail_after(2):
                await known.wait()
            await elsewhere.ask()
            assert [each.binding.id for each in elsewhere.harness.exchanges[-1].chain] == [run.binding("b")]


# --- in which order -------------------------------------------------------------------------------------------------


async def test_weights_share_out_the_traffic_and_the_rest_is_the_fallback(tmp_path: Path) -> None:
    async with policied(tmp_path, answering(), answering(), answering(503), strategy="weighted") as run:
        weights = {"a": 3, "b": 1, "c": 1}
        await run.change(entries=[entry(run.binding(letter), weight=weight) for letter, weight in weights.items()])
        run.random(11)
        asked = Counter([await run.dials() for _ in range(200)])
        assert set(asked) == {"a", "b", "ca", "cb"}
        assert asked["a"] == pytest.approx(120, abs=25)
        assert asked["b"] == pytest.approx(40, abs=20)
        assert asked["ca"] > asked["cb"]


async def test_latency_moves_the_traffic_to_who_answers(tmp_path: Path) -> None:
    async with policied(tmp_path, answering(503), answering(), entries="ab", strategy="least_latency") as run:
        run.random(1)
        dials = [await run.dials() for _ in range(12)]
        assert "ab" in dials[:2]
        assert set(dials[2:]) == {"b"}


async def test_latencies_are_those_of_a_model(tmp_path: Path) -> None:
    async with policied(tmp_path, answering(503), answering(), strategy="least_latency") as run:
        maps = [entry(run.binding("a"), model_map={"x": "other"}), entry(run.binding("b"))]
        await run.change(entries=maps)
        run.random(1)
        for _ in range(3):
            await run.ask()
        assert "ab" in [await run.dials("x") for _ in range(2)]


async def test_cheapest_is_asked_first_by_the_price_of_what_it_is_asked_for(tmp_path: Path) -> None:
    async with policied(tmp_path, answering(503), answering(503), answering(503), strategy="cost") as run:
        names = {"a": "dear", "b": "priceless", "c": "cheap"}
        maps = [entry(run.binding(letter), model_map={"any": model}) for letter, model in names.items()]
        await run.change(entries=maps)
        await run.gateway.price("openai_compatible", "dear", {"input": 2_000_000, "output": 2_000_000})
        await run.gateway.price("openai_compatible", "cheap", {"input": 1_000_000, "output": 1_000_000})
        assert await run.dials("any") == "cab"
        await run.gateway.price("openai_compatible", "priceless", {"input": 1, "output": 1})
        assert await run.dials("any") == "bca"


# --- under which names ----------------------------------------------------------------------------------------------


async def test_map_of_an_entry_comes_before_that_of_the_binding(tmp_path: Path) -> None:
    upstream = answering()
    async with policied(tmp_path, upstream) as run:
        await run.gateway.change("provider_binding", run.binding("a"), model_map={"big": "deployment-7"})
        await run.change(entries=[entry(run.binding("a"), model_map={"gpt-4o-mini": "big", "small": "tiny"})])
        assert (await run.ask()).header("X-Penstock-Model") == "deployment-7"
        assert (await run.ask("small")).header("X-Penstock-Model") == "tiny"
        assert (await run.ask("big")).header("X-Penstock-Model") == "deployment-7"
        asked = [json.loads(request.body)["model"] for request in upstream.requests]
        assert asked == ["deployment-7", "tiny", "deployment-7"]


async def test_entry_that_maps_the_model_stands_beside_one_that_serves_it_by_guess(tmp_path: Path) -> None:
    async with policied(tmp_path, answering(503), answering(503)) as run:
        await run.change(entries=[entry(run.binding("a")), entry(run.binding("b"), model_map={"m": "n"})])
        await run.ask("m")
        assert [each.model for each in run.gateway.harness.exchanges[-1].attempts] == ["m", "n"]


async def test_aliases_of_the_key_come_before_those_of_the_policy(tmp_path: Path) -> None:
    async with policied(tmp_path, answering(), entries="a", model_aliases={"x": "policy-x", "y": "policy-y"}) as run:
        await run.use_key(model_aliases={"x": "key-x"})
        assert (await run.ask("x")).header("X-Penstock-Model") == "key-x"
        assert (await run.ask("y")).header("X-Penstock-Model") == "policy-y"
        assert run.gateway.harness.exchanges[-1].chain[0].model_source == "alias"


async def test_listing_shows_what_the_policy_maps_and_its_aliases(tmp_path: Path) -> None:
    async with policied(tmp_path, FakeUpstream([[http_reply(b'{"data":[]}')]], repeat=True)) as run:
        await run.gateway.change("provider_binding", run.binding("a"), models=("own",))
        await run.change(
            entries=[entry(run.binding("a"), model_map={"mapped": "own"})], model_aliases={"nick": "mapped"}
        )
        await run.use_key(models_allowed=("own", "n*"))
        reply = await run.gateway.harness.request("GET", "/v1/models")
        assert [each["id"] for each in json.loads(reply.body)["data"]] == ["mapped", "nick", "own"]


async def test_models_allowed_judges_each_candidate_of_a_policy(tmp_path: Path) -> None:
    async with policied(tmp_path, answering(503), answering(503)) as run:
        maps = [entry(run.binding("a"), model_map={"m": "fine"}), entry(run.binding("b"), model_map={"m": "dear"})]
        await run.change(entries=maps)
        await run.use_key(models_allowed=("fine",))
        assert await run.dials("m") == "a"
        assert code_of(await run.ask("dear")) == (403, "model_not_allowed")


# --- when the next is tried -----------------------------------------------------------------------------------------


async def test_fallback_is_that_of_the_key_else_of_the_policy_else_the_default(tmp_path: Path) -> None:
    async with policied(tmp_path, answering(503), answering(503), entries="ab") as run:
        assert await run.dials() == "ab"
        await run.change(fallback=attrs.asdict(Fallback(on=())))
        assert await run.dials() == "a"
        assert run.gateway.harness.exchanges[-1].fallback == Fallback(on=())
        await run.use_key(fallback=Fallback(max_attempts=7))
        assert await run.dials() == "ab"
        assert run.gateway.harness.exchanges[-1].fallback == Fallback(max_attempts=7)
