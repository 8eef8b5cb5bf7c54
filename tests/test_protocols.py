"""Protocols: each row against a plain computation of one network, and that other rows stay."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

import ddsweep
from ddsweep.catalog import DATASETS, EvaluationSpec, Protocol, TrialSpec, augmentation_parts
from ddsweep.core.augment import draw_augmentation
from ddsweep.core.images import normalise
from ddsweep.core.init import draw_network
from ddsweep.core.networks import build_network
from ddsweep.core.task import known_seed
from ddsweep.data.load import Splits, load_splits
from ddsweep.distilled import DistilledSet
from ddsweep.errors import SettingError
from ddsweep.evaluation import evaluate_unit, finish, missing_units, trial_is_done
from ddsweep.evaluation.protocol_rows import changed
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part, write_part
from ddsweep.results.schemas import EVALS
from ddsweep.seeds import derive_seed
from ddsweep.trial import distil_trial
from ddsweep.trial_plan import TrialSettings
from tests.tables import read_table

SMALL, OTHER = "convnet(depth=1,width=4,norm=none)", "convnet(depth=2,width=3,norm=instance)"


def spec_of(**settings: Any) -> TrialSpec:
    defaults = {
        **{"network": SMALL, "images_per_class": 3, "inner_steps": 3, "inner_epochs": 2, "inner_lr": 0.3},
        **{"outer_steps": 2, "models_per_step": 2, "real_batch": 64, "selection_networks": 1},
    }
    return TrialSpec(dataset=DATASETS["digits"], dtype="float64", **(defaults | settings))


PLAIN = spec_of()
LEARNED = spec_of(labels="soft", order="shuffled", inner_optimizer="momentum", window=5)
KNOWN = spec_of(init="fixed", seed=3, order="sampled")
TRIALS = {"plain": PLAIN, "learned": LEARNED, "known": KNOWN}


@pytest.fixture(scope="module")
def splits() -> Splits:
    whole = load_splits(DATASETS["digits"], None, validation_fraction=0.1, split_seed=0)
    return replace(whole, test_images=whole.test_images[:60], test_labels=whole.test_labels[:60])


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> Path:
    """A folder with the trials, distilled and not evaluated. Not to be written to."""
    directory = SweepDirectory(tmp_path_factory.mktemp("distilled"))
    for spec in TRIALS.values():
        assert distil_trial(spec, splits, directory, TrialSettings())
        path = directory.distilled(spec.trial_id)
        found = DistilledSet.load(path)
        # After two outer steps rates are all alike; they should tell one step from the other.
        assert found.rates.unique().numel() > 1
    return directory.root


@pytest.fixture
def directory(distilled: Path, tmp_path: Path) -> SweepDirectory:
    for folder in ("artifacts", "history"):
        shutil.copytree(distilled / folder, tmp_path / "sweep" / folder)
    return SweepDirectory(tmp_path / "sweep")


def asked(*protocols: Protocol, **settings: Any) -> EvaluationSpec:
    defaults: dict[str, Any] = {"networks": 3, "group_size": 2, "baselines": ()}
    return EvaluationSpec(protocols=("as_distilled", *protocols), **(defaults | settings))


def judge(spec: TrialSpec, evaluation: EvaluationSpec, splits: Splits, directory: SweepDirectory) -> Any:
    """The ``evals`` rows of ``spec``."""
    for unit in evaluation.units(spec):
        evaluate_unit(spec, unit, evaluation, splits, directory, torch.device("cpu"))
    rows = read_table(directory.parts("evals"), EVALS).to_pandas()
    return rows[rows["trial_id"] == spec.trial_id].reset_index(drop=True)


# ------------------------------------------------------------------ against a plain computation


def batch_order(order: str, spec: TrialSpec, index: int, total: int) -> list[tuple[torch.Tensor, int]]:
    """For each step the images (of all S*n in a row) and the rate (of T), as docs/settings.md says."""
    s, e, n = spec.inner_steps, spec.inner_epochs, 10 * spec.images_per_class_per_step
    generator = torch.Generator().manual_seed(derive_seed("heldout_order", spec.trial_id, "heldout", index))
    steps: list[tuple[torch.Tensor, int]] = []
    if order == "sampled":
        keys = torch.rand(total, 10, spec.images_per_class, generator=generator)
    for epoch in range(-(-total // s)):
        rates = min(epoch, e - 1) * s
        batches = torch.randperm(s, generator=generator) if order == "shuffled" else torch.arange(s)
        for place, batch in enumerate(batches.tolist()):
            t = epoch * s + place
            if t == total:
                break
            if order == "sampled":
                # m = 1: the image of each class with the smallest key; image j of class c lies at j*10 + c.
                picks = keys[t].argmin(1) * n + torch.arange(10)
                steps.append((picks, rates + place))
            else:
                steps.append((torch.arange(n) + batch * n, rates + (batch if order == "shuffled" else place)))
    return steps


def by_hand(
    spec: TrialSpec, protocol: Protocol, index: int, splits: Splits, found: DistilledSet
) -> list[Any]:
    """(step, accuracy, loss) at the ends of all epochs, of network ``index``: plain torch, one at a time."""
    network = protocol.network or spec.network
    law, param = protocol.init_law or spec.init_law, protocol.init_param or spec.init_param
    used = replace(spec, network=network, init_law=law, init_param=param)
    same = (used.network, law, param) == (spec.network, spec.init_law, spec.init_param)
    known = spec.init == "fixed" and same
    seed = known_seed(spec) if known else derive_seed("heldout", used.network, law, param, index)
    model = build_network(used.network_spec, spec.dataset.shape, 10).to_empty(device="cpu").double()
    model.load_state_dict({k: v.double() for k, v in draw_network(model, law, param, seed).items()})
    x = normalise(splits.test_images, splits.mean, splits.std, torch.float64)
    images = found.images.double().flatten(0, 1)
    labels = found.labels.flatten(0, 1)
    labels = labels.double() if labels.is_floating_point() else labels
    kind = protocol.inner_optimizer or spec.inner_optimizer
    epochs = protocol.inner_epochs or spec.inner_epochs
    weights = list(model.parameters())
    slots = [[torch.zeros_like(w), torch.zeros_like(w)] for w in weights]
    out = []

    def look(step: int) -> None:
        with torch.no_grad():
            logits = model(x)
        right = (logits.argmax(1) == splits.test_labels).double().mean()
        out.append((step, float(right), float(F.cross_entropy(logits, splits.test_labels))))

    look(0)
    steps = batch_order(protocol.order or spec.order, spec, index, epochs * spec.inner_steps)
    for t, (picks, place) in enumerate(steps, 1):
        rate = float(found.rates[place]) if protocol.inner_lr is None else protocol.inner_lr
        gradients = torch.autograd.grad(F.cross_entropy(model(images[picks]), labels[picks]), weights)
        with torch.no_grad():
            for weight, (m, v), gradient in zip(weights, slots, gradients, strict=True):
                g = gradient + (protocol.weight_decay or 0.0) * weight
                if kind == "gd":
                    weight.sub_(rate * g)
                elif kind == "momentum":
                    m.mul_(0.9).add_(g)
                    weight.sub_(rate * m)
                else:
                    m.mul_(0.9).add_(0.1 * g)
                    v.mul_(0.999).add_(0.001 * g * g)
                    weight.sub_(rate * (m / (1 - 0.9**t)) / (v / (1 - 0.999**t) + 1e-16).sqrt())
        if t % spec.inner_steps == 0:
            look(t)
    return out


@pytest.mark.parametrize("trial", TRIALS)
@pytest.mark.parametrize(
    "changes",
    [
        {"network": OTHER},
        {"init_law": "kaiming", "init_param": 0.5},
        {"init_param": 2.0},
        {"order": "fixed"},
        {"order": "shuffled"},
        {"order": "sampled"},
        {"inner_optimizer": "gd"},
        {"inner_optimizer": "momentum"},
        {"inner_optimizer": "adam", "inner_lr": 0.01},
        {"inner_lr": 0.05},
        {"inner_epochs": 1},
        {"inner_epochs": 4},
        {"weight_decay": 0.2},
        {"weight_decay": 0.2, "inner_optimizer": "adam", "inner_lr": 0.01},
        {"order": "shuffled", "inner_epochs": 4, "inner_optimizer": "momentum", "network": OTHER},
    ],
    ids=lambda changes: Protocol(**changes).name,
)
def test_a_row_is_what_plain_torch_finds_for_one_network(
    trial: str, changes: dict[str, Any], splits: Splits, directory: SweepDirectory
) -> None:
    spec, protocol = TRIALS[trial], Protocol(**changes)
    rows = judge(spec, asked(protocol), splits, directory)
    rows = rows[rows["protocol"] == protocol.name]
    used = protocol.applied_to(spec)
    assert sorted(set(rows["model_seed"])) == ([3] if used.init == "fixed" else [0, 1, 2])
    assert set(rows["source"]) == {"distilled"}
    for column in ("network", "init_law", "order", "inner_optimizer", "inner_epochs"):
        assert set(rows[column]) == {getattr(used, column)}, column
    if protocol.weight_decay is None:
        assert rows["weight_decay"].isna().all()
    else:
        assert set(rows["weight_decay"]) == {protocol.weight_decay}
    if protocol.inner_lr is None:
        assert rows["inner_lr"].isna().all()
    else:
        assert set(rows["inner_lr"]) == {protocol.inner_lr}
    found = DistilledSet.load(directory.distilled(spec.trial_id))
    index = int(rows["model_seed"].max())
    mine = rows[rows["model_seed"] == index].sort_values("inner_step")
    expected = by_hand(spec, protocol, index, splits, found)
    assert mine["inner_step"].tolist() == [step for step, _, _ in expected]
    assert mine["accuracy"].tolist() == pytest.approx([accuracy for _, accuracy, _ in expected], abs=1e-12)
    assert mine["loss"].tolist() == pytest.approx([loss for _, _, loss in expected], rel=1e-6)


FIELD = {
    **{"inner_optimizer": "momentum", "inner_lr": 0.05, "weight_decay": 5e-4, "inner_epochs": 5},
    **{"inner_schedule": "step", "inner_decay_epochs": 3},
}


def a_torch_loop(
    spec: TrialSpec, protocol: Protocol, index: int, splits: Splits, found: DistilledSet
) -> tuple[int, float, float]:
    """(steps, accuracy, loss) of network ``index`` by a loop as any torch user writes it, in float64."""
    seed = derive_seed("heldout", spec.network, spec.init_law, spec.init_param, index)
    model = build_network(spec.network_spec, spec.dataset.shape, 10).to_empty(device="cpu").double()
    drawn = draw_network(model, spec.init_law, spec.init_param, seed)
    model.load_state_dict({k: v.double() for k, v in drawn.items()})
    images, labels = found.images.double().flatten(0, 1), found.labels.flatten(0, 1)
    labels = labels.double() if labels.is_floating_point() else labels
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3], 0.1)
    own = derive_seed("heldout_order", spec.trial_id, "heldout", index)
    batch = protocol.inner_batch or len(images)
    parts = augmentation_parts("inner_augment", protocol.inner_augment or "none", "digits")
    steps = 0
    for epoch in range(5):
        generator = torch.Generator().manual_seed(derive_seed("heldout_order", own, epoch))
        for picks in torch.randperm(len(images), generator=generator).split(batch):
            x = images[picks] if batch < len(images) else images
            y = labels[picks] if batch < len(images) else labels
            if parts:
                draws = derive_seed("heldout_augment", spec.trial_id, "heldout", index, steps)
                x = draw_augmentation(parts, len(x), 8, torch.Generator().manual_seed(draws))(x)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            steps += 1
        scheduler.step()
    with torch.no_grad():
        logits = model(normalise(splits.test_images, splits.mean, splits.std, torch.float64))
    right = (logits.argmax(1) == splits.test_labels).double().mean()
    return steps, float(right), float(F.cross_entropy(logits, splits.test_labels))


@pytest.mark.parametrize("trial", ["plain", "learned"])
@pytest.mark.parametrize(
    "more",
    [
        {"inner_batch": 8},
        {"inner_batch": 256},
        {"inner_batch": 8, "inner_augment": "dsa"},
        {"inner_batch": 30, "inner_augment": "shift+rotate+scale+cutout"},
    ],
    ids=lambda more: Protocol(**more).name,
)
def test_the_evaluation_of_the_field_is_what_a_torch_loop_finds(
    trial: str, more: dict[str, Any], splits: Splits, directory: SweepDirectory
) -> None:
    spec, protocol = TRIALS[trial], Protocol(name="field", **FIELD, **more)
    rows = judge(spec, asked(protocol), splits, directory)
    rows = rows[rows["protocol"] == "field"]
    found = DistilledSet.load(directory.distilled(spec.trial_id))
    for index in (0, 2):
        mine = rows[rows["model_seed"] == index].sort_values("inner_step")
        steps, accuracy, loss = a_torch_loop(spec, protocol, index, splits, found)
        assert mine["inner_step"].tolist() == [0, steps], "not tested after each of many epochs"
        last = mine.iloc[-1]
        assert (last["accuracy"], last["loss"]) == (
            pytest.approx(accuracy, abs=1e-12),
            pytest.approx(loss, rel=1e-10),
        )
    columns = ["inner_batch", "inner_schedule", "inner_decay_epochs", "inner_decay_factor", "weight_decay"]
    assert rows[columns].drop_duplicates().values.tolist() == [[more["inner_batch"], "step", 3, 0.1, 5e-4]]
    assert set(rows["order"]) == {"shuffled"}, "that of the recipe, also where there is one minibatch"
    assert set(rows["inner_augment"].dropna()) == ({more["inner_augment"]} if len(more) > 1 else set())
    recipe = changed(found.recipe, protocol)
    model = found.network(2).double()
    ddsweep.apply(found, model, index=2, recipe=recipe)
    with torch.no_grad():
        logits = model(normalise(splits.test_images, splits.mean, splits.std, torch.float64))
    again = float(F.cross_entropy(logits, splits.test_labels))
    assert again == pytest.approx(loss, rel=1e-10), "apply goes the same way"


def test_one_minibatch_is_the_cheap_way_to_many_epochs(splits: Splits, directory: SweepDirectory) -> None:
    """For a set of one batch and one rate: the same training as epoch by epoch, tested at its end alone."""
    spec = spec_of(images_per_class=2, inner_steps=1, inner_epochs=1, inner_lr_mode="shared", seed=7)
    distil_trial(spec, splits, directory, TrialSettings())
    changes = {"inner_lr": 0.1, "inner_optimizer": "momentum", "inner_epochs": 6}
    curve, end = Protocol(name="curve", **changes), Protocol(name="end", **changes, inner_batch=256)
    rows = judge(spec, asked(curve, end), splits, directory)
    steps = {name: sorted(set(rows[rows["protocol"] == name]["inner_step"])) for name in ("curve", "end")}
    assert steps == {"curve": [0, 1, 2, 3, 4, 5, 6], "end": [0, 6]}
    last = rows[rows["inner_step"] == 6].pivot(index="model_seed", columns="protocol")
    assert (
        len(last) > 1
        and last["order"]["end"].eq("shuffled").all()
        and last["order"]["curve"].eq("fixed").all()
    )
    assert last["accuracy"]["end"].tolist() == last["accuracy"]["curve"].tolist()
    assert last["loss"]["end"].tolist() == pytest.approx(last["loss"]["curve"].tolist(), rel=1e-10)


def test_a_schedule_and_an_augmentation_need_no_minibatches(
    splits: Splits, directory: SweepDirectory
) -> None:
    """Then a set is used as it was made, and tested after every epoch."""
    spec = TRIALS["known"]
    changes = {"inner_lr": 0.1, "inner_epochs": 4, "inner_schedule": "cosine", "inner_augment": "cutout"}
    protocol = Protocol(order="shuffled", **changes)
    rows = judge(spec, asked(protocol, inner_steps_beyond=(14,)), splits, directory)
    mine = rows[rows["protocol"] == protocol.name].sort_values("inner_step")
    assert mine["inner_step"].tolist() == [0, 3, 6, 9, 12, 14]
    assert set(mine["inner_schedule"]) == {"cosine"} and mine["inner_decay_epochs"].isna().all()
    found, model = DistilledSet.load(directory.distilled(spec.trial_id)), None
    for step, loss in zip(mine["inner_step"], mine["loss"], strict=True):
        model = found.network().double()
        ddsweep.apply(found, model, int(step), recipe=changed(found.recipe, protocol))
        with torch.no_grad():
            logits = model(normalise(splits.test_images, splits.mean, splits.std, torch.float64))
        assert float(F.cross_entropy(logits, splits.test_labels)) == pytest.approx(loss, rel=1e-10)


def test_rows_with_minibatches_and_augmentations_are_the_same_in_any_shard(
    splits: Splits, directory: SweepDirectory, distilled: Path, tmp_path: Path
) -> None:
    protocol = Protocol(name="field", **FIELD, inner_batch=8, inner_augment="dsa")
    evaluation = asked(protocol, networks=5)
    one = judge(PLAIN, evaluation, splits, directory)
    apart = SweepDirectory(tmp_path / "apart")
    shutil.copytree(distilled / "artifacts", apart.root / "artifacts")
    for shard in range(3):  # each with its share of the groups, the last one first
        for unit in reversed(evaluation.units(PLAIN)[shard::3]):
            evaluate_unit(PLAIN, unit, evaluation, splits, apart, torch.device("cpu"))
    keys = ["protocol", "model_seed", "inner_step"]
    three = judge(PLAIN, evaluation, splits, apart)
    pd.testing.assert_frame_equal(*(found.sort_values(keys, ignore_index=True) for found in (one, three)))
    shutil.rmtree(apart.root / "evals")
    other = judge(PLAIN, replace(evaluation, group_size=5), splits, apart)
    one, other = (found.sort_values(keys, ignore_index=True) for found in (one, other))
    assert other["loss"].tolist() == pytest.approx(one["loss"].tolist(), rel=1e-9), (
        "a network goes its own way"
    )


def test_what_takes_one_rate_is_refused_for_a_set_with_many() -> None:
    for changes in ({"inner_batch": 8}, {"inner_schedule": "cosine"}):
        protocol = Protocol(**changes)
        with pytest.raises(
            SettingError, match=r"takes one rate for all steps, .* each of its 6; give inner_lr"
        ):
            protocol.applied_to(PLAIN)
        assert Protocol(inner_lr=0.1, **changes).applied_to(PLAIN)
        matched = TrialSpec(DATASETS["digits"], method="distribution_matching", inner_epochs=3)
        for trial in (spec_of(inner_lr_mode="shared"), spec_of(inner_lr_mode="fixed"), matched):
            assert protocol.applied_to(trial)
    assert Protocol(inner_schedule="constant", order="shuffled").applied_to(PLAIN)
    with pytest.raises(SettingError, match="inner_augment: 'flip': digits is not the same in a mirror"):
        Protocol(inner_augment="flip").applied_to(PLAIN)
    with pytest.raises(SettingError, match="order: shuffled: inner_batch draws minibatches from all images"):
        Protocol(inner_batch=8, inner_lr=0.1, order="shuffled")
    for name, value in (("inner_decay_epochs", 3), ("inner_decay_factor", 0.5)):
        with pytest.raises(SettingError, match=f"{name}: {value} is for inner_schedule: step"):
            Protocol(**{name: value}, inner_schedule="cosine")


@pytest.mark.parametrize("trial", TRIALS)
def test_changes_to_what_the_trial_has_give_the_same(
    trial: str, splits: Splits, directory: SweepDirectory
) -> None:
    spec = TRIALS[trial]
    names = ("network", "init_law", "init_param", "order", "inner_optimizer", "inner_epochs")
    protocol = Protocol(name="same", **{name: getattr(spec, name) for name in names})
    rows = judge(spec, asked(protocol, inner_steps_beyond=(8,)), splits, directory)
    same, own = (rows[rows["protocol"] == name] for name in ("same", "as_distilled"))
    columns = [name for name in rows.columns if name != "protocol"]
    pd.testing.assert_frame_equal(
        same[columns].reset_index(drop=True), own[columns].reset_index(drop=True), check_exact=True
    )
    assert sorted(set(own["inner_step"])) == [0, 3, 6, 8]


# ---------------------------------------------------------------------------------------- units


def test_units_of_a_protocol_are_groups_or_the_one_known_network() -> None:
    order, law = Protocol(order="shuffled"), Protocol(init_law="normal")
    evaluation = asked(order, law)
    found = [(unit.protocol, unit.indices, unit.changes) for unit in evaluation.units(PLAIN)]
    assert found[2:] == [
        (protocol.name, indices, protocol) for protocol in (order, law) for indices in ((0, 1), (2,))
    ]
    found = [(unit.protocol, unit.size, unit.indices) for unit in evaluation.units(KNOWN)]
    assert found == [
        ("as_distilled", 1, (3,)),
        ("order=shuffled", 1, (3,)),
        ("init_law=normal", 2, (0, 1)),
        ("init_law=normal", 2, (2,)),
    ]


def test_a_protocol_that_is_impossible_for_a_trial_has_no_units() -> None:
    evaluation = asked(Protocol(order="shuffled"), Protocol(network="lenet"))
    single = spec_of(inner_steps=1)
    assert {unit.protocol for unit in evaluation.units(single)} == {"as_distilled"}
    assert evaluation.evaluation_id(single) == asked().evaluation_id(single)


def test_the_window_of_the_distillation_does_not_limit_the_epochs() -> None:
    assert Protocol(inner_epochs=1).applied_to(LEARNED).steps == 3


def test_ids_change_with_what_a_protocol_is_and_only_then() -> None:
    shuffled = Protocol(order="shuffled")
    ids = [
        evaluation.evaluation_id(PLAIN)
        for evaluation in (
            asked(),
            asked(shuffled),
            asked(Protocol(name="a", order="shuffled")),
            asked(Protocol(name="a", order="sampled")),
            asked(Protocol(inner_epochs=1)),
            # Beyond one epoch, but not beyond T: asked of the protocol alone.
            asked(Protocol(inner_epochs=1), inner_steps_beyond=(5,)),
            asked(shuffled, Protocol(inner_epochs=1)),
        )
    ]
    assert len(set(ids)) == len(ids)
    assert asked(shuffled).evaluation_id(PLAIN) == asked(Protocol(order="shuffled")).evaluation_id(PLAIN)


def test_golden_ids_of_evaluations() -> None:
    """Another id for the same question would evaluate everyone's results again."""
    trial = TrialSpec(DATASETS["digits"], inner_steps=3, images_per_class=3, inner_epochs=2)
    matched = TrialSpec(DATASETS["mnist"], method="distribution_matching")
    protocols = [
        Protocol(order="shuffled"),
        Protocol(inner_lr=0.1, weight_decay=5e-4, inner_epochs=7),
        Protocol(name="n", network="convnet(width=8)"),
    ]
    found = [
        EvaluationSpec(
            protocols=("as_distilled", "on_random", protocol), inner_steps_beyond=(9,)
        ).evaluation_id(spec)
        for spec in (trial, replace(trial, init="fixed"), matched)
        for protocol in protocols
    ]
    assert found == [
        *("145266ed54", "8e8a77a179", "b85655da3d"),
        *("1fcf634ead", "65d8a4dc75", "f267c745ac"),
        *("1abc78d915", "219e0d998a", "1f1b268e97"),
    ]


