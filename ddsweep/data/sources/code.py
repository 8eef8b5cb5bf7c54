"""Data that a function of the user's gives: ``{file: my_data.py, name: load, ...options}``.

The function runs in two places. What it gives is looked at once, in a process of its own, and kept
(`ddsweep.data.survey_cache`) by the hash of its source: ids hang on the content. Where trials are to be run,
it is called again, in their process, and must give the same. All else only reads what is kept.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddsweep.catalog import CodeRef, DatasetSpec, Survey, base_name, parse_code
from ddsweep.data.layout import MissingError
from ddsweep.data.sources import Raw, Say, Source
from ddsweep.data.survey_cache import (
    Files,
    as_text,
    files_of,
    forget_survey,
    from_text,
    keep_survey,
    kept_survey,
)
from ddsweep.errors import DataError, SettingError, UserError
from ddsweep.own_code import load_code, read_source, resolve_code, version_of

__all__ = ["SOURCE", "from_copy", "measure"]

_NOT_OPTIONS = ("size", "channels")
"""Keys of the mapping that mean here what they mean for other data of one's own."""


class Code(Source):
    """``spec.name`` is the reference (`CodeRef`), ``spec.path`` the file, or the module."""

    def described(self, value: Mapping[str, Any]) -> dict[str, Any]:
        ref, _ = resolve_code({k: v for k, v in value.items() if k not in _NOT_OPTIONS}, "dataset")
        path = str(Path(value["file"]).expanduser().resolve()) if ref.is_file else ref.where
        return {"name": str(ref), "path": path}

    def check(self, spec: DatasetSpec, root: Path | None) -> None:
        ref = _ref(spec)
        if not ref.is_file:
            return
        if not Path(spec.path).is_file():
            what = f"{spec.path} is missing"
            raise MissingError(f"dataset {spec.name}: {what}; it is the code of these data", what)
        if self.content(spec, root) != ref.digest:
            raise DataError(
                f"dataset {spec.name}: {spec.path} has changed since the trial was planned; run the same "
                "command again"
            )

    def content(self, spec: DatasetSpec, root: Path | None) -> str:
        ref = _ref(spec)
        return read_source(Path(spec.path), "dataset").digest if ref.is_file else version_of(ref) or ""

    def survey(
        self,
        spec: DatasetSpec,
        root: Path | None,
        *,
        sized: bool,
        say: Say | None = None,
        may_run: bool = False,
    ) -> Survey | None:
        key = _key(spec, root)
        kept = kept_survey(key)
        if kept is not None:
            return kept
        if not may_run:
            raise DataError(
                f"dataset {spec.name}: what it gives is not known here, and nothing of it is run for that; "
                "`ddsweep plan` of its sweep file runs it once"
            )
        if say:
            say(f"dataset {spec.name}: run once, in a process of its own, to see what it gives")
        began = time.time()
        found = _in_own_process(spec, root)
        keep_survey(key, found, began)
        return found

    def read(self, spec: DatasetSpec, root: Path | None) -> Raw:
        from ddsweep.data.arrays import arrays_digest

        raw = _call(spec, root)
        if spec.fingerprint and arrays_digest(raw) != spec.fingerprint:
            forget_survey(_key(spec, root))
            raise DataError(
                f"dataset {spec.name}: it gave other images or labels than before: what it reads has "
                "changed, or it draws at random without a seed; run the same command again once it gives the "
                "same at every call"
            )
        return raw._replace(class_names=spec.class_names)

    def how_to_get(self, spec: DatasetSpec) -> str:
        return f"it is what {spec.path} gives"


def from_copy(text: str, folder: Path | None) -> DatasetSpec:
    """The data set that ``text`` names (`CodeRef`), whose code lies in ``folder``: the copies beside results.

    Raises `SettingError` for text that is no reference, `DataError` for a copy that is not there.
    """
    ref = parse_code(base_name(text), "dataset")
    path = ref.where
    if ref.is_file:
        home = None if folder is None else folder / ref.digest / ref.where
        if home is None or not home.is_file():
            raise DataError(f"dataset {ref}: the copy of its code{f' {home}' if home else ''} is not here")
        path = str(home.resolve())
    return DatasetSpec(str(ref), SOURCE_NAME, path=path)


def _ref(spec: DatasetSpec) -> CodeRef:
    return parse_code(spec.base_name, "dataset")


def _key(spec: DatasetSpec, root: Path | None) -> Files:
    return files_of("code", spec.base_name, version_of(_ref(spec)), str(root and root.resolve()))


