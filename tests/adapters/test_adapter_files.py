"""Every layout has one meaning, and what cannot be read is refused by name."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from loopback_hub import hub, hub_environment
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from flowopd_eval.adapters import KNOWN_ALPHAS, Adapter, AdapterBank, check_adapter, read_adapter, write_adapter
from flowopd_eval.errors import RequestError

Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."
LAST_QUERY = "transformer_blocks.1.attn.add_q_proj"


@pytest.fixture
def raw(peft_folder: Path) -> Tensors:
    """The tensors PEFT wrote, by module and side: ``transformer_blocks.0.attn.to_q.lora_A``."""
    tensors = load_file(peft_folder / "adapter_model.safetensors")
    return {key.removeprefix(PREFIX).removesuffix(".weight"): tensor for key, tensor in tensors.items()}


def as_diffusers(raw: Tensors) -> Tensors:
    return {f"transformer.{key}.weight": t for key, t in raw.items()}


def as_old_diffusers(raw: Tensors) -> Tensors:
    sides = {"lora_A": "lora.down", "lora_B": "lora.up"}
    return {f"transformer.{key[:-6]}{sides[key[-6:]]}.weight": t for key, t in raw.items()}


def as_kohya(raw: Tensors) -> Tensors:
    sides = {"lora_A": "lora_down", "lora_B": "lora_up"}
    return {f"lora_transformer_{key[:-7].replace('.', '_')}.{sides[key[-6:]]}.weight": t for key, t in raw.items()}


def alphas(tensors: Tensors, value: float) -> Tensors:
    down = re.compile(r"\.lora[_.](A|down)\.weight$")
    return {down.sub(".alpha", key): torch.tensor(value) for key in tensors if down.search(key)}


def baked(raw: Tensors) -> Tensors:
    """B doubled, as baking alpha / r = 2 leaves it."""
    return {key: t * 2 if key.endswith("lora_B") else t for key, t in raw.items()}


def saved(folder: Path, tensors: Tensors, name: str = "file.safetensors", **header: str) -> Path:
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / name, metadata={"format": "pt", **header})
    return folder / name


def edited(peft_folder: Path, target: Path, **config: object) -> Path:
    """A copy of PEFT's folder with changes to its config."""
    folder = shutil.copytree(peft_folder, target, dirs_exist_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.fixture
def reference(peft_folder: Path) -> Adapter:
    return read_adapter(peft_folder)


def test_peft_folder_has_pefts_velocity(transformer, peft_model, peft_folder, velocity):
    adapter = read_adapter(peft_folder)
    with AdapterBank(transformer, {"x": adapter}).use("x"):
        assert torch.allclose(velocity(transformer), velocity(peft_model), atol=1e-6, rtol=0)
    assert (adapter.alpha, adapter.alpha_from, adapter.rank) == (8, "adapter_config.json", 4)


def layouts(raw: Tensors) -> dict[str, tuple[Tensors, dict]]:
    named = {key.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"): t for key, t in raw.items()}
    return {
        "peft file, alpha given": ({f"{PREFIX}{k}.weight": t for k, t in raw.items()}, {"alpha": 8}),
        "peft file with the adapter's name": ({f"{PREFIX}{k}.weight": t for k, t in named.items()}, {"alpha": 8}),
        "diffusers, baked": (as_diffusers(baked(raw)), {}),
        "diffusers, alpha given": (as_diffusers(raw), {"alpha": 8}),
        "diffusers with alpha keys": (as_diffusers(raw) | alphas(as_diffusers(raw), 8), {}),
        "diffusers down/up, baked": (as_old_diffusers(baked(raw)), {}),
        "diffusers down/up with alpha keys": (as_old_diffusers(raw) | alphas(as_old_diffusers(raw), 8), {}),
        "kohya with alpha keys": (as_kohya(raw) | alphas(as_kohya(raw), 8), {}),
        "kohya, alpha = r": (as_kohya(baked(raw)), {}),
    }


@pytest.mark.parametrize("layout", layouts({}))
def test_every_layout_is_the_same_adapter(layout, raw, reference, tmp_path):
    tensors, options = layouts(raw)[layout]
    file = saved(tmp_path, tensors)
    adapter = read_adapter(file, **options)
    assert adapter.sha256 == reference.sha256
    assert adapter.file_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_headers_that_diffusers_writes(peft_model, reference, transformer, tmp_path):
    layers = {k.removeprefix(PREFIX): t for k, t in get_peft_model_state_dict(peft_model).items()}
    config = peft_model.peft_config["default"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path / "pipeline", transformer_lora_layers=layers, transformer_lora_adapter_metadata=config
    )
    transformer.add_adapter(copy.deepcopy(peft_model.peft_config["default"]))
    transformer.load_state_dict({k.replace(".weight", ".default.weight"): t for k, t in layers.items()}, strict=False)
    transformer.save_lora_adapter(tmp_path / "model")
    for folder in ("pipeline", "model"):
        adapter = read_adapter(tmp_path / folder)
        assert adapter.sha256 == reference.sha256
        assert adapter.alpha_from == "the header's lora_adapter_metadata"


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {"attn.to_q": 2}, "alpha_pattern": {"attn.to_q": 7, "transformer_blocks.0.attn.to_v": 3}},
        {"layers_to_transform": [1], "layers_pattern": "transformer_blocks", "target_modules": ["attn.to_q"]},
    ],
)
def test_config_variants_have_pefts_velocity(changes, make_peft, transformer, velocity, tmp_path):
    model = make_peft(**changes)
    model.save_pretrained(tmp_path)
    with AdapterBank(transformer, {"x": read_adapter(tmp_path)}).use("x"):
        assert torch.allclose(velocity(transformer), velocity(model), atol=1e-6, rtol=0)


