"""GenEval's detector without mmdet: the official weights in transformers' Mask2Former, with mmdet's own conventions.

GenEval judges with mmdet 2.x's ``mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco`` (instance segmentation, 80 classes).
``Mask2FormerForUniversalSegmentation`` is the same network under other names (:func:`convert`); what the two libraries
do before and after it differs, so both are written here as mmdet has them: :func:`prepare` and :func:`postprocess`.
The Detectron2 weights on the Hub are another training run, and transformers' own post-processing is another one too;
neither gives the official numbers.

Sources: open-mmlab/mmdetection 2.28 (``configs/mask2former``, ``maskformer_fusion_head.py``); djghosh13/geneval.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flowopd_eval.errors import RequestError
from flowopd_eval.fetched import cache_folder
from flowopd_eval.prompts import COCO_CLASSES
from flowopd_eval.records import Detection
from flowopd_eval.scorers.geneval import OFFICIAL

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import Mask2FormerForUniversalSegmentation

CHECKPOINT = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
CHECKPOINT_URL = (
    "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"
    + CHECKPOINT
)
CHECKPOINT_SHA256 = "743b7d99"  # the first eight digits, which OpenMMLab writes into the file's name
LONG_SIDE, SHORT_SIDE, DIVISOR, PADDING = 1333, 800, 32, 128
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)
MOST = 100  # (query, class) pairs a picture, mmdet's max_per_image

View = Callable[["Image.Image"], "Image.Image"]


@dataclass(frozen=True)
class MaskedDetection(Detection):
    """A detection with its mask, bool (H, W) over the picture."""

    mask: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)


class ColourClassifier(Protocol):
    """Tells the colours of detected objects."""

    def identity(self) -> Mapping[str, Any]:
        """What decides its answers. Plain JSON."""

    def classify(self, images: Sequence[Image.Image], queries: Sequence[Sequence[MaskedDetection]]) -> list[list[str]]:
        """For each picture the colours of the asked-for objects, in their order."""


# --- the network -----------------------------------------------------------------------------------------------------
def build_network() -> Mask2FormerForUniversalSegmentation:
    """The network of the official checkpoint, untrained."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, num_labels=80))


