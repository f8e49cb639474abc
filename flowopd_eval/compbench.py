"""T2I-CompBench++: its prompts, and the one of its scores that is computed here, non-spatial relations by CLIP.

Huang et al., "T2I-CompBench++" (TPAMI 2025; arXiv 2307.06350); code and prompts Karine-Huang/T2I-CompBench (MIT). Eight
categories of 300 validation prompts, ten pictures each. The other seven categories are judged by networks that want
environments of their own: :mod:`flowopd_eval.compbench_layout` writes a run as the folders that their official scripts
read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowopd_eval.errors import RequestError
from flowopd_eval.fetched import Source
from flowopd_eval.records import Prompt, Sample, Score
from flowopd_eval.scorers.clip_model import ClipModel
from flowopd_eval.statistics import mean_interval

if TYPE_CHECKING:
    from PIL import Image

# Category (the name of its prompt file) -> what judges it officially.
OFFICIAL: Mapping[str, str] = {
    "color": "BLIP-VQA (BLIPvqa_eval/BLIP_vqa.py)",
    "shape": "BLIP-VQA (BLIPvqa_eval/BLIP_vqa.py)",
    "texture": "BLIP-VQA (BLIPvqa_eval/BLIP_vqa.py)",
    "spatial": "UniDet (UniDet_eval/2D_spatial_eval.py)",
    "3d_spatial": "UniDet and a depth network (UniDet_eval/3D_spatial_eval.py)",
    "numeracy": "UniDet (UniDet_eval/numeracy_eval.py)",
    "non_spatial": "CLIP (CLIPScore_eval/CLIP_similarity.py)",
    "complex": "3-in-1 (BLIP-VQA, UniDet and CLIP; 3_in_1_eval/3_in_1.py)",
}
CATEGORIES = tuple(OFFICIAL)
COMPUTED = "non_spatial"
PICTURES = 10  # a prompt; 3_in_1.py counts on it
REPOSITORY = "Karine-Huang/T2I-CompBench"
COMMIT = "1b7094991a57f3c22abdd4f6e8ba6c1a15517073"
_SHA256 = {
    "color": "1634259756dbc77d13093d907d414480080ec9790a8c97ad09efaea7b2534f2d",
    "shape": "37e1a276906c7ea9516cbd7ac8501be896006c0c17ca7344f260562834455bae",
    "texture": "fbb5363515b4a28009e360afaaaf389d2dd2289e50dbb0c6ef4ea0c7fe4f3d4f",
    "spatial": "8707a1d7e42ce3002d95363cf55f74bd043c843ae27108f5125aaaa7840ca988",
    "3d_spatial": "c9953597315f36a5fcb41291bb19bdc6ab5f64a0fa760d691b4854a73f5d1fe9",
    "numeracy": "dad8df141604b70ba7554bec724e3db0a80023680769b5c514854ea2d2527bbe",
    "non_spatial": "04c56cc9ac441dc9ea6c5157652058bd1635b5308526dd31bb29a1caab9a758d",
    "complex": "1b808018b8d9916db3d47d5aa2ef18377a3549a56901a474156f799824cdf3b4",
}
SOURCES: Mapping[str, Source] = {
    category: Source(
        f"t2i_compbench_{category}_val.txt",
        f"https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}/examples/dataset/{category}_val.txt",
        sha256,
    )
    for category, sha256 in _SHA256.items()
}
# The official script loads OpenAI's ViT-B/32. The Hub's main revision holds it pickled; this one is the Hub's own
# conversion of it to safetensors.
CLIP = "hub:openai/clip-vit-base-patch32@c237dc49a33fc61debc9276459120b7eac67e7ef"


# ------------------------------------------------------------------------------------------------------------ prompts


def compbench_prompts(folder: Path | None = None, sources: Mapping[str, Source] = SOURCES) -> list[Prompt]:
    """The validation prompts, category by category in the files' order: fetched, checked and cached once.

    ``task`` is the category, ``id`` is ``compbench-<category>-<line, from 000>``. Flow-OPD's public code has another
    ``color_val.txt``, of which five lines differ; this is the benchmark's own.

    Raises:
        RequestError: as :meth:`flowopd_eval.fetched.Source.path`.
    """
    return [
        Prompt(f"compbench-{category}-{number:03d}", text, category)
        for category, source in sources.items()
        for number, text in enumerate(_lines(source.path(folder)))
    ]


def _lines(path: Path) -> list[str]:
    """As ``inference_eval.py`` reads a prompt file: the lines, whatever ends them, up to a tab."""
    return [line.split("\t")[0] for line in path.read_text(encoding="utf-8").splitlines()]


def check_category(prompt: Prompt) -> None:
    """Nothing for a prompt of the benchmark's categories.

    Raises:
        RequestError: its task is none of them.
    """
    if prompt.task not in OFFICIAL:
        raise RequestError(
            f"The prompt {prompt.id!r} has the task {prompt.task!r}; T2I-CompBench++ has {', '.join(CATEGORIES)}."
        )


# ------------------------------------------------------------------------------------------------------------- scorer


class NonSpatialScorer:
    """CLIP's cosine of picture and prompt for ``non_spatial`` (:class:`flowopd_eval.records.Scorer`).

    Official: ``CLIPScore_eval/CLIP_similarity.py``, which takes OpenAI's ViT-B/32, L2-normalises both features and
    writes their product, neither scaled nor cut at 0 (there in fp16 on a GPU, here in fp32). Pictures of the other
    categories get no score, and the official tool's name.
    """

    def __init__(self, clip: ClipModel | None = None, device: str = "cpu") -> None:
        self.clip = clip or ClipModel(CLIP, device=device)

    def identity(self) -> Mapping[str, Any]:
        """The rule and the CLIP with its hash. Raises ``RequestError`` when its weights cannot be had or do not fit."""
        self.clip.load()
        return {
            "scorer": "compbench",
            "rule": "clip-cosine-1",
            "computed": COMPUTED,
            "clip": dict(self.clip.identity()),
        }

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
        """Cosine in -1..1 for each ``non_spatial`` picture; no score for the others.

        Raises:
            RequestError: a prompt is of no category of the benchmark.
        """
        pairs = list(zip(images, prompts, strict=True))
        for prompt in prompts:
            check_category(prompt)
        mine = [(image, prompt.prompt) for image, prompt in pairs if prompt.task == COMPUTED]
        cosines = iter(self._cosines(*zip(*mine, strict=True)) if mine else ())
        return [Score(next(cosines)) if prompt.task == COMPUTED else _elsewhere(prompt.task) for prompt in prompts]

    def _cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        from flowopd_eval.scorers.preference import cosine

        return cosine(self.clip.image_features(images), self.clip.text_features(texts)).tolist()


def _elsewhere(category: str) -> Score:
    return Score(None, error=f"not computed here: {OFFICIAL[category]} of {REPOSITORY}")


# ------------------------------------------------------------------------------------------------------------ metrics


def compbench_metrics(samples: Sequence[Sample], correct_at: float | None) -> dict[str, Any]:
    """The mean cosine of ``non_spatial``, with a 95 % interval clustered by prompt: the only number, and ``overall``.

    ``not_computed`` holds the other categories that were drawn, each with its number of ``pictures`` and the
    ``official`` tool that judges it. There is no right and wrong: ``correct_at`` is not used.
    """
    mine = [sample for sample in samples if sample.task == COMPUTED]
    clusters: dict[str, list[float]] = defaultdict(list)
    for sample in mine:
        if sample.score is not None:
            clusters[sample.id].append(sample.score)
    overall = asdict(mean_interval(list(clusters.values()))) if clusters else None
    interval = overall or {"value": None, "low": None, "high": None, "n": 0}
    counts = {"unscored": sum(s.score is None for s in mine), "prompts": len({s.id for s in mine})}
    drawn = {category: sum(s.task == category for s in samples) for category in CATEGORIES if category != COMPUTED}
    return {
        "overall": overall,
        "tasks": {COMPUTED: {**interval, **counts}} if mine else {},
        "images": overall,
        "not_computed": {
            category: {"pictures": count, "official": OFFICIAL[category]} for category, count in drawn.items() if count
        },
    }
