"""What models cost: a dated table shipped with the package, an operator's prices over it."""

from penstock_plugins.prices.plugin import Prices

__all__ = ["Prices"]
