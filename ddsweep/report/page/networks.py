"""The rows of ``evals`` as arrays, because a million of them are searched many times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ddsweep.catalog import PROTOCOLS

__all__ = ["OWN", "Networks"]

OWN = PROTOCOLS[0]
"""The protocol that a set was made for."""

_WORDS = ("source", "protocol", "network")
_COUNTS = ("model_seed", "inner_step", "inner_epochs", "inner_batch")


@dataclass(frozen=True)
class Networks:
    """One entry per row, sorted by trial: ``trial`` is its number, ``source``, ``protocol``, ``network`` and
    ``law`` (law or pool) index into ``words``; ``model_seed``, ``inner_step``, ``inner_epochs`` and
    ``inner_batch`` are -1 for null. ``accuracy`` and ``attack_success`` are fractions, NaN for null."""

    words: Mapping[str, Sequence[str]]
    trial: np.ndarray
    source: np.ndarray
    protocol: np.ndarray
    network: np.ndarray
    law: np.ndarray
    model_seed: np.ndarray
    inner_step: np.ndarray
    inner_epochs: np.ndarray
    inner_batch: np.ndarray
    accuracy: np.ndarray
    accuracy_other: np.ndarray
    attack_success: np.ndarray
    diverged: np.ndarray

    @classmethod
    def of(cls, frames: Sequence[tuple[str, pd.DataFrame]], by_id: Mapping[tuple[str, str], int]) -> Networks:
        """From the rows of each sweep; those of trials that are not in ``by_id`` are left out."""
        numbers, kept = [], []
        for name, frame in frames:
            codes, ids = pd.factorize(frame["trial_id"])
            lookup = np.array([by_id.get((name, trial_id), -1) for trial_id in ids] or [-1])
            numbers.append(lookup[codes])
            kept.append(frame)
        frame = pd.concat(kept, ignore_index=True)
        trial = np.concatenate(numbers)
        order = np.argsort(trial, kind="stable")
        order = order[trial[order] >= 0]
        law = frame["pool"].where(frame["pool"].notna(), frame["init_law"])
        words: dict[str, Sequence[str]] = {}
        coded: dict[str, np.ndarray] = {}
        for name, column in {**{n: frame[n] for n in _WORDS}, "law": law}.items():
            codes, found = pd.factorize(column.fillna(""))
            words[name], coded[name] = [str(word) for word in found], codes[order]
        whole = {name: _whole(frame[name])[order] for name in _COUNTS}
        reals = {
            name: frame[name].to_numpy(dtype=float, na_value=np.nan)[order]
            for name in ("accuracy", "accuracy_other", "attack_success")
        }
        diverged = frame["diverged"].fillna(False).to_numpy(dtype=bool)[order]
        return cls(words=words, trial=trial[order], diverged=diverged, **coded, **whole, **reals)

    def code(self, kind: str, word: str) -> int:
        """The index of ``word``, -2 if no row has it."""
        words = list(self.words[kind])
        return words.index(word) if word in words else -2

    def spans(self) -> Iterator[tuple[int, slice]]:
        """(trial, the positions of its rows)."""
        starts = np.flatnonzero(np.diff(self.trial, prepend=-1))
        for start, end in zip(starts, [*starts, len(self.trial)][1:], strict=True):
            yield int(self.trial[start]), slice(int(start), int(end))

    def measured(self, name: str) -> np.ndarray:
        """The column of this name: ``accuracy``, ``accuracy_other`` or ``attack_success``."""
        values: np.ndarray = getattr(self, name)
        return values

    def distilled(self, protocol: str = OWN) -> np.ndarray:
        """A mask of the rows of distilled sets under ``protocol``."""
        ours = self.source == self.code("source", "distilled")
        mask: np.ndarray = ours & (self.protocol == self.code("protocol", protocol))
        return mask

    def last(self, inner_steps: Mapping[int, int], inner_epochs: Mapping[int, int]) -> np.ndarray:
        """Where the rows of distilled sets after their last epoch are, whatever the protocol, as a mask.
        ``inner_steps`` and ``inner_epochs`` have S and E of each trial; a protocol may have epochs of its
        own. With an ``inner_batch`` networks are tested at 0, after the last epoch, and beyond.
        """
        count = int(self.trial.max(initial=-1)) + 1
        steps = np.array([inner_steps.get(number, 0) for number in range(count)], dtype=np.int64)
        own = np.array([inner_epochs.get(number, 0) for number in range(count)], dtype=np.int64)
        epochs = np.where(self.inner_epochs < 0, own[self.trial], self.inner_epochs)
        ours = self.source == self.code("source", "distilled")
        last = steps[self.trial] * epochs
        minibatches = ours & (self.inner_batch > 0) & (self.inner_step > 0)
        protocols = max(1, len(self.words["protocol"]))
        kind = self.trial * protocols + self.protocol
        first = np.full(count * protocols, np.iinfo(np.int64).max)
        np.minimum.at(first, kind[minibatches], self.inner_step[minibatches])
        last[minibatches] = first[kind[minibatches]]
        mask: np.ndarray = ours & (self.inner_step == last)
        return mask


def _whole(column: Any) -> np.ndarray:
    values: np.ndarray = column.to_numpy(dtype=np.int64, na_value=-1)
    return values
