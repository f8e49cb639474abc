"""A random SD3 pipeline of some 100,000 weights, adapters for it, prompt files, and recipes that train on them."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from random_adapters import TARGETS, random_adapter
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from flowopd_eval.adapters import Adapter, Factors, write_adapter
from flowopd_eval.pipeline import FlowOPDPipeline
from flowopd_eval.records import SamplingRecord
from flowopd_eval.tiny.vocabulary import BEGIN, END, PAD, TEXT_LENGTH, build_tokenizer, words
from training.config import Config, load_recipe
from training.data import Mixture, task_prompts
from training.loop import Parallel
from training.policies import Policies

RECORD = SamplingRecord(steps=4, guidance=3.0, shift=3.0, width=16, height=16, text_length=0)  # latents (4, 8, 8)
REWARDED = ("grpo", "nft")  # stages without teachers
TEACHERS = {"shapes": "one", "signs": "two"}  # task -> its teacher
SHAPES = [(f"{c} {s}", "colors") for c in ("red", "green", "blue") for s in ("circle", "square", "star", "triangle")]
SHAPES += [(f"two {shape}s", "counting") for shape in ("circle", "square", "star", "triangle")]
SIGNS = [(f'a sign that says "{word}"', "ocr") for word in ("CAT", "DOG", "SUN", "MOON", "TREE")]
REWARDS = '''
import numpy as np
from flowopd_eval.records import Score

class Bright:
    """Share of bright values; of prompts with "green" it says nothing."""
    def identity(self):
        return {"name": "bright"}
    def score(self, images, prompts):
        values = [float((np.asarray(image) > 127).mean()) for image in images]
        return [Score(None if "green" in p.prompt else value) for value, p in zip(values, prompts)]

class Blinking(Bright):
    """Bright, but of every fifth picture it says nothing, whatever its prompt."""
    seen = 0
    def score(self, images, prompts):
        scores = [Score(float((np.asarray(image) > 127).mean())) for image in images]
        self.seen += len(images)
        first = self.seen - len(images) + 1
        return [Score(None) if n % 5 == 0 else score for n, score in enumerate(scores, first)]

class Flat(Bright):
    """Every picture is as good as any other."""
    def score(self, images, prompts):
        return [Score(0.5) for _ in images]

class Mute:
    def identity(self):
        return {}
'''


def build_pipeline() -> FlowOPDPipeline:
    """Two blocks of width 32, two text encoders of one layer and width 16, an autoencoder of factor 2."""
    torch.manual_seed(0)
    ids = {word: index for index, word in enumerate(words())}
    text = CLIPTextConfig(
        vocab_size=len(ids), hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=TEXT_LENGTH,
        pad_token_id=ids[PAD], bos_token_id=ids[BEGIN], eos_token_id=ids[END],
    )  # fmt: skip
    encoders = [CLIPTextModelWithProjection(text) for _ in range(2)]
    for encoder in encoders:
        torch.nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight)  # words that differ plainly
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=32,
        num_attention_heads=1, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=4, qk_norm="rms_norm",
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
        scaling_factor=1.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    with torch.no_grad():  # a decoder that blurs, or its pictures would pass for noise
        vae.decoder.conv_out.weight.copy_(vae.decoder.conv_out.weight[:, :, 1:2, 1:2].expand(-1, -1, 3, 3))
    pipeline = FlowOPDPipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=RECORD.shift), vae=vae,
        text_encoder=encoders[0], tokenizer=build_tokenizer(), text_encoder_2=encoders[1],
        tokenizer_2=build_tokenizer(), text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipeline._record = RECORD
    return pipeline


def strong_adapter(transformer: torch.nn.Module, seed: int) -> Adapter:
    """Changes as large as the weights: the adapter's velocity differs from the base's far beyond rounding."""
    factors = random_adapter(transformer, seed).factors
    return Adapter({name: Factors(f.A, 10 * f.B) for name, f in factors.items()})


def write_prompts(path: Path, prompts: list[tuple[str, str]]) -> None:
    """A prompt file of (text, task) pairs; ids are ``<stem>-<n>``."""
    lines = [{"id": f"{path.stem}-{n}", "prompt": text, "task": task} for n, (text, task) in enumerate(prompts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def toml(value: object) -> str:
    """A value as TOML, tables inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


