"""Writes docs/analysis.ipynb from docs/analysis.md: `make docs`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("analysis.md")
NOTEBOOK = PAGE.with_suffix(".ipynb")


def notebook(page: str) -> str:
    """A notebook with the text and the code of ``page``, which shows each answer. It holds no outputs."""
    cells: list[dict[str, Any]] = []
    for text, code in re.findall(r"(.*?)(?:^```python\n(.*?)^```|\Z)", page, re.M | re.S):
        if text := text.strip():
            cells.append({"cell_type": "markdown", "metadata": {}, "source": _lines(text)})
        if code := code.strip():
            source = code.replace('root = "', 'root = "../')
            if "answer = " in code:
                source += "\nanswer"  # a name in the last line shows the table
            cell = {"cell_type": "code", "metadata": {}, "source": _lines(source)}
            cells.append({**cell, "execution_count": None, "outputs": []})
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    text = notebook(PAGE.read_text())
    if not NOTEBOOK.exists() or NOTEBOOK.read_text() != text:
        NOTEBOOK.write_text(text)
        print(f"{NOTEBOOK.name}: written again")
