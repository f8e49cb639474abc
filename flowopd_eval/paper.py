"""A run beside Table 2 of the paper: each number with the paper's, a verdict only where nothing stands between.

Source: Fang et al., *Flow-OPD*, arXiv 2605.08063 v5, Table 2 (its abstract and v1 have other numbers for the last row).
Its average is the mean of GenEval, OCR, DeQA / 5 and PickScore / 26. "All training and test data strictly follow the
Flow-GRPO splits" (section 5); which protocol and judges that means is told by its public code (CostaliyA/Flow-OPD:
README, ``flow_grpo/rewards.py``) and by Flow-GRPO (arXiv 2505.05470).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import hypot
from typing import TYPE_CHECKING, Any

from flowopd_eval.errors import RequestError
from flowopd_eval.quiet import printable
from flowopd_eval.records import SD35_RECORD
from flowopd_eval.scorers.geneval import FLOW_GRPO

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

Summaries = Mapping[str, Mapping[str, Mapping[str, Any]]]  # model -> bench -> summary
Reasons = Callable[[Mapping[str, Any]], list[str]]  # a judge's identity -> why its numbers are not the paper's

SOURCE = "arXiv 2605.08063 v5, Table 2"
OCR_ENGINE, OCR_VERSION, OCR_LANGUAGE = "paddleocr", "2.9.1", "en"
PICKSCORE_MODEL = "yuvalkirstain/PickScore_v1"
DEQA_MODEL = "DeQA-Score-Mix3"


# ---------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """One model of the table, its numbers as printed; ``model`` is its name in this toolkit, where it has one."""

    name: str
    model: str | None
    geneval: float  # 0..1
    ocr: float  # 0..1
    deqa: float  # 1..5
    pickscore: float  # raw, about 20 to 24
    average: float  # 0..1, as printed: up to 1e-4 from the mean of the printed numbers

    @property
    def columns(self) -> tuple[float, float, float, float]:
        """GenEval, OCR, DeQA, PickScore."""
        return self.geneval, self.ocr, self.deqa, self.pickscore


TABLE = (
    Row("SD3.5-M", "flow-opd:base", 0.63, 0.59, 4.07, 21.64, 0.7165),
    Row("GRPO-GenEval", "flow-opd:geneval", 0.94, 0.65, 4.01, 21.53, 0.8050),
    Row("GRPO-OCR", "flow-opd:ocr", 0.64, 0.92, 4.06, 21.69, 0.8015),
    Row("GRPO-DeQA", "flow-opd:deqa", 0.64, 0.66, 4.23, 23.02, 0.7578),
    Row("GRPO-PickScore", "flow-opd:pickscore", 0.51, 0.69, 4.22, 23.19, 0.7340),
    Row("GRPO-Mix", None, 0.73, 0.83, 4.33, 21.84, 0.8165),
    Row("SFT + GRPO-Mix", None, 0.85, 0.86, 4.29, 21.79, 0.8515),
    Row("Merge + GRPO-Mix", None, 0.84, 0.86, 4.18, 21.87, 0.8442),
    Row("Flow-OPD (SFT)", None, 0.91, 0.92, 4.29, 21.83, 0.8820),
    Row("Flow-OPD (Merge)", "flow-opd:student", 0.93, 0.93, 4.31, 23.05, 0.9021),
)


# -------------------------------------------------------------------------------------------------- why not comparable


def _geneval_judge(identity: Mapping[str, Any]) -> list[str]:
    from flowopd_eval.scorers.mask2former import CHECKPOINT

    protocol, detector = _mapping(identity.get("protocol")), _mapping(identity.get("detector"))
    expected = {field: value for field, value in asdict(FLOW_GRPO).items() if field != "name"}
    reasons = []
    if not protocol:
        reasons.append("its GenEval protocol is unknown")
    elif other := _differences(protocol, expected):
        reasons.append(
            f"the paper's code asks Flow-GRPO's server (--protocol {FLOW_GRPO.name}), but the protocol here is "
            f"{_shown(protocol.get('name'))}: {other}"
        )
    if detector.get("name") != CHECKPOINT:
        reasons.append(f"the detector is {_shown(detector.get('name'))}, not {CHECKPOINT}")
    return reasons


def _ocr_judge(identity: Mapping[str, Any]) -> list[str]:
    if (identity.get("name"), identity.get("version")) != (OCR_ENGINE, OCR_VERSION):
        return [f"the OCR engine is {_judge(identity)}, not PaddleOCR {OCR_VERSION} with lang {OCR_LANGUAGE}"]
    reasons = []
    if identity.get("lang") != OCR_LANGUAGE:
        said = f"is {_shown(identity['lang'])}" if "lang" in identity else "is not told"
        reasons.append(f"PaddleOCR's lang {said}; the paper's code has {OCR_LANGUAGE}")
    if identity.get("rule") != "flow-grpo":
        reasons.append(f"the rule is {_shown(identity.get('rule'))}, not Flow-GRPO's")
    return reasons


def _deqa_judge(identity: Mapping[str, Any]) -> list[str]:
    if any(DEQA_MODEL.lower() in str(identity.get(field)).lower() for field in ("name", "model")):
        return []
    return [f"quality is judged by {_judge(identity)}, not by {DEQA_MODEL}"]


def _pickscore_judge(identity: Mapping[str, Any]) -> list[str]:
    model = _mapping(_mapping(identity.get("metrics")).get("pickscore")).get("model")
    if identity.get("value") == "pickscore" and PICKSCORE_MODEL in str(model):
        return []
    return [f"preference is judged by {_judge(identity)}, not by {PICKSCORE_MODEL}"]


@dataclass(frozen=True)
class Column:
    """A column of the table: the metric ``key`` that fills it (None: nothing does), and how the paper measured it.

    Its number divided by ``divisor`` goes into the average; ``digits`` are those the paper prints. ``judged`` says what
    of a judge's identity is not the paper's; ``never`` why no number here is.
    """

    name: str
    key: str | None
    digits: int
    divisor: float
    protocol: str
    judged: Reasons = lambda identity: []
    never: tuple[str, ...] = ()
    samples: int | None = None  # pictures a prompt, where the protocol says how many


_OTHER_PROMPTS = (
    "preference is measured on DrawBench's 200 prompts (or the user's own), in the paper on Flow-GRPO's test split of "
    "Pick-a-Pic"
)
_OWN = "this is the built-in miniature's own metric, which compares with nothing of the paper's"

COLUMNS = (
    Column(
        "GenEval",
        "geneval",
        2,
        1,
        "yifan123/reward-server: the official 553 prompts by four, pictures through JPEG, red and blue exchanged for "
        "the detector, mean over pictures",
        _geneval_judge,
        samples=4,
    ),
    Column(
        "OCR",
        "ocr",
        2,
        1,
        f"Flow-GRPO's 1,018 prompts and rule, PaddleOCR {OCR_VERSION}, lang {OCR_LANGUAGE}",
        _ocr_judge,
        samples=1,
    ),
    Column(
        "DeQA",
        "deqa",
        2,
        5,
        f"zhiyuanyou/{DEQA_MODEL}; the paper names no prompts, Flow-GRPO measures quality on DrawBench",
        _deqa_judge,
    ),
    Column(
        "PickScore",
        "preference",
        2,
        26,
        f"{PICKSCORE_MODEL}, raw, by the text on Flow-GRPO's test split: Pick-a-Pic's prompts",
        _pickscore_judge,
        (_OTHER_PROMPTS,),
    ),
)
MINIATURE = (
    Column("GenEval", "shapes_geneval", 2, 1, "", never=(_OWN,)),
    Column("OCR", "sign_ocr", 2, 1, "", never=(_OWN,)),
    Column("DeQA", "shapes_quality", 2, 1, "", never=(_OWN,)),
    Column("PickScore", None, 2, 1, "", never=("the miniature has no such metric",)),
)


def _why_not(column: Column, summary: Mapping[str, Any]) -> list[str]:
    """What stands between a summary's number and the paper's, a short sentence each."""
    if _OWN in column.never:
        return [_OWN]  # whatever else is true of the miniature does not matter
    identity, scorer = _mapping(summary.get("generator")), summary.get("scorer")
    reasons = list(column.never)
    reasons += column.judged(scorer) if isinstance(scorer, Mapping) else ["it has no judge"]
    if summary.get("version") != 1:
        reasons.append(f"version {_shown(summary.get('version'))} of the bench is not the one set beside the paper, 1")
    sampling = identity.get("sampling")
    if not isinstance(sampling, Mapping):
        reasons.append("its sampling record is unknown")
    elif other := _differences(sampling, asdict(SD35_RECORD)):
        reasons.append(f"drawn with {other}")
    if column.samples and summary.get("samples") != column.samples:
        reasons.append(f"pictures of each prompt: {_shown(summary.get('samples'))} instead of {column.samples}")
    if summary.get("partial"):
        reasons.append(f"a partial run ({str(summary['partial'])[:200]})")
    if summary.get("unscored"):
        total = summary["unscored"] + summary["n"]
        reasons.append(f"{summary['unscored']:,} of {total:,} pictures have no score")
    return reasons


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Each field that differs, with both values."""
    return ", ".join(
        f"{field} {_shown(found.get(field))} instead of {_shown(value)}"
        for field, value in expected.items()
        if field not in found or found[field] != value
    )


