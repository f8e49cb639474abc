"""A run as a dataset: pictures and scores, and no prompt whose licence keeps it back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from huggingface_hub import DatasetCard
from painting import PROMPTS, RUN, Painter

from flowopd_eval.benches import bench_by_key
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import run_bench
from flowopd_eval.hub.datasets import run_repository
from flowopd_eval.hub.licences import OPEN_PROMPTS, open_prompts
from flowopd_eval.hub.results import text_sha256
from flowopd_eval.records import Prompt


def test_a_run_becomes_a_dataset_of_pictures_with_their_scores(machine, hub, finished):
    answer = machine("push", finished, "me/run")
    assert answer.code == 0, answer.err
    assert "144 pictures" in answer.out
    repo = hub.repositories["datasets/me/run"]
    assert repo.private
    (entry,) = json.loads((finished / "run.json").read_text())["runs"]
    lines = [json.loads(line) for line in repo.files[f"{entry}/metadata.jsonl"].splitlines()]
    assert len(lines) == 144
    for line in lines:
        assert repo.files[f"{entry}/{line['file_name']}"] == (finished / entry / line["file_name"]).read_bytes()
    assert lines[0]["prompt"] == bench_by_key("shapes_quality").prompts()[0].prompt
    (config,) = DatasetCard(repo.files["README.md"].decode()).data.to_dict()["configs"]
    assert config["data_dir"] == entry
    assert DatasetCard(repo.files["README.md"].decode()).data.license == "apache-2.0"
    assert not any(name.endswith((".html", ".lock")) for name in repo.files)
    head, before = repo.head, len(hub.log)
    assert machine("push", finished, "me/run").code == 0
    assert repo.head == head
    assert not [line for line in hub.log[before:] if line.startswith("PUT")]


@pytest.mark.parametrize("key", ["deqa", "ocr", "preference", "shapes_quality", "own"])
def test_prompts_that_may_not_be_shown_are_ids_and_hashes(tmp_path, key):
    """Texts of benches without an open licence, and texts of the user's own under an open bench's key."""
    secret = [Prompt(p.id, f"zebra {p.prompt} \u00e9", p.task, {"vqa": f"zebra {n}"}) for n, p in enumerate(PROMPTS)]
    run_bench(replace(RUN, key=key, prompts=tuple(secret)), Painter(), tmp_path)
    entry = json.loads((tmp_path / "run.json").read_text())
    (name,) = entry["runs"]
    log = tmp_path / name / "samples.jsonl"
    spoken = [
        json.loads(line) | {"reason": "I see a zebra", "detail": {"quoted": "zebra"}}
        for line in log.read_text().splitlines()
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in spoken))
    repository = run_repository(tmp_path, "me/run")
    lines = [json.loads(line) for line in repository.files[f"{name}/metadata.jsonl"].splitlines()]
    assert {line["prompt"] for line in lines} == {None}
    assert {line["prompt_sha256"] for line in lines} == {text_sha256(p.prompt) for p in secret}
    for path, content in repository.files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        assert b"zebra" not in data, path


def test_only_a_benchs_own_words_are_open():
    (first, second, *_) = bench_by_key("geneval").prompts()
    mixed = [first, replace(second, prompt="mine"), replace(first, id="mine")]
    assert open_prompts("geneval", mixed) == {first.id}
    assert not {"geneval2", "ocr", "preference", "compbench", "own", "deqa"} & OPEN_PROMPTS.keys()


def test_a_picture_that_was_changed_is_not_published(tmp_path):
    run_bench(replace(RUN, prompts=PROMPTS[:2]), Painter(), tmp_path)
    (picture, *_) = sorted(tmp_path.rglob("*.png"))
    picture.write_bytes(picture.read_bytes() + b"x")
    with pytest.raises(RequestError, match="was changed since it was drawn"):
        run_repository(tmp_path, "me/run")


def test_scores_of_a_run_belong_to_adapters_alone(machine, finished):
    answer = machine("push", finished, "me/run", "--run", finished)
    assert (answer.code, "is a dataset" in answer.err) == (2, True)
