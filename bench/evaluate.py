"""Time of one held-out evaluation per network: the engine against a plain loop on the same work.

Run from the repository: ``python bench/evaluate.py [--json]``. See bench/README.md.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import partial

import torch
from baseline import (
    Contender,
    best_threads,
    compare,
    fastest,
    load_data,
    make_parser,
    measure,
    parse_options,
    plain_test,
    plain_train,
    positive,
    prepare_device,
    print_json,
    print_setting,
    ratio_text,
)

from ddsweep.catalog import measure_of
from ddsweep.core.evaluate import Evaluation, evaluate_networks
from ddsweep.core.execution import choose_plan
from ddsweep.core.images import LabelledImages, RealSet, class_labels, normalise, sample_per_class
from ddsweep.core.init import draw_networks
from ddsweep.core.networks import Params, build_network
from ddsweep.errors import UserError
from ddsweep.seeds import derive_seed

TOLERANCE = 0.01
STANDARD_BATCH = 1024
BATCHES = (64, 128, 256, 512, 1024, 2048, 4096, 10000)
PROBE_NETWORKS = 4
QUICK = {
    **{"networks": 4, "group_size": 2, "baseline_networks": 1, "test_images": 200, "repeats": 1},
    **{"inner_steps": 2, "inner_epochs": 2, "threads": 1},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if engine and baseline disagree about the accuracy."""
    parser = make_parser("time per network of one held-out evaluation, engine against a plain loop")
    parser.add_argument("--networks", type=positive, default=64, help="held-out networks in all")
    parser.add_argument(
        "--group-size", type=positive, default=16, help="networks that the engine takes at once"
    )
    parser.add_argument(
        "--baseline-networks", type=positive, default=4, help="of each group, by the plain loop"
    )
    parser.add_argument("--test-images", type=positive, default=10000, help="test images, at most")
    parser.add_argument("--no-compile", action="store_true", help="the engine's test pass by torch alone")
    o, dataset = parse_options(parser, argv, QUICK)
    if o.networks % min(o.group_size, o.networks):
        parser.error("--networks must be a multiple of --group-size: groups of one size have one speed")
    device, dtype = prepare_device(o.device), getattr(torch, o.dtype)
    size = min(o.group_size, o.networks)
    groups, plain_count = o.networks // size, min(o.baseline_networks, size)
    repeats = max(o.repeats, groups)  # so that every network is evaluated

    per_class = o.inner_steps * o.images_per_class_per_step
    data = load_data(dataset, o.data_root, dataset.classes * per_class, o.test_images)
    generator = torch.Generator().manual_seed(0)
    picks = sample_per_class(data.train_labels, dataset.classes, per_class, generator)
    picks = picks.view(dataset.classes, o.inner_steps, -1).transpose(0, 1).reshape(o.inner_steps, -1)
    images = normalise(data.train_images[picks].to(device), data.mean, data.std, dtype)
    labels = class_labels(o.inner_steps, dataset.classes, o.images_per_class_per_step).to(device)
    pixels, targets = data.test_images.to(device), data.test_labels.to(device)
    normalised = normalise(pixels, data.mean, data.std, dtype)
    steps = o.inner_steps * o.inner_epochs
    rates = [o.inner_lr] * steps
    network = build_network(o.network, dataset.shape, dataset.classes)
    seeds = [derive_seed("heldout", str(o.network), o.init_law, 1.0, i) for i in range(o.networks)]
    params = draw_networks(network, o.init_law, 1.0, seeds, device=device, dtype=dtype)

    def engine(count: int, threads: int, repeat: int = 0) -> Evaluation:
        start = repeat % groups * size
        some = {name: value[start : start + count] for name, value in params.items()}
        plan = choose_plan(device, threads, network, graph=True, native=not o.no_compile)
        test = RealSet(pixels, targets, data.mean, data.std)
        return evaluate_networks(network, some, LabelledImages(images, labels), rates, [steps], test, plan)

    def weights_of(index: int) -> Params:
        return {name: value[index] for name, value in params.items()}

    def plain(count: int, batch: int, repeat: int = 0) -> list[float]:
        """Accuracies of the first ``count`` networks of the group of that repeat."""
        accuracies, start = [], repeat % groups * size
        for k in range(start, start + count):
            trained = plain_train(network, weights_of(k), images, labels, rates)
            accuracies.append(plain_test(network, trained, normalised, targets, batch)[0])
        return accuracies

    print_setting(
        "evaluate: train held-out networks on a small set and test them, engine against a plain loop",
        device,
        o.dtype,
        f"{dataset.name}: {data.note}",
        f"{o.network}, {o.networks} networks in groups of {size}, S={o.inner_steps} x E={o.inner_epochs} = "
        f"{steps} inner steps of {labels.shape[1]} images (training images), {len(targets)} test images",
    )
    probe = min(PROBE_NETWORKS, size)
    threads = best_threads(partial(engine, probe), device, o.threads)
    plain_threads = best_threads(lambda _: plain(1, STANDARD_BATCH), device, o.threads)
    batches = sorted({min(batch, len(targets)) for batch in BATCHES})
    tests = {
        batch: partial(plain_test, network, weights_of(0), normalised, targets, batch) for batch in batches
    }
    best_batch = fastest(tests, device, plain_threads)

    contenders = [
        Contender("engine", threads, size, partial(engine, size, threads)),
        Contender("baseline", plain_threads, plain_count, partial(plain, plain_count, STANDARD_BATCH)),
        Contender("best batch", plain_threads, plain_count, partial(plain, plain_count, best_batch)),
    ]
    measured = measure(contenders, repeats, device)
    found, baseline, best = (measured[contender.name] for contender in contenders)
    ratio, ratio_best = compare(baseline, found), compare(best, found)
    ours = [float(a) for result in found.results for a in result.accuracy[0, :plain_count]]
    apart = max(
        abs(statistics.mean(ours) - statistics.mean(a for result in other.results for a in result))
        for other in (baseline, best)
    )
    agree = apart < TOLERANCE
    native = choose_plan(device, threads, network, native=not o.no_compile).native
    flops = measure_of(o.network, dataset.shape, dataset.classes).flops * (
        3 * steps * labels.shape[1] + len(targets)
    )
    gflops = flops / found.median / 1e9

    print(
        f"engine      {found.median:.4f} s per network, {threads} threads, {repeats} groups timed, "
        f"{gflops:.1f} GFLOP/s, test pass {'compiled' if native else 'by torch'}"
    )
    for batch, other, r in ((STANDARD_BATCH, baseline, ratio), (best_batch, best, ratio_best)):
        print(
            f"baseline    {other.median:.4f} s per network, {plain_threads} threads, test batches of {batch}"
            f"{' (its best)' if other is best else ''}: engine {ratio_text(r)}"
        )
    print(
        f"scaled      the plain loop ran {plain_count} networks of each group of {size}; times are per "
        f"network, ratios medians (min .. max) of {repeats} repeats"
    )
    print(
        f"operations  {flops / 1e9:.3f} GFLOP per network = F (3 T n + tests): F one forward pass of one "
        "image (2 per multiply-add), 3 F a gradient"
    )
    print(
        f"accuracy    mean {100 * statistics.mean(ours):.2f} %; engine and baseline differ by {apart:.5f}, "
        f"{'less' if agree else 'NOT LESS'} than {TOLERANCE:g}"
    )
    if o.json:
        print_json(
            device,
            {
                "bench": "evaluate",
                "ratio": ratio[0],
                "ratio_min": ratio[1],
                "ratio_max": ratio[2],
                "ratio_best_batch": ratio_best[0],
                "ratio_best_batch_min": ratio_best[1],
                "ratio_best_batch_max": ratio_best[2],
                "best_batch": best_batch,
                "networks": o.networks,
                "group_size": size,
                "repeats": repeats,
                "seconds_per_network": found.median,
                "baseline_seconds_per_network": baseline.median,
                "best_batch_seconds_per_network": best.median,
                "baseline_networks": plain_count,
                "threads": threads,
                "baseline_threads": plain_threads,
                "gflops": gflops,
                "native": native,
                "accuracy": statistics.mean(ours),
                "accuracy_difference": apart,
                "agree": agree,
                "network": str(o.network),
                "dataset": dataset.name,
                "real_data": data.real,
                "test_images": len(targets),
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
