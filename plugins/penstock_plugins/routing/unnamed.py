"""Gemini's paths that name no model: which of them a key may ask, and which models their bodies may name; pure."""

from __future__ import annotations

import json
from collections.abc import Iterator

from penstock import Candidate, Principal, Request, RequestError, editable_body
from penstock.peek import PeekError, peek_request
from penstock.splice import SpliceError, children, key_of, root
from penstock_plugins.routing.resolve import is_allowed, not_allowed


def may_go_without_model(path: bytes, principal: Principal) -> bool:
    """Say whether a Gemini path that names no model may go to the first binding: listings, files, cached contents.

    A key that may call some models only gets no path that calls a method or hides something in an escape.
    """
    return principal.models_allowed is None or (b":" not in path and b"%" not in path)


def check_named(request: Request, principal: Principal, candidate: Candidate) -> None:
    """Refuse a body that names a model the key may not call: contents cached are cached for that model.

    Raises RequestError ``model_not_allowed``, ``bad_request`` for a body that cannot be read.
    """
    if principal.models_allowed is None or not request.body:
        return
    try:
        names = list(_names_in(editable_body(request)))
    except (PeekError, SpliceError, ValueError):
        raise RequestError("bad_request", "The request body names no model that can be judged.") from None
    for name in names:
        if not is_allowed(principal, candidate, name.removeprefix("models/")):
            raise not_allowed(name)


def _names_in(body: bytes) -> Iterator[str]:
    """Yield every model a JSON object names at its top, duplicates included."""
    peek_request(body)  # whatever is read below is JSON, whole and to the end
    for child in children(body, root(body)):
        if key_of(body, child) == "model":
            value = json.loads(body[child.value.start : child.value.end], strict=False)
            if isinstance(value, str):
                yield value
