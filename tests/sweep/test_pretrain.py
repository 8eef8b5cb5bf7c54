"""`ddsweep pretrain` on a real Ray: killed, drained, gone on with, and used by a sweep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import ddsweep
from ddsweep.results.layout import PoolDirectory
from ddsweep.sweep import pretrain as train
from ddsweep.sweep.retry import RetryPolicy
from tests.conftest import PATIENCE_S, OneRay, Run
from tests.sweep.driver import POOL, descendants, kill

pytestmark = pytest.mark.ray

ATTACKS = """
name: attacks
base:
  dataset: digits
  network: convnet(depth=1,width=4,norm=none)
  init: pretrained
  pool: tiny
  objective: attack
  attack_class: 3
  images_per_class: 2
  inner_steps: 1
  inner_lr: 0.3
  outer_steps: 60
  outer_lr: 0.05
  real_batch: 128
grid:
  target_class: [5, 8]
evaluate: {networks: 8, group_size: 4, shards: 1, baselines: [random_real]}
resources: {dashboard: false}
"""


def start(file: Path, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "ddsweep",
        "pretrain",
        str(file),
        "--results",
        str(file.parent / "results"),
    ]
    with log.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)


def until(done: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_pool_survives_what_happens_to_it_and_serves_a_sweep(
    tmp_path: Path, environment: dict[str, str], ddsweep_process: Run
) -> None:
    """SIGKILL to all of it once the first group is there; SIGTERM once more; then to its end."""
    file, log = tmp_path / "tiny.yaml", tmp_path / "log.txt"
    file.write_text(POOL.format(epochs=60))
    pool = PoolDirectory(tmp_path / "results" / "pools" / "tiny")
    process = start(file, environment, log)
    until(lambda: pool.part("train", 7).exists(), process, log)
    time.sleep(0.3)
    for pid in [*descendants(process.pid), process.pid]:
        kill(pid)
    process.wait(timeout=PATIENCE_S)
    assert not pool.index.exists() and not pool.part("heldout", 7).exists()
    first = {path.name: path.stat().st_mtime_ns for path in pool.root.glob("networks/train-*")}
    assert len(first) == 8, "what was trained is whole"

    refused = ddsweep_process("plan", write(tmp_path / "attacks.yaml", ATTACKS), cwd=tmp_path)
    assert refused.returncode == 0, "a pool that is begun can be planned with"
    refused = ddsweep_process("run", "attacks.yaml", cwd=tmp_path)
    assert refused.returncode == 1
    assert "pool tiny: " in refused.stderr and "is not finished: `ddsweep pretrain`" in refused.stderr

    process = start(file, environment, log)
    until(lambda: "begun" in log.read_text() or children(process.pid), process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE_S) == 75, log.read_text()
    assert "draining" in log.read_text() and not pool.index.exists()

    done = ddsweep_process("pretrain", file, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    index = pd.read_parquet(pool.index)
    assert index.groupby("role").size().to_dict() == {"heldout": 8, "train": 8}
    assert "heldout: 8 networks" in done.stdout and str(pool.index.relative_to(tmp_path)) in done.stdout
    assert first == {path.name: path.stat().st_mtime_ns for path in pool.root.glob("networks/train-*")}
    again = ddsweep_process("pretrain", file, cwd=tmp_path)
    assert again.returncode == 0 and "trained" not in again.stdout, "nothing is left to do"
    torn = pool.network("heldout", 3)
    torn.write_bytes(torn.read_bytes()[:-9])
    mended = ddsweep_process("pretrain", file, cwd=tmp_path)
    assert mended.returncode == 0 and "heldout 0 to 7 trained" in mended.stdout

    attacked = ddsweep_process("run", "attacks.yaml", cwd=tmp_path)
    assert (attacked.returncode, attacked.stderr) == (0, "")
    check_attacks(tmp_path / "results" / "attacks", attacked.stdout)
    trial = min((tmp_path / "results" / "attacks" / "artifacts").iterdir()).name
    shown = ddsweep_process("show", trial, cwd=tmp_path).stdout
    assert "fooled" in shown and "other classes" in shown and "0, before" in shown


def test_a_group_whose_worker_is_killed_is_tried_again(
    tmp_path: Path, one_ray: OneRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "RETRIES", RetryPolicy(3, spread_s=3))
    killed: list[int] = []

    def kill_once() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not killed and time.monotonic() < deadline:
            for pid in descendants(one_ray.pid):
                if "pool tiny, train" in title(pid) and not killed:
                    kill(pid)
                    killed.append(pid)
            time.sleep(0.02)

    killer = threading.Thread(target=kill_once)
    killer.start()
    done = one_ray("pretrain", write(tmp_path / "tiny.yaml", POOL.format(epochs=30)), cwd=tmp_path)
    killer.join()
    assert done.returncode == 0 and killed, done.stderr
    assert "tried again in 0 s: the process was killed from outside" in " ".join(done.stdout.split())
    index = pd.read_parquet(PoolDirectory(tmp_path / "results" / "pools" / "tiny").index)
    assert index.groupby("role").size().to_dict() == {"heldout": 8, "train": 8}


def children(pid: int) -> bool:
    """Whether the work has begun: a worker of Ray is training."""
    return any("pool tiny" in title(child) for child in descendants(pid))


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def check_attacks(directory: Path, said: str) -> None:
    results = ddsweep.load_results(directory)
    trials = results.trials.set_index("target_class")
    assert trials.index.tolist() in ([5, 8], [8, 5]) and set(trials.pool) == {"tiny"}
    assert set(trials.source_dataset) == {"digits"} and set(trials.pool_train) == {8}
    for target in (5, 8):
        row = trials.loc[target]
        assert f"3 → {target}" in said
        assert f"{100 * row.test_attack_success_mean:.1f} ± {100 * row.test_attack_success_std:.1f}" in said
        assert f"{100 * row.test_accuracy_before_mean:.1f}" in said
    picture = (directory / "attack.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert os.fspath(directory / "attack.png").endswith(said.rpartition("Attacks: ")[2].strip())


@pytest.mark.slow
def test_other_settings_under_the_same_name_are_refused(tmp_path: Path, ddsweep_process: Run) -> None:
    file = write(tmp_path / "tiny.yaml", POOL.format(epochs=1))
    assert ddsweep_process("pretrain", file, "train=1", "heldout=1", cwd=tmp_path).returncode == 0
    for other in ("epochs=2", "train=2"):
        refused = ddsweep_process("pretrain", file, "train=1", "heldout=1", other, cwd=tmp_path)
        assert refused.returncode == 1 and "holds a pool of other settings" in refused.stderr
    refused = ddsweep_process(
        "pretrain", file, "train=1", "heldout=2", "cpus=99", "total_cpus=1", cwd=tmp_path
    )
    assert refused.returncode == 1
    assert "cpus: a group of networks asks for 99, but there are 1" in refused.stderr
