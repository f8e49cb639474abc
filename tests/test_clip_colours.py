"""The colour classifier: real CLIP code on random weights, against the formula written out."""

from __future__ import annotations

import json
import string

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from flowopd_eval.prompts import GENEVAL_COLOURS
from flowopd_eval.scorers.clip_colours import ClipColours, cut_out
from flowopd_eval.scorers.clip_model import crop_pixels
from flowopd_eval.scorers.mask2former import MaskedDetection


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of two narrow layers with 224-pixel pictures, and a tokenizer that spells."""
    folder = tmp_path_factory.mktemp("clip")
    pieces = [*string.ascii_lowercase, "-", *(f"{c}</w>" for c in [*string.ascii_lowercase, "-"])]
    vocabulary = {piece: n for n, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), max_position_embeddings=77, eos_token_id=len(vocabulary) - 1, **sizes
    )
    vision = CLIPVisionConfig(image_size=224, patch_size=56, **sizes)
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    ).save_pretrained(folder)
    return folder


def detection(box, mask=None, label="car"):
    return MaskedDetection(label, box, 0.9, mask=mask)


def picture(width=90, height=60, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_an_object_is_cut_out_on_grey():
    image = picture()
    mask = np.zeros((60, 90), bool)
    mask[10:30, 20:50] = True
    mask[12, 22] = False
    cut = np.asarray(cut_out(image, detection((20.0, 10.0, 50.0, 30.0), mask)))
    expected = np.asarray(image)[10:30, 20:50].copy()
    expected[2, 2] = 153
    assert (cut == expected).all()


@pytest.mark.parametrize("size", [(224, 224), (300, 100), (31, 200), (225, 224)])
def test_crops_are_resized_by_the_short_side_and_cut_in_the_middle(size):
    image = picture(*size)
    short = min(size)
    resized = image.resize((int(224 * size[0] / short), int(224 * size[1] / short)), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, np.float64) / 255
    left, top = round((pixels.shape[1] - 224) / 2), round((pixels.shape[0] - 224) / 2)
    middle = pixels[top : top + 224, left : left + 224].transpose(2, 0, 1)
    for channel, (mean, std) in enumerate(
        zip((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), strict=True)
    ):
        assert np.allclose(crop_pixels(image)[channel], (middle[channel] - mean) / std, atol=1e-5)


def test_colours_follow_the_formula_whatever_the_batch(clip_folder):
    images = [picture(seed=n) for n in range(3)]
    boxes = [(5.0 * n, 3.0 * n, 5.0 * n + 40, 3.0 * n + 30) for n in range(5)]
    queries = [
        [detection(boxes[0]), detection(boxes[1], label="dog")],
        [],
        [detection(box, label="orange") for box in boxes[2:]],
    ]
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)

    def by_hand(image, asked):
        box = tuple(int(edge) for edge in asked.box)
        with torch.no_grad():
            seen = model.get_image_features(torch.from_numpy(crop_pixels(image.crop(box)))[None]).pooler_output[0]
            likeness = []
            for colour in GENEVAL_COLOURS:
                sentences = [
                    f"a photo of a {colour} {asked.label}",
                    f"a photo of a {colour}-colored {asked.label}",
                    f"a photo of a {colour} object",
                ]
                vectors = []
                for sentence in sentences:
                    vector = model.get_text_features(**tokenizer(sentence, return_tensors="pt")).pooler_output[0]
                    vectors.append(vector / vector.norm())
                mean = sum(vectors) / 3
                likeness.append(float(mean @ seen / (mean.norm() * seen.norm())))
        return GENEVAL_COLOURS[int(np.argmax(likeness))]

    expected = [[by_hand(image, asked) for asked in query] for image, query in zip(images, queries, strict=True)]
    for batch in (1, 2, 32):
        assert ClipColours(str(clip_folder), batch=batch).classify(images, queries) == expected
    assert len({colour for colours in expected for colour in colours}) > 1


def test_text_is_encoded_once_a_class(clip_folder):
    colours = ClipColours(str(clip_folder))
    assert colours.directions("car") is colours.directions("car")
    assert colours.directions("car").shape == (10, 16)
    assert torch.allclose(colours.directions("dog").norm(dim=-1), torch.ones(10))
