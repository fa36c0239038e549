"""Who may do what: every route, for every role, on what is one's own and on what is another tenant's."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from management_client import Api, running_api
from penstock.governance import Scope
from penstock_plugins.management.catalogue import RESOURCES
from penstock_plugins.management.permissions import (
    ALL,
    ROLES,
    Actor,
    Grant,
    covers,
    expanded,
)
from penstock_plugins.management.rest.routes import ANY_TOKEN, PUBLIC, Route
from penstock_plugins.management.rest.table import ROUTES

pytestmark = pytest.mark.anyio

ORGANIZATION, TEAM, PROJECT = Scope("org_1"), Scope("org_1", "team_1"), Scope("org_1", "team_1", "proj_1")
OTHER = Scope("org_1", "team_1", "proj_2")
_IN_PROJECT = {"project", "service_account", "virtual_key"}
_SHARED = {"organization", "gatewayProviders", "routingPolicies", "gatewayCacheRules", "gatewayGuardrails"}
INSTALLATION = {"create_organizations", "verify_ledger", "create_prices_overrides", "update_prices_overrides",
                "archive_prices_overrides"}  # fmt: skip


def test_every_route_declares_a_permission() -> None:
    public = {route.name for route in ROUTES if route.permission == PUBLIC}
    any_token = {route.name for route in ROUTES if route.permission == ANY_TOKEN}
    assert (public, any_token) == ({"openapi"}, {"whoami"})
    assert {route.permission for route in ROUTES} - ALL == {PUBLIC, ANY_TOKEN}


def test_routes_and_their_names_are_unique() -> None:
    assert len({(route.method, route.path) for route in ROUTES}) == len(ROUTES) == len({route.name for route in ROUTES})


def test_a_grant_holds_within_its_scope_and_nowhere_else() -> None:
    assert covers(None, ORGANIZATION)
    assert covers(ORGANIZATION, PROJECT)
    assert covers(TEAM, PROJECT)
    assert not covers(PROJECT, TEAM)
    assert not covers(PROJECT, OTHER)
    assert not covers(ORGANIZATION, None)
    assert not covers(Scope("org_2"), PROJECT)


def test_manage_holds_every_action_of_its_resource_alone() -> None:
    held = expanded(["virtualKeys:manage"])
    assert {"virtualKeys:view", "virtualKeys:rotate", "virtualKeys:delete"} <= held
    assert {name.partition(":")[0] for name in held} == {"virtualKeys"}


def test_a_developer_acts_on_his_own_keys_alone() -> None:
    held, own = ROLES["developer"]
    actor = Actor("tok_1", "t", "user_1", "org_1", PROJECT, (Grant(held, own, PROJECT, "proj_1"),))
    assert actor.may("virtualKeys:rotate", PROJECT, "user_1")
    assert not actor.may("virtualKeys:rotate", PROJECT, "user_2")
    assert not actor.may("virtualKeys:delete", PROJECT, "user_1")
    assert not actor.sees("virtualKeys", PROJECT, "user_2")
    assert actor.views("gatewayProviders", ORGANIZATION)
    assert not actor.may("gatewayProviders:update", ORGANIZATION)


# --- every route --------------------------------------------------------------------------------------------


@attrs.frozen
class Tenant:
    """Hold an id of each kind, all of one organization."""

    ids: dict[str, str]
    project_id: str
    organization_id: str


async def populate(api: Api, slug: str) -> Tenant:
    """Make one of everything."""
    organization = (await api.make("/organizations", {"slug": slug}))["id"]
    team = (await api.make("/teams", {"slug": slug, "organization_id": organization}))["id"]
    project = (await api.make("/projects", {"slug": slug, "team_id": team}))["id"]
    user = (await api.make("/users", {"slug": f"{slug}-dev", "organization_id": organization}))["id"]
    ids = {"organization": organization, "team": team, "project": project, "user": user}
    scope = {"scope_id": organization}
    bodies: list[tuple[str, str, dict[str, Any]]] = [
        ("user", "/users", {"slug": f"{slug}-else", "organization_id": organization}),
        ("service_account", "/service-accounts", {"slug": slug, "project_id": project}),
        ("group", "/groups", {"slug": slug, "organization_id": organization}),
        ("provider_binding", "/provider-bindings", {"name": slug, "type": "mock", **scope}),
        ("routing_policy", "/routing-policies", {"name": slug, **scope}),
        ("evaluator", "/evaluators", {"name": slug, "type": "x", **scope}),
        ("cache_rule", "/cache-rules", {"name": slug, "mode": "respect", **scope}),
        ("webhook", "/webhooks", {"name": slug, "url": "http://127.0.0.1/x", **scope}),
        ("virtual_key", "/virtual-keys", {"name": slug, "project_id": project, "principal_id": user}),
        ("api_token", "/api-tokens", {"name": slug, "permissions": ["audit:view"], **scope}),
    ]
    for kind, path, body in bodies:
        ids[kind] = (await api.make(path, body))["id"]
    guardrail = {"name": slug, "evaluator_id": ids["evaluator"], **scope}
    ids["guardrail"] = (await api.make("/guardrails", guardrail))["id"]
    budget = {"scope": "organization", "scope_id": organization, "window": "month", "limit_usd": "1"}
    ids["budget"] = (await api.make("/budgets", budget))["id"]
    rates = {"provider": slug, "model": "m", "effective_at": "2026-01-01T00:00:00Z", "rates": {"input": 1}}
    ids["price_override"] = (await api.make("/prices/overrides", rates))["id"]
    ids["developer"] = user
    return Tenant(ids, project, organization)


def allowed(role: str, route: Route, kind: str) -> bool:
    """Say, independently of the code, whether a role may do what a route does to its own tenant's object."""
    resource, _, action = route.permission.partition(":")
    if kind == "price_override" and route.method == "GET":
        return role != "auditor"
    if route.name in INSTALLATION:
        return False
    if role == "org_admin":
        return True
    if role == "viewer of all":
        return action == "view"
    in_project = kind in _IN_PROJECT
    if role == "project_admin":
        return in_project or (action == "view" and resource in _SHARED)
    if role == "developer":
        if resource == "virtualKeys":
            return action in ("view", "update", "rotate")
        return action == "view" and (in_project or resource in _SHARED)
    return False


