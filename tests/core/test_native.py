"""Test passes by compiled code: what torch says, to rounding, and torch's where there is no compiler."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.catalog import DATASETS, TrialSpec, parse_network
from ddsweep.core import native
from ddsweep.core.derivatives import derivatives_of
from ddsweep.core.evaluate import count_right
from ddsweep.core.execution import choose_plan
from ddsweep.core.images import RealSet
from ddsweep.core.init import draw_networks
from ddsweep.core.layers import BiasReLU, Conv, Layer, Linear, MaxPool, Params, Tape
from ddsweep.core.native import NativeLogits, find_compiler, native_logits
from ddsweep.core.networks import build_network, forward_networks
from ddsweep.data.load import load_splits
from ddsweep.results.artifacts import load_tensors
from ddsweep.results.layout import SweepDirectory
from ddsweep.trial import distil_trial, read_distilled
from ddsweep.trial_plan import TrialSettings, first_plan

CPU = torch.device("cpu")
PARTS = ("images", "labels")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def unloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for compiled code of this process, which has loaded nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._loaded.cache_clear()
    yield tmp_path / "cache" / "ddsweep" / "compiled"
    native._loaded.cache_clear()


def lenet(shape: tuple[int, int, int] = (1, 28, 28), count: int = 3) -> tuple[nn.Module, Params]:
    network = build_network(parse_network("lenet", shape), shape, 10)
    return network, draw_networks(network, "xavier", 1.0, list(range(count)), device=CPU, dtype=torch.float32)


def compiled(network: nn.Module) -> NativeLogits:
    found = native_logits(network)
    assert found is not None, "these tests need a C++ compiler"
    return found


def script(path: Path, text: str) -> str:
    """A compiler of our own."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def doubled(params: Params) -> Params:
    return {name: value.double() for name, value in params.items()}


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("n", [0, 1, 8, 37])
def test_logits_are_those_of_the_module(shape: tuple[int, int, int], n: int) -> None:
    network, params = lenet(shape)
    images = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
    found = compiled(network).logits(params, images)
    expected = forward_networks(network, doubled(params), images.double(), "loop")
    assert found.shape == (3, n, 10)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=3e-6)


