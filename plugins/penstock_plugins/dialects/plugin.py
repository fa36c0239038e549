"""The ``dialects`` plugin: the translators it brings."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from penstock import ConfigurationError, Translator, hookimpl
from penstock_plugins.dialects.anthropic_requests import DEFAULT_MAX_TOKENS
from penstock_plugins.dialects.anthropic_to_openai_chat import AnthropicToOpenAIChat
from penstock_plugins.dialects.openai_chat_to_anthropic import OpenAIChatToAnthropic
from penstock_plugins.dialects.openai_responses_to_anthropic import OpenAIResponsesToAnthropic
from penstock_plugins.dialects.openai_responses_to_openai_chat import OpenAIResponsesToOpenAIChat


@attrs.frozen(kw_only=True)
class DialectsConfig:
    """The ``[plugins.dialects]`` table."""

    default_max_tokens: int = DEFAULT_MAX_TOKENS
    """``max_tokens`` for Anthropic, which requires it, where a client sets no bound; thinking is added to it."""


@attrs.frozen
class Dialects:
    """Bring the translators between dialects."""

    Config = DialectsConfig

    config: DialectsConfig

    def __attrs_post_init__(self) -> None:
        if self.config.default_max_tokens < 1:
            raise ConfigurationError("default_max_tokens: is at least 1")

    @hookimpl
    def register_translators(self) -> Iterable[Translator]:
        default_max_tokens = self.config.default_max_tokens
        return [
            OpenAIChatToAnthropic(default_max_tokens),
            AnthropicToOpenAIChat(),
            OpenAIResponsesToAnthropic(default_max_tokens),
            OpenAIResponsesToOpenAIChat(),
        ]
