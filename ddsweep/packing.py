"""Measures how many trials at a time get the most done on one machine or GPU, for ``resources: auto``.

A trial that keeps a part of a device busy should not own it. So trials are distilled together in a process,
and processes run side by side. Both numbers grow in turn while more gets done: first the processes on the
CPU, where each core takes one, and first the trials of a process on a GPU. Each time as many copies of one
trial take outer steps on random images. Nothing here depends on the content of images, so neither data nor
pools are read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from ddsweep.catalog import TrialSpec
from ddsweep.core.distill import applied, gradients_together, initial_state, outer_step
from ddsweep.core.images import RealSet
from ddsweep.core.init import draw_network
from ddsweep.core.memory import keep_to_share
from ddsweep.core.networks import build_network
from ddsweep.core.task import Task
from ddsweep.cost import choose_memory, estimate
from ddsweep.errors import DivergedError, UserError
from ddsweep.interpreter import answers, python_module
from ddsweep.provenance import device_name, environment
from ddsweep.results.files import write_atomic
from ddsweep.results.layout import SweepDirectory
from ddsweep.trial_plan import TrialSettings, first_plan, pick_device, ready_network

__all__ = ["Packed", "Packing", "best", "measure", "measured", "process_counts", "warm_step"]

SECONDS = 3.0
"""The trials take steps for so long, or for three steps if that is longer."""

LEAST_STEPS = 3
PATIENCE_S = 600.0
"""The time limit for a trial's first steps; the very first trial may compile them."""

NEARLY = 0.97
"""Fewer trials are preferred if they get such a part of the most work done: they take less memory. Less than
that part of the best so far, and larger numbers are not tried."""

_FEWEST_IMAGES = 512


@dataclass(frozen=True)
class Packing:
    """``count`` processes side by side, each with ``cpus``, ``gpus`` and ``together`` trials."""

    count: int
    cpus: float
    gpus: float
    together: int = 1

    @property
    def trials(self) -> int:
        return self.count * self.together


@dataclass(frozen=True)
class Packed(Packing):
    """A packing, and the outer steps that all of its trials take in a second."""

    steps_per_second: float = 0.0


