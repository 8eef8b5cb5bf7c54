"""The folder of a launch: private, and read by others while it is written."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ddsweep.errors import ResultsError
from ddsweep.launch.folder import (
    Job,
    Launch,
    LaunchFolder,
    launches_of,
    new_folder,
    read_json,
    write_json,
)
from ddsweep.launch.site import Site
from ddsweep.machine import versions
from ddsweep.results.layout import SweepDirectory
from tests.launch.conftest import make_record

SITE = Site.model_validate(
    {"scheduler": "slurm", "cpus_per_node": 4, "setup": ["module load x"], "time": "90m"}
)


@pytest.fixture
def directory(tmp_path: Path) -> SweepDirectory:
    return SweepDirectory(tmp_path / "all results" / "small")


def test_a_record_is_read_as_it_was_written(directory: SweepDirectory) -> None:
    folder = new_folder(directory, "array")
    launch = make_record(directory, SITE, Job("12", "trials", 3), Job("77", "local", started="99"))
    launch.write(folder)
    back = Launch.read(folder)
    assert back.jobs == launch.jobs and back.versions == versions()
    assert back.directory == directory
    site = back.site_spec
    assert (site.time, site.cpus_per_node, tuple(site.setup)) == (90, 4, ("module load x",))
    assert {name: getattr(site, name) for name in Site.model_fields if name != "setup"} == {
        name: getattr(SITE, name) for name in Site.model_fields if name != "setup"
    }


def test_folders_are_private_and_in_order(directory: SweepDirectory) -> None:
    folders = [new_folder(directory, mode) for mode in ("cluster", "array")]
    for folder in folders:
        make_record(directory, SITE).write(folder)
        for place in (folder.root, folder.logs):
            assert place.stat().st_mode & 0o777 == 0o700
        assert re.fullmatch(r"\d{8}-\d{6}-(cluster|array)-[0-9a-f]{4}", folder.name)
    new_folder(directory, "array")  # without a record: a launch that was refused just then
    assert sorted(f.root for f in launches_of(directory)) == sorted(f.root for f in folders)


def test_a_folder_that_cannot_be_made_is_one_message(directory: SweepDirectory) -> None:
    directory.root.mkdir(parents=True)
    (directory.root / "jobs").touch()
    with pytest.raises(ResultsError, match="a file is in the way"):
        new_folder(directory, "array")


@pytest.mark.parametrize("text", ['{"mode": "arr', "", "[1, 2]", "\xff"])
def test_a_torn_file_is_one_message_that_names_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "launch.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ResultsError, match=f"^{re.escape(str(path))}: ") as refused:
        read_json(path)
    assert "\n" not in str(refused.value)
    with pytest.raises(ResultsError, match=re.escape(str(path))):
        Launch.read(LaunchFolder(tmp_path))


def test_no_file_is_none_and_no_record_an_error(tmp_path: Path) -> None:
    assert read_json(tmp_path / "launch.json") is None
    with pytest.raises(ResultsError, match="no record of a launch"):
        Launch.read(LaunchFolder(tmp_path))


@pytest.mark.parametrize(
    "change", [{"from_tomorrow": 1}, {"jobs": [{"number": 1}]}, {"jobs": None}, {"site": {}}, {"site": "x"}]
)
def test_a_record_of_another_version_is_one_message(
    directory: SweepDirectory, change: dict[str, object]
) -> None:
    folder = new_folder(directory, "array")
    make_record(directory, SITE).write(folder)
    content = json.loads(folder.record.read_text())
    write_json(folder.record, {**content, **change})
    with pytest.raises(ResultsError, match="not a record that this version reads"):
        Launch.read(folder)


def test_writing_leaves_nothing_beside(directory: SweepDirectory) -> None:
    folder = new_folder(directory, "array")
    launch = make_record(directory, SITE)
    for number in range(3):
        replace(launch, jobs=(Job(str(number), "trials"),)).write(folder)
    assert [job.id for job in Launch.read(folder).jobs] == ["2"]
    assert not list((folder.root / ".tmp").iterdir())


def test_versions_name_the_code_itself(tmp_path: Path) -> None:
    found = versions()
    assert set(found) == {"ddsweep", "code", "python", "torch", "ray"}
    assert re.fullmatch("[0-9a-f]{12}", found["code"]) and found["ray"].count(".") == 2
    versions.cache_clear()
    assert versions() == found, "the same files, the same digest"


def test_names_of_elements_and_runs() -> None:
    folder = LaunchFolder(Path("/r/jobs/l"))
    assert folder.run("12_2", 1) == Path("/r/jobs/l/runs/12_2.1")
    assert folder.outcome("trials", 2) == Path("/r/jobs/l/outcomes/trials-0002.json")
    assert os.path.basename(folder.log("12_2")) == "12_2_0_log.out"
