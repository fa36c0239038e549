"""The gateway's own errors, in the shape each dialect's SDK raises its exception classes for."""

import importlib
import json
from typing import Any

import anthropic
import openai
import pytest

from penstock import RequestError, Response
from penstock.envelopes import error_response, header_stem, stream_error_payload
from penstock.errors import RETRY_CURES, STATUS_OF_CODE, overloaded

# The SDKs' own HTTP client library has had more than one name.
http_library = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])
CODES = sorted(STATUS_OF_CODE)
REQUEST_ID = b"req_" + b"0" * 30
OPENAI_CLASSES = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    429: openai.RateLimitError,
}
ANTHROPIC_CLASSES = {
    400: anthropic.BadRequestError,
    401: anthropic.AuthenticationError,
    403: anthropic.PermissionDeniedError,
    404: anthropic.NotFoundError,
    413: anthropic.RequestTooLargeError,
    429: anthropic.RateLimitError,
    503: anthropic.ServiceUnavailableError,
    504: anthropic.DeadlineExceededError,
}


def answer(code: str, family: str) -> Response:
    error = RequestError(code, "No, because.", param="model", meta={"rule": 7})
    return error_response(error, family, REQUEST_ID, "penstock")


def transport(code: str, family: str) -> Any:
    response = answer(code, family)
    return http_library.MockTransport(
        lambda _: http_library.Response(response.status, headers=list(response.fields), content=response.body)
    )


@pytest.mark.parametrize("code", CODES)
def test_openai_envelope_names_message_type_code_param_and_meta(code: str) -> None:
    response = answer(code, "openai")
    assert response.status == STATUS_OF_CODE[code]
    assert json.loads(response.body) == {
        "error": {
            "message": "No, because.",
            "type": code,
            "code": code,
            "param": "model",
            "meta": {"rule": 7},
        }
    }


@pytest.mark.parametrize("code", CODES)
def test_anthropic_envelope_uses_anthropics_types(code: str) -> None:
    response = answer(code, "anthropic")
    body = json.loads(response.body)
    assert (body["type"], body["request_id"]) == ("error", REQUEST_ID.decode())
    assert body["error"]["code"] == code
    assert body["error"]["type"] in {
        "invalid_request_error", "authentication_error", "billing_error", "permission_error",
        "not_found_error",
        "request_too_large", "rate_limit_error", "api_error", "overloaded_error", "timeout_error",
    }  # fmt: skip
    assert dict(response.fields)[b"request-id"] == REQUEST_ID


@pytest.mark.parametrize("code", CODES)
def test_gemini_envelope_has_number_status_word_and_reason(code: str) -> None:
    error = json.loads(answer(code, "gemini").body)["error"]
    assert error["code"] == STATUS_OF_CODE[code]
    assert error["status"].isupper()
    assert error["details"][0]["reason"] == code
    assert all(isinstance(value, str) for value in error["details"][0]["metadata"].values())


@pytest.mark.parametrize("code", CODES)
def test_openai_sdk_raises_its_usual_class(code: str) -> None:
    with http_library.Client(transport=transport(code, "openai")) as http:
        client = openai.OpenAI(base_url="http://gateway/v1", api_key="k", max_retries=0, http_client=http)
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="m", messages=[])
    status = STATUS_OF_CODE[code]
    usual = openai.InternalServerError if status >= 500 else OPENAI_CLASSES.get(status, openai.APIStatusError)
    assert type(caught.value) is usual
    assert (caught.value.code, caught.value.type, caught.value.param) == (code, code, "model")


@pytest.mark.parametrize("code", CODES)
def test_anthropic_sdk_raises_its_usual_class(code: str) -> None:
    with http_library.Client(transport=transport(code, "anthropic")) as http:
        client = anthropic.Anthropic(base_url="http://gateway", api_key="k", max_retries=0, http_client=http)
        with pytest.raises(anthropic.APIStatusError) as caught:
            client.messages.create(model="m", max_tokens=1, messages=[])
    status = STATUS_OF_CODE[code]
    default = anthropic.InternalServerError if status >= 500 else anthropic.APIStatusError
    assert isinstance(caught.value, ANTHROPIC_CLASSES.get(status, default))
    assert caught.value.request_id == REQUEST_ID.decode()


@pytest.mark.parametrize("family", ["openai", "anthropic", "gemini"])
@pytest.mark.parametrize("code", CODES)
def test_refusals_a_retry_cannot_cure_say_so(code: str, family: str) -> None:
    fields = dict(answer(code, family).fields)
    curable = code in RETRY_CURES or code in ("provider_error", "upstream_timeout")
    assert fields.get(b"x-should-retry") == (None if curable else b"false")
    assert fields[b"X-Penstock-Error"] == code.encode()


def test_every_retryable_code_exists() -> None:
    assert set(STATUS_OF_CODE) >= RETRY_CURES


def test_additional_fields_travel_with_the_refusal() -> None:
    response = error_response(overloaded("connections", 3), "openai", REQUEST_ID, "penstock")
    assert (response.status, dict(response.fields)[b"retry-after"]) == (503, b"1")


@pytest.mark.parametrize(
    ("namespace", "stem"), [("penstock", b"Penstock"), ("langwatch", b"LangWatch"), ("our_gate", b"Our-Gate")]
)
def test_namespace_names_the_headers(namespace: str, stem: bytes) -> None:
    assert header_stem(namespace) == stem
    error = RequestError("not_found", "No.")
    assert (b"X-%b-Error" % stem, b"not_found") in error_response(error, "openai", REQUEST_ID, namespace).fields


def test_stream_payloads_follow_the_dialect() -> None:
    payload = stream_error_payload("openai", "provider_error", "upstream_mid_stream_failure", "It broke.")
    detail = {"type": "provider_error", "code": "upstream_mid_stream_failure", "message": "It broke."}
    assert json.loads(payload) == {"error": {**detail, "param": None}}
    payload = stream_error_payload("anthropic", "provider_error", "upstream_mid_stream_failure", "It broke.")
    assert json.loads(payload) == {"type": "error", "error": {**detail, "type": "api_error"}}
