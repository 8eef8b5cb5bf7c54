"""Processes that ddsweep starts ask for huge pages of memory, unless the user has said otherwise."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LIBRARY, VERSION = platform.libc_ver()
OLD = LIBRARY != "glibc" or [int(part) for part in VERSION.split(".")] < [2, 35]

CHILD = """
import re
block = bytearray(64 * 2**20)
block[:: 4096] = bytes([1]) * len(block[:: 4096])
found = re.search(r"AnonHugePages: +([0-9]+) kB", open("/proc/self/smaps_rollup").read())
print(int(found.group(1)) // 1024)
"""

PARENT = """
import os, subprocess, sys
import ddsweep
print(os.environ["GLIBC_TUNABLES"], flush=True)
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""


def started_with(environment: dict[str, str], tunables: str | None) -> tuple[str, int]:
    """What a process that imports ddsweep hands on, and the MiB in huge pages of one that it starts, after it
    has filled 64 MiB."""
    given = {name: value for name, value in environment.items() if name != "GLIBC_TUNABLES"}
    given |= {} if tunables is None else {"GLIBC_TUNABLES": tunables}
    command = [sys.executable, "-c", PARENT, CHILD]
    said = subprocess.run(command, env=given, capture_output=True, text=True, check=True).stdout
    handed_on, filled = said.split()
    return handed_on, int(filled)


@pytest.mark.skipif(
    not ENABLED.is_file() or "[madvise]" not in ENABLED.read_text() or OLD,
    reason="this Linux gives huge pages to all or to none, or its C library (before 2.35) does not ask",
)
def test_processes_get_huge_pages_where_linux_lets_them_ask(environment: dict[str, str]) -> None:
    assert started_with(environment, None)[1] >= 48
    assert started_with(environment, "glibc.malloc.hugetlb=0")[1] < 16


def test_what_the_user_has_set_stays(environment: dict[str, str]) -> None:
    own = "glibc.malloc.hugetlb=0"
    assert started_with(environment, own)[0] == own
    others = "glibc.malloc.check=0"
    assert started_with(environment, others)[0] == f"{others}:glibc.malloc.hugetlb=1"
