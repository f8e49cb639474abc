"""T2I-CompBench++: its prompts, CLIP's cosine by real CLIP code, and the folders that the official scripts read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import string
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from flowopd_eval.compbench import (
    CATEGORIES,
    CLIP,
    COMMIT,
    OFFICIAL,
    SOURCES,
    NonSpatialScorer,
    check_category,
    compbench_metrics,
    compbench_prompts,
)
from flowopd_eval.compbench_layout import file_name, write_layout
from flowopd_eval.errors import RequestError
from flowopd_eval.fetched import Source
from flowopd_eval.harness import BenchRun, identity_of, run_bench, summarise
from flowopd_eval.records import Prompt, Sample, Score
from flowopd_eval.scorers.clip_model import ClipModel
from flowopd_eval.store import BenchFolder

TEXTS = ["a red cube", "two dogs run", "a man holds a cup"]


# --- prompts ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def served(tmp_path):
    """Small files in place of the official ones, with the line ends that those have: some CRLF, the last one open."""
    texts = {"color": b"a red cube\r\na blue cup", "non_spatial": b"a man sits.\na dog runs\tand more\n"}
    sources = {}
    for category, data in texts.items():
        path = tmp_path / f"{category}.txt"
        path.write_bytes(data)
        sources[category] = Source(f"served_{category}.txt", path.as_uri(), hashlib.sha256(data).hexdigest())
    return sources


def test_prompts_are_fetched_checked_and_named_by_category_and_line(served, tmp_path):
    cache = tmp_path / "cache"
    found = compbench_prompts(cache, served)
    assert [(p.id, p.prompt, p.task) for p in found] == [
        ("compbench-color-000", "a red cube", "color"),
        ("compbench-color-001", "a blue cup", "color"),
        ("compbench-non_spatial-000", "a man sits.", "non_spatial"),
        ("compbench-non_spatial-001", "a dog runs", "non_spatial"),
    ]
    (tmp_path / "color.txt").unlink()
    assert compbench_prompts(cache, served) == found  # from the cache
    (cache / "served_color.txt").write_bytes(b"a red cube\na blue cup")
    with pytest.raises(RequestError, match="is not the file that was meant"):
        compbench_prompts(cache, served)


def test_every_category_has_a_pinned_source_and_a_judge():
    assert list(SOURCES) == list(CATEGORIES) == list(OFFICIAL)
    assert len(CATEGORIES) == len({source.sha256 for source in SOURCES.values()}) == 8
    for category, source in SOURCES.items():
        assert source.url.endswith(f"/Karine-Huang/T2I-CompBench/{COMMIT}/examples/dataset/{category}_val.txt")
        assert (len(source.sha256), len(COMMIT), source.name.count(category)) == (64, 40, 1)
    assert len(CLIP.split("@")[1]) == 40


def test_a_prompt_of_another_task_is_refused_by_name():
    check_category(Prompt("p", "a cup", "3d_spatial"))
    with pytest.raises(RequestError, match=r"'mine-1' has the task 'ocr'; .* color, shape, texture, spatial"):
        check_category(Prompt("mine-1", "a cup", "ocr"))


# --- CLIP ------------------------------------------------------------------------------------------------------------
def save_clip(folder):
    """A tiny CLIP of random weights, with a tokenizer that spells, in the layout of the published one."""
    pieces = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    vocabulary = {piece: n for n, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    end = len(vocabulary) - 1
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), max_position_embeddings=77, eos_token_id=end, projection_dim=12, **sizes
    )
    vision = CLIPVisionConfig(image_size=224, patch_size=56, projection_dim=12, **sizes)
    torch.manual_seed(5)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12))
    with torch.no_grad():
        for name, value in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            value.copy_(norm + 0.3 * torch.randn_like(value))
        model.logit_scale.fill_(2.5)
    model.eval().save_pretrained(folder)
    return model, vocabulary


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return *save_clip(folder), folder


def picture(seed, size=224):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def cosine_by_hand(clip, image, text):
    """The official formula on transformers' network, pixels and tokens made here; only for pictures of 224 pixels."""
    model, vocabulary, _ = clip
    words = [[*word[:-1], f"{word[-1]}</w>"] for word in text.split()]
    spelled = [vocabulary[piece] for word in words for piece in word]
    ids = [vocabulary["<|startoftext|>"], *spelled, vocabulary["<|endoftext|>"]]
    mean, std = np.array([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    pixels = ((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1)
    with torch.no_grad():
        seen = model.get_image_features(pixel_values=torch.tensor(pixels[None], dtype=torch.float32)).pooler_output[0]
        read = model.get_text_features(input_ids=torch.tensor([ids])).pooler_output[0]
    return float(seen.double() @ read.double() / (seen.double().norm() * read.double().norm()))


def test_non_spatial_is_clip_s_cosine_neither_scaled_nor_cut(clip):
    scorer = NonSpatialScorer(ClipModel(str(clip[2])))
    images = [picture(seed) for seed in range(6)]
    texts = [TEXTS[seed % 3] for seed in range(6)]
    scores = scorer.score(images, [Prompt(f"p{n}", text, "non_spatial") for n, text in enumerate(texts)])
    expected = [cosine_by_hand(clip, image, text) for image, text in zip(images, texts)]
    assert [score.value for score in scores] == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.02  # else any order of them would do
    assert all(-1 <= value <= 1 for value in expected)


def test_a_cosine_below_zero_stays_below_zero(clip):
    scorer = NonSpatialScorer(ClipModel(str(clip[2])))
    one = Prompt("p", TEXTS[0], "non_spatial")
    (before,) = scorer.score([picture(0)], [one])
    with torch.no_grad():
        scorer.clip.network.visual_projection.weight.neg_()
    (after,) = scorer.score([picture(0)], [one])
    assert after.value == pytest.approx(-before.value, abs=1e-6)
    assert min(after.value, before.value) < 0


def test_other_categories_get_no_score_and_the_official_tool_s_name(clip):
    scorer = NonSpatialScorer(ClipModel(str(clip[2])))
    tasks = ["color", "non_spatial", "3d_spatial", "complex", "numeracy", "non_spatial"]
    images = [picture(seed) for seed in range(6)]
    scores = scorer.score(images, [Prompt(f"p{n}", TEXTS[0], task) for n, task in enumerate(tasks)])
    assert [score.value is None for score in scores] == [task != "non_spatial" for task in tasks]
    for score, image, task in zip(scores, images, tasks):
        if task == "non_spatial":
            assert score.value == pytest.approx(cosine_by_hand(clip, image, TEXTS[0]), abs=1e-5)
        else:
            assert score.error == f"not computed here: {OFFICIAL[task]} of Karine-Huang/T2I-CompBench"
    assert "UniDet" in scores[2].error
    assert scorer.score(images[:1], [Prompt("p", "a", "color")])[0].value is None  # none of it is CLIP's
    with pytest.raises(RequestError, match="has the task 'preference'"):
        scorer.score(images[:1], [Prompt("p", "a", "preference")])


def test_the_identity_has_the_clip_and_its_hash(clip, tmp_path):
    identity = identity_of(NonSpatialScorer(ClipModel(str(clip[2]))))
    expected = hashlib.sha256((clip[2] / "model.safetensors").read_bytes()).hexdigest()
    assert (identity["rule"], identity["clip"]["sha256"]) == ("clip-cosine-1", expected)
    with pytest.raises(RequestError, match=r"no config\.json and no model\.safetensors"):
        NonSpatialScorer(ClipModel(str(tmp_path))).identity()  # before anything is drawn
    assert NonSpatialScorer().clip.source == CLIP


# --- metrics ---------------------------------------------------------------------------------------------------------
def sample(number, task, score, k=0):
    return Sample(f"{task}-{number}", k, task, "a", 1, "f.png", "", score)


def test_non_spatial_is_the_only_number_and_the_rest_is_named():
    mine = [sample(n, "non_spatial", value, k) for n in range(4) for k, value in enumerate((0.2 + n / 100, 0.4))]
    others = [sample(n, task, None) for n in range(3) for task in CATEGORIES if task != "non_spatial"]
    metrics = compbench_metrics([*others, *mine, sample(9, "non_spatial", None)], None)
    expected = sum(s.score for s in mine) / 8
    assert metrics["overall"]["value"] == metrics["images"]["value"] == pytest.approx(expected)
    assert metrics["overall"]["low"] < expected < metrics["overall"]["high"]
    assert list(metrics["tasks"]) == ["non_spatial"]
    assert {k: metrics["tasks"]["non_spatial"][k] for k in ("n", "unscored", "prompts")} == {
        "n": 8,
        "unscored": 1,
        "prompts": 5,
    }
    assert set(metrics["not_computed"]) == set(CATEGORIES) - {"non_spatial"}
    assert metrics["not_computed"]["color"] == {"pictures": 3, "official": OFFICIAL["color"]}
    json.dumps(metrics, allow_nan=False)


def test_pictures_of_one_prompt_are_one_cluster():
    """Ten equal pictures of each of four prompts say no more than one of each."""
    values = (0.1, 0.2, 0.3, 0.4)
    ten, one = (
        compbench_metrics([sample(n, "non_spatial", v, k) for n, v in enumerate(values) for k in range(count)], None)
        for count in (10, 1)
    )
    assert ten["overall"]["value"] == pytest.approx(one["overall"]["value"])
    assert ten["overall"]["high"] == pytest.approx(one["overall"]["high"])


def test_what_other_tools_judge_is_no_failure_of_this_one():
    drawn = [sample(0, "color", None), sample(1, "non_spatial", 0.3), sample(2, "non_spatial", None)]
    request = dict.fromkeys(("bench", "key", "version", "model", "partial", "correct_at", "scorer"))
    summary = summarise({**request, "prompts": 3, "samples": 1}, drawn, (), compbench_metrics)
    assert (summary["n"], summary["unscored"], summary["expected"]) == (1, 1, 3)
    assert summary["partial"] is None


def test_without_a_score_there_is_no_number():
    nothing = compbench_metrics([sample(0, "color", None)], None)
    assert (nothing["overall"], nothing["tasks"], nothing["images"]) == (None, {}, None)
    unscored = compbench_metrics([sample(0, "non_spatial", None)], None)
    assert unscored["tasks"]["non_spatial"] == {
        "value": None,
        "low": None,
        "high": None,
        "n": 0,
        "unscored": 1,
        "prompts": 1,
    }


# --- the official layout ---------------------------------------------------------------------------------------------
class Squares:
    """A picture by its seed alone."""

    def identity(self):
        return {"model": "squares"}

    def generate(self, prompts, seeds):
        return [Image.new("RGB", (4, 4), (s % 256, s // 256 % 256, s // 65536 % 256)) for s in seeds]


class Judge:
    def identity(self):
        return {"scorer": "none"}

    def score(self, images, prompts):
        return [Score(None, error="not asked") for _ in images]


# categories interleaved and one prompt twice: a picture's digits must follow its category, not the run
PROMPTS = (
    Prompt("b-0", "a green bench and a blue bowl", "color"),
    Prompt("n-0", "A man sits. He reads.", "non_spatial"),
    Prompt("b-1", "a green bench and a blue bowl", "color"),
    Prompt("b-2", "the clock reads 11.44", "color"),
)


def drawn(out, prompts=PROMPTS, samples=10):
    bench = BenchRun("compbench", "compbench", 1, prompts, Judge(), samples=samples, batch_size=7, correct_at=None)
    run_bench(bench, Squares(), out)
    return BenchFolder.of(out, "squares", "compbench")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("compbench"))


def as_official(samples):
    """What the official scripts make of a folder: sorted by the digits, the prompt up to the first underscore."""
    names = sorted(os.listdir(samples), key=lambda name: int(name.split("_")[-1].split(".")[0]))
    return [(int(name.split(".png")[0].split("_")[1]), name.split("_")[0], samples / name) for name in names]


def test_the_official_scripts_find_every_picture_with_its_prompt_and_number(folder, tmp_path):
    found = write_layout(folder, tmp_path)
    assert found == [tmp_path / "color", tmp_path / "non_spatial"]
    by_file = [json.loads(line) for line in folder.samples.read_text().splitlines()]
    for category in found:
        mine = [prompt for prompt in PROMPTS if prompt.task == category.name]
        read = as_official(category / "samples")
        assert [number for number, _, _ in read] == list(range(10 * len(mine)))
        assert [text for _, text, _ in read] == [prompt.prompt for prompt in mine for _ in range(10)]
        pictures = [s for prompt in mine for s in by_file if s["id"] == prompt.id]
        assert [s["k"] for s in pictures] == [*range(10)] * len(mine)
        for (_, _, path), one in zip(read, pictures):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == one["sha256"]


def test_writing_twice_is_writing_once_and_takes_no_room(folder, tmp_path):
    write_layout(folder, tmp_path)
    first = {path: path.stat().st_ino for path in tmp_path.rglob("*.png")}
    write_layout(folder, tmp_path)
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()} == first
    assert set(first.values()) == {path.stat().st_ino for path in folder.path.glob("samples/*.png")}


def test_without_hard_links_pictures_are_copied(folder, tmp_path, monkeypatch):
    def refuse(*paths, **options):
        raise OSError(errno.EXDEV, "another disk")

    linked = {
        path.name: path.read_bytes() for place in write_layout(folder, tmp_path / "a") for path in place.rglob("*.png")
    }
    monkeypatch.setattr(os, "link", refuse)
    copied = [path for place in write_layout(folder, tmp_path / "b") for path in place.rglob("*") if path.is_file()]
    assert {path.name: path.read_bytes() for path in copied} == linked
    assert all(path.stat().st_nlink == 1 for path in copied)


def test_a_folder_with_other_pictures_is_refused_before_anything_is_written(folder, tmp_path):
    place = tmp_path / "non_spatial" / "samples"
    place.mkdir(parents=True)
    (place / "an older prompt_000000.png").touch()
    with pytest.raises(RequestError, match=r"1 other files \('an older prompt_000000\.png'\)"):
        write_layout(folder, tmp_path)
    assert not (tmp_path / "color").exists()
    (place / "an older prompt_000000.png").rename(place / ".an older prompt_000000.png.tmp")  # of a killed process
    write_layout(folder, tmp_path)
    assert len(list(place.iterdir())) == 10


def test_ten_pictures_a_prompt_and_all_of_them(tmp_path):
    few = drawn(tmp_path / "few", PROMPTS[:1], samples=2)
    with pytest.raises(RequestError, match=r"2 pictures a prompt.*--samples 10"):
        write_layout(few, tmp_path / "out")
    torn = drawn(tmp_path / "torn", PROMPTS[:1])
    next(torn.path.glob("samples/*.png")).unlink()
    with pytest.raises(RequestError, match="is not complete"):
        write_layout(torn, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prompts_of_other_tasks_are_refused_before_anything_is_written(tmp_path):
    other = drawn(tmp_path / "run", (*PROMPTS[:1], Prompt("o", "a sign", "../ocr")))
    with pytest.raises(RequestError, match=r"'o' has the task '\.\./ocr'"):
        write_layout(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a snake_case name", "'_'"),
        ("and/or", "'/'"),
        ("a file cat.png on a screen", r"'\.png'"),
        ("two\nlines", "not printable"),
        ("nul \0", r"'\\x00'"),
        ("long " * 60, r"makes a file name of 311 bytes, of which a disk takes 250"),
        ("é" * 120, "makes a file name of 251 bytes"),
    ],
)
def test_a_prompt_that_no_file_name_holds_is_refused(text, why):
    with pytest.raises(RequestError, match=f"'bad-7' .*{why}"):
        file_name(Prompt("bad-7", text, "color"))


def test_what_a_file_name_holds_comes_back_whole(tmp_path):
    for text in ("é" * 119, "a (b) [c] 'd' - e, f; 50% $g #h & i!", ".hidden", "ends with a dot."):
        name = f"{file_name(Prompt('p', text, 'shape'))}_000012.png"
        (tmp_path / f".{name}.tmp").touch()
        (tmp_path / name).touch()
        assert name.split("_")[0] == text
    clock = Prompt("p", "reads 11:44.", "color")  # one of the official prompts
    assert file_name(clock, forbidden="/\0") == clock.prompt
    with pytest.raises(RequestError, match="':'"):
        file_name(clock, forbidden='/\0<>:"\\|?*')
    with pytest.raises(RequestError, match="has the task"):
        file_name(replace(clock, task="other"))
