"""Tables and the report page of a run. Everything read from a run may be hostile: it is checked, and shown escaped.

``report.html`` needs no network and no server. It lies beside its pictures and refers to them: copied alone it keeps
the tables and charts, copied with its folder it is whole.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from flowopd_eval import store
from flowopd_eval.harness import (
    Metrics,
    collect,
    drawn_differently,
    finish,
    protocol_and_engine,
    standard_metrics,
    summarise,
)
from flowopd_eval.quiet import printable
from flowopd_eval.records import Sample
from flowopd_eval.store import BenchFolder

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

    from flowopd_eval.benches import Bench

Summaries = Mapping[str, Mapping[str, Mapping[str, Any]]]  # model -> bench -> summary

_VERDICTS = ("wrong", "unscored", "right", "scored")  # failures first
_BOXES = 24  # drawn over one picture at most


@dataclass(frozen=True)
class Entry:
    """One model on one bench."""

    folder: BenchFolder
    summary: dict[str, Any]
    samples: list[Sample]
    sessions: list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """A run as read from its folder; ``note`` says in plain words what was evaluated.

    ``unavailable`` says, by metric key, why a bench that was asked for could not be judged.
    """

    note: str
    entries: list[Entry]
    unavailable: dict[str, str]


def metrics_of(bench: Bench) -> Metrics:
    """What sums up a bench's samples."""
    return bench.metrics() if bench.metrics else standard_metrics


def load_run(out: Path, metrics: Mapping[str, Metrics] | None = None) -> Run:
    """Read a run, finished or not, and compute its summaries; writes nothing.

    ``metrics`` gives the summary of benches, by metric key, that have one of their own.
    Raises ``RequestError`` for a folder that holds no run, a damaged one, or one that names files outside itself.
    """
    run = store.read_run(out)
    entries = []
    for folder in store.bench_folders(out):
        request = folder.request()
        samples, missing = collect(folder)
        summary = summarise(request, samples, missing, (metrics or {}).get(request["key"], standard_metrics))
        entries.append(Entry(folder, summary, samples, run["runs"][folder.entry].get("sessions", [])))
    return Run(str(run.get("note", "")), entries, store.unavailable(run))


