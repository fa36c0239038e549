"""The evaluators that come along."""

from __future__ import annotations

from collections.abc import Sequence

from penstock import Evaluator, Services
from penstock_plugins.guardrails.credentials import Secrets
from penstock_plugins.guardrails.json_schema import JSONSchema
from penstock_plugins.guardrails.llm_judge import LLMJudge
from penstock_plugins.guardrails.max_length import MaxLength
from penstock_plugins.guardrails.pii import PII
from penstock_plugins.guardrails.prompt_injection import PromptInjection
from penstock_plugins.guardrails.regex import Regex
from penstock_plugins.guardrails.remote import Remote


def bundled(services: Services) -> Sequence[Evaluator]:
    """Return one of each."""
    return (
        Regex(), PII(), Secrets(), PromptInjection(), MaxLength(), JSONSchema(), Remote(services), LLMJudge(services)
    )  # fmt: skip
