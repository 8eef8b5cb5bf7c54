"""What exists, by name: networks with the sizes they take, data sets, init laws, and `TrialSpec`.

Imports neither torch nor anything heavy, so that ``ddsweep plan`` and ``--help`` stay instant.
The names here are the vocabulary of sweep files and of the result tables.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any

from ddsweep.errors import SettingError

__all__ = [
    "BASELINES",
    "BASELINE_EPOCHS",
    "BASELINE_RATES",
    "CHOICES",
    "DATASETS",
    "DEFAULT_BASELINES",
    "INIT_LAWS",
    "NETWORKS",
    "PROTOCOLS",
    "SPEC_VERSION",
    "DatasetSpec",
    "EvalUnit",
    "EvaluationSpec",
    "NetworkSpec",
    "Protocol",
    "TrialSpec",
    "parse_network",
]

SPEC_VERSION = 1
"""Raised only when the meaning of a setting changes: it enters every trial id."""

INIT_LAWS = ("xavier", "xavier_uniform", "kaiming", "kaiming_out", "orthogonal", "normal", "default")
NETWORKS = ("lenet", "alexcifarnet", "convnet")
NORMS = ("none", "instance")


# --------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class NetworkSpec:
    """One architecture. ``depth``, ``width`` and ``norm`` are parameters of ``convnet`` only."""

    kind: str
    depth: int = 0
    width: int = 0
    norm: str = ""

    def __str__(self) -> str:
        if self.kind != "convnet":
            return self.kind
        return f"convnet(depth={self.depth},width={self.width},norm={self.norm})"


_NETWORK = re.compile(r"^\s*([a-z0-9_]+)\s*(?:\(([^()]*)\))?\s*$")


def parse_network(text: str, shape: tuple[int, int, int]) -> NetworkSpec:
    """The `NetworkSpec` named by ``text`` for images of ``shape`` (channels, height, width).

    ``lenet``, ``alexcifarnet``, ``convnet`` or ``convnet(depth=3,width=128,norm=instance)``. What is
    left out of a convnet is depth 2 up to 16 pixels and 3 beyond, width 128, instance norm (Zhao et
    al. 2021). Raises `SettingError` for an unknown name or parameter, and for a size that the
    network cannot take.
    """
    match = _NETWORK.match(text)
    kind = match.group(1) if match else text
    if match is None or kind not in NETWORKS:
        raise SettingError(
            f"network: unknown network {text!r}; known are {', '.join(NETWORKS)} "
            "(convnet also as convnet(depth=3,width=128,norm=instance))"
        )
    height = shape[1]
    given = _network_parameters(text, kind, match.group(2))
    if kind == "convnet":
        spec = NetworkSpec(
            "convnet",
            depth=int(given.get("depth", 2 if height <= 16 else 3)),
            width=int(given.get("width", 128)),
            norm=str(given.get("norm", "instance")),
        )
    else:
        spec = NetworkSpec(kind)
    _check_size(spec, shape)
    return spec


def _network_parameters(text: str, kind: str, inside: str | None) -> dict[str, str | int]:
    given: dict[str, str | int] = {}
    for item in filter(None, (part.strip() for part in (inside or "").split(","))):
        key, _, value = (piece.strip() for piece in item.partition("="))
        if kind != "convnet" or key not in ("depth", "width", "norm"):
            allowed = "depth, width, norm" if kind == "convnet" else "no parameters"
            raise SettingError(f"network: {text!r}: unknown parameter {key!r}; {kind} takes {allowed}")
        if key == "norm":
            if value not in NORMS:
                raise SettingError(f"network: {text!r}: norm is one of {', '.join(NORMS)}")
            given[key] = value
        elif value.isdecimal() and 1 <= int(value) <= 4096:
            given[key] = int(value)
        else:
            raise SettingError(f"network: {text!r}: {key} must be a whole number of at least 1")
    return given


def _check_size(spec: NetworkSpec, shape: tuple[int, int, int]) -> None:
    channels, height, width = shape
    here = f"images of {channels}x{height}x{width}"
    if height != width:
        raise SettingError(f"network: {spec} takes square images, not {here}")
    if spec.kind == "lenet" and height not in (28, 32):
        raise SettingError(f"network: lenet takes images of 28 or 32 pixels, not {here}")
    if spec.kind == "alexcifarnet" and height != 32:
        raise SettingError(f"network: alexcifarnet takes images of 32 pixels, not {here}")
    if spec.kind == "convnet":
        last = height >> (spec.depth - 1)
        smallest = 2 if spec.norm == "instance" else 1
        if last < smallest or height >> spec.depth < 1:
            raise SettingError(f"network: {spec} halves the image {spec.depth} times, too often for {here}")


def layer_shapes(
    network: NetworkSpec, shape: tuple[int, int, int], classes: int
) -> list[tuple[str, int, int, int, int]]:
    """The layers with weights, as (kind, inputs, outputs, kernel, output side); side 1 for linear."""
    channels, side, _ = shape
    if network.kind == "lenet":
        first = side if side == 28 else side - 4
        second = first // 2 - 4
        return [
            ("conv", channels, 6, 5, first),
            ("conv", 6, 16, 5, second),
            ("linear", 16 * (second // 2) ** 2, 120, 1, 1),
            ("linear", 120, 84, 1, 1),
            ("linear", 84, classes, 1, 1),
        ]
    if network.kind == "alexcifarnet":
        return [
            ("conv", channels, 64, 5, 32),
            ("conv", 64, 64, 5, 16),
            ("linear", 64 * 8 * 8, 384, 1, 1),
            ("linear", 384, 192, 1, 1),
            ("linear", 192, classes, 1, 1),
        ]
    layers: list[tuple[str, int, int, int, int]] = []
    inputs = channels
    for _ in range(network.depth):
        layers.append(("conv", inputs, network.width, 3, side))
        if network.norm == "instance":
            layers.append(("norm", network.width, network.width, 1, side))
        inputs, side = network.width, side // 2
    layers.append(("linear", inputs * side * side, classes, 1, 1))
    return layers


def parameter_count(network: NetworkSpec, shape: tuple[int, int, int], classes: int) -> int:
    """Number of trainable parameters (weights and biases)."""
    total = 0
    for kind, inputs, outputs, kernel, _ in layer_shapes(network, shape, classes):
        total += 2 * outputs if kind == "norm" else outputs * inputs * kernel**2 + outputs
    return total


def forward_flops(network: NetworkSpec, shape: tuple[int, int, int], classes: int) -> int:
    """FLOPs of one forward pass of one image: two per multiply-add of convolutions and linear layers."""
    return sum(
        2 * inputs * outputs * kernel**2 * side**2
        for kind, inputs, outputs, kernel, side in layer_shapes(network, shape, classes)
        if kind != "norm"
    )


# -------------------------------------------------------------------------------------- data sets


@dataclass(frozen=True)
class DatasetSpec:
    """One data set: where it comes from and what its images are.

    ``shape`` is (channels, height, width). ``mean`` and ``std`` per channel are the constants that a
    paper names; empty means measured on the training part. ``path`` is relative to the data root.
    ``train`` and ``test`` name the files (or, by number, the sorted shards) of a ``parquet`` source
    and the two folders of a ``folder`` source. ``fingerprint`` is the content hash of the files of a
    ``parquet`` or ``folder`` source: it stands for the path in a trial's id.
    """

    name: str
    source: str
    shape: tuple[int, int, int] = (0, 0, 0)
    classes: int = 0
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    path: str = ""
    train: tuple[str | int, ...] = ()
    test: tuple[str | int, ...] = ()
    fingerprint: str = ""

    def identity(self) -> str | list[Any]:
        """What stands for this data set in a trial id: its name, or the content of its files together
        with how they are read (the same files as grey or RGB, or normalised otherwise, are other data)."""
        if self.source in ("parquet", "folder"):
            read_as = [list(self.shape), self.classes, list(self.mean), list(self.std)]
            return [self.fingerprint, *read_as]
        return self.name


_DIGITS = tuple(str(i) for i in range(10))
_CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)

DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec("digits", "digits", (1, 8, 8), 10, _DIGITS),
        DatasetSpec("mnist", "torchvision", (1, 28, 28), 10, _DIGITS, (0.1307,), (0.3081,)),
        DatasetSpec("fashion_mnist", "torchvision", (1, 28, 28), 10, _FASHION),
        DatasetSpec("usps", "torchvision", (1, 16, 16), 10, _DIGITS),
        DatasetSpec("cifar10", "torchvision", (3, 32, 32), 10, _CIFAR10, _CIFAR10_MEAN, _CIFAR10_STD),
        DatasetSpec(
            *("cifar10-exact", "parquet", (3, 32, 32), 10, _CIFAR10, _CIFAR10_MEAN, _CIFAR10_STD),
            path="cifar10",
            train=(0, 1, 2, 3),
            test=(4,),
        ),
    )
}


# ---------------------------------------------------------------------------------------- trials


CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("classification",),
    "init": ("fixed", "random"),
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
    "dtype": ("float32", "float64"),
}
"""The settings of `TrialSpec` that are one of a few words."""

_AT_LEAST_ONE = (
    *("images_per_class", "inner_steps", "inner_epochs", "outer_steps", "models_per_step"),
    *("real_batch", "outer_decay_steps", "selection_networks", "validate_every"),
)
_POSITIVE = (
    *("init_param", "inner_lr", "outer_lr", "outer_decay_factor", "clip_norm", "clip_median"),
    *("clip_running", "rate_limit", "image_scale", "outer_lr_rates", "outer_lr_labels", "outer_cutoff"),
)

MOST_WHITENED = 4096
"""Values of an image up to which it can be whitened: the matrix has their square."""

AUGMENTATIONS = ("shift", "rotate", "scale", "flip", "cutout")
"""What an augmentation is made of: one of them, or several joined by ``+``."""

_NEVER_FLIPPED = ("digits", "mnist", "usps")
"""Data sets whose classes are not the same in a mirror."""


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
    if "flip" in parts and dataset in _NEVER_FLIPPED:
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
        if self.clip_norm is not None and self.clip_median is not None:
            raise SettingError("clip_norm and clip_median exclude each other: give one of them")
        if self.init == "fixed":
            object.__setattr__(self, "models_per_step", 1)
        object.__setattr__(self, "network", str(parse_network(self.network, self.dataset.shape)))

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

    @property
    def trial_id(self) -> str:
        """10 hex digits over the settings that differ from their defaults, and the spec version."""
        settings: dict[str, Any] = {"dataset": self.dataset.identity(), "spec_version": SPEC_VERSION}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "dataset" and value != item.default:
                settings[item.name] = value
        text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for a file header; `TrialSpec.from_dict` reads it back."""
        out = {item.name: getattr(self, item.name) for item in fields(self)}
        out["dataset"] = {
            item.name: list(value) if isinstance(value := getattr(self.dataset, item.name), tuple) else value
            for item in fields(self.dataset)
        }
        return out

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrialSpec:
        dataset: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values["dataset"].items()
        }
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise SettingError(f"settings of a newer version of ddsweep: {', '.join(unknown)}")
        return cls(**{**values, "dataset": DatasetSpec(**dataset)})


