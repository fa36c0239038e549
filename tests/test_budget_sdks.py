"""The official SDKs on a budget that is spent: their own exception, once, with a message that names it."""

from __future__ import annotations

from pathlib import Path

import anthropic
import openai
import pytest

from governed_gateway import ANSWERED, governed

pytestmark = pytest.mark.anyio


async def test_openai_sdk_raises_its_own_exception_that_names_the_budget(tmp_path: Path) -> None:
    async with governed(tmp_path, socket=True) as gateway:
        budget_id = await gateway.budget(ANSWERED, reserve="none", name="monthly cap")
        harness = gateway.harness
        async with openai.AsyncOpenAI(base_url=f"{harness.base_url}/v1", api_key=harness.key) as client:
            await client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "Hi"}])
            for is_stream in (False, True):
                before = harness.settled
                with pytest.raises(openai.APIStatusError) as caught:
                    await client.chat.completions.create(
                        model="gpt-4o-mini", messages=[{"role": "user", "content": "Hi"}], stream=is_stream
                    )
                assert (caught.value.status_code, caught.value.code) == (402, "budget_exceeded")
                assert "monthly cap" in str(caught.value)
                assert budget_id in caught.value.message
                assert harness.settled == before + 1
            with pytest.raises(openai.APIStatusError, match="monthly cap"):
                await client.responses.create(model="gpt-4o-mini", input="Hi")
            with pytest.raises(openai.APIStatusError, match="monthly cap"):
                await client.embeddings.create(model="text-embedding-3-small", input="Hi")


async def test_anthropic_sdk_raises_its_own_exception_that_names_the_budget(tmp_path: Path) -> None:
    async with governed(tmp_path, socket=True) as gateway:
        budget_id = await gateway.budget(0, name="monthly cap")
        harness = gateway.harness
        async with anthropic.AsyncAnthropic(base_url=harness.base_url, api_key=harness.key) as client:
            for is_stream in (False, True):
                before = harness.settled
                with pytest.raises(anthropic.APIStatusError) as caught:
                    await client.messages.create(
                        model="claude-x",
                        max_tokens=9,
                        messages=[{"role": "user", "content": "Hi"}],
                        stream=is_stream,
                    )
                assert caught.value.status_code == 402
                assert "monthly cap" in str(caught.value)
                assert budget_id in str(caught.value)
                assert harness.settled == before + 1
