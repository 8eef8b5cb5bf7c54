"""Trials on trained networks: adaptation and attack, from the gradient to the rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from ddsweep.catalog import DATASETS, EvaluationSpec, PoolSpec, TrialSpec
from ddsweep.core import distill, tuning
from ddsweep.core.distill import initial_state, outer_step
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import normalise
from ddsweep.core.methods import bptt
from ddsweep.core.methods.bptt import rates as rates_of
from ddsweep.core.networks import Params, build_network
from ddsweep.core.outer import combined
from ddsweep.core.task import Task, network_seeds
from ddsweep.data.load import Splits
from ddsweep.distilled import DistilledSet, apply
from ddsweep.errors import UserError
from ddsweep.evaluation import evaluate_unit, finish
from ddsweep.evaluation.elsewhere import take_over
from ddsweep.pools import store
from ddsweep.pools.recipe import PoolRecipe
from ddsweep.pools.store import TrainedPool, open_pool
from ddsweep.results.artifacts import load_tensors
from ddsweep.results.elsewhere import other_sweeps
from ddsweep.results.layout import PoolDirectory, SweepDirectory
from ddsweep.results.parts import read_part
from ddsweep.results.schemas import EVALS
from ddsweep.trial import distil_trial, read_distilled, training_networks
from ddsweep.trial_plan import TrialSettings
from tests.pools.conftest import NAME, NETWORK
from tests.tables import read_table

CPU = torch.device("cpu")
ATTACK = {"objective": "attack", "attack_class": 3, "target_class": 5}


@pytest.fixture
def pool_spec(recipe: PoolRecipe) -> PoolSpec:
    return recipe.spec(NAME)


def spec_of(pool: PoolSpec, **settings: Any) -> TrialSpec:
    defaults = {
        **{"network": NETWORK, "init": "pretrained", "pool": pool, "images_per_class": 2},
        **{"inner_lr": 0.1, "outer_steps": 3, "models_per_step": 3, "real_batch": 64},
        **{"selection_networks": 4, "validate_every": 2},
    }
    return TrialSpec(DATASETS["digits"], **(defaults | settings))


# ---------------------------------------------------------------------------------------- gradients


def outer_loss(task: Task, networks: Sequence[Params], learned: dict[str, Tensor], step: int) -> Tensor:
    """The objective, written down again: networks one after another, by plain autograd, the labels of real
    images of the attacked class replaced by hand."""
    spec = task.spec
    real = bptt._real_batch(replace(task, real=replace(task.real, labels=TRUE)), step)
    pixels, given, labels = real.images, real.labels, real.labels.clone()
    if spec.objective == "attack":
        labels[given == spec.attack_class] = spec.target_class
    rates, total = F.softplus(learned["raw"]).expand(spec.steps), torch.zeros((), dtype=torch.float64)
    for start in networks:
        weights = {name: value.double().requires_grad_() for name, value in start.items()}
        for t in range(spec.steps):
            s = t % spec.inner_steps
            logits = functional_call(task.network, weights, (learned["images"][s],))
            loss = F.cross_entropy(logits, task.labels[s])
            gradient = torch.autograd.grad(loss, list(weights.values()))
            weights = {
                name: (w - rates[t] * g).detach().requires_grad_()
                for (name, w), g in zip(weights.items(), gradient, strict=True)
            }
        total += F.cross_entropy(functional_call(task.network, weights, (pixels,)), labels).detach()
    return total / len(networks)


TRUE = torch.empty(0)


@pytest.mark.parametrize(
    "settings",
    [
        {"inner_epochs": 3},
        {"inner_steps": 2, "inner_epochs": 2},
        {"init": "fixed", "seed": 4, "inner_steps": 2},
        {**ATTACK},
        {**ATTACK, "inner_steps": 2, "inner_epochs": 2},
        {**ATTACK, "init": "fixed", "seed": 1},
    ],
    ids=["adapt-1x3", "adapt-2x2", "adapt-known", "attack-1x1", "attack-2x2", "attack-known"],
)
@pytest.mark.parametrize("way", ["explicit", "vmap", "loop"])
def test_the_gradient_of_an_outer_step_is_that_of_the_objective(
    pools: Path,
    pool_spec: PoolSpec,
    splits: Splits,
    settings: dict[str, Any],
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = spec_of(pool_spec, dtype="float64", **settings)
    plan = ExecutionPlan(inner_batching=way, real_batching=way)
    directory = SweepDirectory(pools.parent / "sweep")
    task = Task.of(spec, plan, splits.train, training_networks(spec, directory))
    monkeypatch.setitem(globals(), "TRUE", splits.train_labels)
    seen: dict[str, Tensor] = {}

    def look(*given: Any) -> dict[str, Tensor]:
        found = combined(*given)
        seen.update(found)
        return found

    monkeypatch.setattr(distill, "combined", look)
    state = initial_state(task)
    _, report = outer_step(task, state)
    networks = open_pool(pool_spec, pools).networks("train", network_seeds(spec, 0))
    assert report.loss == pytest.approx(float(outer_loss(task, networks, state.learned, 0)), rel=1e-12)
    generator = torch.Generator().manual_seed(1)
    for name in ("images", "raw"):
        value = state.learned[name]
        for _ in range(3):
            along = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            ends = [
                float(outer_loss(task, networks, {**state.learned, name: value + sign * 1e-6 * along}, 0))
                for sign in (1, -1)
            ]
            measured = (ends[0] - ends[1]) / 2e-6
            assert float((seen[name] * along).sum()) == pytest.approx(measured, rel=1e-4, abs=1e-8), name


# --------------------------------------------------------------------------- which networks, and when


def test_distillation_and_selection_see_training_networks_only(
    pools: Path, pool_spec: PoolSpec, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []
    read = TrainedPool.networks

    def note(self: TrainedPool, role: str, indices: Sequence[int]) -> list[Params]:
        asked.append((role, tuple(indices)))
        return read(self, role, indices)

    monkeypatch.setattr(TrainedPool, "networks", note)
    directory = sweep_beside(pools, tmp_path)
    assert distil_trial(spec_of(pool_spec), splits, directory, TrialSettings())
    assert {role for role, _ in asked} == {"train"}
    draws = [indices for _, indices in asked if len(indices) == 3]
    assert len(draws) == 3 and len(set(draws)) == 3, "others at every outer step"
    assert all(len(set(draw)) == 3 for draw in draws), "without replacement"
    assert (0, 1, 2, 3) in [indices for _, indices in asked], "selection: the first ones"


def sweep_beside(pools: Path, tmp_path: Path) -> SweepDirectory:
    """A new results folder that shares ``pools``."""
    results = tmp_path / "results"
    results.mkdir(parents=True)
    (results / "pools").symlink_to(pools)
    directory = SweepDirectory(results / "sweep")
    directory.create()
    return directory


# ---------------------------------------------------------------------------------------------- rows


def evaluated(spec: TrialSpec, evaluation: EvaluationSpec, splits: Splits, directory: SweepDirectory) -> Any:
    assert distil_trial(spec, splits, directory, TrialSettings())
    for unit in evaluation.units(spec):
        evaluate_unit(spec, unit, evaluation, splits, directory, CPU)
    assert finish(spec, evaluation, directory, "a sweep")
    table = read_table(directory.parts("evals"), EVALS).to_pandas()
    row = read_part(directory.trials_part(spec.trial_id)).to_pylist()[0]
    return row, table


def answers(spec: TrialSpec, weights: Params, splits: Splits, distilled: DistilledSet | None) -> Tensor:
    """What a network says to the test images, after it was trained on ``distilled``."""
    module = build_network(spec.network_spec, spec.dataset.shape, spec.dataset.classes).to_empty(device="cpu")
    module.load_state_dict(weights)
    if distilled is not None:
        apply(distilled, module)
    images = normalise(splits.test_images, splits.mean, splits.std, torch.float32)
    with torch.no_grad():
        return torch.as_tensor(module(images).argmax(1))


def test_adaptation_is_judged_on_every_heldout_network_before_and_after(
    pools: Path, pool_spec: PoolSpec, splits: Splits, tmp_path: Path
) -> None:
    directory, spec = sweep_beside(pools, tmp_path), spec_of(pool_spec, inner_epochs=2)
    evaluation = EvaluationSpec(networks=5, group_size=2)
    row, table = evaluated(spec, evaluation, splits, directory)
    distilled = DistilledSet.load(directory.distilled(spec.trial_id))
    networks = open_pool(pool_spec, pools).networks("heldout", range(5))
    own = table[(table.source == "distilled") & (table.protocol == "as_distilled")]
    for step, made in ((0, None), (spec.steps, distilled)):
        found = own[own.inner_step == step].sort_values("model_seed")
        assert found.model_seed.tolist() == [0, 1, 2, 3, 4]
        assert set(found.pool) == {NAME} and found.init_law.isna().all()
        for accuracy, weights in zip(found.accuracy, networks, strict=True):
            right = answers(spec, weights, splits, made) == splits.test_labels
            assert accuracy == pytest.approx(float(right.double().mean()), abs=1 / 360 + 1e-9)
    assert row["test_accuracy_before_mean"] == pytest.approx(own[own.inner_step == 0].accuracy.mean())
    assert row["test_accuracy_before_std"] == pytest.approx(own[own.inner_step == 0].accuracy.std())
    assert (row["pool"], row["source_dataset"], row["pool_train"]) == (NAME, "digits", 10)
    assert row["pool_recipe"] == pool_spec.recipe and row["init_law"] is None
    assert row["test_attack_success_mean"] is None and own.attack_success.isna().all()
    baselines = table[table.source == "random_real"]
    assert set(baselines.pool) == {NAME} and set(baselines.model_seed) == {0, 1, 2, 3, 4}


def trained_anew(place: PoolDirectory, pool: PoolSpec, role: str, index: int) -> None:
    weights, _ = load_tensors(place.network(role, index))
    (row,) = read_part(place.part(role, index)).to_pylist()
    nudged = {name: value * (1 + 1e-7) for name, value in weights.items()}
    drop = ("pool", "role", "index", "recipe", "sha256")
    kept = {name: value for name, value in row.items() if name not in drop}
    store.save_network(place, pool, role, index, nudged, kept)
    store.write_index(place, pool)


def test_results_of_networks_and_of_others_of_their_names_do_not_mix(
    recipe: PoolRecipe, splits: Splits, pools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, and baselines that trials share, are paired by the numbers of networks."""
    monkeypatch.setattr(store, "_open", {})
    shutil.copytree(pools, tmp_path / "pools")
    evaluation = EvaluationSpec(networks=2, group_size=2, baselines=("random_real",), epochs=(1,))
    directory, beside = SweepDirectory(tmp_path / "sweep"), SweepDirectory(tmp_path / "beside")
    fewer, pool = replace(recipe.spec(NAME), heldout=2), recipe.spec(NAME)
    directory.create()
    directory.sweep_file.touch()
    evaluated(first := spec_of(fewer), evaluation, splits, directory)
    evaluated(spec_of(pool, seed=1), evaluation, splits, directory)

    place = PoolDirectory(directory.pools / NAME)
    trained_anew(place, pool, "heldout", 1)
    monkeypatch.setattr(store, "_open", {})
    said = rf"pool {NAME}: 1 network, heldout 1 first, is another one than in the results in {directory.root}"
    with pytest.raises(UserError, match=said):
        evaluated(spec_of(pool, seed=2), evaluation, splits, directory)
    assert len(list(directory.parts("evals").iterdir())) == 2

    beside.create()
    assert take_over(first, splits.fingerprint, beside, other_sweeps(beside)) is None, (
        "the first of all there"
    )
    evaluated(spec_of(pool, seed=3), evaluation, splits, beside)
    assert take_over(first, splits.fingerprint, beside, other_sweeps(beside)) is None
    shutil.rmtree(place.root)
    shutil.copytree(pools / NAME, place.root)
    monkeypatch.setattr(store, "_open", {})
    evaluated(spec_of(pool, seed=2), evaluation, splits, directory)
    fresh = SweepDirectory(tmp_path / "fresh")
    fresh.create()
    assert take_over(first, splits.fingerprint, fresh, other_sweeps(fresh)) is not None
    assert fresh.pool_networks.is_file(), "what came from elsewhere has networks too"
    directory.pool_networks.write_text("{")
    last = SweepDirectory(tmp_path / "last")
    last.create()
    assert take_over(first, splits.fingerprint, last, other_sweeps(last)) is None, "a neighbour stops nobody"
    with pytest.raises(UserError, match="remove it, and the networks are noted anew"):
        evaluated(spec_of(pool, seed=4), evaluation, splits, directory)


