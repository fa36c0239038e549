"""Let clients of one dialect ask providers that speak another: requests, answers, streams and errors."""

from penstock_plugins.dialects.plugin import Dialects

__all__ = ["Dialects"]
