"""The picture of a distilled set: where each image is, and that it fits a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from ddsweep.results.grid import grid_png, image_grid

LEFT, TOP, SIDE = 56, 22, 50
"""Pixels of step names, of class names, and from tile to tile (8 x 8 pixels, enlarged to 48)."""


def drawn(classes: Sequence[Sequence[int]], names: Sequence[str], size: int = 8) -> torch.Tensor:
    """The picture [height, width] of a set with these classes, whose images are grey: the class as tens, and
    the number of the image in its class as units, of 255."""
    grey = torch.zeros(len(classes), len(classes[0]))
    for step, own in enumerate(classes):
        seen = dict.fromkeys(own, 0)
        for image, label in enumerate(own):
            grey[step, image] = (10 * label + seen[label] + 1) / 255
            seen[label] += 1
    images = grey.view(*grey.shape, 1, 1, 1).expand(-1, -1, 1, size, size)
    png = grid_png(images, [0.0], [1.0], torch.tensor(classes), names)
    return torch.from_numpy(imread(io.BytesIO(png)).copy())[..., 0]


def tiles(picture: torch.Tensor, top: int, columns: int) -> list[int]:
    """The greys of a row of tiles; white behind its last one is 255."""
    middles = [LEFT + SIDE * column + 24 for column in range(columns)]
    return [round(255 * float(picture[top + 24, middle])) for middle in middles]


def test_names_with_dollars_are_names() -> None:
    """And no formula between them."""
    for names in (("$0_to_$10", "b"), ("US$5 to US$9", r"\alpha$\frac$")):
        grid_png(torch.rand(1, 2, 1, 8, 8), [0.5], [0.5], torch.tensor([[0, 1]]), names)


def test_many_images_of_a_class_are_below_each_other() -> None:
    """A step of 10 x 10 images is a square, and not a row of 100."""
    labels = [image % 10 for image in range(100)]
    picture = drawn([labels], [str(label) for label in range(10)])
    assert picture.shape == (TOP + 10 * SIDE + 6, LEFT + 10 * SIDE + 6)
    for row in range(10):
        found = tiles(picture, TOP + SIDE * row, 10)
        assert found == [10 * label + row + 1 for label in range(10)]


def test_steps_of_several_rows_lie_apart() -> None:
    """Three images of each of ten classes a step: three rows, and white below them."""
    labels = [image // 3 for image in range(30)]
    picture = drawn([labels, labels], [str(label) for label in range(10)])
    for step_top in (TOP, TOP + 3 * SIDE + 6):
        for row in range(3):
            found = tiles(picture, step_top + SIDE * row, 10)
            assert found == [10 * label + row + 1 for label in range(10)]
    assert picture.shape == (TOP + 6 * SIDE + 6 + 6, LEFT + 10 * SIDE + 6)


def test_more_classes_than_columns_have_their_names_above_each_row() -> None:
    picture = drawn([list(range(25))], [chr(ord("a") + label) for label in range(25)])
    first, second = TOP, 2 * TOP + SIDE
    assert tiles(picture, first, 12) == [10 * label + 1 for label in range(12)]
    assert tiles(picture, second, 13) == [10 * label + 1 for label in range(12, 25)]
    between = picture[first + SIDE : second, LEFT:]
    assert (between < 0.5).any(), "names"


def test_steps_with_other_classes_have_names_of_their_own() -> None:
    """The classes of a step may be its own; the names above the first step would be wrong there."""
    picture = drawn([[0, 0, 1], [0, 1, 1]], ["zero", "one"])
    assert tiles(picture, TOP, 3) == [1, 2, 11]
    assert tiles(picture, 2 * TOP + SIDE, 3) == [1, 11, 12]


def test_grid_shows_every_image_denormalised_by_step_and_class(tmp_path: Path) -> None:
    # Image (step, class) is one grey level, so that its place in the picture can be found again.
    levels = torch.tensor([[0.1, 0.3, 0.5], [0.6, 0.8, 2.0]])
    images = ((levels - 0.2) / 0.5).view(2, 3, 1, 1, 1).expand(2, 3, 1, 8, 8)
    path = tmp_path / "ab" / "grid.png"
    image_grid(images, [0.2], [0.5], [2, 0, 1], path, ["zero", "one", "two"], tmp_path / ".tmp")
    picture = torch.from_numpy(imread(path).copy())[..., 0]
    first = path.read_bytes()
    for row, level in enumerate(levels[:, [1, 2, 0]].clamp(0, 1)):
        for column in range(3):
            # 56 pixels of step names, 22 of class names, tiles of 48 with gaps of 2
            tile = picture[22 + 50 * row : 70 + 50 * row, 56 + 50 * column : 104 + 50 * column]
            assert tile.shape == (48, 48)
            assert (tile - level[column]).abs().max() < 0.01
    image_grid(images, [0.2], [0.5], [2, 0, 1], path, ["zero", "one", "two"], tmp_path / ".tmp")
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("steps", "per_class", "channels", "size"), [(50, 1, 1, 28), (50, 30, 3, 32), (1, 1, 3, 64)]
)
def test_large_sets_stay_readable(
    tmp_path: Path, steps: int, per_class: int, channels: int, size: int
) -> None:
    labels = torch.arange(10).repeat(per_class)
    images = torch.rand(steps, 10 * per_class, channels, size, size)
    names = [f"a long name {i}" for i in range(10)]
    mean, std = [0.5] * channels, [0.2] * channels
    image_grid(images, mean, std, labels.expand(steps, -1), tmp_path / "g.png", names, tmp_path / ".tmp")
    height, width = imread(tmp_path / "g.png").shape[:2]
    scaled = size * (1 if size >= 48 else 2) + 2
    assert scaled < height < 40 * scaled + 150
    assert 10 * scaled < width < 20 * scaled + 300
