"""Checks on a CUDA device; run with ``python -m benchmarks.gpu``."""

from pathlib import Path

import numpy as np
import pytest
import torch
from random_adapters import random_adapter

from flowopd_eval.adapters import read_adapter, write_adapter
from flowopd_eval.models import TINY_RECORD, fetch_base
from flowopd_eval.pipeline import FlowOPDPipeline
from training.config import load_recipe
from training.distill import Distillation
from training.loop import train

pytestmark = pytest.mark.gpu
PROMPTS = ["a photo of a red circle", 'a sign that says "CAT"', "a photo of two blue stars on sand"]
ARMS = ["one", None, "two"]
RECIPES = Path(__file__).parent.parent / "training" / "recipes"


def load(dtype: torch.dtype) -> FlowOPDPipeline:
    pipe = FlowOPDPipeline.from_pretrained(fetch_base("builtin:tiny"), record=TINY_RECORD, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.add_experts({name: random_adapter(pipe.transformer, i) for i, name in enumerate(["one", "two"])})
    return pipe


def draw(pipe: FlowOPDPipeline) -> np.ndarray:
    return np.stack([np.asarray(i, int) for i in pipe(PROMPTS, expert=ARMS, seed=[1, 2, 3]).images])


@pytest.fixture(scope="module")
def on_cpu() -> np.ndarray:
    return draw(load(torch.float32))


def test_cuda_draws_what_the_cpu_draws(on_cpu):
    assert abs(draw(load(torch.float32).to("cuda")) - on_cpu).max() <= 3


def test_offloading_draws_the_same(on_cpu):
    pipe = load(torch.float32)
    pipe.enable_model_cpu_offload()
    assert abs(draw(pipe) - on_cpu).max() <= 3


def test_fusing_on_the_device(on_cpu):
    pipe = load(torch.float32).to("cuda")
    rows = pipe(PROMPTS[:1], expert="one", seed=1, output_type="latent").images
    pipe.fuse_expert("one")
    fused = pipe(PROMPTS[:1], expert="one", seed=1, output_type="latent").images
    torch.testing.assert_close(fused, rows, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_not_promised(on_cpu, dtype):
    difference = abs(draw(load(dtype).to("cuda")) - on_cpu)
    print(f"{dtype}: mean {difference.mean():.2f}, largest {difference.max()} of 255 levels from fp32 on the CPU")
    assert difference.mean() < 64  # a picture, not noise


def test_training_goes_on_where_it_was(tmp_path):
    """Up to the order in which attention's backward adds: the promise bit for bit is the CPU's."""
    transformer = load(torch.float32).transformer
    for seed, name in enumerate(["one", "two"]):
        write_adapter(random_adapter(transformer, seed), tmp_path / name)
    settings = ["batch_size=8", "micro_batch=8", "rollout.steps=4", "strip_every=0", f"cache={tmp_path / 'cache'}"]
    settings += [f"teachers.{name}.source={tmp_path / 'one'}" for name in ("geneval", "ocr", "quality")]
    settings += [f"anchor.source={tmp_path / 'two'}", "start=none"]

    def adapter(out: str, *steps: int) -> torch.Tensor:
        for number in steps:
            more = [f"out={tmp_path / out}", f"steps={number}"]
            config = load_recipe(RECIPES / "tiny_opd.toml", [*settings, *more])
            folder = train(config, Distillation, tmp_path / out)
        factors = read_adapter(folder).factors
        return torch.cat([(factors[name].B @ factors[name].A).flatten() for name in sorted(factors)])

    whole, parts = adapter("whole", 6), adapter("parts", 3, 6)
    difference = (whole - parts).norm() / whole.norm()
    print(f"resumed against uninterrupted: relative difference {difference:.1e}")
    assert difference < 1e-3
