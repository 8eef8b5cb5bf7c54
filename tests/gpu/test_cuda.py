"""The engine on CUDA: the numbers of the CPU, and less memory where less is promised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddsweep.catalog import DATASETS, TrialSpec, parse_network
from ddsweep.core.distill import (
    Problem,
    evaluation_loop,
    initial_state,
    labels_of,
    outer_step,
    presented,
    rates_of,
)
from ddsweep.core.evaluate import count_right, evaluate_networks
from ddsweep.core.execution import ExecutionPlan, choose_plan
from ddsweep.core.init import draw_networks
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.memory import is_out_of_memory, keep_to_share, release_memory
from ddsweep.core.networks import build_network
from ddsweep.core.pretrain import Course, train_on_real
from ddsweep.core.unroll import InnerLoop, outer_gradient, raw_rates

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
NETWORKS = [
    ("lenet", (1, 28, 28), 0.1),
    ("alexcifarnet", (3, 32, 32), 0.02),
    ("convnet(width=16)", (1, 8, 8), 0.1),
]


def problem(
    text: str,
    shape: tuple[int, int, int],
    device: torch.device,
    *,
    rate: float = 0.1,
    count: int = 3,
    inner_steps: int = 2,
    inner_epochs: int = 2,
    batch: int = 10,
    real_batch: int = 50,
    real: str = "shared",
    dtype: torch.dtype = torch.float64,
) -> tuple:
    """The arguments of ``outer_gradient`` but the plan, drawn on the CPU and moved to ``device``."""
    network = build_network(parse_network(text, shape), shape, 10)
    params = draw_networks(network, "xavier", 1.0, list(range(count)), device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    lead = (count, real_batch) if real == "per_network" else (real_batch,)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, *shape, generator=generator, dtype=torch.float64).to(device, dtype)

    images, real_images = normal(inner_steps, batch), normal(*lead)
    labels = torch.randint(10, (inner_steps, batch), generator=generator).to(device)
    real_labels = torch.randint(10, lead, generator=generator).to(device)
    raw = raw_rates(rate, inner_steps * inner_epochs).to(device, dtype)
    return network, params, images, labels, raw, real_images, real_labels


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("real", ["shared", "per_network"])
@pytest.mark.parametrize("mode", ["store", "recompute"])
@pytest.mark.parametrize(("text", "shape", "rate"), NETWORKS)
def test_gradients_on_cuda_are_those_on_the_cpu(text, shape, rate, mode, real) -> None:
    here, there = (problem(text, shape, device, rate=rate, real=real) for device in (CPU, CUDA))
    on_cpu = outer_gradient(*here, choose_plan(CPU, 1, here[0], mode))
    on_cuda = outer_gradient(*there, choose_plan(CUDA, 1, there[0], mode))
    assert on_cuda.images.device.type == "cuda"
    assert relative(on_cuda.losses, on_cpu.losses) < 1e-9
    assert relative(on_cuda.images, on_cpu.images) < 1e-9
    assert relative(on_cuda.raw_rates, on_cpu.raw_rates) < 1e-9


@pytest.mark.parametrize("batching", ["explicit", "vmap", "loop"])
def test_the_ways_to_batch_networks_agree_on_cuda(batching) -> None:
    arguments = problem("lenet", (1, 28, 28), CUDA)
    plan = choose_plan(CUDA, 1, arguments[0])
    expected = outer_gradient(*arguments, plan)
    found = outer_gradient(
        *arguments, replace(plan, inner_batching=batching, real_batching=batching, real_chunk=7)
    )
    assert relative(found.images, expected.images.cpu()) < 1e-9
    assert relative(found.raw_rates, expected.raw_rates.cpu()) < 1e-9


@pytest.mark.parametrize("optimizer", ["gd", "adam"])
@pytest.mark.parametrize(("text", "shape", "rate"), NETWORKS)
def test_compiled_steps_and_their_cuda_graphs_are_the_same_steps(
    text, shape, rate, optimizer, tmp_path, monkeypatch
) -> None:
    """Several outer steps: the first ones compile and record, the later ones replay what was recorded."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    loop = InnerLoop(InnerOptimizer(optimizer))
    plan = choose_plan(CUDA, 1, problem(text, shape, CUDA)[0])
    for turn in range(4):
        arguments = list(problem(text, shape, CUDA, rate=rate * (1 + 0.1 * turn)))
        expected = outer_gradient(*arguments, plan, loop=loop)
        found = outer_gradient(*arguments, replace(plan, compile=True), loop=loop)
        assert relative(found.losses, expected.losses.cpu()) < 1e-9, turn
        assert relative(found.images, expected.images.cpu()) < 1e-8, turn
        assert relative(found.raw_rates, expected.raw_rates.cpu()) < 1e-8, turn


