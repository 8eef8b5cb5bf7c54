from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from ddsweep.errors import ResultsError, UnreadableError
from ddsweep.results import lock
from ddsweep.results.lock import SweepLock, live_holder, read_lock
from tests.conftest import PATIENCE_S

HOLD = """
import sys
from pathlib import Path
from ddsweep.errors import ResultsError
from ddsweep.results.lock import SweepLock
sys.stdin.readline() if "wait" in sys.argv else None
try:
    with SweepLock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except ResultsError as error:
    print("refused", error, flush=True)
"""
Start = Callable[..., "Popen[str]"]


def line(process: Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def tell(process: Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def foreign(path: Path, age_s: float, **changes: Any) -> None:
    then = (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat()
    content = {"host": "another-node", "pid": 1, "process_start": "1", "job": "77", "command": "ddsweep run"}
    path.write_text(json.dumps({**content, "since": then, "heartbeat": then, **changes}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


def test_the_file_says_who_holds_it_and_goes_afterwards(path: Path) -> None:
    with SweepLock(path) as lock:
        holder = json.loads(path.read_text())
        assert holder["host"] == socket.gethostname() and holder["pid"] == os.getpid()
        assert {"process_start", "job", "command", "since", "heartbeat"} <= set(holder)
        assert not lock.lost
    assert not path.exists()
    with SweepLock(path):
        pass


def test_it_goes_when_the_work_fails(path: Path) -> None:
    with pytest.raises(RuntimeError, match="work"), SweepLock(path):
        raise RuntimeError("work")
    assert not path.exists()


def test_two_real_processes(path: Path, run_python: Start) -> None:
    with run_python(HOLD, path) as first:
        assert line(first) == "held\n"
        with run_python(HOLD, path) as second:
            refused = line(second)
        assert refused.startswith("refused another driver is at work on this sweep: host ")
        assert f"pid {first.pid}," in refused and f"remove {path}" in refused
        with pytest.raises(ResultsError, match="another driver"), SweepLock(path):
            pass
        tell(first)
    with SweepLock(path):
        pass


def test_takeover_at_once_after_kill(path: Path, run_python: Start) -> None:
    first = run_python(HOLD, path)
    assert line(first) == "held\n"
    first.kill()
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:  # not waited for: it is a zombie, as under a busy parent
        try:
            with SweepLock(path):
                assert json.loads(path.read_text())["pid"] == os.getpid()
            break
        except ResultsError:  # the kill takes a moment to arrive
            time.sleep(0.01)
    else:
        pytest.fail("the lock of a killed process was not taken over")
    first.communicate()


def test_of_many_starters_on_a_stale_lock_exactly_one_gets_it(path: Path, run_python: Start) -> None:
    starters = [run_python(HOLD, path, "wait") for _ in range(4)]
    foreign(path, age_s=1000)
    for process in starters:
        tell(process)
    answers = [line(process).split()[0] for process in starters]
    assert sorted(answers) == ["held", "refused", "refused", "refused"]
    for process in starters:
        process.communicate("go\n")
    assert not path.exists()


def held_by_threads(path: Path, launches: Sequence[str | None]) -> list[int]:
    """1 for each of several threads that start at once and get the lock, 0 for each that is refused."""
    barrier, done = threading.Barrier(len(launches)), threading.Event()
    held: list[int] = []

    def start(launch: str | None) -> None:
        barrier.wait()
        try:
            with SweepLock(path, launch=launch):
                held.append(1)
                done.wait(PATIENCE_S)
        except ResultsError:
            held.append(0)

    threads = [threading.Thread(target=start, args=(launch,)) for launch in launches]
    for thread in threads:
        thread.start()
    while len(held) < len(launches):
        time.sleep(0.001)
    done.set()
    for thread in threads:
        thread.join()
    return sorted(held)


def test_threads_race_for_a_stale_lock(path: Path) -> None:
    for _ in range(20):
        foreign(path, age_s=1000)
        assert held_by_threads(path, [None] * 4) == [0, 0, 0, 1]
    assert [p.name for p in path.parent.iterdir()] == [".lock.guard"]


def test_another_host_is_believed_for_five_minutes(path: Path) -> None:
    foreign(path, age_s=290)
    with pytest.raises(ResultsError, match="host another-node, pid 1, Slurm job 77, since"), SweepLock(path):
        pass
    foreign(path, age_s=310)
    with SweepLock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_process_number_used_again_is_another_process(path: Path) -> None:
    foreign(path, age_s=1, host=socket.gethostname(), pid=os.getpid(), process_start="1")
    with SweepLock(path):
        pass
    foreign(path, age_s=1000, host=socket.gethostname(), pid=os.getpid(), process_start=None)
    with pytest.raises(ResultsError, match="another driver"), SweepLock(path):
        pass


def test_in_another_container_of_this_host_only_the_heartbeat_tells(path: Path) -> None:
    """Its numbers of processes are others: a living one would look as if it were gone."""
    elsewhere = {"host": socket.gethostname(), "pid": 2**22 + 1, "pid_namespace": "pid:[1]"}
    foreign(path, age_s=60, **elsewhere)
    with pytest.raises(ResultsError, match="another driver"), SweepLock(path):
        pass
    foreign(path, age_s=100, **elsewhere)
    with SweepLock(path):
        own = json.loads(path.read_text())["pid_namespace"]
        assert own == os.readlink("/proc/self/ns/pid")
    foreign(path, age_s=1, **{**elsewhere, "pid_namespace": own})
    with SweepLock(path):
        pass


def test_an_unreadable_lock_counts_by_its_age(path: Path) -> None:
    path.write_text("{half")
    with pytest.raises(ResultsError, match=r"another driver.*host unknown"), SweepLock(path):
        pass
    os.utime(path, (1, 1))
    with SweepLock(path):
        pass


def test_the_heart_beats(path: Path) -> None:
    with SweepLock(path, heartbeat_s=0.02):
        first = read_lock(path)
        time.sleep(0.2)
        second = read_lock(path)
    assert first is not None and second is not None
    assert second["heartbeat"] > first["heartbeat"] and second["since"] == first["since"]


def test_a_driver_that_lost_its_lock_knows_and_leaves_its_successor_alone(path: Path) -> None:
    told = threading.Event()
    with SweepLock(path, heartbeat_s=0.02, on_lost=told.set) as lock:
        assert not told.is_set()
        successor = path.with_name("new")
        foreign(successor, age_s=0)
        os.replace(successor, path)
        text = path.read_text()
        assert told.wait(PATIENCE_S) and lock.lost
    assert path.read_text() == text


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="a file is in the way"), SweepLock(tmp_path / "file" / ".lock"):
        pass


# ------------------------------------------------------------------------- shared by one launch


def share(path: Path, launch: str) -> SweepLock:
    return SweepLock(path, launch=launch)


HOLD_SHARED = HOLD.replace("SweepLock(Path(sys.argv[1]))", "SweepLock(Path(sys.argv[1]), launch=sys.argv[2])")


def test_elements_of_one_launch_share_it(path: Path, run_python: Start) -> None:
    with run_python(HOLD_SHARED, path, "a") as first:
        assert line(first) == "held\n"
        with share(path, "a"):
            assert len(list(path.with_name(".lock.d").iterdir())) == 2
            holder = live_holder(path)
            assert holder is not None and holder["launch"] == "a"
            assert holder["pid"] == first.pid, "the first to come: what it began is at work"
        assert live_holder(path) is not None, "one of them left, the other is at work"
        tell(first)
    assert live_holder(path) is None
    assert list(path.with_name(".lock.d").iterdir()) == [] and not path.exists()


def test_another_launch_and_a_driver_are_refused(path: Path, run_python: Start) -> None:
    with run_python(HOLD_SHARED, path, "a") as first:
        assert line(first) == "held\n"
        for other in (share(path, "b"), SweepLock(path)):
            with pytest.raises(ResultsError, match=f"another driver .* pid {first.pid},"), other:
                pass
        assert not path.exists(), "who is refused leaves no lock"
        assert len(list(path.with_name(".lock.d").iterdir())) == 1
        tell(first)
    with share(path, "b"):
        pass


def test_a_driver_keeps_elements_out(path: Path, run_python: Start) -> None:
    with run_python(HOLD, path) as driver:
        assert line(driver) == "held\n"
        with pytest.raises(ResultsError, match=f"pid {driver.pid},"), share(path, "a"):
            pass
        assert list(path.with_name(".lock.d").iterdir()) == []
        tell(driver)


def test_elements_that_are_gone_keep_nobody_out(path: Path, run_python: Start) -> None:
    first = run_python(HOLD_SHARED, path, "a")
    assert line(first) == "held\n"
    first.kill()
    first.wait()
    members = path.with_name(".lock.d")
    foreign(members / "another-node-7-1", age_s=400, launch="a")
    assert len(list(members.iterdir())) == 2
    with SweepLock(path):
        assert list(members.iterdir()) == []
    foreign(members / "another-node-7-1", age_s=100, launch="a")  # still believed
    with pytest.raises(ResultsError, match="another-node"), SweepLock(path):
        pass
    with share(path, "a"):  # but its fellows go on beside it
        pass
    first.communicate()


@pytest.mark.parametrize("launch", [None, "a"])
def test_a_job_takes_over_from_itself_before_its_requeue(
    path: Path, monkeypatch: pytest.MonkeyPatch, launch: str | None
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    for restart, age in (("1", 1), ("2", 1)):
        foreign(path, age_s=age, job="77", restart=int(restart) - 1)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        with SweepLock(path, launch=launch) as lock:
            content = json.loads(lock.path.read_text())
            assert (content["job"], content["restart"]) == ("77", int(restart))
        assert not path.exists()
    for job, restart in (("77", 2), ("77", 3), ("78", 0)):  # itself, its successor, somebody else
        foreign(path, age_s=1, job=job, restart=restart)
        with pytest.raises(ResultsError, match="another driver"), SweepLock(path, launch=launch):
            pass
        path.unlink()


def test_a_driver_and_an_element_that_start_at_once_are_never_both_let_in(path: Path) -> None:
    for _ in range(20):
        assert held_by_threads(path, [None, "a"]) != [1, 1]


def test_a_fellow_that_is_just_writing_its_name_is_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no flock: its file may be seen before its content."""
    members = path.with_name(".lock.d")
    members.mkdir()
    young = members / "another-node-7-1"
    young.touch()
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        foreign(young, 0, launch="a")

    with monkeypatch.context() as patch:
        patch.setattr(lock.time, "sleep", sleep)
        with share(path, "a"):
            pass
    assert waited


@pytest.mark.parametrize(
    "changes", [{"heartbeat": "2026-01-01T00:00:00"}, {"restart": "x"}, {"pid": "many"}, {"host": None}]
)
def test_a_damaged_lock_counts_by_its_age(path: Path, changes: dict[str, Any]) -> None:
    foreign(path, 0)
    content = {**json.loads(path.read_text()), **changes}
    if content["host"] is None:
        del content["host"]
    path.write_text(json.dumps(content))
    assert read_lock(path) is not None and live_holder(path) is not None
    os.utime(path, (1, 1))
    assert live_holder(path) is None


def test_a_lock_that_the_system_cannot_read_is_named(path: Path) -> None:
    path.mkdir()
    for look in (read_lock, live_holder):
        with pytest.raises(UnreadableError, match=f"{path}: cannot be read"):
            look(path)
