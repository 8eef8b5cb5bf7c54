"""A method of a user's own, from its file to whole tables; and what is refused before any trial starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddsweep import DistilledSet, load_results
from ddsweep.catalog import TrialSpec
from ddsweep.core.methods import method_of
from ddsweep.errors import UserError
from ddsweep.one_trial import FinishedTrial, run_trial
from ddsweep.own_code import load_code
from ddsweep.spec import load_sweep
from tests.conftest import Run
from tests.documents import ROOT

BLOCKS = [block.partition("\n")[2] for block in (ROOT / "docs" / "methods.md").read_text().split("```")[1::2]]
METHODS, SWEEP = BLOCKS

SMALL: dict[str, Any] = {
    **{"dataset": "digits", "network": "convnet(width=4)", "images_per_class": 1, "outer_steps": 6},
    **{"models_per_step": 2, "selection_networks": 2, "validate_every": 3},
}
OWN = {"file": "my_methods.py", "name": "GradientMatching", "real_per_class": 4}


@pytest.fixture
def mine(user_folder: Callable[..., Path]) -> Path:
    """A folder with the files of the page."""
    return user_folder({"my_methods.py": METHODS, "my_methods_sweep.yaml": SWEEP})


def trial(where: Path, **more: Any) -> FinishedTrial:
    return run_trial(
        {**SMALL, "method": OWN, **more}, where, evaluate={"networks": 2, "baselines": ["random_real"]}
    )


@pytest.mark.usefixtures("checked_here")
def test_from_its_file_to_whole_tables(mine: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    found = trial(results)
    spec = found.distilled.spec
    ref = spec.method_code
    assert ref is not None
    assert found.row["method"] == f"my_methods.py:GradientMatching(real_per_class=4)@{ref.digest}"
    assert (results / "code" / ref.digest / "my_methods.py").read_text() == METHODS
    assert found.row["inner_lr"] is None and found.row["real_per_class"] is None, "settings of other methods"
    assert TrialSpec.from_dict(spec.to_dict()) == spec
    again = DistilledSet.load(next(results.glob("artifacts/*/distilled.safetensors")))
    assert again.sha256 == found.distilled.sha256 and again.rates.unique().numel() == 1
    tables = load_results(results)
    assert set(tables.evals["source"]) == {"distilled", "random_real"}
    assert (tables.history["outer_loss"] > 0).all() and (tables.history["grad_norm"] > 0).all()


@pytest.mark.slow
@pytest.mark.usefixtures("checked_here")
@pytest.mark.parametrize("init", ["random", "fixed"])
def test_it_takes_the_network_of_the_page_on_networks(mine: Path, tmp_path: Path, init: str) -> None:
    """That has batch norm, which counts in whole numbers, and dropout."""
    page = (ROOT / "docs" / "networks.md").read_text()
    (mine / "my_nets.py").write_text(page.split("```")[1].partition("\n")[2])
    network = {"file": "my_nets.py", "name": "SmallNet", "width": 4}
    found = trial(tmp_path / "results", network=network, init=init)
    assert found.row["network"].startswith("my_nets.py:SmallNet(width=4)@")


@pytest.mark.usefixtures("checked_here")
def test_its_object_is_made_with_its_options(mine: Path, tmp_path: Path) -> None:
    found = trial(tmp_path / "results")
    assert found.distilled.spec.method_code is not None
    load_code(found.distilled.spec.method_code, tmp_path / "results" / "code")
    assert method_of(found.distilled.spec).real_per_class == 4  # type: ignore[attr-defined]


@pytest.mark.usefixtures("checked_here")
def test_a_changed_file_makes_other_trials_and_the_old_copy_stays(mine: Path, tmp_path: Path) -> None:
    first = trial(tmp_path / "results").trial_id
    (mine / "my_methods.py").write_text(METHODS + "\n# changed\n")
    assert trial(tmp_path / "results").trial_id != first
    assert len(list((tmp_path / "results" / "code").iterdir())) == 2


def test_the_sweep_of_the_page_is_planned_and_its_file_checked_once(mine: Path, ddsweep: Run) -> None:
    assert load_sweep(mine / "my_methods_sweep.yaml").grid["method"][0] == "distribution_matching"
    cache = str(mine / "cache")
    said = ddsweep("plan", "my_methods_sweep.yaml", cwd=mine, XDG_CACHE_HOME=cache)
    assert said.returncode == 0, said.stderr
    assert "GradientMatching(real_per_class=16)" in said.stderr and "is being checked, once" in said.stderr
    said = ddsweep("plan", "my_methods_sweep.yaml", cwd=mine, XDG_CACHE_HOME=cache)
    assert said.returncode == 0 and "checked" not in said.stderr


@pytest.mark.usefixtures("checked_here")
def test_settings_of_other_methods_do_not_multiply_its_trials(mine: Path, ddsweep: Run) -> None:
    (mine / "grid.yaml").write_text(
        "name: grid\n"
        "base: {dataset: digits, network: convnet(width=4), images_per_class: 1}\n"
        "grid:\n"
        "  method: [bptt, {file: my_methods.py, name: GradientMatching}]\n"
        "  inner_lr: [0.02, 0.1]\n"
    )
    said = ddsweep("plan", "grid.yaml", cwd=mine)
    assert said.returncode == 0 and "3 trials" in said.stdout, said.stdout + said.stderr


REFUSED = {
    "no such name": ("class GradientMatching", "class Other", "has no 'GradientMatching'"),
    "an option too many": ("real_per_class=32):", "per_class=32):", "calling it failed: TypeError"),
    "a function is missing": ("def rates(", "def rate(", "no rates"),
    "raises": ("classes = task.spec", "classes = task.spek", "AttributeError"),
    "a wrong derivative": ('{"images": by}', '{"images": 2 * by}', "is not the derivative of the losses"),
    "a wrong shape": ('{"images": by}', '{"images": by[0]}', "by['images'] has shape"),
    "draws from elsewhere": ("seed = derive_seed", "seed = torch.seed() or derive_seed", "has another loss"),
    "no derivative": ('{"images": by}', "{}", "by has no 'images'"),
    "another type": (
        "NetworkGradients(losses,",
        "NetworkGradients(losses.float(),",
        "losses: torch.float32; compute in",
    ),
    "not finite": ("NetworkGradients(losses,", "NetworkGradients(losses * torch.nan,", "losses: not finite"),
    "a value of another type": (
        'return {"images": images}',
        'return {"images": images, "scale": torch.ones(1)}',
        "start()['scale'] is torch.float32 [1]; a learned value is",
    ),
    "a number": (
        'return {"images": images}',
        'return {"images": images, "x": images.sum()}',
        "at least one dim",
    ),
    "nothing": ('return {"images": images}', "return None", "start() is of type NoneType, not a dict"),
    "rates of another type": ("return None", "return [0.1]", "rates() is of type list; return finite [T]"),
    "rates that are no numbers": (
        "return None",
        "return torch.full((spec.steps,), torch.nan)",
        ", not finite; return finite [T]",
    ),
    "no images": ('return {"images": images}', 'return {"pixels": images}', "start() returns no `images`"),
}


@pytest.mark.usefixtures("checked_here")
@pytest.mark.parametrize(("old", "new", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_method_is_refused_before_any_trial(
    mine: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in METHODS
    (mine / "my_methods.py").write_text(METHODS.replace(old, new))
    with pytest.raises(UserError) as caught:
        trial(tmp_path / "results")
    assert said in str(caught.value) and "method: " in str(caught.value)
    assert not (tmp_path / "results").exists()
