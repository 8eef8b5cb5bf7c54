"""Whether a trial's inner steps are compiled, and where torch keeps compiled code.

torch keeps compiled code, and pickles about it, in a folder for the next process. By default that is in the
machine's temporary folder; here it is the user's own folder, closed to others.
"""

from __future__ import annotations

import os

import torch

from ddsweep.catalog import TrialSpec, measure_of
from ddsweep.core.native import COMPILERS, find_compiler, private_folder
from ddsweep.errors import UserError

__all__ = ["check_compiler", "compiles", "pays_to_compile", "prepare_compilation"]

FROM_STEPS = 50_000
"""From so many inner steps on, compiling them (one to three minutes) pays."""

SMALL_PASS = 15e6
"""With fewer operations in a forward pass of all networks over one distilled batch, on the CPU, the calls
between them take most of the time."""


def check_compiler(setting: str) -> None:
    """Raises `UserError` if ``resources.compile`` is ``on`` and there is no C++ compiler here."""
    if setting == "on" and find_compiler() is None:
        looked = f"CXX, {os.environ['CXX']!r}" if os.environ.get("CXX") else ", ".join(COMPILERS)
        raise UserError(
            f"resources.compile: on, but there is no C++ compiler here (looked for {looked}); install one "
            "or set compile: off"
        )


def pays_to_compile(device: torch.device, trial: TrialSpec) -> bool:
    """The static rule of ``compile: auto``, on the work ahead of ``trial``.

    As measured (docs/performance.md): on the CPU small ConvNets with their norms gain, other networks lose;
    on a GPU a recorded graph is as fast without, and trials that record none were not measured.
    """
    if device.type != "cpu" or trial.method != "bptt" or trial.outer_steps * trial.steps < FROM_STEPS:
        return False  # other methods take no inner steps while they distil
    network, data = trial.network_spec, trial.dataset
    if network.kind != "convnet" or network.norm != "instance":
        return False
    images = trial.models_per_step * trial.images_per_class_per_step * data.classes
    return images * measure_of(network, data.shape, data.classes).flops <= SMALL_PASS


def compiles(setting: str, device: torch.device, trial: TrialSpec) -> bool:
    """Whether ``trial`` compiles its inner steps. ``auto`` is a static rule, and false without a C++
    compiler; ``on`` raises `UserError` without one."""
    check_compiler(setting)
    if setting == "auto":
        return pays_to_compile(device, trial) and find_compiler() is not None
    return setting == "on"


def prepare_compilation() -> None:
    """Have torch keep compiled code in the user's own cache folder, unless its variables say otherwise.
    Raises `UserError` for a folder that others may write to: code in it is run."""
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    folder = private_folder()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
