"""The official openai package through the gateway: every refusal is the SDK's own exception."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import attrs
import openai
import pytest
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from penstock.errors import STATUS_OF_CODE
from sdk.expected import RETRIES, attempts_for, should_retry_field
from sdk.gateway_process import MAX_BODY_BYTES, RunningGateway

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi there"}]
CLASS_OF_STATUS: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    429: openai.RateLimitError,
}


def class_of(status: int) -> type[openai.APIStatusError]:
    return openai.InternalServerError if status >= 500 else CLASS_OF_STATUS.get(status, openai.APIStatusError)


@attrs.define(eq=False)
class Caller:
    """A client that remembers the requests it sent."""

    client: openai.OpenAI
    sent: list[object]


Connect = Callable[..., Caller]
Ask = Callable[[openai.OpenAI], object]


@pytest.fixture
def connect(gateway: RunningGateway) -> Iterator[Connect]:
    with ExitStack() as stack:

        def make(key: str = "dev", **options: Any) -> Caller:
            sent: list[object] = []
            http_client = openai.DefaultHttpxClient(verify=False, event_hooks={"request": [sent.append]})
            client = openai.OpenAI(
                base_url=f"{gateway.url}/v1",
                api_key=gateway.keys[key],
                http_client=http_client,
                **{"max_retries": RETRIES, **options},
            )
            return Caller(stack.enter_context(client), sent)

        yield make


def chat(model: str, text: str = "Hi there") -> Ask:
    return lambda client: client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}])


def _check(error: openai.APIStatusError, code: str) -> dict[str, Any]:
    """Assert class, code, type and request id; returns the body's error member."""
    status = STATUS_OF_CODE[code]
    assert type(error) is class_of(status)
    assert error.status_code == status
    body = error.body
    assert isinstance(body, dict)
    assert set(body) == {"message", "type", "code", "param", "meta"}
    headers = error.response.headers
    assert error.code == error.type == headers["x-penstock-error"] == code
    assert error.request_id == headers["x-penstock-request-id"]
    return body


# --- refusals as they come about ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "key", "ask"),
    [
        ("invalid_api_key", "unknown", chat("mock-gpt")),
        ("virtual_key_revoked", "revoked", chat("mock-gpt")),
        ("virtual_key_disabled", "disabled", chat("mock-gpt")),
        ("virtual_key_expired", "expired", chat("mock-gpt")),
        ("model_not_allowed", "limited", chat("mock-gpt")),
        ("missing_model", "dev", chat("")),
        ("model_not_recognized", "declared", chat("other-model")),
        ("provider_not_bound", "dev", chat("openai/gpt-5-mini")),
        ("bad_request", "dev", lambda client: client.post("/responses", cast_to=object, content=b'{"model"')),
        ("payload_too_large", "dev", chat("mock-gpt", "x" * 40 * MAX_BODY_BYTES)),
        ("unsupported_encoding", "dev",
         lambda client: client.with_options(default_headers={"content-encoding": "x-own"}).responses.create(
             model="mock-gpt", input="Hi there")),
        ("not_found", "dev", lambda client: client.files.list()),
        ("not_found", "dev", lambda client: client.models.retrieve("no-such-model")),
        ("method_not_allowed", "dev", lambda client: client.models.delete("mock-gpt")),
        ("provider_error", "dev", chat("mock/reset")),
        ("provider_error", "dead", chat("any-model")),
        ("upstream_timeout", "impatient", chat("mock-gpt")),
    ],
)  # fmt: skip
def test_refusal_raises_the_sdks_class(connect: Connect, code: str, key: str, ask: Ask) -> None:
    caller = connect(key)
    with pytest.raises(openai.APIStatusError) as caught:
        ask(caller.client)
    _check(caught.value, code)
    assert len(caller.sent) == attempts_for(code)


@pytest.mark.parametrize("code", sorted(STATUS_OF_CODE))
def test_every_code_has_a_class_and_is_retried_only_if_that_helps(connect: Connect, code: str) -> None:
    caller = connect()
    with pytest.raises(openai.APIStatusError) as caught:
        caller.client.chat.completions.create(model="mock-gpt", messages=HELLO, extra_headers={"x-test-refuse": code})
    assert _check(caught.value, code)["meta"] == {"rule": "instruments"}
    assert caught.value.param == "model"
    assert len(caller.sent) == attempts_for(code)
    assert caught.value.response.headers.get("x-should-retry") == should_retry_field(code)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stream_that_is_refused_raises_before_its_first_chunk(connect: Connect, stream: bool) -> None:
    with pytest.raises(openai.PermissionDeniedError) as caught:
        connect("limited").client.chat.completions.create(model="mock-gpt", messages=HELLO, stream=stream)
    assert caught.value.code == "model_not_allowed"


