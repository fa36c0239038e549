"""Every resource there is, in the order a declarative file is applied."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from penstock import ConfigurationError, Direction
from penstock.governance import KINDS, Rates, StoredObject, write_usd
from penstock_plugins.management import objects
from penstock_plugins.management.bindings import PROVIDER_BINDINGS, check_url, sealing_place
from penstock_plugins.management.bodies import read_money
from penstock_plugins.management.budgets import BUDGETS
from penstock_plugins.management.calls import Call
from penstock_plugins.management.documents import refuse_unknown, shown
from penstock_plugins.management.faults import bad_field
from penstock_plugins.management.keys import VIRTUAL_KEYS
from penstock_plugins.management.permissions import covers
from penstock_plugins.management.resources import CONTAINERS, PRINCIPALS, Draft, Resource, reach_of
from penstock_plugins.management.rules import check_fallback, check_rules, check_unique
from penstock_plugins.management.tokens import API_TOKENS, check_roles

_IN_SCOPE: dict[str, Any] = {
    "aliases": dict.fromkeys(CONTAINERS, "scope_id"),
    "locked": frozenset(("scope_id",)),
    "filters": ("name", "scope_id", "external_id"),
}


def _check_email(call: Call, draft: Draft) -> None:
    email = draft.document.email
    if email is not None and (email.count("@") != 1 or len(email) > 254 or " " in email or not email.isprintable()):
        raise bad_field("email", "must be an e-mail address")
    check_roles(call, draft)


def _check_members(call: Call, draft: Draft) -> None:
    check_unique("member_ids", draft.document.member_ids)
    for number, member_id in enumerate(draft.document.member_ids):
        member = call.tx.get(PRINCIPALS[member_id.startswith("svc_")], member_id)
        if member is None or not covers(draft.scope, member.scope):
            raise bad_field(f"member_ids[{number}]", "must be a user or service account of the organization")


def _check_policy(call: Call, draft: Draft) -> None:
    policy = draft.document
    check_fallback(policy.fallback)
    check_rules(policy.policy_rules)
    for number, entry in enumerate(policy.entries):
        _check_related(call, draft, "provider_binding", entry.binding_id, f"entries[{number}].binding_id")
    check_unique("entries", [entry.binding_id for entry in policy.entries])


def _check_related(call: Call, draft: Draft, kind: str, object_id: str, where: str) -> None:
    """Raise RefusedError unless an object lives in the draft's scope, above it or below it."""
    stored = call.tx.get(kind, object_id)
    is_near = stored is not None and (covers(reach_of(stored), draft.scope) or covers(draft.scope, reach_of(stored)))
    if not is_near:
        raise bad_field(where, f"{object_id[:80]} is not there for this scope")


def _check_cache_rule(call: Call, draft: Draft) -> None:
    rule = draft.document
    if rule.ttl is not None and rule.mode != "force":
        raise bad_field("ttl", 'goes with mode "force"')
    if rule.match.virtual_key_id is not None:
        _check_related(call, draft, "virtual_key", rule.match.virtual_key_id, "match.virtual_key_id")
    if rule.match.principal_id is not None:
        kind = PRINCIPALS[rule.match.principal_id.startswith("svc_")]
        _check_related(call, draft, kind, rule.match.principal_id, "match.principal_id")


def _check_guardrail(call: Call, draft: Draft) -> None:
    guardrail = draft.document
    _check_related(call, draft, "evaluator", guardrail.evaluator_id, "evaluator_id")
    check_unique("directions", guardrail.directions)
    if not guardrail.directions:
        raise bad_field("directions", "must name at least one")
    if not 0 <= guardrail.sample_rate <= 1:
        raise bad_field("sample_rate", "must be from 0 to 1")
    evaluator = call.tx.get("evaluator", guardrail.evaluator_id)
    assert evaluator is not None, "it was looked up just now"
    settings = {**evaluator.document["settings"], **guardrail.settings}
    _check_settings(call, evaluator.document["type"], settings, guardrail.directions)


