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
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ddsweep
from ddsweep.catalog import CodeRef, EvaluationSpec, NetworkSpec, TrialSpec, is_code, parse_code
from ddsweep.catalog.measures import Measure, is_measured, remember
from ddsweep.errors import SettingError, UserError
from ddsweep.interpreter import python_module
from ddsweep.own_code import copied_source, version_of

__all__ = ["codes_of", "measure_networks", "networks_of"]

_VERSION = 1

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
    codes += [
        parse_code(trial.dataset.base_name, "dataset") for trial in trials if trial.dataset.source == "code"
    ]
    return [code for code in dict.fromkeys(codes) if code is not None]


def measure_networks(
    trials: Iterable[TrialSpec], evaluation: EvaluationSpec, code: Path, say: Callable[[str], None]
) -> None:
    """Make sure that `measure_of` knows all networks of ``trials``. ``code`` is the folder with copies of
    users' sources, if there is one. Raises `UserError` for a network that cannot be distilled through, with
    what to change."""
    for problem, methods in networks_of(trials, evaluation).items():
        network = problem[0]
        found = _kept(problem)
        if found is None:
            began = time.monotonic()
            found = _measured(problem, code)
            _keep(problem, found)
            done = "measured" if network.code is None else "checked and measured"
            seconds = f"{time.monotonic() - began:.0f} s"
            say(f"network {network}: {done} once, in a process of its own ({seconds})")
        if "distribution_matching" in methods and not found["head"]:
            raise SettingError(
                f"network: {network}: method: distribution_matching compares what a last linear layer is "
                "given, and no torch.nn.Linear gives its logits; end it with one"
            )
        if not is_measured(*problem):
            remember(*problem, Measure(found["flops"], found["outputs"], found["parameters"]))


def _measured(problem: Problem, code: Path) -> dict[str, Any]:
    network, shape, classes = problem
    with tempfile.TemporaryDirectory(prefix="ddsweep-") as folder:
        if network.code is not None and network.code.is_file:
            copied_source(network.code, code, Path(folder))
        job = {"code": folder, "network": str(network), "shape": shape, "classes": classes}
        done = subprocess.run(
            python_module("ddsweep.core.measure"),
            check=False,
            input=json.dumps(job) + "\n",
            capture_output=True,
            text=True,
        )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        words = done.stderr.strip().splitlines()
        said = words[-1] if words else f"code {done.returncode}"
        raise UserError(f"network: {network}: the process that measures it ended: {said}") from None
    if "error" in answer:
        raise SettingError(str(answer["error"]))
    return answer


def _path(problem: Problem) -> Path:
    network, shape, classes = problem
    own = ddsweep.__version__ if network.code is None else version_of(network.code)
    versions = (importlib.metadata.version("torch"), own)
    text = json.dumps([_VERSION, str(network), shape, classes, versions])
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "ddsweep" / "networks"
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _kept(problem: Problem) -> dict[str, Any] | None:
    with suppress(OSError, RuntimeError, ValueError):
        found = json.loads(_path(problem).read_text("utf-8"))
        if isinstance(found, dict) and {"flops", "outputs", "parameters", "head"} <= found.keys():
            return found
    return None


def _keep(problem: Problem, found: dict[str, Any]) -> None:
    with suppress(OSError, RuntimeError):
        path = _path(problem)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            partial.write_text(json.dumps(found), "utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
