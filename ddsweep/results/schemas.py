"""The columns of the result tables: public API, one explicit schema per table.

Accuracies are fractions, times are seconds, sizes are bytes. Null means not measured. Every column may be
null in a file, so that a table can get a new column and still read older files.
"""

from __future__ import annotations

import pyarrow as pa

__all__ = ["EVALS", "FAILURES", "HISTORY", "POOL", "SCHEMA_VERSION", "SORT_KEYS", "TABLES", "TRIALS"]

SCHEMA_VERSION = 1
"""Raised when a column changes its meaning. A new column does not raise it: old files read it as null."""

_METADATA = {"schema_version": str(SCHEMA_VERSION)}
_TEXT, _FLAG, _REAL = pa.string(), pa.bool_(), pa.float64()
_COUNT, _LONG = pa.int32(), pa.int64()
_TIME = pa.timestamp("us", tz="UTC")

TRIALS = pa.schema(
    [
        ("trial_id", _TEXT),
        ("sweep", _TEXT),
        # Whether the sweep file still has the trial; null in older files, which counts as true.
        ("in_sweep", _FLAG),
        # Every setting of `TrialSpec`; those that people vary come first.
        ("dataset", _TEXT),
        ("network", _TEXT),
        ("objective", _TEXT),
        ("init", _TEXT),
        ("init_law", _TEXT),
        ("pool", _TEXT),
        ("images_per_class", _COUNT),
        ("inner_steps", _COUNT),
        ("images_per_class_per_step", _COUNT),
        ("inner_epochs", _COUNT),
        ("outer_steps", _COUNT),
        ("models_per_step", _COUNT),
        ("seed", _LONG),
        ("init_param", _REAL),
        ("inner_lr", _REAL),
        ("inner_lr_mode", _TEXT),
        ("image_init", _TEXT),
        ("real_batch", _COUNT),
        ("real_batch_mode", _TEXT),
        ("outer_lr", _REAL),
        ("outer_schedule", _TEXT),
        ("outer_decay_steps", _COUNT),
        ("outer_decay_factor", _REAL),
        ("clip_norm", _REAL),
        ("clip_median", _REAL),
        ("on_nonfinite", _TEXT),
        ("validation_fraction", _REAL),
        ("split_seed", _LONG),
        ("selection_networks", _COUNT),
        ("validate_every", _COUNT),
        ("dtype", _TEXT),
        ("inner_optimizer", _TEXT),
        ("inner_momentum", _REAL),
        ("order", _TEXT),
        ("window", _COUNT),
        ("labels", _TEXT),
        ("inner_augment", _TEXT),
        ("outer_augment", _TEXT),
        ("clip_running", _REAL),
        ("trim", _REAL),
        ("ema", _REAL),
        ("keep", _TEXT),
        ("max_rollbacks", _COUNT),
        ("rate_limit", _REAL),
        ("image_centre", _FLAG),
        ("image_scale", _REAL),
        ("outer_lr_rates", _REAL),
        ("outer_lr_labels", _REAL),
        ("whitening", _TEXT),
        ("outer_cutoff", _REAL),
        ("source_dataset", _TEXT),
        ("pool_recipe", _TEXT),
        ("pool_train", _COUNT),
        ("attack_class", _COUNT),
        ("target_class", _COUNT),
        # Results. test_models networks; std and ci95 over networks, null for one network.
        ("status", _TEXT),
        ("outer_steps_done", _COUNT),
        ("val_score", _REAL),
        ("test_accuracy_mean", _REAL),
        ("test_accuracy_std", _REAL),
        ("test_accuracy_ci95", _REAL),
        ("test_accuracy_before_mean", _REAL),
        ("test_accuracy_before_std", _REAL),
        # For attacks: the fraction of attack_class called target_class, and accuracy on the other classes.
        ("test_attack_success_mean", _REAL),
        ("test_attack_success_std", _REAL),
        ("test_attack_success_ci95", _REAL),
        ("test_attack_success_before_mean", _REAL),
        ("test_accuracy_other_mean", _REAL),
        ("test_accuracy_other_std", _REAL),
        ("test_accuracy_other_before_mean", _REAL),
        ("test_models", _COUNT),
        ("n_diverged", _COUNT),
        # Accuracy of the distilled set minus that of random real images, network by network.
        ("gain_mean", _REAL),
        ("gain_ci95", _REAL),
        # Cost. gpu_seconds = granted fraction x wall_seconds.
        ("wall_seconds", _REAL),
        ("cpu_seconds", _REAL),
        ("gpu_seconds", _REAL),
        ("peak_memory_bytes", _LONG),
        ("distilled_bytes", _LONG),
        # Provenance.
        ("distilled_sha256", _TEXT),
        ("dataset_fingerprint", _TEXT),
        ("dataset_stand_in", _FLAG),
        ("spec_version", _COUNT),
        ("evaluation_id", _TEXT),
        ("outer_loss", _REAL),
        ("n_skipped", _LONG),
        ("n_rollbacks", _COUNT),
        ("n_resumed", _COUNT),
        ("n_torn_checkpoints", _COUNT),
        ("device", _TEXT),
        ("device_name", _TEXT),
        ("threads", _COUNT),
        ("memory_mode", _TEXT),
        # JSON: the plan at the end, after n_replans changes because memory ran out.
        ("execution_plan", _TEXT),
        ("n_replans", _COUNT),
        ("host", _TEXT),
        ("started_at", _TIME),
        ("ended_at", _TIME),
        ("ddsweep_version", _TEXT),
        ("git_commit", _TEXT),
        ("git_dirty", _FLAG),
        ("python_version", _TEXT),
        ("torch_version", _TEXT),
        ("ray_version", _TEXT),
        # Settings of version 0.2.
        ("method", _TEXT),
        ("real_per_class", _COUNT),
        # Found in the data.
        ("dataset_shape", _TEXT),
        ("n_test_in_train", _COUNT),
    ],
    metadata=_METADATA,
)
"""One row per trial: settings, status, accuracy, cost, provenance."""