def _judge(identity: Mapping[str, Any]) -> str:
    """A judge in two or three words."""
    names = [identity[field] for field in ("name", "engine", "judge", "scorer", "metric") if identity.get(field)]
    return " ".join(str(word)[:60] for word in (*names[:1], identity.get("version", ""))).strip() or "something unknown"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


# --------------------------------------------------------------------------------------------------------- the result


@dataclass(frozen=True)
class Cell:
    """One number of one model beside the paper's.

    ``value``, ``low`` and ``high`` are ours with the 95 % interval, None where it was not measured; ``paper`` is the
    printed number, None for a model that is not in the table. ``verdict`` is where the printed number lies relative to
    our interval (``inside``, ``below``, ``above``, both ends belonging to it), and None where there are ``reasons``.
    """

    column: str
    key: str | None
    value: float | None
    low: float | None
    high: float | None
    paper: float | None
    reasons: tuple[str, ...]
    verdict: str | None
    digits: int = 2
    of: tuple[str, ...] = ()  # an average: the columns it is the mean of
    lacking: tuple[str, ...] = ()  # an average that is missing: the columns it lacks

    @property
    def says(self) -> str:
        """The whole of it in a sentence."""
        if self.lacking:
            return f"missing: there is no {', no '.join(self.lacking)}"
        if self.value is None:
            return f"missing: {'; '.join(self.reasons)}"
        if self.reasons:
            return f"not comparable, because {'; '.join(self.reasons)}"
        return f"the paper's {self.paper:.{self.digits}f} lies {self.verdict} our 95 % interval"


