"""``ddsweep best``: the answer of a sweep in a few lines for each kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ddsweep.catalog import PROTOCOLS, TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.errors import UserError
from ddsweep.report.answers import (
    PROTOCOL_TEXTS,
    TUNED_MEANING,
    Answer,
    TwoLevels,
    answers,
    rows_of,
    warnings_of,
)
from ddsweep.report.formats import percent, plain
from ddsweep.report.settings import KIND, NAMES, heading, lacks, settings_of_row, varying
from ddsweep.report.summary_table import BASELINE_NAMES
from ddsweep.results.reader import Results

__all__ = ["best_lines", "interval_text", "levels_text"]

_SPEAKING = ("init", "dataset", "network", "pool", "method", "init_law")
"""Settings whose values say what they are."""


def best_lines(
    results: Results, by: Sequence[str] | None = None, asked: Sequence[TrialSpec] = ()
) -> list[str]:
    """What `ddsweep best` prints. ``by`` are the settings that tell kinds apart, ``asked`` the trials of the
    sweep file.

    Raises `UserError` for an unknown setting, and if no trial is done.
    """
    unknown = [name for name in by or () if name not in NAMES]
    if by is not None and not by:
        raise UserError("--by: name a setting at least; `ddsweep settings` lists them")
    if unknown:
        raise UserError(f"--by: {', '.join(unknown)}: no such setting; `ddsweep settings` lists them")
    found = answers(results, by, asked)
    if not found:
        raise UserError("no trial is done and evaluated yet")
    names = [name for name in by or KIND if len({repr(answer.kind[name]) for answer in found}) > 1]
    what = f", for each {', '.join(map(heading, names))}" if names else ""
    lines = [f"The best by val_score (mean over seeds){what}; test accuracy in %"]
    varied = _varied(results)
    for answer in found:
        lines += ["", *_lines(answer, names, varied)]
    tuned = any(protocol.endswith("_tuned") for answer in found for _, protocol in answer.gains)
    lines += ["", f"{_MEANING} {TUNED_MEANING}" if tuned else _MEANING]
    return lines


_MEANING = (
    "± is the standard deviation over held-out networks, [ ] the 95 % interval of the mean: for other seeds, "
    "if there are several, and other networks, if they are unknown. Gains are paired: on the same networks."
)


def _varied(results: Results) -> list[str]:
    """The settings in which trials differ, but for seeds."""
    settings = [settings_of_row(row) for row in rows_of(results.trials)]
    return [name for name in varying(settings) if name != "seed"]


def _lines(answer: Answer, names: Sequence[str], varied: Sequence[str]) -> Iterator[str]:
    kind = ", ".join(_said(name, answer.kind[name]) for name in names) or "all trials"
    measure = "fooled: " if answer.measure == "attack_success" else ""
    yield f"{kind}: {measure}{levels_text(answer.test)}"
    if answer.others is not None:
        yield f"  accuracy on the other classes: {levels_text(answer.others)}"
    own = [
        _said(name, answer.settings.get(name))
        for name in varied
        if name not in answer.kind and not lacks(answer.settings, name)
    ]
    chosen = f"best of {answer.among} settings" if answer.among > 1 else "the only setting"
    score = "" if answer.val_score is None else f", validation {percent(answer.val_score)}"
    yield f"  {chosen}{score}{': ' if own else ''}{', '.join(own)}"
    for protocol, text in PROTOCOL_TEXTS.items():
        levels = {name: answer.gains.get((source, protocol)) for source, name in BASELINE_NAMES.items()}
        gains = [
            f"{percent(gain.mean, sign=True)} {interval_text(gain)} over {name}"
            for name, gain in levels.items()
            if gain is not None
        ]
        best = answer.tuned if protocol == f"{PROTOCOLS[0]}_tuned" else None
        if gains or best:
            yield f"  {text}: {', '.join([levels_text(best), *gains] if best else gains)}"
    yield f"  {'trials' if len(answer.trials) > 1 else 'trial'} {', '.join(answer.trials)}"
    if warnings := list(warnings_of(answer)):
        yield f"  mind: {'; '.join(warnings)}"


def _said(name: str, value: object) -> str:
    return plain(value) if name in _SPEAKING else f"{heading(name)} {plain(value)}"


def levels_text(levels: TwoLevels) -> str:
    """``81.0 ± 3.1 [± 2.7], 3 seeds x 64 networks``."""
    count = f"{counted(levels.seeds, 'seed')} x {counted(levels.networks, 'network')}"
    return f"{percent(levels.mean, levels.std_networks)} {interval_text(levels)}, {count}"


def interval_text(levels: TwoLevels) -> str:
    return "[no interval: n = 1]" if levels.ci95 is None else f"[± {percent(levels.ci95)}]"
