"""The command line without mistakes: what each verb prints, what it imports, and how it exits."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.exceptions import Abort

import ddsweep as package
from ddsweep import cli
from ddsweep.catalog import DATASETS, DatasetSpec
from ddsweep.data.files import resolve_dataset
from ddsweep.errors import UserError
from ddsweep.pools.file import load_pool, pool_yaml, resolve_pool
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part
from ddsweep.spec import Plan, expand, load_sweep, resolved_yaml
from tests.conftest import SLOW, Ask, Run, imported_by_command, write_done

REPOSITORY = Path(__file__).resolve().parents[1]
SWEEPS = sorted(REPOSITORY.glob("sweeps/*.yaml"))
QUICKSTART = REPOSITORY / "sweeps" / "quickstart.yaml"

SMALL = """\
name: small
base: {dataset: digits, network: convnet(width=4), outer_steps: 4}
seeds: 2
evaluate: {networks: 2, shards: 1, baselines: none}
"""

OPTIONS = {
    "init": [],
    "plan": ["--results", "--data-root", "--smoke"],
    "pretrain": ["--results", "--data-root", "--smoke", "--address"],
    "run": ["--results", "--data-root", "--smoke", "--address", "--all", "--track"],
    "eval": ["--data-root", "--address", "--all"],
    "launch": [
        *("--site", "--mode", "--nodes", "--gpus-per-node", "--time", "--partition", "--account"),
        *("--dry-run", "--wait", "--results", "--data-root"),
    ],
    "cancel": ["--grace"],
    "logs": ["--job", "--lines"],
    "status": ["--data-root"],
    "show": ["--results"],
    "settings": [],
    "collect": [],
    "prune": ["--yes", "--data-root"],
    "track": ["--to", "--out", "--watch", "--data-root"],
    "import": ["--dataset", "--space", "--out", "--labels", "--experiment", "--mean", "--std", "--data-root"],
    "export": ["--out", "--space"],
    "doctor": ["--site", "--patience", "--results", "--data-root"],
    "data list": ["--data-root"],
    "data fetch": ["--data-root"],
}
"""The options of each verb that scripts of users rely on."""


@pytest.fixture
def small(tmp_path: Path) -> SweepDirectory:
    """The results of a sweep of two trials, one of them done."""
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    sweep = load_sweep(file)
    directory = SweepDirectory(tmp_path / "results" / "small")
    directory.create()
    directory.sweep_file.write_text(resolved_yaml(sweep))
    trial = expand(sweep, lambda name: DATASETS[str(name)]).trials[0]
    write_done(directory, trial, sweep.evaluate.spec())
    return directory


def planned(file: Path, root: Path | None = None) -> Plan:
    def dataset(value: Any) -> DatasetSpec:
        return resolve_dataset(value, root)

    pools = Path("results/pools").resolve()
    return expand(load_sweep(file), dataset, lambda value: resolve_pool(value, pools, dataset))


def begin_pools(folder: Path) -> set[Path]:
    """What ``ddsweep pretrain`` writes first of every pool in the repository."""
    for file in REPOSITORY.glob("sweeps/pools/*.yaml"):
        pool = load_pool(file)
        assert pool.name == file.stem, "a pool is found by the name of its file"
        place = folder / pool.name / "pool.yaml"
        place.parent.mkdir(parents=True)
        place.write_text(pool_yaml(pool))
    return {path for path in folder.rglob("*") if path.is_file()}


def data_root() -> Path | None:
    """Where the real data sets are, if they are anywhere."""
    given = os.environ.get("DDSWEEP_DATA")
    places = [Path(given)] if given else [REPOSITORY.parent / "shared" / "data"]
    return next((place for place in places if place.is_dir()), None)


HERE = data_root()
"""Asked before a test of the command line takes it out of the environment."""


def verb_help(verb: str, ask: Ask) -> str:
    code, out, err = ask(*verb.split(), "--help")
    assert code == 0, f"ddsweep {verb} --help: {err}"
    return out


# ------------------------------------------------------------------------------------ what is imported


@pytest.mark.parametrize(
    "arguments",
    [
        *("--help", "--version", "run --help", f"plan {QUICKSTART}", "status results/small", "data list"),
        "settings",
    ],
)
def test_instant_verbs_import_neither_torch_nor_ray_nor_pandas(
    arguments: str, small: SweepDirectory, tmp_path: Path, environment: dict[str, str]
) -> None:
    declared = ("ddsweep.catalog",) if "--" in arguments else ()  # no help needs what can be set
    words, slow = arguments.split(), (*SLOW, *declared)
    assert imported_by_command(*words, slow=slow, cwd=tmp_path, env=environment) == []


@pytest.mark.parametrize(
    "dataset", ["mnist", "cifar10-exact", "{source: folder, path: a, train: b, test: c}"]
)
def test_missing_data_are_told_before_anything_slow_is_imported(
    dataset: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "sweep.yaml").write_text(f"name: small\nbase: {{dataset: {dataset}}}\n")
    (tmp_path / "empty").mkdir()
    words = ["run", "sweep.yaml", "--data-root", "empty"]
    assert imported_by_command(*words, code=1, cwd=tmp_path, env=environment) == []
    assert not (tmp_path / "results").exists()


def test_the_package_lists_what_it_offers() -> None:
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None


# ------------------------------------------------------------------------------------------ exit codes


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UserError("grid.init: is empty"), 1),
        (PermissionError(errno.EACCES, "Permission denied", "/a/folder"), 1),
        (KeyboardInterrupt(), 130),
        (Abort(), 130),
    ],
)
def test_what_stops_a_verb_decides_the_exit_code(
    raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app(arguments: Any, **options: Any) -> None:
        raise raised

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main(["any"])
    assert ended.value.code == code
    expected = f"ddsweep: {raised}\n" if isinstance(raised, UserError) else ""
    if isinstance(raised, PermissionError):
        expected = "ddsweep: /a/folder: the system refuses it: Permission denied\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("code", [0, 2, 75, 130])
def test_a_verb_may_choose_its_exit_code(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()

    @app.command()
    def verb() -> None:
        raise typer.Exit(code)

    monkeypatch.setattr(cli, "app", app)
    assert cli._exit_code([]) == code


def test_failed_trials_are_2_and_trials_left_are_75() -> None:
    from ddsweep.sweep.runner import Outcome

    counts = {(3, 0, 0): 0, (2, 1, 0): 2, (2, 0, 1): 75, (1, 1, 1): 75}
    assert {key: Outcome(*key).exit_code for key in counts} == counts
    assert Outcome(done=2, failed=0, left=0, stopped=3).exit_code == 0
    assert Outcome(done=2, failed=0, left=1, stopped=3).exit_code == 75


# ---------------------------------------------------------------------------------- help and version


@pytest.mark.parametrize("verb", [["plan", str(QUICKSTART)], ["--help"], []])
def test_windows_is_shown_the_way_to_wsl(verb: list[str], ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    said = "ddsweep: runs on Linux and macOS; on Windows, install it inside WSL (`wsl --install`)\n"
    assert ask(*verb) == (1, "", said)
    with pytest.raises(ImportError, match="install it inside WSL"):
        package.__getattr__("load_results")


def test_jobs_are_for_linux(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    code, out, err = ask("launch", "quickstart", "--site", "local", "--dry-run")
    assert (code, out) == (1, "") and "launch: jobs run on Linux only; `ddsweep run`" in err


def test_the_version_is_the_package_s(ask: Ask) -> None:
    assert ask("--version") == (0, f"ddsweep {package.__version__}\n", "")


def test_help_lists_every_verb(ask: Ask) -> None:
    help_text = verb_help("", ask) + verb_help("data", ask)
    for verb in OPTIONS:
        assert re.search(rf"[ │]{verb.split()[-1]} ", help_text), verb


@pytest.mark.parametrize("verb", OPTIONS)
def test_help_of_a_verb_lists_its_options_and_says_what_it_does(verb: str, ask: Ask) -> None:
    text = verb_help(verb, ask)
    assert f"{verb} [OPTIONS]" in text
    assert re.search(r"^ [A-Z].*[.:]", text, re.MULTILINE), "a sentence that says what it does"
    for option in (*OPTIONS[verb], "--help"):
        assert f"{option} " in text


def test_h_is_help_everywhere(ask: Ask) -> None:
    for verb in ("", "plan", "data", "data fetch"):
        assert ask(*verb.split(), "-h") == ask(*verb.split(), "--help")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ddsweep pl", ["plan"]),
        ("ddsweep run sweep.yaml evaluate.net", ["evaluate.networks="]),
        ("ddsweep run sweep.yaml site.dr", ["site.drain="]),
        ("ddsweep settings alexc", ["alexcifarnet"]),
        ("ddsweep data fetch cub", ["cub200"]),
    ],
)
def test_a_shell_completes(line: str, offered: list[str], ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_DDSWEEP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    code, out, err = ask()
    assert (code, out.split(), err) == (0, offered, "")


def test_a_shell_completes_trials_that_are_here(
    small: SweepDirectory, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.artifacts("abcdef0123").mkdir()
    monkeypatch.setenv("_DDSWEEP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "ddsweep show abc")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert ask()[1].split() == ["abcdef0123"]


def test_help_alone_and_help_of_a_process_are_the_same(ddsweep_process: Run, tmp_path: Path) -> None:
    done = ddsweep_process("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "quickstart" not in done.stdout
    assert "one YAML file in, Parquet tables with error bars out" in done.stdout


# ------------------------------------------------------------------------------------------------ plan


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_file_can_be_planned_and_lists_its_trials(file: Path, ask: Ask, tmp_path: Path) -> None:
    root = HERE
    sweep = load_sweep(file)
    begun = begin_pools(tmp_path / "results" / "pools")
    if root is None and any(
        value == "cifar10-exact" or isinstance(value, dict) for value in sweep.datasets()
    ):
        pytest.skip("the ids of this sweep depend on data that are not here")
    code, out, err = ask("plan", file, *(["--data-root", root] if root else []))
    assert (code, err) == (0, "")
    trials = planned(file, root).trials
    assert [trial.trial_id for trial in trials if trial.trial_id not in out] == []
    assert re.search(rf"\b{len(trials)} trials?, 0 done", out)
    assert sweep.name == file.stem, "a sweep is found by the name of its file"
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == begun, "plan writes nothing"


def test_plan_shows_what_is_done(ask: Ask, small: SweepDirectory, tmp_path: Path) -> None:
    code, out, err = ask("plan", "small.yaml")
    assert (code, err) == (0, "")
    done, missing = (trial.trial_id for trial in planned(tmp_path / "small.yaml").trials)
    assert re.search(rf"^{done} .*\bdone\b", out, re.MULTILINE)
    assert re.search(rf"^{missing} .*\bmissing\b", out, re.MULTILINE)
    assert "2 trials, 1 done" in out
    # A set that is distilled already costs no distillation.
    small.artifacts(missing).mkdir(exist_ok=True)
    small.distilled(missing).touch()
    out = ask("plan", "small.yaml")[1]
    assert re.search(rf"^{missing} .*\bto evaluate\b", out, re.MULTILINE)
    assert "2 trials, 1 done, 1 to evaluate\n" in out
    # Asked for more networks, the evaluation that is there will not do.
    assert "2 trials, 0 done" in ask("plan", "small.yaml", "evaluate.networks=3")[1]


def test_plan_tells_of_trials_that_another_sweep_has_finished(
    ask: Ask, small: SweepDirectory, tmp_path: Path
) -> None:
    done = planned(tmp_path / "small.yaml").trials[0].trial_id
    assert "finished in" not in ask("plan", "small.yaml", "name=other")[1], "it has no distilled set"
    small.artifacts(done).mkdir(parents=True)
    small.distilled(done).touch()
    out = ask("plan", "small.yaml", "name=other")[1]
    assert out.endswith("1 trial finished in sweep small: taken over if the data are the same\n")
    assert "finished in" not in ask("plan", "small.yaml")[1]


def test_plan_of_a_smoke_run_shows_what_run_would_do(ask: Ask, tmp_path: Path) -> None:
    """Also with a pool, which is made by the run: its small version is in its file."""
    code, out, err = ask("plan", REPOSITORY / "sweeps" / "adapt_usps_mnist.yaml", "--smoke")
    assert (code, err) == (0, "")
    full = ask("plan", REPOSITORY / "sweeps" / "mnist_random.yaml")[1]
    small = ask("plan", REPOSITORY / "sweeps" / "mnist_random.yaml", "--smoke")[1]
    assert "missing" in out and "missing" in small and small != full
    assert list(tmp_path.iterdir()) == [], "plan writes nothing"


def test_the_results_folder_comes_from_the_option_then_the_environment_then_results(
    ask: Ask, small: SweepDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results").rename(tmp_path / "elsewhere")
    assert "2 trials, 0 done" in ask("plan", "small.yaml")[1]
    assert "2 trials, 1 done" in ask("plan", "small.yaml", "--results", "elsewhere")[1]
    monkeypatch.setenv("DDSWEEP_RESULTS", "elsewhere")
    assert "2 trials, 1 done" in ask("plan", "small.yaml")[1]
    assert "2 trials, 0 done" in ask("plan", "small.yaml", "--results", "results")[1]


def test_overrides_are_laid_over_the_file(ask: Ask, small: SweepDirectory) -> None:
    code, out, _ = ask("plan", "small.yaml", "seeds=1", "images_per_class=[2,4]", "inner_steps=2")
    assert code == 0
    assert re.search(r"^trial +images/class ", out)
    assert "2 trials, 0 done" in out


# ------------------------------------------------------------------------------- status, show, collect


def test_status_says_how_far_each_trial_is(ask: Ask, small: SweepDirectory, tmp_path: Path) -> None:
    code, out, err = ask("status", "results/small")
    assert (code, err) == (0, "")
    done, pending = (trial.trial_id for trial in planned(tmp_path / "small.yaml").trials)
    assert out.startswith("small: 2 trials, 1 done, 1 pending\nno driver at work; `ddsweep run` goes on")
    assert re.search(rf"^{done} .*\bdone +4/4\b", out, re.MULTILINE)
    assert re.search(rf"^{pending} .*\bpending +0/4\b", out, re.MULTILINE)


def test_prune_shows_what_the_sweep_file_no_longer_has_and_removes_it_if_told(
    ask: Ask, small: SweepDirectory, tmp_path: Path
) -> None:
    done, pending = (trial.trial_id for trial in planned(tmp_path / "small.yaml").trials)
    assert ask("prune", "results/small")[1] == "sweep.yaml has all trials that are here: nothing to remove\n"
    small.sweep_file.write_text(SMALL.replace("seeds: 2", "seeds: [1]"))
    assert "`ddsweep prune results/small` shows them" in ask("status", "results/small")[1]
    code_copy, set_copy = small.code / "58cc8337ef77" / "nets.py", small.sets / "e3803c005b86.safetensors"
    for path in (code_copy, set_copy):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(600))
    before = sorted(small.root.rglob("*"))
    code, out, err = ask("prune", "results/small")
    assert (code, err) == (0, "")
    assert re.search(rf"^{done} +done +50\.0 +3 ", out, re.MULTILINE) and pending not in out
    assert "1 trial that sweep.yaml no longer has" in out
    launched = small.root / "jobs" / "x" / "sweep.yaml"
    launched.parent.mkdir(parents=True)
    launched.write_text("name: small\nbase: {network: 'nets.py:Net@58cc8337ef77'}\n")
    assert "1 copy of code or a set that" in ask("prune", "results/small")[1], "its job may still wait"
    shutil.rmtree(launched.parents[1])
    assert "2 copies of code and sets that sweep.yaml no longer names, 1.2 kB" in out
    assert "nothing is removed yet; `ddsweep prune results/small --yes` removes them" in out
    assert sorted(small.root.rglob("*")) == before
    code, out, err = ask("prune", "results/small", "--yes")
    assert (code, err) == (0, "") and out.endswith("removed\n") and done in out
    assert not [path for path in small.root.rglob("*") if done in path.name]
    assert not code_copy.parent.exists() and not set_copy.exists()
    assert "no longer has" not in ask("status", "results/small")[1]


def test_show_finds_a_trial_by_how_it_begins(ask: Ask, small: SweepDirectory, tmp_path: Path) -> None:
    done = planned(tmp_path / "small.yaml").trials[0].trial_id
    code, out, err = ask("show", done[:4])
    assert (code, err) == (0, "")
    assert out.startswith(f"trial {done}: done, outer step 4/4")
    assert ask("show", done, "results/small")[1] == out


def test_collect_compacts_each_table_and_keeps_the_parts(ask: Ask, small: SweepDirectory) -> None:
    parts = sorted(small.root.glob("*/part-*.parquet"))
    code, out, err = ask("collect", "results/small")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"results/small/tables/{name}.parquet: {rows}"
        for name, rows in {
            "trials": "1 row",
            "evals": "4 rows",
            "history": "1 row",
            "failures": "0 rows",
        }.items()
    ]
    assert read_part(small.table("evals")).column("model_seed").to_pylist() == [0, 0, 1, 1]
    assert sorted(small.root.glob("*/part-*.parquet")) == parts
    assert list(small.temporary.iterdir()) == []


# ------------------------------------------------------------------------------------------------ data


def test_data_list_shows_the_whole_catalog_and_what_is_here(ask: Ask) -> None:
    code, out, err = ask("data", "list")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert list(lines) == list(DATASETS)
    assert "embedded" in lines["digits"]
    assert "missing" in lines["mnist"]


def test_digits_need_no_fetching(ask: Ask, tmp_path: Path) -> None:
    code, out, err = ask("data", "fetch", "digits", "--data-root", "new")
    assert (code, out) == (1, "")
    assert err == "ddsweep: digits: nothing to fetch: it comes with scikit-learn\n"
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------- pipes


@pytest.mark.parametrize("arguments", [f"plan {QUICKSTART}", "--help", "--version", "collect results/small"])
def test_a_reader_that_goes_away_early_is_no_error(
    arguments: str, small: SweepDirectory, tmp_path: Path, environment: dict[str, str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ddsweep", *arguments.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # before anything is written: `| head -0`
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), err) == (0, "")


def test_the_first_line_alone_can_be_had(tmp_path: Path, environment: dict[str, str]) -> None:
    line = f"{shlex.quote(sys.executable)} -m ddsweep plan {shlex.quote(str(QUICKSTART))} | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("trial ")
    assert len(done.stdout.splitlines()) == 1
