"""Distilled sets in a user's hands: the header of the file, and `apply` on the user's own network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

import ddsweep
from ddsweep.catalog import DATASETS, EvaluationSpec, PoolSpec, TrialSpec
from ddsweep.core.images import normalise
from ddsweep.core.recipe import Recipe
from ddsweep.data.load import Splits
from ddsweep.distilled import DistilledSet, apply
from ddsweep.errors import CheckpointError
from ddsweep.evaluation import evaluate_unit
from ddsweep.results.artifacts import save_tensors
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.schemas import EVALS
from ddsweep.trial import distil_trial
from ddsweep.trial_plan import TrialSettings
from tests.tables import read_table

SETTINGS = {"images_per_class": 2, "inner_steps": 2, "inner_epochs": 2, "outer_steps": 3, "real_batch": 64}
# In double precision, so that one network alone and many at once give the same answers.
DOUBLE = {**SETTINGS, "inner_lr": 0.1, "models_per_step": 1, "selection_networks": 1, "dtype": "float64"}
EVALUATION = EvaluationSpec(networks=2, group_size=2, baselines=(), inner_steps_beyond=(7,))


def convnet() -> nn.Module:
    """A user's own ConvNet: torch's layers, in the order of a forward pass."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(32, 10)),
    )


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


@dataclass
class Case:
    """A distilled set on disk, and the accuracies that evaluation found: {(network, inner step): value}."""

    splits: Splits
    path: Path
    checkpoint: Path
    accuracy: dict[tuple[int, int], float]
    user_network: Callable[[], nn.Module]
    networks: tuple[int, ...]

    def load(self) -> DistilledSet:
        return DistilledSet.load(self.path)

    def score(self, model: nn.Module) -> float:
        """Accuracy of ``model`` (double precision) on the test images."""
        data = self.splits
        with torch.no_grad():
            x = normalise(data.test_images, data.mean, data.std, torch.float64)
            return float((model(x).argmax(1) == data.test_labels).double().mean())


def digits_of_28_pixels(digits: Splits) -> Splits:
    """The digits, three times as large and with a frame of 2: images for a LeNet."""

    def enlarge(pixels: Tensor) -> Tensor:
        large = pixels.repeat_interleave(3, -1).repeat_interleave(3, -2)
        return F.pad(large, (2, 2, 2, 2))

    parts = {name: enlarge(getattr(digits, f"{name}_images")) for name in ("train", "validation", "test")}
    return replace(digits, name="mnist", **{f"{name}_images": value for name, value in parts.items()})


@pytest.fixture(scope="module")
def few(splits: Splits) -> Splits:
    """All images but those of the test set, of which there are 120."""
    return replace(splits, test_images=splits.test_images[:120], test_labels=splits.test_labels[:120])


