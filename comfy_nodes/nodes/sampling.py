"""Drawing as KSampler draws, for nodes that draw several times: the same noise, progress over all, interruption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from ..logic.errors import PackError, check_choice


def sampling_inputs() -> list[io.Input]:
    """The inputs of a node that draws; defaults as the paper evaluates SD3.5 Medium (512 x 512 there)."""
    return [
        io.Conditioning.Input("positive"),
        io.Conditioning.Input("negative"),
        io.Latent.Input("latent_image"),
        io.Vae.Input("vae"),
        io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True),
        io.Int.Input("steps", default=40, min=1, max=10000),
        io.Float.Input("cfg", default=4.5, min=0.0, max=100.0, step=0.1),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler"),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="normal"),
        io.Float.Input("shift", default=3.0, min=0.0, max=100.0, step=0.01),
    ]


@dataclass(frozen=True)
class Sampling:
    """One way to draw. ``draw(model, seed)`` gives the latents that KSampler gives for that seed and latent."""

    positive: Any
    negative: Any
    latent_image: dict[str, Any]
    vae: Any
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    shift: float

    def __post_init__(self) -> None:
        # KSampler takes the first of its list for a name it does not know, and says nothing.
        check_choice("sampler", self.sampler_name, comfy.samplers.KSampler.SAMPLERS)
        check_choice("scheduler", self.scheduler, comfy.samplers.KSampler.SCHEDULERS)

    @property
    def batch(self) -> int:
        """Pictures a draw."""
        return self.latent_image["samples"].shape[0]

    def shifted(self, model: Any) -> Any:
        """A clone of a flow model with this shift (as ComfyUI's ModelSamplingSD3 does it)."""

        class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
            pass

        sampling = Flow(model.model.model_config)
        sampling.set_parameters(shift=self.shift)
        clone = model.clone()
        clone.add_object_patch("model_sampling", sampling)
        return clone

    def draw(self, model: Any, seed: int, on_step: Callable[..., None]) -> torch.Tensor:
        """Latents (B, C, h, w); the noise is that of the seed, drawn on the CPU, whatever the model.

        Raises:
            PackError: NaN or infinity.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        samples = comfy.sample.fix_empty_latent_channels(model, self.latent_image["samples"])
        noise = comfy.sample.prepare_noise(samples, seed, self.latent_image.get("batch_index"))
        latents = comfy.sample.sample(
            model,
            noise,
            self.steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            self.positive,
            self.negative,
            samples,
            denoise=1.0,
            noise_mask=self.latent_image.get("noise_mask"),
            callback=on_step,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        if not latents.isfinite().all():  # ComfyUI would decode it to black and say nothing
            raise PackError(f"The model drew NaN or infinity with seed {seed}; try another dtype or strength.")
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (B, H, W, 3) in 0..1."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        images = self.vae.decode(latents)
        return images.reshape(-1, *images.shape[-3:])


class Progress:
    """One bar over several draws, with a preview at each step."""

    def __init__(self, model: Any, draws: int, steps: int) -> None:
        self.bar = comfy.utils.ProgressBar(draws * steps)
        self.steps, self.total = steps, draws * steps
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def of(self, draw: int) -> Callable[..., None]:
        """ComfyUI's callback for draw number ``draw``."""

        def on_step(step: int, x0: torch.Tensor, x: torch.Tensor, steps: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            preview = self.previewer.decode_latent_to_preview_image("JPEG", x0) if self.previewer else None
            # a sampler may take fewer steps than asked for: each draw has its own share of the bar
            self.bar.update_absolute(draw * self.steps + self.steps * (step + 1) // steps, self.total, preview)

        return on_step
