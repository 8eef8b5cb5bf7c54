"""Draining: how a run is told to end early, and ends with exit code 75 and nothing left behind.

It is told by a signal (SIGINT, SIGTERM, SIGHUP), by a stop file, or by the loss of Ray.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ddsweep.errors import EXIT_DRAINED, UserError
from ddsweep.processes import MARK, RAY_WAS_LOST, leave
from ddsweep.results.files import is_there

__all__ = ["SIGNALS", "Drain", "Drained", "Interrupted", "out_of_reach"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""A person, a batch system or a service manager, a terminal that was closed."""

_LOOK_EVERY_S = 0.2
_COME_BACK_S = 8.0
_NOTICED_S = 3.0
_ONE_EVENT_S = 1.0
"""A signal that comes twice within this time is one event: `timeout` and systemd signal a process, and then
its group with it."""


@contextmanager
def out_of_reach() -> Iterator[None]:
    """`SIGNALS` do not reach processes that start in here, nor their children: children inherit blocked
    signals, whatever handlers they install. Only SIGKILL ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Drained(BaseException):
    """The run ends here: it was told to, and no work is in progress that could drain."""


class Interrupted(BaseException):
    """A second signal came while the run was draining."""


class Drain:
    """How a run learns that it is to end. A context manager around the whole run: a signal may come at any
    moment.

    The effect of the first signal depends on the state of the run:

    - `at_work`: a thread calls ``begin(cause)`` once, and the work drains by itself.
    - `interruptible`: `Drained` is raised at once. Nothing is made there that must be removed again.
    - elsewhere: it is noted, and `Drained` is raised where the next of these begins.

    A second signal raises `Interrupted`, once. In the processes of a launch that is a SIGINT only: a batch
    system signals all of them, and the one that started this run hands the signal on as well.
    """

    def __init__(self) -> None:
        self.cause: str | None = None
        self._lost = threading.Event()
        self._first = 0.0
        self._interruptible = self._at_work = self._raised = self._interrupted = False
        self._begin: Callable[[str], None] | None = None
        self._stop_file: Path | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._leftovers: list[Callable[[], object]] = []
        self._main = threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {}
        self._hook_before: Any = None
        self._again_counts = (signal.SIGINT,) if MARK in os.environ else SIGNALS

    def __enter__(self) -> Drain:
        if self._main:
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self._hook_before, sys.unraisablehook = sys.unraisablehook, self._swallowed
            self.listen()
        # This thread blocks no signal, so that the process takes them also while the main thread does.
        self._thread = threading.Thread(target=self._look, name="drain", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        for number, old in self._before.items():
            signal.signal(number, old)
        if self._main:
            sys.unraisablehook = self._hook_before

    def _swallowed(self, found: Any) -> None:
        """Reports an exception that Python could not pass on, from a destructor or beside a fork. A `Drained`
        of a signal handler is not reported: it is raised again at the end of `interruptible`."""
        if found.exc_type is not Drained:
            self._hook_before(found)

    def listen(self) -> None:
        """Take the signals (again: Ray installs a handler of its own). One that ``nohup`` has switched off
        stays so."""
        for number in self._before:
            if number != signal.SIGHUP or self._before[number] != signal.SIG_IGN:
                signal.signal(number, self._handle)

    # ------------------------------------------------------------------------ what the run is at

    def check(self) -> None:
        """Raise `Drained` if the run was told to end."""
        if self.cause is not None:
            raise self._drained()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        self._interruptible = True
        try:
            self.check()
            yield
        finally:
            self._interruptible = False
        self.check()  # once more: Python swallows an exception of a handler in a destructor

    @contextmanager
    def at_work(self, begin: Callable[[str], None], stop_file: Path) -> Iterator[None]:
        """``stop_file`` drains as a signal does. Raises `Drained` once Ray is lost."""
        with self._lock:
            self._begin, self._stop_file, self._at_work = begin, stop_file, True
        try:
            yield
        except UserError:
            raise
        except Exception:
            # An error inside Ray is often the first sign that Ray is gone.
            if not self._lost.wait(_NOTICED_S):
                raise
            raise self._drained() from None
        finally:
            self._at_work = False
            with self._lock:  # not while `begin` runs
                self._begin = None
        if self.ray_is_lost:
            self.check()

    # ------------------------------------------------------------------------------- being told

    def tell(self, cause: str) -> None:
        """Note a cause, from any thread: the first counts."""
        if self.cause is None:
            self.cause, self._first = cause, time.monotonic()

    def lose_ray(self, how: str) -> None:
        """Note, from any thread, that Ray is gone: work in progress can neither go on nor drain."""
        self.cause = f"{f'{self.cause}, and ' if self.cause else ''}Ray was lost ({how})"
        self._lost.set()
        RAY_WAS_LOST.set()
        if not self._main or (main := threading.main_thread().ident) is None:
            return
        signal.pthread_kill(main, signal.SIGTERM)  # it may wait for an answer that never comes
        if self._over.wait(_COME_BACK_S):
            return
        # It waits inside Ray, where no handler is called, and Ray would end this process with 1 in a minute.
        for remove in reversed(self._leftovers):
            with suppress(Exception):
                remove()
        print(f"ddsweep: {self._drained()}", file=sys.stderr, flush=True)
        leave(EXIT_DRAINED)

    @contextmanager
    def leftover(self, remove: Callable[[], object]) -> Iterator[None]:
        """Registers ``remove``, which does the caller's own clean-up. Another thread calls it if the run has
        to end while the caller waits for a Ray that is lost."""
        self._leftovers.append(remove)
        try:
            yield
        finally:
            self._leftovers.remove(remove)

    @property
    def ray_is_lost(self) -> bool:
        return self._lost.is_set()

    def _drained(self) -> Drained:
        self._raised = True
        return Drained(f"{self.cause}: stopped; the same command goes on")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        if self.cause is None:
            self.tell(signal.Signals(number).name)
        elif not self.ray_is_lost and time.monotonic() - self._first > _ONE_EVENT_S:
            if number in self._again_counts and not self._interrupted:
                self._interrupted = True
                raise Interrupted
            return
        if not self._raised and (self._interruptible or (self._at_work and self.ray_is_lost)):
            raise self._drained()

    def _look(self) -> None:
        """Begins to drain, in a thread of its own: a handler must not wait for anybody's lock."""
        while not self._over.wait(_LOOK_EVERY_S):
            with self._lock:
                cause = self.cause
                if cause is None and self._stop_file is not None and is_there(self._stop_file):
                    cause = f"{self._stop_file.name} file"
                if self._begin is not None and cause is not None:
                    begin, self._begin = self._begin, None
                    begin(cause)


def _leave_terminal() -> None:
    """After a hang-up, discard output: writing to a closed terminal is an error."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
