"""The page's first tab: one prompt, one seed, any models."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from app import cards
from app.examples import EXAMPLES, example
from app.picture import Saved, enlarged, file_name, read_comparison, write_comparison
from app.session import Drawn, Session, Step, weights
from app.told import DRAWING, in_words, on_a_shared_gpu, saved_file
from app.wanted import GUIDANCE, SEED, STEPS, Wanted, shown, steps_in_words, wanted
from flowopd_eval.errors import RequestError

_IDLE = cards.empty(
    "No pictures yet",
    "Write a prompt or take an example, choose models, and draw. Every model starts from the same noise, so what "
    "differs between the pictures is what the models differ in.",
)
_PAIR = cards.empty("Two pictures under one slider", "Draw at least two models; then any two of them can be laid here.")


# On a phone the pictures come below the settings: whoever draws is taken there.
_SEE = """(...asked) => {
  if (window.innerWidth < 700) document.querySelector("#status").scrollIntoView({behavior: "smooth"});
  return asked;
}"""

# In the page itself: the server would answer only after its turn, and its answer could overtake that of the drawing.
_BUSY = """() => [{__type__: "update", interactive: false}, {__type__: "update", interactive: true}]"""

# The line under the pictures cannot be reached by keyboard: this moves it, in the page itself.
_MOVE = """at => ({__type__: "update", slider_position: at})"""


class CompareTab:
    """The components of the tab and what they do."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.objects = session.family.objects
        self._build()
        self._connect()

    def _build(self) -> None:
        session, base = self.session, self.session.family.record
        names = [arm.name for arm in session.ready]
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300, elem_classes="controls"):
                self.prompt = gr.Textbox(
                    next(iter(EXAMPLES[self.objects].values()))[0]
                    if not session.toy
                    else "a photo of a star above a square",
                    label="Prompt",
                    lines=2,
                    max_lines=5,
                    submit_btn=False,
                    elem_id="prompt",
                )
                with gr.Row(elem_classes="chips", equal_height=True):
                    self.chips = {
                        task: gr.Button(task, size="sm", min_width=60, elem_classes="chip")
                        for task in EXAMPLES[self.objects]
                    }
                self.arms = gr.CheckboxGroup(
                    [(_arm_label(arm), arm.name) for arm in session.ready],
                    value=names[:4],
                    label="Models",
                    elem_id="arms",
                )
                if problems := [arm for arm in session.arms.values() if arm.problem]:
                    told = (f"{arm.name} is not available: {shown(arm.problem)}" for arm in problems)
                    gr.HTML(cards.notice("; ".join(told)))
                with gr.Row(equal_height=True, elem_classes="seed"):
                    # Without limits of gradio's: it rounds, or answers with a trace, where the request has words.
                    self.seed = gr.Number(7, label="Seed", min_width=120, elem_id="seed")
                    self.dice = gr.Button("Another seed", size="sm", min_width=120)
                with gr.Accordion("Settings", open=False):
                    self.own_steps = gr.Checkbox(True, label="Each model's own number of steps")
                    self.steps = gr.Slider(1, STEPS, base.steps, step=1, label="Steps for all", interactive=False)
                    self.own_guidance = gr.Checkbox(True, label="Each model's own guidance scale")
                    self.guidance = gr.Slider(
                        0, GUIDANCE, base.guidance, step=0.1, label="Guidance for all", interactive=False
                    )
                    self.side = gr.Dropdown(
                        [(f"{side} × {side}", side) for side in session.sides],
                        value=base.width,
                        label="Size in pixels",
                        visible=len(session.sides) > 1,
                    )
                with gr.Row(equal_height=True):
                    self.draw = gr.Button("Draw", variant="primary", min_width=100, elem_id="draw")
                    self.stop = gr.Button("Stop", interactive=False, min_width=100, elem_id="stop")
                with gr.Accordion("Restore a saved comparison", open=False):
                    self.dropped = gr.File(
                        label="PNG of a comparison",
                        show_label=False,  # it would lie over gradio's own words
                        file_types=[".png"],
                        height=140,
                        elem_id="dropped",
                    )
            with gr.Column(scale=5, min_width=320):
                self.status = gr.HTML("", elem_id="status")
                self.grid = gr.HTML(_IDLE, elem_id="grid")
                self.save = gr.DownloadButton(
                    "Save the comparison as one PNG", interactive=False, visible=False, elem_id="save"
                )
                with gr.Group(visible=False, elem_id="pair") as self.pair:
                    with gr.Row():
                        self.left = gr.Dropdown([], label="Left", min_width=120)
                        self.right = gr.Dropdown([], label="Right", min_width=120)
                    self.slider = gr.ImageSlider(
                        label="Drag the line", format="png", buttons=["fullscreen"], max_height=512, elem_id="slider"
                    )
                    self.line = gr.Slider(
                        0, 100, 50, step=1, label="The line, in percent from the left", buttons=[], elem_id="line"
                    )
        self.results = gr.State(None)

    def _connect(self) -> None:
        settings = [self.own_steps, self.steps, self.own_guidance, self.guidance, self.side]
        asked = [self.prompt, self.seed, self.arms, *settings]
        shown = [self.status, self.grid, self.save, self.pair, self.left, self.right, self.slider, self.results]
        shown += [self.draw, self.stop]
        private: dict[str, Any] = {"api_visibility": "private"}
        at_once: dict[str, Any] = {**private, "queue": False, "show_progress": "hidden"}
        begun = [self.draw.click, self.prompt.submit]
        gr.on(begun, None, None, [self.draw, self.stop], js=_BUSY, **at_once)
        drawing = gr.on(
            begun,
            on_a_shared_gpu(self.compare),
            [*asked, self.results],
            shown,
            show_progress="minimal",
            show_progress_on=[self.status],
            trigger_mode="once",
            js=_SEE,
            **DRAWING,
            **private,
        )
        self.stop.click(None, None, None, cancels=[drawing], **at_once)
        # After the server has ended the drawing, so that no late step of it overwrites what is left.
        drawing.failure(self.stopped, [self.results], shown, **at_once)
        gr.on(
            [self.left.input, self.right.input], self.lay, [self.left, self.right, self.results], self.slider, **at_once
        )
        self.line.input(None, self.line, self.slider, js=_MOVE, **at_once)
        for own, value in ((self.own_steps, self.steps), (self.own_guidance, self.guidance)):
            own.change(lambda own: gr.update(interactive=not own), own, value, **at_once)
        self.dice.click(lambda: random.randrange(SEED + 1), None, self.seed, **at_once)
        for task, chip in self.chips.items():
            chip.click(lambda now, task=task: example(self.objects, task, now), self.prompt, self.prompt, **at_once)
        self.dropped.upload(
            self.restore,
            [self.dropped, self.results],
            [self.status, *asked, self.grid],
            **at_once,
        )

    def compare(self, *asked_and_results: Any) -> Iterator[tuple[Any, ...]]:
        """Draw, a picture at a time."""
        idle = (gr.update(visible=False), gr.update(visible=False), *[gr.skip()] * 3)
        *asked_for, results = asked_and_results
        drawn: list[Drawn] = []
        try:
            request = self.request(*asked_for)
            asked = [self.session.arms[name] for name in request.arms]
            results = (request, [])
            yield cards.notice("Starting…"), self._cards(request, drawn, True), *idle, results, *[gr.skip()] * 2
            for event in self.session.draw(request):
                if isinstance(event, Step):
                    at = len(drawn) * event.steps + event.done
                    text = f"{event.arm}: step {event.done} of {event.steps} · picture {len(drawn) + 1} of {len(asked)}"
                    text = f"{event.arm}: judging" if event.done == event.steps else text
                    yield cards.progress(text, at, event.steps * len(asked)), *[gr.skip()] * 9
                else:
                    drawn.append(event)
                    results = (request, list(drawn))
                    yield gr.skip(), self._cards(request, drawn, True), *[gr.skip()] * 5, results, *[gr.skip()] * 2
        except Exception as error:
            yield cards.notice(in_words(error), "bad"), self._earlier(results), *[gr.skip()] * 6, *_idle()
            return
        yield self._finished(request, drawn, "")

    def stopped(self, results: tuple[Wanted, list[Drawn]] | None) -> tuple[Any, ...]:
        """What is left when somebody stops: the pictures that were done, this time or, before its turn, the last."""
        if results is None:
            return cards.notice("Stopped before anything was drawn."), *[gr.skip()] * 7, *_idle()
        request, drawn = results
        if len(drawn) == len(request.arms):
            return self._finished(request, drawn, "")
        return self._finished(request, drawn, f"Stopped with {len(drawn)} of {len(request.arms)} pictures drawn.")

    def _finished(self, request: Wanted, drawn: list[Drawn], stopped: str) -> tuple[Any, ...]:
        good = {one.arm: one for one in drawn if one.picture is not None}
        names, file = list(good), None
        if good:
            png = write_comparison(
                self.session.family.name,
                request,
                {name: one.picture for name, one in good.items() if one.picture is not None},
                {name: one.identity for name, one in good.items()},
                {name: one.scores for name, one in good.items()},
                cards.lines(drawn),
            )
            file = saved_file(png, file_name(request))
        remark = self._remark(self.session.unknown_words(request.prompt))
        failed = f"{len(drawn) - len(good)} of {len(drawn)} could not be drawn." if len(good) < len(drawn) else ""
        words = " ".join(filter(None, (stopped, failed, remark)))
        pair = (names[0], names[1]) if len(names) > 1 else (None, None)
        return (
            cards.notice(words, "bad" if failed else "info"),
            self._cards(request, drawn, False),
            gr.update(value=file, visible=bool(good), interactive=bool(good)),
            gr.update(visible=len(names) > 1),
            gr.update(choices=names, value=pair[0]),
            gr.update(choices=names, value=pair[1]),
            _laid(good, *pair),
            (request, drawn),
            *_idle(),
        )

    def lay(self, left: str, right: str, results: tuple[Wanted, list[Drawn]] | None) -> Any:
        """Two pictures under the slider."""
        good = {one.arm: one for one in (results[1] if results else []) if one.picture is not None}
        return _laid(good, left, right)

    def restore(self, file: str | None, results: tuple[Wanted, list[Drawn]] | None) -> tuple[Any, ...]:
        """Every setting out of a saved comparison."""
        if file is None:
            return (gr.skip(),) * 10
        try:
            saved = read_comparison(Path(file))
            found = restorable(self.session, saved)
        except Exception as error:
            return cards.notice(in_words(error), "bad"), *[gr.skip()] * 8, self._earlier(results)
        asked, base = saved.settings, self.session.family.record
        return (
            cards.notice(found.words, "bad" if found.changed else "good"),
            asked.prompt,
            asked.seed,
            found.arms,
            asked.steps is None,
            asked.steps or base.steps,
            asked.guidance is None,
            base.guidance if asked.guidance is None else asked.guidance,
            asked.side or base.width,
            self._earlier(results),
        )

    def request(
        self,
        prompt: str,
        seed: int,
        arms: Sequence[str],
        own_steps: bool,
        steps: int,
        own_guidance: bool,
        guidance: float,
        side: int | None,
    ) -> Wanted:
        """What the components ask for. Raises ``RequestError``."""
        values = {
            "prompt": prompt,
            "seed": seed,
            "arms": arms,
            "steps": None if own_steps else steps,
            "guidance": None if own_guidance else guidance,
            "side": None if side == self.session.family.record.width else side,
        }
        return self.session.check(wanted(values))

    def _remark(self, unknown: Sequence[str]) -> str:
        if not unknown:
            return ""
        were = "it was" if len(unknown) == 1 else "they were"
        return f"The miniature never saw {', '.join(unknown[:8])}: it draws as if {were} not there."

    def _earlier(self, results: tuple[Wanted, list[Drawn]] | None) -> Any:
        """The pictures there are, dimmed and with their prompt: a new message stands above them, and not of them."""
        if results is None:
            return gr.skip()
        request, drawn = results
        return self._cards(request, drawn, False, f"Drawn earlier: {request.prompt}, seed {request.seed}")

    def _cards(self, request: Wanted, drawn: Sequence[Drawn], drawing: bool, earlier: str = "") -> str:
        asked = [self.session.arms[name] for name in request.arms]
        # Where nothing was drawn there was nothing to judge.
        seats = self.session.panel.seats(request.prompt) if not drawing and any(one.picture for one in drawn) else []
        return cards.comparison(request.prompt, asked, drawn, seats, drawing=drawing, earlier=earlier)


