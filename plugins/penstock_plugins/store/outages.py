"""Say once that something has begun to fail, and once that it works again, however often it was tried between."""

from __future__ import annotations

import logging

import attrs

_log = logging.getLogger("penstock.store")


@attrs.define(eq=False)
class Outage:
    """Follow one thing that is done again and again."""

    begins: str
    """The line when it begins to fail; the fault is put behind it."""
    ends: str
    """The line when it works again; how often it had failed is put behind it."""
    failures: int = 0
    """How often it has failed since it last worked."""

    def failed(self, error: BaseException) -> None:
        """Take note of a failure."""
        self.failures += 1
        if self.failures == 1:
            _log.error("%s: %r", self.begins, error)

    def worked(self) -> None:
        """Take note of a success."""
        if self.failures:
            _log.warning("%s; %d tries had failed", self.ends, self.failures)
            self.failures = 0
