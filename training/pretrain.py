"""Pre-training of the miniature's base: flow matching on its world, transformer and text encoders together.

    python -m training training/recipes/tiny_base.toml

One file, top to bottom: what the model is, what a batch is, the loop. The latent here is *linear*: a fixed basis of
4x4 patches whose spectrum is half-whitened (:func:`fit_basis`), so that this stage needs no autoencoder; the
``autoencoder`` stage then trains an ``AutoencoderKL`` whose encoder agrees with that basis and whose decoder is far
better than linear. What it leaves out: more than one device, mixed precision (two cores are fastest in fp32).
"""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from flowopd_eval.tiny.scenes import SIZE, draw_scene, sample_scene
from flowopd_eval.tiny.vocabulary import BEGIN, END, PAD, TEXT_LENGTH, build_tokenizer, words
from training.config import PretrainConfig
from training.muon import Muon
from training.state import load_checkpoint, save_checkpoint

CHANNELS, FACTOR = 16, 4
GRID = SIZE // FACTOR  # 16: latents are (16, 16, 16)
TEXT_WIDTH = 96
BASIS_FILE = Path(__file__).parent / "recipes" / "tiny_basis.safetensors"


# --- the latent ------------------------------------------------------------------------------------------------------
def patches(pictures: torch.Tensor) -> torch.Tensor:
    """(B, 3, 64, 64) in -1..1 -> (B, 48, 16, 16): the pixels of each 4x4 patch as channels."""
    return torch.nn.functional.pixel_unshuffle(pictures, FACTOR)


def fit_basis(seed: int, count: int = 4000) -> dict[str, torch.Tensor]:
    """Principal components of the world's 4x4 patches with a half-whitened spectrum.

    Component ``i`` of variance ``l_i`` is scaled by ``l_i**-0.25``: its standard deviation becomes ``l_i**0.25``. That
    is the gain a linear autoencoder under fixed latent noise and a power budget would choose, between PCA (detail too
    faint for shift-3 sampling) and whitening (detail as loud as layout).

    Returns: ``mean`` (48,), ``encode`` (16, 48), ``decode`` (48, 16); the latents have mean 0 and overall variance 1.
    """
    x = patches(scene_batch(seed, range(count))[0]).permute(0, 2, 3, 1).reshape(-1, 48).double()
    mean = x.mean(0)
    variance, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    variance, vectors = variance.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
    gain = variance**-0.25 / (variance**0.5).mean() ** 0.5
    basis = {"mean": mean, "encode": gain[:, None] * vectors.T, "decode": vectors / gain, "variance": variance}
    return {name: tensor.float().contiguous() for name, tensor in basis.items()}


def load_basis() -> dict[str, torch.Tensor]:
    """The basis every stage uses, kept in a file: :func:`fit_basis` of seed 0 in the world's first form.

    Eigenvectors have no sign of their own, so another machine could find some of them turned round; a model trained on
    the one basis draws noise on the other.
    """
    return load_file(BASIS_FILE)


def encode_linear(pictures: torch.Tensor, basis: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, 3, 64, 64) in -1..1 -> latents (B, 16, 16, 16)."""
    return torch.einsum("cp,bphw->bchw", basis["encode"], patches(pictures) - basis["mean"][:, None, None])


def decode_linear(latents: torch.Tensor, basis: dict[str, torch.Tensor]) -> torch.Tensor:
    """Latents (B, 16, 16, 16) -> pictures (B, 3, 64, 64) in -1..1, the least-squares inverse of the encoder."""
    flat = torch.einsum("pc,bchw->bphw", basis["decode"], latents) + basis["mean"][:, None, None]
    return torch.nn.functional.pixel_shuffle(flat, FACTOR)


# --- data ------------------------------------------------------------------------------------------------------------
def scene_batch(seed: int, indices: range, sign_share: float = 0.2) -> tuple[torch.Tensor, list[str]]:
    """Scenes ``indices`` of ``seed`` as pictures (B, 3, 64, 64) in -1..1 with their captions."""
    scenes = [sample_scene(np.random.default_rng([seed, index]), sign_share=sign_share) for index in indices]
    pictures = torch.from_numpy(np.stack([draw_scene(scene) for scene in scenes]))
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1, [scene.caption for scene in scenes]


# --- the model -------------------------------------------------------------------------------------------------------
def build_transformer() -> SD3Transformer2DModel:
    """An SD3.5-Medium-shaped transformer of 4 M parameters, modulation and output at zero so it starts as identity."""
    transformer = SD3Transformer2DModel(
        sample_size=GRID,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=192,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=GRID // 2,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():
        if name.endswith((".norm1.linear", ".norm1_context.linear", "norm_out.linear")) or name == "proj_out":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return transformer


def build_text_encoder() -> CLIPTextModelWithProjection:
    """One of the two small CLIP text encoders: two layers of width 96, end token pooled."""
    ids = {word: index for index, word in enumerate(words())}
    config = CLIPTextConfig(
        vocab_size=len(ids),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=TEXT_LENGTH,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BEGIN],
        eos_token_id=ids[END],
    )
    encoder = CLIPTextModelWithProjection(config)
    # CLIP draws its embeddings with std 0.02; a model of this size learns words sooner from larger ones.
    torch.nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight, std=0.3)
    return encoder


class Base(torch.nn.Module):
    """Transformer and text encoders, so that one optimiser, one EMA and one checkpoint hold them all."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = build_transformer()
        self.text_encoder = build_text_encoder()
        self.text_encoder_2 = build_text_encoder()

    def encode_text(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, 16) -> text states (B, 16, 192) and pooled vector (B, 192), joined as SD3's pipeline does."""
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return states, torch.cat([output.text_embeds for output in outputs], dim=-1)

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Velocity (B, 16, 16, 16) at noise level ``sigma`` (B,) in 0..1."""
        states, pooled = self.encode_text(ids)
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=sigma * 1000,
            return_dict=False,
        )[0]


# --- the loop --------------------------------------------------------------------------------------------------------
def build_optimizers(model: Base, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for everything else."""

    def is_matrix(name: str, p: torch.nn.Parameter) -> bool:
        return p.ndim == 2 and "transformer_blocks" in name and "norm" not in name and config.optimizer == "muon"

    named = list(model.named_parameters())
    matrices = [p for n, p in named if is_matrix(n, p)]
    others = [p for n, p in named if not is_matrix(n, p)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=config.matrix_learning_rate))
    return optimizers


