"""Drawing: ``FlowOPDPipeline`` against stock diffusers, ``python -m benchmarks.generation``.

Two comparisons, on the miniature where there is no GPU, on SD3.5 Medium's architecture with random weights (512²,
bf16, embeddings given, no text encoders on either side) where there is one:

- *a run's pictures*: a loop over a plain ``StableDiffusion3Pipeline`` with the LoRA on PEFT's layers, one prompt at a
  time and in the same batches, against ``FlowOPDPipeline`` with the expert chosen row by row and fused;
- *five experts on one prompt*: five pipelines, each with its LoRA, against one call.

Noise is the same, and so must the latents be: within 1e-3 of their size in fp32. In bf16 rounding differs with the
batch: there latents are compared after four steps, the difference is reported, and refused from 0.1 on.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.full_size import SD35, SMOKE, Scale, random_adapters, random_text, random_transformer
from flowopd_eval.adapters import Adapter
from flowopd_eval.errors import WorkError
from flowopd_eval.models import Backbone, resolve
from flowopd_eval.pipeline import FlowOPDPipeline, draw_noise
from flowopd_eval.quiet import quiet_libraries

EXPERTS = ("student", "geneval", "ocr", "pickscore", "deqa")
AT_MOST = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # difference of latents, relative to their size


@dataclass
class Bench:
    """A backbone as a pipeline without experts, the adapters, and what a batch of prompts is to a call."""

    stock: StableDiffusion3Pipeline
    adapters: Mapping[str, Adapter]
    conditions: Callable[[Sequence[str]], dict[str, Any]]
    settings: dict[str, Any]
    shape: tuple[int, int, int]

    def plain(self, expert: str) -> StableDiffusion3Pipeline:
        """A stock pipeline on a transformer of its own, the expert's LoRA on PEFT's layers."""
        made = StableDiffusion3Pipeline(**self._parts())
        factors = self.adapters[expert].factors
        state = {f"transformer.{m}.lora_{side}.weight": t for m, f in factors.items() for side, t in zip("AB", f)}
        with quiet_libraries():
            made.load_lora_weights(state)
        nn.Module.to(made.transformer, self.stock.transformer.device, self.stock.transformer.dtype)
        made.set_progress_bar_config(disable=True)
        return made

    @cached_property
    def ours(self) -> FlowOPDPipeline:
        """One pipeline with all experts on one transformer."""
        made = FlowOPDPipeline(**self._parts())
        made._record = self.settings["record"]
        made.set_progress_bar_config(disable=True)
        made.add_experts(self.adapters)
        return made

    def compared_steps(self, dtype: torch.dtype) -> int:
        """Of the comparison: all in fp32; in half precision, whose rounding adds up over the steps, four."""
        return self.settings["steps"] if dtype == torch.float32 else min(4, self.settings["steps"])

    def _parts(self) -> dict[str, Any]:
        return {**self.stock.components, "transformer": copy.deepcopy(self.stock.transformer)}

    def call(
        self, pipeline: StableDiffusion3Pipeline, prompts: Sequence[str], seeds: Sequence[int], **more: Any
    ) -> Tensor:
        """Latents (B, C, h, w), fp32 on the CPU; the VAE's work is done as well, as a user's call would."""
        noise = draw_noise(seeds, self.shape).to(pipeline.transformer.device, pipeline.transformer.dtype)
        record = self.settings["record"]
        more.setdefault("num_inference_steps", self.settings["steps"])
        latents = pipeline(
            **self.conditions(prompts), latents=noise, output_type="latent",
            guidance_scale=record.guidance, height=record.height, width=record.width,
            max_sequence_length=record.text_length, **more,
        ).images  # fmt: skip
        vae = pipeline.vae
        with torch.no_grad():
            vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)
        return latents.float().cpu()


def random_bench(scale: Scale, device: torch.device, steps: int) -> Bench:
    """SD3.5 Medium's architecture with random weights and its VAE; embeddings in place of text encoders."""
    base, dtype = scale.base, getattr(torch, scale.dtype)
    transformer = random_transformer(base, device, dtype, seed=0)
    with torch.device(device):
        vae = AutoencoderKL.from_config({**base.vae, "scaling_factor": 1.5305, "shift_factor": 0.0609}).eval()
    vae = nn.Module.to(vae.requires_grad_(False), device, dtype)
    parts = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    stock = StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts
    )

    def conditions(prompts: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for prefix, texts in (("", prompts), ("negative_", [""] * len(prompts))):
            pairs = [random_text(base, text, scale.text_length) for text in texts]
            for name, part in zip(("prompt_embeds", "pooled_prompt_embeds"), zip(*pairs, strict=True), strict=True):
                found[f"{prefix}{name}"] = torch.stack(part).to(device, dtype)
        return found

    return Bench(
        stock, random_adapters(transformer, EXPERTS, scale.rank), conditions,
        {"record": base.record, "steps": steps}, base.latent_shape,
    )  # fmt: skip


def miniature_bench(steps: int | None) -> Bench:
    """The built-in miniature, its text encoders included, with random adapters."""
    spec = resolve("tiny:base")
    pipeline = Backbone(spec.base, [spec], "cpu", None).pipeline
    record = spec.record
    return Bench(
        StableDiffusion3Pipeline(**pipeline.components), random_adapters(pipeline.transformer, EXPERTS, 16),
        lambda prompts: {"prompt": list(prompts), "negative_prompt": [""] * len(prompts)},
        {"record": record, "steps": steps or record.steps}, pipeline.latent_shape(record.height, record.width),
    )  # fmt: skip


def agree(what: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Relative difference of latents.

    Raises:
        WorkError: it is beyond what the precision explains.
    """
    relative = float((found - expected).norm() / expected.norm()) if found.shape == expected.shape else float("nan")
    measure.same(what, [relative], [0.0], AT_MOST[dtype])
    return relative


def a_run(bench: Bench, pictures: int, batch: int, repetitions: int) -> dict[str, Any]:
    """So many pictures by one expert: one by one, in batches, ours, ours fused."""
    prompts, seeds = [f"a photo of {n} things" for n in range(pictures)], list(range(pictures))
    plain, ours = bench.plain("student"), bench.ours
    dtype = plain.transformer.dtype

    def over(pipeline: StableDiffusion3Pipeline, size: int, **more: Any) -> Tensor:
        starts = range(0, pictures, size)
        parts = [bench.call(pipeline, prompts[i : i + size], seeds[i : i + size], **more) for i in starts]
        return torch.cat(parts)

    def fused(**more: Any) -> Tensor:
        ours.fuse_expert("student")
        try:
            return over(ours, batch, expert="student", **more)
        finally:
            ours.unfuse_expert()

    variants: dict[str, Callable[..., Tensor]] = {
        "plain, one by one": partial(over, plain, 1),
        "plain, in batches": partial(over, plain, batch),
        "FlowOPDPipeline": partial(over, ours, batch, expert="student"),
        "FlowOPDPipeline, fused": fused,
    }
    few = bench.compared_steps(dtype)
    expected = variants["plain, one by one"](num_inference_steps=few)
    differences = {
        name: agree(f"Latents of {name!r}", work(num_inference_steps=few), expected, dtype)
        for name, work in variants.items()
    }
    timings = measure.take_turns(variants, repetitions, warm_up=0)  # the comparison was the warm-up
    slow = "plain, one by one"
    measure.show(f"{pictures} pictures, {batch} at a time", measure.rows_of(timings, pictures, "pictures", slow))
    return {
        "pictures": pictures, "batch": batch, "differences": differences,
        "variants": {name: timing.to_json(pictures, "pictures") for name, timing in timings.items()},
        "times_one_by_one": {name: measure.ratio(timings[slow], timing) for name, timing in timings.items()},
    }  # fmt: skip


def five_experts(bench: Bench, repetitions: int) -> dict[str, Any]:
    """One prompt by all experts from one noise: five pipelines one after the other, and one call."""
    plains = {name: bench.plain(name) for name in EXPERTS}
    ours = bench.ours
    prompt, dtype = "four stars and a moon", ours.transformer.dtype
    count = len(EXPERTS)

    def one_after_the_other(**more: Any) -> Tensor:
        return torch.cat([bench.call(pipeline, [prompt], [7], **more) for pipeline in plains.values()])

    variants: dict[str, Callable[..., Tensor]] = {
        "five pipelines": one_after_the_other,
        "one call": partial(bench.call, ours, [prompt] * count, [7] * count, expert=list(EXPERTS)),
    }
    few = bench.compared_steps(dtype)
    expected, found = (work(num_inference_steps=few) for work in variants.values())
    difference = agree("Latents of five pipelines and of one call", found, expected, dtype)
    apart = float((expected[0] - expected[1]).norm() / expected[0].norm())
    timings = measure.take_turns(variants, repetitions, warm_up=0)
    slots = [t for slot in ours._bank.slots for t in slot.buffers()] if ours._bank else []
    vae = measure.bytes_of(bench.stock.vae.parameters())  # each pipeline of its own would have one
    held = {
        "five pipelines": sum(measure.bytes_of([*p.transformer.parameters(), *p.transformer.buffers()]) + vae
                              for p in plains.values()),
        "one call": measure.bytes_of([*ours.transformer.parameters(), *ours.transformer.buffers(), *slots]) + vae,
    }  # fmt: skip
    rows = measure.rows_of(timings, len(EXPERTS), "pictures", "five pipelines")
    for row in rows:
        row["weights GB"] = held[row["variant"]] / 1e9
    measure.show("Five experts, one prompt (transformers and VAE; text encoders not counted)", rows)
    return {
        "difference": difference, "experts_apart": apart,
        "variants": {name: timing.to_json(len(EXPERTS), "pictures") for name, timing in timings.items()},
        "times_five_pipelines": measure.ratio(timings["five pipelines"], timings["one call"]),
        "weights_gb": {name: count / 1e9 for name, count in held.items()},
        "weights_share": held["one call"] / held["five pipelines"],
    }  # fmt: skip


def main() -> int:
    options = measure.parser("benchmarks.generation", str(__doc__), repetitions=3)
    options.add_argument("--pictures", type=int, default=16, help="of the first comparison (default: %(default)s)")
    options.add_argument("--batch", type=int, default=8, help="pictures at a time (default: %(default)s)")
    options.add_argument("--steps", type=int, help="default: those of the sampling record")
    asked = options.parse_args()
    cuda = torch.cuda.is_available()
    pictures, batch = (2, 2) if asked.smoke else (asked.pictures, asked.batch)
    if asked.smoke:
        bench = random_bench(SMOKE, torch.device("cpu"), 2)
    elif cuda:
        bench = random_bench(SD35, torch.device("cuda"), asked.steps or SD35.base.record.steps)
    else:
        bench = miniature_bench(asked.steps)
    try:
        results = {"model": "full size, random weights" if cuda else "the miniature", "steps": bench.settings["steps"]}
        results |= {"a_run": a_run(bench, pictures, batch, asked.repetitions)}
        results |= {"five_experts": five_experts(bench, asked.repetitions)}
        measure.keep("generation-cuda" if cuda else "generation-cpu", results, asked.smoke)
    except WorkError as error:
        print(f"benchmarks.generation: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
