"""Sweeps over methods: which trials there are, and what comes out of one whose method learns no rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddsweep.baselines import epoch_grid
from ddsweep.catalog import BASELINE_RATES, DATASETS, METHODS, SETTINGS, EvaluationSpec, TrialSpec
from ddsweep.core.init import draw_network
from ddsweep.core.recipe import Recipe
from ddsweep.core.task import selection_seeds
from ddsweep.data.load import Splits
from ddsweep.distilled import DistilledSet, apply
from ddsweep.errors import SettingError
from ddsweep.evaluation import evaluate_unit, finish, missing_units
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.reader import load_results
from ddsweep.spec import Plan, expand, load_sweep
from ddsweep.trial import distil_trial, read_distilled
from ddsweep.trial_plan import TrialSettings

MATCHING = "distribution_matching"


def planned(tmp_path: Path, text: str) -> Plan:
    file = tmp_path / "sweep.yaml"
    file.write_text("name: s\nbase: {dataset: digits, network: convnet(width=4)}\n" + text)
    return expand(load_sweep(file), lambda name: DATASETS[name])


def test_an_axis_that_a_method_lacks_gives_it_no_further_trials(tmp_path: Path) -> None:
    text = (
        f"grid: {{method: [bptt, {MATCHING}], images_per_class: [1, 2], inner_lr: [0.02, 0.2]}}\nseeds: 2\n"
    )
    plan = planned(tmp_path, text)
    by_method = {name: [t for t in plan.trials if t.method == name] for name in ("bptt", MATCHING)}
    assert {name: len(trials) for name, trials in by_method.items()} == {"bptt": 8, MATCHING: 4}
    assert plan.repeated == plan.dropped == ()
    alone = planned(tmp_path, f"grid: {{method: [{MATCHING}], images_per_class: [1, 2]}}\nseeds: 2\n")
    assert {t.trial_id for t in alone.trials} == {t.trial_id for t in by_method[MATCHING]}


def test_what_a_method_lacks_stays_outside_its_ids() -> None:
    """Golden: a setting that moves to another method's group would change ids."""
    of_bptt = "inner_lr inner_lr_mode inner_augment window labels real_batch real_batch_mode outer_lr_rates"
    assert METHODS[MATCHING].lacks >= {*of_bptt.split(), "outer_lr_labels", "rate_limit"}
    assert METHODS["bptt"].lacks >= {"real_per_class"}
    assert METHODS["given"].lacks >= {*of_bptt.split(), "real_per_class"} - {"labels"}
    assert "labels" not in METHODS["given"].lacks | METHODS["bptt"].lacks
    shared = {name for name in SETTINGS if not any(name in method.lacks for method in METHODS.values())}
    assert shared >= {"method", "network", "images_per_class", "inner_optimizer", "outer_augment", "seed"}
    plain = TrialSpec(DATASETS["digits"], method=MATCHING)
    assert TrialSpec(DATASETS["digits"], method=MATCHING, window=1).trial_id == plain.trial_id
    assert TrialSpec(DATASETS["digits"], method=MATCHING, real_per_class=8).trial_id != plain.trial_id


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "grid: {real_per_class: [8]}",
            "real_per_class: bptt has no such setting (distribution_matching has)",
        ),
        (
            f"grid: {{method: [{MATCHING}], window: [2]}}",
            f"window: {MATCHING} has no such setting (bptt has)",
        ),
        (
            f"grid: {{method: [{MATCHING}], labels: [soft]}}",
            f"labels: {MATCHING} has no such setting (bptt and given have)",
        ),
        ("grid: {method: [bppt]}", "'bppt' is not one of bptt, distribution_matching"),
    ],
)
def test_a_setting_that_no_method_of_the_sweep_has(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingError) as caught:
        planned(tmp_path, text)
    assert said in str(caught.value)


