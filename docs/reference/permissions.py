"""The page of permissions and roles; its tables are made from the code that judges."""

from __future__ import annotations

from penstock_plugins.management.permissions import ACTIONS, ROLES
from penstock_plugins.management.rest.table import ROUTES
from reference.source import row

ABOUT = {
    "virtualKeys": "virtual keys",
    "gatewayProviders": "provider bindings, prices",
    "gatewayBudgets": "budgets",
    "routingPolicies": "routing policies",
    "gatewayCacheRules": "cache rules",
    "gatewayGuardrails": "guardrails, evaluators",
    "gatewayLogs": "messages, which nothing keeps yet",
    "gatewayUsage": "usage and the ledger; a refund needs `update`, verification `manage`",
    "apiTokens": "api tokens",
    "webhooks": "webhooks",
    "audit": "the audit",
    "organization": "organizations, teams, projects, users, service accounts, groups; export, apply, plugins",
}
_HEAD = """
# Permissions

Who calls the [management API](api.md) presents an **api token** (`ps_at_…`). It holds permissions within a scope: the
whole installation (`*`), an organization, a team or a project, and everything below it. Whatever no permission allows
is refused.

```sh
penstock tokens create --name ci --role project_admin --project web
penstock tokens create --name reports --permission gatewayUsage:view --team engineering \\
         --expires-at 2027-01-31T00:00:00Z
penstock tokens create --name ada --role developer --user ada --project web
penstock whoami
```

The secret is shown once. `penstock tokens list` shows the rest; `penstock tokens revoke NAME` ends one.

## Permissions and roles

A permission is `resource:action`. The actions are `view`, `create`, `update`, `delete`, `rotate` and `manage`, which
holds all of them; guardrails also have `attach` and `detach`, to and from keys. What each route needs stands at the
route in the [API](api.md). A role is a set of permissions:

"""
_FOOT = """
- **`org_admin`** is given on an organization (or `*`), **`project_admin`** on a project or team; the scope is what
  tells them apart.
- **own**: only for virtual keys whose principal is the token's user (`--user`), and for what was spent with them.
- A token may have a role, permissions, or both. One with a user and neither has the roles of the user: `roles` of a
  [user](api.md#users), as in `penstock users update ada --config-json
  '{"roles":[{"role":"developer","scope_id":"proj_…"}]}'`.
- A token that follows its user's roles has no more of them than reaches into its own scope; only who holds everything
  there may make one. Nobody makes a token that holds, or lasts, more than what he acts with.
- Where a stored credential is sent, a binding's `base_url` or `proxy`, takes `gatewayProviders:manage` to change, or
  the credential anew.
- Bindings, routing policies, cache rules, guardrails and the tree itself apply to everything below where they are, so
  whoever may view them within a project also sees those of its team and organization, and changes none of them.

## 403 or 404

- **404 `not_found`**: the object is out of sight: in another project, or another user's key. The answer is the same for
  what does not exist.
- **403 `permission_denied`**: it is in sight, and the permission is missing. The message names it, and where it would
  have to be held:

```text
This needs gatewayBudgets:create on proj_01M80DKSWDRMEAAC7ANPB0PXVK, which the token does not hold.
```

- **401 `invalid_api_token`**: unknown, revoked, expired, or its scope or user is archived. Which of them is not said.

## Nobody grants more than he holds

Who makes or changes a token, or gives a user a role, must hold everything in it himself, in a scope that covers it. The
same is so for roles that a token takes over from its user. Rights are looked up at each call: a role taken away is gone
from all tokens that live off it.

## The first token

The first start of a fresh store makes a token for the whole installation and writes it to `<database>.admin-token`,
mode 0600. [Lost it?](operations.md#lost-the-last-token)
"""


def permissions_page() -> str:
    """Return the page."""
    text = _HEAD + row("resource", "what of", *(f"`{role}`" for role in ROLES)) + row(*("---",) * (len(ROLES) + 2))
    for resource in sorted(ACTIONS, key=_first_route):
        text += row(f"`{resource}`", ABOUT[resource], *(_held(role, resource) for role in ROLES))
    return text + _FOOT


def _first_route(resource: str) -> int:
    """Return where the API first needs a resource: what it needs never comes last."""
    needed = [number for number, route in enumerate(ROUTES) if route.permission.partition(":")[0] == resource]
    return needed[0] if needed else len(ROUTES)


def _held(role: str, resource: str) -> str:
    whole, own = ROLES[role]
    actions = ACTIONS[resource]
    found = [action for action in actions if f"{resource}:{action}" in whole]
    mine = [action for action in actions if f"{resource}:{action}" in own and action not in found]
    if len(found) == len(actions):
        return "all"
    return "; ".join(filter(None, [", ".join(found), f"own: {', '.join(mine)}" if mine else ""])) or "none"
