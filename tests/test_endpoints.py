"""Which paths are endpoints: ids go upstream inside a path, so they must be able to mean one thing only."""

from __future__ import annotations

import pytest

from penstock.endpoints import GEMINI, MODEL, RESPONSE_BY_ID, RESPONSE_CANCEL, RESPONSE_ITEMS, Endpoint, find_endpoint
from penstock.testing import FakeUpstream, Harness, http_reply

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        (b"resp_1", RESPONSE_BY_ID),
        (b"A-z_09", RESPONSE_BY_ID),
        (b"x" * 128, RESPONSE_BY_ID),
        (b"resp_1/cancel", RESPONSE_CANCEL),
        (b"resp_1/input_items", RESPONSE_ITEMS),
        (b"x" * 129, None),
        (b"", None),
        (b"/cancel", None),
        (b"..", None),
        (b"..%2Fmodels", None),
        (b"..%2Ffiles%3F/cancel", None),
        (b"a%20b", None),
        (b"a.b", None),
        (b"a;b/cancel", None),
        (b"resp_1/", None),
        (b"resp_1/other", None),
        (b"resp_1/cancel/x", None),
    ],
)
def test_id_of_a_stored_response_is_a_plain_word(path: bytes, endpoint: Endpoint | None) -> None:
    assert find_endpoint(b"/v1/responses/" + path) is endpoint


@pytest.mark.parametrize(
    "path",
    [
        b"models/gemini-x:generateContent",
        b"models/openai%2Fgpt-5:generateContent",
        b"models/openai/gpt-5.1:generateContent",
        b"models",
        b"cachedContents/a-b_1",
    ],
)
def test_geminis_paths_are_taken_as_they_come(path: bytes) -> None:
    assert find_endpoint(b"/v1beta/" + path) is GEMINI


@pytest.mark.parametrize(
    "path",
    [
        b"models/cheap/../dear:generateContent",
        b"models/cheap/..%2Fdear:generateContent",
        b"models/cheap%2F..%2Fdear:generateContent",
        b"models/cheap/%2e%2E/dear:generateContent",
        b"x/./models/dear:generateContent",
        b"/models/dear:generateContent",
        b"models/%2Fdear:generateContent",
    ],
)
def test_geminis_paths_that_could_lead_elsewhere_are_none(path: bytes) -> None:
    assert find_endpoint(b"/v1beta/" + path) is None


async def test_other_ids_are_not_found_and_never_sent_upstream() -> None:
    upstream = FakeUpstream([[http_reply()]], repeat=True)
    async with Harness(upstream=upstream) as harness:
        for path in ("/v1/responses/..%2Fmodels", "/v1/responses/a%3Fb/cancel"):
            for method in ("GET", "POST", "DELETE"):
                reply = await harness.request(method, path)
                assert (reply.status, reply.json()["error"]["code"]) == (404, "not_found")
        assert upstream.requests == []


async def test_ids_of_models_are_looked_up_here_and_never_sent_upstream() -> None:
    assert find_endpoint(b"/v1/models/..%2Ffiles") is MODEL
    upstream = FakeUpstream([[http_reply(b'{"data":[]}')]], repeat=True)
    async with Harness(upstream=upstream) as harness:
        reply = await harness.request("GET", "/v1/models/..%2Ffiles")
        assert (reply.status, reply.json()["error"]["code"]) == (404, "not_found")
        assert {request.target.partition(b"?")[0] for request in upstream.requests} == {b"/v1/models"}
