"""What the rows measure with: the subjects, the interleaving, the load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import Popen

import attrs
from benchmarks.build import Programs
from benchmarks.gateway import ALL_PLUGINS_COMMAND, GOVERNED_COMMAND, SECRETS, GatewayCommand, Served, Stores
from benchmarks.generator import Generator, Load, LoadResult
from benchmarks.machine import CorePlan
from benchmarks.nginx import write_nginx_command
from benchmarks.processes import (
    MeasurementError,
    free_port,
    running,
    running_mock,
    wait_for_answer,
    wait_for_listeners,
)
from benchmarks.prompts import Prompt, build_requests, write_requests
from benchmarks.report import Spread, paired

PROXIES = ("gateway", "nginx")
SUBJECTS = (*PROXIES, "direct")
FURTHER = {"governed": GOVERNED_COMMAND, "all-plugins": ALL_PLUGINS_COMMAND}
"""Gateways that some rows compare, whichever is under test."""


@attrs.frozen
class Subject:
    """Something that answers: the gateway, nginx or the mock itself."""

    name: str
    port: int
    program: Popen[bytes] | None = None
    start_seconds: float = 0.0
    secrets: Mapping[str, str] = SECRETS


@attrs.frozen
class Measured:
    """For each subject, by name: what every window gave, and the row's figure of it."""

    results: Mapping[str, Sequence[LoadResult]]
    values: Mapping[str, Sequence[float]]

    @property
    def spreads(self) -> dict[str, Spread]:
        """Summarise the figure for each subject."""
        return {name: Spread.of(values) for name, values in self.values.items()}

    @property
    def errors(self) -> int:
        """Count the answers that failed, of all subjects."""
        return sum(result.errors for list_ in self.results.values() for result in list_)

    def compare(self, combine: Callable[..., float], *names: str) -> Spread:
        """Combine the figures of the named subjects window by window."""
        return paired(combine, *(self.values[name] for name in names))


@attrs.define
class Bench:
    """One run: where things are, how often and how long to measure, and what is running."""

    programs: Programs
    gateway_command: GatewayCommand
    nginx: str
    folder: Path
    plan: CorePlan
    cores: Sequence[int]
    rounds: int
    is_quick: bool
    say: Callable[[str], None]
    _stack: ExitStack = attrs.field(factory=ExitStack)
    _mock_port: int = 0
    _standing: dict[str, Subject] = attrs.field(factory=dict)
    _stores: Stores = attrs.field(init=False, default=attrs.Factory(lambda self: Stores(self.folder), takes_self=True))
    _count: int = 0

    @contextmanager
    def open(self) -> Iterator[Bench]:
        """Run the mock for the time of the block; end everything that was started in it."""
        with self._stack:
            self._mock_port = self._stack.enter_context(running_mock(self.programs.mock, self.plan.mock))
            self._standing["direct"] = Subject("direct", self._mock_port)
            yield self

    @contextmanager
    def fresh(
        self, name: str, *, workers: int = 1, plan: CorePlan | None = None, mock_port: int = 0
    ) -> Iterator[Subject]:
        """Start a gateway or nginx and wait for its first 200; end it with the block."""
        self._count += 1
        folder = self.folder / f"{name}-{self._count}"
        folder.mkdir()
        port = free_port()
        upstream = mock_port or self._mock_port
        command = None if name == "nginx" else FURTHER.get(name, self.gateway_command)
        if command is None:
            served = Served(write_nginx_command(folder, self.nginx, port, upstream))
        else:
            served = command.write(folder, port, upstream, workers, self._stores)
        log = folder / "output.log"
        request = build_requests(Prompt(), port, served.secret, 1)[0]
        started = time.perf_counter()
        with running(served.command, (plan or self.plan).gateway, log) as program:
            try:
                wait_for_answer(program, port, request, log)
                seconds = time.perf_counter() - started
                if command is not None and command.template is None:
                    wait_for_listeners(port, workers)
            except MeasurementError as error:
                raise MeasurementError(f"{name} is {error}") from error
            yield Subject(name, port, program, seconds, served.secrets)

    def standing(self, name: str) -> Subject:
        """Return the subject that stays up between rows; start it when it is not running."""
        if FURTHER.get(name) == self.gateway_command:
            name = "gateway"
        subject = self._standing.get(name)
        if subject is None or (subject.program is not None and subject.program.poll() is not None):
            subject = self._stack.enter_context(self.fresh(name))
            self._standing[name] = subject
        return subject

    def seconds(self, quick: float, full: float) -> float:
        """Choose how long to measure."""
        return quick if self.is_quick else full

    def write(self, subject: Subject, prompt: Prompt) -> Path:
        """Write the requests for a prompt to a subject."""
        path = self.folder / f"requests-{subject.port}"
        return write_requests(path, build_requests(prompt, subject.port, subject.secrets[prompt.key]))

    def measure(self, subject: Subject, prompt: Prompt, load: Load, plan: CorePlan | None = None) -> LoadResult:
        """Send load to a subject and return what was measured."""
        generator = Generator(self.programs.load, (plan or self.plan).load)
        return generator.run(subject.port, self.write(subject, prompt), load)

    @contextmanager
    def holding(self, subject: Subject, prompt: Prompt, load: Load) -> Iterator[None]:
        """Keep streams open for the time of the block."""
        generator = Generator(self.programs.load, self.plan.load)
        with generator.holding(subject.port, self.write(subject, prompt), load):
            yield

    def interleave(
        self, prompt: Prompt, load: Load, figure: Callable[[LoadResult], float], slices: int = 1
    ) -> Measured:
        """Send the same to all subjects, by turns.

        Args:
            figure: what the row is about; shown while the row is measured.
            slices: how many windows each round is cut into, for figures that drift within seconds.
        """
        return self.take_turns({name: (name, prompt) for name in SUBJECTS}, load, figure, slices)

    def take_turns(
        self,
        turns: Mapping[str, tuple[str, Prompt]],
        load: Load,
        figure: Callable[[LoadResult], float],
        slices: int = 1,
    ) -> Measured:
        """Measure A B C, B C A, C A B, … so that nothing always follows the same.

        Args:
            turns: by the name of its results, who is asked and what.
        """
        names = tuple(turns)
        results: dict[str, list[LoadResult]] = {name: [] for name in names}
        for number in range(self.rounds * slices):
            turn = number % len(names)
            for name in (*names[turn:], *names[:turn]):
                asked, prompt = turns[name]
                result = self.measure(self.standing(asked), prompt, load)
                results[name].append(result)
                self.say(f"    {number + 1} {name}: {figure(result):,.3f}, {result.errors} errors")
        values = {name: [figure(result) for result in list_] for name, list_ in results.items()}
        return Measured(results, values)

    @contextmanager
    def mock_on(self, plan: CorePlan) -> Iterator[int]:
        """Run a second mock on the cores of another plan; yield its port."""
        with running_mock(self.programs.mock, plan.mock) as port:
            yield port
