"""Keep best of N: draw until a picture passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..logic.best import Best, keep_best
from ..logic.judges import Verdict
from ..logic.pictures import annotated, to_pictures
from .common import CATEGORY
from .judging import judging_inputs, memory_given_back, ready_judge
from .sampling import Progress, Sampling, sampling_inputs


class FlowOPDKeepBest(io.ComfyNode):
    """Draws with seed, seed + 1, … and judges each; out come the best picture and its seed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowOPDKeepBest",
            display_name="Keep best of N",
            category=CATEGORY,
            description=(
                "Draws with seed, seed + 1, ... until a picture's score reaches pass_at or N draws are done, and keeps "
                "the best. A KSampler with the seed that comes out draws it again. Needs the package flowopd-eval."
            ),
            inputs=[
                io.Model.Input("model"),
                *judging_inputs(),
                io.Int.Input("n", default=4, min=1, max=256),
                io.Float.Input("pass_at", default=1.0, min=0.0, max=1.0, step=0.01),
                *sampling_inputs(),
            ],
            outputs=[
                io.Image.Output(display_name="image"),
                io.Image.Output(display_name="annotated"),
                io.Float.Output(display_name="score"),
                io.Int.Output(display_name="best_seed"),
                io.String.Output(display_name="verdict"),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, prompt: str, bench: str, clauses: str, n: int, pass_at: float, seed: int, **settings: Any
    ) -> io.NodeOutput:
        sampling = Sampling(**settings)
        with memory_given_back():
            best = _draw_and_judge(sampling, model, (bench, prompt, clauses), n, pass_at, seed)
        image = best.picture[None]
        value = float(best.verdict.value or 0.0)
        how = "passed" if best.passed else f"none of {best.drawn} passed; the best"
        said = f"{how}: {value:.2f} {best.verdict.text} (seed {_seed(seed, best.draw)}, #{best.k}, {best.drawn} drawn)"
        shown = annotated(image, [best.verdict.boxes], [said])
        return io.NodeOutput(image, shown, value, _seed(seed, best.draw), said, ui=ui.PreviewText(said))


def _draw_and_judge(
    sampling: Sampling, model: Any, request: tuple[str, str, str], n: int, pass_at: float, seed: int
) -> Best[torch.Tensor]:
    shifted = sampling.shifted(model)
    judge = ready_judge(*request)  # before the first picture: a prompt that cannot be judged costs no drawing
    progress = Progress(shifted, n, sampling.steps)

    def draw(index: int) -> Sequence[torch.Tensor]:
        return list(sampling.decode(sampling.draw(shifted, _seed(seed, index), progress.of(index))))

    def verdicts(images: Sequence[torch.Tensor]) -> list[Verdict]:
        return judge(to_pictures(torch.stack(list(images))))

    return keep_best(draw, verdicts, n, pass_at)


def _seed(seed: int, draw: int) -> int:
    """Seeds go round at 2**64, as ComfyUI's do."""
    return (seed + draw) % 2**64


NODE = FlowOPDKeepBest
