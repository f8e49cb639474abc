"""Benchmarks of drawing and judging: each compares what its variants make, and refuses figures where they differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from benchmarks import end_to_end, generation, growth, scoring, start
from benchmarks.full_size import SMOKE, random_adapters
from flowopd_eval.errors import WorkError
from flowopd_eval.prompts import COCO_CLASSES
from flowopd_eval.records import Prompt, Score
from flowopd_eval.scorers.clip_colours import ClipColours
from flowopd_eval.scorers.geneval import GenEvalScorer
from flowopd_eval.scorers.mask2former import Mask2FormerDetector
from flowopd_eval.scorers.ocr import OCRScorer

CPU = torch.device("cpu")


# --- drawing ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def bench():
    return generation.random_bench(SMOKE, CPU, 2)


def test_all_ways_of_drawing_make_the_same_latents(bench, capsys):
    run = generation.a_run(bench, 3, 2, 1)
    assert run["variants"].keys() == run["differences"].keys()
    assert max(run["differences"].values()) < 1e-4
    experts = generation.five_experts(bench, 1)
    assert experts["difference"] < 1e-4
    assert experts["experts_apart"] > 1e-3  # five times the same expert would agree as well
    assert experts["weights_share"] < 0.5
    assert "one call" in capsys.readouterr().out


def test_another_expert_is_not_the_same_picture(bench):
    others = random_adapters(bench.stock.transformer, ["x", "student"], SMOKE.rank)
    bench.ours.add_experts({"student": others["student"]})
    with pytest.raises(WorkError, match=r"FlowOPDPipeline.*no figure is reported"):
        generation.a_run(bench, 2, 2, 1)
    with pytest.raises(WorkError, match="five pipelines"):
        generation.five_experts(bench, 1)


# --- judging ---------------------------------------------------------------------------------------------------------
class Blobs(nn.Module):
    """A detector of the real one's interface: four queries, the first two sure of a dog and a bicycle."""

    def forward(self, pixel_values):
        pooled = torch.nn.functional.avg_pool2d(pixel_values, 16)  # (B, 3, h, w)
        masks = torch.cat([pooled, pooled.mean(1, keepdim=True)], 1)
        logits = torch.zeros(len(pooled), 4, 81)
        for query, name in enumerate(scoring.OBJECTS):
            logits[:, query, COCO_CLASSES.index(name)] = 9
        logits[:, 2:, 80] = 9
        return type("Output", (), {"class_queries_logits": logits, "masks_queries_logits": 4 * masks})()


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    clip = scoring.write_random_clip(folder / "clip", **narrow)
    save_file({"none": torch.zeros(1)}, folder / "weights.safetensors")
    made = Mask2FormerDetector(folder / "weights.safetensors", ClipColours(str(clip)), batch=4)
    made.__dict__["network"] = Blobs()
    return made


def test_ours_judges_as_the_loop_one_by_one(detector, capsys):
    pictures, prompts = scoring.questions(3, height=64)
    found = scoring.detection(detector, detector.network, pictures, prompts, 1)
    assert set(found["objects"].values()) == {6}  # two objects in each picture
    assert "official, one by one" in capsys.readouterr().out


def test_other_verdicts_boxes_and_colours_are_seen(detector):
    pictures, prompts = scoring.questions(2, height=64)
    scores = GenEvalScorer(detector).score(pictures, prompts)
    assert scores[0].detail["colours"]
    boxes, colours = scores[0].detail["boxes"], scores[0].detail["colours"]
    moved = {label: [[box[0] + 3, *box[1:]] for box in found] for label, found in boxes.items()}
    for change in (
        {"value": 1 - scores[0].value},
        {"reason": "another"},
        {"detail": {"boxes": moved, "colours": colours}},
        {"detail": {"boxes": {**boxes, "dog": []}, "colours": colours}},
        {"detail": {"boxes": boxes, "colours": {"dog": ["plaid"]}}},
    ):
        with pytest.raises(WorkError):
            scoring.same_verdicts([Score(**{**vars(scores[0]), **change}), scores[1]], scores)


def test_a_faster_judge_that_finds_less_is_refused(detector, monkeypatch):
    monkeypatch.setattr(
        scoring.GenEvalScorer, "_detect", lambda self, pictures: [found[:1] for found in self.detector.detect(pictures)]
    )
    with pytest.raises(WorkError):
        scoring.detection(detector, detector.network, *scoring.questions(2, height=64), 1)


class Reader:
    """Reads one and the same word."""

    def __init__(self, word):
        self.word = word

    def read(self, image):
        return self.word


def test_processes_must_read_the_same():
    pictures, prompts = scoring.signs(2)
    assert all(p.prompt.startswith('a sign that says "') for p in prompts)
    same = {1: OCRScorer(Reader("CAT")), 2: OCRScorer(Reader("CAT"))}
    assert scoring.reading(same, pictures, prompts, 1)["texts_read"] == 2
    with pytest.raises(WorkError, match="With 2 processes other texts are read"):
        scoring.reading({**same, 2: OCRScorer(Reader("DOG"))}, pictures, prompts, 1)


