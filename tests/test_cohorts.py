"""Trials that are distilled together: each ends with the bits that it has alone, whatever happens to the
others."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ddsweep.trial.running
from ddsweep.catalog import DATASETS, Measure, TrialSpec
from ddsweep.catalog.measures import remember
from ddsweep.cohorts import (
    FREE,
    MEMORY,
    cohort_key,
    cohort_sizes,
    dealt_out,
    room_beside,
    split_evenly,
    why_alone,
    why_in_turn,
)
from ddsweep.core.methods import bptt
from ddsweep.core.networks import build_network
from ddsweep.core.own_network import written_out
from ddsweep.cost import choose_memory, estimate
from ddsweep.data.load import Splits, load_splits
from ddsweep.errors import DivergedError, UserError
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part
from ddsweep.spec import ResourcesSpec
from ddsweep.trial import TrialJob, distil_together, distil_trial, read_distilled
from ddsweep.trial_plan import TrialSettings, first_plan
from tests.companions import Cohort
from tests.conftest import PATIENCE_S

SETTINGS = TrialSettings(checkpoint_every=3, log_every=1, cohort=8)


def spec_of(seed: int = 0, **settings: Any) -> TrialSpec:
    defaults = {
        **{"network": "convnet(depth=1,width=8,norm=none)", "images_per_class": 2, "inner_steps": 2},
        **{"inner_epochs": 2, "inner_lr": 0.1, "outer_steps": 9, "models_per_step": 2, "real_batch": 64},
        **{"selection_networks": 2, "validate_every": 3},
    }
    return TrialSpec(dataset=DATASETS["digits"], seed=seed, **(defaults | settings))


SPECS = [
    spec_of(0),
    spec_of(1, outer_lr=0.05, clip_norm=0.1, outer_schedule="cosine"),
    spec_of(2, ema=0.9, keep="best", trim=0.5, outer_steps=12),
    spec_of(3, inner_lr=0.3, inner_lr_mode="shared", clip_running=1.1, outer_steps=4),
]
BROKEN = spec_of(9, inner_lr=1e30, on_nonfinite="stop")


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_splits(DATASETS["digits"], None, validation_fraction=0.1, split_seed=0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> SweepDirectory:
    """Each of the trials, distilled by itself."""
    directory = SweepDirectory(tmp_path_factory.mktemp("alone"))
    for spec in SPECS:
        assert distil_trial(spec, splits, directory, replace(SETTINGS, cohort=1))
    return directory


@pytest.fixture
def job(tmp_path: Path, splits: Splits) -> Callable[..., TrialJob]:
    directory = SweepDirectory(tmp_path / "together")
    return lambda spec, settings=SETTINGS: TrialJob(spec, splits, directory, settings)


def rows(spec: TrialSpec, directory: SweepDirectory) -> list[dict[str, Any]]:
    found = read_part(directory.history_part(spec.trial_id)).to_pylist()
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def assert_as_alone(specs: Sequence[TrialSpec], directory: SweepDirectory, alone: SweepDirectory) -> None:
    for spec in specs:
        assert read_distilled(spec, directory).sha256 == read_distilled(spec, alone).sha256, spec.seed
        assert rows(spec, directory) == rows(spec, alone), spec.seed


def test_each_ends_with_the_bits_that_it_has_alone(
    job: Callable[..., TrialJob], alone: SweepDirectory
) -> None:
    """They differ in rates, clips, schedules and ends; one joins late, when another has left."""
    cohort = Cohort([[job(SPECS[0]), job(SPECS[1]), job(SPECS[3])], [], [], [], [], [job(SPECS[2])]])
    distil_together(cohort)
    assert cohort.outcomes == {spec.trial_id: True for spec in SPECS}
    directory = job(SPECS[0]).directory
    assert_as_alone(SPECS, directory, alone)
    said = [read_distilled(spec, directory).provenance for spec in SPECS]
    assert [row["cohort_size"] for row in said] == [3, 3, 3, 3]


@pytest.mark.parametrize("mode", ["shared", "per_network"])
def test_a_small_training_part_of_another_size_has_company_of_its_own(
    tmp_path: Path, splits: Splits, mode: str
) -> None:
    """Where `real_batch` is more than there is, a step takes all: `validation_fraction` decides how many."""
    specs = [
        spec_of(seed, real_batch=1024, outer_steps=2, real_batch_mode=mode, validation_fraction=fraction)
        for seed, fraction in ((0, 0.1), (1, 0.5), (2, 0.5))
    ]
    half = load_splits(DATASETS["digits"], None, validation_fraction=0.5, split_seed=0)
    assert len({cohort_key(spec) for spec in specs}) == 1
    for name in ("together", "alone"):
        directory = SweepDirectory(tmp_path / name)
        own = [TrialJob(spec, splits if spec.seed == 0 else half, directory, SETTINGS) for spec in specs]
        for turn in [own] if name == "together" else [[job] for job in own]:
            cohort = Cohort([turn])
            distil_together(cohort)
            assert set(cohort.outcomes.values()) == {True}
    for spec in specs:
        sums = {
            read_distilled(spec, SweepDirectory(tmp_path / name)).sha256 for name in ("together", "alone")
        }
        assert len(sums) == 1


def test_one_that_diverges_or_is_refused_leaves_and_the_rest_go_on(
    job: Callable[..., TrialJob], alone: SweepDirectory
) -> None:
    other = replace(SETTINGS, device="cuda", gpus=1.0)
    refused = job(spec_of(7), other)
    cohort = Cohort([[job(SPECS[0]), job(BROKEN), refused, job(SPECS[1])]])
    distil_together(cohort)
    assert isinstance(cohort.outcomes[BROKEN.trial_id], DivergedError)
    if not torch.cuda.is_available():
        assert isinstance(cohort.outcomes[refused.spec.trial_id], UserError)
    assert_as_alone(SPECS[:2], job(SPECS[0]).directory, alone)


def test_others_come_after_those_that_were_all_refused(
    job: Callable[..., TrialJob], alone: SweepDirectory
) -> None:
    refused = job(spec_of(7), replace(SETTINGS, device="cuda", gpus=1.0))
    if torch.cuda.is_available():
        refused = job(BROKEN)
    cohort = Cohort([[refused], [job(SPECS[0])]])
    distil_together(cohort)
    assert isinstance(cohort.outcomes[refused.spec.trial_id], DivergedError | UserError)
    assert_as_alone(SPECS[:1], job(SPECS[0]).directory, alone)


def test_a_drained_cohort_goes_on_in_other_company(
    job: Callable[..., TrialJob], alone: SweepDirectory
) -> None:
    first = Cohort([[job(SPECS[0]), job(SPECS[1])]], stop_after=4)
    distil_together(first)
    assert first.outcomes == {spec.trial_id: False for spec in SPECS[:2]}
    second = Cohort([[job(SPECS[1]), job(SPECS[2])]], stop_after=2)
    distil_together(second)
    distil_together(Cohort([[job(SPECS[2])], [job(SPECS[0]), job(SPECS[1])]]))
    assert_as_alone(SPECS[:3], job(SPECS[0]).directory, alone)


def test_one_that_leaves_at_a_rung_comes_back_where_it_was(
    job: Callable[..., TrialJob], alone: SweepDirectory
) -> None:
    settings = replace(SETTINGS, rungs=(6,))
    left = SPECS[1].trial_id
    cohort = Cohort([[job(SPECS[0], settings), job(SPECS[1], settings)]])
    cohort.leave = lambda spec, progress: progress.rung and spec.trial_id == left
    distil_together(cohort)
    assert cohort.outcomes == {SPECS[0].trial_id: True} and cohort.steps[left][-1] == 6
    again = Cohort([[job(SPECS[1], settings)]])
    distil_together(again)
    assert again.steps[left][0] == 6, "told once more"
    assert read_distilled(SPECS[1], job(SPECS[1]).directory).sha256 == (
        read_distilled(SPECS[1], alone).sha256
    )


def test_a_torn_checkpoint_of_one_is_moved_aside(job: Callable[..., TrialJob], alone: SweepDirectory) -> None:
    distil_together(Cohort([[job(SPECS[0]), job(SPECS[1])]], stop_after=5))
    checkpoint = job(SPECS[0]).directory.checkpoint(SPECS[0].trial_id)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    cohort = Cohort([[job(SPECS[0]), job(SPECS[1])]])
    distil_together(cohort)
    assert_as_alone(SPECS[:2], job(SPECS[0]).directory, alone)
    assert cohort.steps[SPECS[0].trial_id][0] == 1 and cohort.steps[SPECS[1].trial_id][0] > 1


def test_memory_that_runs_out_splits_the_cohort_and_makes_no_trial_frugal(
    job: Callable[..., TrialJob], alone: SweepDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, widths = bptt.outer_gradient, []

    def short(network: Any, params: Any, *more: Any, **named: Any) -> Any:
        count = len(next(iter(params.values()))) // 2
        widths.append(count)
        if count > 2:
            raise torch.OutOfMemoryError("no room for more than two")
        return real(network, params, *more, **named)

    monkeypatch.setattr(bptt, "outer_gradient", short)
    distil_together(Cohort([[job(spec) for spec in SPECS[:3]]]))
    assert 3 in widths and 2 in widths and 1 in widths
    directory = job(SPECS[0]).directory
    assert_as_alone(SPECS[:3], directory, alone)
    assert {read_distilled(spec, directory).provenance["n_replans"] for spec in SPECS[:3]} == {0}


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Trials begin with a plan of width 4, of which memory holds ``most``. Returns how many are computed
    together, copies included, at each attempt."""
    real, widths = bptt.outer_gradient, []

    def short(network: Any, params: Any, *more: Any, **named: Any) -> Any:
        widths.append(len(next(iter(params.values()))) // 2)
        if widths[-1] > most:
            raise torch.OutOfMemoryError("no room")
        return real(network, params, *more, **named)

    def wide(spec: TrialSpec, settings: TrialSettings) -> Any:
        return replace(first_plan(spec, settings), width=4)

    monkeypatch.setattr(bptt, "outer_gradient", short)
    monkeypatch.setattr(ddsweep.trial.running, "first_plan", wide)
    return widths


def test_copies_up_to_the_width_are_fewer_once_memory_has_run_out(
    job: Callable[..., TrialJob], alone: SweepDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each half would take as much memory as the whole, in every step anew."""
    tried = as_on_a_gpu(monkeypatch, most=2)
    distil_together(Cohort([[job(spec) for spec in SPECS[:3]]], stop_after=2))
    assert tried == [4, 2, 2, 2, 2], "three, as two and one, in both steps"
    distil_together(Cohort([[job(spec) for spec in SPECS[:3]]]))
    assert set(tried[5:]) == {2}, "the checkpoints have it"
    directory = job(SPECS[0]).directory
    assert_as_alone(SPECS[:3], directory, alone)
    for spec in SPECS[:3]:
        said = read_distilled(spec, directory).provenance
        assert (said["n_replans"], json.loads(said["execution_plan"])["width"]) == (1, 2)


def test_one_that_is_left_is_computed_with_copies_as_in_company(
    job: Callable[..., TrialJob], alone: SweepDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = as_on_a_gpu(monkeypatch, most=4)
    distil_together(Cohort([[job(SPECS[0]), job(SPECS[2])]]))
    assert tried == [4] * 12, "the last three steps are those of one trial"
    assert_as_alone([SPECS[0], SPECS[2]], job(SPECS[0]).directory, alone)


def test_memory_that_holds_no_two_trials_leaves_each_alone(
    job: Callable[..., TrialJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = as_on_a_gpu(monkeypatch, most=1)
    distil_together(Cohort([[job(SPECS[0])]], stop_after=2))
    assert tried == [4, 2, 1, 1] and job(SPECS[0]).directory.checkpoint(SPECS[0].trial_id).exists()


def test_seconds_are_shares_of_what_was_used_and_no_more(job: Callable[..., TrialJob]) -> None:
    specs = [spec_of(seed, outer_steps=20) for seed in range(20, 24)]
    began, used = time.monotonic(), time.process_time()
    distil_together(Cohort([[job(spec, replace(SETTINGS, gpus=0.5, device="cpu")) for spec in specs]]))
    wall, cpu = time.monotonic() - began, time.process_time() - used
    said = [read_distilled(spec, job(specs[0]).directory).provenance for spec in specs]
    assert 0 < sum(row["cpu_seconds"] for row in said) <= cpu
    assert 0 < sum(row["gpu_seconds"] for row in said) / 0.5 <= wall
    for row in said:
        assert 0 < row["gpu_seconds"] / 0.5 < row["wall_seconds"] <= wall, "and each has the time that passed"


CHILD = """
import json, sys
from pathlib import Path
from ddsweep.catalog import TrialSpec
from ddsweep.data.load import load_splits
from ddsweep.results.layout import SweepDirectory
from tests.companions import Cohort
from tests.test_cohorts import SETTINGS
from ddsweep.trial import TrialJob, distil_together

specs = [TrialSpec.from_dict(values) for values in json.loads(sys.argv[1])]
splits = load_splits(specs[0].dataset, None, validation_fraction=0.1, split_seed=0)
directory = SweepDirectory(Path(sys.argv[2]))
distil_together(Cohort([[TrialJob(spec, splits, directory, SETTINGS) for spec in specs]]))
"""


def test_a_killed_cohort_goes_on_where_it_was(job: Callable[..., TrialJob], alone: SweepDirectory) -> None:
    directory = job(SPECS[0]).directory
    given = json.dumps([spec.to_dict() for spec in SPECS])
    child = subprocess.Popen([sys.executable, "-c", CHILD, given, str(directory.root)])
    deadline = time.monotonic() + PATIENCE_S
    while not directory.checkpoint(SPECS[2].trial_id).exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    distil_together(Cohort([[job(spec) for spec in SPECS]]))
    assert_as_alone(SPECS, directory, alone)
    said = [read_distilled(spec, directory).provenance["n_resumed"] for spec in SPECS]
    assert max(said) == 1


# ---------------------------------------------------------------------------------- who goes with whom


def test_what_decides_the_shape_and_what_does_not() -> None:
    key = cohort_key(SPECS[0])
    assert key is not None and all(cohort_key(spec) == key for spec in SPECS)
    for other in ({"inner_steps": 1}, {"models_per_step": 3}, {"dtype": "float64"}, {"real_batch": 32}):
        assert cohort_key(spec_of(**other)) not in (None, key), other
    for own in ({"window": 2}, {"window": 3}, {"inner_augment": "shift"}):
        assert cohort_key(spec_of(**own)) not in (None, key), own
        assert cohort_key(spec_of(**own)) == cohort_key(spec_of(5, outer_lr=0.3, **own)), own
    assert cohort_key(MATCHED) is None and cohort_key(LARGE) is None and cohort_key(OWN) is None
    assert {item.name for item in fields(TrialSpec)} >= FREE


MATCHED = TrialSpec(DATASETS["digits"], network="convnet(width=8)", method="distribution_matching")
LARGE = TrialSpec(DATASETS["cifar10"], network="alexcifarnet")
OWN = TrialSpec(DATASETS["digits"], network="my_nets.py:Small@0123456789ab")
remember(OWN.network_spec, OWN.dataset.shape, 10, Measure(1000, 100, 100, written_out=False))
HEAVY: dict[str, Any] = {
    **{"dataset": DATASETS["cifar10"], "network": "convnet(depth=1,width=8,norm=none)", "method": "bptt"},
    **{"models_per_step": 4, "real_batch": 45_000, "real_batch_mode": "per_network"},
}
OWN_METHOD = TrialSpec(DATASETS["digits"], network="convnet(width=8)", method="my.methods:Mine")


@pytest.mark.parametrize(
    ("trial", "setting", "compile", "why"),
    [
        (MATCHED, "auto", "auto", "distribution_matching takes one trial at a time"),
        (OWN_METHOD, "auto", "auto", "a method of your own takes one trial at a time"),
        (
            OWN,
            4,
            "auto",
            "side by side, a network with derivatives by autograd would give other last digits than alone",
        ),
        (LARGE, "auto", "auto", "networks as large as alexcifarnet are slower side by side"),
        (SPECS[0], "auto", "on", "compiled code is that of one trial (resources.compile: on)"),
        (spec_of(models_per_step=8), "auto", "auto", "8 networks an outer step fill a core"),
        (
            replace(MATCHED, **HEAVY),
            "auto",
            "auto",
            "two together would take too much memory by estimate",
        ),
    ],
)
def test_plan_knows_why_trials_are_not_together(
    trial: TrialSpec, setting: int | str, compile: str, why: str
) -> None:
    """Two that differ in the seed alone, beside two that can be together unless nothing is."""
    trials = [trial, replace(trial, seed=7), SPECS[2], SPECS[3]]
    sizes = cohort_sizes(trials, setting, compile=compile)
    count = 4 if compile == "on" else 2
    assert why_in_turn(trials, sizes, setting, compile=compile) == {why: count}
    assert (why_alone(trial) == why) == (trial in (MATCHED, OWN_METHOD, OWN, LARGE))


def test_the_memory_of_a_cohort_is_that_of_the_mode_that_is_asked_for() -> None:
    long = [spec_of(seed, init="fixed", inner_epochs=25_000) for seed in range(20)]
    stored = estimate(long[0], 1, memory_mode="store").memory_bytes
    assert choose_memory(long[0])[0] == "recompute" and stored > MEMORY / 2
    assert set(cohort_sizes(long, "auto").values()) == {16}
    assert set(cohort_sizes(long, "auto", memory_mode="store").values()) == {1}
    assert set(cohort_sizes(long, "auto", segment=25_000).values()) == {3}
    given = ResourcesSpec(memory_mode="store")
    assert {cohort.size for cohort in dealt_out(long, given, 1)} == {1}
    assert room_beside(long[0], given, 20)[1] == 1


def test_trials_on_the_cpu_beside_trials_on_a_gpu_count_as_such() -> None:
    """`resources.gpus` by a setting gives GPUs to some trials alone."""
    small = [spec_of(seed, init="fixed") for seed in range(40)]
    gpus = [0.0] * 30 + [0.25] * 10
    sizes = cohort_sizes(small, "auto", gpus=gpus)
    assert [sizes[trial.trial_id] for trial in small] == [16] * 30 + [10] * 10
    many, gpus = [spec_of(seed, models_per_step=65) for seed in range(4)], [0.0, 0.5, 0.5, 0.5]
    assert why_in_turn(many, cohort_sizes(many, "auto", gpus=gpus), "auto", gpus=gpus) == {
        "65 networks an outer step fill a core": 1,
        "65 networks an outer step fill a GPU": 3,
    }


def test_one_of_another_shape_has_no_companion_yet() -> None:
    trials = [SPECS[0], SPECS[1], spec_of(inner_epochs=5)]
    sizes = cohort_sizes(trials, "auto")
    assert why_in_turn(trials, sizes, "auto") == {"no other trial has its shape": 1}
    assert why_in_turn(trials, sizes, "auto", more=True) == {}, "a search may propose companions"
    assert why_in_turn(trials[2:], sizes, "auto") == {}, "there is no other trial"
    assert why_in_turn(trials, cohort_sizes(trials, 1), 1) == {}, "as asked for"


def test_plan_says_which_trials_go_one_after_the_other(tmp_path: Path, ddsweep: Callable[..., Any]) -> None:
    (tmp_path / "both.yaml").write_text(
        "name: both\nbase: {dataset: digits, network: convnet(width=8), inner_epochs: 4}\n"
        "points: [{window: 2}, {method: distribution_matching}]\nseeds: 3\n"
    )
    said = ddsweep("plan", "both.yaml", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    told = " ".join(said.stdout.split())
    assert "3 trials share processes with others of their shape, up to 3 in one; 3 trials alone" in told
    assert "3 trials one after the other, not together: distribution_matching takes one trial" in told


def test_networks_with_written_out_derivatives_are_those_that_say_so() -> None:
    for name in ("lenet", "convnet", "alexcifarnet"):
        spec = TrialSpec(DATASETS["cifar10"], network=name)
        network = build_network(spec.network_spec, (3, 32, 32), 10)
        assert (written_out(network) is not None) == (name in ("lenet", "convnet")), name


@pytest.mark.parametrize(
    ("trial", "resources", "most", "room"),
    [
        (spec_of(), {}, 3, 3),
        (spec_of(), {}, 99, 8),  # as many as keep a core busy
        (spec_of(), {"cohort": 5}, 3, 5),
        (spec_of(), {"cohort": 1}, 3, 1),
        (spec_of(), {"compile": "on"}, 3, 1),
        (spec_of(models_per_step=8), {}, 3, 1),
        (spec_of(window=2), {"cohort": 5}, 3, 5),
        (TrialSpec(DATASETS["cifar10"], network="alexcifarnet"), {"cohort": 5}, 3, 1),
    ],
)
def test_how_many_may_be_beside_a_trial_whose_companions_are_to_come(
    trial: TrialSpec, resources: dict[str, Any], most: int, room: int
) -> None:
    """As in a guided search: trials that differ in rates alone have one key, others have another one."""
    given = ResourcesSpec(**resources)
    key, found = room_beside(trial, given, most)
    assert found == room
    assert (room_beside(replace(trial, outer_lr=0.3), given, most)[0] == key) == (
        cohort_key(trial) is not None and given.compile != "on"
    )
    assert room_beside(replace(trial, inner_epochs=5), given, most)[0] != key


def test_as_many_as_keep_a_core_busy() -> None:
    fixed = [spec_of(seed, init="fixed") for seed in range(40)]
    assert set(cohort_sizes(fixed, "auto").values()) == {16}
    assert set(cohort_sizes(fixed, 3).values()) == {3}
    assert set(cohort_sizes(fixed, 1).values()) == {1}
    assert set(cohort_sizes(fixed[:5], "auto").values()) == {5}
    assert set(cohort_sizes(fixed, "auto", compile="on").values()) == {1}
    many = [spec_of(seed, models_per_step=8) for seed in range(40)]
    assert set(cohort_sizes(many, "auto").values()) == {1}, "they fill a core already"
    assert set(cohort_sizes(many, "auto", gpus=[1.0] * 40).values()) == {16}
    large = [spec_of(seed, init="fixed", inner_epochs=4000, real_batch=4096) for seed in range(40)]
    most = max(cohort_sizes(large, "auto").values())
    mode, segment = choose_memory(large[0])
    needed = estimate(large[0], 1, memory_mode=mode, segment=segment).memory_bytes
    assert 1 <= most < 16 and most * needed <= MEMORY, "memory lasts"
    whole, part = (max(cohort_sizes(large, "auto", gpus=[gpus] * 40).values()) for gpus in (1.0, 0.25))
    assert whole // 4 == part > 1, "a quarter of a GPU has a quarter of the memory"
    assert split_evenly(9, 4) == [3, 3, 3] and split_evenly(3, 8) == [3]
