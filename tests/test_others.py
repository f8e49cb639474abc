"""Models that are not SD3: two tiny random pipelines of diffusers saved to disk, and a user's function."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from random_adapters import random_adapter
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flowopd_eval.adapters import write_adapter
from flowopd_eval.benches import find_bench
from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.models import ANYTHING, TINY_RECORD, Backbone, fetch_base, resolve
from flowopd_eval.others import DiffusersModel, PythonModel, open_models
from flowopd_eval.records import Prompt
from flowopd_eval.tiny.vocabulary import build_tokenizer

PROMPTS = [Prompt(f"p{n}", text, "colors") for n, text in enumerate(["a red circle", "a blue star", "a green cross"])]
SEEDS = [prompt.seed(0, 0) for prompt in PROMPTS]


def text_config(**changes):
    return CLIPTextConfig(
        vocab_size=len(build_tokenizer()), hidden_size=32, intermediate_size=37, num_attention_heads=4,
        num_hidden_layers=2, max_position_embeddings=16, projection_dim=32, **changes,
    )  # fmt: skip


def vae(**changes):
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=2, layers_per_block=1, **changes,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """Stable Diffusion 1.x: a UNet, DDIM, 16x16 pixels."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=2, cross_attention_dim=32,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae(latent_channels=4), CLIPTextModel(text_config()), build_tokenizer(), unet,
        DDIMScheduler(steps_offset=1, clip_sample=False),
        None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "sd"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """Flux: a flow-matching transformer with CLIP and T5, without classifier-free guidance."""
    torch.manual_seed(1)
    transformer = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(build_tokenizer()), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    )
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(latent_channels=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        CLIPTextModel(text_config()), build_tokenizer(), t5, build_tokenizer(), transformer,
    )  # fmt: skip
    pipeline.default_sample_size = 8
    folder = tmp_path_factory.mktemp("models") / "flux"
    pipeline.save_pretrained(folder)
    return folder


def opened(folder, lora=None, **changes):
    spec = resolve(str(folder), lora)
    models = open_models(spec.base, [spec], "cpu", None)
    return models.generator(spec, type(models.record(spec))(**(models.record(spec).__dict__ | {"steps": 2} | changes)))


@pytest.mark.parametrize("name", ["stable_diffusion", "flux"])
def test_any_pipeline_draws_by_the_seed_alone(name, request):
    folder = request.getfixturevalue(name)
    generator = opened(folder, **({"width": 16, "height": 16} if name == "flux" else {}))
    identity = generator.identity()
    assert identity["pipeline"] == {"stable_diffusion": "StableDiffusionPipeline", "flux": "FluxPipeline"}[name]
    assert identity["sampling"]["sampler"] in ("DDIMScheduler", "FlowMatchEulerDiscreteScheduler")
    together = [np.asarray(picture, int) for picture in generator.generate(PROMPTS, SEEDS)]
    assert all(picture.shape == (16, 16, 3) for picture in together)
    order = [2, 0, 1]
    mixed = generator.generate([PROMPTS[n] for n in order], [SEEDS[n] for n in order])
    for place, n in enumerate(order):
        (alone,) = generator.generate([PROMPTS[n]], [SEEDS[n]])
        assert abs(np.asarray(alone, int) - together[n]).max() <= 2
        assert abs(np.asarray(mixed[place], int) - together[n]).max() <= 2
    assert abs(together[0] - together[1]).max() > 10
    (other,) = generator.generate([PROMPTS[0]], [SEEDS[1]])
    assert abs(np.asarray(other, int) - together[0]).max() > 10


def test_a_guidance_scale_of_zero_is_drawn_with(stable_diffusion):
    """0 is not "the pipeline's own": below 1 the pipeline leaves the unconditional forward out."""
    scales = [0.0, 1.0, 7.5]
    drawn = [
        np.asarray(opened(stable_diffusion, guidance=scale).generate(PROMPTS[:1], SEEDS[:1])[0], int)
        for scale in scales
    ]
    assert (drawn[0] == drawn[1]).all()
    assert abs(drawn[0] - drawn[2]).max() > 2


