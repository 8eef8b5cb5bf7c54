"""The table of `ddsweep status`: a line for each trial of a sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from ddsweep.catalog.numbers import counted
from ddsweep.report.console import MOST_LISTED
from ddsweep.report.formats import NONE, duration, percent
from ddsweep.report.settings import varying
from ddsweep.report.status import AGAIN, STATES, STYLES, SweepStatus, TrialStatus
from ddsweep.report.summary import networks_note
from ddsweep.report.trial_table import trial_table

__all__ = ["driver_text", "status_table"]


def status_table(found: SweepStatus) -> RenderableType:
    """A head line, a line for each trial, then failures and torn parts."""
    counts = ", ".join(f"{count} {state}" for state, count in found.counts.items() if count)
    trials = counted(len(found.trials), "trial")
    more = f"; up to {found.to_propose} more to be proposed" if found.to_propose else ""
    head = Text.assemble((found.name, "bold"), f": {trials}, {counts or 'none yet'}{more}")
    parts: list[RenderableType] = [head, Text(driver_text(found))]
    listed = _listed(found.trials)
    if listed:
        parts += [Text(), _table(listed)]
    if rest := Counter(t.state for t in found.trials) - Counter(t.state for t in listed):
        others = ", ".join(f"{rest[state]} {state}" for state in STATES if rest[state])
        parts.append(Text(f"and {rest.total()} more: {others}"))
    below = [Text(f"failed {t.trial_id}: {t.message}", "red") for t in listed if t.message]
    below += [Text(f"torn part, to be made again by `ddsweep run`: {path}", "red") for path in found.torn]
    if note := networks_note(trial.heldout for trial in found.trials if trial.settings):
        below.append(Text(note, "yellow"))
    if found.left:
        count = counted(len(found.left), "more trial is here that", "more trials are here that")
        below.append(
            Text(f"{count} sweep.yaml no longer has; `ddsweep prune {found.root}` shows them", "yellow")
        )
    if found.note:
        below.append(Text(found.note, "yellow"))
    return Group(*parts, *([Text(), *below] if below else []))


def driver_text(found: SweepStatus) -> str:
    """The driver at work and the time left; or that there is none, and what to do."""
    driver = found.driver
    if driver is None:
        rest = sum(found.counts[state] for state in AGAIN)
        if not rest and found.to_propose:
            return "no driver at work; `ddsweep run` proposes the next trials"
        if not rest:
            stopped = "; without `scheduler` the stopped ones go on" if found.counts["stopped"] else ""
            return (
                f"no driver at work; nothing is left to do{stopped}" if found.trials else "no driver at work"
            )
        return f"no driver at work; `ddsweep run` goes on with the other {rest}"
    job = f", Slurm job {driver['job']}" if driver.get("job") else ""
    text = (
        f"driver at work on {driver.get('host', 'a host unknown')}, pid {driver.get('pid', 'unknown')}{job}"
    )
    if found.eta_seconds is None:
        return text
    return f"{text}; all distilled in about {duration(found.eta_seconds)}"


def _listed(trials: Sequence[TrialStatus]) -> Sequence[TrialStatus]:
    """As many as a person reads, in their order; of too many, the active ones first."""
    if len(trials) <= MOST_LISTED:
        return trials
    settled = ("done", "stopped", "pending")
    order = sorted(range(len(trials)), key=lambda place: trials[place].state in settled)
    return [trials[place] for place in sorted(order[:MOST_LISTED])]


def _table(trials: Sequence[TrialStatus]) -> RenderableType:
    told: dict[str, list[str | Text]] = {
        trial.trial_id: [
            Text(trial.state, STYLES[trial.state]),
            _step(trial),
            NONE if trial.outer_loss is None else f"{trial.outer_loss:.4g}",
            NONE if trial.val_score is None else f"{percent(trial.val_score)} %",
            duration(trial.seconds),
        ]
        for trial in trials
    }
    names = varying([trial.settings for trial in trials if trial.settings])
    settings = {trial.trial_id: trial.settings for trial in trials}
    return trial_table(settings, names, ["outer step", "loss", "val. score", "time"], told)


def _step(trial: TrialStatus) -> str:
    return f"{trial.outer_step}/{trial.outer_steps}" if trial.outer_steps else str(trial.outer_step)
