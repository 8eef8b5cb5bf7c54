"""What is handed to Slurm, to the letter, and what its answers are taken for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ddsweep.errors import UserError
from ddsweep.launch import slurm as slurm_module
from ddsweep.launch.folder import Job, LaunchFolder
from ddsweep.launch.jobs import stages
from ddsweep.launch.slurm import (
    JobState,
    SilentError,
    SubmissionError,
    active,
    cancel_jobs,
    check_nodes,
    check_site,
    job_states,
    wait,
)
from ddsweep.launch.submit import script, submit
from tests.launch.conftest import FakeSlurm, make_site

CLUSTER = """#!/bin/bash

# Parameters
#SBATCH --account=proj
#SBATCH --constraint='a100|h100'
#SBATCH --cpus-per-task=16
#SBATCH --error='{folder}/logs/%j_0_log.err'
#SBATCH --exclusive
#SBATCH --gpus-per-node=a100:4
#SBATCH --job-name=ddsweep-small-cluster
#SBATCH --mem=122880M
#SBATCH --no-kill
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output='{folder}/logs/%j_0_log.out'
#SBATCH --partition=main
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --reservation=mine
#SBATCH --signal=USR2@120
#SBATCH --time=240
#SBATCH --wckey=x

# setup
module load cuda
source '/a b/activate'

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '{folder}/logs/%j_%t_log.out' --error '{folder}/logs/%j_%t_log.err' --no-kill \
--cpus-per-task=16 apptainer exec x.sif python3 -P -u -m submitit.core._submit '{folder}/logs'
"""

ARRAY = """#!/bin/bash

