"""What the command line says of own data: at plan, run, doctor, data list and show."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddsweep import load_results, run_trial
from ddsweep.catalog import PoolSpec, TrialSpec
from ddsweep.data import own
from ddsweep.data.files import resolve_dataset
from ddsweep.errors import SettingError

from .conftest import pictures, png, write_parquet

Run = Callable[..., Any]

SWEEP = """
name: mine
base:
  dataset: {source: folder, path: pets, size: 8}
  network: convnet(depth=1,width=4)
  outer_steps: 2
  models_per_step: 1
  selection_networks: 1
evaluate: {networks: 1, baselines: none}
"""


@pytest.fixture
def root(make_folder: Callable[..., Path]) -> Path:
    """A data root with ``pets``, in which a note lies and one test image is a training image."""
    root = make_folder()
    (root / "pets/train/cat/notes.txt").write_text("of cats")
    shutil.copy(root / "pets/train/cat/00.png", root / "pets/test/cat/twin.png")
    (root / "sweep.yaml").write_text(SWEEP)
    return root


REMARKS = (
    "pets(size=8): left out: not readable as images: 1 (train/cat/notes.txt)",
    "pets(size=8): test images that are in train too: 1 of 5 (test/cat/twin.png equals train/cat/00.png)",
)


def test_plan_prints_shape_counts_and_what_was_found(root: Path, ddsweep: Run) -> None:
    said = ddsweep("plan", "sweep.yaml", "--data-root", ".", cwd=root)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.splitlines()[-3:] == [
        "data: pets(size=8): images 3x8x8 (files: 3x6x6), 2 classes; train 8 (cat 4, dog 4); "
        "test 5 (cat 3, dog 2)",
        *(f"data:   {remark.removeprefix('pets(size=8): ')}" for remark in REMARKS),
    ]
    said = ddsweep("plan", "sweep.yaml", "base.dataset=usps", "--data-root", ".", cwd=root)
    assert said.stdout.splitlines()[-1] == "data: usps: images 1x16x16, 10 classes; missing: USPS/usps.bz2"


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_data_that_are_unfit_end_a_verb_before_it_begins(verb: str, root: Path, ddsweep: Run) -> None:
    (root / "pets/test/dog/01.png").write_bytes(b"no image")
    said = ddsweep(verb, "sweep.yaml", "--data-root", ".", cwd=root)
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr == (
        "ddsweep: dataset pets in pets: test/dog/01.png: the image cannot be read: not an image\n"
    )
    assert not (root / "results").exists()


def test_doctor_looks_at_the_data_of_a_sweep(root: Path, ddsweep: Run) -> None:
    said = ddsweep("doctor", "sweep.yaml", "--data-root", ".", cwd=root)
    line = said.stdout.splitlines()[-1]
    assert line == "; ".join(["warn data: mine needs folder:pets: there", *REMARKS])
    (root / "pets/train/cat/00.png").unlink()
    (root / "pets/train/cat/00.png").symlink_to("gone.png")
    said = ddsweep("doctor", "sweep.yaml", "--data-root", ".", cwd=root)
    wrong = "dataset pets in pets: train/cat/00.png: a link to a file that is not there"
    assert (said.returncode, said.stdout.splitlines()[-1]) == (1, f"FAIL data: {wrong}")


def test_data_list_shows_own_data_as_they_were_found(
    root: Path, ddsweep: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("train-0", 1), ("test", 2)):
        write_parquet(root / f"rows/{name}.parquet", *pictures(20, (5, 5), seed=seed))
    (root / "broken/train/a").mkdir(parents=True)
    (root / "broken/test/a").mkdir(parents=True)
    (root / "else/images").mkdir(parents=True)
    said = ddsweep("data", "list", "--data-root", ".", cwd=root, COLUMNS="200")
    rows = {line.split()[0]: line for line in said.stdout.splitlines()}
    assert re.fullmatch(r"pets +3x6x6 +2 +present +pets *", rows["pets"])
    assert re.fullmatch(r"rows +1x5x5 +10 +present +rows *", rows["rows"])
    assert re.match(r"broken +– +– +refused: dataset broken in broken: 3 things make", rows["broken"])
    assert "else" not in rows and said.stdout.splitlines()[-2:] == [
        remark.replace("(size=8)", "") for remark in REMARKS
    ]
    monkeypatch.setattr(own, "_MANY", 10)
    said = ddsweep("data", "list", "--data-root", ".", cwd=root, COLUMNS="200")
    assert re.search(r"^pets +– +– +present, and large: `ddsweep data list FILE`", said.stdout, re.M)
    (root / "several.yaml").write_text("name: s\ngrid: {dataset: [digits, mnist, cifar10-exact]}\n")
    said = ddsweep("data", "list", "several.yaml", "--data-root", ".", cwd=root, COLUMNS="200")
    assert said.returncode == 0
    for name, status in (("digits", "embedded"), ("mnist", "missing"), ("cifar10-exact", "missing")):
        assert re.search(rf"^{name} .* {status}", said.stdout, re.M)
    said = ddsweep("data", "list", "sweep.yaml", "--data-root", ".", cwd=root, COLUMNS="200")
    assert re.search(r"^pets\(size=8\) +3x8x8 +2 +present +pets *$", said.stdout, re.M)
    assert said.stdout.splitlines()[-2:] == list(REMARKS)


def test_a_folder_that_nobody_may_enter_is_no_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As lost+found, at the top of any disk."""
    (root / "lost+found").mkdir()
    is_dir = Path.is_dir

    def refusing(path: Path) -> bool:
        if path.parent.name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", refusing)
    assert [row.name for row in own.list_own(root)] == ["pets"]


