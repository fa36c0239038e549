"""The demo's folder: what is made on the first start, and what is read on every one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from penstock import ConfigurationError, is_well_formed, new_key
from penstock_plugins.demo.vendors import VENDORS

if TYPE_CHECKING:
    from penstock.config import Configuration

CONFIG_FILE = "penstock.toml"
KEY_FILE = "virtual-key"

_CONFIG = """\
# Made by "penstock demo". Serve it again with the same command, or with: penstock serve -c {file}
[gateway]
plugins = [
    "store", "virtual_keys", "rate_limits", "routing", "caching", "policy_rules", "prices", "budgets", "guardrails",
    "mock", "openai", "anthropic", "management",
]

# Keys, providers, budgets and all that was spent are in this database; "penstock virtual-keys list" shows the keys.
[plugins.store]
url = "sqlite:///penstock.db"
"""
_BINDING = """
[[plugins.routing.bindings]]
name = "{name}"
type = "{name}"
credential = {{ env = "{variable}" }}
"""


@attrs.frozen
class Demo:
    """Hold what the demo runs on."""

    file: Path
    virtual_key: str = attrs.field(repr=False)
    is_kept: bool
    has_store: bool
    """Folders of an earlier layout keep key and bindings in the configuration file."""

    def read(self, listen: str, given: Mapping[str, type[Any]]) -> Configuration:
        """Read the configuration, and have the plugins in ``given`` run right after the store.

        In a folder without a store, bindings whose credential is not in the environment now are left out. Raises
        ConfigurationError.
        """
        from penstock.config import read_document  # noqa: PLC0415 - "penstock --help" need not load it

        document = _read_document(self.file)
        overrides: dict[str, Any] = {"listen": listen}
        if self.has_store:
            names = _plugins(document)
            after = names.index("store") + 1
            overrides["plugins"] = [*names[:after], *given, *names[after:]]
        else:
            bindings = _bindings(document)
            bindings[:] = [binding for binding in bindings if _missing_variable(binding) is None]
        folder = self.file.parent
        read = read_document(document, source=str(self.file), folder=folder, overrides=overrides)
        return attrs.evolve(read, given=given) if self.has_store else read


@contextlib.contextmanager
def opened(given: Path | None) -> Iterator[Path]:
    """Yield the folder that was given, or one that is gone afterwards. Raises ConfigurationError."""
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
    """Make what the folder lacks, and use what it has. Raises ConfigurationError."""
    file, key_file = folder / CONFIG_FILE, folder / KEY_FILE
    try:
        with _alone(folder):
            if not file.exists():
                _make(file, key_file)
            document = _read_document(file)
            has_store = "store" in _plugins(document)
            if has_store and not key_file.exists():
                write_private(key_file, new_key() + "\n")
            virtual_key = key_file.read_text(encoding="ascii").strip()
            if not has_store:
                _bind_by_environment(file, document)
    except (OSError, UnicodeDecodeError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else "the key is not text"
        raise ConfigurationError(f"--folder {folder}: its files cannot be used: {reason}") from None
    if not is_well_formed(virtual_key.encode()):
        raise ConfigurationError(f"{key_file}: holds no virtual key; remove the folder's files to start anew")
    return Demo(file, virtual_key, is_kept, has_store)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one demo after the other see what a folder lacks, so that two that start at once have one key."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make(file: Path, key_file: Path) -> None:
    """Write key and configuration, the configuration last: where it is, the folder is complete."""
    write_private(key_file, new_key() + "\n")
    write_private(file, _CONFIG.format(file=shlex.quote(str(file))))


def _bind_by_environment(file: Path, document: Mapping[str, Any]) -> None:
    """Add bindings for providers whose key is in the environment; the file names the variable, no key is written."""
    bound = [binding.get("type") for binding in _bindings(document) if isinstance(binding, Mapping)]
    for name, variable in VENDORS.items():
        if os.environ.get(variable) and name not in bound:
            with file.open("a", encoding="utf-8") as stream:
                stream.write(_BINDING.format(name=name, variable=variable))


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, from its first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "w", encoding="utf-8") as stream:
        os.fchmod(descriptor, 0o600)
        stream.write(text)


def _read_document(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file}: is not valid TOML: {error}") from None


def _plugins(document: Mapping[str, Any]) -> list[Any]:
    """Return the names of the plugins; what is wrong with them is for the configuration to say."""
    gateway = document.get("gateway")
    names = gateway.get("plugins") if isinstance(gateway, Mapping) else None
    return names if isinstance(names, list) else []


def _bindings(document: Mapping[str, Any]) -> list[Any]:
    """Return the document's own list of bindings; what is wrong with it is for the configuration to say."""
    found: object = document
    for name in ("plugins", "routing", "bindings"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, list) else []


def _missing_variable(binding: object) -> str | None:
    """Return the variable a binding's credential names, where it is not set."""
    credential = binding.get("credential") if isinstance(binding, Mapping) else None
    variable = credential.get("env") if isinstance(credential, Mapping) else None
    return variable if isinstance(variable, str) and not os.environ.get(variable) else None
