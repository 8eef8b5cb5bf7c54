"""Data from a user's own function: ``{file: my_data.py, name: load, ...options}``.

The function runs in two places. Its result is checked once, in a separate process, and the findings are kept
(`ddsweep.data.survey_cache`) by the hash of its source: ids depend on the content. A process that runs trials
calls it again and must get the same. All other processes only read the kept findings.
"""

from __future__ import annotations

import time
from pathlib import Path

from ddsweep.catalog import CodeRef, DatasetSpec, Survey, parse_code
from ddsweep.data.layout import MissingError
from ddsweep.data.sources import Looking, Raw, Source
from ddsweep.data.survey_cache import Files, files_of, forget_survey, keep_survey, kept_survey
from ddsweep.errors import DataError, UserError
from ddsweep.own_code import known_source, stored_source, version_of

__all__ = ["SOURCE"]


class Code(Source):
    """``spec.name`` is the reference (`CodeRef`), ``spec.path`` the folder with copies of its source, if this
    process has not read it from the user's own file."""

    def check(self, spec: DatasetSpec, root: Path | None) -> None:
        ref = _ref(spec)
        if not ref.is_file or known_source(ref):
            return
        try:
            stored_source(ref, Path(spec.path))
        except UserError as error:
            raise MissingError(f"dataset {spec.name}: {error}", str(error)) from None

    def content(self, spec: DatasetSpec, root: Path | None) -> str:
        ref = _ref(spec)
        return ref.digest or version_of(ref) or ""

    def survey(self, spec: DatasetSpec, root: Path | None, how: Looking) -> Survey | None:
        key = _key(spec, root)
        kept = kept_survey(key)
        if kept is not None:
            return kept
        if not how.may_run:
            raise DataError(
                f"dataset {spec.name}: its images are not known here, and its code is not run for that; "
                "`ddsweep plan` of its sweep file runs it once"
            )
        from ddsweep.data.function import look_in_own_process

        self.check(spec, root)
        if how.say:
            how.say(f"dataset {spec.name}: run once, in a process of its own, to see what it gives")
        began = time.time()
        found = look_in_own_process(_ref(spec), Path(spec.path), root)
        keep_survey(key, found, began)
        return found

    def read(self, spec: DatasetSpec, root: Path | None) -> Raw:
        from ddsweep.data.arrays import arrays_digest
        from ddsweep.data.function import called

        raw = called(_ref(spec), Path(spec.path), root)
        if spec.fingerprint and arrays_digest(raw) != spec.fingerprint:
            forget_survey(_key(spec, root))
            raise DataError(
                f"dataset {spec.name}: it gave other images or labels than before: what it reads has "
                "changed, or it draws at random without a seed; run the same command again once it gives the "
                "same at every call"
            )
        return raw._replace(class_names=spec.class_names)

    def how_to_get(self, spec: DatasetSpec) -> str:
        return "that is what its code gives"


def _ref(spec: DatasetSpec) -> CodeRef:
    return parse_code(spec.base_name, "dataset")


def _key(spec: DatasetSpec, root: Path | None) -> Files:
    return files_of("code", spec.base_name, version_of(_ref(spec)), str(root and root.resolve()))


SOURCE = Code()