def test_tables_and_show_have_name_shape_and_count(root: Path, ddsweep: Run) -> None:
    settings = {
        "network": "convnet(depth=1,width=4)",
        "outer_steps": 1,
        "real_batch": 4,
        "models_per_step": 1,
    }
    data = {"source": "folder", "path": "pets", "size": 8}
    evaluate = {"networks": 1, "baselines": []}
    done = run_trial({**settings, "dataset": data}, root / "mine", evaluate=evaluate, data_root=root)
    (row,) = load_results(root / "mine").trials.to_dict("records")
    assert (row["dataset"], row["dataset_shape"], row["n_test_in_train"]) == ("pets(size=8)", "3x8x8", 1)
    said = ddsweep("show", done.trial_id, "mine", cwd=root)
    assert "pets(size=8), images 3x8x8, 1 of its test images in train too, fingerprint " in said.stdout


def test_two_data_sets_of_one_name_need_names_of_their_own(root: Path, ddsweep: Run) -> None:
    shutil.copytree(root / "pets/test", root / "pets/more")
    two = "[{source: folder, path: pets}, {source: folder, path: pets, test: more, train: train}]"
    (root / "pets/more/cat/00.png").write_bytes(png(pictures(1, (6, 6, 3), seed=5)[0][0]))
    (root / "two.yaml").write_text(f"name: two\ngrid: {{dataset: {two}}}\n")
    said = ddsweep("plan", "two.yaml", "--data-root", ".", cwd=root)
    assert (
        "two different data sets are called pets; give each a name of its own, with the key `n" in said.stderr
    )
    (root / "two.yaml").write_text(
        f"name: two\ngrid: {{dataset: {two.replace('more,', 'more, name: b,')}}}\n"
    )
    assert ddsweep("plan", "two.yaml", "--data-root", ".", cwd=root).returncode == 0


def test_a_pool_of_the_same_files_is_known_by_their_content(root: Path) -> None:
    """Under another path, too: its training images must not become validation images."""
    shutil.copytree(root / "pets", root / "copies")
    spec, same = (resolve_dataset({"source": "folder", "path": path}, root) for path in ("pets", "copies"))
    assert (spec.name, same.name) == ("pets", "copies")
    network = "convnet(depth=1,width=4)"
    own_pool = PoolSpec(
        *("p", same.name, same.shape, same.classes, network, 4, 4, "0" * 16),
        source_fingerprint=same.fingerprint,
    )
    with pytest.raises(SettingError, match=r"pool p was trained on pets without its validation images"):
        TrialSpec(spec, network=network, init="pretrained", pool=own_pool, split_seed=1)
    other = PoolSpec(
        *("p", "pets", same.shape, same.classes, network, 4, 4, "0" * 16), source_fingerprint="f" * 32
    )
    assert TrialSpec(spec, network=network, init="pretrained", pool=other, split_seed=1)


def test_damaged_files_of_the_catalog_are_told_before_anything_runs(tiny: Path, ddsweep: Run) -> None:
    path = tiny / "MNIST/raw/train-images-idx3-ubyte"
    os.truncate(path, 1000)
    wrong = f"{path}: truncated: 1000 bytes, but its header promises 31376; `ddsweep data fetch mnist`"
    (tiny / "sweep.yaml").write_text(SWEEP.replace("{source: folder, path: pets, size: 8}", "mnist"))
    said = ddsweep("plan", "sweep.yaml", "--data-root", tiny, cwd=tiny)
    assert said.returncode == 0
    assert said.stdout.splitlines()[-1].startswith(
        f"data: mnist: images 1x28x28, 10 classes; damaged: {wrong}"
    )
    said = ddsweep("doctor", "sweep.yaml", "--data-root", tiny, cwd=tiny)
    assert said.stdout.splitlines()[-1].startswith(f"FAIL data: mnist: damaged: {wrong}")
    said = ddsweep("data", "list", "--data-root", tiny, cwd=tiny, COLUMNS="400")
    assert f" damaged: {wrong}" in said.stdout
    said = ddsweep("run", "sweep.yaml", "--data-root", tiny, cwd=tiny)
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.startswith(f"ddsweep: dataset mnist: {wrong}")
    assert not (tiny / "results").exists()
    path.unlink()
    said = ddsweep("plan", "sweep.yaml", "--data-root", tiny, cwd=tiny)
    assert said.stdout.endswith("10 classes; missing: MNIST/raw/train-images-idx3-ubyte\n")
