"""Asynchronous successive halving of settings: which trials go on, wait for the other seeds, or are stopped.

No Ray here, and no clock: decisions follow from the scores so far, which are in the files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

import numpy as np

from ddsweep.catalog import TrialSpec
from ddsweep.spec import AshaSpec, setting_of

__all__ = ["WORST", "Halving", "Verdict"]

Verdict = Literal["go", "wait", "stop"]

WORST = 0.0
"""The score of a failed seed: accuracy and attack success are fractions, so none is lower."""


@dataclass
class _Setting:
    """All seeds of one setting: the ``scores`` of each by rung, and the decision at each rung in
    ``decided``."""

    stratum: tuple[Any, ...]
    rungs: tuple[int, ...]
    seeds: list[str] = field(default_factory=list)
    scores: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    decided: dict[int, bool] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    reached: dict[str, int] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)

    def next_rung(self) -> int | None:
        """The first rung without a decision; None after the last, and once it was stopped."""
        if not all(self.decided.values()):
            return None
        return next((rung for rung in self.rungs if rung not in self.decided), None)

    def all_there(self, rung: int) -> bool:
        return all(seed in self.scores[rung] or seed in self.failed for seed in self.seeds)

    def mean(self, rung: int) -> float | None:
        """The mean over the seeds with a known score and the failed ones."""
        known = [*self.scores[rung].values(), *(WORST for s in self.failed if s not in self.scores[rung])]
        return fmean(known) if known else None


class Halving:
    """The decisions of ``asha`` over all ``trials`` of a sweep, with those of earlier runs.

    The state of an earlier run comes first: `replay` for each trial, then `begin`. A decision on a setting is
    made as soon as each of its seeds has a score at the rung or has failed; ``decided`` are the trials of
    settings on which one was made and that nobody has asked for yet.
    """

    def __init__(self, asha: AshaSpec, trials: Sequence[TrialSpec]) -> None:
        self._asha = asha
        self._settings: dict[tuple[Any, ...], _Setting] = {}
        self._setting: dict[str, _Setting] = {}
        self._recorded: defaultdict[tuple[Any, ...], list[float]] = defaultdict(list)
        self.decided: list[str] = []
        self.add(trials)

    def add(self, trials: Sequence[TrialSpec]) -> None:
        """Further trials: all seeds of their settings."""
        for trial in trials:
            setting = self._settings.setdefault(
                setting_of(trial), _Setting(self._asha.stratum(trial), self._asha.rungs(trial))
            )
            setting.seeds.append(trial.trial_id)
            self._setting[trial.trial_id] = setting

    def replay(
        self, trial_id: str, scores: Mapping[int, float], reached: int, *, stopped: bool = False
    ) -> None:
        """Tell what an earlier run left of a trial: its ``scores`` by outer step, the last step it
        ``reached``, and whether it was ``stopped`` there."""
        setting = self._setting[trial_id]
        setting.reached[trial_id] = reached
        if stopped:
            setting.stopped.add(trial_id)
        for rung in setting.rungs:
            if rung in scores:
                setting.scores[rung][trial_id] = scores[rung]

    def begin(self) -> None:
        """Make the decisions that follow from the replayed scores. A setting with a seed beyond a rung has
        passed that rung: it was decided then, or there was no scheduler."""
        open_: list[tuple[_Setting, int]] = []
        for setting in self._settings.values():
            for rung in setting.rungs:
                passed = any(reached > rung for reached in setting.reached.values())
                if not passed and not setting.stopped:
                    if setting.all_there(rung):
                        open_.append((setting, rung))
                    break
                setting.decided[rung] = passed
                if (mean := setting.mean(rung)) is not None:
                    self._recorded[setting.stratum, rung].append(mean)
                if not passed:
                    break
        for setting, rung in open_:  # now that all earlier scores are recorded
            self._decide(setting, rung)

    def verdict(self, trial_id: str) -> Verdict:
        """What a trial does next, after its last score."""
        setting = self._setting[trial_id]
        here = max((rung for rung in setting.rungs if trial_id in setting.scores[rung]), default=None)
        if not all(setting.decided.values()):
            last = max(setting.decided)
            return "stop" if here is not None and here >= last else "go"
        return "go" if here is None or here in setting.decided else "wait"

    def is_rung(self, trial_id: str, outer_step: int) -> bool:
        return outer_step in self._setting[trial_id].rungs

    def scored(self, trial_id: str, rung: int, score: float) -> Verdict:
        """A trial has come to a ``rung``."""
        setting = self._setting[trial_id]
        setting.scores[rung].setdefault(trial_id, score)
        missed = [lower for lower in setting.rungs if lower < rung and lower not in setting.decided]
        if missed and all(setting.decided.values()):  # it is beyond them: no trial waits there any more
            setting.decided |= dict.fromkeys(missed, True)
            self.decided += setting.seeds
        self._decide_if_all_there(setting)
        return self.verdict(trial_id)

    def failed(self, trial_id: str) -> None:
        """A trial has failed for good."""
        setting = self._setting[trial_id]
        setting.failed.add(trial_id)
        self._decide_if_all_there(setting)

    def awaited(self, trial_id: str) -> list[str]:
        """The seeds for which a paused trial waits."""
        setting = self._setting[trial_id]
        rung = setting.next_rung()
        there = {} if rung is None else setting.scores[rung]
        return [seed for seed in setting.seeds if seed not in there and seed not in setting.failed]

    def wait_no_longer(self, trial_id: str) -> None:
        """No trial is left to wait for: missing seeds count as failed."""
        setting = self._setting[trial_id]
        rung = setting.next_rung()
        if rung is not None:
            setting.failed |= {seed for seed in setting.seeds if seed not in setting.scores[rung]}
            self._decide_if_all_there(setting)

    def _decide_if_all_there(self, setting: _Setting) -> None:
        rung = setting.next_rung()
        if rung is not None and setting.all_there(rung):
            self._decide(setting, rung)

    def _decide(self, setting: _Setting, rung: int) -> None:
        """As Ray's ASHA: a setting goes on if it reaches the quantile 1 - 1/reduction of those recorded
        before; the first one always does."""
        mean, before = setting.mean(rung), self._recorded[setting.stratum, rung]
        assert mean is not None, "nobody came"
        best = 100 * (1 - 1 / self._asha.reduction)
        setting.decided[rung] = not before or mean >= float(np.percentile(before, best))
        before.append(mean)
        self.decided += setting.seeds

    def __str__(self) -> str:
        return f"ASHA in {len({s.stratum for s in self._settings.values() if s.rungs})} strata"