def test_scale_is_alpha_over_rank(raw, tmp_path):
    file = saved(tmp_path, as_diffusers(raw))
    a, b = (read_adapter(file, alpha=alpha).factors[LAST_QUERY].B for alpha in (8, 2))
    assert torch.equal(a, raw[f"{LAST_QUERY}.lora_B"] * 2)
    assert torch.equal(b, raw[f"{LAST_QUERY}.lora_B"] / 2)


def test_known_file_needs_no_config(peft_folder, reference, tmp_path, monkeypatch):
    bare = shutil.copy(peft_folder / "adapter_model.safetensors", tmp_path)
    monkeypatch.setitem(KNOWN_ALPHAS, reference.file_sha256, 8)
    assert read_adapter(bare).sha256 == reference.sha256


def test_half_precision_is_read_as_fp32(raw, tmp_path):
    adapter = read_adapter(saved(tmp_path, {k: t.bfloat16() for k, t in as_diffusers(raw).items()}))
    assert all(t.dtype == torch.float32 for factors in adapter.factors.values() for t in factors)


# --- what is written


def test_round_trip_into_diffusers(reference, transformer, peft_model, velocity, tmp_path):
    write_adapter(reference, tmp_path)
    pipeline = StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, None, None
    )
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert torch.allclose(velocity(transformer), velocity(peft_model), atol=1e-6, rtol=0)


def test_round_trip_into_peft(reference, transformer, peft_model, velocity, tmp_path):
    write_adapter(reference, tmp_path, base_model="org/base")
    model = PeftModel.from_pretrained(transformer, tmp_path)
    assert torch.allclose(velocity(model), velocity(peft_model), atol=1e-6, rtol=0)
    assert model.peft_config["default"].base_model_name_or_path == "org/base"


def test_round_trip_with_ranks_that_differ(make_peft, base, velocity, tmp_path):
    model = make_peft(rank_pattern={"attn.to_q": 2, "0.attn.to_v": 3}, alpha_pattern={"attn.to_q": 5})
    model.save_pretrained(tmp_path / "peft")
    adapter = read_adapter(tmp_path / "peft")
    write_adapter(adapter, tmp_path / "baked")
    assert read_adapter(tmp_path / "baked").sha256 == adapter.sha256
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "baked")
    assert torch.allclose(velocity(loaded), velocity(model), atol=1e-6, rtol=0)
    stock = copy.deepcopy(base)
    stock.load_lora_adapter(tmp_path / "baked", weight_name="pytorch_lora_weights.safetensors")
    assert torch.allclose(velocity(stock), velocity(model), atol=1e-6, rtol=0)


