"""The official SDKs for Node through the gateway: scripts of theirs report what they got, tests judge it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import STATUS_OF_CODE
from sdk.expected import RETRIES, attempts_for, should_retry_field
from sdk.gateway_process import MAX_BODY_BYTES, RunningGateway

Report = dict[str, Any]

_FOLDER = Path(__file__).with_name("node")
_INSTALL = ("npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts")
_INSTALL_SECONDS = 100
_RUN_SECONDS = 60

GREETING = 'Hello from {}. You said: "Hi there". The mock provider heard every word.'
CALLS = [["get_weather", {"city": "mock"}], ["get_time", {"city": "mock"}]]
OPENAI_CLASSES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
    502: "InternalServerError",
    503: "InternalServerError",
    504: "InternalServerError",
}
"""Any other status: ``APIError``."""
ANTHROPIC_CLASSES = {
    **OPENAI_CLASSES,
    402: "PaymentRequiredError",
    408: "RequestTimeoutError",
    413: "ContentTooLargeError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}
CAUSED = (
    "invalid_api_key",
    "virtual_key_revoked",
    "virtual_key_disabled",
    "virtual_key_expired",
    "model_not_allowed",
    "missing_model",
    "model_not_recognized",
    "provider_not_bound",
    "bad_request",
    "payload_too_large",
    "unsupported_encoding",
    "not_found",
    "method_not_allowed",
    "provider_error",
    "upstream_timeout",
)


@pytest.fixture(scope="session")
def node_folder() -> Path:
    """Return the scripts' folder with the SDKs installed; without Node the tests are skipped, and loudly."""
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    if missing:
        message = f"{' and '.join(missing)} not found: the tests of the SDKs for Node are skipped"
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(message, stacklevel=2)
        pytest.skip(message)
    manifest = _FOLDER / "package.json"
    with manifest.open(encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # two runs in one checkout install once
        wanted: dict[str, str] = json.load(stream)["dependencies"]
        if {name: _installed(name) for name in wanted} != wanted:
            done = subprocess.run(
                _INSTALL, cwd=_FOLDER, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False
            )
            assert done.returncode == 0, f"npm install failed: {done.stderr}"
    return _FOLDER


def _installed(name: str) -> str | None:
    """Return the version of a package that is installed, None for none."""
    manifest = _FOLDER / "node_modules" / name / "package.json"
    if not manifest.is_file():
        return None
    version: str = json.loads(manifest.read_text(encoding="utf-8"))["version"]
    return version


def _run(folder: Path, script: str, gateway: RunningGateway) -> Report:
    facts = {
        "url": gateway.url,
        "keys": gateway.keys,
        "codes": sorted(STATUS_OF_CODE),
        "maxBodyBytes": MAX_BODY_BYTES,
    }
    environment = {**os.environ, "SDK_TEST": json.dumps(facts)}
    done = subprocess.run(
        ["node", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=_RUN_SECONDS, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: Report = json.loads(done.stdout)
    return report


@pytest.fixture(scope="session")
def openai_report(node_folder: Path, gateway: RunningGateway) -> Report:
    return _run(node_folder, "openai.mjs", gateway)


@pytest.fixture(scope="session")
def anthropic_report(node_folder: Path, gateway: RunningGateway) -> Report:
    return _run(node_folder, "anthropic.mjs", gateway)


# --- openai -------------------------------------------------------------------------------------------------


def test_openai_chat_answers_whole_and_as_a_stream(openai_report: Report) -> None:
    text = GREETING.format("mock-gpt")
    assert openai_report["chat"] == {"text": text, "hasUsage": True}
    assert openai_report["chat stream"] == {"text": text, "withUsage": 0}
    assert openai_report["chat stream with usage"] == {"withoutChoices": 1, "last": [0, True]}
    assert openai_report["chat stream helper"] == text


def test_openai_chat_calls_tools_in_parallel_whole_and_as_a_stream(openai_report: Report) -> None:
    assert openai_report["chat tools"] == [CALLS, CALLS]


def test_openai_responses_answer_whole_and_as_a_stream(openai_report: Report) -> None:
    text = GREETING.format("mock-gpt")
    assert openai_report["responses"] == [text, text]
    assert openai_report["responses stream"] == ["response.created", "response.completed", True]
    assert openai_report["responses stream helper"] == {"text": text, "calls": CALLS}


def test_openai_embeddings_models_and_audio_answer(openai_report: Report) -> None:
    assert openai_report["embeddings"] == [8, 8]
    assert {"mock-gpt", "mock-embedding"} <= set(openai_report["models"])
    assert "heard" in openai_report["transcription"]


def test_openai_sees_the_gateways_headers(openai_report: Report) -> None:
    _check_headers(openai_report, "mock-gpt")


@pytest.mark.parametrize("code", CAUSED)
def test_openai_raises_its_class_for_a_refusal(openai_report: Report, code: str) -> None:
    _check_refusal(openai_report[f"caused {code}"], code, OPENAI_CLASSES, code)


@pytest.mark.parametrize("code", sorted(STATUS_OF_CODE))
def test_openai_has_a_class_for_every_code(openai_report: Report, code: str) -> None:
    _check_refusal(openai_report[f"refused {code}"], code, OPENAI_CLASSES, code)


@pytest.mark.parametrize("status", [400, 429, 503, 529])
def test_openai_raises_providers_errors_as_its_own(openai_report: Report, status: int) -> None:
    found = openai_report[f"provider {status}"]
    assert found["class"] == OPENAI_CLASSES.get(status, "InternalServerError")
    assert (found["status"], found["code"], found["header"]) == (status, "mock_fault", None)
    assert found["attempts"] == (1 if status == 400 else 1 + RETRIES)


@pytest.mark.parametrize("what", ["cut chat stream", "cut responses stream", "cut chat stream helper"])
def test_openai_raises_when_a_stream_is_cut(openai_report: Report, what: str) -> None:
    found = openai_report[what]
    assert (found["class"], found["status"], found["attempts"]) == ("APIError", None, 1)
    assert (found["code"], found["type"]) == ("upstream_mid_stream_failure", "provider_error")


# --- anthropic ----------------------------------------------------------------------------------------------


def test_anthropic_messages_answer_whole_and_as_a_stream(anthropic_report: Report) -> None:
    text = GREETING.format("mock-claude")
    assert anthropic_report["message"] == {"text": text, "hasUsage": True}
    kinds = ["message_start", "content_block_stop", "message_delta", "message_stop"]
    assert anthropic_report["message stream"] == kinds
    assert anthropic_report["message stream helper"] == text


def test_anthropic_uses_tools_in_parallel_whole_and_as_a_stream(anthropic_report: Report) -> None:
    assert anthropic_report["tools"] == [CALLS, CALLS]


def test_anthropic_counts_tokens_and_lists_models(anthropic_report: Report) -> None:
    assert anthropic_report["count"] > 0
    assert {"mock-claude", "mock-gpt"} <= set(anthropic_report["models"])


def test_anthropic_sees_the_gateways_headers(anthropic_report: Report) -> None:
    _check_headers(anthropic_report, "mock-claude")


@pytest.mark.parametrize("code", CAUSED)
def test_anthropic_raises_its_class_for_a_refusal(anthropic_report: Report, code: str) -> None:
    _check_refusal(anthropic_report[f"caused {code}"], code, ANTHROPIC_CLASSES)


@pytest.mark.parametrize("code", sorted(STATUS_OF_CODE))
def test_anthropic_has_a_class_for_every_code(anthropic_report: Report, code: str) -> None:
    _check_refusal(anthropic_report[f"refused {code}"], code, ANTHROPIC_CLASSES)


@pytest.mark.parametrize("status", [400, 429, 503, 529])
def test_anthropic_raises_providers_errors_as_its_own(anthropic_report: Report, status: int) -> None:
    found = anthropic_report[f"provider {status}"]
    assert found["class"] == ANTHROPIC_CLASSES.get(status, "OverloadedError")
    assert (found["status"], found["header"]) == (status, None)
    assert found["attempts"] == (1 if status == 400 else 1 + RETRIES)


@pytest.mark.parametrize("what", ["cut stream", "cut stream helper"])
def test_anthropic_raises_when_a_stream_is_cut(anthropic_report: Report, what: str) -> None:
    found = anthropic_report[what]
    assert (found["class"], found["status"], found["attempts"]) == ("APIError", None, 1)
    assert (found["code"], found["type"]) == ("upstream_mid_stream_failure", "api_error")


# --- both ---------------------------------------------------------------------------------------------------


def _check_headers(report: Report, model: str) -> None:
    found = report["headers"]
    assert (found["provider"], found["model"]) == ("mock", model)
    assert found["request"].startswith("req_")
    assert found["text"] == GREETING.format(model)


def _check_refusal(found: Report, code: str, classes: dict[int, str], kind: str | None = None) -> None:
    status = STATUS_OF_CODE[code]
    assert "unexpected" not in found, found
    assert (found["class"], found["status"]) == (classes.get(status, "APIError"), status)
    assert found["code"] == found["header"] == code
    assert found["type"] == kind if kind is not None else found["type"].endswith(("_error", "_too_large"))
    assert found["namesRequest"]
    assert found["attempts"] == attempts_for(code)
    assert found["shouldRetry"] == should_retry_field(code)
