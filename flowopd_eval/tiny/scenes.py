"""The miniature's world: 64x64 scenes of flat shapes and signs, with captions of GenEval's six kinds.

Everything is drawn from a seed: scene ``i`` of seed ``s`` is the same picture on every machine with the same
Pillow and numpy. The world is small on purpose. Five shapes, eight colours (GenEval's ten without pink and brown,
which at 64 pixels and with varied hues cannot be told from red and orange), six soft graded backgrounds, and signs
that show one of a closed list of short words in DejaVu Sans Bold.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flowopd_eval.prompts import article, plural

SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "cross")
# colour -> (hue range in degrees, saturation range, value range), HSV
COLOURS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-6, 6), (0.85, 0.98), (0.78, 0.92)),
    "orange": ((25, 33), (0.88, 1.0), (0.93, 1.0)),
    "yellow": ((51, 58), (0.82, 0.98), (0.93, 1.0)),
    "green": ((115, 140), (0.70, 0.95), (0.48, 0.68)),
    "blue": ((213, 230), (0.78, 0.95), (0.68, 0.92)),
    "purple": ((274, 290), (0.60, 0.85), (0.55, 0.75)),
    "black": ((0, 360), (0.0, 0.10), (0.03, 0.10)),
    "white": ((0, 360), (0.0, 0.02), (0.97, 1.0)),
}
# place -> the two HSV colours between which its background is graded
PLACES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "sand": ((40, 0.24, 0.76), (34, 0.28, 0.62)),
    "mist": ((210, 0.03, 0.76), (210, 0.06, 0.60)),
    "slate": ((215, 0.16, 0.56), (220, 0.22, 0.44)),
    "moss": ((95, 0.18, 0.66), (110, 0.22, 0.52)),
    "dusk": ((285, 0.14, 0.66), (260, 0.18, 0.52)),
    "clay": ((14, 0.22, 0.68), (10, 0.26, 0.54)),
}
PREFIXES = ("a photo of", "a picture of", "a drawing of")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SIGN_TASK = "ocr"
WORDS = tuple(
    "BAR BUS CAFE CAR CAT CITY COLD DOG DOOR EAST EXIT FARM FISH FOOD FREE GAME GOLD HELP HOME HOT ICE INN JAZZ KEY "
    "LAKE LEFT LOVE MAIL MAP MENU MILK MOON NEW OPEN OUT PARK PAY PUB QUIZ RAIN RED ROAD SALE SHOP SKY SOUP STAR STOP "
    "SUN TAXI TEA TOWN UP VAN WEST WIFI WINE YES ZOO".split()
)

# The suite asks for these as well, and no scene of the base's pre-training shows one: they must be spelt, not recalled.
NEW_WORDS = tuple(
    "ANT ARM BANK BEE BELL BIRD BLUE BOAT BOOK BOX CAKE CORN COW DESK DUCK EGG FIRE FLAG FOX GATE HALL HAND HAT IRON "
    "JAM JUMP KING LAMP LEG LION MEAT MUD NEST NOON NUT OAK OVEN OWL PEAR PIG POOL RICE RING ROSE ROW SALT SEA SHIP "
    "SNOW SONG TEN TOP TREE VASE WALL WEB WOLF WOOD YARD ZERO ZIP".split()
)

# Everything stands on the grid of the transformer's patches, in one size: a small model then meets each edge in one
# phase, and its tokens have little to agree on but what stands where.
_GRID = 8
# Half extent in pixels, by the number of objects in the scene.
_RADII = {1: 12.0, 2: 10.0, 3: 8.0, 4: 8.0}
_GAP = 3.0  # least distance between two bounding boxes, pixels
_MARGIN = 2.5  # least distance from a bounding box to the border, pixels
_SUPERSAMPLING = 8


@dataclass(frozen=True)
class Thing:
    """One shape of a scene: what it is, where its centre lies (pixels), its half extent and its RGB colour."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Tight bounding box ``(x1, y1, x2, y2)`` in pixels."""
        points = _outline(self.shape, self.x, self.y, self.radius)
        if points is None:
            return (self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        return (min(xs), min(ys), max(xs), max(ys))


@dataclass(frozen=True)
class Sign:
    """A board with a word on it: centre and half extents of the board in pixels, colours as RGB."""

    word: str
    x: float
    y: float
    half_width: float
    half_height: float
    board: tuple[int, int, int]
    ink: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """A scene before it is drawn. ``include`` and ``exclude`` are GenEval clauses that hold for it by construction."""

    caption: str
    task: str
    place: str
    angle: float
    things: tuple[Thing, ...] = ()
    sign: Sign | None = None
    include: tuple[dict, ...] = ()
    exclude: tuple[dict, ...] = ()


def _uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(rng.uniform(*bounds))


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    r, g, b = colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value)
    return (round(r * 255), round(g * 255), round(b * 255))


