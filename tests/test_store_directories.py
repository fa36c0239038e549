"""What the data plane finds follows every change of the store at once."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import attrs
import pytest

from penstock import (
    Fallback,
    GuardrailAttachment,
    KeyRecord,
    PatternRules,
    PolicyRules,
    Principal,
    RateLimits,
    Services,
)
from penstock.governance import Scope, Transaction, new_id
from penstock.governance.objects import Group, Organization, Project, Team
from store_fixtures import (
    Owners,
    archive,
    bindings_of,
    budgets_of,
    change,
    found_key,
    hashed,
    insert,
    insert_binding,
    insert_budget,
    insert_key,
    keys_of,
    objects_of,
    owners_of,
    services_of,
    store_harness,
)

Check = Callable[[Services, Owners], Awaitable[None]]


def run(folder: Path, check: Check) -> None:
    async def main() -> None:
        async with store_harness(folder) as harness:
            services = services_of(harness)
            await check(services, await owners_of(objects_of(services)))

    anyio.run(main)


def principal_of(services: Services, secret: str) -> Principal:
    record = found_key(services, secret)
    assert record is not None
    return record.principal


def names_of(services: Services, principal: Principal) -> list[str]:
    return [binding.name for binding in bindings_of(services).bindings_of(principal)]


def test_key_is_found_with_all_it_says(tmp_path: Path) -> None:
    async def check(services: Services, owners: Owners) -> None:
        secret, stored = await insert_key(
            services, owners, models_allowed=("gpt-*",), model_aliases={"a": "b"}, tags=("t",), metadata={"k": "v"},
            rate_limits=RateLimits(rpm=3), usage_frame="forward", expires_at="2030-01-01T00:00:00Z",
            display_prefix="ps_vk_live_01", provider_bindings=("gpc_1",), fallback=Fallback(on=("5xx",)),
            cache_mode="force", policy_rules=PolicyRules(tools=PatternRules(deny=("^shell",))),
            guardrails=(GuardrailAttachment(guardrail_id="gr_1", fail_open=True),),
        )  # fmt: skip
        record = found_key(services, secret)
        assert record is not None
        assert attrs.asdict(record.principal, recurse=False) == {
            "virtual_key_id": stored.id, "key_name": "a", "display_prefix": "ps_vk_live_01", "bindings": ("gpc_1",),
            "principal_id": owners.user.id, "project_id": owners.project.id, "team_id": owners.team.id,
            "organization_id": owners.organization.id, "model_aliases": {"a": "b"}, "models_allowed": ("gpt-*",),
            "usage_frame": "forward", "tags": ("t",), "metadata": {"k": "v"}, "group_ids": (),
            "rate_limits": RateLimits(rpm=3), "revision": 1, "routing_policy_id": None,
            "fallback": Fallback(on=("5xx",)),
            "cache_mode": "force", "policy_rules": PolicyRules(tools=PatternRules(deny=("^shell",))),
            "guardrails": (GuardrailAttachment(guardrail_id="gr_1", fail_open=True),),
        }  # fmt: skip
        assert (record.status, record.expires_at, record.works_until) == ("active", 1893456000.0, None)

    run(tmp_path, check)


def test_revoked_archived_and_rotated_keys_follow_at_once(tmp_path: Path) -> None:
    async def check(services: Services, owners: Owners) -> None:
        store = objects_of(services)
        secret, stored = await insert_key(services, owners)
        old, (new, _) = stored.document["hash"], await insert_key(services, owners, "unused")
        revoked = await change(store, stored, status="revoked")
        assert getattr(found_key(services, secret), "status", None) == "revoked"
        other = "ab" * 32
        rotated = await change(
            store, revoked, status="active", hash=other, previous_hash=old, previous_expires_at="2030-01-01T00:00:00Z"
        )
        assert getattr(found_key(services, secret), "works_until", None) == 1893456000.0
        assert principal_of(services, secret).virtual_key_id == stored.id
        ended = await change(store, rotated, previous_hash=None, previous_expires_at=None)
        assert found_key(services, secret) is None
        await archive(store, ended)
        assert found_key(services, new) is not None
        assert record_of_hash(services, other) is None

    run(tmp_path, check)


def record_of_hash(services: Services, key_hash: str) -> KeyRecord | None:
    return keys_of(services).find_key(bytes.fromhex(key_hash))


@pytest.mark.parametrize("level", ["organization", "team", "project"])
def test_key_below_an_archived_owner_does_not_work(tmp_path: Path, level: str) -> None:
    async def check(services: Services, owners: Owners) -> None:
        store = objects_of(services)
        organization_id, team_id, project_id = new_id("org_"), new_id("team_"), new_id("proj_")
        scope = Scope(organization_id, team_id, project_id)
        made = {
            "organization": await insert(store, "organization", scope, Organization(slug="o"), organization_id),
            "team": await insert(store, "team", scope, Team(slug="t", organization_id=organization_id), team_id),
            "project": await insert(store, "project", scope, Project(slug="p", team_id=team_id), project_id),
        }
        secret, _ = await insert_key(services, owners, project_id=project_id)
        untouched, _ = await insert_key(services, owners, "other")
        assert principal_of(services, secret).organization_id == organization_id
        await archive(store, made[level])
        assert found_key(services, secret) is None
        assert found_key(services, untouched) is not None

    run(tmp_path, check)


def test_moving_a_project_moves_its_keys(tmp_path: Path) -> None:
    async def check(services: Services, owners: Owners) -> None:
        store = objects_of(services)
        secret, _ = await insert_key(services, owners)
        value = Team(slug="other", organization_id=owners.organization.id)
        team = await insert(store, "team", owners.organization.scope, value)
        await change(store, owners.project, team_id=team.id)
        assert principal_of(services, secret).team_id == team.id

    run(tmp_path, check)


def test_groups_are_those_of_the_principal(tmp_path: Path) -> None:
    async def check(services: Services, owners: Owners) -> None:
        store = objects_of(services)
        secret, _ = await insert_key(services, owners)
        value = Group(slug="g", organization_id=owners.organization.id, member_ids=(owners.user.id,))
        group = await insert(store, "group", owners.organization.scope, value)
        principal = principal_of(services, secret)
        assert principal.group_ids == (group.id,)
        budget = await insert_budget(services, owners, "group", group.id)
        (rule,) = budgets_of(services).budgets_of(principal)
        assert rule.counter(None) == f"budget:{budget.id}:{owners.user.id}"
        await archive(store, group)
        assert principal_of(services, secret).group_ids == ()
        assert budgets_of(services).budgets_of(principal_of(services, secret)) == ()

    run(tmp_path, check)


def test_bindings_of_a_key_are_its_own_in_order_or_those_in_sight(tmp_path: Path) -> None:
    async def check(services: Services, owners: Owners) -> None:
        scope, org = owners.organization.scope, owners.organization.id
        team = await insert_binding(services, owners.team.scope, owners.team.id, "team", fallback_priority=1)
        last = await insert_binding(services, scope, org, "last", fallback_priority=9)
        first = await insert_binding(services, scope, org, "first", fallback_priority=-1)
        off = await insert_binding(services, scope, org, "off", enabled=False)
        away = await insert_binding(services, scope, new_id("org_"), "away")
        unknown = await insert_binding(services, scope, org, "unknown", type="nobody")
        bad = await insert_binding(services, scope, org, "bad", base_url="ftp://x")
        listed, _ = await insert_key(
            services, owners, "listed",
            provider_bindings=tuple(stored.id for stored in (last, off, away, unknown, bad, first)),
        )  # fmt: skip
        plain, _ = await insert_key(services, owners, "plain")
        assert names_of(services, principal_of(services, listed)) == ["last", "first"]
        assert names_of(services, principal_of(services, plain)) == ["first", "team", "last"]
        directory = bindings_of(services)
        found = directory.find_binding(team.id)
        assert found is not None
        assert (found is directory.find_binding("team"), getattr(found.credential, "reveal", str)()) == (
            True,
            "sk-team",
        )

    run(tmp_path, check)


def test_changed_binding_is_sent_to_its_new_address(tmp_path: Path) -> None:
    async def check(services: Services, owners: Owners) -> None:
        directory = bindings_of(services)
        stored = await insert_binding(
            services, owners.organization.scope, owners.organization.id, "a", base_url="https://one.example"
        )
        provider = services.providers.get("openai")
        before, binding = directory.revision, directory.find_binding("a")
        assert binding is not None
        assert provider.address(binding).origin.host == "one.example"  # type: ignore[union-attr]
        await change(objects_of(services), stored, base_url="https://two.example")
        binding = directory.find_binding("a")
        assert binding is not None
        assert provider.address(binding).origin.host == "two.example"  # type: ignore[union-attr]
        assert directory.revision > before

    run(tmp_path, check)


def test_budgets_of_a_key_are_those_of_all_its_scopes(tmp_path: Path) -> None:
    async def check(services: Services, owners: Owners) -> None:
        secret, key = await insert_key(services, owners)
        scopes = [
            ("organization", owners.organization.id), ("team", owners.team.id), ("project", owners.project.id),
            ("virtual_key", key.id), ("principal", owners.user.id), ("end_user", key.id),
            ("end_user", owners.project.id),
        ]  # fmt: skip
        made = [await insert_budget(services, owners, *scope) for scope in scopes]
        await insert_budget(services, owners, "virtual_key", new_id("vk_"))
        await insert_budget(services, owners, "team", owners.project.id)
        directory = budgets_of(services)
        assert {rule.id for rule in directory.budgets_of(principal_of(services, secret))} == {each.id for each in made}
        await change(objects_of(services), made[0], period_reset_at="2026-01-01T00:00:00Z")
        rules = {rule.id: rule for rule in directory.budgets_of(principal_of(services, secret))}
        assert rules[made[0].id].reset_at == 1767225600.0
        await archive(objects_of(services), made[2])
        assert made[2].id not in {rule.id for rule in directory.budgets_of(principal_of(services, secret))}

    run(tmp_path, check)


def test_one_change_among_ten_thousand_keys_is_cheap(tmp_path: Path) -> None:
    async def check(services: Services, owners: Owners) -> None:
        store = objects_of(services)
        secret, stored = await insert_key(services, owners, "mine")

        def fill(transaction: Transaction) -> None:
            for number in range(10_000):
                document = {**stored.document, "name": f"k{number}", "hash": f"{number:064x}"}
                transaction.insert("virtual_key", new_id("vk_"), stored.scope, document, {})

        await store.transact(fill)
        others = record_of_hash(services, f"{9_999:064x}")
        assert others is not None
        began = time.thread_time()
        await change(store, stored, status="disabled")
        spent = time.thread_time() - began
        assert getattr(found_key(services, secret), "status", None) == "disabled"
        assert record_of_hash(services, f"{9_999:064x}") is others
        assert spent < 0.05

    run(tmp_path, check)


def test_other_process_finds_a_new_key_within_two_seconds(tmp_path: Path) -> None:
    @asynccontextmanager
    async def opened() -> AsyncIterator[Services]:
        async with store_harness(tmp_path) as harness:
            yield services_of(harness)

    async def main() -> None:
        async with opened() as one, opened() as other:
            known = anyio.Event()
            objects_of(other).watch(known.set)
            secret, _ = await insert_key(one, await owners_of(objects_of(one)))
            assert hashed(one, secret) == hashed(other, secret)
            with anyio.fail_after(2):
                await known.wait()
            assert found_key(other, secret) is not None

    anyio.run(main)
