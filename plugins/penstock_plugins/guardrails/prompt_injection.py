"""``prompt_injection``: heuristics for texts that try to take over the model; a score, and a threshold.

Heuristics: they find the usual phrases of the usual attacks in a few languages' English, and nothing that is new.
"""

from __future__ import annotations

import attrs

from penstock import ALLOW, Check, Direction, Subject, Verdict
from penstock_plugins.guardrails.spans import compiled, plainly, translated

_SIGNS: dict[str, tuple[float, str]] = {
    "ignore_instructions": (
        1.0,
        (
            r"\b(?:ignore|disregard|forget|override|bypass)\b.{0,40}\b(?:previous|prior|above|earlier|all|your|system)\b"
            r".{0,30}\b(?:instructions?|prompts?|rules|directives|guidelines|messages?)\b"
        ),
    ),
    "reveal_prompt": (
        0.8,
        (
            r"\b(?:reveal|show|print|repeat|output|display|leak)\b.{0,30}\b(?:system|hidden|initial|secret)\b.{0,20}"
            r"\b(?:prompt|instructions?|message)\b"
        ),
    ),
    "new_persona": (
        0.6,
        (
            r"\b(?:you are now|from now on,? you(?: are| will|'re)|pretend (?:to be|you are)|act as (?:an? )?"
            r"(?:unrestricted|unfiltered|jailbroken|evil))\b"
        ),
    ),
    "jailbreak_name": (
        0.8,
        r"\b(?:DAN mode|do anything now|developer mode (?:enabled|on)|jailbreak(?:ed)?|god mode)\b",
    ),
    "no_limits": (
        0.5,
        r"\b(?:without|no|free of|ignore)\b.{0,20}\b(?:restrictions?|limitations?|filters?|censorship|safety)\b",
    ),
    "forged_role": (
        0.7,
        (
            r"(?m:^\s*(?:###\s*)?(?:system|assistant|developer)\s*:)|<\|(?:im_start|im_end|system|endoftext)\|>|\[/?INST\]"
            r"|<</?SYS>>"
        ),
    ),
    "exfiltrate": (
        0.7,
        (
            r"\b(?:send|post|exfiltrate|upload|forward)\b.{0,40}\b(?:conversation|credentials?|secrets?|api keys?"
            r"|passwords?|chat history)\b.{0,40}(?:\bto\b|https?://)"
        ),
    ),
    "encoded": (0.4, r"\b(?:base64|rot13|hex)\b.{0,30}\b(?:decode|instructions?|execute|follow)\b"),
}

_INVISIBLE: dict[int, str | None] = dict.fromkeys(
    (0xAD, *range(0x200B, 0x2010), *range(0x2060, 0x2065), 0xFEFF, *range(0xE0000, 0xE0080))
)


@attrs.frozen(kw_only=True)
class PromptInjectionSettings:
    """Settings of ``prompt_injection``."""

    threshold: float = 1.0
    """From which score a text is blocked: signs count 0.4 to 1 each."""


class PromptInjectionCheck(Check):
    """Add up signs in each text."""

    def __init__(self, settings: PromptInjectionSettings) -> None:
        self._threshold = settings.threshold
        self._signs = [
            (name, score, compiled(f"(?s:{pattern})", ignore_case=True)) for name, (score, pattern) in _SIGNS.items()
        ]

    def judge(self, subject: Subject) -> Verdict:
        """Block a text whose signs reach the threshold."""
        for text in subject.texts:
            data = _folded(text).encode("utf-8", "surrogatepass")
            found = [(name, score) for name, score, pattern in self._signs if pattern.search(data) is not None]
            if found and sum(score for _, score in found) >= self._threshold - 1e-9:
                return Verdict("block", ", ".join(name for name, _ in found))
        return ALLOW


def _folded(text: str) -> str:
    """Return a text without what is invisible, in plain letters where others only look different."""
    return text if text.isascii() else plainly(translated(text, _INVISIBLE))


class PromptInjection:
    """Block texts that try to take over the model."""

    type = "prompt_injection"
    directions: frozenset[Direction] = frozenset(("request", "response"))
    settings = PromptInjectionSettings

    def prepare(self, settings: PromptInjectionSettings) -> PromptInjectionCheck:
        """Return the check. Raises ValueError."""
        if not 0 < settings.threshold <= 10:
            raise ValueError("threshold: must be above 0, and at most 10")
        return PromptInjectionCheck(settings)
