"""Sweep files: their meaning, and the messages for mistakes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddsweep.catalog import (
    BASELINES,
    DATASETS,
    DEFAULT_BASELINES,
    DatasetSpec,
    EvaluationSpec,
    Protocol,
    TrialSpec,
)
from ddsweep.errors import SettingError
from ddsweep.spec import (
    AshaSpec,
    EvaluateSpec,
    SweepSpec,
    check_strata,
    expand,
    load_sweep,
    resolved_yaml,
    settings_by_stratum,
)
from ddsweep.spec.values import MOST_TRIALS
from ddsweep.spec.yaml_text import parse_yaml, yaml_of

Load = Callable[..., SweepSpec]


def resolve(value: str | dict[str, Any]) -> DatasetSpec:
    """Stands for `ddsweep.data`: catalog names, and mappings that name no file."""
    if isinstance(value, dict):
        shape = (3, 32, 32)
        return DatasetSpec("inline", value["source"], shape, 10, fingerprint="00ff", path=value["path"])
    if value not in DATASETS:
        raise SettingError(f"dataset: unknown data set {value!r}")
    return DATASETS[value]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def run(text: str, overrides: Sequence[str] = (), header: str = "name: test\n") -> SweepSpec:
        path = tmp_path / "sweep.yaml"
        path.write_text(header + text)
        return load_sweep(path, overrides)

    return run


def trials_of(sweep: SweepSpec) -> tuple[TrialSpec, ...]:
    return expand(sweep, resolve).trials


def refusal(load: Load, text: str, overrides: Sequence[str] = (), **more: str) -> str:
    with pytest.raises(SettingError) as caught:
        trials_of(load(text, overrides, **more))
    message = str(caught.value)
    assert "pydantic" not in message and "validation error" not in message
    return message


BASE = "base: {dataset: digits}\n"


# ---------------------------------------------------------------------------------------- expansion


def test_no_grid_and_no_points_is_one_trial_per_seed(load: Load) -> None:
    assert trials_of(load(BASE)) == (TrialSpec(DATASETS["digits"]),)
    assert [trial.seed for trial in trials_of(load(BASE + "seeds: 3"))] == [0, 1, 2]
    assert [trial.seed for trial in trials_of(load(BASE + "seeds: [7, 5]"))] == [7, 5]


def test_points_are_crossed_with_the_grid_and_the_seeds(load: Load) -> None:
    sweep = load(
        BASE
        + "grid: {inner_epochs: [1, 2]}\npoints: [{init: fixed}, {init: random, inner_lr: 1e-3}]\nseeds: 2"
    )
    assert [(t.init, t.inner_lr, t.inner_epochs, t.seed) for t in trials_of(sweep)] == [
        (init, rate, epochs, seed)
        for init, rate in (("fixed", 0.02), ("random", 0.001))
        for epochs in (1, 2)
        for seed in (0, 1)
    ]


def test_a_point_overrides_the_grid_and_the_grid_the_base(load: Load) -> None:
    sweep = load(
        "base: {dataset: digits, outer_steps: 1, real_batch: 8}\n"
        "grid: {outer_steps: [2, 3]}\npoints: [{outer_steps: 4}, {init: fixed}]"
    )
    trials = trials_of(sweep)
    assert [(trial.outer_steps, trial.init) for trial in trials] == [
        (4, "random"),
        (2, "fixed"),
        (3, "fixed"),
    ]
    assert {trial.real_batch for trial in trials} == {8}


def test_seed_can_be_a_grid_axis(load: Load) -> None:
    assert [t.seed for t in trials_of(load(BASE + "grid: {seed: [4, 5]}"))] == [4, 5]
    assert "seeds: the seed is also given" in refusal(load, BASE + "grid: {seed: [4, 5]}\nseeds: 2")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", (1, 1)),
        ("images_per_class: 10, inner_steps: 5", (10, 5)),
        ("images_per_class: 10, images_per_class_per_step: 5", (10, 2)),
        ("inner_steps: 10, images_per_class_per_step: 5", (50, 10)),
        # One size alone: the others are 1.
        ("images_per_class: 10", (10, 1)),
        ("inner_steps: 10", (10, 10)),
        ("images_per_class_per_step: 10", (10, 1)),
    ],
)
def test_one_size_or_two_make_the_others(load: Load, given: str, expected: tuple[int, int]) -> None:
    (trial,) = trials_of(load(f"base: {{dataset: digits, {given}}}"))
    assert (trial.images_per_class, trial.inner_steps) == expected


def test_a_size_that_is_left_out_is_1_and_plan_says_so(load: Load) -> None:
    text = (
        "base: {dataset: digits}\ngrid: {images_per_class: [1, 4]}\npoints: [{}, {inner_steps: 1, seed: 1}]"
    )
    plan = expand(load(text), resolve)
    assert [(t.images_per_class, t.inner_steps) for t in plan.trials] == [(1, 1), (4, 1)] * 2
    assert plan.assumed == ("inner_steps: 1, because only images_per_class of the three sizes is given",)
    assert not expand(load("base: {dataset: digits, images_per_class: 4, inner_steps: 2}"), resolve).assumed


def test_three_sizes_are_an_error_also_under_skip_invalid(load: Load) -> None:
    three = refusal(
        load,
        "skip_invalid: true\nbase: {dataset: digits, images_per_class: 10, inner_steps: 5}\n"
        "points: [{init: fixed}, {images_per_class_per_step: 2}]",
    )
    assert "images_per_class_per_step=2: all three sizes are given (images_per_class=10, " in three


def test_what_does_not_divide_is_named_or_dropped_and_counted(load: Load) -> None:
    text = "base: {dataset: digits}\ngrid: {images_per_class: [10, 12], inner_steps: [5, 4]}\nseeds: 2\n"
    message = refusal(load, text)
    assert "4 of 8 trials are impossible" in message
    assert "images_per_class=12 inner_steps=5: images_per_class: 12 does not divide" in message
    assert "skip_invalid: true" in message
    plan = expand(load(text + "skip_invalid: true"), resolve)
    assert [(trial.images_per_class, trial.inner_steps) for trial in plan.trials] == [(10, 5)] * 2 + [
        (12, 4)
    ] * 2
    assert [combination for combination, _ in plan.dropped] == [
        "images_per_class=10 inner_steps=4 seed=0",
        "images_per_class=10 inner_steps=4 seed=1",
        "images_per_class=12 inner_steps=5 seed=0",
        "images_per_class=12 inner_steps=5 seed=1",
    ]
    assert "does not divide" in plan.dropped[0][1]


def test_per_step_that_does_not_divide(load: Load) -> None:
    text = "base: {dataset: digits, images_per_class: 10, images_per_class_per_step: 3}"
    assert "base: images_per_class: 10 does not divide into images_per_class_per_step 3" in refusal(
        load, text
    )


def test_the_list_of_impossible_combinations_is_short(load: Load) -> None:
    axis = ", ".join(str(number) for number in range(2, 20))
    message = refusal(load, BASE + f"grid: {{images_per_class: [1], inner_steps: [{axis}]}}")
    assert "18 of 18" in message and "and 13 more" in message and "skip_invalid" not in message


def test_all_dropped_is_an_error(load: Load) -> None:
    text = "base: {dataset: digits, network: lenet}\nskip_invalid: true"
    message = refusal(load, text)
    assert "1 of 1 trial is impossible" in message and "28 or 32" in message


def test_duplicates_name_both_combinations(load: Load) -> None:
    message = refusal(load, BASE + "grid: {init: [fixed, random], models_per_step: [2, 4]}")
    assert "`init=fixed models_per_step=2` and `init=fixed models_per_step=4` are the same trial" in message
    assert "models_per_step 1" in message
    assert "are the same trial" in refusal(load, BASE + "grid: {network: [convnet, 'convnet(depth=2)']}")
    inline = "grid: {dataset: [{source: folder, path: a}, {source: folder, path: b}]}"
    assert "`dataset=folder:a` and `dataset=folder:b` are the same trial" in refusal(load, inline)


def test_colliding_ids_are_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrialSpec, "trial_id", property(lambda self: "0123456789"))
    message = refusal(load, BASE + "seeds: 2")
    assert "`base seed=0` and `base seed=1` are different trials with one id, 0123456789" in message


def test_each_data_set_is_resolved_once(load: Load) -> None:
    asked: list[Any] = []

    def counting(value: str | dict[str, Any]) -> DatasetSpec:
        asked.append(value)
        return resolve(value)

    sweep = load(
        "grid: {dataset: [mnist, digits, {source: folder, path: a}], inner_epochs: [1, 2]}\nseeds: 2"
    )
    assert len(expand(sweep, counting).trials) == 12
    assert asked == ["mnist", "digits", {"source": "folder", "path": "a"}]


def test_an_unknown_data_set_is_an_error_also_under_skip_invalid(load: Load) -> None:
    text = "grid: {dataset: [digits, digit]}\nskip_invalid: true"
    assert "unknown data set 'digit'" in refusal(load, text)


def test_expansion_is_deterministic_and_resources_change_no_id(load: Load) -> None:
    text = BASE + "grid: {init: [fixed, random]}\nseeds: 2\n"
    plain, moved = load(text), load(text + "resources: {cpus: 2, device: cpu}\nevaluate: {networks: 3}")
    assert expand(plain, resolve) == expand(plain, resolve) == expand(moved, resolve)


def test_too_many_trials(load: Load) -> None:
    text = BASE + f"grid: {{outer_steps: [1, 2, 3]}}\nseeds: {MOST_TRIALS // 2}"
    assert "150000 trials are more than 100000; split it up" in refusal(load, text)
    search = "search: {samples: 1e6, space: {outer_lr: {uniform: [0.1, 1]}}}"
    assert "1000000 trials are more than 100000" in refusal(load, BASE + search)


# ------------------------------------------------------------------------------------ random search

SEARCH = """\
search:
  samples: {samples}
  seed: {seed}
  space:
    outer_lr: {{log_uniform: [1e-3, 0.1]}}
    inner_lr: {{uniform: [0.01, 0.1]}}
    outer_steps: {{integer: [100, 400]}}
    init: {{choice: [fixed, random]}}
