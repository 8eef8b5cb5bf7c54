"""The paths of one sweep: ``results/<sweep>/``."""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ddsweep.results.files import names_in, results_error

__all__ = ["PART_FOLDERS", "PoolDirectory", "SweepDirectory"]

_LONGEST_WORD = 100

PART_FOLDERS = ("trials", "evals", "history", "failures")


@dataclass(frozen=True)
class _Directory:
    """What the folders of sweeps and of pools have in common. Making one touches no disk."""

    root: Path

    @property
    def temporary(self) -> Path:
        """Files are written here before they are renamed; readers never look here."""
        return self.root / ".tmp"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    @property
    def stop_file(self) -> Path:
        """Once this file exists, the driver drains."""
        return self.temporary / "STOP"


@dataclass(frozen=True)
class SweepDirectory(_Directory):
    """The paths of one sweep."""

    @property
    def sweep_file(self) -> Path:
        """The resolved sweep."""
        return self.root / "sweep.yaml"

    def parts(self, table: str) -> Path:
        """The folder of the parts of one table."""
        return self.root / table

    def trials_part(self, trial_id: str) -> Path:
        """One row. A trial is done if and only if this file exists."""
        return self.parts("trials") / f"part-{trial_id}.parquet"

    def evals_part(self, trial_id: str, protocol: str, law: str, group: int, size: int | None = None) -> Path:
        """The rows of one group of networks (its law, or pool) under one protocol. ``size`` tells groups of
        one number apart if both sizes exist."""
        word = f"g{group:03d}" if size is None else f"g{group:03d}of{size}"
        return self.parts("evals") / f"part-{trial_id}-{_word(protocol)}-{_word(law)}-{word}.parquet"

    def evals_parts(self, trial_id: str) -> list[Path]:
        """All evals parts of one trial, sorted by name."""
        return self._found("evals", f"part-{trial_id}-")

    def evals_by_trial(self) -> dict[str, list[Path]]:
        """All evals parts by trial, sorted by name. This lists the folder once; `evals_parts` lists it for
        each trial."""
        found: dict[str, list[Path]] = {}
        for path in self._found("evals"):
            trial_id, *rest = path.stem.removeprefix("part-").split("-", 1)
            if rest:
                found.setdefault(trial_id, []).append(path)
        return found

    def _found(self, table: str, beginning: str = "part-") -> list[Path]:
        """The parts of a table whose names begin so, sorted by name. Raises `UnreadableError`."""
        folder = self.parts(table)
        names = (name for name in names_in(folder) if name.startswith(beginning))
        return [folder / name for name in names if name.endswith(".parquet")]

    def history_part(self, trial_id: str) -> Path:
        return self.parts("history") / f"part-{trial_id}.parquet"

    def failure_part(self, trial_id: str) -> Path:
        return self.parts("failures") / f"part-{trial_id}.parquet"

    def artifacts(self, trial_id: str) -> Path:
        return self.root / "artifacts" / trial_id

    def distilled(self, trial_id: str) -> Path:
        return self.artifacts(trial_id) / "distilled.safetensors"

    def checkpoint(self, trial_id: str) -> Path:
        return self.artifacts(trial_id) / "checkpoint.safetensors"

    def grid(self, trial_id: str) -> Path:
        return self.artifacts(trial_id) / "grid.png"

    @property
    def cache(self) -> Path:
        """Files that can be computed again, such as baselines shared by several trials."""
        return self.root / ".cache"

    @property
    def proposals(self) -> Path:
        """The samples that guided searches have proposed (`ddsweep.results.proposals`)."""
        return self.root / "proposals"

    @property
    def code(self) -> Path:
        """Copies of users' code that trials name, a folder for each hash (`ddsweep.own_code`)."""
        return self.root / "code"

    @property
    def sets(self) -> Path:
        """Copies of distilled sets in which trials begin (`ddsweep.start_set`)."""
        return self.root / "sets"

    @property
    def pools(self) -> Path:
        """The folder of pools of trained networks, which all sweeps beside this one share."""
        return self.root.parent / "pools"

    @property
    def pool_networks(self) -> Path:
        """The hashes of the networks of pools that the results are of (`ddsweep.pools.judged`)."""
        return self.root / "pools.json"

    @property
    def tables(self) -> Path:
        """The compacted tables, one file each."""
        return self.root / "tables"

    def table(self, name: str) -> Path:
        return self.tables / f"{name}.parquet"

    @property
    def launch_lock(self) -> Path:
        """Held while jobs are submitted: the first job may take the other lock before the last one is
        submitted."""
        return self.root / ".launch.lock"

    def seen_trials(self) -> list[str]:
        """The ids of all trials with a file: a part, or something in ``artifacts/``. Raises
        `UnreadableError` for a folder that the system does not list."""
        parts = (path for table in ("trials", "history", "failures") for path in self._found(table))
        found = {path.stem.removeprefix("part-") for path in parts}
        artifacts = self.root / "artifacts"
        return sorted(found | {name for name in names_in(artifacts) if (artifacts / name).is_dir()})

    def create(self) -> None:
        """Make the folders and check that files can be written in each, before any work is done.

        ``collect`` makes ``tables/``. Raises `ResultsError` if a file is in the way, without permission or
        space, and on a read-only file system.
        """
        folders = [self.parts(table) for table in PART_FOLDERS]
        for folder in (self.root, *folders, self.root / "artifacts", self.temporary, self.cache):
            _make(folder)


def _make(folder: Path) -> None:
    """Make a folder and write in it. Permissions alone do not tell: network file systems and quotas refuse on
    writing."""
    probe = folder / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"ddsweep can write here\n")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise results_error(error, folder) from error


@dataclass(frozen=True)
class PoolDirectory(_Directory):
    """The paths of one pool of trained networks: ``results/pools/<name>/``."""

    @property
    def pool_file(self) -> Path:
        """The resolved pool file."""
        return self.root / "pool.yaml"

    def network(self, role: str, index: int) -> Path:
        return self.root / "networks" / f"{role}-{index:05d}.safetensors"

    def part(self, role: str, index: int) -> Path:
        """The row of one network. It is trained if and only if this file exists."""
        return self.root / "parts" / f"part-{role}-{index:05d}.parquet"

    @property
    def index(self) -> Path:
        """All rows as one table. It exists once the pool is whole."""
        return self.root / "index.parquet"

    def create(self) -> None:
        """Make the folders, and check that files can be written in each. Raises `ResultsError`."""
        for folder in (self.root, self.root / "networks", self.root / "parts", self.temporary):
            _make(folder)


def _word(text: str) -> str:
    """``text`` as a piece of a file name, which has 255 characters at most: names of pools and protocols have
    any characters and any length."""
    quoted = quote(text, safe="")
    if len(quoted) <= _LONGEST_WORD:
        return quoted
    return f"{quoted[: _LONGEST_WORD - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