# Parameters
#SBATCH --array=0-7%2
#SBATCH --cpus-per-task=4
#SBATCH --dependency=afterany:41
#SBATCH --error='{folder}/logs/%A_%a_0_log.err'
#SBATCH --gres=gpu:2
#SBATCH --job-name=ddsweep-small-evals
#SBATCH --no-kill
#SBATCH --no-requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output='{folder}/logs/%A_%a_0_log.out'
#SBATCH --signal=USR2@60
#SBATCH --time=90

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '{folder}/logs/%A_%a_%t_log.out' --error '{folder}/logs/%A_%a_%t_log.err' \
--no-kill --cpus-per-task=4 {python} -P -u -m submitit.core._submit '{folder}/logs'
"""


@pytest.fixture
def folder(tmp_path: Path) -> LaunchFolder:
    return LaunchFolder(tmp_path / "all results" / "jobs" / "l")


# ---------------------------------------------------------------------------------------- the scripts


@pytest.mark.usefixtures("slurm")
def test_the_script_of_a_cluster(folder: LaunchFolder) -> None:
    site = make_site(
        partition="main",
        account="proj",
        qos="high",
        constraint="a100|h100",
        wckey="x",
        time="4h",
        nodes=3,
        cpus_per_node=16,
        gpus_per_node=4,
        gpu_type="a100",
        memory_per_node=120,
        exclusive=True,
        sbatch={"reservation": "mine", "hold": False},
        setup=["module load cuda", "source '/a b/activate'"],
        python="apptainer exec x.sif python3",
    )
    (stage,) = stages(folder, "cluster", site, 0)
    text = script(site, folder, "ddsweep-small-cluster", stage)
    assert text == CLUSTER.format(folder=folder.root)


@pytest.mark.usefixtures("slurm")
def test_the_script_of_an_array(folder: LaunchFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/a b/python3")
    site = make_site(time="90m", nodes=2, gpus_per_node=2, gpu_syntax="gres", requeues=0, drain=60)
    evals, _ = stages(folder, "array", site, 0)
    text = script(site, folder, "ddsweep-small-evals", evals, "41")
    assert text == ARRAY.format(folder=folder.root, python="'/a b/python3'")


def test_what_was_submitted_is_a_job(slurm: FakeSlurm, folder: LaunchFolder) -> None:
    slurm.says("sbatch", "Submitted batch job 4711\n")
    site = make_site()
    assert submit(site, folder, "n", *stages(folder, "cluster", site, 0)) == Job("4711", "cluster", 0)
    array = submit(site, folder, "n", stages(folder, "array", site, 3)[0], "4")
    assert array == Job("4711", "trials", 3)
    single = submit(site, folder, "n", stages(folder, "array", site, 1)[0])
    assert single == Job("4711", "trials", 0), "an array of one is none"
    assert len(slurm.asked("sbatch")) == 3
    assert {path.name for path in folder.logs.glob("*.pkl")} == {
        "4711_submitted.pkl",
        *(f"4711_{n}_submitted.pkl" for n in range(3)),
    }


def test_variables_of_the_shell_do_not_go_over_the_script(
    slurm: FakeSlurm, folder: LaunchFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch reads SBATCH_... after the script; where the site says nothing they are the user's defaults."""
    slurm.says("sbatch", "Submitted batch job 7\n")
    program = slurm.folder / "sbatch"
    program.write_text(
        program.read_text().replace("\n", "\nenv | grep ^SBATCH_ | sort > $(dirname $0)/env\n", 1)
    )
    for name in (
        "TIMELIMIT",
        "NO_REQUEUE",
        "GPUS",
        "PARTITION",
        "ACCOUNT",
        "RESERVATION",
        "MEM_PER_CPU",
        "HINT",
    ):
        monkeypatch.setenv(f"SBATCH_{name}", "1")
    site = make_site(account="mine", sbatch={"reservation": "mine"})
    submit(site, folder, "name", *stages(folder, "cluster", site, 0))
    assert (slurm.folder / "env").read_text().split() == [
        "SBATCH_HINT=1",
        "SBATCH_MEM_PER_CPU=1",
        "SBATCH_PARTITION=1",
    ]
    site = make_site(memory_per_node=4)
    submit(site, folder, "name", *stages(folder, "cluster", site, 0))
    assert "MEM_PER_CPU" not in (slurm.folder / "env").read_text()
    assert os.environ["SBATCH_TIMELIMIT"] == "1"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "sbatch: error: invalid partition specified: gpu\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
            "Slurm refused the job: invalid partition specified: gpu; Batch job submission failed: Invalid "
            "partition name specified; the partitions are main, old (partition: gpu)",
        ),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination\n",
            "set account in the site file (now None); sacctmgr lists yours",
        ),
        (
            "sbatch: error: CPU count per node can not be satisfied\n"
            "sbatch: error: Batch job submission failed: Requested node configuration is not available\n",
            "ask for fewer nodes, cpus_per_node, gpus_per_node or memory_per_node",
        ),
        ("slurm_load: something else\n", "something else"),
    ],
)
def test_a_refusal_is_one_message(slurm: FakeSlurm, folder: LaunchFolder, said: str, told: str) -> None:
    slurm.says("sbatch", error=said, code=1)
    site = make_site(partition="gpu")
    with pytest.raises(SubmissionError) as refused:
        submit(site, folder, "n", *stages(folder, "cluster", site, 0))
    text = str(refused.value)
    assert "\n" not in text and text.startswith("Slurm refused the job: ")
    assert told in text


def test_no_slurm_is_one_message(
    folder: LaunchFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubmissionError, match="sbatch: no such command: this is not a login node"):
        submit(make_site(), folder, "n", *stages(folder, "cluster", make_site(), 0))
    with pytest.raises(SubmissionError, match="squeue: no such command"):
        job_states([Job("1", "cluster")])


def test_of_several_partitions_one_must_be_large_enough(slurm: FakeSlurm) -> None:
    slurm.says("sinfo", "main*|2\nlarge|8\n")
    check_nodes(make_site(partition="main,large", nodes=8))
    with pytest.raises(SubmissionError, match="nodes: 9; partition 'large' has 8"):
        check_nodes(make_site(partition="main,large", nodes=9))
    with pytest.raises(SubmissionError, match="nodes: 3; partition 'main' has 2"):
        check_nodes(make_site(nodes=3))


