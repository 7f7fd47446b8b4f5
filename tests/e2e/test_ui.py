"""Dagster's UI after a promotion, in a browser: what a person sees of a benchmark."""

import dataclasses
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.e2e.conftest import Target

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(500)]

CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run"
)
WAIT_MS = 60_000  # for anything to appear, on a busy machine


@pytest.fixture(scope="module")
def chromium() -> str:
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("no chromium on PATH: install the package `chromium` (apt-get install)")
    return path


@pytest.fixture(scope="module")
def promoted(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """After a promotion in a DAGSTER_HOME of its own: the UI shows the latest run of each asset."""
    home = tmp_path_factory.mktemp("dagster_home_ui")
    shutil.copy(target.home / "dagster.yaml", home)
    alone = dataclasses.replace(target, home=home)
    run = alone.promote()
    assert run.status == 0, run.output[-6000:]
    return alone


@pytest.fixture(scope="module")
def address(promoted: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The web server that `make ui` starts too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    log = tmp_path_factory.mktemp("ui") / "log"
    webserver = str(Path(sys.executable).parent / "dagster-webserver")
    with log.open("w") as out:
        process = subprocess.Popen(
            [webserver, "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", port],
            cwd=promoted.checkout, env=promoted.environment(), stdout=out, stderr=out,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/server_info", timeout=5).close()
                break
            except OSError:
                said = log.read_text()[-3000:]
                assert process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def page(chromium: str, address: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS.split())
        try:
            page = browser.new_page(viewport={"width": 1600, "height": 1200})
            page.set_default_timeout(WAIT_MS)
            expect.set_options(timeout=WAIT_MS)
            yield page
        finally:
            browser.close()


def test_the_benchmarks_picture(promoted: Target, address: str, page: Page) -> None:
    page.goto(f"{address}/assets/ttft_benchmark?view=events&partition={promoted.model_name}")
    page.get_by_text("Show Markdown").first.click()
    picture = page.get_by_role("img", name="TTFT against arrival rate")
    expect(picture).to_be_visible()
    width, height = picture.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert min(width, height) > 200


def test_the_benchmarks_check(promoted: Target, address: str, page: Page) -> None:
    page.goto(f"{address}/assets/ttft_benchmark?view=checks")
    expect(
        page.get_by_text(re.compile(r"pass: TTFT p95 .* ms \(SLO 1000 ms\)")).first
    ).to_be_visible()
    expect(page.get_by_text("Passed", exact=True).first).to_be_visible()
