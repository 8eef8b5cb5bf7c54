"""One trial: its files, and that stops, kills and torn files do not change the result."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import ddsweep.trial.running
import ddsweep.trial.step
from ddsweep import baselines
from ddsweep.catalog import DATASETS, EvalUnit, TrialSpec
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import normalise
from ddsweep.core.init import draw_network
from ddsweep.core.networks import build_network
from ddsweep.core.outer import DistillState
from ddsweep.core.steps import _compiled
from ddsweep.data.load import Splits, load_splits
from ddsweep.distilled import DistilledSet, apply
from ddsweep.errors import DiskFullError, DivergedError, GpuLostError, UserError
from ddsweep.evaluation.baseline_rows import _images
from ddsweep.evaluation.group import Group
from ddsweep.results.artifacts import load_tensors
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part
from ddsweep.seeds import derive_seed
from ddsweep.trial import Progress, checkpoint_provenance, distil_trial, read_distilled, record_failure
from ddsweep.trial_plan import TrialSettings, check_gpu_seen, pick_device
from tests.conftest import PATIENCE_S
from tests.disks import fill

SETTINGS = TrialSettings(checkpoint_every=3, log_every=5)


def spec_of(**settings: Any) -> TrialSpec:
    """A small distillation of digits: 12 outer steps, validated every 4."""
    defaults = {
        **{"network": "convnet(depth=1,width=8,norm=none)", "images_per_class": 2, "inner_steps": 2},
        **{"inner_epochs": 2, "inner_lr": 0.1, "outer_steps": 12, "models_per_step": 2, "real_batch": 64},
        **{"selection_networks": 2, "validate_every": 4},
    }
    return TrialSpec(dataset=DATASETS["digits"], **(defaults | settings))


SPEC = spec_of()


@dataclass
class Trial:
    """One trial in a results folder of its own."""

    spec: TrialSpec
    splits: Splits
    directory: SweepDirectory

    def run(self, settings: TrialSettings = SETTINGS, *, steps: int | None = None, **more: Any) -> bool:
        """Distil, or go on; with ``steps``, stop after that many outer steps."""
        left = iter(range(steps)) if steps is not None else None
        stop = (lambda: False) if left is None else (lambda: next(left, None) is None)
        return distil_trial(self.spec, self.splits, self.directory, settings, should_stop=stop, **more)

    @property
    def checkpoint(self) -> Path:
        return self.directory.checkpoint(self.spec.trial_id)

    @property
    def distilled(self) -> Path:
        return self.directory.distilled(self.spec.trial_id)

    def header(self) -> dict[str, Any]:
        return load_tensors(self.checkpoint)[1]

    def step(self) -> int:
        return self.header()["counters"]["step"]

    def result(self) -> DistilledSet:
        return read_distilled(self.spec, self.directory)

    def history(self) -> list[dict[str, Any]]:
        """Logged rows without ``seconds``, the one column that no two runs share."""
        rows = read_part(self.directory.history_part(self.spec.trial_id)).to_pylist()
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    def torn(self) -> list[str]:
        return sorted(path.name for path in self.checkpoint.parent.glob("*.torn-*"))


@pytest.fixture
def trial_of(tmp_path: Path, splits: Splits) -> Callable[..., Trial]:
    """``trial_of(spec)``: that trial in a new folder."""
    made: list[Trial] = []

    def make(spec: TrialSpec = SPEC, data: Splits = splits) -> Trial:
        made.append(Trial(spec, data, SweepDirectory(tmp_path / f"results-{len(made)}")))
        return made[-1]

    return make


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> Trial:
    """`SPEC`, run from beginning to end in one go."""
    trial = Trial(SPEC, splits, SweepDirectory(tmp_path_factory.mktemp("undisturbed")))
    assert trial.run()
    return trial


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> Trial:
    """`SPEC`, stopped after 7 outer steps."""
    trial = Trial(SPEC, splits, SweepDirectory(tmp_path_factory.mktemp("halfway")))
    assert not trial.run(steps=7)
    return trial


def copy_of(trial: Trial, root: Path) -> Trial:
    shutil.copytree(trial.directory.root, root)
    return replace(trial, directory=SweepDirectory(root))


def assert_same_bits(left: Trial, right: Trial) -> None:
    a, b = left.result(), right.result()
    for name, value in a.tensors().items():
        assert torch.equal(value, b.tensors()[name]), name
    assert a.sha256 == b.sha256
    assert left.history() == right.history()


# ------------------------------------------------------------------------------------ what it leaves


def test_a_trial_leaves_a_distilled_set_a_picture_a_history_and_a_checkpoint(undisturbed: Trial) -> None:
    found = undisturbed.result()
    assert found.images.shape == (2, 10, 1, 8, 8)
    assert found.images.dtype == torch.float32
    assert found.labels.tolist() == [list(range(10))] * 2
    assert found.rates.shape == (4,)
    assert (found.rates > 0).all()
    assert found.spec == SPEC
    assert (found.mean, found.std) == (undisturbed.splits.mean, undisturbed.splits.std)
    assert undisturbed.directory.grid(SPEC.trial_id).read_bytes().startswith(b"\x89PNG")
    assert undisturbed.step() == SPEC.outer_steps
    assert not list(undisturbed.directory.temporary.iterdir())


def test_the_history_has_the_logged_the_validated_and_the_last_step(undisturbed: Trial) -> None:
    rows = undisturbed.history()
    assert [row["outer_step"] for row in rows] == [4, 5, 8, 10, 12]
    assert [row["outer_step"] for row in rows if row["val_score"] is not None] == [4, 8, 12]
    assert {row["trial_id"] for row in rows} == {SPEC.trial_id}
    assert all(row["outer_loss"] > 0 and row["grad_norm"] > 0 and row["n_skipped"] == 0 for row in rows)
    seconds = read_part(undisturbed.directory.history_part(SPEC.trial_id))["seconds"].to_pylist()
    assert seconds == sorted(seconds)


def test_the_distilled_set_says_how_it_came_to_be(undisturbed: Trial) -> None:
    said, last = undisturbed.result().provenance, undisturbed.history()[-1]
    assert (said["val_score"], said["outer_loss"]) == (last["val_score"], last["outer_loss"])
    assert said["dataset_fingerprint"] == undisturbed.splits.fingerprint
    assert (said["n_resumed"], said["n_torn_checkpoints"], said["n_skipped"]) == (0, 0, 0)
    assert (said["device"], said["threads"], said["memory_mode"]) == ("cpu", 1, "store")
    assert said["started_at"] < said["ended_at"]
    assert said["gpu_seconds"] == 0


def test_progress_tells_what_the_history_holds(trial_of: Callable[..., Trial]) -> None:
    told: list[Progress] = []
    trial = trial_of(spec_of(outer_steps=5))
    assert trial.run(on_progress=told.append)
    rows = trial.history()
    assert [(p.outer_step, p.outer_loss, p.val_score) for p in told] == [
        (row["outer_step"], row["outer_loss"], row["val_score"]) for row in rows
    ]


def test_a_finished_trial_is_left_alone(undisturbed: Trial) -> None:
    files = [path for path in undisturbed.directory.root.rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert undisturbed.run(on_progress=lambda progress: pytest.fail("worked again"))
    assert {path: path.stat().st_mtime_ns for path in before} == before


# -------------------------------------------------------------------------------- stopped and killed


def test_a_rung_is_validated_and_checkpointed_before_it_is_told(
    trial_of: Callable[..., Trial], undisturbed: Trial
) -> None:
    """A scheduler ends the function from within its report, as `SystemExit` does here."""
    trial, rung = trial_of(), 7

    def report(progress: Progress) -> None:
        if progress.outer_step == rung:
            assert progress.val_score is not None, "7 is no multiple of validate_every"
            raise SystemExit(0)

    settings = replace(SETTINGS, rungs=(rung,))
    with pytest.raises(SystemExit):
        trial.run(settings, on_progress=report)
    assert trial.step() == rung
    assert [row["outer_step"] for row in trial.history()] == [4, 5, 7]
    step, said = checkpoint_provenance(SPEC, trial.directory)
    assert (step, said["val_score"]) == (rung, trial.history()[-1]["val_score"])
    assert said["outer_loss"] == trial.history()[-1]["outer_loss"]
    assert said["wall_seconds"] > 0 and said["host"] and said["device"] == "cpu"
    # A scheduler that was killed before it heard of it, or that let the trial wait there, hears of it again.
    told: list[Progress] = []

    def end(progress: Progress) -> None:
        told.append(progress)
        raise SystemExit(0)

    with pytest.raises(SystemExit):
        trial.run(settings, on_progress=end)
    assert [(p.outer_step, p.val_score, p.steps_taken) for p in told] == [(rung, said["val_score"], 0)]
    # Going on without a scheduler ends where an undisturbed trial does, with one more score on the way.
    assert trial.run()
    assert trial.result().sha256 == undisturbed.result().sha256
    rows = trial.history()
    assert [row for row in rows if row["outer_step"] != rung] == undisturbed.history()
    assert trial.result().provenance["n_resumed"] == 1


def test_a_full_disk_loses_nothing_and_a_minute_of_it_is_waited_out(
    disk: Path, splits: Splits, undisturbed: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(SPEC, splits, SweepDirectory(disk / "results"))
    assert not trial.run(steps=4)
    full = fill(disk)
    monkeypatch.setattr("ddsweep.results.files.PATIENCE_S", 0.3)
    with pytest.raises(DiskFullError, match=r"no space left.* MB free in .*run the same command again"):
        trial.run()
    assert trial.step() == 4 and not list(trial.directory.temporary.iterdir())
    record_failure(trial.directory, SPEC, "a sweep", DiskFullError("full"), "distillation", 1)
    # Somebody makes room while it waits.
    monkeypatch.setattr("ddsweep.results.files.PATIENCE_S", 60.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: full.unlink(missing_ok=True))
    assert trial.run()
    assert_same_bits(trial, undisturbed)


def test_a_drained_trial_leaves_a_checkpoint_of_just_that_step(halfway: Trial) -> None:
    assert halfway.step() == 7
    assert not halfway.distilled.exists()
    assert [row["outer_step"] for row in halfway.history()] == [4, 5]


@pytest.mark.parametrize("stops", [(0,), (1,), (3,), (11,), (2, 0, 5)])
def test_a_stopped_trial_ends_with_the_bits_of_one_that_was_not(
    stops: tuple[int, ...], undisturbed: Trial, trial_of: Callable[..., Trial]
) -> None:
    trial = trial_of()
    for steps in stops:
        assert not trial.run(steps=steps)
    assert trial.step() == sum(stops)
    assert trial.run()
    assert_same_bits(trial, undisturbed)
    assert trial.result().provenance["n_resumed"] == len(stops)


@pytest.mark.parametrize(
    "settings",
    [
        {"init": "fixed", "seed": 3, "inner_lr_mode": "shared", "outer_schedule": "cosine"},
        {
            **{"network": "convnet(width=8)", "dtype": "float64", "real_batch_mode": "per_network"},
            **{"clip_median": 1.0, "image_init": "real"},
        },
        {
            **{"inner_optimizer": "adam", "inner_lr": 0.02, "order": "shuffled", "window": 3},
            **{"labels": "soft", "clip_running": 1.5, "trim": 0.5},
            **{"inner_augment": "shift+cutout", "outer_augment": "rotate"},
            **{"ema": 0.8, "keep": "best", "max_rollbacks": 2, "image_init": "kmeans", "validate_every": 1},
        },
        {
            **{"inner_optimizer": "momentum", "order": "sampled", "outer_lr": 0.5},
            **{"max_rollbacks": 6, "rate_limit": 0.15},
        },
    ],
    ids=["fixed", "float64", "everything", "rolled back"],
)
def test_other_kinds_of_trials_go_on_bit_for_bit_too(
    settings: dict[str, Any], trial_of: Callable[..., Trial]
) -> None:
    spec = spec_of(**settings, outer_steps=6)
    whole, stopped = trial_of(spec), trial_of(spec)
    assert whole.run()
    assert not stopped.run(steps=2)
    assert not stopped.run(steps=3)
    assert stopped.run()
    assert_same_bits(stopped, whole)
    if "rate_limit" in settings:
        assert whole.result().provenance["n_rollbacks"] > 0


CHILD = """
import json, sys
from pathlib import Path
from ddsweep.catalog import TrialSpec
from ddsweep.data.load import load_splits
from ddsweep.results.layout import SweepDirectory
from ddsweep.trial import distil_trial
from ddsweep.trial_plan import TrialSettings

