"""Folders of a Ray and its token: who owns them, and what a process that was killed leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ddsweep.private import owned, private_folder, remove_left

OWNER = """
import sys, time
from pathlib import Path
import pytest

from ddsweep.private import private_folder
with private_folder(Path(sys.argv[1])) as folder:
    (folder / "token").write_text("secret")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_and_nothing_else(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        assert left.stat().st_mode & 0o777 == 0o700
        assert remove_left(tmp_path) == [] and (left / "token").exists(), "it is at work"
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert (left / "token").exists()
    others = [tmp_path / name for name in ("dds-of-nobody", "something", "dds-link")]
    for other in others[:2]:
        other.mkdir()
    others[2].symlink_to(others[1])
    with private_folder(tmp_path) as mine:
        assert not left.exists() and mine.exists()
    assert not mine.exists() and all(other.exists() for other in others)


def test_a_folder_that_is_owned_stays(tmp_path: Path) -> None:
    folder = tmp_path / "dds123"
    folder.mkdir()
    with owned(folder):
        assert remove_left(tmp_path) == []
    assert remove_left(tmp_path) == [folder] and not folder.exists()


def test_a_process_that_still_writes_there_keeps_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of Ray that is being killed: its last file comes when the folder was emptied."""
    real, late = os.rmdir, iter(("log", "socket"))

    def rmdir(path: Path, **more: int) -> None:
        if (name := next(late, None)) is not None:
            (mine / name).touch()
        real(path, **more)

    monkeypatch.setattr(os, "rmdir", rmdir)
    with private_folder(tmp_path) as mine:
        (mine / "token").write_text("secret")
    assert next(late, None) is None and not mine.exists()
