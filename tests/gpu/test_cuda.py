"""What only CUDA has: graphs, roundings, the memory of a part of a GPU; and compiled steps there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import ddsweep.core.training
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.core.distill import applied, gradients_together, initial_state
from ddsweep.core.evaluate import count_right
from ddsweep.core.execution import ExecutionPlan, choose_plan
from ddsweep.core.graphs import forget_recordings, has_recordings, replayed
from ddsweep.core.images import LabelledImages, RealSet
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.memory import is_out_of_memory, keep_to_share, release_memory
from ddsweep.core.networks import build_network
from ddsweep.core.order import draw_batch_order
from ddsweep.core.task import Task
from ddsweep.core.training import InnerLoop, TrainState, train_networks
from ddsweep.core.unroll import Window, outer_gradient
from ddsweep.trial import TrialJob, distil_together
from tests.companions import Cohort
from tests.gpu.problems import DEVICE, NETWORKS, problem, relative


def changing(text, shape, turn: int, rate: float, **sizes) -> list:
    """A problem whose weights, images, rates and real images are other ones in every ``turn``."""
    network, *tensors = problem(text, shape, DEVICE, rate=rate * (1 + 0.1 * turn), **sizes)
    params, distilled, raw, real = tensors
    shrink = 1 - 0.05 * turn
    params = {name: value * shrink for name, value in params.items()}
    return [
        network,
        params,
        LabelledImages(distilled.images * shrink, distilled.labels.roll(turn, 1)),
        raw,
        LabelledImages(real.images * shrink, real.labels.roll(turn)),
    ]


@pytest.mark.parametrize("mode", ["store", "recompute"])
@pytest.mark.parametrize("order", ["fixed", "sampled"])
@pytest.mark.parametrize("optimizer", ["gd", "momentum", "adam"])
@pytest.mark.parametrize(("text", "shape", "rate"), NETWORKS)
def test_a_replayed_graph_is_the_outer_gradient_of_what_goes_in(
    text, shape, rate, optimizer, order, mode
) -> None:
    """Each turn has other weights, images, labels, rates, real images and orders."""
    network = problem(text, shape, DEVICE)[0]
    plan = replace(choose_plan(DEVICE, 1, network, graph=True), memory_mode=mode, segment=2)
    assert plan.graph
    for turn in range(3):
        seeds = [10 * turn + k for k in range(3)]
        batch_order = None if order == "fixed" else draw_batch_order(order, 2, 10, 1, 4, seeds)
        loop = InnerLoop(InnerOptimizer(optimizer), batch_order)
        arguments = [network, *changing(text, shape, turn, rate)[1:]]
        if turn == 2:  # learned labels: another recording
            soft = torch.nn.functional.one_hot(arguments[2].labels, 10).double()
            arguments[2] = replace(arguments[2], labels=soft)
        expected = outer_gradient(*arguments, replace(plan, graph=False), loop=loop)
        found = outer_gradient(*arguments, plan, loop=loop)
        for name in ("losses", "images", "raw_rates", *(["labels"] if turn == 2 else [])):
            # Adam divides by the roots of small squares, which makes much of a rounding.
            apart = relative(getattr(found, name), getattr(expected, name).cpu())
            assert apart < (1e-8 if optimizer == "adam" else 1e-11), (turn, name)
    forget_recordings()


def test_recordings_of_windows_are_apart_and_what_was_returned_stays() -> None:
    arguments = changing("lenet", (1, 28, 28), 0, 0.1)
    plan = choose_plan(DEVICE, 1, arguments[0], graph=True)
    found = [outer_gradient(*arguments, plan, window=Window(start, start + 2)) for start in (0, 2)]
    again = [value.images.clone() for value in found]
    for start, value, copy in zip((0, 2), found, again, strict=True):
        exact = outer_gradient(*arguments, replace(plan, graph=False), window=Window(start, start + 2))
        assert relative(value.images, exact.images.cpu()) < 1e-11
        outer_gradient(*changing("lenet", (1, 28, 28), 1, 0.1), plan, window=Window(start, start + 2))
        assert torch.equal(value.images, copy), "a replay must not write where the last one's results are"
    forget_recordings()


@pytest.mark.parametrize("graph", [False, True], ids=["no graph", "graph"])
@pytest.mark.parametrize(("text", "shape", "rate"), NETWORKS)
def test_the_same_outer_gradient_has_the_same_bits(text, shape, rate, graph) -> None:
    """What a trial that goes on bit for bit rests on; kernels that add up in any order would be faster."""
    arguments = problem(text, shape, DEVICE, rate=rate, dtype=torch.float32)
    plan = choose_plan(DEVICE, 1, arguments[0], graph=graph)
    first, *others = (outer_gradient(*arguments, plan) for _ in range(3))
    for other in others:
        assert torch.equal(other.images, first.images) and torch.equal(other.raw_rates, first.raw_rates)
    forget_recordings()


def test_a_plan_in_pieces_is_recorded_as_it_is() -> None:
    network = problem("lenet", (1, 28, 28), DEVICE)[0]
    plan = replace(choose_plan(DEVICE, 1, network, graph=True), real_chunk=8, real_block=2)
    for turn in range(2):
        arguments = [network, *changing("lenet", (1, 28, 28), turn, 0.1, dtype=torch.float32)[1:]]
        expected = outer_gradient(*arguments, replace(plan, graph=False))
        # A rounding on its way may turn a ReLU; a plan that was not recorded would be far off.
        assert relative(outer_gradient(*arguments, plan).images, expected.images.cpu()) < 0.05, turn
    forget_recordings()


@pytest.mark.parametrize("optimizer", ["gd", "adam"])
@pytest.mark.parametrize(("text", "shape", "rate"), NETWORKS)
def test_training_by_graphs_is_training(text, shape, rate, optimizer, monkeypatch) -> None:
    monkeypatch.setattr(ddsweep.core.training, "RECORDED_STEPS", 3)
    network = problem(text, shape, DEVICE)[0]
    loop, way = InnerLoop(InnerOptimizer(optimizer)), choose_plan(DEVICE, 1, network).inner_batching
    for turn in range(2):
        _, params, distilled, *_ = changing(text, shape, turn, rate)
        rates = [rate * (1 + 0.1 * t) for t in range(7)]
        start = TrainState.start(network, params, loop.optimizer)
        expected = train_networks(network, start, distilled, rates, way, loop)
        found = train_networks(network, start, distilled, rates, way, loop, graph=True)
        pairs = zip((found.weights, *found.slots), (expected.weights, *expected.slots), strict=True)
        for left, right in pairs:
            for name in left:
                assert relative(left[name], right[name].cpu()) < 1e-9, (turn, name)
    forget_recordings()


def test_forgotten_recordings_give_their_memory_back() -> None:
    arguments = changing("lenet", (1, 28, 28), 0, 0.1)
    plan, reserved = choose_plan(DEVICE, 1, arguments[0], graph=True), []
    for _ in range(4):
        outer_gradient(*arguments, plan)
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved()
        release_memory()
        reserved.append(torch.cuda.memory_reserved())
        assert reserved[-1] < held
    workspace = 2**25  # of the matrix library, for a stream that is new
    assert reserved[-1] <= reserved[0] + workspace


def test_what_cannot_be_recorded_is_done_without_and_leaves_the_gpu_usable(caplog) -> None:
    x = torch.ones(3, device="cuda")
    for _ in range(2):
        found = replayed("looks at values", lambda value: [value * 2] if value.sum() > 0 else [value], [x])
        assert float(found[0].sum()) == 6
    assert caplog.text.count("no CUDA graph could be recorded") == 1
    found = replayed("does not", lambda value: [value * 2], [x])
    assert float(found[0].sum()) == 6
    assert float(replayed("does not", lambda value: [value * 2], [x + 1])[0].sum()) == 12
    assert caplog.text.count("no CUDA graph could be recorded") == 1
    forget_recordings()


def test_a_trial_by_graphs_is_the_trial_without_and_goes_on_bit_for_bit(tmp_path, monkeypatch) -> None:
    from ddsweep.data.load import load_splits
    from ddsweep.results.layout import SweepDirectory
    from ddsweep.trial import distil_trial, read_distilled
    from ddsweep.trial_plan import TrialSettings, first_plan

    spec = TrialSpec(
        dataset=DATASETS["digits"],
        network="convnet(depth=1,width=8,norm=none)",
        **{"images_per_class": 2, "inner_steps": 2, "inner_epochs": 2, "inner_lr": 0.1, "order": "shuffled"},
        **{"outer_steps": 6, "models_per_step": 3, "real_batch": 64, "selection_networks": 2},
        **{"validate_every": 3, "labels": "soft", "real_batch_mode": "per_network", "dtype": "float64"},
    )
    settings = TrialSettings(device="cuda", compile="off", checkpoint_every=1)
    assert first_plan(spec, settings).graph
    splits = load_splits(spec.dataset, None, validation_fraction=0.1, split_seed=0)
    whole, killed = SweepDirectory(tmp_path / "whole"), SweepDirectory(tmp_path / "killed")
    assert distil_trial(spec, splits, whole, settings)
    asked = iter([False, False, False, True])
    assert not distil_trial(spec, splits, killed, settings, should_stop=lambda: next(asked))
    forget_recordings()
    assert distil_trial(spec, splits, killed, settings)
    found, expected = read_distilled(spec, killed), read_distilled(spec, whole)
    assert expected.provenance["n_replans"] == 0
    assert torch.equal(found.images, expected.images) and torch.equal(found.labels, expected.labels)
    monkeypatch.setattr("ddsweep.trial_plan._records_a_graph", lambda spec: False)
    without = SweepDirectory(tmp_path / "without")
    assert not first_plan(spec, settings).graph and distil_trial(spec, splits, without, settings)
    assert relative(read_distilled(spec, without).images, expected.images) < 1e-6


@pytest.mark.parametrize("settings", [{"init": "fixed"}, {"models_per_step": 2}], ids=["fixed", "random"])
@pytest.mark.parametrize("text", ["lenet", "convnet(width=8)"])
def test_in_a_plan_of_one_width_a_trial_has_the_same_bits_in_any_company(text, settings) -> None:
    """float32, by recorded graphs: among three others, with one other, at another place, alone."""
    data = DATASETS["mnist" if text == "lenet" else "digits"]
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (300, *data.shape), generator=generator, dtype=torch.uint8)
    real = RealSet(pixels, torch.arange(300) % 10, (0.5,), (0.25,))
    specs = [
        TrialSpec(
            data,
            network=text,
            **{"inner_steps": 2, "images_per_class": 2, "inner_epochs": 2, "real_batch": 100, "seed": seed},
            **{"inner_lr": 0.05 * (1 + seed), **settings},
        )
        for seed in range(4)
    ]
    network = build_network(specs[0].network_spec, data.shape, 10)
    plan = choose_plan(DEVICE, 1, network, networks=specs[0].models_per_step, graph=True)
    tasks = [Task.of(spec, replace(plan, width=4), real) for spec in specs]

    def ends(numbers) -> list:
        states = [initial_state(tasks[number]) for number in numbers]
        for _ in range(3):
            found = gradients_together([tasks[number] for number in numbers], states)
            states = [state for state, _ in applied([tasks[n] for n in numbers], states, found)]
        return states

    expected = ends([0, 1, 2, 3])
    for numbers in ([3, 0], [2], [1, 3, 2]):
        for number, state in zip(numbers, ends(numbers), strict=True):
            for name, value in state.learned.items():
                assert torch.equal(value, expected[number].learned[name]), (numbers, number, name)
    forget_recordings()


def test_a_cohort_on_a_gpu_ends_as_its_trials_alone_but_for_rounding(tmp_path) -> None:
    """Whole trials in float64, drained and gone on with; one ends early, one joins late."""
    from ddsweep.data.load import load_splits
    from ddsweep.results.layout import SweepDirectory
    from ddsweep.trial import distil_trial, read_distilled
    from ddsweep.trial_plan import TrialSettings

    shape = {
        **{"network": "convnet(depth=1,width=8,norm=none)", "images_per_class": 2, "inner_steps": 2},
        **{"inner_epochs": 2, "models_per_step": 2, "real_batch": 64, "selection_networks": 2},
        **{"validate_every": 3, "dtype": "float64"},
    }
    specs = [
        TrialSpec(DATASETS["digits"], **shape, seed=0, inner_lr=0.1, outer_steps=9),
        TrialSpec(DATASETS["digits"], **shape, seed=1, inner_lr=0.3, outer_steps=4, clip_running=1.1),
        TrialSpec(DATASETS["digits"], **shape, seed=2, outer_steps=12, ema=0.9, keep="best", trim=0.5),
    ]
    settings = TrialSettings(device="cuda", compile="off", checkpoint_every=3, log_every=1, cohort=4)
    splits = load_splits(DATASETS["digits"], None, validation_fraction=0.1, split_seed=0)
    alone, together = SweepDirectory(tmp_path / "alone"), SweepDirectory(tmp_path / "together")
    for spec in specs:
        assert distil_trial(spec, splits, alone, settings)
    jobs = [TrialJob(spec, splits, together, settings) for spec in specs]
    distil_together(Cohort([jobs[:2], [], [jobs[2]]], stop_after=6))
    rest = Cohort([jobs])
    distil_together(rest)
    assert rest.outcomes == {spec.trial_id: True for spec in specs}
    for spec in specs:
        assert relative(read_distilled(spec, together).images, read_distilled(spec, alone).images) < 1e-6
    forget_recordings()


@pytest.mark.parametrize("graph", [False, True], ids=["no graph", "graph"])
@pytest.mark.parametrize("optimizer", ["gd", "adam"])
@pytest.mark.parametrize(("text", "shape", "rate"), NETWORKS)
def test_compiled_steps_are_the_same_steps(
    text, shape, rate, optimizer, graph, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    loop = InnerLoop(InnerOptimizer(optimizer))
    plan = choose_plan(DEVICE, 1, problem(text, shape, DEVICE)[0], graph=graph)
    for turn in range(3):
        arguments = changing(text, shape, turn, rate)
        expected = outer_gradient(*arguments, replace(plan, graph=False), loop=loop)
        found = outer_gradient(*arguments, replace(plan, compile=True), loop=loop)
        assert relative(found.losses, expected.losses.cpu()) < 1e-9, turn
        assert relative(found.images, expected.images.cpu()) < 1e-8, turn
        assert relative(found.raw_rates, expected.raw_rates.cpu()) < 1e-8, turn
    assert has_recordings() == graph
    forget_recordings()


@pytest.mark.parametrize(("text", "shape", "rate"), NETWORKS)
def test_float32_is_exact(text, shape, rate) -> None:
    """One step: only the rounding of products is visible. torch's default would have convolutions in TF32."""
    sizes = {"rate": rate, "inner_steps": 1, "inner_epochs": 1, "count": 8}
    exact = problem(text, shape, DEVICE, **sizes)
    single = problem(text, shape, DEVICE, dtype=torch.float32, **sizes)
    plan = choose_plan(DEVICE, 1, exact[0])
    expected = outer_gradient(*exact, plan).images.cpu()
    flags = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    found = outer_gradient(*single, plan).images.cpu().double()
    assert ((found - expected).flatten(1).norm(dim=1) / expected.norm()).median() < 1e-4
    assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) == flags


