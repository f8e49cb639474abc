"""A LoRA at its true scale: read from any layout, written in one that ComfyUI and diffusers both load right."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from .errors import PackError, listing
from .layouts import DIFFUSERS, sort_keys
from .scales import CONFIG, find_scale

Pair = tuple[torch.Tensor, torch.Tensor]
KEPT = 4  # LoRAs kept in CPU memory; their tensors are those of the patches, so that one in use costs nothing more


@dataclass(frozen=True, eq=False)
class Lora:
    """Changes of a transformer's weights: ``pairs[module]`` is A (r, in) and B (out, r), fp32 on the CPU.

    The weight of ``module`` becomes ``W + B @ A``: the scale is inside B. ``alpha`` (None: it differs, or none is
    named) and ``origin`` say which scale was found and where.
    """

    name: str
    pairs: Mapping[str, Pair]
    alpha: float | None
    origin: str

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(a.shape[0] for a, _ in self.pairs.values())

    def about(self) -> str:
        """One line: modules, rank, alpha and its origin."""
        alpha = "" if self.alpha is None else f"{self.alpha:g}, "
        return f"{self.name}: {len(self.pairs)} modules, rank {self.rank}, alpha {alpha}from {self.origin}"


def read_lora(path: str | Path, name: str = "") -> Lora:
    """Read a LoRA file; the last few are kept by the hash of their content.

    Args:
        path: a ``.safetensors`` file; an ``adapter_config.json`` in its folder is taken for a PEFT file's.
        name: what messages call it.

    Raises:
        PackError: a pickle, a broken file, a layout or kind that is not supported, no scale, values that are not
            finite, or all of B zero.
    """
    path = Path(path)
    name = name or path.name
    if path.suffix.lower() != ".safetensors":
        raise PackError(f"{name} is no .safetensors file. Others can run code when they are opened, and are not read.")
    beside = path.parent / CONFIG
    try:
        config = beside.read_text(encoding="utf-8") if beside.is_file() else None
    except UnicodeDecodeError as error:
        raise PackError(f"The {CONFIG} beside {name} is no UTF-8 text: {error}.") from error
    return _read(str(path), name, file_sha256(path), config)


def file_sha256(path: Path) -> str:
    """Hash of a file's content, taken anew when its size or time changed."""
    stat = path.stat()
    return _hashed(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _hashed(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@lru_cache(maxsize=KEPT)
def _read(path: str, name: str, sha256: str, config: str | None) -> Lora:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            header = file.metadata() or {}
    except SafetensorError as error:
        raise PackError(f"{name} is truncated or no safetensors file ({error}). Fetch it again.") from error
    keys = sort_keys(tensors, name)
    scale = find_scale(keys, header, config, sha256, name)
    pairs = {
        module: (a.float().contiguous(), b.float() * scale.of(module, a.shape[0]))
        for module, (a, b) in keys.pairs.items()
    }
    _check_values(pairs, name)
    return Lora(name, pairs, scale.alpha, scale.origin)


def _check_values(pairs: Mapping[str, Pair], name: str) -> None:
    broken = [module for module, (a, b) in pairs.items() if not (a.isfinite().all() and b.isfinite().all())]
    if broken:
        raise PackError(f"{name}: NaN or infinity in {len(broken)} of {len(pairs)} modules: {listing(broken)}.")
    if not any(b.any() for _, b in pairs.values()):
        raise PackError(f"{name}: all of lora_B is zero, so it changes nothing: it was saved before training.")


def state_dict(lora: Lora) -> dict[str, torch.Tensor]:
    """``lora`` under the keys of diffusers, without alpha: ComfyUI and diffusers both take it as it is."""
    return {
        f"{DIFFUSERS}{module}.lora_{side}.weight": tensor
        for module, pair in lora.pairs.items()
        for side, tensor in zip("AB", pair, strict=True)
    }


def write_lora(lora: Lora, path: str | Path) -> None:
    """Write ``lora`` with its scale inside; the file is whole or absent, and its bytes depend on the LoRA alone."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file({key: t.contiguous() for key, t in state_dict(lora).items()}, part, metadata={"format": "pt"})
    part.replace(path)
