"""Keep exchanges from bindings that keep failing."""

from penstock_plugins.fallback.plugin import FallbackChains, FallbackConfig

__all__ = ["FallbackChains", "FallbackConfig"]
