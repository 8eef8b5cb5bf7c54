"""Writes the tables of docs/ that say what the code declares: `make docs`.

They stand between `<!-- table: KIND NAME -->` and `<!-- end -->`; the text around them is written by hand.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from ddsweep import DistilledSet
from ddsweep.catalog import GROUPS, TrialSpec
from ddsweep.catalog.evaluation import epoch_grid
from ddsweep.launch.site import Site
from ddsweep.report.declarations import TRIAL, Key, declared, keys_of_group, texts_below
from ddsweep.report.formats import NONE, percent
from ddsweep.results.schemas import PARTS
from ddsweep.results.statistics import paired_difference
from ddsweep.spec import load_sweep
from ddsweep.start_set import set_digest

DOCS = Path(__file__).parent
_TABLE = re.compile(r"(<!-- table: (\w+) (\w+) -->\n).*?(<!-- end -->)", flags=re.S)


def up_to_date(page: str) -> str:
    """The text of a page with its tables as they should be."""
    return _TABLE.sub(lambda found: f"{found[1]}{_MADE[found[2]](found[3])}{found[4]}", page)


def settings(section: str) -> str:
    if section != TRIAL:
        return _keys(declared({"site": Site})[section])
    parts = [f"\n**{(group.__doc__ or '').strip()}**\n\n{_keys(keys_of_group(group))}" for group in GROUPS]
    return "".join(parts) + "\n"


def _keys(keys: Iterable[Key]) -> str:
    return _table(
        ("setting", "default", "meaning"), ((f"`{key.name}`", key.default, key.meaning) for key in keys)
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first, *rest = (f"| {' | '.join(cells)} |\n" for cells in (head, *rows))
    return "".join((first, f"|{'---|' * len(head)}\n", *rest))


def columns(table: str) -> str:
    """Columns with one meaning share a row; settings do, wherever they stand."""
    rows: dict[str, list[str]] = {}
    for part in PARTS[table]:
        found = [(part.split(), _SETTING)] if isinstance(part, str) else texts_below(part)
        for names, meaning in found:
            rows.setdefault(meaning, []).extend(f"`{name}`" for name in names)
    return _table(("column", "meaning"), ((" ".join(names), meaning) for meaning, names in rows.items()))


def modules(room: str) -> str:
    """The modules of a room, with the first sentence of what each says of itself."""
    root = DOCS.parent / "ddsweep"
    paths = root.glob("*.py") if room == "top" else (root / room).rglob("*.py")
    rows = []
    for path in sorted(paths):
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        first = re.split(r"(?<=[.]) (?=[A-Z`])", " ".join(said.split("\n\n")[0].split()))[0]
        rows.append(
            (f"[`{path.relative_to(root)}`](../ddsweep/{path.relative_to(root)})", first.replace("``", "`"))
        )
    return _table(("module", "job"), rows)


# ------------------------------------------------------------------------------- docs/reproduction


@dataclass(frozen=True)
class Kept:
    """One set in docs/reproduction: its settings, its row of ``trials`` and its rows of ``evals``."""

    row: str
    spec: TrialSpec
    sha256: str
    trial: pd.Series
    evals: pd.DataFrame
    steps_tried: Sequence[int]
    """The numbers of steps among which the best one of a baseline was chosen."""

    @property
    def score(self) -> str:
        """The column that its objective is about."""
        return "attack_success" if self.spec.objective == "attack" else "accuracy"

    def of(self, source: str, protocol: str = "as_distilled", step: int | None = None) -> pd.DataFrame:
        """Rows of ``source`` after so many inner steps; without ``step`` after T, or the last of another
        protocol."""
        rows = self.evals[(self.evals["source"] == source) & (self.evals["protocol"] == protocol)]
        last = self.spec.steps if protocol == "as_distilled" else rows["inner_step"].max()
        return rows[rows["inner_step"] == (last if step is None else step)]

    def said(self, source: str = "distilled", protocol: str = "as_distilled", step: int | None = None) -> str:
        """Mean and deviation over networks, percent."""
        return _spread(self.of(source, protocol, step)[self.score])

    def gain(self, source: str, protocol: str = "as_distilled") -> str:
        """How far the set is ahead of ``source`` on the same networks, percent points, with the 95 % interval
        of the mean."""
        ours, others = (
            rows.assign(accuracy=rows[self.score]).to_dict("records")
            for rows in (self.of("distilled"), self.of(source, protocol))
        )
        gain = paired_difference(ours, others)
        assert gain is not None, f"{self.row}: no {source} on the networks of the set"
        return percent(gain.mean, gain.ci95)


def kept(row: str | None = None) -> list[Kept]:
    """The kept sets, of one row or of all."""
    found = []
    for folder in sorted(path.parent for path in DOCS.glob(f"reproduction/{row or '*'}/sweep.yaml")):
        trials, evals = (pd.read_parquet(folder / f"{name}.parquet") for name in ("trials", "evals"))
        searched = yaml.safe_load((folder / "sweep.yaml").read_text())["evaluate"]["epochs"]
        for path in sorted(folder.glob("*.safetensors")):
            made = DistilledSet.load(path)
            spec = made.spec
            (trial,) = (own for _, own in trials.iterrows() if own["trial_id"] == spec.trial_id)
            of_trial = evals[evals["trial_id"] == spec.trial_id]
            epochs = epoch_grid(spec.inner_steps, spec.inner_epochs, searched)
            tried = [spec.inner_steps * many for many in epochs]
            found.append(Kept(folder.name, spec, made.sha256, trial, of_trial, tried))
    return found


def _spread(values: pd.Series) -> str:
    if values.empty:
        return NONE
    return percent(values.mean(), values.std() if len(values) > 1 else None)


HEADLINES = (
    ("MNIST, one known network, 10 images", "mnist_fixed_longer", "mnist_fixed_labels"),
    ("MNIST, unknown networks, 100 images", "mnist_random", "mnist_further_longer"),
    ("CIFAR-10, one known network, 100 images", "cifar10_fixed_short", None),
    ("CIFAR-10, unknown networks, 100 images", "cifar10_random_longer", None),
    ("USPS -> MNIST, 100 images", "adapt_usps_mnist", "adapt_usps_mnist_labels"),
    ("MNIST -> USPS, 100 images", "adapt_mnist_usps", None),
    ("SVHN -> MNIST, 100 images", "adapt_svhn_mnist", None),
    ("attack, 0 called 1, 100 images", "attack_mnist", "attack_mnist_labels"),
    ("attack, planes called cars, 100 images", "attack_cifar10_short", "attack_cifar10_labels"),
    ("ImageNet -> PASCAL VOC, an image a class", "alexnet_voc2007", None),
    ("ImageNet -> CUB-200, an image a class", "alexnet_cub200", None),
)
"""The settings of 2018, the sweep of each with their inner loop, and one with better settings."""


def headlines(what: str) -> str:
    """What 2018 has beside what is kept: a line for each of their settings."""
    there = {one.row: one for one in kept()}
    rows = []
    for setting, row, further in HEADLINES:
        own, more = there.get(row), there.get(further or "")
        rows.append(
            (
                setting,
                _published(row),
                "[not run](#not-run)" if own is None else _headline(own),
                "" if more is None else f"{_headline(more)}: {_beyond(more.spec)}",
                NONE if own is None else _best_baseline(own),
                NONE if own is None else _best_of_all(own),
            )
        )
    head = ("", "2018", "their inner loop", "better settings", "best baseline, as many steps as theirs")
    return _table((*head, "best baseline of all"), rows)


def sweep_file(row: str) -> Path:
    """The sweep file of a row: in ``sweeps/``, or, if it goes on from a kept set, in ``sweeps/longer/``."""
    (found,) = DOCS.parent.glob(f"sweeps/**/{row}.yaml")
    return found


def _published(row: str) -> str:
    (published,) = load_sweep(sweep_file(row)).published
    score = published.attack_success if published.accuracy is None else published.accuracy
    return percent(score, published.std)


def _headline(own: Kept) -> str:
    before = "" if own.spec.pool is None else f"{own.said(step=0)} -> "
    return f"{before}**{own.said()}** (n = {own.trial['test_models']})"


def _beyond(spec: TrialSpec) -> str:
    """What a trial has that 2018 had not."""
    adam = "" if spec.inner_optimizer == "gd" else f" of {spec.inner_optimizer.capitalize()}"
    return f"T = {spec.steps}{adam}" + (", learned labels" if spec.labels != "hard" else "")


def _best_baseline(own: Kept) -> str:
    found = {source: own.of(source)[own.score].mean() for source in _BASELINES if not own.of(source).empty}
    if not found:
        return NONE
    best = max(found, key=lambda source: found[source])
    return f"{_BASELINES[best]} {own.said(best)}"


def _best_of_all(own: Kept) -> str:
    """Of baselines at their best number of steps, where several were tried, and of nearest neighbours."""
    found = {}
    for source, name in _BASELINES.items():
        tuned = own.of(source, TUNED)
        if len(own.steps_tried) > 1 and not tuned.empty:
            words = f"{name} {own.said(source, TUNED)} ({tuned['inner_step'].iloc[0]} steps)"
            found[words] = tuned[own.score].mean()
    for source, name in _NEIGHBOURS.items():
        near = own.of(source, "nearest_neighbour")
        if own.score == "accuracy" and not near.empty:
            words = f"nearest neighbour on {name} {own.said(source, 'nearest_neighbour')}"
            found[words] = near["accuracy"].mean()
    return max(found, key=lambda words: found[words], default=NONE)


def kept_numbers(what: str) -> str:
    """The first table of reproduction.md: a line for each kept set."""
    head = ("kept set", "question", "2018", "ddsweep", "n", "random real, T steps", "class means", "k-means")
    rows, everything = [], kept()
    for own in everything:
        before = f"{own.said(step=0)} -> " if own.spec.pool is not None else ""
        rows.append(
            (
                f"[{own.row}](reproduction/{own.row}), trial {own.spec.trial_id}",
                _question(own.spec),
                _published(own.row),
                f"{before}**{own.said()}**",
                str(own.trial["test_models"]),
                *(own.said(source) for source in ("random_real", "class_mean", "kmeans")),
                _outer_steps(own, everything),
                f"{own.trial['cpu_seconds'] / 60:.0f}, {own.trial['device_name']}",
                f"{own.trial['ended_at']:%Y-%m-%d}",
            )
        )
    return _table((*head, "outer steps", "CPU min", "date"), rows)


def _outer_steps(own: Kept, everything: list[Kept]) -> str:
    steps = f"{own.spec.outer_steps:,}"
    for first in everything:
        if own.spec.start_set == set_digest(first.sha256):
            return f"{steps}, on from {first.row}"
    return steps


def _question(spec: TrialSpec) -> str:
    data, images = spec.dataset.name, spec.images_per_class * spec.dataset.classes
    whom = {"fixed": "one known network", "random": "unknown networks"}.get(spec.init)
    if spec.pool is not None:
        whom = f"networks trained on {spec.pool.source_dataset}"
    if spec.attack_class is not None and spec.target_class is not None:
        names = spec.dataset.class_names
        attacked, target = names[spec.attack_class], names[spec.target_class]
        whom = f"{whom}; the percentage of {attacked} called {target}"
    return f"{data}, {images} images, {_beyond(spec)}: {whom}"


def kept_steps(row: str) -> str:
    """Accuracy along the inner steps of a kept set."""
    (own,) = kept(row)
    rows = own.evals[(own.evals["source"] == "distilled") & (own.evals["protocol"] == "as_distilled")]
    steps = sorted(rows["inner_step"].unique())
    head = [str(step) + (" = T" if step == own.spec.steps else "") for step in steps]
    cells = [own.said(step=step) for step in steps]
    n = "one network" if own.spec.init == "fixed" else f"n = {own.trial['test_models']}"
    return _table(("inner step", *head), [(f"test accuracy, %, {n}", *cells[:-1], f"**{cells[-1]}**")])


def kept_baselines(row: str) -> str:
    """Baselines on the networks of a kept set, at their best number of steps too if several were tried."""
    (own,) = kept(row)
    rows, most = [], max(own.steps_tried)
    for source, name in _BASELINES.items():
        if not (tuned := own.of(source, TUNED)).empty or not own.of(source).empty:
            steps = "" if tuned.empty else f" ({tuned['inner_step'].iloc[0]} steps)"
            rows.append((name, own.said(source), own.said(source, TUNED) + steps))
    near = [own.said(source, "nearest_neighbour") for source in _NEIGHBOURS]
    if set(near) != {NONE}:
        rows.append((f"nearest neighbour: {' / '.join(_NEIGHBOURS.values())}", " / ".join(near), ""))
    head = ["baseline, same networks, as many images", f"{own.spec.steps} steps, best rate"]
    if len(own.steps_tried) == 1:
        return _table(head, [cells[: len(head)] for cells in rows])
    return _table([*head, f"best rate and number of steps, of at most {most}"], rows)


def kept_attack(row: str) -> str:
    """What a kept attack and its baselines do, before and after."""
    (own,) = kept(row)
    steps, names = own.spec.steps, own.spec.dataset.class_names
    assert own.spec.attack_class is not None and own.spec.target_class is not None
    attacked, target = names[own.spec.attack_class], names[own.spec.target_class]
    rows = [("before", own.of("distilled", step=0)), (f"**distilled**, T = {steps}", own.of("distilled"))]
    for source, name in _BASELINES.items():
        rows.append((f"{name}, labels of the attack, best rate", own.of(source)))
        tuned = own.of(source, TUNED)
        many = steps if tuned.empty else tuned["inner_step"].iloc[0]
        if many != steps:
            rows.append((f"{name}, labels of the attack, {many} steps, best rate", tuned))
    columns = ("attack_success", "accuracy_other", "accuracy")
    cells = [(name, *(_spread(found[c]) for c in columns)) for name, found in rows if not found.empty]
    head = (f"{attacked} called {target}, %", "accuracy on the other classes, %", "accuracy on all, %")
    return _table((f"images, n = {own.trial['test_models']}", *head), cells)


# ------------------------------------------------------------------------------------ docs/studies

STUDIED = ["init", "images_per_class", "inner_steps", "inner_epochs"]


def studied(row: str) -> pd.DataFrame:
    """The trials of docs/studies/``row`` after their last steps: a row for each setting, source. Settings of
    which a seed is missing are left out.

    ``mean`` of the seeds' means over networks; ``least`` and ``most`` of these; ``std`` over the networks of
    a seed (the root of the seeds' mean variance), for known networks over the seeds.
    """
    folder = DOCS / "studies" / row
    trials, evals = (pd.read_parquet(folder / f"{name}.parquet") for name in ("trials", "evals"))
    evals = evals.loc[evals["protocol"] == "as_distilled", ["trial_id", "source", "inner_step", "accuracy"]]
    evals = evals.merge(trials[["trial_id", "seed", *STUDIED]], on="trial_id")
    evals = evals[evals["inner_step"] == evals["inner_steps"] * evals["inner_epochs"]]
    key = [*STUDIED, "source"]
    seeds = evals.groupby([*key, "seed"])["accuracy"].agg(["mean", "var", "count"]).reset_index()
    found = seeds.groupby(key).agg(
        mean=("mean", "mean"),
        least=("mean", "min"),
        most=("mean", "max"),
        over_seeds=("mean", "std"),
        within=("var", "mean"),
        networks=("count", "min"),
        seeds=("seed", "nunique"),
    )
    found["std"] = (found["within"] ** 0.5).where(found["networks"] > 1, found["over_seeds"])
    return found[found["seeds"] == found["seeds"].max()].reset_index()


def study(row: str) -> str:
    """What the trials of a study come to, a line for each point."""
    found = studied(row)
    head = ["images a class", "S", "E", "T"]
    for init in ("known network", "unknown networks"):
        head += [f"{init}: distilled", "random real", "k-means"]
    rows = []
    for (images, steps, epochs), own in found.groupby(STUDIED[1:]):
        cells = [str(images), str(steps), str(epochs), str(steps * epochs)]
        for init in ("fixed", "random"):
            for source in ("distilled", "random_real", "kmeans"):
                line = own[(own["init"] == init) & (own["source"] == source)]
                bold = "**" if source == "distilled" and len(line) else ""
                cells.append(f"{bold}{percent(*line[['mean', 'std']].iloc[0]) if len(line) else NONE}{bold}")
        rows.append(cells)
    return _table(head, rows)


_BASELINES = {
    "random_real": "random real",
    "optimized_random": "optimised random real",
    "class_mean": "class means",
    "kmeans": "k-means",
}
_NEIGHBOURS = {"knn_random": "random real", "knn_kmeans": "k-means"}
TUNED = "as_distilled_tuned"
"""The protocol of baselines at their best number of steps."""

_SETTING = "the [settings](settings.md); null where the method of the trial lacks one"
_MADE = {
    **{"settings": settings, "columns": columns, "modules": modules},
    **{"kept": kept_numbers, "kept_steps": kept_steps, "kept_baselines": kept_baselines},
    **{"kept_attack": kept_attack, "study": study, "headlines": headlines},
}


if __name__ == "__main__":
    for path in DOCS.glob("*.md"):
        before = path.read_text()
        if (after := up_to_date(before)) != before:
            path.write_text(after)
            print(f"{path.name}: tables written again")
