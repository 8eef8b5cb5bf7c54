"""Data that a function of the user's gives: what it must give, when it runs, and what is said of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddsweep.catalog import TrialSpec
from ddsweep.data.arrays import checked_arrays
from ddsweep.data.files import resolve_dataset
from ddsweep.data.load import Splits, load_splits
from ddsweep.errors import DataError, SettingError, UserError
from ddsweep.spec.yaml_text import parse_yaml

SETTINGS = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
TRIAL = {"network": "convnet(depth=1,width=4)", "outer_steps": 1, "real_batch": 4, "models_per_step": 1}
DATA = """
import os
import numpy as np
import helper

def load(classes=3, seed=1, **rest):
    with open(os.environ["RUNS"], "a") as file:
        file.write("run\\n")
    def part(seed, count):
        images = np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)
        return images, np.arange(count) % classes
    return {"train": part(seed, 10 * classes), "test": part(seed + helper.ONE, 4 * classes)}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user works. ``runs`` holds a line for each call of the function."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    (tmp_path / "my_data.py").write_text(DATA)
    (tmp_path / "helper.py").write_text("ONE = 1\n")
    return tmp_path


def runs(home: Path) -> int:
    return (home / "runs").read_text().count("run") if (home / "runs").exists() else 0


def value(home: Path, **more: Any) -> dict[str, Any]:
    return {"file": str(home / "my_data.py"), "name": "load", **more}


def load(spec: Any, root: Path | None = None) -> Splits:
    return load_splits(spec, root, validation_fraction=0.2, split_seed=0)


def good() -> dict[str, Any]:
    images = np.arange(8 * 16, dtype=np.uint8).reshape(8, 4, 4)
    return {"train": (images, [0, 1] * 4), "test": (images[:2] + 1, [0, 1])}


# ------------------------------------------------------------------------------- what it must give


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((4, 5, 6), np.uint8),
        np.zeros((4, 1, 5, 6), np.uint8),
        np.zeros((4, 6, 5, 3), np.uint8).transpose(0, 2, 1, 3),
        torch.zeros(4, 3, 5, 6, dtype=torch.uint8),
        torch.zeros(4, 5, 6, 1, dtype=torch.uint8),
        np.full((4, 5, 6), 255).tolist(),
    ],
)
def test_images_come_out_one_way(images: Any) -> None:
    raw = checked_arrays({"train": (images, [0, 1, 0, 1]), "test": (images, np.array([1, 0, 1, 0]))}, "d")
    assert raw.train.images.dtype == np.uint8 and raw.train.images.flags.c_contiguous
    assert raw.train.images.shape in ((4, 1, 5, 6), (4, 3, 5, 6))
    assert raw.train.labels.dtype == np.int64 and raw.class_names == ()


def test_colours_and_rows_stay_where_they_are() -> None:
    last = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    for images in (last, last.transpose(0, 3, 1, 2), torch.from_numpy(last)):
        raw = checked_arrays({"train": (images, [0, 1, 0, 1]), "test": (images, [0, 1, 0, 1])}, "d")
        assert np.array_equal(raw.train.images, last.transpose(0, 3, 1, 2))


def changed(**parts: Any) -> dict[str, Any]:
    return {**good(), **parts}


