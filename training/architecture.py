"""The shapes of a base without its weights: Stable Diffusion 3.5 Medium's as data, any folder's as it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowopd_eval.errors import RequestError
from flowopd_eval.models import FAMILIES, fetch_base, resolve
from flowopd_eval.records import SD35_RECORD, SamplingRecord


@dataclass(frozen=True)
class Architecture:
    """A base's configurations as in its folder: transformer, VAE, text encoders by subfolder; and its record."""

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    encoders: Mapping[str, Mapping[str, Any]]
    record: SamplingRecord

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        factor = 2 ** (len(self.vae["block_out_channels"]) - 1)
        return self.transformer["in_channels"], self.record.height // factor, self.record.width // factor

    def tokens_of(self, encoder: str, text_length: int) -> int:
        """Tokens of a prompt: as many as fit for CLIP, ``text_length`` for T5."""
        return int(self.encoders[encoder].get("max_position_embeddings", text_length))

    def tokens(self, text_length: int) -> int:
        """Text tokens the transformer attends to: CLIP's, then ``text_length`` of T5's (zeros where there is no T5)."""
        return self.tokens_of("text_encoder", text_length) + text_length


_CLIP = {"architectures": ["CLIPTextModelWithProjection"], "vocab_size": 49408, "max_position_embeddings": 77}
SD35_MEDIUM = Architecture(
    transformer={
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
        "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
    },
    vae={
        "in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2, "use_quant_conv": False, "use_post_quant_conv": False,
    },
    encoders={
        "text_encoder": _CLIP | {
            "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768,
            "num_hidden_layers": 12, "num_attention_heads": 12,
        },
        "text_encoder_2": _CLIP | {
            "hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280,
            "num_hidden_layers": 32, "num_attention_heads": 20,
        },
        "text_encoder_3": {
            "architectures": ["T5EncoderModel"], "vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "d_kv": 64,
            "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False,
        },
    },
    record=SD35_RECORD,
)  # fmt: skip


def architecture(base: str) -> Architecture:
    """The architecture of a recipe's ``base``: SD3.5-Medium's is known here, a folder's is read. Nothing is downloaded.

    Raises:
        RequestError: a base with an adapter, an unknown name, a folder without configurations, or another repository.
    """
    known = FAMILIES["flow-opd"].base
    if base.startswith("hub:"):
        if base.partition("@")[0] != known:
            raise RequestError(f"The shapes of {base} are not known before it is downloaded; give its folder on disk.")
        return SD35_MEDIUM
    spec = resolve(base)
    if spec.adapter:
        raise RequestError(f"base = {base!r} has an adapter; the backbone is {spec.name.split(':')[0]}:base.")
    if spec.base == known:
        return SD35_MEDIUM
    folder = fetch_base(spec.base)
    encoders = {name: folder / name for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    return Architecture(
        _read_config(folder / "transformer"),
        _read_config(folder / "vae"),
        {name: _read_config(path) for name, path in encoders.items() if path.is_dir()},
        spec.record,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise RequestError(f"{folder.parent} is no diffusers pipeline: {path} is missing.")
    return {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("_")}


def build(kind: Callable[..., nn.Module], config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A model without values, as it is once loaded in ``dtype``: parameters and buffers alike."""
    with torch.device("meta"):
        # Past diffusers' own `to`, which warns of modules that it would have kept in fp32; there are none.
        return nn.Module.to(kind(config).eval().requires_grad_(False), dtype)


def text_encoder(config: Mapping[str, Any]) -> nn.Module:
    """The text encoder of a configuration, by the class it names."""
    import transformers

    made = getattr(transformers, config["architectures"][0])
    return made(made.config_class.from_dict(dict(config)))
