"""Exports: every format is read back by another reader than its writer, and says no more than the run does."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from huggingface_hub.repocard_data import ModelCardData, model_index_to_eval_results
from markdown_it import MarkdownIt
from painting import PROMPTS, RUN, Painter

from flowopd_eval import cli
from flowopd_eval.benches import bench_by_key
from flowopd_eval.errors import RequestError
from flowopd_eval.export import FORMATS, Results, comparable, escape_latex, formula_safe, model_index, write_exports
from flowopd_eval.harness import BenchRun, request_of, run_bench, summarise
from flowopd_eval.records import Prompt, Sample
from flowopd_eval.report import summarise_run

HOSTILE = (
    "=1+1|<b>x</b>\n| new | row |",
    '"; - key: [x]\r\n--- !!python/object/apply:os.system [ls] # {a: *b}',
    "[1em] \\input{/etc/passwd} $x^2$ & 50% #1 _a_ ~ --- `c`",
    "\x85tail\u2028more\x1b[2J\x00 \ud800\ttab",
    "one\x85two\u2028three: four",
    "@SUM(A1) | ![i](https://x.y/z) www.evil.com",
)
DATASETS = {"geneval": ("someone/geneval", "default"), "shapes_geneval": ("someone/shapes", "default")}


def whole(model: str, key: str = "geneval", tasks=("colors", "counting"), scored=lambda n: True, partial=None):
    """The summary of a run of all the bench's prompts, a third of the pictures right."""
    prompts = tuple(Prompt(p.id, p.prompt, tasks[i % len(tasks)]) for i, p in enumerate(bench_by_key(key).prompts()))
    run = BenchRun("geneval", key, 1, prompts, None, samples=1, partial=partial)
    scorer = {"metric": "geneval", "protocol": {"name": "official", "margin": 0.1}, "detector": {"name": "m2f"}}
    request = request_of(run, {"model": model, "base_sha256": "ab" * 32}, scorer)
    scores = [float(n % 3 == 0) if scored(n) else None for n in range(len(prompts))]
    samples = [Sample(p.id, 0, p.task, p.prompt, 1, "samples/a.png", "", s) for p, s in zip(prompts, scores)]
    return summarise(request, samples)


def of(*summaries, **more) -> Results:
    return Results({one["model"]: {one["bench"]: one} for one in summaries}, **more)


def text(name: str, results: Results) -> str:
    ((_, written),) = FORMATS[name](results)
    return written


def cells_of(source: str) -> list[list[list[str]]]:
    """The tables of a CommonMark page as texts; there is nothing but text in their cells."""
    tables: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(source):
        if token.type in ("table_open", "tr_open"):
            (tables if token.type == "table_open" else tables[-1]).append([])
        elif token.type == "inline":
            assert {child.type for child in token.children} <= {"text", "text_special"}, token.content
            if token.level > 1:
                tables[-1][-1].append("".join(child.content for child in token.children))
        assert token.type != "html_block"
    return tables


