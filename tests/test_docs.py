"""The documents say what is there: every setting, column and file they name, and every one there is."""

from __future__ import annotations

import ast
import re
import runpy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from ddsweep.catalog import DATASETS, NETWORKS, NORMS, SETTINGS
from ddsweep.catalog.groups import AUGMENTATIONS
from ddsweep.cli import app
from ddsweep.launch.site import Site
from ddsweep.report.declarations import declared
from ddsweep.results.schemas import TABLES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md"), *ROOT.glob("slurm/*.md")]


def words_of_first_column(text: str) -> set[str]:
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {word for row in rows for word in re.findall(r"`([a-z0-9_]+)`", row)}


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text.split(f"## {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


@pytest.mark.parametrize("document", [*DOCUMENTS, *ROOT.glob("docs/*/*.md")], ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert target.startswith("http") or (document.parent / target).exists(), target


def anchors(page: Path) -> set[str]:
    """What a link into ``page`` may name: its headings, as they are shown, and its own marks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    found, seen = set(re.findall(r'<a id="([^"]+)">', text)), Counter[str]()
    for heading in re.findall(r"^#+ +(.+)$", text, re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


@pytest.mark.parametrize("document", [*DOCUMENTS, *ROOT.glob("docs/*/*.md")], ids=lambda path: path.name)
def test_links_into_a_page_lead_to_a_heading(document: Path) -> None:
    for target, name in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", document.read_text()):
        page = document.parent / target if target else document
        if page.suffix == ".md" and "://" not in target:
            assert name in anchors(page), f"{target}#{name}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_tables_of_what_is_declared_are_up_to_date() -> None:
    tables = runpy.run_path(str(ROOT / "docs/tables.py"))
    for page in ROOT.glob("docs/*.md"):
        text = page.read_text()
        now = tables["up_to_date"](text)
        if page.name == "structure.md":  # by module; its line may lag behind its docstring
            text, now = (re.sub(r"^(\| \[`\S+).*$", r"\1", page, flags=re.M) for page in (text, now))
        assert now == text, f"{page.name}: `make docs` writes its tables again"


def test_every_room_is_in_the_table_of_modules_and_in_the_tree() -> None:
    rooms = {path.parent.name for path in (ROOT / "ddsweep").glob("*/__init__.py")}
    assert set(re.findall(r"<!-- table: modules (\w+)", (ROOT / "docs/structure.md").read_text())) == {
        *rooms,
        "top",
    }
    tree = (ROOT / "README.md").read_text().split("## Where things are", 1)[1]
    assert set(re.findall(r"^  (\w+)/ ", tree, flags=re.M)) == rooms - {"dashboards"}


def test_every_setting_and_key_has_a_place_in_a_document() -> None:
    pages = "".join((ROOT / f"docs/{name}.md").read_text() for name in ("settings", "cluster"))
    shown = set(re.findall(r"<!-- table: settings (\w+) -->", pages))
    assert shown == {*declared({"site": Site})}


def test_a_setting_that_takes_words_says_which() -> None:
    """In its meaning, or as its default."""
    words = {
        **{name: item.one_of for name, item in SETTINGS.items()},
        **{"dataset": tuple(DATASETS), "network": (*NETWORKS, *NORMS), "outer_augment": AUGMENTATIONS},
    }
    for key in declared({})["trial"]:
        said = f"{key.default} {key.meaning}"
        assert {word for word in words[key.name] if f"`{word}`" not in said} == set(), key.name


def test_every_data_set_is_documented_as_it_is() -> None:
    text = section((ROOT / "docs/settings.md").read_text(), "Data sets")
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in text.splitlines() if "x" in line]
    found = {name.strip("`"): (images, classes) for name, images, classes in (r for r in rows if len(r) == 3)}
    catalog = {name: ("x".join(map(str, spec.shape)), str(spec.classes)) for name, spec in DATASETS.items()}
    assert {name: found.get(name) for name in catalog} == catalog


@pytest.mark.parametrize("table", list(TABLES))
def test_every_column_is_documented_and_no_other(table: str) -> None:
    text = section((ROOT / "docs/results.md").read_text(), f"`{table}`")
    assert words_of_first_column(text) == set(TABLES[table].names)


def test_files_named_in_the_readme_tree_exist() -> None:
    tree = (ROOT / "README.md").read_text().split("## Where things are", 1)[1].split("```")[1]
    for line in tree.strip().splitlines():
        name = line.split()[0]
        place = ROOT / "ddsweep" / name if line.startswith("  ") else ROOT / name
        assert place.exists(), name


def verbs_of(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, set[str]]]:
    """Each verb, such as ``data list``, and its options."""
    yield " ".join(words), {"--help", *(option for item in command.params for option in item.opts)}
    for name, inner in getattr(command, "commands", {}).items():
        yield from verbs_of(inner, (*words, name))


VERBS = dict(verbs_of(typer.main.get_command(app)))
ANY_VERB = "|".join(sorted(filter(None, VERBS), key=len, reverse=True))
OPTION = r"(?<![\w-])--[a-z][a-z-]*"
FILES = [*ROOT.glob("sweeps/**/*.yaml"), *ROOT.glob("slurm/*.*")]


def code_of(page: Path) -> str:
    """What a page sets as code; all of another file."""
    text = page.read_text()
    if page.suffix != ".md":
        return text
    fenced = re.compile(r"^```.*?^```", flags=re.M | re.S)
    indented = re.findall(r"^ {4}.*$", text, flags=re.M)
    return "\n".join([*fenced.findall(text), *indented, *re.findall(r"`[^`\n]+`", fenced.sub("", text))])


def messages(module: Path) -> Iterator[str]:
    """The texts in a module that people may come to read: no docstrings, and no single words. What is filled
    in is {}."""
    tree = ast.parse(module.read_text())
    passed = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            passed |= set(map(id, node.values))
            text = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in passed:
            text = node.value
        else:
            continue
        if " " in text.strip():
            yield text


def unknown_commands(text: str, begins: str) -> list[str]:
    """What ``text`` tells people to type that the command line does not have; ``begins`` stands before
    a command."""
    found = []
    for said in re.finditer(rf"(?:{begins})ddsweep (?![-{{])([^`;()\n#]*)", text, flags=re.M):
        for words in re.split(r"(?<=\w)\|(?=\w)", said[1]):  # status|logs|cancel
            verb = re.match(rf"(?:{ANY_VERB})(?![\w-])", words)
            if verb is None or set(re.findall(OPTION, words)) - VERBS[verb[0]]:
                found.append(said[0])
    return found


@pytest.mark.parametrize("page", [*DOCUMENTS, *FILES], ids=lambda path: path.name)
def test_every_command_that_a_page_names_is_there(page: Path) -> None:
    assert unknown_commands(code_of(page), "[`(]|^ *") == []


@pytest.mark.parametrize(
    "page", [path for path in FILES if "sweeps" in path.parts], ids=lambda path: path.name
)
def test_every_sweep_file_says_what_it_costs(page: Path) -> None:
    """In numbers that can be read: a letter before one is a place that was not filled in, as in `E12.5`."""
    head = " ".join(re.findall(r"^# ?(.*)$", page.read_text(), flags=re.M))
    cost = re.search(r"Cost: (.+?)(?= (?:Needs|Measured|Expect|Beats|Reproduces): |$)", head)
    assert cost is not None, "it has no line `# Cost: ...`"
    numbers = [word for word in re.split(r"[\s();:]+", head) if re.search(r"\d\.\d", word)]
    assert [word for word in numbers if re.match(r"[A-Za-z]+\d", word)] == []
    assert re.search(r"\d", cost[1]) or "GPU" in cost[1]


def test_every_command_and_option_that_a_message_names_is_there() -> None:
    everything = set().union(*VERBS.values())
    for module in sorted((ROOT / "ddsweep").rglob("*.py")):
        for text in messages(module):
            assert unknown_commands(text, "[`(]|see ") == [], module
            own = re.sub(r"`(?!ddsweep )[^`]*`", "", text)  # `wsl --install` is not ours
            assert set(re.findall(OPTION, own)) <= everything, f"{module}: {text}"
