"""What a stream says after guardrails is what the whole text would say, however it is cut; sans-IO."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guarded_gateway import CARD, MAIL, SHAPES, Shape
from penstock import ALL_DIRECTIONS, Check, EvaluatorRegistry, Event, Services, TextEdit
from penstock.sse import EventSplitter
from penstock_plugins.guardrails.bundled import bundled
from penstock_plugins.guardrails.holding import Holder, Track
from penstock_plugins.guardrails.pii import luhn
from penstock_plugins.guardrails.spans import SpanCheck
from penstock_plugins.guardrails.texts import difference, joined_edits, rewritten

REGISTRY = EvaluatorRegistry()
for each in bundled(Services()):
    REGISTRY.add(each)
KEY = "sk-ant-" + "api03-" + "AbCdEfGhIj" * 3
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7\nabcd==\n-----END RSA PRIVATE KEY-----"
SEEDS = [
    CARD, "4111-1111-1111-1111", "378282246310005", MAIL, "a.b+c@x.co", "DE89 3704 0044 0532 0130 00",
    "GB82WEST12345698765432", "+49 (0)30 901820-0", "555-867-5309", "078-05-1120", "12345678Z", KEY, JWT, PEM,
    "password = 'aG9yc2ViYXR0ZXJ5c3RhcGxl'", "AKIAIOSFODNN7EXAMPLE", "foo1", "barbar", " ", "\n", "-", "1", "4", "é", "𝄞",  # noqa: E501
    "a", "@", ".", "E", "DE", "not a secret", "2026-11-22",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(SEEDS), st.text(max_size=5)), max_size=8).map("".join)
CHECKS: dict[str, SpanCheck] = {}
SETTINGS: dict[str, dict[str, Any]] = {
    "pii": {"kinds": ["email", "phone", "iban", "card", "us_ssn", "es_dni", "fr_nir", "de_tax_id", "pl_pesel"]},
    "secrets": {"action": "redact"},
    "regex": {"patterns": [r"\bfoo\d+\b", r"(?:bar){1,3}", r"^4"], "action": "redact", "window": 16},
}
for name, settings in SETTINGS.items():
    check = REGISTRY.prepare(name, settings)
    assert isinstance(check, SpanCheck)
    CHECKS[name] = check


def edits_of(checks: Sequence[SpanCheck], text: str, before: str = "") -> list[TextEdit]:
    return [
        TextEdit(hit.start - len(before), hit.end - len(before), f"[{hit.rule}]")
        for check in checks
        for hit in check.find(before + text, len(before))
    ]


def redacted(checks: Sequence[SpanCheck], text: str) -> str:
    return rewritten(text, joined_edits(edits_of(checks, text)))


def through(shape: Shape, checks: Sequence[SpanCheck], events: Sequence[bytes]) -> tuple[bytes, list[bytes]]:
    """Take events through a holder as the plugin does; returns all that was released, and it after each step."""
    holder, released, steps = Holder(shape.name), b"", []
    for number, raw in enumerate(events):
        tracks, repeats = holder.take([Event(raw)])
        if number == len(events) - 1:
            tracks += [track for track in holder.finish() if track not in tracks]
        for track in tracks:
            upto = len(track.held) if track.is_ended else min(check.undecided(track.held) for check in checks)
            track.settle(edits_of(checks, track.held, track.before), upto)
        for repeat in repeats:
            repeat.new = redacted(checks, repeat.text.text)
        released += holder.release()
        steps.append(released)
    assert not holder.is_holding
    return released, steps


@st.composite
def cuttings(draw: st.DrawFn) -> list[str]:
    text = draw(TEXTS)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("names", [("pii",), ("secrets",), ("regex",), ("pii", "secrets", "regex")], ids="+".join)
@given(pieces=cuttings(), shape=st.sampled_from(SHAPES))
def test_stream_says_what_the_whole_text_says_redacted(names: tuple[str, ...], pieces: list[str], shape: Shape) -> None:
    checks = [CHECKS[name] for name in names]
    wanted = redacted(checks, "".join(pieces))
    released, steps = through(shape, checks, shape.events(pieces))
    assert shape.said(released) == wanted
    for step in steps:  # what is out is a beginning of it: nothing forbidden ever showed, not even in part
        assert wanted.startswith(shape.said(step))


@given(pieces=cuttings(), shape=st.sampled_from(SHAPES))
def test_events_without_a_hit_come_out_as_they_went_in(pieces: list[str], shape: Shape) -> None:
    checks = [CHECKS["pii"], CHECKS["secrets"]]
    text = "".join(pieces)
    events = shape.events(pieces)
    released, _ = through(shape, checks, events)
    if redacted(checks, text) == text:
        assert released == b"".join(events)
    splitter = EventSplitter()
    assert len(splitter.feed(released) + splitter.finish()) == len(events)


@given(TEXTS)
def test_no_digit_of_a_card_is_out_before_it_is_known_to_be_one(text: str) -> None:
    track = Track()
    check = CHECKS["pii"]
    out = ""
    for letter in f"{text} {CARD}":
        track.held += letter
        track.settle(edits_of([check], track.held, track.before), check.undecided(track.held))
    out = track.rewritten(0, track.decided, f"{text} {CARD}"[: track.decided])
    assert CARD[:4] not in out[len(redacted([check], text)) :]


@given(st.text(), st.text())
def test_difference_makes_one_text_of_another(before: str, after: str) -> None:
    assert rewritten(before, [difference(before, after)]) == after


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted), max_size=8))
def test_joined_edits_do_not_overlap_and_cover_all(pairs: list[list[int]]) -> None:
    edits = [TextEdit(start, end, "") for start, end in pairs]
    joined = joined_edits(edits)
    assert all(first.end <= second.start for first, second in pairwise(joined))
    covered = {at for each in edits for at in range(each.start, each.end)}
    assert {at for each in joined for at in range(each.start, each.end)} == covered


def test_overlapping_edits_become_one_with_the_replacement_of_the_first_attached() -> None:
    edits = [TextEdit(4, 9, "[first]"), TextEdit(2, 6, "[second]")]
    assert joined_edits(edits) == [TextEdit(2, 9, "[first]")]


def test_text_beyond_the_look_back_is_not_kept() -> None:
    track = Track()
    for _ in range(2000):
        track.held += "word "
        track.settle((), CHECKS["pii"].undecided(track.held))
        assert len(track.held) < 64
        assert len(track.before) <= 64
    assert track.edits == []


# --- what the bundled checks find -----------------------------------------------------------------------------------

FOUND = {
    "card": ["4111111111111111", "4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005"],
    "iban": ["DE89370400440532013000", "GB82 WEST 1234 5698 7654 32", "NL91ABNA0417164300", "NO9386011117947"],
    "email": ["a@b.co", "jane.roe+tag@mail.example.org"],
    "phone": ["+1 415 555 2671", "+49-30-901820", "(415) 555-2671", "415-555-2671"],
    "us_ssn": ["078-05-1120"],
    "es_dni": ["12345678Z", "X1234567L"],
    "fr_nir": ["2 55 08 14 168 025 38"],
    "de_tax_id": ["86095742719"],
    "pl_pesel": ["44051401359"],
}
MISSED = {
    "card": ["4111111111111112", "1234567890123456", "14111111111111111", "order 4111 1111"],
    "iban": ["DE88370400440532013000", "XX89370400440532013000", "DE8937040044053201300"],
    "email": ["a@b", "@b.co", "not an address"],
    "phone": ["12:30:45", "2026-11-22", "1.2.3.4", "+12"],
    "us_ssn": ["000-12-3456", "666-12-3456", "900-12-3456", "1078-05-1120"],
    "es_dni": ["12345678A"],
    "fr_nir": ["2 55 08 14 168 025 39"],
    "de_tax_id": ["86095742718"],
    "pl_pesel": ["44051401358"],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_personal_data_is_found(kind: str, text: str) -> None:
    found = REGISTRY.prepare("pii", {"kinds": [kind]})
    assert isinstance(found, SpanCheck)
    for around in ("{}", "call {} now", "({})", "é: {}."):
        assert redacted([found], around.format(text)) == around.format(f"[{kind}]")


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in MISSED.items() for text in texts])
def test_what_only_looks_like_it_is_left_alone(kind: str, text: str) -> None:
    found = REGISTRY.prepare("pii", {"kinds": [kind]})
    assert isinstance(found, SpanCheck)
    assert redacted([found], f"see {text} there") == f"see {text} there"


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("anthropic_key", KEY), ("jwt", JWT), ("aws_access_key", "AKIAIOSFODNN7EXAMPLE"),
        ("openai_key", "sk-proj-abcdefghijklmnopqrstuvwx"), ("github_token", "ghp_" + "a1B2" * 9),
        ("slack_token", "xoxb-1234567890-abcdefghij"), ("google_key", "AIza" + "Ab1_" * 9),
        ("stripe_key", "sk_live_abcdefghijklmnop"), ("hugging_face_token", "hf_" + "abcde" * 7),
    ],
)  # fmt: skip
def test_credentials_are_found(rule: str, text: str) -> None:
    assert rule in {hit.rule for hit in CHECKS["secrets"].find(f"use {text} here", 0)}
    assert text[8:] not in redacted([CHECKS["secrets"]], f"use {text} here")


def test_private_key_is_found_whole_and_random_values_behind_words_that_mean_secret() -> None:
    assert redacted([CHECKS["secrets"]], f"key:\n{PEM}\nbye") == "key:\n[private_key][private_key_end]\nbye"
    assert "aG9y" not in redacted([CHECKS["secrets"]], "password = 'aG9yc2ViYXR0ZXJ5c3RhcGxl'")
    assert redacted([CHECKS["secrets"]], "token = aaaaaaaaaaaaaaaaaaaa") == "token = aaaaaaaaaaaaaaaaaaaa"


@given(st.from_regex(r"[3-6][0-9]{11,17}", fullmatch=True))
def test_every_number_has_one_check_digit(number: str) -> None:
    assert sum(luhn(number + digit) for digit in "0123456789") == 1


def test_bundled_evaluators_name_themselves_and_where_they_work() -> None:
    assert REGISTRY.types == (
        "http", "json_schema", "llm_judge", "max_length", "pii", "prompt_injection", "regex", "secrets"
    )  # fmt: skip
    for each in REGISTRY:
        assert each.directions <= ALL_DIRECTIONS
    assert issubclass(SpanCheck, Check)


def test_events_of_no_dialect_are_judged_as_text() -> None:
    holder = Holder("openai.chat")
    _, repeats = holder.take([Event(b"data: " + CARD.encode() + b"\n\n"), Event(b"data: [DONE]\n\n")])
    assert [repeat.text.text for repeat in repeats] == [CARD]
    assert holder.release() == b""
    repeats[0].new = "[card]"
    assert holder.release() == b"data: [card]\n\ndata: [DONE]\n\n"
