"""Status, logs and the end of launches, from their folders and a Slurm with given answers."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddsweep.errors import ResultsError, UserError
from ddsweep.launch.folder import Job, Launch, LaunchFolder, write_json
from ddsweep.launch.site import Site
from ddsweep.launch.start import Request, launch
from ddsweep.launch.watch import active_jobs, cancel, latest, launch_lines, log_files, wait_for
from ddsweep.results.current import write_sweep_file
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.lock import SweepLock, process_start
from ddsweep.spec import load_sweep
from tests.conftest import Ask
from tests.launch.conftest import FakeSlurm, make_launch, make_site

JOBS = (Job("12", "trials", 3), Job("13", "evals", 3), Job("14", "finish"))
LOCAL = Site.model_validate({"scheduler": "local", "cpus_per_node": 2})


def outcome(folder: LaunchFolder, kind: str, index: int = 0, **content: object) -> None:
    whole = {"code": 0, "restart": 0, "requeued": False, "message": "", **content}
    write_json(folder.outcome(kind, index), whole)


@pytest.fixture
def folder(directory: SweepDirectory) -> LaunchFolder:
    return make_launch(directory, make_site(poll=0.01), *JOBS)


# ------------------------------------------------------------------------------------------- status


def test_status_says_what_waits_runs_and_came_of_it(slurm: FakeSlurm, folder: LaunchFolder) -> None:
    slurm.says("squeue", "12_[1-2%1]|PENDING|Resources|\n12_0|RUNNING|None|node1\n13|PENDING|Dependency|\n")
    slurm.says("sacct", "14|COMPLETED|node2\n")
    outcome(folder, "trials", 0, restart=2)
    outcome(folder, "trials", 1)
    outcome(folder, "trials", 2, code=1, message="no data")
    directory = Launch.read(folder).directory
    assert list(launch_lines(directory)) == [
        f"launch {folder.name}: mode array, slurm/mine.yaml, 2026-01-01T00:00:00Z",
        "  trials job 12: 1 running, 2 pending (Resources) of 3",
        "  evals job 13: 3 pending (Dependency) of 3",
        "  finish job 14: completed",
        "  trials-0000: requeued 2 times; exit code 0",
        "  trials-0002: exit code 1: no data",
    ]


def test_status_without_slurm_or_with_another_version_still_works(
    folder: LaunchFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    directory = Launch.read(folder).directory
    _, line = launch_lines(directory)
    assert line.startswith("  its jobs cannot be asked for: squeue: no such command")
    folder.record.write_text("{}")
    (line,) = launch_lines(directory)
    assert "not a record that this version reads" in line


def test_a_sweep_that_was_never_launched(directory: SweepDirectory) -> None:
    assert list(launch_lines(directory)) == []
    with pytest.raises(ResultsError, match="was never launched"):
        latest(directory)


def test_the_newest_launch_counts(directory: SweepDirectory) -> None:
    first, second = (make_launch(directory, LOCAL) for _ in range(2))
    os.rename(first.root, first.root.with_name("20200101-000000-array-0000"))
    assert latest(directory).name == second.name


# --------------------------------------------------------------------------------------------- logs


def test_logs_of_all_and_of_one_job_the_newest_last(folder: LaunchFolder) -> None:
    for age, name in (
        (30, "12_10_0_log.err"),
        (20, "12_1_0_log.out"),
        (10, "local.log"),
        (5, "123_0_log.out"),
    ):
        path = folder.logs / name
        path.write_text("x")
        os.utime(path, (time.time() - age,) * 2)
    (folder.logs / "12_2_0_log.out").touch()  # empty
    (folder.logs / "12_1_submitted.pkl").write_text("x")
    assert [path.name for path in log_files(folder)] == [
        "12_10_0_log.err",
        "12_1_0_log.out",
        "local.log",
        "123_0_log.out",
    ]
    assert [path.name for path in log_files(folder, "12_1")] == ["12_1_0_log.out"]
    assert [path.name for path in log_files(folder, "12")] == ["12_10_0_log.err", "12_1_0_log.out"]
    assert log_files(folder, "9") == []


# ------------------------------------------------------------------------------------------- waiting


def waited(folder: LaunchFolder) -> tuple[int, list[str]]:
    said: list[str] = []
    return wait_for(folder, said.append), said


def test_the_code_of_a_launch_is_that_of_its_last_job(slurm: FakeSlurm, folder: LaunchFolder) -> None:
    slurm.says("squeue", "14|COMPLETED|None|node1\n")
    slurm.says("sacct", "12_0|COMPLETED|node1\n")
    outcome(folder, "trials", 0, code=2)
    outcome(folder, "trials", 1, code=75, message="not requeued again")
    outcome(folder, "finish", code=75)
    code, said = waited(folder)
    assert (code, said[-1]) == (75, "trials-0001: not requeued again")


@pytest.mark.parametrize("content", [None, {"code": 75, "requeued": True}])
def test_a_launch_without_an_outcome_is_an_error(
    slurm: FakeSlurm, folder: LaunchFolder, content: dict[str, object] | None
) -> None:
    folder.log("12_0").touch()
    slurm.says("squeue", "12|TIMEOUT|None|\n13|CANCELLED|None|\n14|CANCELLED|None|\n")
    if content:
        outcome(folder, "finish", **content)
    with pytest.raises(UserError, match=r"without an outcome \(job 12 timeout, job 13 .*launch it again"):
        waited(folder)


def test_who_waits_for_a_launch_that_is_cancelled_is_told_so(slurm: FakeSlurm, folder: LaunchFolder) -> None:
    slurm.says("squeue", "12|COMPLETED|None|\n13|CANCELLED|None|\n14|CANCELLED|None|\n")
    folder.stop_file.touch()
    code, said = waited(folder)
    assert code == 75 and said[-1].startswith("cancelled; ")
    outcome(folder, "finish", code=0)
    assert waited(folder)[0] == 0, "it was done before it heard of that"


def test_a_message_of_the_last_job_is_the_error(slurm: FakeSlurm, folder: LaunchFolder) -> None:
    slurm.says("squeue", "12|COMPLETED|None|\n13|COMPLETED|None|\n14|FAILED|NonZeroExitCode|\n")
    outcome(folder, "finish", code=1, message="the disk is full")
    with pytest.raises(UserError, match=r"^the disk is full$"):
        waited(folder)


def test_what_never_starts_is_cancelled_but_not_what_nobody_can_ask_for(
    slurm: FakeSlurm, directory: SweepDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(poll=0.01).model_copy(update={"longest_pending": 0})
    folder = make_launch(directory, site, Job("12", "cluster"), mode="cluster")
    monkeypatch.setattr("ddsweep.launch.slurm._SILENCE_S", 0.05)
    slurm.says("squeue", error="Unable to contact slurm controller\n", code=1)
    with pytest.raises(UserError, match="Slurm does not answer"):
        waited(folder)
    assert slurm.asked("scancel") == []
    slurm.says("squeue", "12|PENDING|Priority|\n")
    with SweepLock(directory.launch_lock):  # as launching does, which leaves a file beside it
        write_sweep_file(directory, b"name: small\n", ["0123456789"])
    with pytest.raises(UserError, match=r"nothing started \(12: Priority\)"):
        waited(folder)
    assert slurm.asked("scancel") == ["scancel 12"]
    assert not directory.root.exists(), "nothing was ever in it"


# ---------------------------------------------------------------------------------------- cancelling


def test_cancelling_ends_what_waits_and_drains_what_runs(slurm: FakeSlurm, folder: LaunchFolder) -> None:
    directory = Launch.read(folder).directory
    slurm.says("squeue", "12|RUNNING|None|node1\n13|PENDING|Dependency|\n")
    # As a job that sees the file: it ends, and Slurm forgets it.
    squeue = slurm.folder / "squeue"
    squeue.write_text(squeue.read_text().replace("cat", f'test -e "{folder.stop_file}" && exit 0\ncat', 1))
    said: list[str] = []
    cancel(folder, 30, said.append)
    assert folder.stop_file.exists() and not directory.stop_file.exists()
    assert slurm.asked("scancel") == [f"scancel --state=PENDING {job.id}" for job in JOBS]
    assert said == [f"launch {folder.name}: cancelled; what is done stays, and launching it again goes on"]
    cancel(folder, 30, said.append)
    assert said[-1] == f"launch {folder.name}: no job of it waits or runs"


def test_a_disk_without_room_for_a_file_does_not_keep_jobs_from_being_cancelled(
    slurm: FakeSlurm, folder: LaunchFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.says("squeue", "12|PENDING|Priority|\n")
    squeue = slurm.folder / "squeue"
    squeue.write_text(squeue.read_text().replace("cat", 'grep -q scancel "$here/asked" && exit 0\ncat', 1))

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "touch", full)
    said: list[str] = []
    cancel(folder, 30, said.append)
    assert slurm.asked("scancel") == [f"scancel --state=PENDING {job.id}" for job in JOBS]
    assert said[-1].startswith(f"launch {folder.name}: cancelled")


@pytest.mark.parametrize("grace", ["nan", "-1", "inf"])
def test_a_span_of_time_that_is_none(grace: str, folder: LaunchFolder, ask: Ask) -> None:
    code, _, error = ask("cancel", str(folder.root.parents[1]), "--grace", grace)
    assert code == 1 and f"--grace: {grace} must be 0 to 86400 seconds" in error


def test_what_does_not_drain_in_time_is_ended_and_what_was_requeued_too(
    slurm: FakeSlurm, folder: LaunchFolder
) -> None:
    slurm.says("squeue", "12_0|RUNNING|None|node1\n12_1|PENDING|BeginTime|\n")
    said: list[str] = []
    cancel(folder, 1.5, said.append)
    assert said[0] == "12_0, 12_1: did not end within 2 s, ended now"
    asked = slurm.asked("scancel")
    assert asked[-3:] == ["scancel 12", "scancel 13", "scancel 14"]
    assert asked.count("scancel --state=PENDING 12") >= 2, "again, for it was requeued meanwhile"


def test_a_local_launch_is_told_by_a_signal_and_killed_with_its_session(directory: SweepDirectory) -> None:
    deaf = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{deaf}; time.sleep(600)"], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline()
        job = Job(str(process.pid), "local", started=process_start(process.pid))
        folder = make_launch(directory, LOCAL, job)
        assert [state.state for state in active_jobs(folder, Launch.read(folder))] == ["RUNNING"]
        said: list[str] = []
        cancel(folder, 0.5, said.append)
        assert process.wait() == -9 and "ended now" in said[0]
    assert active_jobs(folder, Launch.read(folder)) == []
    gone = make_launch(directory, LOCAL, Job(str(os.getpid()), "local", started="1"))
    assert active_jobs(gone, Launch.read(gone)) == [], "the same number, another process"


def test_a_local_launch_of_another_host_is_seen_by_its_lock_and_told_by_its_file(
    directory: SweepDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = socket.gethostname()
    job = Job(str(os.getpid()), "local", started=process_start(os.getpid()), host=here)
    folder = make_launch(directory, LOCAL, job, mode="cluster")
    launched = Launch.read(folder)
    with SweepLock(directory.lock, launch=folder.name):
        monkeypatch.setattr("socket.gethostname", lambda: "another")
        assert [(state.state, state.nodes) for state in active_jobs(folder, launched)] == [("RUNNING", here)]
        assert list(launch_lines(directory))[1] == f"  local job {job.id}: running on {here}"
        with pytest.raises(UserError, match=f"did not end within 0 s, and can only be killed on {here}"):
            cancel(folder, 0, lambda text: None)
        assert folder.stop_file.exists() and directory.stop_file.exists()
    folder.stop_file.unlink()
    monkeypatch.undo()
    with SweepLock(directory.lock):  # of a run that is not of the launch
        monkeypatch.setattr("socket.gethostname", lambda: "another")
        assert active_jobs(folder, launched) == []
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["ddsweep", "run", str(folder.sweep_file)])
    with SweepLock(directory.lock):
        monkeypatch.setattr("socket.gethostname", lambda: "another")
        assert [state.state for state in active_jobs(folder, launched)] == ["RUNNING"]
    said: list[str] = []
    cancel(folder, 0, said.append)
    assert said == [f"launch {folder.name}: no job of it is seen from here; one that is left on {here} ends"]
    assert folder.stop_file.exists(), "between two of its jobs nobody holds the lock"
    outcome(folder, "cluster")
    cancel(folder, 0, said.append)
    assert said[-1] == f"launch {folder.name}: no job of it waits or runs"


# ---------------------------------------------------------------------------------------- submitting


@pytest.fixture
def request_(directory: SweepDirectory, tmp_path: Path) -> Request:
    file = tmp_path / "small.yaml"
    file.write_text(
        "name: small\nbase: {dataset: digits, init: fixed, images_per_class: 1, inner_steps: 1}\n"
    )
    site = make_site(partition="main", array_tasks=2, nodes=2)
    return Request(load_sweep(file), directory, site, tmp_path / "s.yaml", "array", None, [["a"], ["b"]])


def test_jobs_may_start_before_the_last_is_submitted(slurm: FakeSlurm, request_: Request) -> None:
    """The sweep is not locked by the launcher while sbatch works."""
    slurm.says("sbatch", "Submitted batch job 12\n")
    sbatch = slurm.folder / "sbatch"
    lock = request_.directory.lock
    sbatch.write_text(sbatch.read_text().replace("cat", f'test -e "{lock}" && exit 9\ncat', 1))
    folder = launch(request_)
    jobs = Launch.read(folder).jobs
    assert [(job.kind, job.elements) for job in jobs] == [("trials", 2), ("evals", 2), ("finish", 0)]
    assert len(slurm.asked("sbatch")) == 3
    assert not request_.directory.launch_lock.exists()


def test_a_second_launch_is_refused_while_the_first_is_there(slurm: FakeSlurm, request_: Request) -> None:
    slurm.says("sbatch", "Submitted batch job 12\n")
    first = launch(request_)
    slurm.says("squeue", "12|PENDING|Priority|\n")
    with pytest.raises(ResultsError, match=f"launch {first.name} is still there: job 12 is PENDING"):
        launch(request_)
    slurm.says("squeue", error="Unable to contact slurm controller\n", code=1)
    with pytest.raises(UserError, match="Slurm does not answer"):
        launch(request_)
    slurm.says("squeue")
    with SweepLock(request_.directory.lock), pytest.raises(ResultsError, match="another driver"):
        launch(request_)
    assert list(first.root.parent.iterdir()) == [first.root]
    first.record.write_text("{}")  # of another version
    launch(request_)


def test_what_is_refused_takes_back_what_went_before_and_leaves_nothing(
    slurm: FakeSlurm, request_: Request
) -> None:
    slurm.says("sbatch", "Submitted batch job 12\n")
    sbatch = slurm.folder / "sbatch"
    third = (
        '[ $(grep -c ^sbatch "$here/asked") = 3 ] && echo "sbatch: error: QOSMaxSubmit" >&2 && exit 1\ncat'
    )
    sbatch.write_text(sbatch.read_text().replace("cat", third, 1))
    with pytest.raises(UserError, match="Slurm refused the job: QOSMaxSubmit"):
        launch(request_)
    assert slurm.asked("scancel") == ["scancel 12", "scancel 12"]
    assert list(request_.directory.root.glob("jobs/*")) == []