EVALS = pa.schema(
    [
        ("trial_id", _TEXT),
        ("source", _TEXT),
        ("protocol", _TEXT),
        ("network", _TEXT),
        ("init_law", _TEXT),
        ("pool", _TEXT),
        ("model_seed", _LONG),
        ("split", _TEXT),
        ("inner_step", _COUNT),
        ("inner_epochs", _COUNT),
        # The constant rate of a baseline or a protocol; null where the rates were learned.
        ("inner_lr", _REAL),
        ("order", _TEXT),
        ("inner_optimizer", _TEXT),
        ("accuracy", _REAL),
        # For attacks: accuracy on the classes but attack_class, and the fraction of attack_class called
        # target_class.
        ("accuracy_other", _REAL),
        ("attack_success", _REAL),
        ("loss", _REAL),
        ("diverged", _FLAG),
        ("n_images", _COUNT),
        ("dataset_stand_in", _FLAG),
        ("group", _COUNT),
    ],
    metadata=_METADATA,
)
"""One row per (trial, source, protocol, network, inner step)."""

HISTORY = pa.schema(
    [
        ("trial_id", _TEXT),
        ("outer_step", _COUNT),
        ("outer_loss", _REAL),
        ("val_score", _REAL),
        ("grad_norm", _REAL),
        ("inner_lr_mean", _REAL),
        ("n_skipped", _COUNT),
        ("n_rollbacks", _COUNT),
        ("seconds", _REAL),
    ],
    metadata=_METADATA,
)
"""One row per logged outer step of a trial."""

FAILURES = pa.schema(
    [
        ("trial_id", _TEXT),
        ("sweep", _TEXT),
        ("status", _TEXT),
        ("error_class", _TEXT),
        ("message", _TEXT),
        ("place", _TEXT),
        ("host", _TEXT),
        ("attempts", _COUNT),
        ("failed_at", _TIME),
    ],
    metadata=_METADATA,
)
"""One row per trial that failed and has not succeeded since."""

POOL = pa.schema(
    [
        ("pool", _TEXT),
        ("role", _TEXT),
        ("index", _LONG),
        ("seed", _LONG),
        ("dataset", _TEXT),
        ("dataset_fingerprint", _TEXT),
        ("dataset_stand_in", _FLAG),
        ("network", _TEXT),
        ("init_law", _TEXT),
        ("init_param", _REAL),
        ("epochs", _COUNT),
        ("batch", _COUNT),
        ("lr", _REAL),
        ("decay_epochs", _COUNT),
        ("decay_factor", _REAL),
        ("recipe", _TEXT),
        # On the test set of its own training data.
        ("accuracy", _REAL),
        ("loss", _REAL),
        ("sha256", _TEXT),
        # For the networks that were trained together, divided by their number.
        ("wall_seconds", _REAL),
        ("cpu_seconds", _REAL),
        ("device", _TEXT),
        ("device_name", _TEXT),
        ("threads", _COUNT),
        ("trained_at", _TIME),
        ("host", _TEXT),
        ("ddsweep_version", _TEXT),
        ("git_commit", _TEXT),
        ("git_dirty", _FLAG),
        ("python_version", _TEXT),
        ("torch_version", _TEXT),
        ("ray_version", _TEXT),
    ],
    metadata=_METADATA,
)
"""One row per network of a pool: ``index.parquet`` of its folder."""

TABLES: dict[str, pa.Schema] = {"trials": TRIALS, "evals": EVALS, "history": HISTORY, "failures": FAILURES}

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
