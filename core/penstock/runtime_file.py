"""How ``penstock`` finds a gateway that the same user runs on this machine, without any set-up.

A gateway with an embedded store writes ``<pid>.json`` (mode 0600) into a folder of its user once it listens: where it
is, and the token of the store's first administrator. It holds a lock on the file as long as it lives (flock), so a file
that can be locked belongs to the dead and is removed by whoever finds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs


@attrs.frozen
class RunningGateway:
    """Hold what a gateway has written down about itself."""

    url: str
    """Where a client on this machine reaches it, without a path."""
    token: str = attrs.field(repr=False)
    """Secret of an api token."""
    pid: int
    started_at_ns: int
    """When it began to listen."""

    @property
    def port(self) -> int:
        """Return the port in ``url``."""
        return int(self.url.rpartition(":")[2])


def runtime_folders(environment: Mapping[str, str]) -> Iterator[Path]:
    """Yield the folders in which runtime files may be, the one to write to first."""
    roots = [environment.get("XDG_RUNTIME_DIR"), environment.get("XDG_STATE_HOME")]
    home = environment.get("HOME")
    roots += [f"{home}/.local/state" if home else None, f"/run/user/{os.getuid()}"]
    for root in dict.fromkeys(roots):
        if root and root.startswith("/"):
            yield Path(root, "penstock", "run")


def local_url(host: str, port: int, *, scheme: str = "http") -> str:
    """Return where a client on this machine reaches what listens on ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - read, not bound
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class RuntimeFile:
    """Be the runtime file of this process, from ``put`` to ``remove``."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._lock: int | None = None

    def put(self, url: str, token: str, environment: Mapping[str, str] | None = None) -> Path | None:
        """Write the file in place of the one before; return its path, or None where no folder takes it."""
        found = {"url": url, "token": token, "pid": os.getpid(), "started_at_ns": time.time_ns()}
        for folder in runtime_folders(os.environ if environment is None else environment):
            with contextlib.suppress(OSError):
                path, lock = _write(folder, json.dumps(found).encode())
                self._let_go(unless=path)
                self._path, self._lock = path, lock
                return path
        return None

    def remove(self) -> None:
        """Take the file away, as the process ends."""
        self._let_go()

    def _let_go(self, unless: Path | None = None) -> None:
        if self._lock is None or self._path is None:
            return
        if self._path != unless:
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(self._lock)
        self._path = self._lock = None


def _write(folder: Path, content: bytes) -> tuple[Path, int]:
    """Return the path of the complete, locked file and the descriptor that holds the lock."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    descriptor, temporary = tempfile.mkstemp(dir=folder)  # mode 0600
    path = folder / f"{os.getpid()}.json"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, content)
        os.replace(temporary, path)
    except OSError:
        os.close(descriptor)
        Path(temporary).unlink(missing_ok=True)
        raise
    return path, descriptor


def running_gateways(environment: Mapping[str, str] | None = None) -> list[RunningGateway]:
    """Return the gateways of this user that live, the newest first, one for each URL; files of the dead are removed."""
    found: dict[str, RunningGateway] = {}
    for folder in runtime_folders(os.environ if environment is None else environment):
        with contextlib.suppress(OSError):
            for path in folder.glob("*.json"):
                gateway = _read(path)
                if gateway is not None:
                    found[gateway.url] = max(found.get(gateway.url, gateway), gateway, key=_age)
    return sorted(found.values(), key=_age, reverse=True)


def _age(gateway: RunningGateway) -> tuple[int, int]:
    return gateway.started_at_ns, gateway.pid


def _read(path: Path) -> RunningGateway | None:
    """Return what a living gateway of this user wrote; remove what a dead one left."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with open(descriptor, "rb") as stream:
        about = os.fstat(descriptor)
        if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
            return None  # somebody else's, or open to others: neither its address nor its token can be trusted
        if _is_left_behind(descriptor):
            with contextlib.suppress(OSError):
                if not os.path.samestat(about, path.stat()):
                    return _read(path)  # a living gateway has put its new one in the place of this
                path.unlink()
            return None
        try:
            content = json.loads(stream.read(65_536))
            return RunningGateway(
                str(content["url"]), str(content["token"]), int(content["pid"]), int(content["started_at_ns"])
            )
        except (ValueError, KeyError, TypeError):
            return None


def _is_left_behind(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
