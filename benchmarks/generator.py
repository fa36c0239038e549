"""Run the load generator and read what it measured."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
from benchmarks.processes import MeasurementError, pinned

SPARE_SECONDS = 20.0


@attrs.frozen
class Load:
    """How to send; times in seconds. A rate makes an open loop, a count sends exactly that many."""

    connections: int = 1
    rate: float = 0
    count: int = 0
    ramp: float = 0
    warmup: float = 0.3
    seconds: float = 2
    drain: float = 0.5
    reads_events: bool = False

    def arguments(self) -> list[str]:
        """Spell this as the generator's command line."""
        options = ["--connections", str(self.connections), "--seconds", str(self.seconds)]
        options += ["--ramp", str(self.ramp), "--warmup", str(self.warmup), "--drain", str(self.drain)]
        if self.rate:
            options += ["--rate", str(self.rate)]
        if self.count:
            options += ["--count", str(self.count)]
        if self.reads_events:
            options.append("--events")
        return options

    @property
    def most_seconds(self) -> float:
        """The time after which the generator must have ended."""
        return self.ramp + self.warmup + self.seconds + self.drain + SPARE_SECONDS


@attrs.frozen
class Percentiles:
    """A distribution of durations in microseconds."""

    count: int
    p50: float
    p90: float
    p99: float
    p999: float
    min: float
    max: float
    mean: float


@attrs.frozen
class LoadResult:
    """What the generator measured in its window; `content_bytes` counts answers without framing."""

    requests: int
    errors: int
    unfinished: int
    seconds: float
    per_second: float
    started: int
    started_late: int
    content_bytes: int
    latency_us: Percentiles
    first_byte_us: Percentiles
    event_delay_us: Percentiles

    @property
    def bytes_per_answer(self) -> float:
        """Mean size of an answer's content."""
        return self.content_bytes / self.requests if self.requests else 0.0


def read_result(line: str) -> LoadResult:
    """Read the generator's JSON line."""
    values: dict[str, Any] = json.loads(line)
    for name in ("latency_us", "first_byte_us", "event_delay_us"):
        values[name] = Percentiles(**values[name])
    return LoadResult(**values)


@attrs.frozen
class Generator:
    """The compiled load generator on its cores."""

    program: Path
    cores: Set[int]

    def run(self, port: int, requests: Path, load: Load) -> LoadResult:
        """Run to the end.

        Raises:
            MeasurementError: it did not end in time or measured nothing.
        """
        with self._start(port, requests, load) as generator:
            return self._finish(generator, load)

    @contextmanager
    def holding(self, port: int, requests: Path, load: Load) -> Iterator[None]:
        """Enter the block once content has come on every connection; end the load with the block."""
        with self._start(port, requests, load) as generator:
            assert generator.stdout is not None
            line = generator.stdout.readline()
            if b'"open"' not in line:
                raise MeasurementError("not every connection received content")
            yield

    @contextmanager
    def _start(self, port: int, requests: Path, load: Load) -> Iterator[subprocess.Popen[bytes]]:
        command = [str(self.program), "--port", str(port), "--requests", str(requests), *load.arguments()]
        with pinned(self.cores):
            generator = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        with generator:
            try:
                yield generator
            finally:
                generator.kill()

    def _finish(self, generator: subprocess.Popen[bytes], load: Load) -> LoadResult:
        try:
            output, complaints = generator.communicate(timeout=load.most_seconds)
        except subprocess.TimeoutExpired as error:
            raise MeasurementError("the load generator did not end in time") from error
        lines = output.decode().splitlines()
        if not lines or '"requests"' not in lines[-1]:
            raise MeasurementError(f"the load generator failed: {complaints.decode(errors='replace')}")
        result = read_result(lines[-1])
        if result.requests == 0 and result.event_delay_us.count == 0:
            raise MeasurementError(f"no answer was measured: {complaints.decode(errors='replace')[-400:]}")
        return result
