"""Route by prompt: which expert a prompt is for."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..logic.route import DEFAULT_RULES, route
from .common import CATEGORY


class FlowOPDRoute(io.ComfyNode):
    """Text in, expert name out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowOPDRoute",
            display_name="Route by prompt",
            category=CATEGORY,
            description=(
                "Chooses an expert by rules, one a line: CONDITIONS -> EXPERT. Conditions, by commas: quoted text, "
                "count, colour, position, otherwise, words a|b, or a regular expression /.../. The first rule that "
                "holds decides."
            ),
            inputs=[
                io.String.Input("prompt", multiline=True),
                io.String.Input("rules", multiline=True, default=DEFAULT_RULES),
            ],
            outputs=[io.String.Output(display_name="expert"), io.String.Output(display_name="reason")],
        )

    @classmethod
    def execute(cls, prompt: str, rules: str) -> io.NodeOutput:
        routed = route(prompt, rules)
        return io.NodeOutput(routed.expert, routed.reason, ui=ui.PreviewText(routed.reason))


NODE = FlowOPDRoute