def test_names() -> None:
    assert Protocol(network="convnet( depth=2, width=4 )").name == "network=convnet(depth=2,width=4)"
    assert Protocol(inner_lr=0.1, order="shuffled").name == "order=shuffled,inner_lr=0.1"
    assert Protocol(name="b", inner_lr=0.1).name == "b"
    for name in (
        "as_distilled",
        "on_random",
        "nearest_neighbour",
        "mine_tuned",
        "two words",
        "a/b",
        "x" * 201,
    ):
        with pytest.raises(SettingError, match="name: "):
            Protocol(name=name, inner_lr=0.1)
    with pytest.raises(SettingError, match="changes nothing; give at least one of network, init_law,"):
        Protocol(name="b")
    for nothing in ({"inner_augment": "none"}, {"inner_schedule": "constant"}):
        with pytest.raises(SettingError, match="changes nothing"):
            Protocol(name="b", **nothing)


def test_long_names_make_files_of_their_own(tmp_path: Path) -> None:
    directory = SweepDirectory(tmp_path)
    many = {"init_law": "xavier_uniform", "init_param": 1.5, "order": "shuffled", "inner_lr": 0.1}
    protocols = [Protocol(network=f"convnet(depth=2,width={w},norm=instance)", **many) for w in (128, 129)]
    paths = [directory.evals_part("0123456789", p.name, "xavier_uniform", 0) for p in protocols]
    assert paths[0] != paths[1]
    for path in paths:
        assert len(path.name) < 160
        write_part(path, [], EVALS, directory.temporary)
    assert len(directory.evals_parts("0123456789")) == 2
    short = directory.evals_part("0123456789", "on_random", "xavier", 3)
    assert short.name == "part-0123456789-on_random-xavier-g003.parquet"


