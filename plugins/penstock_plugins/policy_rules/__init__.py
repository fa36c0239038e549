"""Refuse requests by what they contain: tools, MCP servers, URLs, models."""

from penstock_plugins.policy_rules.plugin import Policies

__all__ = ["Policies"]
