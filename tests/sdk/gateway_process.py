"""A gateway as its users run it: the installed command, a configuration file, a port of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from penstock import new_key

MAX_BODY_BYTES = 64 * 1024
_PATIENCE_SECONDS = 20.0
_KEY_NAMES = ("dev", "limited", "declared", "impatient", "dead", "revoked", "disabled", "expired", "unknown")
_CONFIG = """\
[gateway]
listen = "127.0.0.1:0"
plugins = [{instruments}, "virtual_keys", "routing", "mock", "openai", "openai_compatible", "anthropic"]
log = "json"
limits = {{ max_body_bytes = {max_body_bytes}, drain_timeout = 5.0 }}

[plugins.virtual_keys]
pepper = "a pepper for the tests of official SDKs"
keys = [
    {{ name = "dev", secret = "{dev}", bindings = ["mock"] }},
    {{ name = "limited", secret = "{limited}", bindings = ["mock"], models_allowed = ["mock/allowed-*"] }},
    {{ name = "declared", secret = "{declared}", bindings = ["declared", "declared-too"] }},
    {{ name = "impatient", secret = "{impatient}", bindings = ["impatient"] }},
    {{ name = "dead", secret = "{dead}", bindings = ["dead-openai", "dead-anthropic"] }},
    {{ name = "revoked", secret = "{revoked}", status = "revoked" }},
    {{ name = "disabled", secret = "{disabled}", status = "disabled" }},
    {{ name = "expired", secret = "{expired}", expires_at = 1.0 }},
]

[plugins.routing]
bindings = [
    {{ name = "mock", type = "mock" }},
    {{ name = "declared", type = "mock", models = ["declared-model"] }},
    {{ name = "declared-too", type = "mock", models = ["declared-model"] }},
    {{ name = "impatient", type = "mock", timeouts = {{ first_byte = 0.02 }}, settings = {{ delay = 1.0 }} }},
    {{ name = "dead-openai", type = "openai_compatible", base_url = "http://127.0.0.1:1/v1" }},
    {{ name = "dead-anthropic", type = "anthropic", base_url = "http://127.0.0.1:1" }},
]
"""


@attrs.frozen
class RunningGateway:
    """Say where the gateway is, and which virtual keys it knows (all but ``unknown``), by name."""

    port: int
    keys: Mapping[str, str]
    log: list[str]
    """Lines of its standard error, so far."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def key(self) -> str:
        return self.keys["dev"]


class _StandardError:
    """Read a process's lines as they come, so that it never waits for a full pipe."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: list[str] = []
        self.port = 0
        self.is_settled = threading.Event()
        """Set once the gateway listens, or has ended."""
        self._process = process
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append(line)
            if not self.port and '"listening"' in line:
                self.port = json.loads(line)["port"]
                self.is_settled.set()
        self.is_settled.set()


@contextmanager
def running_gateway(folder: Path) -> Iterator[RunningGateway]:
    """Serve until left. Raises AssertionError unless SIGTERM then ends it with status 0, no fault logged."""
    keys = {name: new_key() for name in _KEY_NAMES}
    instruments = json.dumps(str(Path(__file__).with_name("instruments.py")))
    file = folder / "penstock.toml"
    file.write_text(_CONFIG.format(instruments=instruments, max_body_bytes=MAX_BODY_BYTES, **keys), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("penstock")), "serve", "--config", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_environment()) as process:
        try:
            stderr = _StandardError(process)
            assert stderr.is_settled.wait(_PATIENCE_SECONDS), "the gateway does not start"
            assert stderr.port, f"the gateway ended: {''.join(stderr.lines)}"
            yield RunningGateway(stderr.port, keys, stderr.lines)
            process.send_signal(signal.SIGTERM)
            status = process.wait(_PATIENCE_SECONDS)
            stderr.thread.join(_PATIENCE_SECONDS)
        finally:
            process.kill()
    assert status == 0, f"SIGTERM ended the gateway with status {status}: {''.join(stderr.lines[-20:])}"
    faults = [line for line in stderr.lines if _is_fault(line)]
    assert not faults, f"the gateway logged faults: {''.join(faults)}"


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}


def _is_fault(line: str) -> bool:
    """Tell what no gateway should log from lines about exchanges, refused ones included."""
    try:
        entry: Any = json.loads(line)
    except ValueError:
        return True
    return "exception" in entry or entry.get("level") in ("error", "critical")