def test_a_pipeline_s_own_defaults_are_its_record(stable_diffusion, flux):
    specs = [resolve(str(folder)) for folder in (stable_diffusion, flux)]
    records = [open_models(spec.base, [spec], "cpu", None).record(spec) for spec in specs]
    assert [(r.steps, r.guidance, r.text_length, r.dtype) for r in records] == [
        (50, 7.5, 0, "float32"),
        (28, 3.5, 512, "float32"),
    ]
    assert (records[0].width, records[0].height) == (16, 16)
    assert records[1].shift == 3.0


def test_sd3_is_drawn_by_our_own_pipeline(stable_diffusion):
    spec = resolve(str(fetch_base("builtin:tiny")))
    models = open_models(spec.base, [spec], "cpu", None)
    assert isinstance(models, Backbone)
    assert "no flow_opd.json" in models.notice
    assert "40 steps, guidance 4.5 and 512x512" in models.notice
    assert open_models("builtin:tiny", [resolve("tiny:base")], "cpu", None).notice == ""
    assert isinstance(open_models(str(stable_diffusion), [resolve(str(stable_diffusion))], "cpu", None), DiffusersModel)


def test_the_command_scores_a_pipeline_and_says_what_it_was(stable_diffusion, command, tmp_path):
    out = tmp_path / "run"
    limits = ("--limit", 1, "--tasks", "colors,counting", "--steps", 2)
    code, said, errors = command("--bench", "shapes_geneval", "--model", stable_diffusion, *limits, "--out", out)
    assert code == 0, errors
    assert "shapes_geneval" in said
    request = json.loads((out / "run.json").read_text())["runs"]["sd/geneval"]["request"]
    assert request["generator"]["sampling"]["steps"] == 2
    assert request["key"] == "shapes_geneval"


def test_what_was_assumed_of_a_pipeline_is_said_and_every_model_s_note_is_kept(command, tmp_path, monkeypatch):
    """Two commands into one folder: the report's head names what both evaluated.

    A miniature cannot draw 512x512 pixels: the settings assumed are its own here.
    """
    monkeypatch.setattr("flowopd_eval.models.SD35_RECORD", TINY_RECORD)
    out = tmp_path / "run"
    shutil.copytree(fetch_base("builtin:tiny"), tmp_path / "mine")
    few = ("--bench", "geneval", "--limit", 1, "--tasks", "colors", "--steps", 1, "--out", out)
    assert command(*few, "--model", "tiny:base")[0] == 0
    width = ("--bench", "shapes_geneval", *few[2:], "--model", tmp_path / "mine")
    code, said, errors = command(*width)
    assert code == 0, errors
    note = json.loads((out / "run.json").read_text())["note"].splitlines()
    assert note[0].startswith("Evaluated: the built-in miniature")
    assert note[1].startswith(f"Evaluated: mine ({tmp_path / 'mine'})")
    assert "has no flow_opd.json" in note[2]
    assert note[2] in errors + said
    assert command(*width)[0] == 0
    assert json.loads((out / "run.json").read_text())["note"].splitlines() == note


