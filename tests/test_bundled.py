"""The files that come with ddsweep: found by name from any folder, and written out to be edited."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ddsweep import bundled
from ddsweep.bundled import bundled_names, find_file, write_files
from ddsweep.cli import main
from ddsweep.errors import SettingError, UserError
from ddsweep.launch.site import load_site
from ddsweep.pools.file import load_pool
from ddsweep.spec import load_sweep
from tests.conftest import Run

ROOT = Path(__file__).resolve().parents[1]
LOADERS = {"sweep file": load_sweep, "pool file": load_pool, "site file": load_site}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", LOADERS)
def test_every_file_is_found_by_its_name_from_an_empty_folder(kind: str) -> None:
    names = bundled_names(kind)
    assert names == sorted(path.stem for path in (ROOT / bundled.FOLDERS[kind]).glob("*.yaml"))
    for name in names:
        LOADERS[kind](find_file(Path(name), kind))


@pytest.mark.parametrize("name", bundled_names("sweep file"))
def test_every_sweep_can_be_planned_without_its_data(name: str, ddsweep: Run) -> None:
    done = ddsweep("plan", name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"(about [\d.]+|under 1) CPU-(minute|hour)s? to distil", done.stdout)


def test_a_path_means_that_file_and_a_name_the_copy_of_this_folder_first() -> None:
    write_files(Path())
    own = Path("sweeps/quickstart.yaml")
    assert find_file(own, "sweep file") == find_file(Path("quickstart"), "sweep file") == own
    Path("quickstart").write_text("name: mine")
    assert find_file(Path("quickstart"), "sweep file") == Path("quickstart")
    Path("usps_lenet").mkdir()
    assert find_file(Path("usps_lenet"), "pool file") == Path("sweeps/pools/usps_lenet.yaml")


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        (
            "quickstrt",
            "sweep file",
            r"^quickstrt: no such sweep file \(did you mean quickstart\?\); .* mnist_",
        ),
        ("lokal", "site file", r"no such site file \(did you mean local\?\); .*: generic, local$"),
        (
            "zzz",
            "pool file",
            r"^zzz: no such pool file; those that come with ddsweep: cifar10_alexcifarnet, ",
        ),
        (
            "sweeps/quickstart.yaml",
            "sweep file",
            "goes by its name, quickstart; `ddsweep init` writes a copy$",
        ),
        ("nowhere/my.yaml", "sweep file", r"^nowhere/my\.yaml: no such sweep file$"),
        (300 * "x", "sweep file", r"^x{300}: no such sweep file; those that come with ddsweep: "),
        ("quickstart.yml", "site file", r"^quickstart\.yml: no such site file$"),
    ],
)
def test_a_file_that_is_not_there(given: str, kind: str, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        find_file(Path(given), kind)


def test_a_file_that_lies_here_without_its_ending_is_hinted_at(empty_folder: Path) -> None:
    (empty_folder / "my_sweep.yaml").touch()
    with pytest.raises(
        SettingError, match=r"^my_sweep: no such sweep file \(did you mean my_sweep\.yaml\?\)"
    ):
        find_file(Path("my_sweep"), "sweep file")


def test_init_writes_what_it_came_with_and_never_over_a_file(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["init", "my lab"])
    assert end.value.code == 0
    there = sorted(path for path in Path("my lab").rglob("*") if path.is_file())
    assert Path("my lab/slurm/ray_cluster.sbatch") in there and len(there) == len(
        [*ROOT.glob("sweeps/*.yaml"), *ROOT.glob("sweeps/pools/*.yaml"), *ROOT.glob("slurm/*.[ys]*")]
    )
    for path in there:
        assert path.read_bytes() == (ROOT / path.relative_to("my lab")).read_bytes()
    assert "Next: cd 'my lab' && ddsweep run sweeps/quickstart.yaml" in capsys.readouterr().out

    mine, gone = Path("my lab/slurm/local.yaml"), Path("my lab/sweeps/quickstart.yaml")
    mine.write_text("scheduler: local\ncpus_per_node: 64\n")
    gone.unlink()
    with pytest.raises(SystemExit):
        main(["init", "my lab"])
    out = capsys.readouterr().out
    assert "my lab/sweeps: 1 file written" in out and f"{mine} differs from" in out
    assert "cpus_per_node: 64" in mine.read_text() and gone.is_file()


@pytest.mark.parametrize("place", ["file", "file/below", "lab"])
def test_a_folder_that_cannot_be_written_is_named(place: str) -> None:
    Path("file").write_text("in the way")
    Path("lab/sweeps").mkdir(parents=True)
    Path("lab/sweeps/pools").write_text("in the way")
    with pytest.raises(UserError, match=rf"^{place}.*: cannot be written: "):
        write_files(Path(place))
