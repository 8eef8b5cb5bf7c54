"""Methods by name, and the settings that each of them has for itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ddsweep.catalog.groups import augmentation_parts, suited_augmentation
from ddsweep.catalog.own_code import own_code
from ddsweep.catalog.setting import COUNT, POSITIVE, Limit, SettingsGroup, setting, settings_in
from ddsweep.errors import SettingError

if TYPE_CHECKING:
    from ddsweep.catalog.trials import TrialSpec

__all__ = ["DEFAULT_METHOD", "METHODS", "MethodSpec", "SettingsOfMethods", "find_method"]


@dataclass(frozen=True)
class Unrolled(SettingsGroup):
    """Of `bptt`: training steps of its own"""

    inner_lr: float = setting(0.02, POSITIVE)
    """every learned rate at the start"""
    inner_lr_mode: str = setting("per_step", one_of=("per_step", "shared", "fixed"))
    """`per_step`: T learned rates; `shared`: one; `fixed`: not learned"""
    window: int | None = setting(
        None, Limit("must lie between 1 and T = inner_steps x inner_epochs", lambda value: value >= 1)
    )
    """number of inner steps that the gradient goes through, at a random place in T; the outer loss is taken
    after them"""
    inner_augment: str = setting("none", check=augmentation_parts)
    """the changes of `outer_augment`, of the distilled images, in each inner step"""
    real_batch: int = setting(1024, COUNT)
    """real images in one outer step"""
    real_batch_mode: str = setting("shared", one_of=("shared", "per_network"))
    """`shared` by the networks of a step, or `per_network`"""
    outer_lr_rates: float | None = setting(None, POSITIVE)
    """`outer_lr` of the raw inner rates; none: that of the images"""
    outer_lr_labels: float | None = setting(None, POSITIVE)
    """`outer_lr` of soft labels; none: that of the images"""
    rate_limit: float = setting(100.0, POSITIVE)
    """with `max_rollbacks`: a rate beyond it counts as diverged"""

    @staticmethod
    def check(trial: TrialSpec) -> None:
        suited_augmentation("inner_augment", trial.inner_augment, trial.dataset)
        if trial.window is not None and trial.window > trial.steps:
            raise SettingError(
                f"window: {trial.window} must lie between 1 and T = inner_steps x inner_epochs = "
                f"{trial.steps}"
            )


@dataclass(frozen=True)
class Labelled(SettingsGroup):
    """Of `bptt` and `given`"""

    labels: str = setting("hard", one_of=("hard", "soft"))
    """`hard`: classes; `soft`: class probabilities, which may be negative and need not add up to 1. `bptt`
    learns them; `given` takes those of the start set"""


@dataclass(frozen=True)
class Matched(SettingsGroup):
    """Of `distribution_matching`"""

    real_per_class: int = setting(256, COUNT)
    """real images of each class in one outer step. The step draws one `outer_augment`, for these and for the
    distilled images"""


@dataclass(frozen=True)
class MethodSpec:
    """A method, and its own groups of settings; two methods may share one.

    Settings that only other methods declare are outside the ids of its trials, and null in their rows.
    """

    name: str
    groups: tuple[type[SettingsGroup], ...]

    @cached_property
    def lacks(self) -> frozenset[str]:
        """The settings that it lacks."""
        return _names(*METHODS.values()) - _names(self)


def _names(*methods: MethodSpec) -> frozenset[str]:
    return frozenset(
        item.name for method in methods for group in method.groups for item in settings_in(group)
    )


METHODS: dict[str, MethodSpec] = {
    spec.name: spec
    for spec in (
        MethodSpec("bptt", (Unrolled, Labelled)),
        MethodSpec("distribution_matching", (Matched,)),
        MethodSpec("given", (Labelled,)),
    )
}
DEFAULT_METHOD = "bptt"


def find_method(name: str) -> MethodSpec:
    """The method of that name. One of a user's own code has none of the settings of the others: the options
    that it is made with are its own."""
    return METHODS[name] if name in METHODS else MethodSpec(name, ())


@dataclass(frozen=True)
class MethodSetting(SettingsGroup):
    """The method"""

    method: str = setting(DEFAULT_METHOD, one_of=tuple(METHODS), beside=own_code)
    """what makes the images: `bptt`, by the gradient through T training steps (Wang et al. 2018);
    `distribution_matching`, by the mean features of each class in networks that are not trained (Zhao and
    Bilen 2023); `given`: none, the start as it is, to judge [sets that others made](published_sets.md); or
    [your own](methods.md), `{file: my_methods.py, name: MyMethod}`"""


@dataclass(frozen=True)
class SettingsOfMethods(Matched, Labelled, Unrolled, MethodSetting):
    """The method, and the settings of all methods; the last base comes first."""
