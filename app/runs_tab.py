"""The page's third tab: finished runs, their tables, and their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any

import gradio as gr

from app import cards
from app.picture import enlarged
from app.runs import VERDICTS, Full, Runs, Shown, chosen, marks, pictures
from app.told import in_words, saved_file
from app.wanted import shown
from flowopd_eval.compare import number, signed
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import drawn_differently
from flowopd_eval.report import Run, by_judge
from flowopd_eval.store import BenchFolder

PAGE = 24  # pictures
_ANY = "any"
_CHANGED = "These are not the bytes that were drawn."
_MARKS = {"right": "✓", "wrong": "✗", "unscored": "?", "scored": ""}

_SEE = """() => document.querySelector("#detail").scrollIntoView({behavior: "smooth", block: "start"})"""


class RunsTab:
    """The components of the tab and what they do."""

    def __init__(self, runs: Runs | None) -> None:
        names = runs.names() if runs else []
        self.none = gr.HTML(
            cards.empty(
                "No finished runs here",
                "Draw and score one in the folder in which the demo was started, or start it with --runs and the "
                "folder of your runs. Reloading this page shows new runs.",
                "flowopd-eval --bench geneval --limit 4",
            ),
            visible=not names,
            elem_id="no-runs",
        )
        if runs is None:
            return
        self.runs = runs
        with gr.Column(visible=bool(names)) as self.some:
            self._build(names)
        self._connect()

    def _build(self, names: Sequence[str]) -> None:
        with gr.Row(elem_classes="beside"):
            self.name = gr.Dropdown(list(names), value=next(iter(names), None), label="Run", scale=4, elem_id="run")
            self.csv = gr.DownloadButton("Save the tables as CSV", size="sm", min_width=160, elem_id="run-csv")
        self.tables = gr.HTML("", elem_id="run-tables")
        with gr.Row(elem_classes="filters"):
            self.key = gr.Dropdown([_ANY], value=_ANY, label="Metric", min_width=130, elem_id="filter-key")
            self.model = gr.Dropdown([_ANY], value=_ANY, label="Model", min_width=130, elem_id="filter-model")
            self.task = gr.Dropdown([_ANY], value=_ANY, label="Task", min_width=130, elem_id="filter-task")
            self.said = gr.Dropdown(
                [_ANY, *VERDICTS], value=_ANY, label="Verdict", min_width=130, elem_id="filter-said"
            )
            self.disagree = gr.Checkbox(
                False, label="Only where the models disagree", min_width=130, elem_id="disagree"
            )
        self.count = gr.HTML("", elem_id="count")
        self.gallery = gr.Gallery(
            [],
            show_label=False,
            columns=8,
            height="auto",
            allow_preview=False,
            buttons=[],
            elem_id="gallery",
            object_fit="contain",
            format="png",
        )
        with gr.Row(equal_height=True):
            self.back = gr.Button("Earlier", size="sm", min_width=80, elem_id="back")
            self.on = gr.Button("Later", size="sm", min_width=80, elem_id="on")
        self.detail = gr.HTML(
            cards.empty("One picture in full", "Choose one above: it is shown here at full size, with its provenance."),
            elem_id="detail",
        )
        self.page = gr.State(0)
        self.listed = gr.State([])

    def _connect(self) -> None:
        filters: list[Any] = [self.key, self.model, self.task, self.said, self.disagree]
        wall = [self.count, self.gallery, self.back, self.on, self.page, self.listed]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        quiet |= {"show_progress_on": [self.gallery]}
        opened = [self.tables, self.csv, self.key, self.model, self.task]
        first = gr.on([self.name.input], self.open, self.name, opened, **quiet)
        first.then(self.wall, [self.name, *filters, gr.State(0)], wall, **quiet)
        # A filter that is changed while another is at work must not be lost.
        asked = [self.name, *filters, gr.State(0)]
        gr.on([one.input for one in filters], self.wall, asked, wall, trigger_mode="always_last", **quiet)
        for button, by in ((self.back, -1), (self.on, 1)):
            button.click(
                partial(self.turned, by),
                [self.name, *filters, self.page],
                wall,
                **quiet,
            )
        looked = self.gallery.select(self.look, [self.name, self.listed], self.detail, **quiet)
        looked.then(None, js=_SEE, api_visibility="private")
        self.start = (self.open, self.name, opened, self.wall, [self.name, *filters, gr.State(0)], wall, quiet)

    def begin(self, page: gr.Blocks) -> None:
        """Look for runs when the page is loaded, and open the newest."""
        if hasattr(self, "start"):
            opening, name, opened, wall, asked, out, quiet = self.start
            there = page.load(self.refresh, None, [self.none, self.some, self.name], api_visibility="private")
            there.then(opening, name, opened, **quiet).then(wall, asked, out, **quiet)

    def refresh(self) -> tuple[Any, ...]:
        """The runs that there are now."""
        names = self.runs.names()
        newest = next(iter(names), None)
        return gr.update(visible=not names), gr.update(visible=bool(names)), gr.update(choices=names, value=newest)

    def open(self, name: str | None) -> tuple[Any, ...]:
        """A run's tables, and what its pictures can be filtered by."""
        if name is None:
            return (gr.skip(),) * 5
        try:
            run = self.runs.load(name)
            csv = saved_file(self.runs.csv(name).encode(), "run.csv")
        except Exception as error:
            return cards.notice(in_words(error), "bad"), *[gr.skip()] * 4
        found = pictures(run)
        filters = (
            dict.fromkeys(one.key for one in found),
            dict.fromkeys(one.model for one in found),
            dict.fromkeys(one.sample.task for one in found),
        )
        return (
            tables(run) + self._differences(name, run),
            gr.update(value=csv),
            *(gr.update(choices=[_ANY, *names], value=_ANY) for names in filters),
        )

    def _differences(self, name: str, run: Run) -> str:
        """In words what sets its models apart, or why they cannot be compared."""
        if len({entry.summary["model"] for entry in run.entries}) < 2:
            return ""
        try:
            result = self.runs.compare(name)
        except RequestError as error:
            return cards.notice(f"Its models cannot be compared: {in_words(error)}")
        parts = []
        for one in result.comparisons:
            rows = [
                [
                    row.name,
                    number(row.a.value, one.points),
                    number(row.b.value, one.points),
                    f"{signed(row.difference.value, one.points)} "
                    f"[{signed(row.difference.low, one.points)}, {signed(row.difference.high, one.points)}]",
                ]
                for row in (one.overall, *one.tasks)
            ]
            header = ["", str(one.a["label"]), str(one.b["label"]), "Difference"]
            parts += [cards.table(header, rows, one.sentence), cards.notice(" ".join(one.warnings))]
        notes = cards.notice(" ".join(result.notes)) if result.notes else ""
        return f'<details class="differences" open><summary>Differences</summary>{"".join(parts)}{notes}</details>'

    def wall(
        self, name: str | None, key: str, model: str, task: str, said: str, disagree: bool, page: int
    ) -> tuple[Any, ...]:
        """A page of the pictures that the filters leave."""
        if name is None:
            return (gr.skip(),) * 6
        try:
            run = self.runs.load(name)
        except Exception as error:
            return cards.notice(in_words(error), "bad"), [], *[gr.update(interactive=False)] * 2, 0, []
        left = chosen(pictures(run), **_filters(key, model, task, said), disagree=disagree)
        pages = max(1, ceil(len(left) / PAGE))
        page = min(max(page, 0), pages - 1)
        on_page = left[page * PAGE : (page + 1) * PAGE]
        folders = {(e.summary["model"], e.summary["key"]): e.folder for e in run.entries}
        several = len({one.model for one in left}) > 1
        items = [self._item(folders[one.model, one.key], one, several) for one in on_page]
        words = (
            f"{len(left):,} pictures · page {page + 1} of {pages}" if left else "No picture is left by these filters."
        )
        return (
            f'<p class="count" role="status">{words}</p>',
            gr.update(value=items, selected_index=None),
            gr.update(interactive=page > 0),
            gr.update(interactive=page + 1 < pages),
            page,
            [one.address for one in on_page],
        )

    def _item(self, folder: BenchFolder, one: Shown, several: bool) -> tuple[Any, str]:
        """A thumbnail and its caption; a verdict only on the bytes that were judged."""
        picture = self.runs.thumbnail(folder, one.sample)
        if picture is None:
            return _gone(), f"gone: {one.sample.prompt}"
        caption = _caption(one, several) if self.runs.intact(folder, one.sample) else f"changed: {one.sample.prompt}"
        return enlarged(picture, 128), caption

    def turned(self, by: int, *values: Any) -> tuple[Any, ...]:
        """The page ``by`` further on."""
        name, key, model, task, said, disagree, page = values
        return self.wall(name, key, model, task, said, disagree, page + by)

    def look(self, name: str, listed: list[dict[str, Any]], event: gr.SelectData) -> str:
        """One picture at full size, what was said of it, and all that decided it."""
        try:
            if not isinstance(event.index, int) or not 0 <= event.index < len(listed):
                raise RequestError("There is no such picture on this page.")
            full = self.runs.picture(name, listed[event.index])
        except Exception as error:
            return cards.notice(in_words(error), "bad")
        return detail(full)


