"""Draws of the next step, made in threads: the same bits whatever becomes of the trial."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ddsweep  # noqa: F401  # before the first product: the math library is told to keep to one order
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.core import task as task_module
from ddsweep.core.ahead import Ahead
from ddsweep.core.distill import initial_state, outer_step
from ddsweep.core.execution import ExecutionPlan, choose_plan
from ddsweep.core.images import RealSet
from ddsweep.core.networks import build_network
from ddsweep.core.task import Task
from ddsweep.data.load import load_splits
from ddsweep.errors import DivergedError
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part
from ddsweep.trial import distil_together, read_distilled, running
from tests.core.conftest import assert_states_equal
from tests.test_cohorts import SETTINGS, SPECS, Cohort, TrialJob, spec_of

SMALL = {"network": "convnet(depth=1,width=4,norm=none)", "real_batch": 30, "images_per_class": 2}
CASES: dict[str, dict[str, Any]] = {
    "as before": {},
    "orthogonal, real images of each network": {
        **{"init_law": "orthogonal", "real_batch_mode": "per_network", "order": "sampled", "inner_steps": 2},
    },
    "a known network, augmented": {"init": "fixed", "models_per_step": 1, "outer_augment": "rotate+cutout"},
    "window, inner augmentations": {"inner_steps": 2, "window": 1, "inner_augment": "shift"},
    "distribution matching": {"method": "distribution_matching", "outer_augment": "dsa"},
}


def task_of(settings: dict[str, Any], ahead: bool, threads: int = 2) -> Task:
    spec = TrialSpec(DATASETS["digits"], **({"models_per_step": 3, "outer_steps": 5} | SMALL | settings))
    if spec.method != "bptt":
        spec = replace(spec, real_per_class=5)
    pixels = torch.randint(256, (100, 1, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    network = build_network(spec.network_spec, (1, 8, 8), 10)
    plan = replace(choose_plan(torch.device("cpu"), threads, network), ahead=ahead)
    return Task.of(spec, plan, RealSet(pixels, torch.arange(100) % 10, (0.5,), (0.25,)))


@pytest.fixture
def drawing_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The names of the threads that drew networks."""
    seen: set[str] = set()
    real = task_module.draw_networks

    def draw(*given: Any, **named: Any) -> Any:
        seen.add(threading.current_thread().name.split("_")[0])
        return real(*given, **named)

    monkeypatch.setattr(task_module, "draw_networks", draw)
    yield seen


@pytest.mark.parametrize("case", CASES)
def test_steps_with_draws_ahead_have_the_bits_of_steps_without(case: str, drawing_threads: set[str]) -> None:
    """In order, and then from an earlier step: as after a rollback or where memory ran out."""
    plain, ahead = (task_of(CASES[case], on) for on in (False, True))
    states = {}
    for task in (plain, ahead):
        state, found = initial_state(task), []
        for _ in range(4):
            state, _ = outer_step(task, state)
            found.append(state)
        for again in (found[1], found[1], found[3]):  # the last step has nothing after it
            found.append(outer_step(task, again)[0])
        states[task.plan.ahead] = found
    for with_, without in zip(states[True], states[False], strict=True):
        assert_states_equal(with_, without)
    assert ("draw" in drawing_threads) == (CASES[case].get("init") != "fixed")


def test_no_more_than_one_step_is_drawn_ahead_and_nothing_beyond_the_end() -> None:
    drawn: list[int] = []
    lock = threading.Lock()

    def draw(step: int) -> int:
        with lock:
            drawn.append(step)
        return 10 * step

    ahead = Ahead(torch.nn.Identity(), 1, 4)
    assert [ahead.drawn("it", step, draw) for step in (0, 1)] == [0, 10]
    assert ahead.drawn("it", 1, draw) == 10, "again: step 2 still waits"
    assert [ahead.drawn("it", step, draw) for step in (2, 3)] == [20, 30]
    assert sorted(drawn) == [0, 1, 1, 2, 3]
    assert [ahead.drawn("other", step, draw) for step in (3, 0)] == [30, 0]


