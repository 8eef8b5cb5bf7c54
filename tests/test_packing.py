"""How many trials run at a time, measured: `resources: auto`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import ddsweep.packing as packing
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.cost import estimate
from ddsweep.errors import SettingError, UserError
from ddsweep.own_code import resolve_code
from ddsweep.packing import Packed, Packing, Room, best, measure, measured, process_counts
from ddsweep.results.code import write_code
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import load_sweep
from ddsweep.sweep import amounts
from ddsweep.sweep.observe import Board
from ddsweep.sweep.session import Node, RaySession
from ddsweep.trial_plan import TrialSettings

SPEC = TrialSpec(
    dataset=DATASETS["digits"],
    network="convnet(depth=1,width=4,norm=none)",
    **{"models_per_step": 1, "real_batch": 32, "outer_steps": 2},
)


def counts(*given: float) -> list[tuple[int, float, float]]:
    return [(packing.count, packing.cpus, packing.gpus) for packing in process_counts(*given)]  # type: ignore[arg-type]


def test_numbers_of_processes_that_are_worth_measuring() -> None:
    assert counts(2, 0, 100) == [(1, 2, 0), (2, 1, 0)]
    assert counts(6, 0, 100) == [(1, 6, 0), (2, 3, 0), (4, 1, 0), (6, 1, 0)]
    assert counts(6, 0, 3) == [(1, 6, 0), (2, 3, 0)] and counts(1, 0, 9) == [(1, 1, 0)]
    assert counts(16, 2, 100) == [(1, 8, 1), (2, 4, 0.5), (4, 2, 0.25), (8, 1, 0.125)], "of one GPU"
    assert counts(2, 1, 100)[-1] == (8, 0.2, 0.125) and len(counts(2, 1, 2)) == 2
    beside_a_shard = [part for _, _, part in counts(16, 1, 100, 0.1)]
    assert beside_a_shard == [0.9, 0.45, 0.225, 0.1125], "one GPU alone has room for its evaluations too"


def test_the_best_is_that_with_the_most_steps_and_of_the_like_that_with_the_fewest_trials() -> None:
    rates = {1: 1.0, 2: 1.7, 4: 2.0, 8: 2.05}
    found = [Packed(n, 1, 1 / n, 1, rate) for n, rate in rates.items()]
    assert best(found).count == 4, "8 get 2.5 % more done, and take twice the memory"
    assert best(found[:2]).count == 2 and best(found[:1]).count == 1
    alike = [Packed(2, 1, 0.5, 2, 2.0), Packed(1, 1, 1, 4, 2.0)]
    assert best(alike).count == 1, "as many trials in fewer processes"


Rate = Callable[[int, int], float]


def climbed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, room: Room, rate: Rate) -> list[tuple[int, int]]:
    """(processes, trials in each) as they are tried, where ``rate`` are the steps of all in a second."""
    monkeypatch.setattr(packing, "pick_device", lambda setting, gpus: torch.device("cpu"))
    monkeypatch.setattr(packing, "_side_by_side", lambda packing, *a: rate(packing.count, packing.together))
    found = measured(SPEC, TrialSettings(), room, SweepDirectory(tmp_path / "results"))
    return [(packed.count, packed.together) for packed in found]


def test_processes_and_trials_in_a_process_grow_in_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A CPU's cores come first, on a GPU the kernels; each goes on from the best of the other."""

    def cpu(count: int, together: int) -> float:
        return count * min(together, 8) ** 0.5  # eight together fill a core

    tried = climbed(monkeypatch, tmp_path, Room(4, 0.0, 100, together=16), cpu)
    assert tried == [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4), (4, 8), (4, 16)]

    def gpu(count: int, together: int) -> float:
        return min(count * together, 24)  # 24 fill it

    tried = climbed(monkeypatch, tmp_path, Room(16, 1.0, 100, together=40), gpu)
    assert tried == [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (1, 32), (1, 40), (2, 32)]


