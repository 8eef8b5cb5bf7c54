"""What `ddsweep doctor` finds in the answers of machines: one finding for each check."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ddsweep.catalog.numbers import counted
from ddsweep.launch.doctor_job import JOB_MIN, Answers
from ddsweep.launch.probe import Facts
from ddsweep.launch.site import LONGEST_TEMPORARY, PORTS_OF_A_JOB, Site
from ddsweep.machine import LEAST_FILES

__all__ = [
    "Finding",
    "check_clocks",
    "check_data",
    "check_gpus",
    "check_open_files",
    "check_ports",
    "check_reported",
    "check_results",
    "check_same_versions",
    "check_shared_memory",
    "check_temporary",
    "check_token",
]

_LITTLE_SPACE = 2 * 10**9
_LITTLE_SHARED = 10**9
_FEW_FILES = 1024
_LEAST_SHARED = 120 * 2**20
"""Ray's object store takes at least 100 MiB, and at most nine tenths of what is free."""

_SKEW_S = (10.0, 150.0)
"""Differences that are a warning, and a failure: a lock is stale when its heartbeat is 300 s old."""


State = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line: what was checked, what was found and, unless it is ``ok``, what to do."""

    state: State
    name: str
    text: str


def check_reported(answers: Answers, site: Site) -> Finding:
    """Whether the job started and all nodes answered."""
    if answers.waiting:
        return Finding(
            "FAIL",
            "nodes",
            f"a job of {counted(site.nodes, 'node')} and {min(site.time, JOB_MIN)} min still waits "
            f"({answers.waiting}) and was cancelled; wait longer with --patience, or ask for less",
        )
    there = [found.host for found in answers.facts]
    if len(there) == site.nodes:
        return Finding("ok", "nodes", f"{', '.join(there)} answered")
    silent = [
        f"{host}: {(answers.said.get(rank) or ('python printed nothing',))[-1]}"
        for rank, host in sorted(answers.started.items())
        if host not in there
    ]
    of_slurm = [line for line in answers.said.get(-1, ()) if "error" in line]
    told = "; ".join(silent or of_slurm[:3]) or "Slurm said nothing"
    return Finding(
        "FAIL",
        "nodes",
        f"{len(there)} of {site.nodes} answered; {told}; is the environment on every node (setup, python)?",
    )


def check_same_versions(nodes: Sequence[Facts], here: dict[str, str]) -> Finding:
    def differing(found: Facts) -> str:
        told = [
            f"{name} {found.versions.get(name)} (here {version})"
            for name, version in here.items()
            if found.versions.get(name) != version
        ]
        return ", ".join(told)

    fine = f"the same on {_count(nodes)} as here"
    return _of_each("versions", nodes, differing, fine, "install the same environment on all nodes")


def check_results(nodes: Sequence[Facts], results: str) -> Finding:
    fine = f"{results}: files are renamed, flushed and locked as they must be on {_count(nodes)}"
    advice = "set --results to a folder that all nodes share"
    return _of_each("results", nodes, lambda found: found.shared_trouble, fine, advice)


def check_token(nodes: Sequence[Facts]) -> Finding:
    """The token, on the nodes that see the results folder."""
    fine = f"mode 600 holds on {_count(nodes)}"
    advice = "set --results to a file system that keeps modes and owners"
    return _of_each("token", nodes, lambda found: found.token_trouble, fine, advice)


def check_temporary(nodes: Sequence[Facts], temporary: str) -> Finding:
    finding = _of_each(
        "temporary",
        nodes,
        lambda found: found.temporary_trouble,
        f"{temporary} ({len(temporary)} of at most {LONGEST_TEMPORARY} characters), "
        f"{min(found.temporary_free for found in nodes) / 1e9:.0f} GB free on {_count(nodes)}",
        "set temporary to a folder on the node itself",
    )
    little = [found.host for found in nodes if found.temporary_free < _LITTLE_SPACE]
    if finding.state == "ok" and little:
        text = f"{', '.join(little)}: less than {_LITTLE_SPACE / 1e9:.0f} GB free in {temporary}; free some"
        return Finding("warn", "temporary", text)
    return finding


def check_ports(nodes: Sequence[Facts], site: Site) -> Finding:
    ports = range(site.first_port, site.first_port + site.ports)
    taken = max(len(found.taken_ports) for found in nodes)
    advice = "set first_port and ports to where nothing listens (ss -tlnp shows who does)"

    def full(found: Facts) -> str:
        blocks = [range(first, first + 4) for first in ports[::PORTS_OF_A_JOB]]
        free = any(not set(block) & set(found.taken_ports) for block in blocks)
        return "" if free else f"no four ports in a row are free from {ports[0]} to {ports[-1]}"

    fine = (
        f"{ports[0]} to {ports[-1]}: {f'at most {taken} taken' if taken else 'all free'} on {_count(nodes)}"
    )
    finding = _of_each("ports", nodes, full, fine, advice)
    if finding.state == "ok" and taken > len(ports) / 10:
        return Finding("warn", "ports", f"{fine}; {advice}")
    return finding


def check_gpus(nodes: Sequence[Facts], site: Site | None) -> Finding:
    wanted = site.gpus_per_node if site else 0
    on_cpu = site is not None and site.device == "cpu"

    def lacking(found: Facts) -> str:
        if found.torch_trouble:
            return found.torch_trouble
        if site is not None and site.scheduler == "slurm" and found.gpus < wanted:
            return f"Slurm gives {found.gpus} of {wanted} GPUs (CUDA_VISIBLE_DEVICES: {found.visible})"
        if not on_cpu and found.torch_gpus < wanted:
            return (
                f"torch can use {found.torch_gpus} of {wanted} GPUs (CUDA_VISIBLE_DEVICES: {found.visible})"
            )
        return ""

    seen = min(found.torch_gpus for found in nodes)
    if wanted == 0:
        fine = f"torch sees {seen}" if seen else "torch sees none: trials run on the CPU"
    else:
        fine = f"{wanted} on {_count(nodes)}{', unused: device is cpu' if on_cpu else ''}"
    advice = "look at gpu_syntax, the driver, and whether torch is built for this CUDA; or set device: cpu"
    return _of_each("gpus", nodes, lacking, fine, advice)


def check_shared_memory(nodes: Sequence[Facts], site: Site | None) -> Finding:
    wanted = int(site.object_store * 1e9) if site and site.object_store else _LITTLE_SHARED
    least = min(found.shared_memory for found in nodes)
    if least >= wanted:
        return Finding("ok", "shared memory", f"{least / 1e9:.1f} GB free in /dev/shm on {_count(nodes)}")
    little = ", ".join(found.host for found in nodes if found.shared_memory < wanted)
    return Finding(
        "FAIL" if least < _LEAST_SHARED else "warn",
        "shared memory",
        f"{little}: {least / 1e9:.1f} GB free in /dev/shm, where Ray keeps data sets; make room, or a "
        "container with more of it",
    )


def check_open_files(nodes: Sequence[Facts]) -> Finding:
    least = min(found.open_files for found in nodes)
    if least >= _FEW_FILES:
        told = f"at least {least}" if least < sys.maxsize else "any number"
        return Finding("ok", "open files", f"a process may have {told} of them on {_count(nodes)}")
    few = ", ".join(found.host for found in nodes if found.open_files < _FEW_FILES)
    return Finding(
        "FAIL" if least < LEAST_FILES else "warn",
        "open files",
        f"{few}: a process may have {least} of them; Ray needs {LEAST_FILES}, and some more for each worker; "
        "raise the hard limit (ulimit -Hn, LimitNOFILE of systemd, nofile of a container)",
    )


def check_data(nodes: Sequence[Facts], data: Sequence[str]) -> Finding:
    def missing(found: Facts) -> str:
        return "; ".join(f"{name}: {what}" for name, what in found.missing.items())

    fine = f"the data here are visible on {_count(nodes)}: {', '.join(data)}"
    return _of_each("data", nodes, missing, fine, "set --data-root to a folder that all nodes share")


def check_clocks(nodes: Sequence[Facts], arrived: dict[str, float]) -> Finding:
    skews = {found.host: found.clock - arrived[found.host] for found in nodes}
    host, worst = max(skews.items(), key=lambda item: abs(item[1]))
    told, too_much = _SKEW_S
    if abs(worst) <= told:
        return Finding(
            "ok", "clocks", f"{_count(nodes)} agree with this one within {max(1, abs(worst)):.0f} s"
        )
    state: State = "FAIL" if abs(worst) > too_much else "warn"
    advice = "set the clocks (ntp): the heartbeat of a sweep's lock is judged by them"
    return Finding(
        state, "clocks", f"{host} is {abs(worst):.0f} s {'ahead' if worst > 0 else 'late'}; {advice}"
    )


def _of_each(
    name: str, nodes: Sequence[Facts], trouble: Callable[[Facts], str], fine: str, advice: str
) -> Finding:
    """``FAIL`` with the problem of each machine; machines with the same problem stand together."""
    by_trouble: dict[str, list[str]] = {}
    for found in nodes:
        if text := trouble(found):
            by_trouble.setdefault(text, []).append(found.host)
    if not by_trouble:
        return Finding("ok", name, fine)
    told = "; ".join(f"{', '.join(hosts)}: {text}" for text, hosts in by_trouble.items())
    return Finding("FAIL", name, f"{told}; {advice}")


def _count(nodes: Sequence[Facts]) -> str:
    return nodes[0].host if len(nodes) == 1 else f"{len(nodes)} nodes"
