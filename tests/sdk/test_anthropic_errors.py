"""The official anthropic package through the gateway: every refusal is the SDK's own exception."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import anthropic
import attrs
import pytest
from anthropic.types import MessageParam

from penstock.errors import STATUS_OF_CODE
from sdk.expected import RETRIES, attempts_for, should_retry_field
from sdk.gateway_process import MAX_BODY_BYTES, RunningGateway

HELLO: list[MessageParam] = [{"role": "user", "content": "Hi there"}]
KINDS: dict[int, tuple[type[anthropic.APIStatusError], str]] = {
    400: (anthropic.BadRequestError, "invalid_request_error"),
    401: (anthropic.AuthenticationError, "authentication_error"),
    402: (anthropic.PaymentRequiredError, "billing_error"),
    403: (anthropic.PermissionDeniedError, "permission_error"),
    404: (anthropic.NotFoundError, "not_found_error"),
    405: (anthropic.APIStatusError, "invalid_request_error"),
    408: (anthropic.RequestTimeoutError, "invalid_request_error"),
    413: (anthropic.ContentTooLargeError, "request_too_large"),
    415: (anthropic.APIStatusError, "invalid_request_error"),
    426: (anthropic.APIStatusError, "invalid_request_error"),
    429: (anthropic.RateLimitError, "rate_limit_error"),
    500: (anthropic.InternalServerError, "api_error"),
    502: (anthropic.InternalServerError, "api_error"),
    503: (anthropic.ServiceUnavailableError, "overloaded_error"),
    504: (anthropic.GatewayTimeoutError, "timeout_error"),
}
"""Status → the exception's class and its ``type``."""


@attrs.define(eq=False)
class Caller:
    """A client that remembers the requests it sent."""

    client: anthropic.Anthropic
    sent: list[object]


Connect = Callable[..., Caller]
Ask = Callable[[anthropic.Anthropic], object]


@pytest.fixture
def connect(gateway: RunningGateway) -> Iterator[Connect]:
    with ExitStack() as stack:

        def make(key: str = "dev", **options: Any) -> Caller:
            sent: list[object] = []
            http_client = anthropic.DefaultHttpxClient(verify=False, event_hooks={"request": [sent.append]})
            client = anthropic.Anthropic(
                base_url=gateway.url,
                api_key=gateway.keys[key],
                http_client=http_client,
                **{"max_retries": RETRIES, **options},
            )
            return Caller(stack.enter_context(client), sent)

        yield make


def message(model: str, text: str = "Hi there", **options: Any) -> Ask:
    return lambda client: client.messages.create(
        model=model, max_tokens=100, messages=[{"role": "user", "content": text}], **options
    )


def _check(error: anthropic.APIStatusError, code: str) -> dict[str, Any]:
    """Assert class, type, code and request id; returns the error member of the body."""
    status = STATUS_OF_CODE[code]
    kind, word = KINDS[status]
    assert type(error) is kind
    assert (error.status_code, error.type) == (status, word)
    body = error.body
    assert isinstance(body, dict)
    detail: dict[str, Any] = body["error"]
    headers = error.response.headers
    assert detail["code"] == headers["x-penstock-error"] == code
    assert error.request_id == body["request_id"] == headers["x-penstock-request-id"]
    return detail


# --- refusals as they come about ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "key", "ask"),
    [
        ("invalid_api_key", "unknown", message("mock-claude")),
        ("virtual_key_revoked", "revoked", message("mock-claude")),
        ("virtual_key_disabled", "disabled", message("mock-claude")),
        ("virtual_key_expired", "expired", message("mock-claude")),
        ("model_not_allowed", "limited", message("mock-claude")),
        ("missing_model", "dev", message("")),
        ("model_not_recognized", "declared", message("other-model")),
        ("provider_not_bound", "dev", message("anthropic/claude-haiku-4-5")),
        (
            "bad_request",
            "dev",
            lambda client: client.post("/v1/messages", cast_to=object, content=b'{"model"'),
        ),
        ("payload_too_large", "dev", message("mock-claude", "x" * 40 * MAX_BODY_BYTES)),
        ("unsupported_encoding", "dev", message("mock-claude", extra_headers={"content-encoding": "x-own"})),
        ("not_found", "dev", lambda client: client.files.list()),
        ("not_found", "dev", lambda client: client.messages.batches.list()),
        ("method_not_allowed", "dev", lambda client: client.get("/v1/messages", cast_to=object)),
        ("provider_error", "dev", message("mock/reset")),
        ("provider_error", "dead", message("any-model")),
        ("upstream_timeout", "impatient", message("mock-claude")),
    ],
)
def test_refusal_raises_the_sdks_class(connect: Connect, code: str, key: str, ask: Ask) -> None:
    caller = connect(key)
    with pytest.raises(anthropic.APIStatusError) as caught:
        ask(caller.client)
    _check(caught.value, code)
    assert len(caller.sent) == attempts_for(code)