"""

GOLDEN_SAMPLES = [
    (0.00249, 0.04807, 288, "fixed"),
    (0.04416, 0.08889, 270, "random"),
    (0.006628, 0.02465, 252, "fixed"),
    (0.001654, 0.01223, 108, "fixed"),
]


def sampled(sweep: SweepSpec) -> list[tuple[Any, ...]]:
    return [(t.outer_lr, t.inner_lr, t.outer_steps, t.init) for t in trials_of(sweep)]


def test_samples_are_the_same_on_every_machine(load: Load) -> None:
    """Golden: a change here would change the trials of everybody's searches."""
    assert sampled(load(BASE + SEARCH.format(samples=4, seed=0))) == GOLDEN_SAMPLES


def test_more_samples_keep_the_first_ones(load: Load) -> None:
    five, twenty, other = (
        sampled(load(BASE + SEARCH.format(samples=samples, seed=seed)))
        for samples, seed in ((5, 0), (20, 0), (20, 1))
    )
    assert twenty[:5] == five
    assert not set(twenty) & set(other)


def test_a_further_setting_leaves_the_values_of_the_others(load: Load) -> None:
    text = BASE + SEARCH.format(samples=8, seed=0)
    before = sampled(load(text))
    assert sampled(load(text + "    clip_norm: {choice: [null, 1]}\n")) == before


def test_samples_lie_in_their_space_and_fill_it(load: Load) -> None:
    values = sampled(load(BASE + SEARCH.format(samples=400, seed=3)))
    rates, inner, steps, inits = zip(*values, strict=True)
    assert 0.001 <= min(rates) < 0.0012 and 0.085 < max(rates) <= 0.1
    assert sum(rate < 0.01 for rate in rates) == pytest.approx(200, abs=40), "half of them in each decade"
    assert 0.01 <= min(inner) < 0.012 and 0.098 < max(inner) <= 0.1
    assert sum(inner) / 400 == pytest.approx(0.055, abs=0.004)
    assert all(isinstance(count, int) and 100 <= count <= 400 for count in steps)
    assert inits.count("fixed") == pytest.approx(200, abs=40)
    assert max(len(f"{rate:g}") for rate in rates) <= len("0.001234"), "short enough for a table"
    assert all(rate == float(f"{rate:.4g}") for rate in rates)
    assert all(rate == round(rate, 5) for rate in inner)


def test_the_ends_of_a_range_are_included_and_never_passed(load: Load) -> None:
    text = BASE + "search: {samples: 60, space: {outer_steps: {integer: [1, 3]}}}"
    plan = expand(load(text), resolve)
    assert sorted(trial.outer_steps for trial in plan.trials) == [1, 2, 3]
    narrow = "search: {samples: 200, space: {inner_lr: {%s: [0.123451, 0.123459]}}}"
    for kind in ("uniform", "log_uniform"):
        values = {trial.inner_lr for trial in trials_of(load(BASE + narrow % kind))}
        assert min(values) >= 0.123451 and max(values) <= 0.123459
        assert len(values) > 100


def test_samples_are_crossed_with_points_grid_and_seeds(load: Load) -> None:
    sweep = load(
        "base: {dataset: digits, outer_lr: 0.5}\npoints: [{init: fixed}, {init: random}]\n"
        "grid: {images_per_class: [1, 4], inner_steps: [1]}\nseeds: 2\n"
        "search: {samples: 3, space: {outer_lr: {log_uniform: [1e-3, 0.1]}}}"
    )
    trials = trials_of(sweep)
    rates = list(dict.fromkeys(trial.outer_lr for trial in trials))
    assert len(rates) == 3 and 0.5 not in rates, "a sample overrides the base"
    assert [(t.init, t.images_per_class, t.outer_lr, t.seed) for t in trials] == [
        (init, images, rate, seed)
        for init in ("fixed", "random")
        for images in (1, 4)
        for rate in rates
        for seed in (0, 1)
    ]


def test_samples_that_repeat_are_left_out_and_counted(load: Load) -> None:
    text = (
        BASE + "search: {samples: 9, space: {init: {choice: [fixed, random]}, models_per_step: "
        "{choice: [2, 4]}}}\ngrid: {inner_epochs: [1, 2]}"
    )
    plan = expand(load(text), resolve)
    assert len(plan.trials) == 6, "fixed is one trial whatever its models_per_step"
    assert len(plan.repeated) == 2 * 9 - 6
    assert "inner_epochs=1 init=fixed models_per_step=2" in plan.repeated
    # What a grid gives twice stays an error.
    assert "are the same trial" in refusal(load, text + "\npoints: [{real_batch: 8}, {real_batch: 8}]")


def test_impossible_samples_are_dropped_on_demand(load: Load) -> None:
    text = (
        "base: {dataset: digits, images_per_class: 6}\n"
        "search: {samples: 12, space: {inner_steps: {integer: [1, 4]}}}\n"
    )
    assert "inner_steps=4: images_per_class: 6 does not divide" in refusal(load, text)
    plan = expand(load(text + "skip_invalid: true"), resolve)
    assert {trial.inner_steps for trial in plan.trials} == {1, 2, 3}
    assert len(plan.trials) + len(plan.repeated) + len(plan.dropped) == 12


def test_the_search_can_give_the_data_set_and_the_seed(load: Load) -> None:
    text = "search: {samples: 20, space: {dataset: {choice: [digits, mnist]}, seed: {integer: [0, 1]}}}\n"
    trials = trials_of(load(text))
    assert {(t.dataset.name, t.seed) for t in trials} == {(n, s) for n in ("digits", "mnist") for s in (0, 1)}
    assert "seeds: the seed is also given" in refusal(load, text + "seeds: 2")


def test_overrides_of_the_search(load: Load) -> None:
    text = BASE + SEARCH.format(samples=4, seed=0)
    before = sampled(load(text))
    assert sampled(load(text, ["search.samples=2"])) == before[:2]
    assert sampled(load(text, ["search.seed=1"])) != before
    wider = load(text, ["search.space.outer_lr={log_uniform: [1e-5, 1e-4]}"])
    assert max(trial.outer_lr for trial in trials_of(wider)) <= 1e-4
    # A bare setting stands for every trial, and a list of values is an axis.
    assert {trial.outer_lr for trial in trials_of(load(text, ["outer_lr=0.5"]))} == {0.5}
    assert [t.outer_lr for t in trials_of(load(text, ["outer_lr=[0.5,0.6]"]))] == [0.5] * 4 + [0.6] * 4
    assert load(text, ["search=null"]).search is None
    assert sampled(load(text, ["search.kind=random"])) == before, "the default"
    one = BASE + "search: {samples: 4, space: {outer_lr: {uniform: [0.1, 0.2]}}}"
    assert load(one, ["outer_lr=0.5"]).search is None, "nothing is left to search"


