"""One exchange under guardrails: who judges it, and how its stream is held back."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from penstock import Chunk, Event, Exchange, RequestError, Subject, TextEdit, TextKind
from penstock_plugins.guardrails.holding import MOST_HELD, Holder, Repeat, Track
from penstock_plugins.guardrails.judging import Judge, Rail, Ruling, blocked, is_final_block
from penstock_plugins.guardrails.texts import joined_edits, kind_of, rewritten

MOST_GATHERED = 1024 * 1024
"""Characters of a stream that are kept to be judged as a whole after its end."""


@attrs.define(eq=False)
class Watch:
    """Follow one exchange."""

    judge: Judge
    response: Sequence[Rail] = ()
    """Who judges whole answers; of a stream after its end."""
    stream: Sequence[Rail] = ()
    answer: Sequence[Rail] = ()
    """Who judges an answer that is no stream."""
    _holder: Holder | None = None
    _said: dict[Track, list[str]] = attrs.field(factory=dict)
    _gathered: int = 0
    _acted: set[tuple[str, str]] = attrs.field(factory=set)
    """Guardrails and outcomes of this stream that were counted."""

    @property
    def said(self) -> tuple[str, ...]:
        """Return the texts of a stream, as far as they were kept."""
        return tuple("".join(parts) for parts in self._said.values())

    @property
    def kinds(self) -> tuple[TextKind, ...]:
        """Return what each of these texts is."""
        return tuple(kind_of(track.path) for track in self._said)

    async def take(self, exchange: Exchange, chunk: Chunk) -> bytes | None:
        """Judge what a chunk brings; returns what may be passed on. Raises RequestError to end the stream."""
        holder = self._holder
        if holder is None:
            holder = self._holder = Holder(exchange.request.endpoint.dialect)
        events = list(chunk.events)
        rest = chunk.data[sum(len(event.raw) for event in events) :]
        if rest:  # of a stream that broke off, or has no blank line at its end
            events.append(Event(rest))
        was_holding = holder.is_holding
        tracks, repeats = holder.take(events)
        if self.response:
            self._gather(tracks)
        if chunk.is_end:
            known = {id(track) for track in tracks}
            tracks += [track for track in holder.finish() if id(track) not in known]
        if not self.stream:
            for track in tracks:
                track.settle((), len(track.held))
            for repeat in repeats:
                repeat.new = repeat.text.text
            holder.release()
            return None
        await self._judge_all(exchange, tracks, repeats)
        released = holder.release()
        return None if not was_holding and released == chunk.data else released

    async def _judge_all(self, exchange: Exchange, tracks: Sequence[Track], repeats: Sequence[Repeat]) -> None:
        for track in tracks:
            if track.held:
                await self._judge_track(exchange, track)
        if repeats:
            await self._judge_repeats(exchange, repeats)

    def _gather(self, tracks: Sequence[Track]) -> None:
        for track in tracks:
            new = track.held[track.gathered - track.decided :]
            track.gathered += len(new)
            if self._gathered < MOST_GATHERED:
                self._said.setdefault(track, []).append(new)
                self._gathered += len(new)

    async def _judge_track(self, exchange: Exchange, track: Track) -> None:
        text = track.held
        subject = Subject(
            "stream_chunk", (text,), exchange, before=track.before, offset=track.decided, is_end=track.is_ended
        )
        rulings = await self._ask(subject)
        undecided = len(text)
        edits: list[TextEdit] = []
        for ruling in rulings:
            if not track.is_ended and not ruling.has_failed and ruling.rail.check is not None:
                undecided = min(undecided, ruling.rail.check.undecided(text))
            edits += self._edits_of(ruling, subject)
        before = len(track.edits)
        track.settle(edits, undecided)
        if len(track.held) > MOST_HELD:
            for rail in self.stream:
                self.judge.fail(rail, subject, "it leaves too long a text undecided")
            track.settle([], 0, is_final=True)
        if len(track.edits) > before:
            for ruling in rulings:
                if ruling.verdict.action == "modify":
                    self._note(exchange, ruling)

    async def _judge_repeats(self, exchange: Exchange, repeats: Sequence[Repeat]) -> None:
        texts = tuple(repeat.text.text for repeat in repeats)
        subject = Subject("stream_chunk", texts, exchange)
        rulings = await self._ask(subject)
        edits = [each for ruling in rulings for each in self._edits_of(ruling, subject)]
        for number, repeat in enumerate(repeats):
            own = joined_edits([each for each in edits if each.text == number])
            repeat.new = rewritten(repeat.text.text, own)
        for ruling in rulings:
            if ruling.verdict.action == "modify":
                self._note(exchange, ruling)

    async def _ask(self, subject: Subject) -> list[Ruling]:
        rulings = self.judge.rule(self.stream, subject)
        return rulings if isinstance(rulings, list) else await rulings

    def _edits_of(self, ruling: Ruling, subject: Subject) -> Sequence[TextEdit]:
        """Return what a verdict modifies. Raises RequestError for a block that stands."""
        if is_final_block(ruling, subject):
            self._note(subject.exchange, ruling)
            raise blocked(ruling.rail, ruling.verdict, "stream_chunk")
        return ruling.verdict.edits if ruling.verdict.action == "modify" else ()

    def _note(self, exchange: Exchange, ruling: Ruling) -> None:
        key = ruling.rail.name, ruling.verdict.action
        if key not in self._acted:
            self._acted.add(key)
            self.judge.note(exchange, ruling.rail, "stream_chunk", ruling.verdict.action, ruling.verdict.rule)

    def count_allowed(self, exchange: Exchange) -> None:
        """Count the guardrails that let a stream pass as it was."""
        if self._holder is not None:
            for rail in self.stream:
                if not any(name == rail.name for name, _ in self._acted):
                    self.judge.note(exchange, rail, "stream_chunk", "allow", "")

    async def flag(self, exchange: Exchange) -> None:
        """Judge a stream as a whole after its end; all that can still be done is to say so."""
        texts = self.said
        if not texts or not self.response:
            return
        subject = Subject("response", texts, exchange, kinds=self.kinds)
        try:
            rulings = self.judge.rule(self.response, subject)
            found = rulings if isinstance(rulings, list) else await rulings
        except RequestError:
            return  # counted and logged; the answer is out
        self.judge.act(found, subject, may_block=False)
