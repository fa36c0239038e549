"""The providers that the quick start names."""

from __future__ import annotations

VENDORS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
"""Binding name and type → the variable whose presence binds the real provider."""
BASE_URLS = {"openai": "OPENAI_BASE_URL", "anthropic": "ANTHROPIC_BASE_URL"}
"""The variables that say where else its API is."""
MODELS = {"openai": "gpt-5-mini", "anthropic": "claude-haiku-4-5"}
STAND_IN = "demo-stand-in:"
"""What the external ids of mocks begin with that answer under a vendor's name; "penstock providers create" knows it."""
