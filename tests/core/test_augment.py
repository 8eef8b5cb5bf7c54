"""Augmentations: linear, drawn from a generator, and each what its name says."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from ddsweep.catalog import augmentation_parts
from ddsweep.core.augment import CUTOUT, Augmentation, draw_augmentation
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import LabelledImages
from ddsweep.core.order import fixed_batch_order
from ddsweep.core.training import Batches, InnerLoop
from ddsweep.core.unroll import outer_gradient

PARTS = ("shift", "rotate", "scale", "flip", "cutout")
COMBINATIONS = [(), *((part,) for part in PARTS), ("shift", "scale"), PARTS]
N = 6


def draw(parts: tuple[str, ...], side: int = 8, count: int = N, seed: int = 0) -> Augmentation:
    return draw_augmentation(parts, count, side, torch.Generator().manual_seed(seed))


def images(*lead: int, side: int = 8, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, 2, side, side, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("parts", COMBINATIONS, ids="+".join)
def test_an_augmentation_is_linear(parts) -> None:
    a, x, y = draw(parts), images(N, seed=1), images(N, seed=2)
    torch.testing.assert_close(a(2 * x - 3 * y), 2 * a(x) - 3 * a(y), rtol=1e-12, atol=1e-12)
    assert float(a(torch.zeros_like(x)).abs().max()) == 0


@pytest.mark.parametrize("parts", COMBINATIONS, ids="+".join)
def test_networks_of_their_own_images_have_the_same_augmentation(parts) -> None:
    a, x = draw(parts), images(3, N)
    whole = a(x)
    assert whole.shape == x.shape
    for k in range(3):
        torch.testing.assert_close(whole[k], a(x[k]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("parts", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("count", [1, 3])
def test_the_way_back_is_the_transpose(parts, count) -> None:
    """<A x, y> = <x, A' y>: with the gradient's own way back, and networks' images innermost in memory."""
    x, y = images(count, N), images(count, N, seed=2).movedim(1, -1).contiguous().movedim(-1, 1)
    a = draw(parts)
    loop = InnerLoop(augment=lambda batch, t: a(batch))
    batches = Batches(LabelledImages(x[0][None], torch.zeros(1, N)), loop, fixed_batch_order(1, N, 1))
    back = batches.back_through_augment(y, 0)
    left, right = (a(x) * y).flatten(1).sum(1), (x * back).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_none_changes_nothing() -> None:
    x = images(N)
    assert draw(()) == Augmentation(None, None)
    assert torch.equal(draw(())(x), x)