# ---------------------------------------------------------------------------------------- scheduler


def test_rungs_are_powers_below_the_last_outer_step() -> None:
    def rungs(outer_steps: int, **settings: Any) -> tuple[int, ...]:
        return AshaSpec(**settings).rungs(TrialSpec(DATASETS["digits"], outer_steps=outer_steps))

    assert rungs(2000) == (100, 300, 900)
    assert rungs(900) == (100, 300), "whoever reaches the last step is done, not stopped"
    assert rungs(901) == (100, 300, 900)
    assert rungs(100) == rungs(50) == ()
    assert rungs(20, grace=5, reduction=2) == (5, 10)


def test_strata_are_what_makes_scores_incomparable() -> None:
    trials = [
        TrialSpec(DATASETS[name], init=init, images_per_class=images, outer_lr=rate)
        for name in ("digits", "usps")
        for init in ("fixed", "random")
        for images in (1, 10)
        for rate in (0.1, 0.2)
    ]
    assert len(set(map(AshaSpec().stratum, trials))) == 8
    assert len(set(map(AshaSpec(strata=("images_per_class",)).stratum, trials))) == 2
    assert len(set(map(AshaSpec(strata=()).stratum, trials))) == 1
    per_step = AshaSpec(strata=("images_per_class_per_step",))
    assert {per_step.stratum(trial) for trial in trials} == {(1,), (10,)}


def test_axes_of_the_grid_are_strata_unless_the_file_names_strata(load: Load) -> None:
    """What the grid compares must have data in the end: a scheduler thins out what else varies."""
    text = BASE + (
        "grid: {images_per_class: [1, 2], inner_steps: [1], inner_epochs: [1, 3], outer_lr: [0.1, 0.2]}\n"
        "search: {samples: 4, space: {inner_lr: {uniform: [0.1, 1]}}}\nseeds: 3\nscheduler: {grace: 20}"
    )
    sweep = load(text)
    scheduler = sweep.scheduler
    assert scheduler is not None
    assert scheduler.strata == (*AshaSpec().strata, "inner_steps", "inner_epochs", "outer_lr")
    strata = settings_by_stratum(scheduler, trials_of(sweep))
    assert [len(settings) for settings in strata] == [4] * 8
    assert all(set(settings.values()) == {3} for settings in strata), "seeds are no settings of their own"
    check_strata("test", scheduler, trials_of(sweep))
    named = load(text, ["scheduler.strata=[images_per_class]"]).scheduler
    assert named is not None and named.strata == ("images_per_class",)
    empty = load(text, ["scheduler.strata=[]"]).scheduler
    assert empty is not None and empty.strata == ()
    seeds = load(BASE + "grid: {seed: [0, 1]}\nscheduler: {grace: 20}").scheduler
    assert seeds == AshaSpec(grace=20), "seeds are compared by their mean"


@pytest.mark.parametrize("scheduler", ["{grace: 20}", "{grace: 20, strata: [inner_epochs, outer_lr]}"])
def test_strata_that_leave_one_setting_each_are_refused(load: Load, scheduler: str) -> None:
    text = BASE + "grid: {inner_epochs: [1, 3], outer_lr: [0.1, 0.2]}\nseeds: 2\nscheduler: " + scheduler
    sweep = load(text)
    with pytest.raises(SettingError, match="the 4 strata have one setting each") as caught:
        check_strata(sweep.name, sweep.scheduler, trials_of(sweep))
    assert "sweep test: scheduler.strata: " in str(caught.value)
    for way_out in ("`search` or `points`", "scheduler.strata=[images_per_class]", "scheduler=null"):
        assert way_out in str(caught.value)
    fewer = load(text, ["scheduler.strata=[inner_epochs]"])
    check_strata(fewer.name, fewer.scheduler, trials_of(fewer))
    none = load(text, ["scheduler=null"])
    check_strata(none.name, none.scheduler, trials_of(none))


