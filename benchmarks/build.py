"""Compile the mock upstream and the load generator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import attrs

HERE = Path(__file__).parent
SOURCES = {
    "mock": ("mock.c", "answers.c", "due_heap.c"),
    "load": ("load.c", "load_options.c", "response.c", "histogram.c", "variants.c"),
}
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")


@attrs.frozen
class Programs:
    """Paths of the compiled programs."""

    mock: Path
    load: Path


def find_compiler() -> str | None:
    """Return the path of a C compiler, or None."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def compile_programs(folder: Path = HERE / "build") -> Programs:
    """Compile what is older than its sources.

    Raises:
        RuntimeError: no compiler was found, or it refused; the text holds what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, sources in SOURCES.items():
        _compile(folder / name, [HERE / source for source in sources])
    return Programs(mock=folder / "mock", load=folder / "load")


def _compile(program: Path, sources: list[Path]) -> None:
    newest = max(path.stat().st_mtime for path in (*sources, *HERE.glob("*.h")))
    if program.exists() and program.stat().st_mtime > newest:
        return
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("the benchmarks need a C compiler (cc, gcc or clang) on the PATH")
    command = [compiler, *FLAGS, "-o", str(program), *map(str, sources), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{program.name} does not compile:\n{done.stderr}")