spec = TrialSpec.from_dict(json.loads(sys.argv[1]))
splits = load_splits(spec.dataset, None, validation_fraction=0.1, split_seed=0)
settings = TrialSettings(checkpoint_every=4, log_every=5, compile=sys.argv[3])
distil_trial(spec, splits, SweepDirectory(Path(sys.argv[2])), settings)
"""


def run_and_kill(trial: Trial, after: int, compile: str = "off") -> None:
    """Run the trial in a process of its own and kill it once its checkpoint has passed a step."""
    spec = json.dumps(trial.spec.to_dict())
    command = [sys.executable, "-c", CHILD, spec, str(trial.directory.root), compile]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE_S
    while not (trial.checkpoint.exists() and trial.step() > after):
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def test_a_trial_killed_again_and_again_ends_with_the_bits_of_one_that_was_not(
    trial_of: Callable[..., Trial],
) -> None:
    spec = spec_of(outer_steps=80, validate_every=40, models_per_step=1)
    killed, whole = trial_of(spec), trial_of(spec)
    for after in (1, 25):
        run_and_kill(killed, after)
        assert not killed.distilled.exists()
        assert killed.step() < spec.outer_steps
    settings = TrialSettings(checkpoint_every=50, log_every=5)
    assert killed.run(settings)
    assert whole.run(settings)
    assert_same_bits(killed, whole)
    said = killed.result().provenance
    assert (said["n_resumed"], said["n_torn_checkpoints"]) == (2, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # torch compiles
def test_a_compiled_trial_that_was_killed_ends_with_the_bits_of_one_that_was_not(
    trial_of: Callable[..., Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process has its compiled code from torch: made anew, or from the cache of the one before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    spec = spec_of(outer_steps=400, validate_every=100, models_per_step=1)
    killed, whole = trial_of(spec), trial_of(spec)
    for after in (1, 150):
        run_and_kill(killed, after, "on")
        assert not killed.distilled.exists()
    settings = TrialSettings(checkpoint_every=50, log_every=5, compile="on")
    assert killed.run(settings)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "another"))
    _compiled.cache_clear()
    torch.compiler.reset()
    assert whole.run(settings)
    _compiled.cache_clear()
    assert_same_bits(killed, whole)
    said = killed.result().provenance
    assert said["n_resumed"] == 2 and json.loads(said["execution_plan"])["compile"]


def test_a_kill_between_the_last_checkpoint_and_its_history_loses_no_rows(
    undisturbed: Trial, halfway: Trial, tmp_path: Path
) -> None:
    trial = copy_of(undisturbed, tmp_path / "copy")
    trial.distilled.unlink()
    stale = halfway.directory.history_part(SPEC.trial_id)
    shutil.copy(stale, trial.directory.history_part(SPEC.trial_id))
    assert trial.run()
    assert_same_bits(trial, undisturbed)


def test_seconds_add_up_over_the_runs_of_a_trial(trial_of: Callable[..., Trial]) -> None:
    trial = trial_of()
    began = time.monotonic()
    assert not trial.run(steps=5, on_progress=lambda progress: time.sleep(0.5))
    first, first_took = trial.header(), time.monotonic() - began
    assert 1.0 <= first["wall"] <= first_took
    time.sleep(0.5)  # not the trial's
    told: list[Progress] = []
    began = time.monotonic()
    assert trial.run(on_progress=told.append)
    second_took = time.monotonic() - began
    said = trial.result().provenance
    assert first["wall"] < told[0].seconds < told[-1].seconds <= said["wall_seconds"]
    assert said["wall_seconds"] <= first_took + second_took
    assert first["cpu"] < said["cpu_seconds"]
    assert said["started_at"] == first["started_at"]


def test_the_seconds_of_a_trial_begin_with_its_start_images(
    trial_of: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters of a large data set can take most of its time."""
    real = ddsweep.trial.running._start_images

    def slow(*arguments: Any) -> Any:
        time.sleep(0.5)
        return real(*arguments)

    monkeypatch.setattr(ddsweep.trial.running, "_start_images", slow)
    trial = trial_of(spec_of(outer_steps=1))
    assert trial.run()
    said = trial.result().provenance
    lasted = datetime.fromisoformat(said["ended_at"]) - datetime.fromisoformat(said["started_at"])
    assert said["wall_seconds"] >= 0.5 and lasted.total_seconds() >= 0.5


