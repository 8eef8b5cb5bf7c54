"""Shared by all tests: the command line, in this process and in one of its own, and what runs beside what."""

from __future__ import annotations

import gc
import io
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from _pytest.mark.expression import Expression

from tests.disks import small_disk

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

    from ddsweep.catalog import EvaluationSpec, TrialSpec
    from ddsweep.data.load import Splits
    from ddsweep.results.layout import SweepDirectory

Run = Callable[..., subprocess.CompletedProcess[str]]

SLOW = ("torch", "torchvision", "ray", "pandas", "sklearn")
"""What takes long to import."""

ROOT = Path(__file__).resolve().parents[1]

PATIENCE_S = 600.0
"""Seconds to wait for what takes few where nothing else runs; less than the time-out of a test."""


# A call of Ray where none is connected is an error. By default it starts a Ray, in the way of later tests.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup switches it off, also for what tests start


# ------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a user without settings of ddsweep's or Ray's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DDSWEEP_", "RAY_"))}
    return {**kept, "COLUMNS": "160"}


@pytest.fixture
def disk() -> Iterator[Path]:
    """A file system of 256 KiB, where this user may make one."""
    with small_disk(256) as made:
        yield made


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to be in, with a module of the user's own for each name of the standard library."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in sys.stdlib_module_names:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('imported the {name}.py of this folder')\n")
    return folder


