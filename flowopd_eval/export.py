"""A run's results for elsewhere: tables for papers and sheets, one JSON file, and metadata for the Hub.

Names, tasks and reasons come from run folders that may be hostile: every format escapes them in its own way. Tables
mark what is partial; the Hub's metadata has no place for a mark, so there such results are refused.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flowopd_eval import store
from flowopd_eval.benches import Bench, bench_by_key
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import drawn_differently, mean_over, protocol_and_engine
from flowopd_eval.models import FAMILIES
from flowopd_eval.quiet import printable

Summary = Mapping[str, Any]  # one summary.json
Texts = Iterator[tuple[str, str]]  # file below OUT/export, its text

_TASK = "text-to-image"
_TOOL = f"flowopd-eval {version('flowopd-eval')}"
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # what a spreadsheet takes for the beginning of a formula, or drops before one
_COMMANDS = "backslash asciitilde asciicircum asciigrave less greater bar quotedbl".split()
_LATEX = {c: f"\\{c}" for c in "{}$&#_%"} | {c: f"\\text{name}{{}}" for c, name in zip('\\~^`<>|"', _COMMANDS)}


@dataclass(frozen=True)
class Results:
    """What a run has to export, and what only its owner knows of the Hub."""

    summaries: Mapping[str, Mapping[str, Summary]]  # as in OUT/summary.json: model -> bench -> summary
    run: Mapping[str, Any] = field(default_factory=dict)  # OUT/run.json
    hub_datasets: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # metric key -> benchmark dataset, task
    source_url: str | None = None  # where the results can be looked up


def write_exports(out: Path, results: Results, formats: Sequence[str]) -> list[Path]:
    """Write ``formats`` below ``OUT/export`` once all of them could be made; returns the files.

    Raises ``RequestError`` for an unknown format or results that a format refuses, ``WorkError`` when the disk is full.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise RequestError(f"Unknown --format {unknown[0]!r}; known: {', '.join(FORMATS)}.")
    texts = [item for name in dict.fromkeys(formats) for item in FORMATS[name](results)]
    paths = [out / "export" / name for name, _ in texts]
    if len(set(paths)) < len(paths):
        raise RequestError("Two models or benches of this run share a folder name: export them from runs of their own.")
    for path, (_, text) in zip(paths, texts, strict=True):
        store.write_atomic(path, text.encode(errors="replace"))  # half a surrogate pair
    return paths


def comparable(results: Results) -> list[list[Summary]]:
    """Summaries that may share a table: of the same metric, version, judge, prompts and pictures a prompt."""
    groups: dict[str, list[Summary]] = {}
    for one in (one for benches in results.summaries.values() for one in benches.values()):
        same = [one[name] for name in ("key", "version", "scorer", "prompts_sha256", "samples")]
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(one)
    return list(groups.values())


def _tasks(rows: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(task for row in rows for task in row["metrics"]["tasks"]))


def _intervals(row: Summary, tasks: Sequence[str]) -> list[Mapping[str, Any]]:
    return [row["metrics"]["overall"] or {}, *(row["metrics"]["tasks"].get(task) or {} for task in tasks)]


def _judged(one: Summary) -> str:
    protocol, engine = protocol_and_engine(one)
    how = f"{one['key']} version {one['version']}, protocol {protocol}, engine {engine}"
    return f"{how}; {one['prompts']} prompts, pictures of each: {one['samples']}"


def _table(rows: Sequence[Summary], escape: Callable[[Any], str], cell: str, mark: str) -> tuple[str, list[list[str]]]:
    """Caption and cells, all escaped: a header, then a row a model. ``cell`` lays out value, mark and interval."""
    tasks = _tasks(rows)
    table = [[escape(head) for head in ("model", "overall", *tasks, "n", "unscored", "partial")]]
    for row in rows:
        cells, star = [escape(row["model"])], mark if row["partial"] else ""
        for one in _intervals(row, tasks):
            ends = "" if one.get("value") is None else escape(f"[{one['low']:.3f}, {one['high']:.3f}]")
            cells.append(cell % (f"{one['value']:.3f}" if ends else "--", star, ends))
        table.append([*cells, str(row["n"]), str(row["unscored"]), escape(row["partial"] or "no")])
    over = "pictures" if mean_over(rows[0]) == "images" else "tasks"
    unlike = "".join(f" Drawn differently: {line}." for line in drawn_differently(rows))
    return escape(f"{_judged(rows[0])}. Value [95 % interval], overall: mean over {over}, * partial.{unlike}"), table


