"""Trials an hour when 1, 2, 4 or 8 processes share the machine (or one GPU), each with one trial or several.

Run from the repository: ``python bench/packing.py [--json]``. See bench/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from statistics import median

from baseline import (
    make_parser,
    parse_options,
    positive,
    prepare_device,
    print_json,
    print_setting,
    trial_of,
    visible_cores,
)

from ddsweep.catalog.numbers import counted
from ddsweep.errors import UserError
from ddsweep.packing import SECONDS, Packing, measure
from ddsweep.trial_plan import TrialSettings

QUICK = {"networks": 2, "inner_steps": 2, "inner_epochs": 1, "real_batch": 64, "seconds": 0.1, "repeats": 1}
PACKED = (1, 2, 4, 8)
STEPS = 1000
"""Outer steps of the trials that are counted."""


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("outer steps a second of trials that run side by side", ["--data-root"])
    parser.add_argument("--networks", type=positive, default=8, metavar="K", help="networks per outer step")
    parser.add_argument("--real-batch", type=positive, default=1024, help="real images, for all networks")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that all take steps for, at least")
    parser.add_argument(
        "--packed", type=positive, nargs="+", default=list(PACKED), help="processes at a time"
    )
    parser.add_argument("--together", type=positive, nargs="+", default=[1], help="trials in each of them")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    return parser


def _said(packing: Packing) -> str:
    each = f"{packing.cpus:g} threads and {counted(packing.together, 'trial')} each"
    return f"{packing.count} side by side, {each}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print trials an hour, for trials of 1,000 outer steps."""
    o, dataset = parse_options(_parser(), argv, QUICK)
    device, cores = prepare_device(o.device), visible_cores()
    print_setting(
        "packing: processes side by side, each with one trial or several",
        device,
        o.dtype,
        "random images",
        f"{o.network}, K={o.networks}, T={o.inner_steps * o.inner_epochs}, {o.real_batch} real images",
    )
    spec = trial_of(o, dataset)
    settings = TrialSettings(compile=o.compile)
    packings = [
        Packing(count, float(threads), 1 / count if device.type == "cuda" else 0.0, together)
        for count, together in product(o.packed, o.together)
        for threads in [o.threads or max(1, cores // count)]
    ]
    found: dict[Packing, list[float]] = {packing: [] for packing in dict.fromkeys(packings)}
    for _ in range(o.repeats):  # all in turn: a machine has slower times
        for packing in [*found]:
            try:
                (packed,) = measure(spec, settings, device.type, [packing], o.seconds)
            except UserError as error:
                if len(found) == 1:
                    raise
                del found[packing]
                print(f"{_said(packing)}: left out ({error})", flush=True)
            else:
                found[packing].append(packed.steps_per_second * 3600 / STEPS)
    rows: list[dict[str, float]] = []
    for packing, rates in found.items():
        rate, low, high = median(rates), min(rates), max(rates)
        of_hour = {"trials_per_hour": rate, "trials_per_hour_min": low, "trials_per_hour_max": high}
        in_second = {"steps_per_second": rate * STEPS / 3600, "threads": int(packing.cpus)}
        rows.append({**asdict(packing), **in_second, **of_hour})
        print(
            f"{_said(packing)}: {packing.trials * 3600 / STEPS / rate:.3f} s an outer step of all, "
            f"{rate:.2f} trials of {STEPS:,} outer steps an hour ({low:.2f} .. {high:.2f}), "
            f"{rate / rows[0]['trials_per_hour']:.2f}x",
            flush=True,
        )
    print(f"numbers     median (min .. max) of {counted(o.repeats, 'repeat')} in turn")
    if o.json:
        what = {"network": str(o.network), "dtype": o.dtype, "repeats": o.repeats}
        print_json(device, {"bench": "packing", **what, "rows": rows})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
