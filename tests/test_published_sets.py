"""Sets that others published: what is read, where images end up, and what is refused before any work."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from ddsweep.catalog import DATASETS, TrialSpec, parse_dataset
from ddsweep.catalog.groups import WHITENINGS
from ddsweep.core.images import class_labels, normalise
from ddsweep.cost import estimate
from ddsweep.data.load import load_splits
from ddsweep.data.splits import Splits
from ddsweep.distilled import DistilledSet, apply
from ddsweep.errors import SettingError
from ddsweep.imported import Source, imported_set
from ddsweep.one_trial import run_trial
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.reader import load_results
from ddsweep.spec import expand, sweep_of
from ddsweep.start_set import check_start
from tests.conftest import Ask

MEAN, STD = 0.3, 0.35
NORMALISED = ("--space", "normalised", "--mean", MEAN, "--std", STD)
PIXELS = ("--space", "pixels")


@pytest.fixture
def real(splits: Splits) -> tuple[Tensor, Tensor]:
    """Two real images of each class, bytes, sorted by class; and their classes."""
    labels = class_labels(1, 10, 2)[0]
    places = [torch.nonzero(splits.train_labels == c).flatten()[:2] for c in range(10)]
    return splits.train_images[torch.cat(places)], labels


def in_order(images: Tensor, labels: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    return images[order], labels[order]


def write_dm(folder: Path, images: Tensor, labels: Tensor) -> list[object]:
    """As DC, DSA and DM keep them: several experiments, and accuracies that are numbers of numpy."""
    runs = [[torch.zeros_like(images), labels], [images, labels]]
    torch.save({"data": runs, "accs_all_exps": {"ConvNet": [np.float64(0.5)]}}, folder / "res.pt")
    return ["res.pt", "--experiment", 1]


def write_mtt(folder: Path, images: Tensor, labels: Tensor) -> list[object]:
    torch.save(images, folder / "images_best.pt")
    torch.save(labels.float(), folder / "labels_best.pt")  # old ones are floats
    return ["images_best.pt", "--labels", "labels_best.pt"]


def write_numpy(folder: Path, images: Tensor, labels: Tensor) -> list[object]:
    np.savez(folder / "set.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    return ["set.npz"]


def write_safetensors(folder: Path, images: Tensor, labels: Tensor) -> list[object]:
    save_file({"images": images.contiguous(), "labels": labels}, folder / "set.safetensors")
    return ["set.safetensors"]


WRITERS = (write_dm, write_mtt, write_numpy, write_safetensors)


@pytest.mark.parametrize("space", ["normalised", "pixels", "bytes"])
@pytest.mark.parametrize("write", WRITERS)
def test_images_end_up_where_real_ones_are(
    write: Callable[..., list[object]],
    space: str,
    real: tuple[Tensor, Tensor],
    splits: Splits,
    ask: Ask,
    tmp_path: Path,
) -> None:
    """Whatever their order in the file, the shape of its arrays and the space of its numbers."""
    pixels, labels = real
    shuffled, theirs = in_order(
        pixels, labels, torch.randperm(20, generator=torch.Generator().manual_seed(3))
    )
    floats = shuffled.double() / 255
    values = {"normalised": (floats - MEAN) / STD, "pixels": floats, "bytes": shuffled}[space]
    told = NORMALISED if space == "normalised" else PIXELS
    said = ask(
        "import", *write(tmp_path, values, theirs), "--dataset", "digits", "--out", "a/set.safetensors", *told
    )
    assert (said.code, said.err) == (0, "")
    assert "2 images per class of digits, hard labels, pixels from 0.00 to 1.00" in said.out
    found = DistilledSet.load(tmp_path / "a" / "set.safetensors")
    expected = normalise(pixels, splits.mean, splits.std, torch.float32)
    assert torch.equal(found.labels, labels[None]) and found.images.shape == (1, 20, 1, 8, 8)
    by_class = lambda images: images.flatten(1).view(10, 2, 64).sort(1).values  # noqa: E731
    torch.testing.assert_close(by_class(found.images[0]), by_class(expected), rtol=0, atol=1e-5)
    assert os.listdir(tmp_path / "a") == ["set.safetensors"]


@pytest.mark.parametrize("kind", WHITENINGS)
def test_whitened_images_are_judged_among_whitened_ones(
    kind: str, real: tuple[Tensor, Tensor], splits: Splits, ask: Ask, tmp_path: Path
) -> None:
    """Their numbers stay as they are; a trial that does not whiten cannot begin in them."""
    white = load_splits(DATASETS["digits"], None, validation_fraction=0.1, split_seed=0, whitening=kind)
    assert white.whitening is not None
    images = white.whitening.whitened(normalise(real[0], splits.mean, splits.std, torch.float32))
    words = (*write_mtt(tmp_path, images, real[1]), "--dataset", "digits", "--out", "s.safetensors")
    said = ask("import", *words, "--space", kind)
    assert (said.code, said.err) == (0, "")
    assert "hard labels, pixels from 0.00 to 1.00" in said.out or "from 0.00 to 1.01" in said.out
    printed = yaml.safe_load(said.out.partition("To judge it:\n")[2])["base"]
    assert printed["whitening"] == kind
    found = run(tmp_path / "results", tmp_path / "s.safetensors", whitening=kind, split_seed=3)
    assert torch.equal(found.images[0], images) and found.spec.whitening == kind
    with pytest.raises(SettingError, match=f"made with whitening {kind}, and this trial has none"):
        run(tmp_path / "plain", tmp_path / "s.safetensors")
    assert "they are for --space normalised" in ask("import", *words, "--space", kind, "--std", 1).words


def test_images_too_large_to_be_whitened_are_refused_before_the_work(
    real: tuple[Tensor, Tensor], ask: Ask, tmp_path: Path
) -> None:
    words = write_mtt(tmp_path, real[0] / 255, real[1])
    said = refused(ask, *words, space=("--space", "zca"), dataset="digits(size=80)")
    assert "whitening: zca of 6400 values an image takes a matrix too large" in said


def test_it_is_judged_as_it_is(real: tuple[Tensor, Tensor], ask: Ask, tmp_path: Path) -> None:
    """Soft labels too; and the header says which file it is from."""
    pixels, labels = real
    soft = torch.nn.functional.one_hot(labels, 10) * 0.8 + 0.02
    torch.save(pixels.float() / 255, tmp_path / "images.pt")
    torch.save(soft, tmp_path / "labels.pt")
    asked = [
        "import",
        "images.pt",
        "--labels",
        "labels.pt",
        *PIXELS,
        "--dataset",
        "digits",
        "--out",
        "s.safetensors",
    ]
    said = ask(*asked)
    assert said.code == 0
    printed = yaml.safe_load(said.out.partition("To judge it:\n")[2])["base"]
    assert (printed["dataset"], printed["labels"], printed["method"]) == ("digits", "soft", "given")
    found = DistilledSet.load(tmp_path / "s.safetensors")
    assert found.imported is not None
    assert (found.imported["file"], found.imported["space"]) == ("images.pt", "pixels")
    settings = {
        **{"dataset": "digits", "network": "convnet(depth=1,width=4)", "method": "given", "labels": "soft"},
        **{"image_init": {"set": "s.safetensors"}, "images_per_class": 2, "inner_steps": 1, "outer_steps": 3},
        **{"selection_networks": 2, "inner_epochs": 2, "ema": 0.9, "outer_cutoff": 3, "validate_every": 1},
    }
    done = run_trial(settings, "results/judged", evaluate={"networks": 2, "baselines": ["random_real"]})
    assert torch.equal(done.distilled.images, found.images)
    assert torch.equal(done.distilled.labels, found.labels)
    row = load_results("results/judged").trials.iloc[0]
    assert (row["method"], row["labels"], row["status"]) == ("given", "soft", "done")
    assert row["test_models"] == 2 and row[["window", "real_batch", "real_per_class"]].isna().all()


SMALL: dict[str, Any] = {
    **{"dataset": "digits", "network": "convnet(depth=1,width=4)", "images_per_class": 2, "inner_steps": 1},
    **{"selection_networks": 2, "outer_steps": 1, "models_per_step": 1},
}
EVALUATE = {"networks": 2, "group_size": 2, "baselines": "none"}


def published(
    folder: Path, real: tuple[Tensor, Tensor], splits: Splits, labels: Tensor | None = None
) -> Path:
    """The set of ``real``, imported."""
    pixels, classes = real
    torch.save({"images": pixels, "labels": classes if labels is None else labels}, folder / "theirs.pt")
    imported_set(Source(folder / "theirs.pt", "pixels"), splits, DATASETS["digits"]).save(
        folder / "ours.safetensors"
    )
    return folder / "ours.safetensors"


def run(folder: Path, start: Path, **more: Any) -> DistilledSet:
    settings = {**SMALL, "method": "given", "image_init": {"set": str(start)}, **more}
    return run_trial(settings, folder, evaluate=EVALUATE).distilled


def test_soft_labels_are_not_left_out_silently(
    real: tuple[Tensor, Tensor], splits: Splits, tmp_path: Path
) -> None:
    soft = torch.rand(20, 10, generator=torch.Generator().manual_seed(2))
    start = published(tmp_path, real, splits, soft)
    with pytest.raises(
        SettingError, match=r"labels: hard: .* has soft labels, and method: given takes it as it is"
    ):
        run(tmp_path / "hard", start)
    found = run(tmp_path / "soft", start, labels="soft")
    assert torch.equal(found.labels[0], soft), "in the order of the file, whatever the largest numbers are"


def test_images_in_no_order_of_classes_are_not_taken_for_sorted_ones(
    real: tuple[Tensor, Tensor], splits: Splits, tmp_path: Path
) -> None:
    """Learned labels may lead elsewhere than where an image began; then places say nothing of classes."""
    pixels, labels = real
    soft = torch.nn.functional.one_hot(labels.flip(0), 10) * 0.8 + 0.02
    soft[0] = torch.nn.functional.one_hot(torch.tensor(3), 10)
    start = published(tmp_path, (pixels.flip(0), labels.flip(0)), splits, soft)
    for more in ({"method": "bptt"}, {"method": "distribution_matching"}):
        with pytest.raises(SettingError, match="stand for no classes by their places; give labels: soft"):
            run(tmp_path / "hard", start, **more)
    found = DistilledSet.load(start)
    assert torch.equal(found.batches(found.recipe).labels, soft[None])
    hard = found.batches(replace(found.recipe, labels="hard")).labels
    assert hard.tolist()[0] == [3, *labels.flip(0)[1:].tolist()], "the largest of each image"
    run(tmp_path / "soft", start, method="bptt", labels="soft", real_batch=32)


@pytest.mark.parametrize("logits", [True, False])
def test_labels_that_are_no_probabilities_are_told_of(
    logits: bool, real: tuple[Tensor, Tensor], ask: Ask, tmp_path: Path
) -> None:
    numbers = 5 * torch.nn.functional.one_hot(real[1], 10).float() - 1
    labels = numbers if logits else numbers.softmax(1)
    torch.save({"images": real[0].float() / 255, "labels": labels}, tmp_path / "soft.pt")
    said = ask("import", "soft.pt", "--dataset", "digits", *PIXELS, "--out", "s.safetensors")
    assert said.code == 0
    words = "Its labels add up to -5.00 to -5.00 an image, probabilities to 1: if they are logits, import"
    assert (words in said.words) == logits


def test_whole_numbers_may_be_soft_labels(
    real: tuple[Tensor, Tensor], splits: Splits, tmp_path: Path
) -> None:
    one_hot = torch.nn.functional.one_hot(real[1], 10)
    found = DistilledSet.load(published(tmp_path, real, splits, one_hot))
    assert torch.equal(found.labels[0], one_hot.float()) and found.spec.labels == "soft"


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("soft", [False, True])
def test_any_whole_numbers_may_be_labels(
    real: tuple[Tensor, Tensor], splits: Splits, tmp_path: Path, kind: type, soft: bool
) -> None:
    labels = torch.nn.functional.one_hot(real[1], 10) if soft else real[1]
    bytes_ = (real[0] * 255).round().numpy() if real[0].is_floating_point() else real[0].numpy()
    np.savez(tmp_path / "set.npz", images=bytes_.astype(kind), labels=labels.numpy().astype(kind))
    found = imported_set(Source(tmp_path / "set.npz", "pixels"), splits, DATASETS["digits"])
    assert torch.equal(found.labels[0], labels.float() if soft else labels)


def test_other_arrays_in_a_file_do_no_harm(
    real: tuple[Tensor, Tensor], splits: Splits, tmp_path: Path
) -> None:
    names = {"class_names": np.array(["zero", "one"]), "more": np.array([Runs()], dtype=object)}
    np.savez(tmp_path / "set.npz", images=real[0].numpy(), labels=real[1].numpy(), **names)
    found = imported_set(Source(tmp_path / "set.npz", "pixels"), splits, DATASETS["digits"])
    assert found.images.shape == (1, 20, 1, 8, 8)


def test_on_another_split_the_pixels_are_the_same(
    real: tuple[Tensor, Tensor], splits: Splits, tmp_path: Path
) -> None:
    """The digits are normalised by their training part, which is another one there."""
    start = published(tmp_path, real, splits)
    found = run(tmp_path / "results", start, split_seed=3, validation_fraction=0.3)
    assert (found.mean, found.std) != (splits.mean, splits.std)
    expected = normalise(real[0], found.mean, found.std, torch.float32)
    torch.testing.assert_close(found.images[0], expected, rtol=0, atol=1e-5)


def test_an_imported_set_brings_no_rates_and_is_known_as_imported_ever_after(
    real: tuple[Tensor, Tensor], splits: Splits, tmp_path: Path
) -> None:
    start = published(tmp_path, real, splits)
    learned = run(tmp_path / "on", start, method="bptt", inner_lr=0.3, outer_lr_rates=1e-9, real_batch=32)
    torch.testing.assert_close(learned.rates, torch.tensor([0.3]))
    file = tmp_path / "learned.safetensors"
    learned.save(file)
    again = run(tmp_path / "again", file)
    for found in (learned, again):
        assert found.imported == DistilledSet.load(start).imported is not None
    # Nobody knows which images the imported set has seen. Those of the trial after it are known.
    with pytest.raises(SettingError, match="was made with split_seed 0, and this trial has 5"):
        run(tmp_path / "other", file, split_seed=5)


def test_a_model_is_not_trained_at_a_rate_that_nobody_chose(
    real: tuple[Tensor, Tensor], splits: Splits, tmp_path: Path
) -> None:
    found = DistilledSet.load(published(tmp_path, real, splits))
    with pytest.raises(ValueError, match="was imported, and has no rates: give a recipe with one"):
        apply(found, found.network())
    before = found.network()
    after = apply(found, found.network(), recipe=replace(found.recipe, rate=0.1, epochs=2))
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    judged = run(tmp_path / "results", tmp_path / "ours.safetensors")
    apply(judged, judged.network())  # at the rate that was chosen


def test_soft_labels_under_the_evaluation_of_the_field(
    real: tuple[Tensor, Tensor], splits: Splits, tmp_path: Path
) -> None:
    soft = torch.nn.functional.one_hot(real[1], 10) * 0.8 + 0.02
    start = published(tmp_path, real, splits, soft)
    field = {
        **{
            "name": "dm",
            "inner_optimizer": "momentum",
            "inner_lr": 0.01,
            "inner_batch": 8,
            "inner_epochs": 3,
        },
        "inner_augment": "shift",
    }
    settings = {**SMALL, "method": "given", "labels": "soft", "image_init": {"set": str(start)}}
    run_trial(settings, tmp_path / "r", evaluate={**EVALUATE, "protocols": ["as_distilled", field]})
    rows = load_results(tmp_path / "r").evals
    last = rows[rows["protocol"] == "dm"]["inner_step"].max()
    assert last == 9, "three epochs of 20 images, 8 at a time"


def test_judging_costs_what_the_search_for_a_rate_costs() -> None:
    trial = TrialSpec(DATASETS["cifar10"], network="convnet", method="given", images_per_class=10)
    twice = replace(trial, selection_networks=2 * trial.selection_networks)
    costs = [estimate(spec, 1) for spec in (trial, twice)]
    assert costs[0].seconds_cpu > 60 and costs[1].flops == 2 * costs[0].flops
    assert costs[0].memory_bytes > 10**9


def test_a_set_is_written_and_read_again(real: tuple[Tensor, Tensor], splits: Splits, tmp_path: Path) -> None:
    pixels, labels = real
    save_file({"images": pixels, "labels": labels}, tmp_path / "theirs.safetensors")
    found = imported_set(Source(tmp_path / "theirs.safetensors", "pixels"), splits, DATASETS["digits"])
    found.save(tmp_path / "ours.safetensors")
    again = DistilledSet.load(tmp_path / "ours.safetensors")
    assert again.sha256 == found.sha256 and again.header() == found.header()


def test_nobody_asks_for_the_split_of_an_imported_set(
    real: tuple[Tensor, Tensor], splits: Splits, tmp_path: Path
) -> None:
    """For nobody knows it; but data and number of images are asked for."""
    pixels, labels = real
    save_file({"images": pixels, "labels": labels}, tmp_path / "theirs.safetensors")
    ours = tmp_path / "ours.safetensors"
    imported_set(Source(tmp_path / "theirs.safetensors", "pixels"), splits, DATASETS["digits"]).save(ours)

    def check(**more: Any) -> None:
        base = {"dataset": "digits", "images_per_class": 2, "image_init": {"set": str(ours)}, **more}
        (trial,) = expand(sweep_of({"name": "on", "base": base}, "test"), parse_dataset).trials
        check_start(trial, SweepDirectory(tmp_path / "none").sets)

    check(split_seed=3, validation_fraction=0.2)
    with pytest.raises(SettingError, match="images_per_class 2, and this trial has 1"):
        check(images_per_class=1)
    with pytest.raises(SettingError, match="was made on digits, and this trial is on mnist"):
        check(dataset="mnist")


class Runs:
    """A pickle that runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/this-must-not-be-made",)


