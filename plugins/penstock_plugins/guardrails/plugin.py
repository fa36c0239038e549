"""The guardrails plugin: judge requests, answers and streams by what is attached to their key.

It stands behind whatever may refuse for less, budgets included: what it runs may cost time and money.
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import asynccontextmanager

import anyio.to_thread
import attrs
import msgspec

from penstock import (
    INNER,
    Chunk,
    Evaluator,
    Exchange,
    GuardrailCounts,
    Request,
    RequestError,
    Services,
    StateKey,
    Subject,
    TextEdit,
    editable_body,
    hookimpl,
    with_headers,
)
from penstock.peek import is_multipart
from penstock_plugins.guardrails.bundled import bundled
from penstock_plugins.guardrails.forms import texts_in_form
from penstock_plugins.guardrails.holding import Piece, Track, pieces_of
from penstock_plugins.guardrails.judging import Judge, Rail, Ruling, is_large_body
from penstock_plugins.guardrails.rails import GuardrailsConfig, Plan, Rails
from penstock_plugins.guardrails.texts import (
    REQUEST_ROOTS,
    Text,
    UnreadableError,
    edited,
    joined_edits,
    kind_of,
    raw_text,
    rewritten,
    texts_in,
)
from penstock_plugins.guardrails.watching import Watch

_WATCH: StateKey[Watch] = StateKey("guardrails.watch")
_ANSWERS = frozenset((
    "chat", "responses", "messages", "completions", "gemini", "response", "response_cancel", "response_items",
    "transcriptions", "moderations", "images_generations", "images_edits",
))  # fmt: skip
"""Operations whose answers hold text."""
_PICTURES = frozenset(("images_generations", "images_edits"))
"""Those of them whose streams hold none, but large events; a whole answer has the prompt as the model changed it."""
_STORED = frozenset(("response", "response_cancel", "response_items"))


@attrs.define(eq=False)
class Guardrails:
    """Run the guardrails attached to keys."""

    enforces = ("guardrails",)

    Config = GuardrailsConfig
    edits_body = True
    edits_chunks = True

    config: GuardrailsConfig
    services: Services
    name: str
    _counts: GuardrailCounts = attrs.field(factory=GuardrailCounts, init=False, repr=False)
    _judge: Judge = attrs.field(init=False, repr=False)
    _rails: Rails = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.services.provide(GuardrailCounts, self._counts)
        self._judge = Judge(self._counts)
        self._rails = Rails(self.config, self.services)

    @hookimpl
    def register_evaluators(self) -> Iterable[Evaluator]:
        """Bring the bundled ones."""
        return bundled(self.services)

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Make the checks of the configuration file; counts outlive a reload."""
        self._rails.open()
        async with self.services.shared.use("guardrails.counts", _new_counts) as counts:
            self._counts.join(counts)
            yield

    # --- requests -------------------------------------------------------------------------------------------------

    @hookimpl
    def pre_request(self, exchange: Exchange) -> Awaitable[None] | None:
        """Judge the request, and ask to see the answer where somebody judges that."""
        principal = exchange.principal
        if principal is None or not principal.guardrails:
            return None
        endpoint = exchange.request.endpoint
        if not endpoint.has_model and endpoint.operation not in _STORED:
            return None
        if INNER in exchange.state:
            message = "The virtual key of a judge must have no guardrails of its own; take them off."
            raise RequestError("guardrail_unavailable", message)
        plan = self._rails.of(principal)
        drawn = _Drawn()
        if endpoint.operation in _ANSWERS and (plan.response or plan.stream):
            self._watch(exchange, plan, drawn)
        rails = drawn.of(plan.request)
        if endpoint.operation == "count_tokens":
            rails = [rail for rail in rails if rail.check is None or not rail.check.is_costly]
        return self._judge_request(exchange, rails) if rails and exchange.request.body else None

    def _watch(self, exchange: Exchange, plan: Plan, drawn: _Drawn) -> None:
        watch = Watch(self._judge, drawn.of(plan.response), drawn.of(plan.stream), drawn.of(plan.answer))
        if watch.answer:
            exchange.state[_WATCH] = watch
            exchange.watch_response(self.name)
            if exchange.request.endpoint.operation not in _PICTURES:
                exchange.watch_chunks(self.name)

    def _judge_request(self, exchange: Exchange, rails: Sequence[Rail]) -> Awaitable[None] | None:
        body = editable_body(exchange.request)
        if is_large_body(body):
            return self._judge_large(exchange, rails, body)
        return self._judge_texts(exchange, rails, body, _texts_of(exchange.request, body))

    async def _judge_large(self, exchange: Exchange, rails: Sequence[Rail], body: bytes) -> None:
        """Look for the texts of a large body in a thread, so that nobody waits for it but who sent it."""
        texts = await anyio.to_thread.run_sync(_texts_of, exchange.request, body)
        pending = self._judge_texts(exchange, rails, body, texts)
        if pending is not None:
            await pending

    def _judge_texts(
        self, exchange: Exchange, rails: Sequence[Rail], body: bytes, texts: Sequence[Text]
    ) -> Awaitable[None] | None:
        if not texts:
            return None
        subject = Subject("request", tuple(text.text for text in texts), exchange)
        rulings = self._judge.rule(rails, subject)
        if isinstance(rulings, list):
            self._change(exchange, body, texts, self._judge.act(rulings, subject))
            return None
        return self._finish_request(exchange, body, texts, subject, rulings)

    async def _finish_request(
        self, exchange: Exchange, body: bytes, texts: Sequence[Text], subject: Subject, pending: Awaitable[list[Ruling]]
    ) -> None:
        edits = self._judge.act(await pending, subject)
        if edits and is_large_body(body):
            await anyio.to_thread.run_sync(self._change, exchange, body, texts, edits)
        else:
            self._change(exchange, body, texts, edits)

    def _change(self, exchange: Exchange, body: bytes, texts: Sequence[Text], edits: Sequence[TextEdit]) -> None:
        """Put other texts into the request, every other byte kept; a content coding is left undone."""
        if not edits:
            return
        new = edited(body, _changes(texts, edits))
        request = exchange.request
        head = request.head
        if b"content-encoding" in head.headers:
            head = with_headers(head, head.headers.without((b"content-encoding",)))
        exchange.request = attrs.evolve(request, head=head, body=new)

    # --- answers --------------------------------------------------------------------------------------------------

    @hookimpl
    async def on_response(self, exchange: Exchange, body: bytes) -> bytes | None:
        """Judge an answer that is no stream."""
        watch: Watch | None = exchange.state.get(_WATCH)
        if watch is None or not body:
            return None
        groups = await anyio.to_thread.run_sync(_groups_of, body) if is_large_body(body) else _groups_of(body)
        if not groups:
            return None
        texts = tuple("".join(text.text for text in group) for group in groups)
        subject = Subject("response", texts, exchange, kinds=tuple(kind_of(group[0].path) for group in groups))
        rulings = self._judge.rule(watch.answer, subject)
        found = rulings if isinstance(rulings, list) else await rulings
        edits = self._judge.act(found, subject)
        if not edits:
            return None
        if is_large_body(body):
            return await anyio.to_thread.run_sync(_rewritten, body, groups, texts, edits)
        return _rewritten(body, groups, texts, edits)

    @hookimpl
    async def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes | None:
        """Judge what a stream says, and hold back what is not decided."""
        watch: Watch | None = exchange.state.get(_WATCH)
        if watch is None or not chunk.is_event_stream:
            return None
        return await watch.take(exchange, chunk)

    @hookimpl
    def post_response(self, exchange: Exchange) -> Awaitable[None] | None:
        """Judge streams as a whole after their end, where somebody asked for that."""
        watch: Watch | None = exchange.state.pop(_WATCH, None)
        if watch is None or not exchange.is_stream:
            return None
        watch.count_allowed(exchange)
        return watch.flag(exchange) if watch.response and exchange.error is None else None


