"""Options of sbatch in a site file: their spellings, and those that other keys set.

sbatch takes an option by its long name, by a letter, or by a unique beginning of its name; and from a
variable ``SBATCH_...``, which overrides the script. The names are those of Slurm 22.05 to 24.11. Other
options are passed on unchanged, because plugins of a site add their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ddsweep.spec.values import Problem, refuse, shown

__all__ = ["Options", "further_options", "without_variables"]

Options = dict[str, str | int | bool]

_SCRIPT = "ddsweep itself, which writes the script and reads what sbatch prints"
_DECIDED: dict[str, str] = {
    "nodes": "nodes",
    "ntasks": "nodes (one task on each)",
    "ntasks-per-node": "nodes (one task on each)",
    "ntasks-per-core": "nodes (one task on each)",
    "ntasks-per-gpu": "nodes (one task on each)",
    "ntasks-per-socket": "nodes (one task on each)",
    "ntasks-per-tres": "nodes (one task on each)",
    "tasks-per-node": "nodes (one task on each)",
    "cpus-per-task": "cpus_per_node",
    "cpus-per-gpu": "cpus_per_node",
    "gpus": "gpus_per_node",
    "gpus-per-node": "gpus_per_node",
    "gpus-per-socket": "gpus_per_node",
    "gpus-per-task": "gpus_per_node",
    "gres": "gpus_per_node",
    "tres-per-task": "cpus_per_node and gpus_per_node",
    "mem": "memory_per_node",
    "mem-per-cpu": "memory_per_node",
    "mem-per-gpu": "memory_per_node",
    "time": "time",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "wckey": "wckey",
    "exclusive": "exclusive",
    "signal": "drain",
    "requeue": "requeues",
    "no-requeue": "requeues",
    "no-kill": "node_failure (a job outlives nodes that it loses)",
    "array": "array_tasks",
    "output": "--results",
    "error": "--results",
    "open-mode": "--results",
    "job-name": "the name of the sweep",
    "dependency": "--mode",
    "wait": "--wait",
    "test-only": "--dry-run",
    "clusters": "the machine that it is submitted from, whose cluster alone is asked about jobs",
    "cluster": "the machine that it is submitted from, whose cluster alone is asked about jobs",
    **dict.fromkeys(("wrap", "parsable", "quiet", "help", "usage", "version"), _SCRIPT),
}
"""Options that another key sets, by that key."""

_OTHERS = (
    *("acctg-freq", "batch", "bb", "bbf", "begin", "chdir", "cluster-constraint", "comment", "container"),
    *("container-id", "consolidate-segments", "context", "contiguous", "core-spec", "cores-per-socket"),
    *("cpu-freq", "deadline", "delay-boot", "distribution", "exclude", "export", "export-file"),
    *("extra", "extra-node-info", "get-user-env", "gid", "gpu-bind", "gpu-freq", "gres-flags", "hint"),
    *("hold", "ignore-pbs", "input", "kill-on-invalid-dep", "licenses", "mail-type", "mail-user"),
    *("mcs-label", "mem-bind", "mincpus", "network", "nice", "nodefile", "nodelist", "oom-kill-step"),
    *("overcommit", "oversubscribe", "power", "prefer", "priority", "profile", "propagate", "reboot"),
    *("reservation", "resv-ports", "segment", "sockets-per-node", "spread-job", "stepmgr", "switches"),
    *("thread-spec", "threads-per-core", "time-min", "tmp", "tres-bind", "uid", "use-min-nodes"),
    *("verbose", "wait-all-nodes"),
)
_LETTERS = {
    **{"A": "account", "B": "extra-node-info", "C": "constraint", "D": "chdir", "F": "nodefile"},
    **{"G": "gpus", "H": "hold", "J": "job-name", "L": "licenses", "M": "clusters", "N": "nodes"},
    **{"O": "overcommit", "Q": "quiet", "S": "core-spec", "V": "version", "W": "wait", "a": "array"},
    **{"b": "begin", "c": "cpus-per-task", "d": "dependency", "e": "error", "h": "help", "i": "input"},
    **{"k": "no-kill", "m": "distribution", "n": "ntasks", "o": "output", "p": "partition", "q": "qos"},
    **{"s": "oversubscribe", "t": "time", "v": "verbose", "w": "nodelist", "x": "exclude"},
}
_KNOWN = (*_DECIDED, *_OTHERS)
_VARIABLES = {
    **{"ARRAY_INX": "array", "TIMELIMIT": "time", "MEM_PER_NODE": "mem", "REQ_SWITCH": "switches"},
    "WAIT4SWITCH": "switches",
}
"""The option of a variable ``SBATCH_<...>`` that has another name."""

_SITE_DEFAULTS = {
    **{name: name for name in ("partition", "account", "qos", "constraint", "wckey", "mem")},
    **dict.fromkeys(("mem-per-cpu", "mem-per-gpu"), "mem"),
}
"""Options that a variable may give if the script does not have the other option."""


def further_options(given: Any, *, exclusive: bool = False) -> Options:
    """The key ``sbatch`` of a site file: options by their long names.

    Raises pydantic's error with all that is wrong: options that another key sets, in any spelling, and values
    that are not one line of text, a number or a truth value.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{shown(given)} is not a mapping of options, such as {{reservation: mine}}")
    problems: list[Problem] = []
    out: Options = {}
    for key, value in given.items():
        try:
            name = _name(key, exclusive)
            if name in out:
                raise ValueError(f"gives --{name} a second time")
            out[name] = _value(value)
        except ValueError as error:
            problems.append(("sbatch", f"{key!r} {error}"))
    refuse(problems)
    return out