def detail(full: Full) -> str:
    """A picture at full size beside its provenance; boxes and verdict only where it is the one that was judged."""
    one = full.shown
    told = {name: str(value) for name, value in full.facts.items() if value not in ("", None)}
    rows = "".join(f"<dt>{cards.escape(k)}</dt><dd>{cards.escape(v)}</dd>" for k, v in told.items())
    seen = marks(one) if full.intact else []
    changed = "" if full.intact else cards.notice(_CHANGED, "bad")
    reason = f": {one.sample.reason}" if one.sample.reason else ""
    said = f"{one.model} · {one.verdict}{reason}" if full.intact else one.model
    toggle = '<label class="toggle"><input type="checkbox" checked> Show what the judge saw</label>' if seen else ""
    return (
        f'{changed}<section class="results detail">{cards.framed(full.picture, one.sample.prompt, seen)}'
        f"<div><h3>{cards.escape(one.sample.prompt)}</h3>"
        f'<p class="verdict {one.verdict if full.intact else ""}">{cards.escape(said)}</p>'
        f'{toggle}<dl class="facts">{rows}</dl></div></section>'
    )


def _filters(key: str, model: str, task: str, said: str) -> dict[str, str | None]:
    named = {"key": key, "model": model, "task": task, "said": said}
    return {name: None if value == _ANY else value for name, value in named.items()}


