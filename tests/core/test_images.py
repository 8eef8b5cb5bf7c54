"""Real images on their way to a device."""

from __future__ import annotations

from dataclasses import replace
from weakref import ref

import torch

from ddsweep.core.images import RealSet

META = torch.device("meta")
"""A device without memory: as with a GPU, what lies there is a copy."""


def real_set() -> RealSet:
    pixels = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    return RealSet(pixels, torch.arange(6), (0.5,), (0.25,))


def test_all_that_use_the_same_images_share_one_copy_on_a_device() -> None:
    ours = real_set()
    first = ours.shared_on(META)
    assert first.pixels.device == META and first.labels.device == META
    assert replace(ours).shared_on(META) is first, "another trial's view of the same splits"
    assert ours.shared_on(torch.device("cpu")) is ours
    assert first.shared_on(META) is first
    assert real_set().shared_on(META) is not first, "other images"
    assert replace(ours, labels=ours.labels.clone()).shared_on(META) is not first
    assert replace(ours, mean=(0.1,)).shared_on(META).mean == (0.1,)


def test_a_copy_goes_with_the_last_that_uses_it() -> None:
    ours = real_set()
    copy = ours.shared_on(META)
    pixels, there = ref(ours.pixels), ref(copy)
    del copy
    assert there() is None
    copy = ours.shared_on(META)
    del ours
    assert pixels() is None and copy.pixels.device == META
