"""Flow-OPD in ComfyUI: the student and every expert at their true strength.

``nodes`` know ComfyUI and little else; ``logic`` knows nothing of ComfyUI and is tested without it. Written against
ComfyUI 0.3.64 (Comfy-Org/ComfyUI at a125cd84): ``comfy_api/latest``, ``comfy/lora.py``, ``comfy/sample.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .extension import FlowOPDExtension


async def comfy_entrypoint() -> FlowOPDExtension:
    """What ComfyUI asks a pack of V3 nodes for."""
    from .extension import FlowOPDExtension

    return FlowOPDExtension()
