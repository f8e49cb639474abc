"""The miniature's detector: which shapes stand in a 64x64 picture, in which colours, by classical image analysis.

There is nothing to train and nothing to load, so that its verdict can be checked with a pencil. A picture is taken
apart the way :mod:`flowopd_eval.tiny.scenes` puts one together:

1. the background is a smooth surface, fitted robustly to the pixels of background tone;
2. connected areas of one palette colour are the hearts of objects, and every pixel near them belongs to the nearest;
3. a pixel's *coverage* is how far it lies on the way from the background's tone to the object's;
4. each shape, with the area and the centroid of that coverage, is laid over it; the best overlap names the shape.

An object's score says how well all this holds: size, overlap, nothing far off the outline, lead over the second-best
shape, purity of colour, clear surroundings. It is steep by intention: what is clearly a star scores near 1, what is not
near 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowopd_eval.records import Box, Detection
from flowopd_eval.scorers.geneval import box_iou
from flowopd_eval.tiny.scenes import COLOURS, SHAPES, SIZE, Thing, shape_mask

VERSION = 1
Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

# How far from a colour's range a tone may lie: degrees of hue, chroma (saturation x value), value.
_TOLERANCE = np.array([12.0, 0.20, 0.15], np.float32)
_NEAR = 5.0  # pixels from its heart within which an object's own pixels lie: the length of a star's thin tip
_HEART = 10  # pixels, the least area of a heart
_LEAST_AREA = 70.0  # pixels, of an object that can be a shape; what is smaller is a letter or a speck

# Where each piece of evidence is indifferent, and how much of it is one unit (a score of 0.73 instead of 0.5).
_RADIUS = (6.0, 0.3)  # pixels; the world's smallest object has 7.5
_OVERLAP = (0.70, 0.012)
_STRAY = (0.035, -0.005)
_LEAD = (0.045, 0.010)
_IMPURITY = (0.55, -0.10)
_CLEARANCE = (0.78, 0.03)


# --- colour ----------------------------------------------------------------------------------------------------------
@cache
def _palette() -> tuple[Array, Array]:
    """Middles and half widths (8, 3) of the palette's hue, saturation and value ranges."""
    low, high = np.moveaxis(np.array(list(COLOURS.values()), np.float32), -1, 0)
    return (low + high) / np.float32(2), (high - low) / np.float32(2)


def colour_excess(rgb: Array) -> Array:
    """How far tones (N, 3), 0..255, lie outside each palette colour, (N, 8), in tolerances: 0 is inside."""
    hsv = cv2.cvtColor(rgb[None].astype(np.float32) / 255, cv2.COLOR_RGB2HSV)[0, :, None]  # hue 0..360, others 0..1
    middle, half = _palette()
    off = np.abs(hsv - middle)
    off[..., 0] = np.minimum(off[..., 0], 360 - off[..., 0])
    off = np.maximum(off - half, 0) / _TOLERANCE
    off[..., 1] *= hsv[..., 2]
    return off.max(-1)


@cache
def _colour_table() -> NDArray[np.uint8]:
    """For each tone in steps of 4 (64 ** 3 of them): the palette colour it goes by, or 255 for none."""
    steps = np.arange(64, dtype=np.float32) * 4 + 1.5
    excess = colour_excess(np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3))
    return np.where(excess.min(-1) < 1, excess.argmin(-1), 255).astype(np.uint8)


def palette_index(picture: NDArray[Any]) -> NDArray[np.uint8]:
    """The palette colour (by its place in ``COLOURS``) of each pixel of (H, W, 3), or 255 for none; shape (H, W)."""
    r, g, b = (picture[..., i].astype(np.int32) >> 2 for i in range(3))
    return _colour_table()[(r << 12) | (g << 6) | b]


# --- background ------------------------------------------------------------------------------------------------------
@cache
def _surface() -> Array:
    """The six quadratic polynomials (6, SIZE, SIZE) over the picture."""
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y]).astype(np.float32)