def _name(key: Any, exclusive: bool) -> str:
    """The long name of the option ``key``. Raises `ValueError`."""
    given = str(key).strip("-").replace("_", "-")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", given):
        raise ValueError("is not the name of an option; write {name: value}, without the dashes of sbatch")
    name = _LETTERS.get(given) or given.lower()
    if name not in _KNOWN:
        meant = [option for option in _KNOWN if option.startswith(name)]
        decided = [option for option in meant if option in _DECIDED]
        if len(meant) == 1 or decided:
            name = (decided or meant)[0]
        elif meant:
            raise ValueError(f"may be short for {', '.join(f'--{option}' for option in meant)}; write one")
        else:
            return given
    decides = _DECIDED.get(name)
    if name == "oversubscribe" and exclusive:
        decides = "exclusive"
    if decides:
        called = "" if name == given else f"(--{name}) "
        raise ValueError(
            f"{called}is decided by {decides}; options here are those of sbatch that no other key has, such "
            "as {reservation: name}"
        )
    return name


def _value(value: Any) -> str | int | bool:
    if isinstance(value, float):
        value = f"{value:g}"
    if not isinstance(value, str | int) or value == "":
        raise ValueError(f"has {shown(value)}, no text or number; give true for an option without a value")
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"has {shown(value)}, which is not one line of text")
    return value


@contextmanager
def without_variables(options: Mapping[str, Any]) -> Iterator[None]:
    """The environment without the variables ``SBATCH_...`` that would override ``options`` (by their long
    names) of a script, or settings that a job of ddsweep relies on."""
    kept = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith("SBATCH_") and _goes_over(_option_of(name), options)
    }
    try:
        yield
    finally:
        os.environ.update(kept)


def _goes_over(option: str, options: Mapping[str, Any]) -> bool:
    if option in options:
        return True
    return option in _DECIDED and (option not in _SITE_DEFAULTS or _SITE_DEFAULTS[option] in options)


def _option_of(variable: str) -> str:
    name = variable.removeprefix("SBATCH_")
    return _VARIABLES.get(name) or name.lower().replace("_", "-")
