"""What both benchmarks share: the plain autograd loop, the timing, the data, the options and the report.

The plain loop is what one writes from the paper's equations: one network at a time, eager, the real or
test images in whole batches, and every derivative by autograd. It uses the same modules as the engine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

# A ddsweep that is installed comes first; without one, this checkout is used.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from ddsweep import __version__
from ddsweep.catalog import DATASETS, DatasetSpec, TrialSpec, parse_dataset, parse_network
from ddsweep.core.networks import Params
from ddsweep.data.files import data_root, presence
from ddsweep.errors import SettingError

__all__ = [
    "Contender",
    "Data",
    "Measured",
    "best_threads",
    "compare",
    "fastest",
    "load_data",
    "make_parser",
    "measure",
    "parse_options",
    "plain_outer_gradient",
    "plain_test",
    "plain_train",
    "positive",
    "prepare_device",
    "print_json",
    "print_setting",
    "ratio_text",
]

# ------------------------------------------------------------------------------------ the plain loop


def plain_outer_gradient(
    network: nn.Module,
    weights: Params,
    images: Tensor,
    labels: Tensor,
    raw: Tensor,
    real_images: Tensor,
    real_labels: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outer loss of one network, and its derivative by ``images [S, n, ...]`` and ``raw [T]``.

    One graph through all T steps (``create_graph=True``), then one backward pass from end to end.
    """
    images, raw = images.detach().requires_grad_(), raw.detach().requires_grad_()
    batches, rates = images.unbind(0), F.softplus(raw).unbind(0)
    names, values = list(weights), [value.detach().requires_grad_() for value in weights.values()]
    for t, rate in enumerate(rates):
        s = t % len(batches)
        logits = functional_call(network, dict(zip(names, values, strict=True)), (batches[s],))
        gradient = torch.autograd.grad(F.cross_entropy(logits, labels[s]), values, create_graph=True)
        values = [value - rate * g for value, g in zip(values, gradient, strict=True)]
    logits = functional_call(network, dict(zip(names, values, strict=True)), (real_images,))
    loss = F.cross_entropy(logits, real_labels)
    by_images, by_raw = torch.autograd.grad(loss, [images, raw])
    return loss.detach(), by_images, by_raw


def plain_train(
    network: nn.Module, weights: Params, images: Tensor, labels: Tensor, rates: Sequence[float]
) -> Params:
    """One network after a gradient step on each batch of ``images [S, n, ...]`` in turn, one per rate."""
    names, values = list(weights), list(weights.values())
    for t, rate in enumerate(rates):
        s = t % len(images)
        values = [value.detach().requires_grad_() for value in values]
        logits = functional_call(network, dict(zip(names, values, strict=True)), (images[s],))
        gradient = torch.autograd.grad(F.cross_entropy(logits, labels[s]), values)
        values = [value.detach() - rate * g for value, g in zip(values, gradient, strict=True)]
    return dict(zip(names, values, strict=True))


@torch.no_grad()
def plain_test(
    network: nn.Module, weights: Params, images: Tensor, labels: Tensor, batch: int
) -> tuple[float, float]:
    """Accuracy and mean loss of one network on normalised ``images``, ``batch`` of them at a time."""
    right = torch.zeros((), dtype=torch.int64, device=images.device)
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    for x, y in zip(torch.split(images, batch), torch.split(labels, batch), strict=True):
        logits = functional_call(network, weights, (x,))
        right += (logits.argmax(1) == y).sum()
        loss += F.cross_entropy(logits, y, reduction="sum")
    return int(right) / len(labels), float(loss) / len(labels)


# -------------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Contender:
    """Something to be timed: ``run(r)`` is its repeat r and computes ``networks`` networks."""

    name: str
    threads: int
    networks: int
    run: Callable[[int], Any]


@dataclass(frozen=True)
class Measured:
    """Seconds per network of each repeat, and what each repeat returned."""

    seconds: list[float]
    results: list[Any]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def _seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def measure(contenders: Sequence[Contender], repeats: int, device: torch.device) -> dict[str, Measured]:
    """Time the contenders in turn (A B A B ...), each at its own number of threads, after one warm-up."""
    out = {contender.name: Measured([], []) for contender in contenders}
    for repeat in range(-1, repeats):
        for contender in contenders:
            torch.set_num_threads(contender.threads)
            seconds, result = _seconds(partial(contender.run, max(repeat, 0)), device)
            if repeat >= 0:
                out[contender.name].seconds.append(seconds / contender.networks)
                out[contender.name].results.append(result)
    return out


def fastest(runs: Mapping[int, Callable[[], Any]], device: torch.device, threads: int = 0) -> int:
    """The key of the fastest of ``runs``: the better of two timings each, taken in turn after a warm-up.

    Each runs with ``threads`` threads, or with as many as its key says if that is 0.
    """
    if len(runs) == 1:
        return min(runs)
    best: dict[int, float] = dict.fromkeys(runs, float("inf"))
    runs[max(runs)]()
    for key, run in 2 * list(runs.items()):
        torch.set_num_threads(threads or key)
        best[key] = min(best[key], _seconds(run, device)[0])
    return min(best, key=lambda key: best[key])


def thread_counts(device: torch.device, given: int) -> list[int]:
    """The numbers of threads to try: 1 to all cores (beyond 4, about two per doubling); one on a GPU."""
    if given or device.type == "cuda":
        return [given or torch.get_num_threads()]
    cores = visible_cores()
    steps = {1, 2, 3, 4, cores} | {n << k for k in range(1, 12) for n in (2, 3)}
    return sorted(n for n in steps if n <= cores)


def best_threads(run: Callable[[int], Any], device: torch.device, given: int) -> int:
    """The number of threads at which ``run(threads)`` is fastest, or ``given`` if that is not 0."""
    counts = thread_counts(device, given)
    return fastest({n: partial(run, n) for n in counts}, device)


