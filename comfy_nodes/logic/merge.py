"""Several LoRAs as one: the exact weighted mean of their changes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .errors import PackError
from .lora import Lora, Pair


def merge_loras(weighted: Sequence[tuple[Lora, float]]) -> Lora:
    """``sum_i w_i B_i A_i / sum_i w_i``, module by module, nothing cut off: the ranks add up.

    The mean of the products, not the product of the means (that is another and worse adapter: (B1 + B2)(A1 + A2) / 4
    has the cross terms B1 A2 and B2 A1). A module that a LoRA lacks counts as no change.

    Args:
        weighted: LoRAs with their weights, which need not sum to 1.

    Raises:
        PackError: nothing to merge, a weight that is not finite, weights that sum to zero, or LoRAs of models of
            different sizes.
    """
    weights = [weight for _, weight in weighted]
    if not weighted:
        raise PackError("Nothing to merge: choose at least two LoRAs.")
    if not all(map(math.isfinite, weights)) or abs(sum(weights)) < 1e-6:
        raise PackError(f"The weights of a mean must be finite and not sum to zero, but they are {weights}.")
    shares = [(lora, weight / sum(weights)) for lora, weight in weighted if weight]
    modules = sorted({module for lora, _ in shares for module in lora.pairs})
    for module in modules:
        sizes = {lora.name: _size(lora.pairs[module]) for lora, _ in shares if module in lora.pairs}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise PackError(f"{module} has another size in each: {told} (out x in). They are of different models.")
    pairs = {
        module: _joined([(lora.pairs[module], w) for lora, w in shares if module in lora.pairs]) for module in modules
    }
    recipe = " + ".join(f"{share:.3g} x {lora.name}" for lora, share in shares)
    return Lora(f"merge ({recipe})", pairs, None, "the merged files, each at its true scale")


def _size(pair: Pair) -> str:
    a, b = pair
    return f"{b.shape[0]}x{a.shape[1]}"


def _joined(parts: Sequence[tuple[Pair, float]]) -> Pair:
    """Factors of ``sum_i w_i B_i A_i``: A stacked on A, B beside B."""
    a = torch.cat([a for (a, _), _ in parts])
    b = torch.cat([(w * b.double()).float() for (_, b), w in parts], dim=1)
    return a, b
