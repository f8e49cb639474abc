"""The one table that ties a bench's flag to its prompts, its scorer, its version and its metric key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from flowopd_eval.errors import RequestError
from flowopd_eval.records import Prompt, Scorer

OCR_SIDE = 160  # pixels; contracts: one value for training and evaluation


@dataclass(frozen=True)
class Bench:
    """A bench: ``flag`` on the command line, for models that draw ``objects``; ``key`` names the metric in results.

    ``protocols`` are those a user may choose, the first by default; ``scorer`` also takes the names in ``steps``.
    """

    flag: str
    objects: str
    key: str
    version: int
    title: str
    about: str
    prompts: Callable[[], list[Prompt]]
    scorer: Callable[[str], Scorer]
    samples: int = 1
    protocols: tuple[str, ...] = ("official",)
    steps: tuple[tuple[str, str], ...] = ()  # from one protocol to another: what changes, and the name of the result


def _official_prompts() -> list[Prompt]:
    from flowopd_eval.prompts import official_geneval

    return official_geneval()


def _shapes_prompts() -> list[Prompt]:
    from flowopd_eval.tiny.suite import shapes_geneval_prompts

    return shapes_geneval_prompts()


def _sign_prompts() -> list[Prompt]:
    from flowopd_eval.tiny.suite import sign_prompts

    return sign_prompts()


@cache
def _coco_detector() -> Any:
    """One detector a process, whatever the protocol."""
    import torch

    from flowopd_eval.scorers.clip_colours import ClipColours
    from flowopd_eval.scorers.mask2former import Mask2FormerDetector, official_weights

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Mask2FormerDetector(official_weights(), ClipColours(device=device), device)


def _coco_scorer(protocol: str) -> Scorer:
    from flowopd_eval.scorers.geneval import GenEvalScorer

    return GenEvalScorer(_coco_detector(), protocol)


def _shapes_scorer(protocol: str) -> Scorer:
    from flowopd_eval.scorers.geneval import GenEvalScorer
    from flowopd_eval.tiny.detector import ShapesDetector

    return GenEvalScorer(ShapesDetector(), protocol)


def _sign_scorer(protocol: str) -> Scorer:
    from flowopd_eval.scorers.ocr import OCRScorer, RapidOCREngine

    return OCRScorer(RapidOCREngine(OCR_SIDE))


def _quality_prompts() -> list[Prompt]:
    from flowopd_eval.tiny.suite import quality_prompts

    return quality_prompts()


def _quality_scorer(protocol: str) -> Scorer:
    from flowopd_eval.tiny.quality import QualityScorer

    return QualityScorer()


GENEVAL_PROTOCOLS = ("official", "flow-grpo")
GENEVAL_STEPS = (
    ("official", "official"),
    ("pictures through JPEG 75", "official+jpeg"),
    ("red and blue exchanged for the detector", "flow-grpo-by-task"),
    ("mean over pictures, not tasks: flow-grpo", "flow-grpo"),
)

BENCHES: tuple[Bench, ...] = (
    Bench(
        "geneval",
        "coco",
        "geneval",
        1,
        "GenEval",
        "553 prompts of six tasks about COCO objects, four pictures each (arXiv 2310.11513)",
        _official_prompts,
        _coco_scorer,
        samples=4,
        protocols=GENEVAL_PROTOCOLS,
        steps=GENEVAL_STEPS,
    ),
    Bench(
        "geneval",
        "shapes",
        "shapes_geneval",
        1,
        "Shapes-GenEval (miniature)",
        "GenEval's six tasks and its verdict over the miniature's shapes, judged by the miniature's own detector",
        _shapes_prompts,
        _shapes_scorer,
        protocols=GENEVAL_PROTOCOLS,
        steps=GENEVAL_STEPS,
    ),
    Bench(
        "ocr",
        "shapes",
        "sign_ocr",
        1,
        "Sign OCR (miniature)",
        "signs with one short word, read by rapidocr and scored by Flow-GRPO's rule",
        _sign_prompts,
        _sign_scorer,
        protocols=("flow-grpo",),
    ),
    Bench(
        "quality",
        "shapes",
        "shapes_quality",
        1,
        "Picture quality (miniature)",
        "how cleanly pictures of every kind are drawn, whatever they show",
        _quality_prompts,
        _quality_scorer,
    ),
)


def find_bench(flag: str, objects: str) -> Bench:
    """The bench ``flag`` for a model that draws ``objects``.

    Raises:
        RequestError: unknown flag, or a bench that does not fit the model.
    """
    flags = sorted({bench.flag for bench in BENCHES})
    if flag not in flags:
        raise RequestError(f"Unknown bench {flag!r}; known: {', '.join(flags)}. `flowopd-eval benches` describes them.")
    for bench in BENCHES:
        if (bench.flag, bench.objects) == (flag, objects):
            return bench
    fitting = ", ".join(bench.flag for bench in BENCHES if bench.objects == objects)
    raise RequestError(f"Bench {flag!r} is not there for models that draw {objects}; there is: {fitting}.")


def bench_by_key(key: str) -> Bench:
    """The bench whose metric is ``key``.

    Raises:
        RequestError: there is no such metric.
    """
    for bench in BENCHES:
        if bench.key == key:
            return bench
    raise RequestError(f"Unknown metric {key!r}; known: {', '.join(bench.key for bench in BENCHES)}.")
