"""The folder of one launch, ``results/<sweep>/jobs/<launch>/``: what was submitted, and the outcomes.

The login node and the jobs exchange small JSON files in it. Only its owner may enter (mode 700): submitit
keeps pickles of the submitted calls in it, and each cluster a token.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddsweep.errors import ResultsError
from ddsweep.launch.site import Site
from ddsweep.results.files import results_error, write_atomic
from ddsweep.results.layout import SweepDirectory

__all__ = [
    "MODES",
    "Job",
    "Launch",
    "LaunchFolder",
    "launches_of",
    "new_folder",
    "read_json",
    "write_json",
]

MODES = ("cluster", "array")
"""One allocation with a Ray cluster over its nodes, or a job array without Ray."""


@dataclass(frozen=True)
class Job:
    """One job that was submitted: its number at the scheduler, ``cluster``, ``trials``, ``evals`` or
    ``finish``, how many array elements it has (0: it is no array), and for a local job the start time of its
    process, which tells it from a later process of the same number, and its host."""

    id: str
    kind: str
    elements: int = 0
    started: str | None = None
    host: str | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is a local job of another host, whose processes cannot be seen from here."""
        return self.host not in (None, socket.gethostname())


@dataclass(frozen=True)
class LaunchFolder:
    """The paths of one launch."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def record(self) -> Path:
        return self.root / "launch.json"

    @property
    def sweep_file(self) -> Path:
        """The resolved sweep, with the settings of the site."""
        return self.root / "sweep.yaml"

    @property
    def logs(self) -> Path:
        """submitit's folder: logs, and pickles of the calls."""
        return self.root / "logs"

    @property
    def shares(self) -> Path:
        """Which trials each element of an array takes."""
        return self.root / "shares.json"

    @property
    def stop_file(self) -> Path:
        return self.root / "STOP"

    def log(self, job: str, rank: int = 0, kind: str = "out") -> Path:
        return self.logs / f"{job}_{rank}_log.{kind}"

    def run(self, job: str, restart: int) -> Path:
        """Shared by the processes of one start of a job. A requeued job has another one, so it reads no old
        address."""
        return self.root / "runs" / f"{job}.{restart}"

    def outcome(self, kind: str, index: int = 0) -> Path:
        """How a job ended. A job that is gone without this file was killed."""
        return self.root / "outcomes" / f"{kind}-{index:04d}.json"


@dataclass(frozen=True)
class Launch:
    """What `LaunchFolder.record` holds. ``results`` and ``data_root`` are absolute."""

    mode: str
    sweep: str
    site: dict[str, Any]
    site_file: str
    results: str
    data_root: str | None
    created: str
    versions: dict[str, str]
    jobs: tuple[Job, ...] = ()

    @classmethod
    def read(cls, folder: LaunchFolder) -> Launch:
        """Raises `ResultsError` without a record, or for one of another version."""
        content = read_json(folder.record)
        if content is None:
            raise ResultsError(f"{folder.record}: no record of a launch")
        try:
            jobs = tuple(Job(**job) for job in content.pop("jobs"))
            found = cls(**content, jobs=jobs)
            found.site["scheduler"]  # the one key that all readers rely on
            return found
        except (TypeError, KeyError) as error:
            raise ResultsError(f"{folder.record}: not a record that this version reads ({error})") from None

    def write(self, folder: LaunchFolder) -> None:
        write_json(folder.record, asdict(self))

    @property
    def site_spec(self) -> Site:
        # Not validated again: times are minutes by now and would be refused as input.
        return Site.model_construct(**self.site)

    @property
    def directory(self) -> SweepDirectory:
        return SweepDirectory(Path(self.results) / self.sweep)


def new_folder(directory: SweepDirectory, mode: str) -> LaunchFolder:
    """Make the folder of a new launch, readable by nobody else. Raises `ResultsError`."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = LaunchFolder(directory.root.resolve() / "jobs" / f"{stamp}-{mode}-{secrets.token_hex(2)}")
    try:
        folder.root.parent.mkdir(parents=True, exist_ok=True)
        for place in (folder.root, folder.logs):
            place.mkdir(mode=0o700)
    except OSError as error:
        raise results_error(error, folder.root) from error
    return folder


def launches_of(directory: SweepDirectory) -> list[LaunchFolder]:
    """All launches of a sweep, the oldest first."""
    return [LaunchFolder(path.parent) for path in sorted(directory.root.glob("jobs/*/launch.json"))]


def read_json(path: Path) -> dict[str, Any] | None:
    """The file, or None without one. Raises `ResultsError` for an unreadable one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ResultsError(f"{path}: holds no mapping")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Readers on other nodes see the whole file or no file."""
    write_atomic(path, (json.dumps(content, indent=1, default=str) + "\n").encode(), path.parent / ".tmp")
