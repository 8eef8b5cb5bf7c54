"""The catalog: networks with the sizes they take, data sets, init laws, and `TrialSpec`.

Imports neither torch nor anything heavy, so that ``ddsweep plan`` and ``--help`` stay instant.
The names here are the vocabulary of sweep files and of the result tables.
"""

from __future__ import annotations

from ddsweep.catalog.datasets import (
    DATASETS,
    DatasetSpec,
    base_name,
    parse_dataset,
    transformed,
    transforms_of,
)
from ddsweep.catalog.evaluation import (
    BASELINE_EPOCHS,
    BASELINE_RATES,
    BASELINES,
    DEFAULT_BASELINES,
    MAX_TUNED_STEPS,
    NEIGHBOUR_BASELINES,
    PROTOCOLS,
    SELECTION_IMAGES,
    SELECTION_NETWORKS,
    EvaluationSpec,
    EvalUnit,
    Protocol,
    epoch_grid,
    steps_per_epoch,
)
from ddsweep.catalog.groups import augmentation_parts, suited_augmentation
from ddsweep.catalog.measures import Measure, layers_of, measure_of
from ddsweep.catalog.methods import DEFAULT_METHOD, METHODS, find_method
from ddsweep.catalog.networks import (
    INIT_LAWS,
    NETWORKS,
    NORMS,
    NetworkSpec,
    parse_network,
)
from ddsweep.catalog.own_code import CodeRef, is_code, parse_code
from ddsweep.catalog.pools import IMAGENET, POOL_FRACTION, SMOKE, PoolSpec
from ddsweep.catalog.setting import SEED, SettingsGroup, settings_in
from ddsweep.catalog.sources import SOURCES
from ddsweep.catalog.survey import MOST_EXAMPLES, Remark, Survey
from ddsweep.catalog.trials import GROUPS, SETTINGS, SPEC_VERSION, TrialSpec

__all__ = [
    "BASELINES",
    "BASELINE_EPOCHS",
    "BASELINE_RATES",
    "DATASETS",
    "DEFAULT_BASELINES",
    "DEFAULT_METHOD",
    "GROUPS",
    "IMAGENET",
    "INIT_LAWS",
    "MAX_TUNED_STEPS",
    "METHODS",
    "MOST_EXAMPLES",
    "NEIGHBOUR_BASELINES",
    "NETWORKS",
    "NORMS",
    "POOL_FRACTION",
    "PROTOCOLS",
    "SEED",
    "SELECTION_IMAGES",
    "SELECTION_NETWORKS",
    "SETTINGS",
    "SMOKE",
    "SOURCES",
    "SPEC_VERSION",
    "CodeRef",
    "DatasetSpec",
    "EvalUnit",
    "EvaluationSpec",
    "Measure",
    "NetworkSpec",
    "PoolSpec",
    "Protocol",
    "Remark",
    "SettingsGroup",
    "Survey",
    "TrialSpec",
    "augmentation_parts",
    "base_name",
    "epoch_grid",
    "find_method",
    "is_code",
    "layers_of",
    "measure_of",
    "parse_code",
    "parse_dataset",
    "parse_network",
    "settings_in",
    "steps_per_epoch",
    "suited_augmentation",
    "transformed",
    "transforms_of",
]
