"""Which evaluation rows a trial has, and which are still missing.

Every evals part says in its metadata (`HOLDS`) what its rows are: which networks at which inner steps, which
baselines and how they were computed, and the distilled set that was judged. Rows beyond what is asked count
as done and stay. Parts of version 0.1 have one digest of the whole question instead. Their question is worked
out from their rows, and believed if its digest is theirs.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ddsweep.catalog import NEIGHBOUR_BASELINES, PROTOCOLS, EvaluationSpec, EvalUnit, TrialSpec
from ddsweep.errors import ResultsError
from ddsweep.results.keys import digest
from ddsweep.results.known import KnownParts, stamp_of
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import GoneError, read_whole, torn_error

__all__ = [
    "HOLDS",
    "Baseline",
    "Held",
    "TrialParts",
    "content_of",
    "described",
    "each_once",
    "holds_text",
    "is_evaluated",
    "missing",
    "needs_baseline",
    "networks_judged",
    "newest_last",
    "old_key",
    "recorded_set",
    "sorted_out",
]

HOLDS = "holds"
"""The key in the metadata of an evals part that says what its rows are."""

_COLUMNS = ("source", "protocol", "model_seed", "inner_step", "group")
_LARGEST_GROUP = 64
"""The largest group of networks that is looked for in a first part of version 0.1."""

_UNKNOWN: dict[str, Any] = {}
"""Stands for the changes of a protocol that no file records; a real protocol changes at least one setting."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Baseline:
    """Rows of one baseline in one part: how they were computed (None: unknown), and for which networks.
    Nearest neighbour on k-means centres has None as its network."""

    settings: Mapping[str, Any] | None
    networks: frozenset[int | None]


@dataclass(frozen=True)
class Held:
    """One evals part: a group of networks under one protocol, computed ``size`` at a time.

    ``steps[i]`` are the inner steps after which the distilled set was tested on network i.
    """

    path: Path
    protocol: str
    group: int
    size: int
    changes: Mapping[str, Any] | None
    steps: Mapping[int, frozenset[int]]
    baselines: Mapping[str, Baseline]

    def lacks_steps(self, index: int, steps: Iterable[int]) -> bool:
        """Whether a test of the distilled set on network ``index`` is missing for one of ``steps``."""
        return not frozenset(steps) <= self.steps.get(index, frozenset())

    def lacks_baseline(self, index: int, source: str, settings: Mapping[str, Any]) -> bool:
        """Whether network ``index`` lacks rows of this baseline with these ``settings``."""
        found = self.baselines.get(source)
        if found is None or found.settings != settings:
            return True
        return (None if source == "knn_kmeans" else index) not in found.networks


@dataclass(frozen=True)
class TrialParts:
    """The evals parts of one trial: those of its distilled set, those that cannot be read, and those of an
    earlier set."""

    held: tuple[Held, ...]
    torn: tuple[Path, ...] = ()
    foreign: tuple[Path, ...] = ()


# ------------------------------------------------------------------------------------ what a part says


def content_of(rows: Rows) -> dict[str, Any]:
    """What ``rows`` of one part tell by themselves: protocol, group, inner steps of the distilled set, and
    networks of each baseline. Empty for no rows."""
    ours = [row for row in rows if row["source"] == "distilled" and not row["protocol"].endswith("_tuned")]
    if not ours:
        return {}
    at: dict[int, set[int]] = defaultdict(set)
    for row in ours:
        at[row["model_seed"]].add(row["inner_step"])
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, steps in at.items():
        alike[tuple(sorted(steps))].append(index)
    baselines: dict[str, set[int | None]] = defaultdict(set)
    for row in rows:
        if row["source"] != "distilled":
            baselines[row["source"]].add(row["model_seed"])
    return {
        "protocol": ours[0]["protocol"],
        "group": ours[0]["group"],
        "steps": [[list(steps), sorted(indices)] for steps, indices in sorted(alike.items())],
        "baselines": {
            source: {"networks": sorted(found, key=lambda i: -1 if i is None else i)}
            for source, found in sorted(baselines.items())
        },
    }


def newest_last(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=_modified)


