"""A Ray that is there already: with a token and without, and the messages before the first trial."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ddsweep.launch.processes import end, spawn
from ddsweep.machine import NONCE, versions
from ddsweep.sweep import join
from tests.conftest import PATIENCE_S, OneRay, Run

SWEEP = """\
name: joined
base: {dataset: digits, network: convnet(width=4), outer_steps: 2, models_per_step: 1, selection_networks: 1}
evaluate: {networks: 2, shards: 1, baselines: none}
resources: {checkpoint_every: 1, compile: off}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "joined.yaml"
    path.write_text(SWEEP)
    return path


@contextmanager
def listening() -> Iterator[str]:
    """Somebody who is no Ray, and says nothing."""
    with socket.create_server(("", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


# -------------------------------------------------------------------------------------- the address


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("ray://10.0.0.1:10001", "is for Ray Client or the dashboard; run ddsweep on a node of the cluster"),
        ("http://127.0.0.1:8265", "is for Ray Client or the dashboard; run ddsweep on a node of the cluster"),
        ("10.0.0.1", "such as 10.0.0.1:6379"),
        ("nobody.invalid:6379", "such as 10.0.0.1:6379"),
        ("127.0.0.1:1", ":1 (Connection refused); is it up"),
        ("somebody else", "(another program listens there); is it up"),
    ],
)
def test_an_address_where_no_ray_is(
    file: Path, ddsweep: Run, monkeypatch: pytest.MonkeyPatch, address: str, told: str
) -> None:
    monkeypatch.setattr(join, "_ANSWER_S", 0.5)
    with listening() as other:
        address = other if address == "somebody else" else address
        said = ddsweep("run", file, "--address", address, cwd=file.parent)
    assert (said.returncode, said.stderr.count("\n")) == (1, 1), said.stderr
    assert said.stderr.startswith("ddsweep: --address: ") and told in said.stderr
    assert not (file.parent / "results" / "joined").exists()


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ({}, "wants a token, and there is none in RAY_AUTH_TOKEN_PATH"),
        (
            {"RAY_AUTH_TOKEN": "0" * 64},
            "wants a token, and not the one that was found in RAY_AUTH",
        ),
        ({"RAY_AUTH_TOKEN_PATH": "/none"}, "wants a token: "),
    ],
)
def test_the_token_of_a_ray_is_asked_for_in_one_line(
    file: Path, ddsweep: Run, one_ray: OneRay, token: dict[str, str], told: str
) -> None:
    said = ddsweep("run", file, "--address", one_ray.address, cwd=file.parent, HOME=str(file.parent), **token)
    assert (said.returncode, said.stderr.count("\n")) == (1, 1), said.stderr
    assert told in said.stderr


# ---------------------------------------------------------------------------------------- its nodes


def test_what_is_wrong_on_a_node_is_told(tmp_path: Path) -> None:
    look, place = join._look(), tmp_path / "results" / "nodes"
    place.mkdir(parents=True)
    (place / NONCE).write_text("nonce")
    assert look(str(place), "nonce", versions()) == ""
    assert "is another folder there, or not there; --results" in look(
        str(tmp_path / "a/b"), "nonce", versions()
    )
    assert "holds something else there; --results" in look(str(place), "other", versions())
    found = look(str(place), "nonce", {**versions(), "ray": "1.0"})
    assert f"has other versions: ray {versions()['ray']} (here 1.0)" in found


HIDDEN = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "ddsweep":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""


@contextmanager
def ray_node(folder: Path, environment: dict[str, str], *options: str) -> Iterator[None]:
    """``ray start`` by hand, in a session of its own."""
    log = folder / f"log{len(list(folder.glob('log*')))}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    sizes = ["--num-cpus=1", f"--object-store-memory={100 * 2**20}"]
    with log.open("w") as output:
        ray = spawn([*command, *sizes, *options], environment, output)
    try:
        while "Ray runtime started" not in log.read_text():
            assert ray.poll() is None, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        end(ray, 20)