def colour_rgb(rng: np.random.Generator, name: str) -> tuple[int, int, int]:
    """One RGB tone (0..255) that goes by the colour ``name``."""
    return _rgb(*(_uniform(rng, bounds) for bounds in COLOURS[name]))


def _scatter(rng: np.random.Generator, radii: Sequence[float]) -> list[tuple[float, float]] | None:
    """Centres on the grid for shapes of the given radii whose boxes keep clear of each other and of the border."""
    centres: list[tuple[float, float]] = []
    for index, radius in enumerate(radii):
        low, high = math.ceil((_MARGIN + radius) / _GRID), math.floor((SIZE - _MARGIN - radius) / _GRID)
        for _ in range(60):
            x, y = rng.integers(low, high + 1, 2) * _GRID
            clear = (
                max(abs(x - cx), abs(y - cy)) >= radius + radii[j] + _GAP for j, (cx, cy) in enumerate(centres[:index])
            )
            if all(clear):
                centres.append((float(x), float(y)))
                break
        else:
            return None
    return centres


def _place_things(rng: np.random.Generator, count: int) -> tuple[list[float], list[tuple[float, float]]]:
    while True:
        radii = [_RADII[count]] * count
        centres = _scatter(rng, radii)
        if centres is not None:
            return radii, centres


def _place_pair(rng: np.random.Generator, relation: str) -> tuple[list[float], list[tuple[float, float]]]:
    """Two objects, the first standing in ``relation`` to the second, clearly on that axis."""
    axis = 0 if relation in ("left of", "right of") else 1
    sign = -1 if relation in ("left of", "above") else 1
    while True:
        radii, centres = _place_things(rng, 2)
        offset = (centres[0][0] - centres[1][0], centres[0][1] - centres[1][1])
        if abs(offset[axis]) < radii[0] + radii[1] + _GAP or abs(offset[1 - axis]) > 0.45 * abs(offset[axis]):
            continue
        return radii, centres if offset[axis] * sign > 0 else _mirror(centres)


def _mirror(centres: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(SIZE - x, SIZE - y) for x, y in centres]


def _noun(colour: str | None, shape: str) -> str:
    return f"{colour} {shape}" if colour else shape


def _clause(shape: str, colour: str | None, count: int = 1) -> dict:
    clause: dict = {"class": shape, "count": count}
    if colour:
        clause["color"] = colour
    return clause


