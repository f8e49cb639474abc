"""Stable Diffusion 3.5 Medium's architecture with random weights, from its configuration alone: nothing is fetched.

A random network costs what a trained one does: the same products, the same bytes. :data:`SD35` is the full size;
:data:`REDUCED` keeps its width, at two of its 24 layers and 128² pixels, for machines without a GPU; :data:`SMOKE` is
as small as all kinds of blocks allow. Figures of one scale are never comparable with those of another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from flowopd_eval.adapters import Adapter, AdapterBank, Factors, fresh_adapter
from flowopd_eval.records import SD35_RECORD
from training.architecture import SD35_MEDIUM, Architecture
from training.config import ATTENTION, DistillConfig
from training.data import Embeddings, Text
from training.policies import STUDENT, Expert, Policies, guidance_of, store


@dataclass(frozen=True)
class Scale:
    """How large a random model is: what differs from SD3.5 Medium's parts, pixels a side, T5 tokens, dtype."""

    name: str
    side: int
    text_length: int
    dtype: str
    transformer: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 32
    vae: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> Architecture:
        """The architecture of this scale."""
        record = replace(SD35_RECORD, width=self.side, height=self.side, text_length=self.text_length, dtype=self.dtype)
        vae, transformer = {**SD35_MEDIUM.vae, **self.vae}, {**SD35_MEDIUM.transformer, **self.transformer}
        return replace(SD35_MEDIUM, transformer=transformer, vae=vae, record=record)


SD35 = Scale("full size", 512, 128, "bfloat16")
REDUCED = Scale("two layers of 24", 128, 16, "float32", {"num_layers": 2, "dual_attention_layers": (0,)})
SMOKE = Scale(
    "smoke", 32, 3, "float32",
    {
        "num_layers": 2, "dual_attention_layers": (0,), "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 4,
    },
    rank=4,
    vae={"block_out_channels": [32] * 4},
)  # fmt: skip


def random_transformer(base: Architecture, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    """The transformer of ``base``, frozen, drawn where it will lie."""
    torch.manual_seed(seed)
    with torch.device(device):
        made = SD3Transformer2DModel.from_config(dict(base.transformer))
    # Past diffusers' own `to`, as training.architecture.build: all parts in one precision.
    return nn.Module.to(made.eval().requires_grad_(False), device, dtype)


def random_adapters(transformer: nn.Module, names: Sequence[str], rank: int) -> dict[str, Adapter]:
    """One adapter a name on the layers of the published ones, no factor of which is zero."""
    made = {}
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        fresh = fresh_adapter(transformer, ATTENTION, rank, generator)
        factors = {
            module: Factors(f.A, 0.02 * torch.randn(f.B.shape, generator=generator))
            for module, f in sorted(fresh.factors.items())
        }
        made[name] = Adapter(factors, source=f"random {name}", declared=fresh.declared)
    return made


def random_text(base: Architecture, text: str, length: int) -> tuple[Tensor, Tensor]:
    """Embeddings in the shape of one prompt's, (tokens, width) and (pooled,), that depend on the text alone."""
    generator = torch.Generator().manual_seed(int(hashlib.sha256(text.encode()).hexdigest()[:8], 16))
    shape = base.transformer
    states = torch.randn(base.tokens(length), shape["joint_attention_dim"], generator=generator)
    return states, torch.randn(shape["pooled_projection_dim"], generator=generator)


class RandomEmbeddings(Embeddings):
    """Embeddings of :func:`random_text`, kept in memory."""

    def __init__(self, base: Architecture) -> None:
        self._of = lru_cache(maxsize=None)(lambda text, length: Text(*random_text(base, text, length)))

    def __call__(self, texts: Sequence[str], length: int, device: torch.device | str, dtype: torch.dtype) -> Text:
        return Text.stack([self._of(text, length) for text in texts], device, dtype)


class RandomPolicies(Policies):
    """The policies of a recipe on a backbone and adapters at hand: training's own code, without files.

    Args:
        config: the recipe.
        base: the architecture.
        transformer: the backbone on its device.
        adapters: the student's, the teachers' and the anchor's, by name.
    """

    def __init__(
        self, config: DistillConfig, base: Architecture, transformer: nn.Module, adapters: Mapping[str, Adapter]
    ) -> None:
        self.record = base.record
        self.device, self.dtype = transformer.device, transformer.dtype  # type: ignore[assignment]
        self.guidance = guidance_of(config, self.record)
        self.shape = base.latent_shape
        self.transformer = transformer
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.bank = AdapterBank(transformer, adapters, trainable={STUDENT: config.lora.scale}).to(self.device)
        store(transformer, config, self.dtype)
        self.model = self.bank
        self.experts = {
            name: Expert(name, name, None, self.guidance, self.record.text_length, None)
            for name in adapters
            if name != STUDENT
        }
        self.embeddings = RandomEmbeddings(base)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.shape
