"""Initial weights: network i is the same wherever it is drawn, and its law is the one named."""

from __future__ import annotations

import math

import pytest
import torch

from ddsweep.catalog import INIT_LAWS, NetworkSpec, parse_network
from ddsweep.core.init import draw_network, draw_networks
from ddsweep.core.networks import build_network
from ddsweep.seeds import ROLES, derive_seed

CPU = torch.device("cpu")


def lenet():
    return build_network(NetworkSpec("lenet"), (1, 28, 28), 10)


def alexcifarnet():
    return build_network(NetworkSpec("alexcifarnet"), (3, 32, 32), 10)


# ------------------------------------------------------------------------------------ what it depends on


@pytest.mark.parametrize("law", INIT_LAWS)
def test_network_i_is_the_same_in_any_batch_and_order(law) -> None:
    network = lenet()
    seeds = [derive_seed("heldout", "lenet", law, 1.0, i) for i in range(5)]
    whole = draw_networks(network, law, 1.0, seeds, device=CPU, dtype=torch.float32)
    for order in ([3], [4, 3, 2, 1, 0], [3, 3, 1]):
        part = draw_networks(network, law, 1.0, [seeds[i] for i in order], device=CPU, dtype=torch.float32)
        for name, value in part.items():
            assert torch.equal(value, whole[name][order])
    for k, seed in enumerate(seeds):
        for name, value in draw_network(network, law, 1.0, seed).items():
            assert torch.equal(value, whole[name][k])


def test_drawing_neither_reads_nor_moves_the_global_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw_network(lenet(), "orthogonal", 1.0, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for name, value in draw_network(lenet(), "orthogonal", 1.0, 7).items():
        assert torch.equal(value, first[name])


def test_float64_networks_are_the_float32_ones_written_in_float64() -> None:
    single = draw_networks(lenet(), "xavier", 1.0, [1, 2], device=CPU, dtype=torch.float32)
    double = draw_networks(lenet(), "xavier", 1.0, [1, 2], device=CPU, dtype=torch.float64)
    for name, value in single.items():
        assert double[name].dtype == torch.float64
        assert torch.equal(double[name].float(), value)


def test_different_seeds_give_different_networks() -> None:
    drawn = draw_networks(lenet(), "xavier", 1.0, list(range(20)), device=CPU, dtype=torch.float32)
    assert len({float(value) for value in drawn["fc1.weight"][:, 0, 0]}) == 20


def test_heldout_selection_known_and_outer_networks_are_different_networks() -> None:
    """The same (network, law, param, i) in another role must not be the same network."""
    seeds = [
        derive_seed(role, "lenet", "xavier", 1.0, i)
        for role in ("heldout", "selection", "known")
        for i in range(50)
    ]
    seeds += [derive_seed("outer", "0123456789", step, k) for step in range(10) for k in range(5)]
    drawn = draw_networks(lenet(), "xavier", 1.0, seeds, device=CPU, dtype=torch.float32)
    assert len(set(seeds)) == 200
    assert len({float(value) for value in drawn["conv1.weight"][:, 0, 0, 0, 0]}) == 200


def test_every_role_is_a_stream_of_its_own_and_a_misspelt_one_is_refused() -> None:
    assert len({derive_seed(role, "x", 1) for role in ROLES}) == len(ROLES)
    with pytest.raises(ValueError, match="unknown seed role 'held_out'"):
        derive_seed("held_out", 0)


def test_an_unknown_law_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown init law 'xavier_normal'.*xavier_uniform, kaiming,"):
        draw_network(lenet(), "xavier_normal", 1.0, 0)


# ---------------------------------------------------------------------------------------- golden values

# First three weights of conv1, one of fc3 and one of the last bias of LeNet at 28 px, seed 20260000
# (torch 2.15, CPU). A change here changes every held-out network, and so every published number.
GOLDEN: dict[str, tuple[float, ...]] = {
    "xavier": (-0.0056814, -0.0397279, -0.0167238, 0.0439275, 0.0),
    "xavier_uniform": (-0.0292367, 0.0366928, -0.1694849, 0.1677837, 0.0),
    "kaiming": (-0.0106289, -0.0743240, -0.0312874, 0.0328583, 0.0),
    "kaiming_out": (-0.0043392, -0.0303427, -0.0127730, 0.0952325, 0.0),
    "orthogonal": (-0.0113448, -0.0793298, -0.0333946, 0.0170372, 0.0),
    "normal": (-0.0531444, -0.3716201, -0.1564371, 0.3011515, 0.0),
    "default": (-0.0315793, 0.0396328, -0.1830646, 0.0961305, -0.0347617),
}

# One weight of held-out and of selection network 3 under xavier: the seeds are part of the contract too.
GOLDEN_ROLES: dict[str, float] = {
    "heldout": 0.0044691,
    "selection": 0.0065304,
    "known": -0.0088118,
}


@pytest.mark.parametrize("law", INIT_LAWS)
def test_weights_are_the_recorded_ones(law) -> None:
    drawn = draw_network(lenet(), law, 1.0, 20260000)
    found = [
        *drawn["conv1.weight"][0, 0, 0, :3].tolist(),
        float(drawn["fc3.weight"][9, 83]),
        float(drawn["fc3.bias"][9]),
    ]
    assert found == pytest.approx(GOLDEN[law], abs=1e-5)


@pytest.mark.parametrize("role", ["heldout", "selection", "known"])
def test_network_3_of_each_role_is_the_recorded_one(role) -> None:
    seed = derive_seed(role, "lenet", "xavier", 1.0, 3)
    assert float(draw_network(lenet(), "xavier", 1.0, seed)["fc1.weight"][0, 0]) == pytest.approx(
        GOLDEN_ROLES[role], abs=1e-5
    )


# ------------------------------------------------------------------------------------------- statistics

# (fan in, fan out) of a large linear and a large convolution layer of AlexCifarNet.
FANS = {"fc1.weight": (4096, 384), "conv2.weight": (64 * 25, 64 * 25)}


def expected_std(law: str, param: float, fan_in: int, fan_out: int) -> float:
    if law in ("xavier", "xavier_uniform"):
        return param * math.sqrt(2 / (fan_in + fan_out))
    if law in ("kaiming", "kaiming_out"):
        return math.sqrt(2 / (1 + param**2) / (fan_in if law == "kaiming" else fan_out))
    if law == "normal":
        return param
    return math.sqrt(1 / (3 * fan_in))  # default: uniform within 1 / sqrt(fan in)


@pytest.mark.parametrize("param", [1.0, 0.5])
@pytest.mark.parametrize("law", [law for law in INIT_LAWS if law != "orthogonal"])
def test_weights_have_the_mean_and_deviation_of_their_law(law, param) -> None:
    drawn = draw_network(alexcifarnet(), law, param, 3)
    for name, (fan_in, fan_out) in FANS.items():
        value, std = drawn[name].double(), expected_std(law, param, fan_in, fan_out)
        # Five standard errors, of a normal law: those of a uniform one are smaller.
        assert float(value.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * value.numel()))
        assert abs(float(value.mean())) < 5 * std / math.sqrt(value.numel())
        bounded = float(value.abs().max()) <= math.sqrt(3) * std * (1 + 1e-6)
        assert bounded == (law in ("xavier_uniform", "default"))


