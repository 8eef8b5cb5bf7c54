"""`ddsweep settings`: everything that can be set is shown as it is declared, and found by its name."""

from __future__ import annotations

import pytest

from ddsweep.catalog import DATASETS, NETWORKS, SETTINGS
from ddsweep.errors import SettingError
from ddsweep.launch.site import Site
from ddsweep.report.settings_page import names_of_settings, settings_page
from ddsweep.spec import ResourcesSpec, SweepSpec

from .conftest import text

MORE = {"site": Site}


def page(name: str | None = None, width: int = 160) -> str:
    return text(settings_page(name, MORE), width)


def test_the_overview_has_every_setting_network_and_data_set_at_any_width() -> None:
    for width in (80, 160):
        shown = page(width=width)
        first = {line.split()[0] for line in shown.splitlines() if line.strip()}
        assert first >= {*SETTINGS, *NETWORKS, *DATASETS}
        assert all(len(line) <= width for line in shown.splitlines())
    assert "More: ddsweep settings NAME" in shown and "resources" in shown and "site" in shown


def test_every_name_that_is_offered_is_found() -> None:
    for name in names_of_settings(MORE):
        shown = page(name)
        assert name.rpartition(".")[2] in shown.lower().replace("data sets", "datasets"), name


def test_one_setting_has_its_default_its_words_and_what_it_means() -> None:
    words = page("dtype").split()
    assert words[:3] == ["dtype", "of", "a"]
    assert words[words.index("default") + 1] == "float32"
    assert f"one of   {', '.join(SETTINGS['dtype'].one_of)}" in page("dtype")
    assert "`" not in page("dtype")
    assert page("outer_lr").split()[4:6] == ["default", f"{SETTINGS['outer_lr'].default:g}"]
    assert "one of" not in page("outer_lr")
    assert "values    must be a positive number" in page("outer_lr")
    assert "methods" not in page("outer_lr") and "methods  bptt" in page("window")


def test_a_name_in_several_places_shows_them_all() -> None:
    shown = page("device")
    blocks = [block.split()[0] for block in shown.split("\n\n")]
    assert blocks == ["resources.device", "device", "site.device"]
    assert page("resources.device").count("default") == 1
    assert page("pool").count("of a trial") == 1, "the setting `pool`, below the keys of a pool file"


def test_a_section_has_all_its_keys_with_their_defaults() -> None:
    rows = {line.split()[0]: line.split()[1] for line in page("resources").splitlines() if line[:1].isalpha()}
    assert rows.keys() >= set(ResourcesSpec.model_fields)
    assert (rows["checkpoint_every"], rows["dashboard"], rows["segment"]) == ("50", "true", "none")
    keys = {line.split()[0] for line in page("file").splitlines() if line}
    assert keys >= set(SweepSpec.model_fields)
    assert "scheduler        required" in page("site")


def test_a_network_and_a_data_set_are_shown_as_they_are() -> None:
    assert "28, 32" in page("lenet") and "61,706" not in page("lenet") and "62,006" in page("lenet")
    assert "4 to 512" in page("convnet") and "norm=instance)" in page("convnet")
    assert "3x32x32" in page("svhn") and "airplane" in page("cifar10") and "airplane" not in page("svhn")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("outer_rl", "'outer_rl' is not a setting, section, network or data set; did you mean outer_lr?"),
        ("evaluate.network", "did you mean evaluate.networks?"),
        ("xyzzy", "ddsweep settings without a name shows all"),
        ("", "ddsweep settings without a name shows all"),
    ],
)
def test_a_name_that_is_none(name: str, message: str) -> None:
    with pytest.raises(SettingError, match=message.replace("?", r"\?")):
        settings_page(name, MORE)
