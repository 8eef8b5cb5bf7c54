"""Where shards go, and that a worker sees the GPUs it was granted, on GPUs that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.errors import UserError
from ddsweep.results.reader import load_results
from ddsweep.spec import expand, load_sweep
from ddsweep.sweep.placement import check_placement, place_shards
from ddsweep.sweep.session import Node, RaySession
from tests.conftest import OneRay, Run


@pytest.mark.parametrize(
    ("wanted", "share", "trial", "gpus", "nodes"),
    [
        (None, 0.0, 0.0, [0], [0, 0]),  # a laptop
        (None, 0.0, 0.0, [0, 0, 0], [0, 1, 2]),
        (5, 0.0, 0.0, [0, 0, 0], [0, 1, 2, 0, 1]),
        (1, 0.0, 0.0, [0, 0, 0], [0]),
        (None, 0.0, 1.0, [8, 8], [0, 1]),  # GPUs for trials, none for shards
        (None, 0.1, 0.25, [1], [0]),
        (None, 0.1, 0.25, [4], [0, 0, 0, 0]),
        (None, 0.1, 0.25, [2, 2, 2], [0, 1, 2, 0, 1, 2]),
        (None, 0.1, 0.25, [0, 2, 1], [1, 2, 1]),  # a head without GPUs
        (3, 0.1, 0.25, [2, 2, 2], [0, 1, 2]),
        (None, 0.1, 1.0, [8, 8], [0, 1] * 8),  # one GPU of each node for eight shards
        (None, 0.1, 1.0, [1, 1, 1, 1], [1, 1, 1, 1]),  # spread, they would leave no whole GPU
        (None, 0.1, 0.5, [1, 1, 1, 1], [1, 1, 1, 1]),  # spread, they would leave 4 trials of 8
        (None, 0.1, 8.0, [8, 8], [1] * 16),  # whole nodes for trials
        (None, 0.5, 0.5, [1], [0]),
        (None, 1.0, 1.0, [1, 1], [0]),  # fewer than there are nodes, but one
        (None, 0.5, 0.0, [1, 0], [0]),  # trials on the CPU
    ],
)
def test_shards_are_spread_where_that_leaves_room_for_trials(wanted, share, trial, gpus, nodes) -> None:
    assert place_shards(wanted, share, trial, gpus) == tuple(nodes)


@pytest.mark.parametrize(
    ("wanted", "share", "trial", "gpus"),
    [
        (None, 0.1, 1.0, [1]),
        (None, 0.6, 0.5, [1]),
        (11, 0.1, 1.0, [1, 1]),
        (1, 0.1, 0.5, [0, 0]),
        (9, 0.1, 0.2, [1]),
        (1, 0.1, 2.0, [1, 1]),  # two GPUs are not on one node
    ],
)
def test_shards_that_leave_no_room_for_a_trial_are_not_placed(wanted, share, trial, gpus) -> None:
    assert place_shards(wanted, share, trial, gpus) is None


def trials_of(folder: Path, *lines: str) -> tuple[Any, tuple[TrialSpec, ...]]:
    file = folder / "sweep.yaml"
    file.write_text("\n".join(("name: s", *lines)))
    sweep = load_sweep(file)
    return sweep, expand(sweep, lambda name: DATASETS[str(name)]).trials


def session_of(*gpus: float, cpus: float = 4) -> RaySession:
    nodes = tuple(Node(f"node-{i}", cpus, own, 8e9) for i, own in enumerate(gpus))
    return RaySession(dashboard="", token=None, nodes=nodes)


def test_the_largest_trial_of_a_mapping_decides_what_fits(tmp_path: Path) -> None:
    lines = ["base: {dataset: digits, inner_steps: 1}", "grid: {images_per_class: [1, 10]}"]
    sweep, trials = trials_of(tmp_path, *lines, "resources: {gpus: {by: images_per_class, 1: 0.1, 10: 1}}")
    placed = check_placement(sweep, trials, session_of(1, 1))
    assert (placed.gpus, placed.nodes) == (0.1, ("node-1", "node-1")), "one GPU stays whole for the large one"
    placed = check_placement(sweep, trials[:1], session_of(1, 1))
    assert placed.nodes == ("node-0", "node-1")
    with pytest.raises(
        UserError, match=r"not even one shard of 0\.1 GPU each cannot be placed beside a trial"
    ):
        check_placement(sweep, trials, session_of(1))


@pytest.mark.parametrize(
    ("resources", "gpus", "cpus", "message"),
    [
        ("{gpus: 4}", (2, 2), 4, r"resources\.gpus: a trial asks for 4 GPUs, but Ray found 2 on one machine"),
        ("{cpus: 6}", (0, 0), 4, r"resources\.cpus: a trial asks for 6 CPUs, but there are 4 on one machine"),
        ("{memory: 9}", (0, 0), 4, r"resources\.memory: a trial asks for 9 GB, but Ray found 8 on one machi"),
    ],
)
def test_a_trial_must_fit_one_machine(resources, gpus, cpus, message, tmp_path: Path) -> None:
    """Only two machines together have what it asks for: it would wait for ever."""
    base = "base: {dataset: digits, images_per_class: 1, inner_steps: 1}"
    sweep, trials = trials_of(tmp_path, base, f"resources: {resources}")
    with pytest.raises(UserError, match=message):
        check_placement(sweep, trials, session_of(*gpus, cpus=cpus))


@pytest.mark.parametrize(
    ("lines", "gpus", "message"),
    [
        (
            "resources: {gpus: 1}",
            0,
            "a trial asks for 1 GPU, but Ray found 0; set resources.gpus=0 to run on",
        ),
        ("resources: {gpus: 0.5}", 0, "a trial asks for 0.5 GPUs, but Ray found 0; set resources.gpus=0"),
        (
            "resources: {gpus: 1}\nevaluate: {shards: 2}",
            1,
            "2 shards of 0.1 GPU each cannot be placed beside a trial of 1 on 1 GPU; ask for fewer",
        ),
    ],
    ids=["none", "a part of none", "no room for shards"],
)
def test_gpus_that_are_not_there_are_refused(lines: str, gpus: int, message: str, tmp_path: Path) -> None:
    sweep, trials = trials_of(tmp_path, "base: {dataset: digits}", lines)
    with pytest.raises(UserError) as caught:
        check_placement(sweep, trials, session_of(gpus))
    assert message in str(caught.value)


def test_what_no_trial_could_run_with_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = "base: {dataset: digits, images_per_class: 1, inner_steps: 1}"
    monkeypatch.setenv("CXX", "no-such-compiler")
    sweep, trials = trials_of(tmp_path, base, "resources: {compile: on}")
    with pytest.raises(UserError, match=r"resources\.compile: on, but there is no C\+\+ compiler here"):
        check_placement(sweep, trials, session_of(1))


def test_a_machine_must_have_both_cpus_and_gpus(tmp_path: Path) -> None:
    base = "base: {dataset: digits, images_per_class: 1, inner_steps: 1}"
    sweep, trials = trials_of(tmp_path, base, "resources: {cpus: 4, gpus: 1}")
    nodes = (Node("large", 8, 0, 8e9), Node("gpu", 2, 1, 8e9))
    with pytest.raises(UserError, match="asks for 4 CPUs and 1 GPU, and no machine has both"):
        check_placement(sweep, trials, RaySession("", None, nodes))


# --------------------------------------------------------------------------------- on a real Ray


@pytest.fixture(scope="module")
def three_nodes(environment: dict[str, str], request: pytest.FixtureRequest) -> dict[str, Any]:
    """With shards only if a test that asks for them is selected: they take longer than all the rest."""
    script = Path(__file__).with_name("three_nodes.py")
    asked = any(item.path == Path(__file__) and "_shard" in item.name for item in request.session.items)
    done = subprocess.run(
        [sys.executable, str(script), *(["shards"] if asked else [])],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.ray
def test_each_shard_is_where_it_was_placed(three_nodes: dict[str, Any]) -> None:
    nodes = three_nodes["nodes"]
    assert len(set(nodes)) == 3 and three_nodes["most"] == [1, 2]
    assert three_nodes["without GPUs"][:3] == nodes, "one on each"
    assert three_nodes["on GPUs"] == [*nodes, nodes[0]], "the second GPU of a node after the first of all"


@pytest.mark.slow
@pytest.mark.ray
def test_a_shard_whose_node_is_lost_lives_on_elsewhere(three_nodes: dict[str, Any]) -> None:
    before, after = three_nodes["without GPUs"][:3], three_nodes["without GPUs"][3:]
    for node, then in zip(before, after, strict=True):
        if node == three_nodes["lost"]:
            assert then != node and then in three_nodes["nodes"]
        else:
            assert then == node


@pytest.mark.ray
@pytest.mark.parametrize(("granted", "number"), [("granted 0.5", 1), ("granted 2", 2)])
def test_a_worker_that_sees_other_gpus_than_its_own_says_so(
    granted: str, number: int, three_nodes: dict[str, Any]
) -> None:
    found = three_nodes[granted]
    assert len(found["visible"].split(",")) == number
    said = found["said"]
    assert said.pop("own") == "fine"
    if number == 2:
        assert said.pop("all") == "fine"
    shown = {"all": "is '0,1'", "none": "is ''", "other": "is '7'", "unset": "is not set"}
    for case, words in said.items():
        assert f"trial t was granted {granted.split()[1]} GPU" in words
        assert f"CUDA_VISIBLE_DEVICES {shown[case]}" in words


@pytest.mark.ray
def test_data_is_read_where_it_lies_in_the_store_of_the_node(three_nodes: dict[str, Any]) -> None:
    first, second = three_nodes["data"]
    for found in (first, second):
        assert (found["owndata"], found["writeable"], found["same"]) == (False, False, True)
        assert "plasma" in found["mapped"]
    assert first["sum"] == second["sum"] > 0


TINY = """
name: tiny
base: {dataset: digits, network: "convnet(depth=1,width=8,norm=none)", images_per_class: 1, inner_steps: 1,
       outer_steps: 4, models_per_step: 1, real_batch: 32, selection_networks: 1}
