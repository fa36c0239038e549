"""The provider classes others build on: what they build, which settings they take, where usage is read."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from penstock import (
    AnthropicProvider,
    BodyWindow,
    Candidate,
    ConfigurationError,
    OpenAIProvider,
    Principal,
    ProviderBinding,
    Secret,
    Services,
    Usage,
    hookimpl,
)
from penstock.http_providers import OPENAI_DIALECTS, HTTPProvider
from penstock.testing import SAMPLES, FakeUpstream, Harness, Sample, sample_exchange, stream_reply
from penstock_plugins.providers.openai import OpenAI

OPENAI = OpenAIProvider(type="openai_compatible")
ANTHROPIC = AnthropicProvider(type="anthropic", default_base_url="https://api.anthropic.com")
_NUMBERS = itertools.count(1)
STREAM = b'{ "model" : "m","messages":[], "stream" : true%b}'
FRAME = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'


def bound(provider: HTTPProvider, base_url: str = "http://h/v1", **settings: Any) -> ProviderBinding:
    return ProviderBinding(f"gpc_{next(_NUMBERS)}", "b", provider.type, base_url, Secret("sk-up"), **settings)


def chat(extra: bytes = b"", path: str = "/v1/chat/completions") -> Sample:
    return Sample("POST", path, STREAM % extra, is_stream=True)


# --- asking for usage -----------------------------------------------------------------------------------------------


def test_chat_stream_is_asked_for_usage_and_what_that_adds_is_taken_out() -> None:
    exchange = sample_exchange(chat())
    request = OPENAI.build(exchange, Candidate(bound(OPENAI), OPENAI, "m"))
    assert json.loads(request.body)["stream_options"] == {"include_usage": True}
    assert request.body.startswith(b'{ "model" : "m","messages":[], "stream" : true')
    assert request.response_filter is not None
    assert request.response_filter.feed(FRAME) + request.response_filter.finish() == b""
    assert b"accept-encoding: identity\r\n" in request.fields


@pytest.mark.parametrize("value", [b"true", b"false"])
def test_client_that_sets_the_option_gets_what_it_asked_for(value: bytes) -> None:
    sample = chat(b',"stream_options":{"include_usage":%b}' % value)
    request = OPENAI.build(sample_exchange(sample), Candidate(bound(OPENAI), OPENAI, "m"))
    assert (request.body, request.response_filter) == (sample.body, None)


FRAMES = [
    (None, None, True),
    (None, "strip", True),
    (None, "forward", False),
    ("strip", "forward", True),
    ("forward", None, False),
    ("forward", "strip", False),
]


@pytest.mark.parametrize(("key", "binding", "strips"), FRAMES)
def test_setting_of_the_key_wins_over_the_bindings(key: Any, binding: Any, strips: bool) -> None:
    exchange = sample_exchange(chat())
    exchange.principal = Principal("vk_a", "a", "a", usage_frame=key)
    request = OPENAI.build(exchange, Candidate(bound(OPENAI, usage_frame=binding), OPENAI, "m"))
    assert (request.response_filter is not None) is strips
    assert b"include_usage" in request.body


@pytest.mark.parametrize(("binding", "strips"), [(None, False), ("strip", True)])
def test_setting_of_the_gateway_counts_where_nobody_else_says(binding: Any, strips: bool) -> None:
    provider = OpenAIProvider(type="openai_compatible", usage_frame="forward")
    request = provider.build(sample_exchange(chat()), Candidate(bound(provider, usage_frame=binding), provider, "m"))
    assert (request.response_filter is not None) is strips


@pytest.mark.anyio
@pytest.mark.parametrize("setting", ["strip", "forward"])
async def test_setting_of_the_gateway_reaches_the_bundled_providers(setting: str) -> None:
    async with Harness(["openai", "openai_compatible", "mock"], gateway={"usage_frame": setting}) as harness:
        found = harness.gateway.generation.services.providers.types
        for kind in ("openai", "openai_compatible", "mock"):
            provider = found[kind]
            assert isinstance(provider, OpenAIProvider)
            assert provider.usage_frame == setting


def test_usage_and_another_model_are_two_edits_of_one_body() -> None:
    request = OPENAI.build(sample_exchange(chat()), Candidate(bound(OPENAI), OPENAI, "other"))
    assert json.loads(request.body) == {
        "model": "other", "messages": [], "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


@pytest.mark.parametrize("sample", [sample for sample in SAMPLES if "chat" not in sample.path], ids=str)
def test_other_endpoints_are_not_asked_for_usage(sample: Sample) -> None:
    exchange = sample_exchange(sample)
    provider: HTTPProvider = ANTHROPIC if exchange.request.endpoint.family == "anthropic" else OPENAI
    model = exchange.peek.model if exchange.request.endpoint.has_model else None
    assert isinstance(provider, OpenAIProvider | AnthropicProvider)
    request = provider.build(exchange, Candidate(bound(provider), provider, model))
    assert (request.body, request.response_filter) == (sample.body, None)
    assert request.method == sample.method.encode()


# --- settings -------------------------------------------------------------------------------------------------------


def test_unknown_setting_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigurationError, match=r"binding 'b': settings\.keyheader: unknown; .* knows key_header"):
        OPENAI.check(bound(OPENAI, settings={"keyheader": "x"}))


def test_provider_without_settings_says_so() -> None:
    provider = OpenAIProvider(type="plain", known_settings=())
    with pytest.raises(ConfigurationError, match="plain knows none"):
        provider.check(bound(provider, settings={"a": 1}))


def test_base_url_of_the_type_is_used_where_the_binding_has_none() -> None:
    binding = bound(ANTHROPIC, "")
    ANTHROPIC.check(binding)
    assert str(ANTHROPIC.address(binding).origin) == "https://api.anthropic.com:443"
    with pytest.raises(ConfigurationError, match="base_url: is missing"):
        OPENAI.check(bound(OPENAI, ""))


def test_address_is_put_together_once() -> None:
    binding = bound(OPENAI)
    assert OPENAI.address(binding) is OPENAI.address(binding)


def test_origin_carries_proxy_and_http2() -> None:
    origin = OPENAI.address(bound(OPENAI, "https://h", proxy="http://p:1", http2=True)).origin
    assert (origin.scheme, origin.host, origin.port, origin.proxy, origin.http2) == (
        "https", "h", 443, "http://p:1", True,
    )  # fmt: skip


def test_openai_guesses_its_own_models_only() -> None:
    (provider,) = OpenAI(Services()).register_providers()
    own = ("gpt-5", "o1", "o3-mini", "o9", "chatgpt-4o-latest", "text-embedding-3-small", "ft:gpt-4o:a::b", "sora-2")
    others = ("claude-x", "gemini-x", "llama-3", "openai-gpt", "o", "mistral", "olmo-2")
    assert all(model.startswith(provider.model_prefixes) for model in own)
    assert not any(model.startswith(provider.model_prefixes) for model in others)
    assert provider.dialects == OPENAI_DIALECTS


# --- reading usage --------------------------------------------------------------------------------------------------


def window(body: bytes) -> BodyWindow:
    return BodyWindow(body, b"", len(body))


def test_openai_counts_cached_tokens_out_of_the_prompt() -> None:
    body = b'{"usage":{"prompt_tokens":10,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}'
    exchange = sample_exchange(SAMPLES[0])
    assert OPENAI.read_usage(exchange, window(body)) == Usage(6, 4, output=3)
    assert OPENAI.read_usage(exchange, window(b'{"id":"x"}')) is None


def test_anthropic_counts_messages_and_no_counting_of_tokens() -> None:
    body = b'{"usage":{"input_tokens":5,"cache_read_input_tokens":2,"output_tokens":3}}'
    by_path = {sample.path: sample for sample in SAMPLES if not sample.is_stream}
    assert ANTHROPIC.read_usage(sample_exchange(by_path["/v1/messages"]), window(body)) == Usage(5, 2, output=3)
    counted = sample_exchange(by_path["/v1/messages/count_tokens"])
    assert ANTHROPIC.read_usage(counted, window(b'{"input_tokens":5}')) is None


# --- what the gateway says for every provider -----------------------------------------------------------------------


class Plain:
    """Bring a provider without telling it what the gateway is configured to do."""

    provider = OpenAIProvider(type="plain")

    @hookimpl
    def register_providers(self) -> list[OpenAIProvider]:
        return [self.provider]


class Stubborn(Plain):
    """Bring one that strips whatever the gateway says."""

    provider = OpenAIProvider(type="plain", usage_frame="strip")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("plugin", "setting", "forwards"),
    [(Plain, "forward", True), (Plain, "strip", False), (Stubborn, "forward", False)],
)
async def test_provider_that_says_nothing_of_the_usage_frame_does_what_the_gateway_says(
    plugin: type[Plain], setting: str, forwards: bool
) -> None:
    upstream = FakeUpstream([stream_reply(FRAME, b"data: [DONE]\n\n")])
    bindings = [{"name": "b", "type": "plain"}]
    async with Harness([plugin], None, upstream, gateway={"usage_frame": setting}, bindings=bindings) as gateway:
        asked = {"model": "m", "messages": [], "stream": True}
        reply = await gateway.request("POST", "/v1/chat/completions", body=asked)
        assert (FRAME in reply.body) is forwards
        assert gateway.exchanges[0].usage is not None
