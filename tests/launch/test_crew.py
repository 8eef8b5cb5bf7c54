"""The processes of an array element, and their ends."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddsweep.errors import DivergedError, GpuLostError, UserError
from ddsweep.launch.allocation import NodeLimits
from ddsweep.launch.crew import Crew
from ddsweep.launch.folder import LaunchFolder
from ddsweep.launch.processes import Signals
from ddsweep.sweep.retry import RetryPolicy
from tests.conftest import PATIENCE_S

QUICK = RetryPolicy(retries=1, spread_s=0.2)

# --------------------------------------------------------------------------------- slots and devices


@pytest.fixture
def crew(tmp_path: Path, handlers: None) -> Crew:
    folder = LaunchFolder(tmp_path / "a launch")
    folder.root.mkdir()
    return Crew(folder, "trials-0", Signals(), NodeLimits(2, 0, None), cpus=1.0, gpus=0.0, policy=QUICK)


def placed(crew: Crew, cpus: int, gpus: int, each_cpus: float, each_gpus: float) -> list[str]:
    one = replace(crew, limits=NodeLimits(cpus, gpus, None), cpus=each_cpus, gpus=each_gpus)
    assert len(one.devices()) == one.slots
    return one.devices()


def test_slots_by_cpus(crew: Crew) -> None:
    assert placed(crew, 8, 0, 1, 0) == [""] * 8
    assert placed(crew, 8, 4, 3, 0) == [""] * 2, "who asks for no GPU sees none"
    assert placed(crew, 3, 0, 0.3, 0) == [""] * 10
    assert placed(crew, 2, 0, 0, 0) == [""] * 2


def test_slots_by_gpus_and_who_sees_which(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert placed(crew, 16, 2, 1, 0.5) == ["4", "7", "4", "7"]
    assert placed(crew, 32, 2, 1, 0.1).count("4") == 10
    assert placed(crew, 3, 2, 1, 0.5) == ["4", "7", "4"]
    assert placed(crew, 16, 2, 1, 0.7) == ["4", "7"]
    assert placed(crew, 16, 2, 1, 1) == ["4", "7"]
    assert placed(crew, 16, 2, 1, 2) == ["4,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert placed(crew, 16, 2, 1, 1) == ["GPU-a", "GPU-b"]


@pytest.mark.parametrize("visible", [None, "NoDevFiles"])
def test_gpus_that_slurm_only_counts_have_the_first_numbers(
    crew: Crew, monkeypatch: pytest.MonkeyPatch, visible: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert placed(crew, 16, 2, 1, 0.5) == ["0", "1", "0", "1"]


@pytest.mark.parametrize(("cpus", "gpus"), [(4.0, 1.0), (1.0, 2.0)])
def test_what_never_fits_is_refused(crew: Crew, cpus: float, gpus: float) -> None:
    with pytest.raises(UserError, match=rf"asks for {cpus:g} CPUs? and {gpus:g} GPUs?, but .* has 2 and 1"):
        placed(crew, 2, 1, cpus, gpus)


# ------------------------------------------------------------------------------------- the processes


def note(folder: str, name: str, text: str = "") -> None:
    """A file for each start, with its process and what it saw."""
    place = Path(folder) / "notes"
    place.mkdir(exist_ok=True)
    (place / f"{name}.{time.monotonic_ns()}").write_text(f"{os.getpid()} {text}")


def notes(crew: Crew, name: str) -> list[list[str]]:
    found = sorted((crew.folder.root / "notes").glob(f"{name}.*"))
    return [path.read_text().split(" ", 1) for path in found]


def quick(folder: str, stop_file: str, name: str) -> str:
    note(folder, name, os.environ["CUDA_VISIBLE_DEVICES"])
    return "done"


def until_told(folder: str, stop_file: str, name: str) -> str:
    """Works for ever, or until the test says go, or until it is to drain."""
    note(folder, name)
    while not Path(stop_file).exists():
        if Path(folder, "go").exists():
            return "done"
        time.sleep(0.02)
    note(folder, f"drained-{name}")
    return "drained"


def deadly(folder: str, stop_file: str, name: str) -> str:
    note(folder, name, os.environ["CUDA_VISIBLE_DEVICES"])
    if name.startswith("deadly"):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    return "done"


def deadly_together(folder: str, stop_file: str, *names: str) -> str:
    note(folder, "+".join(names))
    return deadly(folder, stop_file, next((name for name in names if name.startswith("deadly")), names[0]))


class Unpicklable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")
        self.lock = threading.Lock()


def raising(folder: str, stop_file: str, name: str) -> str:
    note(folder, name)
    if name == "exits":
        raise SystemExit(3)
    if name == "odd":
        raise Unpicklable(1, 2)
    if name == "plain":
        raise DivergedError("no longer finite")
    return "failed" if name == "known" else "done"


class Broken(list[tuple[str, str, str, int]]):
    """The report of a crew on work that it gave up."""

    def __call__(self, trial_id: str, error: Exception, attempts: int) -> None:
        self.append((trial_id, type(error).__name__, str(error), attempts))


def when(condition: Callable[[], object], then: Callable[[], object]) -> threading.Thread:
    def work() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)
        then()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def children() -> list[Any]:
    return [child for child in multiprocessing.active_children() if child.is_alive()]


def test_everything_is_done_once_and_nothing_is_left(
    crew: Crew, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    whole = replace(crew, limits=NodeLimits(2, 1, None), gpus=0.5)
    broken = Broken()
    assert whole.run(quick, [(f"t{n}",) for n in range(5)], broken) == 0
    assert broken == [] and children() == []
    seen = [notes(crew, f"t{n}") for n in range(5)]
    assert [len(one) for one in seen] == [1] * 5
    assert {one[0][1] for one in seen} == {"5"}
    assert len({one[0][0] for one in seen}) <= 2, "two processes, used again"
    assert sorted(capsys.readouterr().out.splitlines()) == [f"trials-0: t{n}: done" for n in range(5)]


def test_a_killed_process_costs_its_own_item_only_and_is_given_up_after_its_attempts(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that die, at the same time, beside others; each again on the device of its place."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    pair = replace(crew, limits=NodeLimits(2, 2, None), gpus=1.0)
    broken = Broken()
    items = [("deadly0",), ("deadly1",), ("a",), ("b",), ("c",)]
    assert pair.run(deadly, items, broken) == 2
    assert sorted((name, kind, attempts) for name, kind, _, attempts in broken) == [
        ("deadly0", "WorkerError", 2),
        ("deadly1", "WorkerError", 2),
    ]
    assert all("the process was killed from outside" in text for _, _, text, _ in broken)
    for name in "abc":
        assert len(notes(crew, name)) == 1, "its fellows know nothing of it"
    for name in ("deadly0", "deadly1"):
        starts = notes(crew, name)
        assert len(starts) == 2 and starts[0][0] != starts[1][0]
        assert {device for _, device in starts} <= {"4", "7"}
    assert children() == []


def test_a_process_that_somebody_kills_is_replaced_and_the_item_done(
    crew: Crew, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill() -> None:
        os.kill(int(notes(crew, "a")[0][0]), signal.SIGTERM)  # as Slurm sends it to all: not for them
        time.sleep(0.3)
        os.kill(int(notes(crew, "a")[0][0]), signal.SIGKILL)
        when(lambda: len(notes(crew, "a")) == 2, (crew.folder.root / "go").touch)

    killer = when(lambda: notes(crew, "a") and notes(crew, "b"), kill)
    broken = Broken()
    assert crew.run(until_told, [("a",), ("b",)], broken) == 0
    killer.join()
    assert broken == []
    assert (len(notes(crew, "a")), len(notes(crew, "b"))) == (2, 1)
    out = capsys.readouterr().out
    assert re.search(r"trials-0: a: the process was killed .*; it will be tried again in 0 s\n", out)


def test_whatever_is_raised_comes_back_as_something_that_can_be_told(crew: Crew) -> None:
    broken = Broken()
    names = ["plain", "odd", "exits", "known", "fine"]
    assert crew.run(raising, [(name,) for name in names], broken) == 2
    assert sorted(broken) == [
        ("exits", "RuntimeError", "SystemExit: 3", 2),
        ("odd", "RuntimeError", "Unpicklable: 1 and 2", 2),
        ("plain", "DivergedError", "no longer finite", 2),
    ]
    assert [len(notes(crew, name)) for name in names] == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("cause", ["warning", "cancelled", "stop file"])
def test_draining_ends_what_runs_and_begins_nothing(crew: Crew, cause: str) -> None:
    stop = crew.folder.stop_file
    crew.signals.stop_when(stop.exists)

    def tell() -> None:
        if cause == "stop file":
            stop.touch()
        else:
            os.kill(os.getpid(), signal.SIGUSR2 if cause == "warning" else signal.SIGTERM)

    when(lambda: notes(crew, "a") and notes(crew, "b"), tell)
    broken = Broken()
    assert crew.run(until_told, [("a",), ("b",), ("c",)], broken) == 75
    assert notes(crew, "drained-a") and notes(crew, "drained-b") and not notes(crew, "c")
    assert broken == [] and children() == []
    assert crew.signals.ending == (cause == "warning")


def on_a_dead_gpu(folder: str, stop_file: str, name: str) -> str:
    note(folder, name, os.environ["CUDA_VISIBLE_DEVICES"])
    if os.environ["CUDA_VISIBLE_DEVICES"] in Path(folder, "dead").read_text().split():
        raise GpuLostError(f"trial {name} was granted a GPU")
    return "done"


@pytest.mark.parametrize(("dead", "code"), [("4", 0), ("4 7", 2)])
def test_a_place_whose_gpu_is_lost_is_given_up_while_there_is_another(
    crew: Crew, monkeypatch: pytest.MonkeyPatch, dead: str, code: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    (crew.folder.root / "dead").write_text(dead)
    pair = replace(crew, limits=NodeLimits(2, 2, None), gpus=1.0)
    broken = Broken()
    assert pair.run(on_a_dead_gpu, [(name,) for name in "abcd"], broken) == code
    tried = [device for name in "abcd" for _, device in notes(crew, name)]
    assert sorted(map(tried.count, "47")) == [1, 4], "no more is lost where one was"
    assert len(broken) == (4 if code else 0) and (code or tried.count("4") == 1)


def on_no_gpu(folder: str, stop_file: str, *names: str) -> str:
    raise GpuLostError("gone")


def test_each_of_the_trials_that_the_last_gpu_was_lost_with_is_told(crew: Crew) -> None:
    broken = Broken()
    alone = replace(crew, limits=NodeLimits(1, 1, None), gpus=1.0)
    assert alone.run(on_no_gpu, [("a", "b"), ("c",)], broken, lambda item: [(name,) for name in item]) == 2
    assert [(trial, text) for trial, _, text, _ in broken] == [("a", "gone"), ("b", "gone"), ("c", "gone")]


def deaf(folder: str, stop_file: str, name: str) -> str:
    note(folder, name)
    time.sleep(PATIENCE_S)
    return "done"


def test_what_does_not_come_to_rest_before_the_time_limit_is_ended(
    crew: Crew, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job must be requeued before its time is up. A cancelled one has no such limit."""
    hurried = replace(crew, drain_s=0.5)
    when(lambda: notes(crew, "a"), lambda: os.kill(os.getpid(), signal.SIGUSR2))
    broken, begun = Broken(), time.monotonic()
    assert hurried.run(deaf, [("a",), ("b",)], broken) == 75
    assert time.monotonic() - begun < PATIENCE_S / 2
    assert broken == [] and children() == []
    assert "trials-0: has not come to rest within 0 s: a" in capsys.readouterr().out


