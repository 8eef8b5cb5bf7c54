"""Whether a Ray would come up on this machine, told beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddsweep import machine
from ddsweep.errors import UserError

GB, MB = 10**9, 10**6


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is free, in bytes: below /dev/shm, and elsewhere."""
    has = {"/dev/shm": 20 * GB, "/tmp": 100 * GB}
    monkeypatch.setattr(machine, "free_bytes", lambda folder: has[str(folder)])
    monkeypatch.setattr(machine, "memory_bytes", lambda: 32 * GB)
    return has


@pytest.mark.parametrize(("files", "told"), [(48, "may have 48 files open, and Ray needs 128"), (1024, "")])
def test_too_few_open_files(
    free: dict[str, int], monkeypatch: pytest.MonkeyPatch, files: int, told: str
) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (16, files))
    assert told in machine.limits_trouble(Path("/tmp"))
    assert bool(told) == bool(machine.limits_trouble(Path("/tmp")))


def test_a_full_temporary_folder(free: dict[str, int]) -> None:
    free["/tmp"] = 3 * MB
    assert "/tmp has 3 MB free, and Ray needs 20" in machine.limits_trouble(Path("/tmp"))


@pytest.mark.parametrize(
    ("shared", "data", "expected"),
    [
        (20 * GB, MB, None),  # Ray's own choice fits
        (2 * GB, 100 * MB, int(1.8 * GB)),  # a smaller store fits, and holds the data
        (64 * MB, 10 * MB, None),  # a container's; Ray takes the temporary folder
        (2 * GB, 5 * GB, None),  # the data do not fit in there
    ],
)
def test_the_object_store_is_in_shared_memory_where_it_can_be(
    free: dict[str, int], shared: int, data: int, expected: int | None
) -> None:
    free["/dev/shm"] = shared
    assert machine.object_store_bytes(Path("/tmp"), data) == expected


def test_data_that_fit_nowhere(free: dict[str, int]) -> None:
    free.update({"/dev/shm": 64 * MB, "/tmp": GB})
    with pytest.raises(UserError, match="needs 10105 MB; /dev/shm has 64 MB free and /tmp 1000 MB"):
        machine.object_store_bytes(Path("/tmp"), 5 * GB)
