"""The units of a trial's evaluation: which are missing, and computing one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddsweep.catalog import EvaluationSpec, EvalUnit, NetworkSpec, TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.core.execution import choose_plan
from ddsweep.core.memory import fitted
from ddsweep.core.networks import build_network
from ddsweep.data.splits import Splits
from ddsweep.distilled import DistilledSet
from ddsweep.errors import TooLargeError
from ddsweep.evaluation.baseline_rows import baseline_rows
from ddsweep.evaluation.group import Group
from ddsweep.evaluation.protocol_rows import protocol_rows
from ddsweep.pools.imagenet import pool_of
from ddsweep.pools.judged import note_networks
from ddsweep.provenance import environment
from ddsweep.results.code import load_code_of
from ddsweep.results.coverage import (
    HOLDS,
    Held,
    TrialParts,
    holds_text,
    missing,
    needs_baseline,
    recorded_set,
    sorted_out,
)
from ddsweep.results.files import patiently
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_parts, write_part
from ddsweep.results.schemas import EVALS
from ddsweep.trial import read_distilled

__all__ = ["evaluate_unit", "missing_units", "parts_of"]

THREADS = 1
"""Evaluation always uses this many CPU threads, because float32 results depend on it."""


# ------------------------------------------------------------------------------------ what is there


def missing_units(
    spec: TrialSpec,
    evaluation: EvaluationSpec,
    directory: SweepDirectory,
    paths: Sequence[Path] | None = None,
) -> list[EvalUnit]:
    """What is left to compute of a distilled trial (see `ddsweep.results.coverage.missing`).

    ``paths`` are its evals parts; left out, the folder is listed, which takes longer the more trials there
    are.
    """
    distilled = read_distilled(spec, directory)
    return missing(spec, evaluation, parts_of(spec, evaluation, directory, distilled.sha256, paths).held)


def parts_of(
    spec: TrialSpec,
    evaluation: EvaluationSpec,
    directory: SweepDirectory,
    distilled: str | None,
    paths: Sequence[Path] | None = None,
    known: KnownParts | None = None,
) -> TrialParts:
    """The evals parts of a trial (``paths``, if they have been listed), by what they hold of the set with the
    hash ``distilled``. Every byte of parts that are not ``known`` is read."""
    known = known or KnownParts()
    if paths is None:
        paths = directory.evals_parts(spec.trial_id)
    recorded = recorded_set(directory, spec.trial_id, known)
    return sorted_out(paths, spec, evaluation, distilled, recorded, known)


def _own_part(
    spec: TrialSpec, unit: EvalUnit, evaluation: EvaluationSpec, directory: SweepDirectory, distilled: str
) -> tuple[Path, Held | None]:
    """The path for the rows of ``unit``, and the existing rows that may stay beside them."""
    law = spec.pool.name if spec.pool else spec.init_law
    name = (spec.trial_id, unit.protocol, law, unit.group)
    plain, sized = directory.evals_part(*name), directory.evals_part(*name, size=unit.size)
    changes = None if unit.changes is None else unit.changes.changes()
    for path in (sized, plain):
        for held in parts_of(spec, evaluation, directory, distilled, [path]).held:
            if held.changes == changes and held.size == unit.size:
                return path, held
            if held.changes == changes:
                return sized, None
    return plain, None


# -------------------------------------------------------------------------------------- evaluating


@lru_cache(maxsize=8)
def _network(spec: NetworkSpec, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """One module for all groups, because recordings of a GPU belong to a module."""
    return build_network(spec, shape, classes)


@dataclass(frozen=True)
class _Todo:
    """The missing rows of a unit: networks that lack a test of the distilled set and, by baseline, networks
    that lack it. Rows of the baselines ``stale`` have other settings than asked."""

    distilled: tuple[int, ...]
    baselines: Mapping[str, tuple[int, ...]]
    stale: frozenset[str]


def _todo(spec: TrialSpec, unit: EvalUnit, evaluation: EvaluationSpec, held: Held | None) -> _Todo:
    steps = evaluation.steps(spec, unit.changes)
    distilled = tuple(i for i in unit.indices if held is None or held.lacks_steps(i, steps))
    if unit.changes is not None:  # no baselines under this one
        return _Todo(distilled, {}, frozenset())
    baselines: dict[str, tuple[int, ...]] = {}
    stale = set()
    for source in evaluation.baselines:
        settings = evaluation.baseline_settings([source])
        lacking = {
            i
            for i in unit.indices
            if needs_baseline(spec, unit.protocol, i, source)
            and (held is None or held.lacks_baseline(i, source, settings))
        }
        if held is not None and (there := held.baselines.get(source)) and there.settings != settings:
            stale.add(source)
            lacking |= {i for i in held.steps if None in there.networks or i in there.networks}
        if lacking:
            # Other trials find the one row for all networks by the networks that are asked for.
            whole = {*unit.indices, *lacking} if source == "knn_kmeans" else lacking
            baselines[source] = tuple(sorted(whole))
    return _Todo(distilled, baselines, frozenset(stale))


def evaluate_unit(
    spec: TrialSpec,
    unit: EvalUnit,
    evaluation: EvaluationSpec,
    splits: Splits,
    directory: SweepDirectory,
    device: torch.device,
    *,
    compile: str = "auto",
) -> Path:
    """Compute the missing rows of one unit of a distilled trial, with baselines, and write its part. Existing
    rows stay, except those of baselines with other settings. Under ``compile: off`` the test pass is not
    compiled either.

    Returns the part's path; does nothing if no row is missing. Raises `CheckpointError` if the distilled set
    is missing or torn, and `TooLargeError` if the group does not fit the memory. Only its test pass can be
    taken in smaller pieces, because rows depend on the networks that are trained together.
    """
    distilled = read_distilled(spec, directory)
    sha256 = distilled.sha256
    path, held = _own_part(spec, unit, evaluation, directory, sha256)
    todo = _todo(spec, unit, evaluation, held)
    if not todo.distilled and not todo.baselines:
        return path
    torch.set_num_threads(THREADS)
    used = spec if unit.changes is None else unit.changes.applied_to(spec)
    load_code_of([used], directory.code)
    network = _network(used.network_spec, used.dataset.shape, used.dataset.classes)
    plan = choose_plan(device, THREADS, network, graph=True, native=compile != "off")
    pool = pool_of(used, directory.pools)
    if pool is not None:
        patiently(lambda: note_networks(pool, directory))
    group = Group(used, unit, splits, plan, network, pool)

    def give_up(error: Exception) -> bool:
        raise TooLargeError(_too_large(spec, group, device, error)) from error

    rows = fitted(lambda: _rows(spec, group, todo, distilled, evaluation, directory), give_up)
    rows = _beside([] if held is None else read_parts([path], EVALS).to_pylist(), rows, todo.stale)
    before = {} if held is None else {name: found.settings for name, found in held.baselines.items()}
    holds = holds_text(
        rows,
        size=unit.size,
        distilled=sha256,
        changes=None if unit.changes is None else unit.changes.changes(),
        settings={**before, **{name: evaluation.baseline_settings([name]) for name in todo.baselines}},
    )
    # The last two are not columns: they change at most the last digits of a loss.
    metadata = {HOLDS: holds, "host": environment()["host"], "native": str(plan.native).lower()}
    rows = [{**row, "trial_id": spec.trial_id} for row in rows]
    patiently(lambda: write_part(path, rows, EVALS, directory.temporary, metadata))
    return path


def _beside(
    there: list[dict[str, Any]], new: list[dict[str, Any]], stale: frozenset[str]
) -> list[dict[str, Any]]:
    """The rows that stay, and the ``new`` rows that are not among them."""
    kept = [row for row in there if row["source"] not in stale]
    keys = set(map(_key, kept))
    return [*kept, *(row for row in new if _key(row) not in keys)]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    # A distilled set is tested after several steps, a baseline once.
    step = row["inner_step"] if row["source"] == "distilled" else None
    return row["source"], row["protocol"], row["model_seed"], step


def _too_large(spec: TrialSpec, group: Group, device: torch.device, error: Exception) -> str:
    said = " ".join(str(error).split())[:200] or type(error).__name__
    more = "a larger evaluate.gpus" if device.type == "cuda" else "fewer evaluate.shards"
    return (
        f"evaluation of {spec.trial_id} under {group.unit.protocol}: "
        f"{counted(len(group.indices), 'network')} trained together do not fit the memory of {device.type}; "
        f"set {more} or a smaller evaluate.group_size ({said})"
    )


def _rows(
    spec: TrialSpec,
    group: Group,
    todo: _Todo,
    distilled: DistilledSet,
    evaluation: EvaluationSpec,
    directory: SweepDirectory,
) -> list[dict[str, Any]]:
    unit, rows = group.unit, []
    if todo.distilled:
        some = replace(group, unit=replace(unit, indices=todo.distilled))
        if unit.changes is not None:
            return protocol_rows(some, unit.changes, distilled, evaluation.steps(spec, unit.changes))
        own, tuned = distilled.recipe, distilled.tuned
        result = some.test_distilled(distilled, own, evaluation.steps(spec))
        rows += some.rows(result, "distilled", unit.protocol, own)
        if tuned is not None:
            result = some.test_distilled(distilled, tuned, [spec.inner_steps * tuned.epochs])
            rows += some.rows(result, "distilled", f"{unit.protocol}_tuned", tuned)
    for source, indices in todo.baselines.items():
        some = replace(group, unit=replace(unit, indices=indices))
        rows += baseline_rows(some, source, evaluation, directory)
    return rows
