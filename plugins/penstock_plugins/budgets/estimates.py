"""What an exchange may cost before it is known: what is likely, and what it cannot exceed.

Likely is what the key's last exchanges with the model cost on average, and no less than the request's own tokens at
list price, guessed from its length. What cannot be exceeded counts a token for each byte of the request, since none is
shorter, and all the output the request or the model allows, at the dearest rates they may have.
"""

from __future__ import annotations

import re

import attrs

from penstock import Exchange, Usage, editable_body
from penstock.governance import PER, Price
from penstock.peek import is_multipart
from penstock_plugins.budgets.outputs import read_output

BYTES_PER_TOKEN = 4
_MEDIA_TOKENS = 8_000
"""Input taken for likely where files lie in the body: their length says nothing about tokens."""
_FRAMING_TOKENS = 1_024
"""What providers put around a request for the model, such as the instructions that explain tools to it."""
_REMEMBERED = 50_000
_WEIGHT = 8
"""Of how many exchanges an average is, roughly."""
_WITHOUT_OUTPUT = frozenset({"embeddings", "moderations"})

# Members and types that stand for tokens which are not in the body: images, files, what the provider keeps, and tools
# that feed the model on its side. A letter that is escaped for no reason may hide any of them.
_STANDS_FOR_MORE = re.compile(
    rb'"(?:previous_response_id|conversation|prompt_cache_id|file_id|file_url|file_data|image_url|input_audio|'
    rb'container|cachedContent|fileData|inlineData|mcp_servers)"|"id"\s*:\s*"pmpt_'
    rb'|"type"\s*:\s*"(?:image|document|file|input_image|input_file|item_reference|container_upload|mcp|'
    rb"[a-z_]*search[0-9a-z_]*|web_[0-9a-z_]*|code_[0-9a-z_]*|computer[0-9a-z_]*|image_generation|bash_[0-9]*|"
    rb'text_editor_[0-9]*|memory_[0-9]*)"|\\u00(?:[46][1-9a-fA-F]|[57][0-9aA]|5[fF])'
).search


class Averages:
    """Remember what the exchanges of each key with each model cost lately, nano-USD."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str | None], int] = {}

    def of(self, key_id: str, model: str | None) -> int:
        """Return the average, 0 where nothing is known."""
        return self._known.get((key_id, model), 0)

    def add(self, key_id: str, model: str | None, cost: int) -> None:
        """Take in what an exchange cost."""
        name = (key_id, model)
        before = self._known.get(name)
        if before is None:
            if len(self._known) >= _REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[name] = cost
        else:
            self._known[name] = before + (cost - before) // _WEIGHT


def likely_input(exchange: Exchange) -> int:
    """Return how many input tokens the request is likely to have, without reading it."""
    request = exchange.request
    body = request.body if request.decoded is None else request.decoded
    tokens = len(body) // BYTES_PER_TOKEN + 1
    if tokens > _MEDIA_TOKENS and (b"base64" in body or is_multipart(request.headers.get(b"content-type"))):
        return _MEDIA_TOKENS
    return tokens


def input_cost(price: Price, tokens: int) -> int:
    """Return what so many plain input tokens cost, nano-USD."""
    rates = price.rates
    for tier in price.tiers:
        if tokens > tier.above:
            rates = tier.rates
    return (tokens * rates.input + PER - 1) // PER + rates.request


class Bounds:
    """Hold the most tokens an exchange can take, read from its body."""

    __slots__ = ("_max_output", "choices", "input")

    def __init__(self, exchange: Exchange, unseen_input: int) -> None:
        """``unseen_input``: tokens that references to content elsewhere may stand for."""
        request = exchange.request
        body = editable_body(request)
        self.input = len(body) + _FRAMING_TOKENS
        if _STANDS_FOR_MORE(body) is not None:
            self.input += unseen_input
        self._max_output: int | None
        self.choices: int
        if request.endpoint.operation in _WITHOUT_OUTPUT:
            self.choices, self._max_output = 0, 0
        elif is_multipart(request.headers.get(b"content-type")):
            self.choices, self._max_output = _form_choices(request.endpoint.operation), None
        else:
            self.choices, self._max_output = read_output(body, request.endpoint.operation)

    def cost(self, price: Price, assumed_output: int) -> int:
        """Return the most it can cost, nano-USD; ``assumed_output`` is for models whose limit is not known."""
        return price.dearest(self.input, self.output(price, assumed_output))

    def output(self, price: Price, assumed_output: int) -> int:
        """Return the most tokens it can put out."""
        output = self._max_output
        if output is None:
            output = assumed_output if price.max_output_tokens is None else price.max_output_tokens
        return output * self.choices

    def within(self, usage: Usage, price: Price, assumed_output: int) -> Usage:
        """Return a usage that was guessed, cut down to what is possible."""
        output = min(usage.output, self.output(price, assumed_output))
        return attrs.evolve(usage, input=min(usage.input, self.input), output=output)


def _form_choices(operation: str) -> int:
    """Return how many answers a form may ask for: transcriptions give one, images as many as a field says."""
    return 1 if operation == "transcriptions" else 10
