"""The fenced blocks of the documents, for the tests that read and run them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path for folder in (".", "docs", "bench", "slurm") for path in (ROOT / folder).glob("*.md")
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    page: Path
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}: {self.text.splitlines()[0][:60]}"


def blocks(*kinds: str) -> list[Block]:
    found = []
    for page in DOCUMENTS:
        for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S):
            if kind in kinds:
                found.append(Block(page, kind, text))
    return found


def write_shown(folder: Path) -> None:
    """The files that documents show whole, with their name in the first line, such as ``# my_nets.py``."""
    for block in blocks("python", "yaml"):
        if named := re.match(r"# (\w+\.(?:py|yaml))\n", block.text):
            (folder / named[1]).write_text(block.text)


def commands(block: Block) -> list[str]:
    """The lines of a block of commands, each whole."""
    return [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]
