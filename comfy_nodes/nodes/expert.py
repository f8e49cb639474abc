"""Flow-OPD Expert: the published student and experts by name."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..logic.experts import EXPERTS, NAMES, find_expert, installed_expert
from .common import CATEGORY, fingerprint, installed, loras_folder, open_lora, patched, report


class FlowOPDExpert(io.ComfyNode):
    """MODEL and a name in, MODEL out; ``base`` is the model as it came."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowOPDExpert",
            display_name="Flow-OPD Expert",
            category=CATEGORY,
            description=(
                "The published Flow-OPD student or one of its experts on Stable Diffusion 3.5 Medium, from the LoRA "
                "folder. What is not there is named with its address and its place; nothing is downloaded."
            ),
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("expert", options=list(NAMES), default=NAMES[0]),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.01),
                io.String.Input(
                    "routed", optional=True, force_input=True, tooltip="A name from Route by prompt; replaces `expert`."
                ),
            ],
            outputs=[io.Model.Output(display_name="patched"), io.String.Output(display_name="report")],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> list[str]:
        files = installed()  # a linked name is not known yet, so all of them count
        return fingerprint(installed_expert(name, files) for name in EXPERTS)

    @classmethod
    def execute(cls, model: Any, expert: str, strength: float, routed: str | None = None) -> io.NodeOutput:
        name = (routed or expert).strip()
        file = find_expert(name, installed(), loras_folder())
        if file is None:
            return io.NodeOutput(model, "base: the model as it came", ui=ui.PreviewText("base: the model as it came"))
        lora = open_lora(file)
        said = f"{name}, {report(lora, strength)}"
        return io.NodeOutput(patched(model, lora, strength), said, ui=ui.PreviewText(said))


NODE = FlowOPDExpert
