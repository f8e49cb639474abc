"""Labels, boxes, verdicts and best-of-N, with the toolkit's own detector on scenes it has drawn."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from comfy_nodes.logic.best import keep_best
from comfy_nodes.logic.errors import PackError
from comfy_nodes.logic.judges import OCR_SIDE, Verdict, open_judge
from comfy_nodes.logic.pictures import annotated, grid, labelled, to_images, to_pictures
from flowopd_eval import benches
from flowopd_eval.prompts import COCO_CLASSES, GENEVAL_COLOURS, official_geneval
from flowopd_eval.scorers.clauses import read_clauses
from flowopd_eval.tiny.scenes import draw_scene, sample_scene


def noise(count: int = 2, side: int = 48) -> torch.Tensor:
    return torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(0))


def test_pictures_survive_the_way_there_and_back() -> None:
    images = (noise() * 255).round() / 255
    torch.testing.assert_close(to_images(to_pictures(images)), images)
    with pytest.raises(PackError, match=r"\(2, 4, 4\)"):
        to_pictures(torch.zeros(2, 4, 4))


def test_a_label_stands_above_and_the_picture_below_is_untouched() -> None:
    images = noise(3)
    out = labelled(images, ["base", "student", "a name so long that it needs more than a line of this picture"])
    strip = out.shape[1] - 48
    assert out.shape == (3, 48 + strip, 48, 3)
    assert torch.equal(out[:, strip:], images)
    assert all(out[n, :strip].min() < 0.3 for n in range(3)), "no ink"
    assert not torch.equal(out[0, :strip], out[1, :strip])
    with pytest.raises(PackError, match="3 pictures, but 1 labels"):
        labelled(images, ["base"])


@pytest.mark.parametrize(("count", "columns"), [(6, 3), (5, 3), (1, 1), (2, 4)])
def test_a_grid_shows_every_picture_in_reading_order(count: int, columns: int) -> None:
    images = noise(count, 8)
    sheet = grid(images, columns)
    assert sheet.shape == (1, -(-count // columns) * 8, columns * 8, 3)
    for n in range(count):
        row, column = divmod(n, columns)
        assert torch.equal(sheet[0, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8], images[n])


def test_boxes_are_drawn_where_they_are_and_the_read_out_below() -> None:
    images = torch.full((2, 64, 64, 3), 0.5)
    out = annotated(images, [{"dog": [[10, 20, 40, 50, 0.9]]}, {}], ["correct", "no dog " * 12])
    assert out.shape[1] > 64
    edge = out[0, 49, 11:39]
    assert (edge != 0.5).any(dim=-1).all(), "no line along the box's lower edge"
    assert torch.allclose(out[0, 55:64, 45:], images[0, 55:64, 45:], atol=1 / 255)
    assert torch.allclose(out[1, :64], images[1], atol=1 / 255)
    assert out[1, 64:].min() < 0.3, "no ink"


def test_every_official_prompt_is_read_as_its_own_clauses() -> None:
    for prompt in official_geneval():
        assert read_clauses(prompt.prompt, COCO_CLASSES, GENEVAL_COLOURS) == (prompt.task, dict(prompt.fields)), prompt


def test_other_words_are_not_guessed_at() -> None:
    for text in ("a photo of a unicorn", "two dogs running", "", "a dog left of", "dogs", 'a sign that says "dog"'):
        assert read_clauses(text, COCO_CLASSES, GENEVAL_COLOURS) is None, text
    task, fields = read_clauses("Two dogs and a red car.", COCO_CLASSES, GENEVAL_COLOURS) or ("", {})
    assert task == "counting"
    assert fields["include"] == [{"class": "dog", "count": 2}, {"class": "car", "count": 1, "color": "red"}]
    assert fields["exclude"] == [{"class": "dog", "count": 3}]


def scene(seed: int, task: str = "colors"):
    return sample_scene(np.random.default_rng(seed), task, sign_share=0.0)


def test_scoring_is_the_toolkits_own_verdict_with_boxes_and_a_reason() -> None:
    drawn = scene(3)
    picture = to_pictures(torch.from_numpy(draw_scene(drawn))[None].float() / 255)
    thing = drawn.things[0]
    right = open_judge("shapes_geneval", f"a photo of a {thing.colour} {thing.shape}")(picture)[0]
    assert (right.value, right.text) == (1.0, "correct")
    box = right.boxes[thing.shape][0]
    assert np.abs(np.array(box[:4]) - np.array(thing.box)).max() < 3
    wrong = open_judge("shapes_geneval", "", json.dumps({"include": [{"class": thing.shape, "count": 3}]}))(picture)[0]
    assert wrong.value == 0.0
    assert thing.shape in wrong.text


@pytest.mark.parametrize(
    ("bench", "prompt", "clauses", "said"),
    [
        ("ocr", "a sign", "", "quotes no text"),
        ("geneval", "a photo of a unicorn", "", "clauses"),
        ("geneval", "a dog", '{"include": null}', "include"),
        ("geneval", "a dog", '{"include": 5}', "include"),
        ("geneval", "x", "{", "no JSON"),
        ("geneval", "x", "[]", "object"),
        ("geneval", "x", '{"include": [{"class": "dog"}]}', "count"),
        ("genval", "x", "", "Unknown bench"),
    ],
)
def test_a_prompt_that_cannot_be_judged_is_refused_before_anything_is_loaded(bench, prompt, clauses, said) -> None:
    with pytest.raises(PackError, match=said):
        open_judge(bench, prompt, clauses)


def test_a_missing_package_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flowopd_eval", None)  # what Python itself does for a module that cannot be had
    with pytest.raises(PackError, match="pip install 'flowopd-eval"):
        open_judge("geneval", "a photo of a dog")


def test_the_text_is_read_as_the_toolkit_reads_it() -> None:
    assert benches.OCR_SIDE == OCR_SIDE


def judge_numbers(pictures) -> list[Verdict]:
    return [Verdict(None if p is None else p, "broken" if p is None else "") for p in pictures]


def test_drawing_stops_at_the_first_draw_that_passes() -> None:
    asked = []
    draws = [[0.2, 0.4], [0.7, 0.9], [1.0, 1.0]]
    best = keep_best(lambda n: asked.append(n) or draws[n], judge_numbers, 3, 0.6)
    assert (best.picture, best.draw, best.k, best.drawn, best.passed) == (0.9, 1, 1, 4, True)
    assert asked == [0, 1]


def test_without_a_pass_the_earliest_best_is_kept_and_the_unjudged_are_worse_than_any() -> None:
    draws = [[None], [0.0], [0.5], [0.5]]
    best = keep_best(lambda n: draws[n], judge_numbers, 4, 1.0)
    assert (best.picture, best.draw, best.drawn, best.passed) == (0.5, 2, 4, False)
    with pytest.raises(PackError, match="None of 2 pictures could be judged; the last: broken"):
        keep_best(lambda n: [None], judge_numbers, 2, 1.0)
    with pytest.raises(PackError, match="at least 1"):
        keep_best(lambda n: [1.0], judge_numbers, 0, 1.0)
