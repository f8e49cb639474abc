"""Files that no training run writes: both readers, the toolkit's and the pack's, refuse them in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from comfy_nodes.logic.errors import PackError
from comfy_nodes.logic.lora import Lora, read_lora
from comfy_nodes.logic.merge import merge_loras
from flowopd_eval.adapters import Adapter, merge_adapters, read_adapter
from flowopd_eval.adapters.adapter import Factors
from flowopd_eval.errors import RequestError

MODULE = "transformer_blocks.0.attn.to_q"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["attn.to_q"]}
PAIR = {"A": torch.ones(2, 8), "B": torch.ones(8, 2)}
DIFFUSERS = {f"transformer.{MODULE}.lora_{side}.weight": t for side, t in PAIR.items()}
FLAT = f"lora_transformer_{MODULE.replace('.', '_')}"
KOHYA = {f"{FLAT}.lora_{side}.weight": t for side, t in (("down", PAIR["A"]), ("up", PAIR["B"]))}


def refused(path: Path, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        read_adapter(path)
    with pytest.raises(PackError, match=match):
        read_lora(path)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({key: t.to(torch.int8) for key, t in DIFFUSERS.items()}, r"torch\.int8: it is quantised"),
        ({key: t.bool() for key, t in DIFFUSERS.items()}, r"torch\.bool: it is quantised"),
        (DIFFUSERS | {f"transformer.{MODULE}.lora.down.weight": 2 * PAIR["A"]}, "to_q stands in it twice"),
        (KOHYA | {f"{FLAT}.alpha": torch.ones(2)}, "alpha should hold one number, but holds 2"),
        ({key: t[:0] if "_A" in key else t[:, :0] for key, t in DIFFUSERS.items()}, "1 of 1 modules are not A"),
    ],
)
def test_tensors_that_are_no_lora_s(tmp_path, tensors, match):
    save_file({key: t.contiguous() for key, t in tensors.items()}, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rank_pattern": [1]}, r"rank_pattern in its config should give patterns numbers, but is \[1\]"),
        ({"alpha_pattern": {"to_q": "16"}}, "alpha_pattern in its config should give patterns numbers"),
        ({"alpha_pattern": {"(((": 4}}, r"'\(\(\(' in its config is no regular expression"),
        (b'{"r": 2, "lora_alpha": 4, "note": "\xff"}', "UTF-8|utf-8"),
        (b"[" * 100_000, "is no JSON|nested"),
    ],
)
def test_a_config_that_is_none(tmp_path, changes, match):
    path = tmp_path / "adapter_model.safetensors"
    save_file({key.replace("transformer.", "base_model.model.", 1): t for key, t in DIFFUSERS.items()}, path)
    content = changes if isinstance(changes, bytes) else json.dumps(CONFIG | changes).encode()
    (tmp_path / "adapter_config.json").write_bytes(content)
    refused(path, match)


@pytest.mark.parametrize("targets", ["(((", 5, [1]])
def test_targets_that_name_nothing(tmp_path, targets):
    path = tmp_path / "adapter_model.safetensors"
    save_file({key.replace("transformer.", "base_model.model.", 1): t for key, t in DIFFUSERS.items()}, path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG | {"target_modules": targets}))
    with pytest.raises(RequestError, match=r"no regular expression|should be a text or a list of texts"):
        read_adapter(path)


def test_loras_of_models_of_different_sizes_are_not_merged():
    small, large = ((torch.ones(2, width), torch.ones(width, 2)) for width in (8, 12))
    with pytest.raises(RequestError, match=r"to_q has another size in each: small 8x8, large 12x12"):
        merge_adapters(
            [(Adapter({MODULE: Factors(*f)}, name), 0.5) for f, name in ((small, "small"), (large, "large"))]
        )
    with pytest.raises(PackError, match=r"to_q has another size in each: small 8x8, large 12x12"):
        merge_loras([(Lora(name, {MODULE: f}, None, ""), 0.5) for f, name in ((small, "small"), (large, "large"))])


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -1.0)])
def test_a_merge_that_leaves_nothing_is_refused(weights):
    adapter = Adapter({MODULE: Factors(*(torch.randn(*t.shape) for t in PAIR.values()))})
    with pytest.raises(RequestError, match="cancel out"):
        merge_adapters([(adapter, weight) for weight in weights])


def test_a_folder_that_is_a_file_is_named(command, tmp_path):
    save_file({key: t.contiguous() for key, t in DIFFUSERS.items()}, tmp_path / "lora.safetensors")
    (tmp_path / "out").write_text("a file")
    code, _, errors = command("convert", tmp_path / "lora.safetensors", "--out", tmp_path / "out")
    assert code == 2
    assert "name one to write into" in errors
