"""What the machine is, and which core runs what."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

RESERVED = 2
"""Cores kept for the mock upstream and the load generator."""


@attrs.frozen
class CorePlan:
    """Which cores the gateway (or nginx), the mock, the load generator and the runner may use."""

    gateway: frozenset[int]
    mock: frozenset[int]
    load: frozenset[int]
    runner: frozenset[int]

    @property
    def is_shared(self) -> bool:
        """Whether parts that should not disturb each other share a core."""
        return bool(self.mock & self.load or self.gateway & (self.mock | self.load))


def plan_cores(cores: Sequence[int], workers: int = 1) -> CorePlan:
    """Give each worker, the mock and the load generator a core of its own, as far as there are enough.

    The runner sleeps while something is measured; it gets what is left, or shares the load generator's core.
    """
    if len(cores) == 1:
        only = frozenset(cores)
        return CorePlan(gateway=only, mock=only, load=only, runner=only)
    reserved = min(RESERVED, len(cores) - 1)
    taken = max(1, min(workers, len(cores) - reserved))
    mock, load = cores[taken], cores[taken + reserved - 1]
    rest = frozenset(cores[taken + reserved :]) or frozenset([load])
    return CorePlan(gateway=frozenset(cores[:taken]), mock=frozenset([mock]), load=frozenset([load]), runner=rest)


def order_cores(siblings: Mapping[int, str]) -> list[int]:
    """Order cores so that one core of each hardware pair comes before any second one.

    The second thread of the first core comes last: whatever runs there slows the gateway down.

    Args:
        siblings: for each core, any name shared by the threads of one hardware core.
    """
    firsts: list[int] = []
    seconds: list[int] = []
    seen: set[str] = set()
    for core, pair in sorted(siblings.items()):
        (seconds if pair in seen else firsts).append(core)
        seen.add(pair)
    return firsts + seconds[::-1]


def usable_cores() -> list[int]:
    """List the cores this program may use, best first."""
    siblings = {}
    for core in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        siblings[core] = path.read_text().strip() if path.exists() else str(core)
    return order_cores(siblings)


@attrs.frozen
class Facts:
    """What a reader needs to judge the figures; nothing that identifies the machine."""

    cores: int
    processor: str
    python: str
    nginx: str
    load_average: float


def read_facts(nginx: str) -> Facts:
    """Collect the facts; `nginx` is the path of its program."""
    said = subprocess.run([nginx, "-v"], capture_output=True, text=True, check=False, timeout=10).stderr
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return Facts(
        cores=len(os.sched_getaffinity(0)),
        processor=names[0] if names else platform.machine(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        nginx=said.strip().rpartition("/")[2].split(" ")[0],
        load_average=os.getloadavg()[0],
    )
