"""Anthropic's API: messages and token counting."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from penstock import AnthropicProvider, Provider, Services, hookimpl


@attrs.define(eq=False)
class Anthropic:
    """Bring the provider type ``anthropic``."""

    services: Services

    @hookimpl
    def register_providers(self) -> Iterable[Provider]:
        return [
            AnthropicProvider(
                type="anthropic",
                namespace=self.services.namespace,
                default_base_url="https://api.anthropic.com",
                model_prefixes=("claude-",),
            )
        ]