@pytest.mark.parametrize(("text", "shape", "rate"), NETWORKS)
def test_float32_is_exact_and_tf32_is_not(text, shape, rate) -> None:
    """One step: what is seen is the rounding of products. torch's default would have convolutions in TF32."""
    sizes = {"rate": rate, "inner_steps": 1, "inner_epochs": 1, "count": 8}
    exact = problem(text, shape, CUDA, **sizes)
    single = problem(text, shape, CUDA, dtype=torch.float32, **sizes)
    plan = choose_plan(CUDA, 1, exact[0])
    expected = outer_gradient(*exact, plan).images.cpu()
    flags = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    apart = {}
    for precision in ("full", "tf32", "bf16"):
        found = outer_gradient(*single, replace(plan, precision=precision)).images.cpu().double()
        apart[precision] = float(((found - expected).flatten(1).norm(dim=1) / expected.norm()).median())
    assert apart["full"] < 1e-4 < apart["tf32"] < apart["bf16"] < 0.5, apart
    assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) == flags


def test_trials_are_measured_side_by_side_on_one_gpu() -> None:
    from ddsweep.packing import candidates, measure
    from ddsweep.trial_plan import TrialSettings

    spec = TrialSpec(DATASETS["digits"], network="convnet(width=16)", real_batch=64)
    found = measure(spec, TrialSettings(), "cuda", candidates(4, 1, 2), 0.5)
    assert [(packed.count, packed.gpus) for packed in found] == [(1, 1.0), (2, 0.5)]
    assert all(packed.steps_per_second > 0 for packed in found)


@pytest.mark.parametrize(("text", "shape", "rate"), NETWORKS)
def test_accuracies_on_cuda_are_those_on_the_cpu(text, shape, rate) -> None:
    """float64: no logit is close enough to another for rounding to turn an answer."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (500, *shape), generator=generator, dtype=torch.uint8)
    targets = torch.randint(10, (500,), generator=generator)
    mean, std = (0.5,) * shape[0], (0.3,) * shape[0]
    found = []
    for device in (CPU, CUDA):
        network, params, images, labels, *_ = problem(text, shape, device, count=4)
        data = (pixels.to(device), targets.to(device), mean, std)
        plan = replace(choose_plan(device, 1, network), real_chunk=64)
        found.append(
            evaluate_networks(network, params, images, labels, [rate] * 4, (0, 2, 4, 6), *data, plan)
        )
    on_cpu, on_cuda = found
    assert torch.equal(on_cuda.accuracy, on_cpu.accuracy)
    assert torch.equal(on_cuda.diverged, on_cpu.diverged)
    torch.testing.assert_close(on_cuda.loss, on_cpu.loss, rtol=1e-9, atol=0)


def test_training_on_real_images_on_cuda_is_that_on_the_cpu() -> None:
    """What pools are made by, and how many images of a class are called what."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (100, 1, 28, 28), generator=generator, dtype=torch.uint8)
    targets = torch.randint(10, (100,), generator=generator)
    course, found = Course(epochs=2, batch=32, lr=1e-3, decay_epochs=1, decay_factor=0.5), []
    for device in (CPU, CUDA):
        network, params, *_ = problem("lenet", (1, 28, 28), device)
        data, plan = (pixels.to(device), targets.to(device), (0.5,), (0.3,)), choose_plan(device, 1, network)
        trained = train_on_real(network, params, *data, course, lambda epoch: [epoch, 7, 8], plan)
        assert trained is not None
        found.append((trained, count_right(network, trained, *data, plan)))
    (on_cpu, counts), (on_cuda, other_counts) = found
    for name, value in on_cpu.items():
        assert relative(on_cuda[name], value) < 1e-9, name
    assert torch.equal(other_counts[3], counts[3]) and int(counts[3].sum()) == 300


