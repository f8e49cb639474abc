"""Checks on a CUDA device; run with ``python -m benchmarks.gpu``."""

import numpy as np
import pytest
import torch
from random_adapters import random_adapter

from flowopd_eval.models import TINY_RECORD, fetch_base
from flowopd_eval.pipeline import FlowOPDPipeline

pytestmark = pytest.mark.gpu
PROMPTS = ["a photo of a red circle", 'a sign that says "CAT"', "a photo of two blue stars on sand"]
ARMS = ["one", None, "two"]


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
