"""Compare experts: one prompt, one noise, one picture an expert."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..logic.experts import EXPERTS, find_arms, installed_expert
from ..logic.pictures import grid, labelled
from .common import CATEGORY, fingerprint, installed, loras_folder, open_lora, patched
from .sampling import Progress, Sampling, sampling_inputs


class FlowOPDCompare(io.ComfyNode):
    """MODEL and names in; labelled pictures, the pictures themselves, and all in one picture out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowOPDCompare",
            display_name="Compare experts",
            category=CATEGORY,
            description=(
                "Draws the same prompt from the same noise with each model named, through ComfyUI's own sampling: a "
                "KSampler with the same settings and seed draws the same pictures."
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
        models = [patched(base, open_lora(arm.file), strength) if arm.file else base for arm in arms]
        progress = Progress(base, len(arms), sampling.steps)
        latents = [sampling.draw(each, seed, progress.of(n)) for n, each in enumerate(models)]
        images = torch.cat([sampling.decode(each) for each in latents])
        labels = [
            arm.label if sampling.batch == 1 else f"{arm.label} #{k}" for arm in arms for k in range(sampling.batch)
        ]
        named = labelled(images, labels)
        rows = named.unflatten(0, (len(arms), -1)).transpose(0, 1).flatten(0, 1)  # a row a noise, a column a model
        return io.NodeOutput(named, images, grid(rows, len(arms)))


NODE = FlowOPDCompare