_SWIN, _PIXEL, _DECODER = (
    "model.pixel_level_module.encoder",
    "model.pixel_level_module.decoder",
    "model.transformer_module",
)
# mmdet's name -> transformers' name; the first that matches. `{}` are split three ways, in the order q, k, v.
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"backbone\.patch_embed\.projection\.", f"{_SWIN}.swin.embeddings.patch_embeddings.projection."),
    (r"backbone\.patch_embed\.norm\.", f"{_SWIN}.swin.embeddings.norm."),
    (
        r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.norm1\.",
        rf"{_SWIN}.swin.encoder.layers.\1.blocks.\2.layernorm_before.",
    ),
    (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.norm2\.", rf"{_SWIN}.swin.encoder.layers.\1.blocks.\2.layernorm_after."),
    (
        r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.qkv\.",
        rf"{_SWIN}.swin.encoder.layers.\1.blocks.\2.attention.{{}}_proj.",
    ),
    (
        r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.proj\.",
        rf"{_SWIN}.swin.encoder.layers.\1.blocks.\2.attention.o_proj.",
    ),
    (
        r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.relative_position_bias_table",
        rf"{_SWIN}.swin.encoder.layers.\1.blocks.\2.attention.relative_position_bias.relative_position_bias_table",
    ),
    (
        r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.0\.0\.",
        rf"{_SWIN}.swin.encoder.layers.\1.blocks.\2.mlp.fc1.",
    ),
    (
        r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.1\.",
        rf"{_SWIN}.swin.encoder.layers.\1.blocks.\2.mlp.fc2.",
    ),
    (r"backbone\.stages\.(\d+)\.downsample\.", rf"{_SWIN}.swin.encoder.layers.\1.downsample."),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv\.", rf"{_PIXEL}.input_projections.\1.0."),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn\.", rf"{_PIXEL}.input_projections.\1.1."),
    (
        r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.attentions\.0\.",
        rf"{_PIXEL}.encoder.layers.\1.self_attn.",
    ),
    (
        r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.0\.",
        rf"{_PIXEL}.encoder.layers.\1.self_attn_layer_norm.",
    ),
    (
        r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.1\.",
        rf"{_PIXEL}.encoder.layers.\1.final_layer_norm.",
    ),
    (
        r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.",
        rf"{_PIXEL}.encoder.layers.\1.fc1.",
    ),
    (
        r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.",
        rf"{_PIXEL}.encoder.layers.\1.fc2.",
    ),
    (r"panoptic_head\.pixel_decoder\.level_encoding\.weight", f"{_PIXEL}.level_embed"),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv\.", f"{_PIXEL}.adapter_1.0."),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn\.", f"{_PIXEL}.adapter_1.1."),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv\.", f"{_PIXEL}.layer_1.0."),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn\.", f"{_PIXEL}.layer_1.1."),
    (r"panoptic_head\.pixel_decoder\.mask_feature\.", f"{_PIXEL}.mask_projection."),
    (r"panoptic_head\.query_embed\.", f"{_DECODER}.queries_embedder."),
    (r"panoptic_head\.query_feat\.", f"{_DECODER}.queries_features."),
    (r"panoptic_head\.level_embed\.", f"{_DECODER}.level_embed."),
    (
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.0\.attn\.",
        rf"{_DECODER}.decoder.layers.\1.cross_attn.",
    ),
    (
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn\.in_proj_",
        rf"{_DECODER}.decoder.layers.\1.self_attn.{{}}_proj.",
    ),
    (
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn\.out_proj\.",
        rf"{_DECODER}.decoder.layers.\1.self_attn.out_proj.",
    ),
    (
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.0\.",
        rf"{_DECODER}.decoder.layers.\1.cross_attn_layer_norm.",
    ),
    (
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.1\.",
        rf"{_DECODER}.decoder.layers.\1.self_attn_layer_norm.",
    ),
    (
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.2\.",
        rf"{_DECODER}.decoder.layers.\1.final_layer_norm.",
    ),
    (
        r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.",
        rf"{_DECODER}.decoder.layers.\1.fc1.",
    ),
    (r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.", rf"{_DECODER}.decoder.layers.\1.fc2."),
    (r"panoptic_head\.transformer_decoder\.post_norm\.", f"{_DECODER}.decoder.layernorm."),
    (r"panoptic_head\.mask_embed\.0\.", f"{_DECODER}.decoder.mask_predictor.mask_embedder.0.0."),
    (r"panoptic_head\.mask_embed\.2\.", f"{_DECODER}.decoder.mask_predictor.mask_embedder.1.0."),
    (r"panoptic_head\.mask_embed\.4\.", f"{_DECODER}.decoder.mask_predictor.mask_embedder.2.0."),
    (r"panoptic_head\.cls_embed\.", "class_predictor."),
)
_NORMS = re.compile(r"backbone\.norm(\d+)\.")
_IGNORED = re.compile(r"relative_position_index$")  # made anew by transformers
# In transformers' network and not in mmdet's: a norm whose output is not used, and the loss's weights.
_UNUSED = re.compile(r"swin\.layernorm\.|criterion\.")


