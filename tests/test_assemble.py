"""What ships with the miniature: adapters in fp16, at full strength, with the guidance scale they were made for."""

import torch
from diffusers import SD3Transformer2DModel
from random_adapters import random_adapter

from flowopd_eval.adapters import read_adapter, write_adapter
from flowopd_eval.models import FAMILIES, TINY_RECORD, Member, fetch_base, resolve
from training.assemble import ship
from training.config import Teacher
from training.policies import teacher_guidance


def test_a_shipped_adapter_is_the_adapter_up_to_fp16_and_half_as_large(tmp_path):
    config = SD3Transformer2DModel.load_config(fetch_base("builtin:tiny"), subfolder="transformer")
    adapter = random_adapter(SD3Transformer2DModel.from_config(config), 0)
    write_adapter(adapter, tmp_path / "trained")
    folder = ship("ocr", tmp_path / "trained", tmp_path / "experts")
    assert folder == tmp_path / "experts" / "ocr"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    weights = "adapter_model.safetensors"
    assert (folder / weights).stat().st_size < 0.6 * (tmp_path / "trained" / weights).stat().st_size
    again = read_adapter(folder)
    assert again.factors.keys() == adapter.factors.keys()
    for name, factors in adapter.factors.items():
        change, kept = (f.B.float() @ f.A.float() for f in (factors, again.factors[name]))
        assert (change - kept).norm() <= 2e-3 * change.norm()


def test_members_keep_the_guidance_scale_they_were_made_for():
    assert Member(None, "x").record(TINY_RECORD) == TINY_RECORD
    assert Member(None, "x", 1.5).record(TINY_RECORD).guidance == 1.5
    for name, member in FAMILIES["tiny"].members.items():
        assert resolve(f"tiny:{name}").record.guidance == (1.0 if member.adapter else 4.5)
    assert {resolve(f"flow-opd:{name}").record.guidance for name in FAMILIES["flow-opd"].members} == {4.5}


def test_a_teacher_teaches_with_its_own_scale_unless_the_recipe_has_another():
    for name, member in FAMILIES["tiny"].members.items():
        scale = 1.0 if member.adapter else 4.5
        assert teacher_guidance(Teacher(source=f"tiny:{name}"), TINY_RECORD) == scale
        assert teacher_guidance(Teacher(source=f"tiny:{name}", guidance=2.0), TINY_RECORD) == 2.0
    assert teacher_guidance(Teacher(source="some/folder"), TINY_RECORD) == 4.5


def test_every_shipped_adapter_fits_the_miniature():
    for name, member in FAMILIES["tiny"].members.items():
        if member.adapter and name != "merge":
            adapter = read_adapter(member.adapter)
            assert all(torch.isfinite(side).all() for factors in adapter.factors.values() for side in factors)
            assert adapter.alpha == adapter.rank
