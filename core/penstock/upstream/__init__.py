"""Transports that carry requests to providers, behind one protocol (``penstock.providers.Transport``)."""

from __future__ import annotations

from penstock.upstream.choose import UpstreamTransports

__all__ = ["UpstreamTransports"]
