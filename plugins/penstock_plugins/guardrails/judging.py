"""Run the guardrails of one direction: at once, bounded, the first block wins; and say what their failures mean."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

import anyio
import anyio.to_thread
import attrs

from penstock import (
    ALLOW,
    GUARDRAIL_OUTCOMES,
    Check,
    Direction,
    Exchange,
    GuardrailCounts,
    GuardrailOutcome,
    RequestError,
    Subject,
    TextEdit,
    Verdict,
)

LARGE = 32 * 1024
"""Bytes, or characters of texts, beyond which texts are looked for and judged beside the event loop."""
MANY = 500
"""Strings beyond which they are, however short."""
AT_ONCE = 8
"""Guardrails of one direction that run at the same time."""
_log = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class Rail:
    """Be a guardrail as it is attached to one key."""

    name: str
    check: Check | None
    """None where it cannot be made: then it fails whenever it is asked."""
    directions: frozenset[Direction]
    fail_open: bool = False
    """What its failures mean in requests and whole answers."""
    opens_streams: bool = True
    """What its failures mean while a stream flows."""
    timeout: float = 5.0
    """Seconds for a request or a whole answer."""
    chunk_timeout: float = 0.05
    """Seconds for one call while a stream flows."""
    sample_rate: float = 1.0
    fault: str = ""
    """Why there is no check."""


@attrs.frozen(eq=False)
class Ruling:
    """Hold what one guardrail said."""

    rail: Rail
    verdict: Verdict
    has_failed: bool = False


@attrs.frozen(eq=False)
class Judge:
    """Ask guardrails and count what they say."""

    counts: GuardrailCounts

    def rule(self, rails: Sequence[Rail], subject: Subject) -> list[Ruling] | Awaitable[list[Ruling]]:
        """Return what each says, in order; a block ends the others. Awaitable only where one of them awaits.

        Raises RequestError ``guardrail_unavailable`` for one that fails and is closed.
        """
        rulings: list[Ruling | None] = [None] * len(rails)
        waiting: list[tuple[int, Rail, Awaitable[Verdict]]] = []
        try:
            for number, rail in enumerate(rails):
                answer = self._ask(rail, subject)
                if isinstance(answer, Ruling):
                    rulings[number] = answer
                    if is_final_block(answer, subject):
                        _close(waiting)
                        return [answer]
                else:
                    waiting.append((number, rail, answer))
        except RequestError:
            _close(waiting)
            raise
        if not waiting:
            return cast("list[Ruling]", rulings)
        return self._wait(rulings, waiting, subject)

    def _ask(self, rail: Rail, subject: Subject) -> Ruling | Awaitable[Verdict]:
        if rail.check is None:
            return self.fail(rail, subject, rail.fault)
        if is_large(subject) and not inspect.iscoroutinefunction(rail.check.judge):
            return _beside(rail.check, subject)
        try:
            answer = rail.check.judge(subject)
        except Exception as error:  # noqa: BLE001 - an evaluator's fault is a failure of the guardrail
            return self.fail(rail, subject, error)
        return self._taken(rail, subject, answer) if isinstance(answer, Verdict) or not _awaits(answer) else answer

    async def _wait(
        self, rulings: list[Ruling | None], waiting: list[tuple[int, Rail, Awaitable[Verdict]]], subject: Subject
    ) -> list[Ruling]:
        slots = anyio.Semaphore(AT_ONCE)
        refusals: list[RequestError] = []
        blocks: list[Ruling] = []

        async def run(number: int, rail: Rail, pending: Awaitable[Verdict]) -> None:
            try:
                async with slots:
                    ruling = await self._bounded(rail, subject, pending)
            except RequestError as error:
                refusals.append(error)
                tasks.cancel_scope.cancel()
                return
            rulings[number] = ruling
            if is_final_block(ruling, subject):
                blocks.append(ruling)
                tasks.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as tasks:
                for each in waiting:
                    tasks.start_soon(run, *each)
        finally:
            _close(waiting)
        if blocks:
            return blocks[:1]
        if refusals:
            raise refusals[0]
        return cast("list[Ruling]", rulings)

    async def _bounded(self, rail: Rail, subject: Subject, pending: Awaitable[Verdict]) -> Ruling:
        is_chunk = subject.direction == "stream_chunk" and not is_large(subject)  # else it repeats a whole answer
        seconds = rail.chunk_timeout if is_chunk else rail.timeout
        try:
            with anyio.fail_after(seconds):
                answer = await pending
        except TimeoutError:
            return self.fail(rail, subject, f"it took over {seconds:g} s")
        except Exception as error:  # noqa: BLE001 - as above
            return self.fail(rail, subject, error)
        return self._taken(rail, subject, answer)

    def _taken(self, rail: Rail, subject: Subject, answer: object) -> Ruling:
        """Return a verdict that can be acted upon; one that cannot is a failure."""
        if not isinstance(answer, Verdict) or answer.action not in ("allow", "block", "modify"):
            return self.fail(rail, subject, "its evaluator gave no verdict")
        texts = subject.texts
        for each in answer.edits:
            if not (0 <= each.text < len(texts) and 0 <= each.start <= each.end <= len(texts[each.text])):
                return self.fail(rail, subject, "its evaluator edits what is not there")
        return Ruling(rail, answer)

    def fail(self, rail: Rail, subject: Subject, fault: object) -> Ruling:
        """Count and log a failure; returns that it lets pass, or raises RequestError ``guardrail_unavailable``."""
        is_open = rail.opens_streams if subject.direction == "stream_chunk" else rail.fail_open
        outcome = "fail_open" if is_open else "fail_closed"
        told = fault if isinstance(fault, str) else type(fault).__name__
        self.note(subject.exchange, rail, subject.direction, outcome, "")
        _log.warning(
            "the guardrail %r failed on %s of %s and is %s: %s", rail.name, subject.direction,
            subject.exchange.request_id.decode(), "open" if is_open else "closed", told,
        )  # fmt: skip
        if is_open:
            return Ruling(rail, ALLOW, has_failed=True)
        raise RequestError(
            "guardrail_unavailable",
            f"The guardrail {rail.name!r} could not judge this {_WORDS[subject.direction]}; try again later.",
            meta={"guardrail": rail.name, "direction": subject.direction},
        )

    def note(self, exchange: Exchange, rail: Rail, direction: Direction, outcome: str, rule: str) -> None:
        """Count an outcome, and keep those that are not allow on the exchange."""
        self.counts.add(rail.name, direction, outcome)
        if outcome != "allow":
            kept = exchange.state.setdefault(GUARDRAIL_OUTCOMES, [])
            entry = GuardrailOutcome(rail.name, direction, outcome, rule)  # type: ignore[arg-type]
            if entry not in kept:
                kept.append(entry)

    def act(self, rulings: Sequence[Ruling], subject: Subject, *, may_block: bool = True) -> list[TextEdit]:
        """Note verdicts; returns what is to be modified, in order of attachment. Raises RequestError for a block."""
        edits: list[TextEdit] = []
        for ruling in rulings:
            rail, verdict = ruling.rail, ruling.verdict
            if ruling.has_failed:
                continue
            outcome = verdict.action if may_block or verdict.action == "allow" else "flag"
            self.note(subject.exchange, rail, subject.direction, outcome, verdict.rule)
            if verdict.action == "block" and may_block:
                raise blocked(rail, verdict, subject.direction)
            if verdict.action == "modify":
                edits += verdict.edits
        return edits


_WORDS: dict[str, str] = {"request": "request", "response": "answer", "stream_chunk": "answer"}


def blocked(rail: Rail, verdict: Verdict, direction: Direction) -> RequestError:
    """Return the refusal of a block: it names the guardrail and what decided, never the text."""
    why = f" ({verdict.rule})" if verdict.rule else ""
    meta = {"guardrail": rail.name, "direction": direction, **({"rule": verdict.rule} if verdict.rule else {})}
    message = f"The guardrail {rail.name!r} blocked this {_WORDS[direction]}{why}."
    return RequestError("guardrail_blocked", message, meta=meta)


def is_final_block(ruling: Ruling, subject: Subject) -> bool:
    """Tell whether a block stands whatever follows the text."""
    verdict, check = ruling.verdict, ruling.rail.check
    if verdict.action != "block":
        return False
    if subject.is_end or not verdict.edits or check is None:
        return True
    decided = check.undecided(subject.texts[0])
    return any(each.start < decided for each in verdict.edits)


def is_large(subject: Subject) -> bool:
    """Tell whether so much is to be judged that others would notice if the event loop did it."""
    return len(subject.texts) > MANY or sum(map(len, subject.texts)) > LARGE


def is_large_body(body: bytes) -> bool:
    """Tell whether others would notice if the event loop looked for the texts of a body."""
    return len(body) > LARGE or body.count(b'"') > 2 * MANY


async def _beside(check: Check, subject: Subject) -> Verdict:
    """Judge in a thread, which is left to itself where it takes too long."""
    answer = await anyio.to_thread.run_sync(check.judge, subject, abandon_on_cancel=True)
    return await answer if inspect.isawaitable(answer) else answer


def _awaits(answer: object) -> bool:
    return inspect.isawaitable(answer)


def _close(waiting: Sequence[tuple[int, Rail, Awaitable[Verdict]]]) -> None:
    """Close coroutines that nobody awaits any more."""
    for _, _, pending in waiting:
        close: Callable[[], None] | None = getattr(pending, "close", None)
        if close is not None:
            close()
