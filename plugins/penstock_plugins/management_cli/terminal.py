"""What every command has in common: its options for reaching a gateway, its way to print, to ask and to fail.

Exit status: 0 done, 1 refused or failed (one line on standard error), 2 usage or configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import click

from penstock_plugins.management_cli.client import Answer, Api, RefusedError
from penstock_plugins.management_cli.output import Column, note, print_facts, print_json, print_table, printable
from penstock_plugins.management_cli.profile import find_access

_COMMON = ("form", "url", "port", "token_file")


@attrs.define(eq=False)
class Terminal:
    """Be what a command talks to: the API on one side, the user on the other."""

    form: str = "table"
    url: str | None = None
    port: int | None = None
    token_file: str | None = None
    _api: Api | None = attrs.field(default=None, init=False)

    @property
    def api(self) -> Api:
        """Return the API of the gateway that is meant. Raises ConfigurationError."""
        if self._api is None:
            self._api = Api(find_access(url=self.url, token_file=self.token_file, port=self.port))
        return self._api

    def show(self, answer: Answer) -> None:
        """Print one object."""
        if self.form == "json":
            print_json(answer.raw or b"null")
        elif isinstance(answer.content, Mapping):
            print_facts(answer.content)
            if answer.content.get("secret"):
                note("Keep the secret now: it is not shown again.")
        elif answer.content is not None:
            print_json(answer.raw)

    def show_page(
        self, page: Mapping[str, Any], shown: Sequence[Column], *, noun: str, raw: bytes | None = None
    ) -> None:
        """Print a list, in JSON as the API spelled it (``raw``); say where it goes on."""
        if self.form == "json":
            print_json(raw or page)
        else:
            print_table(page["data"], shown, empty=f"no {noun.replace('-', ' ')}")
        if page.get("next_cursor"):
            note(f"there are more: --all shows them, --cursor {printable(str(page['next_cursor']))} the next page")

    def close(self) -> None:
        """Let go of the gateway."""
        if self._api is not None:
            self._api.close()


class ApiCommand(click.Command):
    """A command that asks a gateway; its callback gets the Terminal first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params = [*self.params, *_common_options()]

    def invoke(self, ctx: click.Context) -> Any:
        terminal = Terminal(**{name: ctx.params.pop(name) for name in _COMMON})
        ctx.obj = terminal
        try:
            return super().invoke(ctx)
        except RefusedError as error:
            note(f"penstock: {printable(str(error))}{_way_out(ctx, error)}")
            sys.exit(1)
        finally:
            terminal.close()


def _way_out(ctx: click.Context, error: RefusedError) -> str:
    """Return where to look for what was named and is not there."""
    parent = ctx.parent
    if error.code != "not_found" or parent is None or "which" not in ctx.params:
        return ""
    return f"; '{parent.command_path} list' shows what there is"


def _common_options() -> list[click.Option]:
    return [
        click.Option(["--format", "form"], type=click.Choice(["table", "json"]), default="table", show_default=True),
        click.Option(["--url"], metavar="URL", help="The gateway; else PENSTOCK_URL, the login, or the one here."),
        click.Option(["--port"], type=click.IntRange(1, 65535), help="Of several running here, the one on this port."),
        click.Option(
            ["--token-file"], metavar="FILE", help="File with the api token, - for standard input; else PENSTOCK_TOKEN."
        ),
    ]


def command(
    group: click.Group, name: str, params: Sequence[click.Parameter] = (), *, about: str
) -> Callable[[Callable[..., None]], ApiCommand]:
    """Make a command of a function that takes the Terminal and the options by keyword."""

    def add(function: Callable[..., None]) -> ApiCommand:
        made = ApiCommand(name, callback=click.pass_obj(function), params=list(params), help=about)
        group.add_command(made)
        return made

    return add


YES = ("--yes", "-y")


def yes_option() -> click.Option:
    """Return the option that answers a question beforehand."""
    return click.Option([*YES, "is_sure"], is_flag=True, help="Do it without asking.")


def confirm(what: str, *, is_sure: bool) -> None:
    """Ask on a terminal; elsewhere only --yes will do. Raises UsageError."""
    if is_sure:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{what}: add --yes to do it without being asked")
    if not click.confirm(f"{what}. Go on?", err=True):
        note("penstock: nothing was done")
        sys.exit(1)
