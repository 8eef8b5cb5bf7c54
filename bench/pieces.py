"""A folder in pieces of a bounded size, for machines that take and give only so much at a time.

``pack DIR OUT --mib 55`` cuts a tar into ``piece-000``, ... and writes their sums to ``pieces.json``.
``unpack OUT DIR`` puts the folder together once all pieces are there. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

MIB = 2**20
INDEX = "pieces.json"


class PiecesError(Exception):
    """What is wrong, for the user."""


def pack(folder: Path, out: Path, mib: int, leave_out: Sequence[str] = ()) -> list[Path]:
    """Write ``folder`` as pieces of at most ``mib`` MiB into the new or empty folder ``out``.

    ``leave_out`` are names below ``folder``, such as ``pools``. Raises `PiecesError` if ``out`` holds files.
    """
    if not folder.is_dir():
        raise PiecesError(f"{folder}: no such folder")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise PiecesError(f"{out}: is not empty; name a new folder")
    paths: list[Path] = []
    sums: dict[str, str] = {}
    with tempfile.TemporaryFile() as whole:
        with tarfile.open(fileobj=whole, mode="w") as tar:
            for path in sorted(folder.rglob("*")):
                inside = path.relative_to(folder)
                if path.is_file() and not path.is_symlink() and inside.parts[0] not in leave_out:
                    tar.add(path, arcname=inside.as_posix())
        whole.seek(0)
        while piece := whole.read(mib * MIB):
            paths.append(out / f"piece-{len(paths):03d}")
            paths[-1].write_bytes(piece)
            sums[paths[-1].name] = hashlib.sha256(piece).hexdigest()
    (out / INDEX).write_text(json.dumps(sums, indent=1))
    return paths


def unpack(pieces: Path, folder: Path) -> None:
    """Put what `pack` wrote into ``folder``, over what is there.

    Raises `PiecesError` for pieces that are missing or damaged; then nothing is written.
    """
    try:
        sums: dict[str, str] = json.loads((pieces / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise PiecesError(f"{pieces / INDEX}: not there or damaged ({error})") from error
    if absent := [name for name in sums if not (pieces / name).is_file()]:
        raise PiecesError(f"{pieces}: {len(absent)} of {len(sums)} pieces are missing: {', '.join(absent)}")
    with tempfile.TemporaryFile() as whole:
        for name, expected in sums.items():
            piece = (pieces / name).read_bytes()
            if hashlib.sha256(piece).hexdigest() != expected:
                raise PiecesError(f"{pieces / name}: damaged; copy it again")
            whole.write(piece)
        whole.seek(0)
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=whole) as tar:
            tar.extractall(folder, filter="data")


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    own = verbs.add_parser("pack")
    own.add_argument("folder", type=Path)
    own.add_argument("out", type=Path)
    own.add_argument("--mib", type=int, default=55)
    own.add_argument("--leave-out", nargs="*", default=[], metavar="NAME")
    own.add_argument("--fresh", action="store_true", help="remove what OUT holds first")
    own = verbs.add_parser("unpack")
    own.add_argument("pieces", type=Path)
    own.add_argument("folder", type=Path)
    options = parser.parse_args(given)
    try:
        if options.verb == "pack":
            if options.fresh and (options.out / INDEX).is_file():
                shutil.rmtree(options.out)
            for path in pack(options.folder, options.out, options.mib, options.leave_out):
                print(path)
        else:
            unpack(options.pieces, options.folder)
    except (PiecesError, OSError) as error:
        print(f"pieces: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
