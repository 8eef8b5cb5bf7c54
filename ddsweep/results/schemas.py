"""The columns of the result tables: public API, one explicit schema per table.

A class below is a table or a part of one; the text below columns says what they mean, for docs/results.md.
Accuracies are fractions, times are seconds, sizes are bytes. Null means not measured. Every column may be
null in a file, so that a table can get a new column and still read older files.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, NewType, get_type_hints

import pyarrow as pa

from ddsweep.catalog import SEED, SETTINGS

__all__ = ["EVALS", "FAILURES", "HISTORY", "PARTS", "POOL", "SCHEMA_VERSION", "SORT_KEYS", "TABLES", "TRIALS"]

SCHEMA_VERSION = 1
"""Raised when a column changes its meaning. A new column does not raise it: old files read it as null."""

Long = NewType("Long", int)
"""A whole number of 64 bits; others have 32."""


class _Trial:
    """One row for each trial that has ended."""

    trial_id: str
    sweep: str
    """id and sweep"""
    in_sweep: bool
    """whether the sweep file still has the trial (below); null, in rows of older versions, means true"""


class _OfPool:
    """The pool of a trial."""

    source_dataset: str
    pool_recipe: str
    pool_train: int
    """the data that the networks of `pool` were trained on, a hash of their recipe, and how many of them
    distillation used; null without a pool"""


class _Outcome:
    """What came out, what it cost, and where it came from."""

    status: str
    """`done`, or `stopped`"""
    outer_steps_done: int
    """outer steps taken: `outer_steps`, or fewer if the trial was stopped"""
    val_score: float
    """mean accuracy on the validation split, over selection networks, of the set that was handed over (of an
    attack: its success there): at the last outer step that was done, or at the best"""
    test_accuracy_mean: float
    """after T steps, over `test_models` held-out networks: all that have rows in `evals` (below); `fixed`: on
    its one known network"""
    test_accuracy_std: float
    test_accuracy_ci95: float
    """over those networks: standard deviation (n - 1), half-width of the 95 % interval (Student t); null for
    one network"""
    test_accuracy_before_mean: float
    test_accuracy_before_std: float
    """the same networks before training"""
    test_attack_success_mean: float
    test_attack_success_std: float
    test_attack_success_ci95: float
    test_attack_success_before_mean: float
    """of an attack: the fraction of `attack_class` that is called `target_class`, after T steps and before"""
    test_accuracy_other_mean: float
    test_accuracy_other_std: float
    test_accuracy_other_before_mean: float
    """of an attack: accuracy on all other classes"""
    test_models: int
    n_diverged: int
    """networks, and how many of them diverged; they count in the mean"""
    gain_mean: float
    gain_ci95: float
    """accuracy of the distilled set minus that of `random_real` with the same T, network by network: mean
    over the networks that have both, half-width of its 95 % interval (Student t; null for one network). The
    gain of the printed table; null without `random_real`, and in rows of versions without these columns"""
    wall_seconds: float
    cpu_seconds: float
    gpu_seconds: float
    """of distilling, all runs of the trial together; GPU: granted fraction x wall, without the shares of
    trials beside it in a cohort"""
    peak_memory_bytes: Long
    """of the process while it did this trial (CPU, on Linux), or allocated on the GPU; includes torch itself
    on the CPU"""
    distilled_bytes: Long
    distilled_sha256: str
    """size of the file; hash of images, labels and rates"""
    dataset_fingerprint: str
    dataset_stand_in: bool
    """content of the data; whether it stands in for the named set"""
    spec_version: int
    evaluation_id: str
    """version of the meaning of settings; what was asked of the evaluation when the row was written"""
    outer_loss: float
    n_skipped: Long
    """last outer loss; networks left out over all outer steps"""
    n_rollbacks: int
    """times that the trial diverged and went back to a healthy state"""
    n_resumed: int
    n_torn_checkpoints: int
    """times that the trial went on from a checkpoint; damaged checkpoints that it moved aside"""
    device: str
    device_name: str
    threads: int
    memory_mode: str
    """how it was computed"""
    execution_plan: str
    n_replans: int
    """the execution plan at the end (JSON), and how often it changed: because memory ran out, torch could not
    compile, or there was no compiler any more; null in rows of versions without these columns"""
    host: str
    started_at: datetime
    ended_at: datetime
    """the machine, and the times (UTC)"""
    ddsweep_version: str
    git_commit: str
    git_dirty: bool
    python_version: str
    torch_version: str
    ray_version: str
    """the versions it was made with; `git_dirty`: the code had changes beyond the commit"""


class _OfData:
    """What was found in the data."""

    dataset_shape: str
    n_test_in_train: int
    """shape of the images after all transforms (`3x32x32`); test images that are training images too, pixel
    by pixel. Null in rows of versions without these columns"""
    network_version: str
    """of a network [of a user's own](networks.md) that is an installed module: the package and its version"""


class _OfNetworks:
    """Which networks it learned from."""

    pool_networks: str
    """of a trial with a pool: a hash of the training networks; it changes where a pool is trained anew. Null
    in rows of versions without this column"""


class _OfCohort:
    """With how many others it ran."""

    cohort_size: int
    """the greatest number of trials that were distilled together with it, itself included; null in rows of
    versions without this column. Its `cpu_seconds` and `gpu_seconds` are shares, which add up to what was
    spent; `wall_seconds` is what passed"""


class _Evals:
    """One row for each (trial, source, protocol, network, inner step)."""

    trial_id: str
    """the trial"""
    source: str
    """`distilled`, or a baseline: `random_real`, `optimized_random` (one draw, the best of several on
    validation images), `class_mean`, `kmeans`, `knn_random`, `knn_kmeans`"""
    protocol: str
    """`as_distilled`; `on_random`: a `fixed` set on random networks; `*_tuned`: a baseline, or a set without
    learned rates, at its best rate and epochs; `nearest_neighbour`: k-NN, no network; else the name of a
    [protocol](settings.md) of one's own"""
    network: str
    init_law: str
    pool: str
    """the networks; null for nearest neighbour"""
    model_seed: Long
    """number of the held-out network (`fixed`: of the known one), and of its draw of real images"""
    split: str
    """`test`"""
    inner_step: int
    """gradient steps taken: 0, the end of each epoch, T (of a protocol: of its own epochs), beyond; baselines
    at their last only"""
    inner_epochs: int
    inner_lr: float
    """epochs; the constant rate of a baseline, of a protocol, or of a set whose method learns no rates; null
    for a set with rates of its own, learned or fixed"""
    order: str
    inner_optimizer: str
    """in which order images were used, by which optimiser: with an `inner_batch` always `shuffled`, though a
    set that is one minibatch has nothing to shuffle; null for nearest neighbour, and in files of versions
    without these columns"""
    accuracy: float
    """on the split"""
    accuracy_other: float
    attack_success: float
    """of an attack: accuracy on the classes but `attack_class`, and the fraction of that called
    `target_class`; else null"""
    loss: float
    diverged: bool
    """on the split; loss is null where the network diverged"""
    n_images: int
    """images of the split: all of it"""
    dataset_stand_in: bool
    """whether the data, or those of the pool, stand in for the named ones"""
    group: int
    """the networks that were computed together"""
    weight_decay: float
    """of a protocol; null: none"""
    inner_batch: int
    """of a protocol: images in a minibatch of all images of the set; null: the set's own batches"""
    inner_schedule: str
    inner_decay_epochs: int
    inner_decay_factor: float
    """of a protocol: `step` or `cosine`, and of `step` the epochs between decays of `inner_lr` and the factor
    of one; null: a constant rate"""
    inner_augment: str
    """of a protocol: random changes of the distilled images in each step; null: none"""


class _History:
    """One row for each logged outer step of a trial."""

    trial_id: str
    outer_step: int
    """outer steps done"""
    outer_loss: float
    """mean over the finite networks of that step"""
    val_score: float
    """at validation steps, and where a scheduler compared"""
    grad_norm: float
    """norm of the gradient applied"""
    inner_lr_mean: float
    """mean learned rate"""
    n_skipped: int
    """networks left out in that step"""
    n_rollbacks: int
    """times it went back to a healthy state so far; rows of steps that were taken again are the later ones"""
    seconds: float
    """wall seconds of the trial so far"""


class _Failures:
    """One row for each trial that failed and has not succeeded since."""

    trial_id: str
    sweep: str
    """the trial and its sweep"""
    status: str
    """`failed`, or `diverged`"""
    error_class: str
    message: str
    place: str
    """the error, and the stage in which it came"""
    host: str
    """the machine of the last attempt"""
    attempts: int
    """attempts that were made"""
    failed_at: datetime
    """the time (UTC)"""


class _Pool:
    """One row for each network of a pool: `index.parquet` of its folder."""

    pool: str
    role: str
    index: Long
    seed: Long
    dataset: str
    dataset_fingerprint: str
    dataset_stand_in: bool
    network: str
    init_law: str
    init_param: float
    epochs: int
    batch: int
    lr: float
    decay_epochs: int
    decay_factor: float
    recipe: str
    accuracy: float
    loss: float
    """on the test set of the data that it was trained on"""
    sha256: str
    wall_seconds: float
    cpu_seconds: float
    """of the networks that were trained together, divided by their number"""
    device: str
    device_name: str
    threads: int
    trained_at: datetime
    host: str
    ddsweep_version: str
    git_commit: str
    git_dirty: bool
    python_version: str
    torch_version: str
    ray_version: str


_SETTINGS = (
    "dataset network objective init init_law pool images_per_class inner_steps images_per_class_per_step "
    "inner_epochs outer_steps models_per_step seed init_param inner_lr inner_lr_mode image_init real_batch "
    "real_batch_mode outer_lr outer_schedule outer_decay_steps outer_decay_factor clip_norm clip_median "
    "on_nonfinite validation_fraction split_seed selection_networks validate_every dtype inner_optimizer "
    "inner_momentum order window labels inner_augment outer_augment clip_running trim ema keep max_rollbacks "
    "rate_limit image_centre image_scale outer_lr_rates outer_lr_labels whitening outer_cutoff"
)
_ATTACK, _SINCE_0_2 = "attack_class target_class", "method real_per_class"
_NEW = " ".join(name for name in SETTINGS if name not in f"{_SETTINGS} {_ATTACK} {_SINCE_0_2}".split())

PARTS: dict[str, tuple[type | str, ...]] = {
    "trials": (
        _Trial,
        _SETTINGS,
        _OfPool,
        _ATTACK,
        _Outcome,
        _SINCE_0_2,
        _OfData,
        _NEW,
        _OfCohort,
        _OfNetworks,
    ),
    "evals": (_Evals,),
    "history": (_History,),
    "failures": (_Failures,),
}
"""Of what each table is made, in the order of its columns: classes, and names of settings."""

_TYPES: dict[Any, pa.DataType] = {
    **{str: pa.string(), bool: pa.bool_(), float: pa.float64(), int: pa.int32(), Long: pa.int64()},
    datetime: pa.timestamp("us", tz="UTC"),
}


def _schema(*parts: type | str) -> pa.Schema:
    columns: list[tuple[str, pa.DataType]] = []
    for part in parts:
        kinds = (
            {name: _kind(name) for name in part.split()} if isinstance(part, str) else get_type_hints(part)
        )
        columns += [(name, _TYPES[kind]) for name, kind in kinds.items()]
    return pa.schema(columns, metadata={"schema_version": str(SCHEMA_VERSION)})


def _kind(name: str) -> Any:
    """The type of the column of a setting, as it is declared."""
    found = SETTINGS[name]
    kinds = {"int": Long if found.limit is SEED else int, "float": float, "bool": bool}
    return kinds.get(found.kind.removesuffix(" | None"), str)  # data set, network and pool by their names


TABLES: dict[str, pa.Schema] = {name: _schema(*parts) for name, parts in PARTS.items()}
TRIALS, EVALS, HISTORY, FAILURES = TABLES.values()
POOL = _schema(_Pool)

SORT_KEYS: dict[str, tuple[str, ...]] = {
    "trials": ("trial_id",),
    "evals": (
        *("trial_id", "source", "protocol", "network", "init_law", "pool", "split"),
        *("model_seed", "inner_epochs", "inner_lr", "inner_step"),
    ),
    "history": ("trial_id", "outer_step"),
    "failures": ("trial_id",),
}
"""The order of the rows of a compacted table. Rows equal in all keys keep the order of their files."""
