"""The picture of README: the images of a kept set, and the accuracy of held-out networks along its steps.

python bench/picture.py docs/reproduction/mnist_random docs/pictures/mnist_random.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

from ddsweep import DistilledSet

BASELINES = {"random_real": "random real images", "class_mean": "class means", "kmeans": "k-means centres"}


def draw(folder: Path, out: Path) -> None:
    """Write a PNG of the first trial in ``folder``, which `bench/keep.py` wrote.

    Left: one row for each inner step, one column for each image of it. Right: test accuracy in percent, mean
    and standard deviation over the held-out networks, after inner steps; baselines after as many steps.
    """
    trial = pd.read_parquet(folder / "trials.parquet").iloc[0]
    evals = pd.read_parquet(folder / "evals.parquet")
    evals = evals[(evals["trial_id"] == trial["trial_id"]) & (evals["protocol"] == "as_distilled")]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))

    distilled = DistilledSet.load(folder / f"{trial['trial_id']}.safetensors")
    images = distilled.images.float()
    low, high = (images.flatten().quantile(torch.tensor(q)).item() for q in (0.005, 0.995))
    grid = torch.cat([torch.cat([*step[:, 0]], 1) for step in images], 0)
    left.imshow(grid.numpy(), cmap="gray", vmin=low, vmax=high)
    left.set_axis_off()
    left.set_title(f"{images.shape[0] * images.shape[1]} distilled images", fontsize=10)

    found = evals.groupby(["source", "inner_step"])["accuracy"].agg(["mean", "std"]).mul(100)
    curve = found.loc["distilled"]
    right.plot(curve.index, curve["mean"], "o-", color="C0", label="distilled images")
    right.fill_between(
        curve.index, curve["mean"] - curve["std"], curve["mean"] + curve["std"], color="C0", alpha=0.2, lw=0
    )
    last = curve.index[-1]
    for number, (source, name) in enumerate(BASELINES.items()):
        mean, std = found.loc[(source, last)]
        right.errorbar(last + number + 1, mean, std, fmt="s", color=f"C{number + 1}", capsize=3, label=name)
    right.set(xlabel="gradient steps", ylabel="test accuracy, %", ylim=(0, 100), xlim=(-1, last + 5))
    right.set_xticks(curve.index)
    networks = evals[evals["source"] == "distilled"]["model_seed"].nunique()
    right.set_title(f"{networks} networks that the set has never seen", fontsize=10)
    right.legend(loc="lower right", fontsize=8, frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    o = parser.parse_args()
    draw(o.folder, o.out)


if __name__ == "__main__":
    main()
