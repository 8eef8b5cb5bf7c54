"""What exists, by name: networks with the sizes they take, data sets, init laws, and `TrialSpec`.

Imports neither torch nor anything heavy, so that ``ddsweep plan`` and ``--help`` stay instant.
The names here are the vocabulary of sweep files and of the result tables.
"""

from __future__ import annotations

import difflib
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
    "IMAGENET",
    "INIT_LAWS",
    "NETWORKS",
    "POOL_FRACTION",
    "PROTOCOLS",
    "SMOKE",
    "SPEC_VERSION",
    "DatasetSpec",
    "EvalUnit",
    "EvaluationSpec",
    "NetworkSpec",
    "PoolSpec",
    "Protocol",
    "TrialSpec",
    "base_name",
    "parse_dataset",
    "parse_network",
    "transformed",
]

SPEC_VERSION = 1
"""Raised only when the meaning of a setting changes: it enters every trial id."""

INIT_LAWS = ("xavier", "xavier_uniform", "kaiming", "kaiming_out", "orthogonal", "normal", "default")
NETWORKS = ("lenet", "alexcifarnet", "convnet", "alexnet")
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

    ``lenet``, ``alexcifarnet``, ``alexnet``, ``convnet`` or
    ``convnet(depth=3,width=128,norm=instance)``. What is left out of a convnet is depth 2 up to 16 pixels
    and 3 beyond, width 128, instance norm (Zhao et al. 2021). Raises `SettingError` for an unknown name or
    parameter, and for a size that the network cannot take.
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
    if spec.kind == "alexnet" and height != 224:
        raise SettingError(f"network: alexnet takes images of 224 pixels, not {here}")
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
    if network.kind == "alexnet":
        return [
            ("conv", channels, 64, 11, 55),
            ("conv", 64, 192, 5, 27),
            ("conv", 192, 384, 3, 13),
            ("conv", 384, 256, 3, 13),
            ("conv", 256, 256, 3, 13),
            ("linear", 256 * 6 * 6, 4096, 1, 1),
            ("linear", 4096, 4096, 1, 1),
            ("linear", 4096, classes, 1, 1),
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


def parameter_shapes(
    network: NetworkSpec, shape: tuple[int, int, int], classes: int
) -> list[tuple[str, int, int, int]]:
    """The layers with weights without the size of their images: equal where weights can be exchanged."""
    return [layer[:4] for layer in layer_shapes(network, shape, classes)]


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

    ``shape``, ``mean`` and ``std`` are of what comes out. ``native`` is the shape of the files where that is
    another (`transformed`), and empty where it is the same, or where the files have no one shape.
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
    native: tuple[int, ...] = ()

    @property
    def native_shape(self) -> tuple[int, int, int]:
        """The shape of the files' own images."""
        if not self.native:
            return self.shape
        channels, height, width = self.native
        return (channels, height, width)

    @property
    def base_name(self) -> str:
        """The name without transforms: that of the files."""
        return base_name(self.name)

    def identity(self) -> str | list[Any]:
        """What stands for this data set in a trial id: its name, or the content of its files together
        with how they are read (the same files as grey or RGB, or normalised otherwise, are other data)."""
        if self.source in ("parquet", "folder"):
            read_as: list[Any] = [list(self.shape), self.classes, list(self.mean), list(self.std)]
            # Only where there is one, so that ids from before there were transforms stay.
            return [self.fingerprint, *read_as, *([list(self.native)] if self.native else [])]
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
_SVHN_MEAN, _SVHN_STD = (0.4379, 0.4440, 0.4729), (0.1980, 0.2010, 0.1970)
_VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CUB_MEAN, _CUB_STD = (0.4785, 0.4993, 0.4022), (0.2321, 0.2277, 0.2665)

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
        DatasetSpec("svhn", "torchvision", (3, 32, 32), 10, _DIGITS, _SVHN_MEAN, _SVHN_STD),
        DatasetSpec("voc2007", "voc", (3, 224, 224), 20, _VOC, _IMAGENET_MEAN, _IMAGENET_STD),
        # Its class names are read from classes.txt: two hundred of them.
        DatasetSpec("cub200", "cub", (3, 224, 224), 200, (), _CUB_MEAN, _CUB_STD),
    )
}

_TRANSFORMS = ("channels", "size")
_LARGEST, _SMALLEST = 512, 4
_DATASET = re.compile(r"\s*([^\s()]+)\s*(?:\(([^()]*)\))?\s*")
_SUFFIX = re.compile(r"\((?:channels=3|size=\d+|channels=3,size=\d+)\)$")


def base_name(name: str) -> str:
    """``name`` of a data set without its transforms: ``usps`` for ``usps(size=28)``."""
    return _SUFFIX.sub("", name)