def test_no_more_trials_are_tried_than_there_are_nor_after_a_loss(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few = climbed(
        monkeypatch, tmp_path, Room(2, 0.0, 6, together=6), lambda count, together: count * together
    )
    assert few == [(1, 1), (2, 1), (2, 2)], "two with four each would be eight"
    worse = climbed(monkeypatch, tmp_path, Room(4, 0.0, 100, together=16), lambda count, together: 1 / count)
    assert worse == [(1, 1), (2, 1), (1, 2), (1, 4), (1, 8), (1, 16)], "four processes are not tried"


def test_no_more_trials_are_tried_than_memory_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    each = estimate(SPEC, 1).memory_bytes
    room = Room(2, 0.0, 100, together=16, memory=5 * each)
    tried = climbed(monkeypatch, tmp_path, room, lambda count, together: count * together)
    assert tried == [(1, 1), (2, 1), (2, 2)], "two with four each would take eight times as much"
    less = replace(room, memory=each / 2)
    found = measured(SPEC, TrialSettings(), less, SweepDirectory(tmp_path / "results"))
    assert [(packed.count, packed.together) for packed in found] == [(1, 1)], "one is tried in any case"


def test_trials_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SECONDS", 0.05)
    room, directory = Room(1, 0.0, 10, together=2), SweepDirectory(tmp_path)
    found = measured(SPEC, TrialSettings(), room, directory)
    assert [(packed.count, packed.cpus, packed.together) for packed in found] == [(1, 1, 1), (1, 1, 2)]
    assert all(packed.steps_per_second > 0 for packed in found)
    monkeypatch.setattr(packing, "measure", lambda *a, **k: pytest.fail("measured again"))
    assert measured(SPEC, TrialSettings(), room, directory) == found
    file = directory.cache / "packing.json"
    assert len(json.loads(file.read_text())) == 1
    monkeypatch.setattr(packing, "measure", lambda *a, **k: found[:1])
    assert measured(SPEC, TrialSettings(compile="off"), room, directory) == found[:1], "another kind of trial"
    file.write_text("{")
    assert measured(SPEC, TrialSettings(), room, directory) == found[:1], "torn: measured again"
    monkeypatch.setattr(packing, "measure", lambda *a, **k: pytest.fail("measured again"))
    assert measured(SPEC, TrialSettings(), room, directory) == found[:1], "that only one fitted is known too"


def test_a_sweep_that_goes_on_with_fewer_trials_is_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rate(count: int, together: int) -> float:
        return count * together

    def left(most: int, together: int) -> list[tuple[int, int]]:
        return climbed(monkeypatch, tmp_path, Room(2, 0.0, most, together=together), rate)

    whole = left(40, 20)
    assert whole[-1] == (2, 20)
    monkeypatch.setattr(packing, "measure", lambda *a, **k: pytest.fail("measured again"))
    assert left(7, 7) == [packed for packed in whole if packed[0] * packed[1] <= 7]
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        left(41, 20)


def test_with_a_number_for_cohorts_only_processes_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    room = Room(4, 0.0, 9, together=4, fixed=True)
    tried = climbed(monkeypatch, tmp_path, room, lambda count, together: count * together)
    assert tried == [(1, 4), (2, 4), (4, 2)], "as many trials together as there will be"


def test_a_shard_that_takes_the_whole_gpu_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.gpus: 1 leaves nothing of a GPU for trials; give less"):
        climbed(monkeypatch, tmp_path, Room(8, 2.0, 9, shard=1.0), lambda count, together: 1.0)


def test_gpus_that_torch_does_not_see_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray may be told of any number of them."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="sees no GPU here"):
        measured(SPEC, TrialSettings(), Room(2, 1.0, 10), SweepDirectory(tmp_path))


def test_numbers_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def side_by_side(packing: Packing, *more: object) -> float:
        if packing.count > 2:
            raise UserError("OutOfMemoryError: CUDA out of memory")
        return float(packing.count)

    monkeypatch.setattr(packing, "_side_by_side", side_by_side)
    found = measure(SPEC, TrialSettings(), "cuda", process_counts(16, 1, 8))
    assert [packed.count for packed in found] == [1, 2]


def test_a_trial_that_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError,
        match=r"resources: auto: a trial could not be measured: UserError: .*no C\+\+ compiler here",
    ):
        measure(TrialSpec(DATASETS["digits"]), TrialSettings(compile="on"), "cpu", [Packing(1, 1, 0)])


