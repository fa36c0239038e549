"""The command: make or open the folder, serve, say how to call it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from penstock_plugins.demo.folder import Demo, opened, prepare
from penstock_plugins.demo.vendors import VENDORS

if TYPE_CHECKING:
    from penstock_plugins.demo.seed import Planted


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 picks a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep configuration and database here for the next start; without it they last as long as the demo.",
)
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def demo(port: int, host: str, folder: Path | None, form: str) -> None:
    """Serve a gateway with a mock provider, ready to be called; no account, no configuration needed.

    With OPENAI_API_KEY or ANTHROPIC_API_KEY in the environment, the real providers answer for their models. The other
    commands of the same user find it by themselves.
    """
    from penstock.runtime_file import local_url  # noqa: PLC0415
    from penstock.serving import serve_forever  # noqa: PLC0415 - "penstock --help" need not load it
    from penstock_plugins.demo.printed import encoded, greeting  # noqa: PLC0415
    from penstock_plugins.demo.seed import seed_for  # noqa: PLC0415

    authority = f"[{host}]" if ":" in host else host
    with opened(folder) as place:
        prepared = prepare(place, is_kept=folder is not None)
        planted = _planted(prepared)

        def announce(bound_port: int) -> None:
            show = encoded if form == "json" else greeting
            click.echo(show(prepared, planted, local_url(host, bound_port)))
            sys.stdout.flush()

        given = {"demo": seed_for(planted)}
        status = serve_forever(lambda: prepared.read(f"{authority}:{port}", given), announce)
    sys.exit(status)


def _planted(prepared: Demo) -> Planted:
    """Return what is known before a store tells: in a folder without one, the environment decides who answers."""
    from penstock_plugins.demo.seed import Planted  # noqa: PLC0415

    planted = Planted(prepared.virtual_key)
    if not prepared.has_store:
        planted.types.update({name: name for name, variable in VENDORS.items() if os.environ.get(variable)})
    return planted