def rate(sample: int, config: PretrainConfig) -> float:
    """Share of the learning rate at ``sample``: linear warm-up, constant, linear cool-down to zero at the end.

    The constant part does not depend on how long the run will be, so a run can be prolonged from any checkpoint in it.
    """
    warm = min(1.0, (sample + config.batch_size) / config.warmup_samples)
    left = (config.samples - sample) / (config.cooldown * config.samples)
    return warm * min(1.0, max(0.0, left))


@torch.no_grad()
def draw_strip(model: Base, basis: dict, prompts: list[str], steps: int = 20, guidance: float = 4.5) -> Image.Image:
    """Pictures of fixed prompts by the Euler ODE with shift 3, decoded linearly: to watch, not to measure."""
    tokenizer = build_tokenizer()
    encode = lambda texts: tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids  # noqa: E731
    ids = torch.cat([encode(prompts), encode([""] * len(prompts))])
    x = torch.randn(len(prompts), CHANNELS, GRID, GRID, generator=torch.Generator().manual_seed(0))
    u = torch.linspace(1, 0, steps + 1)
    sigmas = 3 * u / (1 + 2 * u)
    for sigma, following in itertools.pairwise(sigmas):
        cond, uncond = model(torch.cat([x, x]), sigma.expand(len(ids)), ids).chunk(2)
        x = x + (following - sigma) * (uncond + guidance * (cond - uncond))
    pictures = ((decode_linear(x, basis).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(pictures[i : i + 12]), 1) for i in range(0, len(pictures), 12)]
    return Image.fromarray(np.concatenate(rows, 0))


def load_weights(model: Base, folder: Path) -> None:
    """Take transformer and text encoders from a folder that :mod:`training.assemble` wrote."""
    files = {
        "transformer": "diffusion_pytorch_model.safetensors",
        "text_encoder": "model.safetensors",
        "text_encoder_2": "model.safetensors",
    }
    for part, file in files.items():
        model.get_submodule(part).load_state_dict({k: v.float() for k, v in load_file(folder / part / file).items()})


def pretrain(config: PretrainConfig, out: Path) -> None:
    """Train until ``config.samples`` pictures have been seen, checkpointing to ``out``; resumes what lies there."""
    torch.manual_seed(config.seed)
    model, basis = Base(), load_basis()
    if config.init:
        load_weights(model, Path(config.init))
    optimizers = build_optimizers(model, config)
    ema = EMAModel(model.parameters(), decay=config.ema, use_ema_warmup=True, power=0.75)
    tokenizer = build_tokenizer()
    step = config.init_samples // config.batch_size
    if state := load_checkpoint(out):
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
    peaks = (config.learning_rate, config.matrix_learning_rate)
    velocity_of = torch.compile(model, dynamic=False) if config.compile else model

    prompts = [sample_scene(np.random.default_rng([config.seed + 1, i])).caption for i in range(36)]
    empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids
    started, last_save, losses = time.time(), time.time(), []
    first = step
    while step * config.batch_size < config.samples:
        seen = step * config.batch_size
        for optimizer, peak in zip(optimizers, peaks, strict=False):
            optimizer.param_groups[0]["lr"] = peak * rate(seen, config)
        # Scenes and noise are functions of the step, so a resumed run draws what the uninterrupted one would have.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        pictures, captions = scene_batch(config.seed, range(seen, seen + config.batch_size), config.sign_share)
        clean = encode_linear(pictures, basis)  # (B, 16, 16, 16)
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        drop = torch.rand(len(ids), generator=generator) < config.text_dropout
        ids = torch.where(drop[:, None], empty, ids)
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.sigmoid(config.sigma_mean + config.sigma_std * torch.randn(len(ids), generator=generator))
        level = sigma[:, None, None, None]
        velocity = velocity_of((1 - level) * clean + level * noise, sigma, ids)
        loss = (velocity - (noise - clean)).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.step(model.parameters())
        step += 1
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"The loss is not finite at step {step}; lower the learning rate and resume.")
        if step % config.log_every == 0:
            speed = (step - first) * config.batch_size / (time.time() - started)
            line = {"step": step, "samples": step * config.batch_size, "loss": round(sum(losses) / len(losses), 5)}
            line |= {"grad_norm": round(float(norm), 4), "pictures_per_second": round(speed, 1)}
            losses.clear()
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
        if step % config.strip_every == 0:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            draw_strip(model, basis, prompts).save(out / f"strip_{step * config.batch_size:08d}.png")
            ema.restore(model.parameters())
        if time.time() - last_save > config.save_minutes * 60 or step * config.batch_size >= config.samples:
            last_save = time.time()
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "step": step}
            save_checkpoint(out, state | {"optimizers": [o.state_dict() for o in optimizers]})
