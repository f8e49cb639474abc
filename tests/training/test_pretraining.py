"""How the miniature is made: its latent, its optimiser, its recipes, and resuming bit for bit."""

from pathlib import Path

import pytest
import torch

from flowopd_eval.models import TINY_RECORD, fetch_base
from flowopd_eval.pipeline import FlowOPDPipeline
from flowopd_eval.tiny.vocabulary import build_tokenizer
from training.autoencoder import POSTERIOR_LOG_VARIANCE, SCALING_FACTOR, build_autoencoder, to_raw, train_autoencoder
from training.config import AutoencoderConfig, PretrainConfig, load_recipe
from training.muon import Muon, orthogonalise
from training.pretrain import (
    Base,
    decode_linear,
    encode_linear,
    fit_basis,
    load_basis,
    load_weights,
    pretrain,
    rate,
    scene_batch,
)
from training.state import load_checkpoint, save_checkpoint

RECIPES = Path(__file__).parents[2] / "training" / "recipes"


@pytest.fixture(scope="module")
def basis():
    return fit_basis(0, 400)


def test_the_linear_latent_is_centred_scaled_and_inverted_by_its_decoder(basis):
    pictures, _ = scene_batch(0, range(400))
    latents = encode_linear(pictures, basis)
    assert latents.shape == (400, 16, 16, 16)
    assert abs(latents.mean((0, 2, 3))).max() < 1e-4
    assert latents.square().mean() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(encode_linear(decode_linear(latents, basis), basis), latents, atol=1e-4, rtol=0)
    error = (decode_linear(latents, basis) - pictures).square().mean()
    assert 10 * torch.log10(4 / error) > 30  # dB: sixteen components of forty-eight keep the pictures


def test_the_latent_is_half_whitened(basis):
    pictures, _ = scene_batch(0, range(400))
    deviation = encode_linear(pictures, basis).std((0, 2, 3))
    ratio = deviation / basis["variance"] ** 0.25
    torch.testing.assert_close(ratio / ratio[0], torch.ones(16), atol=1e-2, rtol=0)


def test_the_basis_on_file_serves_the_world_as_a_fitted_one_does():
    """It was fitted when things stood anywhere; what the models were trained on is kept."""
    kept, fitted = load_basis(), fit_basis(0)
    torch.testing.assert_close(kept["encode"] @ kept["decode"], torch.eye(16), atol=1e-5, rtol=0)
    pictures, _ = scene_batch(0, range(200))

    def error(basis):
        return float((decode_linear(encode_linear(pictures, basis), basis) - pictures).square().mean())

    assert error(kept) < 1.2 * error(fitted)
    assert encode_linear(pictures, kept).var() == pytest.approx(1, abs=0.1)


def test_pretraining_goes_on_from_an_assembled_folder():
    model = Base()
    load_weights(model, fetch_base("builtin:tiny"))
    ids = build_tokenizer()(["a photo of a red circle"], padding="max_length", return_tensors="pt").input_ids
    states, pooled = model.encode_text(ids)
    pipe = FlowOPDPipeline.from_pretrained(fetch_base("builtin:tiny"), record=TINY_RECORD, dtype=torch.float32)
    embeds, _, pooled_embeds, _ = pipe.encode_prompt("a photo of a red circle", None, None, max_sequence_length=0)
    torch.testing.assert_close(states, embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, pooled_embeds, atol=1e-5, rtol=0)


