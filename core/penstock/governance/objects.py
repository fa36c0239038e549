"""The objects of the management plane: what is stored, of which kind, and what is unique about it.

Each class is the document of one kind: JSON objects with these members, strict. Ids are a prefix and a ULID. What a
client may read and write of it, and who, is the management plugin's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs

from penstock.governance.stores import Scope
from penstock.models import RateLimits
from penstock.policies import CacheMode, Fallback, GuardrailAttachment, PolicyRules

Window = Literal["minute", "hour", "day", "week", "month", "total", "manual"]
BudgetScope = Literal["organization", "team", "project", "virtual_key", "principal", "group", "end_user"]
OnBreach = Literal["block", "warn"]
Reserve = Literal["expected", "max", "none"]
Env = Literal["live", "test"]
KeyStatus = Literal["active", "disabled", "revoked"]
RoleName = Literal["org_admin", "project_admin", "developer", "viewer"]


@attrs.frozen(kw_only=True)
class RoleGrant:
    """Give a role within a scope: ``org_…``, ``team_…`` or ``proj_…``."""

    role: RoleName
    """What may be done."""
    scope_id: str
    """Organization, team or project."""


@attrs.frozen(kw_only=True)
class Organization:
    """Own teams, users, groups and everything below."""

    slug: str
    name: str = ""


@attrs.frozen(kw_only=True)
class Team:
    """Own projects."""

    slug: str
    organization_id: str
    """Whose it is."""
    name: str = ""


@attrs.frozen(kw_only=True)
class Project:
    """Own virtual keys."""

    slug: str
    team_id: str
    """Whose it is."""
    name: str = ""


@attrs.frozen(kw_only=True)
class User:
    """Be a person on whose behalf keys call, and who may hold roles."""

    slug: str
    organization_id: str
    """Where they belong."""
    name: str = ""
    email: str | None = None
    """For people to read; need not be unique."""
    roles: tuple[RoleGrant, ...] = ()
    """What tokens of theirs may do that name neither role nor permissions."""


@attrs.frozen(kw_only=True)
class ServiceAccount:
    """Be a program on whose behalf keys call."""

    slug: str
    project_id: str
    """Where it belongs."""
    name: str = ""


@attrs.frozen(kw_only=True)
class Group:
    """Gather principals, each of whom has the full allowance of the group's budgets."""

    slug: str
    organization_id: str
    """Where it belongs."""
    name: str = ""
    member_ids: tuple[str, ...] = ()
    """Users and service accounts."""


@attrs.frozen(kw_only=True)
class BindingTimeouts:
    """Bound an attempt, in seconds; None takes the gateway's default."""

    connect: float | None = None
    first_byte: float | None = None
    idle: float | None = None


@attrs.frozen(kw_only=True)
class Binding:
    """Be an upstream account."""

    name: str
    """Unique in its scope."""
    type: str
    """Provider type that an enabled plugin brings."""
    scope_id: str
    """Organization, team or project whose keys may use it."""
    credential: str | None = None
    """Sealed; never returned."""
    credential_last4: str | None = None
    """Its last four characters; null for short ones."""
    base_url: str = ""
    """Empty takes the type's own."""
    handle: str | None = None
    """Lets clients ask for ``handle/model``; unique in its organization."""
    models: tuple[str, ...] = ()
    """Models declared; empty leaves the choice to the name."""
    model_map: Mapping[str, str] = attrs.field(factory=dict)
    """What a model is called upstream."""
    region: str | None = None
    """For types that have regions."""
    api_version: str | None = None
    """For types that have versions."""
    extra_headers: Mapping[str, str] = attrs.field(factory=dict)
    """Added to every request."""
    rate_limits: RateLimits = RateLimits()
    """Over all keys together; where one is reached the next candidate has its turn."""
    timeouts: BindingTimeouts = BindingTimeouts()
    """Bounds of an attempt."""
    fallback_priority: int = 0
    """Keys that name no bindings try them in this order, lowest first."""
    propagate_trace: bool = False
    """Send ``traceparent`` and ``tracestate`` upstream."""
    usage_frame: Literal["strip", "forward"] | None = None
    """Whether the usage frame the gateway asks a chat stream for is taken out again; the key's wins."""
    proxy: str | None = None
    """``http://…`` or ``socks5://…``."""
    http2: bool = False
    """Speak HTTP/2 to an https:// address."""
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    """What the provider type alone understands."""
    enabled: bool = True
    """Whether it is used."""
    external_id: str | None = None
    """Your own id for it; unique in its organization."""


