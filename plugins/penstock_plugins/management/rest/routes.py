"""The table of routes: method, path, permission and work. REST, the OpenAPI document and tests derive from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs

from penstock_plugins.management.calls import Call
from penstock_plugins.management.resources import Resource
from penstock_plugins.management.rest.asks import Answer, Ask

if TYPE_CHECKING:
    from penstock_plugins.management.rest.desk import Desk, Written

PUBLIC = "public"
"""In place of a permission: anybody may."""
ANY_TOKEN = "any"  # noqa: S105 - no secret
"""In place of a permission: whoever presents a token may."""
Work = Callable[[Call, Ask], Answer]
OutsideWork = Callable[["Desk", Ask], Awaitable["Answer | Written"]]


@attrs.frozen(eq=False, kw_only=True)
class Route:
    """Hold one operation."""

    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    """Below ``/api/v1``."""
    permission: str
    """What it needs, at the scope of whatever it touches; PUBLIC, or ANY_TOKEN."""
    summary: str
    name: str
    """The operation's id."""
    tag: str
    reads: Work | None = None
    """Work on one view of the store."""
    writes: Work | None = None
    """Work in one transaction."""
    outside: OutsideWork | None = None
    """Work that asks others than the store."""
    resource: Resource | None = None
    body: Any = None
    """``create`` or ``update`` for members of the resource, an attrs class, or a JSON schema."""
    answer: Any = None
    """``view``, ``list`` or ``secret`` of the resource, or a JSON schema."""
    status: int = 200
    query: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    """Query parameters and their JSON schemas."""
    is_secret: bool = False
    """Whether the answer holds a secret, so that no cache may keep it."""
    is_long: bool = False
    """Whether its transaction may take so long that nobody else should wait for it."""

    @property
    def takes_body(self) -> bool:
        """Say whether a body is read."""
        return self.method in ("POST", "PATCH")


LIST_QUERY: dict[str, dict[str, Any]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 200, "default": 50},
    "cursor": {"type": "string"},
}