class _Drawn:
    """Remember which guardrails an exchange was drawn for: one and the same in all directions."""

    def __init__(self) -> None:
        self._drawn: dict[str, bool] = {}

    def of(self, rails: Iterable[Rail]) -> list[Rail]:
        """Return those it was drawn for."""
        return [rail for rail in rails if rail.sample_rate >= 1 or self._is_drawn(rail)]

    def _is_drawn(self, rail: Rail) -> bool:
        return self._drawn.setdefault(rail.name, random.random() < rail.sample_rate)  # noqa: S311


def _texts_of(request: Request, body: bytes) -> list[Text]:
    """Return what a model may read. Raises RequestError for a body that cannot be told apart.

    What merely calls itself a form is read as JSON: there are servers that do so whatever its type.
    """
    content_type = request.headers.get(b"content-type") or b""
    try:
        if not (request.endpoint.takes_form and is_multipart(content_type)):
            return texts_in(body, REQUEST_ROOTS)
        if len(request.headers.get_all(b"content-type")) > 1:
            raise UnreadableError("it has two content types")
        return texts_in_form(body, content_type)
    except UnreadableError as error:
        raise RequestError("bad_request", f"The request cannot be judged by its guardrails: {error}.") from None


def _groups_of(body: bytes) -> list[list[Text]]:
    try:
        _check_whole(body)
        return pieces_of(body)
    except UnreadableError:
        return [[raw_text(body)]]  # plain text, as of transcriptions, or JSON line by line


def _check_whole(body: bytes) -> None:
    """Raise UnreadableError for what is not one JSON value: behind a first value there may be others."""
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except (ValueError, RecursionError):
        try:  # NaN, bare control characters and the like
            json.JSONDecoder(parse_int=str, strict=False).decode(body.decode("utf-8-sig", "replace"))
        except (ValueError, RecursionError):
            raise UnreadableError("it is not one JSON value") from None


def _rewritten(body: bytes, groups: Sequence[Sequence[Text]], texts: Sequence[str], edits: Sequence[TextEdit]) -> bytes:
    by_group: dict[int, list[TextEdit]] = {}
    for each in edits:
        by_group.setdefault(each.text, []).append(each)
    changes: list[tuple[Text, str]] = []
    for number, own in by_group.items():
        changes += _spread(groups[number], texts[number], own)
    return edited(body, changes)


def _changes(texts: Sequence[Text], edits: Sequence[TextEdit]) -> list[tuple[Text, str]]:
    by_text: dict[int, list[TextEdit]] = {}
    for each in edits:
        by_text.setdefault(each.text, []).append(each)
    return [(texts[number], rewritten(texts[number].text, joined_edits(own))) for number, own in by_text.items()]


def _spread(group: Sequence[Text], whole: str, edits: Sequence[TextEdit]) -> list[tuple[Text, str]]:
    """Return the parts of one text as they are after edits of the whole."""
    if not edits:
        return []
    if len(group) == 1:
        return [(group[0], rewritten(whole, joined_edits(edits)))]
    track = Track(held=whole)
    track.settle(edits, len(whole))
    changes: list[tuple[Text, str]] = []
    position = 0
    for text in group:
        piece = Piece(track, position, text)
        changes.append((text, track.rewritten(piece.start, piece.end, text.text)))
        position = piece.end
    return changes


@asynccontextmanager
async def _new_counts() -> AsyncIterator[GuardrailCounts]:
    yield GuardrailCounts()
