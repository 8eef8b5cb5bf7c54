"""Judging distilled sets on held-out networks, with baselines beside them. No Ray in here.

The work on one trial falls into `EvalUnit`s: a group of networks under one protocol. `evaluate_unit` computes
what is missing of one and writes its part; `finish` sums up a trial once everything that is asked is there.
Both may be called again at any time, by any process: finished work is found and kept. `record_stop` ends a
trial that a scheduler stopped; such a trial never sees held-out networks.

A row does not depend on the process that computed it: a unit always trains its whole group together, on one
thread, with networks that are pure functions of their index.
"""

from ddsweep.evaluation.elsewhere import take_over, take_over_all
from ddsweep.evaluation.endings import (
    finish,
    forget_stop,
    record_stop,
    settled,
    trial_is_done,
    trial_is_stopped,
)
from ddsweep.evaluation.units import evaluate_unit, missing_units

__all__ = [
    "evaluate_unit",
    "finish",
    "forget_stop",
    "missing_units",
    "record_stop",
    "settled",
    "take_over",
    "take_over_all",
    "trial_is_done",
    "trial_is_stopped",
]