@pytest.mark.parametrize("code", sorted(STATUS_OF_CODE))
def test_every_code_has_a_class_and_is_retried_only_if_that_helps(connect: Connect, code: str) -> None:
    caller = connect()
    with pytest.raises(anthropic.APIStatusError) as caught:
        message("mock-claude", extra_headers={"x-test-refuse": code})(caller.client)
    detail = _check(caught.value, code)
    assert detail["meta"] == {"rule": "instruments"}
    assert len(caller.sent) == attempts_for(code)
    assert caught.value.response.headers.get("x-should-retry") == should_retry_field(code)


def test_refusals_of_count_tokens_have_the_same_shape(connect: Connect) -> None:
    with pytest.raises(anthropic.APIStatusError) as caught:
        connect("limited").client.messages.count_tokens(model="mock-claude", messages=HELLO)
    _check(caught.value, "model_not_allowed")


def test_unknown_model_in_the_listing_is_not_found(connect: Connect) -> None:
    with pytest.raises(anthropic.NotFoundError):
        connect().client.models.retrieve("no-such-model")


def test_a_stream_that_is_refused_raises_before_its_first_event(connect: Connect) -> None:
    with pytest.raises(anthropic.APIStatusError) as caught:
        message("mock-claude", stream=True)(connect("limited").client)
    _check(caught.value, "model_not_allowed")


# --- errors of the provider ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 429, 500, 503, 529])
def test_providers_errors_pass_unchanged(connect: Connect, status: int) -> None:
    caller = connect()
    own = {
        409: anthropic.ConflictError,
        422: anthropic.UnprocessableEntityError,
        529: anthropic.OverloadedError,
    }
    with pytest.raises(anthropic.APIStatusError) as caught:
        message(f"mock/fault-{status}")(caller.client)
    error = caught.value
    assert type(error) is (own[status] if status in own else KINDS[status][0])
    assert f"status {status}" in (error.api_message or "")
    assert "x-penstock-error" not in error.response.headers
    assert len(caller.sent) == (1 + RETRIES if status in (409, 429) or status >= 500 else 1)


def test_stream_that_begins_with_an_error_raises_it(connect: Connect) -> None:
    stream = connect().client.messages.create(model="mock/error-first", max_tokens=100, messages=HELLO, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="error first") as caught:
        next(stream)
    assert caught.value.type == "overloaded_error"


# --- failures in the middle ---------------------------------------------------------------------------------


def test_message_stream_cut_in_the_middle_raises_after_its_events(connect: Connect) -> None:
    caller = connect()
    stream = caller.client.messages.create(model="mock/cut;after=5", max_tokens=100, messages=HELLO, stream=True)
    kinds: list[str] = []
    with pytest.raises(anthropic.APIStatusError) as caught:
        kinds.extend(event.type for event in stream)
    assert kinds == ["message_start", "content_block_start", "content_block_delta", "content_block_delta"]
    _is_cut(caught.value, caller)


def test_stream_helper_raises_when_the_stream_is_cut(connect: Connect) -> None:
    caller = connect()
    with (
        pytest.raises(anthropic.APIStatusError) as caught,
        caller.client.messages.stream(model="mock/cut;after=5", max_tokens=100, messages=HELLO) as stream,
    ):
        stream.get_final_message()
    _is_cut(caught.value, caller)


def _is_cut(error: anthropic.APIStatusError, caller: Caller) -> None:
    """The status was 200 when the stream began; type and code say what happened then."""
    assert (error.status_code, error.type) == (200, "api_error")
    assert isinstance(error.body, dict)
    assert error.body["error"]["code"] == "upstream_mid_stream_failure"
    assert len(caller.sent) == 1


def test_body_cut_in_the_middle_is_a_connection_error_and_tried_again(connect: Connect) -> None:
    caller = connect(max_retries=1)
    with pytest.raises(anthropic.APIConnectionError):
        message("mock/cut")(caller.client)
    assert len(caller.sent) == 2


# --- asynchronous -------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_async_client_raises_the_same(gateway: RunningGateway) -> None:
    options: dict[str, Any] = {"base_url": gateway.url, "max_retries": 0}
    async with anthropic.AsyncAnthropic(api_key=gateway.keys["revoked"], **options) as client:
        with pytest.raises(anthropic.PermissionDeniedError) as refused:
            await client.messages.create(model="mock-claude", max_tokens=100, messages=HELLO)
        _check(refused.value, "virtual_key_revoked")
    async with anthropic.AsyncAnthropic(api_key=gateway.key, **options) as client:
        with pytest.raises(anthropic.InternalServerError) as failed:
            await client.messages.create(model="mock/reset", max_tokens=100, messages=HELLO)
        _check(failed.value, "provider_error")
        async with client.messages.stream(model="mock/cut", max_tokens=100, messages=HELLO) as stream:
            with pytest.raises(anthropic.APIStatusError) as cut:
                await stream.get_final_message()
        assert cut.value.type == "api_error"
