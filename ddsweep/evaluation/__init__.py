"""Judging distilled sets on held-out networks, with baselines beside them. No Ray in here.

The work on one trial falls into `EvalUnit`s: a group of networks under one protocol. `evaluate_unit`
computes one and writes its part; `finish` sums up a trial whose parts are all there. Both may be
called again at any time, by anyone: what is done is seen and kept.

A row does not depend on who computed it: a unit always trains its whole group together, on one thread,
with networks that are pure functions of their index.
"""

from ddsweep.evaluation.units import evaluate_unit, finish, missing_units, trial_is_done

__all__ = ["evaluate_unit", "finish", "missing_units", "trial_is_done"]