def convert(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """mmdet's state dict under transformers' names.

    Raises:
        RequestError: keys that belong to another network, or keys that are missing; with counts and names.
    """
    import torch

    found: dict[str, torch.Tensor] = {}
    unknown = []
    for key, value in state.items():
        if _IGNORED.search(key):
            continue
        name = _renamed(key)
        if name is None:
            unknown.append(key)
        elif "{}" in name:
            found.update({name.format(part): piece for part, piece in zip("qkv", value.chunk(3), strict=True)})
        else:
            found[name] = _reordered(value) if ".downsample." in name else value
    with torch.device("meta"):  # for names and shapes
        wanted = {name: v.shape for name, v in build_network().state_dict().items() if not _UNUSED.search(name)}
    missing, wrong = (
        wanted.keys() - found.keys(),
        [n for n in wanted.keys() & found.keys() if wanted[n] != found[n].shape],
    )
    if unknown or missing or wrong or found.keys() - wanted.keys():
        names = ", ".join(sorted([*unknown, *missing, *wrong])[:4])
        raise RequestError(
            f"This is no checkpoint of {CHECKPOINT.rpartition('_')[0]}: {len(unknown)} unknown keys, {len(missing)} "
            f"missing, {len(wrong)} of another shape ({names} …). The panoptic one of the same family does not fit."
        )
    return found


def _renamed(key: str) -> str | None:
    if norm := _NORMS.match(key):
        return f"{_SWIN}.hidden_states_norms.stage{int(norm[1]) + 1}.{key[norm.end() :]}"
    for pattern, name in _RENAMES:
        if match := re.match(pattern, key):
            return match.expand(name) + key[match.end() :]
    return None


def _reordered(value: torch.Tensor) -> torch.Tensor:
    """A downsampling layer's last axis: mmdet has the four pixels of a patch side by side, transformers the channels.

    mmdet: channel * 4 + pixel, pixels row by row; transformers: pixel * channels + channel, pixels column by column.
    """
    by_pixel = value.unflatten(-1, (-1, 4)).transpose(-1, -2)  # (..., pixel, channel)
    return by_pixel[..., [0, 2, 1, 3], :].flatten(-2).contiguous()


def official_weights(folder: Path | None = None, url: str = CHECKPOINT_URL, sha256: str = CHECKPOINT_SHA256) -> Path:
    """The official weights as safetensors: downloaded (or put there by hand), checked and converted once.

    Raises:
        RequestError: the download fails, or the file's sha256 does not begin with ``sha256``, as its name says.
    """
    import hashlib

    import torch
    from safetensors.torch import save_file

    folder = folder or cache_folder()
    converted = folder / CHECKPOINT.replace(".pth", ".safetensors")
    if converted.is_file():
        return converted
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / CHECKPOINT
    if not source.is_file():
        try:
            torch.hub.download_url_to_file(url, str(source), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise RequestError(
                f"Cannot fetch GenEval's detector from {url}: {error}. With the file at hand, put it at {source}."
            ) from error
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256):
        raise RequestError(
            f"{source} is not GenEval's detector, or not all of it: its sha256 begins with {found[:8]}, not {sha256}. "
            f"Delete it (it is fetched again from {url}), or put the whole file there."
        )
    state = torch.load(source, map_location="cpu", weights_only=True)["state_dict"]
    part = converted.with_suffix(f".{os.getpid()}.part")
    save_file({name: tensor.contiguous() for name, tensor in convert(state).items()}, part)
    part.replace(converted)
    return converted


def load_weights(weights: Path) -> Mask2FormerForUniversalSegmentation:
    """The network with what :func:`official_weights` returned.

    Raises:
        RequestError: the file cannot be read, or does not fit the network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    network = build_network()
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{weights} cannot be read ({error}): delete it, it is made again.") from error
    result = network.load_state_dict(state, strict=False)
    misfits = [name for name in result.missing_keys if not _UNUSED.search(name)] + result.unexpected_keys
    if misfits:
        raise RequestError(f"{weights} does not fit the detector: {', '.join(misfits[:4])} …; delete it.")
    return network


# --- before and after the network ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Prepared:
    """A picture as the network takes it: (3, H, W) float32 with H, W multiples of 32; its sizes within and before."""

    pixels: NDArray[np.float32]
    inner: tuple[int, int]
    original: tuple[int, int]


def prepare(image: Image.Image) -> Prepared:
    """Resize to fit 1333 x 800 (cv2, bilinear), pad to a multiple of 32 with grey 128, normalise (mmdet's pipeline)."""
    import cv2

    array = np.asarray(image.convert("RGB"))
    height, width = array.shape[:2]
    scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    inner = (int(height * scale + 0.5), int(width * scale + 0.5))
    resized = cv2.resize(array, (inner[1], inner[0]), interpolation=cv2.INTER_LINEAR)
    padded = np.full((*(-(-side // DIVISOR) * DIVISOR for side in inner), 3), PADDING, np.uint8)
    padded[: inner[0], : inner[1]] = resized
    normalised = (padded.astype(np.float32) - MEAN) / STD
    return Prepared(np.ascontiguousarray(normalised.transpose(2, 0, 1)), inner, (height, width))


def postprocess(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    padded: tuple[int, int],
    inner: tuple[int, int],
    original: tuple[int, int],
    least: float = OFFICIAL.threshold,
) -> list[MaskedDetection]:
    """The detections of one picture, as mmdet's ``MaskFormerFusionHead.instance_postprocess`` has them, best first.

    Args:
        class_logits: (queries, 81), the last class being none.
        mask_logits: (queries, h, w).
        padded: height and width of the network's input.
        inner: of the picture within it.
        original: of the picture.
        least: detections that score this or less are left out. A score is the product of a class's probability and
            the mean of the mask's sigmoids, so that whatever has less probability need not be enlarged.
    """
    from torch.nn.functional import interpolate

    probabilities = class_logits.float().softmax(-1)[:, :-1]
    pairs = probabilities.flatten().topk(min(MOST, probabilities.numel()))
    chosen = pairs.values > least
    scores, indices = pairs.values[chosen], pairs.indices[chosen]
    if not len(indices):
        return []
    queries, labels = indices // probabilities.shape[1], indices % probabilities.shape[1]
    unique, place = queries.unique(return_inverse=True)
    masks = interpolate(mask_logits[unique].float()[:, None], padded, mode="bilinear", align_corners=False)
    masks = interpolate(masks[:, :, : inner[0], : inner[1]], original, mode="bilinear", align_corners=False)[:, 0]
    inside = masks > 0
    sureness = (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    final = (scores * sureness[place]).cpu().tolist()
    shapes = inside.cpu().numpy()
    found = [
        MaskedDetection(COCO_CLASSES[label], _box(shapes[n]), score, mask=shapes[n])
        for label, n, score in zip(labels.tolist(), place.tolist(), final, strict=True)
        if score > least
    ]
    return sorted(found, key=lambda detection: -detection.score)


def _box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """The tight box of a mask, right and bottom exclusive; zeros for an empty one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


# --- the detector ----------------------------------------------------------------------------------------------------
class Mask2FormerDetector:
    """GenEval's detector and colour classifier (:class:`flowopd_eval.scorers.geneval.Detector`).

    Args:
        weights: what :func:`official_weights` returned.
        colours: tells the colours.
        device: where it runs.
        view: what the network sees of a picture (official: the picture).
        batch: pictures of one size at a time; None is 8, and 1 on a CPU, where several are slower than one by one
            (``benchmarks.scoring detector``).
    """

    def __init__(
        self,
        weights: Path,
        colours: ColourClassifier,
        device: str = "cpu",
        view: View | None = None,
        batch: int | None = None,
    ) -> None:
        self.weights, self.colours, self.device = weights, colours, device
        self.batch = batch or (1 if device == "cpu" else 8)
        self.view = view or (lambda image: image)

    @cached_property
    def network(self) -> Mask2FormerForUniversalSegmentation:
        """The network with its weights; on a CPU with a quicker attention (:mod:`flowopd_eval.scorers.deformable`)."""
        network = load_weights(self.weights)
        if self.device == "cpu":
            from flowopd_eval.scorers.deformable import quicken

            quicken(network)
        return network.to(self.device).eval()

    def identity(self) -> Mapping[str, Any]:
        """The network's file and hash, and the colour classifier."""
        import hashlib

        with self.weights.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"name": CHECKPOINT, "sha256": sha256, "colours": dict(self.colours.identity())}

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """What stands in each picture, with masks; pictures of one size go through the network together."""
        import torch

        prepared = [prepare(self.view(image)) for image in images]
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, picture in enumerate(prepared):
            by_shape.setdefault(picture.pixels.shape, []).append(index)
        found: list[list[Detection]] = [[] for _ in images]
        for shape, indices in by_shape.items():
            for start in range(0, len(indices), self.batch):
                chunk = indices[start : start + self.batch]
                pixels = torch.from_numpy(np.stack([prepared[i].pixels for i in chunk])).to(self.device)
                with torch.inference_mode():
                    output = self.network(pixel_values=pixels)
                for n, index in enumerate(chunk):
                    logits, masks = output.class_queries_logits[n], output.masks_queries_logits[n]
                    padded, picture = (shape[1], shape[2]), prepared[index]
                    found[index] = list(postprocess(logits, masks, padded, picture.inner, picture.original))
        return found

    def classify_colours(
        self, images: Sequence[Image.Image], queries: Sequence[Sequence[Detection]]
    ) -> list[list[str]]:
        """The colours of detections that :meth:`detect` returned."""
        return self.colours.classify(images, queries)  # type: ignore[arg-type]
