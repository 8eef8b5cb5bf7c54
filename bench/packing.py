"""Trials an hour when 1, 2, 4 or 8 of them share the machine (or one GPU).

Run from the repository: ``python bench/packing.py [--json]``. See bench/README.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from baseline import (
    make_parser,
    parse_options,
    positive,
    prepare_device,
    print_json,
    print_setting,
    visible_cores,
)

from ddsweep.catalog import DatasetSpec, TrialSpec
from ddsweep.core.distill import Problem, initial_state, outer_step
from ddsweep.core.execution import choose_plan
from ddsweep.core.networks import build_network
from ddsweep.errors import UserError

QUICK = {"networks": 2, "inner_steps": 2, "inner_epochs": 1, "real_batch": 64, "outer_steps": 2}
PACKED = (1, 2, 4, 8)


def _work(argv: Sequence[str]) -> int:
    """One of the trials: says when it is warm, waits for a line, and prints its seconds."""
    o, dataset = parse_options(_parser(), argv, {})
    device = prepare_device(o.device)
    torch.set_num_threads(o.threads)
    spec = TrialSpec(
        dataset,
        network=str(o.network),
        images_per_class=o.inner_steps * o.images_per_class_per_step,
        inner_steps=o.inner_steps,
        inner_epochs=o.inner_epochs,
        models_per_step=o.networks,
        real_batch=o.real_batch,
    )
    steps = warm_trial(spec, dataset, device, o.threads)
    print("warm", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    steps(o.outer_steps)
    print(time.perf_counter() - start, flush=True)
    return 0


def warm_trial(
    spec: TrialSpec, dataset: DatasetSpec, device: torch.device, threads: int
) -> Callable[[int], None]:
    """A trial on random images that has taken its first outer step, to take as many more as it is told."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (4096, *dataset.shape), generator=generator, dtype=torch.int16)
    labels = torch.arange(4096) % dataset.classes
    network = build_network(spec.network_spec, dataset.shape, dataset.classes)
    channels = dataset.shape[0]
    problem = Problem.of(
        spec,
        choose_plan(device, threads, network),
        pixels.to(torch.uint8),
        labels,
        (0.5,) * channels,
        (0.25,) * channels,
    )

    def steps(number: int) -> None:
        nonlocal state
        for _ in range(number):
            state, _ = outer_step(problem, state)
        if device.type == "cuda":
            torch.cuda.synchronize()

    state = initial_state(problem)
    steps(1)
    return steps


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("outer steps a second of trials that run side by side")
    parser.add_argument("--networks", type=positive, default=8, metavar="K", help="networks per outer step")
    parser.add_argument("--real-batch", type=positive, default=1024, help="real images, for all networks")
    parser.add_argument("--outer-steps", type=positive, default=10, help="that each trial takes")
    parser.add_argument("--packed", type=positive, nargs="+", default=list(PACKED), help="trials at a time")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print trials an hour, for trials of 1,000 outer steps."""
    words = list(sys.argv[1:] if argv is None else argv)
    o, dataset = parse_options(_parser(), words, QUICK)
    device, cores = prepare_device(o.device), visible_cores()
    print_setting(
        "packing: trials side by side, each a process of its own",
        device,
        "float32",
        "random images",
        f"{o.network}, K={o.networks}, T={o.inner_steps * o.inner_epochs}, {o.real_batch} real images",
    )
    rows = []
    for count in o.packed:
        threads = o.threads or max(1, cores // count)
        command = [
            *(sys.executable, __file__, "--one", "--network", str(o.network), "--dataset", dataset.name),
            *("--inner-steps", str(o.inner_steps), "--inner-epochs", str(o.inner_epochs)),
            *("--networks", str(o.networks), "--real-batch", str(o.real_batch)),
            *("--outer-steps", str(o.outer_steps), "--device", device.type, "--threads", str(threads)),
            *("--images-per-class-per-step", str(o.images_per_class_per_step)),
        ]
        running = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]
        seconds = _run_together(running)
        rate = count * o.outer_steps / max(seconds) * 3600 / 1000
        rows.append({"packed": count, "threads": threads, "seconds": seconds, "trials_per_hour": rate})
        print(
            f"{count} side by side, {threads} threads each: {max(seconds) / o.outer_steps:.3f} s an outer "
            f"step, {rate:.2f} trials of 1,000 outer steps an hour, {rate / rows[0]['trials_per_hour']:.2f}x",
            flush=True,
        )
    if o.json:
        print_json(device, {"bench": "packing", "network": str(o.network), "rows": rows})
    return 0


def _run_together(running: list[subprocess.Popen[str]]) -> list[float]:
    """Start all once all are warm; the seconds that each took."""
    try:
        for process in running:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "warm":
                raise UserError("a trial ended before it began; see its error above")
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [float(process.communicate()[0]) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


if __name__ == "__main__":
    try:
        if "--one" in sys.argv:
            sys.exit(_work([word for word in sys.argv[1:] if word != "--one"]))
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
