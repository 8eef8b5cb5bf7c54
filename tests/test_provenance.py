"""Provenance: seconds and memory belong to one trial, and every record has a column."""

from __future__ import annotations

import mmap
import re
import time
from datetime import timedelta

import torch

import ddsweep
from ddsweep.provenance import Meter, device_name, environment, utc_now
from ddsweep.results.schemas import TRIALS

MEBIBYTE = 2**20


def test_the_meter_counts_wall_seconds_asleep_and_awake() -> None:
    began = time.monotonic()
    meter = Meter("cpu")
    time.sleep(0.2)
    wall = meter.wall_seconds()
    assert 0.2 <= wall <= time.monotonic() - began


def test_the_meter_counts_cpu_seconds_only_awake() -> None:
    began = time.process_time()
    meter = Meter("cpu")
    time.sleep(0.3)
    asleep = meter.cpu_seconds()
    assert asleep < 0.1
    while time.process_time() - began < asleep + 0.2:
        sum(range(10_000))
    assert 0.15 <= meter.cpu_seconds() <= time.process_time() - began


def test_the_meter_goes_on_from_what_was_spent_before() -> None:
    fresh, resumed = Meter("cpu"), Meter("cpu", wall=100.0, cpu=40.0)
    assert fresh.wall_seconds() < 50
    assert 100 <= resumed.wall_seconds() < 150
    assert 40 <= resumed.cpu_seconds() < 90


def test_peak_memory_is_that_of_one_trial_in_a_process_that_does_many() -> None:
    size = 256 * MEBIBYTE
    first = Meter("cpu")
    big = torch.ones(size, dtype=torch.uint8)
    assert int(big[-1]) == 1
    del big
    peak = first.peak_memory_bytes()
    second = Meter("cpu")
    rest = second.peak_memory_bytes()
    assert peak is not None
    assert rest is not None
    assert peak - rest > 0.8 * size


def test_the_peak_of_a_trial_outlives_the_start_of_another_one_beside_it() -> None:
    size = 256 * MEBIBYTE
    first = Meter("cpu")
    big = torch.ones(size, dtype=torch.uint8)
    assert int(big[-1]) == 1
    del big
    before = first.peak_memory_bytes()
    second = Meter("cpu")
    after, rest = first.peak_memory_bytes(), second.peak_memory_bytes()
    assert before is not None and after is not None and rest is not None
    assert after >= before and before - rest > 0.8 * size


def test_peak_memory_sees_what_is_freed_before_it_is_asked() -> None:
    size = 128 * MEBIBYTE
    meter = Meter("cpu")
    before = meter.peak_memory_bytes()
    with mmap.mmap(-1, size) as big:  # fresh pages, whatever the allocator keeps
        big.write(b"1" * size)
    after = meter.peak_memory_bytes()
    assert before is not None
    assert after is not None
    assert after - before > 0.5 * size


def test_what_the_environment_tells_are_columns_of_the_trials_table() -> None:
    told = environment()
    assert set(told) <= set(TRIALS.names)
    for name, value in told.items():
        assert value is None or isinstance(value, bool if name == "git_dirty" else str), name
    assert told["ddsweep_version"] == ddsweep.__version__
    assert told["torch_version"] == torch.__version__
    assert told["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}", told["git_commit"])


def test_the_processor_has_a_name() -> None:
    assert device_name("cpu").strip()


def test_times_are_in_utc() -> None:
    assert utc_now().utcoffset() == timedelta(0)
