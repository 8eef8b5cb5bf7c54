"""The sweep file: pydantic models of it (`model`), reading (`files`) and expansion into trials (`plan`).

Imports pydantic and yaml only, neither torch, ray nor pandas: ``plan`` must stay instant. Every mistake in a
file becomes one `SettingError` here, which names the file, the dotted key, the value and what is allowed.
"""

from ddsweep.spec.files import is_smoke, load_sweep, resolved_yaml, sweep_of
from ddsweep.spec.model import EvaluateSpec, ResourcesSpec, SweepSpec
from ddsweep.spec.plan import Plan, Proposed, Sample, Search, expand
from ddsweep.spec.published import PublishedSpec
from ddsweep.spec.scheduler import AshaSpec, check_strata, setting_of, settings_by_stratum
from ddsweep.spec.search import SearchSpec

__all__ = [
    "AshaSpec",
    "EvaluateSpec",
    "Plan",
    "Proposed",
    "PublishedSpec",
    "ResourcesSpec",
    "Sample",
    "Search",
    "SearchSpec",
    "SweepSpec",
    "check_strata",
    "expand",
    "is_smoke",
    "load_sweep",
    "resolved_yaml",
    "setting_of",
    "settings_by_stratum",
    "sweep_of",
]