def test_two_models_of_one_name_are_refused_before_anything_is_drawn(command, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(fetch_base("builtin:tiny"), tmp_path / place / "mine")
    models = ("--model", tmp_path / "a" / "mine", "--model", tmp_path / "b" / "mine")
    code, _, errors = command("--bench", "shapes_geneval", *models, "--out", tmp_path / "run")
    assert code == 2
    assert "go by the name 'mine'" in errors
    assert str(tmp_path / "b" / "mine") in errors
    assert not (tmp_path / "run").exists()


# --- LoRA ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def lora(stable_diffusion, tmp_path_factory):
    """A random LoRA on the UNet's attention, as diffusers saves it."""
    pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    StableDiffusionPipeline.save_lora_weights(folder, get_peft_model_state_dict(pipeline.unet))
    return folder


def test_a_lora_changes_the_pictures_and_stands_in_the_identity(stable_diffusion, lora):
    plain, adapted = opened(stable_diffusion), opened(stable_diffusion, str(lora))
    before, after = (np.asarray(g.generate(PROMPTS[:1], SEEDS[:1])[0], int) for g in (plain, adapted))
    assert abs(before - after).max() > 2
    assert plain.identity()["adapter_sha256"] is None
    assert len(adapted.identity()["adapter_sha256"]) == 64


def test_a_lora_of_another_model_is_refused(stable_diffusion, tmp_path):
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel.from_pretrained(fetch_base("builtin:tiny"), subfolder="transformer")
    write_adapter(random_adapter(transformer, 0), tmp_path / "sd3")
    file = tmp_path / "sd3" / "pytorch_lora_weights.safetensors"
    with pytest.raises(RequestError, match=r"pytorch_lora_weights\.safetensors"):
        opened(stable_diffusion, str(file))
    with pytest.raises(RequestError, match=r"Expected one LoRA file \(\.safetensors\).*found none"):
        opened(stable_diffusion, str(tmp_path))


def test_a_lora_that_is_no_safetensors_is_refused(stable_diffusion, tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(RequestError, match="does not load into StableDiffusionPipeline"):
        opened(stable_diffusion, str(tmp_path / "lora.safetensors"))


def test_pickled_weights_are_refused(stable_diffusion, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(stable_diffusion, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(RequestError, match="cannot load"):
        opened(folder)


def test_a_folder_without_a_pipeline_is_refused(tmp_path, command):
    code, _, errors = command("--bench", "geneval", "--model", tmp_path)
    assert code == 2
    assert "no model_index.json" in errors  # before the bench's detector is asked for


# --- functions -------------------------------------------------------------------------------------------------------
DRAW = """
from PIL import Image

def draw(prompts, seeds):
    return [Image.new("RGB", (64, 64), (seed % 256, len(prompt), 9)) for prompt, seed in zip(prompts, seeds)]

draw.sampling = {"steps": 3}

class Painter:
    def __init__(self):
        self.grey = 77
    def __call__(self, prompts, seeds):
        return [Image.new("L", (64, 64), self.grey) for _ in prompts]

def few(prompts, seeds):
    return draw(prompts, seeds)[1:]

def words(prompts, seeds):
    return prompts

def broken(prompts, seeds):
    raise KeyError("weights")

number = 3
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "painter.py"
    path.write_text(DRAW)
    return path


def test_a_function_draws_and_its_file_is_its_hash(file):
    generator = function(file, "draw")
    pictures = generator.generate(PROMPTS, SEEDS)
    assert [picture.getpixel((0, 0)) for picture in pictures] == [
        (seed % 256, len(prompt.prompt), 9) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    identity = generator.identity()
    assert identity["model"] == "painter.py:draw"
    assert identity["sampling"] == {"steps": 3}
    file.write_text(DRAW + "# another\n")
    assert function(file, "draw").identity()["base_sha256"] != identity["base_sha256"]


def function(file, name):
    spec = resolve(f"{file}:{name}")
    models = open_models(spec.base, [spec], "cpu", None)
    assert isinstance(models, PythonModel)
    return models.generator(spec, models.record(spec))


def test_a_class_is_made_first_and_grey_pictures_become_rgb(file):
    (picture,) = function(file, "Painter").generate(PROMPTS[:1], SEEDS[:1])
    assert isinstance(picture, Image.Image)
    assert picture.getpixel((5, 5)) == (77, 77, 77)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("few", "expected 3 pictures .* but got 2"),
        ("words", "but got a str"),
        ("broken", "failed: KeyError: 'weights'"),
    ],
)
def test_a_function_that_fails_says_how(file, name, problem):
    with pytest.raises(WorkError, match=problem):
        function(file, name).generate(PROMPTS, SEEDS)


def test_what_would_not_reach_a_function_is_refused(file, command):
    draw = f"{file}:draw"
    for words in (("--steps", "3"), ("--lora", "x"), ("--guidance", "2"), ("--dtype", "float32")):
        code, _, errors = command("--bench", "shapes_geneval", "--model", draw, *words, "--limit", "1")
        assert code == 2, words
        assert "painter.py:draw" in errors
    for name, problem in (("nothing", "has no nothing"), ("number", "cannot be called")):
        code, _, errors = command("--bench", "shapes_geneval", "--model", f"{file}:{name}", "--limit", "1")
        assert (code, problem in errors) == (2, True), errors


def test_a_model_of_which_nothing_is_known_takes_every_bench():
    assert find_bench("geneval", ANYTHING).key == "geneval"
    assert find_bench("shapes_geneval", ANYTHING).objects == "shapes"
    with pytest.raises(RequestError, match="Unknown bench 'colours'"):
        find_bench("colours", ANYTHING)
