"""The five operations every resource has, and the actions some have beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from penstock.governance import StoredObject
from penstock_plugins.management import objects
from penstock_plugins.management.calls import Call
from penstock_plugins.management.cursors import ListPlace, read_cursor, write_cursor
from penstock_plugins.management.places import find, spoken
from penstock_plugins.management.resources import Resource
from penstock_plugins.management.rest.asks import Answer, Ask
from penstock_plugins.management.rest.routes import LIST_QUERY, Route

_TEXT = {"type": "string"}
Act = Callable[..., tuple[StoredObject, dict[str, Any]]]


def routes_of(resource: Resource) -> Iterator[Route]:
    """Yield the routes of a resource: list, create, read, change, archive."""
    path, tag, noun = f"/{resource.path}", resource.path, spoken(resource.kind.name)
    one = path + "/{id}"
    stem = resource.path.replace("-", "_").replace("/", "_")
    query = {
        **dict.fromkeys(resource.filters, _TEXT),
        "include_archived": {"type": "boolean"},
        **LIST_QUERY,
    }
    yield Route(method="GET", path=path, permission=resource.permission("view"), name=f"list_{stem}", tag=tag,
                summary=f"List each {noun} in sight, oldest first.", reads=_lists(resource), resource=resource,
                answer="list", query=query)  # fmt: skip
    yield Route(method="POST", path=path, permission=resource.permission("create"), name=f"create_{stem}", tag=tag,
                summary=f"Make a {noun}.", writes=_creates(resource), resource=resource, body="create",
                answer="secret", status=201, is_secret=True)  # fmt: skip
    yield Route(method="GET", path=one, permission=resource.permission("view"), name=f"get_{stem}", tag=tag,
                summary=f"Read a {noun} by id or {resource.label}.", reads=_gets(resource), resource=resource,
                answer="view")  # fmt: skip
    yield Route(method="PATCH", path=one, permission=resource.permission("update"), name=f"update_{stem}", tag=tag,
                summary=f"Change members of a {noun} (JSON Merge Patch); null clears.", writes=_updates(resource),
                resource=resource, body="update", answer="view")  # fmt: skip
    yield Route(method="DELETE", path=one, permission=resource.permission("delete"), name=f"archive_{stem}", tag=tag,
                summary=f"Archive a {noun}; it stays readable by id.", writes=_archives(resource), resource=resource,
                answer="view")  # fmt: skip


def action(
    resource: Resource, name: str, permission: str, act: Act, *, summary: str, body: Any, shows: str = "view"
) -> Route:
    """Return the route of something that can be done to one object."""

    def work(call: Call, ask: Ask) -> Answer:
        stored, once = act(call, ask.name, ask.body, version=ask.version)
        return _shown(call, resource, stored, once)

    stem = resource.path.replace("-", "_")
    return Route(method="POST", path=f"/{resource.path}/{{id}}/{name}", permission=resource.permission(permission),
                 name=f"{name}_{stem}", tag=resource.path, summary=summary, writes=work, resource=resource, body=body,
                 answer=shows, is_secret=shows == "secret")  # fmt: skip


def page(
    call: Call, ask: Ask, filters: Mapping[str, str], browse: Callable[[str | None], tuple[list[Any], str | None]]
) -> Answer:
    """Return a page of a list and the cursor of the next."""
    place = ListPlace(call.actor.id, ask.path, filters)
    cursor = ask.query.get("cursor")
    after = None if cursor is None else read_cursor(call.means.vault, place, cursor)
    shown, last = browse(after)
    following = None if last is None else write_cursor(call.means.vault, place, last)
    return Answer({"data": shown, "next_cursor": following})


def _lists(resource: Resource) -> Callable[[Call, Ask], Answer]:
    references = {name.removesuffix("[]"): kinds for name, kinds in resource.references.items()}

    def work(call: Call, ask: Ask) -> Answer:
        filters = {name: ask.query[name] for name in resource.filters if name in ask.query}
        resolved = dict(filters)
        for name, text in filters.items():
            if references.get(name):
                resolved[name] = find(call, references[name], text).id
        archived = ask.flag("include_archived")
        bound = {**filters, "include_archived": str(archived)}
        limit = ask.limit
        return page(
            call, ask, bound,
            lambda after: objects.browse(call, resource, resolved, after=after, limit=limit, archived=archived),
        )  # fmt: skip

    return work


def _creates(resource: Resource) -> Callable[[Call, Ask], Answer]:
    def work(call: Call, ask: Ask) -> Answer:
        stored, once = objects.create(call, resource, ask.body)
        return _shown(call, resource, stored, once, status=201)

    return work


def _gets(resource: Resource) -> Callable[[Call, Ask], Answer]:
    def work(call: Call, ask: Ask) -> Answer:
        return _shown(call, resource, objects.get(call, resource, ask.name), {})

    return work


def _updates(resource: Resource) -> Callable[[Call, Ask], Answer]:
    def work(call: Call, ask: Ask) -> Answer:
        stored, once = objects.update(call, resource, ask.name, ask.body, version=ask.version)
        return _shown(call, resource, stored, once)

    return work


def _archives(resource: Resource) -> Callable[[Call, Ask], Answer]:
    def work(call: Call, ask: Ask) -> Answer:
        return _shown(call, resource, objects.archive(call, resource, ask.name, version=ask.version), {})

    return work


def _shown(call: Call, resource: Resource, stored: StoredObject, once: Mapping[str, Any], status: int = 200) -> Answer:
    view = objects.view(call, resource, stored)
    return Answer({"id": view["id"], **once, **view}, status, stored.version)
