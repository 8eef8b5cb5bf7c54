"""The file of a pool: data and training of its networks. No torch: ``plan`` reads it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from ddsweep.bundled import bundled_names
from ddsweep.catalog import IMAGENET, INIT_LAWS, SMOKE, DatasetSpec, PoolSpec, parse_network
from ddsweep.catalog.numbers import real, whole
from ddsweep.data.weights import find_weights
from ddsweep.errors import DataError, ResultsError, SettingError
from ddsweep.paths import user_path
from ddsweep.pools.recipe import GROUP_SIZE, PoolRecipe
from ddsweep.results.layout import PoolDirectory
from ddsweep.results.parts import part_metadata
from ddsweep.spec.files import load_model
from ddsweep.spec.values import SECTION, Count, amount, folder_name, shown, word
from ddsweep.spec.yaml_text import yaml_of

__all__ = ["PoolFile", "check_pool", "is_trained", "listed", "load_pool", "pool_yaml", "resolve_pool"]


def _gpus(value: Any) -> float:
    """As for a trial: a part of one GPU, or whole GPUs."""
    if isinstance(value, dict):
        raise ValueError(f"{shown(value)} is not a number")
    return float(amount(value, shared=True))  # type: ignore[arg-type]


def _shipped(value: Any) -> Any:
    if isinstance(value, dict):
        raise ValueError(f"{shown(value)}: a pool has networks that ship with ddsweep, none of your own")
    return value


def _dataset(value: Any) -> Any:
    if not isinstance(value, str | dict):
        raise ValueError(f"{shown(value)} is neither the name of a data set nor a mapping of settings of one")
    return value


def _mapping(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{shown(value)} is not a mapping of settings to values")
    return value


class PoolFile(BaseModel):
    """A pool file. ``cpus`` and ``gpus`` are for each group of networks that are trained together;
    ``total_cpus`` and ``total_gpus`` limit all groups. None of the four changes a network."""

    model_config = SECTION

    name: str
    """of the pool, and of its folder"""
    dataset: Annotated[str | dict[str, Any], BeforeValidator(_dataset)]
    """as in a sweep file; networks are trained on its training part without validation"""
    network: Annotated[str, BeforeValidator(_shipped)]
    """as in a sweep file, but none of your own"""
    init_law: Annotated[str, BeforeValidator(lambda value: word(value, INIT_LAWS))] = "xavier"
    """law of their first weights"""
    init_param: Annotated[float, BeforeValidator(real), Field(gt=0, lt=math.inf)] = 1.0
    """p of the law"""
    train: Count
    """networks for distillation; validation scores and rates of baselines look at the first of them"""
    heldout: Count
    """networks for evaluation alone"""
    epochs: Count
    """times each network goes over all images of the training part, in an order of its own"""
    batch: Count = 1024
    """images a step"""
    lr: Annotated[float, BeforeValidator(real), Field(gt=0, lt=math.inf)]
    """rate of Adam (betas 0.5, 0.999)"""
    decay_epochs: Count
    """epochs between decays"""
    decay_factor: Annotated[float, BeforeValidator(real), Field(gt=0, le=1)] = 0.5
    """factor of a decay"""
    seed: Annotated[int, BeforeValidator(whole), Field(ge=0)] = 0
    """another seed is another pool"""
    group_size: Count = GROUP_SIZE
    """networks that are trained together"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """as in `resources`"""
    cpus: Annotated[float, BeforeValidator(real), Field(ge=0, lt=math.inf)] = 1.0
    """CPUs of a group"""
    gpus: Annotated[float, BeforeValidator(_gpus)] = 0.0
    """GPUs of a group, also a part of one"""
    total_cpus: Count | None = None
    """CPUs that may be used; none: all"""
    total_gpus: Annotated[float, BeforeValidator(real), Field(ge=0)] | None = None
    """GPUs that may be used; none: all"""
    smoke: Annotated[dict[str, Any], BeforeValidator(_mapping)] = {}
    """small values for `--smoke`"""

    @field_validator("name", mode="before")
    @classmethod
    def _name(cls, value: Any) -> str:
        name = folder_name(value, "networks")
        if name == IMAGENET or name.startswith(f"{IMAGENET}-"):
            raise ValueError(f"{name!r} is the pool of torchvision's AlexNet, which is not trained here")
        return name

    @model_validator(mode="after")
    def _smoke_by_name(self) -> PoolFile:
        if self.name.endswith(SMOKE) and not self.smoke:
            raise ValueError(f"name: {self.name!r}: only what --smoke makes may end in {SMOKE}")
        return self

    def recipe(self, resolve: Callable[[Any], DatasetSpec]) -> PoolRecipe:
        """Its recipe with the data set resolved. Raises `SettingError` if the network cannot take it."""
        dataset = resolve(self.dataset)
        given = {item.name: getattr(self, item.name) for item in fields(PoolRecipe)}
        network = str(parse_network(self.network, dataset.shape))
        return PoolRecipe(**{**given, "dataset": dataset, "network": network})


def load_pool(path: Path, overrides: Sequence[str] = (), *, smoke: bool = False) -> PoolFile:
    """The pool file ``path`` with ``key=value`` settings over it, or its small version for trying out.
    Raises `SettingError`, one message that names file, key, value and what is allowed."""
    return load_model(PoolFile, path, overrides, what="pool file", smoke=smoke)


def pool_yaml(pool: PoolFile) -> str:
    """``pool`` with every default written out; `load_pool` reads it back to an equal model."""
    return yaml_of(pool.model_dump())


def resolve_pool(
    value: str | Mapping[str, Any],
    pools: Path,
    resolve: Callable[[Any], DatasetSpec],
    files: Path | None = None,
) -> PoolSpec:
    """What ``pool:`` of a sweep file means: the name of a pool in the folder ``pools``, or ``imagenet``, or
    ``{name: imagenet, weights: FILE}``. A pool that was not begun is read from its file in the folder
    ``files``. Raises `SettingError` for anything else, `DataError` for a pool without a file."""
    if isinstance(value, Mapping):
        if set(value) != {"name", "weights"} or value["name"] != IMAGENET:
            raise SettingError(
                f"pool: {dict(value)!r} is not {{name: imagenet, weights: FILE}}; other pools go by name"
            )
        return _imagenet(user_path(str(value["weights"])))
    if value == IMAGENET:
        return _imagenet(None)
    if value == IMAGENET + SMOKE:
        return _alexnet(value, value)
    file = pools / value / "pool.yaml"
    tiny = None if files is None else files / f"{value.removesuffix(SMOKE)}.yaml"
    if value.endswith(SMOKE) and not file.is_file() and tiny is not None and tiny.is_file():
        return load_pool(tiny, smoke=True).recipe(resolve).spec(value)
    if not file.is_file() and files is not None and (files / f"{value}.yaml").is_file():
        return _named(files / f"{value}.yaml", value).recipe(resolve).spec(value)
    if not file.is_file():
        there = sorted(path.parent.name for path in pools.glob("*/pool.yaml"))
        known = f"; there are {', '.join(there)}" if there else ""
        which = value if value in bundled_names("pool file") else "FILE"
        raise DataError(
            f"pool: there is no pool {value!r} in {pools}{known}; `ddsweep pretrain {which}` makes it"
        )
    spec = load_pool(file).recipe(resolve).spec(value)
    counts = listed(PoolDirectory(file.parent))
    return spec if counts is None else replace(spec, heldout=counts[1])


def _named(file: Path, name: str) -> PoolFile:
    """The pool file ``file``. Raises `SettingError` if its pool has another name: then it lies elsewhere."""
    found = load_pool(file)
    if found.name != name:
        raise SettingError(
            f"pool: {name!r}: {file} has name: {found.name}, and `ddsweep pretrain` makes that pool; give "
            "the file and the pool one name"
        )
    return found


def listed(directory: PoolDirectory) -> tuple[int, int] | None:
    """The numbers of training and of held-out networks in the index of a pool; None if it has no whole one.
    While a whole pool grows, they are the earlier ones."""
    try:
        found = part_metadata(directory.index)
        return int(found["train"]), int(found["heldout"])
    except (ResultsError, KeyError):
        return None


def is_trained(spec: PoolSpec, pools: Path) -> bool:
    """Whether the pool ``spec`` in the folder ``pools`` has all of its networks, by its index. That of
    ImageNet is made when it is needed."""
    if not spec.classes:
        return True
    there = listed(PoolDirectory(pools / spec.name))
    return there is not None and there[0] >= spec.train and there[1] >= spec.heldout


def check_pool(spec: PoolSpec, pools: Path, data_root: Path | None) -> None:
    """Raises `DataError` for a pool that is not trained, or without its weights of ImageNet."""
    if not is_trained(spec, pools):
        raise DataError(
            f"pool {spec.name}: {pools / spec.name} is not there, or not finished: `ddsweep pretrain` with "
            "its file makes it, and goes on where it was"
        )
    if not spec.classes and not PoolDirectory(pools / spec.name).index.is_file():
        find_weights(Path(spec.weights) if spec.weights else None, data_root)


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise DataError(f"pool: weights file {path} cannot be read: {error.strerror or error}") from error


def _imagenet(weights: Path | None) -> PoolSpec:
    if weights is None:
        return _alexnet(IMAGENET, IMAGENET)
    recipe = _file_digest(weights)
    return _alexnet(f"{IMAGENET}-{recipe[:8]}", recipe, str(weights.resolve()))


def _alexnet(name: str, recipe: str, weights: str = "") -> PoolSpec:
    return PoolSpec(name, IMAGENET, (3, 224, 224), 0, "alexnet", 1, 0, recipe, weights)
