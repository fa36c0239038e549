"""The page of every setting, from the classes that settings are read into."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import attrs

from penstock.config import GatewayConfig
from penstock.structuring import describe
from reference.source import cell, default_of, field_docs, first_line, row, tables_of

ENVIRONMENT = ("listen", "namespace", "workers", "loop", "log", "spans")


def bundled() -> Iterator[tuple[str, type[Any]]]:
    """Yield the plugins that come with penstock, in the order a configuration would name them."""
    points = {point.name: point for point in entry_points(group="penstock") if _is_bundled(point.value)}
    first = ("virtual_keys", "routing")
    for name in (*first, *sorted(set(points) - set(first))):
        yield name, points[name].load()


def _is_bundled(value: str) -> bool:
    return value.startswith("penstock_plugins.")


_CONFIGURATION_HEAD = """
# Configuration

One TOML file, `penstock.toml` unless `-c` names another. Unknown tables and keys are refused with the nearest known
name; `penstock check` says what is wrong, `penstock check --explain` where each setting of the gateway comes from.

Precedence: command line > environment > file > default. The environment can set {variables}.
Relative paths of plugins and of secrets' files are relative to the configuration file, and so are settings of the type
path, given or default, where `~` is the home folder; a plugin's setting of type string that it opens itself is relative
to where the gateway was started.

A **secret** is a string, `{{ env = "NAME" }}` or `{{ file = "path" }}`; it never prints.

```toml
[gateway]
listen = "127.0.0.1:8080"
plugins = ["virtual_keys", "routing", "mock"]

[plugins.virtual_keys]
pepper = "at least sixteen characters"

[[plugins.routing.bindings]]
name = "mock"
type = "mock"
```
"""


def configuration_page() -> str:
    variables = ", ".join(f"`PENSTOCK_{name.upper()}`" for name in ENVIRONMENT)
    text = _CONFIGURATION_HEAD.format(variables=variables)
    text += "\n## The gateway\n" + "".join(_table(*each) for each in tables_of(GatewayConfig, "gateway"))
    for name, kind in bundled():
        text += f"\n## `{name}`\n\n{cell(inspect.getdoc(kind) or '')}\n"
        config = getattr(kind, "Config", None)
        if config is None:
            text += "\nNo settings.\n"
        else:
            text += "".join(_table(*each) for each in tables_of(config, f"plugins.{name}"))
    return text


def _table(heading: str, kind: type[Any]) -> str:
    docs = field_docs(kind)
    text = f"\n### `{heading}`\n\n{cell(first_line(kind))}\n\n" + row("key", "type", "default", "meaning")
    text += row("---", "---", "---", "---")
    for field in attrs.fields(kind):
        text += row(f"`{field.name}`", cell(describe(field.type)), default_of(field), cell(docs.get(field.name, "")))
    return text
