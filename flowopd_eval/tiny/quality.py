"""How cleanly a 64x64 picture is drawn, whatever it shows: the miniature's counterpart of DeQA.

The picture is painted anew from what a clean one would be made of: its own smooth background, and flat areas of its own
tones with smooth outlines. What the two do not share (noise, specks, blur, ragged outlines, colours that run) is the
picture's *untidiness*, in levels (0..255) for each pixel of ink; a pixel may have any tone between those next to it in
the clean painting, so that where an outline crosses a pixel does not matter. The prompt is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowopd_eval.records import Prompt, Score
from flowopd_eval.tiny.detector import fit_background, palette_index
from flowopd_eval.tiny.scenes import SIZE

VERSION = 1
_INK = 36.0  # levels by which a pixel of ink differs from the background
_LEAST_INK = 40  # pixels; a picture with less shows nothing
_LEAST_AREA = 10  # pixels of one flat area
_TIDY = 3.0  # untidiness up to which a picture counts as clean: nineteen of twenty renders have less
_SCALE = 7.0  # untidiness beyond that by which the score falls to 1/e


def untidiness(picture: NDArray[np.uint8]) -> float | None:
    """Levels of difference for each pixel of ink of an RGB picture (64, 64, 3); None where nothing is drawn."""
    tones = picture.astype(np.float32)
    background = fit_background(tones)
    if background is None:
        return None
    ink = (np.abs(tones - background).max(-1) > _INK).astype(np.uint8)
    amount = int(ink.sum())
    if amount < _LEAST_INK:
        return None
    clean, near_by = _paint(picture, background, ink), np.ones((3, 3), np.uint8)
    outside = np.maximum(cv2.erode(clean, near_by) - tones, tones - cv2.dilate(clean, near_by))
    difference = np.clip(outside.max(-1), 0, 100)
    near = cv2.dilate(ink, np.ones((5, 5), np.uint8)) > 0
    rest = float(difference[~near].mean()) if not near.all() else 0.0
    return float(difference[near].sum()) / amount + rest


def _paint(picture: NDArray[np.uint8], background: NDArray[np.float32], ink: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The clean picture (64, 64, 3)."""
    index = palette_index(cv2.medianBlur(picture, 3)).astype(np.int32)
    index[cv2.dilate(ink, np.ones((3, 3), np.uint8)) == 0] = -1
    areas = []
    for colour in np.unique(index[(index >= 0) & (index < 255)]):
        count, labels, stats, _ = cv2.connectedComponentsWithStats((index == colour).astype(np.uint8), connectivity=4)
        areas += [labels == k for k in range(1, count) if stats[k, cv2.CC_STAT_AREA] >= _LEAST_AREA]
    canvas = background.copy()
    for area in sorted(areas, key=lambda a: -int(a.sum())):
        tone = np.median(picture[area].astype(np.float32), axis=0)
        smooth = (cv2.GaussianBlur(area.astype(np.float32), (0, 0), 0.8) > 0.5).astype(np.uint8)
        canvas += (tone - canvas) * cv2.GaussianBlur(smooth.astype(np.float32), (0, 0), 0.5)[..., None]
    return canvas


def quality(picture: NDArray[np.uint8]) -> float:
    """0..1 for an RGB picture (64, 64, 3): 1 for a clean one, 0 where nothing is drawn.

    ``exp(-(untidiness - 3) / 7)``, at most 1.
    """
    found = untidiness(picture)
    return 0.0 if found is None else math.exp(-max(0.0, found - _TIDY) / _SCALE)


class QualityScorer:
    """:func:`quality` over batches of pictures (:class:`flowopd_eval.records.Scorer`)."""

    def identity(self) -> Mapping[str, Any]:
        """Name and version; the version changes whenever a score could."""
        return {"scorer": "quality", "version": VERSION}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
        """Score each picture; pictures of another size are resized by area averaging."""
        return [_score(image) for image in images]


def _score(image: Image.Image) -> Score:
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    picture = np.asarray(image)
    found = untidiness(picture)
    reason = "nothing is drawn" if found is None else f"untidiness {found:.1f}"
    return Score(quality(picture), reason, {"untidiness": None if found is None else round(found, 3)})
