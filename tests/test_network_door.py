"""Networks of users' own from a sweep file to the tables: distilled, judged, run only where that is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ddsweep import DistilledSet, apply
from ddsweep.catalog import TrialSpec
from ddsweep.data.load import load_splits
from ddsweep.errors import UserError
from ddsweep.one_trial import FinishedTrial, run_trial
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.reader import load_results
from ddsweep.spec import load_sweep
from ddsweep.trial import TrialJob, distil_together, distil_trial, read_distilled
from ddsweep.trial_plan import TrialSettings
from tests.companions import Cohort

NETS = '''
import torch
from torch import nn
from torch.nn import functional as F

from layers import Scale


class Drop(nn.Module):
    """Batch norm, dropout by a module and by a function, and a parameter of no layer."""

    def __init__(self, channels, classes, width=4):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.2)
        self.scale = Scale(width)
        self.head = nn.Linear(width * 16, classes)

    def forward(self, x):
        x = F.avg_pool2d(F.relu(self.scale(self.norm(self.conv(x))), inplace=True), 2)
        x = F.dropout2d(x, 0.1, self.training)
        return self.head(self.drop(x.flatten(1)))
'''
LAYERS = """
import torch
from torch import nn


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.free = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x):
        return x * self.free[:, None, None]
"""
SMALL = {
    **{"dataset": "digits", "images_per_class": 2, "inner_steps": 2, "outer_steps": 4, "models_per_step": 2},
    **{"real_batch": 64, "validate_every": 2, "selection_networks": 2, "inner_lr": 0.1},
}
MATCHING = {
    **{key: value for key, value in SMALL.items() if key not in ("real_batch", "inner_lr")},
    **{"method": "distribution_matching", "real_per_class": 8},
}
EVALUATE = {"networks": 4, "group_size": 4, "baselines": ["random_real"], "rates": [0.1], "epochs": [1]}


@pytest.fixture
def nets(user_folder: Callable[..., Path]) -> Path:
    return user_folder({"nets.py": NETS, "layers.py": LAYERS})


OWN = {"file": "nets.py", "name": "Drop", "width": 6}


def trial(network: Any, where: Path, **more: Any) -> FinishedTrial:
    return run_trial({**SMALL, "network": network, **more}, where, evaluate=EVALUATE)


@pytest.mark.usefixtures("checked_here")
def test_a_network_with_norms_dropout_and_a_free_parameter_is_distilled_and_judged(
    nets: Path, tmp_path: Path
) -> None:
    found = trial(OWN, tmp_path / "results")
    ref = found.distilled.spec.network_spec.code
    assert ref is not None and found.row["network"] == f"nets.py:Drop(width=6)@{ref.digest}"
    assert found.row["network_version"] is None and found.row["test_models"] == 4
    copies = tmp_path / "results" / "code" / ref.digest
    assert {path.name for path in copies.iterdir()} == {"nets.py", "layers.py"}
    assert found.row["test_accuracy_mean"] > 0.1
    evals = load_results(found.directory).evals
    assert set(evals["network"]) == {found.row["network"]} and set(evals["source"]) == {
        "distilled",
        "random_real",
    }
    again = TrialSpec.from_dict(found.distilled.spec.to_dict())
    assert again == found.distilled.spec and again.trial_id == found.trial_id
    # The network of the set, in this process, which has run its code: as evaluation has it.
    first, second = found.distilled.network(0), found.distilled.network(1)
    assert not torch.equal(first.scale.free, second.scale.free)
    assert torch.equal(first.scale.free, found.distilled.network(0).scale.free)
    splits = load_splits(found.distilled.spec.dataset, None, validation_fraction=0.1, split_seed=0)
    torch.manual_seed(1)  # whatever else a notebook draws
    for index in (0, 3):
        module = apply(found.distilled, found.distilled.network(index), index=index).eval()
        with torch.no_grad():
            answers = module(found.distilled.normalise(splits.test_images)).argmax(1)
        row = evals.query(f"source == 'distilled' and model_seed == {index} and inner_step == 2")
        expected = row["accuracy"].item()
        assert float((answers == splits.test_labels).double().mean()) == pytest.approx(expected, abs=0.004)


@pytest.mark.usefixtures("checked_here")
def test_an_option_that_is_a_list_comes_as_a_list(tmp_path: Path, user_folder: Callable[..., Path]) -> None:
    text = "from torch import nn\n\ndef net(channels, classes, side, widths):\n"
    text += "    sizes = [channels * side**2] + widths + [classes]\n"
    text += "    pairs = list(zip(sizes, sizes[1:]))\n"
    text += "    widths.clear()\n"  # the next call has a list of its own
    text += "    return nn.Sequential(nn.Flatten(), *(nn.Linear(a, b) for a, b in pairs))\n"
    user_folder({"lists.py": text})
    trial({"file": "lists.py", "name": "net", "widths": [6, 5]}, tmp_path / "results")
    (name,) = load_results(tmp_path / "results").trials["network"]
    assert "widths=[6,5]" in name


@pytest.mark.usefixtures("checked_here")
def test_a_trial_that_is_killed_goes_on_bit_for_bit(nets: Path, tmp_path: Path) -> None:
    whole = trial(OWN, tmp_path / "whole")
    spec = whole.distilled.spec
    splits = load_splits(spec.dataset, None, validation_fraction=0.1, split_seed=0)
    directory = SweepDirectory(tmp_path / "cut")
    directory.create()
    (tmp_path / "whole" / "code").rename(directory.code)
    torch.manual_seed(5)
    settings = TrialSettings(threads=1, checkpoint_every=1)
    for steps in (1, 2, 9):
        torch.rand(steps)  # whatever else a process draws
        left = iter([False] * steps)
        distil_trial(spec, splits, directory, settings, should_stop=partial(next, left, True))
    assert torch.equal(DistilledSet.load(directory.distilled(spec.trial_id)).images, whole.distilled.images)


@pytest.mark.usefixtures("checked_here")
def test_a_set_is_read_where_its_code_does_not_run(nets: Path, tmp_path: Path) -> None:
    (nets / "nets.py").write_text(NETS + f"\nopen({str(tmp_path / 'ran')!r}, 'a').write('x')\n")
    found = trial(OWN, tmp_path / "results")
    (tmp_path / "ran").unlink()
    code = f"""
