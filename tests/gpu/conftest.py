"""Tests that need CUDA. They need torch, pytest and ddsweep's engine, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# Without a GPU the folder holds no tests at all, rather than a row of skipped ones: a skip in the
# summary then always means that something which could have run did not.
if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def exact_arithmetic() -> Iterator[None]:
    """TF32 off, so that float32 means float32; memory peaks counted from here."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
