"""The OCR rule against an independent edit distance, and the engine on signs it can read."""

import hashlib
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flowopd_eval import cli
from flowopd_eval.benches import OCR_SIDE, find_bench
from flowopd_eval.errors import RequestError
from flowopd_eval.fetched import Source
from flowopd_eval.prompts import ocr_prompts
from flowopd_eval.records import Prompt
from flowopd_eval.scorers.ocr import OCRScorer, RapidOCREngine, error_rate, levenshtein, ocr_reward, target_text
from flowopd_eval.tiny.scenes import draw_scene, sample_scene

SHORT = st.text("ab C!", max_size=7)


def slow_distance(a: str, b: str) -> int:
    """The textbook recursion, on its own."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return slow_distance(a[1:], b[1:])
    return 1 + min(slow_distance(a[1:], b), slow_distance(a, b[1:]), slow_distance(a[1:], b[1:]))


@given(SHORT, SHORT)
def test_levenshtein_equals_the_recursion(a, b):
    assert levenshtein(a, b) == slow_distance(a, b)


@pytest.mark.parametrize(
    ("recognised", "target", "reward"),
    [  # computed with Flow-GRPO's ocr.py
        ("xx hello world yy", "Hello World", 1.0),
        ("Hell World", "Hello World", 0.9),
        ("", "abc", 0.0),
        ("a" * 50, "abc", 0.0),
        ("open", "OPEN!", 0.8),
        ("Hello,World", "Hello World", 0.9),
        ("OPENOPEN", "open", 1.0),
    ],
)
def test_golden_rewards(recognised, target, reward):
    assert ocr_reward(recognised, target) == pytest.approx(reward)


@given(SHORT, SHORT.filter(lambda t: t.replace(" ", "")))
def test_reward_is_bounded_and_blind_to_case_and_spaces(recognised, target):
    reward = ocr_reward(recognised, target)
    assert 0 <= reward <= 1
    assert reward == ocr_reward(f" {recognised.upper()} ", target.lower())
    assert ocr_reward(target, target) == 1


@pytest.mark.parametrize("prompt", ["no quotes", 'one " only', 'empty "" quotes', 'blank "  " quotes'])
def test_a_prompt_without_a_target_is_an_error(prompt):
    with pytest.raises(RequestError, match=re.escape(repr(prompt))):
        target_text(prompt)


def test_only_the_first_quotation_counts():
    assert target_text('a "first" and a "second"') == "first"


def test_clean_signs_are_read_and_wrong_ones_are_told():
    scenes = [sample_scene(np.random.default_rng([99, i]), "ocr") for i in range(24)]
    pictures = [Image.fromarray(draw_scene(scene)) for scene in scenes]
    prompts = [Prompt(str(i), scene.caption, "ocr") for i, scene in enumerate(scenes)]
    scorer = OCRScorer(RapidOCREngine(OCR_SIDE))
    assert scorer.identity()["side"] == OCR_SIDE
    scores = scorer.score(pictures, prompts)
    assert np.mean([score.value for score in scores]) >= 0.95
    (wrong,) = scorer.score(pictures[:1], [Prompt("x", 'a sign that says "XYZXYZXYZ"', "ocr")])
    assert wrong.value is not None
    assert wrong.value < 0.5
    assert "XYZXYZXYZ" in wrong.reason


@given(SHORT, SHORT.filter(lambda t: t.replace(" ", "")))
def test_the_error_rate_has_no_cap_and_forgives_nothing_around_the_target(recognised, target):
    found, wanted = (text.replace(" ", "").lower() for text in (recognised, target))
    assert error_rate(recognised, target) == slow_distance(found, wanted) / len(wanted)
    assert error_rate("abc" * 5, "abc") == 4.0


def test_exact_match_and_error_rate_stand_beside_the_rule():
    class Reader:
        def __init__(self, texts):
            self.texts = iter(texts)

        def identity(self):
            return {"engine": "given"}

        def read(self, image):
            return next(self.texts)

    prompts = [Prompt(str(n), 'a sign that says "CAT"', "ocr") for n in range(3)]
    scores = OCRScorer(Reader(["cat", "thecats", "car"])).score([Image.new("RGB", (8, 8))] * 3, prompts)
    assert [score.value for score in scores] == [1.0, 1.0, pytest.approx(2 / 3)]
    assert [score.detail["also"]["exact_match"] for score in scores] == [1.0, 0.0, 0.0]
    assert [score.detail["also"]["cer"] for score in scores] == pytest.approx([0.0, 4 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("bench", "prompt"),
    [("ocr", {"prompt": "a sign without words", "task": "ocr"}), ("geneval", {"prompt": "a cat", "task": "colors"})],
)
def test_a_prompt_that_nobody_could_judge_is_refused_before_anything_is_drawn(bench, prompt, tmp_path, command):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"id": "p", **prompt}))
    code, _, errors = command("--bench", bench, "--prompts", file, "--out", tmp_path / "run")
    assert code == 2
    assert prompt["prompt"] in errors or "'p'" in errors
    assert not (tmp_path / "run").exists()


def test_own_prompts_need_no_network(tmp_path, monkeypatch):
    """The bench's own cannot be had: that these are others is all there is to know."""
    monkeypatch.setenv("FLOWOPD_CACHE", str(tmp_path))
    monkeypatch.setattr("flowopd_eval.fetched.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    assert not cli._are_of(find_bench("ocr", "coco"), [Prompt("p", 'a sign that says "A"', "ocr")])
    signs = find_bench("ocr", "shapes")
    assert cli._are_of(signs, signs.prompts())


def test_the_public_prompts_are_fetched_once_and_become_prompts(tmp_path):
    """From a file: URL, as the checksum and not the way decides; each line quotes one text."""
    lines = b'A board that says "One"\nA cup with "Two words" on it\n'
    (tmp_path / "there.txt").write_bytes(lines)
    source = Source("ocr.txt", (tmp_path / "there.txt").as_uri(), hashlib.sha256(lines).hexdigest())
    prompts = ocr_prompts(tmp_path / "cache", source)
    assert [(prompt.task, target_text(prompt.prompt)) for prompt in prompts] == [("ocr", "One"), ("ocr", "Two words")]
    assert (tmp_path / "cache" / "ocr.txt").read_bytes() == lines
    (tmp_path / "there.txt").unlink()
    assert ocr_prompts(tmp_path / "cache", source) == prompts
    assert find_bench("ocr", "coco").key == "ocr"


def test_a_blank_picture_reads_as_nothing():
    (score,) = OCRScorer(RapidOCREngine(OCR_SIDE)).score([Image.new("RGB", (64, 64))], [Prompt("x", '"A"', "ocr")])
    assert (score.value, score.detail["recognised"], score.error) == (0.0, "", None)
