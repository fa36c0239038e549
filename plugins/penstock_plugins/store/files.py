"""Where an embedded store keeps what is not in its database: keys beside it, locks, and who may read them."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from penstock import ConfigurationError

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@attrs.frozen
class Place:
    """Name the files around a database."""

    database: Path

    def _beside(self, ending: str) -> Path:
        return self.database.with_name(f"{self.database.name}.{ending}")

    @property
    def key(self) -> Path:
        """Return the file of the encryption keys, one in a line, the one that seals first."""
        return self._beside("key")

    @property
    def pepper(self) -> Path:
        """Return the file of the pepper."""
        return self._beside("pepper")

    @property
    def admin_token(self) -> Path:
        """Return the file of the first administrator's token."""
        return self._beside("admin-token")

    @property
    def journal(self) -> Path:
        """Return the folder of what is not yet in the ledger."""
        return self._beside("journal")

    @property
    def lock(self) -> Path:
        """Return the file that processes lock while they have the database open."""
        return self._beside("lock")

    def copy_before(self, schema: str) -> Path:
        """Return where the database is copied to before it gets another schema."""
        return self._beside(f"before-{schema}")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the database open together with other processes. Raises ConfigurationError while one replaces it."""
        with _locked(self.lock, fcntl.LOCK_SH | fcntl.LOCK_NB) as is_locked:
            if not is_locked:
                raise ConfigurationError(f"url: {self.database} is just being restored; start again after that")
            yield

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Yield whether no other process has the database open; none can open it before this is left."""
        with _locked(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB) as is_locked:
            yield is_locked

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Let one process after the other see what a start has to make."""
        descriptor = os.open(self.database.parent, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def check_folder(self) -> None:
        """See that the database could be made, without making anything. Raises ConfigurationError."""
        folder = self.database.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigurationError(f"url: {self.database} cannot be made: {folder} is no folder that can be written")

    def prepare(self) -> None:
        """Make the database's folder and an empty file that only its owner can read. Raises ConfigurationError."""
        try:
            self.database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise ConfigurationError(f"url: {self.database} cannot be opened: {error.strerror}") from None


@contextmanager
def _locked(path: Path, how: int) -> Iterator[bool]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(f"url: {path} cannot be opened: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def write_private(path: Path, text: str, *, replace: bool = False) -> None:
    """Write a file of mode 0600 that is there whole or not at all. Raises ConfigurationError."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(descriptor)
            if replace:
                part.replace(path)
            else:
                os.link(part, path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from None


def sync_folder(folder: Path) -> None:
    """Have names that were made or changed in a folder survive the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_private(path: Path) -> str | None:
    """Return what a secret's file holds, None where there is none.

    Raises ConfigurationError for a file that is empty, unreadable, or open to others than its owner.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            text = stream.read().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        fault = getattr(error, "strerror", None) or "it is no text"
        raise ConfigurationError(f"{path} cannot be read: {fault}") from None
    if mode & _OTHERS:
        raise ConfigurationError(f"{path} is open to others (mode {mode:04o}); run: chmod 600 {path}")
    if not text:
        raise ConfigurationError(f"{path} is empty; put the one that belongs to the database in its place")
    return text
