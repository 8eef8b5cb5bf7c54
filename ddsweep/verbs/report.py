"""The verb ``report``: a page, or figures and tables for papers, of one sweep or several."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ddsweep.errors import UnreadableError
from ddsweep.verbs.arguments import DataRoot, Watch
from ddsweep.verbs.inputs import data_folder

__all__ = ["report"]


def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Results of one sweep, or of several.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")] = Path("report"),
    figures: Annotated[
        bool,
        typer.Option("--figures", help="Also figures (PDF, SVG, PNG) and tables (LaTeX, Markdown, CSV)."),
    ] = False,
    watch: Watch = None,
    data_root: DataRoot = None,
) -> None:
    """Write one page with the answer, charts, pictures and all tables, also while the sweep runs."""
    from ddsweep.data.files import resolve_dataset
    from ddsweep.report.page.scripts import require_charts

    require_charts()
    from ddsweep.report.page.gather import gather
    from ddsweep.report.page.write import sweeps_of_page, write_page

    root = data_folder(data_root)
    sweeps_of_page(out)
    while True:
        try:
            gathered = gather(directories, lambda value: resolve_dataset(value, root))
        except UnreadableError as error:
            if watch is None:
                raise
            typer.echo(f"ddsweep: {error}", err=True)  # it may pass
            time.sleep(watch)
            continue
        goes_on = watch is not None and gathered.running
        before = sweeps_of_page(out)
        path = write_page(gathered, out, watch if goes_on else None)
        replaced = "" if before in (None, gathered.names) else f"; it replaces the page of {before} (--out)"
        typer.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB{replaced}")
        if not goes_on or watch is None:
            break
        time.sleep(watch)
    if figures:
        from ddsweep.report.page.figures import write_figures
        from ddsweep.results.files import writing

        with writing(out):
            for line in write_figures(gathered, out):
                typer.echo(line)
