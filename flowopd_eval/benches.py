"""The one table that ties a bench's flag to its prompts, its scorer, its version and its metric key."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from flowopd_eval.errors import RequestError, Unavailable
from flowopd_eval.models import ANYTHING
from flowopd_eval.records import Prompt, Sample, Scorer

OCR_SIDE = 160  # pixels; contracts: one value for training and evaluation
VLM_JUDGE = "Qwen/Qwen3-VL-8B-Instruct"  # GenEval 2's official one


@dataclass(frozen=True)
class Judge:
    """What a user says about the judges of a run; a bench takes from it what concerns it.

    ``url`` and ``model`` are an OpenAI-compatible server and a model on it (None: the bench's official one);
    ``metrics`` the preference metrics, the first of them the score (none: all); ``ocr_engine`` and ``ocr_workers`` who
    reads, in how many processes (None: half the processors, four at most). ``own`` (a scorer by
    :func:`flowopd_eval.scorers.own.own_scorer`) and ``command`` (a program) judge in the bench's scorer's place, by the
    bench's flag. All of it comes from the user's command line.
    """

    url: str | None = None
    model: str | None = None
    metrics: tuple[str, ...] = ()
    ocr_engine: str = "rapidocr"
    ocr_workers: int | None = None
    own: Mapping[str, str] = field(default_factory=dict)
    command: Mapping[str, str] = field(default_factory=dict)


USUAL = Judge()


@dataclass(frozen=True)
class Bench:
    """A bench: ``flag`` on the command line, for models that draw ``objects``; ``key`` names the metric in results.

    ``protocols`` are those a user may choose, the first by default; ``scorer`` takes one of them or of the names in
    ``steps``, and what the user says of the judge. A picture is right from ``correct_at`` on; None: there is no right
    and wrong. ``metrics`` gives the function that sums up its samples, where it is not GenEval's.
    """

    flag: str
    objects: str
    key: str
    version: int
    title: str
    about: str
    prompts: Callable[[], list[Prompt]]
    scorer: Callable[..., Scorer]
    samples: int = 1
    protocols: tuple[str, ...] = ("official",)
    steps: tuple[tuple[str, str], ...] = ()  # from one protocol to another: what changes, and the name of the result
    correct_at: float | None = 1.0
    metrics: Callable[[], Callable[[Sequence[Sample], float | None], dict[str, Any]]] | None = None
    check: Callable[[Prompt], None] = lambda prompt: None  # raises RequestError for a prompt nobody could judge
    replaceable: bool = False  # a judge of the user's may take its scorer's place


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
    """One detector a process, whatever the protocol. Raises ``Unavailable`` where its weights cannot be had."""
    import torch

    from flowopd_eval.scorers.clip_colours import ClipColours
    from flowopd_eval.scorers.mask2former import Mask2FormerDetector, official_weights

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return Mask2FormerDetector(official_weights(), ClipColours(device=device), device)
    except RequestError as error:
        raise Unavailable(str(error)) from error


def _coco_scorer(protocol: str, judge: Judge = USUAL) -> Scorer:
    from flowopd_eval.scorers.geneval import GenEvalScorer

    return GenEvalScorer(_coco_detector(), protocol)


def _shapes_scorer(protocol: str, judge: Judge = USUAL) -> Scorer:
    from flowopd_eval.scorers.geneval import GenEvalScorer
    from flowopd_eval.tiny.detector import ShapesDetector

    return GenEvalScorer(ShapesDetector(), protocol)


def _ocr_prompts() -> list[Prompt]:
    from flowopd_eval.prompts import ocr_prompts

    return ocr_prompts()


def _quotes(prompt: Prompt) -> None:
    from flowopd_eval.scorers.ocr import target_text

    target_text(prompt.prompt)


def _of_coco(prompt: Prompt) -> None:
    from flowopd_eval.prompts import COCO_CLASSES, GENEVAL_COLOURS
    from flowopd_eval.scorers.geneval import check_record, check_words

    check_record(prompt)
    check_words(prompt, COCO_CLASSES, GENEVAL_COLOURS)


def _of_shapes(prompt: Prompt) -> None:
    from flowopd_eval.scorers.geneval import check_record, check_words
    from flowopd_eval.tiny.scenes import COLOURS, SHAPES

    check_record(prompt)
    check_words(prompt, list(SHAPES), list(COLOURS))


def _ocr_scorer(protocol: str, judge: Judge = USUAL) -> Scorer:
    # The other half draws, or feeds what draws; one worker is this process itself.
    usual = max(1, min(4, (os.cpu_count() or 1) // 2))
    return _reader(judge.ocr_engine, judge.ocr_workers or usual)


@cache
def _reader(engine: str, workers: int) -> Scorer:
    """One set of worker processes, whatever the number of models and benches."""
    from flowopd_eval.scorers.ocr import OCRScorer
    from flowopd_eval.scorers.ocr_engines import ENGINES

    if engine not in ENGINES:
        raise RequestError(f"Unknown OCR engine {engine!r}; known: {', '.join(ENGINES)}.")
    return OCRScorer(ENGINES[engine](OCR_SIDE), workers)


def _drawbench_prompts() -> list[Prompt]:
    from flowopd_eval.drawbench import drawbench_prompts

    return drawbench_prompts()


@cache
def _preference_judge(metrics: tuple[str, ...]) -> Scorer:
    """One judge a process: its models take about 10 GB."""
    import torch

    from flowopd_eval.scorers.preference import METRICS, PreferenceScorer

    return PreferenceScorer(metrics or METRICS, device="cuda" if torch.cuda.is_available() else "cpu")


def _preference_scorer(protocol: str, judge: Judge = USUAL) -> Scorer:
    return _preference_judge(judge.metrics)


def _quality_prompts() -> list[Prompt]:
    from flowopd_eval.tiny.suite import quality_prompts

    return quality_prompts()


def _quality_scorer(protocol: str, judge: Judge = USUAL) -> Scorer:
    from flowopd_eval.tiny.quality import QualityScorer

    return QualityScorer()


def _geneval2_prompts() -> list[Prompt]:
    from flowopd_eval.geneval2_prompts import geneval2_prompts

    return geneval2_prompts()


def _geneval2_scorer(protocol: str, judge: Judge = USUAL) -> Scorer:
    from flowopd_eval.scorers.geneval2 import GenEval2Scorer
    from flowopd_eval.scorers.vlm import VLMClient

    if judge.url is None:
        raise RequestError(
            f"GenEval 2 is judged by a vision-language model: start one (`vllm serve {VLM_JUDGE}`) and give "
            "--judge-url http://localhost:8000/v1."
        )
    return GenEval2Scorer(VLMClient(judge.url, judge.model or VLM_JUDGE))


def _writing_judge(rubric: str, model: str) -> Callable[..., Scorer]:
    """A model that writes points by a rubric of :mod:`flowopd_eval.scorers.judges`."""

    def scorer(protocol: str, judge: Judge = USUAL) -> Scorer:
        from flowopd_eval.scorers.judges import RUBRICS, JudgeScorer
        from flowopd_eval.scorers.vlm import VLMClient

        if judge.url is None:
            raise RequestError(f"{rubric} asks a model: start one (`vllm serve {model}`) and give --judge-url URL.")
        return JudgeScorer(VLMClient(judge.url, judge.model or model), RUBRICS[rubric])

    return scorer


@cache
def external_scorer(command: tuple[str, ...]) -> Scorer:
    """A judge in a process of its own, one a command, whatever the number of models and benches."""
    from flowopd_eval.scorers.external import ExternalScorer

    return ExternalScorer(command)


@cache
def _own_scorer(name: str) -> Scorer:
    """One a name, whatever the number of models and benches."""
    from flowopd_eval.scorers.own import own_scorer

    return own_scorer(name)


def _compbench_prompts() -> list[Prompt]:
    from flowopd_eval.compbench import compbench_prompts

    return compbench_prompts()


def _has_category(prompt: Prompt) -> None:
    from flowopd_eval.compbench import check_category

    check_category(prompt)


@cache
def _non_spatial_judge() -> Scorer:
    """One CLIP a process. Raises ``Unavailable`` where its weights cannot be had."""
    import torch

    from flowopd_eval.compbench import NonSpatialScorer

    scorer = NonSpatialScorer(device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        scorer.identity()
    except RequestError as error:
        raise Unavailable(str(error)) from error
    return scorer


def _compbench_scorer(protocol: str, judge: Judge = USUAL) -> Scorer:
    return _non_spatial_judge()


def _compbench_metrics() -> Callable[[Sequence[Sample], float | None], dict[str, Any]]:
    from flowopd_eval.compbench import compbench_metrics

    return compbench_metrics


def _named_by_the_user(flag: str, option: str) -> Callable[..., Scorer]:
    """The place of a judge that a bench does not have itself."""

    def scorer(protocol: str, judge: Judge = USUAL) -> Scorer:
        raise Unavailable(f"--bench {flag} has no judge of its own here: name one with {option}.")

    return scorer


def _prompts_of_the_user() -> list[Prompt]:
    raise RequestError("--bench own judges prompts of your own: give --prompts FILE.")


def scorer_of(bench: Bench, protocol: str, judge: Judge) -> Scorer:
    """The bench's judge, or what the user named in its place.

    Raises:
        RequestError: a judge that cannot take this bench's place, or that is not to be had.
    """
    import shlex

    named = [
        option
        for option, names in (("--scorer", judge.own), ("--scorer-command", judge.command))
        if bench.flag in names
    ]
    if not named:
        return bench.scorer(protocol, judge)
    if len(named) > 1 or not bench.replaceable:
        raise RequestError(f"--bench {bench.flag}: {' and '.join(named)} cannot take this bench's judge's place.")
    if bench.flag in judge.own:
        return _own_scorer(judge.own[bench.flag])
    return external_scorer(tuple(shlex.split(judge.command[bench.flag])))


def _geneval2_metrics() -> Callable[[Sequence[Sample], float | None], dict[str, Any]]:
    from flowopd_eval.scorers.geneval2 import geneval2_metrics

    return geneval2_metrics


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
        check=_of_coco,
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
        check=_of_shapes,
    ),
    Bench(
        "ocr",
        "shapes",
        "sign_ocr",
        1,
        "Sign OCR (miniature)",
        "signs with one short word, read by rapidocr and scored by Flow-GRPO's rule",
        _sign_prompts,
        _ocr_scorer,
        protocols=("flow-grpo",),
        check=_quotes,
        replaceable=True,
    ),
    Bench(
        "ocr",
        "coco",
        "ocr",
        1,
        "OCR",
        "1,018 prompts that quote a text, read by rapidocr and scored by Flow-GRPO's rule (arXiv 2505.05470)",
        _ocr_prompts,
        _ocr_scorer,
        protocols=("flow-grpo",),
        check=_quotes,
        replaceable=True,
    ),
    Bench(
        "preference",
        "coco",
        "preference",
        1,
        "Preference",
        "DrawBench's 200 prompts: PickScore, and HPS v2.1, Aesthetic v2 and CLIPScore besides (arXiv 2305.01569)",
        _drawbench_prompts,
        _preference_scorer,
        protocols=("raw",),
        correct_at=None,
        replaceable=True,
    ),
    Bench(
        "preference",
        "shapes",
        "shapes_preference",
        1,
        "Preference (miniature)",
        "the same metrics on the miniature's prompts, which they were not made for",
        _quality_prompts,
        _preference_scorer,
        protocols=("raw",),
        correct_at=None,
        replaceable=True,
    ),
    Bench(
        "deqa",
        "coco",
        "deqa",
        1,
        "DeQA",
        "DrawBench's 200 prompts, picture quality of 1 to 5 by DeQA-Score in an environment of its own",
        _drawbench_prompts,
        _named_by_the_user("deqa", '--scorer-command "PYTHON examples/external_scorers/deqa/scorer.py"'),
        protocols=("raw",),
        correct_at=None,
        replaceable=True,
    ),
    Bench(
        "compbench",
        "coco",
        "compbench",
        1,
        "T2I-CompBench++",
        "8 times 300 prompts, ten pictures each: non-spatial by CLIP here, the rest by the official tools, for which "
        "`report --format compbench` writes the pictures (arXiv 2307.06350)",
        _compbench_prompts,
        _compbench_scorer,
        samples=10,
        protocols=("clip-cosine",),
        correct_at=None,
        metrics=_compbench_metrics,
        check=_has_category,
    ),
    Bench(
        "own",
        ANYTHING,
        "own",
        1,
        "A judge of your own",
        "prompts and a scorer that you name: --prompts FILE --scorer FILE.py:CLASS",
        _prompts_of_the_user,
        _named_by_the_user("own", "--scorer FILE.py:CLASS"),
        protocols=("own",),
        correct_at=None,
        replaceable=True,
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
        correct_at=None,
        replaceable=True,
    ),
    Bench(
        "unifiedreward",
        "coco",
        "unified_reward",
        1,
        "UnifiedReward",
        "DrawBench's 200 prompts, points for alignment and quality by a model that writes (arXiv 2503.05236)",
        _drawbench_prompts,
        _writing_judge("unified-reward", "CodeGoat24/UnifiedReward-7b-v1.5"),
        protocols=("points",),
        correct_at=None,
    ),
    Bench(
        "qwenvl",
        "coco",
        "qwenvl",
        1,
        "QwenVL",
        "DrawBench's 200 prompts, points by Qwen2.5-VL or any other model that writes",
        _drawbench_prompts,
        _writing_judge("qwenvl", "Qwen/Qwen2.5-VL-7B-Instruct"),
        protocols=("points",),
        correct_at=None,
    ),
    Bench(
        "geneval2",
        "coco",
        "geneval2",
        1,
        "GenEval 2",
        "800 prompts of 3 to 10 claims each, judged claim by claim by a vision-language model (arXiv 2512.16853)",
        _geneval2_prompts,
        _geneval2_scorer,
        protocols=("soft-tifa",),
        correct_at=None,
        metrics=_geneval2_metrics,
    ),
)


# `--bench paper`: the columns of the paper's Table 2, by what a model draws.
PAPER = "paper"
PAPER_FLAGS = {
    "coco": ("geneval", "ocr", "deqa", "preference"),
    "shapes": ("geneval", "ocr", "quality"),
}


def flags_for(flags: Sequence[str], objects: str) -> list[str]:
    """The benches that ``flags`` ask of a model that draws ``objects``, ``paper`` spelled out."""
    of_paper = PAPER_FLAGS.get(objects, PAPER_FLAGS["coco"])
    return list(dict.fromkeys(one for flag in flags for one in (of_paper if flag == PAPER else (flag,))))


def find_bench(flag: str, objects: str) -> Bench:
    """The bench ``flag`` for a model that draws ``objects``.

    A model that may draw ``anything`` takes a bench of COCO objects by its flag, and every bench by its key.

    Raises:
        RequestError: unknown flag, or a bench that does not fit the model.
    """
    flags = sorted({bench.flag for bench in BENCHES})
    if objects == ANYTHING:
        for bench in BENCHES:
            if bench.key == flag:
                return bench
        objects = "coco"
    if flag not in flags:
        known = next((f"That is a metric's key: the bench is {b.flag!r}. " for b in BENCHES if b.key == flag), "")
        raise RequestError(
            f"Unknown bench {flag!r}; known: {', '.join([*flags, PAPER])}. {known}"
            "`flowopd-eval benches` describes them."
        )
    for bench in BENCHES:
        if bench.flag == flag and bench.objects in (objects, ANYTHING):
            return bench
    fitting = ", ".join(bench.flag for bench in BENCHES if bench.objects in (objects, ANYTHING))
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
