"""`Lab`: a throw-away Slurm cluster on this machine, with the actions and the views of tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.conftest import PATIENCE_S

T = TypeVar("T")

SCRIPT = Path(__file__).parent / "lab/slurm-lab.sh"
REPOSITORY = Path(__file__).parents[2]

PROGRAMS = ["slurmctld", "slurmd", "munged", "sbatch", "setpriv", "unshare", "nsenter", "ip", "ps"]
DATABASE = ["slurmdbd", "mariadbd", "mariadb-install-db"]
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"

# Variables of the user who runs the tests. Jobs should see only those that Slurm sets.
PERSONAL = ("DDSWEEP_", "RAY_", "SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_", "CUDA_VISIBLE_", "LAB_", "PYTEST_")


def why_not() -> str | None:
    """What this machine lacks for a lab, or None."""
    if os.geteuid() != 0:
        return "a cluster of namespaces needs root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (make cluster-deps)"
    trial = subprocess.run(
        ["unshare", "-n", "-u", "-i", "-m", "-p", "-f", "--mount-proc", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if trial.returncode != 0:
        return f"this root may not make namespaces: {trial.stderr.strip()}"
    return None


class Lab:
    """Nodes ``node1`` to ``nodeN`` with two fake GPUs each, and ``ctl``, which runs Slurm.

    ``directory`` is a new folder of its own; ``shared`` in it is what a parallel file system is on
    a cluster. The nodes' /tmp and /root are their own, so a test's ``tmp_path`` is not on them.
    """

    def __init__(
        self, *, nodes: int = 3, gpus: int = 2, accounting: str | None = None, owner: int | None = None
    ) -> None:
        # UNIX sockets lie in it, and their paths may have 107 characters.
        self.directory = Path(tempfile.mkdtemp(prefix="ddlab-", dir="/tmp"))
        self.shared = self.directory / "shared"
        self.logs = self.directory / "log"
        self.nodes = [f"node{i}" for i in range(1, nodes + 1)]
        database = all(shutil.which(name, path=SYSTEM_PATH) for name in DATABASE)
        self.accounting = accounting or ("db" if database else "shim")
        self.environment = self._job_environment()
        self._settings = {
            "LAB": str(self.directory),
            "LAB_NODES": str(nodes),
            "LAB_GPUS": str(gpus),
            "LAB_ACCOUNTING": self.accounting,
            "LAB_KEEP": ":".join(map(str, self._kept())),
            "LAB_OWNER": str(owner or os.getpid()),
        }

    def _job_environment(self) -> dict[str, str]:
        """What jobs inherit: the lab's commands first, a home of the lab, nothing personal."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(PERSONAL)}
        # The bytecode of the virtual environment is there, and found unless PYTHONPYCACHEPREFIX
        # hides it; that of the project's own modules is to be written by the first who needs it.
        kept.pop("PYTHONDONTWRITEBYTECODE", None)
        data = os.environ.get("DDSWEEP_DATA")
        return {
            **kept,
            **({"DDSWEEP_DATA": str(Path(data).resolve())} if data else {}),
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}:{SYSTEM_PATH}",
            "HOME": str(self.directory / "home/root"),
            "COLUMNS": "160",
        }

    def _kept(self) -> list[Path]:
        """Folders that nodes share with the machine, wherever they lie."""
        given = [
            *(str(REPOSITORY), sys.prefix, sys.base_prefix),
            *os.environ.get("PYTHONPATH", "").split(":"),
            *(os.environ.get("PYTHONPYCACHEPREFIX", ""), os.environ.get("DDSWEEP_DATA", "")),
        ]
        # By both names if there is a link on the way.
        paths = [path for text in given if text for path in (Path(text).absolute(), Path(text).resolve())]
        return sorted({path for path in paths if path.is_dir()})

    # --- its life

    def up(self) -> str:
        """Start it; returns how long each part took. RuntimeError, with Slurm's words, if it fails."""
        done = subprocess.run(
            [SCRIPT, "up"],
            env={**self.environment, **self._settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            check=False,
        )
        if done.returncode != 0:
            self.down()
            raise RuntimeError(f"the lab does not come up:\n{done.stdout}")
        return done.stdout

    def down(self) -> None:
        """End every process and remove the folder; may be called at any time, and twice."""
        self._verb("down", timeout=120)
        shutil.rmtree(self.directory, ignore_errors=True)

    def repair(self) -> None:
        """Bring it back to idle and whole: no jobs, every node on and connected, nothing left running."""
        if jobs := self.jobs():
            self.sh("scancel", *jobs)
        self._verb("repair")
        self.wait(lambda: not self.jobs(), "jobs are gone", 120)
        for node in self.nodes:
            if "drain" in self.node_state(node):
                self.sh("scontrol", "update", f"NodeName={node}", "State=RESUME")
            if self.processes(node):
                self.power_off(node)
                self.power_on(node)
        self.wait(lambda: all(self.node_state(node) == "idle" for node in self.nodes), "nodes are idle", 120)

    def _verb(self, *arguments: str, timeout: float = 60) -> str:
        done = subprocess.run(
            [SCRIPT, *arguments],
            env={**self.environment, **self._settings},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"slurm-lab {' '.join(arguments)}: exit code {done.returncode}\n{done.stderr}")
        return done.stdout

    # --- commands

    def sh(self, *command: object, timeout: float = 60) -> str:
        """Run from outside, as on a login node: Slurm's commands are first on PATH. Returns stdout."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stderr}")
        return done.stdout.strip()

    def ddsweep(
        self, *arguments: object, timeout: float = 240, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the project's command line as on a login node, with any exit code; ``more`` is environment."""
        return subprocess.run(
            [sys.executable, "-m", "ddsweep", *map(str, arguments)],
            cwd=REPOSITORY,
            env={**self.environment, **more},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start(
        self,
        node: str,
        *command: object,
        user: str | None = None,
        **more: str,
    ) -> subprocess.Popen[str]:
        """Start a command in a node, as root or another user, with environment variables ``more``.

        Its standard output is piped, with errors in it. The caller waits for it or kills it; killed,
        it leaves to `repair` what it had started in the node.
        """
        return subprocess.Popen(
            [SCRIPT, "exec", *(["-u", user] if user else []), node, *map(str, command)],
            env={**self.environment, **self._settings, **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def exec(
        self, node: str, *command: object, user: str | None = None, timeout: float = PATIENCE_S, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a node to its end, with any exit code; ``stdout`` has its errors too."""
        with self.start(node, *command, user=user, **more) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, "")

    def wait(
        self, condition: Callable[[], T], what: str, seconds: float = PATIENCE_S, every: float = 0.2
    ) -> T:
        """Poll until ``condition`` gives something true, and return that."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, f"not within {seconds} s: {what}"
            time.sleep(every)
        return value

    # --- what there is to see

    def node_state(self, node: str) -> str:
        """Slurm's word in lower case: idle, mixed, allocated, down, ...; with a star, it does not respond."""
        return self.sh("sinfo", "-h", "-N", "-p", "main", "-n", node, "-o", "%T")

    def jobs(self) -> dict[str, str]:
        """Jobs that are not over: id (of a task of an array: ``7_1``) to state."""
        rows = self.sh("squeue", "-h", "-a", "-o", "%i %T").splitlines()
        return {job: state for job, state in (row.split() for row in rows)}

    def job(self, job: str) -> dict[str, str]:
        """All that Slurm's controller knows of a job, by its own names: JobState, Restarts, NodeList, ..."""
        words = self.sh("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def processes(self, node: str) -> list[tuple[int, str]]:
        """(pid, command) of everything that runs on a node, but for the lab's own daemons."""
        rows = [row.split(" ", 1) for row in self._verb("ps", node).splitlines()]
        return [(int(pid), command) for pid, command in rows]

    # --- what can be done to it

    def sbatch(self, *arguments: object) -> str:
        """Submit; returns the job's id."""
        return self.sh("sbatch", "--parsable", *arguments).split(";")[0]

    def power_off(self, node: str) -> None:
        """As if the plug was pulled: everything on it ends at once."""
        self._verb("power-off", node)

    def power_on(self, node: str) -> None:
        self._verb("power-on", node)

    def cut(self, node: str) -> None:
        """Pull its network cable: everything on it goes on, alone."""
        self._verb("cut", node)

    def mend(self, node: str) -> None:
        self._verb("mend", node)

    def kill_slurmd(self, node: str) -> None:
        """Slurm's daemon only: jobs go on."""
        self._verb("kill-slurmd", node)

    def start_slurmd(self, node: str) -> None:
        self._verb("start-slurmd", node)
