"""The gateway under test: its configuration, its command, its keys."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
from benchmarks.processes import free_port
from benchmarks.seeding import make_edited, make_objects

from penstock import new_key

CONFIGURATION = """\
[gateway]
listen = "127.0.0.1:{port}"
plugins = ["virtual_keys", "routing", "openai_compatible"]

[plugins.virtual_keys]
pepper = "0123456789abcdef0123456789abcdef"

[[plugins.virtual_keys.keys]]
name = "bench"
secret = "{secret}"
bindings = ["mock"]

[[plugins.virtual_keys.keys]]
name = "bench-alias"
secret = "{alias_secret}"
bindings = ["mock"]
model_aliases = {{ "fast" = "gpt-4o-mini" }}

[[plugins.routing.bindings]]
name = "mock"
type = "openai_compatible"
base_url = "http://127.0.0.1:{upstream}/v1"
credential = "sk-upstream"
models = ["gpt-4o-mini"]
"""
GOVERNED = """\
[gateway]
listen = "127.0.0.1:{port}"
plugins = {plugins}
"""
GOVERNED_PLUGINS = ("store", "virtual_keys", "rate_limits", "routing", "prices", "budgets", "openai", "management")
ALL_PLUGINS = (
    "store", "virtual_keys", "rate_limits", "routing", "caching", "policy_rules", "prices", "budgets", "guardrails",
    "fallback", "dialects", "openai", "anthropic", "openai_compatible", "mock", "management",
)  # fmt: skip
"""Every bundled plugin, in the order in which requests meet them."""
KEYS = ("bench", "alias", "guarded", "policed", "anthropic", "uncached")
SECRETS = {name: new_key(env="test") for name in KEYS}
"""What requests bear where the gateway does not make its keys itself; the configuration file has the first two."""
SECRET, ALIAS_SECRET = SECRETS["bench"], SECRETS["alias"]


@attrs.frozen
class Served:
    """A command that serves, and the secrets of its virtual keys by name."""

    command: list[str]
    secrets: Mapping[str, str] = SECRETS

    @property
    def secret(self) -> str:
        """The secret of the plain key."""
        return self.secrets["bench"]


def write_configuration(folder: Path, port: int, upstream: int) -> Path:
    """Write the gateway's configuration file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "penstock.toml"
    path.write_text(CONFIGURATION.format(port=port, upstream=upstream, secret=SECRET, alias_secret=ALIAS_SECRET))
    return path


def serve_command(config: Path, workers: int = 1) -> list[str]:
    """Return the command that serves a configuration with this environment's gateway."""
    command = [str(Path(sys.executable).with_name("penstock")), "serve", "--config", str(config)]
    return command if workers == 1 else [*command, "--workers", str(workers)]


@attrs.frozen
class GatewayCommand:
    """How to start the gateway: `penstock serve`, or any command with {port}, {upstream} and so on."""

    template: str | None = None
    is_governed: bool = False
    """Whether store, limits, budgets and ledger are on."""
    has_all_plugins: bool = False
    """Whether a governed gateway has every bundled plugin, most of them without anything to do for the plain key."""

    @property
    def can_choose_workers(self) -> bool:
        """Whether the number of workers has a place in the command."""
        return self.template is None or "{workers}" in self.template

    def write(self, folder: Path, port: int, upstream: int, workers: int = 1, stores: Stores | None = None) -> Served:
        """Write the configuration into the folder; return the command that serves it, and its keys."""
        if self.is_governed:
            plugins = ALL_PLUGINS if self.has_all_plugins else GOVERNED_PLUGINS
            return governed(folder, port, upstream, workers, plugins=plugins, stores=stores)
        config = write_configuration(folder, port, upstream)
        if self.template is not None:
            places = {"port": port, "upstream": upstream, "config": config, "workers": workers}
            return Served([part.format(**places) for part in shlex.split(self.template)])
        return Served(serve_command(config, workers))


GOVERNED_COMMAND = GatewayCommand(is_governed=True)
ALL_PLUGINS_COMMAND = GatewayCommand(is_governed=True, has_all_plugins=True)


@attrs.define
class Stores:
    """Stores that are filled once, and copied for each gateway: filling one takes longer than most measurements."""

    folder: Path
    _filled: dict[tuple[Sequence[str], int], tuple[Path, dict[str, str]]] = attrs.field(factory=dict)

    def copy(self, folder: Path, upstream: int, plugins: Sequence[str]) -> dict[str, str]:
        """Put a store into a folder; return the secrets of its keys by name."""
        found = self._filled.get((plugins, upstream))
        if found is None:
            origin = self.folder / f"store-{len(self._filled)}"
            found = self._filled[plugins, upstream] = origin, fill_store(origin, upstream, plugins)
        origin, secrets = found
        shutil.copytree(origin, folder, dirs_exist_ok=True)
        return secrets


def fill_store(folder: Path, upstream: int, plugins: Sequence[str]) -> dict[str, str]:
    """Make a store with bindings, keys with limits and budgets that are never reached; return the keys' secrets.

    With all plugins there are keys for the edited paths too; nothing of theirs concerns the plain key.
    """
    port = free_port()
    config = _write_governed(folder, port, plugins)
    with open(folder / "seeding.log", "wb") as log:
        program = subprocess.Popen(serve_command(config), stdout=log, stderr=log)
        try:
            secrets = make_objects(folder, port, upstream)
            if plugins == ALL_PLUGINS:
                secrets |= make_edited(folder, port, upstream)
        finally:
            program.terminate()
            program.wait(20)
    return secrets


def governed(
    folder: Path,
    port: int,
    upstream: int,
    workers: int,
    *,
    plugins: Sequence[str] = GOVERNED_PLUGINS,
    stores: Stores | None = None,
) -> Served:
    """Put a filled store into the folder; return what serves it."""
    secrets = fill_store(folder, upstream, plugins) if stores is None else stores.copy(folder, upstream, plugins)
    return Served(serve_command(_write_governed(folder, port, plugins), workers), secrets)


def _write_governed(folder: Path, port: int, plugins: Sequence[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "penstock.toml"
    config.write_text(GOVERNED.format(port=port, plugins=json.dumps(plugins)))
    return config
