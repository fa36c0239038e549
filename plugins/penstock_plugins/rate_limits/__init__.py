"""Bound the traffic of keys and bindings: requests and tokens a minute, requests a day, exchanges under way."""

from penstock_plugins.rate_limits.plugin import RateLimiting

__all__ = ["RateLimiting"]