@pytest.mark.parametrize("param", [1.0, 0.5])
def test_orthogonal_weights_have_orthogonal_rows_of_the_given_length(param) -> None:
    drawn = draw_network(alexcifarnet(), "orthogonal", param, 3)
    for name in FANS:
        rows = drawn[name].flatten(1).double()
        expected = param**2 * torch.eye(len(rows), dtype=torch.float64)
        torch.testing.assert_close(rows @ rows.T, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("law", INIT_LAWS)
def test_biases_are_zero_except_under_the_default_law(law) -> None:
    drawn = draw_network(alexcifarnet(), law, 1.0, 0)
    for name, value in drawn.items():
        if name.endswith("bias"):
            assert bool((value != 0).any()) == (law == "default")
    if law == "default":
        assert float(drawn["fc1.bias"].abs().max()) <= 1 / math.sqrt(4096)
        assert float(drawn["fc1.bias"].std()) == pytest.approx(1 / math.sqrt(3 * 4096), rel=0.1)


@pytest.mark.parametrize("law", INIT_LAWS)
def test_norm_layers_start_as_the_identity(law) -> None:
    network = build_network(parse_network("convnet(width=8)", (1, 8, 8)), (1, 8, 8), 10)
    drawn = draw_network(network, law, 0.5, 0)
    for i in range(2):
        assert drawn[f"norms.{i}.weight"].tolist() == [1.0] * 8
        assert drawn[f"norms.{i}.bias"].tolist() == [0.0] * 8
