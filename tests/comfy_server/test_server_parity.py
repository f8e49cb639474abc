"""ComfyUI against ``FlowOPDPipeline``: the same seed, the same conditioning, the same latents and pictures.

ComfyUI's samplers give a latent as the autoencoder takes it, x / 1.5305 + 0.0609 of diffusers'; these two numbers of
SD3 are the miniature's own as well.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowopd_eval.adapters import merge_adapters, read_adapter

from .files import EXPERTS, factors, layouts
from .graphs import PROMPT, Drawing

LAYOUTS = sorted(layouts(factors(1)))
SEED = 7


def theirs(pipe, expert, seed=SEED, prompt=PROMPT, **settings):
    """Latents (in ComfyUI's scale) and the picture that the toolkit draws."""
    config = pipe.vae.config
    assert (config.scaling_factor, config.shift_factor) == (1.5305, 0.0609)
    latents = pipe(prompt, expert=expert, seed=seed, output_type="latent", **settings).images
    picture = pipe(prompt, expert=expert, seed=seed, **settings).images[0]
    return latents / config.scaling_factor + config.shift_factor, np.asarray(picture, int)


def draw(server, drawing, seed=SEED):
    sampled = drawing.sample(seed)
    kept, saved = drawing.keep(sampled), drawing.decode(sampled)
    ran = server.done(drawing.graph)
    return server.latent(ran, kept), server.pictures(ran, saved)[0]


@pytest.mark.parametrize("seed", [SEED, 0, 2**32 - 1])
def test_the_base_is_the_base(server, experts, seed):
    latent, picture = draw(server, Drawing(), seed)
    expected, ours = theirs(experts, None, seed)
    torch.testing.assert_close(latent, expected, rtol=0, atol=1e-4)
    assert abs(picture - ours).max() <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_of_any_layout_has_its_true_strength(server, experts, layout):
    drawing = Drawing()
    node = drawing.lora(f"layouts/{layout}/adapter_model.safetensors")
    drawing.show(node, 1)
    latent, picture = draw(server, drawing)
    expected, ours = theirs(experts, "student")
    torch.testing.assert_close(latent, expected, rtol=0, atol=1e-4)
    assert abs(picture - ours).max() <= 2
    base, _ = theirs(experts, None)
    assert (expected - base).abs().max() > 0.1, "an adapter that can be told from none"


@pytest.mark.parametrize("expert", EXPERTS)
def test_a_published_name_is_its_file(server, experts, expert):
    drawing = Drawing()
    drawing.model = [drawing.add("FlowOPDExpert", model=drawing.model, expert=expert, strength=1.0), 0]
    latent, _ = draw(server, drawing)
    torch.testing.assert_close(latent, theirs(experts, expert)[0], rtol=0, atol=1e-4)


def test_base_as_an_expert_is_the_model_as_it_came(server):
    drawing = Drawing()
    drawing.model = [drawing.add("FlowOPDExpert", model=drawing.model, expert="base", strength=1.0), 0]
    assert torch.equal(draw(server, drawing)[0], draw(server, Drawing())[0])


def test_strength_is_a_factor_of_the_change(server, experts):
    """Half strength is the toolkit's adapter with half of its B."""
    drawing = Drawing()
    drawing.lora("Flow-OPD/adapter_model.safetensors", 0.5)
    latent, _ = draw(server, drawing)
    experts.add_experts({"half": merge_adapters([(experts.adapter("student"), 0.5)])[0]})
    torch.testing.assert_close(latent, theirs(experts, "half")[0], rtol=0, atol=1e-4)


def test_a_merge_is_the_toolkits_and_its_file_loads_anywhere(server, experts, tmp_path):
    drawing = Drawing()
    files = [f"{folder}/adapter_model.safetensors" for folder in EXPERTS.values()]
    chosen = {"lora_1": files[0], "weight_1": 1.0, "lora_2": files[1], "weight_2": 3.0}
    rest = {"lora_3": "none", "weight_3": 1.0, "lora_4": "none", "weight_4": 1.0}
    merge = drawing.add(
        "FlowOPDMerge", model=drawing.model, **chosen, **rest, strength=1.0, save_as="flow-opd-tests/merged"
    )
    drawing.model = [merge, 0]
    shown = drawing.show(merge, 1)
    sampled = drawing.sample(SEED)
    kept = drawing.keep(sampled)
    ran = server.done(drawing.graph)
    merged, _ = merge_adapters([(experts.adapter("student"), 0.25), (experts.adapter("geneval"), 0.75)], rank=64)
    experts.add_experts({"merged": merged})
    torch.testing.assert_close(server.latent(ran, kept), theirs(experts, "merged")[0], rtol=0, atol=1e-4)
    written = ran.text(shown).rpartition("written to ")[2].replace("\\", "/")
    folder, name = written.rpartition("/output/")[2].rsplit("/", 1)
    file = tmp_path / "merged.safetensors"
    file.write_bytes(server.view({"filename": name, "subfolder": folder, "type": "output"}))
    assert not any(key.endswith(".alpha") for key in load_file(file))
    assert all(
        torch.allclose(f.B @ f.A, merged.factors[key].B @ merged.factors[key].A, atol=1e-6)
        for key, f in read_adapter(file).factors.items()
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_the_arms_of_a_comparison_are_single_runs_with_stock_nodes(server, batch):
    drawing = Drawing(batch=batch)
    compare = drawing.compare("base\nstudent\nlayouts/kohya/adapter_model.safetensors", SEED)
    saved = drawing.save(compare, 1)
    arms = server.pictures(server.done(drawing.graph), saved)
    singles = []
    for file in (None, "Flow-OPD/adapter_model.safetensors", "layouts/kohya/adapter_model.safetensors"):
        single = Drawing(batch=batch)
        if file:
            single.lora(file)
        saved = single.decode(single.sample(SEED))
        singles += server.pictures(server.done(single.graph), saved)
    assert len(arms) == 3 * batch
    assert all(abs(arm - single).max() == 0 for arm, single in zip(arms, singles, strict=True))


def test_the_shift_of_a_comparison_is_the_one_asked_for(server):
    pictures = []
    for shift in (3.0, 1.0):
        drawing = Drawing()
        saved = drawing.save(drawing.compare("base", SEED, shift=shift), 1)
        pictures += server.pictures(server.done(drawing.graph), saved)
    single = Drawing()
    shifted = single.add("ModelSamplingSD3", model=single.model, shift=1.0)
    single.model = [shifted, 0]
    sampled = single.add(
        "KSampler", model=[shifted, 0], seed=SEED, steps=20, cfg=4.5, sampler_name="euler", scheduler="normal",
        denoise=1.0, **single.conditions,
    )  # fmt: skip
    saved = single.decode(sampled)
    assert abs(pictures[1] - server.pictures(server.done(single.graph), saved)[0]).max() == 0
    assert abs(pictures[0] - pictures[1]).max() > 20
