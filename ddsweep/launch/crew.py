"""The processes of one array element: as many as its node holds, each with its own part of the GPUs."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ddsweep.catalog.numbers import counted
from ddsweep.errors import EXIT_DRAINED, GpuLostError, UserError
from ddsweep.launch.allocation import NodeLimits
from ddsweep.launch.folder import LaunchFolder
from ddsweep.launch.processes import Signals
from ddsweep.sweep.drain import SIGNALS
from ddsweep.sweep.retry import RetryPolicy, WorkerError, told_death

__all__ = ["Crew"]

_LOOK_S = 0.5
_TINY = 1e-9


@dataclass(frozen=True)
class Crew:
    """As many processes side by side as ``cpus`` and ``gpus`` of each fit into the node's limits."""

    folder: LaunchFolder
    name: str
    signals: Signals
    limits: NodeLimits
    cpus: float
    gpus: float
    policy: RetryPolicy
    drain_s: float = math.inf
    """So long after the warning before the time limit what still runs is killed: it is lost, and the job is
    requeued, which it would not be after its time is up."""

    @property
    def slots(self) -> int:
        by_cpu = int(self.limits.cpus / self.cpus + _TINY) if self.cpus else self.limits.cpus
        if not self.gpus:
            return max(1, by_cpu)
        if self.gpus < 1:
            by_gpu = int(1 / self.gpus + _TINY) * self.limits.gpus
        else:
            by_gpu = self.limits.gpus // int(self.gpus)
        if by_cpu < 1 or by_gpu < 1:
            raise UserError(
                f"resources: a trial asks for {counted(self.cpus, 'CPU')} and {counted(self.gpus, 'GPU')}, "
                f"but an element of the array has {self.limits.cpus} and {self.limits.gpus}"
            )
        return min(by_cpu, by_gpu)

    def devices(self) -> list[str]:
        """``CUDA_VISIBLE_DEVICES`` for each process: those that share a GPU see the same one."""
        if not self.gpus:
            return [""] * self.slots
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace("NoDevFiles", "")
        seen = [name.strip() for name in visible.split(",") if name.strip()]
        seen = seen or [str(number) for number in range(self.limits.gpus)]  # Slurm only counts them
        if self.gpus >= 1:
            each = int(self.gpus)
            return [",".join(seen[i * each : (i + 1) * each]) for i in range(self.slots)]
        return [seen[i % len(seen)] for i in range(self.slots)]

    def run(
        self,
        call: Callable[..., str],
        items: Sequence[tuple[Any, ...]],
        broken: Callable[[str, Exception, int], None],
        apart: Callable[[tuple[Any, ...]], list[tuple[Any, ...]]] = lambda item: [item],
        saved: Callable[[tuple[Any, ...]], int] = lambda item: 0,
    ) -> int:
        """``call(folder, stop file, *item)`` for each item, whose first word is a trial. One that raises, or
        whose process dies, is tried again as ``policy`` says, and ``broken`` hears of the last time. Failures
        of before do not count once an item has ``saved`` more steps. An item that falls ``apart`` into
        several does so at its second failure (at the first, if nothing is tried again), and each of them then
        has all attempts. Each process is a pool of its own: if it is killed, the others go on.
        """
        stop_file = self.folder.root / "stops" / self.name
        stop_file.parent.mkdir(exist_ok=True)
        stop_file.unlink(missing_ok=True)
        devices = self.devices()[: len(items)]
        crew = [_new_process(device) for device in devices]
        free = deque(range(len(crew)))
        waiting, failures, failed, drained = deque(items), Counter[tuple[Any, ...]](), 0, False
        not_before: dict[tuple[Any, ...], float] = {}
        saved_before = Counter[tuple[Any, ...]]()
        late = math.inf
        running: dict[Future[str], tuple[int, tuple[Any, ...]]] = {}
        try:
            while waiting or running:
                if not drained and self.signals.any:
                    drained = True
                    with suppress(OSError):  # no space, say: what runs then ends by itself
                        stop_file.touch()
                    waiting.clear()
                    print(f"{self.name}: draining", flush=True)
                now = time.monotonic()
                if self.signals.ending and late == math.inf:
                    late = now + self.drain_s
                if now > late:
                    names = ", ".join(" ".join(map(str, item)) for _, item in running.values())
                    said = f"has not come to rest within {self.drain_s:.0f} s: {names}: ended now"
                    print(f"{self.name}: {said}", flush=True)
                    for child in multiprocessing.active_children():
                        child.kill()
                    break
                for item in [item for item in waiting if not_before.get(item, now) <= now][: len(free)]:
                    waiting.remove(item)
                    slot = free.popleft()
                    words = (call, str(self.folder.root), str(stop_file), *item)
                    try:
                        future = crew[slot].submit(_call, *words)
                    except BrokenProcessPool:  # it was killed while idle
                        crew[slot].shutdown()
                        crew[slot] = _new_process(devices[slot])
                        future = crew[slot].submit(_call, *words)
                    running[future] = (slot, item)
                if not running and waiting:
                    time.sleep(_LOOK_S)
                for future in wait(running, _LOOK_S, FIRST_COMPLETED).done:
                    slot, item = running.pop(future)
                    free.append(slot)
                    try:
                        state = future.result()
                    except GpuLostError as lost:
                        if drained:
                            state = str(lost)
                        elif len(free) + len(running) > 1:  # others take the work
                            free.remove(slot)
                            waiting.appendleft(item)
                            state = f"{lost}; this place is given up"
                        else:
                            for part in apart(item):
                                broken(part[0], lost, 1)
                            state = "failed"
                    except Exception as raised:
                        error: Exception = raised
                        if isinstance(raised, BrokenProcessPool):
                            error = WorkerError(told_death("the process was killed"))
                            crew[slot].shutdown()
                            crew[slot] = _new_process(devices[slot])
                        parts, steps = apart(item), saved(item)
                        if steps > saved_before[item] and not parts[1:]:
                            saved_before[item], failures[item] = steps, 0
                        failures[item] += 1
                        again = self.policy.wait(1 if parts[1:] else failures[item])
                        if drained:
                            state = str(error)
                        elif parts[1:] and (failures[item] > 1 or again is None):
                            waiting.extend(parts)
                            state = f"{error}; each will be tried by itself"
                        elif again is not None or self.signals.any:  # which kills one that starts
                            waiting.append(item)
                            not_before[item] = time.monotonic() + (again or 0.0)
                            state = f"{error}; it will be tried again in {again or 0:.0f} s"
                        else:
                            broken(item[0], error, failures[item])
                            state = "failed"
                    failed += state.startswith("failed")
                    print(f"{self.name}: {' '.join(map(str, item))}: {state}", flush=True)
        except BaseException:
            with suppress(OSError):
                stop_file.touch()  # otherwise it would wait for the others to end
            raise
        finally:
            for process in crew:
                process.shutdown()
        if drained:
            return EXIT_DRAINED
        return 2 if failed else 0


def _new_process(device: str) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (device, os.getpid()))


def _begin(device: str, parent: int) -> None:
    """Runs in each process of a crew: it ends with the element, sees its own GPU only, and leaves signals to
    the element."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in (signal.SIGUSR2, *SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    os.environ["CUDA_VISIBLE_DEVICES"] = device


def _call(call: Callable[..., str], *words: Any) -> str:
    """Runs in each process of a crew. Its errors must survive pickling, or they would break the pool."""
    try:
        return call(*words)
    except (UserError, GpuLostError):  # its text is complete, and survives
        raise
    except BaseException as error:
        traceback.print_exc()
        if "torch" in sys.modules:
            from ddsweep.core.memory import end_without_gpu

            end_without_gpu(error)
        try:
            keeps = isinstance(error, Exception) and type(pickle.loads(pickle.dumps(error))) is type(error)
        except Exception:
            keeps = False
        if keeps:
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
