"""The journal: what must outlive the process before it is in the database, one file per some thousand exchanges.

Each process owns ``<holder>.lock``, locked for as long as it lives, and segments ``<holder>.<number>.journal``: records
framed by a mark, a kind, a length and a CRC, each copied into the mapped file, which is the system's and not the
process's: killing the process at any instruction loses at most the record being copied, and its CRC gives that away. No
system call is made, and so the interpreter is not handed to another thread for every record. The space of a segment is
allocated before it is used, and an intent is accepted only while there is room for what will settle it too: a disk that
fills up refuses new exchanges and still takes what the old ones cost. Power loss may take what the system had not
written yet, unless every record is synced.

A segment is deleted once all that is in it is committed. A lock that can be had belonged to a process that died.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from zlib import crc32

import attrs

INTENT = b"I"
ENTRY = b"E"
SEGMENT_BYTES = 8 << 20
ROOM_TO_SETTLE = 2048
"""What is kept free for settling each open intent beside as much as the intent itself takes, in bytes."""

_MARK = b"\xf5\xcaPJ"
_HEAD = struct.Struct("<4scII")  # mark, kind, length, CRC-32 of kind and payload
_NO_ALLOCATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def frame(kind: bytes, payload: bytes) -> bytes:
    """Return a record."""
    return _HEAD.pack(_MARK, kind, len(payload), crc32(payload, kind[0])) + payload


def read_records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and payload of every whole record; what is torn or damaged is passed over."""
    position = content.find(_MARK)
    while 0 <= position <= len(content) - _HEAD.size:
        _, kind, length, check = _HEAD.unpack_from(content, position)
        start = position + _HEAD.size
        payload = content[start : start + length]
        if kind in (INTENT, ENTRY) and len(payload) == length and crc32(payload, kind[0]) == check:
            yield kind, payload
            position = content.find(_MARK, start + length)
        else:
            position = content.find(_MARK, position + 1)


@attrs.define(eq=False, slots=True)
class Segment:
    """One file, and how many records in it something still depends on."""

    path: Path
    descriptor: int
    size: int
    memory: mmap.mmap | None = None
    """The mapped file; None where its space could not be allocated, so that copying into it could kill the process."""
    position: int = 0
    pending: int = 0
    is_current: bool = True


class Journal:
    """Write the journal of this process. Not thread-safe: one thread writes."""

    def __init__(self, folder: Path, holder: str, *, sync: bool = False) -> None:
        """Lock the journal of a new holder. Raises OSError."""
        self.folder = folder
        self.holder = holder
        self._sync = sync
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _create_lock(folder / f"{holder}.lock")
        self._number = 0
        self._intents: dict[str, tuple[Segment, int]] = {}
        """Where each is, and the room kept for settling it."""
        self._room = 0
        """All of it: the current segment has at least as much left."""
        self._current: Segment | None = None
        self._segments: set[Segment] = set()
        self._done: list[Segment] = []

    @property
    def open_intents(self) -> int:
        """Return how many intents are not settled."""
        return len(self._intents)

    def add_intent(self, request_id: str, payload: bytes) -> None:
        """Write an intent. Raises OSError, and then nothing is written."""
        record = frame(INTENT, payload)
        room = len(record) + ROOM_TO_SETTLE
        segment = self._segment_for(len(record) + self._room + room)
        self._write(segment, record)
        previous = self.drop_intent(request_id)
        self._intents[request_id] = segment, room
        self._room += room
        self.release(previous)

    def add_entry(self, request_id: str, payload: bytes) -> tuple[Segment | None, Segment | None]:
        """Write an entry in place of its intent, if it has one; returns what to ``release`` once it is committed.

        It never takes the room that is kept for others. Raises OSError; the intent stands then.
        """
        record = frame(ENTRY, payload)
        intent = self._intents.get(request_id)
        others = self._room if intent is None else self._room - intent[1]
        segment = self._segment_for(len(record) + others)
        self._write(segment, record)
        return self.drop_intent(request_id), segment

    def drop_intent(self, request_id: str) -> Segment | None:
        """Forget an intent that is settled, or whose entry could not be written here; returns what to ``release``."""
        segment, room = self._intents.pop(request_id, (None, 0))
        self._room -= room
        return segment

    def release(self, segment: Segment | None) -> None:
        """Say that one record of a segment is no longer needed."""
        if segment is not None:
            segment.pending -= 1
            if not segment.pending and not segment.is_current:
                self._done.append(segment)

    def take_done(self) -> list[Segment]:
        """Return the segments that nothing depends on; hand them to ``delete``, in any thread."""
        done, self._done = self._done, []
        self._segments.difference_update(done)
        return done

    def close(self) -> None:
        """Let go of the journal; what is not committed is found by whoever starts next."""
        if self._current is not None:
            self._retire(self._current)
        delete(self.take_done())
        if not list(self.folder.glob(f"{self.holder}.*.journal")):
            (self.folder / f"{self.holder}.lock").unlink(missing_ok=True)
        for segment in self._segments:
            _close(segment)
        os.close(self._lock)

    # --- segments -------------------------------------------------------------------------------------------------

    def _segment_for(self, needed: int) -> Segment:
        segment = self._current
        if segment is None or segment.position + needed > segment.size:
            segment = self._rotate(needed)
        return segment

    def _write(self, segment: Segment, record: bytes) -> None:
        start = segment.position
        end = start + len(record)
        if segment.memory is not None:
            segment.memory[start:end] = record
        elif os.pwrite(segment.descriptor, record, start) != len(record):  # the next record goes over it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(segment.path))
        if self._sync:
            os.fdatasync(segment.descriptor)
        segment.position = end
        segment.pending += 1

    def _rotate(self, needed: int) -> Segment:
        self._number += 1
        path = self.folder / f"{self.holder}.{self._number:08d}.journal"
        size = max(SEGMENT_BYTES, 2 * needed)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            memory = mmap.mmap(descriptor, size) if _allocate(descriptor, size) else None
            if self._sync:
                _sync_folder(self.folder)
        except OSError:
            os.close(descriptor)
            path.unlink()
            raise
        if self._current is not None:
            self._retire(self._current)
        self._current = Segment(path, descriptor, size, memory)
        self._segments.add(self._current)
        return self._current

    def _retire(self, segment: Segment) -> None:
        segment.is_current = False
        if not segment.pending:
            self._done.append(segment)