LOUD = """
from torch import nn

print("read")


class Loud(nn.Module):
    def __init__(self, channels, side, classes):
        super().__init__()
        print("warm")
        self.head = nn.Linear(channels * side * side, classes)

    def forward(self, x):
        print("12.5")
        if x.shape[0] == 7:
            raise ValueError("seven")
        return self.head(x.flatten(1))
"""


@pytest.mark.slow
def test_what_a_users_network_prints_is_no_answer(user_folder: Callable[..., Path]) -> None:
    """The processes talk to this one on their standard output."""
    directory = SweepDirectory(user_folder({"loud.py": LOUD}))
    network, _ = resolve_code({"file": "loud.py", "name": "Loud"}, "network")
    write_code(directory, [network])
    spec = replace(SPEC, network=str(network))
    tried = [Packing(1, 1.0, 0.0)]
    (found,) = measure(spec, TrialSettings(), "cpu", tried, seconds=0.05, code=directory.code)
    assert found.steps_per_second != 12.5
    with pytest.raises(UserError, match=r"could not be measured: .*: seven$"):
        seven = replace(spec, real_batch=7)
        measure(seven, TrialSettings(), "cpu", tried, seconds=0.05, code=directory.code)


@pytest.mark.parametrize(("cohort", "measured_with"), [("auto", (6, False)), (3, (3, True)), (1, (1, True))])
def test_what_the_settings_leave_to_the_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cohort: str | int, measured_with: tuple[int, bool]
) -> None:
    file, rooms = tmp_path / "auto.yaml", []
    file.write_text(BASE + f"resources: {{cpus: auto, cohort: {cohort}}}\n")
    sweep = load_sweep(file)

    def found(spec: TrialSpec, settings: TrialSettings, room: Room, directory: object) -> list[Packed]:
        rooms.append(room)
        return [Packed(2, 3.0, 0.0, room.together, 1.0)]

    monkeypatch.setattr(amounts, "measured", found)
    trials = [replace(SPEC, seed=seed) for seed in range(6)]
    session = RaySession("", None, (Node("here", 6.0, 0.0, 1e9),))
    board = Board(Console(quiet=True), {trial.trial_id: "" for trial in trials}, trials)
    seconds = {trial.trial_id: 1.0 for trial in trials}
    used, networks = amounts.with_measured_resources(
        sweep, trials, session, SweepDirectory(tmp_path), board, seconds
    )
    assert [(room.together, room.fixed) for room in rooms] == [measured_with]
    assert rooms[0].most == 6
    amounts.with_measured_resources(
        sweep, trials[:1], session, SweepDirectory(tmp_path), board, seconds, further=9
    )
    assert rooms[1].most == 10, "one trial is left of a search, which goes on with many"
    assert (used.resources.cpus, used.resources.gpus, used.resources.cohort) == (3.0, 0.0, cohort)
    assert networks == (16 if cohort == "auto" else None), "with more trials it might have been more"


BASE = "name: auto\nbase: {dataset: digits, images_per_class: 1, inner_steps: 1}\n"


def test_auto_in_a_sweep_file(tmp_path: Path) -> None:
    file = tmp_path / "auto.yaml"
    file.write_text(BASE + "resources: auto\n")
    sweep = load_sweep(file, ["resources.dashboard=false"])
    resources = sweep.resources
    assert (resources.cpus, resources.gpus, resources.dashboard) == ("auto", "auto", False)
    assert resources.to_be_measured and resources.for_trial(SPEC) == (1.0, 0.0), "until it is measured"
    assert not load_sweep(file, ["resources.cpus=1", "resources.gpus=0"]).resources.to_be_measured
    assert load_sweep(file, ["resources.gpus=0"]).resources.to_be_measured, "cpus alone, on the CPU"
    with pytest.raises(SettingError, match="cpus: auto is measured together with gpus"):
        load_sweep(file, ["resources.gpus=0.5"])
    for text in ("fast", "{cpus: fast}"):
        file.write_text(BASE + f"resources: {text}\n")
        with pytest.raises(SettingError, match=r"resources"):
            load_sweep(file)
