"""`TrialSpec`: the science settings of one distillation, and its id."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from ddsweep.catalog.datasets import DatasetSpec, base_name
from ddsweep.catalog.methods import METHODS
from ddsweep.catalog.networks import INIT_LAWS, NetworkSpec, parameter_shapes, parse_network
from ddsweep.catalog.pools import POOL_FRACTION, PoolSpec
from ddsweep.errors import SettingError

__all__ = [
    "AUGMENTATIONS",
    "CHOICES",
    "MOST_WHITENED",
    "SPEC_VERSION",
    "TrialSpec",
    "augmentation_parts",
]


SPEC_VERSION = 1
"""Raised only when the meaning of a setting changes: it enters every trial id."""

CHOICES: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "objective": ("classification", "attack"),
    "init": ("fixed", "random", "pretrained"),
    "init_law": INIT_LAWS,
    "inner_lr_mode": ("per_step", "shared", "fixed"),
    "inner_optimizer": ("gd", "momentum", "adam"),
    "order": ("fixed", "shuffled", "sampled"),
    "labels": ("hard", "soft"),
    "image_init": ("noise", "real", "kmeans"),
    "real_batch_mode": ("shared", "per_network"),
    "whitening": ("none", "zca"),
    "outer_schedule": ("constant", "step", "cosine"),
    "on_nonfinite": ("stop", "skip"),
    "keep": ("last", "best"),
    "dtype": ("float32", "float64", "tf32", "bf16"),
}
"""The settings of `TrialSpec` that are one of a few words."""

_AT_LEAST_ONE = (
    *("images_per_class", "inner_steps", "inner_epochs", "outer_steps", "models_per_step"),
    *("real_batch", "real_per_class", "outer_decay_steps", "selection_networks", "validate_every"),
)
_POSITIVE = (
    *("init_param", "inner_lr", "outer_lr", "outer_decay_factor", "clip_norm", "clip_median"),
    *("clip_running", "rate_limit", "image_scale", "outer_lr_rates", "outer_lr_labels", "outer_cutoff"),
)

MOST_WHITENED = 4096
"""Values of an image up to which it can be whitened: the matrix has their square."""

AUGMENTATIONS = ("shift", "rotate", "scale", "flip", "cutout")
"""What an augmentation is made of: one of them, or several joined by ``+``."""

_NEVER_FLIPPED = ("digits", "mnist", "usps", "svhn")
"""Data sets whose classes are not the same in a mirror, at any size and in any colour."""


def augmentation_parts(name: str, text: str, dataset: str) -> tuple[str, ...]:
    """The parts of setting ``name``, such as ``shift+rotate``; none for ``none``. Raises `SettingError`."""
    if text == "none":
        return ()
    parts = text.split("+")
    for part in parts:
        if part not in AUGMENTATIONS:
            raise SettingError(
                f"{name}: {part!r} is not one of {', '.join(AUGMENTATIONS)} (several joined by +; or none)"
            )
    if len(set(parts)) < len(parts):
        raise SettingError(f"{name}: {text!r} names a part twice")
    if "flip" in parts and base_name(dataset) in _NEVER_FLIPPED:
        raise SettingError(f"{name}: {text!r}: {dataset} is not the same in a mirror; leave flip out")
    return tuple(parts)


@dataclass(frozen=True)
class TrialSpec:
    """The science settings of one distillation: all that decides which images come out.

    Notation of Wang et al. 2018: ``inner_steps`` S, ``inner_epochs`` E, ``images_per_class_per_step``
    m, T = S*E gradient steps, S*m*classes synthetic images. Where and how fast a trial runs is not
    here, so moving it changes no id. New fields need a default that means "as before".

    A value exists only if it is possible: the constructor raises `SettingError`, naming the setting,
    what it got and what is allowed. It also writes ``network`` in full, and ``models_per_step`` of a
    ``fixed`` trial as 1, for it has one known network (number ``seed`` of its law).
    """

    dataset: DatasetSpec
    network: str = "convnet"
    objective: str = "classification"
    init: str = "random"
    init_law: str = "xavier"
    init_param: float = 1.0
    images_per_class: int = 1
    inner_steps: int = 1
    inner_epochs: int = 1
    inner_lr: float = 0.02
    inner_lr_mode: str = "per_step"
    image_init: str = "noise"
    outer_steps: int = 400
    models_per_step: int = 4
    real_batch: int = 1024
    real_batch_mode: str = "shared"
    outer_lr: float = 0.01
    outer_schedule: str = "constant"
    outer_decay_steps: int = 1000
    outer_decay_factor: float = 0.5
    clip_norm: float | None = None
    clip_median: float | None = None
    on_nonfinite: str = "skip"
    validation_fraction: float = 0.1
    split_seed: int = 0
    selection_networks: int = 8
    validate_every: int = 100
    dtype: str = "float32"
    seed: int = 0
    inner_optimizer: str = "gd"
    inner_momentum: float = 0.9
    order: str = "fixed"
    window: int | None = None
    labels: str = "hard"
    inner_augment: str = "none"
    outer_augment: str = "none"
    clip_running: float | None = None
    trim: float = 0.0
    ema: float | None = None
    keep: str = "last"
    max_rollbacks: int = 0
    rate_limit: float = 100.0
    image_centre: bool = False
    image_scale: float = 1.0
    outer_lr_rates: float | None = None
    outer_lr_labels: float | None = None
    whitening: str = "none"
    outer_cutoff: float | None = None
    pool: PoolSpec | None = None
    attack_class: int | None = None
    target_class: int | None = None
    method: str = "bptt"
    real_per_class: int = 256

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise SettingError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in _AT_LEAST_ONE:
            if not 1 <= getattr(self, name) < 2**31:
                raise SettingError(f"{name}: {getattr(self, name)} must be at least 1 and below 2**31")
        for name in ("seed", "split_seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise SettingError(f"{name}: {getattr(self, name)} must be at least 0 and below 2**63")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not (0 < value < float("inf")):
                raise SettingError(f"{name}: {value} must be a positive number")
        if not 0 < self.validation_fraction < 1:
            raise SettingError(f"validation_fraction: {self.validation_fraction} must lie between 0 and 1")
        if self.images_per_class % self.inner_steps:
            raise SettingError(
                f"images_per_class: {self.images_per_class} does not divide into inner_steps "
                f"{self.inner_steps}; images_per_class = inner_steps x images_per_class_per_step"
            )
        values = math.prod(self.dataset.shape)
        if self.whitening != "none" and values > MOST_WHITENED:
            raise SettingError(
                f"whitening: {self.whitening} of {values} values an image takes a matrix too large; at most "
                f"{MOST_WHITENED} (32x32x3 are 3072)"
            )
        self._check_how_it_is_learned()
        self._check_attack()
        if self.clip_norm is not None and self.clip_median is not None:
            raise SettingError("clip_norm and clip_median exclude each other: give one of them")
        if self.init == "fixed":
            object.__setattr__(self, "models_per_step", 1)
        object.__setattr__(self, "network", str(parse_network(self.network, self.dataset.shape)))
        self._check_pool()

    @property
    def lacks(self) -> frozenset[str]:
        """The settings that mean nothing to the trial's method: they decide nothing."""
        return METHODS[self.method].lacks

    def _check_attack(self) -> None:
        if self.objective == "attack" and self.method != "bptt":
            raise SettingError(f"method: {self.method} has no objective: attack; only bptt has")
        pair = (self.attack_class, self.target_class)
        if self.objective != "attack":
            for name, value in zip(("attack_class", "target_class"), pair, strict=True):
                if value is not None:
                    raise SettingError(f"{name}: {value} is for objective: attack, not {self.objective}")
            return
        last = self.dataset.classes - 1
        for name, value in zip(("attack_class", "target_class"), pair, strict=True):
            if value is None:
                raise SettingError(f"{name}: objective: attack needs one; 0 to {last}")
            if not 0 <= value <= last:
                raise SettingError(f"{name}: {value} is no class of {self.dataset.name}: 0 to {last}")
        if self.attack_class == self.target_class:
            raise SettingError(
                f"target_class: {self.target_class} is attack_class too; they must be different classes"
            )

    def _check_pool(self) -> None:
        """Whether the networks of ``pool`` are of this trial's kind and shape."""
        pool = self.pool
        if pool is None:
            if self.init == "pretrained":
                raise SettingError("pool: init: pretrained needs one: the name of a pool of trained networks")
            return
        if self.init == "random":
            raise SettingError(
                f"pool: {pool.name}: init: random draws fresh networks; leave pool out, or give init: "
                "pretrained (or fixed, for one network of the pool)"
            )
        if self.init == "pretrained" and pool.known:
            raise SettingError(
                f"pool: {pool.name} is one known network, with none of its kind to judge on; give init: fixed"
            )
        for name, default in (("init_law", "xavier"), ("init_param", 1.0)):
            if getattr(self, name) != default:
                raise SettingError(
                    f"{name}: {getattr(self, name)}: the networks are those of pool {pool.name}; leave it out"
                )
        if self.whitening != "none":
            raise SettingError(
                f"whitening: {self.whitening}: the networks of pool {pool.name} were trained on images that "
                "are not whitened"
            )
        self._check_split_of_pool(pool)
        source = parse_network(pool.network, pool.source_shape)
        classes = pool.classes or self.dataset.classes
        ours = parameter_shapes(self.network_spec, self.dataset.shape, self.dataset.classes)
        if source.kind != self.network_spec.kind or ours != parameter_shapes(
            source, pool.source_shape, classes
        ):
            theirs, here = ("x".join(map(str, shape)) for shape in (pool.source_shape, self.dataset.shape))
            raise SettingError(
                f"pool: {pool.name} has {pool.network} for {classes} classes of {theirs} images; "
                f"{self.network} for the {self.dataset.classes} classes of {here} images of "
                f"{self.dataset.name} has other weights"
            )
        if self.init == "pretrained" and self.models_per_step > pool.train:
            raise SettingError(
                f"models_per_step: {self.models_per_step} are more than the {pool.train} training networks "
                f"of pool {pool.name}"
            )
        if self.init == "fixed" and self.seed >= pool.train:
            raise SettingError(
                f"seed: {self.seed}: a fixed trial takes training network number `seed` of its pool, and "
                f"{pool.name} has 0 to {pool.train - 1}"
            )

    def _check_split_of_pool(self, pool: PoolSpec) -> None:
        """Images that the pool was trained on must be neither test nor validation images here."""
        source, own = base_name(pool.source_dataset), self.dataset.base_name
        prints = (pool.source_fingerprint, self.dataset.fingerprint)
        if prints[0] == prints[1] if any(prints) else source == own:
            if (self.validation_fraction, self.split_seed) != (POOL_FRACTION, 0):
                raise SettingError(
                    f"validation_fraction and split_seed: pool {pool.name} was trained on {own} without its "
                    f"validation images, those of fraction {POOL_FRACTION:g} and split_seed 0; give these"
                )
        elif {source, own} == {"cifar10", "cifar10-exact"}:
            raise SettingError(
                f"pool: {pool.name} was trained on {source}, which splits the same images otherwise than "
                f"{own}: its training images may be test images here; make a pool on {own}"
            )

    def _check_how_it_is_learned(self) -> None:
        for name in ("inner_momentum", "trim", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise SettingError(f"{name}: {value} must be at least 0 and below 1")
        if not 0 <= self.max_rollbacks < 2**31:
            raise SettingError(f"max_rollbacks: {self.max_rollbacks} must be at least 0 and below 2**31")
        if self.window is not None and not 1 <= self.window <= self.steps:
            raise SettingError(
                f"window: {self.window} must lie between 1 and T = inner_steps x inner_epochs = {self.steps}"
            )
        if self.order != "fixed" and self.inner_steps == 1:
            raise SettingError(
                f"order: {self.order} needs inner_steps of at least 2: there is one batch, and so one order"
            )
        if self.trim and self.init == "fixed":
            raise SettingError(f"trim: {self.trim}: a fixed trial has one network, none can be left out")
        for name in ("inner_augment", "outer_augment"):
            augmentation_parts(name, getattr(self, name), self.dataset.name)

    @property
    def images_per_class_per_step(self) -> int:
        """m: synthetic images per class in one inner step."""
        return self.images_per_class // self.inner_steps

    @property
    def steps(self) -> int:
        """T = S*E: gradient steps of one unroll."""
        return self.inner_steps * self.inner_epochs

    @property
    def network_spec(self) -> NetworkSpec:
        return parse_network(self.network, self.dataset.shape)

    @cached_property
    def trial_id(self) -> str:
        """10 hex digits over the settings that differ from their defaults, and the spec version."""
        settings: dict[str, Any] = {"dataset": self.dataset.identity(), "spec_version": SPEC_VERSION}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "dataset" and value != item.default and item.name not in self.lacks:
                settings[item.name] = value.identity() if isinstance(value, PoolSpec) else value
        text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def __repr__(self) -> str:
        """The id, and the settings that differ from their defaults."""
        said = [f"dataset={self.dataset.name!r}"]
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "dataset" and value != item.default:
                said.append(f"{item.name}={value.name if isinstance(value, PoolSpec) else value!r}")
        return f"TrialSpec({self.trial_id}: {', '.join(said)})"

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for a file header; `TrialSpec.from_dict` reads it back."""
        out = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("dataset", "pool"):
            if out[name] is not None:
                out[name] = _plain(out[name])
        return out

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrialSpec:
        dataset = DatasetSpec(**_tuples(values["dataset"]))
        pool = values.get("pool") and PoolSpec(**_tuples(values["pool"]))
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise SettingError(f"settings of a newer version of ddsweep: {', '.join(unknown)}")
        return cls(**{**values, "dataset": dataset, "pool": pool})


_SINCE_0_2 = ("image_column", "label_column", "first_label", "source_fingerprint")


def _plain(value: DatasetSpec | PoolSpec) -> dict[str, Any]:
    """Its fields in types that JSON has; `_tuples` is the way back. What was found in files stays behind, and
    so do settings of reading them that are as they always were."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(value).items()}
    return {k: v for k, v in plain.items() if k != "survey" and (v or k not in _SINCE_0_2)}


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
