"""A comparison as one labelled PNG that carries its settings, and the settings out of such a PNG."""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from pydantic import BaseModel, ConfigDict, ValidationError

from app.wanted import Wanted, steps_in_words
from flowopd_eval.errors import RequestError
from flowopd_eval.records import Score
from flowopd_eval.store import read_picture

CHUNK = "flow-opd-comparison"  # keyword of the iTXt chunk
_LARGEST = 32 * 2**20  # bytes of a file that is opened at all
_SLUG = 40  # letters of the prompt in the name of a saved file
_CELL = 320  # pixels a picture has at least
_INK, _GREY, _PAPER, _LINE = (26, 26, 30), (98, 98, 108), (255, 255, 255), (222, 222, 228)
_BEST = (20, 122, 82)


class Saved(BaseModel):
    """What stands in the chunk. ``sha256`` is of the picture's pixels: a PNG that was painted over is told apart."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1] = 1
    family: str
    settings: Wanted
    drawn: dict[str, dict[str, Any]]  # arm -> model, hashes, sampling record
    scores: dict[str, dict[str, float | None]]  # arm -> judge -> value
    sha256: str


def enlarged(picture: Image.Image, least: int = _CELL) -> Image.Image:
    """A small picture with every pixel as a square of whole pixels, at least ``least`` wide; a large one as it is."""
    factor = -(-least // picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def write_comparison(
    family: str,
    settings: Wanted,
    pictures: Mapping[str, Image.Image],
    drawn: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Score]],
    lines: Mapping[str, Sequence[tuple[str, bool]]],
) -> bytes:
    """The PNG.

    Args:
        family: of the models.
        settings: what was asked for.
        pictures: arm -> picture, in the order in which they are shown.
        drawn: arm -> model, hashes and sampling record.
        scores: arm -> judge -> score.
        lines: arm -> what stands under its picture, and whether it is the best in that.
    """
    sheet = _sheet(settings, pictures, drawn, lines)
    saved = Saved(
        family=family,
        settings=settings,
        drawn={arm: dict(drawn[arm]) for arm in pictures},
        scores={arm: {flag: score.value for flag, score in scores[arm].items()} for arm in pictures},
        sha256=hashlib.sha256(sheet.tobytes()).hexdigest(),
    )
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(CHUNK, saved.model_dump_json())
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", pnginfo=chunks, optimize=True)
    return buffer.getvalue()


def file_name(settings: Wanted) -> str:
    """What a comparison is called when it is saved: its prompt's first words and its seed."""
    words = re.sub(r"[^a-z0-9]+", "-", settings.prompt.lower()).strip("-")[:_SLUG].rstrip("-")
    return "-".join(filter(None, ("flow-opd", words, str(settings.seed)))) + ".png"


def read_comparison(path: Path) -> Saved:
    """What a comparison's PNG says of itself; nothing in it is taken on trust.

    Raises:
        RequestError: it is no PNG, too large, not one of ours, or not as it was saved.
    """
    if path.stat().st_size > _LARGEST:
        raise RequestError(f"That file is larger than {_LARGEST // 2**20} MB; a comparison never is.")
    try:
        with Image.open(path, formats=("PNG",)) as opened:
            pixels = read_picture(path)
            opened.load()  # text may stand after the pixels
            text = opened.text.get(CHUNK) if isinstance(opened, PngImagePlugin.PngImageFile) else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise RequestError(
            "That is not a PNG picture, or a damaged one. Drop a comparison saved on this page."
        ) from None
    if text is None:
        raise RequestError(
            "That PNG carries no settings. Only a comparison saved on this page does, and only as long as no other "
            "program (a messenger, an editor) has rewritten it."
        )
    try:
        saved = Saved.model_validate_json(text)
    except ValidationError as error:
        places = ", ".join(dict.fromkeys(".".join(map(str, one["loc"])) or "all" for one in error.errors()))
        raise RequestError(f"The settings in that PNG are not as this page writes them ({places[:120]}).") from None
    if hashlib.sha256(pixels.tobytes()).hexdigest() != saved.sha256:
        raise RequestError("That comparison was changed after it was saved: its pixels do not match its settings.")
    return saved


# -------------------------------------------------------------------------------------------------------------- sheet


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in ("DejaVuSans-Bold.ttf",) if bold else ("DejaVuSans.ttf",):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


