"""Guided search on the queue: what is proposed when, by places and a clock of the test's own."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ddsweep.catalog import TrialSpec
from ddsweep.errors import DiskFullError
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.proposals import read_proposals
from ddsweep.spec import AshaSpec
from ddsweep.sweep.guide import Guide
from ddsweep.sweep.halving import Halving
from ddsweep.sweep.proposing import Proposing
from ddsweep.sweep.queue import TrialQueue
from ddsweep.sweep.retry import RetryPolicy
from tests.report.conftest import Folder
from tests.sweep.test_guide import SWEEP, ended, guide_of, rates, sweep_of

POLICY = RetryPolicy(3)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return folder_in(tmp_path)


def folder_in(path: Path) -> Folder:
    directory = SweepDirectory(path / "results" / "small")
    directory.create()
    return Folder(directory)


def score(trial: TrialSpec) -> float:
    return round(1 - abs(trial.inner_lr - 0.1), 6)


@dataclass
class Places:
    """A driver whose places take ``seconds`` for each trial. ``begun`` and ``ended`` are (time, trial)."""

    folder: Folder
    guide: Guide
    places: int = 1
    spare: int = 0
    together: int = 1
    seconds: Callable[[TrialSpec], float] = lambda trial: 1.0
    cohort: int | str = "auto"
    halving: Halving | None = None
    drained: bool = False
    now: float = 0.0
    begun: list[tuple[float, TrialSpec]] = field(default_factory=list)
    ended: list[tuple[float, TrialSpec]] = field(default_factory=list)
    beside: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        trials = self.guide.plan.trials
        self.by_id = {trial.trial_id: trial for trial in trials}
        resources = sweep_of(self.folder, f"{SWEEP}resources: {{cohort: {self.cohort}}}\n").resources
        self.proposing = Proposing(
            *(self.guide, lambda trials: trials, self.proposed, lambda: self.drained),
            *(resources, self.together),
        )
        missing = [t for t in trials if not self.folder.directory.distilled(t.trial_id).exists()]
        planned = self.proposing.places(missing, self.places, self.spare)
        self.all_names = [place.name for place in planned]
        self.queue = TrialQueue(
            planned, POLICY, halving=self.halving, source=self.proposing, room=lambda: self.places
        )
        self.held: dict[str, list[str]] = {name: [] for name in self.all_names}
        self.events: list[tuple[float, int, str, str, int]] = []
        self.events_so_far = 0
        self.paused: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Those that the nodes hold."""
        return self.all_names[: self.places]

    def proposed(self, trials: Sequence[TrialSpec], sizes: Any) -> None:
        self.by_id |= {trial.trial_id: trial for trial in trials}
        if self.halving is not None:
            self.halving.add(trials)

    def ask(self, name: str) -> None:
        for trial in self.queue.take(name, len(self.held[name])) or []:
            self.held[name].append(trial)
            self.beside.append(list(self.held[name]))
            self.begun.append((self.now, self.by_id[trial]))
            self.goes_on(name, trial, 60 if trial in self.paused else 20)

    def goes_on(self, name: str, trial: str, step: int) -> None:
        """It comes to outer step 20, the rung, after half its time, and to its end, 60, after all of it."""
        self.events_so_far += 1
        at = self.now + self.seconds(self.by_id[trial]) / 2
        heapq.heappush(self.events, (at, self.events_so_far, name, trial, step))

    def run(self, most: float = float("inf")) -> None:
        """All of it, or until so many things have happened, as a kill would have it."""
        for name in self.names:
            self.ask(name)
        while self.events and most > 0:
            most -= 1
            self.now, _, name, trial, step = heapq.heappop(self.events)
            spec = self.by_id[trial]
            if step == 60:
                self.held[name].remove(trial)
                ended(self.folder, [spec], score(spec))
                self.queue.ended(name, trial)
                self.ended.append((self.now, spec))
            elif self.halving is None or self.queue.scored(name, trial, step, score(spec)):
                self.goes_on(name, trial, 60)
            else:
                self.held[name].remove(trial)
                self.paused.add(trial)
            for stopped in self.queue.newly_stopped():
                self.folder.stopped(self.by_id[stopped], step=20)
            for other in self.names:
                self.ask(other)


def one_after_the_other(folder: Folder, text: str = SWEEP, *overrides: str) -> list[float]:
    """The rates of a search by hand: each sample from the scores of all before it."""
    guide = guide_of(folder, text, *overrides)
    ended_by_score(folder, guide.plan.trials)
    while trials := guide.propose():
        ended_by_score(folder, trials)
    return rates(guide.plan.trials)


