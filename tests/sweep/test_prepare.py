"""What a run says of its data before it begins."""

from __future__ import annotations

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.sweep.prepare import load_all_splits, repeats


def test_more_distilled_images_than_real_ones_are_told() -> None:
    trials = [TrialSpec(DATASETS["digits"], images_per_class=count) for count in (1, 10, 500)]
    splits = load_all_splits(trials, None, stand_in=False)
    least = min(int((next(iter(splits.values())).train.labels == label).sum()) for label in range(10))
    (said,) = repeats(trials, splits)
    assert f"digits: images_per_class 500 is more than the {least} training images" in said
    assert list(repeats(trials[:2], splits)) == []
