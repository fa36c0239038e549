"""Judge what goes to models and what comes back: block it, redact it, or let it pass."""

from penstock_plugins.guardrails.plugin import Guardrails

__all__ = ["Guardrails"]
