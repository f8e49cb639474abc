"""A run beside the paper's table: the table's arithmetic, every reason one by one, and no verdict beside a reason."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict, replace
from math import sqrt

import pytest
from rich.console import Console

from flowopd_eval import paper
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import BenchRun, run_bench
from flowopd_eval.models import FAMILIES, resolve
from flowopd_eval.paper import COLUMNS, TABLE, beside_paper, terminal_report
from flowopd_eval.records import SD35_RECORD, Prompt, Score
from flowopd_eval.report import summarise_run
from flowopd_eval.scorers.geneval import FLOW_GRPO, PROTOCOLS, GenEvalScorer
from flowopd_eval.scorers.mask2former import CHECKPOINT
from flowopd_eval.scorers.ocr import OCRScorer
from flowopd_eval.scorers.ocr_engines import RapidOCREngine

JUDGES = {
    "geneval": {"metric": "geneval", "protocol": asdict(FLOW_GRPO), "detector": {"name": CHECKPOINT}},
    "ocr": {"scorer": "external", "name": "paddleocr", "version": "2.9.1", "lang": "en", "rule": "flow-grpo"},
    "deqa": {"scorer": "external", "name": "deqa", "version": "1", "model": "zhiyuanyou/DeQA-Score-Mix3@abc"},
    "preference": {
        "scorer": "preference",
        "value": "pickscore",
        "metrics": {"pickscore": {"model": "hub:yuvalkirstain/PickScore_v1@a4e4367"}},
    },
}
MEASURED = {
    "geneval": (0.62, 0.60, 0.64, 2212),
    "ocr": (0.50, 0.48, 0.52, 1018),
    "deqa": (4.20, 4.15, 4.25, 200),
    "preference": (22.30, 22.10, 22.50, 200),
}
FLAGS = {"geneval": "geneval", "ocr": "ocr", "deqa": "quality", "preference": "preference"}


def summary(key, model="flow-opd:base"):
    """What a faithful run of a column would leave."""
    value, low, high, n = MEASURED[key]
    overall = {"value": value, "low": low, "high": high, "n": n, "level": 0.95}
    return {
        "bench": FLAGS[key],
        "key": key,
        "version": 1,
        "model": model,
        "metrics": {"overall": overall, "tasks": {}, "images": overall},
        "n": n,
        "samples": {"geneval": 4}.get(key, 1),
        "unscored": 0,
        "partial": None,
        "generator": {"model": model, "sampling": asdict(SD35_RECORD)},
        "scorer": copy.deepcopy(JUDGES[key]),
    }


def run(*keys, model="flow-opd:base", **changes):
    benches = {FLAGS[key]: {**summary(key, model), **changes} for key in keys or MEASURED}
    return {model: benches}


def cells(summaries):
    (one,) = beside_paper(summaries).models
    return {cell.column: cell for cell in (*one.cells, one.average)}


@pytest.fixture
def same_prompts(monkeypatch):
    """As if the preference prompts were the paper's: then nothing stands between a faithful run and the table."""
    monkeypatch.setattr(paper, "COLUMNS", tuple(replace(column, never=()) for column in COLUMNS))


# --- the table -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_the_table_s_average_is_the_mean_of_its_columns_each_on_its_scale(row):
    geneval, ocr, deqa, pickscore = row.columns
    assert (geneval + ocr + deqa / 5 + pickscore / 26) / 4 == pytest.approx(row.average, abs=1.1e-4)
    assert [column.divisor for column in COLUMNS] == [1, 1, 5, 26]


def test_its_models_are_this_toolkit_s():
    named = {row.model: row.name for row in TABLE if row.model}
    members = FAMILIES["flow-opd"].members
    assert set(named) == {f"flow-opd:{name}" for name in members if name != "merge"}
    assert named[resolve("flow-opd").name] == "Flow-OPD (Merge)"
    assert all(resolve(name).name == name for name in named)
    assert (TABLE[0].name, named["flow-opd:base"]) == ("SD3.5-M", "SD3.5-M")


def test_the_short_name_is_the_student(same_prompts):
    short, long = (cells(run(model=name)) for name in ("flow-opd", "flow-opd:student"))
    assert short == long
    assert short["GenEval"].paper == 0.93


def test_another_number_of_pictures_a_prompt_is_another_measurement():
    """The paper's GenEval is of four pictures a prompt, its OCR of one: more or fewer have another interval."""
    found = cells(run("geneval", "ocr", samples=2))
    assert found["GenEval"].reasons == ("pictures of each prompt: 2 instead of 4",)
    assert found["OCR"].reasons == ("pictures of each prompt: 2 instead of 1",)
    assert found["GenEval"].verdict is found["OCR"].verdict is None