def test_the_scheduler_changes_no_trial_and_can_be_put_over_a_file(load: Load) -> None:
    text = BASE + "seeds: 2\n"
    scheduled = load(text + "scheduler: {grace: 20}")
    assert trials_of(scheduled) == trials_of(load(text))
    assert scheduled.scheduler == AshaSpec(kind="asha", grace=20, reduction=3)
    assert load(text, ["scheduler.grace=20"]).scheduler == AshaSpec(grace=20)
    assert load(text + "scheduler: {grace: 20}", ["scheduler=null"]).scheduler is None
    assert load(text + "scheduler: {grace: 2e1, reduction: 4}").scheduler == AshaSpec(grace=20, reduction=4)


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("inner_lr: 1e-3", "inner_lr", 0.001),
        ("inner_lr: 1", "inner_lr", 1.0),
        ("inner_lr: '0.5'", "inner_lr", 0.5),
        ("clip_norm: 5", "clip_norm", 5.0),
        ("clip_norm: null", "clip_norm", None),
        ("outer_steps: 3.0", "outer_steps", 3),
        ("outer_steps: 1e3", "outer_steps", 1000),
    ],
)
def test_numbers_get_their_type(load: Load, text: str, name: str, value: Any) -> None:
    (trial,) = trials_of(load(f"base: {{dataset: digits, {text}}}"))
    assert getattr(trial, name) == value
    assert type(getattr(trial, name)) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("outer_steps: 3.5", "base.outer_steps: 3.5 is not a whole number"),
        ("outer_steps: true", "base.outer_steps: True is not a whole number"),
        ("outer_steps: many", "base.outer_steps: 'many' is not a whole number"),
        ("outer_steps: [1, 2]", "base.outer_steps: [1, 2] is not a whole number"),
        ("outer_steps: .inf", "base.outer_steps: inf is not a whole number"),
        ("outer_steps: null", "base.outer_steps: None is not a whole number"),
        ("outer_steps: -3", "base.outer_steps: -3 must be at least 1"),
        ("images_per_class: -10", "base.images_per_class: -10 must be at least 1"),
        ("images_per_class_per_step: 0", "base.images_per_class_per_step: 0 must be at least 1"),
        ("inner_steps: 0", "base.inner_steps: 0 must be at least 1"),
        ("real_batch: -1", "base.real_batch: -1 must be at least 1"),
        ("seed: -1", "base.seed: -1 must be at least 0"),
        ("inner_lr: fast", "base.inner_lr: 'fast' is not a number"),
        ("inner_lr: -1e-3", "base.inner_lr: -0.001 must be a positive number"),
        ("inner_lr: .nan", "base.inner_lr: nan must be a positive number"),
        ("validation_fraction: 2", "base.validation_fraction: 2.0 must lie between 0 and 1"),
        ("init: fixd", "base.init: 'fixd' is not one of fixed, random, pretrained (did you mean fixed?)"),
        ("init_law: 3", "base.init_law: 3 is not one of xavier"),
        ("network: resnet", "base.network: unknown network 'resnet'; known are lenet"),
        ("network: 'convnet(depth=-1)'", "base.network: 'convnet(depth=-1)': depth must be"),
        ("network: 7", "base.network: 7 is not text"),
        ("outer_step: 3", "base.outer_step: unknown key 'outer_step' (did you mean outer_steps?)"),
        ("1: 3", "base.1: unknown key 1"),
    ],
)
def test_bad_settings(load: Load, text: str, message: str) -> None:
    full = refusal(load, f"base: {{dataset: digits, {text}}}\nskip_invalid: true")
    assert f"sweep.yaml: {message}" in full


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "grid: {}", "grid: {} is not a mapping of settings to lists"),
        (BASE + "grid: {init: []}", "grid.init: is empty; a grid axis is a list of at least one value"),
        (BASE + "grid: {init: random}", "grid.init: 'random' is not a list"),
        (BASE + "grid: {init: [fixed, rand]}", "grid.init[1]: 'rand' is not one of fixed, random"),
        (BASE + "grid: {innit: [fixed]}", "grid.innit: unknown key 'innit' (did you mean init?)"),
        (BASE + "points: []", "points: [] is not a list of at least one"),
        (BASE + "points: [3]", "points[0]: 3 is not a mapping"),
        (BASE + "points: [{init: fixed}, {seed: x}]", "points[1].seed: 'x' is not a whole number"),
        (BASE + "seeds: 0", "seeds: 0: the number of seeds must lie"),
        (BASE + "seeds: -2", "seeds: -2: the number of seeds must lie"),
        (BASE + "seeds: []", "seeds: is empty"),
        (BASE + "seeds: [1, 1]", "seeds: [1, 1] gives a number twice"),
        (BASE + "seeds: [-1]", "seeds: -1 must be at least 0"),
        (BASE + "seeds: some", "seeds: 'some' is not a whole number"),
        ("base: 3", "base: 3 is not a mapping"),
        ("seeds: 2", "base.dataset: is required: digits, mnist"),
        ("points: [{dataset: digits}, {init: fixed}]", "base.dataset: is required (points[1] has none)"),
        ("base: {dataset: 3}", "base.dataset: 3 is neither a name nor a mapping"),
        (BASE + "skip_invalid: 1", "skip_invalid: 1 is not true or false"),
        (BASE + "evalute: {}", "evalute: unknown key 'evalute' (did you mean evaluate?)"),
        (BASE + "outer_steps: 3", "outer_steps: unknown key 'outer_steps' at the top level"),
        (
            BASE + "grid: {init: [fixed]}\nsearch: {samples: 1, space: {init: {choice: [random]}}}",
            "search.space.init: also given in grid; give it in one of the two",
        ),
        (
            BASE + "points: [{}, {init: fixed}]\nsearch: {samples: 1, space: {init: {choice: [random]}}}",
            "search.space.init: also given in points[1]; give it in one of the two",
        ),
        (
            BASE + "grid: {outer_steps: [50, 80]}\nscheduler: {grace: 80}",
            "scheduler.grace: 80 is not below the outer_steps of any trial (at most 80), so none could be ",
        ),
        (BASE + "3: 4", "3 is a key, but keys are words"),
        (
            BASE + "points: [{init: fixed}, {seeds: 2}]",
            "points[1].seeds: unknown key 'seeds' (did you mean seed?)",
        ),
        (
            BASE + "published: [{accuracy: 0.8, source: a}, {acuracy: 0.9, source: b}]",
            "published[1].acuracy: unknown key 'acuracy' (did you mean accuracy?); allowed are accuracy, ",
        ),
        (BASE + "grid:\n", "leave `grid` out for none"),
        (BASE + "grid: {inner_epochs: [1, -2]}", "grid.inner_epochs[1]: -2 must be at least 1"),
    ],
)
def test_bad_files(load: Load, text: str, message: str) -> None:
    assert message in refusal(load, text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{network: 8}", "network: unknown key 'network' (did you mean networks?)"),
        ("{networks: 0}", "networks: 0 must be at least 1"),
        ("{networks: 2.5}", "networks: 2.5 is not a whole number"),
        ("{shards: true}", "shards: True is not a whole number"),
        ("3", "3 is not a mapping"),
        ("{protocols: []}", "protocols: [] is empty; give at least one"),
        ("{protocols: lenet}", "protocols: 'lenet' is not a list; each entry is"),
        (
            "{protocols: [as_distiled]}",
            "protocols[0]: 'as_distiled' is not one of as_distilled, on_random (did you mean "
            "as_distilled?); or a mapping of changes such as {network: lenet}",
        ),
        ("{protocols: [on_random, on_random]}", "protocols[1]: 'on_random' is there twice"),
        (
            "{protocols: [{order: fixed}, {order: fixed}]}",
            "protocols[1]: 'order=fixed' is there twice; give each a name of its own",
        ),
        (
            "{protocols: [as_distilled, {netwrok: lenet}]}",
            "protocols[1].netwrok: unknown key 'netwrok' (did you mean network?); allowed are ",
        ),
        (
            "{protocols: [{network: convnet(depth=2,width=4)}]}",
            'needs quotes: {network: "convnet(depth=2,width=64)"}',
        ),
        ("{protocols: [{weight_decay: -1}]}", "[0].weight_decay: -1.0 must be a positive"),
        ("{protocols: [{inner_batch: 0}]}", "[0].inner_batch: 0 must be at least 1"),
        (
            "{protocols: [{inner_schedule: linear}]}",
            "[0].inner_schedule: 'linear' is not one of constant, step, cosine",
        ),
        (
            "{protocols: [{inner_augment: dsa+flip}]}",
            "[0].inner_augment: 'dsa' is not one of shift, rotate, scale, flip, cutout (several joined by",
        ),
        (
            "{protocols: [{inner_schedule: cosine, inner_decay_epochs: 3}]}",
            "protocols[0]: inner_decay_epochs: 3 is for inner_schedule: step",
        ),
        (
            "{protocols: [{inner_schedule: step, inner_decay_factor: 10}]}",
            "protocols[0]: inner_decay_factor: 10 must be at most 1",
        ),
        (
            "{protocols: [{inner_batch: 4, order: sampled, inner_lr: 1}]}",
            "protocols[0]: order: sampled: inner_batch draws minibatches from all images",
        ),
        ("{protocols: [{network: lnet}]}", "protocols[0].network: unknown network 'lnet'"),
        ("{protocols: [{init_law: xavir}]}", "protocols[0].init_law: 'xavir' is not one of xavier,"),
        ("{protocols: [{order: random}]}", "[0].order: 'random' is not one of fixed, shuff"),
        ("{protocols: [{inner_lr: -1}]}", "[0].inner_lr: -1.0 must be a positive number"),
        ("{protocols: [{inner_lr: null}]}", "[0].inner_lr: None is not a number"),
        ("{protocols: [{inner_epochs: 0}]}", "[0].inner_epochs: 0 must be at least 1"),
        ("{protocols: [{name: a}]}", "protocols[0]: changes nothing; give at least"),
        ("{protocols: [{name: 3, inner_lr: 1}]}", "protocols[0].name: 3 is not a"),
        (
            "{protocols: [{name: on_random, inner_lr: 1}]}",
            "protocols[0]: name: 'on_random' has a meaning of its own",
        ),
        ("{baselines: [kmean]}", "baselines: 'kmean' is not one of"),
        ("{baselines: 3}", "baselines: 3 is not a list of words"),
        ("{rates: [0.1, 0]}", "rates: [0.1, 0]: every number must be positive"),
        ("{rates: [.nan]}", "rates: [nan]: every number must be positive"),
        ("{rates: [1, 1.0]}", "rates: [1, 1.0] gives a number twice"),
        ("{rates: []}", "rates: [] is empty; give at least one"),
        ("{rates: 0.1}", "rates: 0.1 is not a list of numbers"),
        ("{epochs: [1.5]}", "epochs: 1.5 is not a whole number"),
        ("{epochs: []}", "epochs: [] is empty; give at least one"),
        ("{candidates: 0}", "candidates: 0 must be at least 1"),
        ("{neighbours: 0}", "neighbours: 0 must be at least 1"),
        ("{neighbour_norm: 0.5}", "neighbour_norm: 0.5 must be at least 1"),
        ("{neighbour_norm: .nan}", "neighbour_norm: nan must be at least 1"),
        ("{neighbour_norm: far}", "neighbour_norm: 'far' is not a number"),
        ("{inner_steps_beyond: [0]}", "inner_steps_beyond: 0 must be at least 1"),
    ],
)
def test_bad_evaluate(load: Load, given: str, message: str) -> None:
    said = refusal(load, f"{BASE}evaluate: {given}")
    assert "evaluate" in said and message in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{device: gpu}", "device: 'gpu' is not one of auto, cpu, cuda"),
        ("{gpus: -1}", "gpus: -1 must be at least 0"),
        ("{gpus: 1.5}", "gpus: 1.5 must be a fraction"),
        ("{cpu: 1}", "cpu: unknown key 'cpu' (did you mean cpus?)"),
        ("{cpus: {by: ipc, 1: 2}}", "cpus: by: 'ipc' is not a setting"),
        ("{cpus: {by: init}}", "gives no amount"),
        ("{cpus: {by: init, none: 2}}", "cpus: 'none' is not one of fixed"),
        ("{memory: lots}", "memory: 'lots' is not a number"),
        ("{memory: 0}", "memory: 0 is neither auto, a positive number of GB"),
        ("{segment: 0}", "segment: 0 must be at least 1"),
        ("{max_failures: -1}", "max_failures: -1 must be at least 0"),
        ("{dashboard: maybe}", "dashboard: 'maybe' is not true or false"),
    ],
)
def test_bad_resources(load: Load, given: str, message: str) -> None:
    said = refusal(load, f"{BASE}resources: {given}")
    assert "resources" in said and message in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{}", "{} is not a mapping of settings to distributions"),
        ("{outer_lrr: {uniform: [1, 2]}}", "outer_lrr: unknown key 'outer_lrr' (did you mean outer_lr?)"),
        ("{outer_lr: 0.1}", "outer_lr: 0.1 is not one distribution"),
        (
            "{outer_lr: [0.1, 0.2]}",
            "such as {log_uniform: [1e-3, 0.1]}; allowed are uniform, log_uniform, choice",
        ),
        ("{outer_lr: {uniform: [1, 2], choice: [1]}}", "is not one distribution with its values"),
        (
            "{outer_lr: {loguniform: [1, 2]}}",
            "outer_lr.loguniform: unknown distribution 'loguniform' (did you mean log_uniform?)",
        ),
        (
            "{outer_lr: {integer: [1, 2]}}",
            "outer_lr.integer: outer_lr is not a whole number; allowed are uniform, log_uniform, choice",
        ),
        (
            "{outer_steps: {uniform: [1, 2]}}",
            "outer_steps.uniform: outer_steps is a whole number; allowed are integer, choice",
        ),
        ("{init: {integer: [1, 2]}}", "init.integer: init is not a number; allowed are choice"),
        ("{outer_lr: {uniform: [0.2, 0.1]}}", "outer_lr.uniform: [0.2, 0.1]: low must be below high"),
        ("{outer_lr: {uniform: [0.1, 0.1]}}", "outer_lr.uniform: [0.1, 0.1]: low must be below high"),
        ("{outer_steps: {integer: [9, 3]}}", "outer_steps.integer: [9, 3]: low must be below high"),
        ("{outer_lr: {log_uniform: [0, 0.1]}}", "outer_lr.log_uniform[0]: 0.0 must be a positive number"),
        ("{trim: {log_uniform: [0, 0.5]}}", "trim.log_uniform[0]: 0 has no logarithm; give a number above 0"),
        ("{clip_norm: {log_uniform: [none, 1]}}", "clip_norm.log_uniform[0]: 'none' is not a number"),
        ("{outer_lr: {log_uniform: [1e-300, 1e300]}}", "too wide for numbers of 64 bits"),
        (
            "{outer_lr: {log_uniform: [-1e-3, 1]}}",
            "outer_lr.log_uniform[0]: -0.001 must be a positive number",
        ),
        ("{outer_lr: {uniform: [0.1]}}", "outer_lr.uniform: [0.1] is not a pair [low, high]"),
        ("{outer_lr: {uniform: [a, 1]}}", "outer_lr.uniform[0]: 'a' is not a number"),
        ("{clip_norm: {uniform: [null, 1]}}", "clip_norm.uniform[0]: None is not a number"),
        ("{outer_steps: {integer: [0, 3]}}", "outer_steps.integer[0]: 0 must be at least 1"),
        ("{init: {choice: []}}", "init.choice: is empty; a choice is a list of at least one value"),
        ("{init: {choice: fixed}}", "init.choice: 'fixed' is not a list"),
        ("{init: {choice: [fixed, rand]}}", "init.choice[1]: 'rand' is not one of fixed, random"),
        ("{init: {choice: [fixed, fixed]}}", "init.choice: ['fixed', 'fixed'] gives a value twice"),
    ],
)
def test_bad_spaces_of_a_search(load: Load, given: str, message: str) -> None:
    said = refusal(load, f"{BASE}search: {{samples: 2, space: {given}}}")
    assert "search.space" in said and message in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{space: {init: {choice: [fixed]}}}", "samples: is required"),
        ("{samples: 3}", "space: is required"),
        ("3", "3 is not a mapping"),
        ("{sample: 3}", "sample: unknown key 'sample' (did you mean samples?)"),
        ("{samples: 0, space: {init: {choice: [fixed]}}}", "samples: 0 must be at least 1"),
        (
            "{kind: bayes, samples: 3, space: {outer_lr: {uniform: [1, 2]}}}",
            "kind: 'bayes' is not one of random, tpe",
        ),
        (
            "{samples: 3, startup: 2, space: {outer_lr: {uniform: [1, 2]}}}",
            "startup: is of kind tpe; random search draws all samples",
        ),
        (
            "{kind: tpe, samples: 3, startup: 1, space: {outer_lr: {uniform: [1, 2]}}}",
            "startup: 1 must be at least 2",
        ),
        (
            "{kind: tpe, samples: 3, space: {init: {choice: [fixed, random]}}}",
            "init: tpe compares samples by val_score, and the scores of two values of this setting "
            "answer two questions; give it under grid or points",
        ),
        ("{kind: tpe, samples: 3, space: {seed: {integer: [0, 3]}}}", "give it as `seeds`"),
        ("{samples: 1, seed: -1, space: {init: {choice: [fixed]}}}", "seed: -1 must be at least 0"),
    ],
)
def test_bad_searches(load: Load, given: str, message: str) -> None:
    said = refusal(load, f"{BASE}search: {given}")
    assert "search" in said and message in said


