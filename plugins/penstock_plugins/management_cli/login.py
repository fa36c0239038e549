"""``login`` and ``whoami``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from penstock_plugins.management_cli.client import Api, path_of
from penstock_plugins.management_cli.output import note, print_facts
from penstock_plugins.management_cli.profile import Access, checked_url, find_access, read_token, write_profile
from penstock_plugins.management_cli.terminal import ApiCommand, Terminal

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@click.command(
    "login",
    cls=ApiCommand,
    help=(
        "Keep where the gateway is and an api token for later commands (in the profile, readable by you only).\n\n"
        "The token is asked for, or read from standard input, --token-file or PENSTOCK_TOKEN."
    ),
)
@click.pass_obj
def login(terminal: Terminal) -> None:
    """Ask who the token belongs to, and keep it."""
    url = terminal.url or os.environ.get("PENSTOCK_URL")
    if url is None or terminal.port is not None:
        url = find_access(port=terminal.port, token_file=terminal.token_file).url
    access = Access(checked_url(url, "--url"), _token(terminal), "this login")
    if sends_openly(access.url):
        note(f"penstock: {access.url} is not encrypted: whoever sees the traffic sees the token")
    api = Api(access)
    try:
        answer = api.request("GET", path_of("whoami"))
    finally:
        api.close()
    path = write_profile(access.url, access.token, os.environ)
    terminal.show(answer)
    note(f"logged in to {access.url}; kept in {path}")


def sends_openly(url: str) -> bool:
    """Say whether a token sent to an address can be read on its way."""
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname not in _LOOPBACK


def _token(terminal: Terminal) -> str:
    if terminal.token_file is not None:
        return read_token(Path(terminal.token_file))
    given = os.environ.get("PENSTOCK_TOKEN", "").strip()
    if given:
        return given
    if not sys.stdin.isatty():
        return read_token(Path("-"))
    return str(click.prompt("api token", hide_input=True, err=True)).strip()


@click.command("whoami", cls=ApiCommand, help="Show whom the gateway takes you for, and what you may do.")
@click.pass_obj
def whoami(terminal: Terminal) -> None:
    """Print the actor."""
    answer = terminal.api.request("GET", path_of("whoami"))
    if terminal.form == "json":
        terminal.show(answer)
    else:
        print_facts({**answer.content, "grants": [_spoken(grant) for grant in answer.content.get("grants", ())]})
    access = terminal.api.access
    note(f"{access.url}, found by {access.origin}")


def _spoken(grant: Mapping[str, Any]) -> str:
    """Return a grant in short: ``manage`` stands for all that can be done with a resource."""
    permissions = grant.get("permissions", ())
    whole = {name.removesuffix(":manage") for name in permissions if name.endswith(":manage")}
    short = [name for name in permissions if name.endswith(":manage") or name.partition(":")[0] not in whole]
    own = [f"{name} (own)" for name in grant.get("own", ()) if name not in permissions]
    return f"on {grant.get('scope_id')}: {' '.join([*short, *own])}"
