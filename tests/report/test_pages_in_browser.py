"""What a person sees: MLflow's pages of a finished run in headless Chromium. Screenshots stay in build/screenshots."""

import shutil
from collections.abc import Callable, Iterator

import mlflow
import pytest
from conftest import REPOSITORY, Finished
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from servers import start_server

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=2200,1000"
).split()
SCREENSHOTS = REPOSITORY / "build" / "screenshots"
PATIENCE_S = 90  # a busy machine draws slowly
WIDTHS = "return Array.from(document.images).map(image => image.complete ? image.naturalWidth : 0)"

Look = Callable[[str, str, Callable[[webdriver.Chrome], object]], bool]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    program, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("Chromium is not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    opened = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield opened
    finally:
        opened.quit()


@pytest.fixture(scope="module")
def look(browser: webdriver.Chrome, finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Look]:
    """Open a page, wait until something is there, keep a picture either way; whether it has come."""
    with start_server(tmp_path_factory.mktemp("server"), finished.uri) as server:

        def look_at(page: str, name: str, there: Callable[[webdriver.Chrome], object]) -> bool:
            if "/artifacts/" in page:  # its view reads the address only when it is loaded
                browser.get("about:blank")
            browser.get(f"{server.url}/#/{page}")
            try:
                WebDriverWait(browser, PATIENCE_S, ignored_exceptions=[Exception]).until(there)
            except TimeoutException:
                return False
            else:
                return True
            finally:
                browser.switch_to.default_content()
                SCREENSHOTS.mkdir(parents=True, exist_ok=True)
                file = SCREENSHOTS / f"{name}.png"
                browser.save_screenshot(str(file))
                print(f"screenshot: {file}")

        yield look_at


@pytest.fixture(scope="module")
def run_pages(finished: Finished) -> dict[str, str]:
    """The pages of the runs, by name of the run."""
    runs = mlflow.MlflowClient(finished.uri).search_runs(["1"])
    return {run.info.run_name: f"experiments/1/runs/{run.info.run_id}" for run in runs}


def _text(page: webdriver.Chrome) -> str:
    return page.find_element(By.TAG_NAME, "body").text


@pytest.mark.slow
def test_table_of_runs_shows_the_answer_as_columns(look: Look) -> None:
    """In the view that each experiment has; MLflow's own columns have neither metrics nor tags."""
    words = ("smallnet-digits", "headline/mean_speedup", "headline/top1_drop_points", "qexp.verdict", "ship int8")
    page = "experiments/1/runs?viewStateShareKey=qexp-verdicts"
    assert look(page, "runs", lambda page: all(word in _text(page) for word in words))


@pytest.mark.slow
def test_run_page_answers_and_shows_models(look: Look, run_pages: dict[str, str]) -> None:
    words = ("Compared with the fastest float", "95 % interval", "smallnet-digits-int8", "headline/size_ratio")
    assert look(run_pages["smallnet-digits"], "run", lambda page: all(word in _text(page) for word in words))


@pytest.mark.slow
@pytest.mark.parametrize(("run", "section"), [("train-smallnet", "train"), ("latency-smallnet", "latency/p50_ms")])
def test_charts_of_a_run_begin_with_its_curves(run: str, section: str, look: Look, run_pages: dict[str, str]) -> None:
    """Charts that are in sight are drawn: these are curves, and none is a bar."""

    def curves(page: webdriver.Chrome) -> bool:
        lines = page.find_elements(By.CSS_SELECTOR, ".js-plotly-plot path.js-line")
        bars = page.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .bars path")
        return section in _text(page).split() and len(lines) >= 3 and not bars

    assert look(f"{run_pages[run]}/model-metrics", f"curves-{run.split('-')[0]}", curves)


@pytest.mark.slow
def test_pictures_and_report_open_in_the_artifact_view(look: Look, run_pages: dict[str, str]) -> None:
    folder = f"{run_pages['smallnet-digits']}/artifacts/report"
    assert look(f"{folder}/figures/accuracy_curve.png", "picture", lambda page: max(page.execute_script(WIDTHS)) > 400)

    def report(page: webdriver.Chrome) -> bool:
        page.switch_to.default_content()
        page.switch_to.frame(page.find_element(By.CSS_SELECTOR, "iframe[src^='blob:']"))
        widths = page.execute_script(WIDTHS)
        return "ship as int8 on this CPU?" in _text(page) and len(widths) == 7 and min(widths) > 400

    assert look(f"{folder}/report.html", "report", report)


@pytest.mark.slow
def test_registry_page_shows_aliases(look: Look) -> None:
    words = ("@ champion", "@ challenger", "Version 1")
    assert look("models/smallnet-digits-int8", "registry", lambda page: all(word in _text(page) for word in words))


@pytest.mark.slow
def test_version_page_answers_and_links_to_its_runs(look: Look) -> None:
    def answers(page: webdriver.Chrome) -> bool:
        links = [link.get_attribute("href") or "" for link in page.find_elements(By.TAG_NAME, "a")]
        words = ("Ship int8", "Test top-1", "95 % interval", "the fastest float in the mean")
        return all(word in _text(page) for word in words) and any("report/report.html" in link for link in links)

    assert look("models/smallnet-digits-int8/versions/1", "version", answers)
