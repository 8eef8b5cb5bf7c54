from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torchvision.datasets

from ddsweep.data.fetch import fetch
from ddsweep.errors import DataError, SettingError

from .conftest import small_root


def test_what_is_not_downloaded_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"digits: nothing to fetch: it comes with scikit-learn"):
        fetch("digits", tmp_path)
    with pytest.raises(
        DataError, match=r"cifar10-exact: nothing to fetch: put its parquet files into .*cifar10"
    ):
        fetch("cifar10-exact", tmp_path)
    with pytest.raises(DataError, match=r"mnist: data root not given"):
        fetch("mnist", None)
    with pytest.raises(SettingError, match=r"unknown data set 'mnits'"):
        fetch("mnits", tmp_path)


def test_what_is_there_is_not_downloaded_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torchvision.datasets, "MNIST")
    assert fetch("mnist", tiny) == tiny / "MNIST/raw"
    assert fetch("cifar10-exact", tiny) == tiny / "cifar10"


def test_a_download_is_moved_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def download(root: str, *, train: bool, download: bool) -> None:
        asked.append(download)
        small_root(Path(root))

    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    root = tmp_path / "new"
    assert fetch("mnist", root) == root / "MNIST/raw"
    assert asked == [True, True]
    assert len(list((root / "MNIST/raw").iterdir())) == 4
    assert not list(root.glob(".fetch-*"))


def test_a_failed_download_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(root: str, **_: Any) -> None:
        (Path(root) / "half").write_text("")
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets, "MNIST", no_network)
    with pytest.raises(DataError, match=r"mnist: could not be fetched into .*: .*Name or service") as caught:
        fetch("mnist", tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".fetch-*"))


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"could not be fetched into"):
        fetch("mnist", tmp_path / "file")