def test_what_a_guided_search_asks_of_a_machine_does_not_vary_in_its_space(load: Load) -> None:
    text = BASE + "search: {kind: tpe, samples: 3, space: {inner_epochs: {integer: [1, 4]}}}\nresources: "
    with pytest.raises(SettingError, match=r"resources\.cpus: by inner_epochs: .*; give one number"):
        trials_of(load(text + "{cpus: {by: inner_epochs, 4: 2, default: 1}}"))
    assert trials_of(load(text + "{cpus: {by: init, fixed: 2, default: 1}}"))


@pytest.mark.parametrize(
    ("sizes", "space"),
    [
        ("{inner_steps: 2}", "{images_per_class_per_step: {integer: [1, 4]}}"),
        ("{images_per_class_per_step: 2}", "{inner_steps: {choice: [1, 2, 4]}}"),
        ("{}", "{inner_steps: {choice: [1, 4]}}"),
    ],
)
def test_a_guided_search_compares_sets_of_one_size(load: Load, sizes: str, space: str) -> None:
    text = f"base: {{dataset: digits, <<: {sizes}}}\nsearch: {{kind: tpe, samples: 3, space: {space}}}\n"
    with pytest.raises(SettingError, match=r"search\.space\.\w+: with it images_per_class varies"):
        trials_of(load(text))
    fixed = load(text.replace("{dataset: digits, <<: " + sizes, "{dataset: digits, images_per_class: 4"))
    if "inner_steps" in space:
        assert all(trial.images_per_class == 4 for trial in trials_of(fixed))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("asha", "'asha' is not a mapping of settings to values"),
        ("{kind: hyperband}", "kind: 'hyperband' is not one of asha"),
        ("{grace: 0}", "grace: 0 must be at least 1"),
        ("{reduction: 1}", "reduction: 1 must be at least 2"),
        ("{reduction: 2.5}", "reduction: 2.5 is not a whole number"),
        ("{grace_period: 3}", "grace_period: unknown key 'grace_period'; allowed are kind, grace, "),
        ("{strata: [ipc]}", "strata: 'ipc' is not one of dataset, network, "),
        ("{strata: [seed]}", "strata: 'seed' is not one of dataset, network, "),
    ],
)
def test_bad_schedulers(load: Load, given: str, message: str) -> None:
    said = refusal(load, f"{BASE}scheduler: {given}")
    assert "scheduler" in said and message in said


@pytest.mark.parametrize("name", ["'../x'", "Big", "''", "'a b'", "-x", "3", "null", "'a\n\n'", "x" * 101])
def test_bad_names(load: Load, name: str) -> None:
    assert "sweep.yaml: name: " in refusal(load, BASE, header=f"name: {name}\n")


def test_name_is_required(load: Load) -> None:
    assert "sweep.yaml: name: is required" in refusal(load, BASE, header="")


def test_all_that_is_wrong_is_said_at_once(load: Load) -> None:
    message = refusal(load, "base: {dataset: digits, init: x, outer_steps: y}\nseeds: z")
    assert "3 settings are wrong" in message
    assert all(key in message for key in ("base.init: ", "base.outer_steps: ", "seeds: "))


