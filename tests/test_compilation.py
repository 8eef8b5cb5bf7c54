"""Whether a trial's inner steps are compiled, where the code is kept, and what becomes of a failure."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

import ddsweep.core.methods.bptt
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.compilation import check_compiler, compiles, pays_to_compile, prepare_compilation
from ddsweep.data.load import load_splits
from ddsweep.errors import SettingError, UserError
from ddsweep.results.artifacts import load_tensors
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import expand, load_sweep
from ddsweep.trial import distil_trial, read_distilled
from ddsweep.trial_plan import TrialSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def trial(network: str, **settings: Any) -> TrialSpec:
    dataset = DATASETS["mnist" if network == "lenet" else "digits"]
    return TrialSpec(dataset, network=network, **{"outer_steps": 50_000, "models_per_step": 4} | settings)


def test_auto_is_a_static_rule_on_the_work_ahead() -> None:
    """On the CPU compiled steps are the faster ones for small networks with norms alone."""
    small = trial("convnet(depth=2,width=32)")
    assert pays_to_compile(CPU, small)
    assert not pays_to_compile(CPU, trial("convnet(depth=2,width=32)", outer_steps=49_999))
    assert pays_to_compile(CPU, trial("convnet(depth=2,width=32)", outer_steps=25_000, inner_epochs=2))
    assert not pays_to_compile(CPU, trial("convnet(depth=2,width=32)", models_per_step=8))
    assert not pays_to_compile(CPU, trial("convnet(depth=2,width=32,norm=none)"))
    assert not pays_to_compile(CPU, trial("lenet", init="fixed"))
    assert not pays_to_compile(CUDA, small), "a recorded graph is as fast"


def test_no_trial_of_the_quickstart_is_compiled() -> None:
    sweep = load_sweep(Path(__file__).parents[1] / "sweeps" / "quickstart.yaml")
    found = expand(sweep, lambda name: DATASETS[name]).trials
    assert found and not any(pays_to_compile(CPU, one) for one in found)


def test_without_a_compiler_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, small = tmp_path / "c++", trial("convnet(depth=2,width=32)")
    compiler.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert compiles("auto", CPU, small) and not compiles("off", CPU, small)
    assert compiles("on", CPU, trial("lenet"))
    compiler.unlink()
    assert not compiles("auto", CPU, small) and not compiles("off", CPU, small)
    for here in (lambda: compiles("on", CPU, small), lambda: check_compiler("on")):
        with pytest.raises(UserError, match=r"resources\.compile: on, but there is no C\+\+ compiler here"):
            here()
    monkeypatch.setenv("CXX", "my-c++")
    with pytest.raises(UserError, match="looked for CXX, 'my-c\\+\\+'"):
        check_compiler("on")


def test_on_and_off_in_a_sweep_file(tmp_path: Path) -> None:
    """YAML 1.1 reads them as true and false."""
    file = tmp_path / "sweep.yaml"
    for text, expected in (("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on")):
        file.write_text(
            "name: one\nbase: {dataset: digits, images_per_class: 1, inner_steps: 1}\n"
            f"resources: {{compile: {text}}}\n"
        )
        assert load_sweep(file).resources.compile == expected
        assert load_sweep(file, ["resources.compile=off"]).resources.compile == "off"
    with pytest.raises(SettingError, match=r"resources\.compile: 'always' is not one of auto, on, off"):
        load_sweep(file, ["resources.compile=always"])


def test_compiled_code_is_kept_in_a_folder_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prepare_compilation()
    folder = tmp_path / "ddsweep" / "compiled"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    folder.chmod(0o770)
    with pytest.raises(UserError, match="is open to others, and what lies there is run; `chmod 700` it"):
        prepare_compilation()
    folder.rmdir()
    folder.touch()
    with pytest.raises(UserError, match=r"compiled cannot be made \(File exists\); set XDG_CACHE_HOME"):
        prepare_compilation()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    prepare_compilation()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere", "it is the user's to say"


SPEC = TrialSpec(
    dataset=DATASETS["digits"],
    **{"network": "convnet(depth=1,width=4,norm=none)", "inner_epochs": 2, "outer_steps": 4},
    **{"models_per_step": 2, "real_batch": 32, "selection_networks": 1, "dtype": "float64"},
)


def test_a_trial_that_torch_cannot_compile_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    real, plans = ddsweep.core.methods.bptt.outer_gradient, []

    def outer_gradient(*arguments, **more):
        plans.append(arguments[5].compile)
        if arguments[5].compile:
            raise BackendCompilerFailed(print, RuntimeError("no such instruction"), None)
        return real(*arguments, **more)

    monkeypatch.setattr(ddsweep.core.methods.bptt, "outer_gradient", outer_gradient)
    splits = load_splits(SPEC.dataset, None, validation_fraction=0.1, split_seed=0)
    compiled, plain = SweepDirectory(tmp_path / "compiled"), SweepDirectory(tmp_path / "plain")
    assert distil_trial(SPEC, splits, compiled, TrialSettings(compile="on"))
    assert plans == [True, *[False] * 4]
    _, header = load_tensors(compiled.checkpoint(SPEC.trial_id))
    assert header["plan"]["compile"] is False and header["n_replans"] == 1
    assert distil_trial(SPEC, splits, plain, TrialSettings(compile="off"))
    found, expected = (read_distilled(SPEC, directory) for directory in (compiled, plain))
    assert torch.equal(found.images, expected.images)
    assert json.loads(found.provenance["execution_plan"])["compile"] is False