def ended_by_score(folder: Folder, trials: Sequence[TrialSpec]) -> None:
    for trial in trials:
        ended(folder, [trial], score(trial))


def test_one_place_proposes_from_the_scores_of_all_before(folder: Folder, tmp_path: Path) -> None:
    """So with one trial at a time the proposals are a function of the seed and the scores."""
    places = Places(folder, guide_of(folder))
    places.run()
    assert rates([trial for _, trial in places.begun]) == one_after_the_other(folder_in(tmp_path / "other"))
    assert len(places.ended) == 6 and not places.guide.left


def test_a_slow_trial_holds_up_no_other(folder: Folder) -> None:
    """The first one takes as long as a hundred others, which go on meanwhile in the other place."""
    guide = guide_of(folder, SWEEP, "search.samples=12")
    slow = guide.plan.trials[0]
    places = Places(folder, guide, 2, seconds=lambda trial: 100.0 if trial is slow else 1.0)
    places.run()
    assert len(places.ended) == 12 and places.ended[-1] == (100.0, slow)
    assert places.ended[-2][0] == 11.0, "one after the other, with no rest"
    tried = [guide.tried(sample).score for sample in guide.plan.searches[0].samples]
    assert None not in tried


def test_each_proposal_comes_as_late_as_it_can(folder: Folder) -> None:
    """Two places: when a trial ends, one is proposed, with the other one still at work."""
    guide = guide_of(folder, SWEEP, "search.samples=8")
    places = Places(folder, guide, 2, seconds=lambda trial: 1 + trial.inner_lr)
    waiting: list[int] = []
    propose = guide.propose

    def counted() -> tuple[TrialSpec, ...]:
        samples = guide.plan.searches[0].samples
        waiting.append(sum(guide.tried(sample).score is None for sample in samples))
        return propose()

    guide.propose = counted  # type: ignore[method-assign]
    places.run()
    assert waiting == [1] * 5


@pytest.mark.parametrize("events", [1, 5, 7, 9, 11])
def test_a_driver_that_is_killed_goes_on_with_what_it_had_proposed(
    folder: Folder, tmp_path: Path, events: int
) -> None:
    """Whenever it dies: nothing is proposed twice, and with one place it comes to the same samples."""
    first = Places(folder, guide_of(folder))
    first.run(events)
    before = list(read_proposals(folder.directory).values())
    second = Places(folder, guide_of(folder))
    second.run()
    after = list(read_proposals(folder.directory).values())
    assert after[0][: len(before[0])] == before[0] and len(after[0]) == 6
    running = {trial.trial_id for _, trial in first.begun} - {trial.trial_id for _, trial in first.ended}
    done = [trial.trial_id for _, trial in [*first.ended, *second.ended]]
    assert len(done) == len(set(done)) == 6 and running <= set(done)
    assert rates(second.guide.plan.trials) == one_after_the_other(folder_in(tmp_path / "other"))


def test_proposals_of_one_shape_are_distilled_together(folder: Folder) -> None:
    """One place with room for three: a seat that becomes free is taken by the next proposal at once."""
    guide = guide_of(folder, SWEEP, "search.samples=12")
    places = Places(folder, guide, 1, together=3, seconds=lambda trial: 1 + trial.inner_lr)
    places.run()
    assert len(places.ended) == 12 and max(map(len, places.beside)) == 3
    late = [beside for beside, (at, _) in zip(places.beside, places.begun, strict=True) if at > 0]
    assert all(len(beside) == 3 for beside in late), "always full"


@pytest.mark.parametrize(("cohort", "together"), [("1", 1), ("4", 4), ("auto", 2)])
def test_the_setting_says_how_many(folder: Folder, cohort: str, together: int) -> None:
    places = Places(folder, guide_of(folder, SWEEP, "search.samples=12"), 1, together=2, cohort=cohort)
    places.run()
    assert max(map(len, places.beside)) == together and len(places.ended) == 12


def test_other_shapes_wait_for_a_place_of_their_own(folder: Folder) -> None:
    """Of two numbers of inner epochs, which never run side by side in one place."""
    text = SWEEP.replace("image_init: {choice: [noise, real]}", "inner_epochs: {choice: [1, 2]}")
    guide = guide_of(folder, text, "search.samples=16")
    places = Places(folder, guide, 2, together=4, seconds=lambda trial: 1 + trial.inner_lr)
    places.run()
    assert len(places.ended) == 16
    for beside in places.beside:
        assert len({places.by_id[trial].inner_epochs for trial in beside}) == 1
    assert max(map(len, places.beside)) > 1
    assert len({trial.inner_epochs for _, trial in places.begun}) == 2


