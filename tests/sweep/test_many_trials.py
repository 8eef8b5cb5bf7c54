"""What keeps the load of the driver and of each worker apart from the number of trials."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.data.load import load_splits
from ddsweep.errors import UserError
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import SweepSpec
from ddsweep.sweep import distilling, placement, worker
from ddsweep.sweep.session import Node, RaySession
from ddsweep.sweep.shards import get_splits, put_splits
from ddsweep.trial import Companions, Progress
from ddsweep.trial_plan import TrialSettings

TRIALS = [TrialSpec(DATASETS["digits"], seed=seed) for seed in range(3000)]


def sweep(**resources: Any) -> SweepSpec:
    return SweepSpec(name="many", base={"dataset": "digits"}, resources=resources)


def session(cpus: float, gpus: float = 0.0) -> RaySession:
    """Two nodes that have this together."""
    nodes = tuple(Node(name, cpus / 2, gpus / 2, 0.0) for name in ("first", "second"))
    return RaySession(dashboard="", token=None, nodes=nodes)


def test_how_many_trials_run_side_by_side() -> None:
    assert placement.side_by_side(sweep(), TRIALS[:5], session(2)) == 2
    assert placement.side_by_side(sweep(), TRIALS[:5], session(8)) == 5
    assert placement.side_by_side(sweep(gpus=0.25), TRIALS, session(16_000, 1000)) == 3000
    assert placement.side_by_side(sweep(gpus=0.5), TRIALS, session(16_000, 1000)) == 2000
    assert placement.side_by_side(sweep(cpus=8, gpus=0.25), TRIALS, session(16_000, 1000)) == 2000
    assert placement.side_by_side(sweep(gpus=0.25, max_concurrent=100), TRIALS, session(16_000, 1000)) == 100


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus", "share", "room"),
    [
        ({"cpus": 2}, 8, 0, 0, 4),
        ({"cpus": 3}, 8, 0, 0, 2),
        ({"cpus": 1, "gpus": 0.25}, 64, 2, 0, 8),
        ({"cpus": 1, "gpus": 0.6}, 64, 4, 0, 4),  # a part of a GPU spans no two
        ({"cpus": 1, "gpus": 0.5}, 64, 2, 0.1, 2),  # one beside the shard of each
        ({"cpus": 1, "gpus": 1}, 64, 4, 0.1, 2),  # a shard takes one GPU of each node
        ({"cpus": {"by": "seed", "default": 4}}, 8, 0, 0, 2),
        ({"max_concurrent": 5}, 64, 0, 0, 5),
        ({"gpus": 1}, 4, 0, 0, 1),
    ],
)
def test_how_many_places_a_guided_search_has(
    resources: dict[str, Any], cpus: float, gpus: float, share: float, room: int
) -> None:
    """As many as fit on each of two nodes, beside a shard on each; at least one, for what does not fit is
    refused elsewhere."""
    shards = placement.Placement(share, ("first", "second"))
    assert placement.room_for(sweep(**resources), TRIALS[:3], session(cpus, gpus), shards) == room


def test_what_lies_on_a_gpu_asks_for_no_memory_of_the_machine() -> None:
    """Else nodes whose GPUs have more memory than the machine would leave some of them idle."""
    node = Node("first", 64, 8, 120e9)
    alone = RaySession(dashboard="", token=None, nodes=(node,))
    large = replace(TRIALS[0], inner_epochs=4000, models_per_step=64, real_batch=1024)
    on_gpu, on_cpu = (distilling._request(sweep(gpus=gpus), large, 9, alone) for gpus in (1, 0))
    assert on_gpu["memory"] == distilling.PROCESS_BYTES_GPU and 8 * on_gpu["memory"] < 120e9
    assert on_cpu["memory"] > 2 * on_gpu["memory"]


def test_places_that_are_all_alike_need_a_node_for_the_dearest_trial() -> None:
    """Also if that trial is done: the next ones of its search ask for as much."""
    cpus = {"by": "seed", "0": 1, "default": 4}
    assert placement.largest_request(sweep(cpus=cpus), TRIALS[:1], session(4)) == (1, 0)
    assert placement.largest_request(sweep(cpus=cpus), TRIALS[:2], session(8)) == (4, 0)
    with pytest.raises(UserError, match=r"guided search.* 4 CPUs and 0 GPUs.*its own sweep"):
        placement.largest_request(sweep(cpus=cpus), TRIALS[:2], session(4))


class Store:
    """Replaces Ray's object store: keeps what was put, as bytes."""

    def __init__(self) -> None:
        self.bytes: list[bytes] = []

    def put(self, value: Any) -> int:
        self.bytes.append(pickle.dumps(value))
        return len(self.bytes) - 1

    def get(self, reference: int) -> Any:
        return pickle.loads(self.bytes[reference])


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(worker.ray, "put", store.put)
    monkeypatch.setattr(worker.ray, "get", store.get)
    return store


