"""What pip installs: the built wheel in an environment of its own, and what wheel and sdist should hold."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import ddsweep

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of this source tree. The wheel is built from the sdist, as pip
    does it where there is no wheel."""
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, "sdist", out)
    with tarfile.open(out / f"ddsweep-{ddsweep.__version__}.tar.gz") as archive:
        archive.extractall(out, filter="data")
    build(out / f"ddsweep-{ddsweep.__version__}", "wheel", out)
    return out


def build(source: Path, target: str, out: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


def of_source(*folders: str) -> set[str]:
    """The files of the source tree in ``folders``."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_and_the_files_that_it_finds_by_name(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    inside = {f"ddsweep/_bundled/{name}" for name in of_source("sweeps", "slurm")}
    assert {name for name in names if not name.startswith(info)} == of_source("ddsweep") | inside
    assert "ddsweep/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    # One classifier for each version that `make` takes.
    classifiers = metadata.get_all("Classifier") or []
    versions = [item.rsplit(" ", 1)[1] for item in classifiers if "Python :: 3." in item]
    assert versions == ["3.11", "3.12", "3.13"] and metadata["Requires-Python"] == ">=3.11"


def test_the_sdist_holds_what_is_needed_to_build_and_test(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    wanted = of_source("ddsweep", "sweeps", "slurm", "tests", "docs", "bench")
    wanted |= {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt"}
    assert wanted <= names


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment with the wheel. What ddsweep depends on is not installed a second time:
    it is that of the tests' environment, in which ddsweep itself is shadowed."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False, symlinks=True)
    (site,) = root.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--offline", "--no-deps"]
    subprocess.run([*uv, "--python", str(root / "bin/python"), str(next(built.glob("*.whl")))], check=True)
    return root / "bin"


@pytest.mark.ray
def test_quickstart_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """And `init` writes files that run, without the source tree."""

    def run(*arguments: str) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DDSWEEP_")}
        result = subprocess.run(
            arguments,
            cwd=tmp_path,
            env={**kept, "PATH": f"{installed}:{os.environ['PATH']}", "COLUMNS": "160"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    where = "import ddsweep; print(ddsweep.__file__)"
    assert run("python", "-c", where).startswith(str(installed.parent))
    tiny = ["outer_steps=1", "images_per_class=1", "inner_epochs=1", "real_batch=16", "evaluate.networks=1"]
    assert "2 trials done" in run("ddsweep", "run", "quickstart", *tiny)
    run("ddsweep", "init")
    assert "nothing is left to do" in run("ddsweep", "plan", "sweeps/quickstart.yaml", *tiny)