@dataclass(frozen=True)
class ModelResult:
    """One model: its row's name in the paper (None: it has none), a cell a column, and the average."""

    model: str
    row: str | None
    cells: tuple[Cell, ...]
    average: Cell


@dataclass(frozen=True)
class PaperResult:
    """A run beside the table, models in the table's order first."""

    source: str
    models: tuple[ModelResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, each cell with what it says, and the table with its protocols."""
        return {
            "source": self.source,
            "columns": {column.name: {"key": column.key, "paper": column.protocol} for column in COLUMNS},
            "models": [
                {
                    "model": one.model,
                    "row": one.row,
                    "cells": [_cell_json(cell) for cell in one.cells],
                    "average": _cell_json(one.average),
                }
                for one in self.models
            ],
            "table": [asdict(row) for row in TABLE],
        }


def _cell_json(cell: Cell) -> dict[str, Any]:
    return {**json.loads(json.dumps(asdict(cell))), "says": cell.says}


def beside_paper(summaries: Summaries) -> PaperResult:
    """Every model of a run beside the paper's table.

    Args:
        summaries: model -> bench -> summary, as :func:`flowopd_eval.report.summarise_run` returns; a column's number
            is found by its metric's key, other metrics are passed over.

    Raises:
        RequestError: no model has a metric of the table's columns, or of those that play their part in the miniature.
    """
    rows = {row.model: row for row in TABLE if row.model}
    rows["flow-opd"] = rows["flow-opd:student"]  # the short name of the same model
    order = {model: place for place, model in enumerate(rows)}
    models = []
    for model in sorted(summaries, key=lambda name: order.get(name, len(order))):  # stable: others as they come
        by_key = {summary.get("key"): summary for summary in summaries[model].values()}
        if columns := _columns_of(by_key):
            models.append(_model_result(model, rows.get(model), columns, by_key))
    if not models:
        keys = ", ".join(str(column.key) for column in (*COLUMNS, *MINIATURE) if column.key)
        raise RequestError(f"Nothing of this run stands in {SOURCE}: none of its metrics is one of {keys}.")
    return PaperResult(SOURCE, tuple(models))


def _columns_of(by_key: Mapping[Any, Any]) -> tuple[Column, ...]:
    """The table's columns, or the miniature's where those are all there is."""
    return next((s for s in (COLUMNS, MINIATURE) if any(column.key in by_key for column in s if column.key)), ())


def _model_result(
    model: str, row: Row | None, columns: Sequence[Column], by_key: Mapping[Any, Mapping[str, Any]]
) -> ModelResult:
    stranger = [] if row or columns is MINIATURE else ["no row of the table is this model"]
    printed = row.columns if row else (None,) * len(columns)
    cells = [
        _cell(column, by_key.get(column.key) if column.key else None, paper, stranger)
        for column, paper in zip(columns, printed, strict=True)
    ]
    average = _average(columns, cells, by_key, row, stranger)
    return ModelResult(model, row.name if row else None, tuple(cells), average)


def _cell(column: Column, summary: Mapping[str, Any] | None, paper: float | None, stranger: list[str]) -> Cell:
    if summary is None:
        return _held(column, None, paper, column.never if column.key is None else ("not measured in this run",))
    overall = _mapping(_mapping(summary.get("metrics")).get("overall"))
    if overall.get("value") is None:
        return _held(column, None, paper, ("no picture has a score",))
    return _held(column, overall, paper, (*stranger, *_why_not(column, summary)))


def _held(column: Column, interval: Mapping[str, Any] | None, paper: float | None, reasons: Iterable[str]) -> Cell:
    reasons = tuple(reasons)
    if interval is None:
        return Cell(column.name, column.key, None, None, None, paper, reasons, None, column.digits)
    value, low, high = (float(interval[end]) for end in ("value", "low", "high"))
    verdict = None if reasons or paper is None else _verdict(paper, low, high)
    return Cell(column.name, column.key, value, low, high, paper, reasons, verdict, column.digits)


def _verdict(paper: float, low: float, high: float) -> str:
    return "below" if paper < low else "above" if paper > high else "inside"


def _average(
    columns: Sequence[Column],
    cells: Sequence[Cell],
    by_key: Mapping[Any, Mapping[str, Any]],
    row: Row | None,
    stranger: list[str],
) -> Cell:
    """The mean of the columns, each on its scale; missing, with the names of what it lacks, unless all are there.

    The interval takes the columns for independent, which pictures of different prompts by different judges nearly
    are: its half width is the root of the sum of the squared half widths, each divided by its column's divisor, over
    the number of columns. A number on the scale of another judge is none of DeQA's or PickScore's and counts as
    lacking; the miniature's average leaves out PickScore, which it does not have.
    """
    parts = [(column, cell) for column, cell in zip(columns, cells, strict=True) if column.key]
    lacking = [_lacking(column, cell, by_key) for column, cell in parts]
    names = tuple(name for name in lacking if name)
    of = tuple(str(column.key) for column, _ in parts)
    paper = row.average if row else None
    if names:
        return Cell("Average", None, None, None, None, paper, (), None, 4, of, names)
    value = sum((cell.value or 0.0) / column.divisor for column, cell in parts) / len(parts)
    halves = [((cell.high or 0.0) - (cell.low or 0.0)) / 2 / column.divisor for column, cell in parts]
    half = hypot(*halves) / len(parts)
    apart = [cell.column for _, cell in parts if cell.reasons]
    are_not = [f"{', '.join(apart)} {'is' if len(apart) == 1 else 'are'} not"] if apart else []
    reasons = (*stranger, *are_not)
    verdict = None if reasons or paper is None else _verdict(paper, value - half, value + half)
    return Cell("Average", None, value, value - half, value + half, paper, reasons, verdict, 4, of)


def _lacking(column: Column, cell: Cell, by_key: Mapping[Any, Mapping[str, Any]]) -> str | None:
    if cell.value is None:
        return f"{column.name} ({column.key})"
    if column.divisor != 1 and (why := column.judged(_mapping(by_key[column.key].get("scorer")))):
        return f"{column.name} ({why[0]})"
    return None


# ----------------------------------------------------------------------------------------------------------- terminal


def terminal_report(result: PaperResult) -> Group:
    """Ours with its interval over the paper's, a column a metric; below, what one says of the other. 100 columns."""
    from rich.console import Group
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", overflow="fold")
    for column in COLUMNS:
        table.add_column(column.name, justify="right")
    table.add_column("Average", justify="right")
    for one in result.models:
        cells = (*one.cells, one.average)
        table.add_row(_plain(one.model), *(_plain(_number(cell, cell.value)) for cell in cells), style="bold")
        table.add_row("  95 % interval", *(_plain(_interval(cell)) for cell in cells), style="dim")
        if one.row:
            printed = (f"{cell.paper:.{cell.digits}f}" for cell in cells if cell.paper is not None)
            table.add_row(_plain(f"  {one.row}"), *map(_plain, printed))
        table.add_row("  verdict", *(_plain(_short(cell)) for cell in cells), style="dim")
        table.add_section()
    legend = _plain(
        f"{result.source}. Ours, its 95 % interval, the paper's number as printed; verdict: where that lies relative "
        "to the interval."
    )
    legend.stylize("dim italic")
    return Group(table, legend, *_explanations(result))


def _explanations(result: PaperResult) -> list[Text]:
    """Every sentence once, with the models it is true of."""
    said: dict[tuple[str, str], list[str]] = {}
    for one in result.models:
        for cell in (*one.cells, one.average):
            name = cell.column if cell.key in (None, cell.column.lower()) else f"{cell.column} ({cell.key})"
            if cell.of and cell.value is not None:
                name = f"Average (mean of {', '.join(cell.of)})"
            said.setdefault((name, cell.says), []).append(one.model)
    every = len(result.models)
    return [
        _plain(f"{name}{'' if len(models) == every else ' of ' + ', '.join(models)}: {sentence}.")
        for (name, sentence), models in said.items()
    ]


def _number(cell: Cell, value: float | None) -> str:
    return "–" if value is None else f"{value:.{2 if cell.key in ('deqa', 'preference') else 3}f}"


def _interval(cell: Cell) -> str:
    return "" if cell.value is None else f"[{_number(cell, cell.low)}, {_number(cell, cell.high)}]"


def _short(cell: Cell) -> str:
    if cell.value is None:
        return "–"
    return cell.verdict or "not comparable"


def _plain(text: str) -> Text:
    """Plain text without markup, and without the control characters by which a name could steer the terminal."""
    from rich.text import Text

    return Text(printable(text))
