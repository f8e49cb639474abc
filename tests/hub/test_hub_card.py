"""The card: what the Hub reads of it, its snippets run as they stand, and pictures the same by every road."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from loopback_hub import hub_environment
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load

from flowopd_eval.hub.card import _rewards, render_card
from flowopd_eval.hub.layout import provenance_of, sheet
from flowopd_eval.hub.results import Results, read_results
from flowopd_eval.hub.subject import Subject, Upstream, read_subject
from flowopd_eval.models import FAMILIES
from flowopd_eval.records import SD35_RECORD


def blocks(readme: str, language: str) -> list[str]:
    return [t.content for t in MarkdownIt().parse(readme) if t.type == "fence" and t.info == language]


def levels(one: Path | Image.Image, other: Path | Image.Image) -> int:
    a, b = (np.asarray(Image.open(x) if isinstance(x, Path) else x, int) for x in (one, other))
    return abs(a - b).max()


@pytest.fixture
def card(hub, pushed) -> str:
    return hub.repositories[f"models/{pushed}"].files["README.md"].decode()


def test_the_hub_reads_metadata_numbers_and_intervals_of_the_card(hub, pushed, card):
    data = ModelCard(card).data
    summary = json.loads(hub.repositories[f"models/{pushed}"].files["metrics.json"])["metrics"]["shapes_quality"]
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "diffusers", "text-to-image")
    assert data.model_name == pushed
    (overall,) = [one for one in data.eval_results if one.metric_type == "shapes_quality"]
    expected = summary["metrics"]["overall"]
    assert overall.metric_value == expected["value"]
    assert (overall.metric_args["low"], overall.metric_args["high"]) == (expected["low"], expected["high"])
    assert overall.dataset_args["prompts_sha256"] == summary["prompts_sha256"]
    assert f"| overall | {expected['value']:.3f} | {expected['low']:.3f} to {expected['high']:.3f} | 144 |" in card
    assert "Toy model" in card
    assert f"flowopd-eval --bench quality --model hub:{pushed}" in card
    assert "Stability" not in card
    assert "was trained on" not in " ".join(card.split())  # rewards of a distillation only tell how good a teacher is


@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ({"stage": "nft", "tasks": [{"rewards": {"quality": 0.7, "ocr": 0.3}}]}, {"shapes_quality", "ocr", "sign_ocr"}),
        ({"stage": "grpo", "tasks": [{"rewards": {"partial_credit": 1.0}}]}, {"shapes_geneval"}),
        ({"stage": "sft", "best_of": 4, "tasks": [{"rewards": {"pickscore": 1.0}}]}, {"pickscore"}),
        ({"stage": "sft", "best_of": 1, "tasks": [{"rewards": {"quality": 1.0}}]}, set()),
        ({"stage": "distill", "tasks": [{"rewards": {"quality": 1.0}}]}, set()),
    ],
)
def test_a_card_says_which_of_its_metrics_were_rewarded(recipe, keys):
    assert _rewards(SimpleNamespace(recipe=recipe)) == keys


def test_every_snippet_runs_and_draws_the_picture_that_the_card_shows(machine, hub, pushed, card):
    shown = hub.repositories[f"models/{pushed}"].files["samples/shapes_quality-00000-00.png"]
    (machine.folder / "shown.png").write_bytes(shown)
    diffusers, peft = blocks(card, "python")
    for code in (diffusers, peft):
        assert "shapes_quality-00000-00.png" in code
        (machine.folder / "picture.png").unlink(missing_ok=True)
        answer = machine.python(code)
        assert answer.code == 0, answer.err
        assert levels(machine.folder / "picture.png", machine.folder / "shown.png") <= 2
    # without the adapter it is another picture
    bare = "\n".join(line for line in diffusers.splitlines() if "load_lora_weights" not in line)
    assert machine.python(bare).code == 0
    assert levels(machine.folder / "picture.png", machine.folder / "shown.png") > 10


def test_the_comfyui_command_fetches_a_file_of_keys_that_comfyui_takes(place, hub, pushed, card, tmp_path):
    command = blocks(card, "bash")[0].strip()
    environment = hub_environment(hub.endpoint, tmp_path / "home") | {"HF_TOKEN": hub.token}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (file,) = (tmp_path / "ComfyUI" / "models" / "loras").rglob("*.safetensors")
    pattern = r"transformer\.(.+)\.lora_[AB]\.weight"  # with the scale inside, and no alpha key beside
    assert all(re.fullmatch(pattern, key) for key in load(file.read_bytes()))
    assert "KSampler: sampler `euler`, scheduler `normal`, 2 steps" in card


def test_our_pipeline_draws_it_from_the_hub_and_offline_from_the_cache(machine, hub, pushed, tmp_path):
    line = json.loads(hub.repositories[f"models/{pushed}"].files["samples.jsonl"].splitlines()[0])
    (tmp_path / "shown.png").write_bytes(hub.repositories[f"models/{pushed}"].files[line["file"]])
    code = f"""
