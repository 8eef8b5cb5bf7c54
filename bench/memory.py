"""Peak memory of one outer step against the number of inner steps, in each memory mode.

Run from the repository: ``python bench/memory.py [--json]``. See bench/README.md.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from baseline import make_parser, parse_options, positive, prepare_device, print_json, print_setting

from ddsweep.core.execution import choose_plan
from ddsweep.core.images import LabelledImages, class_labels
from ddsweep.core.init import draw_networks
from ddsweep.core.networks import build_network
from ddsweep.core.unroll import outer_gradient, raw_rates
from ddsweep.errors import UserError

QUICK = {"networks": 2, "inner_steps": 2, "threads": 1}
SEGMENTS = (10, 30)


def _resident(field: str) -> int:
    """``VmHWM`` (the peak) or ``VmRSS`` (now) of this process, bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _measure(argv: Sequence[str]) -> int:
    """In a process of its own: bytes that one outer step adds at its peak, printed."""
    parser = make_parser("one measurement")
    parser.add_argument("--networks", type=positive, default=8)
    parser.add_argument("--mode", choices=("store", "recompute"))
    parser.add_argument("--segment", type=positive, default=1)
    o, dataset = parse_options(parser, argv, {})
    device = prepare_device(o.device)
    if o.threads:
        torch.set_num_threads(o.threads)
    generator = torch.Generator().manual_seed(0)
    network = build_network(o.network, dataset.shape, dataset.classes)
    dtype = getattr(torch, o.dtype)
    params = draw_networks(network, o.init_law, 1.0, list(range(o.networks)), device=device, dtype=dtype)
    labels = class_labels(o.inner_steps, dataset.classes, o.images_per_class_per_step).to(device)
    images = torch.randn(*labels.shape, *dataset.shape, generator=generator).to(device, dtype)
    real = torch.randn(64, *dataset.shape, generator=generator).to(device, dtype)
    real_labels = torch.arange(64, device=device) % dataset.classes
    plan = replace(choose_plan(device, o.threads or 1, network), memory_mode=o.mode, segment=o.segment)

    def step(epochs: int, count: int) -> None:
        raw = raw_rates(o.inner_lr, o.inner_steps * epochs).to(images)
        some = {name: value[:count] for name, value in params.items()}
        outer_gradient(
            network,
            some,
            LabelledImages(images, labels),
            raw,
            LabelledImages(real[:64], real_labels[:64]),
            plan,
        )

    # What every process needs once. Of one network: freed memory that stays with the process is not seen.
    step(1, 1)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(o.inner_epochs, o.networks)
        print(torch.cuda.max_memory_allocated() - before)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _resident("VmRSS")
        step(o.inner_epochs, o.networks)
        print(_resident("VmHWM") - before)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each (T, mode) in a process of its own, and print a table."""
    without = ("--repeats", "--data-root", "--inner-epochs")
    parser = make_parser("peak memory of one outer step against the number of inner steps T", without)
    parser.add_argument("--networks", type=positive, default=8, metavar="K", help="networks per outer step")
    parser.add_argument("--epochs", type=positive, nargs="+", default=None, help="T = S x each of these")
    o, dataset = parse_options(parser, argv, QUICK)
    device = prepare_device(o.device)
    epochs = o.epochs or ([1, 2] if o.quick else [3, 10, 30])
    print_setting(
        "memory: what one outer step adds at its peak, in a process of its own each",
        device,
        o.dtype,
        "random images",
        f"{o.network}, K={o.networks} networks, {o.inner_steps} batches of "
        f"{dataset.classes * o.images_per_class_per_step} images, 64 real images",
    )
    kinds = [("store", 1), ("recompute", 1), *(("recompute", k) for k in SEGMENTS)]
    rows: list[dict[str, Any]] = []
    print(f"{'T':>6}" + "".join(f"{_name(mode, segment):>22}" for mode, segment in kinds))
    for count in epochs:
        steps, line = count * o.inner_steps, ""
        for mode, segment in kinds:
            command = [
                *(sys.executable, __file__, "--one", "--network", str(o.network)),
                *("--dataset", dataset.name, "--inner-steps", str(o.inner_steps), "--mode", mode),
                *("--inner-epochs", str(count), "--networks", str(o.networks), "--segment", str(segment)),
                *("--device", device.type, "--dtype", o.dtype),
                *("--inner-lr", str(o.inner_lr), "--init-law", o.init_law),
                *("--images-per-class-per-step", str(o.images_per_class_per_step)),
                *("--threads", str(o.threads or 1)),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(f"{_name(mode, segment)} at T = {steps}: {done.stderr.strip()[-300:]}")
            found = max(0, int(done.stdout.split()[-1]))
            rows.append({"steps": steps, "memory_mode": mode, "segment": segment, "bytes": found})
            line += f"{found / 1e6:>19.0f} MB"
        print(f"{steps:>6}{line}", flush=True)
    if o.json:
        what = {"network": str(o.network), "networks": o.networks, "dtype": o.dtype}
        print_json(device, {"bench": "memory", **what, "rows": rows})
    return 0


def _name(mode: str, segment: int) -> str:
    return mode if segment == 1 else f"{mode}, segment {segment}"


if __name__ == "__main__":
    try:
        if "--one" in sys.argv:
            sys.exit(_measure([word for word in sys.argv[1:] if word != "--one"]))
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
