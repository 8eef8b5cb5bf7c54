"""Tests that need CUDA. They need torch, pytest and ddsweep's engine, and nothing else."""

from __future__ import annotations

import pytest
import torch

# Without a GPU the folder holds no tests at all, rather than a row of skipped ones: a skip in the
# summary then always means that something which could have run did not.
if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def from_nothing() -> None:
    """Memory peaks are counted from here."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
