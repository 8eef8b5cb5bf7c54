"""Long runs in short periods: trials that go on, period after period, from one folder. No Ray, no pydantic.

``plan`` expands sweep files into JSON, where ddsweep is installed whole. ``run`` works on what is missing for
so many seconds, where torch is: networks of pools, trials (those of one shape together), evaluations. See
bench/README.md.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from campaign_jobs import plan_all, read_jobs
from campaign_tasks import Place, Task, lost, missing, work

from ddsweep.catalog import TrialSpec
from ddsweep.core.memory import keep_to_share
from ddsweep.errors import EXIT_DRAINED, CheckpointError, UserError
from ddsweep.evaluation import missing_units
from ddsweep.results.files import write_atomic
from ddsweep.results.layout import PoolDirectory, SweepDirectory
from ddsweep.results.lock import SweepLock
from ddsweep.trial import checkpoint_provenance
from ddsweep.trial_plan import pick_device

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

GRACE_S = 60.0
"""After the last second a worker has this long for its outer step and its checkpoints. Then it is killed."""


def run(place: Place) -> bool:
    """Work for one period; True if nothing is left to do. What a worker dies of is not tried again in the
    same period. Raises the `UserError` of a worker, such as missing data, once the others have drained."""
    (place.folder / "STOP").unlink(missing_ok=True)
    for job in place.jobs:
        directory = place.directory(job)
        directory.create()
        write_atomic(directory.sweep_file, job.yaml.encode(), directory.temporary)
        if job.pool is not None:
            PoolDirectory(place.folder / "pools" / job.pool[0]).create()
    idle = [_new_worker(place) for _ in range(place.side_by_side)]
    running: dict[Future[str], tuple[ProcessPoolExecutor, Task]] = {}
    given: set[Any] = set()
    wrong: UserError | None = None

    def look(seconds: float, when: str) -> None:
        nonlocal wrong
        for future in wait(running, seconds, when).done:
            worker, task = running.pop(future)
            error = future.exception()
            said = future.result() if error is None else str(error)
            if isinstance(error, UserError):
                wrong = error
                (place.folder / "STOP").touch()
            elif error is not None:
                if not isinstance(error, BrokenProcessPool):
                    traceback.print_exception(error)
                said = lost(place, task, error)
                _kill(worker)
                worker = _new_worker(place)
            idle.append(worker)
            print(f"{place.jobs[task.job].name} {task.label}: {said}", flush=True)

    try:
        while not place.is_over():
            for task in missing(place) if idle else ():
                if idle and given.isdisjoint(task.pieces):
                    given |= task.pieces
                    worker = idle.pop()
                    # Signals are for the driver, which tells by a file: its workers inherit the mask.
                    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
                    try:
                        future = worker.submit(work, place, task)
                    except BrokenProcessPool:  # it was killed while idle
                        worker = _new_worker(place)
                        future = worker.submit(work, place, task)
                    running[future] = worker, task
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            if not running:
                break
            look(0.5, FIRST_COMPLETED)
        look(GRACE_S, ALL_COMPLETED)
    finally:
        for worker in [*idle, *(worker for worker, _ in running.values())]:
            _kill(worker)
    if wrong is not None:
        raise wrong
    return not missing(place)


def _new_worker(place: Place) -> ProcessPoolExecutor:
    """A process of its own, so that only one task is lost with it. CUDA does not outlive a fork."""
    start = os.getpid(), place.device, place.gpus
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, start)


def _begin(driver: int, device: str, gpus: float) -> None:
    """Runs in each worker: it ends with the driver, or two would write the checkpoints of a trial."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != driver:
        os._exit(1)
    keep_to_share(device, gpus)


def _kill(worker: ProcessPoolExecutor) -> None:
    for process in list((worker._processes or {}).values()):
        process.kill()


def status(folder: Path) -> list[str]:
    """One line for each trial: how far it is."""
    lines = []
    for job in read_jobs(folder):
        directory = SweepDirectory(folder / job.name)
        for trial in job.trials:
            if directory.trials_part(trial.trial_id).exists():
                state = "done"
            elif directory.failure_part(trial.trial_id).exists():
                state = "failed"
            elif directory.distilled(trial.trial_id).exists():
                left = len(missing_units(trial, job.evaluation, directory))
                state = f"distilled, {left} of {len(job.evaluation.units(trial))} evaluations missing"
            else:
                state = _steps(trial, directory)
            lines.append(f"{job.name} {trial.trial_id}: {state}")
    return lines


def _steps(trial: TrialSpec, directory: SweepDirectory) -> str:
    try:
        step, columns = checkpoint_provenance(trial, directory)
    except CheckpointError:
        return "not begun"
    score = columns["val_score"]
    best = "" if score is None else f", validation {score:.4f}"
    return f"step {step} of {trial.outer_steps}{best}, {columns['wall_seconds']:.0f} s"


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (
        ("plan", "add sweep files to a campaign (needs all of ddsweep)"),
        ("run", "work on what is missing for one period"),
        ("status", "how far each trial is"),
    ):
        own = verbs.add_parser(verb, help=text)
        own.add_argument("folder", type=Path, metavar="DIR", help="the folder of the campaign")
        if verb != "status":
            root = os.environ.get("DDSWEEP_DATA")
            own.add_argument("--data-root", type=Path, default=Path(root) if root else None)
        if verb == "plan":
            more = "sweep files, then settings for all of them; pool.KEY=VALUE: of their pool's file"
            own.add_argument("given", nargs="+", metavar="FILE|KEY=VALUE", help=more)
        if verb == "run":
            own.add_argument("--seconds", type=float, required=True, help="how long this period is")
            own.add_argument("--device", choices=("cpu", "cuda"))
            own.add_argument("--side-by-side", type=int, help="worker processes (2 on a GPU, else 1)")
            own.add_argument("--threads", type=int, default=1, help="CPU threads of each worker")
            own.add_argument("--only", nargs="*", metavar="SWEEP", help="these sweeps of the campaign only")
    return parser.parse_args(given)


def _run(options: argparse.Namespace) -> int:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pick_device(device, 1.0)
    side_by_side = options.side_by_side or (2 if device == "cuda" else 1)
    jobs = read_jobs(options.folder)
    names = [job.name for job in jobs]
    if unknown := sorted(set(options.only or ()) - set(names)):
        raise UserError(f"--only: {', '.join(unknown)}: the campaign has {', '.join(names)}")
    chosen = tuple(job for job in jobs if not options.only or job.name in options.only)
    place = Place(
        options.folder.resolve(),
        chosen,
        options.data_root,
        device,
        side_by_side,
        options.threads,
        time.time() + options.seconds,
    )

    def stop(number: int, frame: Any) -> None:
        (place.folder / "STOP").touch()

    for number in SIGNALS:
        signal.signal(number, stop)
    with SweepLock(place.folder / ".lock"):
        whole = run(place)
    for line in status(options.folder):
        print(line)
    return 0 if whole else EXIT_DRAINED


def main(given: Sequence[str] | None = None) -> int:
    options = _arguments(given)
    try:
        if options.verb == "plan":
            plan_all(options.folder, options.given, options.data_root)
        elif options.verb == "status":
            print("\n".join(status(options.folder)))
        else:
            return _run(options)
    except UserError as error:
        print(f"campaign: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