# ------------------------------------------------------------------------------------ evaluation

PROTOCOLS = ("as_distilled", "on_random")
"""How a set is applied: on the networks it was made for, or a ``fixed`` set on random held-out ones.
Every other way is a `Protocol`."""

BASELINES = ("random_real", "optimized_random", "class_mean", "kmeans", "knn_random", "knn_kmeans")

DEFAULT_BASELINES = ("random_real", "class_mean", "kmeans", "knn_random", "knn_kmeans")
"""What is asked for if nothing is said. It enters the ids of evaluations that are there, so it stays."""

BASELINE_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
BASELINE_EPOCHS = (1, 2, 5, 10, 20, 50, 100)
"""The grids in which the rate and the number of epochs of a baseline are chosen."""

_NEAREST = ("knn_random", "knn_kmeans")
_TRAINED = tuple(name for name in BASELINES if name not in _NEAREST)
_MATTERS_TO = {
    "rates": _TRAINED,
    "epochs": _TRAINED,
    "candidates": ("optimized_random",),
    "neighbours": _NEAREST,
    "neighbour_norm": _NEAREST,
}


_PROTOCOL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=()+-]{0,199}")


@dataclass(frozen=True)
class Protocol:
    """A way to apply distilled sets that is not the one they were made for; None is as in the trial.

    ``inner_lr`` is one rate for all steps instead of the learned ones. With other ``inner_epochs`` than
    the trained number the sets are applied for so many; beyond it the rates of the last epoch repeat.
    Without a ``name`` it is called by what it changes: ``order=shuffled,inner_lr=0.1``.

    Raises `SettingError` if nothing is changed, or for a name that means something else already.
    """

    name: str = ""
    network: str | None = None
    init_law: str | None = None
    init_param: float | None = None
    order: str | None = None
    inner_optimizer: str | None = None
    inner_lr: float | None = None
    inner_epochs: int | None = None

    def __post_init__(self) -> None:
        changes = self.changes()
        if not changes:
            raise SettingError(f"changes nothing; give at least one of {', '.join(self.settings())}")
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
        """What a protocol can change."""
        return tuple(item.name for item in fields(cls) if item.name != "name")

    def changes(self) -> dict[str, Any]:
        """What it changes, by setting."""
        return {name: value for name in self.settings() if (value := getattr(self, name)) is not None}

    def applied_to(self, trial: TrialSpec) -> TrialSpec:
        """``trial`` with the networks, the order, the optimiser and the epochs of this protocol: how to apply
        its set, not how it was made.

        A ``fixed`` trial stays so only if its networks are the same: of another kind or law there is no
        known one. Raises `SettingError` if its set cannot be applied like this.
        """
        changes = {name: value for name, value in self.changes().items() if name != "inner_lr"}
        # Of distilling; it need not lie in these epochs.
        used = replace(trial, window=None, **changes)
        networks = [(spec.network, spec.init_law, spec.init_param) for spec in (trial, used)]
        return used if networks[0] == networks[1] else replace(used, init="random")


