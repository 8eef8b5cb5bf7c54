"""Tests that need a GPU, or for the engine a pretended one. They need torch, pytest and ddsweep; no Ray."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.pretended import PretendedDevice
from tests.gpu.problems import PRETENDED

# Without a GPU the folder holds no tests at all, rather than a row of skipped ones: a skip in the
# summary then always means that something which could have run did not. tests/core/test_devices.py runs
# those of the engine on the pretended device.
if PRETENDED:
    collect_ignore_glob = ["test_cuda.py"]
elif torch.cuda.is_available():
    collect_ignore_glob = ["test_pretended.py"]
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def pretended() -> Iterator[None]:
    if not PRETENDED:
        yield
        return
    with PretendedDevice():
        yield


@pytest.fixture(autouse=True)
def from_nothing() -> None:
    """Memory peaks are counted from here."""
    if not PRETENDED:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
