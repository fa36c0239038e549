"""The commands that every kind of object has: create, list, get, update, archive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import click

from penstock_plugins.management_cli.client import RefusedError, path_of
from penstock_plugins.management_cli.fields import AnyField, Field, body_of, parameters
from penstock_plugins.management_cli.output import Column, note
from penstock_plugins.management_cli.terminal import Terminal, command, confirm, yes_option

Prepare = Callable[[Terminal, dict[str, Any], Mapping[str, Any]], None]
"""Complete a body by what the options name: look up scopes."""
_PAGE = 200


@attrs.frozen(kw_only=True)
class Resource:
    """Say what a kind of object is called here and in the API, and which members have options."""

    name: str
    """Command and path alike, such as ``virtual-keys``."""
    noun: str
    """One of them, such as ``virtual key``."""
    about: str
    columns: Sequence[Column]
    fields: Sequence[AnyField] = ()
    filters: Sequence[Field] = ()
    """Options of ``list``; the member is the query parameter."""
    scopes: Sequence[click.Parameter] = ()
    """Further options of ``create``, for ``prepare``."""
    prepare: Prepare | None = None
    path: str = ""

    @property
    def place(self) -> str:
        """Return the path of the list."""
        return path_of(self.path or self.name)

    def one(self, which: str, *more: str) -> str:
        """Return the path of one object, by id, slug or name."""
        return path_of(self.path or self.name, which, *more)


def new_group(resource: Resource, verbs: Sequence[str] = ("create", "list", "get", "update", "archive")) -> click.Group:
    """Return the group of a resource with the commands that all have."""
    group = click.Group(resource.name, help=resource.about, context_settings={"help_option_names": ["-h", "--help"]})
    for verb in verbs:
        _ADD[verb](group, resource)
    return group


def which_argument() -> click.Argument:
    """Return the argument that names an object."""
    return click.Argument(["which"], metavar="ID")


def idempotency_option() -> click.Option:
    """Return the option for scripts that may run twice."""
    return click.Option(
        ["--idempotency-key"], metavar="KEY", help="Within 24 h the same key and values give the same answer again."
    )


def _add_create(group: click.Group, resource: Resource) -> None:
    params = [*parameters(resource.fields, "create"), *resource.scopes, idempotency_option()]

    @command(group, "create", params, about=f"Make a {resource.noun}; prints its id.")
    def create(terminal: Terminal, **values: Any) -> None:
        body = body_of(resource.fields, values)
        if resource.prepare is not None:
            resource.prepare(terminal, body, values)
        key = values["idempotency_key"]
        terminal.show(terminal.api.request("POST", resource.place, body, idempotency_key=key))


def _add_list(group: click.Group, resource: Resource) -> None:
    @command(group, "list", list_parameters(resource.filters), about=f"List {resource.name.replace('-', ' ')}.")
    def show_list(terminal: Terminal, **values: Any) -> None:
        show_pages(terminal, resource.place, resource.columns, resource.filters, values, noun=resource.name)


def list_parameters(filters: Sequence[Field]) -> list[click.Parameter]:
    """Return the options of a list."""
    return [
        *(field.parameter("list") for field in filters),
        click.Option(["--limit"], type=click.IntRange(1, _PAGE), help="At most so many on a page.  [default: 50]"),
        click.Option(["--cursor"], help="Go on where a page before ended."),
        click.Option(["--all", "is_all"], is_flag=True, help="All pages."),
    ]


def query_of(filters: Sequence[Field], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the query of what was given. Raises UsageError."""
    query = {name: values[name] for name in ("limit", "cursor") if values.get(name) is not None}
    for name, value in body_of(filters, values).items():
        query[name] = {True: "true", False: "false"}[value] if isinstance(value, bool) else value
    return query


def show_pages(
    terminal: Terminal,
    place: str,
    columns: Sequence[Column],
    filters: Sequence[Field],
    values: Mapping[str, Any],
    *,
    noun: str,
) -> None:
    """Print one page of a list, or all of it."""
    query = query_of(filters, values)
    if values["is_all"]:
        rows = [row for page in terminal.api.pages(place, {"limit": _PAGE, **query}) for row in page["data"]]
        terminal.show_page({"data": rows, "next_cursor": None}, columns, noun=noun)
    else:
        answer = terminal.api.request("GET", place, query=query)
        terminal.show_page(answer.content, columns, noun=noun, raw=answer.raw)


def _add_get(group: click.Group, resource: Resource) -> None:
    @command(group, "get", [which_argument()], about=f"Show a {resource.noun}.")
    def get(terminal: Terminal, which: str) -> None:
        terminal.show(terminal.api.request("GET", resource.one(which)))


def _add_update(group: click.Group, resource: Resource) -> None:
    params = [
        which_argument(),
        *parameters(resource.fields, "update"),
        click.Option(["--if-match"], metavar="VERSION", help="Refuse if it has changed since this version."),
    ]

    @command(group, "update", params, about=f"Change members of a {resource.noun}; all others stay.")
    def update(terminal: Terminal, which: str, if_match: str | None, **values: Any) -> None:
        body = body_of(resource.fields, values)
        if not body:
            raise click.UsageError("nothing to change: give at least one member")
        terminal.show(terminal.api.request("PATCH", resource.one(which), body, etag=etag_of(if_match)))


def etag_of(version: str | None) -> str | None:
    """Return a version as If-Match takes it."""
    return None if version is None else f'"{version.strip(chr(34))}"'


def _add_archive(group: click.Group, resource: Resource) -> None:
    @command(
        group,
        "archive",
        [which_argument(), yes_option()],
        about=f"Take a {resource.noun} out of use for good; what was spent and changed stays on record.",
    )
    def archive(terminal: Terminal, which: str, *, is_sure: bool) -> None:
        confirm(f"{resource.noun} {which} will be archived", is_sure=is_sure)
        answer = terminal.api.request("DELETE", resource.one(which))
        if answer.raw:
            terminal.show(answer)
        else:
            note(f"{which} is archived")


_ADD: dict[str, Callable[[click.Group, Resource], None]] = {
    "create": _add_create,
    "list": _add_list,
    "get": _add_get,
    "update": _add_update,
    "archive": _add_archive,
}


def add_action(
    group: click.Group,
    resource: Resource,
    name: str,
    *,
    about: str,
    warning: str | None = None,
    verb: str = "POST",
    fields: Sequence[Field] = (),
) -> None:
    """Add a command that does something to one object; with a ``warning`` it asks first."""
    params: list[click.Parameter] = [which_argument(), *(field.parameter(name) for field in fields)]
    if warning is not None:
        params.append(yes_option())

    @command(group, name, params, about=about)
    def act(terminal: Terminal, which: str, *, is_sure: bool = False, **values: Any) -> None:
        if warning is not None:
            confirm(f"{resource.noun} {which} {warning}", is_sure=is_sure)
        body, query = (body_of(fields, values), None) if verb == "POST" else (None, query_of(fields, values))
        terminal.show(terminal.api.request(verb, resource.one(which, name), body, query=query))


def looked_up(terminal: Terminal, kind: str, which: str, option: str) -> str:
    """Return the id of an object given by id, slug or name. Raises RefusedError naming the option and the way out."""
    noun = kind.replace("-", " ").removesuffix("s")
    try:
        found = terminal.api.get(path_of(kind, which))
    except RefusedError as error:
        if error.status != 404:
            raise
        raise RefusedError(
            f"{option}: there is no {noun} {which!r} in sight; 'penstock {kind} list' shows those there are, "
            f"'penstock {kind} create' makes one",
            status=404,
            code=error.code,
        ) from None
    return str(found["id"])