def test_an_error_of_a_draw_comes_at_the_step_that_uses_it() -> None:
    class Gone(Exception):
        pass

    def pool(numbers: Any) -> Any:
        raise Gone(f"network {list(numbers)}")

    task = task_of({}, True)
    state, _ = outer_step(task, initial_state(task))
    broken = replace(task, pool=pool)
    state, _ = outer_step(broken, state)  # drawn before the pool was gone; it begins the draw that fails
    with pytest.raises(Gone, match=r"network \["):
        outer_step(broken, state)


# --------------------------------------------------------------------------------------- whole trials


@pytest.fixture
def ahead_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = running.first_plan

    def first_plan(*given: Any) -> ExecutionPlan:
        return replace(real(*given), ahead=True)

    monkeypatch.setattr(running, "first_plan", first_plan)


FAILING = [
    spec_of(31, max_rollbacks=2, rate_limit=0.104, outer_lr=0.01),
    spec_of(32, inner_lr=1e30, outer_steps=12),
    spec_of(33, max_rollbacks=3, rate_limit=0.13, ema=0.9),
]


def rows_of(spec: TrialSpec, directory: SweepDirectory) -> list[dict[str, Any]]:
    part = directory.history_part(spec.trial_id)
    found = read_part(part).to_pylist() if part.exists() else []
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def results(root: Path, turns: list[list[TrialSpec]], stop_after: int | None = None) -> dict[str, Any]:
    splits = load_splits(DATASETS["digits"], None, validation_fraction=0.1, split_seed=0)
    directory = SweepDirectory(root)
    jobs = [[TrialJob(spec, splits, directory, SETTINGS) for spec in turn] for turn in turns]
    if stop_after is not None:
        distil_together(Cohort([[job for turn in jobs for job in turn]], stop_after=stop_after))
    cohort = Cohort(jobs)
    distil_together(cohort)
    found: dict[str, Any] = {}
    for spec in (spec for turn in turns for spec in turn):
        outcome = cohort.outcomes[spec.trial_id]
        said = read_distilled(spec, directory).sha256 if outcome is True else str(outcome)
        found[spec.trial_id] = said, rows_of(spec, directory)
    return found


def test_a_cohort_with_draws_ahead_ends_with_the_same_bits(
    tmp_path: Path, request: pytest.FixtureRequest, drawing_threads: set[str]
) -> None:
    """With trials that go back, that diverge, that join late and that were stopped in between."""
    turns = [[SPECS[0], FAILING[0], FAILING[1]], [], [SPECS[2], FAILING[2]], [SPECS[3]]]
    expected = results(tmp_path / "plain", turns)
    assert drawing_threads == {"MainThread"}
    outcomes = [said for said, _ in expected.values()]
    assert sum(len(said) == 64 for said in outcomes) >= 3
    assert any("rate_limit" in said for said in outcomes), "it went back as often as it may"
    assert any("no network was finite" in said for said in outcomes)
    request.getfixturevalue("ahead_on_the_cpu")
    assert results(tmp_path / "ahead", turns) == expected
    assert "draw" in drawing_threads
    stopped = results(tmp_path / "stopped", turns, stop_after=5)
    assert {name: said for name, (said, _) in stopped.items()} == {
        name: said for name, (said, _) in expected.items()
    }


def test_it_is_for_a_gpu_and_for_networks_of_ddsweep() -> None:
    network = build_network(spec_of().network_spec, (1, 8, 8), 10)
    assert choose_plan(torch.device("cuda"), 1, network).ahead
    assert not choose_plan(torch.device("cpu"), 4, network).ahead
    assert not ExecutionPlan.from_dict({"device": "cuda"}).ahead, "a plan of before"


def test_one_that_diverges_drops_its_draws() -> None:
    task = task_of({"inner_lr": 1e30, "on_nonfinite": "stop"}, True)
    with pytest.raises(DivergedError, match="outer step 0"):
        outer_step(task, initial_state(task))
