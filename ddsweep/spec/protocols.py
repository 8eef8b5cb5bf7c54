"""``evaluate.protocols``: words and mappings, and the check that they are possible for the trials of a
sweep."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ddsweep.catalog import PROTOCOLS, EvaluationSpec, Protocol, TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.errors import SettingError
from ddsweep.spec.values import Problem, refuse, setting, shown, unknown, word

__all__ = ["check_evaluation", "protocols_of"]

_LISTED = 5
"""The number of impossible combinations that a message lists."""

_MAPPING = "a mapping of changes such as {network: lenet} or {order: shuffled, inner_lr: 0.1}"


def protocols_of(value: Any) -> tuple[str | dict[str, Any], ...]:
    """The entries of ``evaluate.protocols``, typed: words stay, mappings have the settings of a
    `Protocol`."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{shown(value)} is not a list; each entry is {', '.join(PROTOCOLS)}, or {_MAPPING}")
    problems: list[Problem] = []
    entries: dict[str, str | dict[str, Any]] = {}
    for place, given in enumerate(value):
        where = f"evaluate.protocols[{place}]"
        wrong: list[Problem] = []
        name, entry = (_mapping if isinstance(given, dict) else _word)(given, where, wrong)
        if not wrong and name in entries:
            wrong.append((where, f"{name!r} is there twice; give each a name of its own"))
        problems += wrong
        entries[name] = entry
    refuse(problems)
    return tuple(entries.values())


def _word(given: Any, where: str, problems: list[Problem]) -> tuple[str, str]:
    try:
        word(given, PROTOCOLS)
    except ValueError as error:
        problems.append((where, f"{error}; or {_MAPPING}"))
    return str(given), given


def _mapping(given: dict[Any, Any], where: str, problems: list[Problem]) -> tuple[str, dict[str, Any]]:
    """(name, the given settings with corrected types)"""
    out: dict[str, Any] = {}
    for key, value in given.items():
        try:
            out[key] = _change(key, value)
        except KeyError:
            hint = '; a network with parameters needs quotes: {network: "convnet(depth=2,width=64)"}'
            what = unknown(key, ("name", *Protocol.settings()))
            problems.append((f"{where}.{key}", what + (hint if "=" in str(key) else "")))
        except ValueError as error:
            problems.append((f"{where}.{key}", str(error)))
    if problems:
        return "", out
    try:
        return Protocol(**out).name, out
    except SettingError as error:
        problems.append((where, str(error)))
        return "", out


def _change(key: Any, value: Any) -> Any:
    """Raises `KeyError` for an unknown key, `ValueError` for an impossible value."""
    if key == "name":
        if not isinstance(value, str) or not value:
            raise ValueError(f"{value!r} is not a name")
        return value
    if key not in Protocol.settings():
        raise KeyError(key)
    return setting(_TYPED_LIKE.get(key, key), value)


_TYPED_LIKE = {
    **{"weight_decay": "inner_lr", "inner_batch": "real_batch", "inner_schedule": "outer_schedule"},
    **{"inner_decay_epochs": "outer_decay_steps", "inner_decay_factor": "outer_decay_factor"},
}
"""What is no setting of a trial has the values of one that is."""


def check_evaluation(
    sweep: str, evaluation: EvaluationSpec, trials: Sequence[tuple[str, TrialSpec]], *, skip_invalid: bool
) -> tuple[tuple[str, str], ...]:
    """The impossible (protocol and combination, reason) pairs for ``trials`` and their combinations.

    Raises `SettingError` if there are any and not ``skip_invalid``, for a protocol that no trial allows, and
    for more neighbours than a trial has images.
    """
    _check_neighbours(sweep, evaluation, trials)
    left_out: list[tuple[str, str]] = []
    for protocol in evaluation.protocols:
        if isinstance(protocol, str):
            continue
        impossible = [(text, why) for text, trial in trials if (why := _impossible(protocol, trial))]
        if impossible and (not skip_invalid or len(impossible) == len(trials)):
            raise SettingError(_message(sweep, protocol, impossible, len(trials)))
        left_out += [(f"{protocol.name} of {text}", why) for text, why in impossible]
    return tuple(left_out)


def _impossible(protocol: Protocol, trial: TrialSpec) -> str | None:
    try:
        protocol.applied_to(trial)
    except SettingError as error:
        return str(error)
    return None


def _message(sweep: str, protocol: Protocol, impossible: Sequence[tuple[str, str]], count: int) -> str:
    head = f"sweep {sweep}: evaluate.protocols: {protocol.name} is impossible for {len(impossible)} of"
    lines = [f"{head} {counted(count, 'trial')}:"]
    lines += [f"  {text}: {why}" for text, why in itertools.islice(impossible, _LISTED)]
    if len(impossible) > _LISTED:
        lines.append(f"  ... and {len(impossible) - _LISTED} more")
    if len(impossible) < count:
        lines.append("Change it, or set `skip_invalid: true` to leave it out for them.")
    return "\n".join(lines)


def _check_neighbours(
    sweep: str, evaluation: EvaluationSpec, trials: Sequence[tuple[str, TrialSpec]]
) -> None:
    if "neighbours" not in evaluation.baseline_settings():
        return
    for text, trial in trials:
        images = trial.images_per_class * trial.dataset.classes
        if evaluation.neighbours > images:
            raise SettingError(
                f"sweep {sweep}: evaluate.neighbours: {evaluation.neighbours} are more than the {images} "
                f"images of {text} (images_per_class x classes); give at most {images}, or leave the "
                "baselines knn_* out"
            )
