"""How much people would like a picture, by four models of it: PickScore, HPS v2.1, Aesthetic v2, and CLIPScore.

Each is a formula over a CLIP's L2-normalised features of picture and prompt:

- ``pickscore``: ``exp(logit_scale) * cos``, CLIP-H tuned on Pick-a-Pic (Kirstain et al., arXiv 2305.01569). Raw, about
  20 to 24 for diffusion models; Flow-GRPO trains on a 26th of it (``pickscore_scorer.py`` of yifan123/flow_grpo).
- ``hps_v2_1``: ``cos``, CLIP-H tuned on HPD v2 (Wu et al., arXiv 2306.09341; tgxs002/HPSv2, which takes v2.0 unless it
  is asked for v2.1). About 0.2 to 0.35. There it runs under fp16 autocast, here in fp32.
- ``aesthetic_v2``: five linear maps on the picture's feature alone, ViT-L/14 (christophschuhmann/
  improved-aesthetic-predictor, ``simple_inference.py``). About 1 to 10; the prompt is not looked at.
- ``clip_score``: ``100 * cos``, ViT-L/14. The paper's CLIPScore (arXiv 2104.08718) is ``2.5 * max(cos, 0)``, ViT-B/32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowopd_eval.errors import RequestError, Unavailable
from flowopd_eval.fetched import Source
from flowopd_eval.records import Prompt, Score
from flowopd_eval.scorers.clip_model import Checkpoint, ClipModel, Need, fit_pixels, load_pickled

if TYPE_CHECKING:
    import torch
    from PIL import Image

_log = logging.getLogger(__name__)

METRICS = ("pickscore", "hps_v2_1", "aesthetic_v2", "clip_score")
AESTHETIC_LAYERS = (0, 2, 4, 6, 7)  # the linear ones of its nn.Sequential; the others are dropout


# --- formulas: features (pictures, width) of length 1 -> (pictures,) --------------------------------------------------
def cosine(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Of each picture with its own text. HPS v2.1 is this, without the model's logit scale."""
    return (image * text).sum(-1)


