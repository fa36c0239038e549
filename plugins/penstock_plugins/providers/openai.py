"""OpenAI's API: chat completions, responses, embeddings, images, audio, moderations."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from penstock import OpenAIProvider, Provider, Services, hookimpl


@attrs.define(eq=False)
class OpenAI:
    """Bring the provider type ``openai``."""

    services: Services

    @hookimpl
    def register_providers(self) -> Iterable[Provider]:
        return [
            OpenAIProvider(
                type="openai",
                namespace=self.services.namespace,
                usage_frame=self.services.usage_frame,
                default_base_url="https://api.openai.com/v1",
                model_prefixes=("gpt-", "o1", "o2", "o3", "o4", "o5", "o6", "o7", "o8", "o9", "chatgpt-",
                                "text-embedding-", "text-moderation-", "omni-moderation-", "dall-e-", "tts-",
                                "whisper-", "codex-", "ft:", "computer-use-", "davinci-", "babbage-", "sora-"),
            )
        ]  # fmt: skip
