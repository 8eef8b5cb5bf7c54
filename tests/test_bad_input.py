"""Mistakes of users: the message, the exit code, and that nothing is left behind.

A message names the place and what is allowed; a traceback never comes. Most of it runs in this process
(it is refused before torch or Ray are looked at), some in a process of its own as a user starts it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import ddsweep as package
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.lock import SweepLock, read_lock
from ddsweep.results.parts import read_part
from ddsweep.spec import expand, load_sweep, resolved_yaml
from tests.conftest import Ask, Run, Said, write_done
from tests.disks import fill


@pytest.fixture
def refuse(ask: Ask, tmp_path: Path) -> Callable[..., str]:
    """``refuse(*arguments)``: the message with which that is refused, having touched no file."""

    def run(*arguments: object) -> str:
        before = tree(tmp_path)
        said = ask(*arguments)
        assert said.code == 1, said.words
        assert said.out == "", "a refusal goes to stderr alone"
        assert tree(tmp_path) == before, "a refusal leaves nothing behind"
        return said.err

    return run


@pytest.fixture
def process(ddsweep_process: Run, tmp_path: Path) -> Ask:
    """Like ``ask``, in a separate process."""

    def run(*arguments: object) -> Said:
        done = ddsweep_process(*arguments, cwd=tmp_path)
        assert "Traceback" not in done.stdout + done.stderr
        return Said(done.returncode, done.stdout, done.stderr)

    return run


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


# ---------------------------------------------------------------------------------- wrong sweep files

HEAD = "name: sweep\n"
BASE = HEAD + "base: {dataset: digits, outer_steps: 4}\n"

WRONG_FILES = {
    "misspelt setting": (
        HEAD + "base: {dataset: digits, outer_step: 4}",
        "base.outer_step: unknown key 'outer_step' (did you mean outer_steps?); `ddsweep settings` lists all",
    ),
    "several at once": (
        HEAD + "base: {dataset: digits, outer_step: 4}\nevaluate: {networks: 0}",
        "2 settings are wrong:\n  base.outer_step: unknown key",
    ),
    "unknown data set": (
        HEAD + "base: {dataset: minst}",
        "dataset: unknown data set 'minst' (did you mean mnist?); known are digits, mnist, ",
    ),
    "sizes that do not divide": (
        BASE + "grid: {images_per_class: [6, 5], inner_steps: [3]}",
        "1 of 2 trials is impossible:\n  images_per_class=5 inner_steps=3: images_per_class: 5 does not "
        "divide into inner_steps 3; images_per_class = inner_steps x images_per_class_per_step\nChange them, "
        "or set `skip_invalid: true`",
    ),
    "three sizes of three": (
        BASE + "points: [{images_per_class: 4, inner_steps: 2, images_per_class_per_step: 2}]",
        "all three sizes are given (images_per_class=4, inner_steps=2, images_per_class_per_step=2); ",
    ),
    "an outer rate that grows without end": (
        HEAD + "base: {dataset: digits, outer_steps: 200, outer_schedule: step, outer_decay_steps: 1, "
        "outer_decay_factor: 1e3}",
        "outer_decay_factor: 1000: by outer step 200, after 199 of them, the outer rate would be more than "
        "1e+06 times as large; a factor below 1 lets it decay",
    ),
    "network too big": (
        HEAD + "base: {dataset: digits, network: lenet}",
        "network: lenet takes images of 28 or 32 pixels, not images of 1x8x8",
    ),
    "same point twice": (BASE + "points: [{init: fixed}, {init: fixed}]", "are the same trial, "),
    "key twice": (BASE + "name: again\n", "sweep.yaml: line 3, column 1: the key 'name' is given twice"),
}
"""One of each kind. What else a sweep file is refused for is in tests/test_spec.py."""


@pytest.mark.parametrize(("text", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_sweep_file_is_refused_by_plan_and_by_run(
    text: str, message: str, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    said = refuse("plan", "sweep.yaml")
    assert message in said
    assert re.match(r"ddsweep: sweep(\.yaml| sweep): ", said), "the file, or its sweep"
    assert "pydantic" not in said
    assert refuse("run", "sweep.yaml") == said


def test_a_point_given_twice_is_not_blamed_on_another_setting(
    tmp_path: Path, refuse: Callable[..., str]
) -> None:
    (tmp_path / "sweep.yaml").write_text(BASE + "points: [{init: fixed}, {init: fixed}]")
    assert "models_per_step" not in refuse("plan", "sweep.yaml")


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_file_that_is_no_sweep_file_is_named(verb: str, tmp_path: Path, refuse: Callable[..., str]) -> None:
    assert refuse(verb, "nope.yaml") == "ddsweep: nope.yaml: no such sweep file\n"
    assert refuse(verb, ".") == "ddsweep: .: cannot be read: Is a directory\n"
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\x00")
    assert refuse(verb, "picture.png") == "ddsweep: picture.png: not a text file in UTF-8\n"


def test_a_process_ends_with_the_message_and_1(tmp_path: Path, process: Ask) -> None:
    (tmp_path / "sweep.yaml").write_text(HEAD + "base: {dataset: digits, outer_step: 4}")
    said = process("run", "sweep.yaml")
    assert (said.code, said.out) == (1, "")
    assert "base.outer_step: unknown key 'outer_step' (did you mean outer_steps?)" in said.err
    assert os.listdir(tmp_path) == ["sweep.yaml"]


# -------------------------------------------------------------------------- wrong overrides and words


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("outer_steps", "'outer_steps': not key=value, e.g. outer_steps=10 or evaluate.networks=8"),
        (
            "outer_stepz=4",
            "override 'outer_stepz=4': unknown key 'outer_stepz' (did you mean outer_steps?); `",
        ),
        ("evaluate.networks=0", "evaluate.networks: 0 must be at least 1 (from 'evaluate.networks=0')"),
    ],
)
def test_a_wrong_override_is_named(
    override: str, message: str, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    (tmp_path / "sweep.yaml").write_text(BASE)
    said = refuse("plan", "sweep.yaml", override)
    assert message in said
    assert refuse("run", "sweep.yaml", override) == said


WRONG_WORDS = {
    "plan sweep.yaml --reslts x": "No such option: --reslts",
    "run sweep.yaml --dry-run": "No such option: --dry-run",
    "run sweep.yaml --outer_steps=3": "No such option: --outer_steps",
    "run sweep.yaml --results": "Option '--results' requires an argument",
    "paln sweep.yaml": "No such command 'paln'. Did you mean 'plan'?",
    "plan": "Missing argument 'FILE'",
    "status": "Missing argument 'DIR'",
    "collect a b": "Got unexpected extra argument",
    "data ftech mnist": "No such command 'ftech'. Did you mean 'fetch'?",
    "data fetch minst": "unknown data set 'minst' (did you mean mnist?); known are digits, mnist, ",
    "data fetch mnist": "mnist: data root not given: pass --data-root or set DDSWEEP_DATA",
    "data fetch cifar10-exact --data-root .": "cifar10-exact: nothing to fetch: put its parquet files into",
}


@pytest.mark.parametrize(("line", "message"), WRONG_WORDS.items(), ids=WRONG_WORDS)
def test_a_wrong_command_line_is_1_with_one_line(line: str, message: str, refuse: Callable[..., str]) -> None:
    said = refuse(*line.split())
    assert message in said
    assert len(said.splitlines()) == 1


def test_an_unknown_option_and_verb_point_to_the_help(ask: Ask) -> None:
    for line, message in {
        "plan sweep.yaml --xyz": "ddsweep plan: No such option: --xyz (see ddsweep plan --help)",
        "paln": "ddsweep: No such command 'paln'. Did you mean 'plan'? (see ddsweep --help)",
    }.items():
        said = ask(*line.split())
        assert (said.code, said.out, said.err) == (1, "", message + "\n")


# ----------------------------------------------------------------------------------------- no such data


def test_mnist_without_files_can_be_planned_but_not_run(tmp_path: Path, ask: Ask) -> None:
    (tmp_path / "sweep.yaml").write_text(HEAD + "base: {dataset: mnist, network: lenet, outer_steps: 4}\n")
    assert ask("plan", "sweep.yaml").code == 0
    said = ask("run", "sweep.yaml")
    assert (said.code, said.out) == (1, "")
    assert said.err == (
        "ddsweep: dataset mnist: data root not given: pass --data-root or set DDSWEEP_DATA to the folder "
        "that holds the files, or that `ddsweep data fetch` is to fill\n"
    )
    said = ask("run", "sweep.yaml", "--data-root", "empty")
    assert (said.code, said.out) == (1, "")
    assert "dataset mnist: data root empty is not a folder; check --data-root or DDSWEEP_DATA" in said.err
    (tmp_path / "empty").mkdir()
    said = ask("run", "sweep.yaml", "--data-root", "empty")
    assert (said.code, said.out) == (1, "")
    assert "MNIST/raw" in said.err and "`ddsweep data fetch mnist` downloads it" in said.err
    left = {path.name for path in (tmp_path / "results").rglob("*") if path.is_file()}
    assert left <= {"sweep.yaml", ".lock.guard"}


def test_data_whose_content_is_part_of_the_ids_are_needed_by_plan(
    tmp_path: Path, refuse: Callable[..., str]
) -> None:
    (tmp_path / "sweep.yaml").write_text(HEAD + "base: {dataset: cifar10-exact}\n")
    (tmp_path / "empty").mkdir()
    for verb in ("plan", "run"):
        assert "dataset cifar10-exact: data root not given: pass --data-root" in refuse(verb, "sweep.yaml")
        said = refuse(verb, "sweep.yaml", "--data-root", "nope")
        assert "dataset cifar10-exact: data root nope is not a folder" in said
        said = refuse(verb, "sweep.yaml", "--data-root", "empty")
        assert "dataset cifar10-exact: folder empty/cifar10 is missing; put the files there" in said


# ------------------------------------------------------------------------------ results that cannot be


@pytest.fixture
def small(tmp_path: Path) -> SweepDirectory:
    """The results of a sweep of two trials, both done."""
    file = tmp_path / "small.yaml"
    file.write_text(BASE.replace("name: sweep", "name: small") + "seeds: 2\nevaluate: {networks: 2}\n")
    return write_small(file, tmp_path / "results" / "small")


def write_small(file: Path, root: Path) -> SweepDirectory:
    sweep = load_sweep(file)
    directory = SweepDirectory(root)
    directory.create()
    directory.sweep_file.write_text(resolved_yaml(sweep))
    for trial in trials_of(file):
        write_done(directory, trial, sweep.evaluate.spec())
    return directory


def trials_of(file: Path) -> tuple[TrialSpec, ...]:
    return expand(load_sweep(file), lambda name: DATASETS[str(name)]).trials


def truncate(path: Path) -> Path:
    """Half of the file, as a full disk or a torn copy leaves it."""
    os.truncate(path, path.stat().st_size // 2)
    return path


def torn_part(small: SweepDirectory, table: str, trial_id: str) -> Path:
    return truncate(next(small.parts(table).glob(f"part-{trial_id}*.parquet")))


def test_a_file_in_the_way_of_the_results_is_named(tmp_path: Path, ask: Ask) -> None:
    (tmp_path / "sweep.yaml").write_text(BASE)
    said = ask("run", "sweep.yaml", "--results", "sweep.yaml")
    assert (said.code, said.out) == (1, "")
    assert said.err == (
        "ddsweep: sweep.yaml: a file is in the way of a results folder; move it, or choose another "
        "folder with --results or DDSWEEP_RESULTS\n"
    )
    assert (tmp_path / "sweep.yaml").read_text() == BASE


@pytest.mark.parametrize("folder", ["/proc/ddsweep", "/sys/ddsweep"])
def test_a_folder_that_cannot_be_written_is_named_with_a_way_out(
    folder: str, tmp_path: Path, ask: Ask
) -> None:
    if not Path(folder).parent.is_dir():
        pytest.skip("not on this system")
    (tmp_path / "sweep.yaml").write_text(BASE)
    said = ask("run", "sweep.yaml", "--results", folder)
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith(f"ddsweep: {folder}/sweep: cannot write")
    assert "choose another folder with --results or DDSWEEP_RESULTS" in said.err


def test_a_full_disk_is_refused_before_any_work(tmp_path: Path, disk: Path, ask: Ask) -> None:
    (tmp_path / "sweep.yaml").write_text(BASE)
    fill(disk)
    said = ask("run", "sweep.yaml", "--results", disk)
    assert (said.code, said.out) == (1, "")
    assert f"no space left on this disk or quota (0.0 MB free in {disk}" in said.err
    assert "nothing was lost; free space and run the same command again" in said.err


def test_collect_on_a_full_disk_leaves_no_half_table(
    tmp_path: Path, disk: Path, small: SweepDirectory, ask: Ask
) -> None:
    moved = SweepDirectory(disk / "small")
    shutil.copytree(small.root, moved.root)
    fill(disk)
    said = ask("collect", moved.root)
    assert (said.code, said.out) == (1, "")
    assert "no space left on this disk" in said.err
    assert [*moved.tables.glob("*"), *moved.temporary.glob("*")] == []
    (disk / "full").unlink()
    assert ask("collect", moved.root).code == 0


def test_a_second_driver_is_told_who_the_first_is(
    small: SweepDirectory, tmp_path: Path, process: Ask
) -> None:
    with SweepLock(small.lock):
        before = {**tree(tmp_path), "results/small/.lock": b""}  # its holder writes that it lives
        said = process("run", "small.yaml", "outer_steps=8")
        assert (said.code, said.out) == (1, "")
        assert "another driver is at work on this sweep" in said.err
        assert f"host {socket.gethostname()}, pid {os.getpid()}, since " in said.err
        assert re.search(
            r"if you are sure that it is gone, remove \S*results/small/\.lock$", said.err.strip()
        )
        there = {**tree(tmp_path), "results/small/.lock": b""}
        assert there == before, "the sweep file of the first driver is untouched"
        holder = read_lock(small.lock)
        assert holder is not None and holder["pid"] == os.getpid()
    assert not small.lock.exists()


def test_a_run_that_is_refused_leaves_the_sweep_file_of_before(
    small: SweepDirectory, tmp_path: Path, ask: Ask
) -> None:
    before = small.sweep_file.read_bytes()
    said = ask("run", "small.yaml", "dataset=mnist", "network=lenet")
    assert said.code == 1, said.words
    assert "data root not given" in said.err
    assert small.sweep_file.read_bytes() == before


# ------------------------------------------------------------------------------- folders of no results


@pytest.mark.parametrize("verb", ["status", "eval", "collect", "prune", "show ab"])
@pytest.mark.parametrize("folder", ["nowhere", "empty", "results"])
def test_a_folder_without_results_is_refused_by_every_verb(
    verb: str, folder: str, small: SweepDirectory, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    (tmp_path / "empty").mkdir()
    said = refuse(*verb.split(), folder)
    assert said.startswith(f"ddsweep: {folder}: no results of a sweep")
    assert "name a folder such as results/quickstart" in said


def test_show_without_any_results_says_how_to_name_them(refuse: Callable[..., str]) -> None:
    assert refuse("show", "ab") == (
        "ddsweep: results: no results of any sweep; name the folder (ddsweep show TRIAL DIR) or --results\n"
    )


def test_an_unknown_trial_lists_those_there_are(
    small: SweepDirectory, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    said = refuse("show", "zz", "results/small")
    assert "no trial begins with 'zz'; trials are " in said
    for trial in trials_of(tmp_path / "small.yaml"):
        assert trial.trial_id in said


def test_an_ambiguous_trial_lists_the_candidates(
    small: SweepDirectory, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    sibling = trials_of(tmp_path / "small.yaml")[0].trial_id[:-1] + "x"
    small.artifacts(sibling).mkdir()
    said = refuse("show", sibling[:-1])
    assert f"{sibling[:-1]!r} is the beginning of 2 trials: " in said
    assert sibling in said and "give more of it" in said
    assert "trials are" in refuse("show", "")


def test_eval_changes_no_trial(small: SweepDirectory, refuse: Callable[..., str]) -> None:
    said = refuse("eval", "results/small", "outer_steps=8")
    assert "'outer_steps=8': eval changes evaluate.* (and resources.*) only; trials stay as they are" in said
    assert "evaluate.network: unknown key" in refuse("eval", "results/small", "evaluate.network=8")


def test_eval_needs_something_distilled(small: SweepDirectory, ask: Ask) -> None:
    said = ask("eval", "results/small", "evaluate.networks=3")
    assert (said.code, said.out) == (1, "")
    assert said.err.endswith("results/small: no trial is distilled yet; run the sweep first\n")


def test_eval_leaves_alone_what_is_not_distilled(tmp_path: Path, ask: Ask) -> None:
    """And says so: 75 would mean that the same command goes on."""
    tiny = {
        "dataset": "digits",
        "network": "convnet(depth=1,width=4)",
        "images_per_class": 1,
        "outer_steps": 2,
    }
    root = tmp_path / "results" / "one"
    package.run_trial({**tiny, "real_batch": 32}, root, evaluate={"networks": 1, "baselines": "none"})
    sweep = yaml.safe_load((root / "sweep.yaml").read_text())
    sweep["points"].append({**sweep["points"][0], "seed": 9})
    (root / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    said = ask("eval", "results/one")
    assert (said.code, said.err) == (0, "")
    assert "1 trial done; 1 not distilled: `ddsweep run` goes on with them" in said.words


def test_a_part_that_cannot_be_read_is_named_and_left_alone(
    small: SweepDirectory, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing disk is no torn part: nothing may be made again in its place."""
    parts = [path for table in ("trials", "evals") for path in small.parts(table).iterdir()]
    before, read = {path: path.read_bytes() for path in parts}, Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.resolve() in before:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    for verb in ("status", "eval", "collect"):
        said = ask(verb, "results/small")
        assert said.code == 1
        assert "cannot be read: Input/output error. It stays as it is" in said.err
        assert any(path.name in said.err for path in parts)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in parts} == before


