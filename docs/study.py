"""Draws the picture of a study in docs/studies: `python docs/study.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import DOCS, studied

ROW = "ablation_steps_epochs_ipc"

BASE = {"images_per_class": 10, "inner_steps": 10, "inner_epochs": 3}
"""The point that all three curves go through."""

NAMES = {"distilled": "distilled", "kmeans": "k-means centres", "random_real": "random real images"}
KINDS = {"random": "unknown networks", "fixed": "a known network"}


def curves(found: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The points of each curve: images per class, one of each in a step; inner steps; epochs."""
    base = (found[[*BASE]] == pd.Series(BASE)).all(axis=1)
    others = {
        "images_per_class": found["images_per_class"] != BASE["images_per_class"],
        "inner_steps": found["inner_steps"] < found["images_per_class"],
        "inner_epochs": (found["inner_steps"] == 10) & (found["images_per_class"] == 10),
    }
    return {axis: found[base | chosen] for axis, chosen in others.items()}


def draw(found: pd.DataFrame, out: Path) -> None:
    """Write a PNG: a row for each kind of network, a column for each curve; test accuracy in percent, mean of
    the seeds, bars for the deviation over networks, and dots for the least and the largest seed."""
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    rows = figure.subplots(len(KINDS), 3, sharey=True)
    titles = {
        "images_per_class": "images per class",
        "inner_steps": "inner steps S, 10 images per class, 3 epochs",
        "inner_epochs": "epochs E, 10 images per class, 10 steps",
    }
    for (init, kind), places in zip(KINDS.items(), rows, strict=True):
        for (axis, points), place in zip(curves(found).items(), places, strict=True):
            _curve(place, points[points["init"] == init], axis)
            place.set_xlabel(titles[axis], fontsize=9)
        places[0].set_ylabel(f"{kind}\ntest accuracy, %", fontsize=9)
    rows[0][0].legend(loc="lower right", fontsize=8, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})


def _curve(place: Axes, points: pd.DataFrame, axis: str) -> None:
    ticks: Sequence[int] = sorted(points[axis].unique())
    for number, (source, name) in enumerate(NAMES.items()):
        own = points[points["source"] == source].sort_values(axis)
        x, color = own[axis].to_numpy(), f"C{number}"
        mean, std, least, most = (100 * own[name].to_numpy() for name in ("mean", "std", "least", "most"))
        place.errorbar(x, mean, std, fmt="o-", capsize=2, ms=4, lw=1, label=name, color=color)
        for seeds in (least, most):
            place.plot(x, seeds, ".", ms=3, color=color)
    place.set_xscale("log")
    place.set_xticks(ticks, [str(tick) for tick in ticks])
    place.minorticks_off()
    place.set_ylim(0, 100)
    place.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    draw(studied(ROW), DOCS / "pictures" / f"{ROW}.png")
