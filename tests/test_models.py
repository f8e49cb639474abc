"""Names become models: the registry, folders, and repositories through the real Hub client on a loopback server."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import SD3Transformer2DModel
from loopback_hub import files_of, hub, hub_environment
from random_adapters import random_adapter

from flowopd_eval.adapters import merge_adapters, read_adapter, write_adapter
from flowopd_eval.errors import RequestError
from flowopd_eval.models import (
    FAMILIES,
    MERGE,
    TINY_RECORD,
    Backbone,
    adapter_settings,
    fetch_base,
    folder_sha256,
    load_adapter,
    load_pipeline,
    pass_on_settings,
    resolve,
    short_name,
)
from flowopd_eval.records import SD35_RECORD, Prompt, SamplingRecord, write_settings


def test_names_of_record():
    assert resolve("flow-opd").name == "flow-opd:student"
    assert resolve("flow-opd:deqa").adapter == "hub:CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix"
    assert resolve("flow-opd:base").adapter is None
    assert resolve("tiny").name == "tiny:student"
    assert {spec.base for spec in map(resolve, ("flow-opd", "flow-opd:ocr"))} == {FAMILIES["flow-opd"].base}
    assert resolve("flow-opd").record == SamplingRecord(40, 4.5, 3.0, 512, 512, 128, dtype="bfloat16")


def test_a_lora_goes_on_a_base_only():
    assert resolve("tiny:base", "some/lora").adapter == "some/lora"
    assert resolve("tiny:base", "some/lora").name == "tiny:base+lora"
    with pytest.raises(RequestError, match=r"adapter of its own.*flow-opd:base"):
        resolve("flow-opd:ocr", "some/lora")


@pytest.mark.parametrize(("made_for", "guidance"), [("tiny:base", 1.5), ("flow-opd:base", 4.5), (None, 4.5)])
def test_a_lora_made_for_its_base_is_drawn_by_its_own_record(tmp_path, made_for, guidance):
    """A pipeline's record, or one of another backbone, is none of an adapter on this one."""
    settings = {"record": asdict(replace(TINY_RECORD, guidance=1.5))} | ({"adapter_of": made_for} if made_for else {})
    (tmp_path / "flow_opd.json").write_text(json.dumps(settings))
    spec = resolve("tiny:base", str(tmp_path))
    assert spec.record == replace(TINY_RECORD, guidance=guidance)
    assert resolve("tiny:base").record == TINY_RECORD


def test_students_of_several_runs_have_several_names(tmp_path):
    """All of them lie in a folder called adapter."""
    adapter = "runs/a/adapter"
    assert resolve("tiny:base", adapter).name == "tiny:base+a"
    assert resolve("tiny:base", "runs/a/snapshots/step-000010").name == "tiny:base+a/step-000010"
    assert resolve("tiny:base", "runs/a/snapshots/step-000010").slug == "tiny-base-a-step-000010"
    assert short_name("hub:team/adapter@v1") == "adapter@v1"
    for run in "ab":
        folder = tmp_path / run / "adapter"
        folder.mkdir(parents=True)
        write_settings(folder, adapter_settings("tiny:base", TINY_RECORD))
        assert resolve(str(folder)).name == run
    assert resolve(str(tmp_path)).name == tmp_path.name


def adapter_with(folder, guidance):
    """A folder with nothing but the record of an adapter of the miniature."""
    folder.mkdir()
    write_settings(folder, adapter_settings("tiny:base", replace(TINY_RECORD, guidance=guidance)))
    return str(folder)


def test_what_is_made_of_adapters_keeps_the_record_they_share(tmp_path):
    one, two, other = (adapter_with(tmp_path / name, g) for name, g in (("one", 1.0), ("two", 1.0), ("other", 2.0)))
    made = tmp_path / "made"
    made.mkdir()
    silent = tmp_path / "silent"
    silent.mkdir()
    for sources, guidance in (
        ([one, two], 1.0), ([one, other], None), ([one], 1.0), ([one, str(silent)], None),
        (["tiny:geneval", "tiny:ocr", one], 1.0), ([str(silent)], None), (["tiny:geneval", other], None),
    ):  # fmt: skip
        record = pass_on_settings(sources, made)
        assert (record and record.guidance) == guidance
        assert resolve("tiny:base", str(made)).record.guidance == (guidance or 4.5)


