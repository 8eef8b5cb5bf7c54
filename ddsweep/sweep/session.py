"""One Ray, started for one sweep or joined: quiet, on loopback, with a token, and gone afterwards."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from ddsweep.errors import UserError

__all__ = ["RaySession", "ray_session"]

_LONGEST_TEMPORARY = 43
"""Ray puts Unix sockets some 64 characters below its folder, and their paths end at 107."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative data and results folders keep their meaning
    "RAY_AIR_NEW_OUTPUT": "0",  # the older output has a mode without any
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 starves trials beside whatever else the machine does
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a worker that was granted no GPU sees none
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the runner drains instead
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # all of its state anew each time, and it is never read back
    "TUNE_MAX_PENDING_TRIALS_PG": "200",  # Tune's own number on a large cluster is that of its CPUs
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "1000",
}


@dataclass(frozen=True)
class RaySession:
    """``dashboard`` is its address or empty, ``token`` the file that holds the token to log in with;
    ``memory`` is in bytes."""

    dashboard: str
    token: Path | None
    cpus: float
    gpus: float
    memory: float


@contextmanager
def ray_session(
    *, address: str | None, cpus: int | None, gpus: float | None, dashboard: bool
) -> Iterator[RaySession]:
    """A local Ray of ``cpus`` and ``gpus`` (all there are if None), or the cluster at ``address``.

    Raises `UserError` if it cannot be started or reached.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address is None:
        # An address in the environment would quietly send the sweep to another cluster.
        os.environ.pop("RAY_ADDRESS", None)
        temporary = _temporary_folder()
        token = _use_token(temporary)
        options = {
            "address": "local",
            "num_cpus": cpus,
            "num_gpus": gpus,
            "include_dashboard": dashboard,
            "dashboard_host": "127.0.0.1",
            "_temp_dir": str(temporary),
        }
    else:
        temporary, token = None, None
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        options = {"address": address}
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the outcome of trials is told by ddsweep
    try:
        context = ray.init(
            log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options
        )
    except Exception as error:  # Ray raises ConnectionError, ValueError, RuntimeError, ...
        raise UserError(f"Ray {ray.__version__} did not start: {' '.join(str(error).split())}") from error
    try:
        resources = ray.cluster_resources()
        url = context.dashboard_url
        yield RaySession(
            dashboard=f"http://{url}" if url else "",
            token=token,
            cpus=resources.get("CPU", 0.0),
            gpus=resources.get("GPU", 0.0),
            memory=resources.get("memory", 0.0),
        )
    finally:
        ray.shutdown()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _temporary_folder() -> Path:
    """A private folder with a short name, of this run alone: users cannot share Ray's default one."""
    for base in (tempfile.gettempdir(), "/tmp"):
        if len(base) + len("/dds-12345678") <= _LONGEST_TEMPORARY and os.access(base, os.W_OK):
            return Path(tempfile.mkdtemp(prefix="dds-", dir=base))
    raise UserError(
        f"no temporary folder with a path of at most {_LONGEST_TEMPORARY - 13} characters can be written: "
        "set TMPDIR to one (Ray keeps its sockets there)"
    )


def _use_token(folder: Path) -> Path:
    """A fresh token of mode 600, and Ray told to ask for it. Set explicitly: Ray's own defaults turn it
    on in some of its processes only."""
    path = folder / "token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    os.environ.pop("RAY_AUTH_TOKEN", None)
    # Ray read its configuration when it was imported, and keeps the last token: both are read again.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    return path
