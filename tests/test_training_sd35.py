"""The recipes of Stable Diffusion 3.5 Medium on random weights of its architecture.

On a CUDA device (``python -m benchmarks.gpu``) at full depth, and its peak memory against ``--dry-run``; on the CPU
(``pytest -m slow``) the same code at two layers. Text encoders have full width and two layers: they are freed before
training, and T5's 4.8 B parameters would only take time.
"""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from flowopd_eval.adapters import Adapter, Factors, fresh_adapter, read_adapter, write_adapter
from flowopd_eval.pipeline import FlowOPDPipeline
from flowopd_eval.records import SD35_RECORD
from flowopd_eval.tiny.vocabulary import BEGIN, END, PAD, build_tokenizer, words
from training.architecture import SD35_MEDIUM
from training.config import ATTENTION, DistillConfig, load_recipe
from training.distill import Distillation
from training.loop import train
from training.price import price

RECIPES = Path(__file__).parent.parent / "training" / "recipes"


def save_random_model(folder: Path, layers: int, size: int, dtype: torch.dtype) -> Path:
    """SD3.5 Medium with random weights: transformer of ``layers`` layers, pictures of ``size`` pixels."""
    torch.manual_seed(0)
    ids = {word: n for n, word in enumerate(words())}
    special = {"pad_token_id": ids[PAD], "bos_token_id": ids[BEGIN], "eos_token_id": ids[END]}
    encoders = SD35_MEDIUM.encoders
    clips = [
        CLIPTextModelWithProjection(CLIPTextConfig(**{**encoders[name], "num_hidden_layers": 2, **special}))
        for name in ("text_encoder", "text_encoder_2")
    ]
    t5 = T5EncoderModel(T5Config(**{**encoders["text_encoder_3"], "num_layers": 2}))
    dual = tuple(n for n in SD35_MEDIUM.transformer["dual_attention_layers"] if n < layers)
    transformer = SD3Transformer2DModel.from_config(
        {**SD35_MEDIUM.transformer, "num_layers": layers, "dual_attention_layers": dual}
    )
    tokenizers = [build_tokenizer() for _ in range(3)]
    for tokenizer in tokenizers[:2]:
        tokenizer.model_max_length = 77
    pipeline = FlowOPDPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL.from_config({**SD35_MEDIUM.vae, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
        text_encoder=clips[0],
        tokenizer=tokenizers[0],
        text_encoder_2=clips[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5,
        tokenizer_3=tokenizers[2],
    ).to(dtype=dtype)
    pipeline._record = replace(SD35_RECORD, width=size, height=size)
    pipeline.save_pretrained(folder / "base")
    for seed, expert in enumerate(("geneval", "ocr", "pickscore", "deqa")):
        generator = torch.Generator().manual_seed(seed)
        fresh = fresh_adapter(transformer, ATTENTION, 32, generator)
        factors = {
            n: Factors(f.A, 0.02 * torch.randn(f.B.shape, generator=generator)) for n, f in fresh.factors.items()
        }
        write_adapter(Adapter(factors, source=expert, declared=fresh.declared), folder / expert)
    for task in ("geneval", "ocr", "pickscore"):
        lines = [{"id": f"{task}-{n}", "prompt": f"a photo of {n} things", "task": task} for n in range(6)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def recipe(folder: Path, name: str, *more: str) -> DistillConfig:
    """The recipe ``name`` with this folder's model, adapters and prompts, for two steps."""
    tasks = enumerate(("geneval", "ocr", "pickscore"))
    settings = [f"base={folder / 'base'}", f"out={folder / 'out'}", f"cache={folder / 'cache'}", "steps=2"]
    settings += [f"tasks.{n}.{key}" for n, task in tasks for key in (f"prompts={folder / task}.jsonl", "held_out=2")]
    settings += [f"teachers.{t}.source={folder / t}" for t in ("geneval", "ocr", "pickscore")]
    config = load_recipe(
        RECIPES / f"{name}.toml", [*settings, f"anchor.source={folder / 'deqa'}", "strip_every=0", *more]
    )
    assert isinstance(config, DistillConfig)
    return config


def two_steps(config: DistillConfig) -> list[dict]:
    """Train; the log's lines."""
    adapter = train(config, Distillation, Path(config.out))
    assert all(torch.isfinite(t).all() for factors in read_adapter(adapter).factors.values() for t in factors)
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_recipes_code_trains_at_two_layers(tmp_path):
    folder = save_random_model(tmp_path, layers=2, size=256, dtype=torch.bfloat16)
    small = ("dtype=float32", "rollout.steps=2", "batch_size=2", "micro_batch=1", "gradient_checkpointing=true")
    lines = two_steps(recipe(folder, "sd35_opd_24gb", *small))
    assert len(lines) == 2
    assert all(line["grad_norm"] > 0 and line["kl/anchor"] > 0 for line in lines)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sd35_opd_24gb", "sd35_opd_80gb"])
def test_the_recipes_train_at_full_depth_in_the_memory_that_was_priced(tmp_path, name):
    folder = save_random_model(tmp_path, layers=24, size=512, dtype=torch.bfloat16)
    config = recipe(folder, name, "batch_size=8")
    expected = price(config)
    training = next(moment for moment in expected.moments if "activations" in moment.parts)
    gc.collect()  # of the recipe before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lines = two_steps(config)
    measured = torch.cuda.max_memory_allocated() - before
    print(f"{name}: {measured / 1e9:.2f} GB measured, {expected.peak.total / 1e9:.2f} GB priced at most")
    print(f"of it in training: {training.total / 1e9:.2f} GB; {lines[-1]['pictures_per_second']:.2f} pictures a second")
    assert measured == pytest.approx(expected.peak.total, rel=0.15)
