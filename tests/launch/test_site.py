"""Site files: what they may contain, what it means, and the messages for mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ddsweep.errors import SettingError
from ddsweep.launch.site import LONGEST_TEMPORARY, Site, load_site
from ddsweep.launch.submit import srun_options

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "slurm").glob("*.yaml"))

Read = Callable[..., Site]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """``read(text, *overrides)``: a Slurm site of four CPUs with that text in its file."""

    def load(text: str = "", *overrides: str) -> Site:
        file = tmp_path / "site.yaml"
        head = "" if "scheduler" in text else "scheduler: slurm\n"
        file.write_text(f"{head}cpus_per_node: 4\n{text}\n")
        return load_site(file, overrides)

    return load


@pytest.fixture
def refused(read: Read, tmp_path: Path) -> Callable[..., str]:
    """``refused(text, *overrides)``: the message, without the name of the file."""

    def load(text: str, *overrides: str) -> str:
        with pytest.raises(SettingError) as caught:
            read(text, *overrides)
        message = str(caught.value)
        assert message.startswith((f"{tmp_path / 'site.yaml'}: ", "override "))
        return message

    return load


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_is_a_site(file: Path) -> None:
    site = load_site(file)
    assert site.scheduler in ("slurm", "local")
    assert file.name in (ROOT / "slurm/README.md").read_text(), "it is in the table"


def test_shipped_files_are_there() -> None:
    assert {"generic.yaml", "local.yaml"} <= {path.name for path in SHIPPED}


def test_what_need_not_be_said(read: Read) -> None:
    site = read()
    told = {"nodes": 1, "least_nodes": 1, "time": 60, "gpus_per_node": 0, "temporary": "/tmp", "requeues": 5}
    assert {key: getattr(site, key) for key in told} == told
    assert (site.partition, site.account, site.memory_per_node, site.longest_pending) == (None,) * 4
    assert (site.first_port, site.ports) == (20000, 10000)


@pytest.mark.parametrize(
    ("written", "minutes"),
    [
        ("90m", 90),
        ("4h", 240),
        ("1d12h", 2160),
        ("1d12h30m", 2190),
        ("'04:00:00'", 240),
        ("'4:00:00'", 240),
        ("'1-12:00:00'", 2160),
        ("'00:00:30'", 1),  # Slurm rounds up too
    ],
)
def test_times(read: Read, written: str, minutes: int) -> None:
    assert read(f"time: {written}\ndrain: 5").time == minutes


@pytest.mark.parametrize(
    "written",
    # Slurm takes 90 for minutes, others for seconds.
    ["14400", "'1:00'", "90", "90s", "'90'", "''", "0m", "tomorrow", "-4h", "4.5h", "true", "[4h]", "null"],
)
def test_what_is_no_time(refused: Callable[..., str], written: str) -> None:
    assert "is not a time; write 90m, 4h, 1d12h, or '04:00:00' in quotes" in refused(f"time: {written}")


def test_overrides_lie_over_the_file(read: Read) -> None:
    site = read("nodes: 2\npartition: small", "nodes=3", "time='02:00:00'", "partition=large")
    assert (site.nodes, site.time, site.partition) == (3, 120, "large")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitions: gpu", "unknown key 'partitions' (did you mean partition?)"),
        ("cpus: 4", "unknown key 'cpus'"),
        ("gpu_syntax: gpus", "gpu_syntax: 'gpus' is not one of 'gpus-per-node' or 'gres'"),
        ("scheduler: pbs", "scheduler: 'pbs' is not one of 'slurm' or 'local'"),
        ("nodes: 0", "nodes: 0 must be at least 1"),
        ("nodes: two", "nodes: 'two'"),
        ("nodes: 1.5", "nodes: 1.5"),
        ("gpus_per_node: -1", "gpus_per_node: -1 must be at least 0"),
        ("memory_per_node: 0", "memory_per_node: 0 must be greater than 0"),
        ("memory_per_node: .inf", "memory_per_node: inf must be at most 1000000"),
        ("poll: .inf", "poll: inf must be at most 2592000"),
        ("node_failure: 0.5", "node_failure: 0.5 must be at least 1"),
        ("memory_per_node: 64G", "memory_per_node: '64G'"),
        ("exclusive: 1", "exclusive: 1 is not true or false"),
        ("setup: module load cuda", "setup: 'module load cuda' is not a list; write ['module load cuda']"),
        ("partition: ''", "partition: ''"),
        ("account: 7", "account: 7 is not text; put it in quotes"),
        ("time: 4:00:00", "4:00:00 is a number to the base 60 in YAML"),
        ("device: gpu", "device: 'gpu' is not one of"),
        ("nodes: 2\nleast_nodes: 3", "least_nodes: 3 of 2 nodes cannot come"),
        ("scheduler: local\nnodes: 2", "scheduler local is this one machine; nodes must be 1"),
        ("time: 2m", "drain: 120 s before the end of a job of 2 min is before its beginning"),
        ("temporary: scratch", "temporary: 'scratch' is not an absolute path"),
        ("nodes: 1\nnodes: 2", "line 4, column 1: the key 'nodes' is given twice"),
    ],
)
def test_what_is_refused(refused: Callable[..., str], text: str, message: str) -> None:
    assert message in refused(text)


def test_all_that_is_wrong_is_told_at_once(refused: Callable[..., str]) -> None:
    said = refused("nodes: 0\ntime: 90\nworkers: 2")
    assert "3 settings are wrong" in said
    assert all(key in said for key in ("nodes: 0", "time: 90", "'workers'"))


def test_an_override_is_named(refused: Callable[..., str]) -> None:
    assert "(from 'time=90')" in refused("", "time=90")
    assert "unknown key 'node' (did you mean nodes?)" in refused("", "node=3")


def test_a_long_temporary_folder(read: Read, refused: Callable[..., str]) -> None:
    longest = "/" + "x" * (LONGEST_TEMPORARY - 1)
    assert read(f"temporary: {longest}").temporary == longest
    said = refused(f"temporary: {longest}x")
    assert f"has {LONGEST_TEMPORARY + 1} characters; at most {LONGEST_TEMPORARY}" in said


def test_the_longest_temporary_folder_leaves_ray_its_sockets() -> None:
    folder = f"{'x' * LONGEST_TEMPORARY}/dds12345678/ray"
    session = "session_2026-11-21_21-04-11_867771_4194304"  # the largest process number of Linux
    assert len(f"{folder}/{session}/sockets/plasma_store") <= 107


@pytest.mark.parametrize(
    ("first", "number", "message"),
    [
        (15000, 100, "overlaps 10002 to 19999, where Ray's workers listen"),
        (9000, 2000, "overlaps 10002 to 19999"),
        (19995, 10, "overlaps 10002 to 19999"),
        (60000, 10000, "60000 to 69999; at least 10 ports between 1024 and 65535"),
        (80, 100, "80 to 179"),
        (20000, 9, "20000 to 20008; at least 10 ports"),
    ],
)
def test_ports_that_cannot_be(refused: Callable[..., str], first: int, number: int, message: str) -> None:
    assert message in refused(f"first_port: {first}\nports: {number}")


@pytest.mark.parametrize(("first", "number"), [(9000, 1000), (20000, 10), (55536, 10000)])
def test_ports_at_the_edge(read: Read, first: int, number: int) -> None:
    assert read(f"first_port: {first}\nports: {number}").ports == number


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("nodes", "nodes"),
        ("N", "(--nodes) is decided by nodes"),
        ("-N", "(--nodes) is decided by nodes"),
        ("ntasks", "nodes"),
        ("n", "nodes"),
        ("ntasks_per_node", "nodes"),
        ("tasks-per-node", "nodes"),
        ("cpus-per-task", "cpus_per_node"),
        ("cpus-per-t", "(--cpus-per-task) is decided by cpus_per_node"),
        ("c", "cpus_per_node"),
        ("--time", "time"),
        ("Time", "(--time) is decided by time"),
        ("t", "time"),
        ("tim", "(--time) is decided by time"),
        ("partition", "partition"),
        ("part", "(--partition) is decided by partition"),
        ("p", "partition"),
        ("A", "account"),
        ("qos", "qos"),
        ("q", "qos"),
        ("constraint", "constraint"),
        ("C", "constraint"),
        ("wckey", "wckey"),
        ("exclusive", "exclusive"),
        ("EXCLUSIV", "exclusive"),
        ("gpus-per-node", "gpus_per_node"),
        ("gpus", "gpus_per_node"),
        ("G", "gpus_per_node"),
        ("gres", "gpus_per_node"),
        ("mem", "memory_per_node"),
        ("mem-per-cpu", "memory_per_node"),
        ("mem_per_gpu", "memory_per_node"),
        ("signal", "drain"),
        ("requeue", "requeues"),
        ("no-requeue", "requeues"),
        ("no_kill", "node_failure"),
        ("array", "array_tasks"),
        ("a", "array_tasks"),
        ("output", "--results"),
        ("error", "--results"),
        ("e", "--results"),
        ("open-mode", "--results"),
        ("job-name", "the name of the sweep"),
        ("J", "the name of the sweep"),
        ("dependency", "--mode"),
        ("W", "--wait"),
        ("test-only", "--dry-run"),
        ("M", "the machine that it is submitted from"),
        ("wrap", "ddsweep itself"),
        ("parsable", "ddsweep itself"),
    ],
)
def test_options_of_sbatch_that_other_keys_decide(refused: Callable[..., str], key: str, ours: str) -> None:
    said = refused(f"sbatch: {{reservation: mine, {key}: 1}}")
    assert (
        f"sbatch: {key!r} " in said and f"is decided by {ours.partition('is decided by ')[2] or ours}" in said
    )
    assert ours in said and "reservation: name" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{res: a}", "'res' may be short for --reservation, --resv-ports; write one"),
        ("{'nodes=3': true}", "'nodes=3' is not the name of an option; write {name: value}"),
        ("{'comment x': true}", "'comment x' is not the name of an option"),
        ("{w: n1, nodelist: n2}", "'nodelist' gives --nodelist a second time"),
        (
            '{comment: "a\\n#SBATCH --nodes=9"}',
            "'comment' has 'a\\n#SBATCH --nodes=9', which is not one line of",
        ),
        ("{comment: [a]}", "'comment' has ['a'], no text or number; give true for an option without a value"),
        ("{comment: null}", "'comment' has None, no text or number"),
        ("[comment]", "['comment'] is not a mapping of options, such as {reservation: mine}"),
    ],
)
def test_options_of_sbatch_that_are_none(refused: Callable[..., str], options: str, message: str) -> None:
    assert message in refused(f"sbatch: {options}")


def test_a_text_of_two_lines_would_be_two_options(refused: Callable[..., str]) -> None:
    assert "partition: 'a\\nb' is not one line of text" in refused('partition: "a\\nb"')


def test_options_of_sbatch_in_any_spelling_get_their_long_names(read: Read) -> None:
    written = "{w: n1, --hold: true, Mail_User: me, licens: 2, plugin_X: 0.5, comment: 'a b', s: true}"
    assert read(f"sbatch: {written}").sbatch == {
        **{"nodelist": "n1", "hold": True, "mail-user": "me", "licenses": 2, "plugin-X": "0.5"},
        **{"comment": "a b", "oversubscribe": True},
    }


def test_oversubscribing_is_the_contrary_of_exclusive(refused: Callable[..., str]) -> None:
    said = refused("exclusive: true\nsbatch: {oversubscribe: true}")
    assert "'oversubscribe' is decided by exclusive" in said


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"mine\.yaml: no such site file"):
        load_site(tmp_path / "mine.yaml")


def test_an_srun_has_the_options_of_the_site(read: Read) -> None:
    site = read(
        "partition: gpu\naccount: mine\ngpus_per_node: 2\ngpu_type: a100\ngpu_syntax: gres\n"
        "memory_per_node: 8\nexclusive: true\nsbatch: {reservation: today, comment: false}"
    )
    assert srun_options(site, minutes=5, nodes=3) == [
        "--partition=gpu",
        "--account=mine",
        "--ntasks-per-node=1",
        "--cpus-per-task=4",
        "--mem=8192M",
        "--exclusive",
        "--gres=gpu:a100:2",
        "--time=5",
        "--nodes=3",
        "--reservation=today",
    ]
    assert "--gpus-per-node=a100:2" in srun_options(
        site.model_copy(update={"gpu_syntax": "gpus-per-node"}), minutes=5, nodes=1
    )