def _caption(one: Shown, several: bool) -> str:
    who = f"{one.model} · " if several else ""
    return f"{_MARKS[one.verdict]} {who}{one.sample.prompt}".strip()


def _gone() -> Any:
    from PIL import Image

    return Image.new("RGB", (128, 128), (200, 200, 205))


def tables(run: Run) -> str:
    """Each metric's table and chart, a column a model; what is partial or unavailable is said."""
    parts = [f'<p class="note">{cards.escape(run.note)}</p>'] if run.note else []
    parts += [_one_metric(*group) for group in by_judge([entry.summary for entry in run.entries]).items()]
    parts += [cards.notice(f"{key} is unavailable: {shown(why)}") for key, why in run.unavailable.items()]
    return "".join(parts)


def _one_metric(label: str, summaries: Sequence[Mapping[str, Any]]) -> str:
    models = [summary["model"] for summary in summaries]
    tasks = dict.fromkeys(task for summary in summaries for task in summary["metrics"]["tasks"])
    rows = [("overall", [summary["metrics"]["overall"] for summary in summaries])]
    rows += [(task, [summary["metrics"]["tasks"].get(task) for summary in summaries]) for task in tasks]
    counts = [
        ["pictures judged", *(f"{summary['n']:,} of {summary['expected']:,}" for summary in summaries)],
        ["unscored", *(f"{summary['unscored']:,}" for summary in summaries)],
    ]
    text = [[name, *map(cards.interval, cells)] for name, cells in rows] + counts
    ends = [
        one[end] for _, cells in rows for one in cells if one and one["value"] is not None for end in ("low", "high")
    ]
    shares = summaries[0]["correct_at"] is not None
    axis = (0.0, 1.0) if shares or not ends else (min(ends), max(max(ends), min(ends) + 1e-9))
    plot = cards.chart([(name, list(zip(models, cells, strict=True))) for name, cells in rows], axis)
    incomplete = [f"{summary['model']}: {summary['partial']}" for summary in summaries if summary["partial"]]
    note = cards.notice("Partial. " + "; ".join(incomplete)) if incomplete else ""
    note += "".join(cards.notice(f"Drawn differently: {line}") for line in drawn_differently(summaries))
    caption = "Value with its 95 % interval; overall is the mean over tasks, or what the protocol says."
    return (
        f'<section class="metric"><h3>{cards.escape(label)}</h3>{note}<div class="halves">'
        f"{cards.table(['', *models], text, caption)}{plot}</div></section>"
    )
