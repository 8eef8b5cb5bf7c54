"""Measures and checks each of the users' own networks once, in a separate process. Imports no torch.

The same is done for networks that ship, at a size that their table lacks (`ddsweep.catalog.measures`). The
result is kept in the user's cache, ``ddsweep/networks``, by source, options, shape and version of torch. It
only saves time: if it cannot be written or read, the network is measured again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import ddsweep
from ddsweep.catalog import CodeRef, EvaluationSpec, NetworkSpec, TrialSpec, is_code, parse_code
from ddsweep.catalog.measures import Measure, is_measured, remember
from ddsweep.errors import SettingError, UserError
from ddsweep.interpreter import python_module
from ddsweep.own_code import copied_source, version_of

__all__ = ["codes_of", "measure_networks", "networks_of"]

_VERSION = 4
"""Of the checks: with another one what was checked is checked again."""

_PATIENCE_S = 600

Problem = tuple[NetworkSpec, tuple[int, int, int], int]
"""A network, the shape of its images, and the number of their classes."""


def networks_of(trials: Iterable[TrialSpec], evaluation: EvaluationSpec) -> dict[Problem, set[str]]:
    """The networks to measure or check for ``trials``, with their methods: those of users' own, also in their
    evaluation, and those that ship at a size that was not measured."""
    found: dict[Problem, set[str]] = {}
    for trial in trials:
        data = trial.dataset
        problem = (trial.network_spec, data.shape, data.classes)
        if problem[0].code is not None or not is_measured(*problem):
            found.setdefault(problem, set()).add(trial.method)
        for protocol in evaluation.protocols:
            if isinstance(protocol, str) or protocol.network is None or not is_code(protocol.network):
                continue
            with suppress(SettingError):  # impossible for this trial, and left out
                other = protocol.applied_to(trial).network_spec
                found.setdefault((other, data.shape, data.classes), set())
    return found


def codes_of(trials: Iterable[TrialSpec], evaluation: EvaluationSpec) -> list[CodeRef]:
    """The users' own code that ``trials`` and their evaluation need."""
    trials = list(trials)
    codes = [network.code for network, _, _ in networks_of(trials, evaluation)]
    codes += [trial.method_code for trial in trials]
    codes += [
        parse_code(trial.dataset.base_name, "dataset") for trial in trials if trial.dataset.source == "code"
    ]
    return [code for code in dict.fromkeys(codes) if code is not None]


def measure_networks(
    trials: Iterable[TrialSpec], evaluation: EvaluationSpec, code: Path, say: Callable[[str], None]
) -> None:
    """Make sure that `measure_of` knows all networks of ``trials``, and that users' own methods pass their
    check. ``code`` is the folder with copies of users' sources, if there is one. Raises `UserError`, with the
    remedy, for a network that cannot be distilled through and for a method that fails its check."""
    trials = list(trials)
    for problem, methods in networks_of(trials, evaluation).items():
        network = problem[0]
        path = _path(*problem)
        found = _kept(path, {"flops", "outputs", "parameters", "written_out", "head"})
        if found is None:
            what = "measured" if network.code is None else "checked and measured"
            say(f"network {network}: is being {what}, once, in a process of its own")
            job = {"network": str(network), "shape": problem[1], "classes": problem[2]}
            found = _asked(job, [network.code], code, f"network: {network}")
            _keep(path, found)
        if "distribution_matching" in methods and not found["head"]:
            raise SettingError(
                f"network: {network}: method: distribution_matching compares what a last linear layer is "
                "given; end it with a torch.nn.Linear whose output are the logits, after layers that have "
                "weights"
            )
        if not is_measured(*problem):
            remember(*problem, Measure(**{item.name: found[item.name] for item in fields(Measure)}))
    for trial in _with_own_methods(trials):
        path = _path(trial.network_spec, trial.dataset.shape, trial.dataset.classes, trial.method)
        if _kept(path, {"method"}) is None:
            say(f"method {trial.method}: is being checked, once, in a process of its own")
            codes = [trial.method_code, trial.network_spec.code]
            _keep(path, _asked({"trial": trial.to_dict()}, codes, code, f"method: {trial.method}"))


def _with_own_methods(trials: Iterable[TrialSpec]) -> Iterable[TrialSpec]:
    """One trial for each method of a user's own, network and shape of images."""
    found: dict[Any, TrialSpec] = {}
    for trial in trials:
        if trial.method_code is not None:
            data = trial.dataset
            found.setdefault((trial.method, trial.network, data.shape, data.classes), trial)
    return found.values()


def _asked(job: dict[str, Any], refs: Sequence[CodeRef | None], code: Path, what: str) -> dict[str, Any]:
    """The answer to ``job`` from a process that runs users' code ``refs``. Raises `SettingError` with the
    fault that it finds in the setting ``what``."""
    with tempfile.TemporaryDirectory(prefix="ddsweep-") as folder:
        for ref in refs:
            if ref is not None and ref.is_file and not (Path(folder) / ref.digest).exists():
                copied_source(ref, code, Path(folder))
        answer = _in_own_process({**job, "code": folder}, what)
    if "error" in answer:
        raise SettingError(str(answer["error"]))
    return answer


def _in_own_process(job: dict[str, Any], what: str) -> dict[str, Any]:
    """`ddsweep.core.measure.answer`, in a process of its own."""
    try:
        done = subprocess.run(
            python_module("ddsweep.core.measure"),
            check=False,
            input=json.dumps(job) + "\n",
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{what}: the process that checks it was ended after {_PATIENCE_S} s") from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        words = done.stderr.strip().splitlines()
        said = words[-1] if words else f"code {done.returncode}"
        raise UserError(f"{what}: the process that checks it ended: {said}") from None
    return answer


def _path(network: NetworkSpec, shape: tuple[int, int, int], classes: int, *more: str) -> Path:
    own = ddsweep.__version__ if network.code is None else version_of(network.code)
    versions = (importlib.metadata.version("torch"), own)
    text = json.dumps([_VERSION, str(network), shape, classes, versions, *more])
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "ddsweep" / "networks"
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _kept(path: Path, keys: set[str]) -> dict[str, Any] | None:
    with suppress(OSError, RuntimeError, ValueError):
        found = json.loads(path.read_text("utf-8"))
        if isinstance(found, dict) and keys <= found.keys():
            return found
    return None


def _keep(path: Path, found: dict[str, Any]) -> None:
    with suppress(OSError, RuntimeError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            partial.write_text(json.dumps(found), "utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
