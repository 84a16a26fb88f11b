"""Each notebook in JupyterLab: opened, run with Run All Cells, its controls moved by keys and mouse, at two widths."""

import ast
import contextlib
import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from .conftest import ROOT

pytestmark = pytest.mark.browser

WIDTHS, HEIGHT = (1280, 900), 900
MAX_JUMP_PX, MAX_ANSWER_MS = 20, 500
# A busy machine may spoil a try.
TRIES = 4
RUN_MS, SHOW_MS = 300_000, 120_000

PANEL = "window.jupyterapp.shell.currentWidget"
IDLE = f"{PANEL}.sessionContext.kernelDisplayStatus == 'idle'"
WAITING = "[...document.querySelectorAll('.jp-InputPrompt')].some(prompt => prompt.textContent == '[*]:')"

# What each stop of each control shall show, by the notebook's own render in its kernel.
EXPECTED = """
import base64, json
from qjax.viz.figure import Figure, png
from qjax.viz.widgets import Explorer

def shown(picture):
    if isinstance(picture, Figure):
        return {"alt": picture.alt, "png": base64.b64encode(png(picture)).decode()}
    return {"html": str(picture)}

explorers = []
for count, widget in Out.items():
    if isinstance(widget, Explorer):
        controls = widget.children[0].children
        first = {control.description: control.value for control in controls}
        walks = {
            name: {
                "labels": [str(value) for value in control.options],
                "first": list(control.options).index(control.value),
                "pictures": [shown(widget.render(**first | {name: value})) for value in control.options],
            }
            for name, control in zip(first, controls)
        }
        explorers.append({"count": count, "walks": walks})
answer = json.dumps(explorers)
"""

# Evaluates an expression in the notebook's kernel and leaves no trace there.
ASK = """async expression => {
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const options = {code: '', silent: true, store_history: false, user_expressions: {answer: expression}};
    return (await kernel.requestExecute(options).done).content.user_expressions.answer;
}"""

# Marks when a reader's hand did something; fires before the widget hears of it.
WATCH_HAND = """() => {
    for (const event of ['keydown', 'pointerup'])
        window.addEventListener(event, () => { window.moved = performance.now(); }, {capture: true});
}"""

# The milliseconds since then, as soon as the picture is there, and each frame again until then.
ANSWERED = """([output, control, label, expected]) => {
    const now = performance.now(), field = control.querySelector('input');
    const value = field ? field.value : control.querySelector('.widget-readout').textContent;
    const content = output.querySelector('.widget-html-content'), image = content.querySelector(':scope > img');
    if (value != label) return null;
    if (expected.html != null) {
        const page = document.createElement('template');
        page.innerHTML = expected.html;
        if (content.innerHTML != page.innerHTML) return null;
    } else if (image?.alt != expected.alt || !image.complete || !image.naturalWidth
               || image.src != 'data:image/png;base64,' + expected.png)
        return null;
    return {milliseconds: now - window.moved};
}"""

# The heights of the output at every change, however short.
WATCH_HEIGHT = """output => {
    window.heights = [];
    new ResizeObserver(([entry]) => window.heights.push(entry.contentRect.height)).observe(output);
}"""

# Where the following cell stands below the top of this one.
NEXT_TOP = """cell => cell.nextElementSibling.getBoundingClientRect().top - cell.getBoundingClientRect().top"""

# What scrolls sideways or is cut off: which cell, which part of it, how wide, and how much of that is seen.
TOO_WIDE = """() => {
    const found = [], whole = [document.documentElement, ...document.querySelectorAll('.jp-WindowedPanel-outer')];
    const cells = [...document.querySelectorAll('.jp-Notebook .jp-Cell')];
    const look = (where, elements) => {
        // What a formula is made of, MathJax measures in boxes of its own.
        for (const e of elements.filter(e => !e.parentElement?.closest('mjx-container')))
            if (e.clientWidth && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX != 'visible')
                found.push(`${where}: ${e.className || e.tagName}, ${e.scrollWidth} px in ${e.clientWidth} px`);
    };
    look('page', whole);
    cells.forEach((cell, i) => look('cell ' + (i + 1), [cell, ...cell.querySelectorAll('*')]));
    return found;
}"""


