"""What is tried again whose process died, and when: by a clock of the test's own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

import pytest

from ddsweep.catalog import EvalUnit
from ddsweep.sweep.retry import RetryPolicy, told_death
from ddsweep.sweep.work import STRANDED_S, QueuedUnit, Work

# ----------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("retries", [1, 3, 4])
def test_attempts_are_spread_over_minutes_by_waits_that_grow(retries: int) -> None:
    waits = [RetryPolicy(retries).wait(failures) for failures in range(1, retries + 2)]
    assert waits[-1] is None
    given = [wait for wait in waits if wait is not None]
    assert len(given) == retries and given == sorted(set(given))
    assert sum(given) == pytest.approx(180), "longer than a minute of anything"
    assert sum(RetryPolicy(retries, spread_s=2).wait(n + 1) or 0 for n in range(retries)) == pytest.approx(2)


def test_no_retries_are_no_retries() -> None:
    assert RetryPolicy(0).wait(1) is None


OUT_OF_MEMORY = """Failure # 1 (occurred at 2026-11-23_11-33-01)
The actor died unexpectedly before finishing this task.
Failure # 2 (occurred at 2026-11-23_11-34-01)
2 worker(s) were killed due to the node running low on memory. \
Memory on the node (IP: 192.0.2.2, ID: d18a2050) was 22.90GB used / 23.54GB limit (0.972812)
OOM kill reason: Memory usage 24591703424B exceeded threshold of 24012676915B (95.0%)
Considered workers: [
Selected to kill: (Actor(bc1f72b902fd38edc761015a01000000): pid=15594, actual memory used=0.05GB)
]
To see more information about memory usage on this node, use `ray logs raylet.out -ip 192.0.2.2`
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
8370\t18.62\t/usr/bin/python somebody.py
8371\t0.30\tray::Distil.train
"""
KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: EvalShard
\tactor_id: 32900e69b4da2061343e364c01000000
\tip: 192.0.2.7
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: \
Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: ...
"""
LOST = """The actor died unexpectedly before finishing this task.
\tip: 192.0.2.7
The actor died because its node has died. Node Id: d18a20505e95
"""
RAISED = """Failure # 1 (occurred at 2026-11-23_11-33-01)
ray::ImplicitFunc.train() (pid=1, ip=192.0.2.2)
  File "trial.py", line 1, in distil
OSError: [Errno 5] Input/output error
"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (OUT_OF_MEMORY, ["Ray's memory monitor killed", "22.90 of 23.54 GB of node 192.0.2.2"]),
        (OUT_OF_MEMORY, ["18.62 by process 8370 (/usr/bin/python somebody.py)", "resources.max_concurrent"]),
        (KILLED, ["was killed from outside, or crashed", "dmesg", "resources.max_concurrent"]),
        (LOST, ["its node 192.0.2.7 was lost"]),
        (RAISED, ["OSError: [Errno 5] Input/output error"]),
        ("The worker died unexpectedly while executing this task.", ["was killed from outside"]),
        ("", ["for an unknown reason"]),
    ],
)
def test_who_ended_a_worker_is_told_in_one_line(text: str, told: list[str]) -> None:
    found = told_death(text)
    assert "\n" not in found and all(part in found for part in told), found


# ------------------------------------------------------------------------------------------ the shards


def tasks(count: int, trial: str = "a") -> list[QueuedUnit]:
    spec: Any = SimpleNamespace(trial_id=trial)
    unit: Any = EvalUnit
    return [QueuedUnit(spec, unit) for _ in range(count)]


class Simulation:
    """Shards that take a second to start and one for a unit, and die when ``deadly`` says so."""

    def __init__(self, shards: int, work: Work) -> None:
        self.work, self.now, self.starts = work, 0.0, 0
        self.ready: dict[int, float] = {}
        self.busy: dict[int, list[tuple[float, QueuedUnit]]] = {shard: [] for shard in range(shards)}
        self.done: list[QueuedUnit] = []
        self.given_up: list[QueuedUnit] = []
        self.alive: set[int] = set()

    def deadly(self, shard: int, task: QueuedUnit | None) -> bool:
        return False

    def die(self, shard: int) -> None:
        self.alive.discard(shard)
        self.busy[shard].clear()
        self.given_up += self.work.died(shard, self.now)

    def run(self, until: float) -> None:
        while self.now < until:
            self.now += 0.5
            for shard in self.work.to_start(self.now):
                self.starts += 1
                self.ready[shard] = self.now + 1
            for shard in [shard for shard, at in self.ready.items() if at <= self.now]:
                del self.ready[shard]
                if self.deadly(shard, None):
                    self.die(shard)
                else:
                    self.alive.add(shard)
                    self.work.started(shard)
            for shard, task in self.work.give(self.now):
                assert shard in self.alive and task.not_before <= self.now
                self.busy[shard].append((self.now + 1 + len(self.busy[shard]), task))
            for shard in list(self.alive):
                task = self.busy[shard][0][1] if self.busy[shard] else None
                if self.deadly(shard, task):
                    self.die(shard)
                elif self.busy[shard] and self.busy[shard][0][0] <= self.now:
                    self.done.append(self.busy[shard].pop(0)[1])
                    self.work.finished(shard, self.done[-1])
            self.given_up += self.work.stranded(self.now)


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("minutes", [1, 2])
def test_minutes_in_which_every_shard_is_killed_again_and_again_cost_nothing(
    shards: int, minutes: int
) -> None:
    class NoMemory(Simulation):
        def deadly(self, shard: int, task: QueuedUnit | None) -> bool:
            return self.now < 60 * minutes + 3 and self.now > 3

    work = Work(shards, RetryPolicy(4))
    work.add(tasks(20))
    simulation = NoMemory(shards, work)
    simulation.run(until=600)
    assert len(simulation.done) == 20 and simulation.given_up == []
    assert simulation.starts <= 6 * shards, "and what dies is not started again at once"


def test_a_unit_that_kills_every_shard_is_given_up_and_the_others_are_done_meanwhile() -> None:
    work = Work(2, RetryPolicy(4))
    bad, *others = tasks(9)
    work.add([bad, *others])

    class Poison(Simulation):
        def deadly(self, shard: int, task: QueuedUnit | None) -> bool:
            return task is bad

    simulation = Poison(2, work)
    simulation.run(until=20)
    assert set(simulation.done) == set(others) and simulation.given_up == []
    simulation.run(until=400)
    assert simulation.given_up == [bad] and bad.failures == 5
    assert {task.failures for task in others} == {0}, "what waited on the same shard is not charged"


def test_shards_that_never_come_up_cost_no_attempt_until_all_is_given_up() -> None:
    class Dead(Simulation):
        def deadly(self, shard: int, task: QueuedUnit | None) -> bool:
            return True

    work = Work(2, RetryPolicy(4))
    units = tasks(3)
    work.add(units)
    simulation = Dead(2, work)
    simulation.run(until=STRANDED_S - 5)
    assert simulation.given_up == [] and {unit.failures for unit in units} == {0}
    simulation.run(until=STRANDED_S + 10)
    assert simulation.given_up == units


def test_no_unit_is_given_up_while_trials_may_hold_the_room_of_the_shards() -> None:
    work = Work(1, RetryPolicy(4))
    units = tasks(2)
    work.add(units)
    assert work.stranded(0.0, distilling=True) == work.stranded(9 * STRANDED_S, distilling=True) == []
    assert work.stranded(10 * STRANDED_S) == [], "from the end of the last trial on"
    assert work.stranded(11 * STRANDED_S) == units


def test_a_drain_gives_nothing_out_and_starts_nothing() -> None:
    work = Work(2, RetryPolicy(4))
    assert work.to_start(0) == [0, 1]
    work.started(0)
    work.add(tasks(4))
    given = work.give(0)
    work.drain()
    assert given and not work.waiting and work.give(0) == []
    assert work.died(0, 1.0) == [] and work.to_start(1000) == [] and not work.waiting
    work.add(tasks(1))
    assert not work.waiting


SHORT_OF_MEMORY = """
import ray, sys
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
class Idle:
    def ready(self): import time; time.sleep(60)
try:
    ray.get(ray.remote(Idle).options(max_restarts=0).remote().ready.remote())
except ray.exceptions.RayError as error:
    print(str(error))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_what_ray_says_of_short_memory_is_understood(environment: dict[str, str]) -> None:
    """All of it is in use, as far as this Ray is told."""
    short = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
    with tempfile.TemporaryDirectory(prefix="dds-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, "-P", "-c", SHORT_OF_MEMORY, folder],
            env={**environment, **short, "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            check=True,
        )
    assert "Ray's memory monitor killed the process" in told_death(done.stdout), done.stdout
