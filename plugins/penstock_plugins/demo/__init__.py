"""``penstock demo``: a gateway with everything embedded, from nothing to an answer in one command.

Configuration, database and virtual key live in one folder, made on the first start and used again on the next.
"""

from penstock_plugins.demo.command import demo

__all__ = ["demo"]
