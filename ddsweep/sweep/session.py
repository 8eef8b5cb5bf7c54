"""One Ray, started for one sweep or joined: quiet, closed by a token, and ended afterwards."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.job_config import JobConfig

from ddsweep.dashboards import provision
from ddsweep.errors import UserError
from ddsweep.interpreter import SAFE_PATH
from ddsweep.machine import limits_trouble, object_store_bytes
from ddsweep.private import private_folder, remove_folder, write_secret
from ddsweep.processes import MARK, kill_marked, kill_with_children
from ddsweep.sweep.drain import Drain, out_of_reach
from ddsweep.sweep.join import find_ray, is_silent, read_token_again, use_its_token

__all__ = ["Node", "RaySession", "nodes_alive", "ray_session"]

_LONGEST_BASE = 43 - len("/dds-12345678/ray")
"""Ray puts Unix sockets some 64 characters below its folder, and their paths end at 107."""

_KEPT_BYTES = 2**20
"""The part of a node's memory for actors that ask for a byte. Ray ignores the node of an actor that asks for
nothing."""

_RAY_FOLDER = "ray"
"""Beside Ray's own folder, in the private one: Ray lets everybody write into its own, where the token would
not be safe."""

_LOOK_S = 1.0
_SILENCE_S = 30.0

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative data and results folders keep their meaning
    "RAY_AIR_NEW_OUTPUT": "0",  # only the older output can be silenced
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 starves trials beside other programs
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a worker that was granted no GPU sees none
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the runner drains instead
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # it would write its whole state, which nothing reads
    "TUNE_MAX_PENDING_TRIALS_PG": "200",  # Tune's own number on a large cluster is that of its CPUs
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "1000",
}


@dataclass(frozen=True)
class Node:
    """A machine of the session, by its id in Ray, and the part that trials may use; ``memory`` is in bytes,
    ``host`` is its name."""

    name: str
    cpus: float
    gpus: float
    memory: float
    host: str = ""


@dataclass(frozen=True)
class RaySession:
    """``dashboard`` is its address or empty, ``token`` the file that holds the token to log in with."""

    dashboard: str
    token: Path | None
    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        """The most that one node has, and that one trial can ask for."""
        return max((node.cpus for node in self.nodes), default=0.0)

    @property
    def gpus(self) -> float:
        """As `cpus`."""
        return max((node.gpus for node in self.nodes), default=0.0)

    @property
    def memory(self) -> float:
        """As `cpus`, in bytes."""
        return max((node.memory for node in self.nodes), default=0.0)


@contextmanager
def ray_session(
    drain: Drain,
    *,
    job: str,
    address: str | None,
    cpus: int | None,
    gpus: float | None,
    dashboard: bool,
    data_bytes: int = 0,
) -> Iterator[RaySession]:
    """A local Ray of ``cpus`` and ``gpus`` (all there are if None), or the cluster at ``address``. ``job`` is
    what the dashboard calls this driver. ``data_bytes`` will be put into its object store. Signals do not
    reach a local Ray, because a run that drains still needs it.

    Raises `UserError` if it cannot be started or reached, as early as possible. Raises `Drained` if the run
    is told to end meanwhile.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the outcome of trials is told by ddsweep
    with ExitStack() as afterwards:
        provisioned: dict[str, str] = {}
        token = None
        if address is None:
            # An address in the environment would silently send the sweep to another cluster.
            os.environ.pop("RAY_ADDRESS", None)
            temporary = afterwards.enter_context(private_folder(_base()))
            afterwards.enter_context(drain.leftover(lambda: remove_folder(temporary)))
            if trouble := limits_trouble(temporary):
                raise UserError(f"Ray cannot start here: {trouble}")
            mark = f"{os.environ.get(MARK, '')}{temporary.name}."
            afterwards.callback(kill_marked, mark)
            afterwards.enter_context(drain.leftover(lambda: kill_marked(mark)))
            token = _use_token(temporary)
            if dashboard:
                provisioned = provision(temporary)
            provisioned[MARK] = mark
            if temporary.parent == Path(tempfile.gettempdir()):
                provisioned["TMPDIR"] = str(temporary)  # a compiler that is killed leaves files there
            options = {
                "address": "local",
                "num_cpus": cpus,
                "num_gpus": gpus,
                "object_store_memory": object_store_bytes(temporary, data_bytes),
                "include_dashboard": dashboard,
                "dashboard_host": "127.0.0.1",
                "_temp_dir": str(temporary / _RAY_FOLDER),
            }
        else:
            found = find_ray(address)
            use_its_token(found)
            options = {"address": found}
        afterwards.callback(_leave, drain)
        context = _start(drain, provisioned, job, options)
        afterwards.enter_context(_watched(drain, address and str(options["address"])))
        url = context.dashboard_url
        yield RaySession(dashboard=f"http://{url}" if url else "", token=token, nodes=nodes_alive())