def _printable(text: Any) -> str:
    return printable(re.sub(r"\s+", " ", str(text)))


def escape_markdown(text: Any) -> str:
    """``text`` on one line, so that CommonMark and GitHub's tables show it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$@:.])", r"\\\1", _printable(text))


def markdown(results: Results) -> Texts:
    """``table.md``: a table a bench, a row a model."""
    parts = []
    for rows in comparable(results):
        caption, table = _table(rows, escape_markdown, "%s%s %s", r"\*")
        table.insert(1, ["---"] * len(table[0]))
        parts.append(f"{caption}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in table))
    yield "table.md", "\n".join(parts)


def escape_latex(text: Any) -> str:
    """``text`` on one line of LaTeX's text mode: special characters, and dashes that would join."""
    plain = _printable(text).replace("\N{REPLACEMENT CHARACTER}", "?")  # pdflatex has no glyph for it
    return re.sub(r"(?<=-)-", "{}-", "".join(_LATEX.get(c, c) for c in plain))


def latex(results: Results) -> Texts:
    r"""``table.tex``: a ``table`` a bench, a row a model; needs ``\usepackage{booktabs}``."""
    lines = [r"% needs \usepackage{booktabs}"]
    for rows in comparable(results):
        caption, (head, *table) = _table(rows, escape_latex, r"%s%s {\scriptsize %s}", "$^{*}$")
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}"]
        columns = "l" + "r" * (len(head) - 2) + "l"
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rf"{' & '.join(head)} \\", r"\midrule"]
        # the braces keep a name that begins with [ or * from becoming an argument of the line before
        lines += [rf"{{{cells[0]}}} & {' & '.join(cells[1:])} \\" for cells in table]
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    yield "table.tex", "\n".join(lines) + "\n"


def formula_safe(cell: Any) -> Any:
    """A text that a spreadsheet would take for a formula gets an apostrophe; numbers stay numbers."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def comma_separated(results: Results) -> Texts:
    """``table.csv``: a row a model and bench in full precision; tasks that a bench lacks stay empty."""
    rows = [row for group in comparable(results) for row in group]
    tasks, buffer = _tasks(rows), io.StringIO()
    facts = ("model", "bench", "key", "version", "n", "unscored", "expected", "prompts", "samples", "prompts_sha256")
    ends = [f"{name}{end}" for name in ("overall", *tasks) for end in ("", " low", " high")]
    writer = csv.writer(buffer)
    writer.writerow(map(formula_safe, (*facts, "partial", "protocol", "engine", *ends)))
    for row in rows:
        values = [one.get(end) for one in _intervals(row, tasks) for end in ("value", "low", "high")]
        known = [*(row[fact] for fact in facts), row["partial"] or "no", *protocol_and_engine(row)]
        writer.writerow(map(formula_safe, (*known, *values)))
    yield "table.csv", buffer.getvalue()


def whole_json(results: Results) -> Texts:
    """``summary.json``: OUT/summary.json with ``provenance``: requests with their hashes, versions, sessions."""
    run = json.loads(json.dumps(results.run), parse_constant=str)  # NaN, which Python reads, is no JSON
    whole = {"schema": store.SCHEMA, "models": results.summaries, "provenance": {"exported_with": _TOOL, **run}}
    yield "summary.json", json.dumps(whole, indent=2, allow_nan=False) + "\n"


def claimed(summary: Summary) -> Bench:
    """The bench of which a card may show ``summary``; ``RequestError`` for one that is not whole or not the model's."""
    bench = bench_by_key(summary["key"])
    title = f"{summary['model']!r} on {summary['key']}"
    family = FAMILIES.get(summary["model"].partition(":")[0])
    if bench.objects != (family.objects if family else "coco"):
        raise RequestError(f"{title}: the miniature's scores are never comparable with a real model's; not exported.")
    lacking = summary["expected"] - summary["n"]
    if summary["partial"] or lacking or summary["unscored"] or not summary["metrics"]["overall"]:
        why = repr(summary["partial"] or f"{lacking} of {summary['expected']} pictures have no score")
        raise RequestError(f"{title} is partial, which a model card would not tell: {why}. Draw and score the rest.")
    if summary["prompts"] != (whole := len(bench.prompts())):
        raise RequestError(f"{title} has {summary['prompts']} prompts, but {bench.title} has {whole}: not its result.")
    return bench


