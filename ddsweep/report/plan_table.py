"""The plan of a sweep, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.text import Text

from ddsweep.catalog import EvaluationSpec, TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.cost import CostEstimate, evaluation_seconds, protocol_seconds
from ddsweep.report.console import MOST_LISTED
from ddsweep.report.formats import NONE, duration, size
from ddsweep.report.settings import settings_of, varying
from ddsweep.report.trial_table import trial_table
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import AshaSpec, Plan, settings_by_stratum

__all__ = ["TO_EVALUATE", "evaluation_line", "plan_table", "protocol_lines", "with_distilled"]

_LISTED = 3
"""The number of left-out combinations that are named."""


TO_EVALUATE = "to evaluate"
"""The state of a trial with a distilled set and an evaluation to do. It costs no distillation."""


def with_distilled(directory: SweepDirectory, states: Mapping[str, str]) -> dict[str, str]:
    """``states`` of trials by id, with `TO_EVALUATE` for missing trials that are distilled."""
    return {
        trial_id: TO_EVALUATE if state == "missing" and directory.distilled(trial_id).is_file() else state
        for trial_id, state in states.items()
    }


def plan_table(
    plan: Plan,
    states: Mapping[str, str],
    estimates: Mapping[str, CostEstimate],
    threads: float = 1.0,
    scheduler: AshaSpec | None = None,
    cohorts: Mapping[str, int] | None = None,
    in_turn: Mapping[str, int] | None = None,
) -> Group:
    """The trials of ``plan`` with their state (``done``, ``stopped``, `TO_EVALUATE` or, also by default,
    ``missing``) and cost, and the totals below. ``threads`` is the number that ``estimates`` were made for,
    ``cohorts`` the most trials that each may be distilled together with, itself included; ``in_turn`` has the
    reasons of those that are alone, with their numbers.
    """
    settings = {trial.trial_id: settings_of(trial) for trial in plan.trials}
    listed = dict(list(settings.items())[:MOST_LISTED])
    told: dict[str, list[str | Text]] = {}
    for trial_id in listed:
        state, cost = states.get(trial_id, "missing"), estimates.get(trial_id)
        told[trial_id] = [
            Text(state, {"done": "green", "stopped": "magenta", TO_EVALUATE: "cyan"}.get(state, "")),
            duration(cost.seconds_cpu) if cost and state != TO_EVALUATE else NONE,
            size(cost.memory_bytes) if cost else NONE,
        ]
    table = trial_table(listed, varying(list(settings.values())), ["about", "memory"], told)
    more = [Text(f"and {hidden} more")] if (hidden := len(settings) - len(listed)) else []
    lines = [_totals(plan, states, estimates, threads, scheduler), *_together(plan, states, cohorts or {})]
    reasons = (in_turn or {}).items()
    lines += [f"{counted(count, 'trial')} one after the other, not together: {why}" for why, count in reasons]
    return Group(table, *more, Text("\n".join(lines)))


def _totals(
    plan: Plan,
    states: Mapping[str, str],
    estimates: Mapping[str, CostEstimate],
    threads: float,
    scheduler: AshaSpec | None,
) -> str:
    ids = [trial.trial_id for trial in plan.trials]
    counts = Counter(states.get(i) for i in ids)
    missing = [i for i in ids if states.get(i) not in ("done", "stopped", TO_EVALUATE)]
    lines = [f"{counted(len(ids), 'trial')}, {counts['done']} done"]
    if counts["stopped"]:
        lines[0] += f", {counts['stopped']} stopped"
    if counts[TO_EVALUATE]:
        lines[0] += f", {counts[TO_EVALUATE]} to evaluate"
    if not missing and not counts[TO_EVALUATE] and not plan.to_propose:
        lines[0] += "; nothing is left to do"
    elif missing and all(i in estimates for i in missing):
        hours = sum(estimates[i].seconds_cpu for i in missing) * threads / 3600
        most = " at most" if scheduler and 60 * hours >= 1 else ""
        rest = f"the other {len(missing)} take" if len(missing) > 1 else "the other one takes"
        rest = "it takes" if len(ids) == 1 else rest
        lines[0] += f"; {rest}{most} {_hours(hours)} to distil"
    if plan.to_propose:
        lines.append(f"up to {counted(plan.to_propose, 'more trial')} to be proposed by the search")
        if len(estimates) >= len(ids):
            mean = sum(estimates[i].seconds_cpu for i in ids) / len(ids)
            lines[-1] += f", {_hours(plan.to_propose * mean * threads / 3600)}"
    lines += plan.assumed
    if scheduler:
        lines += _scheduling(plan, scheduler)
    dropped, unjudged = ([f"{text}: {reason}" for text, reason in of] for of in (plan.dropped, plan.unjudged))
    lines += _named(f"{len(dropped)} dropped as impossible (skip_invalid)", dropped)
    lines += _named(f"{counted(len(unjudged), 'evaluation')} left out as impossible (skip_invalid)", unjudged)
    repeated = list(dict.fromkeys(plan.repeated))
    lines += _named(f"{len(plan.repeated)} left out: an earlier sample is the same trial", repeated)
    return "\n".join(lines)


def _named(what: str, texts: Sequence[str]) -> list[str]:
    """``what``, with the first of ``texts`` below it; nothing without any."""
    if not texts:
        return []
    return [
        what + (":" if len(texts) <= _LISTED else ", among them:"),
        *(f"  {text}" for text in texts[:_LISTED]),
    ]


def _together(plan: Plan, states: Mapping[str, str], cohorts: Mapping[str, int]) -> list[str]:
    """A line on the trials that are still to be distilled and share a process, if there are any."""
    sizes = [
        cohorts.get(trial.trial_id, 1)
        for trial in plan.trials
        if states.get(trial.trial_id) not in ("done", "stopped", TO_EVALUATE)
    ]
    shared = [size for size in sizes if size > 1]
    if not shared:
        return []
    alone = len(sizes) - len(shared)
    rest = f"; {counted(alone, 'trial')} alone" if alone else ""
    shares = f"{len(shared)} trials share processes with others of their shape, up to {max(shared)} in one"
    return [f"{shares}{rest} (resources.cohort)"]


def evaluation_line(
    trials: Sequence[TrialSpec],
    evaluation: EvaluationSpec,
    states: Mapping[str, str],
    scheduler: AshaSpec | None = None,
) -> str | None:
    """What it costs to judge those of ``trials`` that are neither done nor stopped; None without any."""
    left = [trial for trial in trials if states.get(trial.trial_id) not in ("done", "stopped")]
    if not left:
        return None
    hours = evaluation_seconds(left, evaluation, 1) / 3600
    shared = ", baselines included" if evaluation.baselines else ""
    most = "at most " if scheduler and 60 * hours >= 1 else ""  # it stops some before
    return f"evaluation of {counted(len(left), 'trial')}: {most}{_hours(hours)}{shared}"


def protocol_lines(
    trials: Sequence[TrialSpec], evaluation: EvaluationSpec, states: Mapping[str, str]
) -> list[str]:
    """For each protocol of one's own: how long networks are trained under it for those of ``trials`` that are
    neither done nor stopped, and what that costs."""
    left = [trial for trial in trials if states.get(trial.trial_id) not in ("done", "stopped")]
    lines = []
    for protocol in evaluation.protocols:
        if isinstance(protocol, str):
            continue
        costs = {trial: protocol_seconds(trial, evaluation, protocol, 1) for trial in left}
        judged, hours = [trial for trial, seconds in costs.items() if seconds], sum(costs.values()) / 3600
        if judged:
            steps = _span([evaluation.last_step(trial, protocol) for trial in judged], "step")
            tests = _span([len(evaluation.steps(trial, protocol)) for trial in judged], "test")
            lines.append(
                f"{protocol.name}: {steps} of training and {tests} for each held-out network; for "
                f"{counted(len(judged), 'trial')} {_hours(hours)}, tests not counted"
            )
    return lines


def _scheduling(plan: Plan, scheduler: AshaSpec) -> list[str]:
    """Lines on early stopping: after which steps, which axes are compared, and which are thinned out."""
    rungs = sorted({rung for trial in plan.trials for rung in scheduler.rungs(trial)})
    strata = settings_by_stratum(scheduler, plan.trials)
    seeds = sorted({count for settings in strata for count in settings.values()})
    kept = [
        name for name in scheduler.strata if len({repr(getattr(trial, name)) for trial in plan.trials}) > 1
    ]
    thinned = [
        name
        for name in varying([settings_of(trial) for trial in plan.trials])
        if name != "seed" and name not in scheduler.strata
    ]
    lines = [
        f"{scheduler.kind}: after outer steps {', '.join(map(str, rungs))} settings may be stopped, by their "
        "val_score",
        f"  compared (each combination keeps its best): {', '.join(kept) or NONE}",
        f"  thinned out: {', '.join(thinned) or NONE}",
        f"  {_span(list(map(len, strata)), 'setting')} in {'each of ' if len(strata) > 1 else ''}"
        f"{len(strata)} strat{'a' if len(strata) > 1 else 'um'}, {_span(seeds, 'seed')} each",
    ]
    if seeds != [1]:
        lines[-1] += "; the seeds of a setting go on or stop together, by their mean"
    return lines


def _span(counts: list[int], what: str) -> str:
    least, most = min(counts), max(counts)
    return f"{least if least == most else f'{least} to {most}'} {what}{'s' if most > 1 else ''}"


def _hours(hours: float) -> str:
    if 60 * hours < 1:
        return "under 1 CPU-minute"
    if hours < 1:
        return f"about {counted(round(60 * hours), 'CPU-minute')}"
    return f"about {hours:.1f} CPU-hours" if hours < 100 else f"about {hours:.0f} CPU-hours"
