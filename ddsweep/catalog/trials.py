"""`TrialSpec`: the science settings of one distillation, and its id."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from ddsweep.catalog.datasets import DatasetSpec, as_in_catalog
from ddsweep.catalog.groups import (
    General,
    InnerSteps,
    Networks,
    OuterSteps,
    Question,
    Start,
    Update,
    Validation,
)
from ddsweep.catalog.methods import SettingsOfMethods, find_method
from ddsweep.catalog.networks import NetworkSpec, parse_network
from ddsweep.catalog.own_code import CodeRef, is_code, parse_code
from ddsweep.catalog.pools import PoolSpec
from ddsweep.catalog.removed import without_removed
from ddsweep.catalog.setting import Setting, SettingsGroup, settings_in

__all__ = ["GROUPS", "SETTINGS", "SPEC_VERSION", "TrialSpec"]

SPEC_VERSION = 1
"""Raised only when the meaning of a setting changes: it enters every trial id."""


@dataclass(frozen=True)
class TrialSpec(  # the last one comes first, as dataclasses collect fields
    General, Validation, Update, OuterSteps, Start, InnerSteps, SettingsOfMethods, Networks, Question
):
    """The science settings of one distillation: they decide the images.

    Notation of Wang et al. 2018: ``inner_steps`` S, ``inner_epochs`` E, ``images_per_class_per_step``
    m, T = S*E gradient steps, S*m*classes synthetic images. Where and how fast a trial runs is not
    here, so moving it changes no id. Settings are declared in groups (`ddsweep.catalog.groups`,
    `ddsweep.catalog.methods`), and each is an attribute.

    The constructor raises `SettingError` for impossible settings, naming the setting, its value and what is
    allowed. It writes ``network`` in full, and ``models_per_step`` of a ``fixed`` trial as 1, because there
    is one known network (number ``seed`` of its law).
    """

    def __post_init__(self) -> None:
        for item in fields(self):
            SETTINGS[item.name].refuse(getattr(self, item.name))
        # 1 and 1.0 are one setting, and the seeds of networks are drawn from its text.
        object.__setattr__(self, "init_param", float(self.init_param))
        if self.init == "fixed":
            object.__setattr__(self, "models_per_step", 1)
        object.__setattr__(self, "network", str(parse_network(self.network, self.dataset.shape)))
        for group in GROUPS:
            group.check(self)

    @property
    def lacks(self) -> frozenset[str]:
        """The settings that the trial's method lacks."""
        return find_method(self.method).lacks

    @property
    def method_code(self) -> CodeRef | None:
        """The code of a user's own method."""
        return parse_code(self.method, "method") if is_code(self.method) else None

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
        dataset = as_in_catalog(DatasetSpec(**_tuples(values["dataset"])))
        pool = values.get("pool") and PoolSpec(**_tuples(values["pool"]))
        kept = without_removed("trial", values, [item.name for item in fields(cls)])
        return cls(**{**kept, "dataset": dataset, "pool": pool})


_SINCE_0_2 = ("image_column", "label_column", "first_label", "source_fingerprint")


def _plain(value: DatasetSpec | PoolSpec) -> dict[str, Any]:
    """Its fields in JSON types; `_tuples` is the way back. Findings in files are left out, and so are
    settings of reading at their defaults."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(value).items()}
    return {k: v for k, v in plain.items() if k != "survey" and (v or k not in _SINCE_0_2)}


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


GROUPS: tuple[type[SettingsGroup], ...] = tuple(
    group for group in reversed(TrialSpec.__mro__) if group.__bases__ == (SettingsGroup,)
)
"""The groups of settings, in the order of the documents."""

SETTINGS: dict[str, Setting] = {item.name: item for group in GROUPS for item in settings_in(group)}
"""Every setting by name: the settings for ``base``, ``grid``, ``points`` and ``search`` of a sweep file."""