# --------------------------------------------------------------------------------- end to end


def test_protocols_come_and_go_without_the_rest_being_done_again(
    splits: Splits, directory: SweepDirectory
) -> None:
    plain = asked(baselines=("random_real", "knn_random"))
    more = replace(plain, protocols=("as_distilled", Protocol(network=OTHER), Protocol(order="shuffled")))

    def complete(evaluation: EvaluationSpec) -> dict[str, Any]:
        judge(PLAIN, evaluation, splits, directory)
        assert finish(PLAIN, evaluation, directory, "a sweep")
        assert trial_is_done(PLAIN, evaluation, directory)
        return dict(read_part(directory.trials_part(PLAIN.trial_id)).to_pylist()[0])

    first = complete(plain)
    before = {path: path.stat().st_mtime_ns for path in directory.evals_parts(PLAIN.trial_id)}
    missing = [unit.protocol for unit in missing_units(PLAIN, more, directory)]
    assert missing == [f"network={OTHER}"] * 2 + ["order=shuffled"] * 2
    second = complete(more)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    rows = read_table(directory.parts("evals"), EVALS).to_pandas()
    others = rows[rows["protocol"].isin([f"network={OTHER}", "order=shuffled"])]
    assert set(others["source"]) == {"distilled"}, "baselines stand beside the set as it was made"
    same = [name for name in first if name not in ("evaluation_id",)]
    assert {name: first[name] for name in same} == {name: second[name] for name in same}

    # What a name stands for may change: its rows are then made again, and no others.
    renamed = replace(plain, protocols=("as_distilled", Protocol(name="x", order="shuffled")))
    complete(renamed)
    assert not missing_units(PLAIN, renamed, directory)
    other = replace(plain, protocols=("as_distilled", Protocol(name="x", order="sampled")))
    assert [unit.protocol for unit in missing_units(PLAIN, other, directory)] == ["x", "x"]

    complete(plain)
    there = directory.evals_parts(PLAIN.trial_id)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(there) == len(before) + 6, "what was asked for earlier stays"


def test_baselines_say_in_which_order_and_by_which_optimiser(
    splits: Splits, directory: SweepDirectory
) -> None:
    rows = judge(LEARNED, asked(baselines=("class_mean", "knn_random")), splits, directory)
    trained = rows[rows["source"] == "class_mean"]
    assert (set(trained["order"]), set(trained["inner_optimizer"])) == ({"fixed"}, {"momentum"})
    own = rows[rows["source"] == "distilled"]
    assert (set(own["order"]), set(own["inner_optimizer"])) == ({"shuffled"}, {"momentum"})
    neighbours = rows[rows["source"] == "knn_random"]
    assert neighbours[["order", "inner_optimizer"]].isna().all(axis=None)


def test_rows_of_an_older_file_have_no_order(splits: Splits, directory: SweepDirectory) -> None:
    judge(PLAIN, asked(), splits, directory)
    path = directory.evals_parts(PLAIN.trial_id)[0]
    old = read_part(path).drop_columns(["order", "inner_optimizer"])
    write_part(path, old.to_pylist(), old.schema, directory.temporary)
    rows = read_table(directory.parts("evals"), EVALS)
    assert rows.column("order").null_count == len(old)
    assert rows.column("accuracy").null_count == 0
