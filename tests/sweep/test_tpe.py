"""Proposals of guided search: better than random draws, in their space, the same from the same scores."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from ddsweep.errors import UserError
from ddsweep.spec import SearchSpec, SweepSpec
from ddsweep.sweep.tpe import Tried, propose, require_optuna
from tests.conftest import Run

SPACE: dict[str, dict[str, list[Any]]] = {
    "outer_lr": {"log_uniform": [1e-4, 1.0]},
    "inner_lr": {"uniform": [0.01, 2.0]},
    "outer_steps": {"integer": [100, 400]},
    "image_init": {"choice": ["noise", "real", "kmeans"]},
}


def search(kind: str = "tpe", samples: int = 50, **more: Any) -> SearchSpec:
    return SearchSpec(**{"kind": kind, "samples": samples, "space": SPACE, **more})


def score(values: Any) -> float:
    """Best, with 1, at outer_lr 0.01, inner_lr 0.3, 150 outer steps and real images."""
    far = 4 * (math.log10(values["outer_lr"]) + 2) ** 2 + 8 * (values["inner_lr"] - 0.3) ** 2
    far += abs(values["outer_steps"] - 150) / 2500 + 0.2 * (values["image_init"] != "real")
    return 1 / (1 + far)


def tried_by(search: SearchSpec, at_a_time: int, score: Callable[[Any], float] = score) -> list[Tried]:
    """A whole search, in which so many samples are always without a score."""
    tried = [Tried(values, score(values)) for values in search.known()]
    while len(tried) < search.samples:
        running = [
            Tried(one.values, one.score if n < len(tried) - at_a_time + 1 else None)
            for n, one in enumerate(tried)
        ]
        values = propose(search, "any", running)
        assert values is not None
        tried.append(Tried(values, score(values)))
    return tried


@pytest.mark.parametrize("at_a_time", [1, 4])
def test_guided_search_beats_random_search_with_as_many_trials(at_a_time: int) -> None:
    """Paired over ten seeds: both begin with the same draws."""
    gains = []
    for seed in range(10):
        random = [score(values) for values in search("random", seed=seed).known()]
        guided = [one.score or 0.0 for one in tried_by(search(seed=seed), at_a_time)]
        assert guided[:10] == random[:10] and len(guided) == len(random) == 50
        gains.append(max(guided) - max(random))
    assert stats.ttest_1samp(gains, 0.0, alternative="greater").pvalue < 0.05, gains


def test_proposals_lie_in_their_space_and_none_comes_twice() -> None:
    space = search(samples=30)
    tried = tried_by(space, 1)
    values = [one.values for one in tried]
    assert all(space.in_space(one) == one for one in values)
    assert all(a != b for n, a in enumerate(values) for b in values[:n])
    digits = max(len(f"{one['outer_lr']:g}") for one in values)
    assert digits <= len("0.0001234"), "numbers as short as drawn ones"


def test_a_proposal_follows_from_what_was_tried() -> None:
    known = tried_by(search(samples=14), 1)
    again = [propose(search(samples=15), "any", known) for _ in range(2)]
    assert again[0] == again[1]
    assert propose(search(samples=15, seed=1), "any", known) != again[0]
    assert propose(search(samples=99), "any", known) == again[0], "more samples change no proposal"


def test_samples_that_run_are_not_proposed_nearby() -> None:
    """Without scores of theirs, all places of eight workers would go to one spot."""
    only = search(space={"inner_lr": {"uniform": [0.0001, 1.0]}})
    known = [Tried(values, 1 - abs(values["inner_lr"] - 0.3)) for values in only.known()]
    running: list[float] = []
    for _ in range(8):
        values = propose(only, "any", [*known, *(Tried({"inner_lr": value}) for value in running)])
        assert values is not None
        running.append(values["inner_lr"])
    assert max(running) - min(running) > 0.2


def test_stopped_samples_guide_too() -> None:
    """What a scheduler stopped scored at its step; all that ran to the end lie elsewhere."""
    only = search(space={"inner_lr": {"uniform": [0.0001, 1.0]}})
    good = [Tried({"inner_lr": 0.8 + n / 100}, 0.9 + n / 1000) for n in range(4)]
    poor = [Tried({"inner_lr": 0.1 + n / 100}, 0.95, stopped_at=20) for n in range(12)]
    found = [propose(only, str(n), [*good, *poor]) for n in range(10)]
    above = [values for values in found if values is not None and values["inner_lr"] > 0.5]
    assert len(above) >= 8, "a score at an early step is not one at the end"


def test_where_samples_fail_no_more_are_proposed_though_others_were_only_stopped() -> None:
    """A scheduler leaves few samples that end, and those that fail are worse than all that it stopped."""
    space = {"outer_lr": {"uniform": [0.0001, 1.0]}}
    spec = search(samples=100, space=space)
    tried = [Tried({"outer_lr": value}, score) for value, score in ((0.1, 0.6), (0.12, 0.62))]
    tried += [Tried({"outer_lr": 0.016 * n}, 0.4 + 0.003 * n, 20) for n in range(1, 31)]
    tried += [Tried({"outer_lr": 0.8 + 0.025 * n}, 0.0, 0) for n in range(8)]
    proposed = []
    for _ in range(25):
        values = propose(spec, "any", tried)
        assert values is not None
        proposed.append(values["outer_lr"])
        tried.append(Tried(values, 0.4, 20))
    assert max(proposed) < 0.75


def test_a_small_space_is_gone_through_once() -> None:
    tiny = search(space={"inner_epochs": {"choice": [1, 2]}, "image_init": {"choice": ["noise", "real"]}})
    assert tiny.size == 4
    tried: list[Tried] = []
    for _ in range(4):
        values = propose(tiny, "any", tried)
        assert values is not None
        tried.append(Tried(values, 0.5))
    assert len({repr(sorted(one.values.items())) for one in tried}) == 4
    assert propose(tiny, "any", tried) is None


def test_a_space_of_whole_numbers_is_gone_through_to_its_end() -> None:
    numbers = search(samples=300, startup=300, space={"outer_steps": {"integer": [1, 300]}})
    tried: list[Tried] = []
    while values := propose(numbers, "any", tried):
        tried.append(Tried(values))
    assert sorted(one.values["outer_steps"] for one in tried) == list(range(1, 301))


def test_more_samples_may_be_drawn_at_the_start_than_are_looked_at_once() -> None:
    drawn = [Tried(values) for values in search(samples=400, startup=250).known()]
    assert len(drawn) == 250 and propose(search(samples=400, startup=250), "any", drawn) is not None


def test_impossible_samples_are_not_proposed() -> None:
    known = [Tried(values, score(values)) for values in search().known()]
    values = propose(search(), "any", known, possible=lambda one: one["outer_steps"] % 2 == 0)
    assert values is not None and values["outer_steps"] % 2 == 0
    assert propose(search(), "any", known, possible=lambda one: False) is None


def test_choices_may_be_of_any_type() -> None:
    """Optuna itself takes words and numbers."""
    mixed = search(
        space={"clip_norm": {"choice": [None, 1.0]}, "network": {"choice": ["lenet", "convnet(width=8)"]}}
    )
    values = propose(mixed, "any", [Tried({"clip_norm": None, "network": "lenet"}, 0.5)])
    assert mixed.in_space(values or {}) is not None


def test_without_optuna_there_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"name": "small", "base": {"dataset": "digits"}}
    monkeypatch.setitem(sys.modules, "optuna", None)
    guided = SweepSpec(**base, search=search())
    with pytest.raises(UserError, match=r"search.kind: tpe needs Optuna.*pip install 'ddsweep\[optuna\]'"):
        require_optuna(guided)
    require_optuna(SweepSpec(**base, search=search("random")))
    require_optuna(SweepSpec(**base))


def test_a_run_without_optuna_ends_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ddsweep: Run
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    search = "search: {kind: tpe, samples: 3, space: {inner_lr: {uniform: [0.1, 1]}}}"
    text = f"name: small\nbase: {{dataset: digits}}\n{search}\n"
    (tmp_path / "small.yaml").write_text(text)
    said = ddsweep("run", "small.yaml", cwd=tmp_path)
    assert (said.returncode, said.stdout) == (1, "") and len(said.stderr.splitlines()) == 1
    assert "pip install 'ddsweep[optuna]'" in said.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]
    assert ddsweep("plan", "small.yaml", cwd=tmp_path).returncode == 0, "looking needs no Optuna"
