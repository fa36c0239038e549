"""``penstock demo``: a gateway with everything embedded, from nothing to an answer in one command.

Configuration, pepper and virtual key live in one folder, made on the first start and used again on the next.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from penstock import ConfigurationError, display_prefix, hash_key, is_well_formed, new_key

if TYPE_CHECKING:
    from penstock.config import Configuration

CONFIG_FILE = "penstock.toml"
KEY_FILE = "virtual-key"
_VENDORS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
"""Binding name and type → the variable whose presence binds the real provider."""
_MODELS = {"openai": "gpt-5-mini", "anthropic": "claude-haiku-4-5"}

_CONFIG = """\
# Made by "penstock demo". Serve it again with the same command, or with: penstock serve -c {file}
[gateway]
plugins = ["virtual_keys", "routing", "mock", "openai", "anthropic"]

[plugins.virtual_keys]
pepper = "{pepper}"

[[plugins.virtual_keys.keys]]
name = "demo"
hash = "{hash}"
prefix = "{prefix}"

# Answers whatever no other binding serves, and always mock/... (see docs/mock.md).
[[plugins.routing.bindings]]
name = "mock"
type = "mock"
"""
_BINDING = """
[[plugins.routing.bindings]]
name = "{name}"
type = "{name}"
credential = {{ env = "{variable}" }}
"""

_GREETING = """
Penstock is running at {base_url}
Answers come from: {answers}

Virtual key: {virtual_key}
Configuration: {config}

With curl:

{curl}

With the OpenAI SDK:

  client = openai.OpenAI(base_url="{base_url}/v1", api_key="{virtual_key}")

With the Anthropic SDK:

  client = anthropic.Anthropic(base_url="{base_url}", api_key="{virtual_key}")

With Claude Code:

  export ANTHROPIC_BASE_URL={base_url}
  export ANTHROPIC_AUTH_TOKEN={virtual_key}

See a fallback's reason, a slow stream, a cut: model "mock/fault-503", "mock/slow", "mock/cut".
Stop with Ctrl-C.
"""


@attrs.frozen
class Demo:
    """Hold what the demo runs on."""

    file: Path
    virtual_key: str = attrs.field(repr=False)
    is_kept: bool

    def read(self, listen: str) -> Configuration:
        """Read the configuration, without the bindings whose credential is not in the environment now.

        Raises ConfigurationError.
        """
        from penstock.config import read_document  # noqa: PLC0415 - "penstock --help" need not load it

        document = _read_document(self.file)
        bindings = _bindings(document)
        bindings[:] = [binding for binding in bindings if _missing_variable(binding) is None]
        return read_document(document, source=str(self.file), folder=self.file.parent, overrides={"listen": listen})


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 picks a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep configuration and key here for the next start; without it they last as long as the demo.",
)
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def demo(port: int, host: str, folder: Path | None, form: str) -> None:
    """Serve a gateway with a mock provider, ready to be called; no account, no configuration needed.

    With OPENAI_API_KEY or ANTHROPIC_API_KEY in the environment, the real providers answer for their models.
    """
    from penstock.serving import serve_forever  # noqa: PLC0415 - "penstock --help" need not load it

    authority = f"[{host}]" if ":" in host else host
    with _folder(folder) as place:
        prepared = prepare(place, is_kept=folder is not None)

        def announce(bound_port: int) -> None:
            click.echo(
                _encoded(prepared, host, bound_port) if form == "json" else _greeting(prepared, host, bound_port)
            )
            sys.stdout.flush()

        status = serve_forever(lambda: prepared.read(f"{authority}:{port}"), announce)
    sys.exit(status)


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        try:
            given.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"--folder {given}: cannot be made: {error.strerror}") from None
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="penstock-demo-") as made:
        yield Path(made)


def prepare(folder: Path, *, is_kept: bool) -> Demo:
    """Make what the folder lacks, and use what it has. Raises ConfigurationError.

    A provider whose key is in the environment gets a binding that names the variable; no key is written.
    """
    file, key_file = folder / CONFIG_FILE, folder / KEY_FILE
    try:
        if not file.exists():
            _make(file, key_file)
        virtual_key = key_file.read_text(encoding="ascii").strip()
        bound = [_type_of(binding) for binding in _bindings(_read_document(file))]
        for name, variable in _VENDORS.items():
            if os.environ.get(variable) and name not in bound:
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(_BINDING.format(name=name, variable=variable))
    except (OSError, UnicodeDecodeError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else "the key is not text"
        raise ConfigurationError(f"--folder {folder}: its files cannot be used: {reason}") from None
    if not is_well_formed(virtual_key.encode()):
        raise ConfigurationError(f"{key_file}: holds no virtual key; remove the folder's files to start anew")
    return Demo(file, virtual_key, is_kept)


def _make(file: Path, key_file: Path) -> None:
    """Write key and configuration, the configuration last: where it is, the folder is complete."""
    pepper, virtual_key = secrets.token_hex(32), new_key()
    _write(key_file, virtual_key + "\n")
    text = _CONFIG.format(
        file=shlex.quote(str(file)),
        pepper=pepper,
        hash=hash_key(pepper.encode(), virtual_key.encode()).hex(),
        prefix=display_prefix(virtual_key),
    )
    _write(file, text)


def _write(path: Path, text: str) -> None:
    """Write a file that only its owner can read, from its first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as stream:
        os.fchmod(descriptor, 0o600)
        stream.write(text)