# ----------------------------------------------------------------------------------------- running


def _call(spec: DatasetSpec, root: Path | None) -> Raw:
    """What the function gives, called in this process."""
    from ddsweep.data.arrays import checked_arrays

    ref = _ref(spec)
    where = f"dataset {spec.name}"
    with tempfile.TemporaryDirectory(prefix="ddsweep-code-") as temporary:
        copies = Path(temporary)
        if ref.is_file:  # what runs is what was hashed
            source = read_source(Path(spec.path), "dataset")
            for name, content in source.files.items():
                (copies / source.digest / name).parent.mkdir(parents=True, exist_ok=True)
                (copies / source.digest / name).write_bytes(content)
        try:
            function = load_code(ref, copies)
        except UserError as error:
            raise DataError(f"dataset {error}") from None
        if not callable(function):
            raise DataError(f"{where}: {ref.name} is {type(function).__name__}, not a function")
        options = {key: list(item) if isinstance(item, tuple) else item for key, item in ref.options}
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # of some functions written in C nobody knows
            signature = None
        if signature and "data_root" in signature.parameters and "data_root" not in options:
            options["data_root"] = root
        if signature:
            try:
                signature.bind(**options)
            except TypeError as error:
                raise SettingError(f"{where}: {ref.name}{signature}: {error}") from None
        try:
            given = function(**options)
        except (Exception, SystemExit) as error:
            raise DataError(f"{where}: {_place(error, spec, copies / ref.digest)}") from error
    return checked_arrays(given, where)


def _place(error: BaseException, spec: DatasetSpec, home: Path) -> str:
    """``my_data.py, line 12, in load: ValueError: ...``: the last line that is of the user's own files."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(home)] or frames[-1:]
    file = Path(own[-1].filename)
    if file.is_relative_to(home):
        file = Path(spec.path).parent / file.relative_to(home)
    told = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return f"{file}, line {own[-1].lineno}, in {own[-1].name}: {told}"


def _in_own_process(spec: DatasetSpec, root: Path | None) -> Survey:
    with tempfile.TemporaryDirectory(prefix="ddsweep-data-") as temporary:
        out = Path(temporary) / "found.json"
        asked = {"name": spec.base_name, "path": spec.path, "root": root and str(root), "out": str(out)}
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"from {__name__} import measure; measure()"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=False,
        )
        if not out.is_file():
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise DataError(
                f"dataset {spec.name}: the process that ran it ended with {done.returncode}"
                + (f": {lines[-1]}" if lines else "")
            )
        found = json.loads(out.read_text("utf-8"))
    if "error" in found:
        raise DataError(found["error"])
    return from_text(found["survey"])


def measure() -> None:
    """In a process of its own: call the function that standard input names, and write what it gives."""
    asked = json.load(sys.stdin)
    root = Path(asked["root"]) if asked["root"] else None
    try:
        found = {"survey": as_text(_look(DatasetSpec(asked["name"], SOURCE_NAME, path=asked["path"]), root))}
    except UserError as error:
        found = {"error": str(error)}
    Path(asked["out"]).write_text(json.dumps(found), "utf-8")


def _look(spec: DatasetSpec, root: Path | None) -> Survey:
    import hashlib

    from ddsweep.data.arrays import arrays_digest
    from ddsweep.data.decode import Look
    from ddsweep.data.labels import Labelled, too_small
    from ddsweep.data.survey import summed_up
    from ddsweep.data.tally import Tally

    raw, tally = _call(spec, root), Tally()
    classes = {}
    for role, part in (("train", raw.train), ("test", raw.test)):
        classes[role] = part.labels.tolist()
        shape = part.images.shape[1:]
        for i, (image, label) in enumerate(zip(part.images, classes[role], strict=True)):
            pixels = hashlib.blake2b(image.data, digest_size=16).digest()
            tally.add(role, label, (Path(role), i), Look(shape, pixels, False, False, False))
    names = raw.class_names or tuple(map(str, range(max(classes["train"]) + 1)))
    labelled = Labelled(names, classes, 0, (), ())
    labelled = replace(labelled, problems=tuple(too_small(labelled)))
    found = summed_up(spec, False, tally, labelled, SOURCE.content(spec, root), {})
    if found.problems:
        raise DataError(f"dataset {spec.name}: {'; '.join(found.problems)}")
    return replace(found, fingerprint=arrays_digest(raw))


SOURCE_NAME = "code"
SOURCE = Code()
