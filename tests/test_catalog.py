"""Names, sizes and ids. The list of ids is golden: a change there orphans everyone's results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ddsweep.catalog import (
    DATASETS,
    EvaluationSpec,
    NetworkSpec,
    PoolSpec,
    Protocol,
    TrialSpec,
    measure_of,
    parse_dataset,
    parse_network,
    transformed,
)
from ddsweep.catalog.numbers import counted
from ddsweep.errors import SettingError

FOLDER = replace(
    DATASETS["cifar10-exact"], name="folder", source="folder", path="somewhere", fingerprint="0123abcd"
)

POOL = PoolSpec("here", "digits", (1, 8, 8), 10, "convnet", train=8, heldout=4, recipe="0123456789abcdef")

GOLDEN: list[tuple[str, str, dict[str, Any]]] = [
    ("58af475130", "digits", {}),
    ("15357bb8b3", "digits", {"seed": 1}),
    ("8e78766407", "digits", {"init": "fixed", "images_per_class": 10, "inner_steps": 10}),
    ("fb1101db74", "mnist", {"network": "lenet"}),
    (
        "690d228b10",
        "mnist",
        {"network": "lenet", "init": "fixed", "images_per_class": 1, "inner_epochs": 3, "inner_lr": 0.001},
    ),
    (
        "54aa89092d",
        "cifar10",
        {
            "network": "alexcifarnet",
            "images_per_class": 100,
            "inner_steps": 10,
            "inner_epochs": 3,
            "outer_schedule": "step",
        },
    ),
    (
        "7f6a624d90",
        "usps",
        {"network": "convnet(depth=3,width=64,norm=none)", "clip_norm": 5.0, "dtype": "float64"},
    ),
    ("ce9ba99e0e", "folder", {"images_per_class": 50, "inner_lr_mode": "shared", "on_nonfinite": "stop"}),
    ("2f3a72c5a3", "usps(size=28)", {"network": "lenet"}),
    ("b9977e72f9", "mnist(channels=3,size=32)", {"network": "lenet"}),
    ("98950cd39e", "folder(size=28)", {"network": "lenet"}),
]


@pytest.mark.parametrize(("trial_id", "dataset", "settings"), GOLDEN)
def test_golden_ids(trial_id: str, dataset: str, settings: dict[str, Any]) -> None:
    files = {"folder": FOLDER, "folder(size=28)": transformed(FOLDER, size=28)}
    data = files[dataset] if dataset in files else parse_dataset(dataset)
    assert TrialSpec(data, **settings).trial_id == trial_id


def test_id_has_the_content_of_the_files_in_it_and_not_their_place() -> None:
    trial = TrialSpec(FOLDER)
    moved = replace(FOLDER, path="elsewhere", name="another")
    assert TrialSpec(moved).trial_id == trial.trial_id
    assert TrialSpec(replace(FOLDER, fingerprint="4567cdef")).trial_id != trial.trial_id


def test_id_changes_with_the_seed_and_every_seed_is_another() -> None:
    ids = {TrialSpec(DATASETS["digits"], seed=seed).trial_id for seed in range(50)}
    assert len(ids) == 50


def test_a_setting_at_its_default_changes_no_id() -> None:
    plain = TrialSpec(DATASETS["digits"])
    assert TrialSpec(DATASETS["digits"], outer_steps=400, inner_lr=0.02, seed=0) == plain
    # The network in full and by its short name are one trial.
    full = "convnet(norm=instance, width=128, depth=2)"
    assert TrialSpec(DATASETS["digits"], network=full).trial_id == plain.trial_id


def test_fixed_has_one_network() -> None:
    assert TrialSpec(DATASETS["digits"], init="fixed", models_per_step=7).models_per_step == 1


def test_there_and_back() -> None:
    for dataset in (*DATASETS.values(), FOLDER):
        trial = TrialSpec(dataset, images_per_class=10, inner_steps=5, clip_norm=2.0, seed=3)
        assert TrialSpec.from_dict(trial.to_dict()) == trial
    with pytest.raises(SettingError, match=r"newer version.*bogus"):
        TrialSpec.from_dict({**trial.to_dict(), "bogus": 1})


@pytest.mark.parametrize(
    ("network", "shape", "count"),
    [
        ("lenet", (1, 28, 28), 61_706),
        ("lenet", (3, 32, 32), 62_006),
        ("alexcifarnet", (3, 32, 32), 1_756_426),
    ],
)
def test_parameter_counts(network: str, shape: tuple[int, int, int], count: int) -> None:
    assert measure_of(parse_network(network, shape), shape, 10).parameters == count


def test_forward_flops_of_lenet() -> None:
    assert measure_of(NetworkSpec("lenet"), (1, 28, 28), 10).flops == 833_040


def test_network_parsing() -> None:
    assert parse_network("convnet", (1, 8, 8)) == NetworkSpec("convnet", 2, 128, "instance")
    assert parse_network("convnet", (3, 32, 32)).depth == 3
    named = parse_network(" convnet( depth = 1, width=16,norm=none ) ", (1, 8, 8))
    assert str(named) == "convnet(depth=1,width=16,norm=none)"
    assert parse_network(str(named), (1, 8, 8)) == named
    assert str(parse_network("lenet", (1, 28, 28))) == "lenet"


@pytest.mark.parametrize(
    ("network", "shape", "message"),
    [
        ("lenet", (1, 8, 8), "lenet takes images of 28 or 32 pixels, not images of 1x8x8"),
        ("lenet", (1, 16, 16), "28 or 32"),
        ("alexcifarnet", (1, 28, 28), "alexcifarnet takes images of 32 pixels"),
        ("convnet", (3, 32, 28), "square"),
        ("convnet(depth=4)", (1, 8, 8), "too often"),
        ("convnet(depth=0)", (1, 8, 8), "depth must be a whole number"),
        ("convnet(norm=batch)", (1, 8, 8), "norm is one of none, instance"),
        ("convnet(breadth=3)", (1, 8, 8), "unknown parameter 'breadth'"),
        ("lenet(depth=3)", (1, 28, 28), "lenet takes no parameters"),
        ("resnet", (3, 32, 32), "unknown network 'resnet'; known are lenet"),
    ],
)
def test_refused_networks(network: str, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(SettingError, match=message.replace("(", r"\(")):
        parse_network(network, shape)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images_per_class": 10, "inner_steps": 3}, "does not divide"),
        ({"outer_steps": -1}, "outer_steps: -1 must be at least 1"),
        ({"init": "known"}, "init: 'known' is not one of fixed, random"),
        ({"inner_lr": 0.0}, "inner_lr: 0.0 must be a positive number"),
        ({"inner_lr": float("nan")}, "must be a positive number"),
        ({"validation_fraction": 1.0}, "between 0 and 1"),
        ({"clip_norm": 1.0, "clip_median": 2.0}, "exclude each other"),
        ({"window": 2}, "window: 2 must lie between 1 and T = inner_steps x inner_epochs = 1"),
        ({"window": 0, "inner_epochs": 3}, "window: 0 must lie between 1 and T = inner_steps x inner_epochs"),
        ({"order": "shuffled", "inner_epochs": 5}, "order: shuffled needs inner_steps of at least 2"),
        ({"order": "sampled", "images_per_class": 10}, "order: sampled needs inner_steps of at least 2"),
        ({"order": "random"}, "order: 'random' is not one of fixed, shuffled, sampled"),
        ({"inner_optimizer": "sgd"}, "inner_optimizer: 'sgd' is not one of gd, momentum, adam"),
        ({"inner_momentum": 1.0}, "inner_momentum: 1.0 must be at least 0 and below 1"),
        ({"labels": "smooth"}, "labels: 'smooth' is not one of hard, soft"),
        ({"trim": 0.3, "init": "fixed"}, "trim: 0.3: a fixed trial has one network"),
        ({"trim": 1.0}, "trim: 1.0 must be at least 0 and below 1"),
        ({"trim": -0.1}, "trim: -0.1 must be at least 0 and below 1"),
        ({"ema": 1.0}, "ema: 1.0 must be at least 0 and below 1"),
        ({"ema": float("nan")}, "ema: nan must be at least 0 and below 1"),
        ({"keep": "first"}, "keep: 'first' is not one of last, best"),
        ({"max_rollbacks": -1}, "max_rollbacks: -1 must be at least 0"),
        ({"rate_limit": 0.0}, "rate_limit: 0.0 must be a positive number"),
        ({"clip_running": -2.0}, "clip_running: -2.0 must be a positive number"),
        ({"inner_augment": "blur"}, "inner_augment: 'blur' is not one of shift, rotate, scale, flip, cutout"),
        ({"outer_augment": "shift+none"}, "outer_augment: 'none' is not one of .*several joined by"),
        ({"outer_augment": "dsa+shift"}, "outer_augment: 'dsa' is not one of .* dsa stands alone"),
        ({"outer_augment": ""}, "outer_augment: '' is not one of"),
        ({"inner_augment": "shift+rotate+shift"}, "inner_augment: 'shift.rotate.shift' names a part twice"),
        ({"inner_augment": "shift+flip"}, "inner_augment: 'shift.flip': digits is not the same in a mirror"),
        ({"image_scale": 0.0}, "image_scale: 0.0 must be a positive number"),
        ({"outer_lr_rates": -0.1}, "outer_lr_rates: -0.1 must be a positive number"),
        ({"image_init": "medoids"}, "image_init: 'medoids' is not one of noise, real, kmeans"),
    ],
)
def test_refused_trials(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        TrialSpec(DATASETS["digits"], **settings)


@pytest.mark.parametrize("name", ["inner_augment", "outer_augment"])
def test_digits_of_every_kind_are_never_flipped_and_objects_may_be(name: str) -> None:
    for dataset in ("digits", "mnist", "usps"):
        with pytest.raises(SettingError, match=f"{name}: 'flip': {dataset} is not the same in a mirror"):
            TrialSpec(DATASETS[dataset], **{name: "flip"})
    for dataset in ("fashion_mnist", "cifar10", "cifar10-exact"):
        assert getattr(TrialSpec(DATASETS[dataset], **{name: "flip+shift"}), name) == "flip+shift"
    assert TrialSpec(FOLDER, **{name: "flip"}).trial_id != TrialSpec(FOLDER).trial_id


@pytest.mark.parametrize(
    "settings",
    [
        {"inner_optimizer": "momentum"},
        {"inner_momentum": 0.5},
        {"order": "sampled", "inner_steps": 2, "images_per_class": 2},
        {"window": 1},
        {"labels": "soft"},
        {"inner_augment": "shift"},
        {"outer_augment": "shift"},
        {"clip_running": 2.0},
        {"trim": 0.25},
        {"ema": 0.0},
        {"keep": "best"},
        {"max_rollbacks": 1},
        {"rate_limit": 10.0},
        {"image_init": "kmeans"},
        {"image_centre": True},
        {"image_scale": 1.5},
        {"outer_lr_rates": 0.001},
        {"outer_lr_labels": 0.001},
        {"whitening": "zca"},
        {"outer_cutoff": 7.0},
        {"init": "pretrained", "pool": POOL},
        {"init": "fixed", "pool": POOL},
        {"objective": "attack", "attack_class": 0, "target_class": 1},
    ],
)
def test_every_new_setting_is_part_of_the_id_and_survives_the_way_there_and_back(
    settings: dict[str, Any],
) -> None:
    trial = TrialSpec(DATASETS["digits"], **settings)
    assert trial.trial_id != TrialSpec(DATASETS["digits"]).trial_id
    assert TrialSpec.from_dict(trial.to_dict()) == trial


# ------------------------------------------------------------------------------- pools and attacks


def pretrained(**settings: Any) -> TrialSpec:
    return TrialSpec(DATASETS["digits"], **{"init": "pretrained", "pool": POOL, **settings})


def test_the_recipe_and_the_number_of_training_networks_stand_for_a_pool_in_an_id() -> None:
    own = pretrained().trial_id
    for same in ({"name": "elsewhere"}, {"heldout": 200}):
        assert pretrained(pool=replace(POOL, **same)).trial_id == own
    for other in ({"recipe": "f" * 16}, {"train": 9}):
        assert pretrained(pool=replace(POOL, **other)).trial_id != own


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool": None}, "pool: init: pretrained needs one"),
        ({"init": "random"}, "pool: here: init: random draws fresh networks"),
        ({"models_per_step": 9}, "models_per_step: 9 are more than the 8 training networks of pool here"),
        ({"init": "fixed", "seed": 8}, "seed: 8: .* pool, and here has 0 to 7"),
        ({"network": "convnet(width=16)"}, "pool: here has convnet for 10 classes of 1x8x8 images; convnet"),
        ({"dataset": DATASETS["usps"]}, "convnet.* for the 10 classes of 1x16x16 images of usps has other"),
    ],
)
def test_a_pool_that_cannot_be_used_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        TrialSpec(**{"dataset": DATASETS["digits"], "init": "pretrained", "pool": POOL, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_law": "kaiming"}, "init_law: kaiming: the networks are those of pool here"),
        ({"init_param": 2.0}, "init_param: 2.0: the networks are those of pool here"),
        (
            {"whitening": "zca"},
            "whitening: zca: the networks of pool here were trained on images that are not",
        ),
        ({"split_seed": 1}, "split_seed: pool here was trained on digits without its validation images"),
        ({"validation_fraction": 0.2}, "validation_fraction and split_seed: pool here was trained on digits"),
        ({"pool": replace(POOL, heldout=0)}, "pool: here is one known network.* give init: fixed"),
    ],
)
def test_settings_that_do_not_go_with_a_pool_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        pretrained(**settings)


def test_a_pool_on_another_split_of_the_same_images_is_refused() -> None:
    """Its training images could be test images of the trial."""
    cifar = replace(POOL, source_dataset="cifar10", source_shape=(3, 32, 32), network="lenet")
    exact = replace(DATASETS["cifar10-exact"], fingerprint="0123abcd")
    with pytest.raises(
        SettingError, match="here was trained on cifar10, which splits the same images otherwise"
    ):
        TrialSpec(exact, network="lenet", init="pretrained", pool=cifar)
    assert TrialSpec(DATASETS["cifar10"], network="lenet", init="pretrained", pool=cifar).pool == cifar


def test_a_protocol_of_other_networks_leaves_the_pool() -> None:
    trial = pretrained()
    for changes in ({"network": "convnet(width=16)"}, {"init_law": "kaiming"}, {"init_law": "xavier"}):
        used = Protocol(**changes).applied_to(trial)
        assert (used.init, used.pool) == ("random", None)
    for changes in ({"inner_lr": 0.1}, {"inner_epochs": 5}, {"inner_optimizer": "adam"}):
        assert Protocol(**changes).applied_to(trial).pool == POOL


def test_lenets_are_exchanged_between_28_and_32_pixels() -> None:
    """Their weights have the same shapes: only the padding of the first layer differs."""
    pool = replace(POOL, source_shape=(3, 32, 32), network="lenet")
    rgb = replace(DATASETS["mnist"], name="rgb", shape=(3, 28, 28))
    assert TrialSpec(rgb, network="lenet", init="pretrained", pool=pool).pool == pool
    with pytest.raises(SettingError, match="has lenet for 10 classes of 3x32x32 images"):
        TrialSpec(DATASETS["mnist"], network="lenet", init="pretrained", pool=pool)


def test_weights_of_imagenet_suit_any_number_of_classes() -> None:
    imagenet = PoolSpec("imagenet", "imagenet", (3, 224, 224), 0, "alexnet", 1, 0, "imagenet")
    birds = replace(DATASETS["cifar10"], name="birds", shape=(3, 224, 224), classes=200)
    trial = TrialSpec(birds, network="alexnet", init="fixed", pool=imagenet)
    assert [unit.protocol for unit in EvaluationSpec().units(trial)] == ["as_distilled"]
    with pytest.raises(SettingError, match="seed: 1: "):
        TrialSpec(birds, network="alexnet", init="fixed", pool=imagenet, seed=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "attack", "target_class": 1}, "attack_class: objective: attack needs one; 0 to 9"),
        ({"objective": "attack", "attack_class": 1}, "target_class: objective: attack needs one; 0 to 9"),
        (
            {"objective": "attack", "attack_class": 10, "target_class": 1},
            "attack_class: 10 is not a class of digits",
        ),
        (
            {"objective": "attack", "attack_class": 0, "target_class": -1},
            "target_class: -1 is not a class of digits",
        ),
        (
            {"objective": "attack", "attack_class": 3, "target_class": 3},
            "target_class: 3 is attack_class too",
        ),
        ({"attack_class": 3}, "attack_class: 3 is for objective: attack, not classification"),
    ],
)
def test_an_attack_names_two_classes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        TrialSpec(DATASETS["digits"], **settings)


def test_one_is_singular() -> None:
    assert [counted(n, "trial") for n in (0, 1, 2, 1.0, 0.5)] == [
        *("0 trials", "1 trial", "2 trials", "1 trial", "0.5 trials"),
    ]
    assert [counted(n, "class", "classes") for n in (1, 1234567)] == ["1 class", "1234567 classes"]


def test_a_spec_that_0_1_0_has_stored_names_sources_of_today() -> None:
    spec = parse_dataset("usps(size=28)")
    stored = TrialSpec(spec, network="lenet").to_dict()
    stored["dataset"] |= {"source": "torchvision", "path": ""}
    again = TrialSpec.from_dict(stored)
    assert again.dataset == spec
    assert again.trial_id == TrialSpec(spec, network="lenet").trial_id