def _read_document(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file}: is not valid TOML: {error}") from None


def _bindings(document: Mapping[str, Any]) -> list[Any]:
    """Return the document's own list of bindings; what is wrong with it is for the configuration to say."""
    found: object = document
    for name in ("plugins", "routing", "bindings"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, list) else []


def _type_of(binding: object) -> object:
    return binding.get("type") if isinstance(binding, Mapping) else None


def _missing_variable(binding: object) -> str | None:
    """Return the variable a binding's credential names, where it is not set."""
    credential = binding.get("credential") if isinstance(binding, Mapping) else None
    variable = credential.get("env") if isinstance(credential, Mapping) else None
    return variable if isinstance(variable, str) and not os.environ.get(variable) else None


# --- what is printed ----------------------------------------------------------------------------------------


def _base_url(host: str, port: int) -> str:
    """Return where a client on this machine reaches the gateway."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - read, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _curl(base_url: str, virtual_key: str) -> str:
    body = f'{{"model":"{_MODELS["openai"]}","messages":[{{"role":"user","content":"Say hello."}}]}}'
    return (
        f"curl -sS {base_url}/v1/chat/completions"
        f" -H 'Authorization: Bearer {virtual_key}' -H 'Content-Type: application/json' -d '{body}'"
    )


def _providers() -> dict[str, str]:
    """Say who answers for each vendor's models."""
    return {name: name if os.environ.get(variable) else "mock" for name, variable in _VENDORS.items()}


def _encoded(prepared: Demo, host: str, port: int) -> str:
    import msgspec  # noqa: PLC0415 - loaded by then, but not for "penstock --help"

    base_url = _base_url(host, port)
    facts = {
        "base_url": base_url,
        "openai_base_url": f"{base_url}/v1",
        "anthropic_base_url": base_url,
        "virtual_key": prepared.virtual_key,
        "model": _MODELS["openai"],
        "anthropic_model": _MODELS["anthropic"],
        "providers": _providers(),
        "config": str(prepared.file),
        "curl": _curl(base_url, prepared.virtual_key),
    }
    return msgspec.json.encode(facts).decode()


def _greeting(prepared: Demo, host: str, port: int) -> str:
    base_url = _base_url(host, port)
    who = _providers()
    answers = ", ".join(
        f"{name} ({_VENDORS[name]} is {'set' if who[name] == name else 'not set, so by the mock'})" for name in who
    )
    return _GREETING.format(
        base_url=base_url,
        answers=answers,
        virtual_key=prepared.virtual_key,
        config=prepared.file if prepared.is_kept else f"{prepared.file} (gone when the demo stops)",
        curl=_curl(base_url, prepared.virtual_key),
    )
