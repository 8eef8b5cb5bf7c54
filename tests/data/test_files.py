from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddsweep.catalog import DATASETS
from ddsweep.data.files import data_root as find_root
from ddsweep.data.files import list_datasets, presence, resolve_dataset
from ddsweep.errors import DataError, SettingError

from .conftest import pictures, write_parquet


def inline(**changes: Any) -> dict[str, Any]:
    return {"source": "parquet", "path": "cifar10", "train": [0, 1, 2, 3], "test": [4], **changes}


FOLDER = {"source": "folder", "path": "pets"}


def test_data_root_is_the_flag_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDSWEEP_DATA", "/from/environment")
    assert find_root("given") == Path("given")
    assert find_root(None) == Path("/from/environment")
    monkeypatch.setenv("DDSWEEP_DATA", "")
    assert find_root(None) is None


def test_names_resolve_to_the_catalog_without_a_root() -> None:
    for name in ("digits", "mnist", "fashion_mnist", "usps", "cifar10"):
        assert resolve_dataset(name, None) == DATASETS[name]


def test_cifar10_exact_gets_a_fingerprint(data_root: Path) -> None:
    spec = resolve_dataset("cifar10-exact", data_root)
    assert spec.name == "cifar10-exact" and len(spec.fingerprint) == 32
    if (data_root / "README.md").exists():  # the real shards: a change here changes ids of trials
        assert spec.fingerprint == "afc381b5e311c6721a97bfaa8c251097"


def test_inline_infers_shape_and_classes(tiny: Path) -> None:
    spec = resolve_dataset(inline(), tiny)
    assert (spec.shape, spec.classes) == ((3, 32, 32), 10)
    assert spec.class_names == tuple("0123456789")
    assert spec.name == "parquet-cifar10"  # there is a cifar10 in the catalog
    assert spec.fingerprint == resolve_dataset("cifar10-exact", tiny).fingerprint
    named = resolve_dataset(inline(name="mine", mean=[0.1] * 3, std=[1, 1, 1]), tiny)
    assert (named.name, named.std) == ("mine", (1.0, 1.0, 1.0))


def test_numbers_may_be_spelt_as_in_settings(tiny: Path) -> None:
    """YAML reads 5e-1 as text, and 16.0 as no whole number."""
    plain = {"shape": [3, 32, 32], "classes": 10, "size": 16, "mean": [0.5] * 3, "std": [1.0] * 3}
    spelt = {
        **{"shape": [3.0, "32", "3.2e1"], "classes": "1e1", "size": 16.0, "channels": 3.0},
        **{"mean": ["5e-1"] * 3, "std": ["1e0"] * 3, "train": [0.0, 1, 2, 3], "test": 4.0},
    }
    assert resolve_dataset(inline(**spelt), tiny) == resolve_dataset(inline(**plain), tiny)


def test_fingerprint_is_of_the_content_and_its_roles(tiny: Path) -> None:
    first = resolve_dataset(inline(), tiny)
    shutil.copytree(tiny / "cifar10", tiny / "elsewhere")
    (tiny / "elsewhere/train-00004-of-00005.parquet").rename(tiny / "elsewhere/last.parquet")
    names = [f"train-0000{i}-of-00005.parquet" for i in range(4)]
    moved = resolve_dataset(inline(path="elsewhere", train=names, test="last.parquet"), tiny)
    assert moved.fingerprint == first.fingerprint
    absolute = resolve_dataset(inline(path=str(tiny / "cifar10")), None)
    assert absolute.fingerprint == first.fingerprint
    others = {
        resolve_dataset(inline(**change), tiny).fingerprint
        for change in ({"train": [1, 0, 2, 3]}, {"train": [0, 1, 2]}, {"train": [0, 1, 2, 4], "test": [3]})
    }
    assert len(others | {first.fingerprint}) == 4
    write_parquet(tiny / "cifar10/train-00004-of-00005.parquet", *pictures(20, (32, 32, 3), seed=77))
    assert resolve_dataset(inline(), tiny).fingerprint != first.fingerprint


