"""What ships with the miniature: adapters in fp16, at full strength, with the guidance scale they were made for."""

import json
from dataclasses import asdict, replace

import pytest
from diffusers import SD3Transformer2DModel
from random_adapters import random_adapter

from flowopd_eval.adapters import read_adapter, write_adapter
from flowopd_eval.models import FAMILIES, TINY_RECORD, Member, fetch_base, resolve
from flowopd_eval.records import SETTINGS_FILE
from training.assemble import ship
from training.config import Teacher
from training.policies import teacher_record


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


@pytest.fixture
def family(monkeypatch):
    """The miniature with an expert that was made for another guidance scale than its base."""
    tiny = FAMILIES["tiny"]
    members = {**tiny.members, "free": Member("some/folder", "an expert", 1.0)}
    monkeypatch.setitem(FAMILIES, "tiny", replace(tiny, members=members))


def test_a_member_keeps_the_guidance_scale_it_was_made_for(family):
    assert resolve("tiny:free").record == replace(TINY_RECORD, guidance=1.0)
    assert resolve("tiny:base").record == TINY_RECORD


@pytest.mark.parametrize(("source", "scale"), [("tiny:free", 1.0), ("tiny:base", 4.5), ("some/folder", 4.5)])
def test_a_teacher_teaches_with_its_own_scale_unless_the_recipe_has_another(source, scale, family):
    assert teacher_record(Teacher(source=source), TINY_RECORD).guidance == scale
    assert teacher_record(Teacher(source=source, guidance=2.0), TINY_RECORD).guidance == 2.0


def test_a_published_adapter_teaches_by_the_record_that_it_carries(tmp_path):
    record = replace(TINY_RECORD, guidance=1.5, text_length=64)
    (tmp_path / SETTINGS_FILE).write_text(json.dumps({"adapter_of": "tiny:base", "record": asdict(record)}))
    teacher = Teacher(source=str(tmp_path))
    assert teacher_record(teacher, TINY_RECORD).guidance == 1.5
    assert teacher_record(teacher, TINY_RECORD).text_length == 64
    assert teacher_record(Teacher(source=str(tmp_path), text_length=32), TINY_RECORD).text_length == 32


def test_a_teacher_whose_settings_the_recipe_gives_is_not_asked_for(monkeypatch):
    monkeypatch.setattr("training.policies.own_record", lambda _: pytest.fail("asked"))
    own = teacher_record(Teacher(source="hub:a/b", guidance=2.0, text_length=32), TINY_RECORD)
    assert (own.guidance, own.text_length) == (2.0, 32)
