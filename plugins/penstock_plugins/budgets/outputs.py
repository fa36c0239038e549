"""How much a request allows to be put out, read from its body.

Only what the endpoint's own dialect calls a bound is one: a provider ignores the others. Of a member that is there
twice, or in another spelling too, providers take one or the other, so the largest counts.
"""

from __future__ import annotations

import re

import msgspec

from penstock.splice import Span, children, key_of, root

MAX_CHOICES = 128
"""The most answers one request can ask for, taken where the number cannot be read."""
_BOUNDS = {
    "chat": ("max_tokens", "max_completion_tokens"),
    "completions": ("max_tokens",),
    "messages": ("max_tokens",),
    "responses": ("max_output_tokens",),
    "gemini": ("gemini_tokens",),
}
"""What bounds the output, by operation; of all others the model's limit counts."""
_UNSET = msgspec.Raw(b"")


class _GeminiConfig(msgspec.Struct):
    max_output_tokens: int | None = msgspec.field(default=None, name="maxOutputTokens")
    candidate_count: int | None = msgspec.field(default=None, name="candidateCount")


class _Asked(msgspec.Struct):
    """The members that say how much may be put out, by all their names."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    prompt: msgspec.Raw = _UNSET
    generation_config: _GeminiConfig | None = msgspec.field(default=None, name="generationConfig")

    @property
    def gemini_tokens(self) -> int | None:
        """Return the bound in the place where Gemini has it."""
        return None if self.generation_config is None else self.generation_config.max_output_tokens


_read_asked = msgspec.json.Decoder(_Asked).decode
_read_prompts = msgspec.json.Decoder(list[msgspec.Raw]).decode
_read_number = msgspec.json.Decoder(int | None).decode
_NUMBERS = frozenset({"maxtokens", "maxcompletiontokens", "maxoutputtokens", "n", "bestof", "candidatecount"})
_SPELLINGS = frozenset({
    b"max_tokens", b"max_completion_tokens", b"max_output_tokens", b"n", b"best_of", b"prompt", b"generationConfig",
    b"maxOutputTokens", b"candidateCount",
})  # fmt: skip
_names_in = re.compile(
    rb'"(max_tokens|max_completion_tokens|max_?output_?tokens|n|best_of|prompt|generation_?config|candidate_?count)"'
    rb"[ \t\r\n]*:",
    re.IGNORECASE,
).findall
_hides_letters = re.compile(rb"\\u00(?:[46][1-9a-fA-F]|[57][0-9aA]|5[fF])").search


def read_output(body: bytes, operation: str) -> tuple[int, int | None]:
    """Return the number of answers asked for and the most tokens of each, None where the request sets no bound."""
    try:
        asked = _read_any(body) if _is_ambiguous(body) else _read_asked(body)
        prompts = _prompts_in(bytes(asked.prompt))
    except (ValueError, RecursionError):
        return MAX_CHOICES, None  # odd enough that the provider is likely to refuse it, and may not
    given = [getattr(asked, name) for name in _BOUNDS.get(operation, ())]
    limits = [limit for limit in given if limit is not None]
    gemini = asked.generation_config or _GeminiConfig()
    choices = max(1, asked.n or 1, asked.best_of or 1, gemini.candidate_count or 1)
    return choices * prompts, max(limits) if limits and min(limits) > 0 else None


def _is_ambiguous(body: bytes) -> bool:
    """Tell whether it may be a matter of the reader which value of a member counts."""
    names = _names_in(body)
    return len(names) != len(set(names)) or not _SPELLINGS.issuperset(names) or _hides_letters(body) is not None


def _read_any(body: bytes) -> _Asked:
    """Read the members however often and in whatever case they are there. Raises ValueError."""
    found = _Found()
    found.gather(body, root(body))
    output = found.bound("max_output_tokens", "maxOutputTokens")
    # Gemini's own is the same word; each endpoint looks at one of the two only.
    gemini = _GeminiConfig(output, found.most("candidatecount"))
    return _Asked(
        max_tokens=found.bound("max_tokens"),
        max_completion_tokens=found.bound("max_completion_tokens"),
        max_output_tokens=output,
        n=found.most("n"),
        best_of=found.most("bestof"),
        prompt=found.prompt,
        generation_config=gemini,
    )


class _Found:
    """Hold every value of the members that count, whatever their case."""

    def __init__(self) -> None:
        self.values: dict[str, list[int | None]] = {}
        self.names: set[str] = set()
        self.prompt = _UNSET

    def gather(self, body: bytes, span: Span) -> None:
        """Take the members of an object. Raises ValueError."""
        for child in children(body, span):
            name = key_of(body, child)
            folded = _folded(name)
            raw = body[child.value.start : child.value.end]
            if folded in _NUMBERS:
                self.names.add(name)
                self.values.setdefault(folded, []).append(_read_number(raw))
            elif folded == "prompt":
                if _prompts_in(raw) >= _prompts_in(bytes(self.prompt)):
                    self.prompt = msgspec.Raw(raw)
            elif folded == "generationconfig":
                self.gather(body, child.value)

    def bound(self, *names: str) -> int | None:
        """Return the value that allows most of a bound that is there by its own name; 0 where one bounds nothing."""
        if self.names.isdisjoint(names):
            return None
        values = [value or 0 for value in self.values[_folded(names[0])]]
        return max(values) if min(values) > 0 else 0

    def most(self, folded: str) -> int | None:
        """Return the largest value; None where there is none."""
        return max((value for value in self.values.get(folded, ()) if value is not None), default=None)


def _folded(name: str) -> str:
    return name.lower().replace("_", "")


def _prompts_in(raw: bytes) -> int:
    """Return how many completions a ``prompt`` asks for; a list of token ids is one prompt."""
    if not raw.startswith(b"["):
        return 1
    prompts = _read_prompts(raw)
    return 1 if not prompts or bytes(prompts[0])[:1].isdigit() else len(prompts)
