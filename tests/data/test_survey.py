"""Own data are checked before use: refusals, remarks, and reading."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddsweep.catalog import DatasetSpec
from ddsweep.data import survey as survey_module
from ddsweep.data.files import resolve_dataset
from ddsweep.data.load import Splits, load_splits
from ddsweep.errors import DataError

from .conftest import pictures, png, write_idx, write_parquet

PETS = {"source": "folder", "path": "pets"}
MakeFolder = Callable[..., Path]


def look(root: Path, **changes: Any) -> DatasetSpec:
    return resolve_dataset({**PETS, **changes}, root)


def load(spec: DatasetSpec | dict[str, Any], root: Path) -> Splits:
    spec = spec if isinstance(spec, DatasetSpec) else resolve_dataset(spec, root)
    return load_splits(spec, root, validation_fraction=0.1, split_seed=0)


def said(spec: DatasetSpec) -> list[str]:
    """The remarks."""
    assert spec.survey is not None
    return [str(remark) for remark in spec.survey.remarks]


def refusal(root: Path, value: dict[str, Any] = PETS, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        resolve_dataset({**value, **changes}, root)
    return str(caught.value)


def image(seed: int, mode: str = "RGB", size: tuple[int, int] = (6, 6)) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (*size[::-1], bands) if bands > 1 else size[::-1]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


# ------------------------------------------------------------------------- train and test the same


def _linked(train: Path, test: Path) -> None:
    for file in sorted(train.rglob("*.png")):
        target = test / file.relative_to(train)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file)


def _other_names(train: Path, test: Path) -> None:
    shutil.copytree(train, test)
    for number, file in enumerate(sorted(test.rglob("*.png"))):
        file.rename(file.with_name(f"z{number}.png"))


def _encoded_anew(train: Path, test: Path) -> None:
    for file in sorted(train.rglob("*.png"))[::2]:
        target = test / file.relative_to(train).with_suffix(".bmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).save(target)


@pytest.mark.parametrize("way", [shutil.copytree, _linked, _other_names, _encoded_anew])
def test_test_images_that_are_all_in_train_are_refused(
    way: Callable[[Path, Path], None], make_folder: MakeFolder
) -> None:
    root = make_folder()
    shutil.rmtree(root / "pets/test")
    way(root / "pets/train", root / "pets/test")
    assert re.search(
        r"dataset pets in \S+/pets: all \d test images are in train too, .*: test/cat/\S+ equals train/",
        refusal(root),
    )


def test_shards_of_the_same_rows_are_refused(tiny: Path) -> None:
    """In another order, and so with other bytes."""
    images, labels = pictures(20, (32, 32, 3), seed=0)
    write_parquet(tiny / "cifar10/again.parquet", images[::-1], labels[::-1])
    value = {"source": "parquet", "path": "cifar10", "train": [1, 2], "test": "again.parquet"}
    assert f"dataset parquet-cifar10 in {tiny}/cifar10: all 20 test images are in train" in refusal(
        tiny, value
    )
    assert resolve_dataset({**value, "train": [2, 3]}, tiny).survey


def test_idx_files_of_the_same_images_are_refused(tiny: Path) -> None:
    """A set of the catalog is looked at when it is read."""
    images, labels = pictures(40, (28, 28), seed=4)
    write_idx(tiny / "MNIST/raw/t10k-images-idx3-ubyte", images[:20])
    write_idx(tiny / "MNIST/raw/t10k-labels-idx1-ubyte", labels[:20])
    with pytest.raises(
        DataError, match=r"dataset mnist: all 20 test images .* are in train .*would say nothing"
    ):
        load(resolve_dataset("mnist", tiny), tiny)
    fresh = pictures(20, (28, 28), seed=9)[0]
    write_idx(tiny / "MNIST/raw/t10k-images-idx3-ubyte", np.concatenate([images[:3], fresh[3:]]))
    assert load(resolve_dataset("mnist", tiny), tiny).test_in_train == 3


def test_test_images_of_which_some_are_in_train_are_counted(make_folder: MakeFolder) -> None:
    root = make_folder()
    pets = root / "pets"
    shutil.copy(pets / "train/cat/00.png", pets / "test/cat/twin.png")
    shutil.copy(pets / "train/dog/01.png", pets / "train/dog/99.png")
    shutil.copy(pets / "train/dog/03.png", pets / "train/cat/stray.png")
    spec = look(root)
    assert said(spec) == [
        "test images that are in train too: 1 of 5 (test/cat/twin.png equals train/cat/00.png)",
        "training images that are there again: 1 of 10 (train/dog/99.png equals train/dog/01.png)",
        "training images that are there again with another label: 1 of 10 "
        "(train/dog/03.png equals train/cat/stray.png)",
    ]
    assert spec.survey is not None and load(spec, root).test_in_train == spec.survey.test_in_train == 1


# ------------------------------------------------------------------------------ channels and sizes


def test_a_folder_has_colour_if_any_image_has(make_folder: MakeFolder) -> None:
    root = make_folder()
    image(1, "L").save(root / "pets/train/cat/00.png")
    spec = look(root)
    assert spec.shape == (3, 6, 6)
    assert said(spec) == ["grey images, read as colour: 1 (train/cat/00.png)"]
    assert said(look(root, shape=[1, 6, 6]))[0].startswith(
        "colour images, read as grey because shape says so: 11 ("
    )


def test_parquet_files_have_colour_if_any_row_has(tiny: Path) -> None:
    images, labels = pictures(20, (32, 32, 3), seed=8)
    rows: list[Any] = list(images)
    rows[0] = images[0, :, :, 0]
    write_parquet(tiny / "cifar10/train-00000-of-00005.parquet", rows, labels)
    spec = resolve_dataset({"source": "parquet", "path": "cifar10", "train": [0, 1], "test": 4}, tiny)
    assert spec.shape == (3, 32, 32)
    assert said(spec) == ["grey images, read as colour: 1 (train-00000-of-00005.parquet: row 0)"]
    assert load(spec, tiny).train_images.shape[1:] == (3, 32, 32)


def test_images_of_several_sizes_are_resized_or_refused(make_folder: MakeFolder) -> None:
    root = make_folder()
    large = image(7, size=(20, 10))
    large.save(root / "pets/test/dog/large.png")
    assert re.search(
        r"images have 2 sizes, from 6x6 \(\S+\) to 10x20 \(\S+large.png\) pixels; give size: N", refusal(root)
    )
    spec = look(root, size=8)
    assert (spec.name, spec.shape, spec.native) == ("pets(size=8)", (3, 8, 8), (3, 0, 0))
    assert said(spec) == ["sizes of images, from 6x6 to 10x20, all resized: 2"]
    resized = np.asarray(large.resize((8, 8), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(load(spec, root).test_images[-1].numpy(), resized)
    for file in (root / "pets").rglob("*.png"):
        Image.open(file).convert("L").save(file)
    spec = look(root, size=8, channels=3)
    assert load(spec, root).test_images.shape == (5, 3, 8, 8) and spec.native == (1, 0, 0)


# --------------------------------------------------------------------------------------- what is read


def test_a_number_of_a_shard_is_its_place_by_number(tiny: Path) -> None:
    for number in range(12):
        write_parquet(tiny / f"many/shard-{number}.parquet", *pictures(20, (6, 6), seed=number))
    spec = resolve_dataset({"source": "parquet", "path": "many", "train": [0, 1, 2], "test": [11]}, tiny)
    splits = load(spec, tiny)
    rows = {image.tobytes() for image in (*splits.train_images.numpy(), *splits.validation_images.numpy())}
    expected = np.concatenate([pictures(20, (6, 6), seed=number)[0] for number in (0, 1, 2)])
    assert rows == {image.tobytes() for image in expected}
    pattern = {
        "source": "parquet",
        "path": "many",
        "train": "shard-?.parquet",
        "test": ["shard-1[01].parquet"],
    }
    named = {**pattern, "train": [f"shard-{i}.parquet" for i in range(10)], "test": [10, 11]}
    matched = resolve_dataset(pattern, tiny)
    assert matched.fingerprint == resolve_dataset(named, tiny).fingerprint != spec.fingerprint


def test_classes_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    for i, (role, label) in enumerate((role, label) for role in ("train", "test") for label in (0, 1, 2, 10)):
        for k in range(2):
            file = tmp_path / "pets" / role / str(label) / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image(10 * i + k).save(file)
    assert look(tmp_path).class_names == ("0", "1", "2", "10")


def test_nothing_in_a_folder_is_dropped_without_a_word(make_folder: MakeFolder) -> None:
    root = make_folder()
    cat = root / "pets/train/cat"
    image(20).save(cat / "a.jfif", "JPEG")
    image(21).save(cat / "b", "PNG")
    (cat / "more/yet").mkdir(parents=True)
    image(22).save(cat / "more/yet/c.png")
    image(23).save(root / "pets/train/loose.png")
    image(24).save(cat / ".hidden.png")
    (cat / "notes.txt").write_text("P1 is the first page of these notes")
    (cat / ".DS_Store").write_bytes(b"Finder's")
    os.mkfifo(cat / "pipe")
    (cat / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    spec = look(root)
    assert spec.survey is not None and spec.survey.train == (7, 4)
    assert said(spec) == [
        "left out: beside the class folders, not in one: 1 (train/loose.png)",
        "left out: names that begin with a dot: 1 (train/cat/.hidden.png)",
        "left out: not readable as images: 3 (train/cat/Thumbs.db, train/cat/notes.txt, train/cat/pipe)",
        "images in folders inside the class folders, read like the others: 1 (train/cat/more/yet/c.png)",
    ]
    splits = load(spec, root)
    assert len(splits.train_labels) + len(splits.validation_labels) == 11


def test_names_that_are_not_utf_8_can_be_told(make_folder: MakeFolder) -> None:
    root = make_folder()
    train = os.fsencode(root / "pets/train")
    os.rename(train + b"/cat/00.png", train + b"/cat/\xe9.png")
    Path(os.fsdecode(train + b"/cat/\xe9.txt")).write_text("a note")
    spec = look(root)
    assert said(spec)[0].endswith(r": 1 (train/cat/\udce9.txt)")
    assert len(load(spec, root).test_labels) == 4
    for part in (train, os.fsencode(root / "pets/test")):
        os.rename(part + b"/cat", part + b"/c\xe9")
    assert r"train/c\udce9: the name of a class must be UTF-8" in refusal(root)


def test_what_cannot_be_read_is_told_at_once(make_folder: MakeFolder) -> None:
    """The first ten, and how many; links, folders, files and labels in one message."""
    root = make_folder()
    dog = root / "pets/train/dog"
    for number in range(12):
        (dog / f"x{number:02d}.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (dog / "y.png").symlink_to(root / "nowhere.png")
    (dog / "z").symlink_to(dog)
    shutil.rmtree(root / "pets/test/cat")
    message = refusal(root)
    assert re.match(
        r"dataset pets in \S+: 2 things make these data unfit:\n  1. 14 images cannot be used: ", message
    )
    assert len(re.findall(r"x\d\d.jpg: the image cannot be read", message)) == 10
    assert message.splitlines()[1].endswith("; and 4 more")
    assert message.splitlines()[2] == "  2. class 'cat' has no images in test"
    for file in dog.glob("x*"):
        file.unlink()
    assert re.search(
        r"2 images cannot be used: train/dog/y.png: a link to a file that is not there; train/dog/z: the "
        r"link leads back to a folder that it is in\n",
        refusal(root),
    )


def test_transparent_images_are_laid_on_white(make_folder: MakeFolder) -> None:
    root = make_folder()
    before = load(look(root), root).test_images[0].numpy()
    file = root / "pets/test/cat/00.png"
    opaque = Image.open(file).convert("RGBA")
    opaque.save(file)
    same = look(root)
    assert said(same) == [] and same.survey is not None and same.fingerprint == same.survey.content
    clear = np.array(opaque)
    clear[0, 0] = (200, 10, 10, 0)
    clear[0, 1] = (0, 0, 0, 128)
    Image.fromarray(clear).save(file)
    spec = look(root)
    assert said(spec) == ["images with transparent parts, laid on white: 1 (test/cat/00.png)"]
    shown = load(spec, root).test_images[0].numpy()
    assert shown[:, 0, 0].tolist() == [255] * 3 and shown[:, 0, 1].tolist() == [127] * 3
    assert np.array_equal(shown[:, 1:], before[:, 1:])
    assert (
        spec.survey is not None and spec.fingerprint != spec.survey.content
    )  # older versions saw the colour
    palette = Image.open(file).convert("RGB").quantize(8)
    palette.info["transparency"] = 0
    palette.save(root / "pets/test/dog/01.png")
    image(3, "LA").save(root / "pets/test/dog/03.png")
    assert said(look(root))[-1].startswith("images with transparent parts, laid on white: 3 (")


def test_frames_and_orientation_are_told(make_folder: MakeFolder) -> None:
    root = make_folder()
    image(30).save(root / "pets/test/cat/m.gif", save_all=True, append_images=[image(31)])
    turned = image(32).getexif()
    turned[0x0112] = 6
    image(32).save(root / "pets/test/cat/n.jpg", exif=turned)
    assert said(look(root)) == [
        "images of several frames, of which the first is read: 1 (test/cat/m.gif)",
        "photographs to be turned by their EXIF data, read as they are stored: 1 (test/cat/n.jpg)",
    ]


# ------------------------------------------------------------------------------ large numbers in files

CHILD = """
import resource, sys
from pathlib import Path
import numpy, pyarrow.parquet, PIL.Image  # what they map is not what is looked for
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
from ddsweep.data.files import resolve_dataset
from ddsweep.errors import UserError
root = Path(sys.argv[1])
for changes in ({}, {"classes": 5_000_000}, {"shape": [3, 10**6, 10**6]}):
    try:
        resolve_dataset({"source": "parquet", "path": "big", **changes}, root)
    except UserError as error:
        print(*str(error).splitlines()[-2:])