def fit_background(picture: Array, rounds: int = 4) -> Array | None:
    """The smooth background (SIZE, SIZE, 3) of a picture, 0..255; None if too little of it has a background's tone.

    Backgrounds are the tones of middle value and low saturation. Least squares on every fourth pixel, repeated without
    the outliers.
    """
    pixels = np.ascontiguousarray(picture[::2, ::2].reshape(-1, 3).T)  # (3, N), the long axis last for speed
    basis = _surface()[:, ::2, ::2].reshape(6, -1)
    high, low = pixels.max(0), pixels.min(0)
    inlier = (high > 95) & (high < 212) & (high - low < 0.42 * high)
    for _ in range(rounds):
        if inlier.sum() < 0.15 * inlier.size:
            return None
        known = basis * inlier
        weights = np.linalg.solve(known @ known.T, known @ pixels.T)  # (6, 3)
        error = np.abs(pixels - weights.T @ basis).max(0)
        inlier = error < max(3 * float(np.median(error[inlier])), 8.0)
    return np.einsum("kc,khw->hwc", weights, _surface(), optimize=True)


# --- objects ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Ink:
    """One object's share of a picture: coverage and distance from the background in a window of it.

    ``coverage`` (h, w) is 0 (background, or another's pixel) to 1 (the object's tone); ``unlike`` (h, w) is how far the
    pixel is from the background's tone, 0..442; ``left`` and ``top`` place the window in the picture.
    """

    colour: str
    impurity: float
    coverage: Array
    unlike: Array
    left: int
    top: int

    @cached_property
    def area(self) -> float:
        """Covered area in pixels."""
        return float(self.coverage.sum())

    @cached_property
    def centroid(self) -> tuple[float, float]:
        """Centre of the covered area in the picture's pixels."""
        height, width = self.coverage.shape
        x = float(self.coverage.sum(0) @ np.arange(width, dtype=np.float32)) / self.area
        y = float(self.coverage.sum(1) @ np.arange(height, dtype=np.float32)) / self.area
        return x + self.left + 0.5, y + self.top + 0.5