def test_a_trial_does_not_go_on_with_networks_that_were_trained_anew(
    recipe: PoolRecipe, splits: Splits, pools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine they have other last digits, and the same names."""
    monkeypatch.setattr(store, "_open", {})
    shutil.copytree(pools, tmp_path / "pools")
    directory = SweepDirectory(tmp_path / "sweep")
    directory.create()
    spec, settings = spec_of(recipe.spec(NAME), outer_steps=6), TrialSettings(checkpoint_every=2)
    stops = iter([False, False, True])
    assert not distil_trial(spec, splits, directory, settings, should_stop=lambda: next(stops))
    before = open_pool(recipe.spec(NAME), directory.pools).learned_from

    place = PoolDirectory(directory.pools / NAME)
    trained_anew(place, recipe.spec(NAME), "train", 3)
    monkeypatch.setattr(store, "_open", {})
    with pytest.raises(UserError, match=f"the networks of pool {NAME} were trained anew since then"):
        distil_trial(spec, splits, directory, settings)

    shutil.rmtree(place.root)
    shutil.copytree(pools / NAME, place.root)
    monkeypatch.setattr(store, "_open", {})
    assert distil_trial(spec, splits, directory, settings)
    assert read_distilled(spec, directory).provenance["pool_networks"] == before


def test_an_attack_is_judged_by_whom_it_fools(
    pools: Path, pool_spec: PoolSpec, splits: Splits, tmp_path: Path
) -> None:
    directory = sweep_beside(pools, tmp_path)
    spec = spec_of(pool_spec, **ATTACK, inner_lr=0.3, outer_steps=60, outer_lr=0.05)
    evaluation = EvaluationSpec(networks=4, group_size=2, baselines=("random_real",))
    row, table = evaluated(spec, evaluation, splits, directory)
    distilled = DistilledSet.load(directory.distilled(spec.trial_id))
    own = table[table.source == "distilled"]
    labels = splits.test_labels
    for step, made in ((0, None), (1, distilled)):
        found = own[own.inner_step == step].sort_values("model_seed").to_dict("records")
        for one, weights in zip(
            found, open_pool(pool_spec, pools).networks("heldout", range(4)), strict=True
        ):
            said = answers(spec, weights, splits, made)
            fooled = (said[labels == 3] == 5).double().mean()
            others = (said[labels != 3] == labels[labels != 3]).double().mean()
            assert one["attack_success"] == pytest.approx(float(fooled), abs=1 / 37 + 1e-9)
            assert one["accuracy_other"] == pytest.approx(float(others), abs=1 / 300)
            assert one["accuracy"] == pytest.approx(float((said == labels).double().mean()), abs=1 / 300)
    assert row["test_attack_success_before_mean"] < 0.2 < 0.5 < row["test_attack_success_mean"]
    after = own[own.inner_step == 1]
    assert row["test_attack_success_std"] == pytest.approx(after.attack_success.std())
    assert row["test_accuracy_other_mean"] == pytest.approx(after.accuracy_other.mean())
    history = read_part(directory.history_part(spec.trial_id)).to_pylist()
    assert row["val_score"] == history[-1]["val_score"] > 0.3, "the success on validation images"


def test_an_attack_may_start_from_real_images_of_their_true_classes(
    pools: Path, pool_spec: PoolSpec, splits: Splits
) -> None:
    spec = spec_of(pool_spec, **ATTACK, image_init="real")
    plain = spec_of(pool_spec, image_init="real")
    start = initial_state(Task.of(spec, ExecutionPlan(), splits.train)).images
    of_class = normalise(
        splits.train_images[splits.train_labels == 3], splits.mean, splits.std, torch.float32
    )
    assert all(any(torch.equal(image, real) for real in of_class) for image in start[0, 6:8])
    assert start.shape == initial_state(Task.of(plain, ExecutionPlan(), splits.train)).images.shape


def test_baselines_of_two_attacks_and_of_none_are_different_questions(
    pools: Path, pool_spec: PoolSpec, splits: Splits, tmp_path: Path
) -> None:
    """Nearest neighbours too: the labels of their images are those of the attack."""
    directory = sweep_beside(pools, tmp_path)
    evaluation = EvaluationSpec(networks=2, group_size=2, baselines=("knn_random", "random_real"))
    other = {**ATTACK, "target_class": 8}
    found = {}
    for name, settings in {"none": {}, "3 to 5": ATTACK, "3 to 8": other}.items():
        spec = spec_of(pool_spec, outer_steps=1, **settings)
        _, table = evaluated(spec, evaluation, splits, directory)
        own = table[table.trial_id == spec.trial_id]
        found[name] = own[own.source == "knn_random"].accuracy.tolist()
    assert len({tuple(accuracies) for accuracies in found.values()}) == 3
    assert max(found["3 to 5"] + found["3 to 8"]) < max(found["none"]), "threes are never right"
    assert len(list((directory.cache / "rates").glob("random_real-*.json"))) == 3


def test_rates_tried_in_blocks_score_as_rates_tried_at_once(
    pools: Path, pool_spec: PoolSpec, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(pool_spec, outer_steps=1, dtype="float64")
    evaluation = EvaluationSpec(networks=2, group_size=2, baselines=("random_real",))
    scores = []
    for size in (2**30, 1):
        monkeypatch.setattr(tuning, "AT_ONCE_BYTES", size)
        directory = sweep_beside(pools, tmp_path / str(size))
        evaluated(spec, evaluation, splits, directory)
        (file,) = (directory.cache / "rates").glob("*.json")
        scores.append(json.loads(file.read_text()))
    assert scores[0] == scores[1]


def test_a_set_for_trained_networks_says_where_they_are(
    pools: Path, pool_spec: PoolSpec, splits: Splits, tmp_path: Path
) -> None:
    directory, spec = sweep_beside(pools, tmp_path), spec_of(pool_spec, outer_steps=1)
    assert distil_trial(spec, splits, directory, TrialSettings())
    with pytest.raises(ValueError, match="trained networks, of pool tiny: load one of results/pools/tiny"):
        DistilledSet.load(directory.distilled(spec.trial_id)).network()


def test_a_known_trained_network_is_judged_alone_and_on_the_heldout_ones(
    pools: Path, pool_spec: PoolSpec, splits: Splits, tmp_path: Path
) -> None:
    directory = sweep_beside(pools, tmp_path)
    spec = spec_of(pool_spec, init="fixed", seed=7)
    evaluation = EvaluationSpec(networks=3, group_size=2, baselines=("random_real",))
    row, table = evaluated(spec, evaluation, splits, directory)
    own = table[(table.source == "distilled") & (table.inner_step == 0)]
    (weights,) = open_pool(pool_spec, pools).networks("train", [7])
    right = answers(spec, weights, splits, None) == splits.test_labels
    known = own[own.protocol == "as_distilled"]
    assert known.accuracy.tolist() == [pytest.approx(float(right.double().mean()), abs=1 / 360 + 1e-9)]
    assert (row["test_models"], row["test_accuracy_std"]) == (1, None)
    others = own[own.protocol == "on_random"].sort_values("model_seed")
    heldout = open_pool(pool_spec, pools).networks("heldout", range(3))
    for accuracy, one in zip(others.accuracy, heldout, strict=True):
        right = answers(spec, one, splits, None) == splits.test_labels
        assert accuracy == pytest.approx(float(right.double().mean()), abs=1 / 360 + 1e-9)


def test_the_rates_of_a_set_survive(pools: Path, pool_spec: PoolSpec, splits: Splits, tmp_path: Path) -> None:
    """The header of a distilled set names its pool, and its id is that of the trial."""
    directory, spec = sweep_beside(pools, tmp_path), spec_of(pool_spec, outer_steps=1)
    assert distil_trial(spec, splits, directory, TrialSettings())
    distilled = DistilledSet.load(directory.distilled(spec.trial_id))
    assert distilled.spec == spec and distilled.spec.pool == pool_spec
    assert distilled.rates.shape == rates_of({"raw": torch.zeros(1)}, spec).shape
