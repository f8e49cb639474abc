"""What the parts of the toolkit hand to one another: frozen, plain, importable without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flowopd_eval.errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[float, float, float, float]

UNKNOWN_SEED = -1  # of pictures that were drawn elsewhere


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file: a stable, unique ``id``, the text, its task, and what its scorer needs besides."""

    id: str
    prompt: str
    task: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def seed(self, base_seed: int, k: int) -> int:
        """Seed of picture ``k`` of this prompt, 0..2**32-1: independent of order, batch, shard and process count."""
        return int(hashlib.sha256(f"{base_seed}|{self.id}|{k}".encode()).hexdigest()[:8], 16)

    def to_json(self) -> dict[str, Any]:
        """The prompt-file line of this prompt."""
        return {"id": self.id, "prompt": self.prompt, "task": self.task, **self.fields}


@dataclass(frozen=True)
class Detection:
    """One object found in a picture.

    ``box`` is ``(x1, y1, x2, y2)`` in pixels, right and bottom exclusive; ``score`` is the detector's confidence in
    0..1; ``colour`` is filled in by a colour classifier for the objects whose colour a prompt asks about.
    """

    label: str
    box: Box
    score: float
    colour: str | None = None


@dataclass(frozen=True)
class Score:
    """What a scorer says of one picture. ``value`` is None when the picture could not be judged; ``error`` says why.

    ``reason`` is one readable sentence a person can check against the picture (empty when there is nothing to say);
    ``detail`` is JSON: boxes, texts, intermediate numbers.
    """

    value: float | None
    reason: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Sample:
    """One line of ``samples.jsonl``: a picture, where it lies, and its score. Nothing in it varies between two runs."""

    id: str
    k: int
    task: str
    prompt: str
    seed: int
    file: str
    sha256: str
    score: float | None = None
    reason: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def which(self) -> str:
        """Which picture of its prompt it is, in words."""
        return f"picture {self.k}, seed {'unknown' if self.seed == UNKNOWN_SEED else self.seed}"

    def to_json(self) -> dict[str, Any]:
        """The line as a dictionary, keys in the order of the fields."""
        return asdict(self)


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval: ``low <= value <= high`` at ``level`` (0.95), from ``n`` pictures."""

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95

    @property
    def half_width(self) -> float:
        """Half the interval's width, in the units of ``value``."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class SamplingRecord:
    """What decides a picture besides model, prompt and seed.

    ``width`` and ``height`` in pixels; ``text_length`` in T5 tokens (0: no T5); ``sampler`` one of ``euler``, ``sde``,
    ``cps``, the latter two with noise level ``a``; ``dtype`` a torch dtype's name.
    """

    steps: int
    guidance: float
    shift: float
    width: int
    height: int
    text_length: int
    sampler: str = "euler"
    a: float = 0.0
    dtype: str = "float32"
    negative_prompt: str = ""


SETTINGS_FILE = "flow_opd.json"  # with a pipeline: its sampling record and its experts; with an adapter: its record
# Stable Diffusion 3.5 Medium as the paper evaluates it (arXiv 2605.08063); text length as in its public code.
SD35_RECORD = SamplingRecord(
    steps=40, guidance=4.5, shift=3.0, width=512, height=512, text_length=128, dtype="bfloat16"
)
# What anything is drawn by here: a record may come from a stranger, and fill the memory.
_DRAWN = {"steps": (1, 1000), "width": (8, 4096), "height": (8, 4096), "text_length": (0, 4096)}
DTYPES = ("float32", "bfloat16", "float16")


def read_settings(folder: Path, source: str) -> dict[str, Any]:
    """What the :data:`SETTINGS_FILE` in ``folder`` says of the pipeline or adapter ``source``; empty without one.

    Raises:
        RequestError: it is no JSON object.
    """
    import json

    path = folder / SETTINGS_FILE
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{SETTINGS_FILE} of {source} is no JSON ({error}): restore it.") from error
    if not isinstance(settings, dict):
        raise RequestError(f"{SETTINGS_FILE} of {source} should hold an object, but holds {type(settings).__name__}.")
    return settings


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the :data:`SETTINGS_FILE` into ``folder``, which must be there."""
    import json

    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def record_of(settings: Mapping[str, Any], source: str) -> SamplingRecord:
    """The sampling record in the ``settings`` of ``source``.

    Raises:
        RequestError: there is none, or none that anything can be drawn by.
    """
    from pydantic import TypeAdapter

    try:
        record = TypeAdapter(SamplingRecord).validate_python(settings["record"])
        if record.dtype not in DTYPES:
            raise ValueError(f"dtype is {record.dtype!r}, and not one of {', '.join(DTYPES)}")
        for name, (least, most) in _DRAWN.items():
            if not least <= getattr(record, name) <= most:
                raise ValueError(f"{name} is {getattr(record, name)}, and not from {least} to {most}")
        if record.width % 8 or record.height % 8:
            raise ValueError(f"{record.width}x{record.height} pixels are not divisible by 8")
        if not (isfinite(record.guidance) and isfinite(record.shift) and record.shift > 0):
            raise ValueError(
                f"guidance {record.guidance} or shift {record.shift} is no finite number, or shift not above 0"
            )
    except (LookupError, ValueError) as error:
        why = "record is missing" if isinstance(error, LookupError) else " ".join(str(error).split()[:30])
        raise RequestError(
            f"{SETTINGS_FILE} of {source} holds no sampling record ({why}): restore the file, or push it again."
        ) from error
    return record


class Scorer(Protocol):
    """A judge of pictures: one method that scores, and an identity that stands in every result."""

    def identity(self) -> Mapping[str, Any]:
        """Name, version, engine and hashes: whatever makes two scores comparable. Plain JSON."""

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
        """Score each picture against its prompt, in order. A picture that cannot be judged gets ``value=None``."""


class Generator(Protocol):
    """What draws: an identity that stands in every result, and pictures from prompts and seeds."""

    def identity(self) -> Mapping[str, Any]:
        """``model`` (its name), model and adapter hashes, sampling record. Plain JSON."""

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        """One picture for each prompt and seed, in order."""
