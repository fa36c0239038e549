"""Any API that speaks OpenAI's dialects at a base URL of its own, with any key header."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from penstock import OpenAIProvider, Provider, Services, hookimpl

CHAT_DIALECTS = frozenset({
    "openai.chat", "openai.completions", "openai.embeddings", "openai.moderations", "openai.images", "openai.audio",
    "openai.models",
})  # fmt: skip
"""What servers speak that do not know the Responses API: most of those that are compatible."""


@attrs.define(eq=False)
class OpenAICompatible:
    """Bring the provider types ``openai_compatible`` and, for servers without the Responses API, ``openai_chat``.

    A binding sets ``base_url`` and, if need be, ``key_header``.
    """

    services: Services

    @hookimpl
    def register_providers(self) -> Iterable[Provider]:
        services = self.services
        every = OpenAIProvider(type="openai_compatible", namespace=services.namespace, usage_frame=services.usage_frame)
        chat = OpenAIProvider(
            type="openai_chat",
            namespace=services.namespace,
            usage_frame=services.usage_frame,
            dialects=CHAT_DIALECTS,
        )
        return [every, chat]
