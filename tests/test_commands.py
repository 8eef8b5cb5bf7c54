"""Every command and every snippet of the documents, word for word.

Here they are read by the parser that would run them, and the files that they name are loaded with their
settings, because some need a cluster, a download or hours. Commands that need only the digits run in
tests/test_readme.py. A command of a kind that is not known here fails.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer
import yaml
from PIL import Image

from ddsweep.bundled import write_files
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.cli import app
from ddsweep.data.files import resolve_dataset
from ddsweep.data.load import load_splits
from ddsweep.errors import DataError
from ddsweep.exported import FILES
from ddsweep.imported import SPACES
from ddsweep.launch.site import load_site
from ddsweep.pools.file import PoolFile, load_pool, resolve_pool
from ddsweep.results.artifacts import save_tensors
from ddsweep.spec import SweepSpec, expand, is_smoke, load_sweep, sweep_of
from tests.documents import DOCUMENTS, ROOT, Block, blocks, commands, write_shown

OTHERS = ("ssh", "prometheus", "grafana", "pip", "ln", "mkdir")
"""Programs that are not ours and are not run."""
FILLED_IN = {
    "--site FILE": "--site local",
    "pretrain FILE": "pretrain usps_lenet",
    **{"NAME": "quickstart", "SWEEP": "quickstart", "<sweep>": "quickstart", "FILE": "quickstart"},
    **{"SITE": "local", "SLOTS": "4", "TRIALS": "8"},
}
"""What stands for any value in a command, and one."""


def told_in_passing() -> Iterator[tuple[str, str]]:
    """Whole commands inside the text of a page; tests/test_docs.py looks at fragments such as
    ``ddsweep launch --mode cluster``."""
    for page in DOCUMENTS:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for code in re.findall(r"`((?:ddsweep|python) [^`]+)`", text):
            words = code.split()
            fragment = all(word.startswith(("-", "[")) for word in words[2:]) or words[1] == "launch"
            if page.name not in ("CHANGELOG.md", "structure.md") and (not fragment or "FILE" in words):
                yield page.name, " ".join(words)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as in the documents: the files of `init`, and the user's own site."""
    folder = tmp_path_factory.mktemp("lab")
    write_files(folder)
    write_shown(folder)
    shutil.copy(folder / "slurm/generic.yaml", folder / "slurm/mine.yaml")
    shutil.copytree(ROOT / "sweeps/longer", folder / "sweeps/longer")  # what a checkout has alone
    (folder / "docs").symlink_to(ROOT / "docs")
    for block in blocks("yaml"):
        write_start(block, folder)
    return folder


def write_start(block: Block, folder: Path) -> None:
    """The set in which the sweep of ``block`` begins, if it begins in one, as far as a plan looks at it."""
    found = re.search(r"image_init: \{set: (.+?)\}", block.text)
    if found is None:
        return
    asked = yaml.safe_load(block.text)["base"]
    sizes = {name: asked[name] for name in ("images_per_class", "inner_steps") if name in asked}
    spec = TrialSpec(DATASETS[asked["dataset"]], **sizes).to_dict()
    save_tensors(folder / found[1], {}, {"kind": "distilled", "spec": spec}, folder)


# ------------------------------------------------------------------------------------------- reading


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The verb and its parameters, by the parser of the command line; nothing runs."""
    command: Any = typer.main.get_command(app)
    name, given, context = "ddsweep", words, None
    while True:
        context = command.make_context(name, given, parent=context)
        if not hasattr(command, "resolve_command"):
            return context.command_path.removeprefix("ddsweep "), context.params
        rest = [*context._protected_args, *context.args]
        name, command, given = command.resolve_command(context, rest)


def check_ddsweep(words: list[str]) -> None:
    """The files, sweeps and data sets that a command names are there, with its settings."""
    verb, given = parsed(words)
    settings = [item for item in given.get("settings") or () if not item.startswith("site.")]
    file, directory = given.get("file"), given.get("directory")
    if verb == "pretrain":
        load_pool(file, settings, smoke=given["smoke"])
        return
    if verb == "export":
        assert given["file"].name == "distilled.safetensors" and given["out"].suffix in FILES
        return
    if verb == "import":
        assert given["dataset"] in DATASETS and given["space"] in SPACES
        return
    if given.get("site"):
        load_site(given["site"])
    if directory is not None and verb != "init":
        assert directory.parent.name in ("results", "campaign"), directory
        file = Path("sweeps") / f"{directory.name}.yaml"
    if file is not None:
        sweep = load_sweep(file, settings, smoke=given.get("smoke", False))
        ids = ids_of(sweep)
        if verb == "show":
            assert sum(item.startswith(given["trial"]) for item in ids) == 1, given["trial"]
    if verb == "data fetch":
        assert given["name"] in {*DATASETS, "alexnet-imagenet"}


def ids_of(sweep: SweepSpec) -> list[str]:
    """The trials that a sweep plans, if that takes no data."""

    def dataset(value: Any) -> Any:
        return resolve_dataset(value, None, stand_in=is_smoke(sweep.name))

    with contextlib.suppress(DataError):
        pools = Path("sweeps/pools")
        plan = expand(sweep, dataset, lambda value: resolve_pool(value, Path("none"), dataset, pools))
        return [trial.trial_id for trial in plan.trials]
    return []


class Read(Exception):
    """The options of a script were read."""


def check_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``python bench/NAME.py ...``: its own parser takes the words."""
    read = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                read(self, *given)
            except SystemExit:
                raise AssertionError(said.getvalue()) from None
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    with pytest.raises(Read):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def check(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for any_value, one in FILLED_IN.items():
        line = re.sub(rf"(?<![\w-]){any_value}(?!\w)", one, line)
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, *rest = words or [""]
    if program == "ddsweep":
        check_ddsweep(rest)
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M), line
    elif program == "python" and rest[0] == "-c":
        exec(rest[1], {})
    elif program == "python":
        check_script(rest, monkeypatch)
    elif program == "cp":
        assert all((ROOT / folder).is_dir() for folder in (Path(rest[0]).parent, Path(rest[1]).parent))
        assert Path(rest[0]).is_file()
    else:
        assert program in ("", *OTHERS), f"a command of a kind that is not known: {line}"
        subprocess.run(["bash", "-n", "-c", line], check=True)