IMAGES = good()["train"][0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r'd gives nothing \(None\), not \{"train": \(images, labels\)'),
        ([1, 2], "d gives list, not"),
        ({"train": good()["train"]}, "what it gives has no 'test'"),
        (changed(valid=1), "what it gives has 'valid'"),
        (changed(train=IMAGES), "'train' is ndarray, not a pair"),
        (changed(train=(IMAGES,)), "'train' is tuple, not a pair"),
        (
            changed(train=(IMAGES / 255, [0] * 8)),
            r"train images are float64, not bytes \(uint8, 0 to 255\), from 0 to 0.498.*\* 255\)\.round\(\)",
        ),
        (changed(train=(IMAGES.astype(int), [0] * 8)), r"train images are int64, not bytes \(uint8"),
        (changed(train=([[[256]]] * 8, [0] * 8)), "train images go from 256 to 256, not from 0 to 255"),
        (changed(train=(IMAGES[0], [0] * 4)), r"train images are \[4, 4\], not \[N, h, w\]"),
        (changed(train=(IMAGES[:, None, None], [0] * 8)), r"train images are \[8, 1, 1, 4, 4\], not"),
        (changed(train=(IMAGES.reshape(8, 2, 4, 2), [0] * 8)), "not .* with c 1 or 3"),
        (changed(train=(IMAGES.reshape(8, 1, 16, 1), [0] * 8)), "cannot be told which of them are the chan"),
        (changed(train=(IMAGES[:0], [])), r"train images: there are none: \[0, 4, 4\]"),
        (changed(train=(object(), [0])), "train images are object, not bytes"),
        (changed(train=(IMAGES, [0.0, 1.0] * 4)), r"train labels are float64 \[8\], not whole numbers"),
        (changed(train=(IMAGES, [[0, 1]] * 8)), r"train labels are int64 \[8, 2\], not whole numbers"),
        (changed(train=(IMAGES, ["a", "b"] * 4)), "train labels are <U1"),
        (changed(train=(IMAGES, [0, 1])), "8 train images but 2 labels"),
        (
            changed(train=(IMAGES, [0, -1] * 4)),
            "train label -1 of image 1 is out of range; labels are 0 to 0",
        ),
        (
            changed(train=(IMAGES, [0, 10**9] * 4)),
            "label 1000000000 of image 1 .*8 images, too few for 1,000",
        ),
        (
            changed(test=(IMAGES[:2], [0, 2])),
            "test label 2 of image 1 is out of range; labels are 0 to 1, as in",
        ),
        (changed(class_names=["a", "b"], train=(IMAGES, [0, 2] * 4)), "label 2 .* 0 to 1, by class_names"),
        (changed(train=(IMAGES, [0] * 8), test=(IMAGES[:1], [0])), "all labels are 0; at least 2 classes"),
        (changed(test=(IMAGES[:2, :3], [0, 1])), "train images are 1x4x4, but test images 1x3x4"),
        (changed(class_names="ab"), "class_names is 'ab', not a list"),
        (changed(class_names=["a", 1]), "class_names is .*, not a list"),
        (changed(class_names=["a", "a"]), "class_names has a name twice"),
    ],
)
def test_what_will_not_do_is_told(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        checked_arrays(given, "d")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "more", "error", "message"),
    [
        ("load = 3", {}, DataError, "load is int, not a function"),
        ("def other(): pass\n", {}, SettingError, "my_data.py has no 'load'"),
        ("def load(:\n", {}, SettingError, "my_data.py, line 1: not Python"),
        ("def load(a): pass\n", {}, DataError, r"load\(a\): missing a required argument: 'a'"),
        (
            "def load(a=1): pass\n",
            {"b": 2},
            DataError,
            r"load\(a=1\): got an unexpected keyword argument 'b'",
        ),
        ("import nowhere_to_be_found\ndef load(): pass\n", {}, DataError, "No module named 'nowhere_to_be_f"),
        (
            "import helper\ndef load():\n    return helper.deep()\n",
            {},
            DataError,
            "my_data.py:load@.*: helper.py, line 3, in deep: ZeroDivisionError: division by zero",
        ),
        (
            "def load():\n    import json\n    return json.loads('{')\n",
            {},
            DataError,
            "my_data.py, line 3, in load: JSONDecodeError: ",
        ),
        ("def load():\n    raise SystemExit(3)\n", {}, DataError, "line 2, in load: SystemExit: 3"),
        ("import os\ndef load():\n    os._exit(3)\n", {}, DataError, "the process that ran it ended: code 3"),
        ("def load():\n    return 5\n", {}, DataError, "gives int, not"),
        (
            "import numpy as np\ndef load():\n    x = np.zeros((4, 4, 4), np.uint8)\n"
            "    return {'train': (x, [0, 0, 0, 1]), 'test': (x, [0] * 4)}\n",
            {},
            DataError,
            "class '1' has 1 training image.*; class '1' has no images in test; all 4 test images are in",
        ),
    ],
)
def test_code_that_will_not_do_is_told_with_its_line(
    home: Path, code: str, more: dict[str, Any], error: type[UserError], message: str
) -> None:
    (home / "my_data.py").write_text(code)
    (home / "helper.py").write_text("def deep():\n    # here\n    return 1 / 0\n")
    with pytest.raises(error, match=message) as caught:
        resolve_dataset(value(home, **more), None, may_run=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"size": "large"}, "size must be a whole number, not 'large'"),
        ({"channels": 1}, "channels is 3, which repeats a grey channel"),
        ({"size": 3}, "size is a whole number from 4 to 512, not 3"),
        ({"seed": {"a": 1}}, "seed: .* is neither a number"),
    ],
)
def test_wrong_options(home: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        resolve_dataset(value(home, **more), None, may_run=True)


# ---------------------------------------------------------------------------------- when it runs


def test_it_runs_once_to_be_known_and_once_to_be_used(home: Path) -> None:
    told: list[str] = []
    with pytest.raises(DataError, match=r"its code is not run for that; `ddsweep plan` .* runs it once"):
        resolve_dataset(value(home), None)
    assert runs(home) == 0
    spec = resolve_dataset(value(home), None, may_run=True, say=told.append)
    assert runs(home) == 1
    assert told == [f"dataset {spec.name}: run once, in a process of its own, to see what it gives"]
    assert resolve_dataset(value(home), None) == spec and runs(home) == 1
    assert load(spec).fingerprint == load(spec).fingerprint and runs(home) == 3


def test_ids_hang_on_the_content_and_not_on_the_text(home: Path) -> None:
    spec = resolve_dataset(value(home), None, may_run=True)
    (home / "my_data.py").write_text(f"# the same\n{DATA}")
    same = resolve_dataset(value(home), None, may_run=True)
    assert same.name != spec.name and runs(home) == 2
    assert TrialSpec(same, **TRIAL).trial_id == TrialSpec(spec, **TRIAL).trial_id
    (home / "helper.py").write_text("ONE = 5\n")
    other = resolve_dataset(value(home), None, may_run=True)
    assert TrialSpec(other, **TRIAL).trial_id != TrialSpec(spec, **TRIAL).trial_id
    more = resolve_dataset(value(home, seed=3), None, may_run=True)
    assert TrialSpec(more, **TRIAL).trial_id != TrialSpec(other, **TRIAL).trial_id
    large = resolve_dataset(value(home, size=16, channels=3), None, may_run=True)
    assert (large.shape, large.native) == ((3, 16, 16), (1, 8, 8))
    assert large.name.endswith("(channels=3,size=16)") and load(large).train_images.shape[1:] == (3, 16, 16)


def test_another_content_at_the_second_call_is_refused_and_looked_at_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "my_data.py").write_text(
        DATA.replace("default_rng(seed)", "default_rng([seed, int(os.environ['SEED'])])")
    )
    monkeypatch.setenv("SEED", "1")
    spec = resolve_dataset(value(home), None, may_run=True)
    monkeypatch.setenv("SEED", "2")
    with pytest.raises(DataError, match=r"gave other images or labels than before: .* without a seed"):
        load(spec)
    new = resolve_dataset(value(home), None, may_run=True)
    assert new.fingerprint != spec.fingerprint
    load(new)


