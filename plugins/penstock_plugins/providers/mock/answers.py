"""Which function answers which operation."""

from __future__ import annotations

from collections.abc import Callable

from penstock_plugins.providers.mock import chat, gemini, messages, models, others, responses
from penstock_plugins.providers.mock.calls import Call
from penstock_plugins.providers.mock.replies import RefusedError, Reply

_ANSWERS: dict[str, Callable[[Call], Reply]] = {
    "chat": chat.complete,
    "completions": chat.complete_prompt,
    "responses": responses.create,
    "response": responses.get_or_delete,
    "response_cancel": responses.cancel,
    "response_items": responses.list_items,
    "messages": messages.create,
    "count_tokens": messages.count_tokens,
    "gemini": gemini.generate,
    "embeddings": others.embed,
    "moderations": others.moderate,
    "images_generations": others.draw,
    "images_edits": others.draw,
    "speech": others.speak,
    "transcriptions": others.transcribe,
    "models": models.list_models,
    "model": models.list_models,
}


def answer(call: Call) -> Reply:
    """Return the reply to a call. Raises RefusedError."""
    function = _ANSWERS.get(call.endpoint.operation)
    if function is None:
        raise RefusedError(404, f"The mock has nothing at {call.path[:200]}.")
    return function(call)
