"""Check a provider adapter: what it says of itself, pure building, reading usage out of anything."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from typing import Any

from hypothesis import strategies as st

from penstock.endpoints import ALL
from penstock.errors import RequestError
from penstock.forwarding import put_model
from penstock.inspection import editable_body
from penstock.metering import HEAD_BYTES, BodyWindow
from penstock.models import Candidate, Exchange, ProviderBinding, Secret, Usage
from penstock.providers import Provider, UpstreamRequest
from penstock.testing.byte_exact import run_property
from penstock.testing.samples import CLIENT_KEY, SAMPLES, Sample, sample_exchange
from penstock.testing.strategies import json_bodies, sse_streams

DIALECTS = frozenset(endpoint.dialect for endpoint in ALL)
_METHODS = {"check": 1, "build": 2, "read_usage": 2}
_OTHER_MODEL = "another-model/2"
_SECRETS = (
    (b"X-Api-Key", CLIENT_KEY.encode()),
    (b"Api-Key", CLIENT_KEY.encode()),
    (b"X-Goog-Api-Key", CLIENT_KEY.encode()),
    (b"Cookie", b"session=" + CLIENT_KEY.encode()),
)


def check_provider(
    provider: Provider, binding: ProviderBinding | None = None, *, translates: Collection[str] = ()
) -> None:
    """Check that an object is a provider the gateway can rely on. Raises AssertionError.

    ``binding``: an account it can work with; without one a binding with its default base URL is made.
    ``translates``: dialects whose request bodies it rewrites; all others must be forwarded byte for byte.
    """
    _check_shape(provider)
    account = binding or _binding_for(provider)
    provider.check(account)
    built = 0
    for sample in SAMPLES:
        exchange = sample_exchange(sample, _SECRETS)
        if exchange.request.endpoint.dialect in provider.dialects:
            built += _check_build(provider, account, sample, exact=exchange.request.endpoint.dialect not in translates)
    assert built, f"{provider.type}: build refuses every sample of its dialects {sorted(provider.dialects)}"
    _check_read_usage(provider, account)


def _check_shape(provider: Any) -> None:
    where = type(provider).__name__
    assert isinstance(getattr(provider, "type", None), str), f"{where}.type must be a string"
    assert provider.type, f"{where}.type must not be empty"
    dialects = getattr(provider, "dialects", None)
    assert isinstance(dialects, frozenset), f"{where}.dialects must be a frozenset of names"
    unknown = sorted(dialects - DIALECTS)
    assert not unknown, f"{where}.dialects: {', '.join(unknown)} unknown; there are {', '.join(sorted(DIALECTS))}"
    assert dialects, f"{where}.dialects is empty: no request would ever come"
    prefixes = getattr(provider, "model_prefixes", None)
    is_strings = isinstance(prefixes, tuple) and all(isinstance(prefix, str) and prefix for prefix in prefixes)
    assert is_strings, f"{where}.model_prefixes must be a tuple of non-empty strings"
    default = getattr(provider, "default_base_url", "")
    assert default is None or (isinstance(default, str) and default), f"{where}.default_base_url: a URL or None"
    for name, count in _METHODS.items():
        method = getattr(provider, name, None)
        assert callable(method), f"{where}.{name} is missing"
        assert not inspect.iscoroutinefunction(method), f"{where}.{name} must be a plain function, not async"
        taken = len(inspect.signature(method).parameters)
        assert taken == count, f"{where}.{name} must take {count} argument(s), takes {taken}"


def _binding_for(provider: Provider) -> ProviderBinding:
    base_url = provider.default_base_url or "https://provider.test/v1"
    return ProviderBinding("gpc_check", "check", provider.type, base_url, Secret("sk-the-upstream-s"))


def _check_build(provider: Provider, binding: ProviderBinding, sample: Sample, *, exact: bool) -> bool:
    """Build for one sample, with its own model and with another; returns whether the provider took it."""
    exchange = sample_exchange(sample, _SECRETS)
    has_model = exchange.request.endpoint.has_model and exchange.request.endpoint.family != "gemini"
    asked = exchange.peek.model if has_model else None
    where = f"{provider.type}: build for {sample}"
    try:
        for model in (asked, _OTHER_MODEL) if has_model else (asked,):
            built = _built_twice(provider, binding, sample, model, where)
            leaked = CLIENT_KEY.encode() in b"".join((built.path, built.fields, built.body))
            assert not leaked, f"{where} lets the client's credential through to the provider"
            _check_fields(built, where)
            if exact:
                _check_body(built, exchange, None if model == asked else model, where)
    except RequestError:
        return False
    return True


def _built_twice(
    provider: Provider, binding: ProviderBinding, sample: Sample, model: str | None, where: str
) -> UpstreamRequest:
    exchange = sample_exchange(sample, _SECRETS)
    candidate = Candidate(binding, provider, model)
    before, once = exchange.request, provider.build(exchange, candidate)
    assert isinstance(once, UpstreamRequest), f"{where} must return an UpstreamRequest"
    assert exchange.request is before, f"{where} replaces exchange.request: build must be pure"
    again = provider.build(exchange, candidate)
    for name in ("origin", "method", "path", "fields", "body"):
        same = getattr(once, name) == getattr(again, name)
        assert same, f"{where} gives another {name} the second time: build must be pure"
    return once


def _check_fields(built: UpstreamRequest, where: str) -> None:
    assert isinstance(built.body, bytes), f"{where}: body must be bytes"
    lines = built.fields.split(b"\r\n")
    assert lines[-1] == b"", f"{where}: fields must be lines that each end in CRLF"
    assert b"" not in lines[:-1], f"{where}: fields must not hold the blank line"
    names = [line.partition(b":")[0].strip().lower() for line in lines[:-1]]
    assert names.count(b"host") == 1, f"{where}: fields must hold Host once"
    for name in (b"content-length", b"transfer-encoding", b"connection"):
        assert name not in names, f"{where}: {name.decode()} belongs to the transport, not into fields"


def _check_body(built: UpstreamRequest, exchange: Exchange, model: str | None, where: str) -> None:
    expected = exchange.request.body
    if model is not None:
        expected = put_model(exchange.request, editable_body(exchange.request), model)
    changed = "although no model changes" if model is None else "beyond the model"
    assert built.body == expected, f"{where} changes the body {changed}; name its dialect in translates if it must"


def _check_read_usage(provider: Provider, binding: ProviderBinding) -> None:
    """Feed junk, cut-off JSON and event streams to read_usage."""
    exchanges = list(_metered(provider, binding))
    bodies = st.binary(max_size=300) | json_bodies() | sse_streams() | st.sampled_from(_USAGE_LIKE)

    def check(body: bytes, cut: int) -> None:
        window = BodyWindow(body[:cut], body[cut:], len(body))
        for exchange in exchanges:
            try:
                usage = provider.read_usage(exchange, window)
            except Exception as error:
                where = f"{provider.type}: read_usage raises {type(error).__name__} on {body!r}, cut at {cut}"
                raise AssertionError(f"{where}: {error}") from error
            _check_usage(provider, usage, body)

    run_property(check, bodies, st.integers(0, 300))


_USAGE_LIKE = (
    b'{"usage":null}',
    b'{"usage":{"prompt_tokens":-1,"completion_tokens":"2"}}',
    b'{"usage":{"prompt_tokens":1e400,"input_tokens":[]}}',
    b'{"usage":' + b"[" * 2000,
    b'data: {"usage":{"prompt_tokens":%d}}\n\n' % 10**40,
    b'data: {"type":"message_start","message":{"usage":7}}\n\n',
    b"\xff" * (HEAD_BYTES // 64),
)


def _check_usage(provider: Provider, usage: Usage | None, body: bytes) -> None:
    if usage is None:
        return
    where = f"{provider.type}: read_usage on {body[:200]!r}"
    assert isinstance(usage, Usage), f"{where} must return a Usage or None"
    counts = (
        usage.input,
        usage.cache_read,
        usage.cache_write_5m,
        usage.cache_write_1h,
        usage.output,
        usage.reasoning,
    )
    assert all(isinstance(count, int) and count >= 0 for count in counts), f"{where} counts {usage}"


def _metered(provider: Provider, binding: ProviderBinding) -> Iterator[Exchange]:
    for sample in SAMPLES:
        exchange = sample_exchange(sample)
        if exchange.request.endpoint.dialect in provider.dialects:
            exchange.candidate = Candidate(binding, provider, "m")
            exchange.status = 200
            yield exchange
