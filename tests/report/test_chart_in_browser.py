"""The page of the report in headless Chromium, from a file and without network: the chart answers, all of it fits."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import ORIGIN, ship_int8
from conftest import REPOSITORY
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from qexp.report.page import write_report
from qexp.report.results import Evidence

OPTIONS = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage --hide-scrollbars".split()
SCREENSHOTS = REPOSITORY / "build" / "screenshots"
MOST_HIDDEN = """
return Math.max(...Array.from(document.querySelectorAll("body > *")).map(part =>
    part.getBoundingClientRect().right)) - document.documentElement.clientWidth
"""


@pytest.fixture(scope="module")
def report(evidence: Evidence, tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("Chromium is not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})  # type: ignore[no-untyped-call]
    page = write_report(ship_int8(evidence), tmp_path_factory.mktemp("report"), ORIGIN)
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        browser.get(page.as_uri())
        yield browser
    finally:
        browser.quit()


def _resize(page: webdriver.Chrome, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _screenshot(page: webdriver.Chrome, name: str) -> Path:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    file = SCREENSHOTS / f"{name}.png"
    page.find_element(By.TAG_NAME, "body").screenshot(str(file))
    return file


@pytest.mark.slow
def test_hover_shows_value_and_interval_and_the_legend_toggles_a_model(
    report: webdriver.Chrome, evidence: Evidence
) -> None:
    _resize(report, 1000)
    chart, tip = report.find_element(By.ID, "latency-chart"), report.find_element(By.CSS_SELECTOR, ".tip")
    report.execute_script("arguments[0].scrollIntoView()", chart)
    points = chart.find_elements(By.CSS_SELECTOR, '.point[data-model="int8_fx_onednn"]')
    lines = chart.find_elements(By.CSS_SELECTOR, 'polyline[data-model="int8_fx_onednn"]')
    assert len(points) == 3 and len(lines) == 1 and not tip.is_displayed()
    ActionChains(report).move_to_element(points[1]).perform()
    ratio = ship_int8(evidence).latency.rows[1].speedups["int8_fx_onednn"]
    assert tip.text == (
        f"int8_fx_onednn, batch size 8: 0.700 ms (p90 0.770, p99 1.05); {ratio.median:.2f}x as fast as fp32 "
        f"(95 % interval {ratio.low:.2f} to {ratio.high:.2f})"
    )
    button = chart.find_element(By.CSS_SELECTOR, 'button[data-model="int8_fx_onednn"]')
    button.click()
    assert button.get_attribute("aria-pressed") == "false" and not any(one.is_displayed() for one in points + lines)
    assert chart.find_element(By.CSS_SELECTOR, '.point[data-model="fp32"]').is_displayed()
    button.click()
    assert all(point.is_displayed() for point in points)
    assert report.get_log("browser") == []  # type: ignore[no-untyped-call]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1000, 375])
def test_the_page_fits_its_width(report: webdriver.Chrome, width: int) -> None:
    """Wide tables scroll by themselves; figures have the width of the text."""
    _resize(report, width)
    _screenshot(report, f"report-{width}")
    assert report.execute_script("return document.documentElement.scrollWidth") <= width
    assert report.execute_script(MOST_HIDDEN) <= 0
    text = report.find_element(By.TAG_NAME, "h1").size["width"]
    images = report.find_elements(By.TAG_NAME, "img")
    assert len(images) == 7 and {image.size["width"] for image in images} == {text}
