"""What another user of the machines can do to a running sweep: docs/security.md says it, this tries it."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.machines import Lab

SITE = """
scheduler: slurm
partition: main
time: 10m
nodes: 2
cpus_per_node: 2
gpus_per_node: 2
gpu_syntax: gres
memory_per_node: 3
device: cpu
wait_for_nodes: 200
drain: 20
poll: 0.5
"""

# Runs as somebody else: [[port's address, ...]] -> what each answered, by gRPC and by HTTP, without a token.
KNOCK = """
import http.client, json, sys, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor
import grpc

METHODS = ["NodeInfoGcsService/GetAllNodeInfo", "NodeManagerService/GetNodeStats",
           "ObjectManagerService/Push", "CoreWorkerService/GetCoreWorkerStats",
           "RayletDriver/ClusterInfo", "ReporterService/GetTraceback"]
PATHS = ["/metrics", "/api/version", "/get_runtime_envs_info"]

def call(address, method):
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc." + method)(b"", timeout=5)
            return "answered"
        except grpc.RpcError as error:
            return error.code().name

def get(address, path):
    try:
        data = b"{}" if path.startswith("/get") else None
        with urllib.request.urlopen("http://" + address + path, data=data, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):  # it does not speak HTTP/1
        return 0

def knock(address):
    said = {method: call(address, method) for method in METHODS}
    return {**said, **{path: get(address, path) for path in PATHS}}

with ThreadPoolExecutor(8) as pool:
    print(json.dumps(dict(zip(sys.argv[1:], pool.map(knock, sys.argv[1:])))))