def test_a_merge_is_the_exact_mean_of_its_sources(tmp_path):
    transformer = SD3Transformer2DModel.from_pretrained(fetch_base("builtin:tiny"), subfolder="transformer")
    for seed in range(3):
        write_adapter(random_adapter(transformer, seed), tmp_path / str(seed))
    sources = [str(tmp_path / str(seed)) for seed in range(3)]
    merged = load_adapter(MERGE + "+".join(sources))
    expected, _ = merge_adapters([(read_adapter(source), 1 / 3) for source in sources])
    assert merged.sha256 == expected.sha256
    assert load_adapter(sources[0]).sha256 == read_adapter(sources[0]).sha256
    assert FAMILIES["flow-opd"].members["merge"].adapter.count("hub:") == 4


def test_a_folder_brings_its_own_record(tmp_path):
    record = SamplingRecord(3, 1.5, 2.0, 64, 64, 0)
    assert resolve(str(tmp_path)).record == SD35_RECORD
    (tmp_path / "flow_opd.json").write_text(json.dumps({"record": asdict(record), "experts": []}))
    assert resolve(str(tmp_path)).record == record


def test_the_hash_of_a_folder_follows_content_and_names(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "config.json").write_text("{}")
        (tmp_path / name / "README.md").write_text(name)  # decides no picture
    one = folder_sha256(tmp_path / "a")
    assert one == folder_sha256(tmp_path / "b")
    (tmp_path / "b" / "sub" / "config.json").write_text("{ }")
    assert folder_sha256(tmp_path / "b") != one
    (tmp_path / "a" / "sub" / "config.json").rename(tmp_path / "a" / "config.json")
    assert folder_sha256(tmp_path / "a") != one


def test_a_folder_below_one_called_experts_is_hashed_all_the_same(tmp_path):
    hashes = []
    for content in (b"one", b"two"):
        folder = tmp_path / "experts" / content.decode() / "transformer"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(content)
        hashes.append(folder_sha256(folder.parent))
    assert hashes[0] != hashes[1]
    (folder.parent / "experts").mkdir()
    (folder.parent / "experts" / "adapter.safetensors").write_bytes(b"an expert is no part of the backbone")
    assert folder_sha256(folder.parent) == hashes[1]


