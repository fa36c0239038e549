"""The gateway under test: its configuration, its command, its key."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

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


def write_configuration(folder: Path, port: int, upstream: int) -> Path:
    """Write the gateway's configuration file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "penstock.toml"
    path.write_text(CONFIGURATION.format(port=port, upstream=upstream, secret=SECRET, alias_secret=ALIAS_SECRET))
    return path


@attrs.frozen
class GatewayCommand:
    """How to start the gateway: `penstock serve`, or any command with {port}, {upstream} and so on."""

    template: str | None = None

    @property
    def can_choose_workers(self) -> bool:
        """Whether the number of workers has a place in the command."""
        return self.template is None or "{workers}" in self.template

    def write(self, folder: Path, port: int, upstream: int, workers: int = 1) -> list[str]:
        """Write the configuration into the folder; return the command that serves it."""
        config = write_configuration(folder, port, upstream)
        if self.template is not None:
            places = {"port": port, "upstream": upstream, "config": config, "workers": workers}
            return [part.format(**places) for part in shlex.split(self.template)]
        command = [str(Path(sys.executable).with_name("penstock")), "serve", "--config", str(config)]
        return command if workers == 1 else [*command, "--workers", str(workers)]
