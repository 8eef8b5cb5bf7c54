"""The words that a shell offers for completion (`ddsweep --install-completion`). No torch, no Ray."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["data_sets", "names_of_settings", "overrides", "trials"]


def overrides(incomplete: str) -> list[str]:
    """``outer_steps=``, ``evaluate.networks=``, ...: what may stand before the value of an override."""
    from ddsweep.launch.site import Site
    from ddsweep.report.settings_page import override_keys

    return [f"{key}=" for key in override_keys({"site": Site}) if key.startswith(incomplete)]


def names_of_settings(incomplete: str) -> list[str]:
    """The arguments of `ddsweep settings`."""
    from ddsweep.launch.site import Site
    from ddsweep.report.settings_page import names_of_settings as names

    return [name for name in names({"site": Site}) if name.startswith(incomplete)]


def trials(incomplete: str) -> list[str]:
    """Ids of trials with files in the folder of results of this shell."""
    root = Path(os.environ.get("DDSWEEP_RESULTS") or "results").expanduser()
    return sorted({path.name for path in root.glob(f"*/artifacts/{incomplete}*") if path.is_dir()})


def data_sets(incomplete: str) -> list[str]:
    """Data sets of the catalog."""
    from ddsweep.catalog import DATASETS

    return [name for name in DATASETS if name.startswith(incomplete)]