def test_the_example_of_the_document(home: Path) -> None:
    part = SETTINGS.read_text().partition("### A function of your own")[2]
    code, mapping = (re.search(rf"```{kind}\n(.*?)```", part, re.S)[1] for kind in ("python", "yaml"))
    (home / "my_data.py").write_text(code)
    given = parse_yaml(mapping, "settings.md")["dataset"]
    spec = resolve_dataset({**given, "file": str(home / given["file"])}, None, may_run=True)
    assert (spec.shape, spec.classes) == ((1, 8, 8), 5)
    assert len(load(spec).test_labels) == 200


def test_a_function_is_given_the_data_root_if_it_asks_for_it(home: Path) -> None:
    (home / "here").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    np.savez(home / "here/all.npz", images=images)
    (home / "my_data.py").write_text(
        "import numpy as np\ndef load(data_root):\n    x = np.load(data_root / 'all.npz')['images']\n"
        "    train, test = (x[:12], [0, 1] * 6), (x[12:], [0, 1] * 4)\n"
        "    return {'train': train, 'test': test, 'class_names': ['a', 'b']}\n"
    )
    spec = resolve_dataset(value(home), home / "here", may_run=True)
    assert (spec.class_names, spec.shape) == (("a", "b"), (1, 4, 4))
    assert np.array_equal(load(spec, home / "here").test_images[:, 0].numpy(), images[12:])
