"""What a fresh store begins with: one of each owner, called ``default``, bindings from the environment, a first token.

All of it in one transaction at the first start of an empty store, and never again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import attrs

from penstock import hash_key
from penstock.governance import KINDS, AuditEntry, Scope, Vault, new_id, new_token, token_prefix
from penstock.governance import unique_values as values_of
from penstock.governance.objects import ApiToken, Binding, Organization, Project, Team, User
from penstock_plugins.store.objects import SQLTransaction

EVERYWHERE = "*"
"""Scope of a token for the whole installation."""
SLUG = "default"
_VENDORS = ("openai", "anthropic")
_ACTIONS = {"provider_binding": "gatewayProviders:create", "api_token": "apiTokens:create"}


@attrs.frozen(kw_only=True)
class Beginnings:
    """Say what a fresh store is filled from."""

    environment: Mapping[str, str]
    """``OPENAI_API_KEY``, ``OPENAI_BASE_URL``, ``ANTHROPIC_API_KEY``, ``ANTHROPIC_BASE_URL``."""
    types: Collection[str]
    """Provider types that are enabled; only these get bindings."""
    namespace: str
    """The gateway's, for the token."""


def is_empty(transaction: SQLTransaction) -> bool:
    """Say whether the store has never held anything."""
    return not transaction.list("organization", limit=1, include_archived=True)


def fill(transaction: SQLTransaction, vault: Vault, beginnings: Beginnings) -> str:
    """Put into an empty store what it begins with; returns the secret of the first api token."""
    organization_id, team_id, project_id = new_id("org_"), new_id("team_"), new_id("proj_")
    owner = Scope(organization_id)
    _add(transaction, "organization", organization_id, owner, Organization(slug=SLUG, name="Default"))
    team = Team(slug=SLUG, organization_id=organization_id, name="Default")
    _add(transaction, "team", team_id, Scope(organization_id, team_id), team)
    project = Project(slug=SLUG, team_id=team_id, name="Default")
    _add(transaction, "project", project_id, Scope(organization_id, team_id, project_id), project)
    user = User(slug=SLUG, organization_id=organization_id, name="Default")
    _add(transaction, "user", new_id("user_"), owner, user)
    for vendor in _VENDORS:
        credential = beginnings.environment.get(f"{vendor.upper()}_API_KEY")
        if credential and vendor in beginnings.types:
            base_url = beginnings.environment.get(f"{vendor.upper()}_BASE_URL", "")
            binding_id = new_id("gpc_")
            binding = Binding(
                name=vendor,
                type=vendor,
                scope_id=organization_id,
                base_url=base_url,
                credential=vault.seal(credential, context=f"provider_binding:{binding_id}"),
                credential_last4=credential[-4:] if len(credential) >= 8 else None,
            )
            _add(transaction, "provider_binding", binding_id, owner, binding)
    secret = new_token(beginnings.namespace)
    add_token(transaction, secret, "first administrator", owner, vault)
    return secret


def add_token(transaction: SQLTransaction, secret: str, name: str, owner: Scope, vault: Vault) -> None:
    """Add the token of an administrator of the whole installation."""
    token = ApiToken(
        name=name,
        scope_id=EVERYWHERE,
        role="org_admin",
        display_prefix=token_prefix(secret),
        hash=hash_key(vault.pepper, secret.encode()).hex(),
    )
    _add(transaction, "api_token", new_id("tok_"), owner, token)


def _add(transaction: SQLTransaction, name: str, object_id: str, scope: Scope, value: Any) -> None:
    """Add an object, and say so in the audit, without its secrets."""
    kind = KINDS[name]
    document = attrs.asdict(value)
    stored = transaction.insert(name, object_id, scope, document, values_of(kind, document, scope))
    after = {member: found for member, found in stored.document.items() if member not in kind.secrets}
    transaction.audit(
        AuditEntry(
            id=new_id("aud_"),
            at_ms=stored.created_at_ms,
            actor="system",
            action=_ACTIONS.get(name, "organization:create"),
            kind=name,
            object_id=object_id,
            scope=scope,
            before=None,
            after=after,
            request_id=None,
            source="system",
        )
    )
