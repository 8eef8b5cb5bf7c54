"""The kept results in docs/reproduction describe themselves, are consistent, and name no host."""

from __future__ import annotations

import io
import json
import re
import runpy
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread

from ddsweep import DistilledSet
from ddsweep.catalog import DatasetSpec, PoolSpec
from ddsweep.data.files import resolve_dataset
from ddsweep.pools.file import load_pool
from ddsweep.report.formats import percent
from ddsweep.results.grid import grid_png
from ddsweep.spec import expand, load_sweep

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "reproduction"
ROWS = sorted(path.parent.name for path in KEPT.glob("*/sweep.yaml"))
STUDIES = ROOT / "docs" / "studies"
STUDIED = sorted(path.parent for path in STUDIES.glob("*/sweep.yaml"))


def test_there_are_rows() -> None:
    assert "mnist_random" in ROWS


def test_what_documents_say_of_kept_sets_is_what_their_tables_say() -> None:
    """Beside the tables that `make docs` computes: every number in a sentence, and those of sweep files."""
    kept = {own.row: own for own in runpy.run_path(str(ROOT / "docs/tables.py"))["kept"]()}
    mnist, usps, fixed = (kept[row] for row in ("mnist_random", "adapt_usps_mnist", "mnist_fixed_short"))
    whole, further, longer = (kept[row] for row in ("mnist_fixed", "mnist_further", "mnist_fixed_longer"))
    wider = kept["mnist_further_longer"]
    at_t = 100 * wider.of("distilled")["accuracy"]
    labels, adapted = kept["mnist_fixed_labels"], kept["adapt_usps_mnist_labels"]
    adapted_to = 100 * adapted.of("distilled")["accuracy"]
    learned = 100 * further.of("distilled")["accuracy"]
    cifar, unknown = kept["cifar10_fixed_short"], kept["cifar10_random_short"]
    on = kept["cifar10_random_longer"]
    ci95_on = 100 * on.trial["test_accuracy_ci95"]
    minutes = {row: f"{own.trial['cpu_seconds'] / 60:.0f} CPU minutes" for row, own in kept.items()}
    n = {row: own.trial["test_models"] for row, own in kept.items()}
    usps_after, attack = kept["adapt_mnist_usps"], kept["attack_mnist"]
    soft = kept["attack_mnist_labels"]
    softly, spared = (soft.of("distilled")[name] for name in ("attack_success", "accuracy_other"))
    planes, cars = kept["attack_cifar10_short"], kept["attack_cifar10_labels"]
    called, left = (100 * cars.of("distilled")[name] for name in ("attack_success", "accuracy_other"))
    kinder = planes.of("distilled")["accuracy_other"]
    called_hard = 100 * planes.of("distilled")["attack_success"]
    fooled = attack.of("distilled")["attack_success"]
    others = attack.of("distilled")["accuracy_other"]
    tuned = "as_distilled_tuned"
    ci95 = 100 * mnist.trial["test_accuracy_ci95"]
    said = {
        "README.md": [
            f"reach {mnist.said()} %, with as many random real images {mnist.said('random_real')} % "
            f"({n['mnist_random']} LeNets; `ddsweep run sweeps/mnist_random.yaml`, "
            f"{minutes['mnist_random']} of distilling)",
        ],
        "docs/reproduction.md": [
            f"the distilled images gain {unknown.gain('random_real')} points over random real ones (95 % "
            "interval, same networks). Validation",
            f"the 95 % interval of the mean is ± {ci95:.1f}: ",
            f"The 95 % interval of the mean is ± {ci95_on:.1f}: this is above the 36.8 of 2018",
            f"Validation (8 networks) is {100 * on.trial['val_score']:.1f} %, where the first set has "
            f"{100 * unknown.trial['val_score']:.1f}. The distilled images gain "
            f"{on.gain('random_real')} points",
            f"**The aim of 40 is missed by {40 - 100 * on.trial['test_accuracy_mean']:.1f} points**",
            f"three fifths of the outer rate, {minutes['cifar10_random_longer']} on an Intel Xeon",
            f"The median at T is {learned.median():.1f}; the worst of the 200 networks has "
            f"{learned.min():.1f}.",
            f"The median at T is {at_t.median():.1f}; the worst of the 200 networks has {at_t.min():.1f}. "
            f"Real images at the same 100 steps of Adam, at their best rate, have "
            f"{wider.gain('random_real')} points less",
            f"**The aim of 96 is missed by {96 - at_t.mean():.1f} points.** Validation (48 networks) rose "
            f"from 93.2 after 40 outer steps to {100 * wider.trial['val_score']:.1f}.",
            f"a quarter of its outer rate and {minutes['mnist_further_longer']} (2026-12-01)",
            f"**{whole.said()}** | {100 * whole.trial['val_score']:.1f} | ",
            f"learned, the kept set (2026-11-29) | 23a9af5d07 | 100,000 | 128 | {labels.said(step=0)} | "
            f"{labels.said(step=1)} | {labels.said(step=2)} | **{labels.said()}** | "
            f"{100 * labels.trial['val_score']:.1f} | {labels.trial['cpu_seconds'] / 60:.0f} min",
            f"have {10_000 * labels.trial['test_accuracy_mean']:,.0f} of 10,000 images right",
            f"and miss theirs by {97.5 - 100 * labels.trial['test_accuracy_mean']:.1f} points",
            f"The classes as labels miss 96 % by {96 - 100 * longer.trial['test_accuracy_mean']:.1f} points",
            f"| 833fe5f75a | 36,000 + 36,000 | 256 | {longer.said(step=0)} | {longer.said(step=1)} | "
            f"{longer.said(step=2)} | **{longer.said()}** | {100 * longer.trial['val_score']:.1f} | "
            f"{whole.trial['cpu_seconds'] / 60:.0f} + {longer.trial['cpu_seconds'] / 60:.0f} min |",
            f"gain {mnist.gain('random_real')} points over random real ones (95 % interval, same networks)",
            f"they are {mnist.gain('kmeans', tuned)} points ahead of k-means centres after 100",
            f"are {usps.gain('random_real')} points ahead of random real ones, and "
            f"{usps.gain('kmeans', tuned)} of k-means centres after 100",
            f"are {usps_after.gain('random_real')} points ahead of random real ones, and "
            f"{usps_after.gain('kmeans', tuned)} of k-means centres at their best number of steps",
            f"The aim of 94.5 is met by {adapted_to.mean() - 94.5:.1f} points",
            f"The median at T is {adapted_to.median():.1f}, the worst of the 200 networks has "
            f"{adapted_to.min():.1f}.",
            f"and {100 * adapted.trial['val_score']:.1f} from 1,950 on, whose state",
            f"shows {100 * usps_after.trial['val_score']:.1f} after 400 outer steps, "
            f"the test {usps_after.said()}",
            f"400 outer steps of 8 of the 200 training networks, judged on {n['adapt_mnist_usps']} held-out",
            f"4 of the 14 training networks, judged on {n['attack_cifar10_short']} held-out",
            f"they differ, from {called_hard.min():.0f} to {called_hard.max():.0f} %, and the 95 % interval "
            f"of the mean is ± {100 * planes.trial['test_attack_success_ci95']:.1f}. [Four more]",
            f"had 39.9 ± 9.2 %; all twelve together have {(8 * called_hard.mean() + 4 * 39.89) / 12:.1f}.",
            f"images) success is {100 * planes.trial['val_score']:.1f} (after 25, 50,",
            f"1,000 outer steps of 8 of the 200 training networks, judged on {n['attack_mnist']} held-out",
            f"The median is {100 * fooled.median():.1f} %, a quarter of the networks is below "
            f"{100 * fooled.quantile(0.25):.0f}.",
            f"(validation images) success is {100 * attack.trial['val_score']:.1f} (after",
            f"{100 * (attack.trial['val_score'] - fooled.mean()):.0f} points more than on networks that were",
            f"**The aim of 90 % is met by {100 * softly.mean() - 90:.1f} points.** The median is "
            f"{100 * softly.median():.1f} %, a quarter of the networks is below "
            f"{100 * softly.quantile(0.25):.0f}. On training networks (validation images) success is "
            f"{100 * soft.trial['val_score']:.1f} (after",
            f"{100 * (soft.trial['val_score'] - softly.mean()):.0f} points more than on networks that were "
            "never seen. Seven settings were tried",
            f"they differ: from {called.min():.0f} to {called.max():.0f} %, the 95 % interval of the mean "
            f"is ± {100 * cars.trial['test_attack_success_ci95']:.1f}. [Four more]",
            f"had 57.6 ± 18.1 %; all twelve together have {(8 * called.mean() + 4 * 57.62) / 12:.1f}. On "
            f"training networks (validation images) success is {100 * cars.trial['val_score']:.1f} (after "
            f"25, 50, 75, 100 and 125 outer steps 44.2, 58.4, 69.9, 72.4 and 73.1), "
            f"{100 * cars.trial['val_score'] - called.mean():.0f} points more than on networks that were",
        ],
        "sweeps/attack_cifar10_labels.yaml": [
            f"Measured: {cars.said()} % over {n['attack_cifar10_labels']} held-out networks, with "
            f"dataset=cifar10-exact; accuracy on the others {left.mean():.1f} ± {left.std():.1f} % "
            f"(docs/reproduction.md); with the classes as labels {planes.said()}.",
            f"Cost: {minutes['attack_cifar10_labels']}",
        ],
        "sweeps/attack_mnist_labels.yaml": [
            f"Measured: {soft.said()} % over {n['attack_mnist_labels']} held-out networks; accuracy on the "
            f"others {percent(spared.mean(), spared.std())} % (docs/reproduction.md); with the classes as "
            f"labels {attack.said()}.",
            f"Cost: {minutes['attack_mnist_labels']}",
        ],
        "sweeps/mnist_random.yaml": [f"Measured: {mnist.said()} and "],
        "sweeps/mnist_fixed_short.yaml": [
            f"Measured: {fixed.said(step=0)} -> {fixed.said()} % on the one known network",
            f"Cost: {minutes['mnist_fixed_short']}",
        ],
        "sweeps/mnist_fixed.yaml": [
            f"Measured: {whole.said(step=0)} -> {whole.said()} % on the one known network",
            f"Cost: {minutes['mnist_fixed']}",
        ],
        "sweeps/longer/mnist_fixed_longer.yaml": [
            f"Measured: {longer.said(step=0)} -> {longer.said()} % on the one known network",
            f"Cost: {minutes['mnist_fixed_longer']} of distilling after the "
            f"{whole.trial['cpu_seconds'] / 60:.0f} of mnist_fixed",
        ],
        "sweeps/mnist_fixed_labels.yaml": [
            f"Measured: {labels.said(step=0)} -> {labels.said()} % on the one known network",
            f"Cost: {minutes['mnist_fixed_labels']}",
        ],
        "sweeps/mnist_further.yaml": [
            f"Measured: {further.said()} % over {n['mnist_further']} held-out networks",
            f"Cost: {minutes['mnist_further']}",
        ],
        "sweeps/longer/mnist_further_longer.yaml": [
            f"Measured: {wider.said()} % over {n['mnist_further_longer']} held-out networks",
            f"Cost: {minutes['mnist_further_longer']} of distilling after the "
            f"{further.trial['cpu_seconds'] / 60:.0f} of mnist_further",
        ],
        "sweeps/cifar10_fixed_short.yaml": [
            f"Measured: {cifar.said(step=0)} -> {cifar.said()} % on the one known network",
            f"Cost: {minutes['cifar10_fixed_short']}",
        ],
        "sweeps/cifar10_random_short.yaml": [
            f"Measured: {unknown.said()} % over {n['cifar10_random_short']} held-out networks",
            f"Cost: {minutes['cifar10_random_short']}",
        ],
        "sweeps/longer/cifar10_random_longer.yaml": [
            f"Measured: {on.said()} % over {n['cifar10_random_longer']} held-out networks",
            f"Cost: {minutes['cifar10_random_longer']} of distilling after the "
            f"{unknown.trial['cpu_seconds'] / 60:.0f} of cifar10_random_short",
        ],
        "sweeps/adapt_mnist_usps.yaml": [
            f"Measured: {usps_after.said(step=0)} -> {usps_after.said()} % over {n['adapt_mnist_usps']} "
            f"held-out networks (random real images {usps_after.said('random_real')}",
            f"Cost: {minutes['adapt_mnist_usps']}",
        ],
        "sweeps/attack_cifar10_short.yaml": [
            f"Measured: {planes.said()} % over {n['attack_cifar10_short']} held-out networks, with "
            f"dataset=cifar10-exact; accuracy on the others {percent(kinder.mean(), kinder.std())} %",
            f"Cost: {minutes['attack_cifar10_short']}",
        ],
        "sweeps/attack_mnist.yaml": [
            f"Measured: {attack.said()} % over {n['attack_mnist']} held-out networks; accuracy on the others "
            f"{percent(others.mean(), others.std())} %",
            f"Cost: {minutes['attack_mnist']}",
        ],
        "sweeps/adapt_usps_mnist_labels.yaml": [
            f"Measured: {adapted.said(step=0)} -> {adapted.said()} % over "
            f"{n['adapt_usps_mnist_labels']} held-out networks (docs/reproduction.md); with the classes as "
            f"labels {usps.said()}.",
            f"Cost: {minutes['adapt_usps_mnist_labels']}",
        ],
        "sweeps/adapt_usps_mnist.yaml": [
            f"Measured: {usps.said(step=0)} -> {usps.said()} % over {n['adapt_usps_mnist']} held-out "
            f"networks (random real images {usps.said('random_real')}",
            f"Cost: {minutes['adapt_usps_mnist']}",
        ],
    }
    for page, sentences in said.items():
        text = " ".join((ROOT / page).read_text().replace("\n# ", "\n").split())
        for sentence in sentences:
            assert sentence.strip() in text, page


