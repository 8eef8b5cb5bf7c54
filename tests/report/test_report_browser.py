"""The pages of `ddsweep report` in a real Chromium: nothing on the console, nothing asked for, and what is
clicked works."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ddsweep.catalog import TrialSpec
from ddsweep.report.page.figures import write_figures
from ddsweep.report.page.gather import gather
from ddsweep.report.page.write import write_page
from ddsweep.results.lock import SweepLock
from tests.report.browser import CHROMIUM, Browser
from tests.report.conftest import Folder, spec
from tests.report.generated import generate
from tests.report.test_every_number import written
from tests.report.test_report import ASKED, attacks, strange, whole

AXE = Path(__file__).parents[2] / ".npm/node_modules/axe-core/axe.min.js"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (make cluster-deps)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


def test_axe_is_here() -> None:
    """Without it the other tests look for no barriers; this one alone says so."""
    if not AXE.exists():
        pytest.skip("needs axe-core (make axe): no page is looked at for barriers")


def barriers(browser: Browser) -> list[Any]:
    """What axe-core finds that keeps people out, seriously or critically."""
    if not AXE.exists():
        return []
    browser.ask(f"(() => {{ {AXE.read_text()} }})()")
    found = "axe.run(document, {resultTypes: ['violations']}).then((found) => found.violations"
    keep = "filter((one) => ['serious', 'critical'].includes(one.impact))"
    told = "map((one) => [one.id, one.nodes.slice(0, 3).map((node) => node.html.slice(0, 200))])"
    answer: list[Any] = browser.ask(f"{found}.{keep}.{told})")
    return answer


def silent(browser: Browser) -> None:
    assert browser.said() == []
    assert browser.asked() == []


def rows(browser: Browser, condition: str = "!row.hidden") -> int:
    body = "document.querySelector('#all-trials').tBodies[0].rows"
    count: int = browser.ask(f"[...{body}].filter((row) => {condition}).length")
    return count


def sort_by(browser: Browser, title: str, table: str = "all-trials") -> None:
    heads = f"[...document.querySelectorAll('#{table} th button')]"
    browser.ask(f"{heads}.find((one) => one.textContent === '{title}').click()")


def column(browser: Browser, title: str, table: str = "all-trials") -> list[str]:
    """The texts of a column of a table, from the top."""
    found: list[str] = browser.ask(
        f"(() => {{ const table = document.querySelector('#{table}');"
        f"const place = [...table.tHead.rows[0].cells].findIndex((head) => head.textContent === '{title}');"
        "return [...table.tBodies[0].rows].map((row) => row.cells[place].textContent); })()"
    )
    return found


def choose(browser: Browser, select: str, value: str) -> None:
    browser.ask(
        f"(() => {{ const one = document.getElementById('{select}'); one.value = '{value}';"
        "one.dispatchEvent(new Event('change')); })()"
    )


def reached_by_keyboard(browser: Browser) -> None:
    """Tab comes to every control that can be seen, and to nothing else that is hidden."""
    wanted = browser.ask(
        "[...document.querySelectorAll('a, button, input, select, summary, [tabindex]')]"
        ".filter((one) => one.checkVisibility()).length"
    )
    reached = set()
    for _ in range(wanted + 20):
        browser.press("Tab")
        number = browser.ask("[...document.querySelectorAll('*')].indexOf(document.activeElement)")
        if number in reached and len(reached) >= wanted:
            break
        reached.add(number)
    assert len(reached) >= wanted


def small(folder: Folder) -> Path:
    with_pictures(folder, whole(folder))
    return folder.directory.root


def with_pictures(folder: Folder, trials: Sequence[TrialSpec]) -> None:
    for trial in trials:
        picture = folder.directory.grid(trial.trial_id)
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(PNG)


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d4944415478da63fccf50f0"
    "0f0004850180d5a8e2640000000049454e44ae426082"
)


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
def test_a_sweep_is_drawn_silently_and_keeps_nobody_out(
    browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    """As of the quickstart: fixed and random networks; one of its trials failed, and one was stopped."""
    folder, trials = written(tmp_path)
    with_pictures(folder, trials)
    path = write_page(gather([folder.directory.root]), tmp_path / "out")
    browser.open(path, width=width, dark=dark)
    browser.draw_all()
    assert rows(browser) == 12
    assert browser.ask("document.querySelectorAll('figure.chart canvas').length") >= 5
    assert browser.ask("[...document.querySelectorAll('.pictures img')].every((one) => one.naturalWidth)")
    assert browser.ask("document.documentElement.scrollWidth") == width
    first = "[...document.querySelectorAll('tbody th')].map((one) => one.offsetWidth)"
    assert browser.ask(f"Math.max(...{first})") < width / 2, "the first column leaves room for numbers"
    browser.resize(width, 900)  # drawing made it as high as the page
    browser.ask("document.querySelector('nav a[href=\"#steps\"]').click()")
    top = "document.querySelector('#steps h2').getBoundingClientRect().top"
    assert browser.wait(f"{top} < 300")
    assert browser.ask(f"{top} >= document.getElementById('controls').getBoundingClientRect().bottom")
    assert barriers(browser) == []
    silent(browser)


def test_filter_sort_pick_and_axis(browser: Browser, folder: Folder, tmp_path: Path) -> None:
    browser.open(write_page(gather([small(folder)]), tmp_path / "out"))
    browser.draw_all()
    assert rows(browser) == 4
    choose(browser, "filter-inner_lr", "0.1")
    assert rows(browser) == 2
    assert browser.ask("document.getElementById('shown').textContent") == "2 of 4 trials shown"
    assert set(column(browser, "inner lr")) == {"0.02", "0.1"}
    browser.ask("document.getElementById('reset').click()")
    assert rows(browser) == 4
    heads = "[...document.querySelectorAll('#all-trials th button')]"
    head = f"{heads}.find((one) => one.textContent === 'validation')"
    browser.ask(f"{head}.click()")
    assert column(browser, "validation") == ["50.0", "60.0", "70.0", "80.0"]
    browser.ask(f"{head}.click()")
    assert column(browser, "validation") == ["80.0", "70.0", "60.0", "50.0"]
    assert browser.ask(f"{head}.closest('th').getAttribute('aria-sort')") == "descending"
    steps = "document.getElementById('chart-inner-steps')"
    before = browser.ask(f"{steps}.dataset.rows")
    drawn = browser.ask(f"{steps}.dataset.drawn")
    browser.ask("document.querySelector('#all-trials input:not(:checked)').click()")
    browser.wait(f"{steps}.dataset.drawn > {drawn}")
    assert int(browser.ask(f"{steps}.dataset.rows")) > int(before)
    accuracy = "document.getElementById('chart-accuracy')"
    drawn = browser.ask(f"{accuracy}.dataset.drawn")
    choose(browser, "accuracy-x", "seed")
    browser.wait(f"{accuracy}.dataset.drawn > {drawn}")
    assert browser.ask(f"{accuracy}.view.data('bars').map((row) => row.x).sort().join()") == "0,0,1,1"
    silent(browser)


def test_every_control_is_reached_by_keyboard(browser: Browser, folder: Folder, tmp_path: Path) -> None:
    browser.open(write_page(gather([small(folder)]), tmp_path / "out"))
    browser.draw_all()
    reached_by_keyboard(browser)
    browser.ask("document.querySelector('button.zoom').focus()")
    browser.press("Enter")
    assert browser.wait("document.getElementById('zoom').open")
    browser.press("Escape")
    assert browser.wait("!document.getElementById('zoom').open")
    silent(browser)


def test_a_running_sweep_renews_itself_and_keeps_what_was_chosen(
    browser: Browser, folder: Folder, tmp_path: Path
) -> None:
    root = small(folder)
    folder.asked(ASKED.replace("0.1]", "0.1, 0.5]"))
    with SweepLock(folder.directory.lock):
        folder.history(spec(init="random", inner_lr=0.5), last=20)
        gathered = gather([root])
        assert gathered.running
        path = write_page(gathered, tmp_path / "out", renew=2)
        browser.open(path)
        assert "The sweep is running" in browser.ask("document.body.textContent")
        assert column(browser, "state").count("running") == 1
        choose(browser, "filter-inner_lr", "0.1")
        picks = (
            "[...document.querySelectorAll('#all-trials input:checked')].map((one) => one.ariaLabel).sort()"
        )
        browser.ask("document.querySelector('#all-trials tbody input').click()")
        picked = browser.ask(picks)
        first = browser.ask("performance.timeOrigin")
        folder.evaluated(spec(init="random", inner_lr=0.5))  # trials get other numbers
        write_page(gather([root]), tmp_path / "out")
        ready = "(document.documentElement || {dataset: {}}).dataset.ready"
        browser.wait(f"performance.timeOrigin > {first} && {ready}")
        assert rows(browser) == 2
        assert browser.ask(picks) == picked
    browser.draw_all()
    assert barriers(browser) == []
    silent(browser)


def test_what_is_printed_or_saved_is_light_on_white(browser: Browser, folder: Folder, tmp_path: Path) -> None:
    browser.open(write_page(gather([small(folder)]), tmp_path / "out"), dark=True)
    browser.draw_all()
    figure = "document.getElementById('chart-accuracy')"
    ground = f"{figure}.view.background()"
    assert browser.ask(ground) in (None, "transparent")
    dark = "document.documentElement.classList.contains('dark-charts')"
    browser.ask(f"addEventListener('beforeprint', () => {{ window.printed = {dark}; }})")
    browser.call("Page.printToPDF")
    assert browser.wait("window.printed")
    assert not browser.ask(dark)
    ink = f"getComputedStyle({figure}.querySelector('canvas')).filter"
    browser.ask("dispatchEvent(new Event('beforeprint'))")
    assert browser.ask(ink) == "none"
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.call("Emulation.setEmulatedMedia", media="print", features=scheme)
    assert "invert" in browser.ask(ink), "light ink on white paper cannot be read"
    browser.call("Emulation.setEmulatedMedia", media="", features=scheme)
    browser.ask("dispatchEvent(new Event('afterprint'))")
    browser.ask(
        "(() => { window.saved = []; HTMLAnchorElement.prototype.click = () => "
        f"saved.push({figure}.view.toSVG()); }})()"
    )
    button = f"[...{figure}.querySelectorAll('.tools button')].find((one) => one.textContent === 'SVG')"
    browser.ask(f"{button}.click()")
    browser.wait("saved.length")
    svg = browser.ask("saved[0]")
    assert 'fill="white"' in svg and "#e8eaed" not in svg, "the ink of a dark page cannot be read on paper"
    browser.wait(f"{ground} !== 'white'")
    silent(browser)


def test_trials_without_a_number_are_said_to_be_missing(
    browser: Browser, folder: Folder, tmp_path: Path
) -> None:
    norms = [round(0.1 * 1.3**place, 6) for place in range(14)]
    text = ASKED.replace("seeds: 2", "").replace("inner_lr: [0.02, 0.1]", f"clip_norm: {[*norms, None]}")
    folder.asked(text.replace("None", "null"))
    for norm in (*norms, None):
        folder.evaluated(spec(init="random", clip_norm=norm))
    gathered = gather([folder.directory.root])
    browser.open(write_page(gathered, tmp_path / "out"))
    browser.draw_all()
    said = "document.querySelector('#chart-accuracy .left')"
    choose(browser, "accuracy-x", "clip_norm")
    assert browser.wait(f"!{said}.hidden && {said}.textContent").startswith("Not drawn: 1 of these trials")
    assert any("figures as PDF" in line for line in write_figures(gathered, tmp_path / "drawn"))
    captions = (tmp_path / "drawn" / "figures" / "captions.md").read_text()
    (accuracy,) = (text for text in captions.split("## ") if text.startswith("accuracy\n"))
    assert "Not drawn: 1 of these trials" in accuracy
    assert barriers(browser) == []
    silent(browser)


@pytest.mark.parametrize("state", ["failed", "stopped", "nothing"])
def test_pages_without_an_answer(browser: Browser, folder: Folder, tmp_path: Path, state: str) -> None:
    folder.asked(ASKED)
    for lr in (0.02, 0.1):
        trial = spec(init="random", inner_lr=lr)
        if state == "failed":
            folder.failure(trial, "<script>alert(1)</script>")
        elif state == "stopped":
            folder.stopped(trial)
    browser.open(write_page(gather([folder.directory.root]), tmp_path / "out"))
    browser.draw_all()
    assert barriers(browser) == []
    silent(browser)


def test_names_run_nothing(browser: Browser, tmp_path: Path) -> None:
    directory, _ = strange(tmp_path)
    browser.open(write_page(gather([directory.root]), tmp_path / "out"))
    browser.draw_all()
    assert "alert(1)" in browser.ask("document.body.textContent"), (
        "shown, and not run: a dialog would stop it"
    )
    assert browser.ask("document.querySelectorAll('script').length") == 3
    assert barriers(browser) == []
    silent(browser)


def test_one_trial_of_one_network(browser: Browser, folder: Folder, tmp_path: Path) -> None:
    folder.asked("name: small\nbase: {dataset: digits}\n")
    folder.evaluated(spec(init="fixed"))
    browser.open(write_page(gather([folder.directory.root]), tmp_path / "out"))
    browser.draw_all()
    assert barriers(browser) == []
    silent(browser)


@pytest.mark.slow
def test_a_thousand_trials(browser: Browser, tmp_path: Path) -> None:
    """1,000 trials x 200 networks x 5 steps. docs/report.md has the seconds and the memory that it prints."""
    generate(tmp_path / "large", 1000, 200)
    command = [
        sys.executable,
        "-m",
        "ddsweep",
        "report",
        str(tmp_path / "large"),
        "--out",
        str(tmp_path / "out"),
    ]
    before = os.times()
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    after = os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    path = tmp_path / "out" / "index.html"
    size = path.stat().st_size
    ready = browser.open(path)
    print(
        f"{time.monotonic() - start:.1f} s, {cpu:.1f} s of CPU, {memory / 1e6:.2f} GB, {size / 1e6:.1f} "
        f"MB, {ready} ms"
    )
    assert size < 20e6
    assert rows(browser) == 1000
    browser.draw_all()
    start = time.monotonic()
    choose(browser, "filter-images_per_class", "4")
    assert 0 < rows(browser) < 1000
    print(f"filtered in {time.monotonic() - start:.1f} s")
    start = time.monotonic()
    sort_by(browser, "validation")
    scores = [float(text) for text in column(browser, "validation")]
    assert scores == sorted(scores)
    print(f"sorted in {time.monotonic() - start:.1f} s")
    silent(browser)


def test_attacks(browser: Browser, folder: Folder, tmp_path: Path) -> None:
    attacks(folder)
    browser.open(write_page(gather([folder.directory.root]), tmp_path / "out"))
    browser.draw_all()
    assert (
        browser.ask("document.getElementById('chart-attack-matrix').querySelectorAll('canvas').length") == 1
    )
    choose(browser, "filter-attack_class", "2")
    assert rows(browser) == 1
    browser.ask("document.getElementById('reset').click()")
    sort_by(browser, "fooled after", "attack")
    fooled = column(browser, "fooled after", "attack")
    assert fooled == sorted(fooled, key=float) and len(fooled) == 2
    assert barriers(browser) == []
    reached_by_keyboard(browser)
    silent(browser)


def test_a_search_with_early_stopping(browser: Browser, folder: Folder, tmp_path: Path) -> None:
    rates = [round(0.01 * 1.5**place, 6) for place in range(14)]
    folder.asked(ASKED.replace("seeds: 2", "scheduler: {grace: 20}").replace("[0.02, 0.1]", str(rates)))
    for place, lr in enumerate(rates):
        trial = spec(init="random", inner_lr=lr)
        if place % 3:
            folder.stopped(trial)
            continue
        folder.evaluated(trial)
        folder.trial(trial, val_score=0.5 + 0.01 * place)
    browser.open(write_page(gather([folder.directory.root]), tmp_path / "out"))
    browser.draw_all()
    assert column(browser, "state").count("stopped") == 9
    assert browser.ask("document.getElementById('chart-importance').querySelectorAll('canvas').length") == 1
    # Numbers that are many have two ends to filter by.
    browser.ask(
        "(() => { const low = document.querySelector('input[aria-label=\"inner lr from\"]'); low.value = "
        "'0.05';"
        "low.dispatchEvent(new Event('change')); })()"
    )
    assert rows(browser) == sum(lr >= 0.05 for lr in rates)
    # What this page does not offer any more is no filter, after a renewal.
    stale = "{inner_lr: 'gone', state: 'running', outer_lr: '3'}"
    browser.ask(
        "(() => { const key = 'ddsweep-report ' + document.title, kept = JSON.parse(sessionStorage[key]);"
        "addEventListener('pagehide', () => { sessionStorage[key] = "
        f"JSON.stringify({{...kept, filters: {stale}}}); }});"
        "document.documentElement.dataset.ready = ''; location.reload(); })()"
    )
    assert browser.wait("(document.documentElement || {dataset: {}}).dataset.ready")
    assert rows(browser) == len(rates)
    browser.draw_all()
    browser.ask("document.getElementById('reset').click()")
    for order in (rates, rates[::-1]):
        sort_by(browser, "inner lr")
        assert column(browser, "inner lr") == [f"{lr:g}" for lr in order]
    assert barriers(browser) == []
    reached_by_keyboard(browser)
    silent(browser)
