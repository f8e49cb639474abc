"""Whether every part of a LoRA lands on a weight of the model: ComfyUI itself would log a line and draw on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import PackError, listing
from .layouts import DIFFUSERS
from .lora import Lora

Target = str | tuple[Any, ...]  # a weight's key, or (key, (dimension, start, length) of its part, …)


def check_fit(lora: Lora, key_map: Mapping[str, Target], shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that each module has a weight of its shape.

    Args:
        lora: what is to be patched in.
        key_map: ComfyUI's map from a LoRA's names to the model's weights (``comfy.lora.model_lora_keys_unet``).
        shapes: shapes of the model's weights by key.

    Raises:
        PackError: modules without a weight, or with one of another shape; with counts and names.
    """
    total = len(lora.pairs)
    targets = {module: key_map.get(DIFFUSERS + module) for module in lora.pairs}
    unmatched = [module for module, target in targets.items() if target is None or _key(target) not in shapes]
    if unmatched:
        raise PackError(
            f"{lora.name}: {len(unmatched)} of {total} modules match nothing in this model: {listing(unmatched)}. It "
            "was made for another model; the Flow-OPD experts are for Stable Diffusion 3.5 Medium."
        )
    misfits = []
    for module, (a, b) in lora.pairs.items():
        wanted = _shape(targets[module], shapes)
        if (b.shape[0], a.shape[1]) != wanted:
            misfits.append(f"{module} (LoRA {b.shape[0]}x{a.shape[1]}, model {wanted[0]}x{wanted[1]})")
    if misfits:
        raise PackError(
            f"{lora.name}: {len(misfits)} of {total} modules have another shape (out x in) than the model: "
            f"{listing(misfits)}. It was made for another size of this model."
        )


def _key(target: Target) -> str:
    return target if isinstance(target, str) else target[0]


def _shape(target: Target | None, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """Rows and columns of a target: q, k and v are thirds of one weight."""
    assert target is not None
    shape = list(shapes[_key(target)])
    if not isinstance(target, str) and len(target) > 1 and target[1] is not None:
        dimension, _, length = target[1]
        shape[dimension] = length
    return shape[0], math.prod(shape[1:])
