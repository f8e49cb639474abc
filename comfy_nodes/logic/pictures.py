"""ComfyUI's IMAGE batches, (B, H, W, 3) in 0..1, with labels, boxes and read-outs drawn on them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .errors import PackError

if TYPE_CHECKING:
    from PIL import Image, ImageFont

INK, PAPER, PAD = (20, 20, 20), (245, 245, 245), 4
_BOXES = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189), (140, 86, 75))


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """A batch (B, H, W, 3) in 0..1 as PIL pictures, rounded to the nearest of 256 levels."""
    from PIL import Image

    if images.ndim != 4 or images.shape[-1] < 3:
        raise PackError(f"Expected an IMAGE batch (B, H, W, 3), but got {tuple(images.shape)}.")
    levels = (images[..., :3].detach().float().cpu().clamp(0, 1) * 255).round().byte().numpy()
    return [Image.fromarray(picture) for picture in levels]


def to_images(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """PIL pictures of one size as a batch (B, H, W, 3), fp32 in 0..1."""
    return torch.from_numpy(np.stack([np.asarray(p.convert("RGB"), dtype=np.float32) / 255 for p in pictures]))


def labelled(images: torch.Tensor, labels: Sequence[str]) -> torch.Tensor:
    """Each picture under a strip with its label: (B, H + strip, W, 3); below the strip nothing is changed.

    Raises:
        PackError: as many labels as pictures are needed.
    """
    if len(labels) != len(images):
        raise PackError(f"{len(images)} pictures, but {len(labels)} labels.")
    width = images.shape[2]
    strips = to_images(_strips(labels, width, max(12, width // 24))).to(images)
    return torch.cat([strips, images[..., :3]], dim=1)


def card(text: str, like: torch.Tensor) -> torch.Tensor:
    """Paper with wrapped ``text`` in the place of the pictures ``like`` (B, H, W, 3): as many, of the same size."""
    from PIL import Image

    count, height, width, _ = like.shape
    picture = Image.new("RGB", (width, height), PAPER)
    picture.paste(_strips([text], width, max(10, width // 32))[0])
    return to_images([picture] * count).to(like)


def grid(images: torch.Tensor, columns: int) -> torch.Tensor:
    """A batch (B, H, W, 3) as one picture (1, rows * H, columns * W, 3), row by row; empty cells are paper."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    cells = images.new_full((rows * columns, height, width, channels), PAPER[0] / 255)
    cells[:count] = images
    return (
        cells.view(rows, columns, height, width, channels)
        .permute(0, 2, 1, 3, 4)
        .reshape(1, rows * height, columns * width, channels)
    )


def annotated(
    images: torch.Tensor, boxes: Sequence[Mapping[str, Sequence[Sequence[float]]]], lines: Sequence[str]
) -> torch.Tensor:
    """Each picture with its boxes, over a strip with its line of text; one strip height for the whole batch."""
    from PIL import ImageDraw

    width = images.shape[2]
    size = max(12, width // 32)
    pictures = to_pictures(images)
    for picture, found in zip(pictures, boxes, strict=True):
        _draw_boxes(ImageDraw.Draw(picture), found, size)
    strips = to_images(_strips(lines, width, size))
    return torch.cat([to_images(pictures), strips], dim=1)


def _draw_boxes(draw, found: Mapping[str, Sequence[Sequence[float]]], size: int) -> None:  # noqa: ANN001
    font = _font(size)
    for index, (name, rows) in enumerate(sorted(found.items())):
        colour = _BOXES[index % len(_BOXES)]
        for x1, y1, x2, y2, *score in rows:
            draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=max(1, size // 8))
            said = f"{name} {score[0]:.2f}" if score else name
            draw.text((x1 + 2, y1 + 2), said, fill=colour, font=font, stroke_width=1, stroke_fill=PAPER)


def _strips(texts: Sequence[str], width: int, size: int) -> list[Image.Image]:
    """Strips of paper with wrapped text, all as high as the longest needs."""
    from PIL import Image, ImageDraw

    font = _font(size)
    columns = max(8, int((width - 2 * PAD) / max(1.0, font.getlength("n"))))
    wrapped = [textwrap.wrap(text, columns) or [""] for text in texts]
    line = size + PAD
    height = 2 * PAD + line * max(map(len, wrapped))
    strips = []
    for lines in wrapped:
        strip = Image.new("RGB", (width, height), PAPER)
        draw = ImageDraw.Draw(strip)
        for row, text in enumerate(lines):
            draw.text((PAD, PAD + row * line), text, fill=INK, font=font)
        strips.append(strip)
    return strips


def _font(size: int) -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)  # type: ignore[return-value]
