"""What policy rules find in a body, however it is spelled, and what their patterns cost."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import PatternRules, PolicyRules, RequestError
from penstock.testing.strategies import json_strings
from penstock_plugins.policy_rules.contents import DepthError, declared, place_of, urls_in
from penstock_plugins.policy_rules.judging import judge_body
from penstock_plugins.policy_rules.patterns import PatternError, RuleSet, compile_rules


def rules(**kinds: PatternRules) -> list[RuleSet]:
    found = compile_rules(PolicyRules(**kinds), "vk_1", "virtual key")
    assert found is not None
    return [found]


def found_in(body: Any) -> list[tuple[str, str, str]]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return [(found.kind, found.place, found.value) for found in declared(raw)]


def plain_urls(body: bytes) -> list[str]:
    return [url.plain for url in urls_in(body)]


# --- tools and servers ------------------------------------------------------------------------------------------------


def test_tools_of_every_dialect_are_found_where_they_stand() -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "tools": {"type": "array"}}}
    body = {
        "messages": [{"tools": [{"name": "not a tool"}]}],
        "tools": [
            {"type": "function", "function": {"name": "chat", "parameters": schema}},
            {"name": "anthropic", "input_schema": schema},
            {"type": "bash_20250124", "name": "bash"},
            {"type": "web_search"},
            {"type": "custom", "name": "free"},
            {"functionDeclarations": [{"name": "gemini", "parameters": schema}, {"name": "second"}]},
            {"function_declarations": [{"name": "snake"}], "googleSearch": {}},
            {"type": "namespace", "name": "crm", "tools": [{"type": "function", "name": "inner"}]},
            7,
        ],
        "functions": [{"name": "legacy"}],
        "web_search_options": {},
    }
    assert found_in(body) == [
        ("tools", "tools[0].function.name", "chat"),
        ("tools", "tools[1].name", "anthropic"),
        ("tools", "tools[2].type", "bash_20250124"),
        ("tools", "tools[2].name", "bash"),
        ("tools", "tools[3].type", "web_search"),
        ("tools", "tools[4].name", "free"),
        ("tools", "tools[5].functionDeclarations[0].name", "gemini"),
        ("tools", "tools[5].functionDeclarations[1].name", "second"),
        ("tools", "tools[6].function_declarations[0].name", "snake"),
        ("tools", "tools[6].googleSearch", "googleSearch"),
        ("tools", "tools[7].name", "crm"),
        ("tools", "tools[7].tools[0].name", "inner"),
        ("tools", "functions[0].name", "legacy"),
        ("tools", "web_search_options", "web_search_options"),
    ]


def test_servers_of_every_dialect_are_found_where_they_stand() -> None:
    body = {
        "mcp_servers": [{"type": "url", "name": "a", "url": "https://a.example/mcp", "authorization_token": "s"}],
        "tools": [
            {"type": "mcp", "server_label": "b", "server_url": "https://b.example", "authorization": "s"},
            {"type": "mcp", "server_label": "c", "connector_id": "connector_gmail"},
            {"type": "mcp_toolset", "mcp_server_name": "a"},
        ],
    }
    assert found_in(body) == [
        ("mcp", "mcp_servers[0].name", "a"),
        ("mcp", "mcp_servers[0].url", "https://a.example/mcp"),
        ("mcp", "tools[0].server_label", "b"),
        ("mcp", "tools[0].server_url", "https://b.example"),
        ("mcp", "tools[1].server_label", "c"),
        ("mcp", "tools[1].connector_id", "connector_gmail"),
        ("mcp", "tools[2].mcp_server_name", "a"),
    ]


@given(json_strings(st.just("tools")), json_strings(st.just("name")), json_strings())
def test_tools_are_found_in_any_spelling(tools: bytes, name: bytes, value: bytes) -> None:
    body = b'{"a":1, %b : [ {%b:%b} ] }' % (tools, name, value)
    assert found_in(body) == [("tools", "tools[0].name", json.loads(value))]


def test_every_duplicate_counts() -> None:
    body = b'{"tools":[{"name":"a","name":"b"}],"tools":[{"name":"c","function":{"name":"d"},"function":{"name":"e"}}]}'
    assert [value for _, _, value in found_in(body)] == ["a", "b", "c", "d", "e"]


def test_tools_nested_beyond_reason_are_refused() -> None:
    with pytest.raises(DepthError):
        found_in(b'{"tools":' + b'[{"tools":' * 50 + b"[]" + b"}]" * 50 + b"}")
    deep = b'{"tools":' + b'[{"tools":' * 5000 + b"[]" + b"}]" * 5000 + b"}"
    with pytest.raises(RequestError) as refused:
        judge_body(deep, rules(tools=PatternRules(deny=("x",))))
    assert refused.value.code == "bad_request"


@pytest.mark.parametrize("body", [b"", b"[]", b"not JSON", b'{"tools":[', b'{"tools":[]} x', b"\xff\xfe{\x00}\x00"])
def test_what_cannot_be_judged_is_refused(body: bytes) -> None:
    for kinds in ({"tools": PatternRules(deny=("x",))}, {"urls": PatternRules(deny=("x",))}):
        with pytest.raises(RequestError) as refused:
            judge_body(body, rules(**kinds))
        assert refused.value.code == "bad_request"


# --- URLs -------------------------------------------------------------------------------------------------------------


@given(json_strings(st.just("see https://Evil.example/a?b=1#c, ok")), json_strings())
def test_a_url_is_found_in_any_spelling_of_its_string(spelled: bytes, other: bytes) -> None:
    body = b'{"messages":[%b,{"content":%b}]}' % (other, spelled)
    assert "https://evil.example/a?b=1#c" in plain_urls(body)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"u":"HTTPS://EVIL.example/Path"}', ["https://evil.example/Path"]),
        (b'{"u":"http:\\/\\/evil.example\\/p"}', ["http://evil.example/p"]),
        (b'{"u":"\\u0068ttp\\u003a//evil.example"}', ["http://evil.example"]),
        (b'{"https://in.a.name/x":1}', ["https://in.a.name/x"]),
        (b'{"arguments":"{\\"u\\":\\"https:\\\\/\\\\/evil.example\\\\/p\\"}"}', ["https://evil.example/p"]),
        (b'{"arguments":"{\\"u\\":\\"\\\\u0068ttps://evil.example\\"}"}', ["https://evil.example"]),
        (b'{"u":"a\\nhttps://a.example\\thttp://b.example\\n"}', ["https://a.example", "http://b.example"]),
        (b'{"u":"(https://a.example/x)."}', ["https://a.example/x"]),
        (b'{"u":"https://ev%69l.example/%69"}', ["https://evil.example/%69"]),
        (b'{"u":"https://a.example/\\u00e9\\u4e2d"}', ["https://a.example/\u00e9\u4e2d"]),
        (b'{"u":"https://a.example,https://b.example/?to=http://c.example"}',
         ["https://a.example", "https://b.example/?to=", "http://c.example"]),
        (b'{"u":"http:/a https:b ftp://c"}', []),
        (b'{"u":"https://' + "é.example".encode() + b'"}', ["https://é.example"]),
    ],
)  # fmt: skip
def test_urls_are_read_as_whoever_fetches_them_would(body: bytes, expected: list[str]) -> None:
    assert plain_urls(body) == expected


def test_denial_sees_a_url_whole_and_in_parts() -> None:
    (whole, inner) = urls_in(b'["https://a.example/?to=https://b.example"]')
    assert "https://a.example/?to=https://b.example" in whole.spellings
    assert inner.spellings == ("https://b.example",)


def test_allowlist_cannot_be_passed_by_gluing_urls_together() -> None:
    allowed = rules(urls=PatternRules(allow=(r"^https://ok\.example(/|$)",)))
    judge_body(b'{"a":"https://ok.example https://OK.example/x."}', allowed)
    for glued in ("https://ok.example/,https://evil.example", "https://ok.example@evil.example", "http://ok.example"):
        with pytest.raises(RequestError) as refused:
            judge_body(json.dumps({"messages": [{"content": [{"text": glued}]}]}).encode(), allowed)
        assert (refused.value.code, refused.value.param) == ("url_not_allowed", "messages[0].content[0].text")


@given(st.recursive(st.just("x"), lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("ab"), inner)))
def test_place_points_at_the_string(tree: Any) -> None:
    body = json.dumps({"z": tree, "deep": [tree, {"u": 'go "https://a.example/x"'}]}).encode()
    (url,) = urls_in(body)
    assert place_of(body, url.plain) == "deep[1].u"


# --- patterns ---------------------------------------------------------------------------------------------------------


def test_each_name_is_judged_by_itself_and_deny_wins() -> None:
    judged = rules(tools=PatternRules(deny=("shell",), allow=("^get_", "^shell", "bash")))
    judge_body(b'{"tools":[{"name":"get_x"},{"type":"bash_1","name":"bash"}]}', judged)
    for body, rule in [
        (b'{"tools":[{"name":"get_shell"}]}', "policy_rules.tools.deny[0]"),
        (b'{"tools":[{"type":"web_search","name":"get_x"}]}', "policy_rules.tools.allow"),
    ]:
        with pytest.raises(RequestError) as refused:
            judge_body(body, judged)
        assert refused.value.meta["rule"] == rule


def test_empty_allowlist_admits_nothing() -> None:
    judge_body(b'{"tools":[]}', rules(tools=PatternRules(allow=())))
    with pytest.raises(RequestError):
        judge_body(b'{"tools":[{"name":""}]}', rules(tools=PatternRules(allow=())))


@pytest.mark.parametrize("pattern", ["(", "(?=x)", "(a)\\1", "\ud800", "a{2,1}"])
def test_what_re2_does_not_compile_is_named(pattern: str) -> None:
    with pytest.raises(PatternError) as raised:
        compile_rules(PolicyRules(urls=PatternRules(deny=("ok", pattern))), "vk_1", "virtual key")
    assert str(raised.value).startswith(f"policy_rules.urls.deny[1]: {pattern!r} is no pattern RE2 compiles: ")


MIB = 1024 * 1024
BACKTRACKING = ["(a+)+$", "(a|a)*b", "(.*a){12}$", "^(([a-z])+.)+[A-Z]([a-z])+$", "(x+x+)+y"]


def seconds(body: bytes, rule_sets: list[RuleSet]) -> float:
    """Return the least of some tries: what else the machine does only adds."""
    tries = []
    for _ in range(3):
        start = time.perf_counter()
        judge_body(body, rule_sets)
        tries.append(time.perf_counter() - start)
    return min(tries)


FILLERS = {
    "one long URL": lambda size: b'{"u":"http://%b"}' % (b"a" * size),
    "URLs one after the other": lambda size: b'{"u":"%b"}' % (b"http://" * (size // 7)),
    "URLs apart": lambda size: b'{"u":"%b"}' % b" ".join(b"http://a%d" % n for n in range(size // 14)),
    "backslashes": lambda size: b'{"u":"http://a%b"}' % (b"\\\\" * (size // 2)),
    "escaped slashes": lambda size: b'{"u":"http://a%b"}' % (b"\\/" * (size // 2)),
    "escapes": lambda size: b'{"u":"http://a%b"}' % (b"\\u4e2d" * (size // 6)),
    "ASCII escapes": lambda size: b'{"u":"http://a%b"}' % (b"\\u0061" * (size // 6)),
    "a tool's name": lambda size: b'{"tools":[{"name":"%b"}]}' % (b"a" * size),
    "many tools": lambda size: b'{"tools":[%b]}' % b",".join([b'{"name":"aaaa","x":{"y":[1]}}'] * (size // 29)),
    "quotes": lambda size: b'{"u":["http://a"%b]}' % (b',""' * (size // 3)),
}


@pytest.mark.parametrize("filler", FILLERS)
def test_a_mebibyte_takes_linear_time_whatever_the_pattern(filler: str) -> None:
    patterns = PatternRules(deny=tuple(f"{pattern}\\d{{9}}" for pattern in BACKTRACKING))
    judged = rules(tools=patterns, urls=patterns)
    small, large = FILLERS[filler](MIB // 16), FILLERS[filler](MIB)
    ratio = seconds(large, judged) / seconds(small, judged)
    assert ratio < 16 * 6  # quadratic would be 256
