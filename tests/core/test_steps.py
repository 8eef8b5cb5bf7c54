"""Compiled inner steps are the same mathematics, and products of float32 are exact.

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
from ddsweep.core.precision import products
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


@pytest.mark.slow
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


def test_the_flags_of_products_are_set_for_a_while_and_on_a_gpu_only() -> None:
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)

    def now() -> list[str]:
        return [flag.fp32_precision for flag in flags]

    before = now()
    with products("cpu"):
        assert now() == before
    with pytest.raises(ZeroDivisionError), products("cuda"):
        assert now() == ["ieee", "ieee"], "torch's default would take convolutions in TF32"
        1 / 0  # noqa: B018
    assert now() == before