def test_orthogonalise_approaches_the_polar_factor():
    matrices = torch.randn(3, 24, 10, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalise(matrices)
    assert torch.linalg.svdvals(found).min() > 0.6
    assert torch.linalg.svdvals(found).max() < 1.3  # the quintic's band, not exactly 1
    aligned = torch.einsum("nij,nij->n", found, u @ vh) / (found.norm(dim=(1, 2)) * (u @ vh).norm(dim=(1, 2)))
    assert aligned.min() > 0.97
    torch.testing.assert_close(orthogonalise(matrices.mT), found.mT)


def test_muon_steps_as_torchs_own_does():
    start = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = [
        Muon([ours], lr=0.01),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(3):
        gradient = torch.randn(12, 8, generator=torch.Generator().manual_seed(10 + step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (ours - start).norm()
    assert (ours - theirs).norm() < 0.05 * moved  # torch's orthogonalises in bfloat16


def test_rate_warms_up_stays_and_cools_down():
    config = PretrainConfig(stage="pretrain", out="x", samples=1000, batch_size=10, warmup_samples=100, cooldown=0.25)
    assert rate(0, config) == pytest.approx(0.1)
    assert rate(90, config) == rate(740, config) == 1
    assert rate(875, config) == pytest.approx(0.5)
    assert rate(1000, config) == 0


def test_resumed_pretraining_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    torch.set_num_threads(1)
    settings = {"stage": "pretrain", "out": "x", "batch_size": 2, "compile": False, "warmup_samples": 4, "log_every": 1}
    # A cool-down over everything would make the rate depend on the length of the run; this one starts at the end.
    settings |= {"cooldown": 1e-6, "strip_every": 10**6}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    pretrain(PretrainConfig(samples=12, **settings), tmp_path / "whole")
    pretrain(PretrainConfig(samples=6, **settings), tmp_path / "parts")
    pretrain(PretrainConfig(samples=12, **settings), tmp_path / "parts")
    whole, parts = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "parts")
    assert whole["step"] == parts["step"] == 6
    assert all(torch.equal(whole["model"][k], parts["model"][k]) for k in whole["model"])
    for a, b in zip(whole["ema"]["shadow_params"], parts["ema"]["shadow_params"], strict=True):
        assert torch.equal(a, b)
    assert any(
        not torch.equal(a, b) for a, b in zip(whole["model"].values(), whole["ema"]["shadow_params"], strict=False)
    )


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_each_half_of_the_autoencoder_trains_alone(half, tmp_path):
    config = AutoencoderConfig(stage="autoencoder", half=half, out="x", samples=8, batch_size=4, log_every=1)
    train_autoencoder(config, tmp_path)
    torch.manual_seed(config.seed)
    fresh, trained = build_autoencoder().state_dict(), load_checkpoint(tmp_path)["model"]
    changed = {name.split(".")[0] for name in fresh if not torch.equal(fresh[name], trained[name])}
    assert changed == {half}
    if half == "encoder":
        assert (trained["encoder.conv_out.bias"][16:] == POSTERIOR_LOG_VARIANCE).all()
        assert (trained["encoder.conv_out.weight"][16:] == 0).all()


def test_raw_latents_follow_the_pipelines_convention():
    latents = torch.randn(2, 3)
    vae = build_autoencoder()
    torch.testing.assert_close((to_raw(latents) - vae.config.shift_factor) * vae.config.scaling_factor, latents)
    assert SCALING_FACTOR != 1


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.name)
def test_every_recipe_reads(path):
    assert load_recipe(path, ["seed=3"]).seed == 3


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ('stage = "pretrain"\nout = "x"\nsamples = 1\nspeed = 3', [], r"speed.*\(got 3\)"),
        ('stage = "pretrain"\nout = "x"\nsamples = 0', [], "samples: .*greater than 0"),
        ('stage = "cooking"\nout = "x"', [], r"stage: expected one of pretrain, .*distill.*\(got 'cooking'\)"),
        ('out = "x"', [], "stage: expected one of pretrain"),
        ('stage = "pretrain"\nout = "x"\nsample = 1', [], "sample: there is no such setting; did you mean samples"),
        ('stage = "distill"\nout = "x"\nlearning_rate = 1', [], r"did you mean optimizer\.learning_rate\?"),
        ('stage = "distill"\nout = "x"\n[[tasks]]\nprompt = 1', [], r"tasks\.0\.prompt: .*tasks\.0\.prompts\?"),
        ('stage = "distill"\nout = "x"\nlora = 3', [], r"lora: expected a table of settings \(got 3\)"),
        ("stage = ", [], "not valid TOML"),
        ('stage = "pretrain"\nout = "x"\nsamples = 1', ["samples"], "key=value"),
        ('stage = "pretrain"\nout = "x"\nsamples = 1', ["samples=many"], "many"),
    ],
)
def test_a_wrong_recipe_names_the_key(content, overrides, message, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(path, overrides)
    assert "recipe.toml" in str(caught.value) or "--set" in str(caught.value)


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path):
    save_checkpoint(tmp_path, {"step": 1})
    with pytest.raises(Exception, match=r"pickle|lambda"):
        save_checkpoint(tmp_path, {"step": lambda: 2})
    assert load_checkpoint(tmp_path) == {"step": 1}


def test_a_recipe_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    for path in (tmp_path / "nowhere.toml", tmp_path):
        with pytest.raises(ValueError, match=r"no recipe .*tiny_opd"):
            load_recipe(path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bytes\.toml is not valid TOML"):
        load_recipe(tmp_path / "bytes.toml")