# --- verdicts --------------------------------------------------------------------------------------------------------
def test_without_a_reason_there_is_a_verdict_by_the_interval():
    found = cells(run())
    assert (found["GenEval"].reasons, found["GenEval"].verdict) == ((), "inside")
    assert found["OCR"].verdict == "above"  # the paper's 0.59 above our 0.48 .. 0.52
    assert found["DeQA"].verdict == "below"
    assert found["OCR"].says == "the paper's 0.59 lies above our 95 % interval"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.63, 0.7, "inside"), (0.5, 0.63, "inside"), (0.631, 0.7, "below"), (0.5, 0.629, "above")],
)
def test_the_interval_s_ends_belong_to_it(low, high, verdict):
    summaries = run("geneval")
    overall = summaries["flow-opd:base"]["geneval"]["metrics"]["overall"]
    overall.update(value=(low + high) / 2, low=low, high=high)
    assert cells(summaries)["GenEval"].verdict == verdict


def test_preference_is_not_comparable_as_long_as_its_prompts_are_others():
    found = cells(run())["PickScore"]
    assert (found.verdict, len(found.reasons)) == (None, 1)
    assert "DrawBench" in found.reasons[0]
    assert "Pick-a-Pic" in found.reasons[0]
    assert cells(run())["Average"].says == "not comparable, because PickScore is not"


# --- reasons, one by one ---------------------------------------------------------------------------------------------
def scorer(key, **changes):
    return {**JUDGES[key], **changes}


REASONS = {
    "partial": ("ocr", {"partial": "--limit 20"}, r"a partial run \(--limit 20\)"),
    "unscored": ("ocr", {"unscored": 3, "n": 1015}, "3 of 1,018 pictures have no score"),
    "version": ("ocr", {"version": 2}, "version 2 of the bench"),
    "no judge": ("ocr", {"scorer": None}, "no judge"),
    "no record": ("ocr", {"generator": {}}, "sampling record is unknown"),
    "protocol": (
        "geneval",
        {"scorer": scorer("geneval", protocol=asdict(PROTOCOLS["official"]))},
        "flow-grpo.*official",
    ),
    "detector": ("geneval", {"scorer": scorer("geneval", detector={"name": "shapes"})}, 'the detector is "shapes"'),
    "no protocol": ("geneval", {"scorer": scorer("geneval", protocol="official")}, "GenEval protocol is unknown"),
    "paddle 3": (
        "ocr",
        {"scorer": scorer("ocr", version="3.7.0")},
        "paddleocr 3.7.0, not PaddleOCR 2.9.1 with lang en",
    ),
    "other lang": ("ocr", {"scorer": scorer("ocr", lang="ch")}, 'lang is "ch"; the paper\'s code has en'),
    "lang untold": ("ocr", {"scorer": {k: v for k, v in JUDGES["ocr"].items() if k != "lang"}}, "lang is not told"),
    "rule": ("ocr", {"scorer": scorer("ocr", rule="exact")}, 'rule is "exact", not Flow-GRPO\'s'),
    "deqa": (
        "deqa",
        {"scorer": scorer("deqa", model="zhiyuanyou/DeQA-Doc")},
        "judged by deqa 1, not by DeQA-Score-Mix3",
    ),
    "pick": ("preference", {"scorer": JUDGES["deqa"]}, "judged by deqa 1, not by yuvalkirstain/PickScore_v1"),
    "value": ("preference", {"scorer": scorer("preference", value="clip_score")}, "not by yuvalkirstain/PickScore_v1"),
}


@pytest.mark.parametrize(("key", "changes", "why"), REASONS.values(), ids=REASONS)
def test_every_reason_is_told_alone_and_takes_the_verdict_away(key, changes, why, same_prompts):
    column = next(column.name for column in COLUMNS if column.key == key)
    faithful, changed = (cells(run(key, **change))[column] for change in ({}, changes))
    assert (len(faithful.reasons), len(changed.reasons)) == (0, 1)
    assert faithful.verdict
    assert changed.verdict is None
    assert re.search(why, changed.reasons[0])
    assert changed.says.startswith("not comparable, because ")
    assert (changed.value, changed.paper) == (faithful.value, faithful.paper)


def test_the_protocol_s_reason_names_every_field_that_differs():
    official = scorer("geneval", protocol=asdict(PROTOCOLS["official"]))
    (reason,) = cells(run("geneval", scorer=official))["GenEval"].reasons
    for field in ("jpeg_quality null instead of 75", "swapped_channels", 'mean_over "tasks" instead of "images"'):
        assert field in reason
    assert "position_margin" not in reason
    renamed = scorer("geneval", protocol=asdict(replace(FLOW_GRPO, name="mine")))
    assert cells(run("geneval", scorer=renamed))["GenEval"].reasons == ()


