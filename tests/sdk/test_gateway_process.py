"""The process that the SDK tests talk to."""

from __future__ import annotations

from pathlib import Path

import openai

from sdk.gateway_process import running_gateway


def test_sigterm_ends_the_gateway_with_status_0_while_an_sdk_keeps_its_connection(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as gateway:
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0)
        assert client.embeddings.create(model="mock-embedding", input="a").data
    client.close()
    assert any('"draining"' in line for line in gateway.log)
