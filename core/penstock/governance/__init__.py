"""What the plugins that govern share: objects, store, counters, ledger, prices, budgets. Public, for plugins.

Protocols are provided and found through ``Services``; the values beside them are what they exchange.
"""

from penstock.governance.budgets import BudgetDirectory, BudgetRule
from penstock.governance.circuits import CircuitDirectory, CircuitState
from penstock.governance.counters import Claim, Counters, Exceeded, Reservation
from penstock.governance.credentials import is_token, new_id, new_token, token_prefix
from penstock.governance.ledgers import (
    CostSource,
    Debit,
    Discrepancy,
    Intent,
    Ledger,
    LedgerEntry,
    LedgerReader,
    LedgerUnavailableError,
    Outcome,
    UsageQuery,
    UsageRow,
)
from penstock.governance.money import MAX_NANO_USD, NANO_PER_USD, read_usd, write_usd
from penstock.governance.objects import KINDS, Kind, unique_values
from penstock.governance.policies import GuardrailRule, PolicyDirectory, StoredCacheRule
from penstock.governance.prices import PER, Price, PriceTable, Rates, Tier
from penstock.governance.stores import (
    AuditEntry,
    ConflictError,
    LocalAdmin,
    ObjectStore,
    Reading,
    Scope,
    StoredObject,
    StoreUnavailableError,
    Transaction,
    Vault,
)
from penstock.governance.windows import Period, period_for, period_of, read_time, write_time

__all__ = [
    "KINDS",
    "MAX_NANO_USD",
    "NANO_PER_USD",
    "PER",
    "AuditEntry",
    "BudgetDirectory",
    "BudgetRule",
    "CircuitDirectory",
    "CircuitState",
    "Claim",
    "ConflictError",
    "CostSource",
    "Counters",
    "Debit",
    "Discrepancy",
    "Exceeded",
    "GuardrailRule",
    "Intent",
    "Kind",
    "Ledger",
    "LedgerEntry",
    "LedgerReader",
    "LedgerUnavailableError",
    "LocalAdmin",
    "ObjectStore",
    "Outcome",
    "Period",
    "PolicyDirectory",
    "Price",
    "PriceTable",
    "Rates",
    "Reading",
    "Reservation",
    "Scope",
    "StoreUnavailableError",
    "StoredCacheRule",
    "StoredObject",
    "Tier",
    "Transaction",
    "UsageQuery",
    "UsageRow",
    "Vault",
    "is_token",
    "new_id",
    "new_token",
    "period_for",
    "period_of",
    "read_time",
    "read_usd",
    "token_prefix",
    "unique_values",
    "write_time",
    "write_usd",
]