def _start(drain: Drain, environment: Mapping[str, str], job: str, options: Mapping[str, Any]) -> Any:
    try:
        with (
            drain.interruptible(),
            out_of_reach(),
            _our_handler_stays(),
            _environment({**environment, **SAFE_PATH}),
        ):
            return ray.init(
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
                # As from Ray Client, because otherwise Ray would put this folder first on the path of its
                # workers.
                job_config=JobConfig(metadata={"job_name": job}, _client_job=True),
                **options,
            )
    except Exception as error:  # Ray raises ConnectionError, ValueError, RuntimeError, ...
        raise UserError(f"Ray {ray.__version__} did not start: {' '.join(str(error).split())}") from error
    finally:
        drain.listen()  # Ray's C++ has put a handler over ours, which prints its stack and may abort


@contextmanager
def _our_handler_stays() -> Iterator[None]:
    """Ray would set a handler of its own for SIGTERM as it starts. That raises `SystemExit` wherever this
    thread is, also where Python ignores exceptions: then the signal is lost."""
    utils = ray._private.utils
    before = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before


@contextmanager
def _watched(drain: Drain, address: str | None) -> Iterator[None]:
    """Tells ``drain`` as soon as Ray is lost. Ray itself would notice after a minute, and end this process
    with 1 and without a clean-up."""
    over, lost = threading.Event(), _own_loss() if address is None else _loss(address)

    def watch() -> None:
        while not over.wait(_LOOK_S):
            if how := lost():
                drain.lose_ray(how)
                return

    thread = threading.Thread(target=watch, name="ray", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_LOOK_S)  # or it waits for an answer


def _own_loss() -> Callable[[], str]:
    """How a Ray that this process started was lost, or empty. It is lost once its control service or its
    raylet has ended."""
    started = ray._private.worker._global_node.all_processes
    services = [(name, one.process) for name in ("gcs_server", "raylet") for one in started.get(name, ())]

    def look() -> str:
        ended = [(name, process.poll()) for name, process in services if process.poll() is not None]
        return ", ".join(f"{name} ended with {code}" for name, code in ended)

    return look


def _loss(address: str) -> Callable[[], str]:
    """The same for a Ray that was joined. It may be busy for a while; Ray itself would wait a minute."""
    heard = time.monotonic()

    def look() -> str:
        nonlocal heard
        if not is_silent(address):
            heard = time.monotonic()
        silence = time.monotonic() - heard
        return f"nobody answers at {address}" if silence > _SILENCE_S else ""

    return look


def _leave(drain: Drain) -> None:
    """Disconnect, and end what was started. Ray would end each of its services by SIGTERM, which does not
    reach them, and wait for a second before it kills it."""
    if drain.ray_is_lost or not ray.is_initialized():
        atexit.unregister(ray.shutdown)  # it would wait a minute for a Ray that is gone, or never began
        return
    for started in ray._private.worker._global_node.all_processes.values():
        for one in started:
            one.process.terminate = partial(kill_with_children, one.process.pid)
    ray.shutdown()


def nodes_alive() -> tuple[Node, ...]:
    """The nodes that are alive, in an order that is the same for every caller."""
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"]))
    return tuple(_node(found, found["Resources"]) for found in alive)


def _node(found: Mapping[str, Any], has: Mapping[str, float]) -> Node:
    memory = max(0.0, has.get("memory", 0.0) - _KEPT_BYTES)
    host = f"{found['NodeManagerHostname']} ({found['NodeManagerAddress']})"
    return Node(found["NodeID"], has.get("CPU", 0.0), has.get("GPU", 0.0), memory, host)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets ``variables`` for processes that are started inside, and not for those of a later Ray."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _base() -> Path:
    """The place for a private folder with a short name: users cannot share Ray's default one."""
    for base in (tempfile.gettempdir(), "/tmp"):
        if len(base) <= _LONGEST_BASE and os.access(base, os.W_OK):
            return Path(base)
    raise UserError(
        f"no temporary folder with a path of at most {_LONGEST_BASE} characters can be written: "
        "set TMPDIR to one (Ray keeps its sockets there)"
    )


def _use_token(folder: Path) -> Path:
    """A fresh token of mode 600, and Ray set to ask for it. This is set explicitly, because Ray's defaults
    turn it on in some of its processes only."""
    path = folder / "token"
    write_secret(path, secrets.token_hex(32))
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    os.environ.pop("RAY_AUTH_TOKEN", None)
    read_token_again()
    return path
