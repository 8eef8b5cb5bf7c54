"""Pools: training, resuming, and that no set is judged on networks that it was made with."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from ddsweep.catalog import PoolSpec, parse_network
from ddsweep.core.images import normalise
from ddsweep.core.init import draw_network
from ddsweep.core.networks import build_network
from ddsweep.data.load import Splits
from ddsweep.errors import DataError, SettingError, TooLargeError, UserError
from ddsweep.pools import store
from ddsweep.pools import train as training
from ddsweep.pools.file import is_trained, load_pool, pool_yaml, resolve_pool
from ddsweep.pools.recipe import PoolRecipe
from ddsweep.pools.store import TrainedPool, open_pool, write_index
from ddsweep.pools.train import check_parts, missing_groups, train_group
from ddsweep.results.layout import PoolDirectory
from ddsweep.results.parts import read_part, write_part
from ddsweep.results.schemas import POOL
from ddsweep.seeds import derive_seed
from ddsweep.spec import Plan, expand, sweep_of
from tests.conftest import Run
from tests.pools.conftest import NAME, NETWORK, make_pool, train_all


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process opens a pool once; tests change them."""
    monkeypatch.setattr(store, "_open", {})


@pytest.fixture
def copy(pools: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pools, tmp_path / "pools"))


@pytest.fixture
def spec(recipe: PoolRecipe) -> PoolSpec:
    return recipe.spec(NAME)


def bytes_of(directory: PoolDirectory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((directory.root / "networks").iterdir())}


# ---------------------------------------------------------------------------------------- training


def test_a_network_is_what_torchs_adam_makes_of_it(
    pools: Path, spec: PoolSpec, recipe: PoolRecipe, splits: Splits
) -> None:
    """Held-out network 3, alone, by torch's own optimiser and schedule, in float64."""
    shape = recipe.dataset.shape
    network = build_network(parse_network(NETWORK, shape), shape, 10)
    seed = derive_seed("pool", recipe.recipe, "heldout", 3)
    drawn = draw_network(network, "xavier", 1.0, seed)
    weights = {name: value.double().requires_grad_() for name, value in drawn.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=0.01, betas=(0.5, 0.999))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    images = normalise(splits.train_images, splits.mean, splits.std, torch.float64)
    for epoch in range(3):
        generator = torch.Generator().manual_seed(
            derive_seed("pool_order", recipe.recipe, "heldout", 3, epoch)
        )
        order = torch.randperm(len(images), generator=generator)
        for picks in order.split(100):
            optimizer.zero_grad()
            F.cross_entropy(
                functional_call(network, weights, (images[picks],)), splits.train_labels[picks]
            ).backward()
            optimizer.step()
        schedule.step()
    (found,) = open_pool(spec, pools).networks("heldout", [3])
    for name, value in weights.items():
        assert torch.allclose(found[name].double(), value, atol=2e-4), name
        assert not torch.allclose(found[name], drawn[name], atol=1e-2)


def test_the_index_says_what_each_network_is(pools: Path, spec: PoolSpec, splits: Splits) -> None:
    rows = read_part(PoolDirectory(pools / NAME).index).to_pylist()
    assert [(row["role"], row["index"]) for row in rows] == [
        *(("train", i) for i in range(10)),
        *(("heldout", i) for i in range(5)),
    ]
    assert len({row["seed"] for row in rows}) == len({row["sha256"] for row in rows}) == 15
    assert {row["recipe"] for row in rows} == {spec.recipe}
    assert {row["dataset_fingerprint"] for row in rows} == {splits.fingerprint}
    assert all(row["accuracy"] > 0.5 for row in rows), "trained networks"
    pool, row = open_pool(spec, pools), rows[12]
    (weights,) = pool.networks("heldout", [2])
    images = normalise(splits.test_images, splits.mean, splits.std, torch.float32)
    network = build_network(parse_network(NETWORK, (1, 8, 8)), (1, 8, 8), 10)
    right = functional_call(network, weights, (images,)).argmax(1) == splits.test_labels
    assert row["accuracy"] == pytest.approx(float(right.double().mean()))


