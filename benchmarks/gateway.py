"""The gateway under test: its configuration, its command, its key."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

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


SECRET = new_key(env="test")
ALIAS_SECRET = new_key(env="test")


@attrs.frozen
class Served:
    """A command that serves, and the secrets of its virtual keys."""

    command: list[str]
    secret: str = SECRET
    alias_secret: str = ALIAS_SECRET


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

    @property
    def can_choose_workers(self) -> bool:
        """Whether the number of workers has a place in the command."""
        return self.template is None or "{workers}" in self.template

    def write(self, folder: Path, port: int, upstream: int, workers: int = 1) -> Served:
        """Write the configuration into the folder; return the command that serves it, and its keys."""
        if self.is_governed:
            return governed(folder, port, upstream, workers)
        config = write_configuration(folder, port, upstream)
        if self.template is not None:
            places = {"port": port, "upstream": upstream, "config": config, "workers": workers}
            return Served([part.format(**places) for part in shlex.split(self.template)])
        return Served(serve_command(config, workers))


GOVERNED = """\
[gateway]
listen = "127.0.0.1:{port}"
plugins = ["store", "virtual_keys", "rate_limits", "routing", "prices", "budgets", "openai", "management"]
"""
BUDGETS = (
    {"scope": "organization", "scope_id": "default", "window": "month", "limit_usd": "1000000"},
    {"scope": "project", "scope_id": "default", "window": "day", "limit_usd": "1000000"},
)


def governed(folder: Path, port: int, upstream: int, workers: int) -> Served:
    """Make a store with a binding, keys with limits and budgets that are never reached; return what serves it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "penstock.toml"
    config.write_text(GOVERNED.format(port=port))
    with open(folder / "seeding.log", "wb") as log:
        program = subprocess.Popen(serve_command(config), stdout=log, stderr=log)
        try:
            secret, alias_secret = _seed(folder, port, upstream)
        finally:
            program.terminate()
            program.wait(20)
    return Served(serve_command(config, workers), secret, alias_secret)


def _seed(folder: Path, port: int, upstream: int) -> tuple[str, str]:
    binding = {
        "name": "mock",
        "type": "openai",
        "scope_id": "default",
        "base_url": f"http://127.0.0.1:{upstream}/v1",
        "credential": "sk-upstream",
        "models": ["gpt-4o-mini"],
        "rate_limits": {"rpm": 100_000_000, "concurrency": 100_000},
    }
    call = _Calls(folder, port)
    call.make("provider-bindings", binding)
    for budget in BUDGETS:
        call.make("budgets", budget)
    key = {
        "provider_bindings": ["mock"],
        "rate_limits": {"rpm": 100_000_000, "tpm": 100_000_000_000, "concurrency": 100_000},
        "budget": {"window": "month", "limit_usd": "1000000"},
    }
    first = call.make("virtual-keys", {"name": "bench", **key})
    second = call.make("virtual-keys", {"name": "bench-alias", "model_aliases": {"fast": "gpt-4o-mini"}, **key})
    return first["secret"], second["secret"]


class _Calls:
    """Call the management API of a gateway that starts just now."""

    def __init__(self, folder: Path, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(f"{self._base}/readyz", timeout=5).close()
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        self._token = (folder / "penstock.db.admin-token").read_text().strip()

    def make(self, resource: str, document: Mapping[str, object]) -> dict[str, Any]:
        """Create one object; return it as the API does."""
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        url = f"{self._base}/api/v1/{resource}"
        request = urllib.request.Request(url, json.dumps(document).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                made: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{resource}: {error.read().decode()}") from error
        return made