@pytest.mark.parametrize("side", [8, 28, 32])
def test_a_flipped_image_is_its_mirror_image_and_half_of_them_are(side) -> None:
    x = images(200, side=side)
    made = draw(("flip",), side, 200)(x)
    mirrored = [bool((b - a.flip(-1)).abs().max() < 1e-12) for a, b in zip(x, made, strict=True)]
    same = [bool((b - a).abs().max() < 1e-12) for a, b in zip(x, made, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert 70 < sum(mirrored) < 130


@pytest.mark.parametrize("side", [8, 28, 32])
def test_a_cutout_is_a_square_of_zeros_and_leaves_the_rest(side) -> None:
    x = images(50, side=side)
    made = draw(("cutout",), side, 50)(x)
    edge, corners = round(CUTOUT * side), set()
    for before, after in zip(x, made, strict=True):
        gone = after[0] == 0
        rows, columns = gone.any(1).nonzero().flatten(), gone.any(0).nonzero().flatten()
        corners.add((int(rows[0]), int(columns[0])))
        assert len(rows) == len(columns) == edge and int(gone.sum()) == edge * edge
        assert torch.equal(after[:, ~gone], before[:, ~gone]) and float(after[:, gone].abs().max()) == 0
    assert len(corners) > 10


def spot(y: int, x: int, side: int = 21) -> Tensor:
    """A blurred spot around pixel (y, x)."""
    at = torch.arange(side, dtype=torch.float64)
    image = torch.exp(-((at[:, None] - y) ** 2 + (at - x) ** 2) / 4)
    return image.expand(N, 2, side, side)


def centre(image: Tensor) -> tuple[float, float]:
    at, weight = torch.arange(image.shape[-1], dtype=torch.float64), image[0] / image[0].sum()
    return float((weight.sum(1) * at).sum()), float((weight.sum(0) * at).sum())


def test_a_shift_moves_by_up_to_a_tenth_of_the_side_and_a_rotation_turns_by_up_to_15_degrees() -> None:
    moved = [centre(image) for seed in range(20) for image in draw(("shift",), 21, seed=seed)(spot(10, 10))]
    reach = [max(abs(y - 10), abs(x - 10)) for y, x in moved]
    assert 1.8 < max(reach) < 2.1 + 1e-6
    turned = [centre(image) for seed in range(20) for image in draw(("rotate",), 21, seed=seed)(spot(10, 16))]
    for y, x in turned:
        assert (y - 10) ** 2 + (x - 10) ** 2 == pytest.approx(36, rel=0.02)
    angle = [torch.atan2(torch.tensor(y - 10), torch.tensor(x - 10)).rad2deg().item() for y, x in turned]
    assert max(angle) == pytest.approx(15, abs=1) and min(angle) == pytest.approx(-15, abs=1)


def test_a_scaling_moves_what_is_outside_along_the_radius() -> None:
    found = [centre(image) for seed in range(20) for image in draw(("scale",), 21, seed=seed)(spot(10, 15))]
    assert all(y == pytest.approx(10, abs=1e-9) for y, _ in found)
    away = [x - 10 for _, x in found]
    assert max(away) == pytest.approx(5 * 1.15, abs=0.15) and min(away) == pytest.approx(5 * 0.85, abs=0.15)


def test_beyond_its_edges_an_image_goes_on() -> None:
    x = torch.ones(N, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(draw(("shift", "rotate", "scale"))(x), x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("parts", COMBINATIONS[1:], ids="+".join)
def test_a_draw_is_a_function_of_its_generator_and_differs_between_images(parts) -> None:
    x = images(1).expand(N, -1, -1, -1)
    made = draw(parts)(x)
    torch.manual_seed(9)
    assert torch.equal(draw(parts)(x), made)
    assert not torch.equal(draw(parts, seed=1)(x), made)
    assert len({tuple(image.flatten().tolist()) for image in made}) > 1


def test_float32_images_stay_float32(make_case) -> None:
    case = make_case("convnet(width=4)", (1, 8, 8), dtype=torch.float32)
    a = draw(PARTS, count=3)
    assert a(case.images).dtype == torch.float32
    plan = ExecutionPlan("cpu", 1, "store", "explicit", "explicit")
    found = outer_gradient(*case.arguments, plan, loop=InnerLoop(augment=lambda batch, t: a(batch)))
    assert found.images.dtype == torch.float32 and bool(torch.isfinite(found.images).all())


# -------------------------------------------------------------------------------------------------- dsa

DSA = ("color", "crop", "cutout", "flip", "scale", "rotate")


def draw_dsa(part: str, side: int = 8, count: int = N, seed: int = 0) -> Augmentation:
    return draw(("dsa", part), side, count, seed)


def test_dsa_draws_one_operation_for_the_batch_all_equally_likely() -> None:
    found = [draw(("dsa", *DSA), seed=seed) for seed in range(600)]
    kinds = Counter(
        "color" if a.color is not None else "cutout" if a.mask is not None else "grid" for a in found
    )
    assert 70 < kinds["color"] < 130 and 70 < kinds["cutout"] < 130 and kinds["grid"] > 340
    assert augmentation_parts("x", "dsa", "cifar10") == ("dsa", *DSA)
    assert "flip" not in augmentation_parts("x", "dsa", "mnist(channels=3)")


def by_its_definition(part: str, draw: Augmentation, x: Tensor) -> Tensor:
    """Zhao and Bilen's operations on images ``[n, c, h, w]``, one pixel after the other, by the values
    drawn."""
    out, (n, _, h, w) = torch.zeros_like(x), x.shape
    for i in range(n):
        if part == "color":
            assert draw.color is not None
            brightness, saturation, contrast = draw.color[i].tolist()
            bright = x[i] + brightness
            grey = bright.mean(0, keepdim=True)
            saturated = (bright - grey) * saturation + grey
            out[i] = (saturated - saturated.mean()) * contrast + saturated.mean()
            continue
        assert draw.affine is not None
        for row in range(h):
            for column in range(w):
                # From -1 at the centre of the first pixel to 1 at that of the last.
                place = torch.tensor([2 * column / (w - 1) - 1, 2 * row / (h - 1) - 1, 1], dtype=x.dtype)
                u, v = (((draw.affine[i] @ place) + 1) * (w - 1) / 2).tolist()
                for q in (math.floor(v), math.floor(v) + 1):
                    for p in (math.floor(u), math.floor(u) + 1):
                        if 0 <= q < h and 0 <= p < w:
                            out[i, :, row, column] += (1 - abs(u - p)) * (1 - abs(v - q)) * x[i, :, q, p]
    return out


@pytest.mark.parametrize("part", [part for part in DSA if part != "cutout"])
def test_an_operation_of_dsa_is_what_it_is_defined_to_be(part: str) -> None:
    x = images(N)
    for seed in range(3):
        a = draw_dsa(part, seed=seed)
        torch.testing.assert_close(a(x), by_its_definition(part, a, x), rtol=0, atol=1e-12)


def test_the_values_of_dsa_fill_their_ranges() -> None:
    def drawn(part: str, side: int = 32) -> Augmentation:
        return draw_dsa(part, side, 2000)

    color = drawn("color").color
    assert color is not None
    ranges = torch.tensor([[-0.5, 0.0, 0.5], [0.5, 2.0, 1.5]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([color.amin(0), color.amax(0)]), ranges, rtol=0, atol=0.01)
    crop, scale, rotate, flip = (drawn(part).affine for part in ("crop", "scale", "rotate", "flip"))
    assert crop is not None and scale is not None and rotate is not None and flip is not None
    pixels = crop[:, :, 2] * 31 / 2
    torch.testing.assert_close(pixels, pixels.round())
    assert set(pixels.round().flatten().tolist()) == set(range(-4, 5))
    sizes = torch.stack([scale[:, 0, 0], scale[:, 1, 1]])
    assert float(sizes.min()) == pytest.approx(1 / 1.2, abs=0.01)
    assert float(sizes.max()) == pytest.approx(1.2, abs=0.01)
    assert not torch.equal(sizes[0], sizes[1])
    angle = torch.atan2(rotate[:, 1, 0], rotate[:, 0, 0]).rad2deg()
    assert float(angle.max()) == pytest.approx(15, abs=0.1) == -float(angle.min())
    assert 900 < int((flip[:, 0, 0] == -1).sum()) < 1100


def test_a_cutout_of_dsa_may_lie_partly_outside() -> None:
    mask = draw_dsa("cutout", 32, 2000).mask
    assert mask is not None
    gone = ~mask[:, 0]
    heights, widths = gone.any(2).sum(1), gone.any(1).sum(1)
    assert torch.equal(gone.sum((1, 2)), heights * widths), "a rectangle"
    assert (int(heights.min()), int(heights.max())) == (8, 16), "its centre is anywhere in the image"
    assert 0.45 < float((heights == 16).double().mean()) < 0.6, "17 of 33 places"


@pytest.mark.parametrize("part", DSA)
def test_one_draw_of_dsa_serves_all_images_of_a_step(part: str) -> None:
    """Siamese: one draw for one image, applied to many, alone or beside those of other networks."""
    a, x = draw_dsa(part, count=1), images(3, N)
    whole = a(x)
    for k in range(3):
        for i in range(N):
            torch.testing.assert_close(whole[k, i], a(x[k, i][None])[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("part", DSA)
def test_the_way_back_through_dsa_is_that_of_its_linear_part(part: str) -> None:
    a, x, y = draw_dsa(part), images(1, N), images(1, N, seed=2)
    loop = InnerLoop(augment=lambda batch, t: a(batch))
    batches = Batches(LabelledImages(x[0][None], torch.zeros(1, N)), loop, fixed_batch_order(1, N, 1))
    back = batches.back_through_augment(y, 0)
    linear = a(x) - a(torch.zeros_like(x))
    torch.testing.assert_close((linear * y).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)
