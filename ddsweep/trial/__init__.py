"""One trial from its settings to its distilled set: resumable, without Ray.

A Tune worker, an array task, a benchmark and a test all call `distil_trial`. It checkpoints into the
trial's folder and can be killed at any moment: a call with the same settings goes on from the last
checkpoint and, on the same kind of machine, ends with the same bits.

`distil` is the way from the first step to the last, `step` one outer step in the memory there is,
`validation` the score and the recipe that are found on validation images, `run_state` what a checkpoint
carries, and `files` what is left in the folder.
"""

from ddsweep.trial.distil import Progress, distil_trial
from ddsweep.trial.files import is_distilled, read_distilled, record_failure
from ddsweep.trial.run_state import checkpoint_provenance
from ddsweep.trial.validation import training_networks

__all__ = [
    "Progress",
    "checkpoint_provenance",
    "distil_trial",
    "is_distilled",
    "read_distilled",
    "record_failure",
    "training_networks",
]
