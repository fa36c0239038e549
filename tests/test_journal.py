"""The journal: records survive in any state the death of a process can leave, and are found once by who comes next."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_plugins.store.journal import (
    ENTRY,
    INTENT,
    ROOM_TO_SETTLE,
    SEGMENT_BYTES,
    Journal,
    delete,
    frame,
    read_records,
    take_dead,
)

RECORDS = st.lists(st.tuples(st.sampled_from((INTENT, ENTRY)), st.binary(max_size=80)), max_size=12)


def records_in(folder: Path) -> list[tuple[bytes, bytes]]:
    """Return what a dead process left, as the next one reads it."""
    found = []
    for journal in take_dead(folder):
        found += list(journal.records())
        journal.release()
    return found


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Refuse files to grow, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@given(RECORDS, st.binary(max_size=30))
def test_records_are_read_as_they_were_written(records: list[tuple[bytes, bytes]], rest: bytes) -> None:
    content = b"".join(frame(kind, payload) for kind, payload in records)
    assert list(read_records(content + bytes(100) + rest))[: len(records)] == records


@given(RECORDS, st.integers(0, 2000))
def test_torn_record_costs_only_itself(records: list[tuple[bytes, bytes]], cut: int) -> None:
    frames = [frame(kind, payload) for kind, payload in records]
    content = b"".join(frames)[:cut]
    whole = []
    for each, record in zip(frames, records, strict=True):
        cut -= len(each)
        if cut >= 0:
            whole.append(record)
    assert list(read_records(content)) == whole


@given(RECORDS, st.data())
def test_damaged_record_costs_only_itself(records: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
    frames = [frame(kind, payload) for kind, payload in records]
    damaged = data.draw(st.integers(0, len(frames)))
    if damaged < len(frames):
        place = data.draw(st.integers(0, len(frames[damaged]) - 1))
        broken = bytearray(frames[damaged])
        broken[place] ^= 0xFF
        frames[damaged] = bytes(broken)
    assert list(read_records(b"".join(frames))) == [each for n, each in enumerate(records) if n != damaged]


def test_segment_goes_once_all_in_it_is_committed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "a")
    payload = bytes(100_000)
    kept = []
    for number in range(100):
        journal.add_intent(str(number), payload)
        kept.append(journal.add_entry(str(number), payload))
    assert len(list(tmp_path.glob("*.journal"))) > 2
    for segments in kept:
        for segment in segments:
            journal.release(segment)
    delete(journal.take_done())
    assert len(list(tmp_path.glob("*.journal"))) == 1
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_living_process_keeps_its_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "a")
    journal.add_intent("1", b"one")
    assert list(take_dead(tmp_path)) == []
    journal.close()
    assert records_in(tmp_path) == [(INTENT, b"one")]


def test_dead_journal_is_had_by_one_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "a")
    journal.add_intent("1", b"one")
    journal.close()
    (first,) = take_dead(tmp_path)
    assert list(take_dead(tmp_path)) == []
    first.remove()
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_refuses_intents_and_takes_what_settles_those_it_took(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "a")
    with file_size_limit(1 << 20), pytest.raises(OSError, match="too large"):
        journal.add_intent("0", b"refused")
    assert journal.open_intents == 0
    taken = 0
    journal.add_intent("first", bytes(1000))
    with file_size_limit(SEGMENT_BYTES - 1), pytest.raises(OSError, match="too large"):  # noqa: PT012
        while True:  # until the segment has room for no more than settling what is open
            journal.add_intent(f"{taken}", bytes(1000))
            taken += 1
    with file_size_limit(SEGMENT_BYTES - 1):
        for number in range(taken):
            journal.add_entry(f"{number}", bytes(1400))
    journal.close()
    assert len([kind for kind, _ in records_in(tmp_path) if kind == ENTRY]) == taken > 1500


def test_what_was_not_admitted_leaves_the_room_of_what_was(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "a")
    for number in range(100):
        journal.add_intent(f"{number}", bytes(1000))
    with file_size_limit(SEGMENT_BYTES - 1):
        with pytest.raises(OSError, match="too large"):  # noqa: PT012
            while True:  # refusals are entered too
                journal.add_entry("refused", bytes(10_000))
        for number in range(100):
            with pytest.raises(OSError, match="too large"):
                journal.add_entry(f"{number}", bytes(100_000))
            journal.add_entry(f"{number}", bytes(1000 + ROOM_TO_SETTLE))
    journal.close()


@pytest.mark.parametrize("sync", [False, True])
def test_intent_opened_again_counts_once(tmp_path: Path, sync: bool) -> None:
    journal = Journal(tmp_path, "a", sync=sync)
    journal.add_intent("1", b"one")
    journal.add_intent("1", b"two")
    assert journal.open_intents == 1
    for segment in journal.add_entry("1", b"entry"):
        journal.release(segment)
    journal.close()
    assert list(tmp_path.iterdir()) == []
