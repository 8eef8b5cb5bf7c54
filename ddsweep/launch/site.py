"""The file of a site: where jobs go, and how its Slurm takes requests. No torch, no Ray."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ddsweep.catalog.numbers import counted, real, whole
from ddsweep.launch.sbatch_options import Options, further_options
from ddsweep.spec.files import load_model
from ddsweep.spec.values import SECTION, Count, shown

__all__ = ["LONGEST_TEMPORARY", "PORTS_OF_A_JOB", "Site", "load_site"]

LONGEST_TEMPORARY = 26
"""Ray puts Unix sockets some 64 characters below its folder, which is ``<temporary>/dds<job>/ray``, and
their paths end at 107."""

PORTS_OF_A_JOB = 10
"""The number of ports of one job; jobs share none."""

_LOCAL_REQUEUES = 5
"""The number of restarts by submitit's local executor; it cannot be changed."""

_WORKER_PORTS = range(10002, 20000)
"""Ray's own ports: it refuses a head port among these."""


def _minutes(value: Any) -> int:
    """Minutes of ``90m``, ``4h``, ``1d12h``, or Slurm's ``04:00:00`` and ``1-12:00:00`` in quotes."""
    text = str(value).strip()
    if isinstance(value, str):
        if found := re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?", text):
            days, hours, minutes = (int(part or 0) for part in found.groups())
            total = (days * 24 + hours) * 60 + minutes
        elif found := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
            days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
            total = (days * 24 + hours) * 60 + minutes + (seconds > 0)
        else:
            total = 0
        if total > 0:
            return total
    # A bare number is refused: Slurm reads minutes, other programs seconds.
    raise ValueError(f"{shown(value)} is not a time; write 90m, 4h, 1d12h, or '04:00:00' in quotes")