@dataclass(frozen=True)
class EvalUnit:
    """What one evaluation task computes and one part holds: a group of networks under one protocol.

    ``indices`` are the networks whose rows are wanted. ``size`` networks, those from ``group * size``
    on, are always computed together: float32 results depend on the size of the batch. ``changes`` is
    what the protocol is, unless it is one of ``PROTOCOLS``.
    """

    protocol: str
    group: int
    size: int
    indices: tuple[int, ...]
    changes: Protocol | None = None


@dataclass(frozen=True)
class EvaluationSpec:
    """What is asked of every trial: ``networks`` held-out networks, computed ``group_size`` at a time, the
    protocols and baselines, and inner steps beyond T at which to look as well.

    Of baselines: the grids of ``rates`` and ``epochs`` that are searched, how many ``candidates`` the
    optimised random images are the best of, and the ``neighbours`` and the p of the distance of k-NN.
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

        ``as_distilled`` is always among them. For ``fixed`` it is the one known network (its index is
        the trial's seed), and the held-out networks come under ``on_random``. A `Protocol` that is
        impossible for the trial has none (``plan`` refuses it, or says that it is left out).
        """
        groups = [
            (g, tuple(range(g * self.group_size, min((g + 1) * self.group_size, self.networks))))
            for g in range(-(-self.networks // self.group_size))
        ]
        if trial.init != "fixed":
            units = [EvalUnit("as_distilled", g, self.group_size, indices) for g, indices in groups]
        else:
            units = [EvalUnit("as_distilled", 0, 1, (trial.seed,))]
            if "on_random" in self.protocols:
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
        """Inner steps at which a distilled set is judged: 0, the end of each epoch, T (of a ``protocol``, the
        end of its own epochs), and beyond."""
        last = self.last_step(trial, protocol)
        ends = range(0, last + 1, trial.inner_steps)
        return tuple(sorted({*ends, *(s for s in self.inner_steps_beyond if s > last)}))

    def last_step(self, trial: TrialSpec, protocol: Protocol | None = None) -> int:
        """The inner step with which the epochs end: T, or that of the epochs of a ``protocol``."""
        return (trial if protocol is None else protocol.applied_to(trial)).steps

    def baseline_settings(self) -> dict[str, Any]:
        """How the baselines that are asked for are computed, as far as it is not as by default.

        Empty by default, and then in no key and no id: what was evaluated before stays valid.
        """
        default = {item.name: item.default for item in fields(self)}
        return {
            name: getattr(self, name)
            for name, sources in _MATTERS_TO.items()
            if getattr(self, name) != default[name] and set(sources) & set(self.baselines)
        }

    def evaluation_id(self, trial: TrialSpec) -> str:
        """10 hex digits over all that decides the evaluation rows of ``trial``."""
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