IMPATIENT = """
from ddsweep.cli import main
from ddsweep.sweep import session
session._SILENCE_S = 3.0
main()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_connection_is_a_drain(file: Path, environment: dict[str, str]) -> None:
    """The head of a Ray that was joined goes away in the middle of a sweep."""
    with tempfile.TemporaryDirectory(prefix="dds-") as name:
        own, results = {**environment, "HOME": name}, file.parent / "results"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        head = ["--head", "--node-ip-address=127.0.0.1", f"--port={address.partition(':')[2]}"]
        with ray_node(Path(name), own, *head, "--include-dashboard=false", f"--temp-dir={name}/ray"):
            command = [sys.executable, "-P", "-c", IMPATIENT, "run", str(file), "outer_steps=100000"]
            command += ["--results", str(results), "--address", address]
            driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=own)
            while not list(results.glob("joined/artifacts/*/checkpoint.safetensors")):
                assert driver.poll() is None, driver.communicate()[0].decode()
                time.sleep(0.1)
        said = driver.communicate(timeout=PATIENCE_S)[0].decode()
    assert driver.returncode == 75, said
    assert "Ray was lost (nobody answers at " in said and f":{address.partition(':')[2]})" in said
    assert "Traceback" not in said
    assert not (results / "joined" / ".lock").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "trials",
    [
        pytest.param("seeds: 4", id="planned"),
        pytest.param(
            "search: {kind: tpe, samples: 4, startup: 2, space: {inner_lr: {log_uniform: [0.01, 1]}}}",
            id="guided",
        ),
    ],
)
def test_a_node_that_joins_gets_trials_and_may_leave_again(
    file: Path, environment: dict[str, str], trials: str
) -> None:
    """One CPU at first, and trials without end: a second one can only begin on the node that joins."""
    file.write_text(f"{SWEEP.replace('checkpoint_every: 1', 'checkpoint_every: 1, cohort: 1')}{trials}\n")
    results, log = file.parent / "results", file.parent / "log"
    deadline = time.monotonic() + 2 * PATIENCE_S

    def wait_for(seen: Callable[[], bool]) -> None:
        while not seen():
            assert driver.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def begun() -> int:
        return len(list(results.glob("joined/artifacts/*/checkpoint.safetensors")))

    with tempfile.TemporaryDirectory(prefix="dds-") as name, socket.create_server(("127.0.0.1", 0)) as probe:
        own, address = {**environment, "HOME": name}, f"127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        here = "--node-ip-address=127.0.0.1"
        head = ["--head", here, f"--port={address.partition(':')[2]}", "--include-dashboard=false"]
        with ray_node(Path(name), own, *head, f"--temp-dir={name}/ray"), log.open("w") as output:
            command = [sys.executable, "-P", "-m", "ddsweep", "run", str(file), "outer_steps=100000"]
            command += ["--results", str(results), "--address", address]
            driver = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=own)
            wait_for(lambda: begun() == 1)
            with ray_node(Path(name), own, f"--address={address}", here):
                wait_for(lambda: begun() == 2)
            wait_for(lambda: "its worker died, and it is tried again" in log.read_text())
            driver.send_signal(signal.SIGTERM)
            assert driver.wait(PATIENCE_S) == 75, log.read_text()
    assert "Traceback" not in log.read_text() and "completed." not in log.read_text()


@pytest.mark.slow
@pytest.mark.ray
def test_a_ray_without_a_token_and_a_node_without_ddsweep(
    file: Path, environment: dict[str, str], ddsweep: Run
) -> None:
    """As `ray start --head` leaves it without a token: the driver finds that out by itself."""
    with tempfile.TemporaryDirectory(prefix="dds-") as name, socket.socket() as probe:
        folder = Path(name)
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        own = {**environment, "HOME": name}
        (folder / "sitecustomize.py").write_text(HIDDEN)
        bare = {**own, "PYTHONPATH": name}
        head = ["--head", "--node-ip-address=127.0.0.1", f"--port={address.partition(':')[2]}"]
        head += ["--include-dashboard=false", f"--temp-dir={folder}/ray"]

        def run() -> tuple[int, str, str]:
            said = ddsweep("run", file, "--address", address, cwd=file.parent, HOME=name)
            return said.returncode, said.stdout, said.stderr

        with ray_node(folder, own, *head):
            with ray_node(folder, bare, f"--address={address}", "--node-ip-address=127.0.0.1"):
                code, _, err = run()
                assert (code, err.count("\n")) == (1, 1), err
                assert "nodes of this Ray cannot run the sweep: " in err and ": has no ddsweep" in err
                assert f"install {versions()['ddsweep']} there" in err
                assert not (file.parent / "results" / "joined").exists()
            code, out, err = run()
            assert code == 0 and "1 trial done" in out, err