def flowopd_eval(endpoint: str, home: Path, *words: str) -> subprocess.CompletedProcess:
    environment = hub_environment(endpoint, home)
    command = [sys.executable, "-m", "flowopd_eval", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_model_from_the_hub_draws_and_a_gated_one_names_the_steps(tmp_path):
    files = files_of(fetch_base("builtin:tiny"))
    record = SamplingRecord(1, 1.5, 3.0, 64, 64, 0)
    files["flow_opd.json"] = json.dumps({"record": asdict(record), "experts": []}).encode()
    words = ["generate", "--bench", "geneval", "--limit", "1", "--tasks", "counting", "--samples", "1"]
    with hub({"team/model": files, "team/gated": files}, "e" * 40, gated=["team/gated"]) as endpoint:
        drawn = flowopd_eval(
            endpoint, tmp_path / "home", *words, "--model", "hub:team/model@v1", "--out", str(tmp_path / "a")
        )
        gated = flowopd_eval(
            endpoint, tmp_path / "home", *words, "--model", "hub:team/gated", "--out", str(tmp_path / "b")
        )
        nowhere = flowopd_eval(
            endpoint, tmp_path / "home", *words, "--model", "hub:team/none", "--out", str(tmp_path / "b")
        )
    assert drawn.returncode == 0, drawn.stderr
    (summary,) = (tmp_path / "a").glob("*/geneval/summary.json")
    generator = json.loads(summary.read_text())["generator"]
    assert generator["sampling"] == asdict(record)
    assert len(list((tmp_path / "a").rglob("*.png"))) == 1
    assert gated.returncode == nowhere.returncode == 2
    assert "team/gated is gated: accept its licence at https://huggingface.co/team/gated" in gated.stderr
    assert "hf auth login" in gated.stderr
    assert "no repository 'team/none'" in nowhere.stderr
    assert not (tmp_path / "b").exists()


def test_a_record_that_the_backbone_cannot_keep_to_is_refused():
    """run.json would say what was not done."""
    spec = resolve("tiny:base")
    noisy = replace(spec, record=replace(spec.record, sampler="sde", a=0.7))
    with pytest.raises(RequestError, match=r"tiny:base.*'sde'.*euler"):
        Backbone(spec.base, [noisy], "cpu", None)
    half = replace(spec, name="half", record=replace(spec.record, dtype="bfloat16"))
    with pytest.raises(RequestError, match=r"tiny:base in float32.*--dtype"):
        Backbone(spec.base, [spec, half], "cpu", None)
    assert Backbone(spec.base, [spec, half], "cpu", "float32").dtype == "float32"


@pytest.mark.parametrize(
    ("made_for", "base", "told"),
    [
        ("stabilityai/stable-diffusion-3-medium-diffusers", "hub:stabilityai/stable-diffusion-3.5-medium", True),
        ("stabilityai/stable-diffusion-3.5-medium", "hub:stabilityai/stable-diffusion-3.5-medium", False),
        ("stabilityai/stable-diffusion-3.5-medium", "hub:stabilityai/stable-diffusion-3.5-medium@abc", False),
        ("flow-opd:base", "hub:stabilityai/stable-diffusion-3.5-medium", False),
        ("tiny:base", "hub:stabilityai/stable-diffusion-3.5-medium", True),
        ("stabilityai/stable-diffusion-3.5-medium", "builtin:tiny", True),
        ("tiny:base", "builtin:tiny", False),
        ("/data/checkpoints/sd35", "hub:stabilityai/stable-diffusion-3.5-medium", False),
        (None, "hub:stabilityai/stable-diffusion-3.5-medium", False),
        ("stabilityai/stable-diffusion-3.5-medium", "models/sd35", False),
    ],
)
def test_an_adapter_of_another_backbone_of_the_same_shapes_is_told(tmp_path, monkeypatch, made_for, base, told):
    """Stable Diffusion 3 Medium's LoRAs fit 3.5 Medium's attention: only the config can tell them apart."""
    write_adapter(load_adapter(resolve("tiny:ocr").adapter), tmp_path / "mine", base_model=made_for)
    tiny = fetch_base("builtin:tiny")
    monkeypatch.setattr("flowopd_eval.models.fetch_base", lambda source: tiny)
    backbone = Backbone(base, [resolve("tiny:base", str(tmp_path / "mine"))], "cpu", None)
    said = f"tiny:base+mine: its adapter_config.json says that it was made for {made_for}"
    assert (said in backbone.notice) == told


def test_models_by_name_are_one_pipeline_and_draw_as_the_command_does(tmp_path):
    pipeline = load_pipeline("tiny", "tiny:ocr")
    assert pipeline.experts == ("tiny:student", "tiny:ocr")
    ours = pipeline("a red star", expert="tiny:ocr", seed=7).images[0]
    spec = resolve("tiny:ocr")
    generator = Backbone(spec.base, [spec], "cpu", None).generator(spec, spec.record)
    assert np.array_equal(ours, generator.generate([Prompt("a", "a red star", "colors")], [7])[0])
    assert not np.array_equal(ours, pipeline("a red star", expert="tiny:student", seed=7).images[0])


def test_a_pipeline_has_one_backbone_and_it_is_sd3(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "users.py").write_text("def draw(prompts, seeds): ...")
    for names, message in (
        ([], "no name has 0"),
        (["tiny", "flow-opd"], "tiny, flow-opd has 2"),
        ([str(tmp_path / "other")], "is a FluxPipeline"),
        ([f"{tmp_path}/users.py:draw"], "is a function of yours"),
    ):
        with pytest.raises(RequestError, match=message):
            load_pipeline(*names)
