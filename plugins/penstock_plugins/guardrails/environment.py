"""Secrets of evaluators: named in their settings, kept in the environment."""

from __future__ import annotations

import os

PREFIX = "PENSTOCK_GUARDRAIL_"
"""Whoever writes settings names variables, and must not be able to have the gateway's other secrets sent anywhere."""


def check_name(member: str, name: str) -> None:
    """Raise ValueError for a name that is none of a guardrail's variable."""
    if not name.startswith(PREFIX) or not name.isidentifier() or not name.isascii():
        raise ValueError(f"{member}: must name an environment variable that begins with {PREFIX}")


def read_secret(name: str) -> str:
    """Return the value. Raises ValueError where there is none that a header field could hold."""
    value = os.environ.get(name, "").strip()
    if not value or not value.isascii() or not value.isprintable():
        raise ValueError(f"the environment variable {name} is not set, or no plain text")
    return value
