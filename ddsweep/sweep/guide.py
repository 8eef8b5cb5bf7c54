"""The guided searches of a running sweep: what was tried, read off the files, and what is tried next."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from ddsweep.catalog import TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.errors import ResultsError, UserError
from ddsweep.results.current import add_current
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part
from ddsweep.results.proposals import read_proposals, write_proposals
from ddsweep.spec import Plan, Proposed, Sample, Search, SweepSpec
from ddsweep.sweep.halving import WORST
from ddsweep.sweep.tpe import Tried, propose

__all__ = ["Guide"]

_Ended = tuple[float, int | None]
"""The score of a trial's set, and the outer step at which a scheduler stopped it."""

_FAILED: _Ended = WORST, 0
"""As if it had been stopped before its first step."""


class Guide:
    """Proposes the samples that are ``left`` of the searches of ``sweep``; the caller holds the sweep's lock.

    ``expand`` makes the plan from proposals. The draws at the start are written down at once, a proposal
    before its trials are handed out. ``plan`` has all trials so far.
    """

    def __init__(
        self, sweep: SweepSpec, directory: SweepDirectory, expand: Callable[[Proposed], Plan]
    ) -> None:
        assert sweep.search is not None
        self._search, self._scheduled = sweep.search, sweep.scheduler is not None
        self._directory, self._expand = directory, expand
        # That no sample was left is looked at again: what was in the way may be gone.
        over = self._search.no_more_marker
        self._written = {
            key: [values for values in written if values != over]
            for key, written in read_proposals(directory).items()
        }
        self._ended: dict[str, _Ended] = {}
        self.plan = expand(self._written)
        for search in self.plan.searches:
            if search.key not in self._written and search.written:  # under the key of an earlier version
                self._written[search.key] = [dict(values) for values in search.written]
            known = len([v for v in self._written.get(search.key, ()) if self._search.in_space(v)])
            if drawn := [dict(sample.values) for sample in search.samples[known:]]:
                self._write(search, *drawn)

    @property
    def left(self) -> bool:
        """Whether a sample may still be proposed."""
        return any(search.left for search in self.plan.searches)

    @property
    def ended_early(self) -> str | None:
        """In words, that searches found no further sample; None if all have as many as were asked for."""
        asked = self._search.samples
        short = [found for s in self.plan.searches if not s.left and (found := len(s.samples)) < asked]
        if not short:
            return None
        few = f"{min(short)}" if min(short) == max(short) else f"{min(short)} to {max(short)}"
        searches = counted(len(short), "search", "searches")
        return (
            f"{searches} ended with {few} of {asked} samples: no other one that is new and possible was found"
        )

    @property
    def to_propose(self) -> int:
        """The most trials that may still be proposed."""
        return self.plan.to_propose

    @property
    def open_trials(self) -> tuple[TrialSpec, ...]:
        """The trials of searches that may propose more: what they ask of a machine, the next ones do too."""
        ids = {
            id for search in self.plan.searches if search.left for s in search.samples for id in s.trial_ids
        }
        return tuple(trial for trial in self.plan.trials if trial.trial_id in ids)

    @property
    def drawn(self) -> int:
        """How many trials the draws at the start come to."""
        seeds = (len(sample.trial_ids) for search in self.plan.searches for sample in search.samples)
        return self._search.drawn * len(self.plan.searches) * max(seeds, default=1)

    def propose(self) -> tuple[TrialSpec, ...]:
        """The trials of one more sample; none once no sample is left. Raises `ResultsError` if it cannot be
        written down."""
        while open_ := [search for search in self.plan.searches if search.left]:
            search = min(open_, key=lambda search: len(search.samples))
            if trials := self._next(search):
                return trials
            self._write(search, self._search.no_more_marker)
            self.plan = self._expand(self._written)
        return ()

    def _next(self, search: Search) -> tuple[TrialSpec, ...]:
        before = {trial.trial_id for trial in self.plan.trials}
        made: dict[str, Plan] = {}

        def possible(values: dict[str, Any]) -> bool:
            try:
                plan = made[repr(values)] = self._expand(self._with(search, values))
            except UserError:  # a combination, or a network of the user's own, that cannot be
                return False
            return any(trial.trial_id not in before for trial in plan.trials)

        tried = [self.tried(sample) for sample in search.samples]
        values = propose(self._search, search.key, tried, possible)
        if values is None:
            return ()
        self._write(search, values)
        self.plan = made[repr(values)]
        trials = tuple(trial for trial in self.plan.trials if trial.trial_id not in before)
        add_current(self._directory, [trial.trial_id for trial in trials])
        return trials

    def _with(self, search: Search, *values: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        return {**self._written, search.key: [*self._written.get(search.key, ()), *values]}

    def _write(self, search: Search, *values: dict[str, Any]) -> None:
        written = self._with(search, *values)
        write_proposals(self._directory, search.key, search.settings, written[search.key])
        self._written = written

    # -------------------------------------------------------------------------------- what was tried

    def tried(self, sample: Sample) -> Tried:
        """How a sample did, by the files. One that failed with all seeds, or is impossible, counts as stopped
        before its first step, which is worse than all others."""
        found = [self._ending(trial_id) for trial_id in sample.trial_ids]
        ended = [one for one in found if one is not None]
        if len(ended) < len(found):
            return Tried(sample.values)
        if all(one == _FAILED for one in ended):
            return Tried(sample.values, *_FAILED)
        stops = [step for score, step in ended if step is not None and (score, step) != _FAILED]
        return Tried(sample.values, fmean(score for score, _ in ended), min(stops, default=None))

    def _ending(self, trial_id: str) -> _Ended | None:
        """None for a trial that is not at its end."""
        if trial_id not in self._ended and (found := self._read(trial_id)):
            self._ended[trial_id] = found
        return self._ended.get(trial_id)

    def _read(self, trial_id: str) -> _Ended | None:
        directory = self._directory
        row = KnownParts().metadata(directory.trials_part(trial_id))
        stopped = row is not None and row.get("status") == "stopped"
        if stopped and not self._scheduled:
            return None  # it goes on
        if not stopped and not directory.distilled(trial_id).is_file():
            return _FAILED if directory.failure_part(trial_id).exists() else None
        try:
            history = read_part(directory.history_part(trial_id)).to_pylist()
        except ResultsError:
            return None
        scored = [row for row in history if row["val_score"] is not None]
        if not scored:
            return None
        if stopped:
            return scored[-1]["val_score"], scored[-1]["outer_step"]
        last = scored[-1]["val_score"]
        trial = next((trial for trial in self.plan.trials if trial.trial_id == trial_id), None)
        if trial is None or trial.keep == "last":
            return last, None
        # A rung of a scheduler does not decide which state is kept.
        steps = (trial.outer_steps, *range(0, trial.outer_steps, trial.validate_every))
        return max((row["val_score"] for row in scored if row["outer_step"] in steps), default=last), None