def test_a_stopped_pool_goes_on_and_ends_the_same(
    pools: Path, recipe: PoolRecipe, splits: Splits, tmp_path: Path
) -> None:
    """Stopped in the second of three groups; then a network is lost, and a row torn."""
    directory, steps = PoolDirectory(tmp_path / NAME), itertools.count()
    train_all(recipe, splits, directory, lambda: next(steps) > 50)  # 13 steps an epoch, 39 a group
    assert [group.label for group in missing_groups(recipe, directory)] == ["train 8 to 9", "heldout 0 to 4"]
    train_all(recipe, splits, directory)
    whole = bytes_of(PoolDirectory(pools / NAME))
    assert bytes_of(directory) == whole
    directory.network("train", 9).unlink()
    part = directory.part("train", 8)
    part.write_bytes(part.read_bytes()[:-20])
    assert [group.label for group in missing_groups(recipe, directory)] == ["train 8 to 9"]
    train_all(recipe, splits, directory)
    assert bytes_of(directory) == whole


def test_a_network_that_is_torn_is_trained_again(copy: Path, recipe: PoolRecipe, splits: Splits) -> None:
    directory = PoolDirectory(copy / NAME)
    whole, path = bytes_of(directory), directory.network("heldout", 2)
    path.write_bytes(path.read_bytes()[:-7] + b"altered")
    assert [group.label for group in missing_groups(recipe, directory)] == ["heldout 0 to 4"]
    train_all(recipe, splits, directory)
    assert bytes_of(directory) == whole


def test_networks_of_other_images_or_another_recipe_are_never_mixed_with(
    copy: Path, recipe: PoolRecipe, splits: Splits
) -> None:
    directory = PoolDirectory(copy / NAME)
    check_parts(directory, recipe, splits)
    with pytest.raises(DataError, match="network 0 was trained on other images; remove the folder"):
        check_parts(directory, recipe, replace(splits, fingerprint="0" * 32))
    with pytest.raises(DataError, match="network 0 was trained by another recipe"):
        check_parts(directory, replace(recipe, lr=0.5), splits)
    with pytest.raises(DataError, match="network 0 was trained by another recipe"):
        check_parts(directory, replace(recipe, lr=0.5))


