"""The summary of a sweep as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ddsweep.report.console import PLAIN_WIDTH, bare_table, width_of
from ddsweep.report.formats import NONE, duration, percent, plain
from ddsweep.report.settings import heading, telling
from ddsweep.report.summary import NEIGHBOUR, Accuracy, TrialSummary
from ddsweep.results.statistics import Difference

__all__ = ["BASELINE_NAMES", "gain_text", "summary_table"]

BASELINE_NAMES = {
    "random_real": "random real",
    "optimized_random": "optimised random",
    "class_mean": "class mean",
    "kmeans": "k-means",
    "knn_random": "k-NN random",
    "knn_kmeans": "k-NN k-means",
}

_SPREAD = "Test accuracy in %. ± is the standard deviation over held-out networks"
_DRAWS = " (of random real: over networks and draws of images)"
_OWN = "; `own`, the one known network of a fixed trial, has none"
_BEFORE = " Before: the same networks before training on the set."
_BASELINES = " Baselines: as many images and steps, at the best rate"
_TUNED = "; `tuned`: at the best rate and number of epochs of those tried"
_KNN = " k-NN: nearest neighbour in pixels, no network."
_REST = (
    " Gain: distilled - random real on the same networks, ± its 95 % confidence interval. Div: networks that "
    f"diverged; they count in the mean. {NONE}: not measured."
)
_STOPPED = " stopped N: by the scheduler, after N outer steps; never evaluated."

_FIRST_TO_GO = ("knn_random", "optimized_random", "class_mean", "kmeans", "knn_kmeans")
"""Baselines whose columns are left out first if there is no room."""

_SPEAKING = ("init", "dataset", "network", "init_law")
"""Settings whose values say what they are."""

_Cell = str | Text


def summary_table(summaries: Sequence[TrialSummary], width: int = PLAIN_WIDTH) -> RenderableType:
    """The summaries as a table that fits ``width`` columns, from 60 on (print it on `report_console`).

    A block for each trial: the distilled set on its own networks, and the tuned baselines below; for a
    ``fixed`` trial the same again on random networks. If a column for each setting does not fit, the settings
    stand above the block. If that is not enough, baselines are left out, and named.
    """
    if not summaries:
        return Text("No trial is done yet.", style="bold")
    present = {source for summary in summaries for of in summary.baselines.values() for source in of}
    sources = [source for source in BASELINE_NAMES if source in present]
    stopped = any(summary.stopped_at is not None for summary in summaries)
    end = _STOPPED if stopped else ""
    for gap in (2, 1):
        table = _table(summaries, sources, gap, settings=True)
        if width_of(table) <= width:
            return Group(table, Text(_caption(summaries, sources) + end, "dim"))
    shown = list(sources)
    for source in (*_FIRST_TO_GO, ""):
        table = _table(summaries, shown, 1, settings=False)
        if width_of(table) <= width or not source:
            break
        shown = [name for name in shown if name != source]
    if hidden := ", ".join(BASELINE_NAMES[source] for source in sources if source not in shown):
        end += f" Left out because the window is too narrow: {hidden}."
    return Group(_Blocks(table, summaries), Text(_caption(summaries, shown) + end, "dim"))


def _caption(summaries: Sequence[TrialSummary], sources: Sequence[str]) -> str:
    """What the columns mean that there are: those of ``sources``, and others that not every sweep has."""
    trained = [source for source in sources if not source.startswith("knn_")]
    tuned = {
        source
        for summary in summaries
        for protocol, of in summary.baselines.items()
        if protocol.endswith("_tuned")
        for source in of
    }
    text = _SPREAD + (_DRAWS if "random_real" in sources else "")
    text += (_OWN if any(summary.settings.get("init") == "fixed" for summary in summaries) else "") + "."
    text += _BEFORE if any(summary.pool for summary in summaries) else ""
    if trained:
        text += _BASELINES + (_TUNED if tuned.intersection(trained) else "") + "."
    return text + (_KNN if len(trained) < len(sources) else "") + _REST


def _table(summaries: Sequence[TrialSummary], sources: Sequence[str], gap: int, *, settings: bool) -> Table:
    """One line for each row, with or without columns for the settings of trials."""
    table = bare_table(gap=gap)
    names = list(summaries[0].settings) if settings else []
    if settings:
        table.add_column("trial", no_wrap=True)
    for name in names:
        table.add_column(heading(name).replace("/", "/\n"), overflow="fold")
    table.add_column("networks", no_wrap=True)
    trained = any(summary.pool for summary in summaries)
    for title in (
        *(["before"] if trained else []),
        "distilled",
        *(BASELINE_NAMES[source] for source in sources),
        "gain",
    ):
        table.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
    table.add_column("div", justify="right", no_wrap=True)
    if settings:
        table.add_column("time", justify="right", no_wrap=True)
    for summary in summaries:
        first = [summary.trial_id, *(plain(summary.settings[name]) for name in names)] if settings else []
        time = [duration(summary.wall_seconds)] if settings else []
        for line in _lines(summary, sources, tight=not settings, before=trained):
            table.add_row(*first, *line, *time)
            first, time = [""] * len(first), []
    return table


class _Blocks:
    """The lines of ``table``; those of each trial stand below its id, settings and time."""

    def __init__(self, table: Table, summaries: Sequence[TrialSummary]) -> None:
        self._table, self._summaries = table, summaries

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._table, options, pad=False)
        headings = len(lines) - len(self._table.rows)  # a row is one line: no cell wraps
        for line in lines[:headings]:
            yield from [*line, Segment.line()]
        told = telling([summary.settings for summary in self._summaries], list(self._summaries[0].settings))
        rest = iter(lines[headings:])
        for summary, names in zip(self._summaries, told, strict=True):
            values = [(name, plain(summary.settings[name])) for name in names]
            texts = [value if name in _SPEAKING else f"{heading(name)} {value}" for name, value in values]
            yield Text.assemble(
                (summary.trial_id, "bold"), " ", (", ".join([*texts, duration(summary.wall_seconds)]), "dim")
            )
            for line in islice(rest, _height(summary)):
                yield from [*line, Segment.line()]


def _height(summary: TrialSummary) -> int:
    """The lines of a trial."""
    return len(_lines(summary, [], tight=True, before=False))


def _lines(summary: TrialSummary, sources: Sequence[str], *, tight: bool, before: bool) -> list[list[_Cell]]:
    """From ``networks`` to ``div``: a line for each protocol, and one for what is tuned: baselines, and a set
    without learned rates; accuracy ``before`` beside the networks if they are trained ones."""
    if summary.stopped_at is not None:
        return [[f"stopped {summary.stopped_at}", *[NONE] * (len(sources) + 3 + before)]]
    fixed = summary.settings.get("init") == "fixed"
    neighbours = summary.baselines.get(NEIGHBOUR, {})
    lines: list[list[_Cell]] = []
    for protocol in ("as_distilled", "on_random"):
        distilled = summary.distilled(protocol)
        if distilled is None:
            continue
        own, tuned = (summary.baselines.get(f"{protocol}{end}", {}) for end in ("", "_tuned"))
        kind = "random" if summary.pool is None else "trained"
        where = "own" if fixed and protocol == "as_distilled" else f"{distilled.n} {kind}"
        first = summary.before if protocol == "as_distilled" else None
        # k-NN has no network, so only the first line of a trial has it.
        numbers = {**own, **neighbours} if not lines else own
        blank = [NONE if source not in neighbours else "" for source in sources]
        lines.append(
            [
                where,
                *([_spread(first, tight=tight)] if before else []),
                Text(_spread(distilled, tight=tight), "bold"),
                *(_spread(numbers.get(s), none, tight=tight) for s, none in zip(sources, blank, strict=True)),
                gain_text(summary.differences.get(protocol), tight=tight),
                str(distilled.n_diverged),
            ]
        )
        best = summary.tuned.get(protocol)
        if tuned or best:
            lines.append(
                [
                    " tuned",
                    *[""] * before,
                    Text(_spread(best, "", tight=tight), "bold"),
                    *(_spread(tuned.get(s), "", tight=tight) for s in sources),
                    gain_text(summary.differences.get(f"{protocol}_tuned"), tight=tight) if best else "",
                    str(best.n_diverged) if best else "",
                ]
            )
    return lines


def _spread(accuracy: Accuracy | None, absent: str = NONE, *, tight: bool) -> str:
    if accuracy is None:
        return absent
    text = percent(accuracy.mean, accuracy.std)
    return text.replace(" ", "") if tight else text


def gain_text(difference: Difference | None, *, tight: bool = False) -> Text:
    """A paired difference with its interval, coloured if the interval excludes zero."""
    if difference is None:
        return Text(NONE)
    text = percent(difference.mean, difference.ci95, sign=True)
    clear = difference.ci95 is not None and abs(difference.mean) > difference.ci95
    style = ("green" if difference.mean > 0 else "red") if clear else ""
    return Text(text.replace(" ", "") if tight else text, style)
