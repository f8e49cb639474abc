"""Slips of `verify` and `push` that would not be seen anywhere else: each test fails on one of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import Stored
from random_adapters import TARGETS
from safetensors.torch import load_file, save_file
from test_hub_push import edited
from test_hub_verify import KEY, RECORD, claim, publish

from flowopd_eval.adapters import Factors, disagreement, write_adapter
from flowopd_eval.benches import bench_by_key
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import standard_metrics
from flowopd_eval.hub import verify as verifying
from flowopd_eval.hub.datasets import run_repository
from flowopd_eval.hub.layout import adapter_repository
from flowopd_eval.hub.push import address
from flowopd_eval.hub.repository import Repository
from flowopd_eval.hub.space import space_repository
from flowopd_eval.hub.stated import Stated
from flowopd_eval.hub.subject import read_subject
from flowopd_eval.hub.there import There, lost_scores, refuse
from flowopd_eval.hub.verify import (
    Redrawn,
    _Findings,
    _judged,
    _numbers_from_the_list,
    _numbers_of_the_card,
    _prompts,
    _same_model,
    _verdict,
)
from flowopd_eval.records import Sample, Score

DIFFUSERS, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"

# ------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize(("end", "by"), [("low", 0.05), ("low", -0.1), ("high", -0.05), ("high", 0.1), ("value", 0.02)])
def test_a_value_or_an_end_of_the_interval_that_the_list_does_not_give_is_found(end, by):
    claims = [claim(n, n / 40) for n in range(40)]
    cell = standard_metrics([Sample(c.id, c.k, c.task, "", c.seed, "", "", c.score) for c in claims], None)["overall"]
    for stated, found in ((cell, 0), (cell | {end: cell[end] + by}, 1)):
        findings = _Findings()
        summary = {"scorer": None, "metrics": {"overall": stated}}
        _numbers_from_the_list(findings, bench_by_key(KEY), summary, claims)
        said = "the list's own scores give" if end == "value" else "their interval is"
        assert [said in one for one in findings.contradictions] == [True] * found


def test_the_wider_side_of_the_cards_interval_is_what_a_difference_may_have():
    redrawn = [Redrawn(claim(n, n / 40), False, None, Score(n / 40 + 0.03 + 0.0001 * (n % 5))) for n in range(32)]
    for low, high, found in ((0.46, 0.51, 0), (0.49, 0.54, 0), (0.49, 0.51, 1)):
        cell = {"value": 0.5, "low": low, "high": high, "n": 500}
        assert len(_verdict(KEY, {"metrics": {"overall": cell}}, redrawn, _Findings()).contradictions) == found


@pytest.mark.parametrize("what", ["nothing", "another row", "ends of the metadata", "a row of a task", "the first row"])
def test_every_number_of_the_card_is_held_against_the_metrics(hub, pushed, what):
    files = hub.repositories[f"models/{pushed}"].files
    text, summary = files["README.md"].decode(), json.loads(files["metrics.json"])["metrics"][KEY]
    data = ModelCard(text).data
    if what == "another row":
        data.eval_results.append(replace(data.eval_results[0], metric_type=f"{KEY}/more"))
    if what == "ends of the metadata":
        data.eval_results[0].metric_args = {**data.eval_results[0].metric_args, "low": 0.0}
    if what.endswith("of a task"):
        task = next(iter(summary["metrics"]["tasks"]))
        row = next(line for line in text.splitlines() if line.startswith(f"| {task[:3]}"))
        text = text.replace(row, row.replace("0.", "9."))
    if what == "the first row":
        row = next(line for line in text.splitlines() if line.startswith("| overall |"))
        text = text.replace(row, row.replace("0.", "9."))
    findings = _Findings()
    _numbers_of_the_card(findings, data, text, summary)
    assert bool(findings.contradictions) == (what != "nothing")


def test_other_settings_contradict_and_another_backbone_is_told():
    mine = {"adapter_sha256": "a", "base_sha256": "b", "sampling": {"steps": 2}}
    generator = SimpleNamespace(identity=lambda: mine)
    for changes, contradictions, notes in (
        ({}, 0, 0), ({"sampling": {"steps": 3}}, 1, 0), ({"base_sha256": "c"}, 0, 1), ({"adapter_sha256": "d"}, 1, 0),
    ):  # fmt: skip
        findings = _Findings()
        _same_model(findings, generator, Stated("a", {}, []), {"generator": mine | changes})
        assert (len(findings.contradictions), len(findings.notes)) == (contradictions, notes), changes


def test_another_version_of_the_bench_is_not_drawn_again():
    bench, findings = bench_by_key(KEY), _Findings()
    assert _prompts(findings, bench, {"version": bench.version + 1, "samples": 1, "seed": 0}, []) is None
    assert f"version {bench.version + 1} of the bench, and here is {bench.version}" in findings.notes[0]


def test_where_a_judge_is_served_makes_it_no_other_judge(monkeypatch):
    monkeypatch.setattr(verifying, "scorer_of", lambda *asked: None)
    monkeypatch.setattr(verifying, "identity_of", lambda scorer: {"judge": "m", "url": "http://10.0.0.7:8000/v1"})
    monkeypatch.setattr(verifying, "judge", lambda *asked: [])
    for theirs, notes in (({"judge": "m"}, 0), ({"judge": "n"}, 1)):
        findings = _Findings()
        _judged(findings, bench_by_key(KEY), {"scorer": theirs}, [], [])
        assert len(findings.notes) == notes


def test_the_commit_that_the_hub_names_is_the_one_that_is_verified(monkeypatch, tmp_path):
    def fetch(source, files):
        return tmp_path, source if "@" in source else f"{source}@old"

    def resolved(source):
        raise RequestError(source)

    monkeypatch.setattr(verifying, "_commit", lambda source: "hub:me/x@new")
    monkeypatch.setattr(verifying, "fetch_files", fetch)
    monkeypatch.setattr(verifying, "resolve", resolved)
    with pytest.raises(RequestError, match=r"^hub:me/x@new$"):
        verifying.verify("hub:me/x", 8, "cpu", lambda *told: None)


def test_a_metric_of_what_another_family_draws_is_found(machine, hub, pushed):
    stated = json.loads(hub.repositories[f"models/{pushed}"].files["metrics.json"])
    stated["metrics"] = {"own": stated["metrics"][KEY] | {"key": "own"}}
    publish(hub, pushed, **{"metrics.json": json.dumps(stated).encode()})
    answer = machine("verify", pushed, "--pictures", 8)
    assert (answer.code, "not so: own is not a metric of what hub:me/gentle@" in answer.out) == (1, True), answer.err


@pytest.fixture
def later(machine, hub, pushed):
    """A Hub that no longer answers, of which the cache has what was pushed, without one picture, and a later commit."""
    publish(hub, pushed)
    del hub.repositories[f"models/{pushed}"].files["samples/shapes_quality-00000-00.png"]
    fetch = "from flowopd_eval.download import fetch_files as f; f('hub:{0}', ['*', '*/*'])"
    assert machine.python(fetch.format(pushed)).code == 0
    publish(hub, pushed, **{"notes.txt": b"later"})
    newer = hub.repositories[f"models/{pushed}"].head
    assert machine.python(fetch.format(f"{pushed}@{newer}")).code == 0
    machine.python("import flowopd_eval.download as d; d.before = d.hub_answers; d.hub_answers = lambda: False")
    yield newer
    machine.python("import flowopd_eval.download as d; d.hub_answers = d.before")


def test_without_the_hub_a_missing_picture_is_a_note_and_a_later_commit_is_named(machine, pushed, later):
    answer = machine("verify", pushed, "--pictures", 8)
    assert answer.code == 0, answer.out + answer.err
    assert "missing: samples/shapes_quality-00000-00.png, from the local cache at least" in answer.out
    assert f"A commit that came later lies in the cache, too: verify {pushed}@{later}" in answer.out


def test_without_the_hub_nothing_is_said_of_pictures_that_are_all_there(machine, hub, pushed):
    fetch = f"from flowopd_eval.download import fetch_files as f; f('hub:{pushed}', ['*', '*/*'])"
    assert machine.python(fetch).code == 0
    machine.python("import flowopd_eval.download as d; d.before = d.hub_answers; d.hub_answers = lambda: False")
    try:
        answer = machine("verify", pushed, "--pictures", 8)
    finally:
        machine.python("import flowopd_eval.download as d; d.hub_answers = d.before")
    assert (answer.code, "are missing" in answer.out) == (0, False), answer.out


# --------------------------------------------------------------------------------------------------------------- push


@pytest.mark.parametrize("lacks", [PEFT, DIFFUSERS])
def test_a_module_in_one_of_two_adapter_files_is_a_disagreement(gentle, tmp_path, lacks):
    write_adapter(gentle, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": TARGETS}))
    assert disagreement(tmp_path) is None
    tensors = load_file(tmp_path / lacks)
    save_file({key: t for key, t in tensors.items() if "blocks.1.attn.to_q." not in key}, tmp_path / lacks)
    assert "1 modules are in one of them alone: transformer_blocks.1.attn.to_q" in str(disagreement(tmp_path))


def test_a_module_of_another_shape_is_a_disagreement(gentle, tmp_path):
    write_adapter(gentle, tmp_path)
    tensors = load_file(tmp_path / DIFFUSERS)
    key = "transformer.transformer_blocks.1.attn.to_q.lora_B.weight"
    save_file(tensors | {key: torch.cat([tensors[key]] * 2)}, tmp_path / DIFFUSERS)
    assert "transformer_blocks.1.attn.to_q is of another shape" in str(disagreement(tmp_path))


def test_what_is_below_the_normal_numbers_of_float16_may_be_rounded_to_its_step(gentle, tmp_path):
    write_adapter(replace(gentle, factors={n: Factors(f.A, 1e-6 * f.B) for n, f in gentle.factors.items()}), tmp_path)
    save_file({k: t.half() for k, t in load_file(tmp_path / DIFFUSERS).items()}, tmp_path / DIFFUSERS)
    assert disagreement(tmp_path) is None


def test_two_adapters_of_a_repository_are_refused(machine, hub, gentle, tmp_path):
    write_adapter(gentle, tmp_path)
    doubled = {k: 2 * t if "lora_B" in k else t for k, t in load_file(tmp_path / DIFFUSERS).items()}
    save_file(doubled, tmp_path / DIFFUSERS)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    hub.repositories["models/they/two"] = Stored({"2" * 40: files}, "2" * 40)
    answer = machine("push", "hub:they/two", "me/two")
    assert (answer.code, "differ: the change of" in answer.err) == (2, True), answer.err


def test_the_same_card_without_a_list_of_an_earlier_push_may_be_written_again():
    repository = Repository("model", {"README.md": b"card"})
    refuse(There("a" * 40, card_sha256=hashlib.sha256(b"card").hexdigest()), repository, "me/x", public=False)
    with pytest.raises(RequestError, match="edited by hand"):
        refuse(There("a" * 40, card_sha256="0"), repository, "me/x", public=False)


def test_what_a_file_is_to_what_lies_there():
    blob = hashlib.sha1(b"blob 1\0x").hexdigest()
    there = There("a" * 40, files=("x", "y"), oids={"x": blob})
    assert [there.state("x", b"x"), there.state("x", b"z"), there.state("n", b""), there.state("y", b"")] == [
        "same", "changed", "new", "",
    ]  # fmt: skip
    assert There().state("x", b"x") == ""


def test_scores_that_the_new_card_shows_too_are_not_lost():
    repository = Repository("model", {"metrics.json": b'{"metrics": {"ocr": {}}}'})
    assert lost_scores(There(scored=("ocr", "geneval")), repository) == ["geneval"]


@pytest.mark.parametrize(("kind", "part"), [("model", ""), ("dataset", "datasets/"), ("space", "spaces/")])
def test_an_address_says_of_what_kind_it_is(kind, part):
    assert address(SimpleNamespace(endpoint="https://hub"), "me/x", kind, "c") == f"https://hub/{part}me/x/tree/c"


def test_a_record_of_another_backbone_or_by_hand_is_none_of_an_earlier_push(machine, hub, trained, gentle, tmp_path):
    settings = {"adapter_of": "flow-opd:base", "record": RECORD | {"steps": 3}}
    there = There("a" * 40, settings=settings, adapter_sha256=gentle.sha256)
    assert read_subject(str(trained / "adapter"), there).record.steps == 20
    files = {
        "flow_opd.json": json.dumps(settings | {"adapter_of": "tiny:base"}).encode(),
        "provenance.json": json.dumps({"adapter": {"sha256": gentle.sha256}}).encode(),
        "pushed.json": json.dumps({"files": ["provenance.json"], "card_sha256": "0"}).encode(),
    }
    hub.repositories["models/me/hand"] = Stored({"4" * 40: files}, "4" * 40, True)
    answer = machine("push", trained / "adapter", "me/hand", "--dry-run")
    assert "Drawn with 20 steps, guidance 2" in answer.out, answer.err


def test_where_a_judge_is_served_and_where_a_run_lies_leave_in_no_file(trained, finished, tmp_path):
    ((_, entry),) = json.loads((finished / "run.json").read_text())["runs"].items()
    run = edited(finished, tmp_path, scorer={**entry["request"]["scorer"], "url": "http://10.0.0.7:8000/v1"})
    (tmp_path / "scratch").mkdir()
    adapter = adapter_repository(read_subject(str(trained / "adapter")), [run], "me/x", tmp_path / "scratch")
    for repository in (adapter, run_repository(run, "me/run")):
        for name, content in repository.files.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            assert b"10.0.0.7" not in data, name
            assert str(trained.parent).encode() not in data, name


def test_roles_add_up_and_an_anchor_without_weight_is_none(gentle, tmp_path, monkeypatch):
    monkeypatch.setattr("flowopd_eval.hub.subject.licence_of_repository", lambda source: "mit")
    write_adapter(gentle, tmp_path)
    recipe = {
        "stage": "distill", "start": "hub:they/start", "teachers": {"a": {"source": "hub:they/start"}},
        "anchor": {"source": "hub:they/anchor", "weight": 0.0},
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    found = {one.source: one.role for one in read_subject(str(tmp_path)).upstream}
    assert found == {"hub:they/start": "teacher, started from"}


def test_of_an_apps_folders_neither_hidden_files_nor_links_nor_weights_are_published(tmp_path):
    (tmp_path / "secret.svg").write_text("secret")
    folder = tmp_path / "app"
    (folder / "assets").mkdir(parents=True)
    (folder / "README.md").write_text("---\nsdk: gradio\napp_file: main.py\n---\n")
    (folder / "requirements.txt").write_text("flowopd-eval @ git+https://example.org/x\n")
    for name in ("main.py", "assets/a.svg", ".hidden.py", "assets/.b.svg", "assets/w.safetensors", "assets/n.txt"):
        (folder / name).write_text(name)
    (folder / "assets" / "link.svg").symlink_to(tmp_path / "secret.svg")
    (folder / "assets" / "all").symlink_to(tmp_path)
    assert set(space_repository(folder).files) == {"README.md", "requirements.txt", "main.py", "assets/a.svg"}
