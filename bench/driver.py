"""What one driver can carry: a sweep of many trivial trials planned, resumed, watched and collected.

Run from the repository: ``python bench/driver.py [--trials 1000 100000] [--json]``. See bench/README.md.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import torch
from baseline import positive, print_json, print_setting

from ddsweep.catalog import DATASETS, EvaluationSpec, TrialSpec
from ddsweep.data.load import load_splits
from ddsweep.distilled import DistilledSet
from ddsweep.errors import UserError
from ddsweep.evaluation import evaluate_unit, finish
from ddsweep.results.artifacts import save_tensors
from ddsweep.results.files import write_atomic
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part, read_whole, write_part_table
from ddsweep.results.schemas import HISTORY
from ddsweep.spec import Plan, SweepSpec, expand, load_sweep
from ddsweep.trial import distil_trial, read_distilled
from ddsweep.trial_plan import TrialSettings

COMMAND_LINE = """
import json, sys, time
from ddsweep.cli import main
try:
    main(sys.argv[1:])
finally:
    sys.stdout.flush()
    status = open("/proc/self/status").read()
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    print(json.dumps({"cpu": time.process_time(), "bytes": peak}))
"""
"""A command as a user gives it, which says at its end how much memory it took at its peak."""

ROOT = Path(__file__).resolve().parents[1]

SWEEP = """\
name: driver
base:
  dataset: digits
  network: convnet(width=4)
  outer_steps: 400
  models_per_step: 1
  real_batch: 16
  selection_networks: 1
grid:
  inner_lr: [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0]
seeds: {seeds}
evaluate:
  networks: 16
