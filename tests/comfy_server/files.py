"""The files that the server's tests need: the miniature in forms that ComfyUI loads, and LoRAs of every layout."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flowopd_eval.adapters import fresh_adapter
from flowopd_eval.models import TINY_RECORD, fetch_base
from flowopd_eval.pipeline import FlowOPDPipeline

Tensors = dict[str, torch.Tensor]
RANK, ALPHA = 32, 64  # as the published adapters
TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"] + [
    f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
]
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
# Published experts whose folders are there; of pickscore and deqa none, so that missing files can be seen.
EXPERTS = {"student": "Flow-OPD", "geneval": "SD3.5M-FlowGRPO-GenEval", "ocr": "SD3.5M-FlowGRPO-Text"}
# What the example workflows ask of SD3.5 -> what is asked of the miniature, with the same expert by the routing rules.
PROMPTS = {
    "a photo of a red car and a blue bench": "a photo of a red circle and a blue square",
    'a cat that holds a sign that says "hello"': 'a sign that says "cat"',
    "a photo of three dogs": "a photo of two circles",
    "a photo of three dogs left of a red bench": "a photo of a star left of a red circle",
    "": "",
}


@cache
def miniature() -> FlowOPDPipeline:
    """The miniature as the toolkit runs it."""
    pipe = FlowOPDPipeline.from_pretrained(fetch_base("builtin:tiny"), record=TINY_RECORD, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def factors(seed: int) -> Tensors:
    """``MODULE.lora_A.weight`` and ``.lora_B.weight`` of a random expert: enough to change a picture plainly."""
    generator = torch.Generator().manual_seed(seed)
    fresh = fresh_adapter(miniature().transformer, TARGETS, RANK, generator).factors
    found = {}
    for name, pair in fresh.items():
        found[f"{name}.lora_A.weight"] = pair.A.clone()
        found[f"{name}.lora_B.weight"] = 0.02 * torch.randn(pair.B.shape, generator=generator)
    return found


def layouts(plain: Tensors) -> dict[str, tuple[Tensors, dict[str, str], dict | None]]:
    """One adapter of true scale 2 in every layout: tensors, header, ``adapter_config.json`` beside it."""
    peft = {f"base_model.model.{key}": value for key, value in plain.items()}
    named = {key.replace(".weight", ".default.weight"): value for key, value in peft.items()}
    diffusers = {f"transformer.{key}": value for key, value in plain.items()}
    old = {
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value * (ALPHA / RANK if "_B" in key else 1)
        for key, value in diffusers.items()
    }
    baked = {key: value * (ALPHA / RANK if "lora_B" in key else 1) for key, value in diffusers.items()}
    alphas = {key.replace(".lora_A.weight", ".alpha"): torch.tensor(float(ALPHA)) for key in diffusers if "_A" in key}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in CONFIG.items()})}
    kohya = {}
    for key, value in plain.items():
        module, side = re.fullmatch(r"(.+)\.lora_(A|B)\.weight", key).groups()
        flat = "lora_transformer_" + module.replace(".", "_")
        kohya[f"{flat}.lora_{'down' if side == 'A' else 'up'}.weight"] = value
        kohya[f"{flat}.alpha"] = torch.tensor(float(ALPHA))
    return {
        "peft": (peft, {}, CONFIG),
        "peft-named": (named, {}, CONFIG),
        "bare": (plain, {}, CONFIG),
        "diffusers-baked": (baked, {}, None),
        "diffusers-old": (old, {}, None),
        "diffusers-alpha": ({**diffusers, **alphas}, {}, None),
        "diffusers-header": (diffusers, header, None),
        "kohya": (kohya, {}, None),
    }


def wrong(plain: Tensors) -> dict[str, tuple[Tensors, dict[str, str], dict | None]]:
    """Files that must be refused."""
    peft = {f"base_model.model.{key}": value for key, value in plain.items()}
    elsewhere = {re.sub(r"blocks\.(\d)", r"blocks.9\1", key): value for key, value in peft.items()}
    some = {key.replace("blocks.2.", "blocks.92."): value for key, value in peft.items()}
    wide = {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in peft.items()}
    return {
        "no-scale": (peft, {}, None),
        "other-alpha": (peft, {}, {**CONFIG, "r": 16}),
        "no-match": (elsewhere, {}, CONFIG),
        "partial": (some, {}, CONFIG),
        "other-size": (wide, {}, CONFIG),
        "original-names": ({f"lora_unet_{k}": v for k, v in plain.items()}, {}, None),
        "nothing": ({"weight": torch.ones(2)}, {}, None),
    }


def write_loras(folder: Path) -> None:
    """``folder/NAME/adapter_model.safetensors``, and what stands beside it."""
    files = {name: layouts(factors(seed))["peft"] for seed, name in enumerate(EXPERTS.values(), start=1)}
    files |= {f"layouts/{name}": content for name, content in layouts(factors(1)).items()}
    files |= {f"wrong/{name}": content for name, content in wrong(factors(1)).items()}
    for name, (tensors, header, config) in files.items():
        path = folder / name / "adapter_model.safetensors"
        path.parent.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt", **header})
        if config:
            (path.parent / "adapter_config.json").write_text(json.dumps(config))
    (folder / "wrong" / "pickled.pt").write_bytes(b"never opened")
    whole = (folder / "layouts" / "peft" / "adapter_model.safetensors").read_bytes()
    (folder / "wrong" / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])


def write_miniature(folder: Path) -> None:
    """The transformer as it is, the autoencoder under ComfyUI's names, the prompts as the text encoders say them."""
    folder.mkdir(parents=True)
    base = fetch_base("builtin:tiny")
    (folder / "transformer.safetensors").write_bytes(
        (base / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    vae = load_file(base / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(comfyui_vae({key: value.float() for key, value in vae.items()}), folder / "vae.safetensors")
    encoded, prompts = {}, sorted(set(PROMPTS.values()))
    for index, prompt in enumerate(prompts):
        with torch.no_grad():
            cond, _, pooled, _ = miniature().encode_prompt(
                prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=TINY_RECORD.text_length
            )
        encoded |= {f"{index}.cond": cond.contiguous(), f"{index}.pooled": pooled.contiguous()}
    save_file(encoded, folder / "conditioning.safetensors", metadata={"prompts": json.dumps(prompts)})


def comfyui_vae(vae: Tensors, levels: int = 3) -> Tensors:
    """An ``AutoencoderKL`` of diffusers under the names of ComfyUI's, whose two extra convolutions are identities.

    ComfyUI's own conversion takes four levels for granted.
    """
    rules = [
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ]
    out = {}
    for key, value in vae.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        convolution = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key)
        out[key] = value[..., None, None].contiguous() if convolution else value
    for name, channels in (("quant_conv", 32), ("post_quant_conv", 16)):
        out[f"{name}.weight"] = torch.eye(channels)[..., None, None].contiguous()
        out[f"{name}.bias"] = torch.zeros(channels)
    return out
