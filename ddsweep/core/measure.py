"""Measures what a network takes, on the module itself; for a user's own network in a separate process.

Run as a module it reads a job from standard input and answers on standard output, both one line of JSON
(`ddsweep.measuring`): a user's code runs here and not in the process that plans.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ddsweep.catalog import TrialSpec, parse_network
from ddsweep.catalog.measures import Measure
from ddsweep.core import method_check
from ddsweep.core.network_check import faults
from ddsweep.core.networks import build_network
from ddsweep.core.own_network import traits_of, written_out
from ddsweep.errors import UserError
from ddsweep.interpreter import answers
from ddsweep.own_code import load_code, place_and_error

__all__ = ["answer", "measure"]


def measure(network: nn.Module, shape: tuple[int, int, int]) -> Measure:
    """`Measure` of ``network`` for an image of ``shape``, by torch's FLOP counter: on the meta device, where
    nothing is computed, or, for a network that asks for values there, on the CPU."""
    try:
        return _measured(network, shape, "meta")
    except (RuntimeError, NotImplementedError):
        return _measured(network, shape, "cpu")


def _measured(network: nn.Module, shape: tuple[int, int, int], device: str) -> Measure:
    module = copy.deepcopy(network).to(device).eval()
    values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    sizes: list[int] = []

    def count(layer: nn.Module, given: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        sizes.extend(value.numel() for value in outputs if isinstance(value, Tensor))

    for layer in module.modules():
        if next(layer.parameters(recurse=False), None) is not None:
            layer.register_forward_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(module, values, (torch.zeros(1, *shape, device=device),))
    parameters = sum(value.numel() for value in network.parameters() if value.requires_grad)
    return Measure(counter.get_total_flops(), sum(sizes), parameters, written_out(network) is not None)


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """The measures of a network, or that a method passes its check, as `ddsweep.measuring` asks for them; or
    under ``error`` the fault that was found."""
    try:
        return _answer(job)
    except UserError as error:
        return {"error": str(error)}


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    if "trial" in job:
        return _method(TrialSpec.from_dict(job["trial"]), Path(job["code"]))
    shape, classes = tuple(job["shape"]), job["classes"]
    spec = parse_network(job["network"], shape)
    if spec.code is None:
        return {**asdict(measure(build_network(spec, shape, classes), shape)), "head": True}
    load_code(spec.code, Path(job["code"]))
    network = build_network(spec, shape, classes)
    for fault in faults(network, shape, classes):
        raise UserError(f"network: {spec}: {fault}")
    traits = traits_of(network)
    assert traits is not None
    before = [name for name in traits.trained if not name.startswith(f"{traits.head}.")]
    return {**asdict(measure(network, shape)), "head": traits.head is not None and bool(before)}


def _method(spec: TrialSpec, code: Path) -> dict[str, Any]:
    for ref in (spec.network_spec.code, spec.method_code):
        if ref is not None:
            load_code(ref, code)
    try:
        found = next(method_check.faults(spec), None)
    except UserError:
        raise
    except Exception as error:
        refs = [ref for ref in (spec.method_code, spec.network_spec.code) if ref is not None]
        found = place_and_error(error, *refs)
    if found is not None:
        raise UserError(f"method: {spec.method}: {found}")
    return {"method": spec.method}


if __name__ == "__main__":
    said = answers()
    torch.set_num_threads(1)
    said.write(json.dumps(answer(json.loads(sys.stdin.readline()))) + "\n")
    said.close()
