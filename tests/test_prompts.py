"""Prompt files, the official GenEval prompts, and the miniature's suites."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flowopd_eval import prompts as module
from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.prompts import COCO_CLASSES, official_geneval, prompts_sha256, read_prompts
from flowopd_eval.records import Prompt
from flowopd_eval.scorers.geneval import check_record
from flowopd_eval.tiny.scenes import COLOURS, NEW_WORDS, PLACES, SHAPES, WORDS, sample_scene
from flowopd_eval.tiny.suite import shapes_geneval_prompts, sign_prompts
from flowopd_eval.tiny.vocabulary import words

# Ours, fixed when the suites were made: a change means a new version of the bench.
SHAPES_SHA256 = "cddb41278638ccad60d3e065d10a8ed3e81d6d5b35a02bf6fa85ea7e0dd0ef51"
SIGNS_SHA256 = "d7efd6194c9034c21959003891a0f0b296d8f1d390a5c87d86390bfc8683217c"


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# --- official GenEval ------------------------------------------------------------------------------------------------
def test_official_prompts_are_the_official_ones() -> None:
    """Their bytes are checked inside; sizes and lines as in djghosh13/geneval@af4902f."""
    prompts = official_geneval()
    assert Counter(p.task for p in prompts) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100
    }  # fmt: skip
    assert len({p.prompt for p in prompts}) == len({p.id for p in prompts}) == 553
    assert prompts[0] == Prompt(
        "geneval-00000", "a photo of a bench", "single_object", {"include": [{"class": "bench", "count": 1}]}
    )
    assert prompts[552].prompt == "a photo of a blue pizza and a yellow baseball glove"
    assert {p.fields["include"][0]["class"] for p in prompts if p.task == "single_object"} == set(COCO_CLASSES)
    for prompt in prompts:
        check_record(prompt)


def test_other_random_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GENEVAL_SEED", 44)
    with pytest.raises(WorkError, match=f"numpy {np.__version__}"):
        official_geneval()


# --- files -----------------------------------------------------------------------------------------------------------
def test_written_prompts_read_back(tmp_path: Path) -> None:
    prompts = official_geneval()
    path = write(tmp_path / "prompts.jsonl", *(p.to_json() for p in prompts))
    assert read_prompts(path) == prompts
    assert prompts_sha256(read_prompts(path)) == prompts_sha256(prompts)


def test_the_official_metadata_file_holds_the_official_prompts(tmp_path: Path) -> None:
    """The file itself has the bench's ids, so that it is the bench; lines of copies have ids from their content."""
    official = official_geneval()
    records = [{"tag": p.task, **p.fields, "prompt": p.prompt} for p in official]
    assert read_prompts(write(tmp_path / "evaluation_metadata.jsonl", *records)) == official
    backwards = read_prompts(write(tmp_path / "backwards.jsonl", *records[::-1]))
    assert [(p.task, p.prompt, p.fields) for p in backwards] == [(p.task, p.prompt, p.fields) for p in official[::-1]]
    copied = read_prompts(write(tmp_path / "copied.jsonl", *records, *records[::-1]))  # as in Flow-GRPO's copy
    assert copied == backwards[::-1]


