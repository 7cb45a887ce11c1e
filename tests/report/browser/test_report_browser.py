"""The report in a real browser without a network: it draws, its controls work, and names in it stay names."""

import base64
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_pages import ATTRIBUTES, LAYERS, NAMES, requests_of, vectors_of
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from tl_persona.report import write_report

pytestmark = pytest.mark.browser

SHOWN = [*sorted(set(NAMES) - {"baseline_assistant"}), "baseline_assistant"]


@pytest.fixture(scope="session")
def page_file(filled_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(filled_store, tmp_path_factory.mktemp("page") / "report.html", attributes=ATTRIBUTES)


@pytest.fixture
def page(chromium: Any, page_file: Path) -> Any:
    chromium.get_log("browser")
    requests_of(chromium)
    chromium.get(page_file.as_uri())
    assert chromium.execute_script("return document.documentElement.dataset.ready") == "yes"
    return chromium


def drawn(page: Any, plot: str, what: str) -> Any:
    return page.execute_script(f"return document.getElementById('{plot}').{what}")


def expected_cosines(layer: int, variant: str = "biography", *, centred: bool) -> np.ndarray[Any, Any]:
    vectors = np.stack([vectors_of(persona_id, variant)[layer].double().numpy() for persona_id in SHOWN])
    if centred:
        vectors = vectors - vectors[:-1].mean(axis=0)  # the plain assistant is last, and no part of the mean
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return units @ units.T


def first_row(page: Any, table: str) -> list[str]:
    """The cells of a table's first row, once the browser has filled it."""
    cells = f"#{table} tbody tr:first-child > *"
    WebDriverWait(page, 10).until(lambda _: page.find_elements(By.CSS_SELECTOR, cells))
    return [cell.text for cell in page.find_elements(By.CSS_SELECTOR, cells)]


def set_slider(page: Any, key: str) -> None:
    page.find_element(By.ID, "layer").send_keys(key)


def test_the_page_asks_the_network_for_nothing_and_the_console_is_clean(page: Any, page_file: Path) -> None:
    page.find_element(By.ID, "layer").send_keys(Keys.HOME)
    page.execute_script("window.dispatchEvent(new Event('resize'))")
    assert page.get_log("browser") == []
    assert {url for url in requests_of(page) if not url.startswith(("data:", "blob:"))} == {page_file.as_uri()}


def test_a_forbidden_request_would_be_noticed(page: Any) -> None:
    page.execute_script("new Image().src = 'http://example.invalid/x.png'; fetch('http://example.invalid/')")
    assert any("Content Security Policy" in entry["message"] for entry in page.get_log("browser"))


def test_the_heatmap_shows_the_cosines_of_the_slider_s_layer(page: Any) -> None:
    set_slider(page, Keys.HOME)
    for layer in range(LAYERS):
        found = np.array(drawn(page, "similarity", "data[0].z"), dtype=float)
        np.testing.assert_allclose(found, expected_cosines(layer, centred=True), atol=1e-4)
        assert page.find_element(By.ID, "layer").get_attribute("aria-valuetext") == (
            f"layer {layer} (blocks.{layer}.hook_resid_post)"
        )
        set_slider(page, Keys.ARROW_RIGHT)
    set_slider(page, Keys.ARROW_RIGHT)  # at the end: stays there
    assert page.find_element(By.ID, "layer").get_attribute("value") == str(LAYERS - 1)


def test_the_mean_persona_stays_in_when_asked_to(page: Any) -> None:
    set_slider(page, Keys.HOME)
    page.find_element(By.ID, "mean").send_keys(Keys.SPACE)
    found = np.array(drawn(page, "similarity", "data[0].z"), dtype=float)
    np.testing.assert_allclose(found, expected_cosines(0, centred=False), atol=1e-4)
    assert (drawn(page, "similarity", "data[0].zmin"), drawn(page, "similarity", "data[0].zmax")) == (-1, 1)


def test_stretched_colours_end_at_the_layer_s_own_values_with_zero_in_the_middle(page: Any) -> None:
    set_slider(page, Keys.HOME)
    page.find_element(By.ID, "stretch").send_keys(Keys.SPACE)
    pairs = expected_cosines(0, centred=True)[np.triu_indices(len(SHOWN), 1)]
    low, high = drawn(page, "similarity", "data[0].zmin"), drawn(page, "similarity", "data[0].zmax")
    assert low == -high and high == pytest.approx(np.abs(pairs).max(), abs=1e-4)
    page.find_element(By.ID, "mean").send_keys(Keys.SPACE)
    pairs = expected_cosines(0, centred=False)[np.triu_indices(len(SHOWN), 1)]
    assert drawn(page, "similarity", "data[0].zmin") == pytest.approx(pairs.min(), abs=1e-4)


def test_another_variant_is_drawn_when_chosen(page: Any) -> None:
    chooser = Select(page.find_element(By.ID, "collection"))
    assert [option.text for option in chooser.options] == [
        f"org/model · answer_mean · {variant}" for variant in ("biography", "templated")
    ]
    chooser.select_by_index(1)
    set_slider(page, Keys.HOME)
    found = np.array(drawn(page, "similarity", "data[0].z"), dtype=float)
    np.testing.assert_allclose(found, expected_cosines(0, "templated", centred=True), atol=1e-4)


def test_names_that_look_like_markup_are_shown_and_never_run(page: Any) -> None:
    labels = [label.text for label in page.find_elements(By.CSS_SELECTOR, "#similarity .yaxislayer-above text")]
    assert sorted(labels) == sorted(
        ["Ada (1)", "Ada (2)", "Assistant", *(NAMES[each][:31] + "…" for each in ("bo", "cy"))]
    )
    page.find_element(By.CSS_SELECTOR, "#similarity-table summary").click()
    page.find_element(By.CSS_SELECTOR, "#map-table summary").click()
    people = page.find_element(By.XPATH, "//summary[contains(text(), 'personas by id')]")
    people.click()
    assert NAMES["bo"] in people.find_element(By.XPATH, "..").text
    assert page.execute_script("return window.hacked") is None
    assert page.execute_script("return document.querySelectorAll('main img, main script, main b').length") == 0


def test_the_map_is_coloured_by_the_chosen_attribute(page: Any) -> None:
    chooser = Select(page.find_element(By.ID, "attribute"))
    assert [option.text for option in chooser.options] == ["one colour", "home", "age"]
    chooser.select_by_visible_text("home")
    assert drawn(page, "map", "data.map((trace) => [trace.name, trace.x.length])") == [
        ["sea", 2], ["&lt;b&gt;hill&lt;/b&gt;", 1], ["town", 1], ["not known", 1],
    ]  # fmt: skip
    looks = drawn(page, "map", "data.map((trace) => trace.marker.color + trace.marker.symbol)")
    assert len(set(looks)) == 4
    before = drawn(page, "map", "data[0].x")
    set_slider(page, Keys.ARROW_RIGHT)
    assert drawn(page, "map", "data[0].x") != before


def test_every_figure_has_a_table_with_the_numbers_it_draws(page: Any) -> None:
    set_slider(page, Keys.HOME)
    page.find_element(By.CSS_SELECTOR, "#similarity-table summary").send_keys(Keys.ENTER)

    for layer in (0, 1):
        assert first_row(page, "similarity-table") == [
            "Ada (1)", *(f"{value:.3f}" for value in expected_cosines(layer, centred=True)[0])
        ]  # fmt: skip
        set_slider(page, Keys.ARROW_RIGHT)  # the open table follows the slider
    page.find_element(By.CSS_SELECTOR, "#norms-table summary").click()
    norms = [np.linalg.norm(vectors_of(each, "biography")[0].double().numpy()) for each in SHOWN]
    cells = first_row(page, "norms-table")
    assert [float(cell) for cell in cells[1:4]] == pytest.approx([min(norms), np.median(norms), max(norms)], rel=1e-3)


def test_the_words_under_the_heatmap_name_the_most_and_the_least_alike(page: Any) -> None:
    set_slider(page, Keys.HOME)
    page.find_element(By.ID, "mean").send_keys(Keys.SPACE)
    similarity = expected_cosines(0, centred=False)
    np.fill_diagonal(similarity, np.nan)
    words = page.find_element(By.ID, "similarity-words").text
    most, least = words.split("Least:")
    assert f"({np.nanmax(similarity):.3f})" in most and f"({np.nanmin(similarity):.3f})" in least
    assert words.split(". ", 1)[1] in page.find_element(By.ID, "similarity").get_attribute("aria-label")


def test_the_layers_of_a_set_are_drawn_with_the_chosen_one_marked(page: Any) -> None:
    lines = {trace["name"]: trace for trace in drawn(page, "set-0", "data.map(({name, y, x}) => ({name, x, y}))")}
    assert lines["held-out AUC"]["y"] == [0.7, 0.95, 0.9]
    assert lines["norm of the vector"]["y"] == [2, 4, 6]  # ones of width 4, times 1, 2, 3
    assert lines["95 % interval of the AUC"]["y"] == pytest.approx([0.6, 0.85, 0.8, 0.94, 0.99, 0.74])
    assert {shape["x0"] for shape in drawn(page, "set-0", "layout.shapes")} == {1}
    assert "Chosen: layer 1" in page.find_element(By.CSS_SELECTOR, "[aria-labelledby=steering]").text


def test_a_screen_reader_finds_names_for_everything(page: Any) -> None:
    assert page.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"
    levels = [int(each.tag_name[1]) for each in page.find_elements(By.CSS_SELECTOR, "h1, h2, h3")]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))
    page.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    for control in page.find_elements(By.CSS_SELECTOR, "input, select, [role=img], [role=region], figure"):
        assert control.accessible_name, control.get_attribute("outerHTML")
    for figure in page.find_elements(By.CSS_SELECTOR, "figure"):
        after = figure.find_element(By.XPATH, "following-sibling::*[1]")
        assert after.tag_name == "details"
    assert page.find_elements(By.CSS_SELECTOR, "table:not(:has(th))") == []


