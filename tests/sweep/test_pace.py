"""The time that is left, for sweeps with a known course, from what was seen so far."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import pytest

from ddsweep.sweep.pace import Left, Pace

STEPS = 100


@dataclass(frozen=True)
class Sweep:
    """Trials of ``seconds`` each on ``places``, beginning after ``startup``; one evaluation at a time takes
    ``evaluation``. ``weights`` are what the estimates said, in units of their own."""

    seconds: tuple[float, ...]
    places: int = 2
    evaluation: float = 10.0
    startup: float = 5.0
    every: int = 10

    def events(self) -> list[tuple[float, str, int, int]]:
        """(time, what, trial, outer step) of the whole sweep, in order."""
        free = [self.startup] * self.places
        heapq.heapify(free)
        out: list[tuple[float, str, int, int]] = []
        ends = []
        for trial, seconds in enumerate(self.seconds):
            start = heapq.heappop(free)
            out.append((start, "started", trial, 0))
            for step in range(self.every, STEPS + 1, self.every):
                out.append((start + seconds * step / STEPS, "stepped", trial, step))
            heapq.heappush(free, start + seconds)
            ends.append((start + seconds, trial))
            out.append((start + seconds, "distilled", trial, STEPS))
        done = 0.0
        for end, trial in sorted(ends):
            done = max(done, end) + self.evaluation
            out.append((done, "evaluated", trial, STEPS))
        order = ["evaluated", "stepped", "distilled", "started"]
        return sorted(out, key=lambda event: (event[0], order.index(event[1])))


def follow(sweep: Sweep, weight: float = 0.01) -> list[tuple[float, Left | None]]:
    """(time, forecast of the time left) after each event; estimates are off by a factor."""
    pace = Pace()
    pace.expect({str(trial): weight * seconds for trial, seconds in enumerate(sweep.seconds)}, [])
    said = []
    for now, what, trial, step in sweep.events():
        if what == "stepped":
            pace.stepped(str(trial), step, sweep.every, now)
        elif what == "started":
            pace.started(str(trial), STEPS, now)
        else:
            getattr(pace, what)(str(trial), now)
        said.append((now, pace.left(now)))
    return said


@pytest.mark.parametrize(
    "sweep",
    [
        Sweep((60.0,) * 8),
        Sweep((60.0,) * 8, places=8),
        Sweep((600.0,) * 40, places=4, evaluation=5.0),
        Sweep((20.0, 20.0, 120.0, 120.0) * 4),
        Sweep((30.0,) * 12, places=4, evaluation=60.0),  # evaluation takes most of it
        Sweep((30.0,) * 700, places=8, evaluation=1.0, every=50),
    ],
    ids=["even", "all at once", "long", "uneven", "evaluation", "many"],
)
def test_what_is_left_is_what_is_left(sweep: Sweep) -> None:
    said = follow(sweep)
    end = said[-1][0]
    first = next(place for place, (_, left) in enumerate(said) if left and left.seconds is not None)
    for now, left in said[first:-1]:
        assert left is not None and left.seconds is not None
        assert left.seconds == pytest.approx(end - now, rel=0.25, abs=max(2.0, 0.05 * end))
    assert said[-1][1] is None, "nothing is left"


def test_before_anything_is_measured_nothing_is_said() -> None:
    said = follow(Sweep((60.0,) * 4))
    assert [left for now, left in said if now <= 5.0] == [None, None]
    pace = Pace()
    assert pace.left(0.0) is None
    pace.expect({"a": 1.0}, [])
    assert pace.left(100.0) is None
    pace.started("a", STEPS, 100.0)
    assert pace.left(200.0) is None


def test_before_an_evaluation_is_measured_only_distilling_is_told() -> None:
    sweep = Sweep((60.0,) * 4)
    for now, left in follow(sweep):
        if 5.0 + 6.0 < now < 75.0:
            assert left is not None and left.seconds is None
            assert left.distilling == pytest.approx(125.0 - now, abs=1.0)
    assert any(left is not None and left.seconds for _, left in follow(sweep))


def test_only_evaluation_is_left() -> None:
    pace = Pace()
    pace.expect({}, ["a", "b", "c", "d"])
    for name in "abcd":
        pace.distilled(name, 10.0)
    assert pace.left(60.0) is None
    pace.evaluated("a", 70.0)
    assert pace.left(70.0) == Left(180.0, None)
    assert pace.left(100.0) == Left(150.0, None)
    pace.evaluated("b", 130.0)
    pace.dropped("c", 130.0)
    assert pace.left(130.0) == Left(60.0, None)
    pace.evaluated("d", 190.0)
    assert pace.left(190.0) is None


def test_a_trial_that_goes_on_counts_what_this_run_does() -> None:
    """It was at step 80 of 100: 20 steps in 20 s are no 100 steps in 20 s for the next one."""
    pace = Pace()
    pace.expect({"a": 1.0, "b": 1.0}, [])
    pace.started("a", STEPS, 0.0)
    for step in (90, 100):
        pace.stepped("a", step, 10, step - 80.0)
    left = pace.left(20.0)
    assert left is not None and left.distilling == pytest.approx(100.0)
    pace.distilled("a", 20.0)
    left = pace.left(20.0)
    assert left is not None and left.distilling == pytest.approx(100.0)


def test_trials_that_a_search_is_still_to_propose_count_like_those_that_it_has() -> None:
    pace = Pace()
    pace.expect({"a": 1.0}, [])
    pace.expect_more({}, [], 3)
    pace.started("a", STEPS, 0.0)
    for step in (50, 100):
        pace.stepped("a", step, 50, float(step))
    left = pace.left(100.0)
    assert left is not None and left.distilling == pytest.approx(300.0)
    pace.distilled("a", 100.0)
    pace.expect_more({"b": 2.0}, [], 2)
    left = pace.left(100.0)
    assert left is not None and left.distilling == pytest.approx(600.0), "a proposal is twice as long"
    pace.expect_more({}, [], 0)
    left = pace.left(100.0)
    assert left is not None and left.distilling == pytest.approx(200.0), "it has no more"


def test_a_worker_that_died_begins_again() -> None:
    pace = Pace()
    pace.expect({"a": 1.0}, [])
    pace.started("a", STEPS, 0.0)
    pace.stepped("a", 40, 40, 40.0)
    pace.stepped("a", 60, 20, 60.0)
    pace.stepped("a", 50, 10, 100.0)  # from its checkpoint at 40
    pace.stepped("a", 60, 10, 110.0)
    left = pace.left(110.0)
    assert left is not None and left.distilling == pytest.approx(40.0)


def test_a_trial_whose_report_is_late_is_not_about_to_end() -> None:
    """A report every ten steps, which take a second each; then the machine sleeps for an hour."""
    pace = Pace()
    pace.expect({"a": 1.0}, [])
    pace.started("a", STEPS, 0.0)
    for now in (10.0, 20.0, 30.0):
        pace.stepped("a", int(now), 10, now)
        assert pace.left(now) == Left(None, STEPS - now)
    assert pace.left(39.0) == Left(None, STEPS - 39.0)
    assert pace.left(40.0) == Left(None, 60.0)
    said = [pace.left(now) for now in (41.0, 70.0, 3630.0)]
    # At least 60 steps are to come after the late report, and none of them was as fast as a second.
    assert all(left is not None and left.distilling is not None and left.distilling > 60 for left in said)
    assert said[-1] == Left(None, pytest.approx(60 * 3620 / 30))
    pace.stepped("a", 40, 10, 3640.0)
    pace.stepped("a", 50, 10, 3650.0)
    assert pace.left(3650.0) == Left(None, 50.0), "the hour is over"


def test_stopped_trials_leave_less_and_the_rest_is_said_to_be_at_most_that() -> None:
    pace = Pace()
    pace.expect(dict.fromkeys("abcd", 1.0), [], at_most=True)
    for name in "ab":
        pace.started(name, STEPS, 0.0)
        pace.stepped(name, 10, 10, 10.0)
    before = pace.left(10.0)
    pace.dropped("c", 10.0)
    pace.dropped("d", 10.0)
    after = pace.left(10.0)
    assert before is not None and after is not None
    assert (before.distilling, after.distilling) == (pytest.approx(190.0), pytest.approx(90.0))
    assert before.at_most and after.at_most


def test_a_paused_trial_waits_with_what_is_left_of_it() -> None:
    pace = Pace()
    pace.expect({"a": 1.0, "b": 1.0}, [], at_most=True)
    pace.started("a", STEPS, 0.0)
    for step in (20, 40):
        pace.stepped("a", step, 20, step)
    pace.paused("a", 40.0)
    pace.started("b", STEPS, 40.0)
    for step in (20, 40):
        pace.stepped("b", step, 20, 40.0 + step)
    left = pace.left(80.0)
    assert left is not None and left.distilling == pytest.approx(60.0 + 60.0)
    pace.paused("b", 80.0)
    pace.started("a", STEPS, 80.0)
    left = pace.left(80.0)
    assert left is not None and left.distilling == pytest.approx(60.0 + 60.0)
