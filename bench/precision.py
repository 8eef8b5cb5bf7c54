"""What rounding does to the gradient of an outer step, against float64: that of float32 and of its products.

Run from the repository: ``python bench/precision.py [--json]``. See bench/README.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from baseline import (
    Contender,
    load_data,
    make_parser,
    measure,
    parse_options,
    positive,
    prepare_device,
    print_json,
    print_setting,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ddsweep.core.execution import ExecutionPlan, choose_plan
from ddsweep.core.graphs import forget_recordings
from ddsweep.core.images import LabelledImages, class_labels, normalise
from ddsweep.core.init import draw_networks
from ddsweep.core.networks import build_network
from ddsweep.core.unroll import outer_gradient, raw_rates
from ddsweep.errors import UserError
from ddsweep.seeds import derive_seed

QUICK = {"networks": 2, "real_batch": 64, "epochs": [1], "inner_steps": 2}
_FLOAT32_BITS = 23
_PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "convolution", "convolution_backward")
_SUMMANDS = {"addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
"""How many of the first arguments of a product are only added: those are not rounded."""


class RoundedProducts(TorchDispatchMode):
    """Every product and convolution of float32 tensors has its factors rounded to ``bits`` of mantissa (to
    nearest, ties to even) and is summed in float32, as tensor cores do it."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.dropped = _FLOAT32_BITS - bits

    def _rounded(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        whole, half = x.contiguous().view(torch.int32), (1 << (self.dropped - 1)) - 1
        odd = (whole >> self.dropped) & 1
        return ((whole + half + odd) >> self.dropped << self.dropped).view(torch.float32)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            kept = _SUMMANDS.get(name, 0)
            args = [*args[:kept], *(self._rounded(value) for value in args[kept:])]
        return func(*args, **(kwargs or {}))


def _again(arguments: tuple[Any, ...], plan: ExecutionPlan, _repeat: int) -> None:
    outer_gradient(*arguments, plan)


def _row(what: str, steps: int, got: Tensor, exact: Tensor, seconds: float | None) -> dict[str, Any]:
    """How far ``got`` is from ``exact``, both ``[K, values]``; printed as well."""
    finite = torch.isfinite(got).all(1) & torch.isfinite(exact).all(1)
    row: dict[str, Any] = {"what": what, "steps": steps, "cosine": None, "relative": None}
    row["seconds"] = seconds
    row["finite"] = int(finite.sum())
    said = "no network is finite"
    if row["finite"]:
        got, exact = got[finite], exact[finite]
        row["cosine"] = float(F.cosine_similarity(got, exact).median())
        row["relative"] = float(((got - exact).norm(dim=1) / exact.norm(dim=1)).median())
        said = (
            f"cosine {row['cosine']:.6f}, relative difference {row['relative']:.1e} "
            f"(median of {row['finite']} networks)"
        )
    if seconds is not None:
        said += f", {1000 * seconds:.1f} ms"
    print(f"T={steps:<4} {what:<28} {said}", flush=True)
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print, for several numbers of inner steps."""
    parser = make_parser("gradients of an outer step in lower precision, against float64")
    parser.add_argument("--networks", type=positive, default=16, metavar="K", help="networks")
    parser.add_argument("--real-batch", type=positive, default=256, help="real images, for all networks")
    parser.add_argument("--epochs", type=positive, nargs="+", default=[1, 3, 10], help="of each measurement")
    o, dataset = parse_options(parser, argv, QUICK)
    device = prepare_device(o.device)
    torch.set_num_threads(o.threads or 1)
    data = load_data(dataset, o.data_root, o.real_batch, 0)
    network = build_network(o.network, dataset.shape, dataset.classes)
    labels = class_labels(o.inner_steps, dataset.classes, o.images_per_class_per_step).to(device)
    # Real images, the first of each class: noise has no digit in it, and its gradients are not typical.
    of_class = [torch.nonzero(data.train_labels == c).flatten() for c in range(dataset.classes)]
    picks = torch.stack([ids[torch.arange(labels.shape[0]) % len(ids)] for ids in of_class], 1)
    picks = picks.repeat(1, o.images_per_class_per_step)

    def problem(dtype: torch.dtype, steps: int) -> tuple[Any, ...]:
        def ready(images: Tensor) -> Tensor:
            return normalise(images.to(device), data.mean, data.std, dtype)

        seeds = [derive_seed("outer", "bench", 0, k) for k in range(o.networks)]
        params = draw_networks(network, o.init_law, 1.0, seeds, device=device, dtype=dtype)
        images = ready(data.train_images[picks.flatten()]).view(*labels.shape, *dataset.shape)
        real = ready(data.train_images[: o.real_batch]), data.train_labels[: o.real_batch].to(device)
        raw = raw_rates(o.inner_lr, steps).to(device, dtype)
        return network, params, LabelledImages(images, labels), raw, LabelledImages(*real)

    def gradient(arguments: tuple[Any, ...], plan: ExecutionPlan) -> Tensor:
        return outer_gradient(*arguments, plan).images.flatten(1).double().cpu()

    print_setting(
        "precision: derivatives by the images, against float64",
        device,
        "float64 as the reference",
        f"{dataset.name}: {data.note}",
        f"{o.network}, K={o.networks} networks, {o.inner_steps} steps x epochs, rate {o.inner_lr:g}, "
        f"{o.real_batch} real images",
    )
    plan = replace(choose_plan(device, o.threads or 1, network, graph=True), teams=1)
    way = "vmap" if device.type == "cuda" else "loop"
    autograd = replace(plan, inner_batching=way, real_batching=way)
    ways: dict[str, tuple[ExecutionPlan, Callable[[], AbstractContextManager[Any]]]] = {
        "float32": (plan, nullcontext),
        "float32, autograd": (autograd, nullcontext),
        "products of TF32": (plan, lambda: RoundedProducts(10)),
        "products of bfloat16": (plan, lambda: RoundedProducts(7)),
    }
    rows = []
    for epochs in o.epochs:
        steps = o.inner_steps * epochs
        exact = gradient(problem(torch.float64, steps), plan)
        arguments = problem(torch.float32, steps)
        for what, (how, context) in ways.items():
            with context():
                got = gradient(arguments, how)
            # Emulated products take as long as the emulation does.
            timed = (
                []
                if context is not nullcontext
                else [Contender(what, o.threads or 1, 1, partial(_again, arguments, how))]
            )
            seconds = measure(timed, o.repeats, device)[what].median if timed else None
            rows.append(_row(what, steps, got, exact, seconds))
            forget_recordings()
    if o.json:
        print_json(device, {"bench": "precision", "network": str(o.network), "rows": rows})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
