"""Trials x protocols, from the files of a sweep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ddsweep.catalog import EvaluationSpec, Protocol
from ddsweep.report.summary import summarise
from ddsweep.report.transfer_table import transfer, transfer_table

from .conftest import Folder, spec, text

SHUFFLED, LONGER = Protocol(order="shuffled"), Protocol(name="longer", inner_epochs=4)
WIDER = Protocol(network="convnet(width=16)")
EVALUATION = EvaluationSpec(
    networks=2, group_size=2, protocols=("as_distilled", "on_random", SHUFFLED, LONGER, WIDER)
)
RANDOM, FIXED = spec(), spec(init="fixed", seed=3)


def no_torn(path: Path) -> None:
    raise AssertionError(path)


@pytest.fixture
def judged(folder: Folder) -> Folder:
    """A random and a fixed trial. What ends with 2 epochs is at step 4, ``longer`` at step 8."""
    for trial in (RANDOM, FIXED):
        folder.trial(trial, EVALUATION)
        own = (3,) if trial is FIXED else (0, 1)
        at = {"as_distilled": (4, own, 0.5), "order=shuffled": (4, own, 0.4), "longer": (8, own, 0.6)}
        at[WIDER.name] = (4, (0, 1), 0.3)
        if trial is FIXED:
            at["on_random"] = (4, (0, 1), 0.2)
        for protocol, (last, indices, start) in at.items():
            steps = {0: 0.1, 2: 0.15, 4: 0.15, last: start, last + 2: 0.9}
            rows = {
                ("distilled", protocol, step): [
                    (i, value + (0.1 * n if value == start else 0)) for n, i in enumerate(indices)
                ]
                for step, value in steps.items()
            }
            rows["random_real", protocol, last] = [(i, 0.9) for i in indices]
            folder.evals(trial, protocol, 0, rows)
    return folder


def test_each_set_is_read_at_the_end_of_the_epochs_of_each_protocol(judged: Folder) -> None:
    found = transfer(judged.directory, [RANDOM, FIXED], EVALUATION, no_torn)
    means = {t: {p: (round(a.mean, 9), a.n) for p, a in of.items()} for t, of in found.items()}
    assert means == {
        RANDOM.trial_id: {
            "as_distilled": (0.55, 2),
            "order=shuffled": (0.45, 2),
            "longer": (0.65, 2),
            WIDER.name: (0.35, 2),
        },
        FIXED.trial_id: {
            "as_distilled": (0.5, 1),
            "order=shuffled": (0.4, 1),
            "longer": (0.6, 1),
            WIDER.name: (0.35, 2),
            "on_random": (0.25, 2),
        },
    }
    assert found[RANDOM.trial_id]["longer"].std == pytest.approx(0.0707, abs=1e-4)


def test_the_table_has_a_line_for_each_trial_and_a_column_for_each_protocol(judged: Folder) -> None:
    table = transfer_table(judged.directory, [RANDOM, FIXED], EVALUATION, no_torn, 200)
    assert table is not None
    lines = text(table, 200).splitlines()
    (head,) = [line for line in lines if line.startswith("trial")]
    protocols = ["as_distilled", "on_random", "order=shuffled", "longer", "convnet(width=16)"]
    assert head.split()[-5:] == protocols
    (own,) = [line.split() for line in lines if line.startswith(RANDOM.trial_id)]
    numbers = "55.0 ± 7.1 (2) – 45.0 ± 7.1 (2) 65.0 ± 7.1 (2) 35.0 ± 7.1 (2)"
    assert " ".join(own).endswith(f"random 0 {numbers}")
    (own,) = [line.split() for line in lines if line.startswith(FIXED.trial_id)]
    assert " ".join(own).endswith("fixed 3 50.0 (1) 25.0 ± 7.1 (2) 40.0 (1) 60.0 (1) 35.0 ± 7.1 (2)")


def test_where_it_is_too_wide_there_is_a_line_for_each_pair(judged: Folder) -> None:
    table = transfer_table(judged.directory, [RANDOM, FIXED], EVALUATION, no_torn, 110)
    assert table is not None
    shown = text(table, 110)
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert any(
        line.startswith(RANDOM.trial_id) and line.endswith("as_distilled 55.0 ± 7.1 (2)") for line in lines
    )
    assert lines.count("longer 65.0 ± 7.1 (2)") == 1
    assert lines.count("network=convnet(width=16) 35.0 ± 7.1 (2)") == 2
    assert "…" not in shown


def test_networks_that_diverged_are_counted(folder: Folder) -> None:
    folder.trial(RANDOM, EVALUATION)
    rows = {("distilled", "longer", 8): [(0, 0.5), (1, 0.0)]}
    folder.evals(RANDOM, "longer", 0, rows, diverged=True)
    table = transfer_table(folder.directory, [RANDOM], EVALUATION, no_torn, 200)
    assert table is not None and "25.0 ± 35.4 (2, 2 div)" in text(table, 200)


def test_there_is_no_table_without_protocols_of_ones_own_or_without_their_rows(judged: Folder) -> None:
    words = replace(EVALUATION, protocols=("as_distilled", "on_random"))
    assert transfer_table(judged.directory, [RANDOM, FIXED], words, no_torn) is None
    other = replace(EVALUATION, protocols=("as_distilled", Protocol(name="longer", inner_epochs=5)))
    assert transfer_table(judged.directory, [RANDOM, FIXED], other, no_torn) is None, "not evaluated so"
    assert transfer_table(judged.directory, [spec(seed=9)], EVALUATION, no_torn) is None


def test_a_torn_part_is_named_and_left_out(judged: Folder) -> None:
    torn: list[Path] = []
    part = judged.directory.evals_part(RANDOM.trial_id, "longer", RANDOM.init_law, 0)
    part.write_bytes(part.read_bytes()[:40])
    found = transfer(judged.directory, [RANDOM], EVALUATION, torn.append)
    assert torn == [part]
    assert "longer" not in found[RANDOM.trial_id] and "as_distilled" in found[RANDOM.trial_id]


def test_the_summary_is_of_the_own_networks_and_order_only(judged: Folder) -> None:
    found = summarise(judged.directory, [RANDOM.trial_id, FIXED.trial_id])
    assert [round(summary.test.mean, 9) for summary in found if summary.test] == [0.55, 0.5]
    assert [summary.on_random and round(summary.on_random.mean, 9) for summary in found] == [None, 0.25]