def test_granted_gpus_are_paid_for_by_the_second(trial_of: Callable[..., Trial]) -> None:
    trial = trial_of(spec_of(outer_steps=1))
    assert trial.run(TrialSettings(device="cpu", gpus=0.25))
    said = trial.result().provenance
    assert said["gpu_seconds"] == pytest.approx(0.25 * said["wall_seconds"])


# ---------------------------------------------------------------------------------------- torn files


def truncate_at(fraction: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(fraction * len(data))]


def alter_at(fraction: float) -> Callable[[bytes], bytes]:
    def alter(data: bytes) -> bytes:
        place = min(int(fraction * len(data)), len(data) - 1)
        return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]

    return alter


DAMAGE = {
    "empty": truncate_at(0),
    "7 bytes": lambda data: data[:7],
    "half": truncate_at(0.5),
    "all but one byte": lambda data: data[:-1],
    "altered length": alter_at(0),
    "altered header": lambda data: data.replace(b'counters\\": {\\"', b'counters\\": {\\"x', 1),
    "altered number": alter_at(0.6),
    "altered last byte": alter_at(1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_torn_checkpoint_is_moved_aside_and_the_trial_starts_again(
    damage: Callable[[bytes], bytes], undisturbed: Trial, halfway: Trial, tmp_path: Path
) -> None:
    trial = copy_of(halfway, tmp_path / "copy")
    whole = trial.checkpoint.read_bytes()
    torn = damage(whole)
    assert torn != whole
    trial.checkpoint.write_bytes(torn)
    assert trial.run()
    assert_same_bits(trial, undisturbed)
    assert trial.torn() == ["checkpoint.safetensors.torn-1"]
    assert trial.checkpoint.with_name("checkpoint.safetensors.torn-1").read_bytes() == torn
    said = trial.result().provenance
    assert (said["n_torn_checkpoints"], said["n_resumed"]) == (1, 0)


def test_every_torn_checkpoint_of_a_trial_is_counted(halfway: Trial, tmp_path: Path) -> None:
    trial = copy_of(halfway, tmp_path / "copy")
    for _ in range(2):
        trial.checkpoint.write_bytes(trial.checkpoint.read_bytes()[:500])
        assert not trial.run(steps=1)
    assert trial.run()
    assert trial.torn() == ["checkpoint.safetensors.torn-1", "checkpoint.safetensors.torn-2"]
    assert trial.result().provenance["n_torn_checkpoints"] == 2


@pytest.mark.parametrize("damage", [truncate_at(0.5), alter_at(0.9)], ids=["half", "altered"])
def test_a_torn_distilled_set_is_moved_aside_and_made_again(
    damage: Callable[[bytes], bytes], undisturbed: Trial, tmp_path: Path
) -> None:
    trial = copy_of(undisturbed, tmp_path / "copy")
    trial.distilled.write_bytes(damage(trial.distilled.read_bytes()))
    assert trial.run()
    assert_same_bits(trial, undisturbed)
    assert trial.torn() == ["distilled.safetensors.torn-1"]
    assert trial.result().provenance["n_torn_checkpoints"] == 1


def test_a_torn_distilled_set_without_a_checkpoint_is_distilled_again(
    undisturbed: Trial, tmp_path: Path
) -> None:
    trial = copy_of(undisturbed, tmp_path / "copy")
    trial.distilled.write_bytes(b"")
    trial.checkpoint.unlink()
    assert trial.run()
    assert_same_bits(trial, undisturbed)


def test_the_files_of_another_trial_are_not_taken_for_its_own(
    undisturbed: Trial, trial_of: Callable[..., Trial]
) -> None:
    other, whole = (trial_of(spec_of(outer_steps=4, seed=7)) for _ in range(2))
    other.checkpoint.parent.mkdir(parents=True)
    shutil.copy(undisturbed.checkpoint, other.checkpoint)
    shutil.copy(undisturbed.distilled, other.distilled)
    assert other.run()
    assert whole.run()
    assert_same_bits(other, whole)
    assert other.torn() == ["checkpoint.safetensors.torn-1", "distilled.safetensors.torn-1"]


@pytest.mark.parametrize("damage", ["torn", "gone"])
def test_a_torn_or_lost_history_of_a_finished_trial_is_written_again(
    damage: str, undisturbed: Trial, tmp_path: Path
) -> None:
    trial = copy_of(undisturbed, tmp_path / "copy")
    part = trial.directory.history_part(SPEC.trial_id)
    if damage == "torn":
        part.write_bytes(part.read_bytes()[:100])
    else:
        part.unlink()
    before = trial.distilled.read_bytes()
    assert trial.run()
    assert trial.history() == undisturbed.history()
    assert trial.distilled.read_bytes() == before


def test_a_checkpoint_made_from_other_images_is_refused_and_kept(halfway: Trial, tmp_path: Path) -> None:
    trial = copy_of(halfway, tmp_path / "copy")
    before = trial.checkpoint.read_bytes()
    trial.splits = replace(trial.splits, fingerprint="0" * 32)
    with pytest.raises(UserError, match=r"made from other images than 'digits' holds now") as caught:
        trial.run()
    assert str(trial.checkpoint.parent) in str(caught.value)
    assert trial.checkpoint.read_bytes() == before
    assert not trial.torn()


# ------------------------------------------------------------------------------- how it is computed


def test_a_resumed_trial_keeps_the_plan_that_it_began_with(trial_of: Callable[..., Trial]) -> None:
    spec = spec_of(outer_steps=6)
    began = replace(SETTINGS, memory_mode="recompute")
    whole, stopped = trial_of(spec), trial_of(spec)
    assert whole.run(began)
    assert not stopped.run(began, steps=2)
    plan = stopped.header()["plan"]
    assert (plan["threads"], plan["memory_mode"]) == (1, "recompute")
    assert stopped.run(replace(SETTINGS, threads=2, memory_mode="store"))
    assert stopped.header()["plan"] == plan
    assert_same_bits(stopped, whole)
    said = stopped.result().provenance
    assert (said["threads"], said["memory_mode"]) == (1, "recompute")
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("setting", "gpus"), [("auto", 1.0), ("auto", 0.25), ("cuda", 0.0), ("cuda", 1.0)])
def test_a_gpu_that_torch_does_not_see_is_an_error(
    setting: str, gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"sees no GPU here; set device: cpu and gpus: 0"):
        pick_device(setting, gpus)


@pytest.mark.parametrize(
    ("setting", "gpus", "built", "lost"),
    [
        *[("auto", 1.0, "13.0", True), ("cuda", 0.25, "13.0", True), ("cpu", 1.0, "13.0", False)],
        *[("auto", 0.0, "13.0", False), ("auto", 1.0, None, False)],
    ],
)
def test_a_gpu_that_is_lost_is_no_fault_of_the_trial(
    setting: str, gpus: float, built: str | None, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torch without GPUs is: then no place can do it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(GpuLostError, match="what nvidia-smi says") if lost else nullcontext():
        check_gpu_seen(setting, gpus, "place x")


@pytest.mark.parametrize("seen", [True, False])
def test_auto_is_the_cpu_unless_a_gpu_was_granted(seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    assert pick_device("auto", 0.0).type == "cpu"
    assert pick_device("cpu", 0.0).type == "cpu"
    assert pick_device("cpu", 0.5).type == "cpu"


def test_auto_is_the_gpu_that_was_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto", 0.25).type == "cuda"


def test_a_trial_without_its_gpu_starts_nothing(
    trial_of: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    trial = trial_of()
    with pytest.raises(UserError, match="gpus: 1"):
        trial.run(TrialSettings(gpus=1.0))
    assert not trial.checkpoint.exists()


# ---------------------------------------------------------------------------------- diverging trials


def test_a_diverging_trial_stops_with_the_step_and_a_remedy(trial_of: Callable[..., Trial]) -> None:
    trial = trial_of(spec_of(inner_lr=1e30, on_nonfinite="stop"))
    with pytest.raises(DivergedError, match=r"outer step 0: 2 of 2 networks .* smaller inner_lr"):
        trial.run()
    assert not trial.distilled.exists()


def test_a_trial_that_skips_every_network_gives_up_after_ten_steps(trial_of: Callable[..., Trial]) -> None:
    trial = trial_of(spec_of(inner_lr=1e30, on_nonfinite="skip"))
    with pytest.raises(DivergedError, match=r"outer step 9: no network was finite for 10 steps in a row"):
        trial.run()
    assert trial.step() == 9
    # Killed or not, it gives up at the same step.
    with pytest.raises(DivergedError, match=r"outer step 9: no network was finite for 10 steps in a row"):
        trial.run()
    rows = trial.history()
    assert [(row["outer_loss"], row["grad_norm"], row["n_skipped"]) for row in rows] == [(None, None, 2)] * 3


def explode_at(monkeypatch: pytest.MonkeyPatch, step: int, times: int) -> list[tuple[int, int]]:
    """Make outer step ``step`` diverge, the first so many times; returns (step, rollbacks) of all steps."""
    tried: list[tuple[int, int]] = []
    real = ddsweep.trial.step.outer_step

    def outer_step(problem: Any, state: Any) -> Any:
        tried.append((state.step, state.rollbacks))
        if state.step == step and state.rollbacks < times:
            raise DivergedError(f"outer step {step}: for this test")
        return real(problem, state)

    monkeypatch.setattr(ddsweep.trial.step, "outer_step", outer_step)
    return tried


def test_a_trial_that_explodes_goes_back_to_its_last_healthy_state(
    trial_of: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = trial_of(spec_of(max_rollbacks=3))
    tried = explode_at(monkeypatch, 6, times=2)
    assert trial.run()
    # Validated every 4 steps: 0 to 6, back to 4, again, and then to the end.
    assert tried == [(s, 0) for s in range(7)] + [(s, 1) for s in (4, 5, 6)] + [(s, 2) for s in range(4, 12)]
    rows = trial.history()
    assert [(row["outer_step"], row["n_rollbacks"]) for row in rows] == [
        (4, 0),
        (5, 2),
        (8, 2),
        (10, 2),
        (12, 2),
    ]
    assert trial.result().provenance["n_rollbacks"] == 2


def test_a_trial_that_explodes_once_too_often_has_diverged(
    trial_of: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = trial_of(spec_of(max_rollbacks=2))
    tried = explode_at(monkeypatch, 2, times=9)
    with pytest.raises(DivergedError, match="outer step 2: for this test"):
        trial.run()
    assert tried == [(s, rollbacks) for rollbacks in range(3) for s in range(3)]
    assert not trial.distilled.exists()


def test_a_huge_outer_rate_is_halved_until_it_works(trial_of: Callable[..., Trial]) -> None:
    """Adam's first update of a raw rate is the outer rate itself: 8, 4 and 2 go beyond the limit."""
    explosive = {"rate_limit": 1.0, "outer_steps": 2, "validate_every": 1, "outer_lr": 8.0}
    trial = trial_of(spec_of(**explosive, max_rollbacks=6))
    assert trial.run()
    assert trial.result().provenance["n_rollbacks"] >= 3
    assert float(trial.result().rates.max()) <= 1.0
    with pytest.raises(
        DivergedError, match=r"rate has grown to .*, beyond rate_limit 1 \(a smaller outer_lr"
    ):
        trial_of(spec_of(**explosive, max_rollbacks=2, seed=1)).run()


@pytest.mark.parametrize("steps", [5, 8, 9, 12])
def test_a_trial_stopped_around_a_rollback_ends_with_the_same_bits(
    steps: int, trial_of: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(max_rollbacks=3, keep="best")
    explode_at(monkeypatch, 6, times=2)
    whole, stopped = trial_of(spec), trial_of(spec)
    assert whole.run()
    assert not stopped.run(steps=steps)
    assert stopped.run()
    assert_same_bits(stopped, whole)
    assert stopped.result().provenance["n_rollbacks"] == 2


@pytest.mark.parametrize(
    ("error", "status"), [(DivergedError("outer step 3"), "diverged"), (UserError("no GPU"), "failed")]
)
def test_a_failure_leaves_a_row(error: Exception, status: str, trial_of: Callable[..., Trial]) -> None:
    trial = trial_of()
    record_failure(trial.directory, SPEC, "a sweep", error, "distillation", 2)
    row = read_part(trial.directory.failure_part(SPEC.trial_id)).to_pylist()[0]
    assert (row["trial_id"], row["sweep"], row["status"]) == (SPEC.trial_id, "a sweep", status)
    assert (row["error_class"], row["message"], row["attempts"]) == (type(error).__name__, str(error), 2)
    assert row["place"] == "distillation"
    assert row["failed_at"].utcoffset().total_seconds() == 0


# ----------------------------------------------------------------------------------------- selection


def accuracy_of(found: DistilledSet, seed: int, pixels: torch.Tensor, targets: torch.Tensor) -> float:
    """Accuracy in float64 of one network that is trained on ``found`` from the weights of ``seed``."""
    spec = found.spec
    model = build_network(spec.network_spec, spec.dataset.shape, spec.dataset.classes).to_empty(device="cpu")
    model.load_state_dict(draw_network(model, spec.init_law, spec.init_param, seed))
    apply(found, model.double())
    with torch.no_grad():
        answers = model(normalise(pixels, found.mean, found.std, torch.float64)).argmax(1)
    return float((answers == targets).double().mean())


@pytest.mark.parametrize("init", ["random", "fixed"])
def test_the_validation_score_is_that_of_validation_images_on_selection_networks(
    init: str, trial_of: Callable[..., Trial]
) -> None:
    spec = spec_of(init=init, dtype="float64", outer_steps=3, seed=2, selection_networks=3)
    trial = trial_of(spec)
    assert trial.run()
    law = (spec.network, spec.init_law, spec.init_param)
    seeds = [derive_seed("selection", *law, i) for i in range(3)]
    if init == "fixed":
        seeds = [derive_seed("known", *law, spec.seed)]
    found, data = trial.result(), trial.splits
    expected = [accuracy_of(found, seed, data.validation_images, data.validation_labels) for seed in seeds]
    assert found.provenance["val_score"] == pytest.approx(sum(expected) / len(expected), abs=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"outer_lr": 0.8},
        {"outer_lr": 0.8, "ema": 0.6},
        {"outer_lr": 2.0, "order": "shuffled", "labels": "soft"},
    ],
    ids=str,
)
def test_keep_best_hands_over_the_state_with_the_highest_score(
    settings: dict[str, Any], trial_of: Callable[..., Trial]
) -> None:
    """The same trial, stopped where it scored best, has just that set. The outer rate is so high that this
    is not at the end."""
    spec = spec_of(**settings, keep="best", validate_every=1, selection_networks=4)
    trial = trial_of(spec)
    assert trial.run()
    scores = [row["val_score"] for row in trial.history()]
    best = max(scores)
    assert scores.index(best) < len(scores) - 1
    assert trial.result().provenance["val_score"] == best
    stopped = trial_of(spec)
    assert not stopped.run(steps=1 + scores.index(best))
    tensors, header = load_tensors(stopped.checkpoint)
    assert header["counters"]["best_score"] == best
    shown = "ema" if "ema" in settings else "learned"
    for name in ("images", "labels")[: 1 + ("labels" in settings)]:
        assert torch.equal(getattr(trial.result(), name), tensors[f"best.{name}"])
        assert torch.equal(tensors[f"best.{name}"], tensors[f"{shown}.{name}"])


def test_kmeans_images_start_where_the_kmeans_baseline_is(
    trial_of: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(image_init="kmeans", outer_steps=1, images_per_class=4)
    trial = trial_of(spec)
    starts: list[DistillState] = []
    real = ddsweep.trial.running.initial_state
    monkeypatch.setattr(
        ddsweep.trial.running, "initial_state", lambda *a: starts.append(real(*a)) or starts[-1]
    )
    assert trial.run()
    data = trial.splits
    network = build_network(spec.network_spec, spec.dataset.shape, spec.dataset.classes)
    group = Group(spec, EvalUnit("as_distilled", 0, 1, (0,)), data, ExecutionPlan(), network)
    expected = _images(group, "kmeans", "baseline", (), trial.directory)
    assert expected.shape == (2, 20, 1, 8, 8)
    assert torch.equal(starts[0].images, expected)
    centres = baselines.kmeans_centres(data.train_images, data.train_labels, 10, 4, data.mean, data.std)
    assert torch.equal(starts[0].images[1, 4:6], centres[2, 2:])


@pytest.mark.parametrize("init", ["random", "fixed"])
def test_distillation_and_validation_never_look_at_the_test_set(
    init: str, trial_of: Callable[..., Trial], splits: Splits
) -> None:
    spec = spec_of(init=init, outer_steps=4)
    garbage = replace(
        splits,
        test_images=torch.randint(256, (7, 1, 8, 8), dtype=torch.uint8),
        test_labels=torch.full((7,), 99),
    )
    clean, spoilt = trial_of(spec), trial_of(spec, garbage)
    assert clean.run()
    assert spoilt.run()
    assert_same_bits(clean, spoilt)


def test_validation_images_decide_the_score_and_not_the_distilled_set(
    trial_of: Callable[..., Trial], splits: Splits
) -> None:
    spec = spec_of(outer_steps=4)
    wrong = replace(splits, validation_labels=(splits.validation_labels + 1) % 10)
    clean, spoilt = trial_of(spec), trial_of(spec, wrong)
    assert clean.run()
    assert spoilt.run()
    assert clean.result().sha256 == spoilt.result().sha256
    assert clean.result().provenance["val_score"] != spoilt.result().provenance["val_score"]


def test_a_distilled_set_lowers_the_loss_that_it_was_made_for(trial_of: Callable[..., Trial]) -> None:
    spec = spec_of(init="fixed", outer_steps=60, outer_lr=0.05, validate_every=60)
    trial = trial_of(spec)
    assert trial.run(replace(SETTINGS, log_every=1, checkpoint_every=60))
    losses = [row["outer_loss"] for row in trial.history()]
    assert losses[-1] < 0.9 * losses[0]
    x = normalise(trial.splits.train_images, trial.splits.mean, trial.splits.std, torch.float32)
    model = apply(trial.result(), trial.result().network())
    with torch.no_grad():
        logits = model(x)
    assert float(F.cross_entropy(logits, trial.splits.train_labels)) < 0.9 * losses[0]


# --------------------------------------------------------------------------------------- whitened images


def test_a_whitened_trial_needs_whitened_images_and_shows_them_as_they_were(
    trial_of: Callable[..., Trial],
) -> None:
    """No rate, so the distilled images stay the real ones that they began as: the picture is theirs."""
    settings = {"image_init": "real", "outer_lr": 1e-12, "outer_steps": 1}
    spec = spec_of(**settings, whitening="zca")
    with pytest.raises(ValueError, match="whitening: the trial's is zca, the images were not loaded so"):
        trial_of(spec).run()
    white = load_splits(spec.dataset, None, validation_fraction=0.1, split_seed=0, whitening="zca")
    trial = trial_of(spec, white)
    assert trial.run()
    assert white.whitening is not None
    images = white.whitening.normalised(trial.result().images)
    pixels = (images * white.std[0] + white.mean[0]) * 255
    real = load_splits(spec.dataset, None, validation_fraction=0.1, split_seed=0).train_images.float()
    nearest = torch.cdist(pixels.flatten(0, 1).flatten(1), real.flatten(1)).amin(1)
    assert float(nearest.max()) < 1  # of 255, over all 64 pixels
    assert trial.directory.grid(spec.trial_id).stat().st_size > 0
    with pytest.raises(ValueError, match="whitening: the trial's is none"):
        trial_of(spec_of(**settings), white).run()