@pytest.mark.parametrize("row", ROWS)
def test_the_sweep_file_makes_the_kept_set(row: str) -> None:
    """So what is kept can be made again by `ddsweep run sweeps/ROW.yaml`, and its pool by its pool file. Data
    that are not those of the sweep file are named after it, as in `dataset=cifar10-exact`."""
    kept = [DistilledSet.load(path).spec.dataset for path in (KEPT / row).glob("*.safetensors")]
    own_data = {spec.name: spec for spec in kept if spec.fingerprint}

    def ids(path: Path) -> set[str]:
        plan = expand(load_sweep(path, [f"dataset={name}" for name in own_data]), dataset, pool)
        return {trial.trial_id for trial in plan.trials}

    def dataset(value: str) -> DatasetSpec:
        return own_data[value] if value in own_data else resolve_dataset(value, None)

    def pool(value: object) -> PoolSpec:
        shipped, own = ROOT / "sweeps" / "pools" / f"{value}.yaml", KEPT / row / "pool.yaml"
        assert load_pool(shipped, [f"dataset={name}" for name in own_data]) == load_pool(own)
        return load_pool(own).recipe(dataset).spec(str(value))

    sets = {path.stem for path in (KEPT / row).glob("*.safetensors")}
    (file,) = ROOT.glob(f"sweeps/**/{row}.yaml")
    assert ids(file) == ids(KEPT / row / "sweep.yaml") == sets


