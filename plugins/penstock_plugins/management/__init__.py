"""Manage the objects of the store through an HTTP API."""

from penstock_plugins.management.plugin import Management, ManagementConfig

__all__ = ["Management", "ManagementConfig"]
