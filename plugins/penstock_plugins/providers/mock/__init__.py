"""A provider without a provider: answers every dialect in this process, to try, demonstrate and test with.

Answers depend on the request; ``docs/mock.md`` says how, and which words in a model name bring faults.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from penstock import Provider, Services, hookimpl


@attrs.define(eq=False)
class Mock:
    """Bring the provider type ``mock``."""

    services: Services

    @hookimpl
    def register_providers(self) -> Iterable[Provider]:
        from penstock_plugins.providers.mock.provider import MockProvider  # noqa: PLC0415 - only who enables it pays

        services = self.services
        return [MockProvider(type="mock", namespace=services.namespace, usage_frame=services.usage_frame)]