def test_everything_can_be_reached_with_the_tab_key(page: Any) -> None:
    body, reached = page.find_element(By.TAG_NAME, "body"), set()
    body.send_keys(Keys.TAB)
    for _ in range(40):
        focused = page.switch_to.active_element
        reached.add(focused.get_attribute("id") or focused.tag_name)
        focused.send_keys(Keys.TAB)
    assert {"collection", "layer", "mean", "stretch", "attribute", "summary"} <= reached


def test_on_paper_controls_are_gone_and_figures_fit(page: Any) -> None:
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert not page.find_element(By.ID, "layer").is_displayed()
        assert page.find_element(By.ID, "printed-collection").is_displayed()
        widths = page.execute_script(
            "return [...document.querySelectorAll('.plot .main-svg')].map((p) => p.getBoundingClientRect().width)"
        )
        assert max(widths) <= 794 - 2 * 53  # of A4 at 96 dots an inch, less both margins
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    printed = page.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    pages = base64.b64decode(printed["data"]).count(b"/Type /Page\n")
    assert 2 <= pages <= 8


@pytest.mark.parametrize("width", [800, 1366])
def test_nothing_sticks_out_to_the_side(width: int, page: Any) -> None:
    page.set_window_size(width, 768)
    try:
        beyond = "return document.documentElement.scrollWidth - window.innerWidth"
        WebDriverWait(page, 10).until(lambda _: page.execute_script(beyond) <= 0)
    finally:
        page.set_window_size(1366, 768)


def test_a_page_about_a_set_alone_draws_it(chromium: Any, filled_store: Path, tmp_path: Path) -> None:
    file = write_report(filled_store / "steering" / "calm", tmp_path / "set.html")
    chromium.get_log("browser")
    chromium.get(file.as_uri())
    assert drawn(chromium, "set-0", "data.length") == 7
    assert chromium.find_elements(By.ID, "layer") == [] and chromium.get_log("browser") == []


@pytest.mark.parametrize("personas", [1, 2])
def test_a_page_about_few_personas_leaves_out_what_makes_no_sense(
    personas: int, chromium: Any, tmp_path: Path, few: Callable[[Path, int], Path]
) -> None:
    file = write_report(few(tmp_path / "store", personas), tmp_path / "few.html")
    chromium.get_log("browser")
    chromium.get(file.as_uri())
    assert chromium.execute_script("return document.documentElement.dataset.ready") == "yes"
    assert not chromium.find_element(By.ID, "map-part").is_displayed()
    assert chromium.find_element(By.ID, "mean").is_enabled() is (personas > 1)
    assert np.shape(drawn(chromium, "similarity", "data[0].z")) == (personas, personas)
    assert chromium.get_log("browser") == []
