"""Rows about what plugins take, unused and used: each compares gateways with a store and every bundled plugin.

None of the edited paths has a goal: they are measured so that a regression shows.
"""

from __future__ import annotations

import attrs
from benchmarks.bench import Bench
from benchmarks.generator import Load
from benchmarks.prompts import Prompt
from benchmarks.report import Goal, Row, format_number, format_spread, ratio
from benchmarks.rows import CHAT, LONG_CHAT, STREAM, per_second, size_notes

SLICES = 3
MESSAGES = Prompt(dialect="messages")
MESSAGE_STREAM = Prompt(dialect="messages", streams=True)
TOOLS_CHAT = Prompt(has_tools=True)
LONG_MESSAGES = Prompt(
    dialect="messages", body_size=LONG_CHAT.body_size, model="claude-haiku-4-5", has_markers=True, key="anthropic"
)


def unused_plugins(bench: Bench) -> Row:
    """Measure what every bundled plugin takes from a key that uses none of those that `--governed` does not have."""
    load = Load(connections=64, warmup=bench.seconds(0.1, 0.5), seconds=bench.seconds(0.5, 2))
    turns = {name: (name, CHAT) for name in ("all-plugins", "governed")}
    measured = bench.take_turns(turns, load, per_second, SLICES)
    return Row(
        number="13",
        name="unused-plugins",
        title="requests with every plugin and nothing on the key, 64 connections",
        unit="per second",
        figures={"gateway": measured.spreads["all-plugins"]},
        compared=measured.compare(ratio, "all-plugins", "governed"),
        compared_unit="x governed",
        goal=Goal(0.95, is_least=True),
        errors=measured.errors,
        notes=(f"governed, in the same windows: {format_spread(measured.spreads['governed'])} per second",),
    )


def _edited(
    bench: Bench,
    prompt: Prompt,
    plain: Prompt,
    connections: int,
    *,
    number: str,
    name: str,
    title: str,
    without: str,
    quick: float = 0.5,
) -> Row:
    """Compare an edited path with nginx, which forwards the same bytes, and with the same gateway's plain path."""
    turns = {"gateway": ("all-plugins", prompt), "nginx": ("nginx", prompt), "plain": ("all-plugins", plain)}
    load = Load(connections=connections, warmup=bench.seconds(0.15, 1), seconds=bench.seconds(quick, 3), drain=3)
    measured = bench.take_turns(turns, load, per_second)
    to_plain = format_spread(measured.compare(ratio, "gateway", "plain"))
    rate = format_number(measured.spreads["plain"].median)
    same_size = prompt.dialect == plain.dialect  # a translated answer is another one
    return Row(
        number=number,
        name=name,
        title=title,
        unit="per second",
        figures={each: measured.spreads[each] for each in ("gateway", "nginx")},
        compared=measured.compare(ratio, "gateway", "nginx"),
        compared_unit="x nginx",
        errors=measured.errors,
        notes=(
            f"{to_plain} x {without}, which is {rate} per second of the same gateway",
            *(size_notes(measured, prompt, "nginx") if same_size else ()),
        ),
    )


def translated(bench: Bench) -> Row:
    """Measure requests per second of a client that speaks messages to a provider that speaks chat completions."""
    return _edited(
        bench, MESSAGES, CHAT, 64,
        number="14", name="translated", title="Anthropic's messages to an OpenAI provider, 64 connections",
        without="chat completions",
    )  # fmt: skip


def translated_streams(bench: Bench) -> Row:
    """Measure streams per second of the same."""
    return _edited(
        bench, MESSAGE_STREAM, STREAM, 16,
        number="14b", name="translated-streams", title="streams of 200 events, translated, 16 at once",
        without="streams of chat completions",
    )  # fmt: skip


def guarded_streams(bench: Bench) -> Row:
    """Measure streams per second of a key whose guardrail reads every event and never finds anything.

    Few at once: of 16 that are slow, none might end within a window.
    """
    return _edited(
        bench, Prompt(streams=True, key="guarded"), STREAM, 4,
        number="15", name="streams-guarded", title="streams of 200 events, each read by a guardrail, 4 at once",
        without="streams without guardrail", quick=1,
    )  # fmt: skip


def policy_rules(bench: Bench) -> Row:
    """Measure requests per second of a key that denies tools and URLs, with two tools and a link in each body."""
    return _edited(
        bench, Prompt(has_tools=True, key="policed"), TOOLS_CHAT, 64,
        number="15b", name="policy-rules", title="requests judged by patterns on tools and URLs, 64 connections",
        without="requests without rules",
    )  # fmt: skip


def cache_disabled(bench: Bench) -> Row:
    """Measure requests per second with bodies of 100 kB out of which two cache markers are spliced."""
    return _edited(
        bench, attrs.evolve(LONG_MESSAGES, key="uncached"), LONG_MESSAGES, 64,
        number="16", name="cache-disabled", title="messages of 100 kB, two cache markers taken out, 64 connections",
        without="messages with their markers",
    )  # fmt: skip
