"""The picture of README is drawn from the results that are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread

ROOT = Path(__file__).resolve().parents[2]


def test_the_picture_of_the_readme_can_be_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from picture import draw

    draw(ROOT / "docs/reproduction/mnist_random", tmp_path / "new" / "picture.png")
    drawn, committed = imread(tmp_path / "new/picture.png"), imread(ROOT / "docs/pictures/mnist_random.png")
    assert drawn.shape == committed.shape
    assert abs(drawn - committed).mean() < 0.02, "run the command in bench/picture.py"


def test_the_picture_of_the_study_can_be_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from study import ROW, draw
    from tables import studied

    draw(studied(ROW), tmp_path / "study.png")
    drawn, committed = imread(tmp_path / "study.png"), imread(ROOT / f"docs/pictures/{ROW}.png")
    assert drawn.shape == committed.shape
    assert abs(drawn - committed).mean() < 0.02, "run python docs/study.py"