"""


def test_a_large_number_in_a_file_allocates_nothing(tmp_path: Path) -> None:
    """One label of 2**31 - 1 stands for so many classes, whose names alone would fill 100 GB."""
    images, labels = pictures(20, (6, 6, 3))
    write_parquet(tmp_path / "big/train.parquet", images, [*map(int, labels[:7]), 2**31 - 1, *labels[8:]])
    write_parquet(tmp_path / "big/test.parquet", pictures(20, (6, 6, 3), seed=1)[0], labels)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    label, classes, shape = done.stdout.splitlines()
    where = rf"{tmp_path}/big: train.parquet: row 7: label 2147483647 is out of range"
    assert re.search(rf"dataset big in {where}: classes count from 0 and train has 20 images$", label)
    assert "classes is 5,000,000, but train has 20 images, and each class needs at least 2" in classes
    assert "40 images have another size: " in shape and "not 1000000x1000000 as declared" in shape


def test_images_that_do_not_fit_the_machine_are_refused(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder()
    spec = look(root)
    monkeypatch.setattr(os, "sysconf", lambda name: 50)  # enough for them once
    with pytest.raises(
        DataError, match=r"12 images of 3x6x6 take 0 GB, twice that while .*, and this machine has 0 GB"
    ):
        load(spec, root)


# ------------------------------------------------------------------------------------ looked at once


def test_a_folder_is_looked_at_again_only_if_a_file_changed(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = make_folder()
    first = look(root)
    assert not (tmp_path / "cache").exists()  # its files may change again within one tick of their clock
    calls: list[int] = []
    real = survey_module.look
    monkeypatch.setattr(survey_module, "look", lambda content: (calls.append(1), real(content))[1])
    monkeypatch.setattr(survey_module.time, "time", lambda: time.monotonic() + 4e9)
    assert look(root) == first and len(calls) == 12
    assert (again := look(root)) == first and again.survey == first.survey and len(calls) == 12
    kept = list((tmp_path / "cache/ddsweep/surveys").iterdir())
    assert len(kept) == 1 and kept[0].parent.stat().st_mode & 0o777 == 0o700
    assert look(root, shape=[1, 6, 6]).shape[0] == 1 and len(calls) == 24  # read otherwise
    file = root / "pets/train/cat/00.png"
    state = file.stat()
    file.write_bytes(png(pictures(1, (6, 6, 3), seed=99)[0][0]))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # as rsync and cp -p leave it
    assert look(root).fingerprint != first.fingerprint and len(calls) == 36
    kept[0].write_text("torn")
    assert len(calls) == 36


def test_a_user_is_told_where_looking_takes_a_while(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, told = make_folder(), list[str]()
    resolve_dataset(PETS, root, say=told.append)
    assert told == []
    monkeypatch.setattr(survey_module, "_MANY", 11)
    resolve_dataset(PETS, root, say=told.append)
    assert told == ["dataset pets: looking at 0 MB of images; next time that is known"]
