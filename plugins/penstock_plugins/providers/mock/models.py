"""The models the mock lists; it answers to any other name as well."""

from __future__ import annotations

from urllib.parse import unquote

from penstock_plugins.providers.mock.calls import Call
from penstock_plugins.providers.mock.replies import CREATED, RefusedError, Reply, json_reply

NAMES = ("mock-gpt", "mock-claude", "mock-gemini", "mock-embedding", "mock-image", "mock-voice")


def list_models(call: Call) -> Reply:
    """List models, or describe the one the path names, in the shape of the caller's dialect."""
    is_anthropic = b"anthropic-version" in call.headers
    entry = _anthropic_entry if is_anthropic else _openai_entry
    wanted = unquote(call.path.removeprefix("/models").strip("/"))
    if wanted:
        if wanted not in NAMES:
            raise RefusedError(404, f"The mock lists no model {wanted[:200]!r}.", param="model", code="model_not_found")
        return json_reply(entry(wanted))
    entries = [entry(name) for name in NAMES]
    if is_anthropic:
        return json_reply({"data": entries, "has_more": False, "first_id": NAMES[0], "last_id": NAMES[-1]})
    return json_reply({"object": "list", "data": entries})


def _openai_entry(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "mock"}


def _anthropic_entry(name: str) -> dict[str, object]:
    return {"type": "model", "id": name, "display_name": name, "created_at": "2025-01-01T00:00:00Z"}