def work(directory: Path, report_every: float = 0.0) -> worker.WorkerInputs:
    given = [worker.TrialOfWorker(trial, TrialSettings()) for trial in TRIALS]
    shared = {worker.splits_key(TRIALS[0]): None}
    folder = SweepDirectory(directory)
    return worker.WorkerInputs("many", worker.put_trials(given), shared, folder, None, report_every)  # type: ignore[arg-type]


def test_a_worker_fetches_a_handful_of_the_trials(store: Store, tmp_path: Path) -> None:
    every = work(tmp_path)
    for trial in TRIALS:
        assert every.trial(trial.trial_id).spec == trial
    assert len(store.bytes) == 256
    assert max(map(len, store.bytes)) < sum(map(len, store.bytes)) / 50


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a place that gets the first of the trials tells Tune."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(worker.tune, "report", found.append)
    monkeypatch.setattr(worker, "get_splits", lambda shared: None)
    monkeypatch.setattr(
        worker, "ask", lambda mailbox, tell, question: ([TRIALS[0].trial_id], True, False, {})
    )
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    now = 0.0

    def forward(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(worker.time, "monotonic", lambda: now)
    yield forward
    monkeypatch.undo()


def test_steps_that_come_too_soon_are_not_reported_unless_they_have_a_score(
    store: Store,
    reports: list[dict[str, Any]],
    clock: Callable[[float], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def distil(companions: Companions) -> None:
        (job,) = companions.more(0)
        for step in range(1, 101):
            clock(1.0)
            score = 0.9 if step in (42, 100) else None
            assert companions.progress(job.spec, Progress(step, 1, 0.5, score, float(step)))
        companions.ended(job.spec, True)
        assert not companions.more(0)

    monkeypatch.setattr(worker, "distil_together", distil)
    worker.distil_in_worker(work(tmp_path, report_every=20.0), "place", 1)
    steps = [report.get("outer_step") for report in reports]
    assert steps == [1, 21, 41, 42, 62, 82, 100, None]
    assert sum(report.get("steps_taken", 0) for report in reports) == 100
    assert reports[-1] == {"state": "distilled", "trial": TRIALS[0].trial_id}


def test_the_stop_file_is_looked_for_once_a_second(
    store: Store,
    reports: list[dict[str, Any]],
    clock: Callable[[float], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = work(tmp_path)
    seen: list[bool] = []

    def distil(companions: Companions) -> None:
        (job,) = companions.more(0)
        every.directory.temporary.mkdir()
        every.directory.stop_file.touch()
        for _ in range(12):
            clock(0.125)
            seen.append(companions.should_stop())
        companions.ended(job.spec, False)

    monkeypatch.setattr(worker, "distil_together", distil)
    worker.distil_in_worker(every, "place", 1)
    assert seen == [False] * 7 + [True] * 5
    assert reports == [{"state": "drained", "trial": TRIALS[0].trial_id}]


def test_a_place_whose_trials_are_all_refused_gets_others(
    store: Store, reports: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter([([trial.trial_id], False, False, {}) for trial in TRIALS[:2]] + [([], False, False, {})])
    monkeypatch.setattr(worker, "ask", lambda mailbox, tell, question: next(given))

    def splits(shared: Any) -> None:
        if not reports:
            raise UserError("the data are gone")

    monkeypatch.setattr(worker, "get_splits", splits)
    monkeypatch.setattr(worker, "record_failure", lambda *row: None)
    place = worker._Place(work(tmp_path), "place", 1)
    assert [job.spec for job in place.more(0)] == [TRIALS[1]]
    assert [report["state"] for report in reports] == ["failed"] and place.more(0) == []


def test_a_place_asks_at_once_when_a_trial_has_left_at_a_rung(
    store: Store, reports: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def ask(mailbox: Any, tell: Any, question: dict[str, Any]) -> Any:
        asked.append(question["state"])
        return ([TRIALS[0].trial_id], False, False, {}) if question["state"] == "room" else False

    monkeypatch.setattr(worker, "ask", ask)
    place = worker._Place(work(tmp_path), "place", 3)
    assert len(place.more(0)) == 1 and place.more(1) == []
    assert not place.progress(TRIALS[0], Progress(10, 1, 0.5, 0.9, 1.0, rung=True))
    assert len(place.more(1)) == 1
    assert asked == ["room", "running", "room"]


def test_trials_of_a_worker_share_their_data_on_a_device(store: Store) -> None:
    """Also where each of them asks for the data: what it gets is what is there already."""
    splits = load_splits(DATASETS["digits"], None, validation_fraction=0.1, split_seed=0)
    shared, other = put_splits(splits), put_splits(replace(splits, fingerprint="another"))
    first, second, apart = (get_splits(one) for one in (shared, shared, other))
    device = torch.device("meta")
    assert first.train.shared_on(device) is second.train.shared_on(device)
    assert apart.fingerprint == "another"
    assert torch.equal(first.train_images, splits.train_images)