from ddsweep import DistilledSet, load_results
found = DistilledSet.load({str(found.directory / "artifacts" / found.trial_id / "distilled.safetensors")!r})
print(found.images.shape, len(load_results({str(found.directory)!r}).trials))
try:
    found.network()
except Exception as error:
    print(type(error).__name__, error)
from ddsweep.cli import _exit_code
for words in (["status"], ["show", {found.trial_id!r}], ["best"]):
    assert _exit_code([*words, {str(found.directory)!r}]) == 0, words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([2, 10, 1, 8, 8]) 1\nUserError nets.py:Drop(width=6)@")
    assert "it does not run here" in done.stdout
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("checked_here")
@pytest.mark.parametrize("how", ["changed", "torn"])
def test_a_copy_that_was_changed_is_not_run(nets: Path, tmp_path: Path, how: str) -> None:
    found = trial(OWN, tmp_path / "results")
    ref = found.distilled.spec.network_spec.code
    assert ref is not None
    copy = found.directory / "code" / ref.digest / "layers.py"
    copy.write_text(LAYERS + "\nraise SystemExit('ran')\n" if how == "changed" else "")
    with pytest.raises(UserError, match="it is not run"):
        trial(OWN, tmp_path / "results", seed=1)


@pytest.mark.usefixtures("checked_here")
def test_a_changed_file_makes_other_trials(nets: Path, tmp_path: Path) -> None:
    first = trial(OWN, tmp_path / "results")
    (nets / "layers.py").write_text(LAYERS.replace("0.1 *", "0.2 *"))
    second = trial(OWN, tmp_path / "results")
    assert first.trial_id != second.trial_id and not torch.equal(
        first.distilled.images, second.distilled.images
    )
    assert len(list((tmp_path / "results" / "code").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("checked_here")
def test_matching_goes_by_what_the_last_layer_is_given(nets: Path, tmp_path: Path) -> None:
    found = run_trial({**MATCHING, "network": OWN}, tmp_path / "results", evaluate=EVALUATE)
    assert found.row["test_accuracy_mean"] > 0.1

    headless = NETS.replace("return self.head(", "return F.linear(").replace(
        "x.flatten(1)))", "x.flatten(1)), self.head.weight)"
    )
    (nets / "nets.py").write_text(headless)
    with pytest.raises(UserError, match=r"distribution_matching compares .* end it with a"):
        run_trial({**MATCHING, "network": OWN}, tmp_path / "other", evaluate=EVALUATE)


@pytest.mark.slow
def test_torchvisions_resnet_is_distilled_and_judged(nets: Path, tmp_path: Path) -> None:
    network = {"module": "torchvision.models", "name": "resnet18"}
    small = {
        "outer_steps": 1,
        "images_per_class": 1,
        "inner_steps": 1,
        "models_per_step": 1,
        "real_batch": 16,
    }
    small |= {"selection_networks": 1, "validate_every": 1, "inner_lr": 0.02}
    evaluate = {**EVALUATE, "networks": 1, "group_size": 1, "baselines": []}
    found = run_trial(
        {"dataset": "digits(channels=3,size=16)", "network": network, **small},
        tmp_path / "results",
        evaluate=evaluate,
    )
    assert found.row["network"] == "torchvision.models:resnet18"
    assert found.row["network_version"].startswith("torchvision 0.")
    assert torch.isfinite(found.distilled.images).all() and found.row["n_diverged"] == 0
    assert not (tmp_path / "results" / "code").exists()


# ------------------------------------------------------------------------------------------- plan


CHAIN = """
from torch import nn
from torch.nn import functional as F


class Chain(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(F.avg_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1))
"""


@pytest.mark.usefixtures("checked_here")
def test_trials_of_a_chain_of_layers_share_a_process_and_have_the_bits_that_they_have_alone(
    nets: Path, tmp_path: Path, ddsweep: Callable[..., Any]
) -> None:
    (nets / "chain.py").write_text(CHAIN)
    own = {"file": "chain.py", "name": "Chain"}
    (nets / "sweep.yaml").write_text(
        json.dumps({"name": "chain", "seeds": 3, "base": SMALL | {"network": own}})
    )
    said = ddsweep("plan", "sweep.yaml")
    assert said.returncode == 0, said.stderr
    assert "3 trials share processes with others of their shape" in " ".join(said.stdout.split())
    alone = [trial(own, tmp_path / "alone", seed=seed) for seed in range(3)]
    directory = SweepDirectory(tmp_path / "together")
    specs = [found.distilled.spec for found in alone]
    splits = load_splits(specs[0].dataset, None, validation_fraction=0.1, split_seed=0)
    jobs = [TrialJob(spec, splits, directory, TrialSettings(cohort=3)) for spec in specs]
    distil_together(Cohort([jobs]))
    for spec, found in zip(specs, alone, strict=True):
        again = read_distilled(spec, directory)
        assert again.sha256 == found.distilled.sha256 and again.provenance["cohort_size"] == 3


def test_plan_reads_and_never_runs_a_file_in_its_own_process(
    nets: Path, tmp_path: Path, ddsweep: Callable[..., Any]
) -> None:
    sweep = """
name: door
base: {dataset: digits, outer_steps: 2}
grid:
  network: [convnet, {file: nets.py, name: Drop, width: 6}, "convnet(width=4)"]
evaluate: {protocols: [as_distilled, {network: {file: nets.py, name: Drop, width: 3}}]}
"""
    (nets / "nets.py").write_text("import sys\nassert 'typer' not in sys.modules\n" + NETS)
    (nets / "sweep.yaml").write_text(sweep)
    for said in (2, 0):  # kept: the second time nothing is measured
        done = ddsweep("plan", "sweep.yaml", XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("is being checked and measured, once, in a process of its own") == said
        assert "Drop(width=6)" in done.stdout


@pytest.mark.usefixtures("checked_here")
def test_a_size_that_was_not_measured_is_measured_once(tmp_path: Path, ddsweep: Callable[..., Any]) -> None:
    for said in (1, 0):
        words = ("plan", "quickstart", "dataset=digits(size=67)", "network=convnet(depth=1,width=2)")
        done = ddsweep(*words, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        assert (
            done.stderr.count("width=2,norm=instance): is being measured, once, in a process of its own")
            == said
        )


REFUSED = {
    "no second derivative": (
        "return F.hardsigmoid(self.head(x.flatten(1)))",
        "its gradient cannot be differentiated again",
    ),
    "hidden from autograd": (
        "return self.head(x.flatten(1)) * x.detach().square().mean()",
        "hidden from autograd",
    ),
    "another shape": ("return x", "it makes [2, 6, 4, 4] of 2 images, not [2, 10], a logit for each class"),
    "a tuple": (
        "return self.head(x.flatten(1)), x",
        "it makes a tuple; forward must return the logits alone",
    ),
    "not finite": (
        "return self.head(x.flatten(1)) * torch.nan",
        "its logits at its first weights are not finite",
    ),
    "probabilities": (
        "return self.head(x.flatten(1)).softmax(1)",
        "its outputs are probabilities, which add up to one for each image; leave the last softmax out",
    ),
    "raises": (
        "return self.nothing(x)",
        "nets.py, line 23, in forward: AttributeError: 'Drop' object has no",
    ),
    "remembers": (
        "self.seen = getattr(self, 'seen', 0) + 1; return self.head(x.flatten(1)) * self.seen",
        "two passes over the same images differ",
    ),
    "draws when it is tested": (
        "return self.head(x.flatten(1)) + 0 * torch.rand(10)",
        "draws random numbers in evaluation mode",
    ),
}


@pytest.mark.usefixtures("checked_here")
@pytest.mark.parametrize(("line", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_distilled_through_is_refused_before_any_trial(
    nets: Path, tmp_path: Path, line: str, said: str
) -> None:
    (nets / "nets.py").write_text(NETS.replace("return self.head(self.drop(x.flatten(1)))", line))
    with pytest.raises(UserError) as caught:
        trial(OWN, tmp_path / "results")
    assert said in str(caught.value) and str(caught.value).startswith("network: nets.py:Drop(width=6)@")
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("checked_here")
@pytest.mark.parametrize(
    "own",
    [
        "self.free = nn.Parameter(torch.full((width,), 1 + random.random()))",
        "self.free = nn.Parameter(torch.full((width,), 1 + float(np.random.rand())))",
        "self.free = nn.Parameter(1 + 0.1 * torch.randn(width)); "
        "self.register_buffer('seen', torch.tensor(random.random()), persistent=False)",
        "self.free = nn.Parameter(torch.ones(width)); self.times = random.random()",
        "self.free = nn.Parameter(torch.ones(width)); self.times = random.choice((1.0, 2.0))",
    ],
)
def test_what_building_draws_comes_from_torch(nets: Path, tmp_path: Path, own: str) -> None:
    """A seed decides what a network is, or trials of one id would differ."""
    (nets / "layers.py").write_text(
        LAYERS.replace("self.free = nn.Parameter(1 + 0.1 * torch.randn(width))", own)
        .replace("import torch\n", "import random\n\nimport numpy as np\nimport torch\n", 1)
        .replace("return x * ", "return x * getattr(self, 'times', 1) * ")
    )
    with pytest.raises(UserError, match="two networks that are built with the same seed differ"):
        trial(OWN, tmp_path / "results")


@pytest.mark.usefixtures("checked_here")
def test_weights_that_a_law_fills_may_come_from_anywhere(nets: Path, tmp_path: Path) -> None:
    head = "self.head = nn.Linear(width * 16, classes)"
    filled = f"import random\n{NETS}".replace(
        head, f"{head}\n        self.head.weight.data.fill_(random.random())"
    )
    (nets / "nets.py").write_text(filled)
    made = [trial(OWN, tmp_path / place / "results").distilled.sha256 for place in ("a", "b")]
    assert made[0] == made[1]


@pytest.mark.usefixtures("checked_here", "nets")
def test_what_is_not_compiled_is_refused_before_any_trial(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"compile: on: nets\.py:Drop\(width=6\)@\w+ is code of your own"):
        run_trial({**SMALL, "network": OWN}, tmp_path / "results", resources={"compile": "on"})
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("checked_here")
def test_a_parameter_may_be_a_single_number(nets: Path, tmp_path: Path) -> None:
    free = "nn.Parameter(1 + 0.1 * torch.randn(width))"
    single = LAYERS.replace(free, "nn.Parameter(torch.tensor(1.0))").replace("[:, None, None]", "")
    (nets / "layers.py").write_text(single)
    assert 0 <= trial(OWN, tmp_path / "results").row["test_accuracy_mean"] <= 1


@pytest.mark.usefixtures("checked_here")
@pytest.mark.parametrize(
    "nothing_to_match",
    [
        "self.head(x.flatten(1)) * 2",  # the logits are not what the last layer gives
        "self.head(x.flatten(1)).relu()",
        "alone",
    ],
)
def test_matching_needs_features(nets: Path, tmp_path: Path, nothing_to_match: str) -> None:
    text = NETS.replace("self.head(self.drop(x.flatten(1)))", nothing_to_match)
    if nothing_to_match == "alone":
        text = (
            "from torch import nn\n\ndef Drop(shape, classes, width):\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))\n"
        )
    (nets / "nets.py").write_text(text)
    with pytest.raises(UserError, match=r"end it with a torch\.nn\.Linear whose output are the logits"):
        run_trial({**MATCHING, "network": OWN}, tmp_path / "results", evaluate=EVALUATE)


@pytest.mark.usefixtures("checked_here")
def test_a_network_that_asks_for_one_side_is_not_given_the_height(
    user_folder: Callable[..., Path], tmp_path: Path
) -> None:
    user_folder(
        {
            "nets.py": "from torch import nn\n\ndef net(channels, side, classes):\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, classes))\n",
            "data.py": "import numpy as np\n\ndef wide():\n"
            "    images = np.random.default_rng(0).integers(0, 256, (40, 4, 6), np.uint8)\n"
            "    labels = np.arange(20) % 2\n"
            "    return {'train': (images[:20], labels), 'test': (images[20:], labels)}\n",
        }
    )
    settings = {**SMALL, "dataset": {"file": "data.py", "name": "wide"}}
    with pytest.raises(UserError, match="it takes side, and the images are 4 x 6 pixels; take shape"):
        run_trial({**settings, "network": {"file": "nets.py", "name": "net"}}, tmp_path / "results")
    network = {"file": "nets.py", "name": "net", "side": 4}  # one's own: its logits then say what is wrong
    with pytest.raises(UserError, match="mat1 and mat2 shapes cannot be multiplied"):
        run_trial({**settings, "network": network}, tmp_path / "results")
    with pytest.raises(UserError, match="takes square images, not images of 1x4x6; `size: N` of a data set"):
        run_trial({**settings, "network": "convnet"}, tmp_path / "results")


@pytest.mark.usefixtures("checked_here")
def test_what_the_page_shows_works(nets: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "networks.md").read_text()
    blocks = [block.partition("\n")[2] for block in page.split("```")[1::2]]
    (nets / "my_nets.py").write_text(blocks[0])
    (nets / "my_sweep.yaml").write_text(blocks[1])
    networks = load_sweep(nets / "my_sweep.yaml").grid["network"]
    assert networks[0] == "convnet" and networks[1].startswith("my_nets.py:SmallNet(width=16)@")
    trial({"file": "my_nets.py", "name": "SmallNet", "width": 16}, nets / "results" / "my_sweep")
    script = blocks[-1] + "\nprint(type(network).__name__, len(network.state_dict()))\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "SmallNet 10\n"
