"""GenEval's detector: the official layout converts; what surrounds the network is mmdet's, by independent versions."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flowopd_eval.errors import RequestError
from flowopd_eval.prompts import COCO_CLASSES
from flowopd_eval.scorers.mask2former import (
    CHECKPOINT,
    Mask2FormerDetector,
    build_network,
    convert,
    official_weights,
    postprocess,
    prepare,
)

DEPTHS, WIDTHS, HEADS = (2, 2, 18, 2), (96, 192, 384, 768), (3, 6, 12, 24)


def mmdet_layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official checkpoint, written down from mmdet 2.28's modules."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    layer("backbone.patch_embed.projection", 96, 3, 4, 4)
    layer("backbone.patch_embed.norm", 96)
    for i, (depth, width, heads) in enumerate(zip(DEPTHS, WIDTHS, HEADS, strict=True)):
        for j in range(depth):
            block = f"backbone.stages.{i}.blocks.{j}"
            layer(f"{block}.norm1", width)
            layer(f"{block}.norm2", width)
            layer(f"{block}.attn.w_msa.qkv", 3 * width, width)
            layer(f"{block}.attn.w_msa.proj", width, width)
            shapes[f"{block}.attn.w_msa.relative_position_bias_table"] = (169, heads)
            shapes[f"{block}.attn.w_msa.relative_position_index"] = (49, 49)
            layer(f"{block}.ffn.layers.0.0", 4 * width, width)
            layer(f"{block}.ffn.layers.1", width, 4 * width)
        if i < 3:
            layer(f"backbone.stages.{i}.downsample.norm", 4 * width)
            shapes[f"backbone.stages.{i}.downsample.reduction.weight"] = (2 * width, 4 * width)
        layer(f"backbone.norm{i}", width)
    head = "panoptic_head"
    for i, width in enumerate((768, 384, 192)):
        layer(f"{head}.pixel_decoder.input_convs.{i}.conv", 256, width, 1, 1)
        layer(f"{head}.pixel_decoder.input_convs.{i}.gn", 256)
    for i in range(6):
        block = f"{head}.pixel_decoder.encoder.layers.{i}"
        for name, size in (
            ("sampling_offsets", 192),
            ("attention_weights", 96),
            ("value_proj", 256),
            ("output_proj", 256),
        ):
            layer(f"{block}.attentions.0.{name}", size, 256)
        layer(f"{block}.ffns.0.layers.0.0", 1024, 256)
        layer(f"{block}.ffns.0.layers.1", 256, 1024)
        layer(f"{block}.norms.0", 256)
        layer(f"{block}.norms.1", 256)
    shapes[f"{head}.pixel_decoder.level_encoding.weight"] = (3, 256)
    shapes[f"{head}.pixel_decoder.lateral_convs.0.conv.weight"] = (256, 96, 1, 1)
    layer(f"{head}.pixel_decoder.lateral_convs.0.gn", 256)
    shapes[f"{head}.pixel_decoder.output_convs.0.conv.weight"] = (256, 256, 3, 3)
    layer(f"{head}.pixel_decoder.output_convs.0.gn", 256)
    layer(f"{head}.pixel_decoder.mask_feature", 256, 256, 1, 1)
    for i in range(9):
        block = f"{head}.transformer_decoder.layers.{i}"
        for attention in (0, 1):
            shapes[f"{block}.attentions.{attention}.attn.in_proj_weight"] = (768, 256)
            shapes[f"{block}.attentions.{attention}.attn.in_proj_bias"] = (768,)
            layer(f"{block}.attentions.{attention}.attn.out_proj", 256, 256)
        layer(f"{block}.ffns.0.layers.0.0", 2048, 256)
        layer(f"{block}.ffns.0.layers.1", 256, 2048)
        for norm in range(3):
            layer(f"{block}.norms.{norm}", 256)
    layer(f"{head}.transformer_decoder.post_norm", 256)
    for name, size in (("query_embed", 100), ("query_feat", 100), ("level_embed", 3)):
        shapes[f"{head}.{name}.weight"] = (size, 256)
    layer(f"{head}.cls_embed", 81, 256)
    for i in (0, 2, 4):
        layer(f"{head}.mask_embed.{i}", 256, 256)
    return shapes


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.zeros(shape, dtype=torch.long)
        if name.endswith("index")
        else 0.02 * torch.randn(shape, generator=generator)
        for name, shape in mmdet_layout().items()
    }


def test_the_layout_has_the_official_number_of_parameters(checkpoint) -> None:
    assert sum(t.numel() for name, t in checkpoint.items() if not name.endswith("index")) == 68_739_547


def test_every_tensor_is_converted_and_fits(checkpoint) -> None:
    converted = convert(checkpoint)
    network = build_network()
    result = network.load_state_dict(converted, strict=False)
    assert not result.unexpected_keys
    assert all("swin.layernorm" in name or "criterion" in name for name in result.missing_keys)
    assert sum(t.numel() for t in converted.values()) == 68_739_547
    # An independent walk: every value of the checkpoint is somewhere, none twice.
    sums = (sum(float(t.double().square().sum()) for t in part.values()) for part in (checkpoint, converted))
    assert math.isclose(*sums, rel_tol=1e-9)


def test_downsampling_sees_the_same_patches(checkpoint) -> None:
    """mmdet unfolds 2x2 patches channel by channel; transformers joins four strided pictures."""
    x = torch.randn(1, 96, 8, 6, generator=torch.Generator().manual_seed(1))
    unfolded = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # (1, patches, 96 * 4)
    name = "backbone.stages.0.downsample"
    normed = torch.nn.functional.layer_norm(
        unfolded, (384,), checkpoint[f"{name}.norm.weight"], checkpoint[f"{name}.norm.bias"]
    )
    theirs = normed @ checkpoint[f"{name}.reduction.weight"].T
    network = build_network()
    network.load_state_dict(convert(checkpoint), strict=False)
    merging = network.model.pixel_level_module.encoder.swin.encoder.layers[0].downsample
    ours = merging(x.flatten(2).transpose(1, 2), (8, 6))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("panoptic_head.cls_embed.weight"),
        lambda state: state.update({"semantic_head.conv.weight": torch.zeros(1)}),
        lambda state: state.update({"panoptic_head.cls_embed.weight": torch.zeros(134, 256)}),
    ],
    ids=["missing", "unknown", "panoptic"],
)
def test_another_checkpoint_is_refused(checkpoint, change) -> None:
    state = dict(checkpoint)
    change(state)
    with pytest.raises(RequestError, match="no checkpoint of mask2former_swin-s"):
        convert(state)


def test_a_checkpoint_at_hand_is_converted_once(checkpoint, tmp_path) -> None:
    torch.save({"meta": {"epoch": 50}, "state_dict": checkpoint}, tmp_path / CHECKPOINT)
    sha256 = hashlib.sha256((tmp_path / CHECKPOINT).read_bytes()).hexdigest()
    path = official_weights(tmp_path, sha256=sha256[:8])
    assert path.suffix == ".safetensors"
    assert load_file(path).keys() == convert(checkpoint).keys()
    (tmp_path / CHECKPOINT).unlink()
    assert official_weights(tmp_path) == path


def test_a_file_at_hand_that_is_cut_short_or_another_is_refused_with_the_remedy(checkpoint, tmp_path) -> None:
    torch.save({"state_dict": checkpoint}, tmp_path / CHECKPOINT)
    with pytest.raises(RequestError, match=rf"{CHECKPOINT} is not GenEval's detector.*not 743b7d99.*Delete it"):
        official_weights(tmp_path)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match="not all of it"):
        official_weights(tmp_path, sha256=hashlib.sha256(whole).hexdigest())
    assert not list(tmp_path.glob("*.safetensors"))


def test_converted_weights_that_are_cut_short_are_refused_with_the_remedy(tmp_path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"\x10")
    with pytest.raises(RequestError, match=r"weights\.safetensors cannot be read.*delete it"):
        Mask2FormerDetector(tmp_path / "weights.safetensors", Red()).network  # noqa: B018  (loads)


def test_a_download_with_another_hash_is_refused(tmp_path) -> None:
    (tmp_path / "served.pth").write_bytes(b"not the checkpoint")
    with pytest.raises(RequestError, match="Cannot fetch GenEval's detector"):
        official_weights(tmp_path / "cache", url=(tmp_path / "served.pth").as_uri())
    assert not list((tmp_path / "cache").glob("*.safetensors"))


# --- before ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "inner", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((640, 384), (800, 1333), (800, 1344)),
        ((384, 640), (1333, 800), (1344, 800)),
        ((100, 33), (440, 1333), (448, 1344)),
    ],
)
def test_pictures_are_fitted_padded_and_normalised(size, inner, padded) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    found = prepare(image)
    assert found.inner == inner
    assert found.original == (size[1], size[0])
    assert found.pixels.shape == (3, *padded)
    grey = (128 - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    outside = np.ones(padded, bool)
    outside[: inner[0], : inner[1]] = False
    assert np.allclose(found.pixels[:, outside], grey[:, None], atol=1e-6)
    within = found.pixels[:, : inner[0], : inner[1]] * np.array([58.395, 57.12, 57.375])[:, None, None]
    mean = (within + np.array([123.675, 116.28, 103.53])[:, None, None]).mean((1, 2))
    assert np.allclose(mean, np.asarray(image).mean((0, 1)), atol=3)


# --- after -----------------------------------------------------------------------------------------------------------
def slowly(class_logits, mask_logits, padded, inner, original) -> list[tuple]:
    """mmdet's steps one query at a time: enlarge, cut, enlarge, threshold, mean, box; (label, score, box)."""
    found = []
    for query in range(len(class_logits)):
        exps = [math.exp(v) for v in class_logits[query].tolist()]
        for label in range(80):
            found.append((exps[label] / sum(exps), query, label))
    result = []
    for probability, query, label in sorted(found, reverse=True)[:100]:
        mask = torch.nn.functional.interpolate(mask_logits[query][None, None], size=padded, mode="bilinear")
        mask = torch.nn.functional.interpolate(mask[..., : inner[0], : inner[1]], size=original, mode="bilinear")
        mask = mask[0, 0].numpy()
        ys, xs = np.where(mask > 0)
        sureness = sum(1 / (1 + math.exp(-float(mask[y, x]))) for y, x in zip(ys, xs, strict=True)) / (len(ys) + 1e-6)
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(ys) else (0, 0, 0, 0)
        if probability * sureness > 0.3:
            result.append((COCO_CLASSES[label], probability * sureness, tuple(map(float, box))))
    return sorted(result, key=lambda r: -r[1])


