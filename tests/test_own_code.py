"""A user's own code: reading, hashing, its name as text, and when it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddsweep.catalog import CodeRef, is_code, parse_code
from ddsweep.errors import SettingError, UserError
from ddsweep.own_code import load_code, loaded_code, resolve_code, stored_source, version_of
from ddsweep.results.code import write_code
from ddsweep.results.layout import SweepDirectory

MAIN = """
import json, helpers
import pack.inner
from pack import more as renamed
from pack.deep.leaf import LEAF
from .beside import BESIDE


def value(width=1):
    from late import LATE
    return [width, helpers.HELP, pack.inner.INNER, renamed.MORE, LEAF, BESIDE, LATE, json.dumps(1)]
"""
FILES = {
    "my_code.py": MAIN,
    "helpers.py": "HELP = 'help'\n",
    "beside.py": "BESIDE = 'beside'\n",
    "late.py": "LATE = 'late'\n",
    "unused.py": "raise RuntimeError('not imported')\n",
    "pack/__init__.py": "",
    "pack/inner.py": "from . import more\nfrom helpers import HELP\nINNER = more.MORE + HELP\n",
    "pack/more.py": "MORE = 'more'\n",
    "pack/deep/leaf.py": "from ..more import MORE\nLEAF = MORE.upper()\n",
}


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def stored(tmp_path: Path, file: Path, name: str = "value", **options: Any) -> tuple[CodeRef, SweepDirectory]:
    ref, source = resolve_code({"file": str(file), "name": name, **options}, "network")
    assert source is not None
    directory = SweepDirectory(tmp_path / "results")
    write_code(directory, [ref])
    return ref, directory


def test_a_file_and_what_it_imports_of_its_folder_are_hashed_copied_and_run(tmp_path: Path) -> None:
    home = written(tmp_path / "mine", FILES)
    ref, directory = stored(tmp_path, home / "my_code.py", width=3)
    copies = {
        path.relative_to(directory.code / ref.digest).as_posix() for path in directory.code.rglob("*.py")
    }
    assert copies == set(FILES) - {"unused.py"}
    for name in FILES:
        (home / name).unlink()
    before = set(sys.modules)
    found = load_code(ref, directory.code)(**dict(ref.options))
    assert found == [3, "help", "morehelp", "more", "MORE", "beside", "late", "1"]
    assert all(name.startswith(f"ddsweep_own_{ref.digest}") for name in set(sys.modules) - before)


@pytest.mark.parametrize("changed", ["my_code.py", "pack/more.py", "late.py"])
def test_the_hash_is_over_all_that_is_imported_and_nothing_else(tmp_path: Path, changed: str) -> None:
    home = written(tmp_path, FILES)

    def digest() -> str:
        return resolve_code({"file": str(home / "my_code.py"), "name": "value"}, "network")[0].digest

    before = digest()
    (home / "unused.py").write_text("anything\n")
    assert digest() == before
    (home / changed).write_text(FILES[changed] + "# changed\n")
    assert digest() != before


def test_two_versions_of_a_file_live_in_one_process(tmp_path: Path) -> None:
    values = []
    for version in ("first", "second"):
        home = written(
            tmp_path / version, {"a.py": "import b\nname = b.name\n", "b.py": f"name = {version!r}\n"}
        )
        ref, directory = stored(tmp_path, home / "a.py", "name")
        values.append(load_code(ref, directory.code))
    assert values == ["first", "second"] and "b" not in sys.modules


def test_reading_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    home = written(tmp_path, {"a.py": f"open({str(mark)!r}, 'w')\ndef f(): pass\n"})
    ref, directory = stored(tmp_path, home / "a.py", "f")
    stored_source(ref, directory.code)
    with pytest.raises(UserError, match="it does not run here"):
        loaded_code(ref)
    assert not mark.exists()
    load_code(ref, directory.code)
    assert mark.exists() and loaded_code(ref).__name__ == "f"


@pytest.mark.parametrize("how", ["changed", "torn", "another beside it"])
def test_a_copy_that_is_not_what_the_hash_says_is_not_run(tmp_path: Path, how: str) -> None:
    home = written(
        tmp_path, {"a.py": "import b\nraise SystemExit('ran')\ndef f(): pass\n", "b.py": "x = 1\n"}
    )
    ref, directory = stored(tmp_path, home / "a.py", "f")
    copy = directory.code / ref.digest / "b.py"
    texts = {"changed": "x = 2\n", "torn": "x"}
    if how in texts:
        copy.write_text(texts[how])
    else:
        copy.with_name("c.py").write_text("")
    with pytest.raises(UserError, match=f"{ref.digest}: changed since .* it is not run"):
        load_code(ref, directory.code)
    with pytest.raises(UserError, match="it is not run"):
        write_code(directory, [ref])
    with pytest.raises(UserError, match=r"the code of .* is not there"):
        load_code(ref, tmp_path / "elsewhere")


WRONG: dict[str, tuple[dict[Any, Any], str]] = {
    "neither": ({"name": "f"}, "give either `file`, a path, or `module`"),
    "both": ({"file": "a.py", "module": "a", "name": "f"}, "give either `file`"),
    "no name": ({"file": "a.py"}, "name: None is not the name of a class or function"),
    "no file": ({"file": "gone.py", "name": "f"}, "gone.py cannot be read: No such file"),
    "not Python": ({"file": "wrong.py", "name": "f"}, "wrong.py, line 2: not Python: "),
    "imported, not Python": ({"file": "imports_wrong.py", "name": "f"}, "wrong.py, line 2: not Python: "),
    "no such name": ({"file": "a.py", "name": "valeu"}, "has no 'valeu' (did you mean value?)"),
    "another kind": ({"file": "a.txt", "name": "f"}, "a.txt is not a file of Python"),
    "above": ({"file": "above.py", "name": "f"}, "above.py, line 1: imports from outside the folder"),
    "option": ({"file": "a.py", "name": "value", "sizes": {}}, "sizes: {} is neither a number, a text"),
    "option's name": (
        {"file": "a.py", "name": "value", "the size": 1},
        "'the size' is not the name of an arg",
    ),
    "no package": ({"module": "no_such_package.nets", "name": "f"}, "no package 'no_such_package' installed"),
    "no path": ({"module": "a-b", "name": "f"}, "'a-b' is not an import path"),
}


@pytest.mark.parametrize(("value", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_mapping_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: dict[Any, Any], said: str
) -> None:
    wrong = {
        "a.py": "def value(): pass\n",
        "a.txt": "",
        "wrong.py": "x = 1\ndef (:\n",
        "imports_wrong.py": "from wrong import f\n",
        "above.py": "from ..a import f\n",
    }
    monkeypatch.chdir(written(tmp_path, wrong))
    with pytest.raises(SettingError) as caught:
        resolve_code(value, "network")
    assert str(caught.value).startswith("network: ") and said in str(caught.value)


REFS = [
    CodeRef("my_nets.py", "Small", (), "0123456789ab"),
    CodeRef("my_nets.py", "Small", (("deep", True), ("rate", 0.001), ("width", 32)), "0123456789ab"),
    CodeRef("torchvision.models", "resnet18", (("weights", None),)),
]


@pytest.mark.parametrize("ref", REFS, ids=str)
def test_a_reference_is_one_line_of_text_and_back(ref: CodeRef) -> None:
    assert is_code(str(ref)) and parse_code(str(ref), "network") == ref


def test_options_may_hold_anything_that_yaml_has(tmp_path: Path) -> None:
    home = written(tmp_path, {"a.py": "def value(): pass\n"})
    given = {"act": "re lu,(x)=@:'", "none": None, "sizes": [1, 2.5, "x"], "rate": "1e-3", "flag": False}
    given |= {"fold": "2007", "part": "1.5"}  # in quotes, so texts
    ref, _ = resolve_code({"file": str(home / "a.py"), "name": "value", **given}, "network")
    again = parse_code(str(ref), "network")
    assert again == ref and str(again) == str(ref)
    assert dict(ref.options) == {**given, "sizes": (1, 2.5, "x"), "rate": 0.001}


@pytest.mark.parametrize(
    "text",
    [
        "my_nets.py:Small",
        "my_nets.py:Small@0123",
        "torchvision.models:resnet18@0123456789ab",
        "my_nets.py:Small(32)@0123456789ab",
        "my_nets.py:Small(width=f())@0123456789ab",
        "my_nets.py:Small(width=32@0123456789ab",
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"^network: "):
        parse_code(text, "network")


def test_a_module_counts_by_its_path_and_has_a_version(tmp_path: Path) -> None:
    code = (
        "import sys; from ddsweep.own_code import resolve_code, version_of;"
        "ref, source = resolve_code({'module': 'torchvision.models', 'name': 'resnet18'}, 'network');"
        "print(ref, source, version_of(ref)); assert not {'torch', 'torchvision'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("torchvision.models:resnet18 None torchvision 0.")
    ref, _ = resolve_code({"module": "json", "name": "dumps"}, "network")
    assert load_code(ref, tmp_path)(1) == "1" and version_of(ref) is None


def test_code_that_raises_and_a_name_that_is_not_there_end_in_one_message(tmp_path: Path) -> None:
    home = written(tmp_path, {"a.py": "def f(): pass\n1 / 0\n", "b.py": "if False:\n    def f(): pass\n"})
    for file, said in (
        ("a.py", "failed: a.py, line 2, in <module>: ZeroDivisionError"),
        ("b.py", "b.py has no 'f'"),
    ):
        ref, directory = stored(tmp_path, home / file, "f")
        with pytest.raises(UserError, match=said):
            load_code(ref, directory.code)
