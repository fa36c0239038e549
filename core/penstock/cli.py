"""The ``penstock`` command. Results go to standard output, messages to standard error.

Commands of other distributions come in through the entry-point group ``penstock.commands``, loaded when run.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any, Literal

import click

from penstock import __version__
from penstock.errors import ConfigurationError

COMMAND_GROUP = "penstock.commands"
DEFAULT_FILE = "penstock.toml"
_UNWRITTEN = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EDQUOT)


class Commands(click.Group):
    """Find commands here, in entry points, and among the plugins that the configuration enables."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_offered(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            return command
        point = _offered(ctx).get(cmd_name)
        if point is not None:
            return _load_command(point)
        return self._from_enabled_plugins(ctx, cmd_name)

    def _from_enabled_plugins(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if not Path(DEFAULT_FILE).is_file():
            return None
        from penstock.config import read_file  # noqa: PLC0415
        from penstock.fetch import Fetcher  # noqa: PLC0415
        from penstock.hooks import collect  # noqa: PLC0415
        from penstock.plugins import load  # noqa: PLC0415
        from penstock.services import Fetch, Services  # noqa: PLC0415
        from penstock.upstream import UpstreamTransports  # noqa: PLC0415

        configuration = read_file(Path(DEFAULT_FILE))
        services = Services(configuration.gateway.namespace)
        services.provide(Fetch, Fetcher(UpstreamTransports(configuration.gateway.upstream)))  # type: ignore[type-abstract]
        manager, _ = load(configuration, services)
        added = click.Group()
        collect(manager, "register_commands", cli=added)
        return added.get_command(ctx, cmd_name)


def _offered(ctx: click.Context) -> dict[str, importlib.metadata.EntryPoint]:
    """Return the commands of installed distributions; finding them reads a file of each, so it is done once a run."""
    found: dict[str, importlib.metadata.EntryPoint] | None = ctx.meta.get(COMMAND_GROUP)
    if found is None:
        found = ctx.meta[COMMAND_GROUP] = {}
        for point in importlib.metadata.entry_points(group=COMMAND_GROUP):
            found.setdefault(point.name, point)
    return found


def _load_command(point: importlib.metadata.EntryPoint) -> click.Command:
    """Return an installed command; one that cannot be loaded says so when it is run, not in ``--help``."""
    try:
        loaded = point.load()
    except Exception as error:  # noqa: BLE001 - somebody else's code
        fault = f"cannot be imported: {type(error).__name__}: {error}"
    else:
        if isinstance(loaded, click.Command):
            return loaded
        fault = "is no click command"

    def refuse() -> None:
        raise ConfigurationError(f"command {point.name!r} ({point.value}) {fault}")

    return click.Command(
        point.name,
        callback=refuse,
        short_help="(cannot be loaded)",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="penstock")
def cli() -> None:
    """Penstock: one endpoint in front of every model provider."""


_config_option = click.option(
    "--config", "-c", "path", type=click.Path(dir_okay=False, path_type=Path), default=DEFAULT_FILE,
    show_default=True, help="Configuration file.",
)  # fmt: skip


@cli.command()
@_config_option
@click.option("--listen", help="HOST:PORT, over the file's.")
@click.option("--workers", type=click.IntRange(1, 256), help="Processes on one port, over the file's.")
def serve(path: Path, listen: str | None, workers: int | None) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reads the file again."""
    from penstock.config import read_file  # noqa: PLC0415
    from penstock.serving import serve_forever  # noqa: PLC0415

    overrides: dict[str, Any] = {}
    if listen is not None:
        overrides["listen"] = listen
    if workers is not None:
        overrides["workers"] = workers
    sys.exit(serve_forever(lambda: read_file(path, overrides)))


@cli.command()
@_config_option
@click.option("--explain", is_flag=True, help="Show each setting with where it came from.")
def check(path: Path, *, explain: bool) -> None:
    """Validate configuration and plugins without serving; one line per fault.

    Plugins are built and started (their lifespans are entered and left at once), so what they reach for on start-up is
    reached for here too.
    """
    from penstock.config import read_file  # noqa: PLC0415
    from penstock.serving import check_configuration  # noqa: PLC0415

    configuration = read_file(path)
    check_configuration(configuration)
    if explain:
        import attrs  # noqa: PLC0415

        for field in attrs.fields(type(configuration.gateway)):
            value = getattr(configuration.gateway, field.name)
            click.echo(f"{field.name} = {value!r}  ({configuration.origins.get(field.name, 'default')})")
    click.echo(f"{path}: ok, {len(configuration.gateway.plugins)} plugins", err=True)


@cli.command("hash-key")
@click.option("--pepper-env", default="PENSTOCK_PEPPER", show_default=True, help="Variable that holds the pepper.")
@click.option("--namespace", default="penstock", show_default=True, help="The gateway's namespace.")
def hash_key_command(pepper_env: str, namespace: str) -> None:
    """Read a virtual key on standard input and print the hash a configuration may hold."""
    from penstock.keys import hash_key, is_well_formed  # noqa: PLC0415

    pepper = os.environ.get(pepper_env)
    if not pepper:
        raise ConfigurationError(f"environment: {pepper_env} is not set; keys are hashed under a pepper")
    secret = sys.stdin.readline().strip().encode()
    if not is_well_formed(secret, namespace):
        raise ConfigurationError("standard input: is not a virtual key; 'penstock new-key' makes one")
    click.echo(hash_key(pepper.encode(), secret).hex())


@cli.command("new-key")
@click.option("--env", type=click.Choice(["live", "test"]), default="live", show_default=True)
@click.option("--namespace", default="penstock", show_default=True)
def new_key_command(env: Literal["live", "test"], namespace: str) -> None:
    """Print a fresh virtual key; put it, or its hash, into the configuration."""
    from penstock.config import NAMESPACE  # noqa: PLC0415
    from penstock.keys import new_key  # noqa: PLC0415

    if not NAMESPACE.fullmatch(namespace):
        raise click.BadParameter("use lower-case letters, digits and _, a letter first", param_hint="--namespace")
    click.echo(new_key(namespace, env))


@cli.group()
def plugins() -> None:
    """Look at plugins."""


_format_option = click.option("--format", "form", type=click.Choice(["table", "json"]), default="table")


@plugins.command("list")
@_config_option
@_format_option
def plugins_list(path: Path, form: str) -> None:
    """List installed plugins, and which of them the configuration enables, in order."""
    from penstock.reports import list_plugins, print_rows  # noqa: PLC0415

    print_rows(list_plugins(_given_or_there(path)), form)


@plugins.command("show")
@click.argument("name")
@_config_option
@_format_option
def plugins_show(name: str, path: Path, form: str) -> None:
    """Show one plugin: hooks, declared needs, settings."""
    from penstock.reports import print_row, show_plugin  # noqa: PLC0415

    print_row(show_plugin(name, _given_or_there(path)), form)


def _given_or_there(path: Path) -> Path | None:
    """Return the configuration file; None where none was named and none lies here."""
    source = click.get_current_context().get_parameter_source("path")
    return None if source is click.core.ParameterSource.DEFAULT and not path.is_file() else path


def main() -> None:
    """Run the command line; configuration faults are lines on standard error and exit status 2."""
    try:
        cli(standalone_mode=False)
    except ConfigurationError as error:
        for fault in error.faults:
            click.echo(f"penstock: {fault}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
    except OSError as error:
        if error.filename is not None or error.errno not in _UNWRITTEN:
            raise
        # Standard output takes no more: what is buffered for it must not be tried again at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:
            click.echo(f"penstock: standard output: {error.strerror}", err=True)
        sys.exit(1)