def refused(ask: Ask, *words: object, space: tuple[object, ...] = PIXELS, dataset: str = "digits") -> str:
    said = ask("import", *words, "--dataset", dataset, *space, "--out", "set.safetensors")
    assert said.code == 1 and said.out == "" and not Path("set.safetensors").exists()
    return said.words


def test_nothing_in_a_file_is_run(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Runs()))
    torch.save({"images": Runs()}, tmp_path / "worse.pt")
    for name in ("evil.pt", "worse.pt"):
        assert f"{name}: not a file of torch, or one that holds more than tensors" in refused(ask, name)
    np.savez(tmp_path / "set.npz", images=np.array([Runs()], dtype=object))
    assert "set.npz: not a file of tensors that can be read without running code" in refused(ask, "set.npz")
    assert not Path("/tmp/this-must-not-be-made").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x, y: (x[:19], y[:19]), "19 images; digits has 10 classes, of equal numbers"),
        (lambda x, y: (x, y[:10]), "10 labels for 20 images"),
        (lambda x, y: (x, y.clamp(max=8)), "labels are not the classes 0 to 9 in equal numbers: [2, 2"),
        (lambda x, y: (x, y + 1), "classes 0 to 9 in equal numbers: from 1 to 10"),
        (lambda x, y: (x, y + 0.5), "labels of shape [20]; give classes [N], or numbers [N, 10]"),
        (lambda x, y: (x, torch.zeros(20, 9)), "labels of shape [20, 9]; the data set has 10 classes"),
        (lambda x, y: (x[:, :, :7], y), "images of shape [20, 1, 7, 8]; the data set has [N, 1, 8, 8]"),
        (lambda x, y: (x * 8 - 4, y), "images go from -4 to 4, and --space pixels is from 0 to 1"),
        (lambda x, y: (x * torch.nan, y), "images are not all finite"),
        (lambda x, y: ((x * 255).round(), y), "Bytes as floats: divide by 255"),
        (lambda x, y: (x.round().long(), y), "whole numbers 0 and 1: are they floats?"),
        (lambda x, y: (x, y + 10**12), "in equal numbers: from 1000000000000 to 1000000000009"),
        (lambda x, y: (x, torch.tensor(3)), "labels of shape [] are no plain tensor of a set"),
        (lambda x, y: (x[:0], y[:0]), "images of shape [0, 1, 8, 8] are no plain tensor of a set"),
        (lambda x, y: (x.to_sparse(), y), "are no plain tensor of a set"),
        (lambda x, y: (x.to(torch.complex64), y), "images are torch.complex64; a set has whole numbers or"),
        (lambda x, y: (x, (y - 1).to(torch.uint64)), "labels go beyond 2^63"),
        (lambda x, y: (x[:1].expand(2**26, 1, 8, 8), y), "are no plain tensor of a set"),
    ],
)
def test_what_is_no_set_of_the_data(
    change: Callable[..., tuple[Tensor, Tensor]],
    told: str,
    real: tuple[Tensor, Tensor],
    ask: Ask,
    tmp_path: Path,
) -> None:
    pixels, labels = real
    images, classes = change(pixels.float() / 255, labels)
    torch.save({"images": images, "labels": classes}, tmp_path / "set.pt")
    assert told in refused(ask, "set.pt")