def pickscore(image: torch.Tensor, text: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """``exp(logit_scale) * cos``."""
    return logit_scale.exp() * cosine(image, text)


def clip_score(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """``100 * cos``, negative ones too."""
    return 100 * cosine(image, text)


def aesthetic_score(image: torch.Tensor, head: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The head's linear layers one after the other, with nothing in between."""
    from torch.nn.functional import linear

    for n in AESTHETIC_LAYERS:
        image = linear(image, head[f"layers.{n}.weight"], head[f"layers.{n}.bias"])
    return image[:, 0]


# --- what they are made of -------------------------------------------------------------------------------------------
HPS = Checkpoint(
    "hub:xswu/HPSv2@697403c78157020a1ae59d23f111aa58ced35b0a",
    "HPS_v2.1_compressed.pt",
    "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
)
AESTHETIC = Source(
    "sac+logos+ava1-l14-linearMSE.pth",
    "https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/"
    "6934dd81792f086e613a121dbce43082cb8be85e/sac%2Blogos%2Bava1-l14-linearMSE.pth",
    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)


@dataclass(frozen=True)
class PreferenceWeights:
    """Where the models come from; the CLIPs are ``hub:REPO@REVISION`` or a folder each.

    CLIP-H gives HPS its configuration, and HPS and PickScore their tokenizer (as PickScore's model card has it).
    """

    pickscore: str = "hub:yuvalkirstain/PickScore_v1@a4e4367c6dfa7288a00c550414478f865b875800"
    clip_h: str = "hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K@1c2b8495b28150b8a4922ee1c8edee224c284c0c"
    clip_l: str = "hub:openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"
    hps: Checkpoint = HPS
    aesthetic: Source = AESTHETIC


WEIGHTS = PreferenceWeights()


class AestheticHead:
    """The linear maps of Aesthetic v2, fetched, checked and cached once."""

    def __init__(self, source: Source, device: str = "cpu") -> None:
        self.source, self.device = source, device

    @property
    def command(self) -> str:
        """What provides its file."""
        place = '"${FLOWOPD_CACHE:-$HOME/.cache/flowopd-eval}/' + f'{self.source.name}"'
        return f"curl -L --create-dirs -o {place} {self.source.url}"

    def fetch(self) -> Path:
        """Its file. Raises ``RequestError`` as :meth:`flowopd_eval.fetched.Source.path`."""
        return self.source.path()

    def load(self) -> None:
        """Raises ``RequestError`` as :meth:`fetch`, and for a file that is no such head."""
        self.weights  # noqa: B018

    def identity(self) -> Mapping[str, Any]:
        """The file and its hash."""
        return {"head": self.source.name, "head_sha256": self.source.sha256}

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """Its state dict."""
        state = load_pickled(path := self.fetch())
        if not isinstance(state, dict) or not all(f"layers.{n}.weight" in state for n in AESTHETIC_LAYERS):
            raise RequestError(f"{path} holds no aesthetic head: expected layers {AESTHETIC_LAYERS}.")
        return {name: value.float().to(self.device) for name, value in state.items()}


class Features:
    """What one model makes of one batch; each side once, when it is first asked for."""

    def __init__(self, model: ClipModel, images: Sequence[Image.Image], texts: Sequence[str]) -> None:
        self.model, self._images, self._texts = model, images, texts

    @cached_property
    def image(self) -> torch.Tensor:
        """(pictures, width)."""
        return self.model.image_features(self._images)

    @cached_property
    def text(self) -> torch.Tensor:
        """(pictures, width): of each picture's own prompt."""
        return self.model.text_features(self._texts)


@dataclass(frozen=True)
class Metric:
    """A formula over the features of ``model``; metrics of one model share them."""

    name: str
    model: ClipModel
    formula: Callable[[Features], torch.Tensor]
    head: AestheticHead | None = None

    @property
    def parts(self) -> list[ClipModel | AestheticHead]:
        """All that has weights."""
        return [self.model, self.head] if self.head else [self.model]

    @property
    def needs(self) -> list[Need]:
        """All that its weights are read from."""
        return [*self.model.needs, *([self.head] if self.head else [])]


def preference_metrics(weights: PreferenceWeights, device: str = "cpu", batch: int = 32) -> dict[str, Metric]:
    """The four metrics by name, on three models; nothing is fetched yet."""
    pick = ClipModel(weights.pickscore, weights.clip_h, device=device, batch=batch)
    hps = ClipModel(weights.clip_h, checkpoint=weights.hps, pixels=fit_pixels, device=device, batch=batch)
    large = ClipModel(weights.clip_l, device=device, batch=batch)
    head = AestheticHead(weights.aesthetic, device)
    metrics = (
        Metric("pickscore", pick, lambda f: pickscore(f.image, f.text, f.model.logit_scale)),
        Metric("hps_v2_1", hps, lambda f: cosine(f.image, f.text)),
        Metric("aesthetic_v2", large, lambda f: aesthetic_score(f.image, head.weights), head),
        Metric("clip_score", large, lambda f: clip_score(f.image, f.text)),
    )
    return {metric.name: metric for metric in metrics}


# --- the scorer ------------------------------------------------------------------------------------------------------
class PreferenceScorer:
    """Scores pictures by the first of ``metrics``, and measures the others besides (:class:`records.Scorer`).

    A metric other than the first whose weights cannot be had is left out: it stands under ``unavailable`` in the
    identity, with the command that provides it, and in no picture's detail. The first one is never replaced.

    Args:
        metrics: names of :data:`METRICS`; the first one's value is the score.
        weights: where the models come from.
        device: where they run.
        batch: pictures at a time.
    """

    def __init__(
        self,
        metrics: Sequence[str] = METRICS,
        weights: PreferenceWeights = WEIGHTS,
        device: str = "cpu",
        batch: int = 32,
    ) -> None:
        known = preference_metrics(weights, device, batch)
        if not metrics or not set(metrics) <= known.keys():
            raise RequestError(f"Expected metrics of {', '.join(METRICS)}, but got {', '.join(metrics) or 'none'}.")
        self.metrics = [known[name] for name in dict.fromkeys(metrics)]

    @cached_property
    def unavailable(self) -> dict[str, str]:
        """The metrics whose weights cannot be had, by name, each with the command that provides what is lacking.

        Raises:
            Unavailable: the first metric is one of them.
        """
        found = {}
        for metric in self.metrics:
            if not (lacking := _lacking(metric.needs)):
                continue
            reasons, commands = " ".join(map(str, lacking.values())), " && ".join(lacking)
            if metric is self.metrics[0]:
                raise Unavailable(
                    f"Pictures are scored by {metric.name} here, and its weights cannot be had: {reasons} To provide "
                    f"them: {commands}"
                )
            _log.warning("%s is left out: %s To provide it: %s", metric.name, reasons, commands)
            found[metric.name] = commands
        return found

    @cached_property
    def available(self) -> list[Metric]:
        """The other metrics, loaded, so that what is amiss shows before anything is drawn.

        Raises:
            RequestError: as :attr:`unavailable`, or for weights that do not fit.
        """
        found = [metric for metric in self.metrics if metric.name not in self.unavailable]
        for metric in found:
            for part in metric.parts:
                part.load()
        return found

    @cached_property
    def _identity(self) -> dict[str, Any]:
        present = {
            metric.name: {key: value for part in metric.parts for key, value in part.identity().items()}
            for metric in self.available
        }
        rule = {"scorer": "preference", "rule": "preference-1", "value": self.metrics[0].name}
        return {**rule, "metrics": present, **({"unavailable": self.unavailable} if self.unavailable else {})}

    def identity(self) -> Mapping[str, Any]:
        """Rule, metrics with their models and hashes, and those that are unavailable. Raises as :attr:`available`."""
        return self._identity

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
        """The first metric's number for each picture, the others ``also`` in its detail."""
        texts = [prompt.prompt for prompt in prompts]
        if len(texts) != len(images):
            raise ValueError(f"got {len(images)} pictures and {len(texts)} prompts")
        if not images:
            return []
        features: dict[ClipModel, Features] = {}
        columns: dict[str, list[float]] = {}
        for metric in self.available:
            shared = features.setdefault(metric.model, Features(metric.model, images, texts))
            columns[metric.name] = metric.formula(shared).tolist()
        first, *others = columns
        return [
            Score(columns[first][n], detail={"also": {name: columns[name][n] for name in others}})
            for n in range(len(images))
        ]


def _lacking(needs: Sequence[Need]) -> dict[str, RequestError]:
    """What cannot be had: the command that provides it -> why."""
    lacking = {}
    for need in needs:
        try:
            need.fetch()
        except RequestError as error:
            lacking[need.command] = error
    return lacking
