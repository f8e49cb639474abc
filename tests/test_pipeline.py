"""FlowOPDPipeline on the built-in miniature, against stock diffusers and against itself."""

import logging

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from random_adapters import random_adapter

from flowopd_eval.adapters import write_adapter
from flowopd_eval.errors import RequestError
from flowopd_eval.models import TINY_RECORD, fetch_base
from flowopd_eval.pipeline import FlowOPDPipeline, draw_noise

PROMPTS = ["a photo of a red circle", 'a sign that says "CAT"', "a photo of two blue stars on sand"]
STEPS = 3
# Latents reach 6; after three guided steps 1e-4 is some 1e-5 of that. One velocity agrees to 1e-5: tests/adapters.


@pytest.fixture(scope="module")
def pipe():
    pipeline = FlowOPDPipeline.from_pretrained(fetch_base("builtin:tiny"), record=TINY_RECORD, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.add_experts({name: random_adapter(pipeline.transformer, i) for i, name in enumerate(["one", "two"])})
    return pipeline


def latents(pipe, prompts, **kwargs):
    kwargs = {"num_inference_steps": STEPS, **kwargs}
    return pipe(prompts, output_type="latent", **kwargs).images


def test_seed_alone_decides_the_noise():
    together = draw_noise([3, 4, 3], (2, 5, 5))
    assert torch.equal(together[0], together[2])
    assert torch.equal(together[1], draw_noise([4], (2, 5, 5))[0])
    assert torch.equal(together[0], torch.randn(2, 5, 5, generator=torch.Generator("cpu").manual_seed(3)))


def test_the_base_is_stock_diffusers(pipe):
    stock = StableDiffusion3Pipeline.from_pretrained(
        fetch_base("builtin:tiny"), text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    stock.set_progress_bar_config(disable=True)
    noise = draw_noise([7, 8, 9], (16, 16, 16))
    expected = stock(
        PROMPTS, latents=noise, num_inference_steps=STEPS, guidance_scale=4.5, height=64, width=64,
        max_sequence_length=0, output_type="np",
    ).images  # fmt: skip
    ours = pipe(PROMPTS, seed=[7, 8, 9], num_inference_steps=STEPS, output_type="np").images
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def close(a, b):
    """Equal up to fp32 rounding of several steps: 1e-4 of the largest value."""
    return (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_rows_of_one_batch_equal_one_after_the_other(pipe):
    arms = ["two", None, "one"]
    mixed = latents(pipe, PROMPTS, expert=arms, seed=[1, 2, 3])
    for row, arm in enumerate(arms):
        alone = latents(pipe, PROMPTS[row], expert=arm, seed=row + 1)
        assert close(mixed[row], alone[0])
    assert not torch.allclose(mixed[0], latents(pipe, PROMPTS[0], expert="one", seed=1)[0], atol=1e-3)


def test_batch_size_changes_a_picture_by_at_most_two_levels(pipe):
    prompts = [PROMPTS[i % 3] for i in range(16)]
    seeds = list(range(16))
    draw = lambda rows: np.stack(  # noqa: E731
        [np.asarray(i, int) for i in pipe([prompts[r] for r in rows], seed=[seeds[r] for r in rows],
                                          num_inference_steps=STEPS).images]
    )  # fmt: skip
    whole = draw(range(16))
    by_three = np.concatenate([draw(range(i, min(i + 3, 16))) for i in range(0, 16, 3)])
    singles = np.concatenate([draw([i]) for i in range(0, 16, 5)])
    assert abs(whole - by_three).max() <= 2
    assert abs(whole[::5] - singles).max() <= 2


def test_compare_gives_all_arms_the_same_noise(pipe):
    output = pipe.compare(PROMPTS[0], ["one", None, "one"], seed=5, num_inference_steps=STEPS, output_type="latent")
    assert close(output.images[0], output.images[2])
    alone = latents(pipe, PROMPTS[0], seed=5)
    assert close(output.images[1], alone[0])
    everything = pipe.compare(PROMPTS[0], num_inference_steps=1)
    assert len(everything.images) == 3  # base, one, two


def test_an_expert_is_what_diffusers_draws_with_the_written_file(pipe, tmp_path):
    write_adapter(pipe.adapter("one"), tmp_path)
    stock = StableDiffusion3Pipeline.from_pretrained(
        fetch_base("builtin:tiny"), text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    expected = stock(
        PROMPTS[0], latents=draw_noise([4], (16, 16, 16)), num_inference_steps=STEPS, guidance_scale=4.5, height=64,
        width=64, max_sequence_length=0, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(latents(pipe, PROMPTS[0], expert="one", seed=4), expected, atol=1e-3, rtol=0)


def test_fusing_changes_nothing_but_refuses_the_others(pipe):
    before = {name: p.clone() for name, p in pipe.transformer.state_dict().items()}
    unfused = latents(pipe, PROMPTS, expert="two", seed=3)
    pipe.fuse_expert("two")
    try:
        torch.testing.assert_close(latents(pipe, PROMPTS, expert="two", seed=3), unfused, atol=1e-3, rtol=0)
        for other in ("one", None):
            with pytest.raises(RequestError, match=r"'two' is fused.*unfuse_expert"):
                pipe(PROMPTS[0], expert=other, num_inference_steps=1)
        with pytest.raises(RequestError, match="unfuse_expert"):
            pipe.save_pretrained("nowhere")
    finally:
        pipe.unfuse_expert()
    assert all(torch.equal(p, before[name]) for name, p in pipe.transformer.state_dict().items())


def test_saved_pipeline_is_stock_for_diffusers_and_whole_for_us(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(  # which takes the class that the folder names
        tmp_path, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    assert type(stock) is StableDiffusion3Pipeline
    again = FlowOPDPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    x = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {
        "hidden_states": x, "timestep": torch.tensor([700.0, 300.0]), "return_dict": False,
        "encoder_hidden_states": torch.randn(2, 16, 192, generator=torch.Generator().manual_seed(1)),
        "pooled_projections": torch.randn(2, 192, generator=torch.Generator().manual_seed(2)),
    }  # fmt: skip
    with torch.no_grad(), pipe._bank.use(None):
        ours = pipe.transformer(**inputs)[0]
    with torch.no_grad():
        assert torch.equal(stock.transformer(**inputs)[0], ours)
    assert again.experts == pipe.experts
    assert again.record == pipe.record
    for expert in (None, "one", "two"):
        expected = latents(pipe, PROMPTS[:1], expert=expert, seed=1)
        torch.testing.assert_close(latents(again, PROMPTS[:1], expert=expert, seed=1), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("asked", "dtype"), [({}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)])
def test_all_parts_have_one_precision_however_they_are_stored(tmp_path, asked, dtype):
    stored = FlowOPDPipeline.from_pretrained(fetch_base("builtin:tiny"), record=TINY_RECORD, dtype=torch.float16)
    stored.save_pretrained(tmp_path)
    pipeline = FlowOPDPipeline.from_pretrained(tmp_path, record=TINY_RECORD, **asked)
    parts = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae)
    assert {part.dtype for part in parts} == {dtype}
    assert pipeline(PROMPTS[0], num_inference_steps=1, seed=1).images[0].size == (64, 64)


def test_diffusers_arguments_still_hold(pipe):
    seen = []

    def watch(p, step, timestep, tensors):
        seen.append((step, tuple(tensors["latents"].shape)))
        return tensors

    output = pipe(
        PROMPTS[:2], num_images_per_prompt=2, expert=["one", None], seed=10, num_inference_steps=2,
        negative_prompt="a photo of a star", callback_on_step_end=watch,
    )  # fmt: skip
    assert seen == [(0, (4, 16, 16, 16)), (1, (4, 16, 16, 16))]
    assert [image.size for image in output.images] == [(64, 64)] * 4
    alone = pipe(PROMPTS[0], expert="one", seed=11, num_inference_steps=2, negative_prompt="a photo of a star").images[
        0
    ]
    assert abs(np.asarray(output.images[1], int) - np.asarray(alone, int)).max() <= 2
    plain = pipe(PROMPTS[0], expert="one", seed=11, num_inference_steps=2).images[0]
    assert np.asarray(plain).tolist() != np.asarray(alone).tolist()
    (array,) = pipe(PROMPTS[0], num_inference_steps=1, output_type="np", return_dict=False)
    assert array.shape == (1, 64, 64, 3)


def test_a_setting_off_the_record_is_warned_of_once(pipe, caplog):
    with caplog.at_level(logging.WARNING, "flowopd_eval"):
        pipe(PROMPTS[0], num_inference_steps=1, guidance_scale=2.25)
        pipe(PROMPTS[0], num_inference_steps=1, guidance_scale=2.25)
    messages = [r.message for r in caplog.records if "guidance_scale" in r.message]
    assert messages == ["guidance_scale is 2.25 here, but 4.5 in the model's sampling record."]


def test_an_expert_made_for_another_guidance_scale_keeps_it_in_any_batch(tmp_path, caplog):
    own = FlowOPDPipeline.from_pretrained(fetch_base("builtin:tiny"), record=TINY_RECORD, dtype=torch.float32)
    own.set_progress_bar_config(disable=True)
    own.add_experts({"free": random_adapter(own.transformer, 0)}, {"free": 1.0})
    assert (own.guidance("free"), own.guidance(None)) == (1.0, 4.5)
    own.save_pretrained(tmp_path)
    again = FlowOPDPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    with caplog.at_level(logging.WARNING, "flowopd_eval"):
        for p in (own, again):
            both = latents(p, PROMPTS[:2], expert=["free", None], seed=[1, 2])
            assert close(both[0], latents(p, PROMPTS[0], expert="free", seed=1, guidance_scale=1.0)[0])
            assert close(both[1], latents(p, PROMPTS[1], seed=2, guidance_scale=4.5)[0])
    assert not [record for record in caplog.records if "guidance_scale" in record.message]
    guided = latents(own, PROMPTS[0], expert="free", seed=1, guidance_scale=4.5)
    assert not close(guided[0], both[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert": "nobody"}, "Unknown expert 'nobody'.*one, two"),
        ({"expert": ["one"]}, "1 experts for 3 prompts"),
        ({"seed": [1, 2]}, "2 seeds for 3 pictures"),
        ({"seed": 1, "generator": torch.Generator()}, "excludes"),
    ],
)
def test_wrong_requests_are_named(pipe, arguments, message):
    with pytest.raises(RequestError, match=message):
        pipe(PROMPTS, num_inference_steps=1, **arguments)


@pytest.mark.parametrize(
    ("settings", "said"),
    [("{", "no JSON"), ("[]", "should hold an object"), ('{"record": {"steps": 20}}', "no sampling record")],
)
def test_a_saved_pipeline_with_broken_settings_says_so_before_it_loads(settings, said, tmp_path):
    (tmp_path / "flow_opd.json").write_text(settings)
    with pytest.raises(RequestError, match=rf"flow_opd\.json of .*{said}"):
        FlowOPDPipeline.from_pretrained(tmp_path)
