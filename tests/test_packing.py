"""How many trials run side by side, measured: `resources: auto`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ddsweep.packing as packing
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.errors import SettingError, UserError
from ddsweep.packing import Packed, best, candidates, measure, measured
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import load_sweep
from ddsweep.trial_plan import TrialSettings

SPEC = TrialSpec(
    dataset=DATASETS["digits"],
    network="convnet(depth=1,width=4,norm=none)",
    **{"models_per_step": 1, "real_batch": 32, "outer_steps": 2},
)


def test_what_is_worth_measuring() -> None:
    assert candidates(2, 0, 100) == [(1, 2, 0), (2, 1, 0)]
    assert candidates(6, 0, 100) == [(1, 6, 0), (2, 3, 0), (4, 1, 0), (6, 1, 0)]
    assert candidates(6, 0, 3) == [(1, 6, 0), (2, 3, 0)] and candidates(1, 0, 9) == [(1, 1, 0)]
    assert candidates(16, 2, 100) == [(1, 8, 1), (2, 4, 0.5), (4, 2, 0.25), (8, 1, 0.125)], "of one GPU"
    assert candidates(2, 1, 100)[-1] == (8, 0.2, 0.125) and len(candidates(2, 1, 2)) == 2
    beside_a_shard = [part for _, _, part in candidates(16, 1, 100, 0.1)]
    assert beside_a_shard == [0.9, 0.45, 0.225, 0.1125], "one GPU alone has room for its evaluations too"


def test_the_best_is_that_with_the_most_steps_and_of_the_like_that_with_the_fewest_trials() -> None:
    rates = {1: 1.0, 2: 1.7, 4: 2.0, 8: 2.05}
    found = [Packed(n, 1, 1 / n, rate) for n, rate in rates.items()]
    assert best(found).count == 4, "8 get 2.5 % more done, and take twice the memory"
    assert best(found[:2]).count == 2 and best(found[:1]).count == 1


def test_trials_are_measured_side_by_side_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SECONDS", 0.05)
    arguments = (SPEC, TrialSettings(), 2, 0.0, 10, SweepDirectory(tmp_path))
    found = measured(*arguments)
    assert [(packed.count, packed.cpus, packed.gpus) for packed in found] == [(1, 2, 0), (2, 1, 0)]
    assert all(packed.steps_per_second > 0 for packed in found)
    monkeypatch.setattr(packing, "measure", lambda *a, **k: pytest.fail("measured again"))
    assert measured(*arguments) == found
    file = SweepDirectory(tmp_path).cache / "packing.json"
    assert len(json.loads(file.read_text())) == 1
    monkeypatch.setattr(packing, "measure", lambda *a, **k: found[:1])
    assert measured(SPEC, TrialSettings(compile="off"), *arguments[2:]) == found[:1], "another kind of trial"
    file.write_text("{")
    assert measured(*arguments) == found[:1], "torn: measured again"
    monkeypatch.setattr(packing, "measure", lambda *a, **k: pytest.fail("measured again"))
    assert measured(*arguments) == found[:1], "that only one of two fitted is known too"


def test_gpus_that_torch_does_not_see_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray may be told of any number of them."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="sees no GPU here"):
        measured(SPEC, TrialSettings(), 2, 1.0, 10, SweepDirectory(tmp_path))


def test_numbers_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def side_by_side(count: int, *more: object) -> float:
        if count > 2:
            raise UserError("OutOfMemoryError: CUDA out of memory")
        return float(count)

    monkeypatch.setattr(packing, "_side_by_side", side_by_side)
    found = measure(SPEC, TrialSettings(), "cuda", candidates(16, 1, 8))
    assert [packed.count for packed in found] == [1, 2]


def test_a_trial_that_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError,
        match=r"resources: auto: a trial could not be measured: UserError: .*no C\+\+ compiler here",
    ):
        measure(TrialSpec(DATASETS["digits"]), TrialSettings(compile="on"), "cpu", [(1, 1, 0)])


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
