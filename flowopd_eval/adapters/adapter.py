"""What a LoRA adapter is here, and whether it fits a transformer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from flowopd_eval.errors import RequestError


class Factors(NamedTuple):
    """One module's low-rank change ``B @ A`` of its weight: A (r, in), B (out, r)."""

    A: torch.Tensor
    B: torch.Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter with its scale inside B: the weight of module ``m`` becomes ``W + factors[m].B @ factors[m].A``.

    ``factors`` are fp32 on the CPU, keyed by the transformer's module names (``transformer_blocks.0.attn.to_q``).
    ``alpha`` is the LoRA alpha that was found and ``alpha_from`` where (None where it differs between modules).
    ``file_sha256`` is the hash of the file it was read from. ``declared`` holds those fields of PEFT's ``LoraConfig``
    that say which modules the adapter claims to cover; it is empty where no config came with it. ``made_for`` is the
    backbone that the config names: a repository, or a folder of whoever trained it.
    """

    factors: Mapping[str, Factors]
    source: str = ""
    alpha: float | None = None
    alpha_from: str = ""
    file_sha256: str | None = None
    declared: Mapping[str, Any] = field(default_factory=dict)
    made_for: str | None = None

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(f.rank for f in self.factors.values())

    @cached_property
    def sha256(self) -> str:
        """Hash of names, shapes and fp32 values with the scale inside: one adapter in two layouts has one hash."""
        digest = hashlib.sha256()
        for name in sorted(self.factors):
            for side, tensor in zip("AB", self.factors[name], strict=True):
                digest.update(f"{name}.{side}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()


def listing(names: Iterable[str], limit: int = 4) -> str:
    """``names`` in order, cut after ``limit``: ``a, b and 7 more``."""
    ordered = sorted(names)
    rest = len(ordered) - limit
    return ", ".join(ordered[:limit]) + (f" and {rest} more" if rest > 0 else "")


def linear_modules(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of ``transformer`` by name."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}


def targets(declared: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """Those of ``names`` that a LoRA config covers, by PEFT's own rule."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(**declared)
    return {name for name in names if check_target_module_exists(config, name)}


def check_adapter(adapter: Adapter, transformer: nn.Module) -> None:
    """Check that every part of ``adapter`` lands on a linear layer of ``transformer`` and that no layer is left out.

    A layer is left out where the adapter's config covers it and the adapter does not; without a config, where the
    same layer of another block is covered.

    Raises:
        RequestError: modules that the transformer lacks, shapes that differ, modules left out; with counts and names.
    """
    linears = linear_modules(transformer)
    total, where = len(adapter.factors), f"Adapter {adapter.source!r}"
    unmatched = [name for name in adapter.factors if name not in linears]
    if unmatched:
        raise RequestError(
            f"{where}: {len(unmatched)} of {total} modules match no linear layer of {type(transformer).__name__}: "
            f"{listing(unmatched)}. It was made for another model."
        )
    misfits = [
        f"{name} (adapter {b.shape[0]}x{a.shape[1]}, layer {linears[name].out_features}x{linears[name].in_features})"
        for name, (a, b) in adapter.factors.items()
        if (b.shape[0], a.shape[1]) != (linears[name].out_features, linears[name].in_features)
    ]
    if misfits:
        raise RequestError(
            f"{where}: {len(misfits)} of {total} modules have another shape (out x in) than the layer: "
            f"{listing(misfits)}. It was made for another size of this model."
        )
    missing = _expected(adapter, linears) - set(adapter.factors)
    if missing:
        raise RequestError(
            f"{where}: {len(missing)} modules left out that it should cover (it has {total}): {listing(missing)}. "
            "The file is incomplete; if it is meant to leave them out, `flowopd-eval convert FILE --out FOLDER` writes "
            "it with a config that says so: give FOLDER."
        )


def _expected(adapter: Adapter, linears: Collection[str]) -> set[str]:
    if adapter.declared:
        return targets(adapter.declared, linears)
    families = {_family(name) for name in adapter.factors}
    return {name for name in linears if _family(name) in families}


def _family(name: str) -> str:
    """``transformer_blocks.7.attn.to_q`` -> ``transformer_blocks.*.attn.to_q``: one layer in whichever block."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def fresh_adapter(
    transformer: nn.Module, target_modules: Sequence[str], rank: int, generator: torch.Generator | None = None
) -> Adapter:
    """An adapter before training: A normal with std 1/rank (PEFT's ``init_lora_weights="gaussian"``), B zero.

    Args:
        transformer: the backbone.
        target_modules: module names or their last parts (``attn.to_q``), as in PEFT's config.
        rank: r of every module, >= 1.
        generator: source of A.

    Raises:
        RequestError: a target that no linear layer answers to.
    """
    declared = {"target_modules": list(target_modules)}
    linears = linear_modules(transformer)
    idle = [t for t in target_modules if not targets({"target_modules": [t]}, linears)]
    if idle:
        raise RequestError(f"No linear layer of {type(transformer).__name__} answers to {listing(idle)}.")
    factors = {}
    for name in sorted(targets(declared, linears)):
        out_features, in_features = linears[name].out_features, linears[name].in_features
        a = torch.randn(rank, in_features, generator=generator) / rank
        factors[name] = Factors(a, torch.zeros(out_features, rank))
    return Adapter(factors, source="fresh", declared=declared)