"""

JOIN = "import ray, sys; ray.init(sys.argv[1]); print('joined', ray.cluster_resources())"


@dataclass(frozen=True)
class Running:
    """A launch that runs: its folder, that of the cluster in it, the job's number, the head's port."""

    launch: Path
    cluster: Path
    job: str
    port: int

    @property
    def token(self) -> str:
        return (self.cluster / "token").read_text()


def launched(lab: Lab, shared: Path) -> Running:
    site = shared / "site.yaml"
    site.write_text(SITE)
    said = lab.ddsweep(
        *("launch", "sweeps/quickstart.yaml", "outer_steps=100000", "resources.compile=off"),
        *("--site", site, "--results", shared / "results"),
    )
    assert said.returncode == 0, said.stderr
    found = re.search(r"launched (\S+): cluster (\d+)", said.stdout)
    assert found is not None
    launch = shared / "results/quickstart/jobs" / found[1]
    log = launch / "logs" / f"{found[2]}_0_log.out"
    lab.wait(lambda: log.exists() and re.search("[1-9] running", log.read_text()), "trials run", every=1)
    cluster = launch / "runs" / f"{found[2]}.0"
    return Running(launch, cluster, found[2], json.loads((cluster / "address.json").read_text())["port"])


def listening(lab: Lab, node: str) -> dict[str, list[str]]:
    """Who of the sweep listens on a node: address and port to the names of its processes."""
    found: dict[str, list[str]] = {}
    for line in lab.exec(node, "ss", "-Htlnp").stdout.splitlines():
        address = line.split()[3].replace("[::ffff:", "").replace("]", "")
        names = re.findall(r'"([^"]+)"', line)
        if not {"slurmd", "srun"} & set(names):
            found[address] = names
    return found


def request(lab: Lab, node: str, url: str, *more: str, user: str | None = "nobody") -> str:
    """The status of a request from a node, ``000`` for none."""
    said = lab.exec(
        node, "curl", "-s", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", *more, url, user=user
    )
    return said.stdout[-3:]


@pytest.mark.slow
def test_another_user_gets_nothing_without_the_token(lab: Lab, shared: Path) -> None:
    run = launched(lab, shared)
    knock = shared / "knock.py"
    knock.write_text(KNOCK)

    # The files.
    assert {oct(path.stat().st_mode & 0o777) for path in (run.launch, run.launch / "logs", run.cluster)} == {
        "0o700"
    }
    assert (run.cluster / "token").stat().st_mode & 0o777 == 0o600
    private = [run.cluster / "token", run.launch / "launch.json", run.launch, f"/tmp/dds{run.job}"]
    for path in private:
        said = lab.exec("node1", "ls" if path in private[2:] else "cat", path, user="nobody")
        assert (said.returncode != 0, "Permission denied" in said.stdout) == (True, True), path
    # What Ray itself keeps on a node would be open to all, were it not in a folder that is not.
    assert lab.exec("node1", "stat", "-c", "%a", f"/tmp/dds{run.job}/ray").stdout == "777\n"
    assert lab.exec("node1", "stat", "-c", "%a", f"/tmp/dds{run.job}").stdout == "700\n"

    # The processes: command lines are seen by everybody, environments are not.
    seen = lab.exec("node1", "ps", "-e", "-ww", "-o", "args", user="nobody").stdout
    assert "ddsweep run" in seen
    assert run.token not in seen
    head = lab.processes("node1")
    number = next(pid for pid, command in head if "gcs_server" in command)
    assert "Permission denied" in lab.exec("node1", "cat", f"/proc/{number}/environ", user="nobody").stdout

    # The dashboard: on loopback only, and there only with the token.
    dashboard = f"http://127.0.0.1:{run.port + 1}"
    bearer = ("-H", f"Authorization: Bearer {run.token}")
    submit = ("-X", "POST", "-H", "Content-Type: application/json", "-d", '{"entrypoint": "id"}')
    for path in ("/api/version", "/api/jobs/", "/nodes?view=summary", "/api/v0/actors", "/api/v0/logs"):
        assert request(lab, "node1", dashboard + path) == "401", path
        assert request(lab, "node1", dashboard + path, "-H", "Authorization: Bearer " + "0" * 64) == "403"
    assert request(lab, "node1", f"{dashboard}/api/jobs/", *submit) == "401"
    assert request(lab, "node1", f"{dashboard}/api/version", *bearer, user=None) == "200"
    assert request(lab, "node1", f"http://10.213.0.11:{run.port + 1}/") == "000"
    assert request(lab, "node2", f"http://10.213.0.11:{run.port + 1}/") == "000"

    # Each port that is open, on the head and on another node, from a third.
    asked = {
        address.replace("*", ip).replace("0.0.0.0", ip): names
        for node, ip in (("node1", "10.213.0.11"), ("node2", "10.213.0.12"))
        for address, names in listening(lab, node).items()
        if not address.startswith("127.")
    }
    with ThreadPoolExecutor(8) as pool:
        answers = pool.submit(lab.exec, "node3", sys.executable, knock, *asked, user="nobody", timeout=200)
        # Ways in that Ray has: as a driver, as a client, as a node, as a job.
        ray = (sys.executable, "-m", "ray.scripts.scripts")
        head = f"10.213.0.11:{run.port}"
        tries = [
            ("node3", sys.executable, "-c", JOIN, head),
            ("node3", sys.executable, "-c", JOIN, f"ray://10.213.0.11:{run.port + 2}"),
            ("node3", *ray, "start", f"--address={head}"),
            ("node1", *ray, "job", "submit", "--address", dashboard, "--", "id"),
        ]
        refused = list(pool.map(lambda words: lab.exec(*words, user="nobody", timeout=200), tries))
        said: dict[str, dict[str, Any]] = json.loads(answers.result().stdout.splitlines()[-1])
    for words, done in zip(tries, refused, strict=True):
        assert done.returncode != 0, (words, done.stdout)
        assert "joined" not in done.stdout
        assert "uthentication" in done.stdout or "onnection" in done.stdout, (words, done.stdout)
    assert "InvalidAuthToken" in refused[0].stdout
    kinds = {address: kind_of(answer) for address, answer in said.items()}
    assert set(kinds.values()) <= {"token by gRPC", "token by HTTP", "metrics, open"}, kinds
    open_to_all = [asked[address] for address, kind in kinds.items() if kind == "metrics, open"]
    # The agents of both nodes, the dashboard's own, and those of the autoscaler's monitor.
    assert sorted(names[0] for names in open_to_all) == [
        "python",
        "python",
        "ray::DashboardA",
        "ray::DashboardA",
    ]
    asks = {name for address, kind in kinds.items() if kind != "metrics, open" for name in asked[address]}
    assert asks >= {"gcs_server", "raylet", "python", "ray::RuntimeEnv", "ray::DashboardA", "ray::EvalShard"}

    # With the token the same port answers: so only the token was missing.
    opened = lab.exec(
        "node2",
        *(sys.executable, "-c", JOIN, head),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(run.cluster / "token"),
        timeout=120,
    )
    assert "joined" in opened.stdout, opened.stdout

    said_at_end = lab.ddsweep("cancel", shared / "results/quickstart", "--grace", "30")
    assert said_at_end.returncode == 0, said_at_end.stderr
    lab.wait(lambda: not any(lab.processes(node) for node in lab.nodes), "nothing runs any more")
    assert not (run.cluster / "token").exists()


def kind_of(answer: dict[str, Any]) -> str:
    """The kind of a port, by its answer to a caller without a token."""
    if any(said in ("answered", "UNKNOWN", "INTERNAL", "INVALID_ARGUMENT") for said in answer.values()):
        return f"open: {answer}"
    if "UNAUTHENTICATED" in answer.values():
        return "token by gRPC"
    if answer["/metrics"] == 200:
        return "metrics, open"
    if 401 in answer.values():
        return "token by HTTP"
    return f"unknown: {answer}"