ALL_WAYS = {
    "as before": {},
    "shuffled": {
        **{"order": "shuffled", "inner_optimizer": "momentum", "labels": "soft", "window": 4},
        **{"inner_augment": "shift+cutout", "outer_augment": "rotate", "clip_running": 2.0, "ema": 0.5},
        **{"trim": 0.3, "max_rollbacks": 1, "image_init": "real"},
    },
    "sampled": {
        "order": "sampled",
        "inner_optimizer": "adam",
        "inner_lr": 0.02,
        "real_batch_mode": "per_network",
    },
}


@pytest.mark.parametrize("settings", ALL_WAYS.values(), ids=ALL_WAYS)
def test_a_few_outer_steps_on_cuda_are_those_on_the_cpu(settings) -> None:
    """The same networks, orders, real batches and first images on both, and so the same distilled set, which
    does the same to other networks."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (200, 1, 8, 8), generator=generator, dtype=torch.uint8)
    targets = torch.arange(200) % 10
    spec = TrialSpec(
        dataset=DATASETS["digits"],
        network="convnet(width=16)",
        **{"inner_steps": 2, "images_per_class": 2, "inner_epochs": 3, "real_batch": 64, "dtype": "float64"},
        **({"inner_lr": 0.2} | settings),
    )
    states, accuracies = [], []
    for device in (CPU, CUDA):
        network = build_network(spec.network_spec, spec.dataset.shape, 10)
        made = Problem.of(spec, choose_plan(device, 1, network), pixels, targets, (0.5,), (0.3,))
        state = initial_state(made)
        for _ in range(3):
            state, report = outer_step(made, state)
            assert report.n_skipped == 0
        states.append(state)
        learned = presented(state)
        found = evaluate_networks(
            *(network, made.networks([1, 2, 3]), learned["images"], labels_of(learned, made)),
            *(rates_of(learned, spec).tolist(), (0, 4, 8), made.real_images, made.real_labels),
            *((0.5,), (0.3,), made.plan),
            loop=evaluation_loop(spec, "heldout", range(3), 8),
        )
        accuracies.append(found.accuracy)
    # Adam divides by the gradient's own size: where that is rounding, so is the direction of the step.
    assert relative(states[1].images, states[0].images) < 1e-6
    assert relative(states[1].raw, states[0].raw) < 1e-6
    torch.testing.assert_close(accuracies[1], accuracies[0], rtol=0, atol=0.011)


def peak_memory(mode: str) -> int:
    arguments = problem(
        *("lenet", (1, 28, 28), CUDA),
        count=8,
        inner_steps=10,
        inner_epochs=3,
        batch=100,
        rate=0.02,
        dtype=torch.float32,
    )
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outer_gradient(*arguments, ExecutionPlan("cuda", 1, mode, "vmap", "vmap", 1024))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_recompute_needs_much_less_memory_than_store_at_thirty_steps() -> None:
    """store keeps the graphs of 30 steps, recompute the weights of 30 steps and the graph of one."""
    peak_memory("store")  # the first call also pays for cuDNN's workspaces
    assert peak_memory("recompute") < 0.5 * peak_memory("store")


GPU_BYTES = 2**30


@pytest.fixture
def small_share() -> Iterator[float]:
    """This process may allocate a GiB more than it has; all of the GPU again afterwards."""
    release_memory()
    total = torch.cuda.get_device_properties(0).total_memory
    share = (torch.cuda.memory_reserved() + GPU_BYTES) / total
    keep_to_share("cuda", share)
    yield share
    keep_to_share("cuda", 0)


def test_a_part_of_a_gpu_is_that_part_of_its_memory_until_it_is_set_anew(small_share) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2 * GPU_BYTES, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(caught.value)
    keep_to_share("cuda", 1)  # the next trial of this process was granted the whole
    assert torch.empty(2 * GPU_BYTES, dtype=torch.uint8, device="cuda").numel() == 2 * GPU_BYTES


def test_what_one_trial_cached_is_there_for_others_after_it() -> None:
    held = torch.empty(GPU_BYTES, dtype=torch.uint8, device="cuda")
    before = torch.cuda.memory_reserved()
    del held
    assert torch.cuda.memory_reserved() == before, "torch keeps it"
    release_memory()
    assert torch.cuda.memory_reserved() <= before - GPU_BYTES


def test_a_test_pass_that_does_not_fit_takes_fewer_images_at_a_time(small_share) -> None:
    """16 networks x 1024 images of 3 x 32 x 32 take gigabytes at once."""
    shape = (3, 32, 32)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (2048, *shape), generator=generator, dtype=torch.uint8).cuda()
    targets = torch.randint(10, (2048,), generator=generator).cuda()
    network, params, *_ = problem("convnet", shape, CUDA, count=16, dtype=torch.float64)
    data = (pixels, targets, (0.5,) * 3, (0.3,) * 3)
    plan = choose_plan(CUDA, 1, network)
    torch.cuda.reset_peak_memory_stats()
    found = count_right(network, params, *data, plan)
    assert torch.cuda.max_memory_allocated() <= small_share * torch.cuda.get_device_properties(0).total_memory
    expected = count_right(network, params, *data, replace(plan, real_chunk=16, test_block=2))
    assert torch.equal(found[3], expected[3])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=0)


def test_a_trial_that_runs_out_of_its_part_goes_on_and_ends_as_without_a_limit(tmp_path) -> None:
    """40 inner steps of 8 networks on 100 images: some 2 GiB under ``store``, 0.2 under ``recompute``."""
    from ddsweep.data.sources import Splits, load_splits
    from ddsweep.results.layout import SweepDirectory
    from ddsweep.trial import distil_trial, read_distilled
    from ddsweep.trial_plan import TrialSettings

    spec = TrialSpec(
        dataset=DATASETS["digits"],
        network="convnet(depth=1,width=64,norm=none)",
        **{"images_per_class": 100, "inner_steps": 10, "inner_epochs": 4, "inner_lr": 0.01},
        **{"outer_steps": 3, "models_per_step": 8, "real_batch": 64, "selection_networks": 1},
        **{"validate_every": 3, "dtype": "float64"},
    )
    splits: Splits = load_splits(spec.dataset, None, validation_fraction=0.1, split_seed=0)
    total = torch.cuda.get_device_properties(0).total_memory
    found = []
    for name, share in (("free", 0.9), ("limited", (torch.cuda.memory_reserved() + GPU_BYTES) / total)):
        directory = SweepDirectory(tmp_path / name)
        settings = TrialSettings(device="cuda", gpus=share, memory_mode="store")
        assert distil_trial(spec, splits, directory, settings)
        found.append(read_distilled(spec, directory))
    keep_to_share("cuda", 0)
    free, limited = found
    assert (free.provenance["memory_mode"], free.provenance["n_replans"]) == ("store", 0)
    assert limited.provenance["memory_mode"] == "recompute" and limited.provenance["n_replans"] >= 1
    assert relative(limited.images, free.images) < 1e-6
