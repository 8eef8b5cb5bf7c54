"""Outer steps in a process that asks for huge pages of memory, and in one that does not.

Run from the repository: ``python bench/pages.py [--json]``. See bench/README.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from baseline import make_parser, parse_options, positive, prepare_device, print_json, print_setting, trial_of

from ddsweep.errors import UserError
from ddsweep.packing import SECONDS, Packing, measure
from ddsweep.trial_plan import TrialSettings

QUICK = {"networks": 2, "inner_steps": 2, "inner_epochs": 1, "real_batch": 64, "seconds": 0.1, "repeats": 1}
PAGES = {"small": "glibc.malloc.hugetlb=0", "huge": "glibc.malloc.hugetlb=1"}
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the ratio of the times of an outer step."""
    parser = make_parser("time of an outer step with huge pages of memory against small ones")
    parser.add_argument("--networks", type=positive, default=8, metavar="K", help="networks per outer step")
    parser.add_argument("--real-batch", type=positive, default=1024, help="real images, for all networks")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that each takes steps for, at least")
    parser.add_argument("--memory-mode", choices=("auto", "store", "recompute"), default="auto")
    o, dataset = parse_options(parser, argv, QUICK)
    device, threads = prepare_device("cpu"), o.threads or 1
    print_setting(
        "pages: outer steps in processes with huge and with small pages of memory, in turn",
        device,
        "float32",
        "random images",
        f"{o.network}, K={o.networks}, T={o.inner_steps * o.inner_epochs}, {o.real_batch} real images, "
        f"{threads} threads",
    )
    print(f"this Linux  {ENABLED.read_text().strip() if ENABLED.is_file() else 'no huge pages'}")
    spec = trial_of(o, dataset)
    settings = TrialSettings(memory_mode=o.memory_mode, compile="off")
    packing = [Packing(1, float(threads), 0.0)]
    seconds: dict[str, list[float]] = {name: [] for name in PAGES}
    for _ in range(o.repeats):
        for name, tunable in PAGES.items():
            os.environ["GLIBC_TUNABLES"] = tunable
            rate = measure(spec, settings, "cpu", packing, o.seconds)[0].steps_per_second
            seconds[name].append(1 / rate)
    ratios = sorted(a / b for a, b in zip(seconds["small"], seconds["huge"], strict=True))
    row = {
        "ratio": median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "seconds_small": median(seconds["small"]),
        "seconds_huge": median(seconds["huge"]),
    }
    print(f"small pages {row['seconds_small']:.3f} s an outer step")
    print(
        f"huge pages  {row['seconds_huge']:.3f} s an outer step: {row['ratio']:.2f}x ({ratios[0]:.2f} .. "
        f"{ratios[-1]:.2f}), median (min .. max) of {o.repeats} turns"
    )
    if o.json:
        more = {"network": str(o.network), "threads": threads, "repeats": o.repeats}
        print_json(device, {"bench": "pages", **row, **more})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