def sample_scene(rng: np.random.Generator, task: str | None = None, sign_share: float = 0.2) -> Scene:
    """Draw one scene.

    Args:
        rng: source of all choices.
        task: one of :data:`TASKS` or ``"ocr"``; None draws a sign with probability ``sign_share``, else a task
            uniformly.
        sign_share: probability of a sign, 0..1.

    The captions are GenEval's, with a prefix out of three and, half of the time, a place. For training, half of the
    captions of the tasks that name no colour name it all the same, so that colour and shape bind early.
    """
    if task is None:
        task = SIGN_TASK if rng.random() < sign_share else TASKS[rng.integers(len(TASKS))]
    place = list(PLACES)[rng.integers(len(PLACES))]
    angle = _uniform(rng, (0.0, 2 * math.pi))
    where = f" on {place}" if rng.random() < 0.5 else ""
    if task == SIGN_TASK:
        sign = _sample_sign(rng)
        return Scene(f'a sign that says "{sign.word}"{where}', task, place, angle, sign=sign)

    prefix = PREFIXES[rng.integers(len(PREFIXES))]
    count = {"counting": int(rng.integers(2, 5)), "single_object": 1, "colors": 1}.get(task, 2)
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:2]]
    colours: list[str] = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:2]]
    told = task in ("colors", "color_attr") or rng.random() < 0.5
    if task == "counting":
        shapes, colours = shapes[:1] * count, colours[:1] * count
    named = [c if told else None for c in colours]
    relation = RELATIONS[rng.integers(4)]
    radii, centres = _place_pair(rng, relation) if task == "position" else _place_things(rng, count)
    rgbs = [colour_rgb(rng, c) for c in colours]
    if task == "counting":
        rgbs = rgbs[:1] * count
    things = tuple(
        Thing(s, c, x, y, r, rgb) for s, c, (x, y), r, rgb in zip(shapes, colours, centres, radii, rgbs, strict=False)
    )
    caption, include, exclude = describe(task, shapes, named, count, relation)
    return Scene(f"{prefix} {caption}{where}", task, place, angle, things, None, include, exclude)


def describe(
    task: str, shapes: Sequence[str], colours: Sequence[str | None], count: int = 1, relation: str = ""
) -> tuple[str, tuple[dict, ...], tuple[dict, ...]]:
    """The noun phrase of a GenEval caption with its ``include`` and ``exclude`` clauses, in GenEval's order."""
    first, second = _noun(colours[0], shapes[0]), _noun(colours[-1], shapes[-1])
    if task in ("single_object", "colors"):
        return article(first), (_clause(shapes[0], colours[0]),), ()
    if task == "counting":
        caption = f"{NUMBERS[count]} {plural(first)}"
        return caption, (_clause(shapes[0], colours[0], count),), ({"class": shapes[0], "count": count + 1},)
    if task == "position":  # GenEval lists the reference object first
        target = _clause(shapes[0], colours[0]) | {"position": [relation, 0]}
        return f"{article(first)} {relation} {article(second)}", (_clause(shapes[1], colours[1]), target), ()
    include = (_clause(shapes[0], colours[0]), _clause(shapes[1], colours[1]))
    return f"{article(first)} and {article(second)}", include, ()


_BOARDS = (("white", "black"), ("yellow", "black"), ("green", "white"), ("blue", "white"), ("red", "white"))


def _sample_sign(rng: np.random.Generator) -> Sign:
    word = WORDS[rng.integers(len(WORDS))]
    board, ink = _BOARDS[rng.integers(len(_BOARDS))]
    y = SIZE // 2 + 4 * int(rng.integers(-2, 3))
    return Sign(word, SIZE / 2, float(y), 29.0, 14.0, colour_rgb(rng, board), colour_rgb(rng, ink))


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]] | None:
    """Polygon of ``shape`` in pixels; None for the circle, which has its own primitive."""
    if shape == "circle":
        return None
    if shape == "square":
        a = 0.86 * r
        return [(x - a, y - a), (x + a, y - a), (x + a, y + a), (x - a, y + a)]
    if shape == "triangle":
        return [(x, y - 0.92 * r), (x + r, y + 0.82 * r), (x - r, y + 0.82 * r)]
    if shape == "cross":
        a, b = 0.96 * r, 0.32 * r
        corners = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b)]
        return [(x + dx, y + dy) for dx, dy in [*corners, (-a, -b), (-b, -b)]]
    if shape == "star":
        spokes = [(1.08 * r if k % 2 == 0 else 0.46 * r, math.pi * (k / 5 - 0.5)) for k in range(10)]
        return [(x + radius * math.cos(t), y + 0.06 * r + radius * math.sin(t)) for radius, t in spokes]
    raise ValueError(f"Unknown shape {shape!r}; expected one of {', '.join(SHAPES)}.")


Window = tuple[slice, slice]


