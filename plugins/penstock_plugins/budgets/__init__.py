"""Keep what is spent within budgets: reserve before a provider is asked, settle with what it really cost."""

from penstock_plugins.budgets.plugin import Budgets

__all__ = ["Budgets"]
