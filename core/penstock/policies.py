"""What a virtual key or a routing policy says about its requests: values, without the code that acts on them."""

from __future__ import annotations

from typing import Literal

import attrs

CacheMode = Literal["respect", "disable", "force"]
FailureClass = Literal["5xx", "timeout", "rate_limit", "network_error", "not_found"]


@attrs.frozen(kw_only=True)
class Fallback:
    """Say when the next candidate is tried."""

    on: tuple[FailureClass, ...] = ("5xx", "timeout", "rate_limit", "network_error", "not_found")
    """After what; nothing here means never."""
    max_attempts: int = 3
    """Candidates that are asked at most; those skipped do not count."""
    timeout_ms: int | None = None
    """From the request until its answer may begin, all attempts together; None leaves it to each attempt's bounds."""
    same_binding_retries: int = 0
    """How often the only candidate is asked again."""


@attrs.frozen(kw_only=True)
class PatternRules:
    """Hold RE2 patterns, unanchored; deny wins; an ``allow`` that is not null admits nothing else."""

    deny: tuple[str, ...] | None = None
    """What is refused."""
    allow: tuple[str, ...] | None = None
    """What alone is admitted; null admits all."""


@attrs.frozen(kw_only=True)
class PolicyRules:
    """Hold what requests may contain."""

    tools: PatternRules | None = None
    """Names of tools."""
    mcp: PatternRules | None = None
    """Names and URLs of MCP servers."""
    urls: PatternRules | None = None
    """Every http(s) URL in any string of the body."""
    models: PatternRules | None = None
    """The resolved model, bare and ``type/model``."""


@attrs.frozen(kw_only=True)
class GuardrailAttachment:
    """Attach a guardrail to a key."""

    guardrail_id: str
    """Id or name."""
    fail_open: bool | None = None
    """Let pass where the check fails; None leaves it to the guardrail."""


NO_RULES = PolicyRules()
ENFORCED = ("policy_rules", "guardrails", "rate_limits")
"""Members of a principal that are refused where no enabled plugin enforces them; the bundled ones have these names."""