@attrs.frozen(kw_only=True)
class VirtualKey:
    """Be a credential that clients present."""

    name: str
    """Unique in its project."""
    project_id: str
    """Where its spend belongs."""
    principal_id: str
    """User or service account on whose behalf it calls."""
    env: Env = "live"
    """Part of the secret, for people to see."""
    status: KeyStatus = "active"
    """Anything but active is 403."""
    expires_at: str | None = None
    """RFC 3339, UTC."""
    provider_bindings: tuple[str, ...] = ()
    """Ids, the first is the primary; empty means every binding in sight of the project."""
    routing_policy_id: str | None = None
    """The routing policy that says whom it may ask, in which order."""
    fallback: Fallback | None = None
    """When the next candidate is tried; null leaves it to the routing policy, and then to the defaults."""
    model_aliases: Mapping[str, str] = attrs.field(factory=dict)
    """What clients may ask for, and what they get."""
    models_allowed: tuple[str, ...] | None = None
    """Globs over the resolved model, bare and ``type/model``; null allows all."""
    cache_mode: CacheMode | None = None
    """How prompt caching is passed through where neither header nor cache rule says; null is ``respect``."""
    usage_frame: Literal["strip", "forward"] | None = None
    """Whether the usage frame the gateway asks a chat stream for is taken out again."""
    guardrails: tuple[GuardrailAttachment, ...] = ()
    """What judges its requests and answers, in order."""
    policy_rules: PolicyRules = PolicyRules()
    """What requests may contain; the routing policy's hold as well."""
    rate_limits: RateLimits = RateLimits()
    """Over all that is asked with it."""
    capture_level: Literal["none", "metadata", "full"] | None = None
    """Kept and checked; nothing acts on it yet."""
    tags: tuple[str, ...] = ()
    """Words to sum usage by, and for plugins to match."""
    metadata: Mapping[str, str] = attrs.field(factory=dict)
    """At most 40 pairs, for plugins to match."""
    external_id: str | None = None
    """Your own id for it; unique in its organization."""
    display_prefix: str = ""
    """How logs name the secret."""
    hash: str = ""
    """Hex HMAC-SHA256 of the secret under the pepper; never returned."""
    previous_hash: str | None = None
    """Of the secret before the last rotation; never returned."""
    previous_expires_at: str | None = None
    """Until when that one works."""
    budget_id: str | None = None
    """The budget given inline with the key."""


@attrs.frozen(kw_only=True)
class Budget:
    """Bound what a scope spends in a window."""

    scope: BudgetScope
    """Whose spend it bounds."""
    scope_id: str
    """Id of the organization, team, project, key, principal or group; for ``end_user`` of a key or project."""
    window: Window
    """How long its period is."""
    limit_nano_usd: int
    """The same in nano-USD; give one of both."""
    on_breach: OnBreach = "block"
    """Refuse with 402, or warn in a header."""
    name: str | None = None
    """Unique in its organization, where there is one."""
    timezone: str = "UTC"
    """IANA name of the zone whose calendar it follows."""
    cycle_anchor_at: str | None = None
    """RFC 3339; makes the window roll from there instead of following the calendar."""
    provider: str | None = None
    """Id of the only binding whose spend counts."""
    reserve: Reserve = "expected"
    """What a request sets aside before it is asked of a provider."""
    period_reset_at: str | None = None
    """When it was last reset; a period starts no earlier."""
    external_id: str | None = None
    """Your own id for it; unique in its organization."""


@attrs.frozen(kw_only=True)
class PolicyEntry:
    """Be one way a routing policy may choose."""

    binding_id: str
    """Whom to ask."""
    weight: int = 1
    """Share among the others."""
    model_map: Mapping[str, str] = attrs.field(factory=dict)
    """What a model is called there."""


@attrs.frozen(kw_only=True)
class RoutingPolicy:
    """Choose among bindings."""

    name: str
    scope_id: str
    strategy: Literal["ordered", "weighted", "least_latency", "cost"] = "ordered"
    """How entries are chosen among."""
    entries: tuple[PolicyEntry, ...] = ()
    """Whom to choose among."""
    model_aliases: Mapping[str, str] = attrs.field(factory=dict)
    """What clients may ask for, and what they get."""
    policy_rules: PolicyRules = PolicyRules()
    """What requests may contain."""
    fallback: Fallback | None = None
    """When the next is tried."""
    external_id: str | None = None


@attrs.frozen(kw_only=True)
class CacheMatch:
    """Say which requests a cache rule is for; all that is given must hold."""

    virtual_key_id: str | None = None
    key_tags: tuple[str, ...] = ()
    key_prefix: str | None = None
    principal_id: str | None = None
    model: str | None = None
    metadata: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class CacheRule:
    """Choose a cache mode."""

    name: str
    scope_id: str
    mode: CacheMode
    """The cache mode it chooses."""
    ttl: int | None = None
    """Seconds, with mode ``force``."""
    priority: int = 0
    """The highest that matches wins."""
    match: CacheMatch = CacheMatch()
    """Which requests it is for."""
    external_id: str | None = None


@attrs.frozen(kw_only=True)
class Evaluator:
    """Name an installed check and its settings."""

    name: str
    scope_id: str
    type: str
    """Which check."""
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    """What the check understands."""
    external_id: str | None = None