@dataclass(frozen=True)
class Opened:
    """A notebook that was run. explorers: of each `explore` its cell's count and what its controls shall show."""

    page: Any
    explorers: list[dict] = field(repr=False)


# Of a notebook one process takes all tests, if they are shared out by group.
NOTEBOOKS = [
    pytest.param(path, id=path.stem, marks=pytest.mark.xdist_group(path.stem))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
]


@pytest.fixture(scope="module", params=NOTEBOOKS)
def opened(request, browser, lab):
    context = browser.new_context(viewport={"width": WIDTHS[0], "height": HEIGHT})
    with contextlib.closing(context):
        page = context.new_page()
        page.set_default_timeout(SHOW_MS)
        page.goto(lab.format(request.param.name))
        page.wait_for_function(f"window.jupyterapp && {PANEL}?.sessionContext && {IDLE}")
        page.locator(".jp-SideBar.jp-mod-left [data-id=filebrowser]").click()
        page.locator("#filebrowser").wait_for(state="hidden")
        page.locator(".lm-MenuBar-itemLabel").get_by_text("Run", exact=True).click()
        page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
        page.wait_for_function(WAITING)
        page.wait_for_function(f"!{WAITING} && {IDLE}", timeout=RUN_MS)
        scope = "{'Out': Out}"
        answer = page.evaluate(ASK, f"(lambda scope: exec({EXPECTED!r}, scope) or scope['answer'])({scope})")
        assert answer["status"] == "ok", answer
        page.evaluate(WATCH_HAND)
        yield Opened(page, json.loads(ast.literal_eval(answer["data"]["text/plain"])))
        page.evaluate(f"{PANEL}.sessionContext.shutdown()")