@pytest.mark.parametrize("field", asdict(SD35_RECORD))
def test_every_field_of_the_sampling_record_counts(field):
    sampling = asdict(SD35_RECORD) | {field: "other"}
    found = cells(run("ocr", generator={"sampling": sampling}))["OCR"]
    assert found.reasons == (f'drawn with {field} "other" instead of {json.dumps(asdict(SD35_RECORD)[field])}',)


def test_the_toolkit_s_own_judges_are_told_apart_from_the_paper_s():
    """By what they say of themselves, not by what this test thinks they say."""
    pytest.importorskip("rapidocr")
    own = json.loads(json.dumps(OCRScorer(RapidOCREngine(160)).identity()))
    (reason,) = cells(run("ocr", scorer=own))["OCR"].reasons
    assert "rapidocr-ppocrv6-small" in reason

    class Detector:
        def identity(self):
            return {"name": CHECKPOINT, "sha256": "0" * 64}

    for name in PROTOCOLS:
        own = json.loads(json.dumps(GenEvalScorer(Detector(), name).identity()))
        assert bool(cells(run("geneval", scorer=own))["GenEval"].reasons) == (name != "flow-grpo")


def test_a_model_that_is_none_of_the_paper_s_gets_its_numbers_and_no_verdict():
    found = cells(run("geneval", model="flow-opd:merge"))["GenEval"]
    assert (found.value, found.paper, found.verdict) == (0.62, None, None)
    assert found.reasons == ("no row of the table is this model",)
    assert cells(run("geneval", model="flow-opd:base+mine"))["GenEval"].paper is None


# --- the average -----------------------------------------------------------------------------------------------------
def test_the_average_combines_scaled_columns_and_independent_half_widths(same_prompts):
    found = cells(run())["Average"]
    assert found.value == pytest.approx((0.62 + 0.50 + 4.20 / 5 + 22.30 / 26) / 4)
    half = sqrt(0.02**2 + 0.02**2 + (0.05 / 5) ** 2 + (0.20 / 26) ** 2) / 4
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))
    assert (found.paper, found.verdict) == (0.7165, "above")  # 0.703 +- 0.008
    assert found.of == ("geneval", "ocr", "deqa", "preference")


@pytest.mark.parametrize("absent", MEASURED)
def test_the_average_is_missing_and_says_what_it_lacks(absent):
    found = cells(run(*(key for key in MEASURED if key != absent)))
    column = next(column.name for column in COLUMNS if column.key == absent)
    assert (found["Average"].value, found["Average"].low, found["Average"].verdict) == (None, None, None)
    assert found["Average"].says == f"missing: there is no {column} ({absent})"
    assert (found[column].value, found[column].says) == (None, "missing: not measured in this run")
    assert found[column].paper is not None


def test_a_column_without_a_scored_picture_is_missing_not_zero():
    summaries = run()
    summaries["flow-opd:base"]["ocr"]["metrics"]["overall"] = None
    found = cells(summaries)
    assert (found["OCR"].value, found["OCR"].says) == (None, "missing: no picture has a score")
    assert found["Average"].lacking == ("OCR (ocr)",)


def test_a_number_on_another_judge_s_scale_does_not_enter_the_average():
    summaries = run()
    summaries["flow-opd:base"]["quality"]["scorer"] = {"scorer": "external", "name": "mine", "version": "3"}
    found = cells(summaries)
    assert found["Average"].value is None
    assert found["Average"].lacking == ("DeQA (quality is judged by mine 3, not by DeQA-Score-Mix3)",)
    assert found["DeQA"].value == 4.20


# --- the miniature ---------------------------------------------------------------------------------------------------
def miniature(*keys):
    values = {"shapes_geneval": 0.6, "sign_ocr": 0.3, "shapes_quality": 0.9}
    flags = {"shapes_geneval": "geneval", "sign_ocr": "ocr", "shapes_quality": "quality"}
    benches = {}
    for key in keys or values:
        overall = {"value": values[key], "low": values[key] - 0.03, "high": values[key] + 0.03, "n": 99, "level": 0.95}
        benches[flags[key]] = {**summary("ocr"), "key": key, "metrics": {"overall": overall}}
    return {"tiny:student": benches}


