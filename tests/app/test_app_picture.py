"""The comparison's PNG: whole, and its settings come back from it and from no other."""

import io
import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from app.picture import CHUNK, enlarged, file_name, read_comparison, write_comparison
from app.wanted import wanted
from flowopd_eval.errors import RequestError
from flowopd_eval.records import Score

ASKED = wanted({"prompt": 'a sign that says "TEA" — größer', "seed": 9, "arms": ["base", "ocr"], "steps": 3})


def noise(seed, side=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def identity(name):
    sampling = {
        "steps": 3,
        "guidance": 4.5,
        "width": 64,
        "height": 64,
        "sampler": "euler",
        "shift": 3.0,
        "dtype": "float32",
    }
    return {"model": name, "base_sha256": "ab" * 32, "adapter_sha256": None, "sampling": sampling}


def sheet_of(prompt):
    """The PNG of one picture for a prompt."""
    asked = wanted({"prompt": prompt, "seed": 9, "arms": ["base"]})
    return write_comparison(
        "tiny", asked, {"base": noise(1)}, {"base": identity("base")}, {"base": {}}, {"base": [("Text: 1.00", False)]}
    )


@pytest.fixture
def saved(tmp_path):
    arms = {"base": noise(1), "ocr": noise(2)}
    png = write_comparison(
        "tiny",
        ASKED,
        arms,
        {arm: identity(arm) for arm in arms},
        {"base": {"ocr": Score(0.5)}, "ocr": {"ocr": Score(None, error="no reader")}},
        {"base": [("Text: 0.50, reads “TE”", True)], "ocr": [("Text: not judged: no reader " * 9, False)]},
    )
    path = tmp_path / "comparison.png"
    path.write_bytes(png)
    return path


def rewritten(path, change, pixels=lambda picture: None):
    """The PNG with its settings, its pixels or both changed."""
    with Image.open(path) as picture:
        picture.load()
        text = picture.text[CHUNK]
    pixels(picture)
    chunks = PngImagePlugin.PngInfo()
    changed = change(text)
    if changed is not None:
        chunks.add_itxt(CHUNK, changed)
    picture.save(path, pnginfo=chunks)
    return path


def edited(**fields):
    return lambda text: json.dumps({**json.loads(text), **fields})


def test_settings_and_scores_come_back(saved):
    read = read_comparison(saved)
    assert read.settings == ASKED
    assert read.family == "tiny"
    assert read.scores == {"base": {"ocr": 0.5}, "ocr": {"ocr": None}}
    assert read.drawn["ocr"] == identity("ocr")


def test_the_pictures_stand_in_it_pixel_by_pixel(saved):
    sheet = np.asarray(Image.open(saved))
    for picture in (noise(1), noise(2)):
        large = np.asarray(enlarged(picture))
        assert large.shape == (320, 320, 3)
        corners = np.argwhere((sheet[:-319, :-319] == large[0, 0]).all(-1))
        assert any(np.array_equal(sheet[y : y + 320, x : x + 320], large) for y, x in corners)


@pytest.mark.parametrize(
    ("prompt", "legible"),
    [
        ("a 狗猫 on a 🎯, größer", "a [U+72D7 U+732B] on a [U+1F3AF], größer"),
        ("犬 and 犬", "[U+72AC] and [U+72AC]"),
    ],
)
def test_what_the_font_lacks_stands_there_as_code_points_and_is_kept_as_text(prompt, legible, tmp_path):
    (tmp_path / "saved.png").write_bytes(sheet_of(prompt))
    seen, expected = (np.asarray(Image.open(io.BytesIO(sheet_of(one)))) for one in (prompt, legible))
    assert np.array_equal(seen, expected)
    assert read_comparison(tmp_path / "saved.png").settings.prompt == prompt


@pytest.mark.parametrize(("side", "least", "wide"), [(64, 320, 320), (64, 512, 512), (100, 320, 400), (512, 320, 512)])
def test_enlarging_multiplies_every_pixel_by_a_whole_number(side, least, wide):
    picture = noise(3, side)
    large = np.asarray(enlarged(picture, least))
    factor = wide // side
    assert large.shape[0] == wide
    assert np.array_equal(large, np.asarray(picture).repeat(factor, 0).repeat(factor, 1))


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a photo of a red circle", "flow-opd-a-photo-of-a-red-circle-9.png"),
        ('A sign that says "TEA"!', "flow-opd-a-sign-that-says-tea-9.png"),
        ("../../etc/passwd\\x", "flow-opd-etc-passwd-x-9.png"),
        ("größer", "flow-opd-gr-er-9.png"),
        ("狗", "flow-opd-9.png"),
        ("x" * 400, f"flow-opd-{'x' * 40}-9.png"),
        ("x" * 39 + " y", f"flow-opd-{'x' * 39}-9.png"),
    ],
)
def test_a_saved_file_is_called_by_its_prompts_first_words_and_its_seed(prompt, name):
    assert file_name(wanted({"prompt": prompt, "seed": 9, "arms": ["base"]})) == name


def test_a_copy_saved_again_without_change_is_still_one(saved):
    assert read_comparison(rewritten(saved, lambda text: text)).settings == ASKED


@pytest.mark.parametrize(
    "change",
    [
        edited(schema_version=2),
        edited(family=7),
        edited(extra="field"),
        edited(settings={**ASKED.model_dump(), "prompt": "x" * 5000}),
        edited(settings={**ASKED.model_dump(), "seed": -1}),
        edited(settings={**ASKED.model_dump(), "seed": "9"}),
        edited(settings={**ASKED.model_dump(), "arms": ["a"] * 50}),
        edited(settings={**ASKED.model_dump(), "steps": 10**9}),
        edited(settings={**ASKED.model_dump(), "path": "/etc/passwd"}),
        lambda text: text[:-20],
        lambda text: "[" * 100_000,
        lambda text: "null",
    ],
)
def test_settings_that_are_not_as_they_were_written_are_refused(saved, change):
    with pytest.raises(RequestError, match=r"not as this page writes them|not a PNG"):
        read_comparison(rewritten(saved, change))


def test_a_picture_painted_over_is_told_apart(saved):
    path = rewritten(saved, lambda text: text, lambda picture: picture.putpixel((40, 90), (1, 2, 3)))
    with pytest.raises(RequestError, match="changed after it was saved"):
        read_comparison(path)


def test_a_foreign_png_says_that_it_carries_nothing(tmp_path):
    noise(1).save(tmp_path / "foreign.png")
    with pytest.raises(RequestError, match="carries no settings"):
        read_comparison(tmp_path / "foreign.png")


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "text", "cut", "empty"])
def test_what_is_no_png_is_named_so(saved, tmp_path, kind):
    path = tmp_path / "other.png"
    if kind in ("JPEG", "GIF"):
        noise(1).save(path, format=kind)
    else:
        path.write_bytes({"text": b"<svg/>", "cut": saved.read_bytes()[:3000], "empty": b""}[kind])
    with pytest.raises(RequestError, match="not a PNG picture, or a damaged one"):
        read_comparison(path)


def test_a_small_file_of_many_pixels_is_not_unpacked(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, format="PNG")
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb.getvalue())
    with pytest.raises(RequestError, match="not a PNG picture"):
        read_comparison(path)


def test_text_that_unpacks_to_a_flood_is_not_unpacked(saved, tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(CHUNK, "x" * 80_000_000, zip=True)
    path = tmp_path / "flood.png"
    noise(1).save(path, pnginfo=chunks)
    with pytest.raises(RequestError, match="not a PNG picture"):
        read_comparison(path)