@attrs.frozen(kw_only=True)
class Guardrail:
    """Run an evaluator inline."""

    name: str
    scope_id: str
    evaluator_id: str
    """What it runs."""
    directions: tuple[Literal["request", "response", "stream_chunk"], ...] = ("request",)
    """When it runs."""
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    """Over the evaluator's."""
    fail_open: bool = False
    """Let pass where the check fails."""
    timeout_ms: int | None = None
    """How long a check may take."""
    sample_rate: float = 1.0
    """Share of exchanges that are checked."""
    external_id: str | None = None


@attrs.frozen(kw_only=True)
class Webhook:
    """Be told of events."""

    name: str
    scope_id: str
    url: str
    """Where to."""
    events: tuple[str, ...] = ()
    """What of."""
    secret: str | None = None
    """Sealed; signs what is sent."""
    enabled: bool = True
    """Whether it is told."""
    external_id: str | None = None


@attrs.frozen(kw_only=True)
class ApiToken:
    """Be a credential of the management plane."""

    name: str
    """Unique in its scope."""
    scope_id: str
    """Organization, team or project; ``*`` is the whole installation."""
    permissions: tuple[str, ...] = ()
    """Such as ``virtualKeys:view``; with ``role`` both count."""
    role: RoleName | None = None
    """What it may do; see permissions."""
    user_id: str | None = None
    """Whose own keys ``own`` permissions are about; without role and permissions, whose roles it has."""
    expires_at: str | None = None
    """RFC 3339; it is refused from then on."""
    display_prefix: str = ""
    """How lists name the secret."""
    hash: str = ""
    """Hex HMAC-SHA256 under the pepper; never returned."""
    revoked: bool = False
    """Whether it was ended for good."""


@attrs.frozen(kw_only=True)
class PriceOverride:
    """Put an operator's price over the table's from a moment on."""

    provider: str
    """Type."""
    model: str
    """Glob."""
    effective_at: str
    """RFC 3339."""
    rates: Mapping[str, int | None]
    """Members of Rates, nano-USD per million tokens."""
    scope_id: str
    """``*``: prices count for the whole installation."""
    external_id: str | None = None
    """Your own id for it; unique."""


@attrs.frozen
class Kind:
    """Say what a kind of object is called and what is unique about it."""

    name: str
    prefix: str
    type: type[Any]
    unique: Mapping[str, tuple[str, ...]]
    """Name of a constraint → the members that are unique together among the active objects of this kind, where
    ``organization_id`` is the organization an object lives in; an object where one of them is None is not bound by it.
    """
    secrets: tuple[str, ...] = ()
    """Members that are never returned."""


_EXTERNAL = {"external_id": ("organization_id", "external_id")}
_NAMED = {"name": ("scope_id", "name"), **_EXTERNAL}
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("organization", "org_", Organization, {"slug": ("slug",)}),
        Kind("team", "team_", Team, {"slug": ("organization_id", "slug")}),
        Kind("project", "proj_", Project, {"slug": ("team_id", "slug")}),
        Kind("user", "user_", User, {"slug": ("organization_id", "slug")}),
        Kind("service_account", "svc_", ServiceAccount, {"slug": ("project_id", "slug")}),
        Kind("group", "grp_", Group, {"slug": ("organization_id", "slug")}),
        Kind("provider_binding", "gpc_", Binding, {**_NAMED, "handle": ("organization_id", "handle")}, ("credential",)),
        Kind(
            "virtual_key",
            "vk_",
            VirtualKey,
            {"name": ("project_id", "name"), **_EXTERNAL, "hash": ("hash",)},
            ("hash", "previous_hash"),
        ),
        Kind("budget", "bud_", Budget, {"name": ("organization_id", "name"), **_EXTERNAL}),
        Kind("routing_policy", "rp_", RoutingPolicy, _NAMED),
        Kind("cache_rule", "cr_", CacheRule, _NAMED),
        Kind("evaluator", "ev_", Evaluator, _NAMED),
        Kind("guardrail", "gr_", Guardrail, _NAMED),
        Kind("webhook", "wh_", Webhook, _NAMED, ("secret",)),
        Kind("api_token", "tok_", ApiToken, {"name": ("scope_id", "name"), "hash": ("hash",)}, ("hash",)),
        Kind("price_override", "pr_", PriceOverride, {"external_id": ("external_id",)}),
    )
}
"""Every kind, by name."""


def unique_values(kind: Kind, document: Mapping[str, Any], scope: Scope) -> dict[str, tuple[str, ...]]:
    """Return the values a document holds that lives in ``scope``, by name of constraint."""
    placed = {"organization_id": scope.organization_id, **document}
    values = {name: tuple(placed.get(member) for member in members) for name, members in kind.unique.items()}
    return {name: found for name, found in values.items() if all(found)}  # type: ignore[misc]