def test_a_group_that_does_not_fit_says_what_helps(
    recipe: PoolRecipe, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(training, "train_on_real", full)
    directory = PoolDirectory(tmp_path / NAME)
    directory.create()
    (group, *_) = missing_groups(recipe, directory)
    said = rf"pool {NAME}: {group.label}: .* do not fit the memory of this cpu; give more `gpus`, a smaller"
    with pytest.raises(TooLargeError, match=said):
        train_group(NAME, recipe, group, splits, directory, torch.device("cpu"), 1)


def test_a_network_that_diverges_is_named(recipe: PoolRecipe, splits: Splits, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pool tiny: train network 0 diverged at lr 1e\+30: .* smaller lr"):
        train_all(replace(recipe, lr=1e30), splits, PoolDirectory(tmp_path / NAME))


def test_the_size_of_groups_is_part_of_the_recipe(recipe: PoolRecipe) -> None:
    assert replace(recipe, group_size=4).recipe != recipe.recipe == replace(recipe, group_size=8).recipe


def test_more_networks_change_none_that_is_there(
    pools: Path, recipe: PoolRecipe, splits: Splits, tmp_path: Path
) -> None:
    small = replace(recipe, train=8, heldout=2)
    assert small.recipe == recipe.recipe and replace(recipe, seed=1).recipe != recipe.recipe
    directory = PoolDirectory(tmp_path / NAME)
    train_all(small, splits, directory)
    before = bytes_of(directory)
    train_all(recipe, splits, directory)
    assert before.items() <= bytes_of(directory).items()


# ----------------------------------------------------------------------------- training or judging


def test_training_and_heldout_networks_are_never_the_same(pools: Path, spec: PoolSpec) -> None:
    pool = open_pool(spec, pools)
    train = {pool.sums["train", i] for i in range(10)}
    assert len(train) == 10 and train.isdisjoint(pool.sums["heldout", i] for i in range(5))


@pytest.mark.parametrize("key", ["seed", "sha256"])
def test_a_planted_overlap_is_refused(copy: Path, spec: PoolSpec, key: str) -> None:
    directory = PoolDirectory(copy / NAME)
    rows = read_part(directory.index).to_pylist()
    rows[11][key] = rows[4][key]
    write_part(directory.index, rows, POOL, directory.temporary)
    with pytest.raises(DataError, match=rf"held-out network 1 is training network 4 .the same {key}."):
        open_pool(spec, copy)


def test_a_training_network_in_the_place_of_a_heldout_one_is_refused(copy: Path, spec: PoolSpec) -> None:
    """The file and its row of training network 4, given the name of held-out network 1."""
    directory = PoolDirectory(copy / NAME)
    shutil.copy(directory.network("train", 4), directory.network("heldout", 1))
    with pytest.raises(DataError, match=r"heldout-00001.safetensors: not heldout network 1 of pool tiny"):
        open_pool(spec, copy).networks("heldout", [1])
    rows = read_part(directory.part("train", 4)).to_pylist()
    write_part(directory.part("heldout", 1), [{**rows[0], "role": "heldout"}], POOL, directory.temporary)
    with pytest.raises(DataError, match=r"held-out network .* is training network 4"):
        write_index(directory, spec)


# -------------------------------------------------------------------------------------- bad input


def without_index(directory: PoolDirectory) -> None:
    directory.index.unlink()


def torn_index(directory: PoolDirectory) -> None:
    directory.index.write_bytes(directory.index.read_bytes()[:200])


def torn_network(directory: PoolDirectory) -> None:
    path = directory.network("train", 0)
    path.write_bytes(path.read_bytes()[:-10])


def no_network(directory: PoolDirectory) -> None:
    directory.network("train", 0).unlink()


def another_network(directory: PoolDirectory) -> None:
    shutil.copy(directory.network("train", 1), directory.network("train", 0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_index, "pool tiny: .* is not finished: `ddsweep pretrain`"),
        (torn_index, "pool tiny: .*index.parquet is torn: `ddsweep pretrain` .* writes it again"),
        (torn_network, "pool tiny: .*train-00000.safetensors: truncated, altered"),
        (no_network, "pool tiny: .*train-00000.safetensors: cannot read: No such file"),
        (another_network, "train-00000.safetensors: not train network 0 of pool tiny"),
    ],
)
def test_a_damaged_pool_is_named(
    copy: Path, spec: PoolSpec, damage: Callable[[PoolDirectory], None], message: str
) -> None:
    damage(PoolDirectory(copy / NAME))
    with pytest.raises(DataError, match=message):
        open_pool(spec, copy).networks("train", [0])


def test_a_pool_of_another_recipe_or_too_small_is_refused(pools: Path, spec: PoolSpec) -> None:
    with pytest.raises(DataError, match="lists networks of another recipe"):
        open_pool(replace(spec, recipe="f" * 16), pools)
    with pytest.raises(DataError, match="lists 10 train networks, not 11: `ddsweep pretrain`"):
        open_pool(replace(spec, train=11), pools)
    with pytest.raises(DataError, match="elsewhere is not there: `ddsweep pretrain`"):
        open_pool(replace(spec, name="elsewhere"), pools)
    with pytest.raises(DataError, match="has no train network 10"):
        open_pool(spec, pools).networks("train", [10])


def test_a_pool_that_has_grown_is_opened_anew(recipe: PoolRecipe, splits: Splits, tmp_path: Path) -> None:
    small = make_pool(replace(recipe, train=1, heldout=1), splits, tmp_path)
    assert len(open_pool(small, tmp_path).networks("heldout", [0])) == 1
    grown = make_pool(replace(recipe, train=1, heldout=2), splits, tmp_path)
    assert len(open_pool(grown, tmp_path).networks("heldout", [0, 1])) == 2


def test_networks_are_kept_in_memory_up_to_a_limit(
    pools: Path, spec: PoolSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = open_pool(spec, pools)
    (first,) = pool.networks("train", [0])
    size = sum(value.nbytes for value in first.values())
    monkeypatch.setattr(store, "_KEPT_BYTES", 3 * size)
    pool.networks("train", range(10))
    assert len(pool.kept) == 3
    assert isinstance(pool, TrainedPool)


# ---------------------------------------------------------------------------------------- the file

FILE = """
name: tiny
dataset: digits
network: convnet(depth=1,width=4,norm=none)
train: 10
heldout: 5
epochs: 3
batch: 100
lr: 1e-2
decay_epochs: 2
smoke: {train: 1, heldout: 1, epochs: 1}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pool.yaml"
    path.write_text(FILE)
    return path


def digits(value: object) -> object:
    from ddsweep.catalog import DATASETS

    return DATASETS[str(value)]


def test_a_pool_file_gives_the_recipe(file: Path, recipe: PoolRecipe, tmp_path: Path) -> None:
    pool = load_pool(file)
    assert pool.recipe(digits) == recipe
    again = tmp_path / "again.yaml"
    again.write_text(pool_yaml(pool))
    assert load_pool(again).recipe(digits) == recipe
    assert load_pool(file, ["epochs=4", "lr=1e-3"]).recipe(digits) == replace(recipe, epochs=4, lr=1e-3)


def test_a_torn_index_is_written_again(copy: Path, file: Path, ddsweep: Run) -> None:
    index = PoolDirectory(copy / NAME).index
    shutil.copy(file, copy / NAME / "pool.yaml")
    whole = index.read_bytes()
    torn_index(PoolDirectory(copy / NAME))
    done = ddsweep("pretrain", file, "--results", copy.parent)
    assert (done.returncode, done.stderr) == (0, "") and "heldout: 5 networks" in done.stdout
    assert index.read_bytes() == whole


def test_a_pool_that_grew_without_its_index_is_finished_by_the_same_command(
    copy: Path, file: Path, ddsweep: Run, recipe: PoolRecipe
) -> None:
    """As a kill leaves it after the last network: its file says more than the index."""
    directory, before = PoolDirectory(copy / NAME), replace(recipe, heldout=4)
    write_index(directory, before.spec(NAME))
    shutil.copy(file, copy / NAME / "pool.yaml")
    assert resolve_pool(NAME, copy, digits).heldout == 4
    assert not is_trained(recipe.spec(NAME), copy) and is_trained(before.spec(NAME), copy)
    done = ddsweep("pretrain", file, "--results", copy.parent)
    assert (done.returncode, done.stderr) == (0, "") and "heldout: 5 networks" in done.stdout
    assert resolve_pool(NAME, copy, digits) == recipe.spec(NAME) and is_trained(recipe.spec(NAME), copy)


def test_a_pool_of_other_images_is_not_called_finished(
    file: Path, recipe: PoolRecipe, splits: Splits, tmp_path: Path, ddsweep: Run
) -> None:
    """Its file says the same, and so do today's data, which are others than those it was trained on."""
    made = replace(recipe, train=8, heldout=8, epochs=1, seed=5)  # other data change the recipe likewise
    make_pool(made, splits, tmp_path / "pools")
    settings = ("train=8", "heldout=8", "epochs=1")
    (tmp_path / "pools" / NAME / "pool.yaml").write_text(pool_yaml(load_pool(file, settings)))
    done = ddsweep("pretrain", file, *settings, "--results", tmp_path)
    assert done.returncode == 1 and "network 0 was trained by another recipe; remove" in done.stderr


def test_the_smoke_section_makes_a_pool_of_its_own(file: Path) -> None:
    pool = load_pool(file, smoke=True)
    assert (pool.name, pool.train, pool.heldout, pool.epochs) == ("tiny-smoke", 1, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epoch: 3", "epoch: unknown key 'epoch'.*did you mean epochs.*`ddsweep settings pool` lists all"),
        ("epochs: 0", "epochs: 0 must be at least 1"),
        ("lr: fast", "lr: 'fast' is not a number"),
        ("lr: -1", "lr: -1.* must be greater than 0"),
        ("decay_factor: 2", "decay_factor: 2.* must be at most 1"),
        ("init_law: xaviar", "init_law: 'xaviar' is not one of .*did you mean xavier"),
        ("device: tpu", "device: 'tpu' is not one of 'auto', 'cpu' or 'cuda'"),
        ("network: {file: nets.py, name: Net}", "network: .* a pool has networks that ship with ddsweep"),
        ("name: imagenet", "name: 'imagenet' is the pool of torchvision's AlexNet"),
        ("dataset: 5", "dataset: 5 is neither the name of a data set nor a mapping of settings of one$"),
        ("dataset: [a]", "dataset: .*a.* is neither the name of a data set nor a mapping"),
        ("smoke: 5", "smoke: 5 is not a mapping of settings to values$"),
        ("lr: .inf", "lr: inf.* must be less than inf"),
        ("gpus: 1.5", "gpus: 1.5 must be a fraction between 0 and 1, or a whole number"),
        ("name: A b", "name: 'A b' names a folder of networks"),
        ("train: 010", "line 11, column 8: 010 starts with 0, as numbers to the base 8 do in YAML"),
    ],
)
def test_a_wrong_pool_file_is_refused(file: Path, change: str, message: str) -> None:
    key = change.partition(":")[0]
    kept = [line for line in FILE.splitlines() if not line.startswith(f"{key}:")]
    file.write_text("\n".join([*kept, change]))
    with pytest.raises(SettingError, match=rf"pool.yaml: {message}"):
        load_pool(file)


def test_a_name_ends_in_smoke_only_where_it_was_asked_for(file: Path) -> None:
    file.write_text(FILE.replace("name: tiny", "name: tiny-smoke").partition("smoke: {")[0])
    with pytest.raises(SettingError, match="'tiny-smoke': only what --smoke makes may end in -smoke"):
        load_pool(file)


def test_a_pool_that_was_not_begun_is_what_its_file_says(
    file: Path, recipe: PoolRecipe, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    shutil.copy(file, tmp_path / "files" / "tiny.yaml")
    assert resolve_pool(NAME, tmp_path / "nowhere", digits, tmp_path / "files") == recipe.spec(NAME)
    shutil.copy(file, tmp_path / "files" / "other.yaml")
    with pytest.raises(
        SettingError, match=r"other.yaml has name: tiny, .* give the file and the pool one name"
    ):
        resolve_pool("other", tmp_path / "nowhere", digits, tmp_path / "files")


def test_a_growing_pool_can_be_judged_on_as_far_as_it_is_whole(
    copy: Path, recipe: PoolRecipe, file: Path
) -> None:
    (copy / NAME / "pool.yaml").write_text(FILE.replace("heldout: 5", "heldout: 50"))
    assert resolve_pool(NAME, copy, digits) == recipe.spec(NAME)


@pytest.mark.parametrize(
    ("settings", "protocols", "enough"),
    [
        ({"init": "pretrained"}, ["as_distilled"], False),
        ({"init": "fixed"}, ["as_distilled", "on_random"], False),
        ({"init": "fixed"}, ["as_distilled"], True),  # one training network
        ({"init": "pretrained"}, None, False),
    ],
)
def test_more_held_out_networks_than_there_are_are_refused_if_they_are_judged_on(
    settings: dict[str, str], protocols: list[str] | None, enough: bool, recipe: PoolRecipe
) -> None:
    base = {"dataset": "digits", "network": NETWORK, "pool": NAME, **settings}
    evaluate = {"networks": 6} | ({} if protocols is None else {"protocols": protocols})

    def plan(**more: int) -> Plan:
        sweep = sweep_of({"name": "x", "base": base, "evaluate": evaluate | more}, "test")
        return expand(sweep, digits, lambda value: recipe.spec(NAME))

    assert len(plan(networks=5).trials) == 1
    if enough:
        assert len(plan().trials) == 1
        return
    with pytest.raises(
        SettingError, match=r"networks: 6 are more than the 5 held-out .*give at most so many"
    ):
        plan()


def test_a_pool_is_found_by_its_name(pools: Path, file: Path, tmp_path: Path, recipe: PoolRecipe) -> None:
    here = tmp_path / "results" / "pools"
    (here / NAME).mkdir(parents=True)
    shutil.copy(file, here / NAME / "pool.yaml")
    assert resolve_pool(NAME, here, digits) == recipe.spec(NAME)
    with pytest.raises(DataError, match=r"no pool 'timy' in .*there are tiny; `ddsweep pretrain FILE`"):
        resolve_pool("timy", here, digits)
    with pytest.raises(DataError, match=r"; `ddsweep pretrain usps_lenet` makes it$"):
        resolve_pool("usps_lenet", here, digits)
    imagenet = resolve_pool("imagenet", here, digits)
    assert (imagenet.recipe, imagenet.train, imagenet.heldout) == ("imagenet", 1, 0)
    with pytest.raises(SettingError, match=r"is not {name: imagenet, weights: FILE}"):
        resolve_pool({"name": NAME, "weights": "x"}, here, digits)
    with pytest.raises(DataError, match=r"weights file .*missing.pth cannot be read"):
        resolve_pool({"name": "imagenet", "weights": "missing.pth"}, here, digits)