def test_written_bytes_depend_on_the_adapter_alone(reference, tmp_path):
    shuffled = Adapter(dict(reversed(reference.factors.items())), source="elsewhere")
    write_adapter(reference, tmp_path / "a")
    write_adapter(shuffled, tmp_path / "b")
    names = ["adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert all(read_adapter(tmp_path / "b" / name).sha256 == reference.sha256 for name in names[1:])


# --- what is refused


def refused(source: object, *parts: str, **options: float) -> None:
    with pytest.raises(RequestError) as caught:
        read_adapter(source, **options)  # type: ignore[arg-type]
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_refuses_peft_file_without_config(peft_folder, raw, tmp_path):
    bare = shutil.copy(peft_folder / "adapter_model.safetensors", tmp_path)
    refused(bare, "no adapter_config.json", "alpha / r", "give alpha")
    refused(saved(tmp_path, {f"{k}.weight": t for k, t in raw.items()}), "no adapter_config.json", "give alpha")


def test_refuses_alpha_that_disagrees(peft_folder, raw, tmp_path):
    refused(peft_folder, "alpha 64 was given", "adapter_config.json says 8", alpha=64)
    refused(saved(tmp_path, as_kohya(raw) | alphas(as_kohya(raw), 2)), "`.alpha` keys", "says 2.0", alpha=64)
    assert read_adapter(peft_folder, alpha=8).alpha == 8


def test_refuses_config_without_alpha(peft_folder, tmp_path):
    refused(edited(peft_folder, tmp_path, lora_alpha=None), "does not say lora_alpha", "scale is unknown")


@pytest.mark.parametrize("name", ["adapter_model.bin", "lora.pt", "lora.CKPT"])
def test_refuses_pickles_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    refused(tmp_path / name, name, "pickle", "weights_only=True")
    refused(tmp_path, name, "pickle", "weights_only=True")


def test_refuses_truncated_file(peft_folder, tmp_path):
    content = (peft_folder / "adapter_model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-100])
    refused(tmp_path / "cut.safetensors", "cut.safetensors is truncated", "Fetch it again")


def test_refuses_what_is_not_there(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "neither a file nor a folder", "hub:REPO")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path, "holds neither adapter_model.safetensors", "model.safetensors", "Name the .safetensors file")


def test_refuses_config_that_is_no_json(peft_folder, tmp_path):
    folder = edited(peft_folder, tmp_path)
    (folder / "adapter_config.json").write_text("{")
    refused(folder, "adapter_config.json is no JSON")
    (folder / "adapter_config.json").write_text("[]")
    refused(folder, "should hold an object, but holds list")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector", "DoRA"),
        ("lora_transformer_transformer_blocks_0_attn_to_q.dora_scale", "DoRA"),
        ("transformer.transformer_blocks.0.attn.to_q.lokr_w1", "LoKr"),
        ("lora_transformer_transformer_blocks_0_attn_to_q.hada_w1_a", "LoHa"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "text-encoder LoRA"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text-encoder LoRA"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_B.bias", "LoRA with a bias"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "original SD3 naming"),
    ],
)
def test_refuses_other_kinds_by_name(key, kind, raw, tmp_path):
    file = saved(tmp_path, as_diffusers(raw) | {key: torch.ones(4, 4)})
    refused(file, kind, "is not supported", f"1 of {len(raw) + 1} keys", key)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"peft_type": "LOKR"}, "LOKR"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["proj_out"]}, "fully trained modules"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialisation 'pissa_niter_4'"),
    ],
)
def test_refuses_other_kinds_by_config(config, kind, peft_folder, tmp_path):
    refused(edited(peft_folder, tmp_path, **config), kind, "not supported")


def test_refuses_real_dora(make_peft, tmp_path):
    make_peft(use_dora=True).save_pretrained(tmp_path)
    refused(tmp_path, "DoRA is not supported", "11 of 33 keys")


