"""How distilled sets are judged: protocols, groups of held-out networks, baselines."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ddsweep.catalog.groups import suited_augmentation
from ddsweep.catalog.methods import METHODS
from ddsweep.catalog.trials import TrialSpec
from ddsweep.errors import SettingError

__all__ = [
    "BASELINES",
    "BASELINE_EPOCHS",
    "BASELINE_RATES",
    "DEFAULT_BASELINES",
    "MAX_TUNED_STEPS",
    "NEIGHBOUR_BASELINES",
    "PROTOCOLS",
    "SELECTION_IMAGES",
    "SELECTION_NETWORKS",
    "EvalUnit",
    "EvaluationSpec",
    "Protocol",
    "epoch_grid",
    "steps_per_epoch",
]


PROTOCOLS = ("as_distilled", "on_random")
"""Protocols with a name: a set on the networks it was made for, or a ``fixed`` set on random held-out ones.
Every other one is a `Protocol`."""

BASELINES = ("random_real", "optimized_random", "class_mean", "kmeans", "knn_random", "knn_kmeans")

DEFAULT_BASELINES = ("random_real", "class_mean", "kmeans", "knn_random", "knn_kmeans")
"""The default. It enters the ids of existing evaluations, so it stays."""

BASELINE_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
BASELINE_EPOCHS = (1, 2, 5, 10, 20, 50, 100)
"""The rate and the number of epochs of a baseline are chosen from these."""

MAX_TUNED_STEPS = 100
SELECTION_NETWORKS = 4
SELECTION_IMAGES = 500
"""The rate search uses at most this many validation images."""

NEIGHBOUR_BASELINES = ("knn_random", "knn_kmeans")
"""Nearest neighbour has no network and no steps."""

_TRAINED = tuple(name for name in BASELINES if name not in NEIGHBOUR_BASELINES)
_MATTERS_TO = {
    "rates": _TRAINED,
    "epochs": _TRAINED,
    "candidates": ("optimized_random",),
    "neighbours": NEIGHBOUR_BASELINES,
    "neighbour_norm": NEIGHBOUR_BASELINES,
}


_PROTOCOL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=()+:@'\[\]-]{0,199}")


@dataclass(frozen=True)
class Protocol:
    """A way to apply distilled sets other than the one they were made for. None means as in the trial.

    ``inner_lr`` is one rate for all steps instead of the learned ones. ``inner_epochs`` is how often the
    batches are gone through; beyond the trained number the rates of the last epoch repeat.
    Without a ``name`` it is called by what it changes: ``order=shuffled,inner_lr=0.1``.

    Some are no settings of a trial. ``weight_decay`` is torch's. With ``inner_batch`` an epoch goes once
    through all images, in minibatches of so many, in an order of its own. ``inner_schedule`` (``constant``,
    ``step``, ``cosine``) changes the rate from epoch to epoch: a ``step`` is times ``inner_decay_factor``
    (0.1) after every ``inner_decay_epochs`` (half of the epochs). ``inner_augment`` changes the images in
    each step. A set is never judged with the augmentation that it was made with unless that stands here.

    Raises `SettingError` if nothing is changed, for changes that exclude each other, and for a name that has
    another meaning already.
    """

    name: str = ""
    network: str | None = None
    init_law: str | None = None
    init_param: float | None = None
    order: str | None = None
    inner_optimizer: str | None = None
    inner_lr: float | None = None
    inner_epochs: int | None = None
    weight_decay: float | None = None
    inner_batch: int | None = None
    inner_schedule: str | None = None
    inner_decay_epochs: int | None = None
    inner_decay_factor: float | None = None
    inner_augment: str | None = None

    def __post_init__(self) -> None:
        changes = self.changes()
        if not {name: value for name, value in changes.items() if _NO_CHANGE.get(name) != value}:
            raise SettingError(f"changes nothing; give at least one of {', '.join(self.settings())}")
        for name in ("inner_decay_epochs", "inner_decay_factor"):
            if name in changes and self.inner_schedule != "step":
                raise SettingError(f"{name}: {changes[name]} is for inner_schedule: step")
        if self.inner_decay_factor is not None and self.inner_decay_factor > 1:
            raise SettingError(
                f"inner_decay_factor: {self.inner_decay_factor:g} must be at most 1: each decay multiplies "
                "the rate by it"
            )
        if self.order is not None and self.inner_batch is not None:
            raise SettingError(
                f"order: {self.order}: inner_batch draws minibatches from all images of a set, anew in each "
                "epoch; leave one of them out"
            )
        if not self.name:
            texts = {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in changes.items()}
            name = ",".join(f"{k}={''.join(text.split())}" for k, text in texts.items())
            object.__setattr__(self, "name", name)
        if not _PROTOCOL_NAME.fullmatch(self.name):
            raise SettingError(
                f"name: {self.name!r} is not a name: letters, digits and _ . , = ( ) + -, starting with a "
                "letter or digit, at most 200"
            )
        if self.name in (*PROTOCOLS, "nearest_neighbour") or self.name.endswith("_tuned"):
            raise SettingError(
                f"name: {self.name!r} has a meaning of its own ({', '.join(PROTOCOLS)}, nearest_neighbour, "
                "..._tuned); take another"
            )

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        """The settings that a protocol can change."""
        return tuple(item.name for item in fields(cls) if item.name != "name")

    def changes(self) -> dict[str, Any]:
        """Its changes, by setting."""
        return {name: value for name in self.settings() if (value := getattr(self, name)) is not None}

    def applied_to(self, trial: TrialSpec) -> TrialSpec:
        """``trial`` with the networks, the order, the optimiser and the epochs of this protocol: how to apply
        its set, not how it was made.

        A trial keeps its known network or pool only if network and law stay the same; for another network or
        law there are only fresh ones. Raises `SettingError` if its set cannot be applied like this.
        """
        changes = {name: value for name, value in self.changes().items() if name not in _OF_TRAINING}
        suited_augmentation("inner_augment", self.inner_augment or "none", trial.dataset)
        for name in ("inner_batch", "inner_schedule"):
            value = getattr(self, name)
            if value not in (None, "constant") and self.inner_lr is None and not _has_one_rate(trial):
                raise SettingError(
                    f"{name}: {value} takes one rate for all steps, and the set has one for each of its "
                    f"{trial.steps}; give inner_lr"
                )
        # A window is for distilling only; it need not fit these epochs.
        trial = replace(trial, window=None)
        fresh = replace(trial, init="random", pool=None, **changes)
        networks = [(spec.network, spec.init_law, spec.init_param) for spec in (trial, fresh)]
        drawn = trial.pool is not None and ("init_law" in changes or "init_param" in changes)
        return replace(trial, **changes) if networks[0] == networks[1] and not drawn else fresh


_NO_CHANGE = {"inner_augment": "none", "inner_schedule": "constant"}
"""What says nothing by itself: no set is judged otherwise without a protocol."""

_OF_TRAINING = (
    *("inner_lr", "weight_decay", "inner_batch", "inner_schedule", "inner_decay_epochs"),
    *("inner_decay_factor", "inner_augment"),
)
"""What a protocol changes of the training alone, whatever the trial has under that name."""


def _has_one_rate(trial: TrialSpec) -> bool:
    """Whether the set of ``trial`` surely has the same rate in all steps. A user's own method may learn
    any."""
    learns = trial.method not in METHODS or "inner_lr_mode" not in trial.lacks
    shared = trial.method in METHODS and trial.inner_lr_mode != "per_step"
    return trial.steps == 1 or not learns or shared


def epoch_grid(
    inner_steps: int, inner_epochs: int, epochs: Sequence[int] = BASELINE_EPOCHS
) -> tuple[int, ...]:
    """The numbers of epochs that are tried: those of `BASELINE_EPOCHS` with at most ``MAX_TUNED_STEPS`` steps
    in all, or ``epochs`` of the user's own, with any number of steps; always also the trial's own."""
    if tuple(epochs) != BASELINE_EPOCHS:
        return tuple(sorted({*epochs, inner_epochs}))
    few = {e for e in BASELINE_EPOCHS if e * inner_steps <= MAX_TUNED_STEPS}
    return tuple(sorted(few | {1, inner_epochs}))


def steps_per_epoch(trial: TrialSpec, batch: int | None) -> int:
    """Inner steps of one epoch on the set of ``trial``: S or, in minibatches of ``batch`` of all images, as
    many as these take."""
    return trial.inner_steps if batch is None else -(-trial.images_per_class * trial.dataset.classes // batch)


@dataclass(frozen=True)
class EvalUnit:
    """One evaluation task, and the content of one part: a group of networks under one protocol.

    ``indices`` are the networks with wanted rows. ``size`` networks, those from ``group * size`` on, are
    always computed together: float32 results depend on the size of the batch. ``changes`` are those of the
    protocol, unless it is one of ``PROTOCOLS``.
    """

    protocol: str
    group: int
    size: int
    indices: tuple[int, ...]
    changes: Protocol | None = None


@dataclass(frozen=True)
class EvaluationSpec:
    """What is asked of every trial: ``networks`` held-out networks, computed ``group_size`` at a time, the
    protocols and baselines, and inner steps beyond T to test at.

    For baselines: the ``rates`` and ``epochs`` that are searched, the number of ``candidates`` for the
    optimised random images, and the ``neighbours`` and the p of the distance of k-NN.
    """

    networks: int = 64
    group_size: int = 16
    protocols: tuple[str | Protocol, ...] = PROTOCOLS
    baselines: tuple[str, ...] = DEFAULT_BASELINES
    inner_steps_beyond: tuple[int, ...] = ()
    rates: tuple[float, ...] = BASELINE_RATES
    epochs: tuple[int, ...] = BASELINE_EPOCHS
    candidates: int = 20
    neighbours: int = 1
    neighbour_norm: float = 2.0

    def units(self, trial: TrialSpec) -> list[EvalUnit]:
        """The units that a trial needs, in a fixed order.

        ``as_distilled`` is always among them. For ``fixed`` it is the one known network (its index is the
        trial's seed), and the held-out networks (of its law, or of its pool) come under ``on_random``. A
        `Protocol` that is impossible for the trial has no units (``plan`` refuses it, or says that it is left
        out).
        """
        groups = [
            (g, tuple(range(g * self.group_size, min((g + 1) * self.group_size, self.networks))))
            for g in range(-(-self.networks // self.group_size))
        ]
        if trial.init != "fixed":
            units = [EvalUnit("as_distilled", g, self.group_size, indices) for g, indices in groups]
        else:
            units = [EvalUnit("as_distilled", 0, 1, (trial.seed,))]
            if "on_random" in self.protocols and not (trial.pool and trial.pool.known):
                units += [EvalUnit("on_random", g, self.group_size, indices) for g, indices in groups]
        for protocol in self.protocols:
            if isinstance(protocol, str):
                continue
            try:
                known = protocol.applied_to(trial).init == "fixed"
            except SettingError:
                continue
            if known:
                units.append(EvalUnit(protocol.name, 0, 1, (trial.seed,), protocol))
            else:
                units += [EvalUnit(protocol.name, g, self.group_size, i, protocol) for g, i in groups]
        return units

    def steps(self, trial: TrialSpec, protocol: Protocol | None = None) -> tuple[int, ...]:
        """Inner steps at which a distilled set is judged: 0, the end of each epoch, T (under a ``protocol``,
        the end of its own epochs), and steps beyond. With an ``inner_batch`` there are many epochs: 0, the
        end of the last one, and steps beyond."""
        last = self.last_step(trial, protocol)
        minibatches = protocol is not None and protocol.inner_batch is not None
        ends = range(0, last + 1, last if minibatches else trial.inner_steps)
        return tuple(sorted({*ends, *(s for s in self.inner_steps_beyond if s > last)}))

    def last_step(self, trial: TrialSpec, protocol: Protocol | None = None) -> int:
        """The last inner step of the epochs: T, or that of a ``protocol``."""
        if protocol is None:
            return trial.steps
        return steps_per_epoch(trial, protocol.inner_batch) * protocol.applied_to(trial).inner_epochs

    def baseline_settings(self, sources: Iterable[str] | None = None) -> dict[str, Any]:
        """Settings of the baselines ``sources`` (default: all that are asked for) that differ from their
        defaults, in JSON types.

        Defaults are in no key and no id, so earlier evaluations stay valid.
        """
        default = {item.name: item.default for item in fields(self)}
        asked = set(self.baselines if sources is None else sources)
        found = {name: getattr(self, name) for name, of in _MATTERS_TO.items() if set(of) & asked}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in found.items()
            if value != default[name]
        }

    def evaluation_id(self, trial: TrialSpec) -> str:
        """10 hex digits over all settings that decide the evaluation rows of ``trial``."""
        units = [
            [u.protocol, u.group, u.size, list(u.indices)]
            + ([u.changes.changes(), list(self.steps(trial, u.changes))] if u.changes else [])
            for u in self.units(trial)
        ]
        parts: list[Any] = [units, sorted(self.baselines), list(self.steps(trial))]
        if settings := self.baseline_settings():
            parts.append(settings)
        text = json.dumps(parts, separators=(",", ":"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]