def summarise_run(out: Path, metrics: Mapping[str, Metrics] | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Merge the shards, write every ``summary.json``; returns model -> bench -> summary. Raises as ``load_run``."""
    summaries: dict[str, dict[str, dict[str, Any]]] = {}
    for folder in store.bench_folders(out):
        key = folder.request()["key"]
        summary = finish(folder, (metrics or {}).get(key, standard_metrics))
        summaries.setdefault(summary["model"], {})[summary["bench"]] = summary
    in_order = {model: dict(sorted(benches.items())) for model, benches in sorted(summaries.items())}
    lacking = store.unavailable(store.read_run(out))
    store.write_json(out / "summary.json", {"schema": store.SCHEMA, "models": in_order, "unavailable": lacking})
    return summaries


# ---------------------------------------------------------------------------------------------------------- terminal


def terminal_table(summaries: Summaries, unavailable: Mapping[str, str] | None = None) -> Group:
    """Tasks by models, each ``mean [low, high]`` of the 95 % interval. Three models fit into 80 columns.

    Numbers stand in one row only where one judge gave them (:func:`by_judge`). ``unavailable`` says, by metric key, why
    a bench that was asked for could not be judged.
    """
    from rich.console import Group
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("", overflow="fold")
    for model in summaries:
        table.add_column(_text(model), justify="right", overflow="fold")
    rows = by_judge([summary for benches in summaries.values() for summary in benches.values()])
    for label, shown in rows.items():
        of_model = {summary["model"]: summary for summary in shown}
        columns = [of_model.get(model) for model in summaries]
        table.add_row(
            _text(label), *(_text(_interval(s and s["metrics"]["overall"], s)) for s in columns), style="bold"
        )
        for task in _in_order(task for summary in shown for task in summary["metrics"]["tasks"]):
            cells = [_interval(s and s["metrics"]["tasks"].get(task)) for s in columns]
            table.add_row(_text(f" {task}"), *map(_text, cells))
        table.add_row(" pictures", *(_text(f"{s['n']:,}" if s else "–") for s in columns), style="dim")
        if any(summary["unscored"] for summary in shown):
            table.add_row(" unscored", *(_text(f"{s['unscored']:,}" if s else "–") for s in columns), style="yellow")
        table.add_section()
    for key in unavailable or ():
        table.add_row(_text(key), *("unavailable" for _ in summaries), style="yellow")
    partial = [
        f"* {model}, {summary['key']}: {summary['partial']}"
        for model, benches in summaries.items()
        for summary in benches.values()
        if summary["partial"]
    ]
    unlike = [
        f"! {label}, drawn differently: {line}" for label, shown in rows.items() for line in drawn_differently(shown)
    ]
    legend = "bold: overall (mean over tasks, or the protocol's own); value [95 % interval]"
    explained = _text("\n".join([legend, *partial]))
    explained.stylize("dim italic")
    elsewhere = [
        _text(f"{model}, {summary['key']}: {category} is not computed here, but by {one['official']}")
        for model, benches in summaries.items()
        for summary in benches.values()
        for category, one in summary["metrics"].get("not_computed", {}).items()
    ]
    reasons = [_text(f"{key} is unavailable: {why}") for key, why in (unavailable or {}).items()]
    return Group(table, explained, *map(_text, unlike), *elsewhere, *reasons)


def _text(text: str) -> Text:
    """Plain text without markup, and without the control characters by which a name could steer the terminal."""
    from rich.text import Text

    return Text(printable(text, keep="\n"))


def _interval(interval: Mapping[str, Any] | None, summary: Mapping[str, Any] | None = None) -> str:
    mark = "*" if summary and summary["partial"] else ""
    if not interval or interval["value"] is None:
        return f"–{mark}"
    digits = 2 if abs(interval["value"]) >= 10 else 3  # as preference scores, about 20
    value, low, high = (f"{interval[end]:.{digits}f}" for end in ("value", "low", "high"))
    return f"{value}{mark} [{low}, {high}]"


_OF_USERS = ("own", "external")  # scorers that have taken the place of a bench's judge


def by_judge(summaries: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The summaries whose numbers can stand side by side: one metric, one version of the bench, one and the same judge.

    They go by the metric's key; where one key has several judges, or one of the user's own, by what tells those apart
    as well, in words.
    """
    judges: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for summary in summaries:
        judge = json.dumps([summary["version"], summary["scorer"]], sort_keys=True)
        judges.setdefault(summary["key"], {}).setdefault(judge, []).append(summary)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for key, of_key in judges.items():
        for number, shown in enumerate(of_key.values(), 1):
            alone = len(of_key) == 1 and (shown[0]["scorer"] or {}).get("scorer") not in _OF_USERS
            label = key if alone else f"{key} ({_judge(shown[0])})"
            groups[label if label not in groups else f"{label}, judge {number}"] = shown
    return groups


def _judge(summary: Mapping[str, Any]) -> str:
    protocol, engine = protocol_and_engine(summary)
    return f"protocol {protocol}, engine {engine}, version {summary['version']}"


def _in_order(names: Iterator[str]) -> list[str]:
    """Distinct names in the order of their first appearance."""
    return list(dict.fromkeys(names))


# -------------------------------------------------------------------------------------------------------------- page


def write_report(out: Path, metrics: Mapping[str, Metrics] | None = None) -> Path:
    """Write ``OUT/report.html`` (and every summary); returns its path. Raises as ``load_run``, and ``WorkError``."""
    summarise_run(out, metrics)
    run = load_run(out, metrics)
    page = render_page(
        "report.html.j2",
        {"number": lambda value: "–" if value is None else f"{value:.3f}"},
        note=run.note,
        models=_in_order(entry.summary["model"] for entry in run.entries),
        benches=[_bench(*group) for group in by_judge([entry.summary for entry in run.entries]).items()],
        entries=run.entries,
        partial=[entry.summary for entry in run.entries if entry.summary["partial"]],
        unavailable=run.unavailable,
        provenance=[_provenance(entry) for entry in run.entries],
        gallery=[_gallery(entry) for entry in run.entries],
        verdicts=_VERDICTS,
    )
    path = out / "report.html"
    store.write_atomic(path, page)
    return path


def render_page(template: str, filters: Mapping[str, Callable[..., str]], **values: Any) -> bytes:
    """A page of this package's templates, everything escaped; ``filters`` are the template's own, by name."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("flowopd_eval", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"sha256": _sha256_source, **filters}
    return environment.get_template(template).render(values).encode(errors="replace")  # half a surrogate pair


def _sha256_source(script: str) -> str:
    """The hash by which a content security policy lets exactly this script run, and no other."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _bench(label: str, summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One bench's table and chart: a row a task, in it a cell a model."""
    rows = [("overall", [s["metrics"]["overall"] for s in summaries])]
    for task in _in_order(task for s in summaries for task in s["metrics"]["tasks"]):
        rows.append((task, [s["metrics"]["tasks"].get(task) for s in summaries]))
    extra = [("mean over pictures", [s["metrics"]["images"] for s in summaries])]
    extra.append(("prompts with any right picture", [s["metrics"].get("prompts_any") for s in summaries]))
    for name in _in_order(name for s in summaries for name in s["metrics"].get("also", {})):
        extra.append((name, [s["metrics"].get("also", {}).get(name) for s in summaries]))
    shares = summaries[0]["correct_at"] is not None
    axis = _axis([cell for _, cells in rows for cell in cells if cell], shares)
    return {
        "key": label,
        "bench": summaries[0]["bench"],
        "judge": _judge(summaries[0]),
        "unlike": drawn_differently(summaries),
        "shares": shares,
        "summaries": summaries,
        "rows": rows,
        "extra": [(name, cells) for name, cells in extra if any(cells)],
        "chart": [(task, [_bar(cell, axis) for cell in cells]) for task, cells in rows],
        "ticks": [(axis[0] + (axis[1] - axis[0]) * part / 4, 25 * part) for part in range(5)],
    }


def _axis(cells: Sequence[Mapping[str, Any]], shares: bool) -> tuple[float, float]:
    """Both ends of the chart: 0..1 for shares, which get bars; else the range of the intervals, shown as points."""
    ends = [end for cell in cells if cell["value"] is not None for end in (cell["low"], cell["high"])]
    if shares or not ends:
        return min([0.0, *ends]), max([1.0, *ends])
    margin = (max(ends) - min(ends)) / 10 or 0.5
    return min(ends) - margin, max(ends) + margin


def _bar(cell: Mapping[str, Any] | None, axis: tuple[float, float]) -> dict[str, float] | None:
    """Where value and whisker stand, in percent of the axis."""
    if not cell or cell["value"] is None:
        return None
    value, low, high = (100 * (cell[end] - axis[0]) / (axis[1] - axis[0]) for end in ("value", "low", "high"))
    return {"value": value, "low": low, "whisker": high - low}


def _provenance(entry: Entry) -> dict[str, Any]:
    """What makes the scores comparable, and the sessions in which they came about, as flat tables."""
    facts = {field: value for field, value in entry.summary.items() if field != "metrics"}
    return {
        "title": f"{entry.summary['model']} on {entry.summary['key']}",
        "facts": list(store.flat(facts)),
        "sessions": [list(store.flat(session)) for session in entry.sessions],
    }


def _gallery(entry: Entry) -> dict[str, Any]:
    """The pictures of one model on one bench as JSON for the page, failures first, then by score."""
    cards = [_card(sample, entry.summary["correct_at"]) for sample in entry.samples]
    cards.sort(key=lambda card: (_VERDICTS.index(card["verdict"]), card["score"] or 0.0))  # stable: else plan order
    return {
        "title": f"{entry.summary['model']} on {entry.summary['key']}",
        "folder": f"./{quote(entry.folder.entry)}/",
        "cards": cards,
    }


def _card(sample: Sample, correct_at: float | None) -> dict[str, Any]:
    return {
        "file": quote(sample.file),
        "id": sample.id,
        "prompt": sample.prompt,
        "task": sample.task,
        "verdict": verdict(sample, correct_at),
        "score": sample.score,
        "reason": sample.reason or sample.error or "",
        "picture": sample.which,
        "boxes": boxes(sample.detail)[:_BOXES],
    }


def verdict(sample: Sample, correct_at: float | None) -> str:
    """``right`` from ``correct_at`` on, else ``wrong``; ``scored`` where the metric knows neither; or ``unscored``."""
    if sample.score is None:
        return "unscored"
    if correct_at is None:
        return "scored"
    return "right" if sample.score >= correct_at else "wrong"


def boxes(detail: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The boxes to draw over a picture: ``box`` in pixels and its ``label``; ill-formed ones are left out.

    ``detections`` is a list of ``{label, box, score, colour}``; ``boxes`` is GenEval's ``{label: [[x1, y1, x2, y2,
    score]]}`` with ``colours`` beside it.
    """
    found = list(_detections(detail.get("detections"))) + list(_geneval_boxes(detail))
    return [
        {"box": [float(edge) for edge in box], "label": " ".join(str(word) for word in words if word is not None)}
        for box, words in found
        if len(box) == 4 and all(isinstance(edge, Real) and isfinite(edge) for edge in box)
    ]


def _detections(found: Any) -> Iterator[tuple[list[Any], tuple[Any, ...]]]:
    for one in found if isinstance(found, list) else []:
        if isinstance(one, dict) and isinstance(one.get("box"), list):
            yield one["box"], (one.get("colour"), one.get("label"), _confidence(one.get("score")))


def _geneval_boxes(detail: Mapping[str, Any]) -> Iterator[tuple[list[Any], tuple[Any, ...]]]:
    found, colours = detail.get("boxes"), detail.get("colours")
    for label, rows in found.items() if isinstance(found, dict) else ():
        named = colours.get(label) if isinstance(colours, dict) else None
        for place, row in enumerate(rows if isinstance(rows, list) else ()):
            if isinstance(row, list) and len(row) == 5:
                colour = named[place] if isinstance(named, list) and place < len(named) else None
                yield row[:4], (colour, label, _confidence(row[4]))


def _confidence(score: Any) -> str | None:
    return f"{score:.2f}" if isinstance(score, Real) else None