def test_a_damaged_sweep_file_of_results_is_named(small: SweepDirectory, refuse: Callable[..., str]) -> None:
    small.sweep_file.write_text("name: small\nbase: {data")
    for verb in ("status", "eval"):
        assert refuse(verb, "results/small").startswith("ddsweep: results/small/sweep.yaml: line 2, column ")


# ------------------------------------------------------------------------------------------ torn parts


@pytest.mark.parametrize("table", ["trials", "evals", "history"])
@pytest.mark.filterwarnings("always:.*is torn and left out")
def test_readers_name_a_torn_part_and_go_on(
    table: str, small: SweepDirectory, tmp_path: Path, ask: Ask
) -> None:
    hurt, whole = (trial.trial_id for trial in trials_of(tmp_path / "small.yaml"))
    part = torn_part(small, table, hurt).relative_to(tmp_path)
    for line in ("status results/small", f"show {hurt}"):
        said = ask(*line.split())
        assert (said.code, said.err) == (0, "")
        assert f"torn part, to be made again by `ddsweep run`: {part}" in said.words
    assert re.search(rf"^{whole} .*\bdone\b", ask("status", "results/small").out, re.MULTILINE)
    assert "torn" not in ask("show", whole).words
    assert ask("plan", "small.yaml").code == 0
    with pytest.warns(UserWarning, match=f"{part} is torn and left out; `ddsweep run` makes it again"):
        results = package.load_results("results/small")
    assert results.torn == (part,)
    assert set(getattr(results, table)["trial_id"]) == {whole}


@pytest.mark.parametrize("table", ["trials", "evals", "history"])
def test_collect_names_every_torn_part_and_writes_nothing(
    table: str, small: SweepDirectory, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    parts = [torn_part(small, table, trial.trial_id) for trial in trials_of(tmp_path / "small.yaml")]
    said = refuse("collect", "results/small")
    assert said.startswith("ddsweep: 2 torn parts: ")
    for part in parts:
        assert str(part.relative_to(tmp_path)) in said
    assert "`ddsweep run` makes it again" in said


def test_a_torn_part_does_not_let_collect_replace_older_tables(
    small: SweepDirectory, tmp_path: Path, ask: Ask, refuse: Callable[..., str]
) -> None:
    assert ask("collect", "results/small").code == 0
    torn_part(small, "evals", trials_of(tmp_path / "small.yaml")[0].trial_id)
    assert "torn part: " in refuse("collect", "results/small")
    assert read_part(small.table("evals")).num_rows == 8
