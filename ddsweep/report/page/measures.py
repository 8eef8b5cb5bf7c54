"""Measures over the rows of networks: after the last step, at every step, over networks of a trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddsweep.report.page.gather import Gathered, Trial
from ddsweep.report.page.section import Axis
from ddsweep.report.settings import heading
from ddsweep.results.statistics import mean_std_ci

__all__ = ["Measured", "Spread", "axis_of", "last_rows", "place_of", "spread_of"]


@dataclass(frozen=True)
class Spread:
    """One trial under one protocol at one inner step: ``values`` (fractions) of the networks ``seeds``, in
    the order of these, and how many diverged."""

    trial: int
    step: int
    seeds: np.ndarray
    values: np.ndarray
    n_diverged: int


def spread_of(values: Sequence[float] | np.ndarray) -> tuple[float, float | None, float | None]:
    """(mean, standard deviation, half-width of the 95 % interval) over networks."""
    return mean_std_ci(np.asarray(values).tolist())


@dataclass(frozen=True)
class Measured:
    """By trial, its distilled set under its own protocol: ``steps`` at each inner step that was measured, T
    or beyond included, and ``finals`` at T."""

    steps: Mapping[int, list[Spread]]
    finals: Mapping[int, Spread]

    @classmethod
    def of(cls, gathered: Gathered) -> Measured:
        steps = _at_steps(gathered)
        finals = {
            number: spread
            for number, found in steps.items()
            for spread in found
            if spread.step == _last_step(gathered.trials[number].settings)
        }
        return cls(steps, finals)


def _last_step(settings: Mapping[str, Any]) -> int | None:
    """T; None for a trial whose settings are not here."""
    steps, epochs = settings.get("inner_steps"), settings.get("inner_epochs")
    return None if steps is None or epochs is None else int(steps * epochs)


def _at_steps(gathered: Gathered) -> dict[int, list[Spread]]:
    networks = gathered.networks
    own = networks.distilled()
    found: dict[int, list[Spread]] = {}
    for number, span in networks.spans():
        rows = np.flatnonzero(own[span]) + span.start
        if not len(rows):
            continue
        values = networks.measured(gathered.trials[number].measure)[rows]
        order = np.lexsort((networks.model_seed[rows], networks.inner_step[rows]))
        rows, values = rows[order], values[order]
        rows, values = rows[~np.isnan(values)], values[~np.isnan(values)]
        steps = networks.inner_step[rows]
        edges = np.flatnonzero(np.diff(steps, prepend=-2))
        for start, end in zip(edges, [*edges, len(rows)][1:], strict=True):
            found.setdefault(number, []).append(
                Spread(
                    trial=number,
                    step=int(steps[start]),
                    seeds=networks.model_seed[rows[start:end]],
                    values=values[start:end],
                    n_diverged=int(networks.diverged[rows[start:end]].sum()),
                )
            )
    return found


def last_rows(gathered: Gathered) -> np.ndarray:
    """Where the rows of distilled sets after their last epoch are, whatever the protocol, as a mask."""
    steps, epochs = (
        {trial.number: trial.settings.get(name) or 0 for trial in gathered.trials}
        for name in ("inner_steps", "inner_epochs")
    )
    return gathered.networks.last(steps, epochs)


def axis_of(gathered: Gathered, name: str) -> Axis:
    """A setting as an axis: words, and numbers if they are few, each have their own place."""
    values = {gathered.value(trial, name) for trial in gathered.trials} - {None}
    title = heading(name)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return Axis(title, "nominal")
    if len(values) <= 12:
        return Axis(title, "ordinal")
    return Axis(title, "quantitative", log=min(values) > 0 and max(values) / min(values) > 30)


def place_of(gathered: Gathered, trials: Sequence[Trial], axis: str) -> dict[int, float]:
    """The offset of each trial among those of the same value, from -1 to 1."""
    groups: dict[str, list[int]] = {}
    for trial in trials:
        groups.setdefault(repr(gathered.value(trial, axis)), []).append(trial.number)
    widest = max(map(len, groups.values()), default=1)
    return {
        number: (2 * place - len(numbers) + 1) / widest
        for numbers in groups.values()
        for place, number in enumerate(numbers)
    }