def _check_evaluator(call: Call, draft: Draft) -> None:
    """Raise RefusedError for what is wrong whatever a guardrail adds; what is missing it may add."""
    _check_settings(call, draft.document.type, draft.document.settings, (), is_whole=False)


def _check_settings(
    call: Call, kind: str, settings: Mapping[str, Any], directions: Sequence[Direction], *, is_whole: bool = True
) -> None:
    """Raise RefusedError unless an enabled plugin brings the evaluator and understands its settings."""
    registry = call.means.services.evaluators
    if not registry:
        return  # nobody judges here, so nobody knows
    try:
        registry.prepare(kind, settings, directions)
    except ConfigurationError as error:
        faults = [line for line in error.faults if is_whole or not line.endswith(": is missing")]
        if faults:
            where, _, rule = faults[0].partition(": ")
            raise bad_field(where, rule) from None


def _check_webhook(call: Call, draft: Draft) -> None:
    if not draft.document.url:
        raise bad_field("url", "must not be empty")
    check_url("url", draft.document.url)
    check_unique("events", draft.document.events)
    given = draft.extras.get("secret")
    if given is None and draft.before is not None and "secret" not in draft.extras:
        return
    if given is None:
        given = draft.once["secret"] = "whsec_" + secrets.token_urlsafe(32)
    if not isinstance(given, str):
        raise bad_field("secret", f"must be a string, not {shown(given)}")
    if not 16 <= len(given) <= 512:
        raise bad_field("secret", "must have 16 to 512 characters")
    draft.set(secret=call.means.vault.seal(given, context=sealing_place("webhook", draft.id)))


def _read_rates(_call: Call, members: dict[str, Any]) -> None:
    """Read ``rates_usd``, decimal strings in USD per million tokens, in place of ``rates``."""
    if "rates_usd" not in members:
        return
    if "rates" in members:
        raise bad_field("rates_usd", "give either rates_usd or rates, not both")
    given = members.pop("rates_usd")
    if not isinstance(given, dict):
        raise bad_field("rates_usd", f"must be an object, not {shown(given)}")
    amounts = {f"{name}_usd": value for name, value in given.items()}
    read_money(amounts, tuple(f"{name}_nano_usd" for name in given))
    members["rates"] = {name.removesuffix("_nano_usd"): value for name, value in amounts.items()}


def _check_price(call: Call, draft: Draft) -> None:
    price = draft.document
    refuse_unknown(price.rates, tuple(field.name for field in attrs.fields(Rates)))
    for name, rate in price.rates.items():
        if rate is not None and not 0 <= rate <= 10**15:
            raise bad_field(f"rates.{name}", "must be from 0 to 1000000 USD")
        if rate is None and name in ("input", "output", "request"):
            raise bad_field(f"rates.{name}", "must be an amount")
    if not price.model or not price.provider:
        raise bad_field("model" if price.provider else "provider", "must not be empty")
    call.actor.require("gatewayProviders:create" if draft.before is None else "gatewayProviders:update", None)


def _show_price(_call: Call, stored: StoredObject, view: dict[str, Any]) -> None:
    view["rates_usd"] = {name: None if rate is None else write_usd(rate) for name, rate in view["rates"].items()}
    view["price_version"] = f"override {stored.id}"


