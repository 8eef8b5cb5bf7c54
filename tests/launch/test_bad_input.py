"""What a launch refuses before Slurm is asked: one message, exit code 1, and no file touched.

What only a cluster can refuse is in tests/cluster/test_bad_input.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Ask

SWEEP = """
name: small
base: {dataset: digits, network: convnet(width=4), outer_steps: 2, real_batch: 32}
grid: {init: [fixed, random]}
evaluate: {networks: 2, group_size: 1}
"""
SITE = """
scheduler: slurm
cpus_per_node: 2
gpus_per_node: 1
memory_per_node: 4
"""

Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask) -> Refuse:
    """``refuse(*arguments, sweep=, site=)``: the message with which ``ddsweep launch`` refuses that."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # a machine without Slurm

    def run(
        *arguments: str, sweep: str = "", site: str = "", options: tuple[str, ...] = ("--site", "site.yaml")
    ) -> str:
        (tmp_path / "small.yaml").write_text(SWEEP + sweep)
        (tmp_path / "site.yaml").write_text(SITE + site)
        before = sorted(tmp_path.rglob("*"))
        code, out, err = ask("launch", "small.yaml", *options, *arguments)
        assert (code, out) == (1, ""), out + err
        assert err.startswith("ddsweep")
        assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"
        return err

    return run


@pytest.mark.parametrize("mode", ["cluster", "array"])
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_pool_that_is_not_trained(
    refuse: Refuse, ask: Ask, tmp_path: Path, mode: str, more: tuple[str, ...]
) -> None:
    """Jobs would find that out one by one. `plan` says so, too."""
    (tmp_path / "pools").mkdir()
    network = "convnet(width=4)"
    pool = f"name: fresh\ndataset: digits\nnetwork: {network}\ntrain: 8\nheldout: 2\nepochs: 1\n"
    pool += "lr: 1e-2\nbatch: 100\ndecay_epochs: 1\n"
    (tmp_path / "pools" / "fresh.yaml").write_text(pool)
    settings = ("grid.init=[pretrained]", "pool=fresh", "models_per_step=2")
    said = refuse("--mode", mode, *settings, *more, options=("--site", "local"))
    assert "pools/fresh is not there, or not finished: `ddsweep pretrain` with its file makes it" in said
    planned = ask("plan", "small.yaml", *settings)
    assert "pool: fresh is not trained yet: `ddsweep pretrain` with its file does that" in planned.words


@pytest.mark.parametrize("mode", ["cluster", "array"])
@pytest.mark.parametrize("dry", [True, False])
def test_weights_of_imagenet_that_are_not_there(
    refuse: Refuse, mode: str, dry: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    settings = (
        "grid.init=[fixed]",
        "pool=imagenet",
        "network=alexnet",
        "dataset=digits(channels=3,size=224)",
    )
    said = refuse("--mode", mode, *settings, *(["--dry-run"] if dry else []), options=("--site", "local"))
    assert "alexnet-imagenet: no weights: neither a file was given" in said


@pytest.mark.parametrize("mode", ["cluster", "array"])
@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--wait",)])
def test_no_slurm(refuse: Refuse, mode: str, more: tuple[str, ...]) -> None:
    said = refuse("--mode", mode, *more)
    assert "sinfo: no such command: this is not a login node of a Slurm cluster" in said
    assert "`scheduler: local` needs no Slurm" in said


def test_no_site(refuse: Refuse) -> None:
    assert "--site: name a site file, such as slurm/mine.yaml, or `local` for this machine" in refuse(
        options=()
    )
    assert "other.yaml: no such site file" in refuse(options=("--site", "other.yaml"))


def test_a_mode_that_is_none(refuse: Refuse) -> None:
    assert "--mode: 'clusters' is not one of cluster, array" in refuse("--mode", "clusters")


def test_an_option_that_is_none(refuse: Refuse) -> None:
    assert "Invalid value for '--nodes'" in refuse("--nodes", "two")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--nodes", "0"), "nodes: 0 must be at least 1 (from 'nodes=0')"),
        (("--gpus-per-node", "-1"), "gpus_per_node: -1 must be at least 0"),
        (("--time", "90"), "time: '90' is not a time; write 90m, 4h"),
        (("--partition", "010"), "sinfo: no such command"),  # text, also if it looks like a number
        (("site.gpus_per_node=010",), "010 starts with 0, as numbers to the base 8 do in YAML"),
        (("site.partitoin=gpu",), "unknown key 'partitoin' (did you mean partition?)"),
        (("outer_stepz=3",), "unknown key 'outer_stepz' (did you mean outer_steps?)"),
    ],
)
def test_what_is_said_on_the_command_line(refuse: Refuse, option: tuple[str, ...], message: str) -> None:
    assert message in refuse(*option)


