"""The summary of a sweep as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ddsweep.report.console import PLAIN_WIDTH
from ddsweep.report.formats import NONE, duration, percent, plain
from ddsweep.report.settings import heading, telling
from ddsweep.report.summary import NEIGHBOUR, Accuracy, TrialSummary, networks_note
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

_CAPTION = (
    "Test accuracy in %. ± is the standard deviation over held-out networks (of random real: over networks "
    "and draws of images); `own`, the one known network of a fixed trial, has none. Before: the same "
    "networks before training on the set. Baselines: as many images and steps, at the best rate; `tuned`: at "
    "the best rate and number of epochs. k-NN: nearest neighbour in pixels, no network. Gain: distilled - "
    "random real on the same networks, ± its 95 % confidence interval. Div: networks that diverged; they "
    f"count in the mean. {NONE}: not measured."
)
_STOPPED = " stopped N: by the scheduler, after N outer steps; never evaluated."

_Cell = str | Text
_STACK_WIDTH = 22
_SPEAKING = ("init", "dataset", "network", "init_law")
"""Settings whose values say what they are."""


def summary_table(summaries: Sequence[TrialSummary], width: int = PLAIN_WIDTH) -> Table:
    """The summaries as a table that fits ``width`` columns, from 100 on (print it on `report_console`).

    A block per trial: the distilled set on its own networks, beneath it the tuned baselines; for a
    ``fixed`` trial the same again on random networks. Where a column for each setting would not fit, the
    settings are stacked under the id.
    """
    if not summaries:
        # rich leaves out the caption of a table without columns
        return Table("No trial is done yet.", box=None, pad_edge=False)
    present = {source for summary in summaries for of in summary.baselines.values() for source in of}
    sources = [source for source in BASELINE_NAMES if source in present]
    endless = Console(width=10_000)
    for gap, stacked in ((2, False), (1, False), (1, True)):
        table = _table(summaries, sources, gap, stacked=stacked)
        if Measurement.get(endless, endless.options, table).maximum <= width:
            break
    stopped = any(summary.stopped_at is not None for summary in summaries)
    note = networks_note(summary.heldout for summary in summaries)
    table.caption = (f"{note}\n" if note else "") + _CAPTION + (_STOPPED if stopped else "")
    return table


def _table(summaries: Sequence[TrialSummary], sources: Sequence[str], gap: int, *, stacked: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    table.caption_justify, table.caption_style = "left", "dim"
    names = list(summaries[0].settings)
    table.add_column("trial", overflow="fold", max_width=_STACK_WIDTH + 1, no_wrap=not stacked)
    for name in [] if stacked else names:
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
    if not stacked:
        table.add_column("time", justify="right", no_wrap=True)
    told = telling([summary.settings for summary in summaries], names)
    for position, (summary, own) in enumerate(zip(summaries, told, strict=True)):
        if stacked and position:
            table.add_row()
        lines = _lines(summary, sources, tight=stacked, before=trained)
        values = [(name, plain(summary.settings[name])) for name in (own if stacked else names)]
        left: list[list[_Cell]] = [[summary.trial_id, *([] if stacked else [v for _, v in values])]]
        right = [duration(summary.wall_seconds)]
        if stacked:
            texts = [value if name in _SPEAKING else f"{heading(name)} {value}" for name, value in values]
            left += [[Text(text, "dim")] for text in _packed([*texts, *right])]
        for number in range(max(len(left), len(lines)) if stacked else len(lines)):
            start = left[number] if number < len(left) else [""] * len(left[0])
            end = right if number == 0 and not stacked else []
            table.add_row(*start, *(lines[number] if number < len(lines) else []), *end)
    return table


def _packed(items: Sequence[str]) -> list[str]:
    """``items`` with commas between them, on as few lines as their length allows."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 2 <= _STACK_WIDTH:
            lines[-1] += f", {item}"
        else:
            lines.append(item)
    return lines


def _lines(summary: TrialSummary, sources: Sequence[str], *, tight: bool, before: bool) -> list[list[_Cell]]:
    """From ``networks`` to ``div``: a line for each protocol, and one for its tuned baselines; accuracy
    ``before`` beside the networks where there are trained ones."""
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
        # k-NN has no network, so it stands in the first line of a trial only.
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
        if tuned:
            lines.append(
                [
                    " tuned",
                    *[""] * (1 + before),
                    *(_spread(tuned.get(s), "", tight=tight) for s in sources),
                    "",
                    "",
                ]
            )
    return lines


def _spread(accuracy: Accuracy | None, absent: str = NONE, *, tight: bool) -> str:
    if accuracy is None:
        return absent
    text = percent(accuracy.mean, accuracy.std)
    return text.replace(" ", "") if tight else text


def gain_text(difference: Difference | None, *, tight: bool = False) -> Text:
    """A paired difference with its interval; coloured if the interval does not reach zero."""
    if difference is None:
        return Text(NONE)
    text = percent(difference.mean, difference.ci95, sign=True)
    clear = difference.ci95 is not None and abs(difference.mean) > difference.ci95
    style = ("green" if difference.mean > 0 else "red") if clear else ""
    return Text(text.replace(" ", "") if tight else text, style)