@pytest.fixture(scope="module", params=["random", "fixed", "lenet"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, few: Splits) -> Case:
    data = digits_of_28_pixels(few) if request.param == "lenet" else few
    if request.param == "lenet":
        spec = TrialSpec(dataset=DATASETS["mnist"], network="lenet", **DOUBLE)
    else:
        init: dict[str, Any] = {"init": request.param, "seed": 5}
        spec = TrialSpec(dataset=DATASETS["digits"], network="convnet(width=8)", **init, **DOUBLE)
    directory = SweepDirectory(tmp_path_factory.mktemp(request.param))
    return made(spec, data, directory, lenet if request.param == "lenet" else convnet)


def made(
    spec: TrialSpec, data: Splits, directory: SweepDirectory, user_network: Callable[[], nn.Module]
) -> Case:
    """``spec``, distilled and evaluated."""
    assert distil_trial(spec, data, directory, TrialSettings())
    for unit in EVALUATION.units(spec):
        if unit.protocol == "as_distilled":
            evaluate_unit(spec, unit, EVALUATION, data, directory, torch.device("cpu"))
    rows = read_table(directory.parts("evals"), EVALS).to_pylist()
    return Case(
        data,
        directory.distilled(spec.trial_id),
        directory.checkpoint(spec.trial_id),
        {(row["model_seed"], row["inner_step"]): row["accuracy"] for row in rows},
        user_network,
        (5,) if spec.init == "fixed" else (0, 1),
    )


# -------------------------------------------------------------------------------------------- apply


def test_apply_gives_the_accuracy_of_the_evaluation_row(case: Case) -> None:
    for index in case.networks:
        found = case.load()
        model = apply(found, found.network(index).double())
        assert case.score(model) == pytest.approx(case.accuracy[index, 4], abs=1e-12)


def test_apply_on_a_users_own_network_gives_the_accuracy_of_the_evaluation_row(case: Case) -> None:
    for index in case.networks:
        found, model = ddsweep.DistilledSet.load(case.path), case.user_network()
        initial = found.initial_weights(model, index)
        model.load_state_dict(initial)
        returned = ddsweep.apply(found, model.double())
        assert returned is model
        assert case.score(model) == pytest.approx(case.accuracy[index, 4], abs=1e-12)


@pytest.mark.parametrize("steps", [0, 2, 7])
def test_apply_stops_early_and_goes_on_beyond_t(case: Case, steps: int) -> None:
    for index in case.networks:
        found = case.load()
        model = apply(found, found.network(index).double(), steps)
        assert case.score(model) == pytest.approx(case.accuracy[index, steps], abs=1e-12)


def test_no_steps_leave_the_network_as_it_was(case: Case) -> None:
    found = case.load()
    model, same = (found.network(case.networks[0]) for _ in range(2))
    apply(found, model, 0)
    for name, value in same.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_random_set_has_many_networks_and_a_fixed_set_one(case: Case) -> None:
    found = case.load()
    first, second = (nn.utils.parameters_to_vector(found.network(i).parameters()) for i in (0, 1))
    assert torch.equal(first, second) == (found.spec.init == "fixed")


def test_apply_trains_in_the_precision_of_the_network(case: Case) -> None:
    found = case.load()
    model = apply(found, found.network(case.networks[0]))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_apply_leaves_frozen_weights_alone(case: Case) -> None:
    found, model = case.load(), case.user_network()
    first = next(model.parameters())
    first.requires_grad_(False)
    before = first.clone()
    apply(found, model)
    assert torch.equal(first, before)


def test_apply_works_where_a_user_has_switched_gradients_off(case: Case) -> None:
    found = case.load()
    with torch.no_grad():
        model = apply(found, found.network(case.networks[0]).double())
    assert case.score(model) == pytest.approx(case.accuracy[case.networks[0], 4], abs=1e-12)


@pytest.mark.parametrize("classes", [9, 11, 1])
def test_a_network_with_another_number_of_classes_is_refused(case: Case, classes: int) -> None:
    pixels = math.prod(case.load().spec.dataset.shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"logits of shape \(10, {classes}\) .* the set has 10 classes"):
        apply(case.load(), model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_network_with_nothing_to_train_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="no parameters to train"):
        apply(case.load(), nn.Flatten())


WAYS = {
    "momentum": {"inner_optimizer": "momentum", "inner_momentum": 0.7},
    "adam, soft labels": {"inner_optimizer": "adam", "labels": "soft", "inner_lr": 0.01},
    "shuffled, soft labels": {"order": "shuffled", "labels": "soft", "outer_lr": 0.1},
    "momentum, sampled": {"inner_optimizer": "momentum", "order": "sampled"},
    "adam, shuffled, fixed": {**{"inner_optimizer": "adam", "order": "shuffled"}, "init": "fixed", "seed": 5},
    "a window, augmented, the best mean": {
        **{"window": 3, "inner_augment": "shift", "outer_augment": "rotate", "ema": 0.5, "keep": "best"},
        **{"order": "sampled", "labels": "soft", "validate_every": 1},
    },
}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_apply_trains_in_every_way_as_evaluation_does(
    settings: dict[str, Any], few: Splits, tmp_path: Path
) -> None:
    """Accuracies of a few outer steps are near chance, but each is a count of right answers out of 120 that
    another order, rate or optimiser would not hit at all of the inner steps 0, 2, 4 and 7."""
    spec = TrialSpec(dataset=DATASETS["digits"], network="convnet(width=8)", **(DOUBLE | settings))
    case = made(spec, few, SweepDirectory(tmp_path), convnet)
    found = case.load()
    for index in case.networks:
        steps = sorted(step for network, step in case.accuracy if network == index)
        assert steps == [0, 2, 4, 7]
        for step in steps:
            how = {} if spec.init == "fixed" else {"index": index}
            model = apply(found, found.network(index).double(), step, **how)
            assert case.score(model) == pytest.approx(case.accuracy[index, step], abs=1e-12)


def test_another_order_gives_another_network(splits: Splits, tmp_path: Path) -> None:
    settings = DOUBLE | {"order": "shuffled", "inner_epochs": 6, "outer_steps": 1}
    spec = TrialSpec(dataset=DATASETS["digits"], network="convnet(width=8)", **settings)
    directory = SweepDirectory(tmp_path)
    assert distil_trial(spec, splits, directory, TrialSettings())
    found = DistilledSet.load(directory.distilled(spec.trial_id))
    models = [apply(found, found.network(0).double(), index=index) for index in (0, 0, 1)]
    one, again, other = (nn.utils.parameters_to_vector(model.parameters()) for model in models)
    assert torch.equal(one, again) and not torch.equal(one, other)


# ---------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("settings", "order", "optimizer"),
    [
        ({"order": "shuffled"}, "in random order, batch s with rates[e*S + s]", "gradient descent"),
        ({"order": "sampled"}, "m random images of each class, with rates[t]", "gradient descent"),
        ({"inner_optimizer": "momentum", "inner_momentum": 0.75}, "batches 0..S-1", "u = 0.75 u + g"),
        ({"inner_optimizer": "adam"}, "batches 0..S-1", "Adam (0.9, 0.999)"),
    ],
)
def test_the_header_says_how_to_train(
    case: Case, settings: dict[str, Any], order: str, optimizer: str
) -> None:
    found = case.load()
    recipe = Recipe.of(replace(found.spec, **settings))
    header = replace(found, recipe=recipe).header()
    assert order in header["order"] and optimizer in header["optimizer"]
    assert DistilledSet.from_tensors(found.tensors(), header).recipe == recipe