def test_folder_infers_and_fingerprints(make_folder: Any) -> None:
    root = make_folder()
    spec = resolve_dataset(FOLDER, root)
    assert (spec.shape, spec.classes, spec.class_names) == ((3, 6, 6), 2, ("cat", "dog"))
    assert spec.name == "pets"
    (root / "pets").rename(root / "beasts")
    assert resolve_dataset({**FOLDER, "path": "beasts"}, root).fingerprint == spec.fingerprint
    for role in ("train", "test"):
        (root / "beasts" / role / "dog").rename(root / "beasts" / role / "wolf")
    assert resolve_dataset({**FOLDER, "path": "beasts"}, root).fingerprint != spec.fingerprint
    make_folder("grey", (5, 5))
    assert resolve_dataset({**FOLDER, "path": "grey"}, root).shape == (1, 5, 5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "minst",
            r"unknown data set 'minst' \(did you mean mnist\?\); known are digits, mnist, .*cifar10-exact",
        ),
        (7, "expected a name or a mapping, got 7"),
        (inline(trian=[0]), r"unknown key 'trian' \(did you mean train\?\); allowed are source, path, train"),
        (inline(source="hdf5"), "source is one of parquet, folder, not 'hdf5'"),
        (inline(path=3), "path must be a text"),
        (inline(train=[]), "train is missing or empty: say which shard numbers or file names"),
        (inline(train=[-1]), "train is a list of shard numbers or file names, and -1 is not one"),
        (inline(train=[True]), "and True is not one"),
        ({**FOLDER, "test": [4]}, "test is a list of folder names, and 4 is not one"),
        (inline(shape=[32, 32, 3]), r"shape is \[channels, height, width\] with 1 or 3 channels"),
        (inline(shape=32), r"shape is \[channels, height, width\]"),
        (inline(classes=1), "classes must be a whole number of at least 2"),
        (inline(classes="ten"), "classes must be a whole number of at least 2, not 'ten'"),
        (inline(class_names=["a", "a"]), "class_names has a name twice"),
        (inline(class_names="ab"), "class_names must be a list of at least 2 texts"),
        (inline(class_names=["a", "b"], classes=3), "classes is 3, but class_names has 2"),
        (inline(mean=[0.5]), "mean and std go together"),
        (inline(mean=[0.5], std=["1e-3x"]), "std must be a list of numbers"),
        (inline(mean=[0.5], std=["inf"]), "std must be a list of numbers"),
        (inline(mean=[True], std=[1]), "mean must be a list of numbers"),
        (inline(size=28.5), "size must be a whole number, not 28.5"),
        (inline(shape=[3, 32, True]), r"shape is \[channels, height, width\]"),
        (inline(shape=[3, 32, 0]), r"shape is \[channels, height, width\]"),
        (inline(mean=[0.5], std=[0]), "std must be above 0"),
        (inline(mean=[0.5], std=[1]), "mean and std have 1 values, but images have 3 channels"),
        (inline(name="mnist"), "the name 'mnist' is taken by the catalog"),
    ],
)
def test_wrong_settings_say_what_is_allowed(tiny: Path, value: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        resolve_dataset(value, tiny)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (inline(test=[3, 4]), r"train-00003-of-00005.parquet is in both train and test"),
        (inline(test="train-00000-of-00005.parquet"), "is in both train and test"),
        (inline(train=[0, 0]), "is twice in train"),
        (inline(test=[5]), r"test asks for shard 5, but .*cifar10 holds 5 \*.parquet files \(0 to 4\)"),
        (inline(test=["gone.parquet"]), "test file .*gone.parquet is missing; put the files there"),
        (inline(path="nowhere"), "folder .*nowhere is missing; put the files there"),
    ],
)
def test_missing_and_doubled_shards(tiny: Path, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve_dataset(value, tiny)


def test_a_copy_of_a_training_shard_is_no_test_set(tiny: Path) -> None:
    shutil.copy(tiny / "cifar10/train-00000-of-00005.parquet", tiny / "cifar10/copy.parquet")
    with pytest.raises(DataError, match=r"copy.parquet is in both train and test: it equals .*train-00000"):
        resolve_dataset(inline(train=["train-00000-of-00005.parquet"], test=["copy.parquet"]), tiny)


@pytest.mark.parametrize("value", ["cifar10-exact", inline()])
def test_no_data_root(value: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data root not given: pass --data-root or set DDSWEEP_DATA"):
        resolve_dataset(value, None)
    with pytest.raises(DataError, match=r"data root .*gone is not a folder"):
        resolve_dataset(value, tmp_path / "gone")


def test_inline_parquet_that_cannot_be_read(tiny: Path) -> None:
    file = tiny / "cifar10/train-00000-of-00005.parquet"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DataError, match=r"train-00000-of-00005.parquet: not a readable parquet file"):
        resolve_dataset(inline(), tiny)
    write_parquet(file, [b"no png", *pictures(9, (8, 8))[0]], range(10))
    with pytest.raises(
        DataError, match=r"train-00000-of-00005.parquet: row 0: .*cannot be read: not an image"
    ):
        resolve_dataset(inline(), tiny)
    write_parquet(file, pictures(10, (8, 8))[0], [-1, *range(9)])
    with pytest.raises(DataError, match=r"row 0: label -1 is out of range"):
        resolve_dataset(inline(), tiny)
    write_parquet(file, [], [])
    with pytest.raises(DataError, match=r"the file has no rows"):
        resolve_dataset(inline(), tiny)


def test_folders_that_cannot_be_used(make_folder: Any) -> None:
    root = make_folder()
    pets = root / "pets"
    with pytest.raises(DataError, match=r"in both train and test"):
        resolve_dataset({**FOLDER, "test": ["train"]}, root)
    with pytest.raises(DataError, match=r"valid is missing; .*pets has test, train; `train` and `test` of a"):
        resolve_dataset({**FOLDER, "test": ["valid"]}, root)
    with pytest.raises(DataError, match=r"classes is 3, but there are 2 class folders"):
        resolve_dataset({**FOLDER, "classes": 3}, root)
    (pets / "test/horse").mkdir()
    with pytest.raises(
        DataError, match=r"test has a folder 'horse' .* that is not a class; classes are cat, dog"
    ):
        resolve_dataset(FOLDER, root)
    (pets / "train/horse").mkdir()
    with pytest.raises(DataError, match=r"class 'horse' has no images in train"):
        resolve_dataset(FOLDER, root)
    for role in ("train", "test"):
        shutil.rmtree(pets / role / "horse")
    shutil.rmtree(pets / "test/dog")
    with pytest.raises(DataError, match=r"class 'dog' has no images in test"):
        resolve_dataset(FOLDER, root)
    shutil.rmtree(pets / "train/dog")
    with pytest.raises(DataError, match=r"pets: train holds 1 class folder, at least 2 needed"):
        resolve_dataset(FOLDER, root)


def test_data_list_says_what_is_there(tiny: Path) -> None:
    rows = {row.name: row for row in list_datasets(tiny)}
    assert list(rows) == list(DATASETS)
    assert (rows["digits"].status, rows["digits"].where) == ("embedded", "scikit-learn")
    assert rows["mnist"].status == rows["usps"].status == rows["cifar10-exact"].status == "present"
    assert rows["cifar10"].status == "missing: cifar-10-batches-py/data_batch_1"
    assert (rows["mnist"].shape, rows["mnist"].classes, rows["mnist"].where) == ((1, 28, 28), 10, "MNIST/raw")
    (tiny / "cifar10/train-00004-of-00005.parquet").unlink()
    assert presence("cifar10-exact", tiny).startswith("missing: test asks for shard 4, but")
    shutil.rmtree(tiny / "cifar10")
    assert presence("cifar10-exact", tiny) == f"missing: folder {tiny / 'cifar10'} is missing"
    assert presence("mnist", None).startswith(
        "missing: no data root (--data-root or DDSWEEP_DATA); `ddsweep data"
    )
    with pytest.raises(SettingError, match=r"unknown data set"):
        presence("svnh", tiny)


def test_images_of_16_bits_are_refused(make_folder: Any) -> None:
    from PIL import Image

    root = make_folder()
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(root / "pets/train/cat/00.png")
    with pytest.raises(DataError, match=r"00.png: pixel mode I;16 is not 8 bits per channel"):
        resolve_dataset(FOLDER, root)
