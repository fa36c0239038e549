"""What plugins share with one another through core: protocols, and the registry where one offers and others ask.

A plugin takes a ``services`` argument to get the registry. It provides in its constructor and asks in ``lifespan`` or
later, so the order of the configuration does not matter.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import attrs

from penstock.errors import ConfigurationError
from penstock.evaluators import EvaluatorRegistry
from penstock.models import Principal, ProviderBinding
from penstock.providers import Provider, ProviderRegistry, UpstreamRequest
from penstock.shared import Shared
from penstock.translation import TranslatorRegistry

T = TypeVar("T")
GROUP = "penstock"
"""The group of entry points plugins are found by."""


@attrs.frozen(eq=False)
class KeyRecord:
    """Hold what is known about one virtual key; ``hash`` is HMAC-SHA256 of the secret under the pepper."""

    hash: bytes = attrs.field(repr=False)
    """32 bytes."""
    principal: Principal
    """On whose behalf calls with the key run."""
    status: str = "active"
    """active, disabled or revoked."""
    expires_at: float | None = None
    """Seconds since the epoch."""
    works_until: float | None = None
    """For the secret before a rotation: when its grace ends, seconds since the epoch."""


class KeyDirectory(Protocol):
    """Find virtual keys by hash, from memory."""

    def find_key(self, key_hash: bytes) -> KeyRecord | None:
        """Return a key by its hash."""
        ...

    def all_principals(self) -> Iterable[Principal]:
        """Return on whose behalf each key calls, so that what keys name can be checked before traffic comes.

        A directory whose keys come and go while it runs may return none.
        """
        ...


class BindingDirectory(Protocol):
    """Find provider bindings, from memory."""

    def find_binding(self, name: str) -> ProviderBinding | None:
        """Return a binding by name or id."""
        ...

    def all_bindings(self) -> Iterable[ProviderBinding]:
        """Return every binding, in the order keys without a list of their own try them."""
        ...

    def bindings_of(self, principal: Principal) -> Sequence[ProviderBinding]:
        """Return the bindings a key may use, in its order."""
        ...

    @property
    def revision(self) -> int:
        """Return a number that changes whenever an answer of this directory may."""
        ...


@attrs.frozen
class FetchedResponse:
    """Hold a whole, de-framed and decoded upstream response."""

    status: int
    """HTTP status."""
    body: bytes = attrs.field(repr=False)
    """The whole body."""


class Fetch(Protocol):
    """Send a plugin's own request through the gateway's upstream transports and read the whole answer.

    Raises UpstreamError, also for a body over ``max_bytes`` and after ``timeout`` seconds.
    """

    async def __call__(self, request: UpstreamRequest, *, timeout: float, max_bytes: int) -> FetchedResponse:
        """Send the request and return the whole answer; ``timeout`` in seconds."""
        ...


class Services:
    """Hold one object per protocol; a plugin gets it by taking an argument ``services``."""

    namespace: str
    """The configured namespace."""
    usage_frame: str
    """``[gateway] usage_frame``, for providers that ask streams for their usage: ``strip`` or ``forward``."""
    providers: ProviderRegistry
    """Provider types by name: ``providers.get(type)``, and ``providers.types`` maps them all.

    Complete once the first lifespan is entered.
    """
    translators: TranslatorRegistry
    """Who translates between dialects: ``translators.between(endpoint, provider)``. Complete with the providers."""
    evaluators: EvaluatorRegistry
    """What guardrails may run: ``evaluators.prepare(type, settings)``. Complete with the providers."""
    clock: Callable[[], float]
    """Wall clock for whatever depends on dates: seconds since the epoch. Tests move it."""
    shared: Shared
    """What outlives a reload: ``async with services.shared.use(key, make) as thing``, in a lifespan."""
    folder: Path
    """What relative paths in the configuration are relative to."""
    is_rehearsal: bool = False
    """Whether lifespans are entered only to see that they can be (``penstock check``): leave nothing behind then."""
    enforced: frozenset[str] = frozenset()
    """Members of principals that an enabled plugin enforces, such as ``policy_rules``."""
    plugins: tuple[str, ...] = ()
    """Names of the enabled plugins, in the order of the configuration."""

    def __init__(
        self,
        namespace: str = "penstock",
        usage_frame: str = "strip",
        *,
        clock: Callable[[], float] = time.time,
        shared: Shared | None = None,
        folder: Path | None = None,
    ) -> None:
        self.namespace = namespace
        self.usage_frame = usage_frame
        self.clock = clock
        self.shared = shared or Shared()
        self.folder = folder or Path()
        self.providers = ProviderRegistry()
        self.translators = TranslatorRegistry()
        self.evaluators = EvaluatorRegistry()
        self._offered: dict[Any, Any] = {}

    def provide(self, protocol: type[T], implementation: T) -> None:
        """Offer an implementation. Raises ConfigurationError where another plugin already does."""
        if protocol in self._offered:
            raise ConfigurationError(f"two plugins provide {protocol.__name__}; enable only one of them")
        self._offered[protocol] = implementation

    def get(self, protocol: type[T]) -> T:
        """Return what was offered. Raises ConfigurationError where no enabled plugin does."""
        found = self._offered.get(protocol)
        if found is None:
            raise ConfigurationError(f"no enabled plugin provides {protocol.__name__}")
        return found  # type: ignore[no-any-return]

    def find(self, protocol: type[T]) -> T | None:
        """Return what was offered, or None."""
        return self._offered.get(protocol)

    def provider_of(self, binding: ProviderBinding) -> Provider:
        """Return the provider of a binding. Raises ConfigurationError naming the types there are."""
        provider = self.providers.get(binding.type)
        if provider is None:
            known = ", ".join(sorted(self.providers.types)) or "none"
            raise ConfigurationError(
                f"binding {binding.name!r}: no enabled plugin brings provider type {binding.type!r}; "
                f"enabled: {known}{self._hint_to_enable(binding.type)}"
            )
        return provider

    def _hint_to_enable(self, name: str) -> str:
        if name in self.plugins or not importlib.metadata.entry_points(group=GROUP, name=name):
            return ""
        return f'; an installed plugin is called "{name}": add it to [gateway] plugins'
