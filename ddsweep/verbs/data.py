"""The verbs of data sets: `data list` and `data fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddsweep import completions
from ddsweep.verbs.arguments import DataRoot, find
from ddsweep.verbs.inputs import aside, data_folder

__all__ = ["data_fetch", "data_list"]


def data_list(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="A sweep file: look at the data sets that it names.",
            callback=find("sweep file"),
        ),
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """List the data sets of the catalog and your own in the data root, and which of them are here."""
    from ddsweep.data.files import list_datasets
    from ddsweep.data.own import list_own, list_values
    from ddsweep.report.console import report_console
    from ddsweep.report.data import dataset_table
    from ddsweep.spec import load_sweep

    root = data_folder(data_root)
    if file is None:
        rows = [*list_datasets(root), *list_own(root, aside)]
    else:
        rows = list_values(load_sweep(file).datasets(), root, aside)
    console = report_console()
    console.print(dataset_table(rows))
    for row in rows:
        for remark in row.remarks:
            console.print(f"{row.name}: {remark}", soft_wrap=True)


def data_fetch(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A data set of the catalog, or alexnet-imagenet.",
            autocompletion=completions.data_sets,
        ),
    ],
    data_root: DataRoot = None,
) -> None:
    """Download a data set, or the weights of AlexNet, into the data root: the only command that downloads."""
    from ddsweep.data.fetch import fetch

    typer.echo(f"{name}: {fetch(name, data_folder(data_root))}")
