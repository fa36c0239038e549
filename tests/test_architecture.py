"""The house's rules: who imports whom, how long things are, what stays cheap to import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import penstock

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core" / "penstock"
PLUGINS = ROOT / "plugins" / "penstock_plugins"
MODULES = sorted([*CORE.rglob("*.py"), *PLUGINS.rglob("*.py"), *ROOT.glob("contrib/*/src/**/*.py")])
SANS_IO = ("heads", "framing", "headers", "sse", "splice", "peek", "codings", "metering", "envelopes")
PUBLIC_MODULES = ("codings", "dialects", "framing", "governance", "peek", "splice", "sse")
"""Sans-IO tools whose public names plugins may use too; docs/plugins/api.md lists them."""
RELAY_PATH = (
    "connection.py", "forwarding.py", "http_providers.py", "metering.py", "outbox.py", "pipeline.py", "relay.py",
    "replies.py", "server.py", "upstream/direct.py", "upstream/store.py", "upstream/via_httpcore.py",
)  # fmt: skip
COMMANDS = {
    "demo": ("penstock.config.", "penstock.runtime_file.", "penstock.serving."),
    "management_cli": ("penstock.runtime_file.",),
    "store": ("penstock.config.",),
}
"""What the packages of commands may import beside the public names."""
MAX_LINES = 500
MAX_FUNCTION_LINES = 40
TOP_LEVEL = {"core", "plugins", "contrib", "tests", "benchmarks", "docs", ".ci"}
# What a running gateway loads but a program that embeds or extends it need not pay for.
HEAVY = ("click", "rich", "httpcore", "opentelemetry", "h11", "hypothesis", "pytest", "uvloop")


def imports_of(path: Path) -> Iterator[str]:
    """Yield the full name of whatever a module imports, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> str:
    """Return the plugin a module belongs to: a module, or the first folder that is one plugin."""
    parts = path.relative_to(PLUGINS).with_suffix("").parts
    return ".".join(parts[:2] if parts[0] == "providers" else parts[:1])


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda path: str(path.relative_to(CORE)))
def test_core_imports_no_plugin(path: Path) -> None:
    assert [name for name in imports_of(path) if name.startswith("penstock_")] == []


def private_imports_of(path: Path) -> list[str]:
    public = {f"penstock.{name}" for name in penstock.__all__} | {"penstock"}
    tools = tuple(f"penstock.{name}." for name in PUBLIC_MODULES)
    ours = {name for name in imports_of(path) if name.partition(".")[0] == "penstock"} - public
    # These are commands, not plugins: one starts a gateway, as an embedding program does, the other finds one.
    embedding = COMMANDS.get(package_of(path), ()) if path.is_relative_to(PLUGINS) else ()
    return sorted(
        name
        for name in ours
        if not name.startswith((*tools, *embedding)) or any(part.startswith("_") for part in name.split("."))
    )


@pytest.mark.parametrize("path", sorted(PLUGINS.rglob("*.py")), ids=lambda path: str(path.relative_to(PLUGINS)))
def test_plugin_imports_only_public_names_and_no_sibling(path: Path) -> None:
    assert private_imports_of(path) == []
    own = f"penstock_plugins.{package_of(path)}"
    foreign = [
        name
        for name in imports_of(path)
        if name.startswith("penstock_plugins") and not f"{name}.".startswith(f"{own}.")
    ]
    assert foreign == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("contrib/*/src/**/*.py")), ids=lambda path: path.parent.name)
def test_contributed_package_imports_only_public_names(path: Path) -> None:
    assert private_imports_of(path) == []
    assert [name for name in imports_of(path) if name.startswith("penstock_plugins")] == []


@pytest.mark.parametrize("path", [*(CORE / f"{name}.py" for name in SANS_IO), *CORE.glob("dialects/*.py")],
                         ids=lambda path: path.stem)  # fmt: skip
def test_sans_io_module_imports_no_io(path: Path) -> None:
    forbidden = {"anyio", "asyncio", "socket", "ssl", "threading", "httpcore"}
    assert [name for name in imports_of(path) if name.partition(".")[0] in forbidden] == []


def test_only_three_modules_know_pluggy() -> None:
    knowing = {path.name for path in MODULES if any(name.partition(".")[0] == "pluggy" for name in imports_of(path))}
    assert knowing == {"hooks.py", "hookspecs.py", "plugins.py"}


@pytest.mark.parametrize("name", RELAY_PATH)
def test_relay_path_takes_no_body_apart(name: str) -> None:
    assert [found for found in imports_of(CORE / name) if found.partition(".")[0] in ("json", "msgspec")] == []


def test_files_keep_within_500_lines() -> None:
    files = [*MODULES, *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/**/*.py")]
    lengths = {path.relative_to(ROOT): path.read_text(encoding="utf-8").count("\n") for path in files}
    assert {str(path): length for path, length in lengths.items() if length > MAX_LINES} == {}


def functions_in(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each function and its length in lines, docstrings apart."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            about = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            length = (node.end_lineno or 0) - node.lineno + 1 - about
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", length


def test_functions_keep_within_40_lines() -> None:
    found = (function for path in MODULES for function in functions_in(path))
    assert {name: length for name, length in found if length > MAX_FUNCTION_LINES} == {}


def test_nothing_is_left_to_do() -> None:
    marks = re.compile("TO" + "DO|FIX" + "ME|NotImplemented" + "Error")
    files = [*MODULES, *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.[pch]*"), *ROOT.glob("docs/**/*.md")]
    assert [str(path.relative_to(ROOT)) for path in files if marks.search(path.read_text(encoding="utf-8"))] == []


def loaded_by(statement: str) -> set[str]:
    program = f"{statement}; import sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(finished.stdout.split())


@pytest.mark.parametrize("module", ["penstock", "penstock.testing.fixtures"])
def test_importing_penstock_is_light(module: str) -> None:
    heavy = set(HEAVY) - ({"pytest"} if module.endswith("fixtures") else set())
    assert loaded_by(f"import {module}") & heavy == set()


@pytest.mark.parametrize(
    "name", ["virtual_keys", "routing", "providers.openai", "providers.anthropic", "providers.mock"]
)
def test_importing_a_bundled_plugin_is_light(name: str) -> None:
    assert loaded_by(f"import penstock_plugins.{name}") & set(HEAVY) == set()


def test_top_level_folders_are_the_houses() -> None:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False, timeout=60
    )
    folders = {path.partition("/")[0] for path in listed.stdout.splitlines() if "/" in path}
    assert folders <= TOP_LEVEL
    assert not list((ROOT / "core").glob("*.py"))
    assert not list((ROOT / "plugins").glob("*.py"))
