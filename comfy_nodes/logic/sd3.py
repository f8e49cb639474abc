"""The linear layers of Stable Diffusion 3's transformer, by diffusers' names.

Needed for files in kohya's layout, which writes a module's dots as underscores: only the architecture tells which they
were. diffusers itself is not among ComfyUI's dependencies.
"""

from __future__ import annotations

import re

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_IN_BLOCK = (
    *(f"attn.{name}" for name in _ATTENTION),
    *(f"attn2.{name}" for name in _ATTENTION[:4]),
    "norm1.linear",
    "norm1_context.linear",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
_AROUND = (
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "time_text_embed.text_embedder.linear_1",
    "time_text_embed.text_embedder.linear_2",
    "context_embedder",
    "norm_out.linear",
    "proj_out",
)
_FLAT_IN_BLOCK = {name.replace(".", "_"): name for name in _IN_BLOCK}
_FLAT_AROUND = {name.replace(".", "_"): name for name in _AROUND}


def dotted(flat: str) -> str | None:
    """``transformer_blocks_7_attn_to_out_0`` -> ``transformer_blocks.7.attn.to_out.0``; None for no layer of SD3."""
    block = re.fullmatch(r"transformer_blocks_(\d+)_(.+)", flat)
    if block is None:
        return _FLAT_AROUND.get(flat)
    name = _FLAT_IN_BLOCK.get(block[2])
    return name and f"transformer_blocks.{block[1]}.{name}"
