"""``penstock store``: work on the database beside, or instead of, a running gateway."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from penstock import ConfigurationError
from penstock.config import read_file, structure
from penstock.governance import StoreUnavailableError, new_token
from penstock_plugins.store.plugin import StoreConfig

_REFUSED = 1


@click.group()
def store() -> None:
    """Back up, restore and re-key the database of a gateway on this machine."""


def _with_store(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the settings of the store, and turn what it refuses into a line and exit status 1."""

    @click.option(
        "--config", "-c", "path", type=click.Path(dir_okay=False, path_type=Path), default="penstock.toml",
        show_default=True, help="Configuration file that names the database.",
    )  # fmt: skip
    @wraps(command)
    def run(path: Path, **options: Any) -> None:
        from penstock_plugins.store.copies import RefusedError  # noqa: PLC0415 - the database is heavy to import
        from penstock_plugins.store.opening import StoreSettings  # noqa: PLC0415

        configuration = read_file(path)
        where = f"{configuration.source}: [plugins.store]"
        config: StoreConfig = structure(
            configuration.plugin_table("store"), StoreConfig, where=where, folder=configuration.folder
        )
        try:
            settings = StoreSettings(
                place=config.place(configuration.folder), encryption_key=config.encryption_key, pepper=config.pepper
            )
            command(settings, namespace=configuration.gateway.namespace, **options)
        except ConfigurationError as error:
            raise ConfigurationError(*(f"{where} {fault}" for fault in error.faults)) from error
        except (RefusedError, StoreUnavailableError) as error:
            click.echo(f"penstock: {error}", err=True)
            sys.exit(_REFUSED)

    return run


_file = click.argument("file", type=click.Path(dir_okay=False, path_type=Path))


@store.command()
@_file
@click.option("--with-keys", is_flag=True, help="Write FILE.key and FILE.pepper too; whoever has all three has all.")
@_with_store
def backup(settings: Any, namespace: str, file: Path, *, with_keys: bool) -> None:  # noqa: ARG001
    """Write a consistent copy of the database to FILE, while gateways go on.

    Encryption key and pepper are not in it: without them a backup cannot be used, so keep them elsewhere.
    """
    from penstock_plugins.store.copies import back_up  # noqa: PLC0415

    back_up(settings, file, with_keys=with_keys)
    click.echo(f"{file}: written", err=True)


@store.command()
@_file
@click.option("--yes", is_flag=True, help="Replace the database that is there.")
@_with_store
def restore(settings: Any, namespace: str, file: Path, *, yes: bool) -> None:  # noqa: ARG001
    """Put the backup FILE in the place of the database; no gateway may have it open."""
    from penstock_plugins.store import copies  # noqa: PLC0415

    with copies.replacing(settings):
        if settings.place.database.exists() and not yes:
            raise copies.RefusedError(f"{settings.place.database} would be replaced; say --yes if that is meant")
        copies.restore(settings, file)
    click.echo(f"{settings.place.database}: restored", err=True)


@store.command("rotate-key")
@_with_store
def rotate_key(settings: Any, namespace: str) -> None:  # noqa: ARG001
    """Seal all credentials with a new encryption key, while gateways go on.

    With encryption_key in the configuration: put the new key in front of the old one there, restart, then run this. The
    pepper cannot be rotated: keys and tokens are hashed under it, and only their owners know their secrets.
    """
    from penstock_plugins.store.copies import check_place  # noqa: PLC0415
    from penstock_plugins.store.rotating import rotate  # noqa: PLC0415

    check_place(settings.place)
    click.echo(f"{rotate(settings, time.time)} secrets sealed with another key", err=True)


@store.command("admin-token")
@_with_store
def admin_token(settings: Any, namespace: str) -> None:
    """Print a new token for an administrator of the whole installation; for when no other is left."""
    from penstock_plugins.store.copies import check_place  # noqa: PLC0415
    from penstock_plugins.store.rotating import add_admin_token  # noqa: PLC0415

    check_place(settings.place)
    secret = new_token(namespace)
    add_admin_token(settings, secret, time.time)
    click.echo(secret)
