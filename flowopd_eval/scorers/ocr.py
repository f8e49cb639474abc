"""How much of the quoted text a picture shows: the OCR rule of Flow-GRPO (``ocr.py`` of yifan123/flow_grpo)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flowopd_eval.errors import RequestError
from flowopd_eval.records import Prompt, Score

if TYPE_CHECKING:
    from PIL import Image


def target_text(prompt: str) -> str:
    """The text between the first pair of straight double quotes.

    Raises:
        RequestError: the prompt quotes nothing, so nothing could be scored.
    """
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].replace(" ", ""):
        raise RequestError(f'Prompt {prompt!r} quotes no text; OCR needs a target in straight double quotes ("...").')
    return parts[1]


def normalise(text: str) -> str:
    """The rule's normal form: ASCII spaces removed, lower case; punctuation stays."""
    return text.replace(" ", "").lower()


def levenshtein(a: str, b: str) -> int:
    """Least number of insertions, deletions and substitutions that turn ``a`` into ``b``."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        current = [i]
        for j, y in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def ocr_reward(recognised: str, target: str) -> float:
    """``1 - distance / len(target)`` in 0..1; distance 0 where the target is contained, and at most ``len(target)``."""
    found, wanted = normalise(recognised), normalise(target)
    if wanted in found:
        return 1.0
    return 1.0 - min(levenshtein(found, wanted), len(wanted)) / len(wanted)


def error_rate(recognised: str, target: str) -> float:
    """Character error rate of the normal forms, 0 and up: the distance is not capped and nothing else is forgiven."""
    found, wanted = normalise(recognised), normalise(target)
    return levenshtein(found, wanted) / len(wanted)


class RapidOCREngine:
    """``rapidocr`` with the PP-OCRv6 models its wheel ships: no network, no torch.

    ``side`` is both the least side to which a small picture is enlarged and the detector's ``limit_side_len``; one
    value for training and evaluation alike, since it changes what is read.
    """

    name = "rapidocr-ppocrv6-small"

    def __init__(self, side: int) -> None:
        self.side = side

    @cached_property
    def _reader(self):  # noqa: ANN202
        try:
            from rapidocr import RapidOCR
        except (ImportError, RuntimeError) as error:
            raise RequestError(
                f"OCR needs rapidocr ({error}); install it with `pip install 'flowopd-eval[ocr]'`."
            ) from error
        limits = {"Det.limit_side_len": self.side, "Det.limit_type": "min"}
        quiet = {"Global.use_cls": False, "Global.log_level": "critical"}
        return RapidOCR(params={**quiet, **limits, "EngineConfig.onnxruntime.intra_op_num_threads": 1})

    def identity(self) -> dict[str, Any]:
        """Engine, versions and side length."""
        from importlib.metadata import version

        self._reader  # noqa: B018  (a missing package shows before anything is drawn)
        versions = {package: version(package) for package in ("rapidocr", "onnxruntime")}
        return {"engine": self.name, "side": self.side, **versions}

    def read(self, image: Image.Image) -> str:
        """All lines found in the picture, in reading order, joined without a separator."""
        import numpy as np
        from PIL import Image

        image = image.convert("RGB")
        if min(image.size) < self.side:
            scale = self.side / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        lines = self._reader(np.asarray(image)[:, :, ::-1]).txts  # the engine expects BGR, as OpenCV reads
        return "".join(lines or ())


class OCRScorer:
    """Scores pictures against the text their prompt quotes (:class:`flowopd_eval.records.Scorer`)."""

    def __init__(self, engine: RapidOCREngine) -> None:
        self.engine = engine

    def identity(self) -> Mapping[str, Any]:
        """The rule and the engine."""
        return {"scorer": "ocr", "rule": "flow-grpo", **self.engine.identity()}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
        """Reward in 0..1 for each picture; a picture the engine fails on is unscored."""
        return [self._score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _score(self, image: Image.Image, prompt: Prompt) -> Score:
        target = target_text(prompt.prompt)
        try:
            recognised = self.engine.read(image)
        except (RuntimeError, ValueError, OSError) as error:
            return Score(None, error=f"{type(error).__name__}: {error}")
        value = ocr_reward(recognised, target)
        also = {"exact_match": float(normalise(recognised) == normalise(target)), "cer": error_rate(recognised, target)}
        detail = {"target": target, "recognised": recognised, "also": also}
        return Score(value, "" if value == 1 else f'reads "{recognised}", not "{target}"', detail)