def test_trials_are_measured_side_by_side_on_one_gpu() -> None:
    from ddsweep.packing import Packing, measure, process_counts
    from ddsweep.trial_plan import TrialSettings

    spec = TrialSpec(DATASETS["digits"], network="convnet(width=16)", real_batch=64)
    found = measure(spec, TrialSettings(), "cuda", [*process_counts(4, 1, 2), Packing(1, 4, 1.0, 4)], 0.5)
    assert [(packed.count, packed.gpus) for packed in found[:2]] == [(1, 1.0), (2, 0.5)]
    assert all(packed.steps_per_second > 0 for packed in found)


def peak_memory(mode: str) -> int:
    arguments = problem(
        *("lenet", (1, 28, 28), DEVICE),
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
    network, params, *_ = problem("convnet", shape, DEVICE, count=16, dtype=torch.float64)
    data = RealSet(pixels, targets, (0.5,) * 3, (0.3,) * 3)
    plan = choose_plan(DEVICE, 1, network)
    torch.cuda.reset_peak_memory_stats()
    found = count_right(network, params, data, plan)
    assert torch.cuda.max_memory_allocated() <= small_share * torch.cuda.get_device_properties(0).total_memory
    expected = count_right(network, params, data, replace(plan, test_chunk=16, test_block=2))
    assert torch.equal(found[3], expected[3])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=0)


def test_a_trial_that_runs_out_of_its_part_goes_on_and_ends_as_without_a_limit(tmp_path) -> None:
    """40 inner steps of 8 networks on 100 images: some 2 GiB under ``store``, 0.2 under ``recompute``."""
    from ddsweep.data.load import Splits, load_splits
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