def to_one(route: Route) -> bool:
    return route.path.endswith("{id}") or (route.resource is not None and "{id}" in route.path)


async def actors(admin: Api, tenant: Tenant) -> dict[str, Api]:
    organization, project = tenant.organization_id, tenant.project_id
    return {
        "auditor": await admin.token_for(permissions=["audit:view"], scope_id=organization),
        "viewer of all": await admin.token_for(role="viewer", scope_id=organization),
        "developer": await admin.token_for(role="developer", scope_id=project, user_id=tenant.ids["developer"]),
        "project_admin": await admin.token_for(role="project_admin", scope_id=project),
        "org_admin": await admin.token_for(role="org_admin", scope_id=organization),
    }


async def test_each_role_does_what_it_may_to_its_own_and_nothing_to_others() -> None:
    order = {"GET": 0, "PATCH": 1, "POST": 2, "DELETE": 3}
    routes = sorted((route for route in ROUTES if to_one(route)), key=lambda route: order[route.method])
    assert len(routes) > 50
    async with running_api() as admin:
        mine, others = await populate(admin, "mine"), await populate(admin, "others")
        wrong = []
        for role, api in (await actors(admin, mine)).items():
            for route in routes:
                assert route.resource is not None
                kind = route.resource.kind.name
                body: dict[str, Any] | None = {} if route.takes_body else None
                foreign = await api.ask(route.method, route.path.replace("{id}", others.ids[kind]), body)
                is_hidden = foreign.status in (403, 404) or (kind == "price_override" and foreign.status == 200)
                if not is_hidden or (b"others" in foreign.raw and kind != "price_override"):
                    wrong.append((role, route.name, "foreign", foreign.status))
                own = await api.ask(route.method, route.path.replace("{id}", mine.ids[kind]), body)
                may = own.status not in (401, 403, 404)
                if may != allowed(role, route, kind):
                    wrong.append((role, route.name, "own", own.status))
                if own.status == 403:
                    assert own.error["meta"]["permission"] in ALL
                    assert own.error["meta"]["permission"] in own.error["message"]
        assert wrong == []


async def test_creations_elsewhere_are_refused() -> None:
    async with running_api() as admin:
        mine, others = await populate(admin, "mine"), await populate(admin, "others")
        places = {
            "organization_id": others.organization_id,
            "team_id": others.ids["team"],
            "project_id": others.project_id,
            "scope_id": others.organization_id,
        }
        for role, api in (await actors(admin, mine)).items():
            for resource in RESOURCES:
                body: dict[str, Any] = {name: place for name, place in places.items() if name in resource.references}
                for name in ("name", "slug", "type", "url", "mode", "provider", "model"):
                    if name in resource.members and resource.kind.name != "budget":
                        body[name] = "mock" if name == "type" else "respect" if name == "mode" else "http://x"
                if resource.kind.name == "budget":
                    body |= {"scope": "organization", "window": "day", "limit_usd": "1"}
                if resource.kind.name == "price_override":
                    del body["scope_id"]
                answered = await api.ask("POST", f"/{resource.path}", body)
                assert answered.status in (403, 404), (role, resource.path, answered.raw)


