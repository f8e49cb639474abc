"""The pack's own reader and merge against those of ``flowopd_eval.adapters``, which share no code with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from comfy_nodes.logic import scales
from comfy_nodes.logic.errors import PackError
from comfy_nodes.logic.fit import check_fit
from comfy_nodes.logic.lora import read_lora, state_dict, write_lora
from comfy_nodes.logic.merge import merge_loras
from comfy_nodes.logic.sd3 import dotted
from flowopd_eval.adapters import files, merge_adapters, read_adapter
from flowopd_eval.errors import RequestError

MODULES = ["attn.to_q", "attn.to_out.0", "attn.add_k_proj", "ff.net.0.proj"]
NAMES = [f"transformer_blocks.{block}.{module}" for block in (0, 11) for module in MODULES]
RANK, WIDTH = 4, 8
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": MODULES}

PATTERN = {"attn.to_q": 12, "^transformer_blocks.0.ff.+": 3}


def factors(seed: int, rank: int = RANK) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return {n: (torch.randn(rank, WIDTH, generator=g), torch.randn(WIDTH, rank, generator=g)) for n in NAMES}


def keys(layout: str, name: str) -> tuple[str, str]:
    return {
        "peft": (f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"),
        "peft named": (
            f"base_model.model.{name}.lora_A.default.weight",
            f"base_model.model.{name}.lora_B.default.weight",
        ),
        "bare": (f"{name}.lora_A.weight", f"{name}.lora_B.weight"),
        "diffusers": (f"transformer.{name}.lora_A.weight", f"transformer.{name}.lora_B.weight"),
        "diffusers old": (f"transformer.{name}.lora.down.weight", f"transformer.{name}.lora.up.weight"),
        "kohya": tuple(f"lora_transformer_{name.replace('.', '_')}.lora_{s}.weight" for s in ("down", "up")),
    }[layout]  # type: ignore[return-value]


def write(
    folder: Path, layout: str = "peft", *, seed: int = 0, config=None, header=None, alphas=False, rank: int = RANK
):
    """A file of ``layout``; its scale in a config beside it, in its header, in alpha keys, or nowhere."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name, (a, b) in factors(seed, rank).items():
        down, up = keys(layout, name)
        tensors |= {down: a, up: b}
        if alphas:
            tensors[down.split(".lora")[0] + ".alpha"] = torch.tensor(6.0)
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path, metadata={scales.HEADER: json.dumps(header)} if header else None)
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


