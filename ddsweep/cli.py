"""The command line: its verbs, and how it ends. ``--help``, plan, status and show stay instant, so everything
is imported where it is used."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import ddsweep
from ddsweep.errors import EXIT_DRAINED, EXIT_INTERRUPTED, NOT_ON_WINDOWS, UserError
from ddsweep.paths import user_path
from ddsweep.processes import leave
from ddsweep.verbs.data import data_fetch, data_list
from ddsweep.verbs.launch import cancel, doctor, launch, logs
from ddsweep.verbs.plan import init, plan, show_settings
from ddsweep.verbs.pretrain import pretrain
from ddsweep.verbs.report import report
from ddsweep.verbs.results import best, collect, compare, prune, show, status
from ddsweep.verbs.run import evaluate, run
from ddsweep.verbs.sets import export, import_set
from ddsweep.verbs.track import track

__all__ = ["app", "main"]

app = typer.Typer(
    name="ddsweep",
    help="Sweeps of dataset distillation: one YAML file in, Parquet tables with error bars out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="List and fetch data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
_VERBS: dict[str, Callable[..., None]] = {
    "init": init,
    "plan": plan,
    "run": run,
    "eval": evaluate,
    "pretrain": pretrain,
    "launch": launch,
    "doctor": doctor,
    "cancel": cancel,
    "logs": logs,
    "status": status,
    "settings": show_settings,
    "show": show,
    "best": best,
    "compare": compare,
    "report": report,
    "track": track,
    "import": import_set,
    "export": export,
    "prune": prune,
    "collect": collect,
}
for _name, _verb in _VERBS.items():
    app.command(_name)(_verb)
data_app.command("list")(data_list)
data_app.command("fetch")(data_fetch)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"ddsweep {ddsweep.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 all done (or stopped by the scheduler), 1 bad input (a message, never
    a traceback), 2 some trials failed, 75 drained before the end, 130 interrupted twice."""
    leave(_exit_code(arguments))


def _exit_code(arguments: Sequence[str] | None) -> int:
    from typer.exceptions import Abort, TyperException

    if sys.platform == "win32":
        typer.echo(f"ddsweep: {NOT_ON_WINDOWS}", err=True)
        return 1
    from ddsweep.sweep.drain import Drained, Interrupted

    try:
        given = [_at_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]
        code = app(given, prog_name="ddsweep", standalone_mode=False)
    except UserError as error:
        typer.echo(f"ddsweep: {error}", err=True)
        return 1
    except TyperException as error:
        _print_usage_error(error)
        return 1
    except Drained as drained:
        typer.echo(f"ddsweep: {drained}", err=True)
        return EXIT_DRAINED
    except (Abort, KeyboardInterrupt, Interrupted):
        return EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            if not error.code:  # completions were printed
                return 0
            raise
        # ddsweep ... | head: rich turns the first into the second
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer goes nowhere
        return 0
    except Exception as error:
        from ddsweep.results.files import full_disk, refused

        told = full_disk(error, Path.cwd()) or refused(error)
        if told is None:
            raise
        typer.echo(f"ddsweep: {told}", err=True)
        return 1
    return code if isinstance(code, int) else 0


def _at_home(word: str) -> str:
    """``~/x`` and ``--option=~/x`` with the home folder in place of ``~``, as a shell does elsewhere."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{user_path(value)}" if value.startswith("~") else word


def _print_usage_error(error: Any) -> None:
    text = error.format_message()
    if not text:  # no command at all: the help was printed
        return
    context = getattr(error, "ctx", None)
    where = f"{context.command_path}: " if context is not None else "ddsweep: "
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    typer.echo(f"{where}{text}{hint}", err=True)