# -------------------------------------------------------------------------------------------- files


def test_missing_unreadable_and_empty_files(load: Load, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"nowhere\.yaml: no such sweep file"):
        load_sweep(tmp_path / "nowhere.yaml")
    with pytest.raises(SettingError, match="cannot be read"):
        load_sweep(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingError, match="not a text file"):
        load_sweep(tmp_path / "binary.yaml")
    assert "is empty; a sweep file is a mapping with the keys name, base" in refusal(load, "", header="")
    assert "holds [1]" in refusal(load, "[1]", header="")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: {dataset: digits\ngrid: }", "sweep.yaml: line 3"),
        ("base:\n\tdataset: digits", "sweep.yaml: line 3"),
        ("base: {seed: 1, seed: 2}", "sweep.yaml: line 2, column 17: the key 'seed' is given twice"),
        (BASE + "name: again", "sweep.yaml: line 3, column 1: the key 'name' is given twice"),
        ("base: !!python/object/apply:os.getcwd []", "sweep.yaml: line 2"),
        ("base: {dataset: \x00}", "not YAML"),
        # Numbers of YAML 1.1: 8, 8, text, -63, 90, 90.5, 16 h in seconds, and a date.
        ("base: {seed: 010}", "sweep.yaml: line 2, column 14: 010 starts with 0, as numbers to the base 8"),
        (
            "base: {seed: +0_10}",
            "0_10 starts with 0, as numbers to the base 8 do in YAML; write 10, or ",
        ),
        (
            "grid: {seed: [1, 08]}",
            "08 starts with 0, as numbers to the base 8 do in YAML; write 8, or ",
        ),
        ("base: {seed: -077}", "-077 starts with 0, as numbers to the base 8 do in YAML; write -77, or"),
        ("base: {outer_steps: 1:30}", "1:30 is a number to the base 60 in YAML; write one to the base 10"),
        ("base: {inner_lr: 1:30.5}", "1:30.5 is a number to the base 60 in YAML"),
        ("resources: {cpus: {by: images_per_class, 010: 1}}", "column 42: 010 starts with 0"),
        (
            "base: {dataset: 2026-01-02}",
            "2026-01-02 is a date in YAML; write '2026-01-02' in quotes for text",
        ),
        ("base: {dataset: 2026-02-31}", "2026-02-31 is a date in YAML"),
    ],
)
def test_what_is_not_yaml_is_named_by_line(load: Load, text: str, message: str) -> None:
    assert message in refusal(load, text)


def test_a_number_is_refused_as_text_if_it_starts_with_zero(load: Load) -> None:
    for text in ("'010'", "'0_10'", "0o10"):
        assert "is not a whole number" in refusal(load, f"base: {{dataset: digits, seed: {text}}}")


def test_texts_that_look_like_numbers_of_yaml_are_written_in_quotes() -> None:
    texts = ["010", "08", "1:30", "1:30.5", "2026-01-02", "2026-01-02 10:00:00", "1e-3", "no", "4", "a"]
    assert parse_yaml(yaml_of({"names": texts}), "here") == {"names": texts}
    plain = "{a: 0, b: 0.5, c: 1_000, d: 0x10, e: 04:00:00, f: 16:9:1a, g: 00.5}"
    assert list(parse_yaml(plain, "here").values()) == [0, 0.5, 1000, 16, "04:00:00", "16:9:1a", 0.5]


@pytest.mark.parametrize(
    "text",
    [
        BASE,
        "base: {dataset: {source: parquet, path: cifar10, train: [0, 1], test: [4]}, inner_lr: 1e-5}\n"
        "grid: {init: [fixed, random], network: ['convnet(depth=2,width=8,norm=none)']}\n"
        "points: [{}, {clip_norm: null}]\nseeds: 4\nskip_invalid: true\n"
        "evaluate: {baselines: none, protocols: [as_distilled], inner_steps_beyond: [5, 20]}\n"
        "resources: {gpus: {by: images_per_class, 1: 0.1, 10: 0.5}, threads: 2, total_gpus: 1}",
        BASE + "evaluate: {protocols: [as_distilled, {network: 'convnet(depth=2,width=4)', inner_lr: 1e-2},\n"
        "  {name: other, init_law: normal, init_param: 0.1}], rates: [1, 1e-2], epochs: [7], candidates: 3,\n"
        "  baselines: all, neighbours: 5, neighbour_norm: inf}",
        BASE
        + SEARCH.format(samples=3, seed=2)
        + "    dataset: {choice: [mnist, {source: folder, path: a}]}\n"
        "    clip_norm: {choice: [null, 1]}\ngrid: {inner_epochs: [1, 2]}\n"
        "scheduler: {grace: 10, reduction: 2, strata: [images_per_class]}",
    ],
)
def test_resolved_file_reads_back_equal(load: Load, tmp_path: Path, text: str) -> None:
    sweep = load(text)
    path = tmp_path / "resolved.yaml"
    path.write_text(resolved_yaml(sweep))
    assert load_sweep(path) == sweep
    assert resolved_yaml(load_sweep(path)) == path.read_text()
    keys = [line.split(":")[0] for line in path.read_text().splitlines() if line[0].isalpha()]
    assert keys == [key for key in SweepSpec.model_fields if key in keys]


# ---------------------------------------------------------------------------------------- overrides


def test_overrides(load: Load) -> None:
    text = (
        BASE
        + "grid: {outer_steps: [1, 2], init: [fixed, random]}\npoints: [{outer_steps: 7}, {real_batch: 9}]\n"
    )
    assert load(text, ["evaluate.networks=8"]).evaluate.networks == 8
    assert load(text, ["base.outer_steps=10"]).base["outer_steps"] == 10
    assert load(text, ["grid.seed=[0,1]"]).grid["seed"] == [0, 1]
    assert load(text, ["seeds=3"]).seeds == (0, 1, 2)
    assert load(text, ["resources.cpus={by: init, fixed: 1, random: 2}"]).resources.for_trial(
        TrialSpec(DATASETS["digits"])
    ) == (2, 0)
    assert load(text, ["inner_lr=1e-3", "inner_lr=1e-4"]).base["inner_lr"] == 1e-4


def test_a_bare_setting_stands_for_every_trial(load: Load) -> None:
    text = (
        BASE
        + "grid: {outer_steps: [1, 2], init: [fixed, random]}\npoints: [{inner_epochs: 2, outer_steps: 7}]\n"
    )
    trials = trials_of(load(text, ["outer_steps=10"]))
    assert [(t.outer_steps, t.init) for t in trials] == [(10, "fixed"), (10, "random")]
    assert [t.outer_steps for t in trials_of(load(text, ["outer_steps=[3, 4]", "init=fixed"]))] == [3, 4]
    # With the last axis gone there is no grid.
    assert load(BASE + "grid: {init: [fixed]}", ["init=random"]).grid == {}


@pytest.mark.parametrize("space", ["[outer_lr]", "outer_lr", "3"])
def test_a_space_that_is_none_is_told_also_under_an_override(load: Load, space: str) -> None:
    said = refusal(load, BASE + f"search: {{samples: 2, space: {space}}}", ["outer_lr=0.2"])
    assert "search.space" in said


def test_points_that_differ_in_the_overridden_setting_alone_are_one(load: Load) -> None:
    """As the values of an axis are."""
    points = BASE + "points: [{outer_lr: .1}, {outer_lr: .2}]"
    assert [trial.outer_lr for trial in trials_of(load(points, ["outer_lr=0.5"]))] == [0.5]
    several = BASE + "points: [{outer_lr: .1, init: fixed}, {outer_lr: .2, init: fixed}, {outer_lr: .3}]"
    found = trials_of(load(several, ["outer_lr=0.5"]))
    assert [(trial.outer_lr, trial.init) for trial in found] == [(0.5, "fixed"), (0.5, "random")]


