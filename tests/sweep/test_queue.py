"""Who distils which trial: the queue by itself, and what Tune is told, by a clock of the test's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.search.basic_variant import BasicVariantGenerator

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.spec import AshaSpec, SweepSpec
from ddsweep.sweep import places
from ddsweep.sweep.distilling import plan_places
from ddsweep.sweep.halving import Halving
from ddsweep.sweep.mailbox import Mailbox, ask
from ddsweep.sweep.places import Places
from ddsweep.sweep.queue import PlannedPlace, TrialQueue
from ddsweep.sweep.retry import RetryPolicy

POLICY = RetryPolicy(3)


def planned(*trials: str, size: int = 8, shape: str = "s") -> PlannedPlace:
    return PlannedPlace(trials[0], trials, size, shape)


# -------------------------------------------------------------------------------------- the queue


def test_a_place_has_its_own_trials_first_and_then_those_of_others() -> None:
    queue = TrialQueue([planned("a", "b", size=2), planned("c", "d", "e"), planned("x", shape="t")], POLICY)
    assert queue.take("a", 0) == ["a", "b"]
    queue.ended("a", "a")
    assert queue.take("a", 1) == ["c"]
    assert queue.take("c", 0) == ["d", "e"] and queue.is_last("c")
    queue.ended("a", "b")
    queue.ended("a", "c")
    assert queue.take("a", 0) == [], "that of another shape is not for it"
    assert queue.take("x", 0) == ["x"]


def test_a_place_that_comes_too_late_is_not_started() -> None:
    queue = TrialQueue([planned("a", size=2), planned("b", size=2)], POLICY)
    assert queue.has_work("b") and not queue.is_over("b")
    assert queue.take("a", 0) == ["a", "b"]
    assert not queue.has_work("b") and not queue.is_over("b"), "they may come back"
    queue.ended("a", "a")
    queue.ended("a", "b")
    assert queue.is_over("b")


def test_no_more_run_than_may() -> None:
    queue = TrialQueue([planned("a", "b"), planned("x", shape="t")], POLICY, most=2)
    assert queue.take("x", 0) == ["x"]
    assert queue.take("a", 0) == ["a"]
    assert not queue.has_work("x")
    queue.ended("x", "x")
    assert queue.take("a", 1) == ["b"]


def test_a_place_asks_again_while_others_have_all_the_room() -> None:
    queue = TrialQueue([planned("a"), planned("x", shape="t")], POLICY, most=1)
    assert queue.take("x", 0) == ["x"]
    assert queue.take("a", 0) is None
    queue.ended("x", "x")
    assert queue.take("a", 0) == ["a"]


def test_companions_of_one_that_kills_its_process_lose_no_attempt() -> None:
    """The second death shows nothing but that it is one of them; so each is tried alone from then on."""
    queue = TrialQueue([planned("good", "bad", "fine")], POLICY)
    name = "good"
    for _ in range(2):
        assert queue.take(name, 0) == ["good", "bad", "fine"]
        lost = queue.lost(name)
        assert lost.again == ("good", "bad", "fine") and not lost.failed and lost.wait > 0
    assert queue.take(name, 0) == ["good"], "alone"
    assert queue.take(name, 1) == []
    queue.ended(name, "good")
    waits = []
    for _ in range(POLICY.retries):
        assert queue.take(name, 0) == ["bad"]
        lost = queue.lost(name)
        assert lost.again == ("bad",)
        waits.append(lost.wait)
    assert waits == sorted(set(waits)), "they grow"
    assert queue.take(name, 0) == ["bad"]
    assert queue.lost(name).failed == (("bad", POLICY.retries + 1),)
    assert queue.take(name, 0) == ["fine"]


def test_one_that_is_alone_is_tried_as_often_as_asked_for() -> None:
    queue = TrialQueue([planned("a", size=1)], RetryPolicy(0))
    assert queue.take("a", 0) == ["a"]
    lost = queue.lost("a")
    assert lost.failed == (("a", 1),) and not lost.again
    assert queue.is_over("a")


def test_what_saves_steps_between_its_deaths_does_not_fail_of_their_number() -> None:
    saved = {"a": 0}
    queue = TrialQueue([planned("a", size=1)], POLICY, saved=lambda trial: saved[trial])
    for steps in (50, 100, 150, 150, 150):
        saved["a"] = steps
        assert queue.take("a", 0) == ["a"]
        lost = queue.lost("a")
        assert not lost.failed and lost.again == ("a",)
    assert queue.take("a", 0) == ["a"]
    assert queue.lost("a").failed == (("a", POLICY.retries + 1),), "it died four times at one place"


def test_a_place_that_never_comes_up_fails_with_all_that_it_has() -> None:
    queue = TrialQueue([planned("a", "b"), planned("x", shape="t")], POLICY)
    waits = [queue.lost("a").wait for _ in range(POLICY.retries)]
    assert waits == sorted(set(waits)) and queue.has_work("a")
    lost = queue.lost("a")
    assert lost.failed == (("a", POLICY.retries + 1), ("b", POLICY.retries + 1)) and not lost.again
    assert queue.is_over("a") and queue.has_work("x")


def test_a_place_that_never_comes_up_leaves_its_trials_to_one_that_is_at_work() -> None:
    queue = TrialQueue([planned("a", size=1), planned("b", "c", size=1)], POLICY)
    assert queue.take("a", 0) == ["a"]
    for _ in range(POLICY.retries + 1):
        assert not queue.lost("b").failed
    assert queue.is_over("b") and not queue.has_work("b")
    queue.ended("a", "a")
    assert queue.take("a", 0) == ["b"]
    queue.ended("a", "b")
    assert queue.given_up("a") == ["c"], "nobody else is left"


def test_what_was_tried_once_fails_with_a_place_that_comes_up_no_more() -> None:
    """Also if the last other place of its shape has been told that it need not ask again."""
    queue = TrialQueue([planned("a", "b", size=2)], RetryPolicy(0))
    assert queue.take("a", 0) == ["a", "b"]
    assert queue.lost("a").again == ("a", "b")
    assert {trial for trial, _ in queue.lost("a").failed} == {"a", "b"} and queue.is_over("a")

    queue = TrialQueue([planned("a", size=1), planned("b", size=1)], POLICY)
    assert [queue.take("a", 0), queue.take("b", 0)] == [["a"], ["b"]]
    assert queue.is_last("a")
    assert queue.lost("b").again == ("b",)
    lost = [queue.lost("b").failed for _ in range(POLICY.retries + 1)]
    assert lost == [(), (), (), (("b", POLICY.retries + 1),)]
    queue.ended("a", "a")
    assert queue.is_over("b")


def test_a_place_that_came_up_is_not_one_that_never_does() -> None:
    queue = TrialQueue([planned("a", "b", size=1)], POLICY, most=1)
    for _ in range(POLICY.retries):
        assert not queue.lost("a").failed
    assert queue.take("a", 0) == ["a"]
    queue.ended("a", "a")
    for _ in range(POLICY.retries):
        assert not queue.lost("a").failed
    assert queue.take("a", 0) == ["b"]


def test_what_a_place_leaves_behind_in_a_drain_counts_nowhere() -> None:
    queue = halving_queue(A, B, size=2)
    assert queue.take(A, 0) == [A, B]
    assert not queue.scored(A, A, 10, 0.9)
    left = queue.left_behind(A)
    assert (left.again, left.failed) == ((B,), ()) and not queue.newly_stopped() and queue.is_paused(A)


def test_companions_are_tried_again_also_where_nothing_else_is() -> None:
    queue = TrialQueue([planned("good", "bad")], RetryPolicy(0))
    for _ in range(2):
        assert queue.take("good", 0) == ["good", "bad"]
        assert queue.lost("good").again == ("good", "bad")
    assert queue.take("good", 0) == ["good"]
    queue.ended("good", "good")
    assert queue.take("good", 0) == ["bad"]
    assert queue.lost("good").failed == (("bad", 1),)


# ------------------------------------------------------------------------------------------- ASHA


def spec(rate: int, seed: int) -> TrialSpec:
    return TrialSpec(DATASETS["digits"], outer_lr=0.01 * (1 + rate), outer_steps=60, seed=seed)


PAIRS = [[spec(rate, seed) for seed in (0, 1)] for rate in range(3)]
ASHA = AshaSpec(grace=10, reduction=2)
(A, B), (C, D), (E, F) = [[trial.trial_id for trial in pair] for pair in PAIRS]


def alone() -> SweepSpec:
    """A sweep whose trials are distilled alone."""
    return SweepSpec.model_validate({"name": "s", "base": {"dataset": "digits"}, "resources": {"cohort": 1}})


def halving_queue(*trials: str, halving: Halving | None = None, size: int = 8, **more: Any) -> TrialQueue:
    halving = halving or Halving(ASHA, [trial for pair in PAIRS for trial in pair])
    return TrialQueue([planned(*trials, size=size)], POLICY, halving=halving, **more)


def test_one_that_waits_frees_its_place_and_goes_on_before_new_ones() -> None:
    """One place: the first seed pauses, so that the second can come; then both go on."""
    queue = halving_queue(A, B, C, size=1)
    assert queue.take(A, 0) == [A]
    assert not queue.scored(A, A, 10, 0.5) and queue.is_paused(A)
    assert queue.take(A, 0) == [B]
    assert queue.scored(A, B, 10, 0.5) and not queue.is_paused(A)
    queue.ended(A, B)
    assert queue.take(A, 0) == [A]
    queue.ended(A, A)
    assert queue.take(A, 0) == [C]


def test_seeds_that_wait_are_stopped_with_the_last() -> None:
    queue = halving_queue(A, B, C, D)
    assert queue.take(A, 0) == [A, B, C, D]
    assert [queue.scored(A, trial, 10, score) for trial, score in ((A, 0.9), (B, 0.9), (C, 0.1))] == [
        *(False, True, False)
    ]
    assert not queue.scored(A, D, 10, 0.1)
    assert sorted(queue.newly_stopped()) == sorted([C, D]) and queue.newly_stopped() == []
    assert queue.take(A, 1) == [A]


@pytest.mark.parametrize("how", ["said so", "worker died"])
def test_a_failure_decides_for_those_that_wait(how: str) -> None:
    queue = halving_queue(A, B)
    queue.take(A, 0)
    assert not queue.scored(A, A, 10, 0.5)
    if how == "said so":
        queue.ended(A, B, failed=True)
        taken = [queue.take(A, 0)]
    else:
        taken = []
        for _ in range(POLICY.retries + 1):
            queue.lost(A)
            taken.append(queue.take(A, 0))
        assert taken[:-1] == [[B]] * POLICY.retries
    assert taken[-1] == [A] and not queue.is_paused(A)


def test_nothing_waits_for_ever() -> None:
    """A seed is not there, though nobody said that it failed: those that wait for it go on."""
    queue = halving_queue(A, C)
    assert queue.take(A, 0) == [A, C]
    assert not queue.scored(A, A, 10, 0.5) and not queue.scored(A, C, 10, 0.9)
    assert queue.take(A, 0) == [A, C]


def test_seeds_that_are_distilled_alone_wait_for_each_other() -> None:
    """Each has a place of its own, and there is one slot: none counts as failed because it has not begun."""
    trials = [trial for pair in PAIRS for trial in pair]
    halving = Halving(ASHA, trials)
    queue = TrialQueue(plan_places(alone(), trials, 1), POLICY, halving=halving)
    score = {A: 0.8, B: 0.2, C: 0.6, D: 0.6, E: 0.9, F: 0.0}
    came: list[str] = []
    for place in trials:
        name, running = place.trial_id, True
        while running:
            running = bool(given := queue.take(name, 0))
            for trial in given:
                if trial not in came:
                    came.append(trial)
                    if not queue.scored(name, trial, 10, score[trial]):
                        continue
                queue.ended(name, trial)
    assert came == [A, B, C, D, E, F]
    assert sorted(queue.newly_stopped()) == sorted([E, F]), "by the means 0.5, 0.6 and 0.45"
    assert halving.verdict(A) == halving.verdict(C) == "go"


def test_one_that_is_tried_again_waits_for_room_also_with_a_scheduler() -> None:
    """Meanwhile another place has all the room."""
    other = TrialSpec(DATASETS["digits"], images_per_class=4, outer_steps=60)
    trials = [PAIRS[0][0], other]
    queue = TrialQueue(plan_places(alone(), trials, 2), POLICY, halving=Halving(ASHA, trials), most=1)
    assert queue.take(A, 0) == [A]
    assert queue.lost(A).again == (A,)
    assert queue.take(other.trial_id, 0) == [other.trial_id]
    assert queue.take(A, 0) is None
    queue.ended(other.trial_id, other.trial_id)
    assert queue.take(A, 0) == [A]


def test_a_seed_that_has_no_room_yet_is_waited_for() -> None:
    other = TrialSpec(DATASETS["digits"], images_per_class=4, outer_steps=60)
    trials = [*PAIRS[0], other]
    halving = Halving(ASHA, trials)
    queue = TrialQueue(plan_places(alone(), trials, 3), POLICY, halving=halving, most=1)
    assert queue.take(A, 0) == [A]
    assert not queue.scored(A, A, 10, 0.5)
    assert queue.take(other.trial_id, 0) == [other.trial_id]
    assert queue.take(A, 0) is None and queue.is_paused(A)
    queue.ended(other.trial_id, other.trial_id)
    assert queue.take(A, 0) == [] and queue.rests(A) and not queue.has_work(A)
    assert queue.take(B, 0) == [B]


def test_a_seed_whose_place_comes_up_no_more_has_failed() -> None:
    """Also if it was tried once, or waits itself: nothing waits for it for ever."""
    trials = [trial for pair in PAIRS for trial in pair]
    queue = TrialQueue(plan_places(alone(), trials, 6), POLICY, halving=Halving(ASHA, trials))
    assert [queue.take(A, 0), queue.take(B, 0)] == [[A], [B]]
    assert not queue.scored(A, A, 10, 0.5)
    assert queue.lost(B).again == (B,)
    for _ in range(POLICY.retries + 1):
        lost = queue.lost(B)
    assert lost.failed == ((B, POLICY.retries + 1),)
    assert not queue.is_paused(A), "its setting was decided on"

    queue = TrialQueue(plan_places(alone(), trials, 6), POLICY, halving=Halving(ASHA, trials))
    assert [queue.take(A, 0), queue.take(B, 0)] == [[A], [B]]
    assert not queue.scored(A, A, 10, 0.5)
    for _ in range(POLICY.retries + 1):
        lost = queue.lost(A)
    assert lost.failed == ((A, POLICY.retries + 1),) and queue.is_over(A)


def test_one_that_is_to_run_apart_does_so_after_a_rung() -> None:
    queue = halving_queue(A, B, C, D, size=2)
    for _ in range(2):
        assert queue.take(A, 0) == [A, B]
        queue.lost(A)
    assert queue.take(A, 0) == [C, D], "those that may be beside others go first"
    for trial in (C, D):
        queue.ended(A, trial)
    assert queue.take(A, 0) == [A] and not queue.scored(A, A, 10, 0.5)
    assert queue.take(A, 0) == [B] and queue.scored(A, B, 10, 0.5)
    assert queue.take(A, 1) == [], "a was released, and still runs apart"
    queue.ended(A, B)
    assert queue.take(A, 0) == [A]


def test_a_place_whose_trials_wait_at_a_rung_comes_back() -> None:
    """It keeps its process as long as nobody else needs the room, and rests if somebody does."""
    other = TrialSpec(DATASETS["digits"], images_per_class=4, outer_steps=60).trial_id
    trials = [*PAIRS[0], TrialSpec(DATASETS["digits"], images_per_class=4, outer_steps=60)]
    queue = TrialQueue(plan_places(alone(), trials, 3), POLICY, halving=Halving(ASHA, trials))
    assert [queue.take(A, 0), queue.take(B, 0), queue.take(other, 0)] == [[A], [B], [other]]
    assert not queue.scored(A, A, 10, 0.5)
    assert queue.take(A, 0) is None and not queue.rests(A), "all places are there"
    assert queue.lost(other).again == (other,)
    assert queue.take(A, 0) == [] and queue.rests(A) and queue.rested(A) and not queue.rested(A)
    assert queue.has_work(other) and not queue.has_work(A) and not queue.is_over(A)
    assert queue.take(other, 0) == [other]
    assert queue.scored(B, B, 10, 0.5) and queue.has_work(A)
    assert queue.take(A, 0) == [A], "beside its sibling"


def test_one_that_waited_when_the_driver_was_killed_waits_again() -> None:
    halving = Halving(ASHA, [trial for pair in PAIRS for trial in pair])
    halving.replay(A, {10: 0.5}, reached=10)
    halving.replay(C, {10: 0.4}, reached=10, stopped=True)
    halving.replay(D, {10: 0.4}, reached=10)
    halving.begin()
    queue = halving_queue(A, B, D, halving=halving)
    assert queue.take(A, 0) == [B], "a is not started"
    assert queue.newly_stopped() == [D], "its sibling was"
    assert queue.scored(A, B, 10, 0.5)
    assert queue.take(A, 1) == [A]


# ---------------------------------------------------------------------------------- what Tune is told


class Controller:
    """What Tune's is to a scheduler."""

    def __init__(self, *trials: Any) -> None:
        self.trials = trials
        self.search_alg = BasicVariantGenerator()
        self._staged_trials: set[Any] = set()
        self._resetting_trials: set[Any] = set()

    def get_live_trials(self) -> Any:
        return {trial for trial in self.trials if trial.status != Trial.TERMINATED}

    def _set_trial_status(self, trial: Any, status: str) -> None:
        trial.status = status

    def stop_trial(self, trial: Any) -> None:
        trial.status = Trial.TERMINATED

    def _unstage_trial_with_resources(self, trial: Any) -> None:
        self._staged_trials.remove(trial)


