"""Several processes that do the same: fork them, pass signals on, replace those that die, end together.

Signals only wake the supervisor; what they ask for is done between forks, never within one, so no worker is missed.
Between the fork and the worker's own event loop they are blocked, and kept for it. A pipe from each worker says that it
could listen, and then that it does; another, which only the supervisor could write to, ends all workers with it,
whatever killed it. The first workers begin to listen together: else clients that all come back at once would crowd
the first.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import attrs

from penstock.errors import ConfigurationError
from penstock.log import Log, message_of, traceback_of


@attrs.define(eq=False)
class Place:
    """What a worker has of its supervisor."""

    lifeline: int
    """A file descriptor that ends with the supervisor."""
    doors: int
    """A file descriptor that ends once workers may listen."""
    _said: int

    def say_prepared(self) -> None:
        """Say that the worker could listen."""
        self._say(_PREPARED)

    def say_listening(self) -> None:
        """Say that it does; nothing is said after that."""
        self._say(_LISTENING)
        os.close(self._said)

    def _say(self, word: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # the supervisor was killed: the lifeline says so
            os.write(self._said, word)


Serve = Callable[[Place], int]
"""Serve in a worker's place until a signal or the end of its lifeline."""

MIN_PAUSE = 0.1
MAX_PAUSE = 10.0
STEADY_SECONDS = 30.0
"""A worker that lived so long is replaced after the shortest pause again."""
CONFIGURATION_STATUS = 2
_PREPARED, _LISTENING = b"p", b"l"
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@attrs.define(eq=False)
class _Worker:
    """One worker's place: the process in it, or when it gets its next one."""

    pid: int | None = None
    ready: int | None = None
    """The end of a pipe that is readable once the process listens."""
    started: float = 0.0
    due: float = 0.0
    pause: float = MIN_PAUSE


class Supervisor:
    """Keep ``count`` workers running until a signal ends them."""

    def __init__(self, count: int, serve: Serve, all_listen: Callable[[], None], log: Log) -> None:
        self._workers = [_Worker() for _ in range(count)]
        self._serve = serve
        self._all_listen = all_listen
        self._log = log
        self._status: int | None = None
        """The exit status, once the workers are ending."""
        self._waiting = set(self._workers)
        """Those that have not listened yet, until all have."""
        self._unprepared = set(self._workers)
        """Those that could not listen yet and have not ended, until the doors are open."""
        self._selector = selectors.DefaultSelector()
        self._lifeline = os.pipe()
        self._doors = os.pipe()

    def run(self) -> int:
        """Fork the workers and look after them; returns the exit status once all have ended."""
        wake, woken = socket.socketpair()
        wake.setblocking(False)
        woken.setblocking(False)
        for number in (*_PASSED_ON, signal.SIGCHLD):
            signal.signal(number, _do_nothing)
        signal.set_wakeup_fd(woken.fileno())
        self._selector.register(wake, selectors.EVENT_READ)
        while self._status is None or any(worker.pid for worker in self._workers):
            self._fork_due()
            for key, _ in self._selector.select(self._patience()):
                if key.data is not None:
                    self._listens(key.data)
                else:
                    with contextlib.suppress(BlockingIOError):
                        self._pass_on(wake.recv(4096))
            self._reap()
        return self._status

    # --- signals --------------------------------------------------------------------------------------------------

    def _pass_on(self, numbers: bytes) -> None:
        for number in numbers:
            if number in _PASSED_ON:
                if number != signal.SIGHUP and self._status is None:
                    self._status = 0
                self._signal(number)

    def _signal(self, number: int) -> None:
        for worker in self._workers:
            # Not reaped yet, so the number is still this worker's.
            if worker.pid is not None:
                os.kill(worker.pid, number)

    # --- workers --------------------------------------------------------------------------------------------------

    def _patience(self) -> float | None:
        """Return the seconds until the next worker is to be started; None where none is."""
        if self._status is not None:
            return None
        due = [worker.due for worker in self._workers if worker.pid is None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _fork_due(self) -> None:
        for worker in self._workers:
            if self._status is None and worker.pid is None and worker.due <= time.monotonic():
                self._fork(worker)

    def _fork(self, worker: _Worker) -> None:
        ready, listening = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
        try:
            pid = os.fork()
            if not pid:
                self._work(ready, listening)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(listening)
        os.set_blocking(ready, False)
        worker.pid, worker.ready, worker.started = pid, ready, time.monotonic()
        self._selector.register(ready, selectors.EVENT_READ, worker)

    def _work(self, ready: int, listening: int) -> None:
        """Be a worker; never returns."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (*_PASSED_ON, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            self._selector.close()
            os.close(ready)
            os.close(self._lifeline[1])
            if self._unprepared:
                os.close(self._doors[1])
            status = self._serve(Place(self._lifeline[0], self._doors[0], listening))
        except ConfigurationError as error:
            for fault in error.faults:
                print(f"penstock: {fault}", file=sys.stderr)  # noqa: T201
            status = CONFIGURATION_STATUS
        except BaseException as error:  # noqa: BLE001 - the end of this process, which must not go on as its parent
            details = {"error": type(error).__name__, "message": message_of(error), "traceback": traceback_of(error)}
            self._log.error("worker failed", pid=os.getpid(), **details)
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _listens(self, worker: _Worker) -> None:
        assert worker.ready is not None
        try:
            says = os.read(worker.ready, 1)
        except BlockingIOError:  # a child of the worker that ended holds the other end
            says = b""
        self._is_prepared(worker)
        if says == _PREPARED:
            return
        self._forget_pipe(worker)
        if says and self._waiting:
            self._waiting.discard(worker)
            if not self._waiting and self._status is None:
                self._all_listen()

    def _is_prepared(self, worker: _Worker) -> None:
        """Open the doors with the last; one that has ended keeps nobody waiting."""
        if self._unprepared:
            self._unprepared.discard(worker)
            if not self._unprepared:
                os.close(self._doors[1])

    def _forget_pipe(self, worker: _Worker) -> None:
        if worker.ready is not None:
            self._selector.unregister(worker.ready)
            os.close(worker.ready)
            worker.ready = None

    def _reap(self) -> None:
        for worker in self._workers:
            if worker.pid is not None:
                pid, status = os.waitpid(worker.pid, os.WNOHANG)
                if pid:
                    self._ended(worker, os.waitstatus_to_exitcode(status))

    def _ended(self, worker: _Worker, status: int) -> None:
        pid, worker.pid = worker.pid, None
        while worker.ready is not None:
            self._listens(worker)
        if self._status is not None:
            return
        if status == CONFIGURATION_STATUS and self._waiting:
            # While it serves, the others go on with the last good configuration; before that nobody is served.
            self._status = CONFIGURATION_STATUS
            self._signal(signal.SIGTERM)
            return
        now = time.monotonic()
        if now - worker.started >= STEADY_SECONDS:
            worker.pause = MIN_PAUSE
        self._log.error("worker ended", pid=pid, status=status, restart_seconds=worker.pause)
        worker.due = now + worker.pause
        worker.pause = min(2 * worker.pause, MAX_PAUSE)


def _do_nothing(_number: int, _frame: Any) -> None:
    """Be there so that a signal wakes the supervisor instead of ending it."""
