"""Choose provider bindings for requests, and list the models a key may call."""

from penstock_plugins.routing.plugin import Routing

__all__ = ["Routing"]