ORGANIZATIONS = Resource(
    kind=KINDS["organization"],
    path="organizations",
    grants="organization",
    label="slug",
    filters=("slug",),
    archive=lambda call, stored: objects.refuse_with_children(call, stored, ("team", "user", "group")),
)
TEAMS = Resource(
    kind=KINDS["team"],
    path="teams",
    grants="organization",
    label="slug",
    aliases={"organization": "organization_id"},
    references={"organization_id": ("organization",)},
    locked=frozenset(("organization_id",)),
    filters=("slug", "organization_id"),
    archive=lambda call, stored: objects.refuse_with_children(call, stored, ("project",)),
)
PROJECTS = Resource(
    kind=KINDS["project"],
    path="projects",
    grants="organization",
    label="slug",
    aliases={"team": "team_id"},
    references={"team_id": ("team",)},
    locked=frozenset(("team_id",)),
    filters=("slug", "team_id"),
    archive=lambda call, stored: objects.refuse_with_children(call, stored, ("virtual_key", "service_account")),
)
USERS = Resource(
    kind=KINDS["user"],
    path="users",
    grants="organization",
    label="slug",
    aliases={"organization": "organization_id"},
    references={"organization_id": ("organization",), "roles[].scope_id": CONTAINERS},
    locked=frozenset(("organization_id",)),
    filters=("slug", "organization_id", "email"),
    check=_check_email,
)
SERVICE_ACCOUNTS = Resource(
    kind=KINDS["service_account"],
    path="service-accounts",
    grants="organization",
    label="slug",
    aliases={"project": "project_id"},
    references={"project_id": ("project",)},
    locked=frozenset(("project_id",)),
    filters=("slug", "project_id"),
)
GROUPS = Resource(
    kind=KINDS["group"],
    path="groups",
    grants="organization",
    label="slug",
    aliases={"organization": "organization_id"},
    references={"organization_id": ("organization",), "member_ids[]": PRINCIPALS},
    locked=frozenset(("organization_id",)),
    filters=("slug", "organization_id"),
    check=_check_members,
)
ROUTING_POLICIES = Resource(
    kind=KINDS["routing_policy"],
    path="routing-policies",
    grants="routingPolicies",
    references={"scope_id": CONTAINERS, "entries[].binding_id": ("provider_binding",)},
    check=_check_policy,
    **_IN_SCOPE,
)
EVALUATORS = Resource(
    kind=KINDS["evaluator"],
    path="evaluators",
    grants="gatewayGuardrails",
    references={"scope_id": CONTAINERS},
    check=_check_evaluator,
    **_IN_SCOPE,
)
GUARDRAILS = Resource(
    kind=KINDS["guardrail"],
    path="guardrails",
    grants="gatewayGuardrails",
    references={"scope_id": CONTAINERS, "evaluator_id": ("evaluator",)},
    check=_check_guardrail,
    **{**_IN_SCOPE, "aliases": {**_IN_SCOPE["aliases"], "evaluator": "evaluator_id"}},
)
CACHE_RULES = Resource(
    kind=KINDS["cache_rule"],
    path="cache-rules",
    grants="gatewayCacheRules",
    references={"scope_id": CONTAINERS, "match.virtual_key_id": ("virtual_key",), "match.principal_id": PRINCIPALS},
    check=_check_cache_rule,
    **_IN_SCOPE,
)
WEBHOOKS = Resource(
    kind=KINDS["webhook"],
    path="webhooks",
    grants="webhooks",
    references={"scope_id": CONTAINERS},
    extras={"secret": str},
    check=_check_webhook,
    **_IN_SCOPE,
)
PRICE_OVERRIDES = Resource(
    kind=KINDS["price_override"],
    path="prices/overrides",
    grants="gatewayProviders",
    label="external_id",
    references={"scope_id": CONTAINERS},
    locked=frozenset(("scope_id",)),
    readonly=frozenset(("scope_id",)),
    extras={"rates_usd": dict},
    derived={"rates_usd": dict[str, str | None], "price_version": str},
    filters=("provider", "model", "external_id"),
    intake=_read_rates,
    check=_check_price,
    show=_show_price,
)
RESOURCES: tuple[Resource, ...] = (
    ORGANIZATIONS,
    TEAMS,
    PROJECTS,
    USERS,
    SERVICE_ACCOUNTS,
    GROUPS,
    PROVIDER_BINDINGS,
    ROUTING_POLICIES,
    EVALUATORS,
    GUARDRAILS,
    VIRTUAL_KEYS,
    CACHE_RULES,
    BUDGETS,
    WEBHOOKS,
    PRICE_OVERRIDES,
    API_TOKENS,
)
"""All of them; what others refer to comes first."""
RESOURCE_OF = {resource.kind.name: resource for resource in RESOURCES}
