"""Playground: a page to try formats on a model; the work in a thread, between two buttons."""

import html
import math
import threading
from collections.abc import Callable
from typing import Any

import ipywidgets
import traitlets

from qjax.errors import QjaxError
from qjax.io import hub, repository
from qjax.methods import recipes
from qjax.progress import Step, Stopped, observed
from qjax.viz.trial import BY_BUDGET, BY_GROUP, GROUPS, TRIAL, Settings, Trial, format_names, trial_page, try_out

_LABELS = {
    "model": "model", "recipe": "file type", "budget": "budget, bpw", "attention": "attention", "mlp": "MLP",
    "embedding": "embedding", "imatrix": "imatrix", "text": "text", "windows": "windows", "prompt": "prompt",
    "max_tokens": "tokens",
}  # fmt: skip
_HINTS = {
    "model": "name, path, or Hub id",
    "imatrix": "none, or a file",
    "text": "tales, or a file",
}
_CHOICES = {"windows": (2, 4, 8, 16, 32, 64), "max_tokens": (16, 32, 64, 128)}


class Playground(ipywidgets.VBox):
    """Controls for `Settings`, Run and Stop, and the page of the last trial.

    state: "idle", "working", "stopped" (by the button) or "failed" (the page says why).
    trial: the last that ran to its end; one that is given is shown at once, and its settings are where the controls
    stand at first.  run: what does the work, `try_out`; its progress is shown and can be stopped.
    """

    state = traitlets.Enum(("idle", "working", "stopped", "failed"), "idle")
    trial = traitlets.Instance(Trial, allow_none=True)

    def __init__(self, trial: Trial | None = None, run: Callable[[Settings], Trial] = try_out):
        self._run = run
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        first = trial.settings if trial else Settings()
        self.controls: dict[str, Any] = {name: _control(name, getattr(first, name)) for name in _LABELS}
        self.run_button = ipywidgets.Button(description="Run", icon="play", button_style="primary")
        self.stop_button = ipywidgets.Button(description="Stop", icon="stop", disabled=True)
        self._bar = ipywidgets.FloatProgress(max=1.0, layout={"width": "14em"})
        self._status, self._page = ipywidgets.HTML(), ipywidgets.HTML()
        super().__init__([*self._rows(), self._status, self._page], trial=trial)
        self.run_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.controls["recipe"].observe(self._enable, names="value")
        self._enable()
        self._say("Choose, then press Run.")
        if trial:
            self._page.value = trial_page(trial)

    def __repr__(self) -> str:
        return f"Playground({self.settings}; {self.state})"

    @property
    def settings(self) -> Settings:
        """Where the controls stand."""
        chosen = {name: control.value for name, control in self.controls.items()}
        return Settings(**{name: v.strip() if name in _HINTS else v for name, v in chosen.items()})

    def start(self) -> None:
        """Begins a trial of `settings`, unless one is under way."""
        if self.state == "working":
            return
        self._stop = threading.Event()
        self._turn("working")
        # A daemon, so that it does not keep a kernel alive that shuts down.
        self._thread = threading.Thread(target=self._work, args=(self.settings, self._stop), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the trial after the step that it is at: a tensor, a window, a few tokens; a download at once."""
        if self.state == "working":
            self._stop.set()
            self.stop_button.disabled = True
            self._say("Stopping after this step.")

    def wait(self, timeout_s: float | None = None) -> None:
        """Until no trial is under way."""
        if self._thread:
            self._thread.join(timeout_s)

    def _work(self, settings: Settings, stop: threading.Event) -> None:
        """In a thread: whatever happens is said on the page, which is all that the reader sees."""

        whole = Step(TRIAL, 0, None, "step")

        def show(step: Step) -> None:
            nonlocal whole
            if stop.is_set():
                raise Stopped
            if step.desc == TRIAL:
                whole = step
                return
            self._bar.value = step.done / step.total if step.total else 0.0
            number = f"Step {whole.done + 1} of {whole.total}, " if whole.total else ""
            self._say(f"{number}{_one_line(step.desc)}: {_how_far(step)}.")

        try:
            with observed(show):
                trial = self._run(settings)
            page = trial_page(trial)
        except Stopped:
            self._turn("stopped", "Stopped. What stands below is from before.")
        except QjaxError as error:
            self._turn("failed", str(error))
        except Exception as error:
            self._turn("failed", f"{type(error).__name__}: {error}")
        else:
            self.trial, self._page.value = trial, page
            self._turn("idle", "Done.")

    def _turn(self, state: str, message: str = "") -> None:
        working = state == "working"
        self.run_button.disabled, self.stop_button.disabled = working, not working
        self._bar.value = 0.0 if working else self._bar.value
        self._bar.bar_style = {"failed": "danger", "stopped": "warning", "idle": "success"}.get(state, "")
        if message:
            self._say(f"<b>Failed:</b> {_one_line(message)}" if state == "failed" else message)
        # Last: who waits for it finds all else done.
        self.state = state

    def _say(self, message: str) -> None:
        self._status.value = f'<div role="status" style="line-height: 1.5; min-height: 1.5em">{message}</div>'

    def _enable(self, change: Any = None) -> None:
        """The formats of the groups count only by group, the budget only by budget."""
        recipe = self.controls["recipe"].value
        for group in GROUPS:
            self.controls[group].disabled = recipe != BY_GROUP
        self.controls["budget"].disabled = recipe != BY_BUDGET

    def _rows(self) -> list[ipywidgets.Widget]:
        of = self.controls
        rows = [
            [of["model"], of["recipe"], of["budget"]],
            [of[group] for group in GROUPS],
            [of["text"], of["windows"], of["max_tokens"]],
            [of["imatrix"]],
            [of["prompt"]],
            [self.run_button, self.stop_button, self._bar],
        ]
        return [ipywidgets.HBox(row, layout={"flex_flow": "row wrap"}) for row in rows]


def _how_far(step: Step) -> str:
    done, total, unit = step.done, step.total, f"{step.unit}s"
    if step.unit == "B":
        done, total, unit = round(done / 1e6), total and math.ceil(total / 1e6), "MB"
    return f"{done} {unit}" if total is None else f"{done} of {total} {unit}"


def _one_line(message: str) -> str:
    return html.escape(" ".join(message.split()))


def _with(value: Any, options: tuple) -> list:
    """``options``, and ``value`` if it is none of them."""
    return list(dict.fromkeys((*options, value)))


def _control(name: str, value: Any) -> Any:
    options: dict[str, Any] = {"description": _LABELS[name], "value": value}
    options |= {"style": {"description_width": "7em"}, "layout": {"width": "22em"}}
    if name == "model":
        at_hand = (*hub.names(), *repository.cached_names())
        return ipywidgets.Combobox(options=at_hand, placeholder=_HINTS[name], **options)
    if name == "recipe":
        return ipywidgets.Dropdown(options=_with(value, (BY_GROUP, BY_BUDGET, *recipes.names())), **options)
    if name == "budget":
        return ipywidgets.FloatText(step=0.25, **options)
    if name in GROUPS:
        return ipywidgets.Dropdown(options=_with(value, format_names()), **options)
    if name in _CHOICES:
        return ipywidgets.SelectionSlider(
            options=sorted(_with(value, _CHOICES[name])), continuous_update=False, **options
        )
    if name == "prompt":
        return ipywidgets.Textarea(rows=2, **options | {"layout": {"width": "48em", "max_width": "95%"}})
    return ipywidgets.Text(placeholder=_HINTS[name], **options)
