"""VOC 2007 and CUB-200-2011: small trees in exactly the official layouts, whole and damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ddsweep.catalog import DATASETS, DatasetSpec, TrialSpec
from ddsweep.data.fetch import fetch
from ddsweep.data.files import list_datasets, presence, require_files, resolve_dataset
from ddsweep.data.load import Splits, load_splits
from ddsweep.errors import DataError

from .conftest import pictures

VOC = DATASETS["voc2007"]
# Three of the two hundred birds, and small: the tests do not depend on the number.
CUB = replace(DATASETS["cub200"], classes=3, shape=(3, 8, 8))
SMALL = replace(VOC, shape=(3, 8, 8))

Object = tuple[str, tuple[Any, Any, Any, Any]]


def load(spec: DatasetSpec, root: Path) -> Splits:
    return load_splits(spec, root, validation_fraction=0.25, split_seed=0)


def fails(spec: DatasetSpec, root: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(spec, root)
    assert "\n" not in str(caught.value)


def save_jpeg(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "JPEG", quality=95)


def resized(path: Path, side: int, box: tuple[int, int, int, int] | None = None) -> npt.NDArray[np.uint8]:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image = image if box is None else image.crop(box)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


# ---------------------------------------------------------------------------------------------- VOC

OBJECT = """\t<object>
\t\t<name>{name}</name>
\t\t<pose>Left</pose>
\t\t<truncated>1</truncated>
\t\t<difficult>1</difficult>
\t\t<bndbox>
\t\t\t<xmin>{}</xmin>
\t\t\t<ymin>{}</ymin>
\t\t\t<xmax>{}</xmax>
\t\t\t<ymax>{}</ymax>
\t\t</bndbox>
\t\t<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
\t</object>
"""


def annotate(root: Path, name: str, objects: Sequence[Object], extra: str = "") -> Path:
    path = root / f"VOCdevkit/VOC2007/Annotations/{name}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    inside = "".join(OBJECT.format(*box, name=label) for label, box in objects)
    path.write_text(
        f"{extra}<annotation>\n\t<folder>VOC2007</folder>\n\t<filename>{name}.jpg</filename>\n"
        f"\t<size><width>20</width><height>16</height><depth>3</depth></size>\n{inside}</annotation>\n"
    )
    return path


def write_voc(root: Path) -> Path:
    """21 training images (the first with three objects of three classes, then one of each class) and 20 of
    test, each 20 wide and 16 high."""
    base = root / "VOCdevkit/VOC2007"
    (base / "ImageSets/Main").mkdir(parents=True)
    train = [f"{i:06d}" for i in range(1, 22)]
    test = [f"{i:06d}" for i in range(101, 121)]
    images = pictures(41, (16, 20, 3))[0]
    for name, image in zip((*train, *test), images, strict=True):
        save_jpeg(base / f"JPEGImages/{name}.jpg", image)
    three: list[Object] = [
        ("dog", (3, 2, 12, 9)),
        ("aeroplane", (1, 1, 20, 16)),
        ("person", (20, 16, 20, 16)),
    ]
    annotate(root, train[0], three)
    for names in (train[1:], test):
        for name, label in zip(names, VOC.class_names, strict=True):
            # Two objects in each training image, so that every class has enough to split.
            twice: list[Object] = [(label, (1, 1, 10, 10)), (label, (5, 5, 20, 16))]
            annotate(root, name, twice if names is not test else twice[:1])
    (base / "ImageSets/Main/trainval.txt").write_text("\n".join(train) + "\n")
    (base / "ImageSets/Main/test.txt").write_text("\n".join(test) + "\n")
    # As in the official tree; it is not read.
    (base / "ImageSets/Main/dog_trainval.txt").write_text("000001  1\n")
    (base / "SegmentationClass").mkdir()
    return root


@pytest.fixture(scope="session")
def voc_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("voc"))


@pytest.fixture
def voc(voc_template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(voc_template, tmp_path / "root"))


def test_every_box_is_an_image(voc: Path) -> None:
    spec = resolve_dataset("voc2007(size=8)", voc)
    splits = load(spec, voc)
    assert len(splits.train_labels) + len(splits.validation_labels) == 3 + 40
    assert splits.test_labels.tolist() == list(range(20))
    assert splits.class_names[11] == "dog" and splits.mean == (0.485, 0.456, 0.406)
    file = voc / "VOCdevkit/VOC2007/JPEGImages/000001.jpg"
    # The official coordinates count from 1 and include both ends.
    crops = {11: (2, 1, 12, 9), 0: (0, 0, 20, 16), 14: (19, 15, 20, 16)}
    both = [*zip(splits.train_labels.tolist(), splits.train_images.numpy(), strict=True)]
    both += zip(splits.validation_labels.tolist(), splits.validation_images.numpy(), strict=True)
    for label, box in crops.items():
        wanted = resized(file, 8, box)
        assert any(at == label and np.array_equal(image, wanted) for at, image in both), label


def test_voc_comes_at_224_pixels(voc: Path) -> None:
    splits = load(VOC, voc)
    assert splits.test_images.shape == (20, 3, 224, 224)
    file = voc / "VOCdevkit/VOC2007/JPEGImages/000101.jpg"
    assert np.array_equal(splits.test_images[0].numpy(), resized(file, 224, (0, 0, 10, 10)))
    # The split is one for every size: another resolution is the same images.
    small = load(resolve_dataset("voc2007(size=8)", voc), voc)
    assert splits.validation_labels.tolist() == small.validation_labels.tolist()
    assert splits.fingerprint != small.fingerprint


def test_voc_is_listed_required_and_not_fetched(voc: Path, tmp_path: Path) -> None:
    (row,) = (row for row in list_datasets(voc) if row.name == "voc2007")
    assert (row.status, row.where, row.classes) == ("present", "VOCdevkit/VOC2007", 20)
    require_files(VOC, voc)
    assert fetch("voc2007", voc) == voc / "VOCdevkit/VOC2007"
    archives = r"unpack VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar \(from the PASCAL VOC site\)"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"voc2007: nothing to fetch: {archives} into the data root"):
        fetch("voc2007", tmp_path / "empty")
    (voc / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").unlink()
    assert presence("voc2007", voc) == "missing: VOCdevkit/VOC2007/ImageSets/Main/test.txt"
    with pytest.raises(DataError, match=rf"Main/test.txt is missing; {archives}"):
        require_files(VOC, voc)
    shutil.rmtree(voc / "VOCdevkit/VOC2007/Annotations")
    (voc / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").write_text("000101\n")
    assert presence("voc2007", voc) == "missing: VOCdevkit/VOC2007/Annotations"


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("objects", "extra", "message"),
    [
        (
            [("unicorn", (1, 1, 5, 5))],
            "",
            "000003.xml: object 1: 'unicorn' is not a class of VOC; classes are aero",
        ),
        ([("", (1, 1, 5, 5))], "", "000003.xml: object 1: '' is not a class of VOC"),
        (
            [("dog", (1, 1, 5, "five"))],
            "",
            "000003.xml: object 1: bndbox has no numbers xmin, ymin, xmax, ymax",
        ),
        ([("dog", (1, 1, 5, "nan"))], "", "bndbox has no numbers"),
        ([("dog", (1, 1, 5, "inf"))], "", "bndbox has no numbers"),
        (
            [("cat", (1, 1, 5, 5)), ("dog", (6, 1, 5, 5))],
            "",
            "object 2: box x 6 to 5, y 1 to 5 is empty or not",
        ),
        ([("dog", (0, 1, 5, 5))], "", "box x 0 to 5, y 1 to 5 is .*; the first pixel is 1"),
        (
            [("dog", (1, 1, 21, 5))],
            "",
            "000003.jpg: box x 1 to 21, .*the image, which is 20 wide and 16 high",
        ),
        ([("dog", (1, 1, 5, 17))], "", "000003.jpg: box x 1 to 5, y 1 to 17 is empty or not inside"),
        (
            [("dog", (1, 1, 5, 5))],
            BOMB,
            "000003.xml: an annotation that declares a document type is none of VOC",
        ),
        ([("dog", (1, 1, 5, 5))], "<" * 10, "000003.xml: the annotation cannot be read: not well-formed"),
        (
            [("dog", (1, 1, 5, 5))],
            f"<!--{'x' * 2**20}-->",
            "000003.xml: an annotation of more than 1048576 bytes",
        ),
    ],
)
def test_broken_annotations(voc: Path, objects: Sequence[Object], extra: str, message: str) -> None:
    annotate(voc, "000003", objects, extra)
    fails(SMALL, voc, message)


def test_other_damage_to_voc(voc: Path) -> None:
    base = voc / "VOCdevkit/VOC2007"
    annotation, image = base / "Annotations/000003.xml", base / "JPEGImages/000003.jpg"
    content = annotation.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content.replace(b"VOC2007", b"\xff\xfe")):
        annotation.write_bytes(damaged)
        fails(SMALL, voc, "dataset voc2007: .*000003.xml: the annotation cannot be read")
    annotation.unlink()
    fails(SMALL, voc, "000003.xml is missing, but .*trainval.txt names it; unpack VOCtrainval")
    annotation.write_bytes(content)
    pixels = image.read_bytes()
    image.write_bytes(pixels[: len(pixels) // 2])
    fails(SMALL, voc, "000003.jpg: the image cannot be read: .*trainval.txt")
    image.unlink()
    fails(SMALL, voc, r"000003.jpg is missing \(named by .*trainval.txt\)")
    image.write_bytes(pixels)
    trainval = base / "ImageSets/Main/trainval.txt"
    names = trainval.read_text()
    trainval.write_text(names + "999999\n")
    fails(SMALL, voc, "Annotations/999999.xml is missing, but .*trainval.txt names it")
    trainval.write_text(names + "../../secret\n")
    fails(SMALL, voc, r"trainval.txt: '../../secret' is not an image's name")
    trainval.write_text(names + "000003\n")
    fails(SMALL, voc, "trainval.txt: an image is named twice")
    trainval.write_text(names + "000101\n")
    fails(SMALL, voc, "image 000101 is in both trainval and test")
    trainval.write_text("")
    fails(SMALL, voc, "trainval.txt: the list is empty; unpack VOC")


# ---------------------------------------------------------------------------------------------- CUB


def write_cub(root: Path, classes: int, train: int = 3) -> Path:
    """``train`` training images and one of test per class, 12 wide and 10 high; the first image is grey."""
    base = root / "CUB_200_2011"
    base.mkdir(parents=True)
    lists: dict[str, list[str]] = {
        name: [] for name in ("images", "image_class_labels", "train_test_split", "classes")
    }
    number = 0
    for label in range(1, classes + 1):
        name = f"{label:03d}.Bird_of_Kind_{label}"
        lists["classes"].append(f"{label} {name}")
        for i in range(train + 1):
            number += 1
            pixels = pictures(1, (10, 12) if number == 1 else (10, 12, 3), seed=number)[0][0]
            save_jpeg(base / f"images/{name}/Bird_{i:04d}_{number}.jpg", pixels)
            lists["images"].append(f"{number} {name}/Bird_{i:04d}_{number}.jpg")
            lists["image_class_labels"].append(f"{number} {label}")
            lists["train_test_split"].append(f"{number} {int(i != 1)}")
    for name, lines in lists.items():
        (base / f"{name}.txt").write_text("\n".join(lines) + "\n")
    # As in the official tree; not read.
    (base / "bounding_boxes.txt").write_text("1 60.0 27.0 325.0 304.0\n")
    return root


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    return write_cub(tmp_path / "root", 3)


def test_birds(cub: Path) -> None:
    splits = load(CUB, cub)
    assert splits.class_names == ("Bird_of_Kind_1", "Bird_of_Kind_2", "Bird_of_Kind_3")
    assert splits.test_labels.tolist() == [0, 1, 2]
    assert (len(splits.train_labels), len(splits.validation_labels)) == (6, 3)
    birds = cub / "CUB_200_2011/images"
    for row, file in enumerate(("001.Bird_of_Kind_1/Bird_0001_2.jpg", "002.Bird_of_Kind_2/Bird_0001_6.jpg")):
        assert np.array_equal(splits.test_images[row].numpy(), resized(birds / file, 8))
    grey = birds / "001.Bird_of_Kind_1/Bird_0000_1.jpg"
    with Image.open(grey) as image:
        assert image.mode == "L"
    images = np.concatenate([splits.train_images.numpy(), splits.validation_images.numpy()])
    (found,) = (item for item in images if np.array_equal(item, resized(grey, 8)))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    assert splits.mean == (0.4785, 0.4993, 0.4022) and splits.std == (0.2321, 0.2277, 0.2665)


def test_two_hundred_classes_at_64_pixels(tmp_path: Path) -> None:
    """``size`` is what the files are resized to: once, and not to 224 pixels before."""
    root = write_cub(tmp_path / "root", 200, train=2)
    spec = resolve_dataset("cub200(size=64)", root)
    splits = load(spec, root)
    assert splits.test_images.shape == (200, 3, 64, 64) and len(splits.class_names) == 200
    file = root / "CUB_200_2011/images/200.Bird_of_Kind_200/Bird_0001_599.jpg"
    assert np.array_equal(splits.test_images[199].numpy(), resized(file, 64))
    assert TrialSpec(spec).trial_id != TrialSpec(DATASETS["cub200"]).trial_id


def test_cub_is_listed_required_and_not_fetched(cub: Path, tmp_path: Path) -> None:
    (row,) = (row for row in list_datasets(cub) if row.name == "cub200")
    assert (row.status, row.where, row.classes) == ("present", "CUB_200_2011", 200)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"nothing to fetch: unpack CUB_200_2011.tgz .*missing: .*images.txt"):
        fetch("cub200(size=64)", tmp_path / "empty")
    (cub / "CUB_200_2011/train_test_split.txt").unlink()
    assert presence("cub200", cub) == "missing: CUB_200_2011/train_test_split.txt"
    fails(CUB, cub, "train_test_split.txt is missing; unpack CUB_200_2011.tgz .* into the data root")
    with pytest.raises(DataError, match="data root not given"):
        require_files(CUB, None)


def without_last(text: str) -> str:
    return text.rsplit("\n", 2)[0] + "\n"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("images", without_last, "images.txt has no image 12, but image_class_labels.txt has"),
        ("image_class_labels", without_last, "image_class_labels.txt has no image 12, but images.txt has"),
        (
            "train_test_split",
            without_last,
            "train_test_split.txt has no image 12, but images.txt has; unpack",
        ),
        (
            "train_test_split",
            lambda text: text + "99 1\n",
            "images.txt has no image 99, but train_test_split.txt",
        ),
        (
            "train_test_split",
            lambda text: text.replace("5 1", "5 2"),
            "image 5: '2' is not a whole number from 0 to 1",
        ),
        ("image_class_labels", lambda text: text.replace("5 2", "5 4"), "image 5: '4' is not .* from 1 to 3"),
        (
            "image_class_labels",
            lambda text: text.replace("5 2", "five 2"),
            "line 5: 'five 2' is not a new number",
        ),
        (
            "images",
            lambda text: text + "1 twice.jpg\n",
            "images.txt: line 13: '1 twice.jpg' is not a new number",
        ),
        ("images", lambda text: text.replace("5 002", "5 ../002"), "images.txt: image 5: '../002"),
        (
            "images",
            lambda text: text.replace("_5.jpg", "_55.jpg"),
            r"_55.jpg is missing \(image 5 of images.txt\)",
        ),
        ("classes", without_last, "classes.txt: 2 classes, not those numbered 1 to 3"),
        (
            "train_test_split",
            lambda text: text.replace(" 0", " 1"),
            "class 'Bird_of_Kind_1' has no images in test",
        ),
    ],
)
def test_lists_that_do_not_fit(cub: Path, name: str, change: Callable[[str], str], message: str) -> None:
    path = cub / f"CUB_200_2011/{name}.txt"
    path.write_text(change(path.read_text()))
    fails(CUB, cub, message)


def test_a_damaged_bird(cub: Path) -> None:
    (file,) = (cub / "CUB_200_2011/images").rglob("*_7.jpg")
    file.write_bytes(file.read_bytes()[:200])
    fails(CUB, cub, r"_7.jpg: the image cannot be read: .*\(image 7 of images.txt\)")
    (cub / "CUB_200_2011/images.txt").write_bytes(b"1 \xff\n")
    fails(CUB, cub, "images.txt cannot be read")