def _names(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(f"{shown(value)} is not a list; write [{value!r}], one entry a line of the shell")
    return value


def _one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError(f"{shown(value)} is not one line of text")
    return value


Text = Annotated[str, Field(min_length=1), AfterValidator(_one_line)]
NotNegative = Annotated[int, BeforeValidator(whole), Field(ge=0)]
_MOST_SECONDS, _MOST_GIGABYTES = 30 * 86400, 1_000_000
Seconds = Annotated[float, BeforeValidator(real), Field(gt=0, le=_MOST_SECONDS)]
Gigabytes = Annotated[float, BeforeValidator(real), Field(gt=0, le=_MOST_GIGABYTES)]


class Site(BaseModel):
    """A site file. docs/cluster.md explains each key; ``--key value`` on the command line and
    ``site.key=value`` override it."""

    model_config = SECTION

    scheduler: Literal["slurm", "local"]
    """`slurm`, or `local`: this machine, through submitit's local executor"""
    partition: Text | None = None
    """as for sbatch; none: the site's default"""
    account: Text | None = None
    """the account that is charged"""
    qos: Text | None = None
    """quality of service"""
    constraint: Text | None = None
    """features that nodes must have"""
    wckey: Text | None = None
    """none: not passed on (submitit's own default is refused by some sites)"""
    time: Annotated[int, BeforeValidator(_minutes)] = Field("1h", validate_default=True)
    """of one job: `90m`, `4h`, `1d12h`, `'04:00:00'` in quotes"""
    nodes: Count = 1
    """of the job; of an array, how many elements run at a time"""
    array_tasks: Count = 8
    """elements of each array"""
    cpus_per_node: Count
    """CPUs of a job on each node"""
    gpus_per_node: NotNegative = 0
    """GPUs of a job on each node"""
    gpu_syntax: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """how the site wants to be asked: `gpus-per-node`, or `gres`"""
    gpu_type: Text | None = None
    """such as `a100`, where nodes have several"""
    memory_per_node: Gigabytes | None = None
    """GB; none: the site's default"""
    exclusive: Annotated[bool, Field(strict=True)] = False
    """whole nodes"""
    sbatch: Options = {}
    """a mapping of further options of sbatch, such as `{reservation: mine, hold: true}`; those that another
    key decides are refused, in every spelling of sbatch; variables `SBATCH_...` of your shell do not go over
    any of these"""
    setup: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    """a list of shell lines before Python starts: modules, activating an environment"""
    python: Text | None = None
    """the shell words that start Python on a node, such as those of a container; none: the one that
    launches"""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """overrides `resources.device` of the sweep"""
    temporary: Text = "/tmp"
    """a folder on the node itself, of at most 26 characters: a folder that only you may enter is made in it,
    for Ray's sockets"""
    first_port: Count = 20000
    """the first port for jobs of this site"""
    ports: Count = 10000
    """how many; each job uses ten, by its number. Not between 10002 and 19999, where Ray's workers listen"""
    object_store: Gigabytes | None = None
    """GB of shared memory for Ray's objects: the data set is there once per node; none: a fifth of the
    memory, at most 20"""
    dashboard: Annotated[bool, Field(strict=True)] = True
    """Ray's dashboard, on loopback of the head's node"""
    wait_for_nodes: Seconds = 300.0
    """seconds until the sweep starts without those that did not come"""
    least_nodes: Count = 1
    """with fewer the job fails"""
    node_failure: Annotated[Seconds, Field(ge=1)] = 30.0
    """seconds until a silent node is given up, at least 1"""
    drain: Count = 120
    """seconds before the time limit at which a job begins to checkpoint; less than `time`"""
    requeues: NotNegative = 5
    """times that a job is requeued to go on; under `local` at most 5"""
    poll: Seconds = 15.0
    """seconds between two looks of `--wait`"""
    longest_pending: Annotated[int, BeforeValidator(_minutes)] | None = None
    """a time after which `--wait` cancels a launch of which nothing has started"""

    @property
    def python_command(self) -> str:
        """The shell words that start Python on a node. It imports nothing from the current folder."""
        return f"{self.python or shlex.quote(sys.executable)} -P"

    @field_validator("temporary")
    @classmethod
    def _short(cls, value: str) -> str:
        if not value.startswith("/"):
            raise ValueError(f"{value!r} is not an absolute path of a folder on the node itself")
        if len(value) > LONGEST_TEMPORARY:
            raise ValueError(
                f"{value!r} has {len(value)} characters; at most {LONGEST_TEMPORARY}, because Ray keeps Unix "
                "sockets below it, whose paths may not be longer than 107"
            )
        return value

    @field_validator("sbatch", mode="before")
    @classmethod
    def _further(cls, value: Any, info: ValidationInfo) -> Options:
        return further_options(value, exclusive=bool(info.data.get("exclusive")))

    @model_validator(mode="after")
    def _possible(self) -> Site:
        last = self.first_port + self.ports - 1
        if self.ports < PORTS_OF_A_JOB or self.first_port < 1024 or last > 65535:
            raise ValueError(
                f"first_port, ports: {self.first_port} to {last}; at least {PORTS_OF_A_JOB} ports between "
                "1024 and 65535"
            )
        if self.first_port <= _WORKER_PORTS[-1] and last >= _WORKER_PORTS[0]:
            raise ValueError(
                f"first_port, ports: {self.first_port} to {last} overlaps {_WORKER_PORTS[0]} to "
                f"{_WORKER_PORTS[-1]}, where Ray's workers listen; 20000 and above are free of them"
            )
        if self.least_nodes > self.nodes:
            raise ValueError(f"least_nodes: {self.least_nodes} of {counted(self.nodes, 'node')} cannot come")
        if self.scheduler == "local" and self.nodes != 1:
            raise ValueError("nodes: scheduler local is this one machine; nodes must be 1")
        if self.scheduler == "local" and self.requeues > _LOCAL_REQUEUES:
            raise ValueError(
                f"requeues: scheduler local starts a job again at most {_LOCAL_REQUEUES} times; ask for a "
                "longer time"
            )
        if self.drain >= self.time * 60:
            raise ValueError(
                f"drain: {self.drain} s before the end of a job of {self.time} min is before its beginning"
            )
        return self


def load_site(path: Path, overrides: Sequence[str] = ()) -> Site:
    """The site in the YAML file ``path``, with ``key=value`` overrides. Raises `SettingError`."""
    return load_model(Site, path, overrides, what="site file")
