"""Time of one outer step per network: the engine against a plain autograd loop on the same work.

Run from the repository: ``python bench/meta_step.py [--json]``. See bench/README.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from baseline import (
    Contender,
    best_threads,
    compare,
    load_data,
    make_parser,
    measure,
    parse_options,
    plain_outer_gradient,
    positive,
    prepare_device,
    print_json,
    print_setting,
    ratio_text,
)
from torch import Tensor, nn

from ddsweep.catalog import measure_of
from ddsweep.core.execution import choose_plan
from ddsweep.core.images import LabelledImages, class_labels, normalise
from ddsweep.core.init import draw_networks
from ddsweep.core.networks import Params, build_network
from ddsweep.core.unroll import OuterGradient, outer_gradient, raw_rates
from ddsweep.errors import UserError
from ddsweep.seeds import derive_seed

# Where an input of a ReLU or a max-pool is a tie up to rounding, two correct float32 computations may take
# different sides, and the gradient of that network differs visibly. So float32 is judged by the median over
# the networks, and float64, where this does not happen, by the largest difference.
TOLERANCE_MEDIAN = {"float32": 1e-3, "float64": 1e-8}
TOLERANCE_FLOAT64 = 1e-8
CHECKED_IN_FLOAT64 = 2
QUICK = {"networks": 2, "inner_steps": 2, "inner_epochs": 2, "real_batch": 64, "repeats": 1, "threads": 1}
MEMORY_MODES = ("store", "recompute")
COMPILED = "compiled"
NO_GRAPH = "no graph"
"""On a GPU: operations started one by one, and not replayed as a CUDA graph."""
Plain = list[tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Work:
    """One outer step, all that it needs, and the two ways to take it."""

    network: nn.Module
    params: Params
    images: Tensor
    labels: Tensor
    raw: Tensor
    real_images: Tensor
    real_labels: Tensor

    def engine(self, mode: str, threads: int, _repeat: int = 0) -> OuterGradient:
        """``mode``: a memory mode, ``compiled``, or ``no graph``."""
        plan = choose_plan(
            self.images.device,
            threads,
            self.network,
            networks=len(next(iter(self.params.values()))),
            compile=mode == COMPILED,
            graph=mode != NO_GRAPH,
        )
        if mode in MEMORY_MODES:
            plan = replace(plan, memory_mode=mode)
        distilled, real = (
            LabelledImages(self.images, self.labels),
            LabelledImages(self.real_images, self.real_labels),
        )
        return outer_gradient(self.network, self.params, distilled, self.raw, real, plan)

    def plain(self, count: int, _repeat: int = 0) -> Plain:
        """Of the first ``count`` networks."""
        return [
            plain_outer_gradient(
                *(self.network, {name: value[k] for name, value in self.params.items()}, self.images),
                *(self.labels, self.raw, self.real_images, self.real_labels),
            )
            for k in range(count)
        ]

    def in_float64(self, count: int) -> Work:
        """The same numbers in float64, with the first ``count`` networks."""
        return replace(
            self,
            params={name: value[:count].double() for name, value in self.params.items()},
            images=self.images.double(),
            raw=self.raw.double(),
            real_images=self.real_images.double(),
        )


def differences(engine: OuterGradient, plain: Plain) -> Tensor:
    """Of each network that the plain loop ran: the largest relative difference of loss, derivative by
    images and derivative by raw rates. NaN where one of them is."""
    rows = []
    for k, values in enumerate(plain):
        ours = (engine.losses[k], engine.images[k], engine.raw_rates[k])
        pairs = [(a.double(), b.double()) for a, b in zip(ours, values, strict=True)]
        rows.append(torch.stack([torch.dist(a, b) / torch.linalg.vector_norm(b) for a, b in pairs]).amax())
    return torch.stack(rows).cpu()


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if engine and baseline disagree about the gradient."""
    parser = make_parser("time per network of one outer step, engine against a plain autograd loop")
    parser.add_argument("--networks", type=positive, default=8, metavar="K", help="networks per outer step")
    parser.add_argument(
        "--baseline-networks", type=positive, help="networks that the plain loop runs (default: all K)"
    )
    parser.add_argument("--real-batch", type=positive, default=1024, help="real images, for all networks")
    parser.add_argument("--memory-mode", choices=("both", *MEMORY_MODES), default="both")
    parser.add_argument("--compile", action="store_true", help="measure compiled inner steps as well")
    o, dataset = parse_options(parser, argv, QUICK)
    plain_count = min(o.baseline_networks or o.networks, o.networks)
    device, dtype = prepare_device(o.device), getattr(torch, o.dtype)

    data = load_data(dataset, o.data_root, o.real_batch, 0)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randperm(len(data.train_labels), generator=generator)[: o.real_batch]
    real_images = normalise(data.train_images[picks].to(device), data.mean, data.std, dtype)
    real_labels = data.train_labels[picks].to(device)
    labels = class_labels(o.inner_steps, dataset.classes, o.images_per_class_per_step).to(device)
    images = torch.randn(*labels.shape, *dataset.shape, generator=generator).to(device, dtype)
    steps = o.inner_steps * o.inner_epochs
    raw = raw_rates(o.inner_lr, steps).to(device, dtype)
    network = build_network(o.network, dataset.shape, dataset.classes)
    seeds = [derive_seed("outer", "bench", 0, k) for k in range(o.networks)]
    params = draw_networks(network, o.init_law, 1.0, seeds, device=device, dtype=dtype)
    work = Work(network, params, images, labels, raw, real_images, real_labels)

    print_setting(
        "meta_step: one outer step, engine against a plain autograd loop (one network at a time)",
        device,
        o.dtype,
        f"{dataset.name}: {data.note}",
        f"{o.network}, K={o.networks} networks, S={o.inner_steps} x E={o.inner_epochs} = {steps} inner steps "
        f"of {labels.shape[1]} images, {len(real_labels)} real images per network (shared)",
    )
    modes = MEMORY_MODES if o.memory_mode == "both" else (o.memory_mode,)
    if device.type == "cuda":
        modes = (*modes, NO_GRAPH)
    if o.compile:
        modes = (*modes, COMPILED)
    threads = best_threads(partial(work.engine, modes[0]), device, o.threads)
    plain_threads = best_threads(lambda _: work.plain(1), device, o.threads)
    contenders = [Contender(m, threads, o.networks, partial(work.engine, m, threads)) for m in modes]
    contenders.insert(1, Contender("baseline", plain_threads, plain_count, partial(work.plain, plain_count)))

    measured = measure(contenders, o.repeats, device)
    baseline = measured["baseline"]
    forward = measure_of(o.network, dataset.shape, dataset.classes).flops
    flops = forward * (9 * steps * labels.shape[1] + 3 * len(real_labels))
    print(
        f"baseline    {baseline.median:.4f} s per network, {plain_threads} threads, {plain_count} networks "
        f"timed, {flops / baseline.median / 1e9:.1f} GFLOP/s"
    )
    by_mode = {}
    for mode in modes:
        found = measured[mode]
        ratio = compare(baseline, found)
        gflops = flops / found.median / 1e9
        by_mode[mode] = {
            "ratio": ratio[0],
            "ratio_min": ratio[1],
            "ratio_max": ratio[2],
            "seconds_per_network": found.median,
            "gflops": gflops,
        }
        print(
            f"{mode:<11} {found.median:.4f} s per network, {threads} threads, {gflops:.1f} GFLOP/s: "
            f"{ratio_text(ratio)}"
        )
    print(f"ratios      baseline / engine, median (min .. max) of {o.repeats} repeats in turn")
    print(
        f"operations  {flops / 1e9:.3f} GFLOP per network = F (9 T n + 3 N): F one forward pass of one image "
        "(2 per multiply-add), 3 F a gradient, 6 F going back through it"
    )

    apart = torch.stack([differences(measured[mode].results[0], baseline.results[0]) for mode in modes])
    median, worst = float(apart.median(1).values.amax()), float(apart.amax())
    torch.set_num_threads(threads)
    count = min(CHECKED_IN_FLOAT64, plain_count)
    small = work.in_float64(count)
    plain = small.plain(count)
    exact = float(torch.stack([differences(small.engine(mode, threads), plain) for mode in modes]).amax())
    agree = exact <= TOLERANCE_FLOAT64 and median <= TOLERANCE_MEDIAN[o.dtype]
    print(
        f"gradients   {'agree' if agree else 'DO NOT AGREE'}: relative difference in float64 at most "
        f"{exact:.1e} ({count} networks; allowed {TOLERANCE_FLOAT64:g}), in {o.dtype} median "
        f"{median:.1e} (allowed {TOLERANCE_MEDIAN[o.dtype]:g}), largest {worst:.1e}"
    )
    if o.json:
        default = choose_plan(device, threads, network).memory_mode
        headline = default if default in modes else modes[0]
        print_json(
            device,
            {
                "bench": "meta_step",
                **by_mode[headline],
                "memory_mode": headline,
                "modes": by_mode,
                "baseline_seconds_per_network": baseline.median,
                "baseline_networks": plain_count,
                "threads": threads,
                "baseline_threads": plain_threads,
                "networks": o.networks,
                "repeats": o.repeats,
                "difference_float64": _finite(exact),
                "difference_median": _finite(median),
                "difference_max": _finite(worst),
                "agree": agree,
                "network": str(o.network),
                "dataset": dataset.name,
                "real_data": data.real,
                "real_batch": len(real_labels),
                "inner_steps": o.inner_steps,
                "inner_epochs": o.inner_epochs,
                "images_per_step": labels.shape[1],
                "dtype": o.dtype,
                "quick": o.quick,
            },
        )
    return 0 if agree else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
