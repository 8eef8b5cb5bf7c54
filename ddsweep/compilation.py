"""Whether a trial's inner steps are compiled, and where what torch compiled is kept.

torch keeps compiled code, and pickles that tell of it, in a folder that the next process takes them from. By
default that is in the machine's temporary folder; here it is one of the user's own, closed to others.
"""

from __future__ import annotations

import os

import torch

from ddsweep.catalog import TrialSpec, forward_flops
from ddsweep.core.native import COMPILERS, find_compiler, private_folder
from ddsweep.errors import UserError

__all__ = ["check_compiler", "compiles", "pays_to_compile", "prepare_compilation"]

FROM_STEPS = 50_000
"""Inner steps ahead of a trial from which compiling them, which takes one to three minutes, is worth it."""

SMALL_PASS = 15e6
"""Operations of a forward pass of all networks over one distilled batch, on the CPU: where they are fewer,
the calls between them take most of the time."""


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
    if device.type != "cpu" or trial.outer_steps * trial.steps < FROM_STEPS:
        return False
    network, data = trial.network_spec, trial.dataset
    images = trial.models_per_step * trial.images_per_class_per_step * data.classes
    small = images * forward_flops(network, data.shape, data.classes) <= SMALL_PASS
    return network.kind == "convnet" and network.norm == "instance" and small


def compiles(setting: str, device: torch.device, trial: TrialSpec) -> bool:
    """Whether ``trial`` compiles its inner steps. ``auto`` is a static rule, and no where there is no C++
    compiler; ``on`` raises `UserError` there."""
    check_compiler(setting)
    if setting == "auto":
        return pays_to_compile(device, trial) and find_compiler() is not None
    return setting == "on"


def prepare_compilation() -> None:
    """Have torch keep compiled code in the user's own cache folder, unless its variables say otherwise.
    Raises `UserError` for a folder that others may write to: what lies there is run."""
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    folder = private_folder()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
