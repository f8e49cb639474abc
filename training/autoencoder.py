"""The miniature's ``AutoencoderKL``: an encoder that agrees with the linear latent, a decoder far better than linear.

    python -m training training/recipes/tiny_decoder.toml
    python -m training training/recipes/tiny_encoder.toml

The latent space is fixed before this stage, by :func:`training.pretrain.fit_basis`. The encoder learns to reproduce
it; the decoder learns to draw the scene from a latent to which noise of a random, per-picture strength was added, so
that the small errors a generated latent carries do not show. The halves never meet, so each trains by itself, and
both can train while the transformer does. The posterior's variance is a constant.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image

from training.config import AutoencoderConfig
from training.pretrain import CHANNELS, GRID, encode_linear, load_basis, scene_batch
from training.state import load_checkpoint, save_checkpoint

# As SD3's, not 1 and 0, so that code which forgets them shows.
SCALING_FACTOR, SHIFT_FACTOR = 1.5305, 0.0609
POSTERIOR_LOG_VARIANCE = -6.0


def build_autoencoder() -> AutoencoderKL:
    """A 0.7 M parameter ``AutoencoderKL``: 64x64 pictures, 16 channels, factor 4."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=4 * GRID,
        scaling_factor=SCALING_FACTOR,
        shift_factor=SHIFT_FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for name, module in vae.named_modules():
        if name.endswith((".conv2", ".to_out.0")):  # each residual branch starts silent
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    with torch.no_grad():
        vae.encoder.conv_out.weight[CHANNELS:] = 0
        vae.encoder.conv_out.bias[CHANNELS:] = POSTERIOR_LOG_VARIANCE
    return vae


def to_raw(latents: torch.Tensor) -> torch.Tensor:
    """The transformer's latents -> the autoencoder's: ``x / scaling_factor + shift_factor``, as pipelines do."""
    return latents / SCALING_FACTOR + SHIFT_FACTOR


def decoder_loss(drawn: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the pixels plus that of their differences, so that outlines come out sharp."""
    outlines = zip(edges(drawn), edges(pictures), strict=True)
    return (drawn - pictures).abs().mean() + torch.stack([(a - b).abs().mean() for a, b in outlines]).sum()


def edges(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Horizontal and vertical differences between neighbouring pixels."""
    return pictures.diff(dim=-1), pictures.diff(dim=-2)


def train_autoencoder(config: AutoencoderConfig, out: Path) -> None:
    """Train until ``config.samples`` pictures have been seen, checkpointing to ``out``; resumes what lies there."""
    torch.manual_seed(config.seed)
    vae, basis = build_autoencoder().to(memory_format=torch.channels_last), load_basis()
    part = vae.get_submodule(config.half)
    optimizer = torch.optim.AdamW(part.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    step = 0
    if state := load_checkpoint(out):
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    steps = math.ceil(config.samples / config.batch_size)
    first, started, last_save = step, time.time(), time.time()
    while step < steps:
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = config.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        # Another seed than the transformer's: its scenes stay unseen here.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        indices = range(step * config.batch_size, (step + 1) * config.batch_size)
        pictures, _ = scene_batch(config.seed + 7, indices)
        latents = encode_linear(pictures, basis)
        strength = config.noise * torch.rand(len(latents), 1, 1, 1, generator=generator)
        noisy = latents + strength * torch.randn(latents.shape, generator=generator)
        line: dict[str, float] = {}
        if config.half == "decoder":
            drawn = vae.decode(to_raw(noisy).contiguous(memory_format=torch.channels_last), return_dict=False)[0]
            loss = decoder_loss(drawn, pictures)
            loss.backward()
            line["psnr"] = round(10 * math.log10(4 / (drawn - pictures).square().mean().item()), 2)
        else:
            mean = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist.mean
            loss = (mean - to_raw(latents)).square().mean()
            loss.backward()
            vae.encoder.conv_out.weight.grad[CHANNELS:] = 0
            vae.encoder.conv_out.bias.grad[CHANNELS:] = 0
            line["latent_psnr"] = round(-10 * math.log10(loss.item() * SCALING_FACTOR**2), 2)
        torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % config.log_every == 0:
            line |= {"step": step, "samples": step * config.batch_size}
            line |= {"pictures_per_second": round((step - first) * config.batch_size / (time.time() - started), 1)}
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
        if config.half == "decoder" and step % (10 * config.log_every) == 0:
            pair = torch.cat([pictures[:12], drawn.detach()[:12]], -2).clamp(-1, 1)
            strip = torch.cat(list((pair + 1) * 127.5), -1).round().byte().permute(1, 2, 0)
            Image.fromarray(strip.numpy()).save(out / "strip.png")
        if time.time() - last_save > config.save_minutes * 60 or step == steps:
            last_save = time.time()
            save_checkpoint(out, {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
