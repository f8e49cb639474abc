"""The miniature's world: what a scene says of itself is so, and every caption is in the vocabulary."""

import hashlib
import itertools

import numpy as np
import pytest

from flowopd_eval.records import Detection
from flowopd_eval.scorers.geneval import keep, verdict
from flowopd_eval.tiny.detector import colour_excess
from flowopd_eval.tiny.scenes import COLOURS, SHAPES, SIGN_TASK, SIZE, TASKS, WORDS, draw_scene, sample_scene
from flowopd_eval.tiny.suite import shapes_geneval_prompts, sign_prompts
from flowopd_eval.tiny.vocabulary import TEXT_LENGTH, UNKNOWN, build_tokenizer, words

SCENES = [sample_scene(np.random.default_rng([123, i])) for i in range(600)]
SHAPED = [scene for scene in SCENES if scene.things]


def test_a_scene_is_its_seed():
    again = sample_scene(np.random.default_rng([123, 5]))
    assert again == SCENES[5]
    assert (draw_scene(again) == draw_scene(SCENES[5])).all()
    assert len({scene.caption for scene in SCENES}) > 300


def test_every_task_and_thing_occurs():
    assert {scene.task for scene in SCENES} == {*TASKS, SIGN_TASK}
    assert {thing.shape for scene in SHAPED for thing in scene.things} == set(SHAPES)
    assert {thing.colour for scene in SHAPED for thing in scene.things} == set(COLOURS)
    assert all(2 <= len(word) <= 4 for word in WORDS)


def test_the_clauses_of_a_scene_hold_for_its_things():
    for scene in SHAPED:
        truth = [Detection(thing.shape, thing.box, 1.0, thing.colour) for thing in scene.things]
        record = {"include": scene.include, "exclude": scene.exclude}
        score = verdict(record, keep(truth, scene.task))
        assert score.value == 1.0, (scene.caption, score.reason)


def test_things_stand_clear_of_one_another_and_of_the_border():
    for scene in SHAPED:
        for thing in scene.things:
            assert min(thing.box[:2]) > 0
            assert max(thing.box[2:]) < SIZE
        for a, b in itertools.combinations(scene.things, 2):
            gap = max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius
            assert gap >= 3 - 1e-6


def test_things_are_drawn_where_and_in_the_colour_they_say():
    for scene in SHAPED[:150]:
        picture = draw_scene(scene)
        for thing in scene.things:
            pixel = picture[int(thing.y), int(thing.x)].astype(np.float32)
            assert abs(pixel - thing.rgb).max() <= 1
            assert list(COLOURS)[int(colour_excess(pixel[None])[0].argmin())] == thing.colour


def test_captions_are_in_the_vocabulary_and_fit():
    tokenizer = build_tokenizer()
    texts = [scene.caption for scene in SCENES] + [p.prompt for p in shapes_geneval_prompts() + sign_prompts()]
    ids = tokenizer(texts)["input_ids"]
    assert max(map(len, ids)) <= TEXT_LENGTH
    assert tokenizer.convert_tokens_to_ids(UNKNOWN) not in set(itertools.chain.from_iterable(ids))


def test_words_are_one_token_and_quoted_letters_one_each():
    tokenizer = build_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer('A sign that says "CAT" on sand')["input_ids"])
    assert tokens[1:-1] == ["a", "sign", "that", "says", '"', "c", "a", "t", '"', "on", "sand"]
    assert UNKNOWN in tokenizer.convert_ids_to_tokens(tokenizer("a photo of a zebra")["input_ids"])
    assert len(set(words())) == len(words())


@pytest.mark.parametrize(
    ("task", "pictures"),
    [
        # sha256 of the first eight pictures of seed 7 as drawn by Pillow 13.0 and numpy 2.4, 2026-11.
        ("counting", "b8b471fdd210f08c9ec59c8e4a7341107ccf9059a2a2239635123283d73bb2c1"),
        ("ocr", "5ffce79f4e408929c6648612373e014bf4b2edfa571f73e73521e44c01a39981"),
    ],
)
def test_golden_pictures(task, pictures):
    digest = hashlib.sha256()
    for i in range(8):
        digest.update(draw_scene(sample_scene(np.random.default_rng([7, i]), task)).tobytes())
    assert digest.hexdigest() == pictures