def test_a_recipe_with_hard_labels_takes_the_classes_of_learned_ones(case: Case) -> None:
    found = case.load()
    learned = torch.nn.functional.one_hot(found.labels, 10).float().roll(1, -1)
    soft = replace(found, labels=learned, recipe=replace(found.recipe, labels="soft"))
    weights = [
        nn.utils.parameters_to_vector(apply(one, one.network(), recipe=recipe).parameters())
        for one, recipe in ((found, None), (soft, None), (soft, replace(soft.recipe, labels="hard")))
    ]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


def test_soft_labels_are_in_the_file_as_probabilities(splits: Splits, tmp_path: Path) -> None:
    spec = TrialSpec(dataset=DATASETS["digits"], network="convnet(width=8)", labels="soft", **DOUBLE)
    directory = SweepDirectory(tmp_path)
    assert distil_trial(spec, splits, directory, TrialSettings())
    found = DistilledSet.load(directory.distilled(spec.trial_id))
    assert found.labels.shape == (2, 10, 10) and found.labels.dtype == torch.float32
    assert found.labels.argmax(-1).tolist() == [list(range(10))] * 2  # three outer steps from the classes
    assert not bool((found.labels == 0).any())
    assert replace(found, labels=found.labels * 2).sha256 != found.sha256


