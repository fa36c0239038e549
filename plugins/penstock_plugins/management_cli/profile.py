"""Where the gateway is and by which token it is asked.

The first that is given wins: ``--url`` and ``--token-file``; ``PENSTOCK_URL`` and ``PENSTOCK_TOKEN``; the profile that
``penstock login`` wrote; the newest gateway that this user runs on this machine.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import attrs

from penstock import ConfigurationError
from penstock.runtime_file import RunningGateway, running_gateways

_MAX_TOKEN = 4096


@attrs.frozen
class Access:
    """Hold where the API is and what lets one in."""

    url: str
    token: str = attrs.field(repr=False)
    origin: str
    """What said so: for messages."""
    token_origin: str | None = None
    """What gave the token, where that is something else."""


def find_access(
    *,
    url: str | None = None,
    token_file: str | None = None,
    port: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Access:
    """Return the gateway to ask. Raises ConfigurationError, which says how to name one."""
    environment = os.environ if environment is None else environment
    token = None if token_file is None else read_token(Path(token_file))
    if port is not None:
        if url is not None:
            raise ConfigurationError("--url and --port: give one of them")
        return _with_token(_local(environment, port), token, "--token-file")
    url_from, token_from = "--url", "--token-file"
    if url is None and (url := environment.get("PENSTOCK_URL") or None) is not None:
        url_from = "PENSTOCK_URL"
    if token is None and (token := environment.get("PENSTOCK_TOKEN", "").strip() or None) is not None:
        token_from = "PENSTOCK_TOKEN"  # noqa: S105 - a name
    if url is not None:
        found = token or _token_for(url, environment, url_from)
        return Access(checked_url(url, url_from), found, url_from, token_from if token else None)
    kept = read_profile(environment)
    if kept is not None:
        return _with_token(kept, token, token_from)
    local = _local(environment, None, token_from if token else None)
    return _with_token(local, token, token_from)


def _with_token(access: Access, token: str | None, token_from: str) -> Access:
    return access if token is None else attrs.evolve(access, token=token, token_origin=token_from)


def _token_for(url: str, environment: Mapping[str, str], url_from: str) -> str:
    """Return the token for an address given without one: the profile's or a local gateway's of that very address."""
    asked = checked_url(url, url_from)
    known = [read_profile(environment), *map(_access_of, running_gateways(environment))]
    for access in known:
        if access is not None and access.url == asked:
            return access.token
    raise ConfigurationError(
        f"{url_from}: no token for {asked}; set PENSTOCK_TOKEN, give --token-file FILE, or run 'penstock login'"
    )


def _access_of(gateway: RunningGateway) -> Access:
    return Access(gateway.url, gateway.token, f"the gateway running here (process {gateway.pid})")


def _local(environment: Mapping[str, str], port: int | None, token_from: str | None = None) -> Access:
    running = running_gateways(environment)
    for gateway in running:
        if port is None or gateway.port == port:
            return _access_of(gateway)
    if port is not None:
        others = ", ".join(str(gateway.port) for gateway in running) or "none"
        raise ConfigurationError(
            f"--port: no gateway of this user with an embedded store listens on {port}; running: {others}"
        )
    given = f"{token_from} is given, but no address; " if token_from else ""
    raise ConfigurationError(
        f"{given}no gateway is known: start one ('penstock demo'), run 'penstock login', or set PENSTOCK_URL and "
        "PENSTOCK_TOKEN"
    )


def checked_url(url: str, origin: str) -> str:
    """Return the address without a trailing slash. Raises ConfigurationError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigurationError(f"{origin}: is no URL; give it like http://127.0.0.1:8080") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ConfigurationError(f"{origin}: must be like http://127.0.0.1:8080 or https://gateway.example")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigurationError(f"{origin}: must hold no credentials, query or fragment; the token is given apart")
    path = parts.path.rstrip("/").removesuffix("/api/v1").removesuffix("/api")
    return f"{parts.scheme}://{parts.netloc}{path}"


def read_token(path: Path) -> str:
    """Return the token in a file, or on standard input for ``-``. Raises ConfigurationError."""
    if str(path) == "-":
        import sys  # noqa: PLC0415

        return _checked_token(sys.stdin.readline(), "standard input")
    try:
        return _checked_token(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigurationError(f"--token-file {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"--token-file {path}: is no text") from None


def _checked_token(text: str, origin: str) -> str:
    token = text.strip()
    if not token or len(token) > _MAX_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigurationError(f"{origin}: holds no api token; it is one word, like ps_at_…")
    return token


# --- the profile --------------------------------------------------------------------------------------------


def profile_path(environment: Mapping[str, str]) -> Path:
    """Return where the profile is. Raises ConfigurationError without a home."""
    root = environment.get("XDG_CONFIG_HOME", "")
    if not root.startswith("/"):
        home = environment.get("HOME")
        if not home:
            raise ConfigurationError("HOME is not set, so there is no place for a profile; use PENSTOCK_URL instead")
        root = f"{home}/.config"
    return Path(root, "penstock", "profile.json")


def read_profile(environment: Mapping[str, str]) -> Access | None:
    """Return what was logged in to. Raises ConfigurationError for a file that cannot be used."""
    try:
        path = profile_path(environment)
    except ConfigurationError:
        return None
    again = "run 'penstock login' again, or remove it"
    try:
        about = path.stat()
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {getattr(error, 'strerror', 'is no text')}") from None
    if about.st_mode & 0o077:
        raise ConfigurationError(f"{path}: is open to other users; 'chmod 600' it, or {again}")
    try:
        content = json.loads(text)
        url, token = content["url"], content["token"]
    except (ValueError, KeyError, TypeError):
        url = token = None
    if not isinstance(url, str) or not isinstance(token, str):
        raise ConfigurationError(f"{path}: is no profile; {again}")
    return Access(checked_url(url, str(path)), _checked_token(token, str(path)), str(path))


def write_profile(url: str, token: str, environment: Mapping[str, str]) -> Path:
    """Keep where to go and by which token (0600 from its first byte on). Raises ConfigurationError."""
    path = profile_path(environment)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
        with open(descriptor, "w", encoding="utf-8") as stream:
            json.dump({"url": url, "token": token}, stream)
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written: {error.strerror}") from None
    return path
