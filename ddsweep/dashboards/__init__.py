"""The Grafana dashboard that ddsweep ships, put where Ray's provisioning finds it; does not import Ray."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ddsweep.errors import UserError

__all__ = ["DASHBOARD", "OUTPUT_DIR", "provision"]

DASHBOARD = Path(__file__).with_name("ddsweep.json")

OUTPUT_DIR = "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"
"""Where a Ray head writes its own dashboards, and from where its Grafana settings load every JSON file."""


def provision(temporary: Path) -> dict[str, str]:
    """Lay ddsweep's dashboard where the head of a Ray, whose temporary folder this is, will put its own.

    Call it before the head starts; returns the environment variables to start the head with. A folder that
    the user has named in `OUTPUT_DIR` is kept. Raises `UserError` if it cannot be written.
    """
    chosen = os.environ.get(OUTPUT_DIR)
    folder = Path(chosen) if chosen else temporary / "dashboards"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(DASHBOARD, folder / DASHBOARD.name)
    except OSError as error:
        raise UserError(f"{OUTPUT_DIR}: {folder} cannot be written ({error.strerror})") from error
    return {OUTPUT_DIR: str(folder)}
