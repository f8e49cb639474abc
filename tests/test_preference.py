"""PickScore, HPS v2.1, Aesthetic v2 and CLIPScore: real CLIP code on random weights, each against its formula."""

from __future__ import annotations

import hashlib
import json
import pickle
import string
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import gelu, layer_norm, linear, multi_head_attention_forward
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from flowopd_eval.drawbench import UNSCREENED, drawbench_prompts, refuse_unscreened
from flowopd_eval.errors import RequestError
from flowopd_eval.fetched import Source
from flowopd_eval.harness import identity_of, standard_metrics
from flowopd_eval.records import Prompt, Sample
from flowopd_eval.scorers.clip_model import Checkpoint, ClipModel, fit_pixels, from_open_clip
from flowopd_eval.scorers.preference import METRICS, PreferenceScorer, PreferenceWeights

HEADS = 2
TEXTS = ["a red cube", "two dogs in snow", "the word hello"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def picture(seed, width=300, height=300):
    """Smooth, so that a resize matters and its rounding does not."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def prompts(texts=TEXTS):
    return [Prompt(f"p{n}", text, "preference") for n, text in enumerate(texts)]


def save_tokenizer(folder: Path) -> int:
    """A tokenizer that spells; the size of its vocabulary, whose last token is the end, as in CLIP's own."""
    pieces = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    vocabulary = {piece: n for n, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return len(vocabulary)


def random_clip(seed, size, activation, width, end=2):
    """Two layers, every weight random: fresh biases are zero and fresh norms one, which would hide a swap."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    text = CLIPTextConfig(
        vocab_size=size, max_position_embeddings=77, eos_token_id=end, hidden_act=activation, projection_dim=12, **sizes
    )
    vision = CLIPVisionConfig(image_size=224, patch_size=56, hidden_act=activation, projection_dim=12, **sizes)
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12))
    with torch.no_grad():
        for name, value in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            value.copy_(norm + 0.3 * torch.randn_like(value) if value.ndim < 2 else 0.3 * torch.randn_like(value))
        model.logit_scale.fill_(2.5)
    return model.half().float().eval()  # so that half precision holds it exactly


def open_clip_layout(model):
    """The weights under open_clip's names, as its modules have them."""
    state = model.state_dict()
    out = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T,  # x @ text_projection
        "visual.proj": state["visual_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        for theirs, ours in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
            for n in range(2):
                layer, block = f"{theirs}.encoder.layers.{n}", f"{ours}.resblocks.{n}"
                q, k, v = (state[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv")
                out[f"{block}.attn.in_proj_{kind}"] = torch.cat([q, k, v])
                out[f"{block}.attn.out_proj.{kind}"] = state[f"{layer}.self_attn.out_proj.{kind}"]
                out[f"{block}.ln_1.{kind}"] = state[f"{layer}.layer_norm1.{kind}"]
                out[f"{block}.ln_2.{kind}"] = state[f"{layer}.layer_norm2.{kind}"]
                out[f"{block}.mlp.c_fc.{kind}"] = state[f"{layer}.mlp.fc1.{kind}"]
                out[f"{block}.mlp.c_proj.{kind}"] = state[f"{layer}.mlp.fc2.{kind}"]
    return {name: value.half().contiguous() for name, value in out.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """All four metrics' weights, tiny and random, in the layouts of the published ones."""
    root = tmp_path_factory.mktemp("preference")
    folders = {name: root / name for name in ("clip_l", "clip_h", "pickscore", "hps", "cache")}
    for folder in folders.values():
        folder.mkdir()
    size = save_tokenizer(folders["clip_h"])
    save_tokenizer(folders["clip_l"])
    random_clip(0, size, "quick_gelu", 32, end=size - 1).save_pretrained(folders["clip_l"])
    random_clip(1, size, "gelu", 24).half().save_pretrained(folders["pickscore"])
    hps = random_clip(2, size, "gelu", 24)
    hps.config.save_pretrained(folders["clip_h"])
    torch.save({"epoch": 1, "state_dict": open_clip_layout(hps)}, folders["hps"] / "hps.pt")
    torch.manual_seed(3)
    widths = (12, 10, 8, 6, 4, 1)
    head = {}
    for n, wide, narrow in zip((0, 2, 4, 6, 7), widths, widths[1:]):
        head |= {f"layers.{n}.weight": torch.randn(narrow, wide), f"layers.{n}.bias": torch.randn(narrow)}
    torch.save(head, folders["cache"] / "head.pth")
    weights = PreferenceWeights(
        str(folders["pickscore"]),
        str(folders["clip_h"]),
        str(folders["clip_l"]),
        Checkpoint(str(folders["hps"]), "hps.pt", sha256(folders["hps"] / "hps.pt")),
        Source("head.pth", "http://127.0.0.1:9/head.pth", sha256(folders["cache"] / "head.pth")),
    )
    return {"weights": weights, "hps": hps, "head": head, "tokenizer": folders["clip_h"], "root": root}


@pytest.fixture(autouse=True)
def cache(world, monkeypatch):
    monkeypatch.setenv("FLOWOPD_CACHE", str(world["root"] / "cache"))


def by_hand(model, tokenizer, image, text, pixels=None):
    """One picture's and one text's feature, of length 1, without padding and from the processor's own pixels."""
    if pixels is None:
        pixels = np.asarray(CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0])
    with torch.no_grad():
        seen = model.get_image_features(torch.from_numpy(pixels)[None]).pooler_output[0]
        said = model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output[0]
    return seen / seen.norm(), said / said.norm()


def test_each_metric_follows_its_formula(world):
    weights, images = world["weights"], [picture(0), picture(1, 300, 150), picture(2, 150, 300)]
    tokenizer = CLIPTokenizer.from_pretrained(world["tokenizer"])
    pick = CLIPModel.from_pretrained(weights.pickscore, dtype=torch.float32).eval()
    large = CLIPModel.from_pretrained(weights.clip_l).eval()
    expected = {name: [] for name in METRICS}
    for image, text in zip(images, TEXTS, strict=True):
        seen, said = by_hand(pick, tokenizer, image, text)
        expected["pickscore"].append(float(2.718281828**2.5 * (seen @ said)))
        seen, said = by_hand(world["hps"], tokenizer, image, text, fit_pixels(image))
        expected["hps_v2_1"].append(float(seen @ said))
        seen, said = by_hand(large, tokenizer, image, text)
        expected["clip_score"].append(float(100 * (seen @ said)))
        for n in (0, 2, 4, 6, 7):
            seen = world["head"][f"layers.{n}.weight"] @ seen + world["head"][f"layers.{n}.bias"]
        expected["aesthetic_v2"].append(float(seen))
    scores = PreferenceScorer(weights=weights).score(images, prompts())
    got = {name: [score.detail["also"][name] for score in scores] for name in METRICS[1:]}
    got["pickscore"] = [score.value for score in scores]
    for name in METRICS:
        assert np.allclose(got[name], expected[name], rtol=0, atol=2e-4), name
        assert np.ptp(expected[name]) > 0.1, f"{name} tells nothing apart"
    assert not any(set(score.detail["also"]) - set(METRICS[1:]) for score in scores)


def test_a_picture_is_worth_the_same_in_any_company_and_order_is_kept(world):
    images, asked = [picture(n) for n in range(4)], prompts([*TEXTS, "a much longer text than any of the others"])
    rows = {}
    for batch in (1, 3, 32):
        scores = PreferenceScorer(weights=world["weights"], batch=batch).score(images, asked)
        rows[batch] = [[s.value, *s.detail["also"].values()] for s in scores]
    scorer = PreferenceScorer(weights=world["weights"])
    alone = [scorer.score([image], [prompt])[0] for image, prompt in zip(images, asked, strict=True)]
    rows[0] = [[s.value, *s.detail["also"].values()] for s in alone]
    turned = scorer.score(images[::-1], asked[::-1])[::-1]
    rows[-1] = [[s.value, *s.detail["also"].values()] for s in turned]
    for row in rows.values():
        assert np.allclose(row, rows[1], rtol=0, atol=1e-4)
    assert np.ptp(np.array(rows[1]), axis=0).min() > 0.1
    assert scorer.score([], []) == []
    with pytest.raises(ValueError, match="4 pictures and 3 prompts"):
        scorer.score(images, asked[:3])


def test_metrics_of_one_model_look_at_a_picture_once(world):
    scorer = PreferenceScorer(("aesthetic_v2", "clip_score"), world["weights"])
    large = scorer.metrics[0].model
    seen, read = [], []
    large.network.vision_model.register_forward_hook(lambda module, args, out: seen.append(len(out.pooler_output)))
    large.network.text_model.register_forward_hook(lambda module, args, out: read.append(len(out.pooler_output)))
    scorer.score([picture(n) for n in range(3)], prompts())
    assert (seen, read) == ([3], [3])
    scorer.score([picture(9)], prompts()[:1])
    assert (seen, read) == ([3, 1], [3, 1])  # nothing is kept from one call to the next
    alone = PreferenceScorer(("aesthetic_v2",), world["weights"])
    alone.metrics[0].model.network.text_model.register_forward_hook(lambda *_: pytest.fail("the prompt is not read"))
    alone.score([picture(0)], prompts()[:1])


# --- HPS: another layout, another transform --------------------------------------------------------------------------
def plain_open_clip(state, tower, x, mask=None):
    """open_clip's transformer on its own weights: x (length, batch, width)."""
    for n in range(2):
        at = {k.removeprefix(f"{tower}.resblocks.{n}."): v for k, v in state.items() if f"{tower}.resblocks.{n}." in k}
        y = layer_norm(x, x.shape[-1:], at["ln_1.weight"], at["ln_1.bias"])
        taken = [at[f"attn.{name}"] for name in ("in_proj_weight", "in_proj_bias")]
        out = [at[f"attn.out_proj.{kind}"] for kind in ("weight", "bias")]
        x = x + multi_head_attention_forward(
            y, y, y, x.shape[-1], HEADS, *taken, None, None, False, 0.0, *out, attn_mask=mask, need_weights=False
        )[0]  # fmt: skip
        y = layer_norm(x, x.shape[-1:], at["ln_2.weight"], at["ln_2.bias"])
        y = gelu(linear(y, at["mlp.c_fc.weight"], at["mlp.c_fc.bias"]))
        x = x + linear(y, at["mlp.c_proj.weight"], at["mlp.c_proj.bias"])
    return x


def test_a_checkpoint_in_open_clips_layout_is_the_same_network(world):
    """Against the model it was made from, and against open_clip's forward in plain torch."""
    weights, image = world["weights"], picture(5)
    model = ClipModel(weights.clip_h, checkpoint=weights.hps, pixels=fit_pixels)
    pixels = torch.from_numpy(fit_pixels(image))[None]
    tokens = model._tokenizer(TEXTS, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        seen = world["hps"].get_image_features(pixels).pooler_output[0]
        said = world["hps"].get_text_features(**tokens).pooler_output
    assert torch.allclose(model.image_features([image])[0], seen / seen.norm(), atol=1e-6)
    assert torch.allclose(model.text_features(TEXTS), said / said.norm(dim=-1, keepdim=True), atol=1e-6)
    assert model.network.dtype == torch.float32

    state = {
        name: value.float() for name, value in torch.load(Path(weights.hps.source) / "hps.pt")["state_dict"].items()
    }
    x = torch.nn.functional.conv2d(pixels, state["visual.conv1.weight"], stride=56).flatten(2).permute(2, 0, 1)
    x = torch.cat([state["visual.class_embedding"][None, None], x]) + state["visual.positional_embedding"][:, None]
    x = layer_norm(x, x.shape[-1:], state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = plain_open_clip({k: v for k, v in state.items() if k.startswith("visual.")}, "visual.transformer", x)[0]
    x = layer_norm(x, x.shape[-1:], state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    x = (x @ state["visual.proj"])[0]
    assert torch.allclose(model.image_features([image])[0], x / x.norm(), atol=1e-5)

    ids = tokens["input_ids"]
    y = (state["token_embedding.weight"][ids] + state["positional_embedding"]).transpose(0, 1)
    mask = torch.full((77, 77), float("-inf")).triu(1)
    y = plain_open_clip({k: v for k, v in state.items() if not k.startswith("visual.")}, "transformer", y, mask)
    y = layer_norm(y, y.shape[-1:], state["ln_final.weight"], state["ln_final.bias"])
    y = y[ids.argmax(-1), range(3)] @ state["text_projection"]
    assert torch.allclose(model.text_features(TEXTS), y / y.norm(dim=-1, keepdim=True), atol=1e-5)


def test_every_weight_has_one_place(world):
    renamed = from_open_clip(open_clip_layout(world["hps"]))
    wanted = world["hps"].state_dict()
    assert renamed.keys() == wanted.keys()
    assert all(torch.equal(renamed[name].float(), wanted[name]) for name in wanted)


@pytest.mark.parametrize("change", ["lacking", "unknown", "misshapen"])
def test_a_checkpoint_of_another_network_is_refused(world, tmp_path, change):
    state = open_clip_layout(world["hps"])
    if change == "lacking":
        del state["visual.transformer.resblocks.1.attn.in_proj_bias"]
    elif change == "unknown":
        state["visual.score_predictor.weight"] = torch.zeros(2)
    else:
        state["visual.proj"] = state["visual.proj"][:, :5]
    torch.save({"state_dict": state}, tmp_path / "hps.pt")
    checkpoint = Checkpoint(str(tmp_path), "hps.pt", sha256(tmp_path / "hps.pt"))
    scorer = PreferenceScorer(("hps_v2_1",), replace(world["weights"], hps=checkpoint))
    with pytest.raises(RequestError, match=r"hps\.pt does not fit"):
        scorer.identity()


def test_safetensors_that_lack_a_weight_are_refused(world, tmp_path):
    from safetensors.torch import save_file

    model = random_clip(7, 54, "gelu", 24)
    model.config.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items() if "logit" not in k}, tmp_path / "model.safetensors"
    )
    with pytest.raises(RequestError, match="logit_scale"):
        PreferenceScorer(weights=replace(world["weights"], pickscore=str(tmp_path))).identity()


class Evil:
    def __reduce__(self):
        return (open, (str(Path(self.place)), "w"))

    def __init__(self, place):
        self.place = place


def test_a_pickle_is_checked_before_it_is_read_and_never_run(world, tmp_path):
    path, trace = tmp_path / "hps.pt", tmp_path / "trace"
    path.write_bytes(pickle.dumps({"state_dict": Evil(trace)}))
    wrong = replace(world["weights"], hps=Checkpoint(str(tmp_path), "hps.pt", "0" * 64))
    with pytest.raises(RequestError, match="sha256"):
        PreferenceScorer(("hps_v2_1",), wrong).identity()
    right = replace(world["weights"], hps=Checkpoint(str(tmp_path), "hps.pt", sha256(path)))
    with pytest.raises(RequestError, match="no checkpoint of plain tensors"):
        PreferenceScorer(("hps_v2_1",), right).identity()
    assert not trace.exists()


@pytest.mark.parametrize("size", [(224, 224), (300, 300), (300, 100), (100, 300), (224, 90), (101, 37)])
def test_pictures_are_fitted_into_a_black_square(size):
    """Pillow's bicubic on floats is the same filter, written by others."""
    image = picture(4, *size)
    width, height = (round(side * 224 / max(size)) for side in size)
    expected = np.zeros((3, 224, 224))
    left, top = (224 - width) // 2, (224 - height) // 2
    for channel, band in enumerate(image.split()):
        resized = band.convert("F").resize((width, height), Image.Resampling.BICUBIC)
        expected[channel, top : top + height, left : left + width] = np.asarray(resized) / 255
    mean, std = np.array([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])[..., None, None]
    assert np.allclose(fit_pixels(image), (expected - mean) / std, atol=1e-4)


# --- texts -----------------------------------------------------------------------------------------------------------
def test_texts_are_cut_to_77_tokens_with_their_end_kept(world):
    model = ClipModel(world["weights"].clip_l)
    letters = "".join(np.random.default_rng(0).choice(list("abcdefgh"), 75))
    cut, same, other = model.text_features([letters + "xyz" * 40, letters + "q" * 99, letters[:-1] + "z" + "q" * 99])
    assert torch.allclose(cut, same, atol=1e-6)
    assert (cut - other).abs().max() > 1e-3
    vocabulary = json.loads((world["tokenizer"] / "vocab.json").read_text())
    ids = [vocabulary["<|startoftext|>"], *(vocabulary[letter] for letter in letters), vocabulary["<|endoftext|>"]]
    assert len(ids) == 77
    with torch.no_grad():
        plain = model.network.get_text_features(input_ids=torch.tensor([ids])).pooler_output[0]
    assert torch.allclose(cut, plain / plain.norm(), atol=1e-6)


# --- what is not there -----------------------------------------------------------------------------------------------
def sample(n, score):
    return Sample(f"p{n}", 0, "preference", TEXTS[n], n, f"{n}.png", "", score.value, score.reason, score.detail)


def test_a_metric_without_weights_is_named_with_its_remedy_and_never_a_zero(world, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FLOWOPD_CACHE", str(tmp_path))
    missing = Checkpoint("hub:nobody/here@abc", "hps.pt", "0" * 64)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    scorer = PreferenceScorer(weights=replace(world["weights"], hps=missing))
    identity = identity_of(scorer)
    assert set(identity["metrics"]) == {"pickscore", "clip_score"}
    assert identity["unavailable"] == {
        "hps_v2_1": 'hf download nobody/here --revision abc --include "hps.pt"',
        "aesthetic_v2": 'curl -L --create-dirs -o "${FLOWOPD_CACHE:-$HOME/.cache/flowopd-eval}/head.pth" '
        "http://127.0.0.1:9/head.pth",
    }
    assert caplog.text.count("hps_v2_1 is left out") == caplog.text.count("aesthetic_v2 is left out") == 1
    scores = scorer.score([picture(n) for n in range(3)], prompts())
    assert all(set(score.detail) == {"also"} and set(score.detail["also"]) == {"clip_score"} for score in scores)
    metrics = standard_metrics([sample(n, score) for n, score in enumerate(scores)], None)
    assert set(metrics["also"]) == {"clip_score"}
    assert metrics["also"]["clip_score"]["value"] == pytest.approx(
        sum(score.detail["also"]["clip_score"] for score in scores) / 3
    )


def test_the_score_is_never_another_metrics(world, tmp_path):
    absent = replace(world["weights"], pickscore=str(tmp_path))
    with pytest.raises(
        RequestError, match=rf"scored by pickscore .* put config\.json, model\.safetensors into {tmp_path}"
    ):
        PreferenceScorer(weights=absent).identity()
    chosen = PreferenceScorer(("clip_score", "pickscore", "aesthetic_v2"), absent)
    assert (chosen.identity()["value"], list(chosen.identity()["unavailable"])) == ("clip_score", ["pickscore"])
    (score,) = chosen.score([picture(0)], prompts()[:1])
    (reference,) = PreferenceScorer(weights=world["weights"]).score([picture(0)], prompts()[:1])
    assert score.value == pytest.approx(reference.detail["also"]["clip_score"], abs=1e-4)
    assert list(score.detail["also"]) == ["aesthetic_v2"]
    for wrong in ((), ("hps",)):
        with pytest.raises(RequestError, match="Expected metrics of pickscore, hps_v2_1"):
            PreferenceScorer(wrong, absent)


def test_the_identity_holds_every_model_and_hash(world):
    weights = world["weights"]
    identity = identity_of(PreferenceScorer(weights=weights))
    assert "unavailable" not in identity
    files = {name: Path(getattr(weights, name)) / "model.safetensors" for name in ("pickscore", "clip_l")}
    assert identity["metrics"]["pickscore"]["sha256"] == sha256(files["pickscore"])
    assert identity["metrics"]["pickscore"]["tokenizer"] == weights.clip_h
    assert identity["metrics"]["clip_score"]["sha256"] == sha256(files["clip_l"])
    assert identity["metrics"]["aesthetic_v2"]["head_sha256"] == weights.aesthetic.sha256
    assert identity["metrics"]["hps_v2_1"]["sha256"] == weights.hps.sha256


# --- prompts ---------------------------------------------------------------------------------------------------------
def test_drawbench_is_fetched_checked_and_each_prompt_taken_once(tmp_path):
    served = tmp_path / "served.txt"
    served.write_text("\n".join(text for text in TEXTS for _ in range(5)))
    source = Source("drawbench.txt", served.as_uri(), sha256(served))
    found = drawbench_prompts(tmp_path / "cache", source)
    assert [prompt.prompt for prompt in found] == TEXTS
    assert {prompt.task for prompt in found} == {"preference"}
    served.unlink()
    assert drawbench_prompts(tmp_path / "cache", source) == found
    with pytest.raises(RequestError, match="is not the file that was meant"):
        drawbench_prompts(tmp_path / "cache", replace(source, sha256="0" * 64))


def test_an_unscreened_list_is_refused_whatever_it_is_called(tmp_path):
    bad, good = tmp_path / "my own prompts.txt", tmp_path / "test.txt"
    bad.write_text("a stand-in\n")
    good.write_text("a stand-in \n")
    hashes = {hashlib.sha256(b"a stand-in\n").hexdigest(): "dataset/stand-in.txt"}
    with pytest.raises(RequestError, match=r"dataset/stand-in\.txt.*screened"):
        refuse_unscreened(bad, hashes)
    refuse_unscreened(good, hashes)
    refuse_unscreened(tmp_path / "absent.txt", hashes)
    refuse_unscreened(bad)
    assert len(UNSCREENED) == 2
