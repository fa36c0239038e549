"""``GET /v1/models``: aliases, declared models, and what undeclared bindings list themselves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, unquote

import anyio
import attrs
import msgspec

from penstock import (
    Exchange,
    Fetch,
    Principal,
    Request,
    RequestError,
    RequestHead,
    Response,
    UpstreamError,
    header_stem,
    with_headers,
)
from penstock_plugins.routing.resolve import Reachable, callable_models, is_allowed
from penstock_plugins.routing.sight import Sight

CACHE_SECONDS = 60.0
FAILURE_SECONDS = 5.0
"""How long a provider that could not be asked is left alone."""
TIMEOUT_SECONDS = 5.0
MAX_BYTES = 4 * 1024 * 1024
PAGE_SIZE = 1000
MAX_PAGES = 10
_CREATED = 1_735_689_600
_CREATED_AT = "2025-01-01T00:00:00Z"


Entry = dict[str, Any]
"""One model as some provider lists it."""


class _Listing(msgspec.Struct):
    data: list[Entry]
    has_more: bool | None = None
    last_id: str | None = None


_read_listing = msgspec.json.Decoder(_Listing).decode


class ModelLists:
    """Answer model listings; what providers list is kept for a minute."""

    def __init__(self, fetch: Fetch, namespace: str, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` counts seconds from anywhere."""
        self._fetch = fetch
        self._clock = clock
        self._incomplete = b"X-%b-Models-Incomplete" % header_stem(namespace)
        self._cached: dict[str, tuple[float, list[Entry] | None]] = {}
        """Until when, and what was listed; None for a provider that could not be asked."""
        self._under_way: dict[str, anyio.Event] = {}
        """Bindings that are being asked, so that many clients ask a provider once."""

    async def answer(
        self, exchange: Exchange, principal: Principal, sight: Sight, known_names: frozenset[str]
    ) -> Response:
        """Return the listing, or the one model named by the path, in the shape of the caller's dialect."""
        models: dict[str, tuple[str, Entry]] = {
            model: (kind, {}) for model, kind in callable_models(principal, sight.aliases, sight.reachable, known_names)
        }
        failed = []
        undeclared = [found for found in sight.native if not found.declares_any and not found.is_by_name_only]
        results: dict[str, list[Entry] | None] = {}
        async with anyio.create_task_group() as tasks:
            for found in undeclared:
                tasks.start_soon(self._list_into, results, exchange, found)
        for found in undeclared:
            listed = results[found.binding.name]
            if listed is None:
                failed.append(found.binding.name)
                continue
            for entry in listed:
                model = entry["id"]
                if is_allowed(principal, found.candidate(model, "declared"), model):
                    models.setdefault(model, (found.binding.type, entry))
        fields = [(b"content-type", b"application/json")]
        if failed:
            fields.append((self._incomplete, ", ".join(failed).encode()))
        return Response(200, self._body(exchange.request, models), tuple(fields))

    @staticmethod
    def _body(request: Request, models: dict[str, tuple[str, Entry]]) -> bytes:
        is_anthropic = b"anthropic-version" in request.headers
        entry = _anthropic_entry if is_anthropic else _openai_entry
        if request.endpoint.operation == "model":
            wanted = unquote(request.path.removeprefix(b"/v1/models/").decode("latin-1"))
            if wanted not in models:
                raise RequestError("not_found", f"This virtual key can call no model {wanted[:200]!r}.", param="model")
            return msgspec.json.encode(entry(wanted, *models[wanted]))
        entries = [entry(model, *models[model]) for model in sorted(models)]
        if is_anthropic:
            ends = (entries[0]["id"], entries[-1]["id"]) if entries else (None, None)
            return msgspec.json.encode({"data": entries, "has_more": False, "first_id": ends[0], "last_id": ends[1]})
        return msgspec.json.encode({"object": "list", "data": entries})

    async def _list_into(self, results: dict[str, list[Entry] | None], exchange: Exchange, found: Reachable) -> None:
        name = found.binding.name
        while name in self._under_way:
            await self._under_way[name].wait()  # whoever asks may leave without an answer
        cached = self._cached.get(name)
        if cached is None or self._clock() >= cached[0]:
            cached = await self._ask_alone(exchange, found)
        results[name] = cached[1]

    async def _ask_alone(self, exchange: Exchange, found: Reachable) -> tuple[float, list[Entry] | None]:
        name = found.binding.name
        answered = self._under_way[name] = anyio.Event()
        try:
            entries: list[Entry] | None = None
            with contextlib.suppress(Exception):  # whatever a provider or its adapter does, the others are listed
                entries = await self._ask(exchange, found)
            kept = self._clock() + (FAILURE_SECONDS if entries is None else CACHE_SECONDS), entries
            self._cached[name] = kept
        finally:
            del self._under_way[name]
            answered.set()
        return kept

    async def _ask(self, exchange: Exchange, found: Reachable) -> list[Entry]:
        """Return what a provider lists, page by page where it speaks Anthropic's dialect only."""
        dialects = found.provider.dialects
        query = b"limit=%d" % PAGE_SIZE if "anthropic.messages" in dialects and "openai.chat" not in dialects else b""
        entries: list[Entry] = []
        after = b""
        with anyio.fail_after(TIMEOUT_SECONDS):
            for _ in range(MAX_PAGES):
                request = found.provider.build(_plain(exchange, query + after), found.candidate(None, "only"))
                answer = await self._fetch(request, timeout=TIMEOUT_SECONDS, max_bytes=MAX_BYTES)
                if answer.status != 200:
                    raise UpstreamError("protocol", f"the listing was answered with {answer.status}")
                page = _read_listing(answer.body)
                entries += [entry for entry in page.data if isinstance(entry.get("id"), str)]
                if not query or not page.has_more or not page.last_id:
                    break
                after = b"&after_id=" + quote(page.last_id, safe="").encode()
        return entries


def _plain(exchange: Exchange, query: bytes) -> Exchange:
    """Return the exchange as a plain listing: no query but ours, none of the client's conditional headers."""
    request = exchange.request
    keep = (b"anthropic-version", b"anthropic-beta", b"user-agent", b"accept")
    headers = request.headers.without([name.lower() for name, _ in request.headers if name.lower() not in keep])
    head: RequestHead = with_headers(request.head, headers)
    plain = attrs.evolve(request, head=head, path=b"/v1/models", query=query, body=b"")
    return attrs.evolve(exchange, request=plain)


def _openai_entry(model: str, kind: str, listed: Entry) -> Entry:
    """Return what the provider lists where it has this shape, else what is known here."""
    if listed.get("object") == "model":
        return listed
    return {"id": model, "object": "model", "created": _CREATED, "owned_by": kind}


def _anthropic_entry(model: str, kind: str, listed: Entry) -> Entry:  # noqa: ARG001 - both shapes are called alike
    if listed.get("type") == "model":
        return listed
    return {"type": "model", "id": model, "display_name": model, "created_at": _CREATED_AT, "lifecycle": "active"}
