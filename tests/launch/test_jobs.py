"""How a job ends that Slurm is to start again, and which GPUs a local one gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddsweep.errors import DiskFullError, UserError
from ddsweep.launch import jobs
from ddsweep.launch.allocation import Place
from ddsweep.launch.folder import Job, Launch, LaunchFolder
from ddsweep.launch.processes import Signals
from ddsweep.launch.submit import executor
from ddsweep.results.layout import SweepDirectory
from tests.launch.conftest import make_launch, make_site


class Drained(jobs._Job):
    """Its time is up, and it has drained."""

    def work(self, folder: LaunchFolder, launch: Launch, place: Place, signals: Signals) -> int:
        signals.ending = True
        return 75


@pytest.mark.usefixtures("handlers")
def test_a_full_disk_does_not_keep_a_job_from_its_requeue(
    directory: SweepDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_launch(directory, make_site(), Job("12", "cluster"))

    def full(path: Path, content: object) -> None:
        raise DiskFullError(f"{path}: no space left on this disk")

    requeued: list[bool] = []
    monkeypatch.setattr(jobs, "_place", lambda folder: Place("12", 0, ("here",), 0))
    monkeypatch.setattr(jobs, "write_json", full)
    monkeypatch.setattr(Signals, "requeue", lambda signals: requeued.append(True))
    with pytest.raises(SystemExit) as ended:
        Drained(str(folder.root))()
    assert ended.value.code == 75 and requeued == [True]
    assert "no space left on this disk" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "count", "wanted"),
    [
        (None, 2, ()),
        ("3", 0, ()),
        ("3, 5", 1, (3,)),
        ("3,5", 2, (3, 5)),
        ("3", 2, r"gpus_per_node: 2, but CUDA_VISIBLE_DEVICES=3 lets this shell use 1"),
        ("", 1, "lets this shell use 0"),
        ("GPU-aaa,GPU-bbb", 1, "CUDA_VISIBLE_DEVICES=GPU-aaa,GPU-bbb names GPUs, and a local launch takes"),
        ("MIG-1", 1, "takes their numbers"),
    ],
)
def test_a_local_job_gets_gpus_that_this_shell_may_use(
    directory: SweepDirectory,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    count: int,
    wanted: tuple[int, ...] | str,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    site = make_site(scheduler="local", gpus_per_node=count)
    folder = make_launch(directory, site)
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            executor(site, folder, "small")
    else:
        assert executor(site, folder, "small").parameters["visible_gpus"] == wanted