@pytest.mark.parametrize("original", [(40, 40), (24, 40), (37, 23)])
def test_postprocessing_is_mmdets(original) -> None:
    generator = torch.Generator().manual_seed(sum(original))
    for _ in range(4):
        classes = torch.randn(12, 81, generator=generator)
        for query in range(9):
            classes[query, int(torch.randint(80, (1,), generator=generator))] += 7  # sure of one class
            if query % 3 == 0:
                classes[query, int(torch.randint(80, (1,), generator=generator))] += 7  # or torn between two
        masks = torch.nn.functional.avg_pool2d(4 * torch.randn(12, 16, 16, generator=generator), 5, 1, 2) * 3
        masks[8] = -1.0  # an empty one
        args = (classes, masks, (64, 64), (50, 60), original)
        ours, theirs = postprocess(*args), slowly(*args)
        assert len(ours) == len(theirs) > 3
        for detection, (label, score, box) in zip(ours, theirs, strict=True):
            assert (detection.label, detection.box) == (label, box)
            assert detection.score == pytest.approx(score, abs=1e-5)
            ys, xs = np.where(detection.mask)
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == detection.box
            assert detection.mask.shape == original


def test_nothing_sure_is_nothing_found() -> None:
    assert postprocess(torch.zeros(5, 81), torch.ones(5, 8, 8), (32, 32), (32, 32), (20, 20)) == []


class Red:
    """Calls everything red."""

    def identity(self):
        return {"name": "red"}

    def classify(self, images, queries):
        return [["red"] * len(asked) for asked in queries]


@pytest.mark.slow
def test_detector_finds_the_same_in_a_batch_and_alone(checkpoint, tmp_path) -> None:
    torch.save({"state_dict": checkpoint}, tmp_path / CHECKPOINT)
    sha256 = hashlib.sha256((tmp_path / CHECKPOINT).read_bytes()).hexdigest()
    detector = Mask2FormerDetector(official_weights(tmp_path, sha256=sha256), Red(), batch=2)
    detector.network.class_predictor.bias.data[79] += 9  # sure of one thing: scores are masks, then, and over 0.3
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((64, 64), (48, 64), (64, 64))
    ]
    together, alone = detector.detect(images), [detector.detect([image])[0] for image in images]
    assert any(together)
    for ours, theirs in zip(together, alone, strict=True):
        assert [(d.label, d.box) for d in ours] == [(d.label, d.box) for d in theirs]
        assert np.allclose([d.score for d in ours], [d.score for d in theirs], atol=1e-4)
    assert detector.identity()["colours"] == {"name": "red"}
