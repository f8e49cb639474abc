"""A tiny SD3 transformer, its inputs, and adapters made by PEFT itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model

TARGETS = ["attn.to_q", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.to_out.0", "attn.to_add_out"]


@pytest.fixture(scope="session")
def base() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=1,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


@pytest.fixture
def transformer(base: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """A copy that the test may change."""
    return copy.deepcopy(base)


@pytest.fixture(scope="session")
def inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """Rows of a batch: latents (B, 16, 8, 8), text (B, 5, 64), pooled text (B, 64), timesteps (B,)."""

    def make(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        return {
            "hidden_states": torch.randn(rows, 16, 8, 8, generator=g),
            "encoder_hidden_states": torch.randn(rows, 5, 64, generator=g),
            "pooled_projections": torch.randn(rows, 64, generator=g),
            "timestep": torch.rand(rows, generator=g) * 1000,
        }

    return make


@pytest.fixture(scope="session")
def velocity(inputs: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., torch.Tensor]:
    """Velocity (B, 16, 8, 8) of a model for the standard inputs."""

    def make(model: torch.nn.Module, rows: int = 2) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs(rows), return_dict=False)[0]

    return make


@pytest.fixture(scope="session")
def make_peft(base: SD3Transformer2DModel) -> Callable[..., PeftModel]:
    """A trained-looking adapter, by PEFT: r = 4 and alpha = 8 unless told, B random."""

    def make(seed: int = 0, **changes: object) -> PeftModel:
        config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": "gaussian"} | changes
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
        g = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=g) * 0.2
        return model.eval()

    return make


@pytest.fixture(scope="session")
def peft_model(make_peft: Callable[..., PeftModel]) -> PeftModel:
    return make_peft()


@pytest.fixture(scope="session")
def peft_folder(peft_model: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    peft_model.save_pretrained(folder)
    return folder
