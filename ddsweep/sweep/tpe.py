"""The next sample of a guided search, by Optuna's TPE from the scores of the samples before it.

Nothing is kept between two proposals: all that counts is what was tried, and that is in the files. So a
search goes on after a kill, on another machine, and when samples are added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from ddsweep.errors import UserError
from ddsweep.seeds import derive_seed
from ddsweep.spec import SearchSpec, SweepSpec

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

__all__ = ["Tried", "propose", "require_optuna"]

_ATTEMPTS = 10
"""How often TPE is asked for a sample that is new and possible; then one is drawn."""
_NEW = 200
"""So many new samples are looked at for a possible one."""


@dataclass(frozen=True)
class Tried:
    """A sample and how it did: its ``score``, the mean over seeds, is None as long as one is not at its end.
    ``stopped_at`` is the outer step at which a scheduler stopped it."""

    values: Mapping[str, Any]
    score: float | None = None
    stopped_at: int | None = None


def require_optuna(sweep: SweepSpec) -> None:
    """Raises `UserError` if the sweep has a guided search and Optuna is not installed."""
    if sweep.search is not None and sweep.search.guided and find_spec("optuna") is None:
        raise UserError(
            f"search.kind: {sweep.search.kind} needs Optuna, which comes with the extra: "
            "pip install 'ddsweep[optuna]'"
        )


def propose(
    search: SearchSpec,
    key: str,
    tried: Sequence[Tried],
    possible: Callable[[dict[str, Any]], bool] = lambda values: True,
) -> dict[str, Any] | None:
    """A sample that is not among the ``tried`` and is ``possible``; None if none was found.

    A pure function of its arguments; ``key`` is that of the search. A sample without a score counts as a poor
    one, so that several at a time lie apart. One that was stopped counts as worse than all that were not. As
    long as there is no score at all, samples are drawn.
    """
    before = [one.values for one in tried]

    def is_new(values: dict[str, Any]) -> bool:
        return values not in before and possible(values)

    scored = any(one.score is not None for one in tried)
    for attempt in range(_ATTEMPTS if scored else 0):
        seed = derive_seed("proposal", search.seed, key, len(tried), attempt)
        if is_new(values := _suggested(search, tried, seed)):
            return values
    drawn = (search.draw(number) for number in range(len(tried) + _NEW))
    new = (values for values in chain(drawn, search.all_samples()) if values not in before)
    return next(filter(possible, islice(new, _NEW)), None)


def _suggested(search: SearchSpec, tried: Sequence[Tried], seed: int) -> dict[str, Any]:
    import optuna

    space = _distributions(search)
    sampler = optuna.samplers.TPESampler(n_startup_trials=0, constant_liar=True, seed=seed % 2**32)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials([_trial(search, one, space) for one in tried])
        suggested = study.ask(space).params
    finally:
        optuna.logging.set_verbosity(verbosity)
    return {name: _own(search, name, value) for name, value in suggested.items()}


def _trial(search: SearchSpec, tried: Tried, space: dict[str, BaseDistribution]) -> FrozenTrial:
    import optuna

    made: FrozenTrial
    params = {name: _optunas(search, name, value) for name, value in tried.values.items()}
    states = optuna.trial.TrialState
    if tried.score is None:
        made = optuna.trial.create_trial(state=states.RUNNING, params=params, distributions=space)
    elif tried.stopped_at is None:
        made = optuna.trial.create_trial(value=tried.score, params=params, distributions=space)
    else:
        scores = {tried.stopped_at: tried.score}
        made = optuna.trial.create_trial(
            state=states.PRUNED, params=params, distributions=space, intermediate_values=scores
        )
    return made


def _distributions(search: SearchSpec) -> dict[str, BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    out: dict[str, BaseDistribution] = {}
    for name, given in search.space.items():
        ((kind, values),) = given.items()
        if kind == "choice":
            out[name] = CategoricalDistribution(range(len(values)))
        elif kind == "integer":
            out[name] = IntDistribution(values[0], values[1])
        else:
            out[name] = FloatDistribution(values[0], values[1], log=kind == "log_uniform")
    return out


def _optunas(search: SearchSpec, name: str, value: Any) -> Any:
    """A value as Optuna has it: that of a choice is its place, because it may be of any type."""
    choices = search.space[name].get("choice")
    return value if choices is None else choices.index(value)


def _own(search: SearchSpec, name: str, value: Any) -> Any:
    choices = search.space[name].get("choice")
    return search.rounded(name, value) if choices is None else choices[value]
