"""``organizations``, ``teams``, ``projects``, ``users``, ``service-accounts``, ``groups``."""

from __future__ import annotations

from collections.abc import Sequence

from penstock_plugins.management_cli.fields import Field
from penstock_plugins.management_cli.output import columns
from penstock_plugins.management_cli.resources import Resource, new_group

SLUG = Field("--slug", "slug", "Short name, usable wherever an id is.", is_required=True)
NAME = Field("--name", "name", "What people call it.")
ORGANIZATION = Field("--organization", "organization_id", "Id or slug.  [default: yours]", only="create")
ARCHIVED = Field("--archived", "include_archived", "Those archived, too.", type=bool)


def grants(texts: Sequence[str]) -> list[dict[str, str]]:
    """Read ``role:scope`` grants. Raises ValueError."""
    found = []
    for text in texts:
        role, colon, scope = text.partition(":")
        if not colon or not scope:
            raise ValueError(f"{text!r} is not ROLE:SCOPE_ID, such as developer:proj_…")
        found.append({"role": role, "scope_id": scope})
    return found


organizations = new_group(
    Resource(
        name="organizations",
        noun="organization",
        about="What owns teams, users and everything below.",
        columns=columns("id", "slug", "name", "created_at"),
        fields=(SLUG, NAME),
        filters=(ARCHIVED,),
    )
)
teams = new_group(
    Resource(
        name="teams",
        noun="team",
        about="What owns projects.",
        columns=columns("id", "slug", "name", "organization_id", "created_at"),
        fields=(SLUG, NAME, ORGANIZATION),
        filters=(ARCHIVED,),
    )
)
projects = new_group(
    Resource(
        name="projects",
        noun="project",
        about="What owns virtual keys.",
        columns=columns("id", "slug", "name", "team_id", "created_at"),
        fields=(
            SLUG,
            NAME,
            Field("--team", "team_id", "Id, slug, or organization/team.  [default: default]", only="create"),
        ),
        filters=(ARCHIVED,),
    )
)
users = new_group(
    Resource(
        name="users",
        noun="user",
        about="People on whose behalf keys call, and who may hold roles.",
        columns=columns("id", "slug", "name", "email", "roles", "created_at"),
        fields=(
            SLUG,
            NAME,
            ORGANIZATION,
            Field("--email", "email"),
            Field(
                "--role", "roles", "ROLE:SCOPE_ID, such as developer:proj_…; all of them.", is_many=True, read=grants
            ),
        ),
        filters=(ARCHIVED,),
    )
)
service_accounts = new_group(
    Resource(
        name="service-accounts",
        noun="service account",
        about="Programs on whose behalf keys call.",
        columns=columns("id", "slug", "name", "project_id", "created_at"),
        fields=(
            SLUG,
            NAME,
            Field("--project", "project_id", "Id, slug, or team/project.  [default: default]", only="create"),
        ),
        filters=(ARCHIVED,),
    )
)
groups = new_group(
    Resource(
        name="groups",
        noun="group",
        about="Principals, each of whom has the full allowance of the group's budgets.",
        columns=columns("id", "slug", "name", "member_ids", "created_at"),
        fields=(
            SLUG,
            NAME,
            ORGANIZATION,
            Field("--member", "member_ids", "User or service account; all of them.", is_many=True),
        ),
        filters=(ARCHIVED,),
    )
)
