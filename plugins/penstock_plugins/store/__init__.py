"""Keep objects, keys, budgets, the ledger and what it sums up in one database, and answer from memory.

``database`` runs transactions, ``objects`` keeps documents, ``vault`` their secrets, ``directories`` answer the data
plane, ``journal`` and ``ledger`` keep the money, ``counters`` bound it; ``opening`` puts them together.
"""

from penstock_plugins.store.plugin import Store, StoreConfig

__all__ = ["Store", "StoreConfig"]