async def test_lists_hold_nothing_of_others() -> None:
    lists = [route for route in ROUTES if route.answer == "list"]
    async with running_api() as admin:
        mine, others = await populate(admin, "mine"), await populate(admin, "others")
        foreign = set(others.ids.values()) - {others.ids["price_override"]}
        for role, api in (await actors(admin, mine)).items():
            for route in lists:
                answered = await api.ask("GET", f"{route.path}?include_archived=true&limit=200")
                assert answered.status in (200, 403), (role, route.name, answered.raw)
                if answered.status == 200:
                    assert not {row["id"] for row in answered.body["data"]} & foreign, (role, route.name)


async def test_without_a_token_in_force_nothing_is_answered() -> None:
    async with running_api() as admin:
        made = await admin.make("/api-tokens", {"name": "t", "role": "viewer"})
        revoked = admin.holding(made["secret"])
        await revoked.get("/whoami")
        assert (await admin.ask("POST", "/api-tokens/t/revoke", {})).status == 200
        key = (await admin.make("/virtual-keys", {"name": "k"}))["secret"]
        for api in (admin.holding(None), admin.holding("ps_at_nonsense"), revoked, admin.holding(key)):
            for route in ROUTES:
                if route.permission != PUBLIC:
                    path = route.path.replace("{id}", "x").replace("{request_id}", "x")
                    answered = await api.ask(route.method, path, {} if route.takes_body else None)
                    assert answered.status == 401, (route.name, answered.raw)
                    assert answered.headers.get(b"www-authenticate") == b"Bearer"


async def test_nobody_grants_more_than_he_holds() -> None:
    async with running_api() as admin:
        mine = await populate(admin, "mine")
        weak = await admin.token_for(
            permissions=["apiTokens:create", "apiTokens:update", "organization:update", "virtualKeys:view"],
            scope_id=mine.organization_id,
        )
        for members in ({"role": "org_admin"}, {"permissions": ["virtualKeys:create"]}, {"role": "developer"}):
            refused = await weak.ask("POST", "/api-tokens", {"name": "x", **members})
            assert (refused.status, refused.error["code"]) == (403, "permission_denied"), members
        assert (await weak.ask("POST", "/api-tokens", {"name": "x", "role": "viewer", "scope_id": "*"})).status == 403
        same = await weak.make("/api-tokens", {"name": "y", "permissions": ["virtualKeys:view"]})
        raised = await weak.ask("PATCH", f"/api-tokens/{same['id']}", {"permissions": ["virtualKeys:manage"]})
        assert raised.status == 403
        roles = [{"role": "org_admin", "scope_id": mine.organization_id}]
        assert (await weak.ask("PATCH", f"/users/{mine.ids['user']}", {"roles": roles})).status == 403


async def test_a_personal_token_has_the_roles_its_user_has_now() -> None:
    async with running_api() as admin:
        user = await admin.make("/users", {"slug": "ann", "roles": [{"role": "viewer", "scope_id": "default"}]})
        ann = await admin.token_for(user_id=user["id"])
        assert (await ann.get("/projects"))["data"]
        assert (await admin.ask("PATCH", "/users/ann", {"roles": []})).status == 200
        assert (await ann.ask("GET", "/projects")).status == 403
        assert (await admin.ask("DELETE", "/users/ann")).status == 200
        assert (await ann.ask("GET", "/whoami")).status == 401


async def test_a_developer_makes_and_turns_his_own_keys_alone() -> None:
    async with running_api() as admin:
        user = await admin.make("/users", {"slug": "dev"})
        others = await admin.make("/virtual-keys", {"name": "others"})
        project = await admin.get("/projects/default")
        dev = await admin.token_for(role="developer", scope_id=project["id"], user_id=user["id"])
        mine = await dev.make("/virtual-keys", {"name": "mine"})
        assert mine["principal_id"] == user["id"]
        assert [row["id"] for row in (await dev.get("/virtual-keys"))["data"]] == [mine["id"]]
        assert (await dev.ask("POST", "/virtual-keys/mine/rotate", {})).status == 200
        assert (await dev.ask("GET", f"/virtual-keys/{others['id']}")).status == 404
        assert (await dev.ask("POST", "/virtual-keys", {"name": "n", "principal_id": "default"})).status == 403
        given_away = await dev.ask("PATCH", "/virtual-keys/mine", {"principal_id": "default"})
        assert given_away.status == 403
        assert (
            await dev.ask("PATCH", "/virtual-keys/mine", {"budget": {"window": "day", "limit_usd": 1}})
        ).status == 403