@dataclass(frozen=True)
class TinyTraining:
    """Folder of ``base``, ``teachers/<name>``, ``<task>.jsonl``, ``rewards.py`` and the embeddings' ``cache``."""

    folder: Path

    def teacher(self, name: str) -> str:
        """Folder of the adapter ``name``: one, two, anchor."""
        return str(self.folder / "teachers" / name)

    def reward(self, name: str) -> str:
        """The reward of class ``name``."""
        return f"{self.folder / 'rewards.py'}:{name}"

    def values(self, stage: str, out: Path, **changes: object) -> dict:
        """A recipe of ``stage`` with two tasks, each with its teacher or a reward, and ``changes``."""
        tasks = [{"name": name, "prompts": str(self.folder / f"{name}.jsonl"), "held_out": 2} for name in TEACHERS]
        values = {
            "stage": stage, "out": str(out), "base": str(self.folder / "base"), "tasks": tasks, "steps": 2,
            "batch_size": 4, "micro_batch": 2, "lora": {"rank": 4, "alpha": 8, "target_modules": TARGETS},
            "optimizer": {"learning_rate": 1e-2, "ema_every": 1}, "cache": str(self.folder / "cache"), "strip_every": 0,
        }  # fmt: skip
        own = {"sft": {"pictures": 6, "picture_steps": 2}, "nft": {"picture_steps": 2}}
        values |= own.get(stage, {"rollout": {"steps": 2}})
        if stage in REWARDED:
            values["group_size"] = 2
        else:
            values["teachers"] = {name: {"source": self.teacher(name)} for name in TEACHERS.values()}
        for task in tasks:
            rewards, teacher = {self.reward("Bright"): 1.0}, TEACHERS[task["name"]]
            task |= {"rewards": rewards} if stage in REWARDED else {"teacher": teacher}
        return values | changes

    def write(self, path: Path, stage: str, out: Path, **changes: object) -> Path:
        """Write :meth:`values` as a recipe."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{k} = {toml(v)}\n" for k, v in self.values(stage, out, **changes).items()))
        return path

    def recipe(self, stage: str, out: Path, **changes: object) -> Config:
        """The recipe of :meth:`values`, read from a file of this process's own: two may ask at the same moment."""
        return load_recipe(self.write(out / f"recipe-{os.getpid()}.toml", stage, out, **changes))

    def stage(self, make: Callable[..., Any], stage: str, out: Path, **changes: object) -> Any:
        """What ``make`` makes of :meth:`recipe`, in this process, its prompts encoded."""
        config = self.recipe(stage, out, **changes)
        policies = Policies(config, torch.device("cpu"))
        prompts = {task.name: task_prompts(task).training for task in config.tasks}
        policies.prepare_text([p.prompt for found in prompts.values() for p in found])
        mixture = Mixture(config.tasks, prompts, config.batch_size, config.group, config.seed)
        return make(config, policies, mixture, Parallel(Accelerator()))


@pytest.fixture(scope="module")
def one_thread_of_the_processor() -> Iterator[None]:
    """Bit for bit is promised for one device, and this one is everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    gc.freeze()  # each run collects garbage, and would look for it among all of the libraries' objects
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    gc.unfreeze()
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyTraining:
    """The files, written once."""
    folder = tmp_path_factory.mktemp("tiny")
    pipeline = build_pipeline()
    pipeline.save_pretrained(folder / "base")
    for seed, name in enumerate(("one", "two", "anchor")):
        write_adapter(strong_adapter(pipeline.transformer, seed), folder / "teachers" / name)
    write_prompts(folder / "shapes.jsonl", SHAPES)
    write_prompts(folder / "signs.jsonl", SIGNS)
    (folder / "rewards.py").write_text(REWARDS)
    return TinyTraining(folder)
