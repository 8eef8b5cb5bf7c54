"""Jobs handed to Slurm, through submitit: the sbatch file of a site, and its submission."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ddsweep.errors import UserError
from ddsweep.launch.folder import Job, LaunchFolder
from ddsweep.launch.jobs import Stage
from ddsweep.launch.sbatch_options import without_variables
from ddsweep.launch.site import Site
from ddsweep.launch.slurm import SubmissionError, partitions, require_command

__all__ = ["executor", "script", "srun_options", "submit"]


def executor(site: Site, folder: LaunchFolder, name: str, **more: Any) -> Any:
    """submitit's executor for one job of this site; ``more`` are parameters of its own spelling."""
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR2"  # the signal of our jobs, for any shell
    import submitit

    submitit_executor: Any
    if site.scheduler == "local":
        submitit_executor = submitit.LocalExecutor(
            folder=folder.logs, max_num_timeout=site.requeues, python=site.python_command
        )
        submitit_executor.update_parameters(
            timeout_min=site.time,
            gpus_per_node=site.gpus_per_node,
            visible_gpus=_own_gpus(site.gpus_per_node),
            signal_delay_s=site.drain,
            setup=list(site.setup) or (),
        )
        return submitit_executor
    require_command("sbatch")
    submitit_executor = submitit.SlurmExecutor(
        folder=folder.logs, max_num_timeout=site.requeues, python=site.python_command
    )
    submitit_executor.update_parameters(**_parameters(site, name), **more)
    return submitit_executor


def _own_gpus(count: int) -> tuple[int, ...]:
    """The first GPUs that this process may use; submitit would take the machine's first. Raises `UserError`
    if it may use fewer, or if they go by other names than numbers, which submitit does not take."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or count == 0:
        return ()
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if len(names) < count:
        raise UserError(
            f"gpus_per_node: {count}, but CUDA_VISIBLE_DEVICES={visible} lets this shell use {len(names)}"
        )
    if not all(name.isdigit() for name in names[:count]):
        raise UserError(
            f"gpus_per_node: {count}: CUDA_VISIBLE_DEVICES={visible} names GPUs, and a local launch takes "
            "their numbers, such as 0,1 (`nvidia-smi -L` lists both)"
        )
    return tuple(int(name) for name in names[:count])


def _parameters(site: Site, name: str) -> dict[str, Any]:
    extra: dict[str, Any] = dict(site.sbatch)
    # The job outlives the loss of a node, except of the first.
    extra |= {"no-kill": True, "requeue" if site.requeues else "no-requeue": True}
    extra = {key: value for key, value in extra.items() if value is not False}
    parameters: dict[str, Any] = {
        "job_name": name,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "wckey": site.wckey,
        "time": site.time,
        "ntasks_per_node": 1,
        "cpus_per_task": site.cpus_per_node,
        "mem": None if site.memory_per_node is None else f"{round(site.memory_per_node * 1024)}M",
        "exclusive": site.exclusive or None,
        "setup": list(site.setup) or None,
        "signal_delay_s": site.drain,
        "additional_parameters": extra,
        # Since Slurm 22.05 srun does not inherit these options from sbatch.
        "srun_args": ["--no-kill", f"--cpus-per-task={site.cpus_per_node}"],
    }
    if site.gpus_per_node:
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        if site.gpu_syntax == "gres":
            parameters["gres"] = f"gpu:{kind}{site.gpus_per_node}"
        else:
            parameters["gpus_per_node"] = f"{kind}{site.gpus_per_node}"
    return {key: value for key, value in parameters.items() if value is not None} | {"wckey": site.wckey}


_OF_SBATCH = {"job_name", "time", "setup", "signal_delay_s", "additional_parameters", "srun_args", "wckey"}


def srun_options(site: Site, *, minutes: int, nodes: int) -> list[str]:
    """The site's own options for one ``srun`` outside of a job, of one task a node."""
    asked = {key: value for key, value in _parameters(site, "").items() if key not in _OF_SBATCH}
    asked |= {"time": minutes, "nodes": nodes, "wckey": site.wckey}
    asked |= {key: value for key, value in site.sbatch.items() if value is not False}
    return [
        f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
        for key, value in asked.items()
        if value is not None
    ]


def submit(site: Site, folder: LaunchFolder, name: str, stage: Stage, after: str | None = None) -> Job:
    """Submit ``stage``, to begin at the end of the job ``after``. Raises `SubmissionError` with Slurm's
    message."""
    import submitit

    ready = _executor_of(site, folder, name, stage, after)
    try:
        # submitit prints what Slurm said, and then raises with it.
        with redirect_stderr(StringIO()), without_variables(_named(ready.parameters)):
            found = ready.submit_array(stage.calls)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise SubmissionError(_refusal(str(error), site)) from None
    except subprocess.CalledProcessError as error:
        raise SubmissionError(_refusal(f"{error}\n{error.stderr or ''}", site)) from None
    number = str(found[0].job_id).partition("_")[0]
    return Job(number, stage.kind, elements=len(stage.calls) if len(stage.calls) > 1 else 0)


def _named(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The options of sbatch among submitit's ``parameters``, by their long names."""
    given = {**parameters, **parameters.get("additional_parameters", {})}
    return {key.replace("_", "-"): value for key, value in given.items()}


def _executor_of(site: Site, folder: LaunchFolder, name: str, stage: Stage, after: str | None) -> Any:
    more = {} if after is None else {"dependency": f"afterany:{after}"}
    return executor(site, folder, name, nodes=stage.nodes, array_parallelism=site.nodes, **more)


def script(site: Site, folder: LaunchFolder, name: str, stage: Stage, after: str | None = None) -> str:
    """The text of the sbatch file that `submit` would hand to Slurm: submitit gives it to a stub."""
    before = set(folder.logs.glob("*"))
    with TemporaryDirectory() as place, _first_on_path(place):
        sbatch = Path(place) / "sbatch"
        sbatch.write_text('#!/bin/sh\ncat "$1" > "$0.sh" && echo "Submitted batch job 0"\n')
        sbatch.chmod(0o700)
        if not os.access(sbatch, os.X_OK):  # the true sbatch would be run in its place
            raise SubmissionError(
                f"{place}: programs cannot be run from there (noexec), which --dry-run needs; set TMPDIR to "
                "another folder"
            )
        ready = _executor_of(site, folder, name, stage, after)
        try:
            ready.submit_array(stage.calls)
            return sbatch.with_name("sbatch.sh").read_text()
        finally:
            for made in set(folder.logs.glob("*")) - before:
                made.unlink()


@contextmanager
def _first_on_path(folder: str) -> Iterator[None]:
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _refusal(text: str, site: Site) -> str:
    lines = [line.partition("error:")[2].strip() for line in text.splitlines() if "error:" in line]
    said = "; ".join(dict.fromkeys(line for line in lines if line)) or " ".join(text.split())[:300]
    hint = ""
    if "ccount" in said:  # first: Slurm says "account or account/partition combination"
        hint = f"; set account in the site file (now {site.account}); sacctmgr lists yours"
    elif "artition" in said:
        hint = f"; the partitions are {', '.join(partitions()) or 'none'} (partition: {site.partition})"
    elif "node configuration" in said or "resources" in said:
        hint = "; ask for fewer nodes, cpus_per_node, gpus_per_node or memory_per_node"
    return f"Slurm refused the job: {said}{hint}"