def compare(baseline: Measured, engine: Measured) -> tuple[float, float, float]:
    """Median, minimum and maximum of the ratios baseline / engine, repeat by repeat."""
    ratios = [b / e for b, e in zip(baseline.seconds, engine.seconds, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


# ---------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """Images uint8 ``[N, c, h, w]`` and labels, on the CPU; ``note`` says where they come from."""

    real: bool
    note: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_data(spec: DatasetSpec, root: Path | None, train: int, test: int) -> Data:
    """The data set ``spec`` if its files are there, else random images of its shape.

    There are ``train`` random images for training, and at most ``test`` images for testing. Random images
    are noise around one random picture per class, so that networks have something to learn from them.
    """
    state = presence(spec.name, root)
    reason = state
    if not state.startswith("missing"):
        try:
            from ddsweep.data.load import load_splits

            splits = load_splits(spec, root, validation_fraction=0.1, split_seed=0)
        except ImportError as error:
            reason = f"{error.name or error} is not installed"
        else:
            return Data(
                *(True, "real images"),
                *(splits.train_images, splits.train_labels),
                *(splits.test_images[:test], splits.test_labels[:test]),
                *(splits.mean, splits.std),
            )
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (spec.classes, *spec.shape), generator=generator, dtype=torch.int16)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % spec.classes
        noise = torch.randint(256, (count, *spec.shape), generator=generator, dtype=torch.int16)
        return ((pictures[labels] + noise) // 2).to(torch.uint8), labels

    note = f"RANDOM images of that shape; {reason}"
    channels = spec.shape[0]
    mean, std = spec.mean or (0.5,) * channels, spec.std or (0.2,) * channels
    return Data(False, note, *draw(train), *draw(test), mean, std)


# ------------------------------------------------------------------------------- options and report


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def make_parser(description: str, without: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The options that the benchmarks share, but for those that mean nothing to one."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    def add(name: str, **how: Any) -> None:
        if name not in without:
            parser.add_argument(name, **how)

    add("--network", default="lenet", help="lenet, alexcifarnet, convnet or convnet(depth=3,width=128)")
    add("--dataset", help=f"{', '.join(DATASETS)} (default: mnist; for alexcifarnet cifar10)")
    add("--data-root", help="folder with the data (default: DDSWEEP_DATA); without it, random images")
    add("--inner-steps", type=positive, default=10, metavar="S", help="distilled batches")
    add("--inner-epochs", type=positive, default=3, metavar="E", help="times through the batches")
    add("--images-per-class-per-step", type=positive, default=1, metavar="M", help="per class and batch")
    add("--inner-lr", type=float, default=0.02, help="rate of every inner step")
    add("--init-law", default="xavier", help="init law of the networks")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is cuda where there is one")
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--threads", type=positive, help="CPU threads for both (default: each at its own best)")
    add("--repeats", type=positive, default=3, help="measurements of each, after one warm-up")
    add("--quick", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    add("--json", action="store_true", help="end with one line of JSON")
    return parser


def parse_options(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, quick: dict[str, int]
) -> tuple[argparse.Namespace, DatasetSpec]:
    """The options and the data set. With ``--quick``, ``quick`` are the defaults."""
    options = parser.parse_args(argv)
    if options.quick:
        parser.set_defaults(**quick)
        options = parser.parse_args(argv)
    options.threads = options.threads or 0
    if "data_root" in options:
        options.data_root = data_root(options.data_root)
    if options.dataset is None:
        options.dataset = "cifar10" if options.network.strip() == "alexcifarnet" else "mnist"
    dataset = parse_dataset(options.dataset)
    options.network = parse_network(options.network, dataset.shape)
    if not 0 < options.inner_lr < float("inf"):
        raise SettingError(f"--inner-lr: {options.inner_lr} must be a positive number")
    return options, dataset


def trial_of(options: argparse.Namespace, dataset: DatasetSpec) -> TrialSpec:
    """The trial whose outer steps the options describe, with ``networks`` and ``real_batch`` among them."""
    return TrialSpec(
        dataset,
        network=str(options.network),
        images_per_class=options.inner_steps * options.images_per_class_per_step,
        inner_steps=options.inner_steps,
        inner_epochs=options.inner_epochs,
        models_per_step=options.networks,
        real_batch=options.real_batch,
        **{name: value for name in _ALSO if (value := getattr(options, name, None)) is not None},
    )


_ALSO = ("dtype", "inner_lr", "init_law")


def prepare_device(name: str) -> torch.device:
    """The torch device for ``auto``, ``cpu`` or ``cuda``. On a GPU, TF32 is off for engine and baseline."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise SettingError("--device: cuda is not available here")
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    return torch.device(name)


def visible_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """What the device calls itself: the GPU, or the CPU's model and the number of cores to be used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {visible_cores()} cores"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def print_setting(title: str, device: torch.device, dtype: str, note: str, work: str) -> None:
    """The first lines of the report: where, with what and on what."""
    print(title)
    print(f"device      {device.type}: {device_name(device)}")
    print(f"software    torch {torch.__version__}, Python {platform.python_version()}, ddsweep {__version__}")
    print(f"date        {_now()}")
    print(f"data        {note}")
    print(f"work        {work}, {dtype}", flush=True)


def ratio_text(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f}x ({ratio[1]:.2f} .. {ratio[2]:.2f})"


def print_json(device: torch.device, values: dict[str, Any]) -> None:
    """One line with ``values`` and what identifies machine and software."""
    where = {
        "device": device.type,
        "device_name": device_name(device),
        "torch": torch.__version__,
        "ddsweep": __version__,
        "date": _now(),
    }
    print(json.dumps({**values, **where}))
