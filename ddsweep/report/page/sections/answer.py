"""The answer: which setting is best, and what it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddsweep.catalog.numbers import counted
from ddsweep.report.answers import PROTOCOL_TEXTS, TUNED_MEANING, Answer, TwoLevels, warnings_of
from ddsweep.report.formats import percent, plain
from ddsweep.report.page.gather import Gathered, Sweep
from ddsweep.report.page.markup import Markup, tag
from ddsweep.report.page.section import Section
from ddsweep.report.page.table import Column, Table
from ddsweep.report.settings import KIND, heading, lacks, values_told
from ddsweep.report.summary_table import BASELINE_NAMES
from ddsweep.spec import PublishedSpec

__all__ = ["answer_section", "kind_text"]

_MOST_CARDS = 12

_MEANING = (
    "The setting with the best score on validation, by its mean over seeds; test chose nothing. The number, "
    "in % of test images, is a mean over seeds of means over held-out networks; ± is the standard deviation "
    "over networks. The 95 % interval of the mean (Student's t) is for other seeds, if there are several, "
    "and for other networks, if they are unknown. Seeds and networks are two levels, and are never pooled "
    "as one."
)
_LEVELS = (
    Column("test_mean", "test", "percent"),
    Column("std_networks", "± over networks", "percent"),
    Column("std_seeds", "± over seeds", "percent"),
    Column("ci95_low", "95 % from", "percent"),
    Column("ci95_high", "to", "percent"),
    Column("networks", "networks", "count"),
    Column("seeds", "seeds", "count"),
)


def answer_section(gathered: Gathered) -> Section:
    pairs = [(sweep, answer) for sweep in gathered.sweeps for answer in sweep.answers]
    if not pairs:
        text = "No trial is done and evaluated yet: there is no answer so far."
        return Section("answer", "The answer", [tag("p", text)])
    names = _telling([answer for _, answer in pairs])
    parts: list[Markup | Table] = [tag("p", _question(gathered))]
    cards = [_card(gathered, sweep, answer, names) for sweep, answer in pairs[:_MOST_CARDS]]
    parts.append(tag("div", *cards, class_="cards"))
    if len(pairs) > _MOST_CARDS:
        parts.append(tag("p", f"and {len(pairs) - _MOST_CARDS} more kinds in the table."))
    tuned = any(protocol.endswith("_tuned") for _, answer in pairs for _, protocol in answer.gains)
    parts.append(tag("p", f"{_MEANING} {TUNED_MEANING}" if tuned else _MEANING, class_="note"))
    parts.append(_best_table(gathered, pairs, names))
    if gains := _gain_table(gathered, pairs, names):
        parts.append(gains)
    return Section("answer", "The answer", parts)


def kind_text(gathered: Gathered, sweep: Sweep, answer: Answer, names: Sequence[str]) -> str:
    """The question of the answer, in a few words."""
    said = [sweep.name] if len(gathered.sweeps) > 1 else []
    return ", ".join([*said, *values_told(answer.kind, names)]) or "all trials"


def _telling(found: Sequence[Answer]) -> list[str]:
    """The settings in which kinds differ; of a single kind, those that people ask for first."""
    names = [name for name in KIND if len({repr(answer.kind[name]) for answer in found}) > 1]
    return names or ["dataset", "network", "init", "images_per_class"]


def _question(gathered: Gathered) -> str:
    names = ", ".join(sweep.name for sweep in gathered.sweeps)
    counts: dict[str, int] = {}
    for trial in gathered.trials:
        counts[trial.state] = counts.get(trial.state, 0) + 1
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    varied = ", ".join(map(heading, gathered.varied))
    asked = f" What varies: {varied}." if varied else ""
    return f"{names}: {counted(len(gathered.trials), 'trial')}, {states}.{asked}"


def _card(gathered: Gathered, sweep: Sweep, answer: Answer, names: Sequence[str]) -> Markup:
    test = answer.test
    own = [
        f"{heading(name)} {plain(answer.settings.get(name))}"
        for name in gathered.settings
        if name not in answer.kind and not lacks(answer.settings, name)
    ]
    chosen = f"the best of {counted(answer.among, 'setting')}" if answer.among > 1 else "the only setting"
    measure = (
        "of the attacked class is called the target" if answer.measure == "attack_success" else "on test"
    )
    count = f"{counted(test.seeds, 'seed')} x {counted(test.networks, 'network')}"
    lines = [
        tag("h3", kind_text(gathered, sweep, answer, names)),
        tag("p", tag("strong", f"{percent(test.mean, test.std_networks)} %"), f" {measure}", class_="big"),
        tag("p", f"{_interval(test)}; {count}"),
        *_others(answer),
        tag("p", f"{chosen}{': ' if own else ''}{', '.join(own)}"),
    ]
    if answer.tuned is not None:
        number = f"{percent(answer.tuned.mean, answer.tuned.std_networks)} %"
        lines.append(tag("p", f"{number} at its best rate and number of steps, {_interval(answer.tuned)}"))
    for published in _published(sweep, answer):
        number = f"{percent(published.value, published.std)} %"
        moved = percent(test.mean - published.value, sign=True)
        lines.append(tag("p", f"{published.source}: {number}; here {moved}", class_="published"))
    gain = answer.gains.get(("random_real", "as_distilled"))
    if gain is not None:
        text = f"{percent(gain.mean, sign=True)} over random real images on the same networks"
        lines.append(tag("p", f"{text}, {_interval(gain, sign=True)}"))
    if answer.gains:
        (source, protocol), least = min(answer.gains.items(), key=lambda item: item[1].mean)
        over = f"{BASELINE_NAMES[source]} {PROTOCOL_TEXTS[protocol]}"
        text = f"{percent(least.mean, sign=True)} over {over}, the least over a baseline"
        lines.append(tag("p", f"{text}, {_interval(least, sign=True)}"))
    said = [tag("li", warning) for warning in warnings_of(answer)]
    if said:
        lines.append(tag("ul", *said, class_="mind", aria_label="Mind"))
    return tag("article", *lines, class_="card")


def _others(answer: Answer) -> list[Markup]:
    """A line on what an attack leaves of the other classes."""
    if answer.others is None:
        return []
    number = f"{percent(answer.others.mean, answer.others.std_networks)} %"
    return [tag("p", f"{number} on the other classes, {_interval(answer.others)}")]


def _interval(levels: TwoLevels, *, sign: bool = False) -> str:
    if levels.ci95 is None:
        return "no interval: n = 1"
    low, high = (percent(levels.mean + side * levels.ci95, sign=sign) for side in (-1, 1))
    return f"95 % interval {low} to {high}"


def _published(sweep: Sweep, answer: Answer) -> list[PublishedSpec]:
    return [
        published
        for published in sweep.published
        if published.measure == answer.measure and published.applies(answer.settings)
    ]


def _levels(levels: TwoLevels) -> list[Any]:
    low, high = (
        (None, None) if levels.ci95 is None else (levels.mean - levels.ci95, levels.mean + levels.ci95)
    )
    return [levels.mean, levels.std_networks, levels.std_seeds, low, high, levels.networks, levels.seeds]


def _best_table(gathered: Gathered, pairs: Sequence[tuple[Sweep, Answer]], names: Sequence[str]) -> Table:
    own = [name for name in gathered.settings if name not in names]
    columns = [
        Column("kind", "kind"),
        *(Column(name, heading(name), "count" if _numeric(pairs, name) else "text") for name in own),
        Column("val_score", "validation", "percent"),
        Column("among", "best of", "count"),
        *_LEVELS,
        Column("n_diverged", "diverged", "count"),
        Column("published", "published", "percent"),
        Column("published_std", "± published", "percent"),
        Column("published_source", "where"),
        Column("trials", "trials", "words"),
    ]
    rows = []
    for sweep, answer in pairs:
        published = next(iter(_published(sweep, answer)), None)
        rows.append(
            [
                kind_text(gathered, sweep, answer, names),
                *(answer.settings.get(name) for name in own),
                answer.val_score,
                answer.among,
                *_levels(answer.test),
                answer.n_diverged,
                *((published.value, published.std, published.source) if published else (None, None, None)),
                ", ".join(answer.trials),
            ]
        )
    caption = "The best setting of each kind, chosen on validation, in % of test images"
    return Table("best", caption, columns, rows).without_empty()


def _numeric(pairs: Sequence[tuple[Sweep, Answer]], name: str) -> bool:
    values = [answer.settings.get(name) for _, answer in pairs]
    return all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values
    )


def _gain_table(
    gathered: Gathered, pairs: Sequence[tuple[Sweep, Answer]], names: Sequence[str]
) -> Table | None:
    rows = [
        [
            kind_text(gathered, sweep, answer, names),
            BASELINE_NAMES[source],
            PROTOCOL_TEXTS[protocol],
            *_levels(gain),
        ]
        for sweep, answer in pairs
        for protocol in PROTOCOL_TEXTS
        for source in BASELINE_NAMES
        if (gain := answer.gains.get((source, protocol)))
    ]
    if not rows:
        return None
    columns = [
        Column("kind", "kind"),
        Column("baseline", "over"),
        Column("protocol", "how it is applied"),
        Column("gain_mean", "gain", "gain"),
        *(
            Column(c.name, c.title, "gain" if "from" in c.title or c.title == "to" else c.kind)
            for c in _LEVELS[1:]
        ),
    ]
    caption = "The best setting of each kind minus every baseline, network by network, in percentage points"
    return Table("gains", caption, columns, rows).without_empty()
