"""The Grafana dashboard: it asks for what there is, and a real Prometheus answers every panel's queries."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddsweep.dashboards import DASHBOARD, OUTPUT_DIR, provision
from ddsweep.errors import UserError
from ddsweep.sweep.metrics import METRICS
from tests.conftest import PATIENCE_S
from tests.sweep.driver import Driver, command_line, kill

BOARD = json.loads(DASHBOARD.read_text())
QUERIES = [
    (panel["title"], target["expr"]) for panel in BOARD["panels"] for target in panel.get("targets", [])
]

EXPORTED = {f"ray_{metric.name}{'_total' if metric.type == 'counter' else ''}" for metric in METRICS}

# Ray's own, under the names that its agents export. Those of GPUs only where there are some.
RAY_METRICS = {
    "ray_node_cpu_utilization",
    "ray_node_mem_used",
    "ray_resources",
    "ray_node_gpus_utilization",
    "ray_node_gram_used",
}

WATCHED = """
name: watched
base:
  dataset: digits
  network: convnet(width=8)
  inner_lr: 1.0
  outer_lr: 0.05
  real_batch: 128
  models_per_step: 2
  inner_steps: 2
  inner_epochs: 2
  validate_every: 8
points:
  - {images_per_class: 2, outer_steps: 24}
  - {images_per_class: 4, outer_steps: 100000}
evaluate:
  networks: 24
  group_size: 4
  shards: 2
  baselines: [random_real]
resources:
  compile: off
  checkpoint_every: 4
  log_every: 4
