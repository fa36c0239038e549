"""Any API that speaks OpenAI's dialects at a base URL of its own, with any key header."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from penstock import OpenAIProvider, Provider, Services, hookimpl


@attrs.define(eq=False)
class OpenAICompatible:
    """Bring the provider type ``openai_compatible``; a binding sets ``base_url`` and, if need be, ``key_header``."""

    services: Services

    @hookimpl
    def register_providers(self) -> Iterable[Provider]:
        services = self.services
        provider = OpenAIProvider(
            type="openai_compatible", namespace=services.namespace, usage_frame=services.usage_frame
        )
        return [provider]
