"""Calls a user's own data function, here or in a separate process."""

from __future__ import annotations

import hashlib
import inspect
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from ddsweep.catalog import CodeRef, DatasetSpec, Survey, parse_code
from ddsweep.data.arrays import arrays_digest, checked_arrays
from ddsweep.data.decode import Look
from ddsweep.data.labels import ROLES, Labelled, too_small
from ddsweep.data.sources import Raw
from ddsweep.data.survey import summed_up
from ddsweep.data.survey_cache import as_text, from_text
from ddsweep.data.tally import Tally
from ddsweep.errors import DataError, UserError
from ddsweep.interpreter import python_module
from ddsweep.own_code import copied_source, load_code, place_and_error, version_of

__all__ = ["called", "look_in_own_process"]


def called(ref: CodeRef, folder: Path, root: Path | None) -> Raw:
    """The result of the function, called in this process with its options, and with ``data_root`` if it has
    an argument of that name and no such option.

    Its source is the one that this process has read, or the copy in ``folder``. Raises `DataError` for
    options that it does not take, for an exception, with its line, and for a result that is not a data set
    (`checked_arrays`).
    """
    where = f"dataset {ref}"
    with tempfile.TemporaryDirectory(prefix="ddsweep-code-") as temporary:
        if ref.is_file:
            copied_source(ref, folder, Path(temporary))
        try:
            function = load_code(ref, Path(temporary))
        except UserError as error:
            raise DataError(f"dataset {error}") from error
        if not callable(function):
            raise DataError(f"{where}: {ref.name} is {type(function).__name__}, not a function")
        options = ref.arguments
        try:
            signature = inspect.signature(function)
            if "data_root" in signature.parameters:
                options.setdefault("data_root", root)
            signature.bind(**options)
        except ValueError:  # some functions written in C have no signature
            pass
        except TypeError as error:
            raise DataError(f"{where}: {ref.name}{signature}: {error}") from None
        try:
            given = function(**options)
        except (Exception, SystemExit) as error:
            raise DataError(f"{where}: {place_and_error(error, ref)}") from error
    return checked_arrays(given, where)


def look_in_own_process(ref: CodeRef, folder: Path, root: Path | None) -> Survey:
    """The result of the function, called in a separate process. Raises as `called` does, and `DataError` for
    a process that dies and for unfit data."""
    with tempfile.TemporaryDirectory(prefix="ddsweep-data-") as temporary:
        if ref.is_file:
            copied_source(ref, folder, Path(temporary))
        out = Path(temporary) / "found.json"
        asked = [str(ref), temporary, None if root is None else str(root), str(out)]
        done = subprocess.run(
            python_module(__name__), input=json.dumps(asked), capture_output=True, text=True, check=False
        )
        if not out.is_file():
            lines = (done.stderr or done.stdout).strip().splitlines()
            said = lines[-1] if lines else f"code {done.returncode}"
            raise DataError(f"dataset {ref}: the process that ran it ended: {said}")
        found = json.loads(out.read_text("utf-8"))
    if "error" in found:
        raise DataError(found["error"])
    return from_text(found["survey"])


def _look(ref: CodeRef, folder: Path, root: Path | None) -> Survey:
    raw, tally = called(ref, folder, root), Tally()
    classes = {role: part.labels.tolist() for role, part in zip(ROLES, raw[:2], strict=True)}
    for role, part in zip(ROLES, raw[:2], strict=True):
        for i, (image, label) in enumerate(zip(part.images, classes[role], strict=True)):
            pixels = hashlib.blake2b(image.data, digest_size=16).digest()
            tally.add(role, label, (Path(role), i), Look(image.shape, pixels, False, False, False))
    names = raw.class_names or tuple(map(str, range(max(classes["train"]) + 1)))
    labelled = Labelled(names, classes, 0, (), ())
    labelled = replace(labelled, problems=tuple(too_small(labelled)))
    content = ref.digest or version_of(ref) or ""
    found = summed_up(DatasetSpec(str(ref), "code"), False, tally, labelled, content, {})
    if found.problems:
        raise DataError(f"dataset {ref}: {'; '.join(found.problems)}")
    return replace(found, fingerprint=arrays_digest(raw))


def _answer() -> None:
    name, folder, root, out = json.load(sys.stdin)
    try:
        survey = _look(parse_code(name, "dataset"), Path(folder), None if root is None else Path(root))
        found = {"survey": as_text(survey)}
    except UserError as error:
        found = {"error": str(error)}
    Path(out).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    _answer()