def parse_dataset(text: str) -> DatasetSpec:
    """The `DatasetSpec` that the catalog has for ``text``: a name, or a name with transforms.

    ``usps(size=28)``, ``mnist(channels=3,size=32)``: see `transformed`. Raises `SettingError` for an unknown
    name or transform, and for one that is not possible.
    """
    match = _DATASET.fullmatch(text)
    name = match.group(1) if match else text.partition("(")[0].strip()
    if name not in DATASETS:
        close = difflib.get_close_matches(name.lower(), DATASETS, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise SettingError(f"dataset: unknown data set {name!r}{meant}; known are {', '.join(DATASETS)}")
    if match is None:
        cut = "; inside [...] of YAML it needs quotes, for there a comma ends it" if ")" not in text else ""
        raise SettingError(
            f"dataset: {text!r}: transforms are written as {name}(channels=3,size=32), either or both{cut}"
        )
    given: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in (match.group(2) or "").split(","))):
        key, _, value = (piece.strip() for piece in item.partition("="))
        if key not in _TRANSFORMS:
            close = difflib.get_close_matches(key, _TRANSFORMS, n=1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            raise SettingError(
                f"dataset: {text!r}: unknown transform {key!r}{meant}; there are {', '.join(_TRANSFORMS)}"
            )
        if key in given:
            raise SettingError(f"dataset: {text!r}: {key} is given twice")
        if not (value.isascii() and value.isdecimal()):
            raise SettingError(f"dataset: {text!r}: {key} must be a whole number, not {value!r}")
        given[key] = int(value)
    return transformed(DATASETS[name], size=given.get("size"), channels=given.get("channels"))


def transformed(spec: DatasetSpec, *, size: int | None = None, channels: int | None = None) -> DatasetSpec:
    """``spec`` with its images resized to ``size`` x ``size`` (bicubic), and with ``channels``: 3 of a grey
    set repeats its one channel. What the images have already is not part of the name.

    Constants of a paper hold for every size, and are repeated with the channel. ``voc`` and ``cub`` resize
    every image anyway, so there ``size`` takes the place of their own. Raises `SettingError` for a size out
    of range, and for a conversion that is not there.
    """
    if spec.base_name != spec.name:
        raise SettingError(f"dataset: {spec.name} is transformed already: give size and channels together")
    depth, height, width = spec.shape
    if size is not None and not _SMALLEST <= size <= _LARGEST:
        raise SettingError(
            f"dataset: {spec.name}: size is a whole number from {_SMALLEST} to {_LARGEST}, not {size}"
        )
    if channels not in (None, 1, 3):
        raise SettingError(f"dataset: {spec.name}: channels is 1 or 3, not {channels}")
    if channels == 1 and depth == 3:
        raise SettingError(
            f"dataset: {spec.name}: channels=1: its images are RGB, and there is no one conversion to grey "
            "(the weights of the channels differ); only channels=3 of a grey data set is possible"
        )
    shape = (channels or depth, size or height, size or width)
    if shape == spec.shape:
        return spec
    parts = [f"channels={shape[0]}"] * (shape[0] != depth) + [f"size={size}"] * (shape[1:] != (height, width))
    repeat = shape[0] // depth if len(spec.mean) == depth else 1
    return replace(
        spec,
        name=f"{spec.name}({','.join(parts)})",
        shape=shape,
        native=() if spec.source in ("voc", "cub") else spec.shape,
        mean=spec.mean * repeat,
        std=spec.std * repeat,
    )


# ----------------------------------------------------------------------------------------- pools


IMAGENET = "imagenet"
"""The pool of one network that is not trained here: torchvision's AlexNet."""

POOL_FRACTION = 0.1
"""The part of its data that a pool leaves out as validation, with split_seed 0: the default of trials."""

SMOKE = "-smoke"
"""What the names of tiny sweeps and pools end with, which only try out the way."""


@dataclass(frozen=True)
class PoolSpec:
    """A pool of trained networks: ``train`` of them for distillation, ``heldout`` for evaluation alone.

    ``recipe`` is a hash over all that decides what one of them is. ``source_shape`` and ``classes`` are of
    the data they were trained on; 0 classes: the last layer is new for each data set (weights of
    ImageNet, ``weights`` is the file they were given in).
    """

    name: str
    source_dataset: str
    source_shape: tuple[int, int, int]
    classes: int
    network: str
    train: int
    heldout: int
    recipe: str
    weights: str = ""

    @property
    def known(self) -> bool:
        """Whether there are no networks of its kind to judge on."""
        return self.heldout == 0

    def identity(self) -> list[Any]:
        """What stands for this pool in a trial id: not its name, nor how many there are to judge on."""
        return [self.recipe, self.train]


# ---------------------------------------------------------------------------------------- trials


CHOICES: dict[str, tuple[str, ...]] = {
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

    def _check_attack(self) -> None:
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
        if source == own:
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

    @property
    def trial_id(self) -> str:
        """10 hex digits over the settings that differ from their defaults, and the spec version."""
        settings: dict[str, Any] = {"dataset": self.dataset.identity(), "spec_version": SPEC_VERSION}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "dataset" and value != item.default:
                settings[item.name] = value.identity() if isinstance(value, PoolSpec) else value
        text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

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


def _plain(value: DatasetSpec | PoolSpec) -> dict[str, Any]:
    """Its fields in types that JSON has; `_tuples` is the way back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(value).items()}


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


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

        A trial with a known network or a pool stays so only if its networks are the same: of another kind or
        law there are none but fresh ones. Raises `SettingError` if its set cannot be applied like this.
        """
        changes = {name: value for name, value in self.changes().items() if name != "inner_lr"}
        # Of distilling; it need not lie in these epochs.
        trial = replace(trial, window=None)
        fresh = replace(trial, init="random", pool=None, **changes)
        networks = [(spec.network, spec.init_law, spec.init_param) for spec in (trial, fresh)]
        drawn = trial.pool is not None and ("init_law" in changes or "init_param" in changes)
        return replace(trial, **changes) if networks[0] == networks[1] and not drawn else fresh


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
        the trial's seed), and the held-out networks (of its law, or of its pool) come under ``on_random``.
        A `Protocol` that is impossible for the trial has none (``plan`` refuses it, or says that it is left
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