class Odd(nn.Module):
    """Three convolutions of 3, 5 and 1 outputs whose sums have an odd last row and column to leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 5, padding=1), nn.Conv2d(3, 5, 5)
        self.c, self.fc = nn.Conv2d(5, 1, 5), nn.Linear(2, 4)
        self.layers: tuple[Layer, ...] = (
            *(Conv("a", 1, bias=False), MaxPool(), BiasReLU("a"), Conv("b", 0, bias=False)),
            *(MaxPool(), BiasReLU("b"), Conv("c", 0, bias=False), MaxPool(), BiasReLU("c"), Linear("fc")),
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.a, self.b, self.c):
            x = F.max_pool2d(conv(x), 2).relu()
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def test_layers_of_other_sizes() -> None:
    network = Odd()
    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.randn(2, *value.shape, generator=generator) / 3
        for name, value in network.named_parameters()
    }
    images = torch.randn(19, 2, 39, 43, generator=generator)
    found = compiled(network).logits(params, images)
    expected = forward_networks(network, doubled(params), images.double(), "loop")
    assert int((expected[0] != expected[0, :1]).sum()) > 0, "ReLU must not be 0 throughout"
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_network_has_the_same_bits_alone_and_with_any_threads(threads: Callable[[int], None]) -> None:
    network, params = lenet(count=4)
    images = torch.randn(100, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    code = compiled(network)
    threads(1)
    together = code._convolved(params, images)
    for k in range(4):
        alone = code._convolved({name: value[k : k + 1] for name, value in params.items()}, images[:50])
        assert torch.equal(alone[0, ..., :50], together[k, ..., :50])
    threads(3)
    assert torch.equal(code._convolved(params, images), together)


def test_what_is_not_finite_stays_so_as_in_torch() -> None:
    network, params = lenet(count=5)
    params["conv1.weight"][1, 2, 0, 1, 1] = torch.nan
    params["conv1.weight"][2] *= 3e38  # overflows to both infinities
    params["conv2.bias"][3, 7] = torch.nan
    params["conv2.weight"][4, 0, 0, 0, 0] = torch.inf
    images = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    found, expected = compiled(network).logits(params, images), derivatives_of(network, "explicit")
    torch.testing.assert_close(found, expected.logits(params, images), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert found.isfinite().all(-1).any(-1).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_pixel_that_is_not_finite_spoils_the_windows_that_see_it(value: float) -> None:
    """Some pooled windows have one and some do not: if one value is NaN, so is the maximum."""
    network, params = lenet()
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(4))
    for n, place in enumerate(((0, 0), (13, 14), (14, 13))):
        images[n, 0, place[0], place[1]] = value
    found = compiled(network)._convolved(params, images)[..., :4]
    x = images.permute(1, 2, 3, 0)[None]
    for layer in network.layers[:6]:
        x = layer.forward(params, x, Tape())
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5, equal_nan=True)
    broken = (~found.isfinite()).flatten(0, 3).float().mean(0)
    assert bool((broken[:3] > 0).all()) and bool((broken[:3] < 1).all()) and float(broken[3]) == 0


def test_answers_are_the_same_either_way(digits) -> None:
    pixels, labels = digits
    pixels = F.interpolate(pixels[:300].float(), 28).to(torch.uint8)
    network, params = lenet()
    plan = choose_plan(CPU, 1, network, native=True)
    assert plan.native and not choose_plan(CPU, 1, network).native
    test = RealSet(pixels, labels[:300], (0.3,), (0.3,))
    found, plain = (count_right(network, params, test, one) for one in (plan, choose_plan(CPU, 1, network)))
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert len(set(found[0].tolist())) > 1
    exact, of_torch = (
        count_right(network, doubled(params), test, one) for one in (plan, replace(plan, native=False))
    )
    assert torch.equal(exact[1], of_torch[1]), "float64 is torch's"


def test_other_networks_and_devices_have_no_such_code() -> None:
    for text, shape in (("convnet(depth=1)", (1, 28, 28)), ("alexcifarnet", (3, 32, 32))):
        network = build_network(parse_network(text, shape), shape, 10)
        assert native_logits(network) is None and not choose_plan(CPU, 1, network, native=True).native
    assert not choose_plan(torch.device("cuda"), 1, lenet()[0], native=True).native


def test_weights_that_the_code_is_not_for_are_refused() -> None:
    network, params = lenet()
    code, images = compiled(network), torch.zeros(2, 1, 28, 28)
    with pytest.raises(ValueError, match=r"conv1: no .* of torch\.float64 is compiled"):
        code.logits(doubled(params), images.double())
    with pytest.raises(ValueError, match="conv2: no"):
        code.logits(params | {"conv2.bias": params["conv2.bias"].double()}, images)
    with pytest.raises(ValueError, match=r"conv1: no \(3, 6, 1, 5, 5\) .* is compiled"):
        code.logits(params, torch.zeros(2, 3, 28, 28))


# ------------------------------------------------------------------------------------- compiling it


def test_it_is_compiled_once_and_for_one_processor(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = lenet()[0]
    compiled(network)
    assert stat.S_IMODE(unloaded.stat().st_mode) == 0o700
    (file,) = unloaded.iterdir()
    before = file.stat()
    native._loaded.cache_clear()
    compiled(network)
    assert file.stat() == before and list(unloaded.iterdir()) == [file]
    native._loaded.cache_clear()
    monkeypatch.setattr(native, "_processor", lambda: "flags: another one")
    compiled(network)
    assert len(list(unloaded.iterdir())) == 2


def test_without_a_compiler_test_passes_are_torchs(
    unloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    network = lenet()[0]
    assert native_logits(network) is None and not caplog.records and not unloaded.exists()
    assert not choose_plan(CPU, 1, network, native=True).native
    native._loaded.cache_clear()
    monkeypatch.setenv("CXX", "g++ -m64")
    assert native_logits(network) is None
    (record,) = caplog.records
    assert record.message == "test passes are not compiled: CXX, 'g++ -m64', is not there"


def test_a_trial_that_finds_no_compiler_any_more_says_so(
    unloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TrialSpec(
        DATASETS["mnist"],
        **{"network": "lenet", "images_per_class": 1, "outer_steps": 2, "models_per_step": 1},
        **{"real_batch": 8, "selection_networks": 1, "validate_every": 1},
    )
    splits = load_splits(DATASETS["mnist"], None, validation_fraction=0.1, split_seed=0, stand_in=True)
    splits = replace(
        splits, **{f"validation_{part}": getattr(splits, f"validation_{part}")[:50] for part in PARTS}
    )
    directory, asked = SweepDirectory(tmp_path / "results"), iter([False, True])
    assert not distil_trial(spec, splits, directory, TrialSettings(), should_stop=lambda: next(asked))
    _, header = load_tensors(directory.checkpoint(spec.trial_id))
    assert header["plan"]["native"] is True and header["n_replans"] == 0
    native._loaded.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert distil_trial(spec, splits, directory, TrialSettings())
    provenance = read_distilled(spec, directory).provenance
    plan = json.loads(provenance["execution_plan"])
    assert (plan["native"], plan["test_chunk"], provenance["n_replans"]) == (False, 128, 1)


def test_a_compiler_that_fails_is_told_of_and_does_without(
    unloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = script(
        tmp_path / "broken-c++",
        '[ "$1" = --version ] && exit 0\nfor last; do :; done\ntouch "$last"\necho no room left >&2\nexit 1',
    )
    monkeypatch.setenv("CXX", compiler)
    assert native_logits(lenet()[0]) is None
    (record,) = caplog.records
    assert record.message == f"test passes are not compiled: {compiler} said: no room left"
    assert list(unloaded.iterdir()) == [], "half a file is no library"


def test_nothing_is_run_that_others_may_have_written(
    unloaded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unloaded.mkdir(parents=True)
    unloaded.chmod(0o777)
    assert native_logits(lenet()[0]) is None
    (record,) = caplog.records
    assert "is open to others, and what lies there is run; `chmod 700` it" in record.message


def test_killed_while_it_compiles_leaves_no_half_library(
    unloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = script(
        tmp_path / "slow-c++",
        '[ "$1" = --version ] && exit 0\nfor last; do :; done\n'
        f'printf half > "$last"\ntouch "{tmp_path}/begun"\nexec sleep 60',
    )
    code = "from ddsweep.core import native; native._loaded()"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"CXX": slow}, start_new_session=True
    ) as process:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    assert not list(unloaded.glob("*.so")) and len(list(unloaded.iterdir())) == 1
    compiled(lenet()[0])
    assert len(list(unloaded.glob("*.so"))) == 1


def test_no_home_is_told_of(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert native_logits(lenet()[0]) is None
    (record,) = caplog.records
    assert "there is no home folder to keep compiled code in; set XDG_CACHE_HOME" in record.message


def test_a_compiler_that_is_fast_and_loose_keeps_what_is_not_finite(
    unloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "loose-c++", f'exec {find_compiler()} -ffast-math "$@"'))
    test_what_is_not_finite_stays_so_as_in_torch()


def test_the_setting_decides() -> None:
    assert find_compiler() is not None, os.environ.get("PATH")
    spec = TrialSpec(DATASETS["mnist"], network="lenet")
    for setting, expected in (("auto", True), ("off", False), ("on", True)):
        assert first_plan(spec, TrialSettings(compile=setting)).native is expected