def test_what_is_merged_into_a_mapping_may_be_overridden_and_merged_on(load: Load) -> None:
    text = "base: &b {dataset: digits, outer_lr: .1}\npoints: [&p {<<: *b, outer_lr: .2}, {<<: *p, seed: 1}]"
    assert [(t.outer_lr, t.seed) for t in trials_of(load(text))] == [(0.2, 0), (0.2, 1)]
    twice = "base: &b {dataset: digits}\npoints: [{<<: *b, seed: 1, seed: 2}]"
    assert "the key 'seed' is given twice" in refusal(load, twice)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "grid: {outer_decay_steps: [10, 20]}",
            "outer_decay_steps: 10, 20: it has no effect without outer_sc",
        ),
        ("grid: {rate_limit: [5, 50]}", "rate_limit: 5.0, 50.0: it has no effect without max_rollbacks"),
        ("points: [{outer_lr_labels: 1}, {outer_lr_labels: 2}]", "it has no effect without labels: soft"),
        (
            "grid: {init_law: [default], init_param: [0.5, 3]}",
            "it has no effect without another init_law than default",
        ),
        (
            "grid: {inner_lr_mode: [fixed], outer_lr_rates: [0.5, 3]}",
            "it has no effect without learned rates, which no trial has",
        ),
    ],
)
def test_trials_that_would_differ_in_nothing_but_chance_are_refused(load: Load, text: str, said: str) -> None:
    assert said in refusal(load, BASE + text)


def test_a_setting_that_some_trial_uses_may_vary(load: Load) -> None:
    text = "grid: {outer_schedule: [constant, step], outer_decay_steps: [10, 20]}"
    assert len(trials_of(load(BASE + text))) == 4
    assert len(trials_of(load("base: {dataset: digits, rate_limit: 7, outer_decay_steps: 9}"))) == 1


def test_an_override_leaves_what_shares_its_anchor_alone(load: Load) -> None:
    text = "base: &b {dataset: digits}\npoints: [*b, {init: fixed}]"
    sweep = load(text, ["base.outer_steps=5"])
    assert sweep.points[0] == {"dataset": "digits"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("outer_steps", "'outer_steps': not key=value"),
        ("=3", "not key=value"),
        ("evaluate.=3", "not key=value"),
        ("outer_step=3", "unknown key 'outer_step' (did you mean outer_steps?)"),
        ("evalute.networks=3", "unknown key 'evalute' (did you mean evaluate?)"),
        ("evaluate.netwroks=3", "evaluate.netwroks: unknown key 'netwroks' (did you mean networks?)"),
        ("outer_steps=ten", "base.outer_steps: 'ten' is not a whole number (from 'outer_steps=ten')"),
        ("grid.init=random", "grid.init: 'random' is not a list"),
        ("init=[fixed, x]", "grid.init[1]: 'x' is not one of fixed, random"),
        ("name.x=3", "'test' has no key 'x' to set"),
        ("grid.seed=[0", "override 'grid.seed=[0': line 1"),
        ("outer_steps=", "base.outer_steps: None is not a whole number (from 'outer_steps=')"),
        ("init=[]", "grid.init: is empty; a grid axis is a list of at least one value (from 'init=[]')"),
        ("search.samples=5", "search.space: is required"),
        ("outer_lr=1" + 400 * "0", "a whole number of 401 digits is too large"),
        ("outer_steps=0100", "override 'outer_steps=0100': line 1, column 1: 0100 starts with 0, as numbers"),
        ("evaluate.networks=1:30", "1:30 is a number to the base 60 in YAML"),
    ],
)
def test_bad_overrides(load: Load, override: str, message: str) -> None:
    assert message in refusal(load, BASE, [override])


# --------------------------------------------------------------------------- evaluate and resources


def test_evaluation_id_has_what_changes_rows() -> None:
    fixed = TrialSpec(DATASETS["digits"], init="fixed")
    fresh = TrialSpec(DATASETS["digits"])

    def identity(evaluate: EvaluateSpec, trial: TrialSpec) -> str:
        return evaluate.spec().evaluation_id(trial)

    plain = EvaluateSpec()
    assert len(identity(plain, fixed)) == 10
    assert identity(plain, fixed) == identity(EvaluateSpec(shards=8, gpus=0.1), fixed)
    backwards = EvaluateSpec(baselines=DEFAULT_BASELINES[::-1], protocols=("on_random", "as_distilled"))
    assert identity(plain, fixed) == identity(backwards, fixed)
    other = [
        EvaluateSpec(networks=8),
        EvaluateSpec(group_size=4),
        EvaluateSpec(baselines=("kmeans",)),
        EvaluateSpec(inner_steps_beyond=(10,)),
    ]
    assert len({identity(spec, fixed) for spec in [plain, *other]}) == 5
    # `on_random` means nothing for a trial with random networks.
    alone = EvaluateSpec(protocols=("as_distilled",))
    assert identity(alone, fixed) != identity(plain, fixed)
    assert identity(alone, fresh) == identity(plain, fresh)


EVALUATIONS = {
    "default": EvaluationSpec(),
    "own": EvaluationSpec(networks=40, protocols=("as_distilled",), baselines=()),
    "beyond": EvaluationSpec(networks=5, group_size=2, baselines=("knn_random",), inner_steps_beyond=(50, 2)),
}
JUDGED = {
    "random": TrialSpec(DATASETS["digits"]),
    "fixed": TrialSpec(DATASETS["digits"], init="fixed", seed=3),
    "lenet": TrialSpec(
        DATASETS["mnist"], network="lenet", images_per_class=10, inner_steps=10, inner_epochs=3
    ),
}


@pytest.mark.parametrize(
    ("trial", "evaluation", "identity"),
    [
        ("random", "default", "2fcda1a843"),
        ("random", "own", "c13deb2820"),
        ("random", "beyond", "ec4f95f797"),
        ("fixed", "default", "be75c31aa5"),
        ("fixed", "own", "80d3d91d91"),
        ("fixed", "beyond", "57f3ecf69a"),
        ("lenet", "default", "0952fdf0da"),
        ("lenet", "own", "eafa75c1c7"),
        ("lenet", "beyond", "1f6638637d"),
    ],
)
def test_golden_evaluation_ids(trial: str, evaluation: str, identity: str) -> None:
    """Another id means that everyone's results are evaluated again."""
    assert EVALUATIONS[evaluation].evaluation_id(JUDGED[trial]) == identity


def test_how_baselines_are_computed_is_part_of_the_id_where_it_matters() -> None:
    trial = TrialSpec(DATASETS["digits"])

    def identity(**settings: Any) -> str:
        return EvaluateSpec(**settings).spec().evaluation_id(trial)

    rates = {"rates": [0.1, 1], "baselines": ["kmeans"]}
    assert identity(**rates) == identity(rates=[1, 0.1], baselines=["kmeans"])
    assert identity(**rates) != identity(baselines=["kmeans"])
    assert identity(epochs=[1]) != identity()
    assert identity(neighbours=3) != identity() != identity(neighbour_norm=1)
    assert identity(candidates=5) == identity()
    assert identity(candidates=5, baselines="all") != identity(baselines="all") != identity()
    unused = {"rates": [3], "epochs": [3], "neighbours": 3, "neighbour_norm": "inf", "candidates": 3}
    assert identity(baselines="none", **unused) == identity(baselines="none")


def test_units_are_whole_groups() -> None:
    fresh, fixed = TrialSpec(DATASETS["digits"]), TrialSpec(DATASETS["digits"], init="fixed", seed=3)
    units = EvaluateSpec(networks=40).spec().units(fresh)
    assert [len(unit.indices) for unit in units] == [16, 16, 8]
    assert [index for unit in units for index in unit.indices] == list(range(40))
    known, *held_out = EvaluateSpec(networks=16).spec().units(fixed)
    assert (known.protocol, known.indices, known.size) == ("as_distilled", (3,), 1)
    assert [unit.protocol for unit in held_out] == ["on_random"]


def test_gpus_that_no_trial_asks_for_are_told(load: Load) -> None:
    def said(text: str, there: float = 2.0) -> str | None:
        sweep = load(BASE + text)
        return sweep.resources.idle_gpus(trials_of(sweep), there)

    idle = said("")
    assert (
        idle is not None
        and "2 GPUs here, and no trial asks for one" in idle
        and "resources.gpus=0.25" in idle
    )
    assert said("", 0) is said("resources: {gpus: 0.5}") is said("resources: {device: cpu}") is None
    assert said("resources: auto") is None
    by_size = "grid: {images_per_class: [1, 10]}\nresources: {gpus: {by: images_per_class, 1: 0, 10: 1}}"
    assert said(by_size) is None, "one of them asks"


