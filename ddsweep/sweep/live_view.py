"""A running sweep on the screen of a terminal. The picture follows the size of the window.

It draws on the terminal's other screen, as editors do. Each picture replaces the whole previous one, so
nothing of it remains in a smaller window. Afterwards the first screen is as it was.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

__all__ = ["Columns", "LiveView", "Picture", "Row", "draw"]

_GAP = 2
_WIDEST = 16
"""The width of a setting's column in characters."""

_MORE = "…"
_STYLES = {
    "running": "cyan",
    "evaluating": "cyan",
    "failed": "red",
    "drained": "yellow",
    "paused": "yellow",
    "stopped": "magenta",
    "done": "green",
}


@dataclass(frozen=True)
class Columns:
    """The settings in which trials differ: their short names, the most important first, and their values by
    trial."""

    headings: tuple[str, ...] = ()
    cells: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """The row of one trial."""

    trial_id: str
    state: str
    step: str = ""
    loss: str = ""
    score: str = ""


@dataclass(frozen=True)
class Picture:
    """The content of a picture: ``rows(n)`` are the ``n`` most interesting trials; ``counts`` are by
    state."""

    summary: str
    counts: Mapping[str, int]
    rows: Callable[[int], Sequence[Row]]
    columns: Columns
    messages: Sequence[str] = ()


def draw(picture: Picture, width: int, height: int) -> list[Text | Table]:
    """``picture`` in at most ``width`` x ``height`` characters: a line of counts, then trials, then messages.

    In a small window columns of settings are left out first, then lines of trials and messages; the counts
    stay.
    """
    head = _fitting([picture.summary], width, max(1, height // 3), "bold")
    room = height - _lines(head, width) - 2  # the headings, and a line on what is hidden
    notes = _fitting(picture.messages, width, room // 4, "dim")
    total = sum(picture.counts.values())
    rows = picture.rows(max(0, min(total, room - _lines(notes, width))))
    hidden = Counter(picture.counts) - Counter(row.state for row in rows)
    states = ", ".join(f"{count} {state}" for state, count in hidden.items())
    more = [Text(f"and {hidden.total()} more: {states}", no_wrap=True, overflow="ellipsis")] if hidden else []
    return [*head, _table(rows, picture.columns, width), *more, *notes]


def _fitting(texts: Sequence[str], width: int, most: int, style: str) -> list[Text]:
    """The last of ``texts`` that fit ``most`` lines; a text that is too long is cut."""
    found: list[Text] = []
    for text in reversed(texts):
        line = Text(text, style, overflow="fold")
        if _lines([line, *found], width) > most:
            cut = Text(_cut(text, most * width), style, overflow="fold")
            return found or ([cut] if most else [])
        found.insert(0, line)
    return found


def _lines(texts: Sequence[Text], width: int) -> int:
    console = Console(width=width, file=io.StringIO())
    return sum(len(text.wrap(console, width)) for text in texts)


def _table(rows: Sequence[Row], columns: Columns, width: int) -> Table:
    fixed = [("state", "left"), ("step", "right"), ("loss", "right"), ("val.", "right")]
    values = [(row.state, row.step, row.loss, row.score) for row in rows]
    wide = [max([len(title), *map(len, cells)]) for (title, _), cells in _columns(fixed, values)]
    own = max([len("trial"), *(len(row.trial_id) for row in rows)])
    free = width - own - sum(wide) - _GAP * len(wide)
    cells = [columns.cells.get(row.trial_id, ("",) * len(columns.headings)) for row in rows]
    kept, hidden = _settings(columns.headings, cells, free)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    table.add_column("trial", no_wrap=True)
    for place, size in kept:
        table.add_column(_cut(columns.headings[place], size), no_wrap=True)
    if hidden:
        table.add_column(_MORE, no_wrap=True)
    for title, justify in fixed:
        table.add_column(title, justify=cast("Any", justify), no_wrap=True)
    for row, mine, numbers in zip(rows, cells, values, strict=True):
        settings = [_cut(mine[place], size) for place, size in kept] + [""] * hidden
        table.add_row(row.trial_id, *settings, Text(numbers[0], _STYLES.get(row.state, "dim")), *numbers[1:])
    return table


def _columns(titles: Sequence[Any], rows: Sequence[Sequence[str]]) -> Iterator[tuple[Any, list[str]]]:
    for place, title in enumerate(titles):
        yield title, [row[place] for row in rows]


def _settings(
    headings: Sequence[str], cells: Sequence[Sequence[str]], free: int
) -> tuple[list[tuple[int, int]], bool]:
    """(place, width) of the settings that fit ``free`` characters, and whether some are left out. Settings
    that are the same in all these trials are left out first, then the last ones."""
    columns = [column for _, column in _columns(headings, cells)]
    sizes = [
        min(_WIDEST, max([min(len(title), 8), *map(len, column)]))
        for title, column in zip(headings, columns, strict=True)
    ]
    kept = list(range(len(headings)))
    while kept:
        hidden = len(kept) < len(headings)
        if sum(sizes[place] + _GAP for place in kept) + (1 + _GAP) * hidden <= free:
            return [(place, sizes[place]) for place in kept], hidden
        kept.remove(max(kept, key=lambda place: (len(set(columns[place])) < 2, place)))
    return [], False


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + _MORE


# ------------------------------------------------------------------------------------ on a terminal


class LiveView:
    """Draws what ``picture()`` gives twice a second, from `start` to `stop`.

    Meanwhile all output of the process goes to ``on_text``, line by line, because it would spoil the picture.
    """

    def __init__(
        self, console: Console, picture: Callable[[], Picture], on_text: Callable[[str], None]
    ) -> None:
        self._console, self._picture, self._on_text = console, picture, on_text
        self._live = Live(
            self,
            console=console,
            screen=True,
            refresh_per_second=2,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._streams: tuple[IO[str], IO[str]] | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Not the size in `options`: the window may have another one by now.
        yield from draw(self._picture(), *console.size)

    def start(self) -> None:
        if self._streams is None:
            self._streams = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = (cast("Any", _Lines(stream, self._on_text)) for stream in self._streams)
            self._live.start()

    def stop(self) -> None:
        if self._streams is not None:
            self._live.stop()
            for lines in (sys.stdout, sys.stderr):
                if isinstance(lines, _Lines):
                    lines.end()
            sys.stdout, sys.stderr = self._streams
            self._streams = None

    def __enter__(self) -> LiveView:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Lines(io.TextIOBase):
    """Replaces a stream and passes on whole lines. All other attributes are those of the stream."""

    def __init__(self, stream: IO[str], on_text: Callable[[str], None]) -> None:
        self._stream, self._on_text, self._begun = stream, on_text, ""

    @property
    def rich_proxied_file(self) -> IO[str]:
        """The stream on which rich draws."""
        return self._stream

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            if line.strip():
                self._on_text(line)
        return len(text)

    def end(self) -> None:
        self.write("\n")

    def flush(self) -> None:
        with suppress(ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(getattr(self._stream, "encoding", "utf-8"))
