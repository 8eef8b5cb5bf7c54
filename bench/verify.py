"""Check the kept distilled sets on networks that their runs have not used: `make verify-results`.

python bench/verify.py [ROW ...] [--networks N]
python bench/verify.py ROW --results results/ROW   # a run of one's own against the kept table

Each set in docs/reproduction is applied with `ddsweep.apply`, network by network, and not by the engine of
evaluations. The mean is compared with that of the kept table: the difference of two means must lie within its
99.9 % interval (Welch). The one network of a `fixed` set is trained again, and lies within half a point. A
set that was distilled anew may differ by two points more: rounding is amplified along a distillation.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn

from ddsweep import DistilledSet, apply, load_results
from ddsweep.catalog import POOL_FRACTION, TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.core.networks import build_network
from ddsweep.data.files import data_root, resolve_dataset
from ddsweep.data.load import Splits, load_splits
from ddsweep.errors import DataError, UserError
from ddsweep.pools.file import load_pool
from ddsweep.pools.train import PoolGroup, train_group
from ddsweep.results.artifacts import load_tensors
from ddsweep.results.layout import PoolDirectory

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "reproduction"

CONFIDENCE = 0.999
FIXED_TOLERANCE = 0.005
ANEW_TOLERANCE = 0.02
"""More, for a set distilled anew: by another version, or on another kind of machine, it is another set."""
NETWORKS, ON_CIFAR = 64, 8
"""Fresh networks for each set: fewer where one takes half a minute."""

OF_POOLS, OF_POOLS_ON_CIFAR = 16, 4
"""Networks that are trained for a row with a pool: a LeNet takes seconds, an AlexCifarNet four minutes."""


def verify(folder: Path, networks: int | None, root: Path | None) -> Iterator[tuple[bool | None, str]]:
    """(whether it holds, what was found) of each set in ``folder``; None: its data are not here. Each is
    applied to so many ``networks``, by default to as many as take a few minutes."""
    trials = pd.read_parquet(folder / "trials.parquet").set_index("trial_id")
    evals = pd.read_parquet(folder / "evals.parquet")
    for path in sorted(folder.glob("*.safetensors")):
        distilled = DistilledSet.load(path)
        spec = distilled.spec
        name = f"{folder.name} {spec.trial_id}"
        if distilled.sha256 != trials["distilled_sha256"].get(spec.trial_id):
            yield False, f"{name}: FAIL: it is not the set of the kept table"
            continue
        rows = _after(evals, spec)
        count = networks or usual(spec)
        try:
            splits = load_splits(
                spec.dataset,
                root,
                validation_fraction=spec.validation_fraction,
                split_seed=spec.split_seed,
                whitening=spec.whitening,
            )
            found = [
                scored(apply(distilled, network, index=index), splits, spec)
                for index, network in _fresh(
                    distilled, folder, int(rows["model_seed"].max()) + 1, count, root
                )
            ]
        except DataError as error:
            yield None, f"{name}: data missing: {error}"
            continue
        yield compared(name, found, rows[score(spec)].tolist())


def usual(spec: TrialSpec) -> int:
    """The number of fresh networks if none is given."""
    many, few = (NETWORKS, ON_CIFAR) if spec.pool is None else (OF_POOLS, OF_POOLS_ON_CIFAR)
    return few if spec.network_spec.kind == "alexcifarnet" else many


def rerun(folder: Path, results: Path) -> Iterator[tuple[bool | None, str]]:
    """As `verify`, of the trials in ``results`` that were also kept in ``folder``."""
    evals, own = pd.read_parquet(folder / "evals.parquet"), load_results(results).evals
    for path in sorted(folder.glob("*.safetensors")):
        spec = DistilledSet.load(path).spec
        name, found = f"{folder.name} {spec.trial_id}", _after(own, spec)
        if found.empty:
            there = ", ".join(sorted(own["trial_id"].unique())) or "no trial"
            yield False, f"{name}: FAIL: {results} has no evaluation of it, but of {there}"
        else:
            column = score(spec)
            kept = _after(evals, spec)[column].tolist()
            yield compared(name, found[column].tolist(), kept, ANEW_TOLERANCE)


def _after(evals: pd.DataFrame, spec: TrialSpec) -> pd.DataFrame:
    """The rows of a set as distilled, after its last step."""
    rows = evals[(evals["trial_id"] == spec.trial_id) & (evals["source"] == "distilled")]
    return rows[(rows["protocol"] == "as_distilled") & (rows["inner_step"] == spec.steps)]


def compared(name: str, found: Sequence[float], kept: Sequence[float], more: float = 0.0) -> tuple[bool, str]:
    """Whether the means of ``found`` and ``kept`` agree, and in which words. They may be ``more`` further
    apart than chance allows."""
    (ours, our_std), (theirs, their_std) = (
        (pd.Series(side).mean(), pd.Series(side).std()) for side in (found, kept)
    )
    if len(kept) == 1:
        most = FIXED_TOLERANCE
    elif len(found) == 1:
        raise UserError(f"{name}: one network says nothing of a mean over {len(kept)}: give at least 2")
    else:
        a, b = our_std**2 / len(found), their_std**2 / len(kept)
        freedom = (a + b) ** 2 / (a**2 / (len(found) - 1) + b**2 / (len(kept) - 1)) if a + b else 1.0
        most = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(a + b)
    most += more
    holds = bool(abs(ours - theirs) <= most)
    here = f"{_percent(ours, our_std)} on {counted(len(found), 'network')}"
    return holds, (
        f"{name}: {'pass' if holds else 'FAIL'}: {here}, kept {_percent(theirs, their_std)} on {len(kept)}; "
        f"difference {100 * (ours - theirs):+.2f}, allowed {100 * most:.2f} points"
    )


def _percent(mean: float, std: float) -> str:
    return f"{100 * mean:.2f}" + ("" if math.isnan(std) else f" ± {100 * std:.2f}") + " %"


def _fresh(
    distilled: DistilledSet, folder: Path, first: int, count: int, root: Path | None
) -> Iterator[tuple[int, nn.Module]]:
    """Networks at their start, by number from ``first`` on: those of a law, the one of a `fixed` set, or
    further held-out networks of the pool in ``folder``, trained here."""
    spec = distilled.spec
    if spec.pool is not None:
        yield from _of_pool(distilled, folder / "pool.yaml", first, count, root)
    elif spec.init == "fixed":
        yield spec.seed, distilled.network(spec.seed)
    else:
        yield from ((index, distilled.network(index)) for index in range(first, first + count))


def _of_pool(
    distilled: DistilledSet, file: Path, first: int, count: int, root: Path | None
) -> Iterator[tuple[int, nn.Module]]:
    spec, pool = distilled.spec, distilled.spec.pool
    assert pool is not None
    recipe = load_pool(file).recipe(lambda value: resolve_dataset(value, root))
    if recipe.recipe != pool.recipe:
        raise UserError(f"{file}: makes other networks than those of the kept set")
    splits = load_splits(recipe.dataset, root, validation_fraction=POOL_FRACTION, split_seed=0)
    size = recipe.group_size
    first += -first % size
    with TemporaryDirectory() as folder:
        directory = PoolDirectory(Path(folder))
        for start in range(first, first + count, size):
            wanted = range(start, min(start + size, first + count))
            group = PoolGroup("heldout", tuple(wanted), size)
            train_group(pool.name, recipe, group, splits, directory, torch.device("cpu"), 1)
            for index in group.indices:
                module = build_network(spec.network_spec, spec.dataset.shape, spec.dataset.classes)
                module = module.to_empty(device="cpu")
                module.load_state_dict(load_tensors(directory.network("heldout", index))[0])
                yield index, module


def score(spec: TrialSpec) -> str:
    """The column of `evals` that a trial is about."""
    return "attack_success" if spec.objective == "attack" else "accuracy"


@torch.no_grad()
def scored(network: nn.Module, splits: Splits, spec: TrialSpec) -> float:
    """The fraction of all test images that ``network`` calls right; of an attack, of those of the attacked
    class that it calls as the attack wants."""
    asked = right = 0
    for start in range(0, len(splits.test), 1000):
        batch = splits.test.take(slice(start, start + 1000))
        logits: Tensor = network.eval()(batch.normalised(torch.float32))
        answers = torch.where(logits.isfinite().all(1), logits.argmax(1), -1)  # diverged: no answer is right
        wanted = batch.labels
        if spec.attack_class is not None and spec.target_class is not None:
            answers = answers[batch.labels == spec.attack_class]
            wanted = torch.full_like(answers, spec.target_class)
        right += int((answers == wanted).sum())
        asked += len(answers)
    return right / asked


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="folders of kept results; left out, all")
    parser.add_argument("--kept", type=Path, default=KEPT, help="where they are (docs/reproduction)")
    parser.add_argument(
        "--networks",
        type=int,
        help=f"fresh networks for each set (by default {NETWORKS}, {ON_CIFAR} of AlexCifarNet; of a pool, "
        f"whose networks are trained for it, {OF_POOLS} and {OF_POOLS_ON_CIFAR})",
    )
    parser.add_argument("--results", type=Path, help="compare these results of a row, and compute nothing")
    parser.add_argument("--data-root", type=Path)
    options = parser.parse_args(given)
    kept, code = options.kept, 0
    rows = sorted(path.parent.name for path in kept.glob("*/sweep.yaml"))
    try:
        root = data_root(options.data_root)
        for row in options.rows or rows:
            if row not in rows:
                raise UserError(f"unknown row {row!r}; the rows are {', '.join(rows)}")
            found = (
                verify(kept / row, options.networks, root)
                if options.results is None
                else rerun(kept / row, options.results)
            )
            for holds, text in found:
                print(text, flush=True)
                code = 1 if holds is False else code
    except UserError as error:
        print(f"verify: {error}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
