"""Compare experts: one prompt, one noise, one picture an expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ..logic.arms import Outcome, each_arm
from ..logic.experts import EXPERTS, find_arms, installed_expert
from ..logic.pictures import card, grid, labelled
from .common import CATEGORY, fingerprint, installed, loras_folder, open_lora, patched
from .sampling import Progress, Sampling, sampling_inputs


class FlowOPDCompare(io.ComfyNode):
    """MODEL and names in; labelled pictures, the pictures themselves, all in one picture, and a report out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowOPDCompare",
            display_name="Compare experts",
            category=CATEGORY,
            description=(
                "Draws the same prompt from the same noise with each model named, through ComfyUI's own sampling: a "
                "KSampler with the same settings and seed draws the same pictures. A model that fails while it draws "
                "has a card with the reason in its place, and is left out of `images`."
            ),
            inputs=[
                io.Model.Input("model"),
                io.String.Input(
                    "experts",
                    multiline=True,
                    default="base\nstudent\ngeneval\nocr",
                    tooltip="One a line: base, student, geneval, ocr, pickscore, deqa, or a file of the LoRA folder.",
                ),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.01),
                *sampling_inputs(),
            ],
            outputs=[
                io.Image.Output(display_name="labelled"),
                io.Image.Output(display_name="images"),
                io.Image.Output(display_name="grid"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> list[str]:
        files = installed()
        named = [line.strip() for line in str(inputs.get("experts") or "").splitlines()]
        return fingerprint([*(installed_expert(name, files) for name in EXPERTS), *(f for f in files if f in named)])

    @classmethod
    def execute(cls, model: Any, experts: str, strength: float, seed: int, **settings: Any) -> io.NodeOutput:
        sampling = Sampling(**settings)
        arms = find_arms(experts, installed(), loras_folder())
        base = sampling.shifted(model)
        # every file is read and every patch fitted before the first picture is drawn
        models = [
            Outcome(arm.label, patched(base, open_lora(arm.file), strength) if arm.file else base) for arm in arms
        ]
        progress = Progress(base, len(arms), sampling.steps)
        interrupted = comfy.model_management.InterruptProcessingException
        latents = each_arm(lambda n, each: sampling.draw(each, seed, progress.of(n)), models, interrupted)
        pictures = each_arm(lambda _, each: sampling.decode(each), latents, interrupted)
        said = "\n".join(arm.about() for arm in pictures)
        named = _labelled(pictures, sampling.batch)
        rows = named.unflatten(0, (len(arms), -1)).transpose(0, 1).flatten(0, 1)  # a row a noise, a column a model
        drawn = torch.cat([arm.value for arm in pictures if arm.value is not None])
        return io.NodeOutput(named, drawn, grid(rows, len(arms)), said, ui=ui.PreviewText(said))


def _labelled(arms: Sequence[Outcome[torch.Tensor]], batch: int) -> torch.Tensor:
    """All arms' pictures under their names; a card with the reason where there are none."""
    like = next(arm.value for arm in arms if arm.value is not None)
    labels = [arm.label if batch == 1 else f"{arm.label} #{k}" for arm in arms for k in range(batch)]
    return labelled(torch.cat([card(arm.about(), like) if arm.value is None else arm.value for arm in arms]), labels)


NODE = FlowOPDCompare