def test_text_file_is_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\nan owl \u2028 at night\r\na cat\r\n".encode())
    prompts = read_prompts(path, task="ocr")
    assert [p.prompt for p in prompts] == ["a cat", "an owl \u2028 at night"]
    assert {p.task for p in prompts} == {"ocr"}
    assert prompts[0].id == read_prompts(write(tmp_path / "other.txt", "a dog", "a cat"), task="ocr")[1].id


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "a", "task": "x"}', '{"prompt": '], r":2 is not JSON"),
        (['["a"]'], r":1: expected a JSON object"),
        ([{"id": "a", "task": "x"}], r':1 lacks "prompt"'),
        ([{"id": "a", "prompt": "a"}], r':1 lacks "task"'),
        ([{"id": "a", "prompt": " ", "task": "x"}], r':1: expected "prompt" to be a text that is not empty'),
        ([{"id": 7, "prompt": "a", "task": "x"}], r':1: expected "id" .* but got 7'),
        ([{"id": "a", "prompt": "a", "task": "x"}, "", {"id": "a", "prompt": "b", "task": "x"}], r":3: the id 'a'"),
        (["", " "], r"holds no prompt"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(RequestError, match=rf"prompts\.jsonl.*{message}|prompts\.jsonl {message}"):
        read_prompts(write(tmp_path / "prompts.jsonl", *lines))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.jsonl: No such file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(RequestError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.txt")


def test_hash_follows_content_and_nothing_else() -> None:
    prompts = official_geneval()[:20]
    assert prompts_sha256(prompts) == prompts_sha256(prompts[::-1])
    changes: list[dict] = [{"id": "x"}, {"prompt": "x"}, {"task": "x"}, {"fields": {}}]
    for change in changes:
        assert prompts_sha256([replace(prompts[0], **change), *prompts[1:]]) != prompts_sha256(prompts)


# --- the miniature's suites ------------------------------------------------------------------------------------------
def test_suites_stay_what_they_are() -> None:
    assert prompts_sha256(shapes_geneval_prompts()) == SHAPES_SHA256
    assert prompts_sha256(sign_prompts()) == SIGNS_SHA256


def test_shapes_suite_is_balanced_and_well_formed() -> None:
    prompts = shapes_geneval_prompts()
    assert Counter(p.task for p in prompts) == dict.fromkeys(module.GENEVAL_TASKS, 96)
    assert len({p.prompt for p in prompts}) == len({p.id for p in prompts}) == 576
    for prompt in prompts:
        check_record(prompt)
        named = {word for word in prompt.prompt.split() if word in COLOURS}
        assert bool(named) == (prompt.task in ("colors", "color_attr"))
    relations = Counter(p.fields["include"][1]["position"][0] for p in prompts if p.task == "position")
    colours = Counter(p.fields["include"][0]["color"] for p in prompts if p.task == "colors")
    counts = Counter(p.fields["include"][0]["count"] for p in prompts if p.task == "counting")
    assert set(colours.values()) == {12}
    assert min(relations.values()) >= 20
    assert min(counts.values()) >= 30


def test_suite_speaks_the_language_of_the_scenes() -> None:
    """A scene of the same caption has the same clauses; each word is in the vocabulary."""
    asked = {p.prompt: p for p in shapes_geneval_prompts()}
    met = 0
    for index in range(3000):
        scene = sample_scene(np.random.default_rng([11, index]), sign_share=0.0)
        if scene.caption in asked:
            met += 1
            fields = asked[scene.caption].fields
            assert list(scene.include) == fields["include"]
            assert list(scene.exclude) == fields.get("exclude", [])
    assert met > 100
    vocabulary = set(words())
    assert {word for text in asked for word in text.split()} <= vocabulary
    assert set(SHAPES) | set(PLACES) <= vocabulary


def test_signs_are_distinct_and_each_word_comes_once() -> None:
    prompts = sign_prompts()
    assert len({p.prompt for p in prompts}) == len({p.id for p in prompts}) == 120
    assert {p.task for p in prompts} == {"ocr"}
    assert sorted(p.prompt.split('"')[1] for p in prompts) == sorted(WORDS + NEW_WORDS)
    assert not set(WORDS) & set(NEW_WORDS)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a \\ud83d cat", "task": "t"}', r"\\ud83d, half of a character"),
        ('{"prompt": "a cat", "task": "t", "weight": NaN}', "not finite"),
        ('{"prompt": "a cat", "task": "t", "weight": 1e999}', "not finite"),
    ],
)
def test_a_line_that_no_run_could_write_down_again_is_refused_at_its_place(tmp_path, line, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a dog", "task": "t"}\n' + line + "\n")
    with pytest.raises(RequestError, match=rf"prompts\.jsonl:2.*{said}"):
        read_prompts(path)
