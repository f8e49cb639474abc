"""Score: GenEval's verdict or the OCR read-out of pictures."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..logic.errors import PackError
from ..logic.judges import Verdict
from ..logic.pictures import annotated, to_pictures
from .common import CATEGORY
from .judging import judging_inputs, memory_given_back, ready_judge


class FlowOPDScore(io.ComfyNode):
    """IMAGE batch and prompt in; the pictures with what was seen on them, the mean score, and the reasons out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowOPDScore",
            display_name="Score",
            category=CATEGORY,
            description=(
                "Judges pictures against their prompt: geneval (objects, counts, colours, positions), ocr (text in "
                "straight double quotes), shapes_geneval (the miniature). Needs the package flowopd-eval, whose "
                "detector is fetched on first use."
            ),
            inputs=[io.Image.Input("images"), *judging_inputs()],
            outputs=[
                io.Image.Output(display_name="annotated"),
                io.Float.Output(display_name="score"),
                io.String.Output(display_name="verdicts"),
            ],
        )

    @classmethod
    def execute(cls, images: torch.Tensor, prompt: str, bench: str, clauses: str) -> io.NodeOutput:
        with memory_given_back():
            verdicts = _judge_all(images, bench, prompt, clauses)
        values = [verdict.value for verdict in verdicts if verdict.value is not None]
        if not values:
            raise PackError(f"No picture could be judged; the last: {verdicts[-1].text}")
        lines = [
            f"#{n} {'-' if verdict.value is None else f'{verdict.value:.2f}'} {verdict.text}"
            for n, verdict in enumerate(verdicts)
        ]
        mean = sum(values) / len(values)
        said = "\n".join([f"{bench}: mean {mean:.3f} over {len(values)} of {len(verdicts)} pictures", *lines])
        shown = annotated(images, [verdict.boxes for verdict in verdicts], lines)
        return io.NodeOutput(shown, mean, said, ui=ui.PreviewText(said))


def _judge_all(images: torch.Tensor, bench: str, prompt: str, clauses: str) -> list[Verdict]:
    """Picture by picture, so that it can be interrupted between any two."""
    judge = ready_judge(bench, prompt, clauses)
    bar = comfy.utils.ProgressBar(len(images))
    verdicts = []
    for picture in to_pictures(images):
        comfy.model_management.throw_exception_if_processing_interrupted()
        verdicts += judge([picture])
        bar.update(1)
    return verdicts


NODE = FlowOPDScore
