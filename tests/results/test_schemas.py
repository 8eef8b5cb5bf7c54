"""The tables are public API: a change of a column is a deliberate change of this file."""

from __future__ import annotations

import pytest

from ddsweep.results.schemas import SCHEMA_VERSION, SORT_KEYS, TABLES

GOLDEN = {
    "trials": """
        trial_id string, sweep string, in_sweep bool, dataset string, network string, objective string,
        init string, init_law string, pool string, images_per_class int32, inner_steps int32,
        images_per_class_per_step int32, inner_epochs int32, outer_steps int32, models_per_step int32,
        seed int64, init_param double, inner_lr double, inner_lr_mode string, image_init string,
        real_batch int32, real_batch_mode string, outer_lr double, outer_schedule string,
        outer_decay_steps int32, outer_decay_factor double, clip_norm double, clip_median double,
        on_nonfinite string, validation_fraction double, split_seed int64, selection_networks int32,
        validate_every int32, dtype string, inner_optimizer string, inner_momentum double, order string,
        window int32, labels string, inner_augment string, outer_augment string, clip_running double,
        trim double, ema double, keep string, max_rollbacks int32, rate_limit double, image_centre bool,
        image_scale double, outer_lr_rates double, outer_lr_labels double, whitening string,
        outer_cutoff double, source_dataset string, pool_recipe string, pool_train int32,
        attack_class int32, target_class int32, status string,
        outer_steps_done int32, val_score double, test_accuracy_mean double,
        test_accuracy_std double, test_accuracy_ci95 double,
        test_accuracy_before_mean double, test_accuracy_before_std double,
        test_attack_success_mean double, test_attack_success_std double,
        test_attack_success_ci95 double, test_attack_success_before_mean double,
        test_accuracy_other_mean double, test_accuracy_other_std double,
        test_accuracy_other_before_mean double, test_models int32, n_diverged int32,
        gain_mean double, gain_ci95 double, wall_seconds double, cpu_seconds double, gpu_seconds double,
        peak_memory_bytes int64, distilled_bytes int64, distilled_sha256 string,
        dataset_fingerprint string, dataset_stand_in bool, spec_version int32, evaluation_id string,
        outer_loss double, n_skipped int64, n_rollbacks int32, n_resumed int32,
        n_torn_checkpoints int32, device string, device_name string, threads int32, memory_mode string,
        execution_plan string, n_replans int32, host string,
        started_at timestamp[us; tz=UTC], ended_at timestamp[us; tz=UTC], ddsweep_version string,
        git_commit string, git_dirty bool, python_version string, torch_version string,
        ray_version string, method string, real_per_class int32,
        dataset_shape string, n_test_in_train int32, network_version string, cohort_size int32,
        pool_networks string""",
    "evals": """
        trial_id string, source string, protocol string, network string, init_law string, pool string,
        model_seed int64, split string, inner_step int32, inner_epochs int32, inner_lr double,
        order string, inner_optimizer string, accuracy double, accuracy_other double,
        attack_success double, loss double, diverged bool, n_images int32,
        dataset_stand_in bool, group int32, weight_decay double,
        inner_batch int32, inner_schedule string, inner_decay_epochs int32, inner_decay_factor double,
        inner_augment string""",
    "history": """
        trial_id string, outer_step int32, outer_loss double, val_score double, grad_norm double,
        inner_lr_mean double, n_skipped int32, n_rollbacks int32, seconds double""",
    "failures": """
        trial_id string, sweep string, status string, error_class string, message string, place string,
        host string, attempts int32, failed_at timestamp[us; tz=UTC]""",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_columns_and_types_are_the_published_ones(name: str) -> None:
    found = [f"{f.name} {str(f.type).replace(', ', '; ')}" for f in TABLES[name]]
    assert found == " ".join(GOLDEN[name].split()).split(", ")
    assert all(field.nullable for field in TABLES[name])
    assert TABLES[name].metadata == {b"schema_version": b"1"} and SCHEMA_VERSION == 1
    assert set(SORT_KEYS[name]) <= set(TABLES[name].names)