@pytest.fixture(scope="session")
def ddsweep(environment: dict[str, str]) -> Run:
    """``ddsweep(*arguments, cwd=...)``: a command line, run to the end in this process; output and exit code
    as `subprocess.run` gives them. ``more`` are variables of the environment."""

    def run(*arguments: object, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        from ddsweep.cli import _exit_code

        words = [str(argument) for argument in arguments]
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        with only({**environment, **more}), chdir(cwd or "."), redirect_stdout(out), redirect_stderr(err):
            code = _exit_code(words)
        said, complained = (file.buffer.getvalue().decode() for file in (out, err))  # type: ignore[attr-defined]
        return subprocess.CompletedProcess(["ddsweep", *words], code, said, complained)

    return run


class Said(NamedTuple):
    """What a command line answered; ``words`` is all of it with single blanks, however it was wrapped."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        return " ".join((self.out + self.err).split())


Ask = Callable[..., Said]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """``ask(*arguments)``: a command line in the folder ``tmp_path``, in this process."""
    from ddsweep.cli import _exit_code

    for name in ("DDSWEEP_RESULTS", "DDSWEEP_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        said = Said(_exit_code([str(argument) for argument in arguments]), *capsys.readouterr())
        assert "Traceback" not in said.out + said.err
        return said

    return run


def imported_by(code: str, *slow: str, **how: Any) -> list[str]:
    """Which of the modules ``slow`` a Python of its own has imported after ``code``."""
    code = f"{code}\nimport sys; print('>', *sorted({set(slow)} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **how)
    return done.stdout.splitlines()[-1].split()[1:]


def imported_by_command(
    *arguments: object, code: int = 0, slow: tuple[str, ...] = SLOW, **how: Any
) -> list[str]:
    """Which of the modules ``slow`` a command line imports that ends with the exit code ``code``."""
    words = [str(argument) for argument in arguments]
    command = f"from ddsweep.cli import _exit_code; assert _exit_code({words}) == {code}"
    return imported_by(command, *slow, **how)


@contextmanager
def only(variables: Mapping[str, str]) -> Iterator[None]:
    """Inside, the environment holds only ``variables``; afterwards it is as before."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def ddsweep_process(environment: dict[str, str]) -> Run:
    """Like `ddsweep`, in a separate process. That takes seconds. It is for what only a process shows: how it
    ends, what Ray's own programs print, and what it leaves."""

    def run(*arguments: object, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ddsweep", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**environment, **more},
            check=False,
        )

    return run


@pytest.fixture
def checked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Users' own networks and methods are checked in this process. One of its own takes seconds, which is for
    tests of that process."""
    from ddsweep import measuring
    from ddsweep.core.measure import answer

    monkeypatch.setattr(measuring, "_in_own_process", lambda job, what: answer(job))


@pytest.fixture
def user_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Mapping[str, str]], Path]:
    """``user_folder(files)``: a folder with a user's files, which ddsweep is started in."""

    def make(files: Mapping[str, str]) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        folder = tmp_path / "mine"
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        monkeypatch.chdir(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def splits() -> Splits:
    """The digits: 1295 images to train on, 142 of validation, 360 of the test set."""
    from ddsweep.catalog import DATASETS
    from ddsweep.data.load import load_splits

    return load_splits(DATASETS["digits"], None, validation_fraction=0.1, split_seed=0)


def write_done(directory: SweepDirectory, trial: TrialSpec, evaluation: EvaluationSpec) -> None:
    """The parts of a trial that is done, judged on the networks of ``evaluation``, without baselines."""
    from ddsweep.report.settings import settings_of
    from ddsweep.results.coverage import HOLDS, holds_text
    from ddsweep.results.parts import write_part
    from ddsweep.results.schemas import EVALS, HISTORY, TRIALS

    of, temporary = {"trial_id": trial.trial_id}, directory.temporary
    row = {**settings_of(trial), **of, "status": "done", "test_accuracy_mean": 0.5}
    made = "0" * 64
    identity = {"evaluation_id": evaluation.evaluation_id(trial), "distilled": made}
    write_part(directory.trials_part(trial.trial_id), [row], TRIALS, temporary, identity)
    history = {**of, "outer_step": 4, "outer_loss": 2.0}
    write_part(directory.history_part(trial.trial_id), [history], HISTORY, temporary)
    for unit in evaluation.units(trial):
        own = {**of, "source": "distilled", "protocol": unit.protocol, "group": unit.group, "diverged": False}
        rows = [
            {**own, "model_seed": index, "inner_step": step, "accuracy": 0.5}
            for index in unit.indices
            for step in evaluation.steps(trial)
        ]
        part = directory.evals_part(trial.trial_id, unit.protocol, "xavier", unit.group)
        holds = holds_text(rows, size=unit.size, distilled=made, changes=None, settings={})
        write_part(part, rows, EVALS, temporary, {HOLDS: holds})


# ------------------------------------------------------------------------------------ the one Ray


@dataclass(frozen=True)
class OneRay:
    """A Ray that tests share. Called as `ddsweep`: a command line in this process that joins it."""

    address: str
    variables: Mapping[str, str]
    """What tells a process how to log in."""
    pid: int
    """The processes of Ray below one process."""
    run: Run

    def __call__(self, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        from ray._raylet import AuthenticationTokenLoader, Config

        with only({**os.environ, **self.variables}):  # Ray read its settings when it was imported
            Config.initialize("")
            AuthenticationTokenLoader.instance().reset_cache()
        return self.run(*arguments, "--address", self.address, cwd=cwd, **self.variables)


@pytest.fixture(scope="session")
def one_ray(ddsweep: Run, environment: dict[str, str]) -> Iterator[OneRay]:
    """A Ray with two CPUs and two pretended GPUs. No test may end it, or leave something on it."""
    from ddsweep.launch.processes import end, spawn

    with tempfile.TemporaryDirectory(prefix="dds-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        token = Path(folder, "token")
        token.write_text(secrets.token_hex(32))
        variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += ["--head", "--node-ip-address=127.0.0.1", f"--port={address.partition(':')[2]}"]
        command += ["--num-cpus=2", "--num-gpus=2", f"--object-store-memory={200 * 2**20}"]
        command += ["--include-dashboard=false", f"--temp-dir={folder}/ray"]
        log = Path(folder, "log")
        with log.open("w") as output:
            # Ray's own 15 would starve its workers beside the other test processes.
            ray = spawn(command, {**environment, **variables, "RAY_worker_niceness": "0"}, output)
        try:
            while "Ray runtime started" not in log.read_text():
                assert ray.poll() is None, log.read_text()
                time.sleep(0.1)
            yield OneRay(address, variables, ray.pid, ddsweep)
        finally:
            end(ray, 20)


# ------------------------------------------------------------------------------ tests side by side


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """One thread of torch in this process. A sum of floats depends on the number of threads, and there are as
    many test processes as processors."""
    if "torch" not in sys.modules:  # no test needs it
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_finish() -> None:
    """What was imported stays, so no search for garbage need look through it: ddsweep asks for one with each
    trial, and through a million objects of torch and of the tests it takes longer than a small trial."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Or libraries written in C++ tell at the end of all that was not freed."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors: tests with a Ray or a Slurm mostly wait."""
    return min(8, (os.cpu_count() or 1) + 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """A file of tests stays in one process, for what its tests share; and so do all files of the one Slurm,
    all of the one Ray, and all that start a Ray of their own, one at a time."""
    from xdist.scheduler import LoadScopeScheduling

    rays = with_rays(config)

    class Together(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0], rays)

    config.option.loadscopereorder = False
    return Together(config, log)


LONG = (
    *("test_network_door", "core/test_unroll", "core/test_gradients", "test_trial", "test_evaluation"),
    *(
        "core/test_steps",
        "core/test_devices",
        "test_changed_evaluation",
        "test_method_door",
        "bench/test_bench",
    ),
    *("test_out_of_memory", "older/test_older_results", "launch/test_crew", "test_packing"),
)
"""Files that take long, the longest first: they begin early, or all would wait for them in the end."""


def with_rays(config: pytest.Config) -> bool:
    """Whether tests that use a Ray are run: not by `make test`."""
    asked = config.getoption("markexpr")
    return not asked or Expression.compile(asked).evaluate(lambda name, **_: name == "ray")


def group_of(path: str, rays: bool) -> str:
    """The group of the tests in the file at ``path``; without tests that use a Ray most are alone."""
    if path.startswith("tests/cluster/"):
        return "the one Slurm"
    if not rays:
        return path
    text = (ROOT / path).read_text()
    if "one_ray" in text:
        return "the one Ray"
    return "Rays of their own" if "pytest.mark.ray" in text else path


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """First the tests that keep together with those of other files, then the long ones."""
    paths = {item.nodeid.partition("::")[0] for item in items}
    groups = {path: group_of(path, with_rays(config)) for path in paths}

    def place(item: pytest.Item) -> int:
        path = item.nodeid.partition("::")[0]
        if groups[path] != path:
            return 0
        name = path.removeprefix("tests/").removesuffix(".py")
        return 1 + (LONG.index(name) if name in LONG else len(LONG))

    items.sort(key=place)
