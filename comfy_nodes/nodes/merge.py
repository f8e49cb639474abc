"""Merge experts: two to four LoRAs as one patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..logic.errors import PackError, check_choice
from ..logic.lora import Lora, write_lora
from ..logic.merge import merge_loras
from .common import CATEGORY, fingerprint, installed, open_lora, patched, report

NONE = "none"


class FlowOPDMerge(io.ComfyNode):
    """The exact weighted mean of the LoRAs' changes, on a model and, if asked for, in a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = installed()
        return io.Schema(
            node_id="FlowOPDMerge",
            display_name="Merge experts",
            category=CATEGORY,
            description=(
                "Two to four LoRAs as one: the exact weighted mean of their changes (of the products B A, not of the "
                "factors), each at its true scale. The weights need not sum to 1. With a name in save_as the merge is "
                "also written to output/loras, where ComfyUI finds it."
            ),
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("lora_1", options=files),
                io.Float.Input("weight_1", default=1.0, min=-10.0, max=10.0, step=0.01),
                io.Combo.Input("lora_2", options=files),
                io.Float.Input("weight_2", default=1.0, min=-10.0, max=10.0, step=0.01),
                io.Combo.Input("lora_3", options=[NONE, *files], default=NONE),
                io.Float.Input("weight_3", default=1.0, min=-10.0, max=10.0, step=0.01),
                io.Combo.Input("lora_4", options=[NONE, *files], default=NONE),
                io.Float.Input("weight_4", default=1.0, min=-10.0, max=10.0, step=0.01),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.01),
                io.String.Input("save_as", default="", tooltip="Empty: nothing is written."),
            ],
            outputs=[io.Model.Output(display_name="patched"), io.String.Output(display_name="report")],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> list[str]:
        return fingerprint(inputs.get(f"lora_{n}") for n in range(1, 5))

    @classmethod
    def execute(cls, model: Any, strength: float, save_as: str, **inputs: Any) -> io.NodeOutput:
        chosen = [(inputs[f"lora_{n}"], inputs[f"weight_{n}"]) for n in range(1, 5)]
        chosen = [(file, weight) for file, weight in chosen if file != NONE]
        for file, _ in chosen:
            check_choice("LoRA", file, installed())
        merged = merge_loras([(open_lora(file), weight) for file, weight in chosen])
        said = report(merged, strength)
        clone = patched(model, merged, strength)  # first, so that nothing is written that does not fit
        if save_as.strip():
            said += f"; written to {_save(merged, save_as.strip())}"
        return io.NodeOutput(clone, said, ui=ui.PreviewText(said))


def _save(lora: Lora, name: str) -> Path:
    """Write below output/loras, under the next free number."""
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise PackError(f"save_as is a name below output/loras, not {name!r}.")
    folder, stem, number, _, _ = folder_paths.get_save_image_path(f"loras/{name}", folder_paths.get_output_directory())
    path = Path(folder) / f"{stem}_{number:05}_.safetensors"
    write_lora(lora, path)
    return path


NODE = FlowOPDMerge
