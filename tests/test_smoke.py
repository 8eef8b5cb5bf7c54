"""Every sweep file runs from end to end with the tiny settings that it has for that, without any data."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import OneRay, Run

SWEEPS = Path(__file__).resolve().parents[1] / "sweeps"
OFTEN = ("attack_mnist",)
"""With every commit; the others with `make test-full`."""
WITH_SMOKE = {
    path.stem: path
    for path in sorted([*SWEEPS.glob("*.yaml"), *SWEEPS.glob("longer/*.yaml")])
    if "\nsmoke:" in path.read_text()
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in WITH_SMOKE]
)
def test_a_sweep_runs_on_stand_in_data(name: str, tmp_path: Path, one_ray: OneRay) -> None:
    done = one_ray("run", WITH_SMOKE[name], "--smoke", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "small stand-in data replace it, and the numbers mean nothing" in done.stdout
    parts = sorted((tmp_path / "results" / f"{name}-smoke" / "trials").glob("*.parquet"))
    trials = pd.concat([pd.read_parquet(part) for part in parts])
    assert len(trials) and trials["dataset_stand_in"].all() and (trials["status"] == "done").all()
    assert trials["test_accuracy_mean"].between(0, 1).all()


def test_every_sweep_of_the_paper_can_be_tried_out() -> None:
    paper = {
        *(
            "mnist_fixed",
            "mnist_fixed_labels",
            "mnist_random",
            "cifar10_fixed",
            "cifar10_random",
            "adapt_mnist_usps",
            "adapt_usps_mnist_labels",
        ),
        *("adapt_usps_mnist", "adapt_svhn_mnist", "attack_mnist", "attack_cifar10", "alexnet_voc2007"),
        *("alexnet_cub200", "ablation_steps_epochs_ipc"),
    }
    assert paper <= set(WITH_SMOKE)


def test_a_sweep_without_a_smoke_section_says_so(tmp_path: Path, ddsweep: Run) -> None:
    refused = ddsweep("run", SWEEPS / "digits_rates.yaml", "--smoke", cwd=tmp_path)
    assert refused.returncode == 1 and "has no `smoke` section to try it out with" in refused.stderr