CASES = {
    "peft, config": {"layout": "peft", "config": CONFIG},
    "peft, adapter named": {"layout": "peft named", "config": CONFIG},
    "peft, rslora": {"layout": "peft", "config": {**CONFIG, "use_rslora": True}},
    "peft, alpha pattern": {"layout": "peft", "config": {**CONFIG, "alpha_pattern": PATTERN}},
    "bare, config": {"layout": "bare", "config": CONFIG},
    "diffusers": {"layout": "diffusers"},
    "diffusers, config beside is not its": {"layout": "diffusers", "config": CONFIG},
    "diffusers, header": {"layout": "diffusers", "header": {f"transformer.{k}": v for k, v in CONFIG.items()}},
    "diffusers, alpha keys": {"layout": "diffusers", "alphas": True},
    "diffusers, old names": {"layout": "diffusers old"},
    "kohya, alpha keys": {"layout": "kohya", "alphas": True},
    "kohya": {"layout": "kohya"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_layout_is_read_as_the_toolkit_reads_it(tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "a", **CASES[case])
    lora, reference = read_lora(path), read_adapter(path)
    assert sorted(lora.pairs) == sorted(reference.factors) == sorted(NAMES)
    for name, (a, b) in lora.pairs.items():
        torch.testing.assert_close(b @ a, reference.factors[name].B @ reference.factors[name].A, rtol=0, atol=0)
    assert lora.alpha == reference.alpha


def test_the_public_files_have_twice_the_product_of_their_factors(tmp_path: Path) -> None:
    lora = read_lora(write(tmp_path / "a", config=CONFIG))
    for name, (a, b) in factors(0).items():
        torch.testing.assert_close(lora.pairs[name][1] @ lora.pairs[name][0], 2 * b @ a)


def test_a_known_file_needs_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a")
    sha256 = read_adapter(path, alpha=8).file_sha256
    monkeypatch.setitem(scales.KNOWN_ALPHAS, sha256, 8.0)
    assert read_lora(path).alpha == 8
    assert scales.KNOWN_ALPHAS.items() >= files.KNOWN_ALPHAS.items()


def test_a_bare_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    for layout in ("peft", "bare"):
        path = write(tmp_path / layout, layout)
        with pytest.raises(PackError, match=r"adapter_config\.json.*flowopd-eval convert"):
            read_lora(path)
        with pytest.raises(RequestError):
            read_adapter(path)


REFUSED = {
    "another rank": ({"config": {**CONFIG, "r": 16}}, "8 of 8 modules have another rank"),
    "other targets": ({"config": {**CONFIG, "target_modules": ["attn.to_q"]}}, "6 of 8 modules.*targets: .*add_k_proj"),
    "no alpha": ({"config": {"r": RANK}}, "lora_alpha"),
    "DoRA": ({"config": {**CONFIG, "use_dora": True}}, "DoRA"),
    "PiSSA": ({"config": {**CONFIG, "init_lora_weights": "pissa"}}, "changes the base"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_is_not_this_files_is_refused(tmp_path: Path, case: str) -> None:
    how, said = REFUSED[case]
    path = write(tmp_path / "a", **how)
    with pytest.raises(PackError, match=said):
        read_lora(path)
    with pytest.raises(RequestError):
        read_adapter(path)


def broken_tensors() -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    a, b = torch.ones(2, 4), torch.ones(4, 2)
    one = "transformer.transformer_blocks.0.attn.to_q"
    peft = "base_model.model.x.lora_"
    other = "lora_transformer_single_blocks_0_x.lora_"
    good = {f"{one}.lora_A.weight": a, f"{one}.lora_B.weight": b}
    return {
        "half": ({f"{one}.lora_A.weight": a}, "1 halves are missing: .*to_q.lora_B"),
        "stranger": ({**good, "hello": a}, "1 of 3 keys match no LoRA layout: hello"),
        "mixed": ({**good, f"{peft}A.weight": a, f"{peft}B.weight": b}, "mixes layouts"),
        "shapes": ({f"{one}.lora_A.weight": a, f"{one}.lora_B.weight": a}, "not A .r, in. and B"),
        "LoKr": ({f"{one}.lokr_w1": a}, "LoKr"),
        "fused": ({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": a}, "fused"),
        "kohya of another model": (
            {f"{other}down.weight": a, f"{other}up.weight": b},
            "2 of 2 keys match no layer of SD3",
        ),
        "NaN": ({f"{one}.lora_A.weight": a * float("nan"), f"{one}.lora_B.weight": b}, "NaN.* in 1 of 1"),
        "untrained": ({f"{one}.lora_A.weight": a, f"{one}.lora_B.weight": 0 * b}, "all of lora_B is zero"),
    }  # fmt: skip


@pytest.mark.parametrize("case", broken_tensors())
def test_a_broken_file_is_refused_with_names(tmp_path: Path, case: str) -> None:
    tensors, said = broken_tensors()[case]
    save_file({key: t.clone() for key, t in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(PackError, match=said):
        read_lora(tmp_path / "x.safetensors")


def test_a_cut_file_and_a_pickle_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a", config=CONFIG)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(PackError, match="truncated"):
        read_lora(path)
    torch.save({}, tmp_path / "x.pt")
    with pytest.raises(PackError, match="run code"):
        read_lora(tmp_path / "x.pt")


def test_files_are_kept_by_content_and_read_again_when_that_or_the_config_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "a", config=CONFIG)
    first = read_lora(path)
    assert read_lora(path) is first
    write(tmp_path / "a", config={**CONFIG, "lora_alpha": RANK})
    second = read_lora(path)
    torch.testing.assert_close(2 * second.pairs[NAMES[0]][1], first.pairs[NAMES[0]][1])
    write(tmp_path / "a", seed=5, config=CONFIG)
    assert not torch.equal(read_lora(path).pairs[NAMES[0]][0], first.pairs[NAMES[0]][0])


def test_what_is_written_has_full_strength_for_every_reader(tmp_path: Path) -> None:
    lora = read_lora(write(tmp_path / "a", config=CONFIG))
    write_lora(lora, tmp_path / "out" / "x.safetensors")
    again, reference = read_lora(tmp_path / "out" / "x.safetensors"), read_adapter(tmp_path / "out" / "x.safetensors")
    for name, (a, b) in lora.pairs.items():
        assert torch.equal(again.pairs[name][1], b)
        assert torch.equal(reference.factors[name].B @ reference.factors[name].A, b @ a)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, -0.25)])
def test_the_merge_is_the_toolkits_exact_mean_of_products(tmp_path: Path, weights: tuple[float, float]) -> None:
    paths = [write(tmp_path / "a", config=CONFIG), write(tmp_path / "b", "diffusers", seed=1, rank=2)]
    merged = merge_loras([(read_lora(path), w) for path, w in zip(paths, weights, strict=True)])
    shares = [w / sum(weights) for w in weights]
    reference, report = merge_adapters(
        [(read_adapter(p), w) for p, w in zip(paths, shares, strict=True)], rank=RANK + 2
    )
    assert report.discarded_energy < 1e-9
    assert merged.rank == RANK + 2
    for name, (a, b) in merged.pairs.items():
        wanted = reference.factors[name].B @ reference.factors[name].A
        torch.testing.assert_close(b @ a, wanted, rtol=1e-4, atol=1e-4)


def test_a_module_that_one_lacks_counts_as_no_change(tmp_path: Path) -> None:
    lora = read_lora(write(tmp_path / "a", config=CONFIG))
    tensors = {key: t for key, t in state_dict(lora).items() if NAMES[0] in key}
    save_file(tensors, tmp_path / "one.safetensors")
    merged = merge_loras([(lora, 1), (read_lora(tmp_path / "one.safetensors"), 1)])
    for name, share in ((NAMES[0], 1.0), (NAMES[1], 0.5)):
        (a, b), (x, y) = merged.pairs[name], lora.pairs[name]
        torch.testing.assert_close(b @ a, share * y @ x)


@pytest.mark.parametrize("weights", [(1.0, -1.0), (float("nan"), 1.0), ()])
def test_weights_that_make_no_mean_are_refused(tmp_path: Path, weights: tuple[float, ...]) -> None:
    lora = read_lora(write(tmp_path / "a", config=CONFIG))
    with pytest.raises(PackError):
        merge_loras([(lora, weight) for weight in weights])


def sd3_maps() -> tuple[dict, dict]:
    """ComfyUI's key map and shapes for the modules here: q, k, v are thirds of one weight."""
    key_map, shapes = {}, {}
    for name in NAMES:
        block = name.split(".")[1]
        fused = {
            "attn.to_q": (f"j.{block}.x.qkv.weight", (0, 0, WIDTH)),
            "attn.add_k_proj": (f"j.{block}.c.qkv.weight", (0, WIDTH, WIDTH)),
        }
        target = fused.get(name.split(".", 2)[2], f"j.{block}.{name.split('.', 2)[2]}.weight")
        key_map["transformer." + name] = target
        shapes[target if isinstance(target, str) else target[0]] = (
            WIDTH if isinstance(target, str) else 3 * WIDTH,
            WIDTH,
        )
    return key_map, shapes  # fmt: skip


def test_a_lora_fits_the_model_it_was_made_for(tmp_path: Path) -> None:
    check_fit(read_lora(write(tmp_path / "a", config=CONFIG)), *sd3_maps())


def test_no_match_a_partial_match_and_another_size_are_refused_with_names(tmp_path: Path) -> None:
    lora = read_lora(write(tmp_path / "a", config=CONFIG))
    key_map, shapes = sd3_maps()
    with pytest.raises(PackError, match="8 of 8 modules match nothing"):
        check_fit(lora, {}, shapes)
    with pytest.raises(
        PackError, match=r"1 of 8 modules match nothing in this model: transformer_blocks\.11\.attn\.to_out\.0"
    ):
        check_fit(lora, key_map, {key: s for key, s in shapes.items() if key != "j.11.attn.to_out.0.weight"})
    wide = {k: (t if isinstance(t, str) else (t[0], (0, 0, 16))) for k, t in key_map.items()}
    with pytest.raises(PackError, match=r"8 of 8 modules have another shape.*LoRA 8x8, model 16x16"):
        check_fit(lora, wide, {key: (2 * rows, 16) for key, (rows, _) in shapes.items()})
    odd = {k: (t if "add_k" not in k else (t[0], (0, 9, 9))) for k, t in key_map.items()}
    with pytest.raises(PackError, match=r"2 of 8 modules have another shape.*add_k_proj \(LoRA 8x8, model 9x8\)"):
        check_fit(lora, odd, shapes)


def test_kohyas_names_are_those_of_every_linear_layer_of_sd3() -> None:
    assert all(dotted(flat) == name for flat, name in files._sd3_names().items())