def test_every_cell_runs(opened):
    """Each in order and to its end, without errors that are not meant, and without a word on stderr."""
    cells = opened.page.evaluate(
        """[...window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells].map(cell => cell.toJSON())"""
    )
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    prompts = opened.page.locator(".jp-InputPrompt").all_text_contents()
    assert [prompt for prompt in prompts if prompt] == [f"[{n}]:" for n in range(1, len(cells) + 1)]
    for cell in cells:
        fails = [output for output in cell["outputs"] if output["output_type"] == "error"]
        assert len(fails) == ("raises-exception" in cell["metadata"].get("tags", [])), cell["source"]
        assert [output for output in cell["outputs"] if output.get("name") == "stderr"] == []
    shown = opened.page.locator(".jp-OutputArea-output")
    # Newer versions of JupyterLab show an error, too, as if it were written to stderr.
    meant = sum(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    stderr = opened.page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']:visible")
    assert len(stderr.all_text_contents()) <= meant
    for words in ("Error displaying widget", "Error creating widget", "Loading widget", "Javascript Error"):
        assert shown.filter(has_text=words).all_text_contents() == []
    assert 0 not in shown.locator("img").evaluate_all("all => all.map(image => image.naturalWidth)")


def test_controls(opened):
    """Every stop shows the picture that render draws for it, soon, and nothing else on the page moves."""
    assert opened.explorers, "a notebook has a control to play with"
    for explorer in opened.explorers:
        prompt = opened.page.locator(f".jp-InputPrompt:text-is('[{explorer['count']}]:')")
        cell = opened.page.locator(".jp-CodeCell").filter(has=prompt)
        cell.scroll_into_view_if_needed()
        cell.evaluate(WATCH_HEIGHT)
        tops = []
        for i, (name, walk) in enumerate(explorer["walks"].items()):
            control = Control(cell, name, walk, tops)
            if control.handle.count():
                control.through_the_stops()
                if i == 0:
                    control.drag()
            else:
                control.type_each()
            assert len({json.dumps(picture) for picture in walk["pictures"]}) > len(walk["pictures"]) / 2, name
        heights = opened.page.evaluate("window.heights")
        assert max(heights) - min(heights) <= MAX_JUMP_PX, heights
        assert max(tops) - min(tops) <= MAX_JUMP_PX, tops


class Control:
    """One control of the `explore` in ``cell``. tops: gains where the following cell stands after each move."""

    def __init__(self, cell: Any, name: str, walk: dict, tops: list[float]):
        self.name, self.labels, self.pictures, self.tops = name, walk["labels"], walk["pictures"], tops
        self.page, self.cell = cell.page, cell
        label = self.page.locator(f".widget-label:text-is('{name}')")
        self.widget = cell.locator(".widget-hslider, .widget-text").filter(has=label)
        self.handle, self.field = self.widget.get_by_role("slider"), self.widget.locator("input")
        self.first = self.here = walk["first"]
        self.seen: set[int] = set()
        self.see(self.first)

    def see(self, stop: int) -> float:
        """Waits for the picture of ``stop``; the milliseconds since the last key or button."""
        from playwright.sync_api import TimeoutError

        where = [self.cell.element_handle(), self.widget.element_handle(), self.labels[stop], self.pictures[stop]]
        try:
            found = self.page.wait_for_function(ANSWERED, arg=where, polling="raf").json_value()
        except TimeoutError:
            content = self.cell.locator(".widget-html-content").inner_html()
            pytest.fail(f"{self.name} at {self.labels[stop]}: {str(self.pictures[stop])[:300]}, not {content[:300]}")
        self.tops.append(self.cell.evaluate(NEXT_TOP))
        self.here = stop
        return found["milliseconds"]

    def through_the_stops(self) -> None:
        """By the arrow keys: to the last stop, to the first, to the last and back, so that each is visited twice."""
        last = len(self.labels) - 1
        for there in (last, 0, last, self.first):
            self.walk(there)

    def walk(self, there: int) -> None:
        while self.here != there:
            self.press(1 if there > self.here else -1)

    def press(self, step: int) -> None:
        """An arrow key, answered soon where the stop was seen before."""
        there = self.here + step
        for _ in range(TRIES):
            milliseconds = self.key(step)
            if milliseconds < MAX_ANSWER_MS or there not in self.seen:
                break
            self.key(-step)
        else:
            pytest.fail(f"{self.name} at {self.labels[there]} took {milliseconds:.0f} ms")
        self.seen.add(there)

    def key(self, step: int) -> float:
        self.handle.press("ArrowRight" if step > 0 else "ArrowLeft")
        return self.see(self.here + step)

    def drag(self) -> None:
        """By the mouse, to the farther end."""
        last = len(self.labels) - 1
        there = 0 if self.first > last / 2 else last
        handle, track = self.handle.bounding_box(), self.widget.locator(".noUi-base").bounding_box()
        y = handle["y"] + handle["height"] / 2
        self.page.mouse.move(handle["x"] + handle["width"] / 2, y)
        self.page.mouse.down()
        self.page.mouse.move(track["x"] + (track["width"] if there else 0), y, steps=8)
        self.page.mouse.up()
        self.see(there)
        self.walk(self.first)

    def type_each(self) -> None:
        """Each example and Enter, twice over; the first of them last."""
        for again in (False, True):
            for i in [*range(1, len(self.labels)), 0]:
                self.field.fill("")
                self.field.press_sequentially(self.labels[i])
                self.field.press("Enter")
                assert self.see(i) < MAX_ANSWER_MS or not again, self.labels[i]


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_scrolls_sideways(opened, width):
    opened.page.set_viewport_size({"width": width, "height": HEIGHT})
    # JupyterLab lays out anew a while after.
    opened.page.wait_for_timeout(700)
    found = opened.page.evaluate(TOO_WIDE)
    opened.page.set_viewport_size({"width": WIDTHS[0], "height": HEIGHT})
    assert not found, "\n".join(found)