def _window(x1: float, y1: float, x2: float, y2: float) -> tuple[Window, int, int]:
    """The whole pixels that a box touches, as slices into (SIZE, SIZE), with the window's left and top pixel."""
    left, top = max(0, math.floor(x1) - 1), max(0, math.floor(y1) - 1)
    right, bottom = min(SIZE, math.ceil(x2) + 1), min(SIZE, math.ceil(y2) + 1)
    return (slice(top, bottom), slice(left, right)), left, top


def shape_mask(shape: str, x: float, y: float, radius: float) -> tuple[Window, np.ndarray]:
    """Anti-aliased coverage (h, w) in 0..1 of one shape, with the window of the scene in which it lies."""
    k = _SUPERSAMPLING
    reach = 1.1 * radius
    window, left, top = _window(x - reach, y - reach, x + reach, y + reach)
    mask = Image.new("L", ((window[1].stop - left) * k, (window[0].stop - top) * k))
    draw = ImageDraw.Draw(mask)
    points = _outline(shape, x, y, radius)
    if points is None:
        corners = [(x - radius, y - radius), (x + radius, y + radius)]
        draw.ellipse([((px - left) * k, (py - top) * k) for px, py in corners], fill=255)
    else:
        draw.polygon([((px - left) * k, (py - top) * k) for px, py in points], fill=255)
    return window, np.asarray(mask.reduce(k), np.float32) / 255


@lru_cache(maxsize=1)
def _font_bytes() -> bytes:
    return resources.files("flowopd_eval.tiny").joinpath("DejaVuSans-Bold-subset.ttf").read_bytes()


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    import io

    return ImageFont.truetype(io.BytesIO(_font_bytes()), size, layout_engine=ImageFont.Layout.BASIC)


def _sign_masks(sign: Sign) -> tuple[Window, np.ndarray, np.ndarray]:
    """Coverage (h, w) of the board and of its letters. The word is as large as its board allows."""
    k = _SUPERSAMPLING // 2
    x1, y1 = sign.x - sign.half_width, sign.y - sign.half_height
    x2, y2 = sign.x + sign.half_width, sign.y + sign.half_height
    window, left, top = _window(x1, y1, x2, y2)
    board = Image.new("L", ((window[1].stop - left) * k, (window[0].stop - top) * k))
    letters = board.copy()
    box = [(x1 - left) * k, (y1 - top) * k, (x2 - left) * k, (y2 - top) * k]
    ImageDraw.Draw(board).rounded_rectangle(box, radius=3 * k, fill=255)
    size = min(20, int(0.88 * 2 * sign.half_width * 20 / _font(20 * k).getlength(sign.word) * k))
    centre = ((sign.x - left) * k, (sign.y - top) * k)
    ImageDraw.Draw(letters).text(centre, sign.word, 255, _font(size * k), anchor="mm")
    return window, np.asarray(board.reduce(k), np.float32) / 255, np.asarray(letters.reduce(k), np.float32) / 255


@lru_cache(maxsize=1)
def _grid() -> tuple[np.ndarray, np.ndarray]:
    axis = np.linspace(-1, 1, SIZE, dtype=np.float32)
    return np.meshgrid(axis, axis)


def background(place: str, angle: float) -> np.ndarray:
    """The graded background (SIZE, SIZE, 3) of a place, 0..255 float; ``angle`` in radians turns the gradient."""
    a, b = (np.asarray(_rgb(*end), np.float32) for end in PLACES[place])
    x, y = _grid()
    ramp = (0.5 + 0.5 * (x * math.cos(angle) + y * math.sin(angle)) / math.sqrt(2))[..., None]
    return a * (1 - ramp) + b * ramp


def draw_scene(scene: Scene) -> np.ndarray:
    """The scene as uint8 RGB of shape (SIZE, SIZE, 3)."""
    canvas = background(scene.place, scene.angle)
    layers = [(*shape_mask(t.shape, t.x, t.y, t.radius), t.rgb) for t in scene.things]
    if scene.sign is not None:
        window, board, letters = _sign_masks(scene.sign)
        layers += [(window, board, scene.sign.board), (window, letters, scene.sign.ink)]
    for window, mask, rgb in layers:
        canvas[window] += mask[..., None] * (np.asarray(rgb, np.float32) - canvas[window])
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
