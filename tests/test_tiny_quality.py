"""The miniature's quality: clean renders score 1, damage lowers it step by step, and the prompt does not matter."""

import cv2
import numpy as np
import pytest
from PIL import Image

from flowopd_eval.benches import bench_by_key
from flowopd_eval.records import Prompt
from flowopd_eval.tiny.quality import QualityScorer, quality
from flowopd_eval.tiny.scenes import SIGN_TASK, background, draw_scene, sample_scene

SHAPES = [draw_scene(sample_scene(np.random.default_rng([31, i]), sign_share=0)) for i in range(60)]
SIGNS = [draw_scene(sample_scene(np.random.default_rng([32, i]), SIGN_TASK)) for i in range(30)]


def noisy(picture, level, rng):
    return np.clip(picture + rng.normal(0, 4 * level, picture.shape), 0, 255).astype(np.uint8)


def blurred(picture, level, rng):
    return cv2.GaussianBlur(picture, (0, 0), 1.2 * level)


def ragged(picture, level, rng):
    dx, dy = (
        cv2.GaussianBlur(rng.normal(0, 1, (64, 64)).astype(np.float32), (0, 0), 1.2) * 7 * level for _ in range(2)
    )
    y, x = np.mgrid[:64, :64].astype(np.float32)
    return cv2.remap(picture, x + dx, y + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def specked(picture, level, rng):
    damaged = picture.copy()
    for _ in range(20 * level):
        x, y = rng.integers(2, 61, 2)
        damaged[y : y + 2, x : x + 2] = rng.integers(0, 256, 3)
    return damaged


@pytest.mark.parametrize("pictures", [SHAPES, SIGNS], ids=["shapes", "signs"])
def test_clean_renders_score_one(pictures):
    scores = np.array([quality(picture) for picture in pictures])
    assert np.median(scores) == 1.0
    assert scores.mean() > 0.95
    assert scores.min() > 0.5


@pytest.mark.parametrize("damage", [noisy, blurred, ragged, specked])
@pytest.mark.parametrize("pictures", [SHAPES, SIGNS], ids=["shapes", "signs"])
def test_more_damage_scores_less(damage, pictures):
    rng = np.random.default_rng(0)
    means = [np.mean([quality(damage(picture, level, rng)) for picture in pictures]) for level in (1, 2)]
    clean = np.mean([quality(picture) for picture in pictures])
    assert clean - means[0] > 0.05
    assert means[0] - means[1] > 0.05
    assert means[1] < 0.5


def test_what_shows_nothing_scores_nothing():
    empty = background("mist", 0.3).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert quality(empty) == 0.0
    assert quality(noise) < 0.01


def test_the_scorer_looks_at_the_picture_alone_and_says_why():
    scorer = QualityScorer()
    images = [Image.fromarray(SHAPES[0]), Image.fromarray(SHAPES[0]).resize((128, 128), Image.Resampling.NEAREST)]
    prompts = [Prompt("a", "a photo of a star", "single_object"), Prompt("b", 'a sign that says "NO"', "ocr")]
    first, second = scorer.score(images, prompts)
    assert first == second
    assert first.value == quality(SHAPES[0])
    empty = scorer.score([Image.fromarray(background("mist", 0.3).astype(np.uint8))], prompts[:1])[0]
    assert (empty.value, empty.reason) == (0.0, "nothing is drawn")
    assert scorer.identity() == {"scorer": "quality", "version": 1}


def test_the_bench_holds_prompts_of_both_suites():
    prompts = bench_by_key("shapes_quality").prompts()
    assert len(prompts) == len({prompt.id for prompt in prompts}) == 144
    assert sum(prompt.task == SIGN_TASK for prompt in prompts) == 48
    tasks = [sum(prompt.task == task for prompt in prompts) for task in {p.task for p in prompts} - {SIGN_TASK}]
    assert tasks == [16] * 6
