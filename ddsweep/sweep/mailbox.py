"""Answers of the driver to the places, by way of a small Ray actor. Its process imports nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

__all__ = ["Mailbox", "ask"]


class Mailbox:
    """A Ray actor with the last answer to each place. It may be started anew, and is empty then: a place that
    finds no answer asks again."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[int, Any]] = {}

    def put(self, place: str, number: int, answer: Any) -> None:
        self._answers[place] = number, answer

    def take(self, place: str, number: int) -> tuple[int, Any] | None:
        """The answer to question ``number`` of a place, with that number; None if there is none."""
        found = self._answers.get(place)
        return found if found is not None and found[0] == number else None


def ask(mailbox: Any, tell: Callable[[dict[str, Any]], None], question: dict[str, Any]) -> Any:
    """The answer to a ``question`` with the keys ``place`` and ``number``; ``tell`` reports to Tune, and
    comes back when Tune has heard it."""
    while True:
        tell(question)
        found = ray.get(mailbox.take.remote(question["place"], question["number"]))
        if found is not None:
            return found[1]
