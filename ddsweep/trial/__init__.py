"""One trial from its settings to its distilled set: resumable, without Ray.

A Tune worker, an array task, a benchmark and a test all call `distil_trial`. It checkpoints into the
trial's folder and can be killed at any moment: a call with the same settings goes on from the last
checkpoint and, on the same kind of machine, ends with the same bits.

`distil` is the way of one trial, or of several together, from the first step to the last, `running` one of
them between two steps, `step` one outer step in the memory there is, `validation` the score and the recipe
that are found on validation images, `run_state` what a checkpoint carries, and `files` what is left in the
folder.
"""

from ddsweep.trial.distil import Companions, distil_together, distil_trial
from ddsweep.trial.files import is_distilled, read_distilled, record_failure
from ddsweep.trial.run_state import TrialJob, checkpoint_provenance, saved_steps
from ddsweep.trial.running import Progress
from ddsweep.trial.validation import training_networks

__all__ = [
    "Companions",
    "Progress",
    "TrialJob",
    "checkpoint_provenance",
    "distil_together",
    "distil_trial",
    "is_distilled",
    "read_distilled",
    "record_failure",
    "saved_steps",
    "training_networks",
]