def test_refuses_keys_without_meaning(raw, tmp_path):
    strange = {"epoch": torch.ones(1), "optimizer.state": torch.ones(1)}
    refused(saved(tmp_path, as_diffusers(raw) | strange), "2 of 24 keys", "epoch, optimizer.state")
    refused(saved(tmp_path, {}), "0 of 0 keys")
    kohya = as_kohya(raw) | {"lora_transformer_input_blocks_1.lora_down.weight": torch.ones(4, 64)}
    refused(saved(tmp_path, kohya), "1 of 23 keys match no module of SD3", "input_blocks_1")


def test_refuses_mixed_files(raw, tmp_path):
    keys = list(raw)
    two = {f"{PREFIX}{k}.{name}.weight": raw[k].clone() for k in keys for name in ("ema", "default")}
    refused(saved(tmp_path, two), "adapters ['default', 'ema']")
    mixed = as_diffusers({k: raw[k] for k in keys[:4]}) | as_kohya({k: raw[k] for k in keys[4:]})
    refused(saved(tmp_path, mixed), "mixes layouts ['lora_transformer_', 'transformer.']")


def test_refuses_halves(raw, tmp_path):
    missing = [f"{LAST_QUERY}.lora_B", "transformer_blocks.0.attn.to_q.lora_A"]
    tensors = as_diffusers({key: t for key, t in raw.items() if key not in missing})
    refused(saved(tmp_path, tensors), "2 halves are missing", *missing)


def test_refuses_shapes_that_are_no_pair(raw, tmp_path):
    raw[f"{LAST_QUERY}.lora_B"] = torch.ones(64, 3)
    refused(saved(tmp_path, as_diffusers(raw)), "1 of 11 modules", f"{LAST_QUERY} (A (4, 64), B (64, 3))")


def test_refuses_rank_that_disagrees_with_the_config(peft_folder, tmp_path):
    refused(edited(peft_folder, tmp_path, r=32), "the rank of 11 of 11 modules is [4]", "r = 32")


def test_refuses_targets_that_disagree_with_the_config(peft_folder, tmp_path):
    named = json.loads((peft_folder / "adapter_config.json").read_text())["target_modules"]
    fewer = edited(peft_folder, tmp_path, target_modules=["attn.to_q", "attn.to_v"])
    refused(fewer, "7 modules are not among the config's targets", "attn.add_k_proj")
    more = edited(peft_folder, tmp_path, target_modules=[*named, "ff.net.2"])
    refused(more, "1 of the config's 7 targets have no module", "ff.net.2")
    refused(edited(peft_folder, tmp_path, target_modules=None), "names no target_modules")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refuses_values_that_are_not_finite(value, raw, tmp_path):
    raw[f"{LAST_QUERY}.lora_A"][0, 0] = value
    refused(saved(tmp_path, as_diffusers(raw)), "NaN or infinity in 1 of 11 modules", LAST_QUERY)


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_refuses_a_side_that_is_zero(raw, tmp_path, side):
    zero = {key: t * 0 if key.endswith(side) else t for key, t in raw.items()}
    refused(saved(tmp_path, as_diffusers(zero)), "lora_B is all zero in 11 of 11 modules", "before training")
    raw[f"transformer_blocks.0.attn.to_q.{side}"].zero_()
    refused(saved(tmp_path, as_diffusers(raw)), "in 1 of 11 modules: transformer_blocks.0.attn.to_q.")


def test_text_queries_of_the_last_block_never_train_and_may_be_zero(make_peft, inputs, raw, tmp_path):
    model = make_peft()
    model.train()
    model(**inputs(2), return_dict=False)[0].square().mean().backward()
    still = {
        name.split(".lora_B")[0].removeprefix(PREFIX)
        for name, parameter in model.named_parameters()
        if "lora_B" in name and (parameter.grad is None or not parameter.grad.any())
    }
    assert still == {LAST_QUERY}
    raw[f"{LAST_QUERY}.lora_B"].zero_()
    assert not read_adapter(saved(tmp_path, as_diffusers(raw))).factors[LAST_QUERY].B.any()