def shown(hostile: str) -> str:
    flat = re.sub(r"\s+", " ", hostile)
    return "".join(c if c.isprintable() else "\ufffd" for c in flat).strip()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A whole and a partial model on one bench of four pictures each, drawn and judged."""
    path = tmp_path_factory.mktemp("run")
    for name, partial in (("painter:base", None), ("flow-opd:geneval", "--limit 2")):
        painter = Painter()
        painter.identity = lambda name=name: {**Painter().identity(), "model": name}
        run_bench(replace(RUN, prompts=PROMPTS[:2], partial=partial), painter, path)
    return path


# ------------------------------------------------------------------------------------------------------------ tables


def test_every_table_has_the_numbers_of_the_summaries(out):
    summaries = summarise_run(out)
    head, *rows = cells_of(text("md", Results(summaries)))[0]
    assert head == ["model", "overall", "counting", "colors", "n", "unscored", "partial"]
    sheet = list(csv.DictReader(io.StringIO(text("csv", Results(summaries)))))
    tex = text("latex", Results(summaries))
    for row, line, (model, benches) in zip(rows, sheet, summaries.items(), strict=True):
        one = benches["squares"]
        intervals = {"overall": one["metrics"]["overall"], **one["metrics"]["tasks"]}
        star = "*" if one["partial"] else ""
        expected = [f"{i['value']:.3f}{star} [{i['low']:.3f}, {i['high']:.3f}]" for i in intervals.values()]
        assert row == [model, *expected, "4", "0", one["partial"] or "no"]
        assert (line["model"], line["partial"].lstrip("'"), line["n"]) == (model, one["partial"] or "no", "4")
        assert (line["protocol"], line["engine"]) == ("own", "red")
        for name, interval in intervals.items():
            ends = [float(line[name + end]) for end in ("", " low", " high")]
            assert ends == [interval["value"], interval["low"], interval["high"]]
        assert all(f"{i['value']:.3f}{'$^{*}$' * bool(star)} {{\\scriptsize [" in tex for i in intervals.values())
    assert tex.count(r"\begin{tabular}{lrrrrrl}") == tex.count(r"\bottomrule") == 1


def test_captions_name_protocol_and_engine():
    for name in ("md", "latex"):
        assert re.search("geneval version 1, protocol official, engine m2f", text(name, of(whole("a"))))


def test_a_caption_says_what_the_overall_score_is_the_mean_of():
    one = whole("a")
    assert "mean over tasks" in text("md", of(one))
    protocol = {"name": "flow-grpo", "mean_over": "images"}
    pictures = {**one, "scorer": {**one["scorer"], "protocol": protocol}}
    assert "mean over pictures" in text("md", of(pictures))


def test_a_run_without_a_judge_says_so():
    assert "engine none" in text("md", of({**whole("a"), "scorer": None}))


def test_what_was_judged_differently_shares_no_table():
    one, other = whole("a"), whole("b")
    assert len(comparable(of(one, other))) == 1
    for change in ({"version": 2}, {"scorer": {"name": "mine"}}, {"prompts_sha256": "0"}, {"samples": 4}):
        assert len(comparable(of(one, {**other, **change}))) == 2
        assert len(cells_of(text("md", of(one, {**other, **change})))) == 2


def test_unscored_tasks_show_no_number():
    one = whole("a", scored=lambda n: n % 2 == 0)
    assert cells_of(text("md", of(one)))[0][1][3].startswith("--")
    (line,) = csv.DictReader(io.StringIO(text("csv", of(one))))
    assert (line["counting"], line["unscored"], line["partial"]) == ("", "276", "no picture of counting has a score")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_survives_the_tables_as_text(hostile):
    results = of(whole(hostile, tasks=(hostile, "colors"), partial=hostile))
    ((head, row),) = cells_of(text("md", results))
    assert (row[0], head[2], row[-1]) == (shown(hostile),) * 3
    head, row = csv.reader(io.StringIO(text("csv", results), newline=""))
    safe = f"'{hostile}" if hostile[0] in "=@" else hostile
    assert (row[0], row[head.index("partial")]) == (safe, safe)
    assert safe in head
    assert not any(cell.startswith(("=", "+", "@", "\t", "\r")) for cell in (*head, *row))


@pytest.mark.parametrize("sign", "=+-@\t\r")
def test_no_text_of_a_sheet_begins_like_a_formula(sign):
    assert formula_safe(f"{sign}1") == f"'{sign}1"
    assert formula_safe(f"1{sign}") == f"1{sign}"
    assert formula_safe(-0.5) == -0.5


def test_latex_reads_back_as_the_text_it_was():
    plain = "".join(map(chr, range(32, 127))) + " a--b---c"
    escaped = escape_latex(plain)
    names = 'backslash \\ asciitilde ~ asciicircum ^ asciigrave ` less < greater > bar | quotedbl "'.split()
    commands = dict(zip(names[::2], names[1::2]))
    back = re.sub(r"\\text(\w+)\{\}", lambda m: f"\0{ord(commands[m[1]])}\0", escaped).replace("-{}", "-")
    assert not re.search(r"(?<!\\)[{}$&#_%~^<>|\"`]", back)  # whatever is special stands behind a backslash
    back = re.sub(r"\\([{}$&#_%])", r"\1", back)
    assert re.sub("\0(\\d+)\0", lambda m: chr(int(m[1])), back) == plain
    assert "--" not in escaped
    assert escape_latex("a\n\\end{table}") == r"a \textbackslash{}end\{table\}"


def test_a_latex_row_never_begins_with_an_argument():
    assert re.search(r"\\midrule\n\{\[1em\]", text("latex", of(whole(HOSTILE[2]))))


# -------------------------------------------------------------------------------------------------------------- json


def test_one_file_holds_summaries_and_provenance(out):
    summaries, run = summarise_run(out), json.loads((out / "run.json").read_text())
    found = json.loads(text("json", Results(summaries, run)))
    assert found["models"] == json.loads((out / "summary.json").read_text())["models"]
    assert found["provenance"]["runs"] == run["runs"]
    sessions = found["provenance"]["runs"]["painter-base/squares"]["sessions"]
    assert "numpy" in sessions[0]["versions"]
    assert found["models"]["painter:base"]["squares"]["generator"]["base_sha256"] == "ab" * 32
    strict = text("json", Results({}, {"runs": {"a/b": {"wall_s": float("nan")}}}))
    assert json.loads(strict, parse_constant=pytest.fail)["provenance"]["runs"]["a/b"]["wall_s"] == "NaN"


# ----------------------------------------------------------------------------------------------------------- the Hub


@pytest.mark.parametrize("hostile", ["flow-opd:student", *HOSTILE])
def test_a_model_index_is_read_back_by_the_hubs_own_reader(hostile):
    one = whole(hostile, tasks=(hostile, "colors"))
    found = yaml.safe_load(text("model-index", of(one, source_url="https://example.org/run")))
    name, results = model_index_to_eval_results(found["model-index"])
    assert name == hostile
    cells = {"geneval": one["metrics"]["overall"]}
    cells |= {f"geneval/{task}": cell for task, cell in one["metrics"]["tasks"].items()}
    assert {result.metric_type: result.metric_value for result in results} == {k: c["value"] for k, c in cells.items()}
    for result in results:
        assert (result.dataset_type, result.dataset_name, result.task_type) == ("geneval", "GenEval", "text-to-image")
        assert (result.verified, result.source_url) == (False, "https://example.org/run")
        assert result.metric_args["low"] == cells[result.metric_type]["low"]
        assert result.dataset_args["prompts_sha256"] == one["prompts_sha256"]
    assert ModelCardData(**found).eval_results == results


@pytest.mark.parametrize("name", ["model-index", "eval-results"])
@pytest.mark.parametrize(
    ("summary", "why"),
    [
        (whole("flow-opd:base", partial="--limit 3"), "is partial.*--limit 3"),
        (whole("flow-opd:base", scored=lambda n: n != 5), "is partial.*1 of 553 pictures have no score"),
        ({**whole("flow-opd:base"), "expected": 554}, "1 of 554"),
        ({**whole("flow-opd:base"), "prompts": 552}, "552 prompts, but GenEval has 553"),
        (whole("flow-opd:base", key="shapes_geneval"), "never comparable"),
        (whole("some/folder", key="shapes_geneval"), "never comparable"),
        (whole("tiny:base"), "never comparable"),
        ({**whole("flow-opd:base"), "key": "homemade"}, "Unknown metric 'homemade'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_card_may_not_show_is_refused_and_nothing_is_written(tmp_path, name, summary, why):
    datasets = {**DATASETS, "homemade": ("a/b", "c")}
    with pytest.raises(RequestError, match=why):
        write_exports(tmp_path, of(summary, hub_datasets=datasets), ["md", name])
    assert not any(tmp_path.iterdir())


def test_the_miniature_may_show_its_own():
    (model,) = model_index("tiny:base", [whole("tiny:base", key="shapes_geneval")])["model-index"]
    assert model["results"][0]["dataset"]["type"] == "shapes_geneval"


@pytest.mark.parametrize("hostile", ["flow-opd:student", *HOSTILE])
def test_eval_results_are_read_back_by_the_hubs_own_reader(tmp_path, hostile):
    one = whole(hostile)
    one["scorer"]["detector"]["name"] = hostile
    results = of(one, hub_datasets={"geneval": ("someone/geneval", "overall")}, source_url="https://example.org/run")
    (path,) = write_exports(tmp_path, results, ["eval-results"])
    assert path == tmp_path / "export/.eval_results/geneval.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_bytes()))
    assert (entry.dataset_id, entry.task_id) == ("someone/geneval", "overall")
    assert (entry.value, entry.source_url) == (one["metrics"]["overall"]["value"], "https://example.org/run")
    assert f"protocol official, engine {hostile};" in entry.notes


def test_eval_results_name_the_dataset_they_lack():
    with pytest.raises(RequestError, match="--hub-dataset geneval=OWNER/NAME"):
        text("eval-results", of(whole("a")))


def test_each_of_several_models_gets_a_card_of_its_own(tmp_path):
    found = write_exports(tmp_path, of(whole("a:1"), whole("b")), ["model-index"])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "export/a-1/model-index.yaml",
        "export/b/model-index.yaml",
    ]
    assert [yaml.safe_load(path.read_text())["model-index"][0]["name"] for path in found] == ["a:1", "b"]
    with pytest.raises(RequestError, match="share a folder"):
        write_exports(tmp_path, of(whole("a:1"), whole("a/1")), ["model-index"])


# ---------------------------------------------------------------------------------------------------------- command


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["flowopd-eval", "report", *map(str, arguments)])
    try:
        cli.run()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_the_command_writes_what_it_prints(out, monkeypatch, capsys):
    assert (
        command(monkeypatch, out, *(word for name in ("md", "csv", "latex", "json") for word in ("--format", name)))
        == 0
    )
    printed = re.findall(r"^Export: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert printed == [str(out / "export" / name) for name in ("table.md", "table.csv", "table.tex", "summary.json")]
    assert json.loads((out / "export/summary.json").read_text())["provenance"]["runs"]
    assert "painter:base" in (out / "export/table.csv").read_text()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--format", "docx"], "Unknown --format 'docx'; known: md, csv"),
        (["--format", "model-index"], "Unknown metric 'red_squares'"),
        (["--format", "eval-results", "--hub-dataset", "geneval"], "KEY=OWNER/NAME"),
    ],
)
def test_the_command_refuses_with_exit_code_2(out, monkeypatch, capsys, words, why):
    assert command(monkeypatch, out, *words) == 2
    assert why in capsys.readouterr().err