def delete(segments: list[Segment]) -> None:
    """Delete segments."""
    for segment in segments:
        _close(segment)
        segment.path.unlink(missing_ok=True)


def _close(segment: Segment) -> None:
    if segment.memory is not None:
        segment.memory.close()
        segment.memory = None
    if segment.descriptor >= 0:
        os.close(segment.descriptor)
        segment.descriptor = -1


def _allocate(descriptor: int, size: int) -> bool:
    """Give a file its size; returns whether its space is taken, too."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _NO_ALLOCATION:
            raise
        os.ftruncate(descriptor, size)  # a file system that cannot: a full disk shows at the write
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- locks --------------------------------------------------------------------------------------------------------


def _create_lock(path: Path) -> int:
    """Return the descriptor of a lock file of our own, locked."""
    while True:
        descriptor = _lock(path, os.O_CREAT)
        if descriptor is not None:
            with suppress(OSError):  # it is for people only
                os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
            return descriptor


def _lock(path: Path, flags: int = 0) -> int | None:
    """Return a descriptor that holds the lock, or None where another does or the file is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


@attrs.define(eq=False)
class DeadJournal:
    """The journal of a process that has ended, locked by this one meanwhile."""

    folder: Path
    holder: str
    _descriptor: int

    def records(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield kind and payload of all records, oldest first."""
        for path in sorted(self.folder.glob(f"{self.holder}.*.journal")):
            yield from read_records(path.read_bytes())

    def remove(self) -> None:
        """Delete it once all of it is committed."""
        for path in self.folder.glob(f"{self.holder}.*.journal"):
            path.unlink()
        (self.folder / f"{self.holder}.lock").unlink(missing_ok=True)

    def set_aside(self) -> None:
        """Keep it under another name: all that can be entered is, and an operator may look at the rest."""
        for path in self.folder.glob(f"{self.holder}.*.journal"):
            path.rename(path.with_suffix(".refused"))
        self.remove()

    def release(self) -> None:
        """Let go of it; unless removed it is found again."""
        os.close(self._descriptor)


def take_dead(folder: Path) -> Iterator[DeadJournal]:
    """Yield the journals of processes that have ended, locked; ``release`` each."""
    for path in sorted(folder.glob("*.lock")):
        descriptor = _lock(path)
        if descriptor is not None:
            yield DeadJournal(folder, path.stem, descriptor)


def is_held(folder: Path, holder: str) -> bool:
    """Tell whether a holder may still be alive, or has left something to replay."""
    return (folder / f"{holder}.lock").exists()


def pid_of(folder: Path, holder: str) -> int | None:
    """Return the number of the process that is or was a holder, where that is known."""
    try:
        return int((folder / f"{holder}.lock").read_text())
    except (OSError, ValueError):
        return None
