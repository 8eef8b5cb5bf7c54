"""Compiled inner steps are the same mathematics; what reduced precision does to gradients is bounded.

``aot_eager`` follows the passes and takes their derivatives as Inductor does, but writes no C++: all that is
ours is tested with it. One slow test goes the whole way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from ddsweep.core import steps
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import LabelledImages
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.precision import precision_of, products, stored_dtype
from ddsweep.core.training import InnerLoop
from ddsweep.core.unroll import OuterGradient, outer_gradient

EXPLICIT = ExecutionPlan(inner_batching="explicit", real_batching="explicit", real_chunk=9)
AUTOGRAD = ExecutionPlan(inner_batching="loop", real_batching="loop", real_chunk=9)
CONVNET, LENET, ALEX = (
    ("convnet(depth=1,width=3)", (1, 8, 8)),
    ("lenet", (1, 28, 28)),
    (
        "alexcifarnet",
        (3, 32, 32),
    ),
)


@pytest.fixture
def without_cpp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    steps._compiled.cache_clear()
    yield
    steps._compiled.cache_clear()
    torch._dynamo.reset()


def relative(found: OuterGradient, expected: OuterGradient) -> float:
    pairs = [(found.losses, expected.losses), (found.images, expected.images)]
    pairs.append((found.raw_rates, expected.raw_rates))
    if expected.labels is not None:
        assert found.labels is not None
        pairs.append((found.labels, expected.labels))
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


WAYS = {
    "explicit": (CONVNET, EXPLICIT, "gd", "hard"),
    "explicit, Adam, soft labels": (CONVNET, EXPLICIT, "adam", "soft"),
    "explicit, momentum, max-pools": (LENET, EXPLICIT, "momentum", "hard"),
    "autograd in a loop": (ALEX, AUTOGRAD, "gd", "hard"),
    "autograd in a loop, soft labels": (CONVNET, AUTOGRAD, "gd", "soft"),
    "autograd under vmap, Adam": (
        CONVNET,
        replace(AUTOGRAD, inner_batching="vmap", real_batching="vmap"),
        "adam",
        "hard",
    ),
}


QUICK = ("explicit, Adam, soft labels",)


@pytest.mark.parametrize(
    ("network", "plan", "optimizer", "labels"),
    [
        pytest.param(*way, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, way in WAYS.items()
    ],
)
def test_compiled_steps_are_the_same_steps(
    network, plan, optimizer, labels, make_case, without_cpp: None
) -> None:
    case = make_case(*network, count=2, rate=0.02)
    loop = InnerLoop(InnerOptimizer(optimizer))
    arguments = list(case.arguments)
    if labels == "soft":
        soft = torch.nn.functional.one_hot(case.labels, 10).double() * 0.9
        arguments[2] = LabelledImages(case.images, soft)
    expected = outer_gradient(*arguments, plan, loop=loop)
    for mode in ("store", "recompute"):
        compiled = replace(plan, compile=True, memory_mode=mode, segment=2)
        assert relative(outer_gradient(*arguments, compiled, loop=loop), expected) < 1e-9, mode
    assert steps._compiled.cache_info().currsize > 0, "nothing was compiled"


def test_they_are_compiled_once_for_all_steps_and_rates(make_case, without_cpp: None) -> None:
    """What differs from step to step is a tensor; the guard against compiling too often was never reached."""
    from torch._dynamo.utils import counters

    counters.clear()
    case = make_case(*CONVNET, count=2, inner_steps=2, inner_epochs=3)
    plan, loop = replace(EXPLICIT, compile=True), InnerLoop(InnerOptimizer("adam"))
    for factor in (1.0, 1.5):  # another outer step, with other rates
        arguments = list(case.arguments)
        arguments[3] = case.raw * factor
        outer_gradient(*arguments, plan, loop=loop)
    assert counters["stats"]["unique_graphs"] == 3, "a step, the way back, the pass over real images"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_compiled_code_of_torch_is_the_same_step_too(make_case, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    steps._compiled.cache_clear()
    case = make_case(*LENET, count=2)
    expected = outer_gradient(*case.arguments, EXPLICIT)
    assert relative(outer_gradient(*case.arguments, replace(EXPLICIT, compile=True)), expected) < 1e-9
    assert any(tmp_path.rglob("*.so")), "it was compiled, and where it was told to"
    steps._compiled.cache_clear()


# -------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(("network", "plan"), [(CONVNET, EXPLICIT), (CONVNET, AUTOGRAD), (LENET, EXPLICIT)])
def test_in_bfloat16_a_gradient_is_the_same_up_to_its_rounding(network, plan, make_case) -> None:
    """One step, so that only rounding is visible, and not its growth in an unroll."""
    exact = make_case(*network, count=4, inner_steps=1, inner_epochs=1, batch=10)
    case = make_case(*network, count=4, inner_steps=1, inner_epochs=1, batch=10, dtype=torch.float32)
    expected = outer_gradient(*exact.arguments, plan)
    found = outer_gradient(*case.arguments, replace(plan, precision="bf16"))
    assert found.images.dtype == found.losses.dtype == torch.float32
    a, b = found.images.double().flatten(1), expected.images.flatten(1)
    cosines = torch.nn.functional.cosine_similarity(a, b)
    assert cosines.median() > 0.97 and cosines.median() < 1 - 1e-7, "rounded, and not by much"
    full = outer_gradient(*case.arguments, plan)
    assert (full.images - expected.images).norm() < 1e-3 * expected.images.norm()


def test_soft_labels_in_bfloat16(make_case) -> None:
    case = make_case(*CONVNET, dtype=torch.float32)
    arguments = list(case.arguments)
    arguments[2] = LabelledImages(case.images, torch.nn.functional.one_hot(case.labels, 10).float())
    expected = outer_gradient(*arguments, EXPLICIT)
    found = outer_gradient(*arguments, replace(EXPLICIT, precision="bf16"))
    assert found.labels is not None and expected.labels is not None
    cosine = torch.nn.functional.cosine_similarity(found.labels.flatten(), expected.labels.flatten(), 0)
    assert cosine > 0.95 and found.labels.dtype == torch.float32


def test_channels_innermost_change_the_order_of_sums_alone(make_case) -> None:
    for count, real in ((2, "shared"), (2, "per_network")):
        case = make_case(*ALEX, count=count, real=real, rate=0.02, batch=2, real_batch=4)
        expected = outer_gradient(*case.arguments, AUTOGRAD)
        found = outer_gradient(*case.arguments, replace(AUTOGRAD, channels_last=True))
        assert relative(found, expected) < 1e-9


def test_the_flags_of_products_are_set_for_a_while_and_on_a_gpu_only() -> None:
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)

    def now() -> list[str]:
        return [flag.fp32_precision for flag in flags]

    before = now()
    with products("cpu", "tf32"):
        assert now() == before
    with products("cuda"):
        assert now() == ["ieee", "ieee"], "torch's default would take convolutions in TF32"
    with pytest.raises(ZeroDivisionError), products("cuda", "tf32"):
        assert now() == ["tf32", "tf32"]
        1 / 0  # noqa: B018
    assert now() == before


def test_what_a_dtype_means() -> None:
    assert [stored_dtype(name) for name in ("float32", "float64", "tf32", "bf16")] == [
        *(torch.float32, torch.float64, torch.float32, torch.float32)
    ]
    assert [precision_of(name) for name in ("float32", "float64", "tf32", "bf16")] == [
        *("full", "full", "tf32", "bf16")
    ]