@pytest.mark.parametrize("order", ["fixed", "shuffled"])
def test_a_set_without_rates_of_its_own_gets_them_as_a_baseline_does(
    order: str, splits: Splits, tmp_path: Path
) -> None:
    spec = TrialSpec(
        DATASETS["digits"],
        network="convnet(width=8)",
        method=MATCHING,
        selection_networks=2,
        image_init="real",
        images_per_class=2,
        inner_steps=2,
        inner_epochs=3,
        outer_steps=20,
        validate_every=10,
        models_per_step=2,
        real_per_class=32,
        keep="best",
        order=order,
    )
    directory, stopped = SweepDirectory(tmp_path / "results"), SweepDirectory(tmp_path / "stopped")
    for place in (directory, stopped):
        place.create()
    assert distil_trial(spec, splits, directory, TrialSettings())
    seen: list[int] = []
    assert not distil_trial(
        spec,
        splits,
        stopped,
        TrialSettings(log_every=1),
        should_stop=lambda: len(seen) == 7,
        on_progress=lambda progress: seen.append(progress.outer_step),
    )
    assert distil_trial(spec, splits, stopped, TrialSettings())
    distilled = read_distilled(spec, directory)
    assert distilled.sha256 == read_distilled(spec, stopped).sha256, "goes on bit for bit"

    assert distilled.images.shape == (2, 10, 1, 8, 8) and distilled.rates.shape == (6,)
    assert len(set(distilled.rates.tolist())) == 1
    own, tuned = distilled.recipe, distilled.tuned
    assert own.rate in BASELINE_RATES and own.epochs == 3
    assert float(distilled.rates[0]) == pytest.approx(own.rate)
    assert tuned is not None and tuned.rate in BASELINE_RATES
    assert tuned.epochs in epoch_grid(2, 3) and replace(tuned, rate=own.rate, epochs=3) == own

    def on_validation(recipe: Recipe) -> float:
        scores = []
        for seed in selection_seeds(spec):
            model = distilled.network()
            model.load_state_dict(draw_network(model, spec.init_law, spec.init_param, seed))
            model = apply(distilled, model, recipe=recipe)
            right = model(splits.validation.normalised(torch.float32)).argmax(1) == splits.validation.labels
            scores.append(float(right.double().mean()))
        return sum(scores) / len(scores)

    # Up to one answer of one network: float32, and another number of networks at once.
    close = 1 / 2 / len(splits.validation)
    best = on_validation(tuned)  # in shuffled order selection networks go ways of their own
    for rate, epochs in () if order != "fixed" else ((0.01, 3), (1.0, 3), (0.1, 1), (0.3, 20)):
        other = on_validation(replace(own, rate=rate, epochs=epochs))
        assert best >= other - close
        assert epochs != 3 or on_validation(own) >= other - close
    evaluation = EvaluationSpec(
        networks=4, group_size=2, baselines=("random_real",), rates=(0.3,), epochs=(1,)
    )
    for unit in missing_units(spec, evaluation, directory):
        evaluate_unit(spec, unit, evaluation, splits, directory, torch.device("cpu"))
    assert finish(spec, evaluation, directory, "s")
    results = load_results(directory.root)
    row = results.trials.iloc[0]
    assert row["method"] == MATCHING and row["real_per_class"] == 32 and row["inner_epochs"] == 3
    assert row[sorted(METHODS[MATCHING].lacks)].isna().all()
    assert results.history["inner_lr_mean"].isna().all()
    rows = results.evals[results.evals["source"] == "distilled"].set_index("model_seed")
    by_protocol = {name: found for name, found in rows.groupby("protocol")}
    assert set(by_protocol) == {"as_distilled", "as_distilled_tuned"}
    at_best = by_protocol["as_distilled_tuned"]
    assert set(at_best["inner_step"]) == {2 * tuned.epochs} and len(at_best) == 4
    assert set(at_best["inner_lr"]) == {tuned.rate} and set(at_best["inner_epochs"]) == {tuned.epochs}
    assert set(by_protocol["as_distilled"]["inner_lr"]) == {own.rate}
    after = by_protocol["as_distilled"].query("inner_step == 6")["accuracy"]
    assert row["test_accuracy_mean"] == pytest.approx(after.mean()) and after.mean() > 0.3

    # The file alone gives the same network to who applies it.
    loaded = DistilledSet.load(directory.distilled(spec.trial_id))
    for recipe, accuracy in ((loaded.recipe, after[1]), (loaded.tuned, at_best["accuracy"][1])):
        trained = apply(loaded, loaded.network(1), index=1, recipe=recipe)
        right = trained(loaded.normalise(splits.test_images)).argmax(1) == splits.test_labels
        assert float(right.double().mean()) == pytest.approx(accuracy, abs=1 / 360)
