"""Launching a sweep. It refuses what cannot work before a job is submitted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ddsweep.catalog import CodeRef, TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.errors import ResultsError, UserError
from ddsweep.interpreter import SAFE_PATH, python_module
from ddsweep.launch.folder import (
    Job,
    Launch,
    LaunchFolder,
    launches_of,
    new_folder,
    read_json,
    write_json,
)
from ddsweep.launch.jobs import Stage, stages
from ddsweep.launch.site import Site
from ddsweep.launch.slurm import array_limit, cancel_jobs, check_nodes, check_site
from ddsweep.launch.submit import script, submit
from ddsweep.launch.watch import active_jobs
from ddsweep.machine import versions
from ddsweep.results.code import write_code, write_sets
from ddsweep.results.current import write_sweep_file
from ddsweep.results.files import results_error, write_atomic
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.lock import SweepLock, live_holder
from ddsweep.spec import SweepSpec, resolved_yaml

__all__ = ["Request", "check_fits", "dry_run", "launch"]

_LOCAL_START_S = 30.0


@dataclass(frozen=True)
class Request:
    """A request to launch. ``shares`` deals the trials to be distilled to the elements of an array; it is
    empty in mode ``cluster``, and if only evaluations are missing. ``trials`` are the ids of all trials of
    the sweep, ``code`` is that of users' own which they take."""

    sweep: SweepSpec
    directory: SweepDirectory
    site: Site
    site_file: Path
    mode: str
    data_root: Path | None
    shares: Sequence[Sequence[str]] = ()
    trials: Sequence[str] = ()
    code: Sequence[CodeRef] = ()

    def stages(self, folder: LaunchFolder) -> list[Stage]:
        return stages(folder, self.mode, self.site, len(self.shares))

    def job_name(self, stage: Stage) -> str:
        return f"ddsweep-{self.sweep.name}-{stage.kind}"


def check_fits(sweep: SweepSpec, trials: Sequence[TrialSpec], site: Site, mode: str) -> None:
    """Raises `UserError` for trials that no node of the site can run."""
    if mode == "array" and sweep.scheduler is not None:
        raise UserError(
            "scheduler: stopping trials early needs all of them in one Ray cluster; use --mode cluster, or "
            "scheduler=null"
        )
    if mode == "array" and sweep.search is not None and sweep.search.guided:
        raise UserError(
            f"search.kind: {sweep.search.kind} proposes trials from the scores of others, but an array needs "
            "all trials before that; use --mode cluster, or search.kind=random"
        )
    if mode == "array" and sweep.resources.to_be_measured:
        raise UserError(
            "resources: auto is measured where the trials run, but an array needs the numbers before that; "
            "use --mode cluster, or give resources.cpus and resources.gpus"
        )
    memory, there_is = sweep.resources.memory, site.memory_per_node
    if isinstance(memory, float) and there_is is not None and memory > there_is:
        raise UserError(
            f"resources.memory: a trial asks for {memory:g} GB, but a node of this site has {there_is:g} "
            "(memory_per_node)"
        )
    for trial in trials:
        cpus, gpus = sweep.resources.for_trial(trial)
        for key, asked, there in (("cpus", cpus, site.cpus_per_node), ("gpus", gpus, site.gpus_per_node)):
            if asked > there:
                raise UserError(
                    f"resources.{key}: a trial asks for {asked:g}, but a node of this site has {there} "
                    f"({key}_per_node)"
                )


# -------------------------------------------------------------------------------------- submitting


def launch(request: Request) -> LaunchFolder:
    """Write the folder of the launch and submit its jobs. Raises `UserError` if the sweep is at work already,
    or Slurm refuses; nothing stays behind."""
    directory, site = request.directory, request.site
    _check_path(directory)
    if site.scheduler == "slurm":
        _check_with_slurm(request)
    made = [place for place in (directory.root, directory.root.parent) if not place.exists()]
    directory.create()
    with SweepLock(directory.launch_lock):
        _refuse_if_active(directory)
        # This checks that no other driver is at work. The lock is then free for the jobs, which may start
        # before all are submitted.
        with SweepLock(directory.lock):
            for token in directory.root.glob("jobs/*/runs/*/token"):  # tokens of jobs that were killed
                token.unlink(missing_ok=True)
        try:
            folder = new_folder(directory, request.mode)
            try:
                _write(request, folder)
                return _submit_all(request, folder) if site.scheduler == "slurm" else _start_local(folder)
            except BaseException:
                if not (read_json(folder.record) or {}).get("jobs"):
                    shutil.rmtree(folder.root, ignore_errors=True)
                raise
        except UserError:
            if directory.root in made and not launches_of(directory) and live_holder(directory.lock) is None:
                shutil.rmtree(directory.root, ignore_errors=True)
                for place in made[1:]:
                    with suppress(OSError):  # the folder holds another sweep by now
                        place.rmdir()
            raise


