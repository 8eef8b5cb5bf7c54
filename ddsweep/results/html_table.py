"""The trials of a sweep as an HTML table, for a notebook."""

from __future__ import annotations

from dataclasses import fields

import pandas as pd

from ddsweep.catalog import DEFAULT_METHOD, TrialSpec, find_method

__all__ = ["trials_html"]

_OUTCOME = {"val_score": "", "test_accuracy_mean": "test_accuracy_std", "gain_mean": "gain_ci95"}
"""Columns of fractions, each with the column of its ±."""

_MOST_ROWS, _MOST_SETTINGS = 50, 8


def trials_html(trials: pd.DataFrame) -> str:
    """``trials`` with the settings in which they differ, at most eight, their status, and their accuracy in
    percent; beyond 50 rows the first and the last."""
    settings = [item.name for item in fields(TrialSpec) if item.name in trials]
    differ = [name for name in settings if trials.loc[_having(trials, name), name].nunique(False) > 1]
    table = trials[["trial_id", *differ[:_MOST_SETTINGS], "status"]].copy()
    for name, spread in _OUTCOME.items():
        if name in trials:
            table[f"{name.removesuffix('_mean')}, %"] = [
                _percent(value, plus_minus)
                for value, plus_minus in zip(
                    trials[name], trials[spread] if spread else [None] * len(trials), strict=True
                )
            ]
    text: str = table.to_html(index=False, border=0, na_rep="", max_rows=_MOST_ROWS)
    return text


def _having(trials: pd.DataFrame, name: str) -> pd.Series[bool]:
    """The rows in which the setting ``name`` means something: those whose method has it. A fixed trial
    has one model per step, also if more are asked for."""
    methods = trials["method"] if "method" in trials else pd.Series(DEFAULT_METHOD, trials.index)
    lacking = [name in find_method(method).lacks for method in methods.fillna(DEFAULT_METHOD)]
    having = ~pd.Series(lacking, trials.index, dtype=bool)
    return having & (trials["init"] != "fixed") if name == "models_per_step" else having


def _percent(value: float | None, plus_minus: float | None) -> str:
    if pd.isna(value):
        return ""
    text = f"{100 * value:.1f}"
    return text if pd.isna(plus_minus) else f"{text} ± {100 * plus_minus:.1f}"
