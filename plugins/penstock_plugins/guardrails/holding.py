"""Hold back what of a stream's texts may still change its meaning; sans-IO.

Events wait in their order until every text in them is decided. The texts of one choice or content block follow one
another in a *track*, over events; what guardrails replace there is taken out of each event it lies in, and put into the
first. Texts that repeat a whole track (``response.completed``) are judged alone.

Invariants: what is released is final; a match that began before what is released lies in it wholly, so that looking
again from there finds what looking at the whole text would have found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import attrs

from penstock import Event, TextEdit
from penstock.splice import Span, SpliceError, children, find, key_of, root
from penstock.sse import replace_payload
from penstock_plugins.guardrails.molds import Found, Molds
from penstock_plugins.guardrails.texts import (
    ANSWER_ROOTS,
    EVENT_ROOTS,
    Path,
    Text,
    UnreadableError,
    edited,
    joined_edits,
    raw_text,
    texts_in,
)

LOOK_BACK = 64
"""Characters in front of a text that are kept for patterns that look behind."""
MOST_HELD = 64 * 1024
"""Characters of a track that are held at most."""
_CARRIERS = frozenset(("delta", "message", "content_block"))
"""Members that only say whether the text is a part or the whole: they make no track of their own."""


@attrs.define(eq=False)
class Track:
    """Follow one text over events."""

    path: Path = ()
    held: str = attrs.field(default="", repr=False)
    """What is not decided."""
    before: str = attrs.field(default="", repr=False)
    """The last of what is."""
    decided: int = 0
    """How many characters are."""
    edits: list[TextEdit] = attrs.field(factory=list)
    """What of them is replaced, counted from the track's beginning."""
    is_ended: bool = False
    gathered: int = 0
    """How many characters whoever judges the whole has taken."""

    @property
    def length(self) -> int:
        """Return how many characters have come."""
        return self.decided + len(self.held)

    def settle(self, edits: Sequence[TextEdit], undecided: int, *, is_final: bool = False) -> None:
        """Take verdicts on what is held, of which everything before ``undecided`` is final.

        A match that reaches the end may grow, so it is not, unless the track has ended or ``is_final`` says so.
        """
        joined = joined_edits(edits)
        is_final = is_final or self.is_ended
        upto = len(self.held) if is_final else min(undecided, len(self.held))
        for each in () if is_final else joined:
            if each.start < upto and (upto < each.end or each.end == len(self.held)):
                upto = each.start
        base = self.decided
        final = [each for each in joined if each.end <= upto]
        self.edits += [TextEdit(base + each.start, base + each.end, each.replacement) for each in final]
        self.decided += upto
        self.before = (self.before + self.held[:upto])[-LOOK_BACK:]
        self.held = self.held[upto:]

    def rewritten(self, start: int, end: int, text: str) -> str:
        """Return what becomes of a piece of the track."""
        pieces: list[str] = []
        position = start
        for each in self.edits:
            if each.end <= start or each.start >= end:
                continue
            pieces.append(text[position - start : max(each.start, start) - start])
            if each.start >= start:
                pieces.append(each.replacement)
            position = min(each.end, end)
        return "".join((*pieces, text[position - start :]))

    def forget(self, upto: int) -> None:
        """Drop edits that no piece behind ``upto`` lies in."""
        if self.edits and self.edits[0].end <= upto:
            self.edits = [each for each in self.edits if each.end > upto]


@attrs.frozen(eq=False)
class Piece:
    """One event's part of a track."""

    track: Track
    start: int
    text: Text

    @property
    def end(self) -> int:
        """Return the offset behind it."""
        return self.start + len(self.text.text)


@attrs.define(eq=False)
class Repeat:
    """A whole text within one event."""

    text: Text
    new: str | None = None
    """What becomes of it; None until it is judged."""


@attrs.define(eq=False)
class Waiting:
    """One event that waits."""

    event: Event
    pieces: list[Piece] = attrs.field(factory=list)
    repeats: list[Repeat] = attrs.field(factory=list)

    @property
    def is_decided(self) -> bool:
        """Tell whether all its texts are."""
        return all(piece.end <= piece.track.decided for piece in self.pieces) and all(
            repeat.new is not None for repeat in self.repeats
        )

    def rewritten(self) -> bytes:
        """Return the event's bytes, those outside replaced texts as they came."""
        changes = [
            (piece.text, piece.track.rewritten(piece.start, piece.end, piece.text.text)) for piece in self.pieces
        ]
        changes += [(repeat.text, repeat.new or "") for repeat in self.repeats]
        payload = self.event.payload
        new = edited(payload, changes)
        for piece in self.pieces:
            piece.track.forget(piece.end)
        return self.event.raw if new is payload else replace_payload(self.event.raw, new)