def test_words_that_are_wrong(real: tuple[Tensor, Tensor], ask: Ask, tmp_path: Path) -> None:
    pixels, labels = real
    torch.save({"data": [[pixels / 255, labels]]}, tmp_path / "dm.pt")
    torch.save({"data": [3]}, tmp_path / "three.pt")
    torch.save({"images": pixels / 255, "labels": labels}, tmp_path / "float.pt")
    save_file({"images": pixels, "labels": labels}, tmp_path / "bytes.safetensors")
    torch.save(pixels, tmp_path / "bare.pt")
    torch.save({"syn": pixels}, tmp_path / "other.pt")
    assert "--experiment 1: dm.pt has 1 of them, from 0 to 0" in refused(ask, "dm.pt", "--experiment", 1)
    assert "bare.pt: holds a Tensor; a set is a file with" in refused(ask, "bare.pt")
    assert "other.pt: holds a mapping with syn; a set is" in refused(ask, "other.pt")
    assert "gone.pt: cannot be read: No such file" in refused(ask, "gone.pt")
    assert "--space: 'white' is not one of pixels, normalised" in refused(
        ask, "dm.pt", space=("--space", "white")
    )
    normalised = ("--space", "normalised")
    assert "--mean: give 1 number joined by commas" in refused(ask, "dm.pt", space=normalised)
    of_bytes = (*normalised, "--mean", 78, "--std", 33)
    assert "--mean: [78.0]: give those of pixels from 0 to 1" in refused(ask, "float.pt", space=of_bytes)
    assert "--std: [0.0]: every number" in refused(ask, "dm.pt", space=(*normalised, "--mean", 0, "--std", 0))
    assert "--mean: 'a': give numbers" in refused(ask, "dm.pt", space=(*normalised, "--mean", "a"))
    assert "unknown data set 'digitz'" in refused(ask, "dm.pt", dataset="digitz")
    for mean, std in ((float("nan"), 1), (0, float("inf"))):
        assert "give 1 number joined" in refused(
            ask, "dm.pt", space=(*normalised, "--mean", mean, "--std", std)
        )
    assert "they are for --space normalised" in refused(ask, "dm.pt", space=(*PIXELS, "--mean", 0))
    assert "three.pt: `data` holds other things than pairs" in refused(ask, "three.pt")
    assert "--experiment: bytes.safetensors holds one set" in refused(
        ask, "bytes.safetensors", "--experiment", 1
    )
    assert "images of whole numbers are no normalised ones" in refused(
        ask, "bytes.safetensors", space=(*normalised, "--mean", 0, "--std", 1)
    )
    said = ask("import", "bytes.safetensors", "--dataset", "digits", *PIXELS, "--out", "bytes.safetensors")
    assert said.code == 1 and "--out: bytes.safetensors is what is to be read" in said.words
    said = ask("import", "dm.pt", "--dataset", "digits", *PIXELS, "--out", "set.pt")
    assert said.code == 1 and "a distilled set is a file that ends in .safetensors" in said.words
