"""Every way to train networks, computed in every way: the gradient is that of one autograd graph.

Inner optimiser, order, window, soft labels and augmentation, in float64. The reference in this file
trains one network at a time in plain Python, with the formulas of torch.optim, and shares no line with
the engine but the modules, the order of batches and the augmentations, which have tests of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ddsweep.core.augment import Augmentation, draw_augmentation
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.explicit import Explicit
from ddsweep.core.images import LabelledImages
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.order import BatchOrder, draw_batch_order
from ddsweep.core.training import InnerLoop
from ddsweep.core.unroll import OuterGradient, Window, outer_gradient
from tests.core.conftest import smooth_network

OPTIMIZERS, ORDERS, LABELS = ("gd", "momentum", "adam"), ("fixed", "shuffled", "sampled"), ("hard", "soft")
MOMENTUM = 0.8
LEARNED = ("images", "raw", "labels")


@dataclass(frozen=True)
class Setup:
    """An outer gradient to compute. ``matrices [T, n, pixels, pixels]``: augmentations, multiplied out."""

    case: Any
    labels: Tensor
    optimizer: str
    batch_order: BatchOrder
    window: Window | None
    draws: list[Augmentation] | None
    matrices: Tensor | None

    @property
    def learned(self) -> dict[str, Tensor]:
        soft = {"labels": self.labels} if self.labels.is_floating_point() else {}
        return {"images": self.case.images, "raw": self.case.raw, **soft}

    @property
    def steps(self) -> tuple[int, int]:
        """The steps that are gone back through."""
        return (0, len(self.batch_order)) if self.window is None else (self.window.start, self.window.stop)

    def computed(self, plan: ExecutionPlan) -> OuterGradient:
        case, draws = self.case, self.draws
        loop = InnerLoop(
            InnerOptimizer(self.optimizer, MOMENTUM),
            self.batch_order,
            None if draws is None else lambda images, t: draws[t](images),
        )
        distilled = LabelledImages(case.images, self.labels)
        return outer_gradient(
            *(case.network, case.params, distilled, case.raw, case.real, plan), loop=loop, window=self.window
        )


Make = Callable[..., Setup]


@pytest.fixture(scope="module")
def make_setup(make_case) -> Make:
    """``make_setup(network, shape, optimizer=..., order=...)``: by default S = 2 batches, twice."""

    def make(
        network: str | nn.Module = "convnet(depth=1,width=3)",
        shape: tuple[int, int, int] = (1, 8, 8),
        *,
        optimizer: str = "gd",
        order: str = "fixed",
        labels: str = "hard",
        window: Window | None = None,
        augment: tuple[str, ...] = (),
        classes: int = 3,
        rate: float = 0.1,
        inner_steps: int = 2,
        inner_epochs: int = 2,
        **more: Any,
    ) -> Setup:
        case = make_case(
            network,
            shape,
            classes=classes,
            batch=classes,
            rate=rate if optimizer != "adam" else 0.1 * rate,
            inner_steps=inner_steps,
            inner_epochs=inner_epochs,
            **more,
        )
        generator = torch.Generator().manual_seed(5)
        seeds = [20 + k for k in range(case.count)]
        batch_order = draw_batch_order(order, inner_steps, classes, 1, inner_steps * inner_epochs, seeds)
        targets = case.labels
        if labels == "soft":  # neither positive everywhere nor of sum one
            noise = torch.randn(*targets.shape, classes, generator=generator, dtype=torch.float64)
            targets = F.one_hot(targets, classes) + 0.2 * noise
        draws, matrices = None, None
        if augment:
            draws = [
                draw_augmentation(augment, classes, shape[1], generator) for _ in range(len(batch_order))
            ]
            matrices = torch.stack([multiplied_out(draw, classes, shape) for draw in draws])
        return Setup(case, targets, optimizer, batch_order, window, draws, matrices)

    return make


def multiplied_out(draw: Augmentation, count: int, shape: tuple[int, int, int]) -> Tensor:
    """``[n, pixels, pixels]``: what the augmentation makes of each image with a single pixel."""
    pixels = shape[0] * shape[1] * shape[2]
    basis = torch.eye(pixels, dtype=torch.float64).view(pixels, 1, *shape).expand(-1, count, *shape)
    return draw(basis.contiguous()).flatten(2).permute(1, 2, 0)


# -------------------------------------------------------------------------------------- the reference


Point = tuple[list[Tensor], list[Tensor], list[Tensor]]
"""Weights; velocity, or first moment; second moment."""


def start_of(setup: Setup, k: int) -> Point:
    weights = [value[k].clone() for value in setup.case.params.values()]
    return weights, [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]


def trained(setup: Setup, k: int, point: Point, learned: dict[str, Tensor], start: int, stop: int) -> Point:
    """Network k after steps ``start`` to ``stop``, differentiable if the learned values are."""
    case, batch_order = setup.case, setup.batch_order
    graph = any(value.requires_grad for value in learned.values())
    row = k if batch_order.batches.shape[1] > 1 else 0
    images = learned["images"].flatten(0, 1)
    labels = learned.get("labels", setup.labels).flatten(0, 1)
    weights, first, second = point
    for t in range(start, stop):
        picks = batch_order.batches[t, row]
        x = images[picks]
        if setup.matrices is not None:
            x = (setup.matrices[t] @ x.flatten(1)[:, :, None]).view(x.shape)
        weights = [w if w.requires_grad else w.requires_grad_() for w in weights]
        logits = functional_call(case.network, dict(zip(case.params, weights, strict=True)), (x,))
        g = torch.autograd.grad(F.cross_entropy(logits, labels[picks]), weights, create_graph=graph)
        if setup.optimizer == "gd":
            moves = list(g)
        elif setup.optimizer == "momentum":
            first = [MOMENTUM * u + a for u, a in zip(first, g, strict=True)]
            moves = first
        else:
            first = [0.9 * m + 0.1 * a for m, a in zip(first, g, strict=True)]
            second = [0.999 * s + 0.001 * a**2 for s, a in zip(second, g, strict=True)]
            a, b = 1 - 0.9 ** (t + 1), 1 - 0.999 ** (t + 1)
            moves = [(m / a) / torch.sqrt(s / b + 1e-16) for m, s in zip(first, second, strict=True)]
        rate = torch.log1p(torch.exp(learned["raw"][batch_order.rates[t, row]]))
        weights = [w - rate * move for w, move in zip(weights, moves, strict=True)]
        if not graph:
            weights, first, second = ([w.detach() for w in part] for part in (weights, first, second))
    return weights, first, second


def outer_loss(setup: Setup, k: int, learned: dict[str, Tensor], point: Point) -> Tensor:
    """Outer loss of network k whose window starts at ``point``."""
    case = setup.case
    weights, _, _ = trained(setup, k, point, learned, *setup.steps)
    own = case.real_images.dim() == 5
    x, y = (case.real_images[k], case.real_labels[k]) if own else (case.real_images, case.real_labels)
    return F.cross_entropy(
        functional_call(case.network, dict(zip(case.params, weights, strict=True)), (x,)), y
    )


def window_starts(setup: Setup) -> list[Point]:
    """Where the window of each network starts."""
    return [
        trained(setup, k, start_of(setup, k), setup.learned, 0, setup.steps[0])
        for k in range(setup.case.count)
    ]


def end_to_end(setup: Setup) -> OuterGradient:
    """What autograd makes of the whole window, one network at a time."""
    rows = []
    for k, point in enumerate(window_starts(setup)):
        learned = {name: value.clone().requires_grad_() for name, value in setup.learned.items()}
        loss = outer_loss(setup, k, learned, point)
        rows.append((loss.detach(), *torch.autograd.grad(loss, list(learned.values()))))
    return OuterGradient(*(torch.stack(column) for column in zip(*rows, strict=True)))


def parts_of(gradient: OuterGradient) -> dict[str, Tensor]:
    found = {"losses": gradient.losses, "images": gradient.images, "raw": gradient.raw_rates}
    return found if gradient.labels is None else found | {"labels": gradient.labels}


def worst_difference(left: OuterGradient, right: OuterGradient) -> float:
    """Largest difference, relative to the largest entry of each network and result."""
    worst = 0.0
    a, b = parts_of(left), parts_of(right)
    assert a.keys() == b.keys()
    for name, expected in b.items():
        assert a[name].shape == expected.shape, name
        difference = (a[name] - expected).reshape(len(expected), -1).abs().amax(1)
        worst = max(worst, float((difference / expected.reshape(len(expected), -1).abs().amax(1)).max()))
    return worst


# ------------------------------------------------------------------------------------------- equality

PLANS = [
    ExecutionPlan("cpu", 1, mode, batching, batching, chunk, block, segment)
    for (mode, segment), (batching, chunk, block) in itertools.product(
        (("store", 1), ("recompute", 1), ("recompute", 3)),
        (("explicit", 4, 2), ("vmap", 9, 3), ("loop", 9, 3)),
    )
]
PLANS += [
    ExecutionPlan("cpu", 2, "store", "explicit", "explicit", 4, 2, teams=2),
    ExecutionPlan("cpu", 4, "recompute", "loop", "loop", 9, 3, 3, teams=4),  # more than networks
]
EXPLICIT = PLANS[0]
ALL_PARTS = ("shift", "rotate", "scale", "flip", "cutout")


WINDOWS, AUGMENTS = (None, Window(1, 3)), ((), ALL_PARTS)
WAYS = list(itertools.product(OPTIMIZERS, ORDERS, LABELS, WINDOWS, AUGMENTS))


def plans_for(way: tuple[Any, ...]) -> list[ExecutionPlan]:
    """A third of the plans. All ways together meet each plan with each of their options."""
    return PLANS[WAYS.index(way) % 3 :: 3]


def test_each_plan_meets_each_option() -> None:
    met = {
        (place, option, plan) for way in WAYS for place, option in enumerate(way) for plan in plans_for(way)
    }
    options = [OPTIMIZERS, ORDERS, LABELS, WINDOWS, AUGMENTS]
    assert met == {
        (place, option, plan) for place, own in enumerate(options) for option in own for plan in PLANS
    }


@pytest.mark.parametrize(
    "plans", [plans_for, pytest.param(lambda way: PLANS, marks=pytest.mark.slow)], ids=["some", "all"]
)
@pytest.mark.parametrize("augment", AUGMENTS, ids=["plain", "augmented"])
@pytest.mark.parametrize("window", WINDOWS, ids=["whole", "window"])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_way_to_train_has_the_gradient_of_one_end_to_end_graph(
    make_setup: Make, optimizer, order, labels, window, augment, plans
) -> None:
    for real in ("shared", "per_network"):
        norm = "instance" if real == "shared" else "none"
        setup = make_setup(
            f"convnet(depth=1,width=3,norm={norm})",
            **{"optimizer": optimizer, "order": order, "labels": labels, "window": window},
            **{"augment": augment, "real": real},
        )
        expected = end_to_end(setup)
        for plan in plans((optimizer, order, labels, window, augment)):
            assert worst_difference(setup.computed(plan), expected) < 1e-12, plan


@pytest.mark.parametrize("teams", [1, 2])
def test_torch_notes_nothing_down_where_it_has_no_part_and_what_comes_out_is_as_ever(
    make_setup: Make, monkeypatch: pytest.MonkeyPatch, teams: int
) -> None:
    real, seen = Explicit.gradient, set()

    def gradient(self: Explicit, *arguments: Any) -> Any:
        seen.add(torch.is_inference_mode_enabled())
        return real(self, *arguments)

    monkeypatch.setattr(Explicit, "gradient", gradient)
    plan = replace(EXPLICIT, threads=teams, teams=teams)
    for augment, expected in (((), True), (ALL_PARTS, False)):
        seen.clear()
        found = make_setup(optimizer="adam", labels="soft", augment=augment).computed(plan)
        assert seen == {expected}
        assert not any(part.is_inference() for part in (*parts_of(found).values(), found.norms))


@pytest.mark.parametrize(
    ("optimizer", "order", "labels", "window"),
    [("momentum", "shuffled", "hard", Window(2, 5)), ("adam", "sampled", "soft", None)],
)
def test_lenet_too_has_the_gradient_of_one_end_to_end_graph(
    make_setup: Make, optimizer, order, labels, window
) -> None:
    setup = make_setup(
        *("lenet", (1, 28, 28)),
        **{"optimizer": optimizer, "order": order, "labels": labels, "window": window},
        **{"inner_steps": 3, "real": "per_network", "augment": ALL_PARTS},
    )
    expected = end_to_end(setup)
    # Some of 61,706 gradients are tiny, and Adam divides by them: rounding grows to 1.5e-11.
    tolerance = 1e-10 if optimizer == "adam" else 1e-12
    for plan in PLANS[::4]:  # each memory mode with another way to batch
        assert worst_difference(setup.computed(plan), expected) < tolerance, plan


def test_a_window_that_is_everything_is_no_window(make_setup: Make) -> None:
    setup = make_setup(optimizer="adam", labels="soft")
    whole, none = (
        replace(setup, window=w).computed(EXPLICIT) for w in (Window(0, len(setup.batch_order)), None)
    )
    for name, value in parts_of(none).items():
        assert torch.equal(value, parts_of(whole)[name])


def test_outside_of_a_window_nothing_has_a_derivative(make_setup: Make) -> None:
    """One batch a step and one rate a step: those of steps before and after the window get nothing."""
    setup = make_setup(
        inner_steps=4, inner_epochs=1, optimizer="momentum", window=Window(1, 3), labels="soft"
    )
    for batching in ("explicit", "vmap"):
        found = setup.computed(ExecutionPlan("cpu", 1, "recompute", batching, batching, segment=3))
        for part in (found.images, found.labels, found.raw_rates):
            assert (part.flatten(2) if part.dim() > 2 else part[..., None]).ne(0).any(2).tolist() == [
                [False, True, True, False]
            ] * 3


def test_steps_before_a_window_matter_only_by_where_they_lead(make_setup: Make) -> None:
    """A window is the whole of a shorter unroll from where the earlier steps led (gd has no memory)."""
    setup = make_setup(inner_steps=4, inner_epochs=1, window=Window(1, 3))
    starts = [weights for weights, _, _ in window_starts(setup)]
    led = {n: torch.stack([w[i] for w in starts]) for i, n in enumerate(setup.case.params)}
    case = replace(
        setup.case,
        params=led,
        images=setup.case.images[1:3],
        labels=setup.labels[1:3],
        raw=setup.case.raw[1:3],
    )
    short = outer_gradient(*case.arguments, EXPLICIT)
    long = setup.computed(EXPLICIT)
    torch.testing.assert_close(long.losses, short.losses, rtol=1e-13, atol=0)
    torch.testing.assert_close(long.images[:, 1:3], short.images, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(long.raw_rates[:, 1:3], short.raw_rates, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("batching", ["explicit", "vmap", "loop"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_diverging_network_leaves_the_others_alone_whatever_the_optimiser(
    make_setup: Make, optimizer, batching
) -> None:
    for order, real in (("fixed", "shared"), ("shuffled", "per_network")):
        setup = make_setup(
            "convnet(depth=1,width=3,norm=none)", optimizer=optimizer, order=order, labels="soft", real=real
        )
        plans = [ExecutionPlan("cpu", 1, mode, batching, batching, 4, 3) for mode in ("store", "recompute")]
        healthy = [setup.computed(plan) for plan in plans]
        for value in setup.case.params.values():
            value[1] *= 1e200
        for plan, well in zip(plans, healthy, strict=True):
            broken = setup.computed(plan)
            assert torch.isfinite(broken.losses).tolist() == [True, False, True]
            assert torch.isfinite(broken.norms).tolist() == [True, False, True]
            rows = [OuterGradient(*(v[[0, 2]] for v in parts_of(g).values())) for g in (broken, well)]
            assert worst_difference(*rows) < 1e-14


def test_the_norm_is_that_of_all_that_is_learned(make_setup: Make) -> None:
    gradient = make_setup(labels="soft").computed(ExecutionPlan())
    parts = [part.flatten(1) for name, part in parts_of(gradient).items() if name != "losses"]
    torch.testing.assert_close(gradient.norms, torch.cat(parts, 1).norm(dim=1), rtol=1e-13, atol=0)


# ------------------------------------------------------------------------------------ finite differences


def worst_slope(setup: Setup, gradient: OuterGradient, eps: float, directions: int = 2) -> dict[str, float]:
    """For each learned value, the largest |measured - computed| / |measured| over networks, as vectors over
    random directions. The start of a window is held fixed."""
    generator = torch.Generator().manual_seed(99)
    computed, starts, worst = parts_of(gradient), window_starts(setup), {}
    for name, value in setup.learned.items():
        errors, sizes = [], []
        for _ in range(directions):
            along = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for k, start in enumerate(starts):
                ends = [
                    outer_loss(setup, k, setup.learned | {name: value + sign * eps * along}, start).detach()
                    for sign in (1, -1)
                ]
                measured = (ends[0] - ends[1]) / (2 * eps)
                errors.append(measured - (computed[name][k] * along).sum())
                sizes.append(measured)
        shape = (directions, setup.case.count)
        error, size = (torch.stack(part).view(shape).norm(dim=0) for part in (errors, sizes))
        worst[name] = float((error / size).max())
    return worst


# (eps, tolerance). Relative errors measured with torch 2.15 on a CPU, the largest over all cases below:
# 4.2e-9 for gd, 3.1e-9 for momentum. Adam bends sharply where a gradient is small, at eps 3e-6 an error
# of 8e-6 that falls with eps squared; at 3e-7 rounding is what remains.
SLOPES = {"gd": (3e-6, 2e-8), "momentum": (3e-6, 2e-8), "adam": (3e-7, 2e-6)}


@pytest.mark.parametrize("window", [None, Window(2, 5)], ids=["whole", "window"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_of_a_smooth_network_are_the_measured_slopes(
    make_setup: Make, optimizer, order, window
) -> None:
    setup = make_setup(
        smooth_network(3, 6, 3),
        inner_steps=3,
        optimizer=optimizer,
        order=order,
        labels="soft",
        window=window,
        rate=0.5,
        count=2,
    )
    eps, tolerance = SLOPES[optimizer]
    for name, error in worst_slope(setup, setup.computed(ExecutionPlan()), eps).items():
        assert error < tolerance, name


# The same at eps 1e-7 with kinks, T = 4: 2.2e-7 and 6.0e-7, both by the images of lenet.
KINKED_TOLERANCE = {"momentum": 1e-6, "adam": 3e-6}


@pytest.mark.parametrize("window", [None, Window(1, 3)], ids=["whole", "window"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize(("network", "shape"), [("lenet", (1, 28, 28)), ("convnet(width=16)", (1, 8, 8))])
def test_gradients_written_out_are_the_measured_slopes_of_networks_with_kinks(
    make_setup: Make, network, shape, optimizer, window
) -> None:
    setup = make_setup(
        network, shape, optimizer=optimizer, order="sampled", labels="soft", window=window, count=2
    )
    for name, error in worst_slope(setup, setup.computed(EXPLICIT), 1e-7, directions=1).items():
        assert error < KINKED_TOLERANCE[optimizer], name