def process_counts(cores: int, gpus: float, most: int, shard: float = 0.0) -> list[Packing]:
    """The numbers of processes that are worth measuring, for at most ``most`` of them. On one GPU they run
    beside an evaluation shard with ``shard`` of it, and share the ``cores`` of the GPU; on the CPU they have
    down to one core each."""
    if gpus:
        own, free = cores / gpus, 1 - shard
        parts = [(n, int(free / n * 10_000 + 1e-6) / 10_000) for n in (1, 2, 4, 8) if n <= most]
        return [Packing(n, max(0.1, int(own / n * 10) / 10), part) for n, part in parts if part > 0]
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < cores]
    return [Packing(n, float(cores // n), 0.0) for n in [*counts, cores] if n <= max(1, most)]


def best(found: Sequence[Packed]) -> Packed:
    """The packing that gets most done; of nearly equal ones the one with the fewest trials, and of these the
    one with the fewest processes."""
    most = max(packed.steps_per_second for packed in found)
    good = [packed for packed in found if packed.steps_per_second >= NEARLY * most]
    return min(good, key=lambda packed: (packed.trials, packed.count))


@dataclass(frozen=True)
class Room:
    """What trials may take: ``cores`` and ``gpus``, on one GPU beside an evaluation shard with ``shard`` of
    it. At most ``most`` trials at a time, of which up to ``together`` in one process; with ``fixed`` so many
    in any case, as long as there are enough. On the CPU all of them have ``memory`` bytes."""

    cores: int
    gpus: float
    most: int
    shard: float = 0.0
    together: int = 1
    fixed: bool = False
    memory: float = math.inf

    def holds(self, packing: Packing, spec: TrialSpec, settings: TrialSettings) -> bool:
        """Whether there are so many trials like ``spec`` and, by estimate, memory for them. One at a time is
        tried in any case."""
        mode, segment = choose_memory(spec, settings.memory_mode, settings.segment)
        each = 0 if self.gpus else estimate(spec, 1, memory_mode=mode, segment=segment).memory_bytes
        few = packing.trials <= self.most and packing.together <= self.together
        return packing.trials == 1 or (few and packing.trials * each <= self.memory)


def measured(spec: TrialSpec, settings: TrialSettings, room: Room, directory: SweepDirectory) -> list[Packed]:
    """What is worth measuring for ``spec`` in its ``room``, measured; or earlier measurements of a similar
    trial on such a machine, kept in the cache of ``directory``. Users' code lies there too. Raises
    `UserError` if GPUs are asked for and torch sees none, or a shard takes all of one."""
    device = pick_device("cuda" if room.gpus else "cpu", room.gpus).type
    if not process_counts(room.cores, room.gpus, room.most, room.shard):
        raise UserError(
            f"resources: auto: evaluate.gpus: {room.shard:g} leaves nothing of a GPU for trials; give less, "
            "or numbers for resources.cpus and resources.gpus"
        )
    kind = replace(spec, seed=0, on_nonfinite="skip")
    what = [kind.to_dict(), settings.memory_mode, settings.segment, settings.compile]
    limits = {"most": room.most, "together": room.together}
    own = {name: value for name, value in asdict(room).items() if name not in (*limits, "memory")}
    where = [device_name(device), own, environment()["torch_version"]]
    key = hashlib.sha256(json.dumps([what, where], sort_keys=True).encode()).hexdigest()[:16]
    path = directory.cache / "packing.json"
    known = _read(path)
    if key in known and all(known[key][name] >= limit for name, limit in limits.items()):
        rows = [Packed(**row) for row in known[key]["found"]]
        # Fewer trials are left than were then, or there is less memory.
        fits = [row for row in rows if room.holds(row, spec, settings)]
        if fits:
            return fits
    found = _climb(kind, settings, device, room, directory.code)
    known[key] = {**limits, "found": [asdict(packed) for packed in found]}
    write_atomic(path, json.dumps(known, indent=1).encode(), directory.temporary)
    return found


def _climb(
    spec: TrialSpec, settings: TrialSettings, device: str, room: Room, code: Path | None
) -> list[Packed]:
    """The packings that were measured: processes and trials in a process grow in turn, or processes alone."""
    counts = process_counts(room.cores, room.gpus, room.most, room.shard)
    if room.fixed:
        each = [min(room.together, max(1, room.most // packing.count)) for packing in counts]
        tried = [replace(packing, together=n) for packing, n in zip(counts, each, strict=True)]
        tried = [tried[0], *(packing for packing in tried[1:] if room.holds(packing, spec, settings))]
        return measure(spec, settings, device, tried, SECONDS, code)
    widths = [2**n for n in range(1, room.together.bit_length()) if 2**n < room.together]
    widths += [room.together] if room.together > 1 else []

    def more_processes(now: Packing) -> list[Packing]:
        return [replace(packing, together=now.together) for packing in counts if packing.count > now.count]

    def more_together(now: Packing) -> list[Packing]:
        return [Packing(now.count, now.cpus, now.gpus, width) for width in widths]

    found = measure(spec, settings, device, counts[:1], SECONDS, code)
    for grow in (more_together, more_processes) if room.gpus else (more_processes, more_together):
        tried = [packing for packing in grow(best(found)) if room.holds(packing, spec, settings)]
        found = measure(spec, settings, device, tried, SECONDS, code, found)
    return found


def _read(path: Path) -> dict[str, Any]:
    """Earlier measurements; empty if they cannot be read."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def measure(
    spec: TrialSpec,
    settings: TrialSettings,
    device: str,
    tried: Sequence[Packing],
    seconds: float = SECONDS,
    code: Path | None = None,
    found: Sequence[Packed] = (),
) -> list[Packed]:
    """``found``, and each of ``tried`` in turn, as processes of their own. One that does not fit (usually the
    memory) and larger ones are left out, and so are those after one that gets clearly less done than the best
    so far. Raises `UserError` if not even the first one runs."""
    found = list(found)
    for packing in tried:
        how = replace(
            settings,
            device=device,
            threads=max(1, int(packing.cpus)),
            gpus=packing.gpus,
            cohort=packing.together,
        )
        try:
            rate = _side_by_side(packing, spec, how, seconds, code)
        except UserError as error:
            if not found:
                raise UserError(f"resources: auto: a trial could not be measured: {error}") from error
            break
        found.append(Packed(packing.count, packing.cpus, packing.gpus, packing.together, rate))
        if rate < NEARLY * max(packed.steps_per_second for packed in found):
            break
    return found


def _side_by_side(
    packing: Packing, spec: TrialSpec, settings: TrialSettings, seconds: float, code: Path | None
) -> float:
    """Outer steps in a second of all trials of ``packing``: all begin once all are warm."""
    what = {"spec": spec.to_dict(), "settings": asdict(settings), "code": str(code or ""), "seconds": seconds}
    job = json.dumps(what)
    command = python_module("ddsweep.packing")
    running: list[_Process] = []
    try:
        for _ in range(packing.count):
            running.append(_Process(command))
        for process in running:
            process.say(job)
        for process in running:
            process.hear()  # that it is warm
        for process in running:
            process.say("go")
        return sum(float(process.hear()) for process in running)
    finally:
        for process in running:
            process.end()


class _Process:
    """One of them, with its trials. Its other output (warnings, an error, what a user's code prints) goes to
    a file, so that it never waits for a reader."""

    def __init__(self, command: Sequence[str]) -> None:
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipe = subprocess.PIPE
        self.popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.said, text=True)

    def say(self, line: str) -> None:
        assert self.popen.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `hear` tells why
            self.popen.stdin.write(line + "\n")
            self.popen.stdin.flush()

    def hear(self) -> str:
        """Its next line. Raises `UserError` with its last words if it ends without."""
        assert self.popen.stdout is not None
        ready = select.select([self.popen.stdout], [], [], PATIENCE_S)[0]
        line = self.popen.stdout.readline().strip() if ready else ""
        if line:
            return line
        if not ready:
            raise UserError(f"it took no step in {PATIENCE_S:g} s")
        code = self.popen.wait()
        self.said.seek(0)
        words = self.said.read().strip().splitlines()
        raise UserError(words[-1] if words else f"it ended with code {code}")

    def end(self) -> None:
        self.popen.kill()
        self.popen.communicate()
        self.said.close()


# ------------------------------------------------------------------------- one process of several


def _random_task(spec: TrialSpec, settings: TrialSettings) -> Task:
    """``spec`` on random images, with random networks instead of those of a pool."""
    plan, data = first_plan(spec, settings), spec.dataset
    torch.set_num_threads(plan.threads)
    keep_to_share(plan.device, settings.gpus)
    generator = torch.Generator().manual_seed(0)
    number = max(_FEWEST_IMAGES, spec.real_batch)
    pixels = torch.randint(256, (number, *data.shape), generator=generator, dtype=torch.uint8)
    labels = torch.arange(number) % data.classes
    network = build_network(spec.network_spec, data.shape, data.classes)
    channels = data.shape[0]
    real = RealSet(pixels, labels, (0.5,) * channels, (0.25,) * channels)

    def pool(numbers: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        drawn = (draw_network(network, "xavier", 1.0, number) for number in numbers)
        return [{name: value.float() for name, value in weights.items()} for weights in drawn]

    own = pool if spec.pool is not None else None
    return Task.of(spec, plan, real, own)


def warm_step(spec: TrialSpec, settings: TrialSettings) -> Callable[[], None]:
    """A function that takes an outer step of ``settings.cohort`` trials like ``spec`` together, on random
    images, and has done so once. It begins from the same images each time, with the draws of the next step:
    only the cost matters, and a run on random images may diverge."""
    first = _random_task(spec, settings)
    tasks = [first.of_trial(replace(spec, seed=seed)) for seed in range(settings.cohort)]
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(*first.labels.shape, *spec.dataset.shape, generator=generator)
    begun = [initial_state(task, start) for task in tasks]
    numbers = itertools.cycle(range(spec.outer_steps))

    def step() -> None:
        number = next(numbers)
        states = [replace(state, step=number) for state in begun]
        if len(tasks) == 1:
            with suppress(DivergedError):
                outer_step(tasks[0], states[0])
        else:
            applied(tasks, states, gradients_together(tasks, states))
        if first.plan.device == "cuda":
            torch.cuda.synchronize()

    step()
    return step


def _work(job: dict[str, Any], said: TextIO) -> None:
    spec = TrialSpec.from_dict(job["spec"])
    ready_network(spec, Path(job["code"]))
    settings = TrialSettings(**job["settings"])
    step = warm_step(spec, settings)
    print("warm", file=said, flush=True)
    sys.stdin.readline()
    began, steps, passed = time.perf_counter(), 0, 0.0
    while passed < job["seconds"] or steps < LEAST_STEPS:
        step()
        steps, passed = steps + 1, time.perf_counter() - began
    print(steps * settings.cohort / passed, file=said, flush=True)


if __name__ == "__main__":
    try:
        _work(json.loads(sys.stdin.readline()), answers())
    except Exception as error:
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