class Holder:
    """Hold the events of one stream."""

    def __init__(self, dialect: str) -> None:
        self._has_own_deltas = dialect == "openai.responses"
        self._waiting: deque[Waiting] = deque()
        self._molds = Molds()
        self.tracks: dict[Path, Track] = {}

    def take(self, events: Iterable[Event]) -> tuple[list[Track], list[Repeat]]:
        """Take events; returns the tracks and repeated texts there is something to judge of."""
        touched: dict[int, Track] = {}
        repeats: list[Repeat] = []
        for event in events:
            entry = Waiting(event)
            self._waiting.append(entry)
            if event.payload and not event.is_comment_only:
                self._read(entry, touched)
                repeats += entry.repeats
        return list(touched.values()), repeats

    def finish(self) -> list[Track]:
        """Take the end of the stream: nothing follows any track. Returns those with something to judge."""
        found = [track for track in self.tracks.values() if track.held]
        for track in self.tracks.values():
            track.is_ended = True
        return found

    def release(self) -> bytes:
        """Return the events that are decided, up to the first that is not."""
        released: list[bytes] = []
        while self._waiting and self._waiting[0].is_decided:
            released.append(self._waiting.popleft().rewritten())
        return b"".join(released)

    @property
    def is_holding(self) -> bool:
        """Tell whether an event waits."""
        return bool(self._waiting)

    def _read(self, entry: Waiting, touched: dict[int, Track]) -> None:
        payload = entry.event.payload
        try:
            parts, wholes, ended = self._texts_of(payload)
        except UnreadableError:
            if payload.strip() == b"[DONE]":
                self._end((), touched)
            else:
                entry.repeats.append(Repeat(raw_text(payload)))  # not JSON: whatever it is, people may read it
            return
        entry.repeats += [Repeat(text) for text in wholes]
        for text in parts:
            track = self._track(text.path)
            entry.pieces.append(Piece(track, track.length, text))
            track.held += text.text
            if text.text:
                touched[id(track)] = track
        for prefix in ended:
            self._end(prefix, touched)

    def _track(self, path: Path) -> Track:
        track = self.tracks.get(path)
        if track is None or track.is_ended:
            track = self.tracks[path] = Track(path)
        return track

    def _end(self, prefix: Path, touched: dict[int, Track]) -> None:
        for path, track in self.tracks.items():
            if path[: len(prefix)] == prefix and not track.is_ended:
                track.is_ended = True
                if track.held:
                    touched[id(track)] = track

    def _texts_of(self, payload: bytes) -> Found:
        """Return the parts of tracks in an event, whole texts, and the beginnings of the paths of tracks that end."""
        known = self._molds.read(payload)
        if known is None:
            known = self._walked(payload)
            self._molds.learn(payload, known)
        return known

    def _walked(self, payload: bytes) -> Found:
        if self._has_own_deltas:
            return _of_responses(payload)
        found = texts_in(payload, ANSWER_ROOTS, by_index=True)
        parts = [attrs.evolve(text, path=_track_of(text.path)) for text in found]
        try:
            return parts, [], _ends_in(payload)
        except SpliceError as error:
            raise UnreadableError("its JSON cannot be read") from error


def _track_of(path: Path) -> Path:
    return tuple(step for step in path if step not in _CARRIERS)


def _value(payload: bytes, *path: str | int) -> bytes | None:
    span = find(payload, path)
    return None if span is None else payload[span.start : span.end]


def _ends_in(payload: bytes) -> list[Path]:
    """Return which tracks an event of chat, completions, messages or Gemini ends."""
    kind = _value(payload, "type")
    if kind == b'"content_block_stop"':
        return [(_integer(_value(payload, "index")),)]
    if kind == b'"message_stop"':
        return [()]
    ended: list[Path] = []
    for name, reason in (("choices", "finish_reason"), ("candidates", "finishReason")):
        span = find(payload, (name,))
        for number, child in enumerate(() if span is None else children(payload, span)):
            members = {key_of(payload, each): each.value for each in children(payload, child.value)}
            if reason in members and not _is_null(payload, members[reason]):
                at = members.get("index")
                place = number if at is None else _integer(payload[at.start : at.end])
                ended.append((name, place))
    return ended


def _is_null(payload: bytes, span: Span) -> bool:
    return payload[span.start : span.end] in (b"null", b'""')


def _integer(value: bytes | None) -> int:
    return int(value) if value is not None and value.isdigit() and len(value) < 10 else -1


def _of_responses(payload: bytes) -> tuple[list[Text], list[Text], list[Path]]:
    """Read an event of the Responses API: a delta is a part, what its other events hold are wholes."""
    try:
        kind = (_value(payload, "type") or b"").strip(b'"').decode("utf-8", "replace")
        place: Path = tuple(
            _integer(_value(payload, name)) for name in ("output_index", "content_index", "summary_index")
        )
    except SpliceError as error:
        raise UnreadableError("its JSON cannot be read") from error
    if kind.endswith(".delta"):
        found = texts_in(payload, frozenset(("delta",)))
        stem = kind.removesuffix(".delta")
        return [attrs.evolve(text, path=(place[0], stem, *place[1:])) for text in found], [], []
    wholes = texts_in(payload, EVENT_ROOTS)
    if kind.endswith(".done"):
        stem = kind.removesuffix(".done")
        return [], wholes, [(place[0],)] if stem == "response.output_item" else [(place[0], stem, *place[1:])]
    is_last = kind in ("response.completed", "response.incomplete", "response.failed")
    return [], wholes, [()] if is_last else []


def pieces_of(body: bytes, *, roots: frozenset[str] = ANSWER_ROOTS) -> list[list[Text]]:
    """Return the texts of a whole answer, those together that are parts of one text. Raises UnreadableError."""
    is_list = body[root_start(body) :][:1] == b"["
    if not is_list:
        return [[text] for text in texts_in(body, roots)]
    tracks: dict[Path, list[Text]] = {}
    for text in texts_in(body, roots, by_index=True):
        tracks.setdefault(_track_of(text.path), []).append(text)
    return list(tracks.values())


def root_start(body: bytes) -> int:
    """Return where the top-level value begins. Raises UnreadableError where there is none."""
    try:
        return root(body).start
    except SpliceError as error:
        raise UnreadableError("its JSON cannot be read") from error