seeds: 2
evaluate: {networks: 4, group_size: 4, shards: 1, baselines: none, gpus: 0.1}
resources: {gpus: 0.5, total_gpus: 2, device: cpu, dashboard: false, cohort: 1}
"""


@pytest.mark.slow
def test_a_sweep_is_packed_on_gpus_that_are_none(tmp_path: Path, one_ray: OneRay) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = one_ray("run", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = load_results(tmp_path / "results" / "tiny").trials
    assert list(trials["status"]) == ["done"] * 2
    assert list(trials["n_replans"]) == [0] * 2 and set(trials["device"]) == {"cpu"}
    assert (trials["gpu_seconds"] / trials["wall_seconds"]).tolist() == pytest.approx([0.5] * 2)


def test_cpus_beyond_the_machine_are_refused_before_any_trial(tmp_path: Path, one_ray: OneRay) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    said = one_ray("run", "tiny.yaml", "resources.cpus=3", cwd=tmp_path)
    assert said.returncode == 1 and "Traceback" not in said.stdout + said.stderr
    assert "resources.cpus: a trial asks for 3 CPUs, but there are 2; ask for less, or set" in said.stderr
    assert not (tmp_path / "results" / "tiny").exists()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("gpus", "code"), [("0.1", 1), pytest.param("0", 2, marks=pytest.mark.slow)], ids=["shards", "trials"]
)
def test_workers_that_all_see_the_same_gpus_fail_with_a_message(
    gpus: str, code: int, tmp_path: Path, ddsweep_process: Run
) -> None:
    """Ray is told not to narrow what its workers see, as some recipes for clusters do."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    traps = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "0,1"}
    done = ddsweep_process("run", "tiny.yaml", f"evaluate.gpus={gpus}", cwd=tmp_path, **traps)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    if code == 1:
        assert "eval shard " in done.stderr and "CUDA_VISIBLE_DEVICES is '0,1'" in done.stderr
        return
    failures = load_results(tmp_path / "results" / "tiny").failures
    assert len(failures) == 2 and set(failures["attempts"]) == {1}, "a retry would not help"
    for message in failures["message"]:
        assert "was granted 0.5 GPU" in message and "CUDA_VISIBLE_DEVICES is '0,1'" in message
