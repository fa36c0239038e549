"""Fill the store of a governed gateway over its management API: bindings, keys, budgets, guardrails."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUDGETS = (
    {"scope": "organization", "scope_id": "default", "window": "month", "limit_usd": "1000000"},
    {"scope": "project", "scope_id": "default", "window": "day", "limit_usd": "1000000"},
)
LIMITS = {"rpm": 100_000_000, "concurrency": 100_000}
KEY = {
    "provider_bindings": ["mock"],
    "rate_limits": {**LIMITS, "tpm": 100_000_000_000},
    "budget": {"window": "month", "limit_usd": "1000000"},
}
DENIED = {
    "tools": {"deny": [r"^shell\.", r"(?i)delete|drop", r"^computer"]},
    "urls": {"deny": [r"^https?://(localhost|127\.|10\.|192\.168\.)", r"\.internal(/|:|$)", r"(?i)pastebin"]},
}
NEVER = r"\bPS-[0-9]{12}\b"
"""A pattern that no answer of the mock has."""


def make_objects(folder: Path, port: int, upstream: int) -> dict[str, str]:
    """Make bindings, budgets and keys whose limits are never reached; return the secrets of the keys by name."""
    call = _Calls(folder, port)
    address = f"http://127.0.0.1:{upstream}"
    call.make("provider-bindings", _binding("mock", "openai", f"{address}/v1", "gpt-4o-mini"))
    for budget in BUDGETS:
        call.make("budgets", budget)
    return {
        "bench": call.make_key("bench"),
        "alias": call.make_key("alias", model_aliases={"fast": "gpt-4o-mini"}),
    }


def make_edited(folder: Path, port: int, upstream: int) -> dict[str, str]:
    """Make a key for each edited path, in a store that `make_objects` has filled; return their secrets by name.

    `guarded` has a guardrail that reads every event, `policed` rules about tools and URLs; `anthropic` asks a
    provider that speaks messages, and `uncached` does without prompt caching.
    """
    call = _Calls(folder, port)
    call.make("provider-bindings", _binding("claude", "anthropic", f"http://127.0.0.1:{upstream}", "claude-haiku-4-5"))
    settings = {"patterns": [NEVER], "action": "redact"}
    call.make("evaluators", {"name": "never", "type": "regex", "settings": settings})
    guardrail = {"name": "never", "evaluator": "never", "directions": ["stream_chunk"]}
    attached = {"guardrail_id": call.make("guardrails", guardrail)["id"]}
    return {
        "guarded": call.make_key("guarded", guardrails=[attached]),
        "policed": call.make_key("policed", policy_rules=DENIED),
        "anthropic": call.make_key("anthropic", provider_bindings=["claude"]),
        "uncached": call.make_key("uncached", provider_bindings=["claude"], cache_mode="disable"),
    }


def _binding(name: str, provider: str, base_url: str, model: str) -> dict[str, object]:
    return {
        "name": name,
        "type": provider,
        "scope_id": "default",
        "base_url": base_url,
        "credential": "sk-upstream",
        "models": [model],
        "rate_limits": LIMITS,
    }


class _Calls:
    """Call the management API of a gateway that starts just now."""

    def __init__(self, folder: Path, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(f"{self._base}/readyz", timeout=5).close()
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        self._token = (folder / "penstock.db.admin-token").read_text().strip()

    def make(self, resource: str, document: Mapping[str, object]) -> dict[str, Any]:
        """Create one object; return it as the API does."""
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        url = f"{self._base}/api/v1/{resource}"
        request = urllib.request.Request(url, json.dumps(document).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                made: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{resource}: {error.read().decode()}") from error
        return made

    def make_key(self, name: str, **members: object) -> str:
        """Create a virtual key; return its secret."""
        secret: str = self.make("virtual-keys", {"name": name, **KEY, **members})["secret"]
        return secret
