"""Pass prompt caching through: respect the client's markers, take them out, or put some in."""

from penstock_plugins.caching.plugin import Caching

__all__ = ["Caching"]
