"""Judging pictures with the scorers of ``flowopd-eval``, the pack's only optional dependency.

The package is looked for when a picture is to be judged and not before: without it every other node works, and these
say what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import PackError, check_choice

if TYPE_CHECKING:
    from PIL import Image

BENCHES = ("geneval", "ocr", "shapes_geneval")
OCR_SIDE = 160  # pixels; the one value with which flowopd-eval reads
_MISSING = (
    "Scoring needs the package flowopd-eval in ComfyUI's own Python ({error}). Install it there: "
    "`python -m pip install 'flowopd-eval[ocr] @ file:///PATH/TO/CHECKOUT'`. The other Flow-OPD nodes work without it."
)


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one picture: ``value`` in 0..1 (None: it could not be judged), one line of ``text``, and
    the ``boxes`` it saw: class -> ``[x1, y1, x2, y2, score]`` in pixels."""

    value: float | None
    text: str
    boxes: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)


Judge = Callable[[Sequence["Image.Image"]], list[Verdict]]


def open_judge(bench: str, prompt: str, clauses: str = "", device: str = "cpu") -> Judge:
    """A judge of pictures of ``prompt``. What it loads, it holds alone: dropped, it gives its memory back.

    Args:
        bench: ``geneval`` (COCO's objects; its detector is fetched once), ``ocr`` (text in straight double quotes), or
            ``shapes_geneval`` (the toolkit's miniature).
        prompt: what the pictures should show.
        clauses: JSON with GenEval's ``include`` and ``exclude``, for a prompt whose words cannot be read as such.
        device: where detectors run, as torch names it.

    Raises:
        PackError: an unknown bench, a missing package, or a prompt that the bench cannot judge.
    """
    check_choice("bench", bench, BENCHES)
    try:
        import flowopd_eval  # noqa: F401

        return _judge(*_open(bench, prompt, clauses, device))
    except ImportError as error:
        raise PackError(_MISSING.format(error=error)) from error
    except PackError:
        raise
    except ValueError as error:  # the toolkit's own words for a request that cannot be met
        raise PackError(str(error)) from error


def _judge(scorer: Any, record: Any) -> Judge:
    def judge(pictures: Sequence[Image.Image]) -> list[Verdict]:
        try:
            return [_verdict(score) for score in scorer.score(pictures, [record] * len(pictures))]
        except ValueError as error:
            raise PackError(str(error)) from error

    return judge


def _open(bench: str, prompt: str, clauses: str, device: str) -> tuple[Any, Any]:
    """The scorer and the prompt as its record."""
    from flowopd_eval.records import Prompt

    if bench == "ocr":
        from flowopd_eval.scorers.ocr import OCRScorer, target_text
        from flowopd_eval.scorers.ocr_engines import RapidOCREngine

        straight = prompt.replace("“", '"').replace("”", '"')
        target_text(straight)  # before any picture is drawn
        return OCRScorer(RapidOCREngine(OCR_SIDE)), Prompt("comfy", straight, "ocr")
    from flowopd_eval.scorers.geneval import GenEvalScorer, check_record

    if bench == "shapes_geneval":
        from flowopd_eval.tiny.detector import ShapesDetector
        from flowopd_eval.tiny.scenes import COLOURS, PLACES, SHAPES

        record = Prompt("comfy", prompt, *_record(prompt, clauses, tuple(SHAPES), tuple(COLOURS), tuple(PLACES)))
        check_record(record)
        return GenEvalScorer(ShapesDetector()), record
    from flowopd_eval.prompts import COCO_CLASSES, GENEVAL_COLOURS

    record = Prompt("comfy", prompt, *_record(prompt, clauses, COCO_CLASSES, GENEVAL_COLOURS))
    check_record(record)
    from flowopd_eval.scorers.clip_colours import ClipColours
    from flowopd_eval.scorers.mask2former import Mask2FormerDetector, official_weights

    return GenEvalScorer(Mask2FormerDetector(official_weights(), ClipColours(device=device), device)), record


def _record(
    prompt: str, clauses: str, classes: Sequence[str], colours: Sequence[str], places: Sequence[str] = ()
) -> tuple[str, dict[str, Any]]:
    if clauses.strip():
        try:
            fields = json.loads(clauses)
        except json.JSONDecodeError as error:
            raise PackError(f"The clauses are no JSON: {error}.") from error
        if not isinstance(fields, dict):
            raise PackError('The clauses should be an object: {"include": [{"class": "dog", "count": 2}]}.')
        include = fields.get("include")
        named = include if isinstance(include, list) else []
        counting = any(isinstance(c, dict) and c.get("count", 1) != 1 for c in named)
        return str(fields.pop("task", "counting" if counting else "clauses")), fields
    from flowopd_eval.scorers.clauses import read_clauses

    read = read_clauses(prompt, classes, colours, places)
    if read is None:
        raise PackError(
            f"GenEval cannot judge {prompt!r}: it is not of the form `a photo of two dogs`, `a photo of a red car and "
            f"a blue bench`, `a photo of a dog left of a cat`, with classes such as {', '.join(classes[:8])}. Say in "
            '`clauses` what to look for: {"include": [{"class": "dog", "count": 2, "color": "brown"}]}.'
        )
    return read


def _verdict(score: Any) -> Verdict:
    if score.value is None:
        return Verdict(None, f"not judged: {score.error}")
    said = score.reason or ("correct" if score.value == 1 else "")
    if "recognised" in score.detail:
        said = f'reads "{score.detail["recognised"]}", {said}' if not score.reason else said
    return Verdict(float(score.value), said, score.detail.get("boxes", {}))