import torch
from flowopd_eval.models import TINY_RECORD, fetch_base
from flowopd_eval.pipeline import FlowOPDPipeline
base, experts = fetch_base("builtin:tiny"), {{"it": "hub:{pushed}"}}
pipe = FlowOPDPipeline.from_pretrained(base, experts=experts, record=TINY_RECORD, dtype=torch.float32)
call = {{"expert": "it", "seed": {line["seed"]}, "num_inference_steps": 2, "guidance_scale": 1.0}}
pipe({line["prompt"]!r}, **call).images[0].save("ours.png")
"""
    answer = machine.python(code)
    assert answer.code == 0, answer.err
    assert levels(machine.folder / "ours.png", tmp_path / "shown.png") <= 2
    (machine.folder / "ours.png").unlink()
    environment = hub_environment("http://127.0.0.1:9", machine.folder / "home")  # nobody listens there
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=machine.folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert levels(machine.folder / "ours.png", tmp_path / "shown.png") <= 2


# -------------------------------------------------------------------------------------------------- texts of others


HOSTILE = "x|<script>alert(1)</script> ![i](http://e.vil) \n# heading `a` \x1b[2J"


def rendered(subject: Subject, results: Results | None = None, record=SD35_RECORD, name="me/x") -> str:
    results = results or Results({}, [], {})
    return render_card(subject, results, record, name, provenance_of(subject, results, []))


def test_texts_of_recipes_and_sources_stay_texts(trained):
    subject = replace(
        read_subject(str(trained / "adapter")),
        recipe={"stage": HOSTILE, "tasks": [{"name": HOSTILE, "teacher": HOSTILE}]},
        upstream=(Upstream(f"hub:{HOSTILE}", "teacher", HOSTILE),),
    )
    text = rendered(subject)
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])
    assert not [token for token in tokens if token.type == "html_block"]
    inner = [child.type for token in tokens if token.type == "inline" for child in token.children]
    assert "html_inline" not in inner
    assert "image" not in inner
    assert "\x1b" not in text
    assert "# heading" not in [line[:9] for line in text.splitlines()]


@pytest.mark.parametrize("task", ['a: "b" # c', "- é\n---\n", "{x: [", "'", "no", "*a &b !c |", "\u2028%"])
def test_the_front_matter_holds_whatever_a_task_is_called(trained, finished, task):
    subject = read_subject(str(trained / "adapter"))
    results = read_results([finished], subject, "me/x")
    (summary,) = results.summaries.values()
    means = {"overall": summary["metrics"]["overall"], "tasks": {task: summary["metrics"]["overall"]}}
    text = rendered(subject, replace(results, summaries={summary["key"]: {**summary, "metrics": means}}))
    data = ModelCard(text).data
    assert (data.model_name, data.license) == ("me/x", "apache-2.0")
    assert [one.metric_type for one in data.eval_results] == [summary["key"], f"{summary['key']}/{task}"]


def test_an_sd35_card_names_base_licence_and_stability(trained):
    subject = replace(read_subject(str(trained / "adapter")), family=FAMILIES["flow-opd"])
    text = rendered(subject)
    data = ModelCard(text).data
    base = "stabilityai/stable-diffusion-3.5-medium"
    assert (data.base_model, data.get("base_model_relation")) == (base, "adapter")
    assert (data.license, data.license_name) == ("other", "stabilityai-ai-community")
    assert data.license_link == f"https://huggingface.co/{base}/blob/main/LICENSE.md"
    assert text.count("Powered by Stability AI") >= 2
    assert "Toy" not in text
    assert all(f"- `{file}`: " in text for file in ("LICENSE.md", "NOTICE", "README.md"))
    for code in blocks(text, "python"):
        compile(code, "snippet", "exec")
        assert "num_inference_steps=40" in code
        assert "(1, 16, 64, 64)" in code
        assert f'from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")' in code
        assert "builtin" not in code


def test_a_merge_names_all_its_bases(trained):
    parts = (Upstream("hub:a/one@1", "merged", "mit"), Upstream("hub:b/two", "merged", "mit"))
    subject = replace(read_subject(str(trained / "adapter")), recipe={"stage": "merge"}, upstream=parts)
    data = ModelCard(rendered(replace(subject, family=FAMILIES["flow-opd"]))).data
    assert (data.base_model, data.get("base_model_relation")) == (["a/one", "b/two"], "merge")
    assert (data.license, data.license_name) == ("other", "stabilityai-ai-community-and-mit")


def test_a_merge_names_its_parts_and_a_card_without_scores_speaks_of_none(trained):
    recipe = {"stage": "merge", "teachers": {"one": 0.25, "two": 0.75}, "discarded_energy": 0.1234}
    text = rendered(replace(read_subject(str(trained / "adapter")), recipe=recipe))
    shown = MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2])
    assert "<td>0.25 × one + 0.75 × two</td>" in shown
    assert "<td>12.34% of the weighted sum's</td>" in shown
    assert "None were published" in text
    assert "interval" not in text
    assert "other scores" not in text
    assert "Its scores" not in text
    assert "`pip install -c constraints.txt -e .` in a checkout" in text


def test_the_guidance_it_was_trained_for_is_its_record(trained, finished):
    subject = read_subject(str(trained / "adapter"))
    assert (subject.record.guidance, subject.record.steps) == (2.0, 20)
    results = read_results([finished], subject, "me/x")
    assert (results.record.guidance, results.record.steps) == (1.0, 2)  # of the run, as its scores are published


def test_the_sheet_enlarges_small_pictures_cleanly(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype("uint8")
    for n in range(7):
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    (tmp_path / "sheet.png").write_bytes(sheet([tmp_path / f"{n}.png" for n in range(7)]))
    page = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert page.shape == (2 * 132 + 4, 6 * 132 + 4, 3)
    assert (page[136:264:2, 4:132:2] == pixels).all()  # the seventh, in the second row
    assert (page[136:264, 136:] == 255).all()
