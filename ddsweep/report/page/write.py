"""The page: sections, charts with their data, scripts, in one file that asks for nothing else."""

from __future__ import annotations

import html
import re
from datetime import UTC, datetime
from pathlib import Path

import ddsweep
from ddsweep.errors import UserError
from ddsweep.paths import make_folder
from ddsweep.report.page.gather import Gathered
from ddsweep.report.page.markup import Markup, inline_json, join, tag
from ddsweep.report.page.measures import Measured
from ddsweep.report.page.payload import payload
from ddsweep.report.page.scripts import bundle, page_file
from ddsweep.report.page.section import Chart, Section
from ddsweep.report.page.sections.answer import answer_section
from ddsweep.report.page.sections.cost import cost_section
from ddsweep.report.page.sections.ending import again_section, trouble_section
from ddsweep.report.page.sections.matrices import attacks_section, transfer_section
from ddsweep.report.page.sections.search import search_section
from ddsweep.report.page.sections.sets import pictures_section, rates_section
from ddsweep.report.page.sections.steps import curves_section, steps_section
from ddsweep.report.page.sections.trials import trials_section
from ddsweep.report.page.sections.worst import worst_section
from ddsweep.report.page.table import Table

__all__ = ["page", "sections_of", "sweeps_of_page", "write_page"]

_MOST_ROWS, _LONGEST = 60, 5000
"""A table with more rows than the first number is closed at first; it has no more than the second."""

_POLICY = "; ".join(
    [
        "default-src 'none'",
        "img-src data: blob:",
        "style-src 'unsafe-inline'",
        "script-src 'unsafe-inline' 'unsafe-eval'",
    ]
)
"""The page can load nothing and send nothing, with any content."""


def sections_of(gathered: Gathered, measured: Measured) -> list[Section]:
    """The sections that have content."""
    finals = measured.finals
    found = [
        answer_section(gathered),
        trials_section(gathered, finals),
        steps_section(gathered, measured.steps),
        curves_section(gathered),
        pictures_section(gathered),
        rates_section(gathered),
        worst_section(gathered, finals),
        transfer_section(gathered),
        attacks_section(gathered),
        cost_section(gathered, finals),
        search_section(gathered),
        trouble_section(gathered),
        again_section(gathered),
    ]
    return [section for section in found if section.parts]


def page(gathered: Gathered, renew: float | None = None) -> str:
    """The HTML. With ``renew`` it reloads itself every so many seconds."""
    measured = Measured.of(gathered)
    sections = sections_of(gathered, measured)
    title = f"{gathered.names}{_TITLE_END}"
    links = [tag("li", tag("a", section.title, href=f"#{section.name}")) for section in sections]
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, by ddsweep {ddsweep.__version__}"
    state = " The sweep is running." if gathered.running else ""
    body = join(
        tag("a", "To the answer", href="#answer", class_="skip"),
        tag(
            "header",
            tag("h1", gathered.names),
            tag("p", f"Made {made}.{state}", class_="note"),
            tag("nav", tag("ul", *links), aria_label="Sections"),
        ),
        tag("noscript", tag("p", "Without scripts there are no charts; all numbers are in the tables.")),
        _controls(renew),
        tag("main", *(_section(section) for section in sections)),
        tag(
            "footer",
            tag(
                "details",
                tag("summary", "Licences of the scripts"),
                tag("pre", page_file("licences.txt"), tabindex="0"),
            ),
        ),
        _ZOOM,
        tag("script", Markup(bundle()), type="module", id="vega"),
        tag(
            "script",
            inline_json(payload(gathered, measured, sections, renew)),
            type="application/json",
            id="data",
        ),
        tag("script", Markup(page_file("page.js")), type="module"),
    )
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(page_file("page.css"))),
    )
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


_ZOOM = tag(
    "dialog",
    tag("button", "Larger", type="button", id="larger"),
    " ",
    tag("button", "Smaller", type="button", id="smaller"),
    " ",
    tag("button", "Close", type="button", id="close"),
    tag("div", tag("img", alt=""), class_="scroll", tabindex="0"),
    id="zoom",
    aria_label="Distilled images, enlarged",
)


def _controls(renew: float | None) -> Markup:
    renewal = tag(
        "label",
        tag("input", type="checkbox", id="renew"),
        f" renew every {renew:g} s" if renew else "",
        class_="line",
    )
    return tag(
        "section",
        tag(
            "div",
            tag("label", "search", tag("input", type="search", id="words"), for_="words"),
            tag("button", "Reset filters", type="button", id="reset"),
            tag("button", "Dark", type="button", id="theme", aria_pressed="false"),
            *([renewal] if renew else []),
            tag("span", id="shown", role="status"),
        ),
        tag("details", tag("summary", "Filters"), tag("div", id="filters")),
        id="controls",
        aria_label="Filters",
    )


def _section(section: Section) -> Markup:
    inside = [_part(part) for part in section.parts]
    return tag("section", tag("h2", section.title), *inside, id=section.name)


def _part(part: Markup | Table | Chart) -> Markup:
    if isinstance(part, Table):
        if len(part.rows) <= _MOST_ROWS or part.name == "all-trials":
            return part.html()
        count, shown = f"{len(part.rows):,} rows", part.first(_LONGEST)
        if len(part.rows) > _LONGEST:
            count = f"the first {_LONGEST:,} of {count}; --figures writes them all"
        return tag("details", tag("summary", f"{part.caption} ({count})"), shown.html())
    if isinstance(part, Chart):
        return tag(
            "figure",
            tag("h3", part.title),
            tag("div", class_="tools"),
            tag("div", class_="plot", role="img", aria_label=f"Chart. {part.summary}"),
            tag(
                "p", "Nothing to draw: pick trials in the table of trials.", class_="empty note", hidden=True
            ),
            tag("p", class_="left note", hidden=True),
            tag("figcaption", part.caption),
            id=f"chart-{part.name}",
            class_="chart",
        )
    return part


_TITLE_END = " – ddsweep"


def sweeps_of_page(out: Path) -> str | None:
    """The names of the sweeps whose page is in the folder ``out``; None without a page. Raises `UserError`
    for a page that is no report: it is somebody's work, and a report would take its place."""
    path = out / "index.html"
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            start = file.read(10_000)
    except (FileNotFoundError, NotADirectoryError):  # the folder is made later, or told that it cannot be
        return None
    except OSError as error:
        raise UserError(f"--out: {path}: cannot be replaced: {error.strerror or error}") from error
    found = re.search(rf"<title>(.*?){_TITLE_END}</title>", start, re.S)
    if found is None:
        raise UserError(
            f"--out: {path} is not a report of ddsweep, and a report would replace it: give another folder"
        )
    return html.unescape(found[1])


def write_page(gathered: Gathered, out: Path, renew: float | None = None) -> Path:
    """Write ``index.html`` into the folder ``out``, which is made, and return its path."""
    from ddsweep.results.files import write_atomic, writing

    make_folder(out, "--out")
    path = out / "index.html"
    with writing(path):
        write_atomic(path, page(gathered, renew).encode(errors="replace"), out)
    return path