def _check_path(directory: SweepDirectory) -> None:
    """Raises `UserError` for a path that Slurm misreads: logs lie below the results, and Slurm replaces %j
    and the like in their paths."""
    path = str(directory.root.resolve())
    if "%" in path or "\\" in path or not path.isprintable():
        raise UserError(
            f"--results: {path!r}: the path of a launched sweep cannot have %, \\ or line breaks in it: its "
            "logs go there, and Slurm reads % as the number of a job; choose another folder"
        )


def _check_with_slurm(request: Request) -> None:
    check_site(request.site)
    if request.mode == "cluster":
        check_nodes(request.site)
    limit = array_limit() if request.mode == "array" else None
    if limit is not None and request.site.array_tasks > limit:
        raise UserError(
            f"array_tasks: {request.site.array_tasks}; this Slurm takes at most {limit} in an array"
        )


def _refuse_if_active(directory: SweepDirectory) -> None:
    for folder in launches_of(directory):
        try:
            earlier = Launch.read(folder)
        except ResultsError:  # a record of another version; if that launch is at work, it has the lock
            continue
        if active := active_jobs(folder, earlier):
            raise ResultsError(
                f"{directory.root}: launch {folder.name} is still there: "
                f"{', '.join(f'job {state.id} is {state.state}' for state in active)}; wait for it "
                f"(ddsweep status {directory.root}) or end it (ddsweep cancel {directory.root})"
            )


def _write(request: Request, folder: LaunchFolder) -> None:
    record = Launch(
        mode=request.mode,
        sweep=request.sweep.name,
        site=request.site.model_dump(),
        site_file=str(request.site_file),
        results=str(request.directory.root.resolve().parent),
        data_root=None if request.data_root is None else str(request.data_root.resolve()),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=versions(),
    )
    record.write(folder)
    text = resolved_yaml(request.sweep).encode()
    write_atomic(folder.sweep_file, text, folder.root / ".tmp")
    write_code(request.directory, request.code)
    write_sets(request.directory, request.sweep.start_sets())
    write_sweep_file(request.directory, text, request.trials)
    if request.mode == "array":
        content = {"trials": [list(share) for share in request.shares], "evals": request.site.array_tasks}
        write_json(folder.shares, content)


def _submit_all(request: Request, folder: LaunchFolder) -> LaunchFolder:
    """Each job is recorded as soon as it is submitted. If one is refused, the earlier ones are cancelled
    too."""
    jobs: list[Job] = []
    try:
        for stage in request.stages(folder):
            after = jobs[-1].id if jobs else None
            jobs.append(submit(request.site, folder, request.job_name(stage), stage, after))
            replace(Launch.read(folder), jobs=tuple(jobs)).write(folder)
    except BaseException:
        cancel_jobs(jobs)
        replace(Launch.read(folder), jobs=()).write(folder)
        raise
    return folder


def _start_local(folder: LaunchFolder) -> LaunchFolder:
    """Start a process in its own session, so that the launch outlives its terminal."""
    with (folder.logs / "local.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            python_module("ddsweep.launch.local", str(folder.root)),
            env={**os.environ, **SAFE_PATH},  # submitit starts more processes
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + _LOCAL_START_S
    while not Launch.read(folder).jobs:
        if process.poll() is not None or time.monotonic() > deadline:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            said = (folder.logs / "local.log").read_text(encoding="utf-8").strip().splitlines()
            raise UserError(f"the local launch did not start: {said[-1] if said else 'it said nothing'}")
        time.sleep(0.1)
    return folder


# ------------------------------------------------------------------------------------- only showing


def dry_run(request: Request, trials: int, missing: int, say: Callable[[str], None]) -> None:
    """Print exactly what `launch` would submit; no file stays."""
    site = request.site
    _check_path(request.directory)
    if site.scheduler == "slurm":
        _check_with_slurm(request)
    say(
        f"{request.sweep.name}: {missing} of {counted(trials, 'trial')} to do; mode {request.mode}, "
        f"results in {request.directory.root}"
    )
    folder = LaunchFolder(request.directory.root.resolve() / "jobs" / "LAUNCH")
    before: str | None = None
    for stage in request.stages(folder):
        if site.scheduler == "local":
            command = f"{site.python_command} -u -m submitit.core._submit {folder.logs}"
            say(f"{stage.kind}: {len(stage.calls)} x {command}")
            continue
        with _only_for_now(folder.logs):  # submitit always makes this folder
            text = script(site, folder, request.job_name(stage), stage, before)
        say(f"\n# {stage.kind}: sbatch, with this file\n{text.rstrip()}")
        before = f"<id of {stage.kind}>"


@contextmanager
def _only_for_now(folder: Path) -> Iterator[None]:
    """Make a folder, and remove it at the end with all folders that were made above it."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise results_error(error, folder) from error
    finally:
        with suppress(OSError):
            for place in made:
                place.rmdir()