def test_a_key_of_the_site_file(refuse: Refuse) -> None:
    assert "gpus: unknown key 'gpus'; `ddsweep settings site` lists all" in refuse(site="gpus: 2\n")


@pytest.mark.parametrize("mode", ["cluster", "array"])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("cpus: 3", "resources.cpus: a trial asks for 3, but a node of this site has 2 (cpus_per_node)"),
        ("gpus: 2", "resources.gpus: a trial asks for 2, but a node of this site has 1 (gpus_per_node)"),
        ("memory: 5", "resources.memory: a trial asks for 5 GB, but a node of this site has 4"),
    ],
)
def test_a_trial_that_no_node_can_take(refuse: Refuse, mode: str, asked: str, message: str) -> None:
    assert message in refuse("--mode", mode, sweep=f"resources: {{{asked}}}\n")


def test_the_elements_of_an_array_are_told_their_resources_beforehand(refuse: Refuse) -> None:
    said = refuse("--mode", "array", sweep="resources: auto\n")
    assert "resources: auto is measured where the trials run" in said
    assert "use --mode cluster, or give resources.cpus and resources.gpus" in said


def test_a_scheduler_needs_all_trials_in_one_place(refuse: Refuse) -> None:
    said = refuse("--mode", "array", sweep="scheduler: {grace: 1, strata: []}\n")
    assert "scheduler: stopping trials early needs all of them in one Ray cluster" in said
    assert "use --mode cluster, or scheduler=null" in said


def test_a_guided_search_cannot_be_an_array(refuse: Refuse) -> None:
    search = "search: {kind: tpe, samples: 4, space: {inner_lr: {uniform: [0.1, 1]}}}\n"
    said = refuse("--mode", "array", sweep=search)
    assert "search.kind: tpe proposes trials from the scores of others" in said
    assert "use --mode cluster, or search.kind=random" in said


@pytest.mark.parametrize("mode", ["cluster", "array"])
def test_a_guided_search_needs_optuna(refuse: Refuse, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    search = "search: {kind: tpe, samples: 4, space: {inner_lr: {uniform: [0.1, 1]}}}\n"
    assert "pip install 'ddsweep[optuna]'" in refuse("--mode", mode, sweep=search)


def test_data_that_are_not_there(refuse: Refuse) -> None:
    assert "dataset mnist: data root not given: pass --data-root" in refuse("dataset=mnist")
    said = refuse("dataset=mnist", "--data-root", "nowhere")
    assert "mnist" in said and "nowhere" in said and "data root not given" not in said


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
@pytest.mark.parametrize("folder", ["100%", "a/%j", "a\\b", "a\nb"])
def test_a_results_folder_whose_name_means_something_to_slurm(
    refuse: Refuse, folder: str, more: tuple[str, ...]
) -> None:
    assert "cannot have %, \\ or line breaks in it: its logs go there" in refuse("--results", folder, *more)


def test_a_results_folder_that_cannot_be(refuse: Refuse, tmp_path: Path) -> None:
    # With the local scheduler, because nothing else is checked first.
    (tmp_path / "file").touch()
    for more in ((), ("--dry-run",)):
        said = refuse("--results", "file", "site.scheduler=local", *more)
        assert "file: a file is in the way of a results folder" in said
