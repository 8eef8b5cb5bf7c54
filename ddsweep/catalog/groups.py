"""The settings that every method has, in groups; those of one method are in `ddsweep.catalog.methods`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddsweep.catalog.datasets import DatasetSpec, base_name
from ddsweep.catalog.networks import INIT_LAWS, parse_network, weights_key
from ddsweep.catalog.pools import POOL_FRACTION, PoolSpec
from ddsweep.catalog.setting import (
    BELOW_ONE,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    Limit,
    Setting,
    SettingsGroup,
    setting,
)
from ddsweep.errors import SettingError

if TYPE_CHECKING:
    from ddsweep.catalog.trials import TrialSpec

__all__ = [
    "AUGMENTATIONS",
    "MOST_WHITENED",
    "WHITENINGS",
    "General",
    "InnerSteps",
    "Networks",
    "OuterSteps",
    "Question",
    "Start",
    "Update",
    "Validation",
    "augmentation_parts",
    "suited_augmentation",
]

WHITENINGS = ("zca", "zca_pixels")
"""See `ddsweep.data.whitening`."""

MOST_WHITENED = 4096
"""An image of more values cannot be whitened: the matrix has their square."""

AUGMENTATIONS = ("shift", "rotate", "scale", "flip", "cutout")
"""The parts of an augmentation: one, or several joined by ``+``."""

DSA = ("color", "crop", "cutout", "flip", "scale", "rotate")
"""What ``dsa`` draws one of."""

_SQUARE = ("rotate", "cutout", "dsa")
"""Augmentations of square images alone."""

_NEVER_FLIPPED = ("digits", "mnist", "usps", "svhn")
"""Data sets with classes that change in a mirror, at any size and in any colour."""


def augmentation_parts(name: str, text: str, dataset: str = "") -> tuple[str, ...]:
    """The parts of setting ``name``, such as ``shift+rotate``; none for ``none``; for ``dsa`` that word and
    what it draws one of. Raises `SettingError`, also for a part that does not suit the images of
    ``dataset``."""
    if text == "none":
        return ()
    if text == "dsa":
        mirrors = base_name(dataset) not in _NEVER_FLIPPED
        return ("dsa", *(part for part in DSA if part != "flip" or mirrors))
    parts = text.split("+")
    for part in parts:
        if part not in AUGMENTATIONS:
            raise SettingError(
                f"{name}: {part!r} is not one of {', '.join(AUGMENTATIONS)} (several joined by +; dsa stands "
                "alone; or none)"
            )
    if len(set(parts)) < len(parts):
        raise SettingError(f"{name}: {text!r} names a part twice")
    if "flip" in parts and base_name(dataset) in _NEVER_FLIPPED:
        raise SettingError(f"{name}: {text!r}: {dataset} is not the same in a mirror; leave flip out")
    return tuple(parts)


def suited_augmentation(name: str, text: str, dataset: DatasetSpec) -> tuple[str, ...]:
    """`augmentation_parts` of setting ``name`` for images of ``dataset``. Raises `SettingError` also for a
    part that takes square images, where these are not."""
    parts, (_, height, width) = augmentation_parts(name, text, dataset.name), dataset.shape
    square = [part for part in text.split("+") if part in _SQUARE]
    if square and height != width:
        others = ", ".join(part for part in AUGMENTATIONS if part not in _SQUARE)
        raise SettingError(
            f"{name}: {text!r}: {square[0]} takes square images, and those of {dataset.name} are "
            f"{height}x{width}; allowed are {others} (several joined by +; or none)"
        )
    return parts


@dataclass(frozen=True)
class Question(SettingsGroup):
    """Data, network and objective"""

    dataset: DatasetSpec
    """`digits`, `mnist`, `fashion_mnist`, `usps`, `cifar10`, `cifar10-exact`, `svhn`, `voc2007`, `cub200`,
    also with transforms such as `usps(size=28)`, or a [mapping](#data-sets)"""
    network: str = "convnet"
    """`lenet` (28 or 32 px), `alexcifarnet` (32 px), `alexnet` (224 px), `convnet` or
    `convnet(depth=3,width=128,norm=instance)`; depth is 2 up to 16 px and 3 beyond; norm is `instance` or
    `none`; or [one of your own](networks.md), `{file: my_nets.py, name: SmallNet, width: 32}`"""
    objective: str = setting("classification", one_of=("classification", "attack"))
    """cross-entropy on real data after T steps; `attack`: the same with the labels `attack_class` rewritten
    to `target_class`"""
    attack_class: int | None = None
    """of an attack: the class whose images are to be called `target_class`"""
    target_class: int | None = None
    """of an attack: another class"""
    whitening: str = setting("none", one_of=("none", *WHITENINGS))
    """`zca`: all images are whitened by the training part (ZCA, epsilon 0.1); distilled images are whitened
    ones, and pictures show them as they would be without; `zca_pixels`: the same of pixels from 0 to 1 that
    were not normalised, a weaker whitening, as in the code of MTT, TESLA and DATM"""

    @staticmethod
    def check(trial: TrialSpec) -> None:
        _check_attack(trial)
        own = trial.network_spec.code
        if own is not None and trial.pool is not None:
            raise SettingError(f"pool: {trial.pool.name}: there are no pools of networks of your own: {own}")
        values = math.prod(trial.dataset.shape)
        if trial.whitening != "none" and values > MOST_WHITENED:
            raise SettingError(
                f"whitening: {trial.whitening} of {values} values an image takes a matrix too large; at most "
                f"{MOST_WHITENED} (32x32x3 are 3072)"
            )


def _check_attack(trial: TrialSpec) -> None:
    if trial.objective == "attack" and trial.method != "bptt":
        raise SettingError(f"method: {trial.method} has no objective: attack; only bptt has")
    pair = (trial.attack_class, trial.target_class)
    if trial.objective != "attack":
        for name, value in zip(("attack_class", "target_class"), pair, strict=True):
            if value is not None:
                raise SettingError(f"{name}: {value} is for objective: attack, not {trial.objective}")
        return
    last = trial.dataset.classes - 1
    for name, value in zip(("attack_class", "target_class"), pair, strict=True):
        if value is None:
            raise SettingError(f"{name}: objective: attack needs one; 0 to {last}")
        if not 0 <= value <= last:
            raise SettingError(f"{name}: {value} is not a class of {trial.dataset.name}: 0 to {last}")
    if trial.attack_class == trial.target_class:
        raise SettingError(
            f"target_class: {trial.target_class} is attack_class too; they must be different classes"
        )


@dataclass(frozen=True)
class Networks(SettingsGroup):
    """First weights"""

    init: str = setting("random", one_of=("fixed", "random", "pretrained"))
    """`random`: fresh networks at every outer step; `fixed`: one known network, number `seed` of its law, or
    of its pool; `pretrained`: trained networks, drawn from `pool` at every outer step"""
    pool: PoolSpec | None = None
    """the [pool](#pools) of trained networks; or `imagenet` (torchvision's AlexNet, one known network),
    `{name: imagenet, weights: FILE}`"""
    init_law: str = setting("xavier", one_of=INIT_LAWS)
    """`xavier`, `xavier_uniform`, `kaiming`, `kaiming_out`, `orthogonal`, `normal`, `default` (torch's
    own)"""
    init_param: float = setting(1.0, POSITIVE)
    """p of the law, as in Wang et al. 2018: gain of xavier and orthogonal, slope of kaiming (1 means gain 1),
    deviation of normal"""

    @staticmethod
    def check(trial: TrialSpec) -> None:
        """Whether the networks of ``pool`` are of this trial's kind and shape."""
        pool = trial.pool
        if pool is None:
            if trial.init == "pretrained":
                raise SettingError("pool: init: pretrained needs one: the name of a pool of trained networks")
            return
        if trial.init == "random":
            raise SettingError(
                f"pool: {pool.name}: init: random draws fresh networks; leave pool out, or give init: "
                "pretrained (or fixed, for one network of the pool)"
            )
        if trial.init == "pretrained" and pool.known:
            raise SettingError(
                f"pool: {pool.name} is one known network, with none of its kind to judge on; give init: fixed"
            )
        for name, default in (("init_law", "xavier"), ("init_param", 1.0)):
            if getattr(trial, name) != default:
                raise SettingError(
                    f"{name}: {getattr(trial, name)}: the networks are those of pool {pool.name}; leave it "
                    "out"
                )
        if trial.whitening != "none":
            raise SettingError(
                f"whitening: {trial.whitening}: the networks of pool {pool.name} were trained on images that "
                "are not whitened"
            )
        _check_split_of_pool(trial, pool)
        source = parse_network(pool.network, pool.source_shape)
        classes = pool.classes or trial.dataset.classes
        ours = weights_key(trial.network_spec, trial.dataset.shape, trial.dataset.classes)
        if ours != weights_key(source, pool.source_shape, classes):
            theirs, here = ("x".join(map(str, shape)) for shape in (pool.source_shape, trial.dataset.shape))
            raise SettingError(
                f"pool: {pool.name} has {pool.network} for {classes} classes of {theirs} images; "
                f"{trial.network} for the {trial.dataset.classes} classes of {here} images of "
                f"{trial.dataset.name} has other weights"
            )
        if trial.init == "pretrained" and trial.models_per_step > pool.train:
            raise SettingError(
                f"models_per_step: {trial.models_per_step} are more than the {pool.train} training networks "
                f"of pool {pool.name}"
            )
        if trial.init == "fixed" and trial.seed >= pool.train:
            raise SettingError(
                f"seed: {trial.seed}: a fixed trial takes training network number `seed` of its pool, and "
                f"{pool.name} has 0 to {pool.train - 1}"
            )


def _check_split_of_pool(trial: TrialSpec, pool: PoolSpec) -> None:
    """Test and validation images must not be training images of the pool."""
    source, own = base_name(pool.source_dataset), trial.dataset.base_name
    prints = (pool.source_fingerprint, trial.dataset.fingerprint)
    if prints[0] == prints[1] if any(prints) else source == own:
        if (trial.validation_fraction, trial.split_seed) != (POOL_FRACTION, 0):
            raise SettingError(
                f"validation_fraction and split_seed: pool {pool.name} was trained on {own} without its "
                f"validation images, those of fraction {POOL_FRACTION:g} and split_seed 0; give these"
            )
    elif {source, own} == {"cifar10", "cifar10-exact"}:
        raise SettingError(
            f"pool: {pool.name} was trained on {source}, which splits the same images otherwise than "
            f"{own}: its training images may be test images here; make a pool on {own}"
        )


@dataclass(frozen=True)
class InnerSteps(SettingsGroup):
    """Training steps on the distilled images"""

    images_per_class: int = setting(1, COUNT)
    """= S x m; give two of the three, or one: then S is 1, or m beside S"""
    inner_steps: int = setting(1, COUNT)
    """S: distinct batches of distilled images"""
    inner_epochs: int = setting(1, COUNT)
    """E: times the S batches are gone through; adds steps and rates, not images"""
    inner_optimizer: str = setting("gd", one_of=("gd", "momentum", "adam"))
    """of the inner steps: `gd`: plain gradient descent; `momentum`: heavy ball; `adam`: betas 0.9, 0.999"""
    inner_momentum: float = setting(0.9, BELOW_ONE)
    """momentum of `inner_optimizer: momentum`"""
    order: str = setting("fixed", one_of=("fixed", "shuffled", "sampled"))
    """`fixed`: step t uses batch t mod S; `shuffled`: every epoch the S batches in random order, each with
    its own rate; `sampled`: every step m random distilled images of each class; both for each network anew,
    and S must be at least 2"""

    derived = (Setting("images_per_class_per_step", "int", 1, COUNT),)

    @property
    def images_per_class_per_step(self) -> int:
        """m: images of each class in one of the S batches"""
        return self.images_per_class // self.inner_steps

    @property
    def steps(self) -> int:
        """T = S*E: gradient steps of one unroll."""
        return self.inner_steps * self.inner_epochs

    @staticmethod
    def check(trial: TrialSpec) -> None:
        if trial.images_per_class % trial.inner_steps:
            raise SettingError(
                f"images_per_class: {trial.images_per_class} does not divide into inner_steps "
                f"{trial.inner_steps}; images_per_class = inner_steps x images_per_class_per_step"
            )
        if trial.order != "fixed" and trial.inner_steps == 1:
            raise SettingError(
                f"order: {trial.order} needs inner_steps of at least 2: there is one batch, and so one order"
            )


_SET = re.compile(r"set@([0-9a-f]{12})")


def own_set(what: str, text: str) -> str | None:
    """The first 12 digits of the SHA-256 of the distilled set that ``text`` names, a value of the setting
    ``what``: ``set@`` and these digits; None for a text that does not begin so. Raises `SettingError` for
    another one that does."""
    if not text.startswith("set@"):
        return None
    if not (found := _SET.fullmatch(text)):
        raise SettingError(f"{what}: {text!r} is not the name of a set; in a sweep file, write {{set: FILE}}")
    return found[1]


@dataclass(frozen=True)
class Start(SettingsGroup):
    """The images at the start"""

    image_init: str = setting("noise", one_of=("noise", "real", "kmeans"), beside=own_set)
    """`noise`: N(0, 1) in normalised pixels; `real`: training images; `kmeans`: cluster centres of each
    class; or [a distilled set](guide.md#going-on-from-a-distilled-set), `{set: distilled.safetensors}`, with
    its labels and rates where they are learned (`inner_lr` is then of no effect)"""
    image_centre: bool = False
    """`true`: the mean of all start images is subtracted from each, so that only their differences remain"""
    image_scale: float = setting(1.0, POSITIVE)
    """factor on the start images, after `image_centre`"""

    @property
    def start_set(self) -> str | None:
        """The distilled set in which the trial begins: the first 12 digits of its SHA-256."""
        return own_set("image_init", self.image_init)


@dataclass(frozen=True)
class OuterSteps(SettingsGroup):
    """Outer steps: the gradient"""

    outer_steps: int = setting(400, COUNT)
    """updates of the distilled set"""
    models_per_step: int = setting(4, COUNT)
    """networks unrolled in one outer step; always 1 for `fixed`"""
    outer_augment: str = setting("none", check=augmentation_parts)
    """random changes of the real images in each outer step: `shift` (by up to 10 %), `rotate` (15 degrees),
    `scale` (15 %), `flip` (not for `digits`, `mnist`, `usps`, `svhn`), `cutout` (a square of 40 %), or
    several joined by `+`; or `dsa` alone: that of [Zhao & Bilen 2021](how_it_works.md#augmentations).
    `rotate`, `cutout` and `dsa` take square images"""
    on_nonfinite: str = setting("skip", one_of=("stop", "skip"))
    """a network whose loss or gradient is not finite (or longer than 1e18): `skip` leaves it out and counts
    it, `stop` ends the trial"""
    trim: float = setting(0.0, BELOW_ONE)
    """fraction of the networks of a step that is left out: those with the largest gradients; not for
    `init: fixed`"""
    clip_norm: float | None = setting(None, POSITIVE)
    """largest gradient norm of one network"""
    clip_median: float | None = setting(None, POSITIVE)
    """largest gradient norm of one network, as a multiple of the median over the networks of the step"""
    clip_running: float | None = setting(None, POSITIVE)
    """largest norm of the mean gradient, as a multiple of its running mean (decay 0.9)"""

    @staticmethod
    def check(trial: TrialSpec) -> None:
        suited_augmentation("outer_augment", trial.outer_augment, trial.dataset)
        if trial.trim and trial.init == "fixed":
            raise SettingError(f"trim: {trial.trim}: a fixed trial has one network, none can be left out")
        if trial.clip_norm is not None and trial.clip_median is not None:
            raise SettingError("clip_norm and clip_median exclude each other: give one of them")


LARGEST_GROWTH = 1e6
"""No schedule of the outer rate may lead to a greater multiple of it: long before the numbers end, nothing is
learned any more."""


@dataclass(frozen=True)
class Update(SettingsGroup):
    """Outer steps: the update, and what is handed over"""

    outer_lr: float = setting(0.01, POSITIVE)
    """rate of Adam on the images (betas 0.5, 0.999)"""
    outer_cutoff: float | None = setting(None, POSITIVE)
    """Adam works on the cosine transform of the images, and its step for frequency f (half-waves over the
    image) is divided by 1 + (f / `outer_cutoff`)^2; none: on pixels"""
    outer_schedule: str = setting("constant", one_of=("constant", "step", "cosine"))
    """`constant`, `step` or `cosine` (to zero)"""
    outer_decay_steps: int = setting(1000, COUNT)
    """outer steps between decays of `step`"""
    outer_decay_factor: float = setting(0.5, POSITIVE)
    """factor of a decay of `step`"""
    ema: float | None = setting(None, BELOW_ONE)
    """decay of a running mean of everything that is learned; the mean is validated and becomes the set. The
    decay is smaller in the first steps"""
    keep: str = setting("last", one_of=("last", "best"))
    """which state becomes the distilled set: the `last`, or the `best` by `val_score`"""
    max_rollbacks: int = setting(0, NOT_NEGATIVE)
    """how often a trial that diverges returns to its last healthy state (at a validation step with a finite
    network, or the start), at half the outer rate"""

    @staticmethod
    def check(trial: TrialSpec) -> None:
        decays = (trial.outer_steps - 1) // trial.outer_decay_steps
        if trial.outer_schedule != "step" or trial.outer_decay_factor <= 1:
            return
        if decays * math.log(trial.outer_decay_factor) > math.log(LARGEST_GROWTH):
            raise SettingError(
                f"outer_decay_factor: {trial.outer_decay_factor:g}: by outer step {trial.outer_steps}, after "
                f"{decays} of them, the outer rate would be more than {LARGEST_GROWTH:g} times as large; a "
                "factor below 1 lets it decay"
            )


@dataclass(frozen=True)
class Validation(SettingsGroup):
    """Validation"""

    validation_fraction: float = setting(0.1, Limit("must lie between 0 and 1", lambda value: 0 < value < 1))
    """fraction of the training data that is kept for validation, of each class"""
    split_seed: int = setting(0, SEED)
    """seed of the validation split"""
    selection_networks: int = setting(8, COUNT)
    """`val_score` is the mean over so many networks"""
    validate_every: int = setting(100, COUNT)
    """outer steps between validation scores; the last step always has one"""


@dataclass(frozen=True)
class General(SettingsGroup):
    """The trial as a whole"""

    dtype: str = setting("float32", one_of=("float32", "float64"))
    """`float32`, or `float64`. Products are taken in it on a GPU too, not in TF32 ([why](performance.md)).
    Sets are stored in float32, and networks are trained on them and judged in `dtype`"""
    seed: int = setting(0, SEED)
    """seed of everything in the trial, and the number of the known network of `fixed`"""
