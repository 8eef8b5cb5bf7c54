"""What real readers of TensorBoard, MLflow and W&B find of a sweep, once, twice, and after a kill."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddsweep.cli import main
from ddsweep.errors import UnreadableError, UserError
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part, write_part
from ddsweep.results.schemas import HISTORY, TRIALS
from ddsweep.trackers import beside, kinds
from ddsweep.trackers import sync as syncing
from ddsweep.trackers.beside import tracked
from ddsweep.trackers.contract import Told
from ddsweep.trackers.sync import Sync
from tests.conftest import PATIENCE_S
from tests.trackers.readers import Found, read_mlflow, read_tensorboard, read_wandb

READERS = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb}
TOLD = {
    "aaaa000001": Told("aaaa000001", "aaaa000001 inner_lr=0.1", {"inner_lr": 0.1, "init": "fixed"}),
    "aaaa000002": Told("aaaa000002", "aaaa000002 inner_lr=0.2", {"inner_lr": 0.2, "init": "fixed"}),
}
FIRST, SECOND = TOLD


@dataclass(frozen=True)
class Sweep:
    directory: SweepDirectory

    @property
    def out(self) -> Path:
        return self.directory.root / "tracking"

    def history(self, trial_id: str, losses: dict[int, float], **columns: dict[int, Any]) -> None:
        rows = [
            {
                **{"trial_id": trial_id, "outer_step": step, "outer_loss": loss, "seconds": step / 2},
                **{name: values.get(step) for name, values in columns.items()},
            }
            for step, loss in losses.items()
        ]
        write_part(self.directory.history_part(trial_id), rows, HISTORY, self.directory.temporary)

    def ended(self, trial_id: str, accuracy: float = 0.75) -> None:
        row = {
            **{"trial_id": trial_id, "sweep": "s", "status": "done", "outer_steps": 30, "inner_lr": 0.1},
            **{"test_accuracy_mean": accuracy, "wall_seconds": 15.0, "outer_steps_done": 30},
        }
        write_part(self.directory.trials_part(trial_id), [row], TRIALS, self.directory.temporary)

    def picture(self, trial_id: str) -> None:
        path = self.directory.grid(trial_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 9, 3), 200, np.uint8)).save(path)

    def sync(self, kind: str) -> int:
        """As one process would."""
        with Sync(kind, self.directory, TOLD, self.out) as sync:
            return sync()

    def read(self, kind: str) -> dict[str, Found]:
        return READERS[kind](self.out / kind, self.directory.root.name)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    directory = SweepDirectory(tmp_path / "small sweep")
    directory.create()
    return Sweep(directory)


@pytest.fixture(params=kinds.KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        kinds.require_trackers([request.param])
    except UserError as error:
        pytest.skip(str(error))
    yield request.param


def test_settings_curves_final_row_and_picture_arrive(sweep: Sweep, kind: str) -> None:
    sweep.history(FIRST, {10: 3.0, 20: 2.0, 30: float("nan")}, val_score={20: 0.5})
    sweep.ended(FIRST)
    sweep.picture(FIRST)
    sweep.history(SECOND, {10: 9.0})
    assert sweep.sync(kind) == 2
    found = sweep.read(kind)
    assert set(found) == {FIRST, SECOND}
    first = found[FIRST]
    assert first.curve("outer_loss") == [(10, 3.0), (20, 2.0)]  # what is not finite is left out
    assert first.curve("val_score") == [(20, 0.5)]
    assert first.curve("seconds") == [(10, 5.0), (20, 10.0), (30, 15.0)]
    assert first.settings["init"] == "fixed" and float(first.settings["inner_lr"]) == 0.1
    assert first.final["test_accuracy_mean"] == 0.75 and first.words["status"] == "done"
    assert "inner_lr" not in first.final
    assert first.pictures == [(9, 6)]
    second = found[SECOND]
    assert second.curve("outer_loss") == [(10, 9.0)] and not second.final and not second.pictures


def test_nothing_is_sent_twice_and_a_later_process_goes_on_in_the_same_run(sweep: Sweep, kind: str) -> None:
    sweep.history(FIRST, {10: 3.0})
    assert sweep.sync(kind) == 1
    assert sweep.sync(kind) == 0
    sweep.history(FIRST, {10: 3.0, 20: 2.0})
    assert sweep.sync(kind) == 1
    sweep.history(FIRST, {10: 3.0, 20: 2.0, 30: 1.0})
    sweep.ended(FIRST)
    sweep.picture(FIRST)
    assert (sweep.sync(kind), sweep.sync(kind)) == (1, 0)
    found = sweep.read(kind)
    assert list(found) == [FIRST]
    assert found[FIRST].curve("outer_loss") == [(10, 3.0), (20, 2.0), (30, 1.0)]
    assert found[FIRST].pictures == [(9, 6)]
    assert found[FIRST].settings["init"] == "fixed"
    sweep.ended(FIRST, accuracy=0.875)  # evaluated again on other networks
    assert sweep.sync(kind) == 1
    again = sweep.read(kind)[FIRST]
    assert again.final["test_accuracy_mean"] == 0.875
    assert again.curve("outer_loss") == [(10, 3.0), (20, 2.0), (30, 1.0)]


def test_after_a_kill_between_sending_and_noting_no_point_is_there_twice(sweep: Sweep, kind: str) -> None:
    sweep.history(FIRST, {10: 3.0})
    sweep.sync(kind)
    note = sweep.out / f"{kind}-small sweep.json"
    before = note.read_bytes()
    sweep.history(FIRST, {10: 3.0, 20: 2.0})
    sweep.sync(kind)
    note.write_bytes(before)
    sweep.sync(kind)
    assert sweep.read(kind)[FIRST].curve("outer_loss") == [(10, 3.0), (20, 2.0)]


def test_what_was_sent_is_there_after_a_kill_and_the_next_process_goes_on(sweep: Sweep, kind: str) -> None:
    sweep.history(FIRST, {10: 3.0, 20: 2.0})
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from ddsweep.results.layout import SweepDirectory\n"
        "from ddsweep.trackers.sync import Sync\n"
        "root = Path(sys.argv[1])\n"
        "with Sync(sys.argv[2], SweepDirectory(root), {}, root / 'tracking') as sync:\n"
        "    print(sync(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(sweep.directory.root), kind]
    killed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "1\n")
    assert _curve(sweep, kind) == [(10, 3.0), (20, 2.0)]
    sweep.history(FIRST, {10: 3.0, 20: 2.0, 30: 1.0})
    assert sweep.sync(kind) == 1
    assert _curve(sweep, kind) == [(10, 3.0), (20, 2.0), (30, 1.0)]


def _curve(sweep: Sweep, kind: str) -> list[tuple[int, float]]:
    found = sweep.read(kind)
    return found[FIRST].curve("outer_loss") if FIRST in found else []


def test_steps_that_were_taken_again_replace_the_first_ones(sweep: Sweep) -> None:
    with Sync("tensorboard", sweep.directory, TOLD, sweep.out) as sync:
        sweep.history(FIRST, {10: 3.0, 20: 7.0, 30: 8.0}, n_rollbacks={10: 0, 20: 0, 30: 0})
        assert sync() == 1
        sweep.history(FIRST, {10: 3.0, 20: 2.5}, n_rollbacks={10: 0, 20: 1})
        assert (sync(), sync()) == (1, 0)
        sweep.history(FIRST, {10: 3.0, 20: 2.5, 30: 2.0}, n_rollbacks={10: 0, 20: 1, 30: 1})
        assert sync() == 1
    assert sweep.read("tensorboard")[FIRST].curve("outer_loss") == [(10, 3.0), (20, 2.5), (30, 2.0)]


def test_a_torn_part_waits_and_an_unknown_trial_is_told_by_its_row(sweep: Sweep) -> None:
    sweep.history("bbbb000001", {10: 3.0})
    sweep.ended("bbbb000001")
    part = sweep.directory.history_part("bbbb000001")
    whole = part.read_bytes()
    part.write_bytes(whole[:-9])
    sweep.sync("tensorboard")
    found = sweep.read("tensorboard")["bbbb000001"]
    assert found.curve("outer_loss") == [] and found.settings["inner_lr"] == 0.1
    part.write_bytes(whole)
    sweep.sync("tensorboard")
    assert sweep.read("tensorboard")["bbbb000001"].curve("outer_loss") == [(10, 3.0)]


def test_two_processes_do_not_send_to_one_place(sweep: Sweep) -> None:
    with (
        Sync("tensorboard", sweep.directory, TOLD, sweep.out),
        pytest.raises(UserError, match="another process sends this sweep to tensorboard"),
    ):
        sweep.sync("tensorboard")


def test_a_tracker_that_is_not_live_gets_trials_that_ended_and_at_the_end_the_others(sweep: Sweep) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    sweep.history(FIRST, {10: 3.0})
    sweep.ended(FIRST)
    sweep.history(SECOND, {10: 9.0})
    with Sync("wandb", sweep.directory, TOLD, sweep.out) as sync:
        assert sync(last=False) == 1
        assert list(sweep.read("wandb")) == [FIRST]
        assert (sync(), sync()) == (1, 0)
    assert list(sweep.read("wandb")) == [FIRST, SECOND]


def test_beside_a_sweep_what_comes_is_sent_and_a_failing_tracker_says_so_once(sweep: Sweep) -> None:
    said: list[str] = []
    (sweep.out).mkdir()
    (sweep.out / "mlflow-small sweep.json").write_text("[torn")
    both = ("tensorboard", "mlflow")
    with tracked(both, sweep.directory, TOLD, sweep.out, said.append, every_s=0.01):
        sweep.history(FIRST, {10: 3.0})
        sweep.ended(FIRST)
    assert sweep.read("tensorboard")[FIRST].final["test_accuracy_mean"] == 0.75
    (line,) = said
    assert line.startswith("tracker mlflow: ") and "ddsweep track" in line and "goes on" in line
    assert beside._EVERY_S >= 5


def test_a_tracker_that_hangs_does_not_hold_up_the_end(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    over = threading.Event()
    monkeypatch.setattr(beside.Sync, "__call__", lambda self, last=True: over.wait(PATIENCE_S))
    with tracked(["tensorboard"], sweep.directory, TOLD, sweep.out, said.append, every_s=0.01, at_end_s=0.2):
        pass
    over.set()
    (line,) = said
    assert line.startswith("tracker tensorboard: not waited for any longer; `ddsweep track ")


def test_a_missing_extra_and_an_unknown_tracker_are_one_message(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.directory.sweep_file.write_text("name: s\n")
    for words, message in (
        (["track", str(sweep.directory.root), "--to", "aim"], "choose from tensorboard, mlflow, wandb"),
        (["run", "quickstart", "--track", "aim"], "choose from tensorboard, mlflow, wandb"),
        (["track", str(sweep.directory.root), "--to", "mlflow"], "pip install 'ddsweep[mlflow]'"),
    ):
        if "mlflow" in words:
            monkeypatch.setattr(kinds, "find_spec", lambda name: None)
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 1
        assert message in capsys.readouterr().err
    assert not sweep.out.exists()


def test_the_verb_sends_from_the_files_alone(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.directory.sweep_file.write_text(
        "name: s\n"
        "base: {dataset: digits, network: convnet(width=8), init: fixed, outer_steps: 30}\n"
        "grid: {inner_lr: [0.1]}\n"
    )
    from ddsweep.report.sweep_file import asked_of

    (trial,) = asked_of(sweep.directory).trials or ()
    sweep.history(trial.trial_id, {10: 3.0})
    out = tmp_path / "elsewhere"
    words = ["track", str(sweep.directory.root), "--to", "tensorboard", "--out", str(out)]
    for news in ("1 trial", "0 trials"):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code
        assert f"news of {news} sent" in capsys.readouterr().out
    found = read_tensorboard(out / "tensorboard", "small sweep")[trial.trial_id]
    assert found.settings["init"] == "fixed" and found.settings["images_per_class"] == 1
    assert found.curve("outer_loss") == [(10, 3.0)]
    assert set(json.loads((out / "tensorboard-small sweep.json").read_text())) == {trial.trial_id, "from"}
    shutil.rmtree(out)


def test_another_sweep_of_that_name_is_not_taken_for_this_one(sweep: Sweep, tmp_path: Path) -> None:
    other = SweepDirectory(tmp_path / "beside" / sweep.directory.root.name)
    other.create()
    out = tmp_path / "shared"
    sweep.history(FIRST, {10: 3.0})
    with Sync("tensorboard", sweep.directory, TOLD, out) as sync:
        assert sync() == 1
    with (
        pytest.raises(UserError, match=rf"of another sweep that is called small sweep, in {tmp_path}/small"),
        Sync("tensorboard", other, TOLD, out),
    ):
        pass
    # A folder may move with what was sent from it, and notes of earlier versions say nothing of it.
    assert sweep.sync("tensorboard") == 1
    moved = Sweep(SweepDirectory(tmp_path / "beside" / "moved" / "small sweep"))
    moved.directory.root.parent.mkdir()
    sweep.directory.root.rename(moved.directory.root)
    assert moved.sync("tensorboard") == 0
    note = moved.out / "tensorboard-small sweep.json"
    content = json.loads(note.read_text())
    del content["from"]
    note.write_text(json.dumps(content))
    assert moved.sync("tensorboard") == 0


def test_a_part_that_cannot_be_read_for_a_moment_is_sent_later(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep.history(FIRST, {10: 3.0})
    sweep.ended(FIRST)
    left = [2]

    def read(path: Path) -> Any:
        if left[0]:
            left[0] -= 1
            raise UnreadableError(f"{path}: cannot be read")
        return read_part(path)

    monkeypatch.setattr(syncing, "read_part", read)
    with Sync("tensorboard", sweep.directory, TOLD, sweep.out) as sync:
        assert [sync(), sync(), sync()] == [0, 1, 0]
    assert sweep.read("tensorboard")[FIRST].final["test_accuracy_mean"] == 0.75


def test_what_a_trackers_own_library_says_is_one_message(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    sweep.directory.sweep_file.write_text("name: s\nbase: {dataset: digits}\n")
    sweep.history(FIRST, {10: 3.0})
    words = ["track", str(sweep.directory.root), "--to", "mlflow"]

    def told(*more: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*words, *more])
        assert ended.value.code == 1
        return capsys.readouterr().err

    bad = sweep.directory.root / "bad"
    (bad / "mlflow").mkdir(parents=True)
    (bad / "mlflow" / "mlflow.db").write_bytes(b"no data base " * 100)
    said = told("--out", str(bad))
    assert said.startswith("ddsweep: tracker mlflow: ") and f"remove {bad / 'mlflow'} and" in said
    sweep.sync("mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{sweep.out}/mlflow/mlflow.db")
    found = client.get_experiment_by_name("small sweep")
    assert found is not None
    client.delete_experiment(found.experiment_id)
    assert "the experiment small sweep was deleted there; restore it" in told()