@pytest.mark.parametrize("spare", [0, 3])
def test_the_last_proposals_are_shared_by_all_places(folder: Folder, spare: int) -> None:
    """None of two places with four seats takes all four that are left; none is kept for what may join."""
    guide = guide_of(folder, SWEEP, "search.samples=7")
    ended_by_score(folder, guide.plan.trials)
    places = Places(folder, guide, 2, spare, together=4)
    places.run()
    assert [len(places.beside[n]) for n in range(4)] == [1, 2, 1, 2]


def test_places_that_come_later_get_proposals_and_leave_what_they_had(folder: Folder) -> None:
    """A node joins for a while: two trials run at a time then, and nothing is lost or done twice with it."""
    places = Places(folder, guide_of(folder, SWEEP, "search.samples=12"), 1, 3)
    places.run(4)
    assert len(places.begun) == 3 and not places.queue.has_work("place-1")
    places.places = 2
    assert places.queue.has_work("place-1") and not places.queue.has_work("place-2")
    places.run(6)
    assert all(places.held[name] for name in places.names)
    (lost,) = places.held["place-1"]
    assert places.queue.lost("place-1").again == (lost,)
    places.places, places.held["place-1"] = 1, []
    places.events = [event for event in places.events if event[2] != "place-1"]
    places.run()
    assert len(places.ended) == len({trial.trial_id for _, trial in places.ended}) == 12
    assert places.queue.is_over("place-1")


def test_seeds_of_a_proposal_go_on_or_stop_together(folder: Folder) -> None:
    """With ASHA: a seed that is at the comparison first gives its place to the other one."""
    text = SWEEP + "seeds: 2\nscheduler: {grace: 20, reduction: 3}\n"
    guide = guide_of(folder, text)
    asha = AshaSpec(grace=20, reduction=3)
    places = Places(folder, guide, 1, halving=Halving(asha, guide.plan.trials))
    places.run()
    (search,) = guide.plan.searches
    assert len(search.samples) == 6
    whole = {trial.trial_id for _, trial in places.ended}
    seeds = [{trial in whole for trial in sample.trial_ids} for sample in search.samples]
    assert all(len(both) == 1 for both in seeds) and {True} in seeds and {False} in seeds
    assert all(guide.tried(sample).score is not None for sample in search.samples)


def test_nothing_is_proposed_while_it_drains(folder: Folder) -> None:
    places = Places(folder, guide_of(folder))
    places.run(4)
    places.drained = True
    begun = len(places.begun)
    places.run()
    assert len(places.begun) == 3 >= begun and places.proposing.left == 0
    assert places.queue.is_last("place-0") and places.queue.is_over("place-0")
    assert places.guide.to_propose == 3, "for the next run"


def test_proposals_that_cannot_be_written_end_the_search_and_nothing_else(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = guide_of(folder)
    places = Places(folder, guide, 2)

    def full(*given: Any) -> None:
        raise DiskFullError("no space left")

    monkeypatch.setattr("ddsweep.sweep.guide.write_proposals", full)
    places.run()
    assert len(places.ended) == 3 and str(places.proposing.error) == "no space left"
    assert len(guide.plan.trials) == 3


def test_what_is_done_already_is_not_distilled_again(folder: Folder) -> None:
    """Such as a sample of an earlier search with another space: the next one comes at once."""
    guide = guide_of(folder)
    places = Places(folder, guide)
    seen: list[TrialSpec] = []

    def make_ready(trials: Sequence[TrialSpec]) -> Sequence[TrialSpec]:
        seen.extend(trials)
        if len(seen) == 1:
            ended_by_score(folder, trials)
            return []
        return trials

    places.proposing.make_ready = make_ready
    places.run()
    assert len(seen) == 3 and [trial for _, trial in places.begun[3:]] == seen[1:]


def test_a_place_that_never_comes_up_is_not_started_for_ever(folder: Folder) -> None:
    """There is always work for it, as long as the search goes on."""
    queue = Places(folder, guide_of(folder), 2).queue
    for _ in range(POLICY.retries):
        assert queue.lost("place-0").wait > 0 and queue.has_work("place-0")
    lost = queue.lost("place-0")
    assert len(lost.failed) == 2, "those that it was dealt"
    assert not queue.has_work("place-0") and queue.is_over("place-0")
    assert queue.has_work("place-1") and queue.take("place-1", 0)