@pytest.mark.parametrize("block", blocks("console", "sh", ""), ids=str)
def test_every_command_of_a_block_is_one(block: Block, lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab)
    lines = commands(block)
    if not block.kind:  # a picture of folders, or what a program says
        lines = [line for line in lines if line.split()[0] in ("ddsweep", "make", "python")]
    for line in lines:
        check(line, monkeypatch)


@pytest.mark.parametrize(("page", "line"), [*told_in_passing()], ids=str)
def test_every_command_in_passing_is_one(
    page: str, line: str, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab)
    check(line, monkeypatch)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ddsweep run sweeps/nowhere.yaml", "nowhere.yaml"),
        ("ddsweep run sweeps/quickstart.yaml outer_step=3", "outer_step"),
        ("ddsweep run sweeps/quickstart.yaml --result here", "--result"),
        (
            "ddsweep eval results/quickstart 'evaluate.protocols=[{order: shuffled}]'",
            "order=shuffled is impossible",
        ),
        ("ddsweep show 0000 results/quickstart", "0000"),
        ("python bench/evaluate.py --repeat", "--repeat"),
        ("make quickstarts", "quickstarts"),
        ("dsweep run quickstart", "dsweep"),
    ],
)
def test_a_command_that_would_fail_is_found(
    line: str, said: str, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab)
    with pytest.raises(Exception) as caught:
        check(line, monkeypatch)
    assert said in f"{caught.value!r} {caught.value} {getattr(caught.value, 'message', '')}"


# --------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of data that docs/settings.md takes as examples."""
    root = tmp_path_factory.mktemp("data")
    pictures = []
    for number in range(20):
        picture = Image.fromarray(np.full((8, 8, 3), 10 * number + 5, np.uint8))
        with io.BytesIO() as file:
            picture.save(file, "png")
            pictures.append(file.getvalue())
        place = root / "flowers" / ("train", "test")[number % 2] / ("rose", "tulip")[number // 2 % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(pictures[-1])
    (root / "cifar10").mkdir()
    for shard in range(5):
        mine = pictures[4 * shard : 4 * shard + 4]
        rows = [{"image": {"bytes": data, "path": ""}, "label": n % 2} for n, data in enumerate(mine)]
        pd.DataFrame(rows).to_parquet(root / "cifar10" / f"shard-{shard}.parquet")
    return root


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_every_file_shown_can_be_read(
    block: Block, tmp_path: Path, lab: Path, own_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab)
    file = tmp_path / "shown.yaml"
    file.write_text(block.text)
    if block.text.startswith("dataset:"):  # one example a line
        for line in block.text.splitlines():
            value = yaml.safe_load(line)["dataset"]
            found = resolve_dataset(value, own_data, may_run=True)
            splits = load_splits(found, own_data, validation_fraction=0.1, split_seed=0)
            assert len(splits.class_names) == value.get("classes", 2)
        return
    content = yaml.safe_load(block.text)
    if content.get("kind") == "RayJob":
        check_ddsweep(shlex.split(content["spec"]["entrypoint"])[1:])
        assert content["spec"]["rayClusterSpec"]["rayVersion"] == version("ray")
    elif "epochs" in content:
        assert isinstance(load_pool(file), PoolFile)
    elif "name" in content:
        assert ids_of(load_sweep(file))
    elif content.keys() & SweepSpec.model_fields.keys():
        two_steps = {} if "grid" in content else {"images_per_class": 2, "inner_steps": 2}
        whole = {"name": "shown", "base": {"dataset": "mnist", **two_steps}}
        assert ids_of(sweep_of(whole | content, "shown"))
    else:
        assert set(content) == {"global", "scrape_configs"}, "a file of a kind that is not known"


def test_no_snippet_is_left_out() -> None:
    """A new snippet needs a test in tests/test_readme.py, or a test of its page."""
    known = ("results/quickstart", "DistilledSet.load", "run_trial", "# my_data.py", "# from mnist.npz")
    own_tests = ("analysis.md", "methods.md", "networks.md")  # test_analysis, test_method_door, ...
    left = [block for block in blocks("python") if block.page.name not in own_tests]
    assert [str(block) for block in left if not any(word in block.text for word in known)] == []
    assert {kind for page in DOCUMENTS for kind in re.findall(r"^```(\w+)", page.read_text(), re.M)} <= {
        *("console", "sh", "python", "sql", "yaml")
    }
