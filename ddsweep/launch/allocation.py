"""The allocation of a job: this task, its nodes, and the part of its node that it may use."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from ddsweep.errors import UserError

__all__ = ["NodeLimits", "Place", "node_limits", "slurm_place"]


@dataclass(frozen=True)
class Place:
    """This task of its job. ``hosts`` are the nodes of the job by rank, ``restart`` is the number of
    requeues."""

    job: str
    rank: int
    hosts: tuple[str, ...]
    restart: int

    @property
    def is_head(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class NodeLimits:
    """The part of this node that the job may use, by Slurm's account. Bytes; None if Slurm does not say."""

    cpus: int
    gpus: int
    memory: int | None


def node_limits(environment: Mapping[str, str], cpus: int | None = None) -> NodeLimits:
    """Read the allocation off Slurm's variables (sites fill in different ones)."""
    given = environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE")
    own = cpus or int(given or os.cpu_count() or 1)
    gpus = _gpus(environment)
    memory = None
    if environment.get("SLURM_MEM_PER_NODE"):
        memory = int(environment["SLURM_MEM_PER_NODE"]) * 2**20
    elif environment.get("SLURM_MEM_PER_CPU"):
        memory = int(environment["SLURM_MEM_PER_CPU"]) * 2**20 * own
    return NodeLimits(own, gpus, memory or None)


def _gpus(environment: Mapping[str, str]) -> int:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible != "NoDevFiles":  # Slurm's word for none
        return len([device for device in visible.split(",") if device.strip()])
    for part in environment.get("SLURM_TRES_PER_TASK", "").replace("=", ":").split(","):
        if "gpu" in part:
            return int(part.rpartition(":")[2])
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    return int(on_node) if on_node.isdigit() else 0


def slurm_place(environment: Mapping[str, str]) -> Place:
    """This task by Slurm's variables. Raises `UserError` outside of a job."""
    try:
        listed = environment["SLURM_JOB_NODELIST"]
        found = subprocess.run(
            ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, timeout=60, check=True
        )
        return Place(
            job=environment["SLURM_JOB_ID"],
            rank=int(environment["SLURM_PROCID"]),
            hosts=tuple(found.stdout.split()),
            restart=int(environment.get("SLURM_RESTART_COUNT") or 0),
        )
    except KeyError as error:
        raise UserError(f"{error.args[0]} is not set: this belongs into a Slurm job, under srun") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"scontrol show hostnames: {error}") from None
