"""What the mock remembers for the life of the process: prompt prefixes and stored responses, both bounded."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from itertools import accumulate
from typing import Any

import attrs

from penstock_plugins.providers.mock.conversation import Piece, Prompt

MIN_CACHED_TOKENS = 1024
"""Shorter prefixes are not cached unless the request marks them, as providers do it."""
_STEP = 128
_MAX_PREFIXES = 20_000
_MAX_RESPONSES = 1_000


@attrs.frozen
class Counts:
    """Divide the input of one prompt into tokens read from the cache, written to it, and neither."""

    input: int
    cache_read: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0

    @property
    def cache_write(self) -> int:
        return self.cache_write_5m + self.cache_write_1h

    @property
    def all_input(self) -> int:
        return self.input + self.cache_read + self.cache_write


@attrs.frozen(eq=False)
class StoredResponse:
    """Keep a response of the Responses API with the items it was made from."""

    document: dict[str, Any]
    items: list[dict[str, Any]]


class Memory:
    """Belong to one binding: as with real accounts, nothing is shared with another."""

    def __init__(self) -> None:
        self._prefixes: OrderedDict[bytes, None] = OrderedDict()
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()

    # --- prompt caching -----------------------------------------------------------------------------------

    def count_automatic(self, prompt: Prompt) -> Counts:
        """Count like OpenAI: the longest prefix seen before, from 1024 tokens on, in steps of 128."""
        total = prompt.input_tokens
        if total < MIN_CACHED_TOKENS:
            return Counts(total)
        cached = 0
        for tokens, prefix in _prefixes(prompt.model, prompt.pieces):
            if tokens >= MIN_CACHED_TOKENS:
                cached = tokens if self._has_seen(prefix) else cached
                self._remember(prefix)
        cached -= cached % _STEP
        return Counts(total - cached, cached)

    def count_marked(self, prompt: Prompt) -> Counts:
        """Count like Anthropic: up to the last mark, what was written before is read, the rest is written."""
        total = prompt.input_tokens
        marks = [index for index, piece in enumerate(prompt.pieces) if piece.mark is not None]
        if not marks:
            return Counts(total)
        read = marked = 0
        for index, (tokens, prefix) in enumerate(_prefixes(prompt.model, prompt.pieces[: marks[-1] + 1])):
            read = tokens if self._has_seen(prefix) else read
            marked = tokens
            if index in marks:
                self._remember(prefix)
        written = marked - read
        is_hour = prompt.pieces[marks[-1]].mark == "1h"
        return Counts(total - marked, read, 0 if is_hour else written, written if is_hour else 0)

    def _has_seen(self, prefix: bytes) -> bool:
        return prefix in self._prefixes

    def _remember(self, prefix: bytes) -> None:
        self._prefixes[prefix] = None
        self._prefixes.move_to_end(prefix)
        if len(self._prefixes) > _MAX_PREFIXES:
            self._prefixes.popitem(last=False)

    # --- stored responses ---------------------------------------------------------------------------------

    def store(self, response: StoredResponse) -> None:
        self._responses[response.document["id"]] = response
        if len(self._responses) > _MAX_RESPONSES:
            self._responses.popitem(last=False)

    def stored(self, response_id: str) -> StoredResponse | None:
        return self._responses.get(response_id)

    def forget(self, response_id: str) -> None:
        self._responses.pop(response_id, None)


def _prefixes(model: str, pieces: tuple[Piece, ...]) -> list[tuple[int, bytes]]:
    """Return length in tokens and digest of every prefix that ends with a piece."""
    digest = hashlib.blake2b(model.encode(), digest_size=16)
    digests = []
    for piece in pieces:
        digest.update(b"%d:%b" % (len(piece.data), piece.data))
        digests.append(digest.digest())
    return list(zip(accumulate([piece.tokens for piece in pieces]), digests, strict=True))
