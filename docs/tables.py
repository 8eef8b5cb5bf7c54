"""Writes the tables of docs/ that say what the code declares: `make docs`.

They stand between `<!-- table: KIND NAME -->` and `<!-- end -->`; the text around them is written by hand.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ddsweep.catalog import GROUPS
from ddsweep.launch.site import Site
from ddsweep.report.declarations import TRIAL, Key, declared, keys_of_group, texts_below
from ddsweep.results.schemas import PARTS

DOCS = Path(__file__).parent
_TABLE = re.compile(r"(<!-- table: (\w+) (\w+) -->\n).*?(<!-- end -->)", flags=re.S)


def up_to_date(page: str) -> str:
    """The text of a page with its tables as they should be."""
    return _TABLE.sub(lambda found: f"{found[1]}{_MADE[found[2]](found[3])}{found[4]}", page)


def settings(section: str) -> str:
    if section != TRIAL:
        return _keys(declared({"site": Site})[section])
    parts = [f"\n**{(group.__doc__ or '').strip()}**\n\n{_keys(keys_of_group(group))}" for group in GROUPS]
    return "".join(parts) + "\n"


def _keys(keys: Iterable[Key]) -> str:
    return _table(
        ("setting", "default", "meaning"), ((f"`{key.name}`", key.default, key.meaning) for key in keys)
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first, *rest = (f"| {' | '.join(cells)} |\n" for cells in (head, *rows))
    return "".join((first, f"|{'---|' * len(head)}\n", *rest))


def columns(table: str) -> str:
    """Columns with one meaning share a row; settings do, wherever they stand."""
    rows: dict[str, list[str]] = {}
    for part in PARTS[table]:
        found = [(part.split(), _SETTING)] if isinstance(part, str) else texts_below(part)
        for names, meaning in found:
            rows.setdefault(meaning, []).extend(f"`{name}`" for name in names)
    return _table(("column", "meaning"), ((" ".join(names), meaning) for meaning, names in rows.items()))


def modules(room: str) -> str:
    """The modules of a room, with the first sentence of what each says of itself."""
    root = DOCS.parent / "ddsweep"
    paths = root.glob("*.py") if room == "top" else (root / room).rglob("*.py")
    rows = []
    for path in sorted(paths):
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        first = re.split(r"(?<=[.]) (?=[A-Z`])", " ".join(said.split("\n\n")[0].split()))[0]
        rows.append(
            (f"[`{path.relative_to(root)}`](../ddsweep/{path.relative_to(root)})", first.replace("``", "`"))
        )
    return _table(("module", "job"), rows)


_SETTING = "the [settings](settings.md); null where the method of the trial lacks one"
_MADE = {"settings": settings, "columns": columns, "modules": modules}


if __name__ == "__main__":
    for path in DOCS.glob("*.md"):
        before = path.read_text()
        if (after := up_to_date(before)) != before:
            path.write_text(after)
            print(f"{path.name}: tables written again")