def test_the_file_can_be_used_without_ddsweep(case: Case) -> None:
    """Read with safetensors and JSON alone, applied by hand as the header says."""
    with safe_open(case.path, "pt") as file:
        header = json.loads(file.metadata()["ddsweep"])["header"]
        images, labels, rates = (file.get_tensor(name).double() for name in ("images", "labels", "rates"))
    assert header["kind"] == "distilled"
    assert header["class_names"] == [str(i) for i in range(10)]
    spec = header["spec"]
    assert images.shape == (
        spec["inner_steps"],
        10 * spec["images_per_class"] // 2,
        *spec["dataset"]["shape"],
    )
    assert len(rates) == spec["inner_steps"] * spec["inner_epochs"]
    assert header["order"] == "batches 0..S-1 in order, S*E steps, rates[t] at step t"
    assert header["optimizer"] == "gradient descent on mean cross-entropy"
    model = case.user_network()
    model.load_state_dict(case.load().initial_weights(model, case.networks[0]))
    model.double()
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    for t, rate in enumerate(rates.tolist()):
        s = t % spec["inner_steps"]
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        F.cross_entropy(model(images[s]), labels[s].long()).backward()
        optimiser.step()
    mean, std = (torch.tensor(header[key], dtype=torch.float64).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        answers = model((case.splits.test_images.double() / 255 - mean) / std).argmax(1)
    right = float((answers == case.splits.test_labels).double().mean())
    assert right == pytest.approx(case.accuracy[case.networks[0], 4], abs=1e-12)


def test_the_header_says_for_which_networks_and_from_which_data(case: Case) -> None:
    with safe_open(case.path, "pt") as file:
        header = json.loads(file.metadata()["ddsweep"])["header"]
    needed = ("network", "init", "init_law", "init_param", "inner_steps", "inner_epochs", "seed", "dataset")
    assert set(needed) <= set(header["spec"])
    assert TrialSpec.from_dict(header["spec"]).trial_id == header["trial_id"]
    assert header["provenance"]["dataset_fingerprint"] == case.splits.fingerprint
    assert {"torch_version", "ddsweep_version", "started_at", "ended_at"} <= set(header["provenance"])


def test_the_header_does_not_say_where_weights_lie_on_this_machine(case: Case) -> None:
    found = case.load()
    pool = PoolSpec("imagenet-1", "imagenet", (3, 224, 224), 0, "alexnet", 1, 0, "1", "weights/of/mine.pth")
    header = replace(
        found,
        spec=replace(
            found.spec, seed=0, dataset=DATASETS["voc2007"], init="fixed", network="alexnet", pool=pool
        ),
    ).header()
    assert "of/mine" not in json.dumps(header) and header["spec"]["pool"]["name"] == "imagenet-1"


def test_nothing_is_trained_in_inference_mode(case: Case) -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match=r"under torch\.inference_mode\(\)"):
        apply(case.load(), case.user_network())


def test_a_set_survives_the_way_to_disk_and_back(case: Case, tmp_path: Path) -> None:
    found, path = case.load(), tmp_path / "copy.safetensors"
    save_tensors(path, found.tensors(), found.header(), tmp_path)
    again = DistilledSet.load(str(path))
    assert again.header() == found.header()
    assert again.sha256 == found.sha256
    assert again.spec == found.spec
    assert path.read_bytes() == case.path.read_bytes()


def test_the_hash_is_of_images_labels_and_rates_alone(case: Case) -> None:
    found = case.load()
    assert replace(found, provenance={}, mean=(0.0,)).sha256 == found.sha256
    for name, value in found.tensors().items():
        changed = value.clone()
        changed.view(-1)[0] += 1
        assert replace(found, **{name: changed}).sha256 != found.sha256, name


# ---------------------------------------------------------------------------------------- bad files


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "distilled.safetensors"
    with pytest.raises(CheckpointError, match=r"distilled\.safetensors: cannot read: No such file"):
        DistilledSet.load(path)


@pytest.mark.parametrize("keep", [0, 8, 0.5, -1])
def test_a_truncated_file_is_named(case: Case, tmp_path: Path, keep: float) -> None:
    data, path = case.path.read_bytes(), tmp_path / "distilled.safetensors"
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"distilled\.safetensors: truncated, altered"):
        DistilledSet.load(path)


def test_an_altered_rate_is_seen(case: Case, tmp_path: Path) -> None:
    data, path = bytearray(case.path.read_bytes()), tmp_path / "distilled.safetensors"
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="altered"):
        DistilledSet.load(path)


def test_a_checkpoint_is_not_taken_for_a_distilled_set(case: Case) -> None:
    with pytest.raises(CheckpointError, match="checkpoint"):
        DistilledSet.load(case.checkpoint)