"""


# ------------------------------------------------------------------------------------ without a sweep


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_a_query_names_metrics_that_there_are(title: str, query: str) -> None:
    asked = set(re.findall(r"\bray_\w+", query))
    assert asked
    assert asked <= EXPORTED | RAY_METRICS


def test_every_metric_is_in_a_panel() -> None:
    asked = {name for _, query in QUERIES for name in re.findall(r"\bray_\w+", query)}
    assert asked == EXPORTED | RAY_METRICS


def test_panels_say_what_they_show_and_ask_the_data_source_that_is_chosen() -> None:
    assert BOARD["uid"] == "ddsweep"
    assert {variable["name"] for variable in BOARD["templating"]["list"]} == {"datasource", "sweep"}
    panels = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
    for panel in panels:
        assert panel["description"], panel["title"]
        for place in (panel, *panel["targets"]):
            assert place["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for other in BOARD["panels"]:
            there = other["gridPos"]
            apart = (
                place["x"] + place["w"] <= there["x"]
                or there["x"] + there["w"] <= place["x"]
                or place["y"] + place["h"] <= there["y"]
                or there["y"] + there["h"] <= place["y"]
            )
            assert other is panel or apart, (panel["title"], other["title"])


def test_provision_lays_it_beside_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OUTPUT_DIR, raising=False)
    variables = provision(tmp_path)
    assert variables == {OUTPUT_DIR: str(tmp_path / "dashboards")}
    assert (tmp_path / "dashboards" / "ddsweep.json").read_bytes() == DASHBOARD.read_bytes()
    assert provision(tmp_path) == variables


def test_provision_keeps_to_the_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    monkeypatch.setenv(OUTPUT_DIR, str(own))
    assert provision(tmp_path / "ray") == {OUTPUT_DIR: str(own)}
    assert [path.name for path in own.iterdir()] == ["ddsweep.json"]
    own.joinpath("file").write_text("")
    monkeypatch.setenv(OUTPUT_DIR, str(own / "file"))
    with pytest.raises(UserError, match=OUTPUT_DIR):
        provision(tmp_path / "ray")


def filled(expression: str) -> str:
    """A query of the dashboard with Grafana's variables filled in."""
    query = expression.replace("$sweep", "watched").replace("$__rate_interval", "40s")
    assert "$" not in query
    return query


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's prometheus) is not on PATH")
def test_gpus_are_shown_where_there_are_some_and_nodes_of_another_ray_are_not(tmp_path: Path) -> None:
    nodes = {
        'ray_ddsweep_trials{SessionName="a",sweep="watched",state="running"}': 2,
        'ray_ddsweep_trials{SessionName="b",sweep="other",state="running"}': 2,
        'ray_node_cpu_utilization{SessionName="a",ip="n1"}': 50,
        'ray_node_cpu_utilization{SessionName="b",ip="n2"}': 60,
        'ray_node_gpus_utilization{SessionName="a",ip="n1",GpuIndex="0"}': 20,
        'ray_node_gpus_utilization{SessionName="a",ip="n1",GpuIndex="1"}': 40,
        'ray_node_mem_used{SessionName="a",ip="n1"}': 1000,
        'ray_node_gram_used{SessionName="a",ip="n1",GpuIndex="0"}': 1,
        'ray_node_gram_used{SessionName="a",ip="n1",GpuIndex="1"}': 2,
    }
    expected = {
        "CPU and GPU use": {
            'ray_node_cpu_utilization{SessionName="a",ip="n1",what="CPU"}': 50,
            '{SessionName="a",ip="n1",what="GPU"}': 30,
        },
        "Memory in use": {
            'ray_node_mem_used{SessionName="a",ip="n1",what="main"}': 1000,
            '{SessionName="a",ip="n1",what="GPU"}': 3 * 2**20,
        },
    }
    queries = dict(QUERIES)
    case = {
        "interval": "10s",
        "input_series": [{"series": name, "values": f"{value}x10"} for name, value in nodes.items()],
        "promql_expr_test": [
            {
                "expr": filled(queries[title]),
                "eval_time": "60s",
                "exp_samples": [{"labels": labels, "value": value} for labels, value in samples.items()],
            }
            for title, samples in expected.items()
        ],
    }
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "10s", "tests": [case]}))
    result = subprocess.run(
        ["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


# ----------------------------------------------------------------------- a sweep, Ray and Prometheus


class Prometheus:
    """Debian's, on loopback and a free port, finding its targets where Ray says they are."""

    def __init__(self, folder: Path, discovery: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        settings = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": [
                {
                    "job_name": "ray",
                    "file_sd_configs": [{"files": [str(discovery)], "refresh_interval": "1s"}],
                }
            ],
        }
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(settings))
        self.log = folder / "prometheus.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={file}",
                    f"--storage.tsdb.path={folder / 'tsdb'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ask(self, path: str, **parameters: str) -> Any:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(address, timeout=PATIENCE_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression now."""
        return list(self.ask("query", query=filled(expression))["result"])

    def number(self, expression: str) -> float:
        series = self.query(expression)
        return float(series[0]["value"][1]) if series else 0.0

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=PATIENCE_S) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.fixture
def watched(tmp_path: Path, environment: dict[str, str]) -> Iterator[Driver]:
    driver = Driver(tmp_path, {**environment, "RAY_PROMETHEUS_HOST": "http://127.0.0.1:9"})
    driver.file = tmp_path / "watched.yaml"
    driver.file.write_text(WATCHED)
    driver.results = tmp_path / "results" / "watched"
    yield driver
    driver.kill_everything()