def test_the_miniature_is_never_comparable_whatever_its_name():
    for name in ("tiny:student", "flow-opd:base"):
        found = cells({name: miniature()["tiny:student"]})
        for column, key in (("GenEval", "shapes_geneval"), ("OCR", "sign_ocr"), ("DeQA", "shapes_quality")):
            assert (found[column].key, found[column].verdict) == (key, None)
            assert "miniature's own metric" in found[column].says
        assert (found["PickScore"].value, found["Average"].verdict) == (None, None)
        assert found["Average"].value == pytest.approx((0.6 + 0.3 + 0.9) / 3)
        assert found["Average"].of == ("shapes_geneval", "sign_ocr", "shapes_quality")
        assert found["Average"].high - found["Average"].value == pytest.approx(sqrt(3) * 0.03 / 3)
        assert found["Average"].says.startswith("not comparable, because GenEval, OCR, DeQA are not")


def test_the_miniature_s_average_lacks_what_it_lacks():
    found = cells(miniature("shapes_geneval", "shapes_quality"))["Average"]
    assert (found.value, found.lacking) == (None, ("OCR (sign_ocr)",))


def test_a_run_without_a_column_of_the_table_is_refused():
    other = {**summary("ocr"), "key": "geneval2"}
    with pytest.raises(RequestError, match=r"none of its metrics is one of geneval, ocr, deqa, preference, shapes_"):
        beside_paper({"m": {"geneval2": other}})
    with pytest.raises(RequestError):
        beside_paper({})
    assert [one.model for one in beside_paper({"m": {"geneval2": other}, **run()}).models] == ["flow-opd:base"]


# --- what comes out --------------------------------------------------------------------------------------------------
def several():
    models = (
        "mine",
        "flow-opd:student",
        "flow-opd:base",
        "hub:somebody/a-model-with-a-rather-long-name@0123456789abcdef",
    )
    summaries = {}
    for model in models:
        summaries |= run(model=model, partial="[red]--limit 3\x1b[31m")
    return summaries | miniature()


def printed(result, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_report(result))
    return console.export_text()


def test_models_stand_in_the_table_s_order_and_the_others_after_them():
    order = [one.model for one in beside_paper(several()).models]
    assert order[:3] == ["flow-opd:base", "flow-opd:student", "mine"]


def test_the_result_is_json_that_says_everything():
    result = beside_paper(several())
    again = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert again == result.to_json()
    assert [row["average"] for row in again["table"]] == [row.average for row in TABLE]
    for one in again["models"]:
        for cell in (*one["cells"], one["average"]):
            assert not (cell["reasons"] and cell["verdict"])
            assert cell["says"]


def test_the_report_fits_100_columns_and_neither_marks_up_nor_steers():
    text = printed(beside_paper(several()))
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    assert "[red]--limit 3" in text
    for words in ("[0.600, 0.640]", "0.63", "[22.10, 22.50]", "0.7165", "not comparable", "Flow-OPD (Merge)"):
        assert words in text
    assert "…" not in text


def test_the_report_gives_each_cell_its_row():
    lines = printed(beside_paper(run())).splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("flow-opd:base"))
    assert lines[at].split()[1] == "0.620"
    assert lines[at + 1].split()[:5] == ["95", "%", "interval", "[0.600,", "0.640]"]
    assert lines[at + 2].split() == ["SD3.5-M", "0.63", "0.59", "4.07", "21.64", "0.7165"]
    assert lines[at + 3].split() == ["verdict", "inside", "above", "below", *["not", "comparable"] * 2]
    assert "GenEval: the paper's 0.63 lies inside our 95 % interval." in lines


class Grey:
    """Draws grey squares by a record."""

    def identity(self):
        return {"model": "flow-opd:base", "sampling": asdict(SD35_RECORD)}

    def generate(self, prompts, seeds):
        from PIL import Image

        return [Image.new("RGB", (8, 8), (seed % 256,) * 3) for seed in seeds]


class Half:
    """Every second prompt is right; one picture cannot be judged."""

    def identity(self):
        return JUDGES["ocr"]

    def score(self, images, prompts):
        return [Score(None, error="torn") if p.id == "p0" else Score(float(p.id[1:] in "123456")) for p in prompts]


def test_a_real_run_s_summaries_are_understood(tmp_path):
    prompts = tuple(Prompt(f"p{n}", f'a sign "{n}"', "ocr") for n in range(10))
    run_bench(BenchRun("ocr", "ocr", 1, prompts, Half(), samples=1), Grey(), tmp_path)
    found = cells(summarise_run(tmp_path))["OCR"]
    assert found.value == pytest.approx(6 / 9)
    assert found.low < found.value < found.high
    assert found.reasons == ("1 of 10 pictures have no score",)