# --- errors of the provider ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 429, 500, 503, 529])
def test_providers_errors_pass_unchanged(connect: Connect, status: int) -> None:
    caller = connect()
    classes = {**CLASS_OF_STATUS, 409: openai.ConflictError, 422: openai.UnprocessableEntityError}
    with pytest.raises(openai.APIStatusError) as caught:
        chat(f"mock/fault-{status}")(caller.client)
    error = caught.value
    assert type(error) is (openai.InternalServerError if status >= 500 else classes[status])
    assert error.code == "mock_fault"
    assert "x-penstock-error" not in error.response.headers
    assert error.response.headers["x-penstock-provider"] == "mock"
    assert len(caller.sent) == (1 + RETRIES if status in (409, 429) or status >= 500 else 1)


def test_stream_that_begins_with_an_error_raises_it(connect: Connect) -> None:
    stream = connect().client.chat.completions.create(model="mock/error-first", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="error first") as caught:
        next(stream)
    assert caught.value.code == "server_error"


# --- failures in the middle ---------------------------------------------------------------------------------


def test_chat_stream_cut_in_the_middle_raises_after_its_chunks(connect: Connect) -> None:
    caller = connect()
    stream = caller.client.chat.completions.create(model="mock/cut;after=3", messages=HELLO, stream=True)
    chunks: list[ChatCompletionChunk] = []
    with pytest.raises(openai.APIError) as caught:
        chunks.extend(stream)
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "Hello", " from"]
    _is_cut(caught.value, caller)


def test_responses_stream_cut_in_the_middle_raises_after_its_events(connect: Connect) -> None:
    caller = connect()
    stream = caller.client.responses.create(model="mock/cut;after=3", input="Hi there", stream=True)
    kinds: list[str] = []
    with pytest.raises(openai.APIError) as caught:
        kinds.extend(event.type for event in stream)
    assert kinds == ["response.created", "response.in_progress", "response.output_item.added"]
    _is_cut(caught.value, caller)


def test_chat_stream_helper_raises_when_the_stream_is_cut(connect: Connect) -> None:
    caller = connect()
    with (
        caller.client.chat.completions.stream(model="mock/cut", messages=HELLO) as stream,
        pytest.raises(openai.APIError) as caught,
    ):
        stream.get_final_completion()
    _is_cut(caught.value, caller)


def test_responses_stream_helper_raises_when_the_stream_is_cut(connect: Connect) -> None:
    caller = connect()
    with (
        caller.client.responses.stream(model="mock/cut", input="Hi there") as stream,
        pytest.raises(openai.APIError) as caught,
    ):
        stream.get_final_response()
    _is_cut(caught.value, caller)


def _is_cut(error: openai.APIError, caller: Caller) -> None:
    assert type(error) is openai.APIError
    assert (error.code, error.type) == ("upstream_mid_stream_failure", "provider_error")
    assert len(caller.sent) == 1


def test_body_cut_in_the_middle_is_a_connection_error_and_tried_again(connect: Connect) -> None:
    caller = connect(max_retries=1)
    with pytest.raises(openai.APIConnectionError):
        chat("mock/cut")(caller.client)
    assert len(caller.sent) == 2


# --- asynchronous -------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_async_client_raises_the_same(gateway: RunningGateway) -> None:
    options: dict[str, Any] = {"base_url": f"{gateway.url}/v1", "max_retries": 0}
    async with openai.AsyncOpenAI(api_key=gateway.keys["revoked"], **options) as client:
        with pytest.raises(openai.PermissionDeniedError) as refused:
            await client.chat.completions.create(model="mock-gpt", messages=HELLO)
        assert refused.value.code == "virtual_key_revoked"
    async with openai.AsyncOpenAI(api_key=gateway.key, **options) as client:
        with pytest.raises(openai.InternalServerError) as failed:
            await client.chat.completions.create(model="mock/reset", messages=HELLO)
        assert failed.value.code == "provider_error"
        stream = await client.chat.completions.create(model="mock/cut", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError) as cut:
            _ = [chunk async for chunk in stream]
        assert cut.value.code == "upstream_mid_stream_failure"