@pytest.mark.ray
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus (Debian's package) is not on PATH")
@pytest.mark.slow
def test_prometheus_answers_every_query_of_the_dashboard(watched: Driver, tmp_path: Path) -> None:
    driver = watched.start()
    pattern = r"Ray dashboard: (http://127\.0\.0\.1:\d+) \(log in with the token in (.*)/token\)"
    found = driver.until(lambda: re.search(pattern, driver.log.read_text()), "the dashboard's address")
    folder = Path(found[2])
    assert folder.stat().st_mode & 0o777 == 0o700, "Ray opens its own folder to everybody: this is above it"
    discovery = folder / "ray" / "prom_metrics_service_discovery.json"
    driver.until(discovery.exists, "the targets of Prometheus")
    prometheus = Prometheus(tmp_path, discovery)
    try:
        driver.until(prometheus.ready, "Prometheus is ready")
        assert_provisioned(folder)
        assert_job_is_named(found[1], (folder / "token").read_text())
        kill_a_worker_and_a_shard(driver)

        unanswered = dict.fromkeys(QUERIES)
        deadline = time.monotonic() + PATIENCE_S
        while unanswered or not faults_are_counted(prometheus) or losses(prometheus) != {"4"}:
            assert driver.process is not None
            assert driver.process.poll() is None, driver.log.read_text()
            assert time.monotonic() < deadline, (
                f"no series: {list(unanswered)}; losses of {losses(prometheus)}\n{driver.log.read_text()}"
            )
            for key in list(unanswered):
                if prometheus.query(key[1]):
                    del unanswered[key]
            time.sleep(0.5)

        assert prometheus.ask("label/sweep/values", **{"match[]": "ray_ddsweep_trials"}) == ["watched"]
        state = {row["metric"]["state"]: row["value"][1] for row in prometheus.query("ray_ddsweep_trials")}
        assert state["done"] == "1"
        assert state["running"] == "1"
        assert sum(map(int, state.values())) == 2
        accuracy = prometheus.query("ray_ddsweep_test_accuracy_mean")
        assert [row["metric"]["images_per_class"] for row in accuracy] == ["2"]
        driver.signal(signal.SIGTERM)
        assert driver.wait() == 75, driver.log.read_text()
    finally:
        prometheus.process.terminate()
        prometheus.process.wait()
    assert "metrics of watched" not in driver.log.read_text()


def assert_provisioned(folder: Path) -> None:
    """Ray's own settings for Grafana load a folder in which ours lies beside Ray's."""
    grafana = folder / "ray" / "session_latest" / "metrics" / "grafana" / "provisioning"
    settings = grafana / "dashboards" / "default.yml"
    deadline = time.monotonic() + PATIENCE_S
    while not (settings.exists() and (provider := yaml.safe_load(settings.read_text()))):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    dashboards = Path(provider["providers"][0]["options"]["path"])
    while not (dashboards / "default_grafana_dashboard.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (dashboards / "ddsweep.json").read_bytes() == DASHBOARD.read_bytes()
    source = yaml.safe_load((grafana / "datasources" / "default.yml").read_text())["datasources"][0]
    assert source["url"] == "http://127.0.0.1:9", "the user's own RAY_PROMETHEUS_HOST"


def assert_job_is_named(url: str, token: str) -> None:
    request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        assert [job["metadata"]["job_name"] for job in json.load(answer)] == ["sweep watched"]


def kill_a_worker_and_a_shard(driver: Driver) -> None:
    driver.until(driver.checkpoint_of_a_running_trial, "a checkpoint")
    workers = driver.workers("ray::Distil")
    assert workers
    for pid in workers:
        kill(pid)

    def shard_at_work() -> int | None:
        shards = driver.workers("ray::EvalShard")
        return next((pid for pid in shards if ".evaluate" in command_line(pid)), None)

    kill(driver.until(shard_at_work, "an evaluation"))


def faults_are_counted(prometheus: Prometheus) -> bool:
    return (
        prometheus.number("ray_ddsweep_trial_retries_total") >= 1
        and prometheus.number("ray_ddsweep_eval_retries_total") >= 1
        and prometheus.number("ray_ddsweep_outer_steps_total") >= 24
        and prometheus.number("ray_ddsweep_networks_evaluated_total") == 24
    )


def losses(prometheus: Prometheus) -> set[str]:
    """Images per class for which there is a loss: of a trial that is done it goes after a while."""
    return {row["metric"]["images_per_class"] for row in prometheus.query("ray_ddsweep_outer_loss")}