@pytest.mark.parametrize("row", ROWS)
def test_sets_and_tables_agree(row: str) -> None:
    folder = KEPT / row
    trials, evals = (pd.read_parquet(folder / f"{name}.parquet") for name in ("trials", "evals"))
    assert load_sweep(folder / "sweep.yaml").name == row
    assert {path.stem for path in folder.glob("*.safetensors")} == set(trials["trial_id"])
    for _, trial in trials.iterrows():
        distilled = DistilledSet.load(folder / f"{trial['trial_id']}.safetensors")
        assert distilled.sha256 == trial["distilled_sha256"]
        assert distilled.spec.trial_id == trial["trial_id"]
        kept = imread(folder / f"{trial['trial_id']}.png")
        shown = distilled.images, distilled.mean, distilled.std, distilled.classes
        drawn = grid_png(*shown, distilled.class_names)
        again = imread(io.BytesIO(drawn))
        assert kept.shape == again.shape and abs(kept - again).mean() < 0.01, "another layout"
        own = evals[(evals["trial_id"] == trial["trial_id"]) & (evals["source"] == "distilled")]
        after = own[(own["protocol"] == "as_distilled") & (own["inner_step"] == distilled.spec.steps)]
        assert len(after) == after["model_seed"].nunique() == trial["test_models"]
        assert after["accuracy"].mean() == pytest.approx(trial["test_accuracy_mean"], abs=1e-12)
        assert not trial["dataset_stand_in"]


