"""Methods by name, and which settings of a trial each of them has."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["METHODS", "MethodSpec"]


@dataclass(frozen=True)
class MethodSpec:
    """One method: what it does in a line, and the settings of a trial that mean nothing to it.

    Those are outside the ids of its trials, and null in its rows.
    """

    name: str
    summary: str
    lacks: frozenset[str]


_UNROLLED = frozenset(
    {
        *("inner_lr", "inner_lr_mode", "inner_augment", "window", "labels", "real_batch", "real_batch_mode"),
        *("outer_lr_rates", "outer_lr_labels", "rate_limit"),
    }
)
"""What only a method has that goes through training steps of its own."""

_MATCHED = frozenset({"real_per_class"})

METHODS: dict[str, MethodSpec] = {
    spec.name: spec
    for spec in (
        MethodSpec("bptt", "gradients through training steps (Wang et al. 2018)", _MATCHED),
        MethodSpec("distribution_matching", "mean features of classes (Zhao and Bilen 2023)", _UNROLLED),
    )
}