class OfTune:
    """The part of a Tune trial that a scheduler uses."""

    def __init__(self, name: str) -> None:
        self.status, self.config, self.trial_id = Trial.PENDING, {"place": {"name": name}}, name
        self.run_metadata = SimpleNamespace(last_result={})

    def set_status(self, status: str) -> None:
        self.status = status

    def init_local_path(self) -> None:
        """Ray's has a folder from here on."""


class Post:
    """The mailbox, without Ray."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.box, self.lost = Mailbox(), False
        self.put = SimpleNamespace(remote=self.box.put)
        self.take = SimpleNamespace(remote=self.box.take)
        monkeypatch.setattr(places.ray, "get", lambda value: value)


def tune_of(
    queue: TrialQueue, *names: str, mailbox: Any = None, **more: Any
) -> tuple[Places, Controller, list[Any]]:
    trials = [OfTune(name) for name in names]
    controller, scheduler = Controller(*trials), Places(queue, mailbox, **more)
    for trial in trials:
        scheduler.on_trial_add(controller, trial)  # type: ignore[arg-type]
    return scheduler, controller, trials


def test_a_place_that_died_rests_and_its_room_is_free() -> None:
    now = [0.0]
    queue = TrialQueue([planned("a", size=1), planned("b", size=1, shape="t")], POLICY)
    scheduler, controller, (first, second) = tune_of(queue, "a", "b", clock=lambda: now[0])
    for failures in (1, 2, 3):
        assert scheduler.choose_trial_to_run(controller) is first
        assert queue.take("a", 0) == ["a"]
        first.status = Trial.PENDING  # as Tune has it when it requeues
        scheduler.on_trial_add(controller, first)
        assert first.status == Trial.PAUSED
        assert scheduler.choose_trial_to_run(controller) is second
        now[0] += (POLICY.wait(failures) or 0) - 0.1
        assert scheduler.choose_trial_to_run(controller) is second
        second.status = Trial.RUNNING
        assert scheduler.choose_trial_to_run(controller) is None
        now[0] += 0.2
        second.status = Trial.PENDING if failures < 3 else Trial.RUNNING
        scheduler._waiting = [first, second]
        assert first.status == Trial.PAUSED
        assert scheduler.choose_trial_to_run(controller) in (first, second)
        assert first.status == Trial.PENDING


def test_a_place_that_the_nodes_do_not_hold_rests_until_others_have_joined() -> None:
    """And once its node is lost again, until the end: its trial goes on in the place that is left."""
    room, now = [1], [0.0]
    places = [planned("a", "b", "c", size=1), PlannedPlace("spare", (), 1, "s")]
    queue = TrialQueue(places, POLICY, room=lambda: room[0])
    scheduler, controller, (first, spare) = tune_of(queue, "a", "spare", clock=lambda: now[0])
    assert scheduler.choose_trial_to_run(controller) is first and spare.status == Trial.PAUSED
    first.status = Trial.RUNNING
    assert queue.take("a", 0) == ["a"]
    assert scheduler.choose_trial_to_run(controller) is None and spare.status == Trial.PAUSED

    room[0] = 2
    assert scheduler.choose_trial_to_run(controller) is spare and spare.status == Trial.PENDING
    assert queue.take("spare", 0) == ["b"]

    room[0] = 1
    scheduler.on_trial_add(controller, spare)
    now[0] = 1e6
    assert scheduler.choose_trial_to_run(controller) is None and spare.status == Trial.PAUSED
    queue.ended("a", "a")
    for trial in ("b", "c"):
        assert queue.take("a", 0) == [trial]
        queue.ended("a", trial)
    assert scheduler.choose_trial_to_run(controller) is None and spare.status == Trial.TERMINATED


def test_another_place_of_a_guided_search_stands_in_for_one_that_never_comes_up() -> None:
    places = [planned("a", size=1), PlannedPlace("spare", (), 1, "s"), PlannedPlace("third", (), 1, "s")]
    queue = TrialQueue(places, POLICY, room=lambda: 1)
    assert not queue.fits("spare")
    queue.given_up("a")
    assert queue.fits("spare") and not queue.fits("third")


def test_a_place_that_was_begun_and_is_not_needed_keeps_no_room() -> None:
    queue = TrialQueue([planned("a", size=1), planned("b", size=1)], POLICY)
    scheduler, controller, (first, second) = tune_of(queue, "a", "b")
    assert scheduler.choose_trial_to_run(controller) is first
    controller._staged_trials |= {second}
    first.status = Trial.RUNNING
    for trial in ("a", "b"):
        assert queue.take("a", 0) == [trial]
        queue.ended("a", trial)
    assert scheduler.choose_trial_to_run(controller) is None
    assert second.status == Trial.TERMINATED and not controller._staged_trials


def test_a_place_that_has_no_work_is_not_begun_after_its_rest() -> None:
    """Tune would begin to start whatever is pending."""
    now = [0.0]
    queue = TrialQueue([planned("a", size=1), planned("b", size=1)], POLICY)
    scheduler, controller, (first, second) = tune_of(queue, "a", "b", clock=lambda: now[0])
    first.status = second.status = Trial.RUNNING
    assert [queue.take("a", 0), queue.take("b", 0)] == [["a"], ["b"]]
    scheduler.on_trial_add(controller, first)
    queue.ended("b", "b")
    assert queue.take("b", 0) == ["a"]
    now[0] = 1e6
    assert scheduler.choose_trial_to_run(controller) is None and first.status == Trial.PAUSED
    assert queue.lost("b").again == ("a",)
    assert scheduler.choose_trial_to_run(controller) is first and first.status == Trial.PENDING


def test_a_place_that_rests_lets_others_go_first_and_counts_no_death() -> None:
    trials = [*PAIRS[0], TrialSpec(DATASETS["digits"], images_per_class=4, outer_steps=60)]
    other = trials[2].trial_id
    queue = TrialQueue(plan_places(alone(), trials, 2), RetryPolicy(0), halving=Halving(ASHA, trials))
    scheduler, controller, (first, second, third) = tune_of(queue, A, B, other)
    first.status = second.status = Trial.RUNNING
    assert [queue.take(A, 0), queue.take(B, 0)] == [[A], [B]]
    assert not queue.scored(A, A, 10, 0.5) and queue.take(A, 0) == [] and queue.rests(A)
    scheduler.on_trial_add(controller, first)
    assert first.status == Trial.PAUSED
    assert scheduler.choose_trial_to_run(controller) is third
    third.status = Trial.RUNNING
    assert queue.take(other, 0) == [other]
    assert scheduler.choose_trial_to_run(controller) is None
    assert queue.scored(B, B, 10, 0.5)
    assert scheduler.choose_trial_to_run(controller) is first
    assert queue.take(A, 0) == [A]


def test_a_place_for_which_nothing_is_left_is_taken_out() -> None:
    queue = TrialQueue([planned("a", size=2), planned("b", size=2)], POLICY)
    scheduler, controller, (first, second) = tune_of(queue, "a", "b")
    assert scheduler.choose_trial_to_run(controller) is first
    first.status = Trial.RUNNING
    for trial in queue.take("a", 0) or []:
        queue.ended("a", trial)
    assert scheduler.choose_trial_to_run(controller) is None
    assert second.status == Trial.TERMINATED


def test_a_place_that_is_stopped_while_it_rests_does_not_come_back() -> None:
    now = [0.0]
    queue = TrialQueue([planned("a", size=1)], POLICY)
    scheduler, controller, (trial,) = tune_of(queue, "a", clock=lambda: now[0])
    queue.take("a", 0)
    scheduler.on_trial_add(controller, trial)
    controller.stop_trial(trial)
    now[0] = 1e6
    assert scheduler.choose_trial_to_run(controller) is None and trial.status == Trial.TERMINATED


def test_a_drain_takes_out_all_that_does_not_run() -> None:
    """However many wait, and whatever for; nothing comes after them."""
    drained = False
    names = [f"p{number}" for number in range(100)]
    queue = TrialQueue([planned(name, size=1, shape=name) for name in names], POLICY)
    scheduler, controller, trials = tune_of(queue, *names, draining=lambda: drained)
    running, paused, *waiting = trials
    running.status, paused.status = Trial.RUNNING, Trial.PAUSED
    assert scheduler.choose_trial_to_run(controller) is waiting[0]
    drained = True
    assert scheduler.choose_trial_to_run(controller) is None
    assert running.status == Trial.RUNNING, "it comes to rest by itself"
    assert {trial.status for trial in (paused, *waiting)} == {Trial.TERMINATED}
    assert controller.search_alg.is_finished()


def test_a_place_gets_what_it_asks_for_also_if_the_mailbox_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    post = Post(monkeypatch)
    queue = TrialQueue([planned("a", "b")], POLICY)
    given: list[list[str]] = []

    def on_given(trials: list[str]) -> dict[str, str]:
        given.append(trials)
        return {"b": "a reference"}

    scheduler, controller, (trial,) = tune_of(queue, "a", mailbox=post, on_given=on_given)
    told = 0

    def tell(question: dict[str, Any]) -> None:
        nonlocal told
        told += 1
        assert scheduler.on_trial_result(controller, trial, question) == "CONTINUE"
        if told == 1:
            post.box._answers.clear()

    answer = ask(post, tell, {"state": "room", "running": 0, "place": "a", "number": 1})
    assert told == 2 and given == [["a", "b"]]
    assert answer == (["a", "b"], True, False, {"b": "a reference"})


def test_only_scores_at_rungs_are_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    post = Post(monkeypatch)
    queue = halving_queue(A, B)
    scheduler, controller, (trial,) = tune_of(queue, A, mailbox=post)
    queue.take(A, 0)

    def tell(step: int, score: float | None, number: int) -> Any:
        result = {"state": "running", "trial": A, "outer_step": step, "val_score": score}
        assert scheduler.on_trial_result(controller, trial, {**result, "number": number}) == "CONTINUE"
        return post.box.take(A, number)

    assert tell(5, 0.0, 1) is None, "validated, but no rung"
    assert tell(60, 0.0, 2) is None, "at the last step it is done, not stopped"
    assert tell(10, 0.5, 3) == (3, False), "it waits for the other seed"
