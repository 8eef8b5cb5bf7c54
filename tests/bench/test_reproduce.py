"""A row with a pool, from nothing to the check of what is kept: `campaign.py`, `keep.py`, `make reproduce`,
`make verify-results`. A few steps, on the digits, and on the real images of the row."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import campaign_jobs
import campaign_tasks
import pytest

from bench.keep import keep
from bench.verify import main
from ddsweep.results.layout import SweepDirectory

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("DDSWEEP_DATA") or ROOT.parent / "shared" / "data")
ROW = "adapt_usps_mnist"
SHORT = (
    *("outer_steps=2", "models_per_step=2", "real_batch=32", "selection_networks=2", "image_init=real"),
    *("evaluate.networks=8", "evaluate.group_size=4", "evaluate.baselines=none"),
    *("evaluate.protocols=[as_distilled]", "resources.dashboard=false"),
    *("pool.train=4", "pool.heldout=8", "pool.epochs=1", "pool.group_size=4"),
)


STAND_IN = ("dataset=digits(size=28)", "pool.dataset=digits(size=28)")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True])
def test_a_row_is_made_from_nothing_and_checked(
    real: bool, tmp_path: Path, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    if real and not all((DATA / name).is_dir() for name in ("MNIST", "USPS")):
        pytest.skip("needs MNIST and USPS under DDSWEEP_DATA: `ddsweep data fetch`")
    root, given = (DATA, SHORT) if real else (None, (*SHORT, *STAND_IN))
    folder, kept = tmp_path / "campaign", tmp_path / "kept"
    campaign_jobs.plan_all(folder, [f"{ROOT}/sweeps/{ROW}.yaml", *given], root)
    (job,) = campaign_jobs.read_jobs(folder)
    place = campaign_tasks.Place(folder, (job,), root, "cpu", 1, 1, time.time() + 3600)
    place.directory(job).create()
    place.directory(job).sweep_file.write_text(job.yaml)
    while tasks := campaign_tasks.missing(place):
        campaign_tasks.work(place, tasks[0])
    (trial_id,) = keep(SweepDirectory(folder / ROW), kept / ROW)

    command = ["make", "-C", ROOT, "-o", ".venv/.installed", "reproduce", f"ROW={ROW}", f"KEPT={kept}"]
    variables = {"DDSWEEP_RESULTS": str(tmp_path / "results"), "DDSWEEP_DATA": str(root or tmp_path)}
    made = subprocess.run(
        [*command, f"BIN={Path(sys.executable).parent}", "SET=resources.total_cpus=1"],
        check=False,
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert f"{ROW} {trial_id}: pass: " in made.stdout and "on 8 networks, kept" in made.stdout
    assert (tmp_path / "results" / "pools" / "usps_lenet" / "index.parquet").is_file(), "its pool was trained"

    capsys.readouterr()
    assert main(["--kept", str(kept), *(("--data-root", str(root)) if root else ())]) == 0
    assert f"{ROW} {trial_id}: pass: " in (said := capsys.readouterr().out)
    assert "on 16 networks, kept" in said, "further ones, trained for this"