# --- whether it fits


def test_check_refuses_modules_of_another_model(reference, transformer):
    strange = {"down_blocks.0.to_q": reference.factors[LAST_QUERY], "mid.to_q": reference.factors[LAST_QUERY]}
    message = r"2 of 13 modules match no linear layer .*: down_blocks\.0\.to_q, mid\.to_q"
    with pytest.raises(RequestError, match=message):
        check_adapter(Adapter({**reference.factors, **strange}), transformer)


def test_check_refuses_shapes_of_another_size(reference, transformer):
    a, b = reference.factors[LAST_QUERY]
    wrong = Adapter({**reference.factors, LAST_QUERY: type(reference.factors[LAST_QUERY])(a[:, :32], b)})
    message = rf"1 of 11 modules have another shape .*{LAST_QUERY} \(adapter 64x32, layer 64x64\)"
    with pytest.raises(RequestError, match=message):
        check_adapter(wrong, transformer)


def test_check_refuses_modules_left_out(reference, transformer, raw, tmp_path):
    check_adapter(reference, transformer)
    partial = {k: t for k, t in raw.items() if not k.startswith("transformer_blocks.0.attn.to_v")}
    with pytest.raises(RequestError, match=r"1 modules left out .*: transformer_blocks\.0\.attn\.to_v"):
        check_adapter(read_adapter(saved(tmp_path, as_diffusers(partial))), transformer)
    declared = Adapter({k: f for k, f in reference.factors.items() if k != LAST_QUERY}, declared=reference.declared)
    with pytest.raises(RequestError, match=rf"1 modules left out .*: {LAST_QUERY}"):
        check_adapter(declared, transformer)


# --- the Hub


READ = """
import sys
from flowopd_eval.adapters import read_adapter
from flowopd_eval.errors import RequestError
for source in sys.argv[1:]:
    try:
        adapter = read_adapter(source)
        print(adapter.source, adapter.sha256)
    except RequestError as error:
        print("refused:", error)
"""


def read_from_hub(endpoint: str, home: Path, *sources: str) -> list[str]:
    environment = hub_environment(endpoint, home)
    done = subprocess.run([sys.executable, "-c", READ, *sources], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_reads_a_repository_at_a_revision(reference, tmp_path):
    write_adapter(reference, tmp_path)
    commit = "c" * 40
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "adapter_model.safetensors"}
    with hub({"team/expert": {**files, "README.md": b"#"}}, commit) as endpoint:
        sources = ("hub:team/expert@v1", "hub:team/expert", "hub:team/expert@v9", "hub:team/none@v1")
        named, default, revision, repository = read_from_hub(endpoint, tmp_path / "home", *sources)
    assert named == default == f"hub:team/expert@{commit} {reference.sha256}"
    assert revision.startswith("refused: team/expert has no revision 'v9'")
    assert repository.startswith("refused: There is no repository 'team/none'")
    assert not list((tmp_path / "home").rglob("README.md"))
    # The server is gone: what was fetched is read from the cache.
    cached, unknown = read_from_hub(endpoint, tmp_path / "home", "hub:team/expert@v1", "hub:team/other@v1")
    assert cached == named
    assert unknown.startswith("refused: Could not get team/other from the Hub")
    assert "not in the local cache" in unknown


def test_refuses_a_repository_of_pickles(tmp_path):
    with hub({"team/expert": {"adapter_model.bin": b"", "adapter_config.json": b"{}"}}, "d" * 40) as endpoint:
        (line,) = read_from_hub(endpoint, tmp_path / "home", "hub:team/expert@v1")
    assert "adapter_model.bin is a pickle" in line


def test_kohya_names_cover_every_linear_layer(base: SD3Transformer2DModel, tmp_path):
    linears = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    raw = {}
    for name, module in linears.items():
        raw[f"{name}.lora_A"] = torch.ones(2, module.in_features)
        raw[f"{name}.lora_B"] = torch.ones(module.out_features, 2)
    adapter = read_adapter(saved(tmp_path, as_kohya(raw)))
    assert adapter.factors.keys() == linears.keys()
    check_adapter(adapter, base)