"""
LOGGED = 40
"""Rows of a history: 400 outer steps, every tenth of them logged."""

SYNCED = 200
"""Trials whose files are written as in a run, each made safe against a power cut; the others are not."""

FINISHED = 100
"""Trials of which the last step is taken that the driver takes itself: summing up their evaluation."""


# ------------------------------------------------------------------------------------ trivial trials


def _planned(file: Path) -> tuple[SweepSpec, Plan]:
    sweep = load_sweep(file)
    return sweep, expand(sweep, lambda name: DATASETS[str(name)])


class _Template:
    """One trial that was distilled and evaluated for real, and whose files all the others copy."""

    def __init__(self, spec: TrialSpec, evaluation: EvaluationSpec, folder: Path) -> None:
        self.spec = replace(spec, outer_steps=1, validate_every=1)
        directory, trial_id = SweepDirectory(folder), self.spec.trial_id
        splits = load_splits(spec.dataset, None, validation_fraction=0.1, split_seed=0)
        distil_trial(self.spec, splits, directory, TrialSettings())
        for unit in evaluation.units(self.spec):
            evaluate_unit(self.spec, unit, evaluation, splits, directory, torch.device("cpu"))
        finish(self.spec, evaluation, directory, "driver")
        self.distilled = read_distilled(self.spec, directory)
        self.grid = directory.grid(trial_id).read_bytes()
        self.trials, self.row = read_whole(directory.trials_part(trial_id))
        row = read_part(directory.history_part(trial_id)).to_pylist()[-1]
        history = [{**row, "outer_step": 10 * (i + 1)} for i in range(LOGGED)]
        self.history = pa.Table.from_pylist(history, schema=HISTORY)
        paths = directory.evals_parts(trial_id)
        self.evals = [(path.name, *read_whole(path)) for path in paths]

    def write(self, spec: TrialSpec, evaluation: EvaluationSpec, directory: SweepDirectory) -> None:
        """The files that ``spec`` leaves, through the writers that a run uses."""
        temporary, trial_id = directory.temporary, spec.trial_id
        distilled: DistilledSet = replace(self.distilled, spec=spec)
        write_atomic(directory.grid(spec.trial_id), self.grid, temporary)
        save_tensors(directory.distilled(spec.trial_id), distilled.tensors(), distilled.header(), temporary)
        write_part_table(directory.history_part(trial_id), _with(self.history, trial_id=trial_id), temporary)
        for name, table, metadata in self.evals:
            path = directory.parts("evals") / name.replace(self.spec.trial_id, trial_id)
            write_part_table(path, _with(table, trial_id=trial_id), temporary, metadata)
        row = {name: getattr(spec, name) for name in ("inner_lr", "seed", "outer_steps", "validate_every")}
        done = {"evaluation_id": evaluation.evaluation_id(spec)}
        table = _with(self.trials, trial_id=trial_id, outer_steps_done=spec.outer_steps, **row, **done)
        write_part_table(directory.trials_part(trial_id), table, temporary, {**self.row, **done})


def _with(table: pa.Table, **values: Any) -> pa.Table:
    """``table`` with the same value in all rows of some columns."""
    for name, value in values.items():
        place = table.schema.get_field_index(name)
        field = table.schema.field(place)
        table = table.set_column(place, field, pa.repeat(pa.scalar(value, field.type), table.num_rows))
    return table


def _write(file: Path, directory: SweepDirectory, first: int, last: int) -> dict[str, Any]:
    """Leave the files of trials number ``first`` to ``last``."""
    sweep, plan = _planned(file)
    evaluation = sweep.evaluate.spec()
    directory.create()
    write_atomic(directory.sweep_file, file.read_bytes(), directory.temporary)
    with tempfile.TemporaryDirectory() as folder:
        template = _Template(plan.trials[0], evaluation, Path(folder))
    trials = plan.trials[first:last]
    start = time.perf_counter()
    for spec in trials[:SYNCED]:
        template.write(spec, evaluation, directory)
    synced = (time.perf_counter() - start) / max(1, len(trials[:SYNCED]))
    os.fsync = lambda descriptor: None  # nobody will miss them after a power cut
    cpu = time.process_time()
    for spec in trials[SYNCED:]:
        template.write(spec, evaluation, directory)
    per_trial = (time.process_time() - cpu) / max(1, len(trials[SYNCED:]))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "seconds_per_synced_trial": synced, "cpu_per_unsynced_trial": per_trial}


# ----------------------------------------------------------------------------- one measurement each


def _resident(field: str) -> int:
    """``VmHWM`` (the peak) or ``VmRSS`` (now) of this process, bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _timed(work: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of ``work``, by the clock and of the CPU, and the bytes that it adds at its peak to what the
    process had before it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, cpu, start = _resident("VmRSS"), time.process_time(), time.perf_counter()
    found = work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    added = max(0, _resident("VmHWM") - before)
    return {"seconds": seconds, "cpu": cpu, "bytes": added, **(found if isinstance(found, dict) else {})}


def _expand(file: Path, directory: SweepDirectory) -> dict[str, Any]:
    """The trials, and which of them are done: what ``plan`` does before it draws."""
    from ddsweep.report.status import trial_states

    def work() -> dict[str, Any]:
        sweep, plan = _planned(file)
        states = trial_states(directory, plan.trials, sweep.evaluate.spec())
        return {"done": sum(state == "done" for state in states.values())}

    return _timed(work)


def _resume(file: Path, directory: SweepDirectory) -> dict[str, Any]:
    """What ``run`` does before it starts Ray: which trials are done, every part of them whole?"""
    from ddsweep.evaluation import trial_is_done
    from ddsweep.results.known import KnownParts

    sweep, plan = _planned(file)
    evaluation = sweep.evaluate.spec()

    def work() -> dict[str, Any]:
        known = KnownParts.load(directory)
        done = sum(trial_is_done(spec, evaluation, directory, known) for spec in plan.trials)
        known.save(directory)
        return {"done": done}

    return _timed(work)


def _load(file: Path, directory: SweepDirectory) -> dict[str, Any]:
    from ddsweep import load_results

    def work() -> dict[str, Any]:
        found = load_results(directory.root)
        return {"rows": {"trials": len(found.trials), "evals": len(found.evals)}}

    return _timed(work)


def _summary(file: Path, directory: SweepDirectory) -> dict[str, Any]:
    """The table that ``run`` prints at its end."""
    from ddsweep.report.console import MOST_LISTED, report_console
    from ddsweep.report.summary import summarise
    from ddsweep.report.summary_table import summary_table

    _, plan = _planned(file)

    def work() -> None:
        ended = (t.trial_id for t in plan.trials if directory.trials_part(t.trial_id).exists())
        ids = list(itertools.islice(ended, MOST_LISTED))
        summaries = summarise(directory, ids)
        report_console().print(summary_table(summaries))

    return _timed(work)


def _board(file: Path, directory: SweepDirectory) -> dict[str, Any]:
    """A log file that hears of every trial: begun, two losses, evaluated, done."""
    from rich.console import Console

    from ddsweep.sweep.observe import Board

    _, plan = _planned(file)
    board = Board(
        Console(file=io.StringIO(), width=160), {t.trial_id: t.trial_id for t in plan.trials}, plan.trials
    )
    heard = plan.trials[:200]

    def work() -> None:
        for spec in heard:
            board.set_state(spec.trial_id, "running")
            board.progress(spec.trial_id, 200, 200, 1.0, None)
            board.progress(spec.trial_id, 400, 200, 0.9, 0.5)
            board.set_state(spec.trial_id, "evaluating")
            board.set_state(spec.trial_id, "done")

    found = _timed(work)
    return {**found, "cpu_per_trial": found["cpu"] / len(heard)}


def _finish(file: Path, directory: SweepDirectory) -> dict[str, Any]:
    """What the driver does itself at the end of each trial, in a folder that holds all the others."""
    sweep, plan = _planned(file)
    evaluation = replace(sweep.evaluate.spec(), baselines=())
    trials, parts = plan.trials[:FINISHED], directory.evals_by_trial()

    def work() -> None:
        for spec in trials:
            assert finish(spec, evaluation, directory, "driver", parts[spec.trial_id])

    found = _timed(work)
    return {**found, **{f"{k}_per_trial": found[k] / len(trials) for k in ("seconds", "cpu")}}


def _in_ray(sweep: SweepSpec, plan: Plan, directory: SweepDirectory, *, stop: bool) -> dict[str, Any]:
    """Run the sweep on a Ray of its own, or, with ``stop``, tell each trial to stop as soon as it begins."""
    from rich.console import Console

    from ddsweep.sweep import distilling
    from ddsweep.sweep.drain import Drain
    from ddsweep.sweep.observe import Board
    from ddsweep.sweep.places import Places
    from ddsweep.sweep.runner import SweepRequest, run_sweep

    alone = {"dashboard": False, "cohort": 1}  # a process of its own for each, with what that costs
    sweep = sweep.model_copy(update={"resources": sweep.resources.model_copy(update=alone)})
    labels = {spec.trial_id: spec.trial_id for spec in plan.trials}
    directory.create()
    clock: dict[str, float] = {}

    def ready() -> None:
        if stop:
            directory.stop_file.touch()
        clock["start"], clock["cpu"] = time.perf_counter(), time.process_time()

    def starts_all(*given: Any, draining: Callable[[], bool], **more: Any) -> Places:
        """In a drain as well, where those that wait are taken out."""
        return Places(*given, **more)

    seconds = dict.fromkeys(labels, 1.0)  # so short that they share worker processes
    with mock.patch.object(distilling, "Places", starts_all), Drain() as drain:
        outcome = run_sweep(
            SweepRequest(sweep, plan.trials, directory, None, seconds, labels),
            Board(Console(file=io.StringIO(), width=160), labels, plan.trials),
            drain,
            on_ready=ready,
        )
    assert (outcome.left if stop else outcome.done) == len(plan.trials)
    return {"seconds": time.perf_counter() - clock["start"], "cpu": time.process_time() - clock["cpu"]}


def _tune(file: Path, directory: SweepDirectory) -> dict[str, Any]:
    """Ray, Tune and its workers, and no work: what is left is what a trial costs whatever it does."""
    sweep, plan = _planned(file)
    before = _resident("VmRSS")
    found = _in_ray(sweep, plan, directory, stop=True)
    count = len(plan.trials)
    per_trial = {f"{k}_per_trial": found[k] / count for k in ("seconds", "cpu")}
    return {**found, **per_trial, "bytes_per_trial": (_resident("VmRSS") - before) / count}


def _reports(file: Path, directory: SweepDirectory) -> dict[str, Any]:
    """Ten trials that report each of their 400 outer steps: what a report costs the driver."""
    sweep, plan = _planned(file)
    resources = sweep.resources.model_copy(update={"log_every": 1, "checkpoint_every": 400})
    evaluate = sweep.evaluate.model_copy(update={"networks": 1, "baselines": ()})
    sweep = sweep.model_copy(update={"resources": resources, "evaluate": evaluate})
    few = replace(plan, trials=plan.trials[:10])
    found = _in_ray(sweep, few, directory, stop=False)
    count = sum(trial.outer_steps for trial in few.trials)
    return {**found, "reports": count, "cpu_per_report": found["cpu"] / count}


ONE: dict[str, Callable[[Path, SweepDirectory], dict[str, Any]]] = {
    "expand": _expand,
    "resume": _resume,
    "load": _load,
    "summary": _summary,
    "board": _board,
    "finish": _finish,
    "tune": _tune,
    "reports": _reports,
}


IN_RAY = ("tune", "reports")


def _one(name: str, file: Path, directory: SweepDirectory, *limits: int) -> None:
    found = _write(file, directory, *limits) if name == "write" else ONE[name](file, directory)
    print(json.dumps(found))


# ------------------------------------------------------------------------------------ all of them


def _measured(command: Sequence[str]) -> dict[str, Any]:
    """Run ``command`` to its end: wall seconds and what its last line says; of a verb, its bytes at the peak
    and the lines that it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        ended = subprocess.run(command, stdout=out, stderr=errors, env=environment, check=False)
        seconds = time.perf_counter() - start
        out.seek(0)
        errors.seek(0)
        if ended.returncode:
            raise UserError(f"{' '.join(command[1:])}: {errors.read().strip()[-2000:]}")
        lines = out.read().splitlines()
    last = json.loads(lines[-1])
    return {"seconds": seconds, **last, **({} if "seconds" in last else {"lines": len(lines) - 1})}


def _footprint(directory: SweepDirectory) -> dict[str, dict[str, int]]:
    """Files, and the bytes that they take on the disk, by folder."""
    found = {}
    for folder in ("trials", "evals", "history", "artifacts", "tables", ".cache"):
        sizes = [p.stat() for p in (directory.root / folder).rglob("*")]
        found[folder] = {"files": len(sizes), "bytes": sum(512 * s.st_blocks for s in sizes)}
    return found


def _measure(count: int, folder: Path, stages: Sequence[str]) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    file, results = folder / f"driver-{count}.yaml", folder / str(count)
    file.write_text(SWEEP.format(seeds=count // 10))
    directory = SweepDirectory(results / "driver")
    cli = [sys.executable, "-c", COMMAND_LINE]
    rows: list[dict[str, Any]] = []

    def one(stage: str, state: str, *more: str) -> None:
        name = stage.partition(" ")[0]
        if name not in stages:
            return
        command = {
            "plan": [*cli, "plan", str(file), "--results", str(results)],
            "status": [*cli, "status", str(directory.root)],
            "collect": [*cli, "collect", str(directory.root)],
        }.get(name, [sys.executable, __file__, "--one", name, str(file), str(directory.root), *more])
        found = {"trials": count, "stage": stage, "state": state, **_measured(command)}
        rows.append(found)
        words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()]
        print(", ".join(words[1:]).replace("stage ", ""), flush=True)

    for state, first, last in (("nothing", 0, 0), ("half", 0, count // 2), ("all", count // 2, count)):
        one("write", state, str(first), str(last))
        for stage in ("expand", "plan", "resume", "resume again"):
            one(stage, state)
    for stage in ("status", "load", "collect", "load again", "resume at last", "summary", "board", "finish"):
        one(stage, "all")
    for stage in ("tune", "reports"):
        one(stage, "nothing")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each stage in a process of its own, for each number of trials."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=positive, nargs="+", default=[1000], help="multiples of ten")
    parser.add_argument("--in-ray", type=positive, nargs="*", default=[300], help="trials for tune, reports")
    stages = ["write", "plan", "status", "collect", *ONE]
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages)
    parser.add_argument("--out", type=Path, help="folder for the files (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    o = parser.parse_args(argv)
    for count in (*o.trials, *o.in_ray):
        if count % 10:
            raise UserError(f"--trials: {count} is not a multiple of ten")
    print_setting(
        "driver: trivial trials, and what they cost the one process that sees them all",
        torch.device("cpu"),
        "float32",
        "digits",
        f"{o.trials} trials",
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ddsweep-driver-") as temporary:
        folder = o.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for count in o.trials:
            print(f"{count} trials", flush=True)
            rows += _measure(count, folder, [s for s in o.stages if s not in IN_RAY])
            footprint = _footprint(SweepDirectory(folder / str(count) / "driver"))
            rows.append({"trials": count, "stage": "files", "by_folder": footprint})
            print(f"files {footprint}", flush=True)
        for count in o.in_ray if {*IN_RAY} & {*o.stages} else ():
            print(f"{count} trials in Ray", flush=True)
            rows += _measure(count, folder / "ray", [s for s in o.stages if s in IN_RAY])
    if o.json:
        print_json(torch.device("cpu"), {"bench": "driver", "rows": rows})
    return 0


if __name__ == "__main__":
    try:
        if "--one" in sys.argv:
            name, file, root, *limits = sys.argv[sys.argv.index("--one") + 1 :]
            _one(name, Path(file), SweepDirectory(Path(root)), *map(int, limits))
            sys.exit(0)
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