@pytest.mark.parametrize("folder", STUDIED, ids=lambda folder: folder.name)
def test_a_study_has_trials_of_its_sweep_and_says_how_many(folder: Path) -> None:
    trials, evals = (pd.read_parquet(folder / f"{name}.parquet") for name in ("trials", "evals"))
    own = ROOT / "sweeps" / f"{folder.name}.yaml"
    ids = [
        {trial.trial_id for trial in expand(load_sweep(path), resolved, none).trials}
        for path in (own, folder / "sweep.yaml")
    ]
    assert ids[0] == ids[1] >= set(trials["trial_id"])
    page = " ".join((ROOT / "docs" / "reproduction.md").read_text().split())
    assert f"{len(trials)} of its {len(ids[0])} trials are done" in page or len(trials) == len(ids[0])
    assert (trials["status"] == "done").all() and not trials["dataset_stand_in"].any()
    after = evals[(evals["source"] == "distilled") & (evals["protocol"] == "as_distilled")]
    steps = (trials["inner_steps"] * trials["inner_epochs"]).set_axis(trials["trial_id"])
    after = after[after["inner_step"] == after["trial_id"].map(steps)]
    means = after.groupby("trial_id")["accuracy"].agg(["mean", "count"])
    for _, trial in trials.iterrows():
        assert means["count"][trial["trial_id"]] == trial["test_models"]
        assert means["mean"][trial["trial_id"]] == pytest.approx(trial["test_accuracy_mean"], abs=1e-12)