def _idle() -> tuple[Any, Any]:
    """The buttons Draw and Stop while nothing is drawn."""
    return gr.update(interactive=True), gr.update(interactive=False)


def _arm_label(arm: Any) -> str:
    record = arm.spec.record
    return f"{arm.name} · {steps_in_words(record.steps)}, guidance {record.guidance:g}"


def _laid(good: dict[str, Drawn], left: str | None, right: str | None) -> Any:
    pair = [good[name].picture for name in (left, right) if name in good]
    if len(pair) < 2:
        return None
    return tuple(enlarged(picture, 512) for picture in pair if picture is not None)


class Restorable(NamedTuple):
    """What can be restored here, in words; the models that are here; and those that were others then."""

    words: str
    arms: list[str]
    changed: list[str]


def restorable(session: Session, saved: Saved) -> Restorable:
    """What of a saved comparison can be restored here. Raises ``RequestError`` where nothing can."""
    settings, here = saved.settings, session.family.name
    if saved.family != here:
        raise RequestError(f"That comparison is of the family {saved.family!r}; this page shows {here!r}.")
    ready = {arm.name for arm in session.ready}
    arms = [name for name in settings.arms if name in ready]
    if not arms:
        raise RequestError(f"None of its models ({', '.join(settings.arms)}) is here.")
    session.check(settings.model_copy(update={"arms": tuple(arms)}))
    gone = [name for name in settings.arms if name not in ready]
    drew = {name: weights(identity) for name, identity in saved.drawn.items()}
    changed = [name for name in arms if name in drew and drew[name] != session.weights(name)]
    lacking = f" Not here, and left out: {', '.join(gone)}." if gone else ""
    return Restorable(f"Settings restored. {_again(arms, changed)}{lacking}", arms, changed)


def _again(arms: Sequence[str], changed: Sequence[str]) -> str:
    if not changed:
        return "Draw to see the pictures again."
    rest = " Draw to see the others again." if len(changed) < len(arms) else ""
    if len(changed) == 1:
        return f"Here {changed[0]} is another model than the one that drew then: its picture will be another.{rest}"
    return f"Here {', '.join(changed)} are other models than those that drew then: their pictures will be others.{rest}"
