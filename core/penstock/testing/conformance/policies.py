"""Checks of PolicyDirectory: run ``check_policy_directory`` in an event loop, on data that nobody else changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import attrs

from penstock.errors import RequestError
from penstock.governance import ObjectStore, PolicyDirectory, Scope, StoredObject, new_id
from penstock.governance.objects import CacheRule, Evaluator, Guardrail, PolicyEntry, RoutingPolicy
from penstock.models import Principal
from penstock.policies import Fallback

OpenPolicies = Callable[[], AbstractAsyncContextManager[tuple[ObjectStore, PolicyDirectory]]]
"""Open a store and the directory that answers from it."""


async def check_policy_directory(open_policies: OpenPolicies) -> None:
    """Run every check. Raises AssertionError saying what is not kept."""
    async with open_policies() as (store, directory):
        for check in (check_routing_policies, check_cache_rules, check_guardrails, check_unreadable):
            await check(store, directory)


async def check_routing_policies(store: ObjectStore, directory: PolicyDirectory) -> None:
    """Check that a policy is found by id as it stands, from the transaction that changes it on."""
    caller = _caller()
    entries = (PolicyEntry(binding_id="gpc_1", weight=3, model_map={"a": "b"}),)
    policy = RoutingPolicy(name="a", scope_id=caller.organization_id, strategy="weighted", entries=entries)
    before = directory.revision
    stored = await _insert(store, "routing_policy", caller, policy)
    assert directory.revision != before, "a new policy changes the revision"
    assert directory.routing_policy(stored.id) == policy, "a policy is found with all it says"
    assert directory.routing_policy(new_id("rp_")) is None, "an unknown policy is None"
    before, changed = directory.revision, attrs.evolve(policy, fallback=Fallback(max_attempts=1))
    stored = await _replace(store, stored, changed)
    assert directory.routing_policy(stored.id) == changed, "a changed policy is found as it is now"
    assert directory.revision != before, "a changed policy changes the revision"
    await store.transact(lambda transaction: transaction.archive(stored))
    assert directory.routing_policy(stored.id) is None, "an archived policy is None"


async def check_cache_rules(store: ObjectStore, directory: PolicyDirectory) -> None:
    """Check that the rules of a key are those of its project, team and organization, the highest priority first."""
    caller = _caller()
    low = await _insert(store, "cache_rule", caller, _rule(caller.project_id, priority=-1))
    high = await _insert(store, "cache_rule", caller, _rule(caller.organization_id, priority=7))
    between = await _insert(store, "cache_rule", caller, _rule(caller.team_id))
    await _insert(store, "cache_rule", caller, _rule(new_id("proj_"), priority=9))
    assert _ids(directory, caller) == [high.id, between.id, low.id], "rules in sight, highest priority first"
    assert _ids(directory, _caller()) == [], "rules of others are out of sight"
    moved = await _replace(store, low, _rule(caller.project_id, priority=8))
    assert _ids(directory, caller) == [low.id, high.id, between.id], "a changed rule has its new place"
    await store.transact(lambda transaction: transaction.archive(moved))
    assert _ids(directory, caller) == [high.id, between.id], "an archived rule is gone"
    assert directory.cache_rules_of(caller)[0].rule.priority == 7, "a rule is found with all it says"


async def check_guardrails(store: ObjectStore, directory: PolicyDirectory) -> None:
    """Check that a guardrail is found by id or by name in sight of a key, with its evaluator and both's settings."""
    caller = _caller()
    evaluator = Evaluator(name="e", scope_id=caller.organization_id, type="words", settings={"a": 1, "b": 1})
    runs = await _insert(store, "evaluator", caller, evaluator)
    value = Guardrail(name="g", scope_id=caller.team_id, evaluator_id=runs.id, settings={"b": 2})
    stored = await _insert(store, "guardrail", caller, value)
    for asked in (stored.id, "g"):
        rule = directory.guardrail(asked, caller)
        assert rule is not None, "a guardrail is found by id and by name"
        assert (rule.id, rule.guardrail, rule.evaluator) == (stored.id, value, "words"), "with what it runs"
        assert dict(rule.settings) == {"a": 1, "b": 2}, "its own settings are over those of the evaluator"
    assert directory.guardrail("g", _caller()) is None, "a name out of sight is None"
    assert directory.guardrail(new_id("gr_"), caller) is None, "an unknown id is None"
    runs = await _replace(store, runs, attrs.evolve(evaluator, settings={"c": 3}))
    changed = directory.guardrail(stored.id, caller)
    assert changed is not None, "it is there still"
    assert dict(changed.settings) == {"b": 2, "c": 3}, "a changed evaluator counts at once"
    await store.transact(lambda transaction: transaction.archive(runs))
    _expect_refusal(lambda: directory.guardrail(stored.id, caller), "a guardrail without its evaluator")
    await store.transact(lambda transaction: transaction.archive(stored))
    for asked in (stored.id, "g"):
        assert directory.guardrail(asked, caller) is None, "an archived guardrail is None"


