"""Policy rules for common wishes, by name: what ``--policy-preset`` gives, and ``virtual-keys presets`` lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs


@attrs.frozen
class Preset:
    """Hold the rules of one wish."""

    name: str
    about: str
    rules: Mapping[str, Mapping[str, Sequence[str]]]
    """As the member ``policy_rules`` of a key takes them."""


_WORD_ENDS = "([^a-z]|$)"
_SHELL = (
    rf"(?i)(^|[^a-z])(shell|bash|zsh|sh|powershell|terminal|exec|cmd){_WORD_ENDS}",
    "(?i)(run|execute)_?(a_?)?(command|script|code|shell|bash)|code_?(interpreter|execution)",
)
_WRITES = (
    r"(?i)(^|[^a-z])(write|edit|delete|remove|move|rename|patch|create)[._-]?(file|dir|directory|folder|path)",
    r"(?i)(file|filesystem|fs)[._-]?(write|edit|delete|remove|move|rename|patch|create)",
    rf"(?i)^(write|edit|multiedit|notebookedit){_WORD_ENDS}|text_?editor|str_replace|apply_?patch",
)
_WEB = (
    rf"(?i)web_?(search|fetch)|google_?search|url_?context|browser|(^|[^a-z])(fetch|curl|wget|http){_WORD_ENDS}",
    r"(?i)(^|[^a-z])computer([^a-z]|$|_use)",
)
_INTERNAL = (
    r"^https?://([^/@]*@)?(localhost|[^/:]*\.(localhost|local|internal|intranet|lan|corp|home\.arpa))\.?(:[0-9]+)?(/|\?|#|$)",
    r"^https?://([^/@]*@)?(127|10|0)\.[0-9.]+(:[0-9]+)?(/|\?|#|$)",
    r"^https?://([^/@]*@)?(192\.168|169\.254|172\.(1[6-9]|2[0-9]|3[01]))\.[0-9.]+(:[0-9]+)?(/|\?|#|$)",
    r"^https?://([^/@]*@)?(0x[0-9a-f.x]+|[0-9]+)(:[0-9]+)?(/|\?|#|$)",
    r"^https?://([^/@]*@)?\[",
)
PRESETS = {
    preset.name: preset
    for preset in (
        Preset("no-shell", "No tool that runs commands or code.", {"tools": {"deny": _SHELL}}),
        Preset("no-file-writes", "No tool that changes files.", {"tools": {"deny": _WRITES}}),
        Preset(
            "no-web", "No tool that searches or fetches from the web, or drives a browser.", {"tools": {"deny": _WEB}}
        ),
        Preset("read-only", "Neither commands nor changes of files.", {"tools": {"deny": (*_SHELL, *_WRITES)}}),
        Preset("no-tools", "No tool at all, and no MCP server.", {"tools": {"allow": ()}, "mcp": {"allow": ()}}),
        Preset("no-mcp", "No MCP server that the provider would call.", {"mcp": {"allow": ()}}),
        Preset(
            "no-internal-urls",
            "No URL of this machine, a private network or a cloud's metadata.",
            {"urls": {"deny": _INTERNAL}},
        ),
    )
}


def rules_of(names: Sequence[str]) -> dict[str, Any]:
    """Return the rules of some presets together: what one of them refuses is refused."""
    found: dict[str, Any] = {}
    for name in names:
        for kind, sides in PRESETS[name].rules.items():
            for side, patterns in sides.items():
                known = found.setdefault(kind, {}).setdefault(side, [])
                known += [pattern for pattern in patterns if pattern not in known]
    return found


def rows() -> list[dict[str, Any]]:
    """Return every preset as the command lists it."""
    return [
        {"name": preset.name, "about": preset.about, "policy_rules": rules_of([preset.name])}
        for preset in PRESETS.values()
    ]
