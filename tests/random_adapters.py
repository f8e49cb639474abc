"""Adapters with random factors for the miniature's transformer."""

import torch

from flowopd_eval.adapters import Adapter, Factors, fresh_adapter

TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj"]


def random_adapter(transformer, seed: int) -> Adapter:
    """Rank 4, B of standard deviation 0.05: enough to change a picture plainly."""
    generator = torch.Generator().manual_seed(seed)
    fresh = fresh_adapter(transformer, TARGETS, 4, generator)
    factors = {
        name: Factors(f.A, 0.05 * torch.randn(f.B.shape, generator=generator)) for name, f in fresh.factors.items()
    }
    return Adapter(factors, source=f"random {seed}")
