"""Processes of a job on one node: signals that only set flags, children that die with it, none left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import IO

from ddsweep.sweep.drain import SIGNALS, out_of_reach

__all__ = ["Signals", "end", "spawn", "spawn_out_of_reach", "time_to_drain"]

_PR_SET_PDEATHSIG = 1


def time_to_drain(drain: float) -> float:
    """Seconds for a job to come to rest before its time limit, of which it is warned ``drain`` seconds
    before. The rest is for its nodes to clean up and for Slurm to accept the requeue: Slurm does not requeue
    a job whose time is up."""
    return drain - min(30.0, drain / 3)


class Signals:
    """The signals of this process. The handlers only set flags.

    ``ending``: SIGUSR2. The job's time is nearly up, or the job is preempted; it goes on after a requeue.
    ``terminated``: SIGTERM. The job was cancelled or is preempted; Slurm decides whether it is requeued.
    ``stopping``: SIGTERM, SIGINT or SIGHUP came, `stop` was called, or the function given to `stop_when` says
    so. submitit's own handlers, which would save and requeue from within the signal and ignore SIGTERM, are
    replaced; `requeue` calls the one for SIGUSR2 when everything has come to rest.
    """

    def __init__(self) -> None:
        self.ending = self.terminated = self._stopped = False
        self._told_otherwise: Callable[[], bool] = lambda: False
        self._requeue = signal.getsignal(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, self._end)
        for number in SIGNALS:
            signal.signal(number, self._stop)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.ending = True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        self.terminated = self.terminated or number == signal.SIGTERM

    def stop(self) -> None:
        """As SIGINT does, from any thread."""
        self._stopped = True

    def stop_when(self, told: Callable[[], bool]) -> None:
        """A cause besides signals, checked at each look."""
        self._told_otherwise = told

    @property
    def stopping(self) -> bool:
        self._stopped = self._stopped or self._told_otherwise()
        return self._stopped

    @property
    def any(self) -> bool:
        return self.ending or self.stopping

    def requeue(self) -> None:
        """Hand over to submitit: it saves the call again, requeues the job and ends this process."""
        if callable(self._requeue):
            self._requeue(signal.SIGUSR2, None)


def spawn(
    command: Sequence[str],
    environment: Mapping[str, str],
    output: IO[str] | None = None,
    *,
    fate: signal.Signals = signal.SIGTERM,
) -> subprocess.Popen[str]:
    """Start a child that gets the signal ``fate`` when its parent dies, however that happens.

    SIGUSR2 is ignored in it and in all that it starts: Slurm sends the warning before the time limit to every
    process of a step, and Ray's would die of it. It writes no core dumps: a Ray node that was taken for dead
    aborts, and would leave gigabytes. ``output`` takes stdout and stderr.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), str(int(fate)), *command],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        text=True,
    )


def spawn_out_of_reach(
    command: Sequence[str], environment: Mapping[str, str], output: IO[str] | None = None
) -> subprocess.Popen[str]:
    """As `spawn`, for a child that ends, with all that it starts, by SIGKILL alone. Slurm sends SIGTERM to
    every process of a step before it takes the nodes away, and processes that drain need the others."""
    with out_of_reach():
        return spawn(command, environment, output, fate=signal.SIGKILL)


_LEASH = f"""
import ctypes, os, resource, signal, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, int(sys.argv[2]))
if os.getppid() != int(sys.argv[1]):  # it died before we asked
    sys.exit(1)
os.execvp(sys.argv[3], sys.argv[3:])
"""
# The program that the child runs before the command. A preexec_fn may run only in a process without threads,
# and Ray has started some before the driver starts.


def end(process: subprocess.Popen[str], patience_s: float) -> int:
    """SIGTERM, and SIGKILL after ``patience_s``. Returns the exit code."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