def test_resources_by_setting(load: Load) -> None:
    text = (
        "grid: {dataset: [digits, mnist], images_per_class: [1, 10]}\nbase: {images_per_class_per_step: 1}\n"
        "resources:\n  gpus: {by: images_per_class, 1: 0.1, 10: 0.5}\n"
        "  cpus: {by: network, lenet: 3, default: 2}"
    )
    sweep = load(text)
    assert [sweep.resources.for_trial(t) for t in trials_of(sweep)] == [(2, 0.1), (2, 0.5)] * 2
    sweep = load(text, ["network=lenet", "dataset=mnist"])
    assert [sweep.resources.for_trial(t) for t in trials_of(sweep)] == [(3, 0.1), (3, 0.5)]
    assert "resources.gpus: no entry for images_per_class: 2" in refusal(load, text, ["images_per_class=2"])


def test_protocols_are_words_and_mappings(load: Load) -> None:
    text = BASE + "evaluate: {protocols: [on_random, {network: lenet}, {inner_lr: 1, weight_decay: 5e-4}]}"
    assert load(text).evaluate.spec().protocols == (
        "on_random",
        Protocol(network="lenet"),
        Protocol(inner_lr=1.0, weight_decay=5e-4),
    )
    asked = load(BASE, ["evaluate.protocols=[as_distilled, {order: sampled}]"]).evaluate.spec()
    assert asked.protocols == ("as_distilled", Protocol(order="sampled"))
    assert "(from 'evaluate.protocols=[{network: no}]')" in refusal(
        load, BASE, ["evaluate.protocols=[{network: no}]"]
    )


def test_a_protocol_that_is_impossible_is_refused_or_left_out(load: Load) -> None:
    text = (
        "base: {dataset: digits, images_per_class_per_step: 1}\ngrid: {images_per_class: [1, 2]}\n"
        "seeds: 2\nevaluate: {protocols: [as_distilled, {order: shuffled}, {inner_lr: 1}]}\n"
    )
    message = refusal(load, text)
    assert "sweep test: evaluate.protocols: order=shuffled is impossible for 2 of 4 trials:" in message
    assert "images_per_class=1 seed=0: order: shuffled needs inner_steps of at least 2" in message
    assert "set `skip_invalid: true` to leave it out for them" in message
    plan = expand(load(text + "skip_invalid: true"), resolve)
    assert len(plan.trials) == 4 and not plan.dropped
    assert [where for where, _ in plan.unjudged] == [
        "order=shuffled of images_per_class=1 seed=0",
        "order=shuffled of images_per_class=1 seed=1",
    ]


def test_a_protocol_that_is_possible_for_no_trial_is_refused(load: Load) -> None:
    text = BASE + "evaluate: {protocols: [{network: lenet}]}\nskip_invalid: true"
    message = refusal(load, text)
    assert "evaluate.protocols: network=lenet is impossible for 1 of 1 trial:" in message
    assert "base: network: lenet takes images of 28 or 32 pixels, not images of 1x8x8" in message
    assert "Change it" not in message


def test_more_neighbours_than_images_are_refused(load: Load) -> None:
    text = (
        "base: {dataset: digits, inner_steps: 1}\ngrid: {images_per_class: [2, 1]}\n"
        "evaluate: {neighbours: 11}"
    )
    assert (
        "evaluate.neighbours: 11 are more than the 10 images of images_per_class=1 (images_per_class x "
        "classes); give at most 10"
    ) in refusal(load, text)
    assert trials_of(load(text, ["evaluate.baselines=[kmeans]"]))
    assert trials_of(load(text, ["evaluate.neighbours=10"]))


def test_baselines_in_one_word(load: Load) -> None:
    assert load(BASE + "evaluate: {baselines: none}").evaluate.baselines == ()
    assert load(BASE + "evaluate: {baselines: []}").evaluate.baselines == ()
    assert load(BASE + "evaluate: {baselines: all}").evaluate.baselines == BASELINES
    assert load(BASE).evaluate.baselines == DEFAULT_BASELINES
    assert set(BASELINES) - set(DEFAULT_BASELINES) == {"optimized_random"}


# ------------------------------------------------------------------------------ how a set is learned


def test_every_setting_of_how_a_set_is_learned_can_be_given_in_a_file_and_taken_back(load: Load) -> None:
    text = (
        "base: {dataset: digits, inner_steps: 2, images_per_class: 4, inner_epochs: 3,\n"
        "  inner_optimizer: momentum, inner_momentum: 0.5, order: shuffled, window: 4,\n"
        "  labels: soft, inner_augment: shift+rotate, outer_augment: cutout,\n"
        "  clip_running: 2, trim: 0.25, ema: 0.99, keep: best, max_rollbacks: 3, rate_limit: 10,\n"
        "  image_init: kmeans}\n"
    )
    (trial,) = trials_of(load(text))
    assert (trial.window, trial.ema, trial.trim, trial.clip_running) == (4, 0.99, 0.25, 2.0)
    assert (trial.inner_augment, trial.order, trial.keep, trial.max_rollbacks) == (
        *("shift+rotate", "shuffled", "best", 3),
    )
    (plain,) = trials_of(load(text, ["window=none", "ema=none", "clip_running=none", "inner_augment=none"]))
    assert (plain.window, plain.ema, plain.clip_running, plain.inner_augment) == (None, None, None, "none")


def test_a_window_beyond_t_is_named_or_dropped_and_counted(load: Load) -> None:
    text = BASE + "grid: {inner_epochs: [2, 5], window: [none, 3]}"
    assert "window: 3 must lie between 1 and T = inner_steps x inner_epochs = 2" in refusal(load, text)
    found = expand(load(text + "\nskip_invalid: true"), resolve)
    assert [(trial.steps, trial.window) for trial in found.trials] == [(2, None), (5, None), (5, 3)]


def test_a_value_that_needs_another_setting_is_refused_only_without_it(load: Load) -> None:
    flipped = "base: {dataset: DATA, inner_augment: flip, outer_augment: flip}"
    (trial,) = trials_of(load(flipped.replace("DATA", "cifar10")))
    assert (trial.inner_augment, trial.outer_augment) == ("flip", "flip")
    assert "digits is not the same in a mirror" in refusal(load, flipped.replace("DATA", "digits"))
    assert "order: shuffled needs inner_steps of at least 2" in refusal(
        load, BASE + "grid: {order: [shuffled]}"
    )
    assert "trim: 0.5: a fixed trial has one network" in refusal(
        load, BASE + "points: [{init: fixed, trim: 0.5}]"
    )


def test_an_augmentation_of_square_images_is_refused_for_others() -> None:
    """Before anything is read: rotated, they would be slanted, and a cut-out has one side."""
    wide = replace(DATASETS["cifar10"], name="wide", shape=(3, 8, 12))
    own = "nets.py:Flat@a3e2a88d3c52"  # those that ship take square images alone
    for given in ("rotate", "shift+cutout", "dsa"):
        part = given.removeprefix("shift+")
        message = rf"'{re.escape(given)}': {part} takes square images, and those of wide are 8x12; allowed"
        for name in ("outer_augment", "inner_augment"):
            with pytest.raises(SettingError, match=f"^{name}: {message} are shift, scale, flip"):
                TrialSpec(wide, network=own, **{name: given})
        with pytest.raises(SettingError, match=f"^inner_augment: {message}"):
            Protocol(inner_augment=given).applied_to(TrialSpec(wide, network=own))
        TrialSpec(DATASETS["cifar10"], network=own, outer_augment=given)
    TrialSpec(wide, network=own, outer_augment="shift+scale+flip")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("window: 2.5", "2.5 is not a whole number"),
        ("window: 0", "0 must lie between 1 and T"),
        ("window: all", "'all' is not a whole number"),
        ("order: random", "'random' is not one of fixed, shuffled, sampled"),
        ("inner_augment: blur", "'blur' is not one of shift, rotate, scale, flip, cutout"),
        ("outer_augment: 3", "3 is not text"),
        ("inner_augment: shift+shift", "names a part twice"),
        ("ema: 1", "must be at least 0 and below 1"),
        ("max_rollbacks: -1", "must be at least 0"),
        ("trim: 1.5", "must be at least 0 and below 1"),
        ("keep: worst", "'worst' is not one of last, best"),
    ],
)
def test_a_value_that_no_trial_can_have_is_refused_where_it_stands(
    load: Load, given: str, message: str
) -> None:
    found = refusal(load, f"base: {{dataset: digits, {given}}}\nskip_invalid: true")
    assert f"base.{given.partition(':')[0]}" in found and message in found
