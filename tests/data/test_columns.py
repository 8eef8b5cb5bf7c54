"""Parquet files as people have them: other columns, labels as text or from 1, names in the metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddsweep.catalog import DatasetSpec, TrialSpec
from ddsweep.data.files import resolve_dataset
from ddsweep.data.load import load_splits
from ddsweep.errors import DataError

from .conftest import pictures, png

OWN = {"source": "parquet", "path": "own"}
LABELS = [i % 4 for i in range(20)]
Table = dict[str, Any]


def encoded(seed: int, *, plain: bool = False) -> pa.Array:
    contents = [png(image) for image in pictures(20, (6, 6, 3), seed=seed)[0]]
    if plain:
        return pa.array(contents, pa.binary())
    return pa.array([{"bytes": content, "path": None} for content in contents])


def write(root: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> None:
    """``train-0`` and ``train-1``, and ``test``, each of 20 rows. A column that is a function gets the number
    of its file; ``image`` is made unless it is given."""
    (root / "own").mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(("train-0", "train-1", "test")):
        made = {key: value(number) if callable(value) else value for key, value in columns.items()}
        table = pa.table({"image": encoded(number), **made} if not {"img", "picture"} & made.keys() else made)
        if features:
            metadata = {"huggingface": json.dumps({"info": {"features": features}})}
            table = table.replace_schema_metadata(metadata)
        pq.write_table(table, root / f"own/{name}.parquet")


def read(root: Path, **changes: Any) -> tuple[DatasetSpec, list[int]]:
    """The data set, and the labels of its test part; the pixels are those that were written."""
    spec = resolve_dataset({**OWN, **changes}, root)
    splits = load_splits(spec, root, validation_fraction=0.1, split_seed=0)
    assert np.array_equal(
        splits.test_images.numpy(), pictures(20, (6, 6, 3), seed=2)[0].transpose(0, 3, 1, 2)
    )
    assert len(splits.train_labels) + len(splits.validation_labels) == 40
    assert splits.class_names == spec.class_names
    assert DatasetSpec(**TrialSpec.from_dict(TrialSpec(spec).to_dict()).dataset.__dict__) == spec
    return spec, splits.test_labels.tolist()


CLASSES = ("apple", "bear", "cup", "dolphin")
TEXTS = [CLASSES[label] for label in LABELS]
FROM_ONE = [label + 1 for label in LABELS]


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ({"img": encoded, "fine_label": LABELS}, "0123"),
        ({"img": encoded, "label": LABELS, "coarse_label": LABELS, "id": LABELS}, "0123"),
        ({"picture": lambda i: encoded(i, plain=True), "kind": LABELS}, "0123"),
        ({"label": pa.array(LABELS, pa.uint64())}, "0123"),
        ({"label": TEXTS}, CLASSES),
        ({"label": pa.array(TEXTS).dictionary_encode()}, CLASSES),
        ({"label": [str(label * 5) for label in LABELS]}, ("0", "5", "10", "15")),
        ({"label": FROM_ONE}, "1234"),
    ],
)
def test_columns_and_labels_as_people_have_them(columns: Table, names: Any, tmp_path: Path) -> None:
    write(tmp_path, columns)
    spec, labels = read(tmp_path)
    assert (spec.class_names, spec.classes, labels) == (tuple(names), 4, LABELS)
    assert (spec.name, spec.shape) == ("own", (3, 6, 6))


def test_truth_values_are_two_classes(tmp_path: Path) -> None:
    write(tmp_path, {"label": [bool(i % 2) for i in range(20)]})
    assert read(tmp_path)[1] == [i % 2 for i in range(20)]


def test_labels_from_one_are_said_and_may_be_counted(tmp_path: Path) -> None:
    write(tmp_path, {"label": FROM_ONE})
    spec, labels = read(tmp_path, classes=4, class_names=list("abcd"))
    assert (spec.class_names, labels, spec.first_label) == (tuple("abcd"), LABELS, 1)
    assert spec.survey and [str(item) for item in spec.survey.remarks] == [
        "labels begin at 1, so label 1 is class 0"
    ]
    with pytest.raises(DataError, match=r"class '0' has no images in train"):
        resolve_dataset({**OWN, "classes": 5}, tmp_path)


def test_names_of_classes_in_the_metadata(tmp_path: Path) -> None:
    named = {"_type": "ClassLabel", "names": list(CLASSES)}
    features: dict[str, Any] = {"picture": {"_type": "Image"}, "species": named, "n": {"dtype": "int64"}}
    columns = {"picture": encoded, "thumb": encoded, "species": LABELS, "n": LABELS}
    write(tmp_path, columns, features)
    assert read(tmp_path)[0].class_names == CLASSES
    assert read(tmp_path, class_names=list("abcd"))[0].class_names == tuple("abcd")
    write(tmp_path, columns, {**features, "species": {**named, "names": [*CLASSES, "elk"]}})
    spec = read(tmp_path)[0]
    assert spec.class_names == CLASSES and spec.survey
    assert str(spec.survey.remarks[0]) == (
        "classes of the metadata, left out because labels only go up to 3: 1 (elk)"
    )
    write(tmp_path, columns, {**features, "species": {**named, "names": ["apple"]}})
    spec = read(tmp_path)[0]
    assert spec.class_names == tuple("0123") and spec.survey
    assert str(spec.survey.remarks[0]).startswith(
        "names of classes in the metadata, not used because labels go up"
    )


def test_files_that_name_their_classes_otherwise_are_refused(tmp_path: Path) -> None:
    """The same number would be another class."""
    named = {"_type": "ClassLabel", "names": list(CLASSES)}
    write(tmp_path, {"label": LABELS}, {"label": named})
    table = pq.read_table(tmp_path / "own/test.parquet")
    features = {"label": {**named, "names": list(CLASSES[::-1])}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "own/test.parquet")
    with pytest.raises(
        DataError, match=r"test.parquet: column 'label' has other classes than that of \S+train-0"
    ):
        resolve_dataset(OWN, tmp_path)


def test_one_of_several_columns_is_named(tmp_path: Path) -> None:
    coarse = [label // 2 for label in LABELS]
    write(tmp_path, {"img": encoded, "small": encoded, "fine_label": LABELS, "coarse_label": coarse})
    with pytest.raises(
        DataError, match=r"several columns may be the image: img, small; .* image_column: img"
    ):
        resolve_dataset(OWN, tmp_path)
    fine, labels = read(tmp_path, image_column="img")
    assert labels == LABELS
    other, labels = read(tmp_path, image_column="img", label_column="coarse_label")
    assert labels == coarse and other.fingerprint != fine.fingerprint
    small = resolve_dataset({**OWN, "image_column": "small"}, tmp_path)
    assert small.fingerprint not in (fine.fingerprint, other.fingerprint)
    write(tmp_path, {"img": encoded, "a": LABELS, "b": LABELS})
    with pytest.raises(DataError, match=r"several columns may be the label: a, b; .* label_column: a"):
        resolve_dataset(OWN, tmp_path)


def test_text_in_the_order_of_class_names(tmp_path: Path) -> None:
    write(tmp_path, {"label": TEXTS})
    plain = read(tmp_path)[0]
    spec, labels = read(tmp_path, class_names=list(CLASSES[::-1]))
    assert labels == [3 - label for label in LABELS] and spec.fingerprint != plain.fingerprint


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        (
            {"img": [1] * 20, "label": LABELS},
            {},
            r"no column of images \(bytes of encoded images, or struct<bytes: binary, path: string>\); col"
            r"umns are img \(int64\), label \(int64\); image_column names the one to read",
        ),
        (
            {"image": [1] * 20, "label": LABELS},
            {},
            "column 'image' is int64, not bytes of encoded images, or str",
        ),
        ({"label": LABELS}, {"image_column": "img"}, "no column 'img'; columns are image "),
        ({"label": [0.5] * 20}, {}, "column 'label' is double, not whole numbers or text"),
        ({"target": [0.5] * 20}, {}, r"no column of labels \(whole numbers or text\); columns are image "),
        ({"label": ["cat"] * 20}, {}, "column 'label' has 1 class; at least 2 are needed"),
        ({"label": LABELS}, {"label_column": "kind"}, "no column 'kind'; columns are image "),
        (
            {"label": TEXTS},
            {"classes": 5},
            "classes is 5, but column 'label' has 4 different labels in train",
        ),
        (
            {"label": lambda i: TEXTS if i < 2 else [*TEXTS[:-1], "elk"]},
            {},
            r"test.parquet: row 19: label elk is none of the classes \(apple, bear, cup, dolphin\)$",
        ),
        (
            {"label": lambda i: LABELS if i < 2 else [-1] * 20},
            {},
            r"1. 20 labels are not classes: test.parquet: row 0: label -1 is out of range \(0 to 3\)"
            r"; .*; and 10 more\n  2. 4 of 4 classes have no images in test: 0, 1, 2, 3$",
        ),
        (
            {"label": lambda i: [f"caption {i} {row}" for row in range(20)]},
            {},
            r"column 'label' has 40 different texts in 40 training images, too many to be classes; label_",
        ),
        (
            {"label": lambda i: [*LABELS[:-1], None]},
            {},
            "3 labels are null: train-0.parquet: row 19: the label",
        ),
    ],
)
def test_columns_that_cannot_be_read_are_refused_with_the_way_out(
    columns: Table, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, columns)
    with pytest.raises(DataError, match=message):
        resolve_dataset({**OWN, **changes}, tmp_path)


def test_a_name_that_two_columns_have_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"label": LABELS})
    for path in (tmp_path / "own").iterdir():
        table = pq.read_table(path)
        pq.write_table(table.append_column("label", table["label"]), path)
    with pytest.raises(DataError, match=r"several columns are called 'label'; rename one"):
        resolve_dataset(OWN, tmp_path)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    bad = pa.array([b"\xff\xfe%d" % label for label in LABELS], pa.binary()).view(pa.string())
    write(tmp_path, {"label": bad})
    with pytest.raises(DataError, match=r"train-0\.parquet: not a readable parquet file .*utf-8"):
        resolve_dataset(OWN, tmp_path)


def test_files_go_by_pattern(tmp_path: Path) -> None:
    write(tmp_path, {"label": LABELS})
    plain = read(tmp_path)[0]
    named = resolve_dataset(
        {**OWN, "train": ["train-0.parquet", "train-1.parquet"], "test": "test*"}, tmp_path
    )
    assert named.fingerprint == plain.fingerprint
    (tmp_path / "own/test.parquet").rename(tmp_path / "own/validation.parquet")
    with pytest.raises(
        DataError,
        match=r"no file in \S+own matches test: test\*.parquet; there is train-0.parquet, train-1.parquet, "
        r"validation.parquet; give test as file names, patterns such as test-\*.parquet, or numbers of sha",
    ):
        resolve_dataset(OWN, tmp_path)
