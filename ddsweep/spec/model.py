"""The pydantic models of a sweep file, and the id of an evaluation.

The invariant: only ``base``, ``grid``, ``points``, ``search`` and ``seeds`` decide what a trial is (its
id); ``scheduler`` decides which of them are stopped before their end; ``evaluate`` decides which rows
their evaluation has; ``resources`` changes none of it, and ``published`` stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from ddsweep.catalog import (
    BASELINE_EPOCHS,
    BASELINE_RATES,
    BASELINES,
    DATASETS,
    DEFAULT_BASELINES,
    PROTOCOLS,
    SETTINGS,
    SMOKE,
    EvaluationSpec,
    Protocol,
    TrialSpec,
    parse_dataset,
    parse_network,
)
from ddsweep.catalog.groups import own_set
from ddsweep.catalog.numbers import counted, real, whole
from ddsweep.errors import SettingError
from ddsweep.spec.protocols import protocols_of
from ddsweep.spec.published import PublishedSpec, one_or_several
from ddsweep.spec.scheduler import AshaSpec
from ddsweep.spec.search import SearchSpec
from ddsweep.spec.values import (
    MOST_TRIALS,
    SECTION,
    Count,
    Problem,
    amount,
    folder_name,
    positives,
    refuse,
    settings_of,
    shown,
    unknown,
    wholes,
    word,
    words_of,
)

POOLS = "pools"
"""The folder of trained networks, beside the results of sweeps."""

AUTO = "auto"
"""An amount that is measured when the sweep runs."""


def _measured_or(value: Any, shared: bool) -> float | dict[Any, Any] | str:
    return AUTO if value == AUTO else amount(value, shared=shared)


Cpus = Annotated[float | dict[Any, Any] | Literal["auto"], BeforeValidator(lambda v: _measured_or(v, False))]
Gpus = Annotated[float | dict[Any, Any] | Literal["auto"], BeforeValidator(lambda v: _measured_or(v, True))]


def _one_of(*allowed: str) -> BeforeValidator:
    return BeforeValidator(lambda value: word(value, allowed))


def _norm(value: Any) -> float:
    """The p of a distance."""
    number = math.inf if value == "inf" else real(value)
    if not number >= 1:
        raise ValueError(f"{value!r} must be at least 1; 1, 2, ..., or inf")
    return number


def _sorted_counts(value: Any) -> tuple[int, ...]:
    return tuple(sorted(wholes(value, 1)))


# ---------------------------------------------------------------------------------------- the model


class _Model(BaseModel):
    model_config = SECTION


class EvaluateSpec(_Model):
    """How distilled sets are judged. ``on_random`` applies to trials with ``init: fixed`` only; mappings in
    ``protocols`` become a `ddsweep.catalog.Protocol`."""

    networks: Count = EvaluationSpec.networks
    """held-out networks, the same for every trial"""
    shards: Count | None = None
    """Ray actors that compute them; none: one for each node and at least 2, or, with GPUs, [one for each
    GPU](#shards)"""
    group_size: Count = EvaluationSpec.group_size
    """networks computed together"""
    protocols: Annotated[
        tuple[str | dict[str, Any], ...], BeforeValidator(protocols_of), Field(min_length=1)
    ] = PROTOCOLS
    """`as_distilled` (always), `on_random` (random networks for `fixed` sets), and [mappings](#protocols) of
    `name` and some of `network`, `init_law`, `init_param`, `order`, `inner_optimizer`, `inner_lr`,
    `inner_epochs`, `weight_decay`, `inner_batch`, `inner_schedule`, `inner_decay_epochs`,
    `inner_decay_factor`, `inner_augment`"""
    baselines: Annotated[tuple[str, ...], words_of(BASELINES, short={"none": (), "all": BASELINES})] = (
        DEFAULT_BASELINES
    )
    """of `random_real`, `optimized_random`, `class_mean`, `kmeans`, `knn_random`, `knn_kmeans`; `none`;
    `all`"""
    rates: Annotated[tuple[float, ...], BeforeValidator(positives), Field(min_length=1)] = BASELINE_RATES
    """constant rates that are tried for a baseline"""
    epochs: Annotated[tuple[int, ...], BeforeValidator(_sorted_counts), Field(min_length=1)] = BASELINE_EPOCHS
    """numbers of epochs that are tried for a baseline's tuned variant, beside E: of the default those that
    make at most 100 steps; a list of your own is taken as it is"""
    candidates: Count = EvaluationSpec.candidates
    """draws of real images of which `optimized_random` is the best"""
    neighbours: Count = EvaluationSpec.neighbours
    """k of `knn_random` and `knn_kmeans`: the majority among the k nearest images; of classes with as many
    votes that of the nearest image; at most images_per_class x classes"""
    neighbour_norm: Annotated[float, BeforeValidator(_norm)] = EvaluationSpec.neighbour_norm
    """p of the distance between images, at least 1; `inf` for the largest difference"""
    inner_steps_beyond: Annotated[tuple[int, ...], BeforeValidator(lambda v: wholes(v, 1))] = ()
    """inner steps beyond T at which networks are tested too; the rates of the last epoch repeat"""
    gpus: Annotated[float, BeforeValidator(real), Field(ge=0, le=1)] | None = None
    """part of a GPU for each shard; none: 0.1 where trials use GPUs, else 0"""

    def spec(self) -> EvaluationSpec:
        """The settings that decide the rows. ``shards`` and ``gpus`` (of each shard) only decide where they
        are computed."""
        asked = {item.name: getattr(self, item.name) for item in fields(EvaluationSpec)}
        protocols = tuple(p if isinstance(p, str) else Protocol(**p) for p in self.protocols)
        return EvaluationSpec(**{**asked, "protocols": protocols})


def _gigabytes(value: Any) -> float | str | None:
    if value is None or value == "auto":
        return None if value is None else "auto"
    number = real(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{value!r} is neither auto, a positive number of GB, nor null (ask for none)")
    return number


def _switch(value: Any) -> str:
    """``auto``, ``on`` or ``off``; YAML 1.1 reads the last two as true and false."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return word(value, ("auto", "on", "off"))


def _cohort(value: Any) -> int | str:
    """``auto``, or a whole number from 1 on."""
    if value == AUTO:
        return AUTO
    number = whole(value)
    if number < 1:
        raise ValueError(f"{number} is less than 1; give auto, 1 for trials by themselves, or more")
    return number


class ResourcesSpec(_Model):
    """Where and how fast trials run. No setting here changes a trial's id or its rows.

    ``cpus``, ``gpus`` (a fraction of one GPU) and ``memory`` (GB; ``auto`` is the estimate) are per trial.
    The first two may be ``auto``; then `ddsweep.packing` measures them. ``checkpoint_every`` and
    ``log_every`` are in outer steps; ``max_failures`` is the number of retries of a trial.
    """

    cpus: Cpus = 1.0
    """CPUs of a trial; or by a setting: `{by: images_per_class, 1: 1, default: 2}`; or
    [`auto`](#resources-auto)"""
    gpus: Gpus = 0.0
    """GPUs of a trial; a fraction packs several on one, each with that part of its memory; or by a setting;
    or `auto`"""
    max_concurrent: Count | None = None
    """most trials at a time; in a job array, as many as `cpus` and `gpus` of a trial fit a node"""
    cohort: Annotated[int | Literal["auto"], BeforeValidator(_cohort)] = "auto"
    """most trials of one shape that are [distilled together](#cohorts) in one process: `auto`, 1 for each by
    itself, or a number"""
    device: Annotated[Literal["auto", "cpu", "cuda"], _one_of("auto", "cpu", "cuda")] = "auto"
    """`auto`: CUDA if a GPU was granted; `cpu`; `cuda`"""
    memory_mode: Annotated[Literal["auto", "store", "recompute"], _one_of("auto", "store", "recompute")] = (
        "auto"
    )
    """`store`, or `recompute`: less memory, more time; `auto` recomputes where storing would take more than 2
    GB"""
    segment: Count | None = None
    """`recompute` keeps the weights of every so many steps; none: of as many as take the least memory"""
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    """`on` compiles each inner step, the way back through it and the pass over real images with
    `torch.compile`; `off`; `auto` is [a static rule on the work ahead](#compile-auto). Unless it is `off`,
    the test passes of LeNet on the CPU are compiled as well"""
    memory: Annotated[float | str | None, BeforeValidator(_gigabytes)] = "auto"
    """GB of the machine that a trial asks Ray for, so that it gets no more trials than fit: `auto` is the
    estimate of `plan` and 1 GB for the process, on a GPU at most 4 GB; `null` asks for none. A job array does
    not look at it"""
    threads: Count | None = None
    """CPU threads of a trial: each computes a part of the networks, and a single network (`fixed`) uses all;
    none: as many as `cpus`"""
    total_cpus: Count | None = None
    """CPUs that Ray may use here; none: all"""
    total_gpus: Annotated[float, BeforeValidator(real), Field(ge=0)] | None = None
    """GPUs that Ray may use here; none: all"""
    max_failures: Annotated[int, BeforeValidator(whole), Field(ge=0)] = 3
    """how often a trial is tried again after its worker died, with growing waits, over three minutes; deaths
    before its last checkpoint do not count"""
    checkpoint_every: Count = 50
    """outer steps between checkpoints"""
    log_every: Count = 10
    """outer steps between rows of `history`"""
    dashboard: Annotated[bool, Field(strict=True)] = True
    """Ray's dashboard, on loopback"""

    def for_trial(self, trial: TrialSpec) -> tuple[float, float]:
        """(CPUs, GPUs) of ``trial``; the defaults as long as they are not measured. Raises `SettingError` if
        a mapping has no entry for it."""
        return _amount_of("cpus", self.cpus, trial), _amount_of("gpus", self.gpus, trial)

    @property
    def to_be_measured(self) -> bool:
        return AUTO in (self.cpus, self.gpus)

    def idle_gpus(self, trials: Sequence[TrialSpec], there: float) -> str | None:
        """What to say where so many GPUs are and none of ``trials`` asks for one; else None."""
        if not trials or there < 1 or self.device == "cpu" or self.to_be_measured:
            return None
        if any(self.for_trial(trial)[1] for trial in trials):
            return None
        return (
            f"{counted(int(there), 'GPU')} here, and no trial asks for one, so trials run on the CPU: "
            "resources.gpus=0.25 packs four on a GPU, resources=auto measures how many pay"
        )

    @model_validator(mode="after")
    def _auto(self) -> ResourcesSpec:
        if self.cpus == AUTO and self.gpus not in (AUTO, 0.0):
            raise ValueError("cpus: auto is measured together with gpus; give a number, or gpus: auto too")
        return self


def _amount_of(key: str, amount: float | dict[Any, Any] | str, trial: TrialSpec) -> float:
    if isinstance(amount, str):
        return {"cpus": 1.0, "gpus": 0.0}[key]
    if not isinstance(amount, dict):
        return amount
    by = amount["by"]
    value = trial.dataset.name if by == "dataset" else getattr(trial, by)
    if by == "pool":
        value = trial.pool.name if trial.pool else None
    for entry, number in amount.items():
        if entry in ("by", "default"):
            continue
        if by == "network":
            # A trial has the full name of its network, such as convnet(depth=2,width=128,norm=instance).
            try:
                entry = str(parse_network(entry, trial.dataset.shape))  # noqa: PLW2901
            except SettingError:
                continue
        elif by == "dataset":
            with suppress(SettingError):  # for an inline data set: its given name
                entry = parse_dataset(str(entry)).name  # noqa: PLW2901
        if entry == value:
            return float(number)
    if "default" not in amount:
        raise SettingError(f"resources.{key}: no entry for {by}: {value}; add one, or `default: NUMBER`")
    return float(amount["default"])


def spelled_out(raw: dict[Any, Any]) -> dict[Any, Any]:
    """A sweep file with the section that ``resources: auto`` stands for."""
    return {**raw, "resources": {"cpus": AUTO, "gpus": AUTO}} if raw.get("resources") == AUTO else raw


class SweepSpec(_Model):
    """A sweep file. Every point of ``points``, every combination of ``grid``, every sample of ``search``
    and all ``seeds`` are crossed with each other."""

    def datasets(self) -> list[str | dict[str, Any]]:
        """The values of ``dataset`` anywhere in the file, each once."""
        return self._values("dataset")

    def start_sets(self) -> list[str]:
        """The sets in which trials begin, by their hashes, named anywhere in the file."""
        named = [own_set("image_init", value) for value in self._values("image_init")]
        return [digest for digest in named if digest is not None]

    def _values(self, name: str) -> list[Any]:
        searched: dict[str, Any] = self.search.space.get(name, {}) if self.search else {}
        values = [settings.get(name) for settings in (self.base, *self.points)]
        values += [*self.grid.get(name, []), *searched.get("choice", [])]
        return list({repr(value): value for value in values if value}.values())

    name: str
    """of the sweep, and of its folder of results"""
    base: dict[str, Any] = {}
    """settings of every trial"""
    grid: dict[str, list[Any]] = {}
    """lists of values for settings; every combination is a trial"""
    points: tuple[dict[str, Any], ...] = ()
    """a list of mappings of settings, crossed with `grid` and `seeds`"""
    search: SearchSpec | None = None
    """settings drawn at random or proposed from scores, crossed with `grid` and `points`"""
    seeds: tuple[int, ...] = (0,)
    """a number, such as 3 for 0, 1, 2, or a list; every combination runs with each seed"""
    scheduler: AshaSpec | None = None
    """ends trials with poor settings early"""
    evaluate: EvaluateSpec = EvaluateSpec()
    """how distilled sets are judged"""
    resources: ResourcesSpec = ResourcesSpec()
    """where and how fast trials run; changes no result"""
    skip_invalid: Annotated[bool, Field(strict=True)] = False
    """`true`: impossible combinations are left out, and `plan` counts them"""
    smoke: dict[str, Any] = {}
    """small values, with which `--smoke` tries the file out"""
    published: Annotated[tuple[PublishedSpec, ...], BeforeValidator(one_or_several)] = ()
    """numbers of papers, which the report shows beside those of the sweep"""

    @field_validator("name", mode="before")
    @classmethod
    def _name(cls, value: Any) -> str:
        name = folder_name(value, "results")
        if name == POOLS:
            raise ValueError(f"{name!r} is the folder of trained networks beside the results of sweeps")
        return name

    @field_validator("resources", mode="before")
    @classmethod
    def _resources(cls, value: Any) -> Any:
        return spelled_out({"resources": value})["resources"]

    @field_validator("base", mode="before")
    @classmethod
    def _base(cls, value: Any) -> dict[str, Any]:
        problems: list[Problem] = []
        out = settings_of(value, "base", problems)
        refuse(problems)
        return out

    @field_validator("grid", mode="before")
    @classmethod
    def _grid(cls, value: Any) -> dict[str, list[Any]]:
        if not isinstance(value, dict) or not value:
            raise ValueError(
                f"{shown(value)} is not a mapping of settings to lists; leave `grid` out for none"
            )
        problems: list[Problem] = []
        out: dict[str, list[Any]] = {}
        for key, values in value.items():
            if key not in SETTINGS:
                problems.append((f"grid.{key}", unknown(key, SETTINGS)))
            elif not isinstance(values, list) or not values:
                what = "is empty" if values == [] else f"{shown(values)} is not a list"
                problems.append((f"grid.{key}", f"{what}; a grid axis is a list of at least one value"))
            else:
                for place, item in enumerate(values):
                    found: list[Problem] = []
                    typed = settings_of({key: item}, "grid", found)
                    problems += [(f"{where}[{place}]", what) for where, what in found]
                    out.setdefault(key, []).extend(typed.values())
        refuse(problems)
        return out

    @field_validator("points", mode="before")
    @classmethod
    def _points(cls, value: Any) -> tuple[dict[str, Any], ...]:
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(
                f"{shown(value)} is not a list of at least one point; leave `points` out for none"
            )
        problems: list[Problem] = []
        out = tuple(settings_of(point, f"points[{place}]", problems) for place, point in enumerate(value))
        refuse(problems)
        return out

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> tuple[int, ...]:
        if isinstance(value, list | tuple):
            if not value:
                raise ValueError("is empty; give a number of seeds or a list of at least one")
            return wholes(value, 0)
        count = whole(value)
        if not 1 <= count <= MOST_TRIALS:
            raise ValueError(f"{count}: the number of seeds must lie between 1 and {MOST_TRIALS}")
        return tuple(range(count))

    @field_validator("scheduler", mode="after")
    @classmethod
    def _scheduler(cls, value: AshaSpec | None, info: ValidationInfo) -> AshaSpec | None:
        return None if value is None else value.with_grid(info.data.get("grid", {}))

    @model_validator(mode="after")
    def _whole_file(self) -> SweepSpec:
        if self.name.endswith(SMOKE) and not self.smoke:
            raise ValueError(f"name: {self.name!r}: only what --smoke makes may end in {SMOKE}")
        searched = self.search.space.keys() if self.search else set()
        for key in searched:
            homes = ["grid"] if key in self.grid else []
            homes += [f"points[{i}]" for i, point in enumerate(self.points) if key in point]
            if homes:
                raise ValueError(f"search.space.{key}: also given in {homes[0]}; give it in one of the two")
        everywhere = self.base.keys() | self.grid.keys() | searched
        lacking = [f"points[{i}]" for i, point in enumerate(self.points) if "dataset" not in point]
        if "dataset" not in everywhere and (lacking or not self.points):
            place = f" ({lacking[0]} has none)" if lacking else ""
            raise ValueError(f"base.dataset: is required{place}: {', '.join(DATASETS)}, ...")
        if self.seeds != (0,) and "seed" in everywhere.union(*self.points):
            raise ValueError("seeds: the seed is also given as a setting (`seed`); give one of the two")
        return self
