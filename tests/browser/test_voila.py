"""The playground in Voila: a page without code, whose controls work."""

import contextlib
import re

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("voila")]

OPEN_MS, WORK_MS, SHOW_MS = 300_000, 180_000, 60_000


class Playground:
    """What a reader can do and see there."""

    def __init__(self, page):
        self.page = page
        # An icon stands before the word.
        self.run, self.stop = (page.get_by_role("button", name=re.compile(f"{name}$")) for name in ("Run", "Stop"))
        self.box = page.locator(".widget-vbox").filter(has=self.run)
        self.status, self.result = self.box.get_by_role("status"), self.box.locator(".qjax-trial")
        self.bar = self.box.locator(".progress-bar")

    def to_the_end(self, label: str, key: str) -> None:
        """Moves a slider to its first or last stop."""
        name = self.page.locator(f".widget-label:text-is('{label}')")
        self.box.locator(".widget-hslider").filter(has=name).get_by_role("slider").press(key)

    def begin(self) -> None:
        from playwright.sync_api import expect

        self.run.click()
        expect(self.run).to_be_disabled()
        expect(self.stop).to_be_enabled()

    def end(self) -> str:
        """Waits for the end, and returns what the page says then."""
        from playwright.sync_api import expect

        expect(self.run).to_be_enabled(timeout=WORK_MS)
        expect(self.stop).to_be_disabled()
        said = self.status.inner_text()
        assert not re.search(r'Traceback|File "', self.page.locator("body").inner_text())
        return said

    def wait_for_progress(self) -> None:
        """Until a step is named and the bar has left its beginning."""
        self.status.filter(has_text=re.compile(r"\bof\b.*\d of \d")).wait_for(timeout=WORK_MS)
        self.page.wait_for_function("bar => bar.offsetWidth > 0", arg=self.bar.element_handle(), timeout=WORK_MS)


@pytest.fixture(scope="module")
def playground(browser, voila):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    with contextlib.closing(context):
        page = context.new_page()
        page.set_default_timeout(SHOW_MS)
        # Nothing is sent before all cells are run.
        page.goto(voila, timeout=OPEN_MS, wait_until="commit")
        opened = Playground(page)
        opened.run.wait_for(timeout=OPEN_MS)
        opened.to_the_end("windows", "Home")
        opened.to_the_end("tokens", "Home")
        yield opened


def test_the_page_is_whole(playground):
    """The last line of the notebook is there, and neither code nor an error."""
    page = playground.page
    assert page.get_by_role("heading", level=1).inner_text().strip("¶") == "What about your model?"
    page.get_by_text("All is as this page says.").wait_for()
    text = page.locator("body").inner_text()
    assert not re.search(r"Traceback|Error displaying|error occurred|import qjax", text)
    assert page.locator("img").evaluate_all("all => all.every(image => image.naturalWidth)")


def test_run_shows_progress_and_a_result(playground):
    before = playground.result.inner_text()
    playground.begin()
    playground.wait_for_progress()
    assert playground.end() == "Done."
    result = playground.result.inner_text()
    assert result != before
    assert "in 2 windows of 512" in result
    for row in (r"size\s.*MiB\s.*MiB\s.*%", r"perplexity \(PPL\)\s.*±.*±.*±", r"KL divergence.*\s0\.\d+ ± 0\.\d+"):
        assert re.search(row, result), row


def test_stop_stops(playground):
    before = playground.result.inner_text()
    playground.to_the_end("windows", "End")
    playground.begin()
    playground.wait_for_progress()
    playground.stop.click()
    assert "Stopped" in playground.end()
    assert playground.result.inner_text() == before


def test_a_wrong_model_gets_an_answer(playground):
    before = playground.result.inner_text()
    model = playground.box.get_by_label("model", exact=True)
    model.fill("no-such-model")
    playground.run.click()
    playground.status.filter(has_text="no-such-model").wait_for()
    said = playground.end()
    assert "Failed" in said
    assert len(said) < 600
    assert playground.result.inner_text() == before
    model.fill("tiny")