def test_an_element_that_is_told_before_it_begins_begins_nothing(crew: Crew) -> None:
    crew.folder.stop_file.touch()
    crew.signals.stop_when(crew.folder.stop_file.exists)
    assert crew.run(quick, [("a",)], Broken()) == 75
    assert not (crew.folder.root / "notes").exists()


def test_the_stop_of_an_earlier_start_is_forgotten(crew: Crew) -> None:
    (crew.folder.root / "stops").mkdir()
    (crew.folder.root / "stops" / "trials-0").touch()
    assert crew.run(quick, [("a",)], Broken()) == 0


def test_an_error_of_its_own_does_not_wait_for_the_others(crew: Crew) -> None:
    def full_disk(trial_id: str, error: Exception, attempts: int) -> None:
        raise UserError("no space left")

    once = replace(crew, policy=RetryPolicy(0))
    with pytest.raises(UserError, match="no space left"):
        once.run(mixed, [("runs",), ("deadly",)], full_disk)
    assert notes(crew, "drained-runs") and children() == []


def mixed(folder: str, stop_file: str, name: str) -> str:
    if name == "runs":
        return until_told(folder, stop_file, name)
    deadline = time.monotonic() + PATIENCE_S
    while not list(Path(folder).glob("notes/runs.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return deadly(folder, stop_file, name)


def test_trials_that_are_together_fall_apart_when_their_process_dies_twice(crew: Crew) -> None:
    """And each is tried by itself then, as often as if nothing had happened."""
    broken = Broken()
    items = [("good", "deadly", "fine")]
    assert crew.run(deadly_together, items, broken, lambda item: [(name,) for name in item]) == 2
    assert [(trial, attempts) for trial, _, _, attempts in broken] == [("deadly", QUICK.retries + 1)]
    assert len(notes(crew, "good+deadly+fine")) == 2
    assert len(notes(crew, "fine")) == 2 * 1, "once by itself, with what it notes"


def test_deaths_do_not_add_up_while_steps_are_saved_between_them(crew: Crew) -> None:
    broken = Broken()

    def saved(item: tuple[Any, ...]) -> int:
        return min(4, len(notes(crew, item[0])))  # it gets no further than step 4

    assert crew.run(deadly, [("deadly",)], broken, saved=saved) == 2
    assert [(trial, attempts) for trial, _, _, attempts in broken] == [("deadly", QUICK.retries + 1)]
    assert len(notes(crew, "deadly")) == 4 + QUICK.retries


def test_without_retries_they_fall_apart_at_once(crew: Crew) -> None:
    broken = Broken()
    once = replace(crew, policy=RetryPolicy(0))
    items = [("good", "deadly", "fine")]
    assert once.run(deadly_together, items, broken, lambda item: [(name,) for name in item]) == 2
    assert [(trial, attempts) for trial, _, _, attempts in broken] == [("deadly", 1)]
