"""Read sweeps for a report: their tables, the state of trials without a row, and what was left out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ddsweep.catalog import TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.errors import UserError
from ddsweep.report.answers import Answer, answers, rows_of
from ddsweep.report.formats import plain
from ddsweep.report.page.networks import Networks
from ddsweep.report.settings import NAMES, heading, settings_of, settings_of_row, telling, varying
from ddsweep.report.status import StateReader
from ddsweep.report.sweep_file import Resolve, asked_of, from_catalog
from ddsweep.results.files import unreadable_error
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.lock import live_holder
from ddsweep.results.reader import Results, load_results, only_in_sweep
from ddsweep.results.schemas import SORT_KEYS
from ddsweep.spec import PublishedSpec, load_sweep

__all__ = ["Gathered", "Sweep", "Trial", "gather"]

_EVALS_KEY = [name for name in SORT_KEYS["evals"] if name != "split"]


@dataclass(frozen=True)
class Trial:
    """A trial of a sweep. ``row`` is its row of ``trials``. Without one it is empty, and ``state`` says how
    far the trial is (a state of ``ddsweep status``). ``label`` tells it from the others."""

    number: int
    sweep: str
    directory: SweepDirectory
    trial_id: str
    state: str
    settings: dict[str, Any]
    row: dict[str, Any]
    label: str = ""
    message: str | None = None

    @property
    def measure(self) -> str:
        """The measure that is shown: ``accuracy``, or ``attack_success`` for an attack."""
        return "attack_success" if self.settings.get("objective") == "attack" else "accuracy"


@dataclass(frozen=True)
class Sweep:
    """One folder of results. ``notes`` say what was left out, and why; ``text`` is its sweep file."""

    name: str
    directory: SweepDirectory
    results: Results
    answers: list[Answer]
    published: tuple[PublishedSpec, ...]
    driver: dict[str, Any] | None
    notes: list[str]
    text: str


@dataclass(frozen=True)
class Gathered:
    """All sweeps of a report. ``trials[i].number`` is i; ``axes`` are the settings that tell them apart."""

    sweeps: list[Sweep]
    trials: list[Trial]
    axes: list[str]
    networks: Networks
    history: pd.DataFrame
    by_id: dict[tuple[str, str], int] = field(repr=False)

    @property
    def names(self) -> str:
        """The names of all sweeps, as the title of a page has them."""
        return ", ".join(sweep.name for sweep in self.sweeps)

    @property
    def best(self) -> list[Trial]:
        """The trials of all answers: one of each, then the second of each, and so on."""
        ids = [
            (place, (sweep.name, trial_id))
            for sweep in self.sweeps
            for own in sweep.answers
            for place, trial_id in enumerate(own.trials)
        ]
        return [self.trials[self.by_id[key]] for _, key in sorted(ids, key=lambda item: item[0])]

    @property
    def settings(self) -> list[str]:
        """The axes that are settings, but for seeds."""
        return [axis for axis in self.axes if axis not in ("sweep", "seed")]

    @property
    def running(self) -> bool:
        return any(sweep.driver for sweep in self.sweeps)

    @property
    def varied(self) -> list[str]:
        """The settings in which trials differ, but for seeds."""
        return [
            name
            for name in self.settings
            if len({repr(self.value(trial, name)) for trial in self.trials}) > 1
        ]

    @property
    def measure_words(self) -> str:
        """What the numbers of the trials are, on test images: accuracy, or of attacks the fraction fooled."""
        attacks = {trial.measure == "attack_success" for trial in self.trials}
        if attacks == {True}:
            return "fooled"
        return "test accuracy (of attacks: fooled)" if True in attacks else "test accuracy"

    @property
    def measure_heading(self) -> str:
        """The same in a heading: a word."""
        return "Fooled" if self.measure_words == "fooled" else "Accuracy"

    @property
    def measure_title(self) -> str:
        """The title of axis y."""
        return f"{self.measure_words}, %"

    def value(self, trial: Trial, axis: str) -> Any:
        return trial.sweep if axis == "sweep" else trial.settings.get(axis)


def gather(folders: Sequence[Path], resolve: Resolve = from_catalog) -> Gathered:
    """The sweeps in ``folders``. ``resolve`` finds the data sets of their files, whose content may enter ids.

    Raises `ResultsError` for a folder that holds no sweep, `UserError` for one that is given twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("the same folder of results is given twice")
    names = _names(folders)
    sweeps, trials = [], []
    for name, folder in zip(names, folders, strict=True):
        sweep, asked = _read(name, SweepDirectory(folder), resolve)
        sweeps.append(sweep)
        trials += _trials(sweep, asked)
    settings = [trial.settings for trial in trials]
    axes = ["sweep"] if len(sweeps) > 1 else []
    axes += varying(settings) if settings else []
    axes = axes or ["images_per_class"]
    told = telling(settings, axes) if settings else []
    found = [
        replace(trial, number=number, label=_label(trial, own, len(sweeps) > 1))
        for number, (trial, own) in enumerate(zip(trials, told, strict=True))
    ]
    by_id = {(trial.sweep, trial.trial_id): trial.number for trial in found}
    frames = [(sweep.name, sweep.results) for sweep in sweeps]
    return Gathered(
        sweeps=sweeps,
        trials=found,
        axes=axes,
        networks=Networks.of([(name, results.evals) for name, results in frames], by_id),
        history=_together([(name, results.history) for name, results in frames], by_id),
        by_id=by_id,
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many of the folders above as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    most = max(map(len, parts))
    found = (["/".join(own[-depth:]) for own in parts] for depth in range(1, most + 1))
    return next(names for names in found if len(set(names)) == len(names))


def _label(trial: Trial, told: Sequence[str], several: bool) -> str:
    said = [f"{heading(name)} {plain(trial.settings.get(name))}" for name in told if name != "sweep"]
    return ", ".join([f"{trial.sweep}/{trial.trial_id}" if several else trial.trial_id, *said])


def _together(frames: Sequence[tuple[str, pd.DataFrame]], by_id: dict[tuple[str, str], int]) -> pd.DataFrame:
    """The rows of all sweeps, ``trial`` being the number of theirs."""
    found = []
    for name, frame in frames:
        ids = {trial_id: number for (sweep, trial_id), number in by_id.items() if sweep == name}
        found.append(frame.assign(trial=frame["trial_id"].map(ids)))
    whole = pd.concat(found, ignore_index=True)
    whole = whole[whole["trial"].notna()]
    return whole.assign(trial=whole["trial"].astype(int))


# ---------------------------------------------------------------------------------------- one sweep

_MORE = "`ddsweep status` says more"
"""Folders of this machine, for example. The page may be on a web server."""


def _read(name: str, directory: SweepDirectory, resolve: Resolve) -> tuple[Sweep, tuple[TrialSpec, ...]]:
    # Before anything else: a driver that ends while the tables are read is worth one more page.
    driver = live_holder(directory.lock)
    notes: list[str] = []
    asked, text = None, ""
    published: tuple[PublishedSpec, ...] = ()
    if directory.sweep_file.is_file():
        try:
            text = directory.sweep_file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise unreadable_error(error, directory.sweep_file) from error
        try:
            spec = load_sweep(directory.sweep_file)
            published = spec.published
            asked = asked_of(directory, resolve)
        except UserError:
            notes.append(f"sweep.yaml cannot be read, so trials without files are not known; {_MORE}")
    if asked is not None and asked.note:
        notes.append(f"{asked.note.partition(':')[0]}; {_MORE}")
    if asked is not None and asked.to_propose:
        notes.append(f"up to {counted(asked.to_propose, 'more trial')} to be proposed by the search")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        everything = load_results(directory.root, all_trials=True)
    results = only_in_sweep(directory, everything)
    for path in results.torn:
        notes.append(
            f"{path.relative_to(directory.root)} is torn and left out; running the sweep again redoes it"
        )
    if left := len(everything.trials) - len(results.trials):
        notes.append(f"{counted(left, 'trial')} that the sweep file no longer has: left out")
    results = _once(results, notes)
    trials = asked.trials if asked and asked.trials else ()
    sweep = Sweep(
        name=name,
        directory=directory,
        results=results,
        answers=answers(results, asked=trials),
        published=published,
        driver=driver,
        notes=notes,
        text=text,
    )
    return sweep, trials


def _once(results: Results, notes: list[str]) -> Results:
    """``results`` with every row once: a copied part must not count twice."""
    keys = {"trials": ["trial_id"], "history": ["trial_id", "outer_step"], "failures": ["trial_id"]}
    frames = {"evals": results.evals, **{name: getattr(results, name) for name in keys}}
    for name, frame in frames.items():
        key = keys.get(name) or [column for column in _EVALS_KEY if not frame[column].isna().all()]
        if frame.empty:
            continue
        doubled = frame.duplicated(key, keep="last")
        if doubled.any():
            count = counted(int(doubled.sum()), "row")
            notes.append(f"{count} of {name} are there twice; each counts once")
            frames[name] = frame[~doubled].reset_index(drop=True)
    return replace(results, **frames)


def _trials(sweep: Sweep, asked: Sequence[TrialSpec]) -> list[Trial]:
    """The trials with a row, then those without, each in the order of the sweep."""
    found = []
    place = {spec.trial_id: number for number, spec in enumerate(asked)}
    rows = rows_of(sweep.results.trials)
    for row in sorted(rows, key=lambda row: place.get(row["trial_id"], len(place))):
        found.append(
            Trial(
                number=0,
                sweep=sweep.name,
                directory=sweep.directory,
                trial_id=row["trial_id"],
                state=row["status"] or "done",
                settings={name: value for name, value in settings_of_row(row).items() if name in NAMES},
                row=dict(row),
            )
        )
    ended = {trial.trial_id for trial in found}
    failures = {row["trial_id"]: row for row in rows_of(sweep.results.failures)}
    specs: dict[str, TrialSpec | None] = {spec.trial_id: spec for spec in asked}
    if not asked:
        specs = dict.fromkeys(dict.fromkeys([*sweep.directory.seen_trials(), *failures]))
    reader = StateReader(sweep.directory, None, sweep.driver)
    for trial_id, spec in specs.items():
        if trial_id in ended:
            continue
        state = reader.status(trial_id, spec).state
        failure, message = failures.get(trial_id), None
        if failure and state in ("failed", "pending"):
            words = [
                failure["error_class"],
                failure["message"],
                failure["place"] and f"in {failure['place']}",
            ]
            state, message = "failed", ": ".join(word for word in words if word)
        settings = settings_of(spec) if spec else {}
        found.append(Trial(0, sweep.name, sweep.directory, trial_id, state, settings, {}, message=message))
    return found
