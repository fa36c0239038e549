"""A gateway that takes keys and bindings from the store answers by every change at once."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import pytest

from penstock.testing import FakeUpstream, Harness, Reply, http_reply
from store_fixtures import (
    archive,
    change,
    insert_binding,
    insert_key,
    objects_of,
    owners_of,
    services_of,
    store_harness,
)

_BODY = b'{"model":"gpt-5-mini","messages":[{"role":"user","content":"hi"}]}'


async def ask(harness: Harness, secret: str) -> Reply:
    return await harness.request(
        "POST", "/v1/chat/completions",
        [(b"authorization", b"Bearer " + secret.encode()), (b"content-type", b"application/json")], _BODY,
    )  # fmt: skip


def code_of(reply: Reply) -> str:
    return str(json.loads(reply.body)["error"]["code"])


def test_key_and_binding_work_from_the_moment_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    upstream = FakeUpstream([[http_reply(b'{"id":"a"}')]], repeat=True)

    async def main() -> None:
        async with store_harness(tmp_path, upstream=upstream) as harness:
            services = services_of(harness)
            objects = objects_of(services)
            owners = await owners_of(objects)
            secret, key = await insert_key(services, owners)
            assert code_of(await ask(harness, secret)) == "provider_not_bound"
            scope = owners.organization.scope
            binding = await insert_binding(
                services, scope, owners.organization.id, "one", base_url=f"{upstream.base_url}/v1"
            )
            reply = await ask(harness, secret)
            assert (reply.status, reply.body) == (200, b'{"id":"a"}')
            assert upstream.requests[-1].headers.get(b"authorization") == b"Bearer sk-one"
            disabled = await change(objects, key, status="disabled")
            reply = await ask(harness, secret)
            assert (reply.status, code_of(reply)) == (403, "virtual_key_disabled")
            key = await change(objects, disabled, status="active")
            assert (await ask(harness, secret)).status == 200
            await archive(objects, binding)
            assert code_of(await ask(harness, secret)) == "provider_not_bound"
            await archive(objects, key)
            assert (await ask(harness, secret)).status == 401

    anyio.run(main)