def _modified(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except FileNotFoundError:
        return 0, path.name


def each_once(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The evals ``rows`` of one trial, each measurement once: of two of the same thing the later one."""
    kept: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        # A distilled set is tested after several steps; a baseline once, so a newer row replaces it.
        step = row["inner_step"] if row["source"] == "distilled" else None
        kept[*(row[name] for name in ("source", "protocol", "model_seed", "split")), step] = row
    return list(kept.values())


def holds_text(
    rows: Rows,
    *,
    size: int,
    distilled: str,
    changes: Mapping[str, Any] | None,
    settings: Mapping[str, Mapping[str, Any] | None],
) -> str:
    """What a new part says of its ``rows`` under `HOLDS`. ``settings`` has those of every baseline in
    ``rows``."""
    content = content_of(rows)
    for source, found in content["baselines"].items():
        found["settings"] = settings[source]
    return json.dumps({**content, "size": size, "distilled": distilled, "changes": changes}, sort_keys=True)


def described(path: Path, known: KnownParts, *, whole: bool = True) -> dict[str, Any]:
    """What the part says it holds; for version 0.1, what its rows say. Every byte is checked, unless
    ``known`` has the part or ``whole`` is false. Raises `ResultsError` for a torn part, and
    `UnreadableError`."""
    if whole:
        metadata = known.whole(path)
    else:
        metadata = known.footer(path)
    if HOLDS not in metadata:
        stamp = stamp_of(path)
        table, metadata = read_whole(path)
        content = content_of(table.select(_COLUMNS).to_pylist())
        metadata = {**metadata, HOLDS: json.dumps({**content, "key": metadata.get("unit")})}
        if stamp is not None:
            known.note(path, stamp, metadata)
    try:
        found: dict[str, Any] = json.loads(metadata[HOLDS])
    except ValueError as error:  # of a part without a seal
        raise torn_error([path], str(error)) from error
    return found


def recorded_set(directory: SweepDirectory, trial_id: str, known: KnownParts) -> str | None:
    """The hash of the distilled set that the trial's row in ``trials`` was made from; None without such a
    row, or if it has no hash."""
    path = directory.trials_part(trial_id)
    try:
        metadata = known.footer(path)
        if "distilled" in metadata:
            return metadata["distilled"]
        stamp = stamp_of(path)
        table, metadata = read_whole(path)
    except ResultsError:
        return None
    found = table["distilled_sha256"].to_pylist() if "distilled_sha256" in table.column_names else []
    if not found or found[0] is None:
        return None
    if stamp is not None:
        known.note(path, stamp, {**metadata, "distilled": found[0]})
    return str(found[0])


def networks_judged(
    directory: SweepDirectory, trial_id: str, known: KnownParts, *, fixed: bool
) -> int | None:
    """The number of held-out networks in the row of a trial; for a ``fixed`` set, of random ones. None
    without a row, and for a ``fixed`` row of version 0.1, which does not say it. Raises `ResultsError` if it
    is torn."""
    path = directory.trials_part(trial_id)
    if not path.exists():
        return None
    metadata = known.footer(path)
    if "networks" in metadata:
        counts: dict[str, int] = json.loads(metadata["networks"])
        return counts["on_random" if fixed else "as_distilled"]
    rows = [] if fixed else read_whole(path)[0].to_pylist()
    return rows[0].get("test_models") if rows else None


def sorted_out(
    paths: Iterable[Path],
    trial: TrialSpec,
    evaluation: EvaluationSpec,
    distilled: str | None,
    recorded: str | None,
    known: KnownParts,
    *,
    whole: bool = True,
) -> TrialParts:
    """The evals parts ``paths`` of ``trial``, whose distilled set has the hash ``distilled``.

    ``recorded`` is the hash in its row. A part of version 0.1 without a hash was there when the row was
    written, so it is of that set.
    """
    held, torn, foreign = [], [], []
    for path in paths:
        try:
            content = described(path, known, whole=whole)
        except GoneError:
            continue
        except ResultsError:
            torn.append(path)
            continue
        if not content.get("protocol"):
            continue  # no rows
        if "key" not in content:
            ours = content["distilled"] == distilled
            found = _held(path, content, content["size"], content["changes"], None) if ours else None
        else:
            found = _recognised(path, content, trial, evaluation, distilled)
            if found is None and distilled is not None and recorded == distilled:
                changes = None if content["protocol"] in PROTOCOLS else _UNKNOWN
                found = _held(path, content, _sizes(content, evaluation)[0], changes, None)
        if found is not None:
            held.append(found)
        elif "key" not in content or content["protocol"] in PROTOCOLS:
            foreign.append(path)
    return TrialParts(tuple(held), tuple(torn), tuple(foreign))


def _held(
    path: Path,
    content: Mapping[str, Any],
    size: int,
    changes: Mapping[str, Any] | None,
    settings: Mapping[str, Mapping[str, Any]] | None,
) -> Held:
    """``settings`` are those of the baselines; without them each part says its own, or they are unknown."""
    baselines = {
        source: Baseline(found.get("settings") if settings is None else settings[source], frozenset(networks))
        for source, found in content["baselines"].items()
        if (networks := found["networks"])
    }
    steps = {index: frozenset(steps) for steps, indices in content["steps"] for index in indices}
    return Held(path, content["protocol"], content["group"], size, changes, steps, baselines)


# ------------------------------------------------------------------------------- parts of version 0.1


def old_key(
    distilled: str,
    trial: TrialSpec,
    unit: EvalUnit,
    steps: Sequence[int],
    baselines: Iterable[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The digest that version 0.1 gave the part of ``unit``."""
    asked = [unit.protocol, unit.group, unit.size, unit.indices]
    if unit.changes is not None:  # no baselines under this one
        pool = [] if trial.pool is None else [trial.pool.heldout]
        return digest(distilled, steps, unit.changes.changes(), asked, *pool)
    return digest(distilled, steps, sorted(baselines), asked, *([settings] if settings else []))


def _recognised(
    path: Path,
    content: Mapping[str, Any],
    trial: TrialSpec,
    evaluation: EvaluationSpec,
    distilled: str | None,
) -> Held | None:
    """A part of version 0.1, if it is of the set ``distilled`` and its rows tell what was asked."""
    if distilled is None or len(content["steps"]) != 1:
        return None
    (steps, indices), key = content["steps"][0], content["key"]
    protocol = content["protocol"]
    changes = {unit.protocol: unit.changes for unit in evaluation.units(trial)}.get(protocol)
    if protocol not in PROTOCOLS and changes is None:
        return None
    there = tuple(content["baselines"])
    # Not every group has rows of these: one group has the row for all, or the groups of another protocol have
    # them.
    silent = [source for source in NEIGHBOUR_BASELINES if source not in there]
    more = [
        tuple(s for s, on in zip(silent, bits, strict=True) if on)
        for bits in product((0, 1), repeat=len(silent))
    ]
    for size in _sizes(content, evaluation):
        unit = EvalUnit(protocol, content["group"], size, tuple(indices), changes)
        if changes is not None:
            if old_key(distilled, trial, unit, steps) == key:
                return _held(path, content, size, changes.changes(), {})
            continue
        for extra in more:
            for asked in (evaluation, EvaluationSpec()):
                sources = (*there, *extra)
                settings = asked.baseline_settings(sources)
                if old_key(distilled, trial, unit, steps, sources, settings) == key:
                    return _held(path, content, size, None, {s: asked.baseline_settings([s]) for s in there})
    return None


def _sizes(content: Mapping[str, Any], evaluation: EvaluationSpec) -> list[int]:
    """How many networks may have been computed together, the likeliest first; at least one number."""
    indices, group = [index for _, some in content["steps"] for index in some], content["group"]
    first, last = min(indices), max(indices)
    likely = [evaluation.group_size, EvaluationSpec.group_size, len(indices)]
    likely += range(last // (group + 1) + 1, first // group + 1 if group else _LARGEST_GROUP + 1)
    fits = [size for size in likely if first // size == last // size == group]
    if group == 0 and first == last:  # the one network of a `fixed` set is a group by itself
        fits = [1, *fits]
    return list(dict.fromkeys(fits)) or [last + 1]


# ---------------------------------------------------------------------------------- what is missing


def missing(trial: TrialSpec, evaluation: EvaluationSpec, held: Sequence[Held]) -> list[EvalUnit]:
    """What ``evaluation`` asks about ``trial`` and is left to compute: by group, the networks that lack rows,
    or whose baselines have other settings.

    A network with rows is completed in its own group, even if another group size is asked for now.
    """
    todo: dict[tuple[str, int, int], set[int]] = defaultdict(set)
    changes = {unit.protocol: unit.changes for unit in evaluation.units(trial)}
    settings = {source: evaluation.baseline_settings([source]) for source in evaluation.baselines}
    homes = {name: _homes(held, name, of) for name, of in changes.items()}
    for unit in evaluation.units(trial):
        steps = evaluation.steps(trial, unit.changes)
        asked = [] if unit.changes else _asked_of(trial, evaluation, unit.protocol, held)
        for index in unit.indices:
            home = homes[unit.protocol].get(index)
            if home is None:
                todo[unit.protocol, unit.group, unit.size].add(index)
            elif home.lacks_steps(index, steps) or any(
                home.lacks_baseline(index, source, settings[source])
                for source in asked
                if needs_baseline(trial, unit.protocol, index, source)
            ):
                todo[home.protocol, home.group, home.size].add(index)
    for part in held:
        if part.protocol not in PROTOCOLS:
            continue
        for source, wanted in settings.items():
            found = part.baselines.get(source)
            if found is not None and found.settings != wanted:
                todo[part.protocol, part.group, part.size] |= set(part.steps)
    order = list(dict.fromkeys([*changes, *PROTOCOLS]))
    return [
        EvalUnit(protocol, group, size, tuple(sorted(indices)), changes.get(protocol))
        for (protocol, group, size), indices in sorted(
            todo.items(), key=lambda item: (order.index(item[0][0]), *item[0][1:])
        )
    ]


def _homes(held: Sequence[Held], protocol: str, changes: Any) -> dict[int, Held]:
    """By network, the part that has it under a protocol."""
    same = None if changes is None else changes.changes()
    mine = [part for part in held if part.protocol == protocol and part.changes == same]
    return {index: part for part in reversed(mine) for index in part.steps}


def _asked_of(trial: TrialSpec, evaluation: EvaluationSpec, protocol: str, held: Sequence[Held]) -> list[str]:
    """The baselines that the parts of ``protocol`` should have. Nearest neighbour needs no network. A trial
    with one known network has it beside the held-out networks, if it has any."""
    if not _is_known(trial, protocol):
        return list(evaluation.baselines)
    beside = [part.baselines for part in held if part.protocol == "on_random"]
    wanted = any(unit.protocol == "on_random" for unit in evaluation.units(trial))
    return [
        source
        for source in evaluation.baselines
        if source not in NEIGHBOUR_BASELINES or not (wanted or any(source in there for there in beside))
    ]


def _is_known(trial: TrialSpec, protocol: str) -> bool:
    return trial.init == "fixed" and protocol == "as_distilled"


def needs_baseline(trial: TrialSpec, protocol: str, index: int, source: str) -> bool:
    """Whether network ``index`` should have rows of a baseline. Nearest neighbour on k-means centres is one
    row for all networks; it stands beside the known network, or number 0."""
    return source != "knn_kmeans" or index == 0 or _is_known(trial, protocol)


def is_evaluated(
    directory: SweepDirectory,
    trial: TrialSpec,
    evaluation: EvaluationSpec,
    known: KnownParts,
    paths: Sequence[Path],
    *,
    believe_row: bool = True,
) -> bool:
    """Whether the trial has a row in ``trials``, and its evals parts ``paths`` have all that is asked. For
    readers: a row that says so is believed. With ``believe_row`` false the parts must be whole, and say so
    too.

    Raises `ResultsError` for a torn row.
    """
    part = directory.trials_part(trial.trial_id)
    if not part.exists():
        return False
    row = known.footer(part)
    if row.get("status") == "stopped":
        return False
    if believe_row and row.get("evaluation_id") == evaluation.evaluation_id(trial):
        return True
    distilled = recorded_set(directory, trial.trial_id, known)
    parts = sorted_out(paths, trial, evaluation, distilled, distilled, known, whole=not believe_row)
    return not missing(trial, evaluation, parts.held)