# --- a whole run -----------------------------------------------------------------------------------------------------
PROMPTS = [Prompt(f"p{n}", f"a photo of {n} things", "counting") for n in range(4)]


def test_a_run_and_its_drawing_alone_draw_the_same(tmp_path, capsys):
    found = end_to_end.runs(growth.Flat(), growth.ByColour(), PROMPTS, 2, 2, tmp_path)
    assert found["times_drawing_alone"]["ratio"] > 0
    assert "whole run" in capsys.readouterr().out


def test_runs_that_draw_otherwise_or_are_not_judged_are_refused(tmp_path):
    class Restless(growth.Flat):
        calls = 0

        def generate(self, prompts, seeds):
            Restless.calls += 1
            return [Image.new("RGB", (8, 8), (Restless.calls, 0, 0)) for _ in seeds]

    class Mute(growth.ByColour):
        def score(self, images, prompts):
            return [Score(None, error="asleep") for _ in images]

    with pytest.raises(WorkError, match="drew other pictures"):
        end_to_end.runs(Restless(), growth.ByColour(), PROMPTS, 2, 1, tmp_path / "restless")
    with pytest.raises(WorkError, match="4 of 4 pictures were not judged"):
        end_to_end.runs(growth.Flat(), Mute(), PROMPTS, 2, 1, tmp_path / "mute")


# --- growth ----------------------------------------------------------------------------------------------------------
def test_each_size_of_a_growth_is_measured_and_checked(tmp_path):
    assert growth.prompts(20, tmp_path / "prompts").keys() == {"run", "read again"}
    assert growth.report(20, tmp_path / "report")["page MB"] > 0
    assert growth.adapters(2, tmp_path)["factors MB"] > growth.adapters(1, tmp_path)["factors MB"]


def test_a_report_without_its_pictures_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "write_report", lambda out: (out / "report.html").write_text("samples/1"))
    with pytest.raises(WorkError, match="The report of 20 pictures shows 1"):
        growth.report(20, tmp_path)


def test_a_row_with_anothers_adapter_is_refused(tmp_path, monkeypatch):
    from flowopd_eval.adapters import AdapterBank

    use = AdapterBank.use
    rolled = lambda bank, names: use(bank, names if isinstance(names, str) else names[1:] + names[:1])  # noqa: E731
    monkeypatch.setattr(AdapterBank, "use", rolled)
    with pytest.raises(WorkError, match="together and alone"):
        growth.adapters(2, tmp_path)


def test_a_run_that_loses_a_prompt_is_refused(tmp_path, monkeypatch):
    run = growth.run_of(20)
    monkeypatch.setattr(growth, "run_of", lambda count: run)
    with pytest.raises(WorkError, match="21 prompts left 20 lines"):
        growth.prompts(21, tmp_path)


def test_growth_runs_each_size_in_a_process_of_its_own_and_names_its_exponent(monkeypatch, capsys):
    sizes = {"10": 1.0, "100": 10.0, "1000": 100.0}
    monkeypatch.setattr(
        growth.measure, "child", lambda command: (0.0, 10**6, f'noise\n{{"run": {sizes[command[-1]]}}}\n')
    )
    found = growth.grow("prompts", [10, 100, 1000])
    beyond = "memory MB beyond the smallest"
    assert found["exponents"] == {"run": pytest.approx(1), beyond: pytest.approx(0, abs=1e-9)}
    assert found["linear_or_better"] == {"run": True, beyond: True}
    sizes["1000"] = 1000.0
    assert growth.grow("prompts", [10, 100, 1000])["linear_or_better"]["run"] is False
    assert "more than linear" in capsys.readouterr().out


# --- start -----------------------------------------------------------------------------------------------------------
def test_what_is_heavy_or_draws_otherwise_is_refused():
    right = dict.fromkeys(start.PROGRAMS, "[]") | {"flowopd-eval --help": "--bench"}
    right["first picture of the miniature"] = "abc\n"
    start.check(right, "abc")
    for change, message in (
        ({"import flowopd_eval, its command line": "['torch']"}, "torch"),
        ({"flowopd-eval --help": ""}, "--bench"),
        ({"first picture of the miniature": "abd"}, "another picture"),
    ):
        with pytest.raises(WorkError, match=message):
            start.check({**right, **change}, "abc")


def test_the_command_line_is_light_in_a_new_process():
    import sys

    _, held, said = start.measure.child([sys.executable, *start.PROGRAMS["import flowopd_eval, its command line"]])
    assert said.strip() == "[]"
    assert held < 200e6
    assert len(start.own_picture()) == 64


def test_questions_ask_for_what_the_detector_sees():
    pictures, prompts = scoring.questions(4, height=32)
    assert {p.size for p in pictures} == {(512, 32)}
    assert [("color" in p.fields["include"][0]) for p in prompts] == [True, False, True, False]
    assert not np.array_equal(np.asarray(pictures[0]), np.asarray(pictures[1]))