def _hearts(picture: NDArray[np.uint8]) -> list[tuple[int, Mask]]:
    """Connected areas (SIZE, SIZE) of one palette colour, thick enough not to be the seam between two tones."""
    index = palette_index(cv2.medianBlur(picture, 3))
    hearts: list[tuple[int, Mask]] = []
    for colour in range(len(COLOURS)):
        area = (index == colour).astype(np.uint8)
        if area.sum() < _HEART:
            continue
        area = cv2.morphologyEx(area, cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
        count, labels, stats, _ = cv2.connectedComponentsWithStats(area, connectivity=4)
        hearts += [(colour, labels == k) for k in range(1, count) if stats[k, cv2.CC_STAT_AREA] >= _HEART]
    return hearts


def _objects(picture: NDArray[np.uint8], background: Array) -> Iterator[_Ink]:
    """Each heart with the pixels that are nearer to it than to any other, where they are enough for a shape."""
    hearts = _hearts(picture)
    if not hearts:
        return
    distance = np.stack([cv2.distanceTransform((~h).astype(np.uint8), cv2.DIST_L2, 3) for _, h in hearts])
    owner, nearest = distance.argmin(0), distance.min(0)
    tones = picture.astype(np.float32)
    for k, (colour, heart) in enumerate(hearts):
        own = (owner == k) & (nearest <= _NEAR)
        rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        tone = np.median(tones[heart], axis=0)
        coverage, unlike = _unmix(tones[window], background[window], tone)
        impurity = float(colour_excess(tone[None])[0, colour])
        name = list(COLOURS)[colour]
        ink = _Ink(name, impurity, coverage * own[window], unlike, int(columns[0]), int(rows[0]))
        if ink.area >= _LEAST_AREA:
            yield ink


def _unmix(tones: Array, background: Array, tone: Array) -> tuple[Array, Array]:
    """Coverage (h, w) in 0..1 by an object of the given tone, and distance (h, w) from the background.

    A pixel between the two tones is covered in part, with a tenth of slack at either end for noise. One far from the
    line between them (30 levels; 60 is foreign) is something else and counts as uncovered.
    """
    span, step = tone - background, tones - background
    covered = np.einsum("hwc,hwc->hw", step, span) / np.maximum(np.einsum("hwc,hwc->hw", span, span), 1)
    rest = step - covered[..., None] * span
    foreign = np.sqrt(np.einsum("hwc,hwc->hw", rest, rest))
    coverage = np.clip((covered - 0.1) / 0.8, 0, 1) * np.clip((60 - foreign) / 30, 0, 1)
    return coverage, np.sqrt(np.einsum("hwc,hwc->hw", step, step))


# --- shapes ----------------------------------------------------------------------------------------------------------
_MODEL_RADIUS = 28.0  # pixels of the drawing a shape is measured from
_MODEL_PAD = 16  # pixels around that drawing
_MODEL_GRID = 160  # side of the distance field
_MODEL_REACH = (SIZE / 2 + _MODEL_PAD) / _MODEL_RADIUS  # half the field's side, in radii


@dataclass(frozen=True)
class _Shape:
    """A shape of radius 1 at the origin: signed distance to its outline (positive inside), area and centroid."""

    name: str
    field: Array
    area: float
    centroid: tuple[float, float]

    def distance(self, x: float, y: float, radius: float, ink: _Ink) -> Array:
        """Signed distance in pixels to the outline of the shape at (x, y), over the window of ``ink``."""
        scale = _MODEL_GRID / (2 * _MODEL_REACH * radius)
        middle = (_MODEL_GRID - 1) / 2
        rows = [[scale, 0, (ink.left + 0.5 - x) * scale + middle], [0, scale, (ink.top + 0.5 - y) * scale + middle]]
        height, width = ink.coverage.shape
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        field = cv2.warpAffine(
            self.field, np.array(rows, np.float32), (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE
        )
        return field * radius


@cache
def _shapes() -> tuple[_Shape, ...]:
    return tuple(_measure(name) for name in SHAPES)


def _measure(name: str) -> _Shape:
    window, mask = shape_mask(name, SIZE / 2, SIZE / 2, _MODEL_RADIUS)
    drawing = np.zeros((SIZE, SIZE), np.float32)
    drawing[window] = mask
    across = (np.arange(SIZE, dtype=np.float32) + 0.5 - SIZE / 2) / _MODEL_RADIUS
    total = float(drawing.sum())
    centroid = (float(drawing.sum(0) @ across) / total, float(drawing.sum(1) @ across) / total)
    scale = 8
    large = cv2.resize(np.pad(drawing, _MODEL_PAD), None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    inside = (large > 0.5).astype(np.uint8)
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, 5) - cv2.distanceTransform(1 - inside, cv2.DIST_L2, 5)
    field = cv2.resize(distance / (scale * _MODEL_RADIUS), (_MODEL_GRID, _MODEL_GRID), interpolation=cv2.INTER_AREA)
    return _Shape(name, np.asarray(field, np.float32), total / _MODEL_RADIUS**2, centroid)


@dataclass(frozen=True)
class _Fit:
    """A shape laid over an object: centre and radius in pixels, its distances to the outline, the overlap 0..1."""

    shape: str
    x: float
    y: float
    radius: float
    distance: Array
    overlap: float


def _fit(shape: _Shape, ink: _Ink) -> _Fit:
    """The shape with the object's area and centroid, which neither softness nor noise displaces.

    The overlap is the soft intersection over union of two equal areas; the outline may be one or two pixels soft.
    """
    radius = math.sqrt(ink.area / shape.area)
    x, y = ink.centroid[0] - shape.centroid[0] * radius, ink.centroid[1] - shape.centroid[1] * radius
    distance = shape.distance(x, y, radius, ink)
    shared = max(_shared(ink.coverage, distance / softness + 0.5) for softness in (1.0, 2.0))
    return _Fit(shape.name, x, y, radius, distance, shared / (2 * ink.area - shared))


def _shared(a: Array, b: Array) -> float:
    """Area common to two coverages, the second of which need not be clipped."""
    return float(np.maximum(np.minimum(a, b), 0).sum())


def _stray(fit: _Fit, ink: _Ink) -> float:
    """Area, as a share of the object's, that is more than 1.2 pixels on the wrong side of the outline.

    A wavering outline leaves little there; a cut, a bulge or a hole leaves much, however large the overlap.
    """
    outside, inside = fit.distance < -1.2, fit.distance > 1.2
    return float(ink.coverage[outside].sum() + (1 - ink.coverage[inside]).sum()) / ink.area


def _clearance(fit: _Fit, ink: _Ink) -> float:
    """Share 0..1 of the ring from 1.5 to 3.5 pixels outside the outline that is background."""
    ring = (fit.distance < -1.5) & (fit.distance > -3.5)
    return float(ring[ink.unlike < 40].sum()) / max(int(ring.sum()), 1)


def _score(best: _Fit, second: _Fit, ink: _Ink) -> float:
    """Confidence 0..1 that the object is what ``best`` says: the weakest piece of evidence decides."""
    evidence = (
        (best.radius, _RADIUS),
        (best.overlap, _OVERLAP),
        (_stray(best, ink), _STRAY),
        (best.overlap - second.overlap, _LEAD),
        (ink.impurity, _IMPURITY),
        (_clearance(best, ink), _CLEARANCE),
    )
    weakest = min((value - middle) / unit for value, (middle, unit) in evidence)
    return 1 / (1 + math.exp(-max(weakest, -30.0)))


def detect_shapes(picture: NDArray[np.uint8]) -> list[Detection]:
    """The shapes of an RGB picture (64, 64, 3): labels of ``SHAPES``, colours of ``COLOURS``, the outlines' boxes."""
    background = fit_background(picture.astype(np.float32))
    if background is None:
        return []
    found = []
    for ink in _objects(picture, background):
        best, second = sorted((_fit(shape, ink) for shape in _shapes()), key=lambda fit: -fit.overlap)[:2]
        box = Thing(best.shape, ink.colour, best.x, best.y, best.radius, (0, 0, 0)).box
        found.append(Detection(best.shape, box, _score(best, second, ink), ink.colour))
    return found


class ShapesDetector:
    """The miniature's detector, as :class:`flowopd_eval.scorers.geneval.Detector`.

    Pictures of another size are resized to 64x64 by area averaging (Pillow's BOX), whatever their proportions; boxes
    come back in the picture's own pixels. About a millisecond a picture; the result depends on nothing but the pixels.
    """

    def identity(self) -> Mapping[str, Any]:
        """Name and version; the version changes whenever a verdict could."""
        return {"name": "shapes", "version": VERSION, "size": SIZE}

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """The shapes of each RGB picture, with their colours."""
        return [_detect_image(image) for image in images]

    def classify_colours(
        self, images: Sequence[Image.Image], queries: Sequence[Sequence[Detection]]
    ) -> list[list[str]]:
        """The colours of asked-for detections: of the object that these pictures show at their place, or ``unclear``.

        Only a protocol in which the detector saw the pictures in other colours asks: :meth:`detect` tells colours.
        """
        return [
            [_colour_at(detection.box, seen) for detection in asked]
            for asked, seen in zip(queries, self.detect(images), strict=True)
        ]


def _colour_at(box: Box, seen: Sequence[Detection]) -> str:
    nearest = max(seen, key=lambda detection: box_iou(box, detection.box), default=None)
    return str(nearest.colour) if nearest and box_iou(box, nearest.box) > 0.5 else "unclear"


def _detect_image(image: Image.Image) -> list[Detection]:
    if image.size == (SIZE, SIZE):
        return detect_shapes(np.asarray(image))
    sx, sy = image.width / SIZE, image.height / SIZE
    found = detect_shapes(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX)))
    return [_scaled(detection, sx, sy) for detection in found]


def _scaled(detection: Detection, sx: float, sy: float) -> Detection:
    x1, y1, x2, y2 = detection.box
    return replace(detection, box=(x1 * sx, y1 * sy, x2 * sx, y2 * sy))