@lru_cache(maxsize=4096)
def _lacks(font: Any, letter: str) -> bool:
    """Whether the font would draw a letter as it draws what no font has: with a box."""
    return not letter.isspace() and bytes(font.getmask(letter)) == bytes(font.getmask("\U0010ffff"))


def _drawable(text: str, font: Any) -> str:
    """``text`` with what the font lacks as code points: no font is fetched, and rows of boxes would say nothing."""
    parts: list[str] = []
    for lacking, group in groupby(text, lambda letter: _lacks(font, letter)):
        letters = list(group)
        parts += ["[", " ".join(f"U+{ord(one):04X}" for one in letters), "]"] if lacking else letters
    return "".join(parts)


def _sheet(
    settings: Wanted,
    pictures: Mapping[str, Image.Image],
    drawn: Mapping[str, Mapping[str, Any]],
    lines: Mapping[str, Sequence[tuple[str, bool]]],
) -> Image.Image:
    cells = {arm: enlarged(picture) for arm, picture in pictures.items()}
    cell = max(picture.width for picture in cells.values())
    tall = max(picture.height for picture in cells.values())
    unit = max(12, cell // 24)
    gap, columns = unit, min(len(cells), 4)
    rows = -(-len(cells) // columns)
    width = columns * cell + (columns + 1) * gap
    title = _wrapped(settings.prompt, _font(unit + 6, bold=True), width - 2 * gap)
    notes = {arm: [part for line in said for part in _cut(line, unit, cell)] for arm, said in lines.items()}
    head = gap + len(title) * (unit + 14)
    label = (unit + 10) * 2 + max((len(found) for found in notes.values()), default=0) * (unit + 8)
    foot = _wrapped(_footer(settings, drawn), _font(unit - 1), width - 2 * gap)
    height = head + rows * (tall + label + gap) + len(foot) * (unit + 8) + gap
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, line in enumerate(title):
        draw.text((gap, gap + place * (unit + 14)), line, _INK, _font(unit + 6, bold=True))
    for place, (arm, picture) in enumerate(cells.items()):
        x = gap + place % columns * (cell + gap)
        y = head + place // columns * (tall + label + gap)
        sheet.paste(picture, (x, y))
        y += tall + 8
        draw.text((x, y), _fitting(arm, _font(unit + 3, bold=True), cell), _INK, _font(unit + 3, bold=True))
        y += unit + 10
        draw.text((x, y), _fitting(_by(drawn[arm]), _font(unit - 1), cell), _GREY, _font(unit - 1))
        for line, is_best in notes[arm]:
            y += unit + 8
            draw.text((x, y), line, _BEST if is_best else _INK, _font(unit, bold=is_best))
    y = height - gap - len(foot) * (unit + 8)
    draw.line((gap, y - 6, width - gap, y - 6), _LINE)
    for place, line in enumerate(foot):
        draw.text((gap, y + place * (unit + 8)), line, _GREY, _font(unit - 1))
    return sheet


def _by(identity: Mapping[str, Any]) -> str:
    sampling = identity["sampling"]
    return f"{identity['model']} · {steps_in_words(sampling['steps'])}, guidance {sampling['guidance']:g}"


def _footer(settings: Wanted, drawn: Mapping[str, Mapping[str, Any]]) -> str:
    one = next(iter(drawn.values()))
    sampling = one["sampling"]
    return (
        f"Seed {settings.seed}, the same noise for all · {sampling['width']} × {sampling['height']} pixels · "
        f"{sampling['sampler']}, shift {sampling['shift']:g}, {sampling['dtype']} · "
        f"backbone {one['base_sha256'][:12]} · "
        "this file carries its settings"
    )


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """``text`` in lines no wider than ``width``; a word that is wider is broken."""
    text = _drawable(text, font)
    letters = max(8, int(width / (font.getlength("abcdefghij nopqrst") / 18)))
    while True:
        lines = textwrap.wrap(text, letters) or [""]
        if letters <= 8 or all(font.getlength(line) <= width for line in lines):
            return lines
        letters -= 1


def _cut(line: tuple[str, bool], unit: int, width: int) -> list[tuple[str, bool]]:
    text, is_best = line
    return [(part, is_best) for part in _wrapped(text, _font(unit, bold=is_best), width)]


def _fitting(text: str, font: Any, width: int) -> str:
    """``text``, its end replaced by … where it would be wider than ``width``."""
    text = _drawable(text, font)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