def test_a_dry_run_from_where_no_program_runs_hands_nothing_to_slurm(
    slurm: FakeSlurm, folder: LaunchFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell would pass over the stub, and take the next sbatch on the path: the real one."""
    monkeypatch.setattr(
        os, "access", lambda path, mode: not (str(path).endswith("sbatch") and mode == os.X_OK)
    )
    (stage,) = stages(folder, "cluster", make_site(), 0)
    with pytest.raises(
        SubmissionError, match=r"\(noexec\), which --dry-run needs; set TMPDIR to another folder"
    ):
        script(make_site(), folder, "n", stage)
    assert not slurm.asked("sbatch")


def test_a_partition_that_would_never_run_it_is_refused(slurm: FakeSlurm) -> None:
    check_site(make_site())
    check_site(make_site(partition="main"))
    with pytest.raises(SubmissionError, match="'gpu' is not one of main, old"):
        check_site(make_site(partition="gpu"))
    with pytest.raises(SubmissionError, match="'old' is down: jobs would wait for ever"):
        check_site(make_site(partition="old"))
    check_site(make_site(partition="old,main"))
    with pytest.raises(SubmissionError, match="'gpu' is not one of main, old"):
        check_site(make_site(partition="main,gpu"))
    slurm.says("sinfo", error="slurm_load_partitions: Unable to contact slurm controller\n", code=1)
    with pytest.raises(SilentError, match="sinfo: slurm_load_partitions: Unable to contact"):
        check_site(make_site(partition="main"))


# --------------------------------------------------------------------------------------- the states


def states(*numbers: str) -> dict[str, list[JobState]]:
    return job_states([Job(number, "trials") for number in numbers])


INVALID = "slurm_load_jobs error: Invalid job id specified\n"


def test_squeue_is_asked_first_and_once(slurm: FakeSlurm) -> None:
    slurm.says(
        "squeue", "12_[3-7%2]|PENDING|Dependency|\n12_1|RUNNING|None|node[1-2]\n13|PENDING|BeginTime|\n"
    )
    assert states("12", "13") == {
        "12": [JobState("12_[3-7%2]", "PENDING", "Dependency"), JobState("12_1", "RUNNING", "", "node[1-2]")],
        "13": [JobState("13", "PENDING", "BeginTime")],
    }
    assert [line.split()[0] for line in slurm.asked()] == ["squeue"]
    assert [state.id for state in active([Job("12", "trials"), Job("13", "evals")])] == [
        "12_[3-7%2]",
        "12_1",
        "13",
    ]


def test_a_job_requeued_after_a_lost_node_is_not_over(slurm: FakeSlurm) -> None:
    """For accounting it ended; squeue knows better."""
    slurm.says("squeue", "12|PENDING|BeginTime|\n")
    slurm.says("sacct", "12|NODE_FAIL|node1\n")
    (state,) = states("12")["12"]
    assert (state.state, state.over) == ("PENDING", False)


def test_what_squeue_forgot_accounting_remembers(slurm: FakeSlurm) -> None:
    slurm.says("squeue", error=INVALID, code=1)
    slurm.says("sacct", "12_0|NODE_FAIL|node1\n12_1|CANCELLED by 1000|node2\n12_0|COMPLETED|node3\n")
    assert states("12")["12"] == [
        JobState("12_0", "COMPLETED", "", "node3"),
        JobState("12_1", "CANCELLED", "", "node2"),
    ]
    assert active([Job("12", "trials")]) == []


@pytest.mark.parametrize("left", ["RUNNING", "PENDING", "REQUEUED", ""])
def test_what_accounting_takes_for_running_and_squeue_does_not_know_is_gone(
    slurm: FakeSlurm, left: str
) -> None:
    slurm.says("squeue", error=INVALID, code=1)
    slurm.says("sacct", f"12|{left}|node1\n")
    (state,) = states("12")["12"]
    assert (state.state, state.over) == ("GONE", True)


@pytest.mark.parametrize("there", [True, False])
def test_without_accounting_scontrol_is_asked(slurm: FakeSlurm, there: bool) -> None:
    slurm.says("squeue")  # asked for several, it says nothing about unknown ones
    slurm.says("sacct", error="Slurm accounting storage is disabled\n", code=1)
    if not there:
        (slurm.folder / "sacct").unlink()
    slurm.says(
        "scontrol",
        "JobId=13 ArrayJobId=12 ArrayTaskId=1 JobName=a=b JobState=TIMEOUT Reason=TimeLimit NodeList=node1\n"
        "JobId=12 ArrayJobId=12 ArrayTaskId=2-4%1 JobState=PENDING Reason=None NodeList=(null)\n",
    )
    assert states("12")["12"] == [
        JobState("12_1", "TIMEOUT", "TimeLimit", "node1"),
        JobState("12_2-4%1", "PENDING"),
    ]
    slurm.says("scontrol", error=INVALID, code=1)
    assert states("12")["12"] == [JobState("12", "GONE")]


def test_a_controller_that_does_not_answer_is_no_end_of_a_job(slurm: FakeSlurm) -> None:
    slurm.says("squeue", error="slurm_load_jobs error: Unable to contact slurm controller\n", code=1)
    for question in (lambda: states("12"), lambda: active([Job("12", "trials")])):
        with pytest.raises(SilentError, match=r"Slurm does not answer: squeue: .*Unable to contact"):
            question()


def test_nothing_is_asked_of_no_jobs(slurm: FakeSlurm) -> None:
    assert job_states([]) == {} and active([]) == [] and slurm.asked() == []


def test_a_command_that_hangs_is_one_message(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    (slurm.folder / "squeue").write_text("#!/bin/sh\nexec sleep 600\n")
    monkeypatch.setattr(slurm_module, "_SLURM_TIMEOUT_S", 0.2)
    with pytest.raises(SilentError, match="squeue did not answer within"):
        states("12")


def test_cancelling_names_the_jobs_and_the_state(slurm: FakeSlurm) -> None:
    jobs = [Job("12", "trials", 3), Job("13", "finish")]
    cancel_jobs(jobs, state="PENDING")
    cancel_jobs(jobs)
    assert slurm.asked() == [
        "scancel --state=PENDING 12",
        "scancel --state=PENDING 13",
        "scancel 12",
        "scancel 13",
    ]


# ------------------------------------------------------------------------------------------- waiting


class Looks:
    """What each look finds; the last for ever."""

    def __init__(self, *found: Sequence[str] | Exception) -> None:
        self.found, self.times = list(found), 0

    def __call__(self) -> list[JobState]:
        self.times += 1
        found = self.found.pop(0) if len(self.found) > 1 else self.found[0]
        if isinstance(found, Exception):
            raise found
        return [JobState(f"1_{n}", *word.split(":")) for n, word in enumerate(found)]


def waited(looks: Looks, longest: int | None = None) -> tuple[list[str], list[str]]:
    changes: list[str] = []
    found = wait(looks, 0.0, lambda state: changes.append(f"{state.id} {state.state}"), longest)
    return [state.state for state in found], changes


def test_waiting_tells_each_change_once() -> None:
    looks = Looks(["PENDING"], ["PENDING"], ["RUNNING"], ["RUNNING"], ["COMPLETING"], ["COMPLETED"])
    assert waited(looks) == (["COMPLETED"], ["1_0 PENDING", "1_0 RUNNING", "1_0 COMPLETING", "1_0 COMPLETED"])


@pytest.mark.parametrize("doubtful", ["NODE_FAIL", "GONE", "PREEMPTED", "BOOT_FAIL"])
def test_a_doubtful_end_that_does_not_stay_is_none(doubtful: str) -> None:
    looks = Looks(["RUNNING"], [doubtful], [doubtful], ["PENDING"], ["RUNNING"], ["COMPLETED"])
    assert waited(looks)[0] == ["COMPLETED"]
    stays = Looks(["RUNNING"], [doubtful])
    assert waited(stays)[0] == [doubtful]
    assert stays.times == 4, "seen three times in a row"


def test_a_silence_is_waited_out_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    silence = SilentError("no answer")
    assert waited(Looks(["RUNNING"], silence, silence, ["COMPLETED"]))[0] == ["COMPLETED"]
    monkeypatch.setattr(slurm_module, "_SILENCE_S", 0.05)
    with pytest.raises(SilentError, match="no answer"):
        waited(Looks(["RUNNING"], silence))
    with pytest.raises(SubmissionError, match="no such command"):
        waited(Looks(SubmissionError("squeue: no such command")))


def test_what_never_starts_is_told_with_its_reason() -> None:
    with pytest.raises(UserError, match=r"nothing started \(1_0: Resources\)"):
        waited(Looks(["PENDING:Resources"]), longest=0)
    requeued = Looks(["RUNNING"], ["PENDING:BeginTime"], ["PENDING:Resources"], ["RUNNING"], ["COMPLETED"])
    assert waited(requeued, longest=0)[0] == ["COMPLETED"], "it had started before"
