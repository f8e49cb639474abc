"""Flow-OPD LoRA: any LoRA file of Stable Diffusion 3.5 at its true scale."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..logic.errors import check_choice
from .common import CATEGORY, fingerprint, installed, open_lora, patched, report


class FlowOPDLora(io.ComfyNode):
    """MODEL in, MODEL out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowOPDLora",
            display_name="Flow-OPD LoRA",
            category=CATEGORY,
            description=(
                "Puts a LoRA on Stable Diffusion 3.5 at the strength it was trained with, whatever layout its file is "
                "in, and fails if a part of it finds no place. A file that hides its scale is refused."
            ),
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("lora", options=installed()),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.01),
            ],
            outputs=[io.Model.Output(display_name="patched"), io.String.Output(display_name="report")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str | None = None, **others: Any) -> list[str]:
        return fingerprint([lora])

    @classmethod
    def execute(cls, model: Any, lora: str, strength: float) -> io.NodeOutput:
        check_choice("LoRA", lora, installed())
        read = open_lora(lora)
        said = report(read, strength)
        return io.NodeOutput(patched(model, read, strength), said, ui=ui.PreviewText(said))


NODE = FlowOPDLora