async def check_unreadable(store: ObjectStore, directory: PolicyDirectory) -> None:
    """Check that what cannot be read refuses whoever depends on it, and nobody else, until it is readable again."""
    caller, stranger = _caller(), _caller()
    ids = {}
    for kind, prefix in (("routing_policy", "rp_"), ("cache_rule", "cr_"), ("guardrail", "gr_")):
        document = {"name": "x", "scope_id": caller.project_id, "entries": 7, "mode": "never", "directions": "up"}
        ids[kind] = await _put(store, kind, new_id(prefix), caller, document)
    _expect_refusal(lambda: directory.routing_policy(ids["routing_policy"].id), "a policy")
    _expect_refusal(lambda: directory.cache_rules_of(caller), "a cache rule")
    _expect_refusal(lambda: directory.guardrail(ids["guardrail"].id, caller), "a guardrail")
    assert list(directory.cache_rules_of(stranger)) == [], "keys of others are not refused"
    for stored in ids.values():
        await store.transact(lambda transaction, gone=stored: transaction.archive(gone))  # type: ignore[misc]
    assert list(directory.cache_rules_of(caller)) == [], "once it is archived nobody is refused"


def _expect_refusal(ask: Callable[[], object], what: str) -> None:
    try:
        ask()
    except RequestError as error:
        code = error.code
    else:
        code = "nothing"
    assert code == "policy_rules_invalid", f"{what} that cannot be read raises policy_rules_invalid, not {code}"


def _caller() -> Principal:
    """Return a key of an organization of its own."""
    return Principal(
        new_id("vk_"), "a", "a", organization_id=new_id("org_"), team_id=new_id("team_"), project_id=new_id("proj_")
    )


def _rule(scope_id: str, priority: int = 0) -> CacheRule:
    return CacheRule(name=new_id(""), scope_id=scope_id, mode="disable", priority=priority)


def _ids(directory: PolicyDirectory, caller: Principal) -> list[str]:
    return [each.id for each in directory.cache_rules_of(caller)]


async def _insert(store: ObjectStore, kind: str, caller: Principal, value: Any) -> StoredObject:
    return await _put(store, kind, new_id(f"{kind}_"), caller, attrs.asdict(value))


async def _put(
    store: ObjectStore, kind: str, object_id: str, caller: Principal, document: dict[str, Any]
) -> StoredObject:
    scope = Scope(caller.organization_id, caller.team_id, caller.project_id)
    return await store.transact(lambda transaction: transaction.insert(kind, object_id, scope, document, {}))


async def _replace(store: ObjectStore, stored: StoredObject, value: Any) -> StoredObject:
    return await store.transact(lambda transaction: transaction.replace(stored, attrs.asdict(value), {}))
