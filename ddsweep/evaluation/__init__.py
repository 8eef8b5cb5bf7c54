"""Judging distilled sets on held-out networks, with baselines beside them. No Ray in here.

The work on one trial falls into `EvalUnit`s: a group of networks under one protocol. `evaluate_unit`
computes one and writes its part; `finish` sums up a trial whose parts are all there. Both may be
called again at any time, by anyone: what is done is seen and kept. `record_stop` is how a trial ends
that a scheduler stopped: it is never looked at on held-out networks.

A row does not depend on who computed it: a unit always trains its whole group together, on one thread,
with networks that are pure functions of their index.
"""

from ddsweep.evaluation.units import (
    evaluate_unit,
    finish,
    forget_stop,
    missing_units,
    record_stop,
    trial_is_done,
    trial_is_stopped,
)

__all__ = [
    "evaluate_unit",
    "finish",
    "forget_stop",
    "missing_units",
    "record_stop",
    "trial_is_done",
    "trial_is_stopped",
]
