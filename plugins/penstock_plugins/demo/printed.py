"""What the demo prints once it listens: for people, or as JSON."""

from __future__ import annotations

from penstock_plugins.demo.folder import Demo
from penstock_plugins.demo.seed import Planted
from penstock_plugins.demo.vendors import MODELS, VENDORS

_GREETING = """
Penstock is running at {base_url}
Answers come from: {answers}

Virtual key: {virtual_key}
Configuration: {config}

With curl:

{curl}

With the OpenAI SDK:

  client = openai.OpenAI(base_url="{base_url}/v1", api_key="{virtual_key}")

With the Anthropic SDK:

  client = anthropic.Anthropic(base_url="{base_url}", api_key="{virtual_key}")

With Claude Code:

  export ANTHROPIC_BASE_URL={base_url}
  export ANTHROPIC_AUTH_TOKEN={virtual_key}
{management}
See a fallback's reason, a slow stream, a cut: model "mock/fault-503", "mock/slow", "mock/cut".
Stop with Ctrl-C.
"""
_MANAGEMENT = """
Manage it from another terminal; these commands find it by themselves:

  penstock virtual-keys create --name my-first-vk --env live --provider openai --provider anthropic
  penstock budgets create --scope project --project default --window month --limit 100 --on-breach block
  penstock usage

The same as an API: {api_url} (described at {api_url}/openapi.json)
"""


def _curl(base_url: str, virtual_key: str) -> str:
    body = f'{{"model":"{MODELS["openai"]}","messages":[{{"role":"user","content":"Say hello."}}]}}'
    return (
        f"curl -sS {base_url}/v1/chat/completions"
        f" -H 'Authorization: Bearer {virtual_key}' -H 'Content-Type: application/json' -d '{body}'"
    )


def encoded(prepared: Demo, planted: Planted, base_url: str) -> str:
    """Return the facts as one line of JSON."""
    import msgspec  # noqa: PLC0415 - loaded by then, but not for "penstock --help"

    facts = {
        "base_url": base_url,
        "openai_base_url": f"{base_url}/v1",
        "anthropic_base_url": base_url,
        "virtual_key": prepared.virtual_key,
        "model": MODELS["openai"],
        "anthropic_model": MODELS["anthropic"],
        "providers": {name: planted.types.get(name, "mock") for name in VENDORS},
        "config": str(prepared.file),
        "curl": _curl(base_url, prepared.virtual_key),
        "api_url": f"{base_url}/api/v1" if prepared.has_store else None,
        "admin_token": planted.admin_token,
    }
    return msgspec.json.encode(facts).decode()


def greeting(prepared: Demo, planted: Planted, base_url: str) -> str:
    """Return the lines for people."""
    return _GREETING.format(
        base_url=base_url,
        answers=", ".join(_who(name, planted) for name in VENDORS),
        virtual_key=prepared.virtual_key,
        config=prepared.file if prepared.is_kept else f"{prepared.file} (gone when the demo stops)",
        curl=_curl(base_url, prepared.virtual_key),
        management=_MANAGEMENT.format(api_url=f"{base_url}/api/v1") if prepared.has_store else "",
    )


def _who(name: str, planted: Planted) -> str:
    variable = VENDORS[name]
    if planted.types.get(name, "mock") == "mock":
        return f"{name} ({variable} is not set, so by the mock)"
    if name in planted.outdated:
        return (
            f"{name} (by the key in the store; {variable} holds another, 'penstock providers update {name}' takes it)"
        )
    return name
