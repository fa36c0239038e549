"""Money as whole nano-dollars: 1 USD is 1,000,000,000 nano-USD. Never a float."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

NANO_PER_USD = 1_000_000_000
MAX_NANO_USD = 9_000_000_000 * NANO_PER_USD
"""What fits a 64-bit integer with room for sums: nine billion dollars."""


def read_usd(value: str | int) -> int:
    """Return the nano-USD of a decimal string such as ``"0.00042"``, or of whole dollars.

    Raises ValueError for anything else, for more than nine decimal places, for negatives and for more than fits.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError('must be an amount in USD as a decimal string, such as "12.50"')
    try:
        amount = Decimal(value)
    except InvalidOperation:
        raise ValueError('must be an amount in USD as a decimal string, such as "12.50"') from None
    if not amount.is_finite():
        raise ValueError("must be a finite amount in USD")
    if amount < 0:
        raise ValueError("must not be negative")
    if amount > MAX_NANO_USD // NANO_PER_USD:
        raise ValueError(f"must not be over {MAX_NANO_USD // NANO_PER_USD} USD")
    nano = amount * NANO_PER_USD
    if nano != nano.to_integral_value():
        raise ValueError("must have no more than nine decimal places")
    return int(nano)


def write_usd(nano_usd: int) -> str:
    """Return nano-USD as a plain decimal string without trailing zeros: ``420000`` is ``"0.00042"``."""
    sign, rest = ("-", -nano_usd) if nano_usd < 0 else ("", nano_usd)
    whole, fraction = divmod(rest, NANO_PER_USD)
    tail = f"{fraction:09d}".rstrip("0")
    return f"{sign}{whole}.{tail}" if tail else f"{sign}{whole}"