def model_index(model: str, summaries: Sequence[Summary], source_url: str | None = None) -> dict[str, Any]:
    """``model-index`` of a model's card: a metric for overall and for each task. Raises as :func:`claimed`."""
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    found = []
    for one in summaries:
        bench, facts = claimed(one), dict(zip(("protocol", "engine"), protocol_and_engine(one)))
        facts |= {name: one[name] for name in ("version", "prompts", "samples", "prompts_sha256")}
        tasks = _tasks([one])
        for task, cell in zip(["", *tasks], _intervals(one, tasks), strict=True):
            kind = f"{bench.key}/{task}" if task else bench.key
            more = {"metric_name": f"{bench.title}: {task or 'overall'}", "verified": False, **_source(source_url)}
            more |= {"dataset_args": facts, "metric_args": {end: cell[end] for end in ("low", "high", "level", "n")}}
            found.append(EvalResult(_TASK, bench.key, bench.title, kind, cell["value"], **more))
    return {"model-index": eval_results_to_model_index(model, found)}


def eval_results(summary: Summary, dataset: tuple[str, str], source_url: str | None = None) -> list[dict[str, Any]]:
    """The overall score in the form of huggingface.co/docs/hub/eval-results; raises as :func:`claimed`."""
    try:
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    except ImportError as error:
        raise RequestError("This huggingface_hub knows no .eval_results: pip install -U huggingface_hub.") from error
    claimed(summary)
    value, low, high = (summary["metrics"]["overall"][end] for end in ("value", "low", "high"))
    notes = f"{_judged(summary)}; 95 % interval {low:.4f} to {high:.4f}"
    return eval_result_entries_to_yaml([EvalResultEntry(*dataset, value, notes=notes, **_source(source_url))])


def _model_indices(results: Results) -> Texts:
    for model, benches in results.summaries.items():
        index = model_index(model, list(benches.values()), results.source_url)
        yield f"{_folder(results, model)}model-index.yaml", _yaml(index)


def _eval_results(results: Results) -> Texts:
    for model, bench, one in ((m, b, one) for m, benches in results.summaries.items() for b, one in benches.items()):
        if one["key"] not in results.hub_datasets:
            raise RequestError(f"eval-results need the Hub's dataset: give --hub-dataset {one['key']}=OWNER/NAME.")
        entries = eval_results(one, results.hub_datasets[one["key"]], results.source_url)
        yield f"{_folder(results, model)}.eval_results/{store.folder_name(bench)}.yaml", _yaml(entries)


def _folder(results: Results, model: str) -> str:
    """A card speaks of one model: each of several gets a folder of its own."""
    return f"{store.folder_name(model)}/" if len(results.summaries) > 1 else ""


def _source(url: str | None) -> dict[str, Any]:
    return {"source_url": url, "source_name": _TOOL} if url else {}


def _yaml(value: Any) -> str:
    from huggingface_hub.utils import yaml_dump

    return yaml_dump(value, sort_keys=False, allow_unicode=False)  # as it is, U+0085 would be read back as a newline


FORMATS: dict[str, Callable[[Results], Texts]] = {"md": markdown, "csv": comma_separated, "latex": latex}
FORMATS |= {"json": whole_json, "model-index": _model_indices, "eval-results": _eval_results}
