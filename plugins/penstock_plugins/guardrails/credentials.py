"""``secrets``: keys of cloud and AI vendors, private keys, tokens, and values that look like passwords."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Iterator

import attrs

from penstock import ALL_DIRECTIONS
from penstock_plugins.guardrails.spans import Act, Ending, Hit, Places, SpanCheck, compiled, first_undecided, matches

_TOKEN = string.ascii_letters + string.digits + "_-./+="
_ARMOUR = string.ascii_uppercase + "- "
FORMATS: dict[str, str] = {
    "anthropic_key": r"\bsk-ant-[A-Za-z0-9_-]{20,}",
    "openai_key": r"\bsk-(?:proj-|svcacct-|admin-)?[A-Za-z0-9_-]{20,}",
    "aws_access_key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "google_key": r"\bAIza[A-Za-z0-9_-]{35,}",
    "github_token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})",
    "gitlab_token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "slack_token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "stripe_key": r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}",
    "hugging_face_token": r"\bhf_[A-Za-z0-9]{30,}",
    "groq_key": r"\bgsk_[A-Za-z0-9]{30,}",
    "npm_token": r"\bnpm_[A-Za-z0-9]{36,}",
    "sendgrid_key": r"\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
    "virtual_key": r"\b[a-z]{1,16}_vk_(?:live|test)_[0-9A-Z]{26}[A-Za-z0-9]{38}",
    "jwt": r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
    "private_key": r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[A-Za-z0-9+/=:,\\\s]*",
    "private_key_end": r"-----END [A-Z ]{0,40}PRIVATE KEY-----",
}
_ASSIGNED = (
    r"(?i:api[_-]?key|secret|token|passw(?:or)?d|credentials?|access[_-]?key)"
    r"[\"']?[ \t]{0,3}(?::|=>?)[ \t]{0,3}[\"']?([A-Za-z0-9_\-./+=]{16,})"
)
_ENDINGS = (Ending(_TOKEN, 4096), Ending(_ARMOUR, 96, "-"))


@attrs.frozen(kw_only=True)
class SecretsSettings:
    """Settings of ``secrets``."""

    action: Act = "block"
    """``block`` or ``redact``."""
    replacement: str = "[{rule}]"
    """What stands where something was redacted; ``{rule}`` is the kind."""
    assigned: bool = True
    """Whether values count that look random behind words such as ``password =``."""
    entropy: float = 3.5
    """From how many bits a character such a value counts."""


def entropy_of(text: str) -> float:
    """Return Shannon's entropy of a text, bits a character."""
    counts = Counter(text).values()
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts)


class SecretsCheck(SpanCheck):
    """Find credentials."""

    keeps_apart = True

    def __init__(self, settings: SecretsSettings) -> None:
        super().__init__(settings.action, settings.replacement)
        self._assigned = compiled(_ASSIGNED) if settings.assigned else None
        self._entropy = settings.entropy
        self._formats = [(name, compiled(pattern)) for name, pattern in FORMATS.items()]

    def undecided(self, text: str) -> int:
        """Return where the last token begins, or what may become the first line of a private key."""
        return first_undecided(text, _ENDINGS)

    def find(self, text: str, start: int) -> Iterator[Hit]:
        """Yield what is found."""
        for name, pattern in self._formats:
            for first, last in matches(pattern, text, start):
                yield Hit(name, first, last)
        if self._assigned is not None:
            places = Places(text)
            for found in self._assigned.finditer(places.data):
                first, last = places.character(found.start(1)), places.character(found.end(1))
                if first >= start and entropy_of(text[first:last]) >= self._entropy:
                    yield Hit("assigned", first, last)


class Secrets:
    """Block or redact credentials."""

    type = "secrets"
    directions = ALL_DIRECTIONS
    settings = SecretsSettings

    def prepare(self, settings: SecretsSettings) -> SecretsCheck:
        """Return the check."""
        return SecretsCheck(settings)