def resolved(value: str) -> DatasetSpec:
    return resolve_dataset(value, None)


def none(value: object) -> PoolSpec:
    raise AssertionError(value)


@pytest.mark.parametrize("folder", [*(KEPT / row for row in ROWS), *STUDIED], ids=lambda path: path.name)
def test_no_host_is_named(folder: Path) -> None:
    """Neither in columns, nor in metadata, headers or other files; and no folder of the machine either."""
    said = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            assert "host" not in table.schema.names or table["host"].null_count == len(table)
            metadata = {
                key: value for key, value in (table.schema.metadata or {}).items() if key != b"pandas"
            }
            assert b"host" not in metadata
            texts = [
                name for name in table.schema.names if str(table.schema.field(name).type).endswith("string")
            ]
            said.append(f"{metadata} {[table[name].unique().to_pylist() for name in texts]}")
        elif path.suffix == ".safetensors":
            length = int.from_bytes(path.read_bytes()[:8], "little")
            header = path.read_bytes()[8 : 8 + length].decode()
            assert '"host"' not in json.loads(header)["__metadata__"]["ddsweep"]
            said.append(header)
        else:
            said.append(path.read_bytes().decode(errors="replace"))
    assert len(said) >= (6 if folder.parent == KEPT else 4)
    for text in said:
        assert not re.search(
            r"/(home|root|tmp|work|mnt|scratch|Users)/|hostname|\b\d+\.\d+\.\d+\.\d+\b", text
        )
