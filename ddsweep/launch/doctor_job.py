"""The short job of `ddsweep doctor`, in which the nodes look at themselves (`ddsweep.launch.probe`)."""

from __future__ import annotations

import json
import secrets
import shlex
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO

from ddsweep.launch.probe import Facts, Request
from ddsweep.launch.site import Site
from ddsweep.launch.slurm import ask
from ddsweep.launch.submit import srun_options

__all__ = ["JOB_MIN", "Answers", "ask_nodes"]

JOB_MIN = 5
_RUN_S = 150.0
_LOOK_S = 1.0


@dataclass(frozen=True)
class Answers:
    """The answers of the job: ``facts`` of the nodes, and when they ``arrived`` (by host). ``started`` by
    rank are the hosts where a task began, ``said`` by rank (-1: srun itself) the lines of stderr. ``waiting``
    is Slurm's reason if the job never started."""

    facts: tuple[Facts, ...]
    arrived: dict[str, float]
    started: dict[int, str]
    said: dict[int, tuple[str, ...]]
    waiting: str = ""


def ask_nodes(site: Site, request: Request, patience_s: float) -> Answers:
    """Run `ddsweep.launch.probe` on the nodes. No job is left afterwards, also after an error."""
    name = f"ddsweep-doctor-{secrets.token_hex(4)}"
    content = shlex.quote(json.dumps(asdict(request)))
    script = "\n".join(
        [
            "echo host $(hostname)",
            *site.setup,
            f"exec {site.python_command} -m ddsweep.launch.probe {content}",
        ]
    )
    options = srun_options(site, minutes=min(site.time, JOB_MIN), nodes=site.nodes)
    watched = ["--label", "--unbuffered", "--kill-on-bad-exit=0", "--no-kill", f"--job-name={name}"]
    job = subprocess.Popen(
        ["srun", *options, *watched, "bash", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = _Lines(job.stdout), _Lines(job.stderr)
    try:
        waiting = _wait(job, name, patience_s)
    finally:
        if job.poll() is None:
            ask("scancel", f"--name={name}")
            job.terminate()
            job.wait()
    return _answers(out.all(), err.all(), waiting)


def _wait(job: subprocess.Popen[str], name: str, patience_s: float) -> str:
    """Wait for the end of the job. Returns Slurm's reason if it did not start in time."""
    begun, running = time.monotonic(), None
    while True:
        with suppress(subprocess.TimeoutExpired):
            job.wait(_LOOK_S)
            return ""
        state, _, reason = (
            ask("squeue", "-h", "-a", f"--name={name}", "-o", "%T|%r").stdout.strip().partition("|")
        )
        if state == "PENDING":
            running = None  # Slurm had not listed it yet
            if time.monotonic() - begun > patience_s:
                return reason or "no reason given"
        elif running is None:
            running = time.monotonic()
        elif time.monotonic() - running > _RUN_S:
            return ""


class _Lines:
    """The lines of a pipe and when they came, read by a thread of its own."""

    def __init__(self, pipe: IO[str] | None) -> None:
        self._lines: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._thread.start()

    def _read(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                self._lines.append((time.time(), line.strip()))

    def all(self) -> list[tuple[float, str]]:
        self._thread.join(10.0)  # srun is gone, but its children may still hold the pipe
        return list(self._lines)


def _answers(out: Sequence[tuple[float, str]], err: Sequence[tuple[float, str]], waiting: str) -> Answers:
    facts, arrived, started = [], {}, {}
    for at, line in out:
        rank, _, text = line.partition(": ")
        if text.startswith("host "):
            started[int(rank)] = text.removeprefix("host ")
            continue
        try:
            found = Facts.read(text)
        except ValueError:  # printed by a line of `setup`
            continue
        facts.append(found)
        arrived[found.host] = at
    said: dict[int, tuple[str, ...]] = {}
    for _, line in err:
        rank, _, text = line.partition(": ")
        key, text = (int(rank), text) if rank.isdigit() else (-1, line.removeprefix("srun: "))
        said[key] = (*said.get(key, ()), text)
    facts.sort(key=lambda found: found.host)
    return Answers(tuple(facts), arrived, started, said, waiting)
