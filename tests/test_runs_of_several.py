"""Several benches, models and processes in one run: none of them may spoil another's numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import pytest
import torch
from filelock import FileLock

from flowopd_eval import store
from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.harness import drawn_differently
from flowopd_eval.models import TINY_RECORD, Backbone, fetch_base, resolve
from flowopd_eval.records import write_settings
from flowopd_eval.terminal import table_console

USERS = """
import numpy as np
from PIL import Image

def draw(prompts, seeds):
    return [Image.new("RGB", (64, 64), (seed % 256, 0, 0)) for seed in seeds]

def other(prompts, seeds):
    return draw(prompts, [seed + 1 for seed in seeds])

class Half:
    def score(self, images, prompts):
        return [0.5 for _ in images]

class Broken:
    def score(self, images, prompts):
        raise ValueError("out of order")
"""
BOTH = ("--bench", "shapes_geneval", "--bench", "shapes_quality", "--limit", 1)


@pytest.fixture
def mine(tmp_path):
    """A file with two models and two judges, and the folder of runs."""
    (tmp_path / "users.py").write_text(USERS)
    return tmp_path / "users.py", tmp_path / "run"


def scorers(out):
    """Entry -> what its judge said of itself."""
    runs = json.loads((out / "run.json").read_text())["runs"]
    return {name.rpartition("/")[2]: run["request"]["scorer"] for name, run in runs.items()}


def test_a_protocol_is_for_the_benches_that_have_it(command, mine):
    file, out = mine
    drawn = command(*BOTH, "--model", f"{file}:draw", "--protocol", "flow-grpo", "--out", out)
    assert drawn[0] == 0, drawn[2]
    said = scorers(out)
    assert said["geneval"]["protocol"]["name"] == "flow-grpo"
    assert "flow-grpo" not in json.dumps(said["quality"])
    assert command("score", out, "--protocol", "official")[0] == 0
    assert scorers(out)["geneval"]["protocol"]["name"] == "official"
    assert scorers(out)["quality"] == said["quality"]
    before = (out / "run.json").read_bytes()
    code, _, errors = command("score", out, "--protocol", "theirs")
    assert (code, (out / "run.json").read_bytes()) == (2, before)
    assert "geneval has no protocol 'theirs'" in errors
    assert "quality has no protocol 'theirs'" in errors


def test_scores_of_a_judge_of_ones_own_are_not_replaced_unasked(command, mine):
    file, out = mine
    own = ("--scorer", f"{file}:Half")
    assert command("--bench", "shapes_quality", "--limit", 1, "--model", f"{file}:draw", *own, "--out", out)[0] == 0
    (log,) = out.glob("*/quality/samples.jsonl")
    before = log.read_bytes()
    assert (
        f"shapes_quality (protocol own, engine {file.name}:Half" in command("report", out)[1]
    )  # no number of the bench's own judge
    code, _, errors = command("score", out)
    assert (code, log.read_bytes()) == (2, before)
    assert "Half" in errors
    assert "--again" in errors
    assert command("score", out, *own)[0] == 0
    assert log.read_bytes() == before
    assert command("--bench", "shapes_geneval", "--limit", 1, "--model", f"{file}:draw", "--out", out)[0] == 0
    assert command("score", out, "--protocol", "flow-grpo")[0] == 2  # which is the other bench's
    assert log.read_bytes() == before
    assert command("score", out, "--again")[0] == 0
    assert log.read_bytes() != before


def test_a_bench_of_which_nothing_could_be_judged_fails_beside_one_that_could(command, mine):
    file, out = mine
    broken = ("--scorer", f"shapes_quality={file}:Broken")
    code, said, errors = command(*BOTH, "--model", f"{file}:draw", *broken, "--out", out)
    assert code == 1
    assert "/quality could be judged. The first: ValueError: out of order" in errors
    assert "shapes_geneval" in said  # its numbers are shown all the same
    # Where a character cannot be shown (the dash of what has no value), the table still is.
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    report = [sys.executable, "-m", "flowopd_eval", "report", str(out)]
    shown = subprocess.run(report, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "unscored" in shown.stdout
    assert command("--bench", "shapes_geneval", "--limit", 1, "--model", f"{file}:draw", "--out", out)[0] == 0


def test_a_launch_waits_for_its_own_pictures_only(command, mine, monkeypatch):
    """What else lies in the folder may be unfinished."""
    file, out = mine
    few = ("--bench", "shapes_quality", "--limit", 1, "--batch-size", 2, "--out", out)
    assert command(*few, "--model", f"{file}:other")[0] == 0
    next(out.glob("*/quality/samples/*.png")).unlink()
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waits for ever"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        code, said, errors = command(*few, "--model", f"{file}:draw")
        assert code == 0, errors
    assert "Report:" in said


def test_models_stand_in_the_order_in_which_they_were_asked_for(command, mine):
    file, out = mine
    few = ("--bench", "shapes_quality", "--limit", 1, "--out", out)
    _, said, _ = command(*few, "--model", f"{file}:other", "--model", f"{file}:draw")
    head = said[: said.index("shapes_quality")]
    assert 0 <= head.index("other") < head.index("draw")


def test_two_benches_of_one_folder_are_refused_before_drawing(command, mine):
    file, out = mine
    code, _, errors = command("--bench", "ocr", "--bench", "sign_ocr", "--model", f"{file}:draw", "--out", out)
    assert code == 2
    assert "one folder" in errors
    assert not out.exists()


def test_beside_another_model_the_miniature_is_called_one(command, mine):
    file, out = mine
    few = ("--bench", "shapes_quality", "--limit", 1, "--steps", 1, "--out", out)
    assert command(*few[:4], *few[6:], "--model", f"{file}:draw")[0] == 0
    code, said, errors = command("--bench", "quality", *few[2:], "--model", "tiny", "--model", "tiny:base")
    assert code == 0, errors
    assert said.count("Evaluated: the built-in miniature, not SD3.5") == 1
    assert f"Evaluated: {file.name}:draw" in said


def test_prompts_longer_than_the_text_encoders_take_are_named(command, tmp_path, caplog):
    long, short = (f"a photo of a {words} circle" for words in ("very " * 80 + "red", "red"))
    prompts = [{"id": name, "prompt": text, "task": "colors"} for name, text in (("long", long), ("short", short))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    words = ("generate", "--bench", "quality", "--prompts", tmp_path / "prompts.jsonl", "--steps", 1, "--samples", 1)
    code, _, errors = command(*words, "--out", tmp_path / "run")
    assert code == 0, errors
    (warning,) = [line for line in caplog.messages if "longer than the text encoders" in line]
    assert warning.endswith(": long.")


def test_each_model_of_a_backbone_is_drawn_with_its_own_guidance():
    """Whatever the order in which they are asked for: a warning would say another."""
    for names in (("tiny", "tiny:base"), ("tiny:base", "tiny")):
        pipeline = Backbone("builtin:tiny", [resolve(name) for name in names], "cpu", None).pipeline
        assert (pipeline.guidance(None), pipeline.guidance("tiny:student")) == (4.5, 1.0)


# --- backbones -------------------------------------------------------------------------------------------------------
def copy_of_tiny(folder, **settings):
    shutil.copytree(fetch_base("builtin:tiny"), folder)
    if settings:
        write_settings(folder, {"record": asdict(replace(TINY_RECORD, **settings)), "experts": []})
    return resolve(str(folder))


def test_weights_that_are_not_hashed_are_not_loaded(tmp_path):
    spec = copy_of_tiny(tmp_path / "mine", steps=1)
    weights = tmp_path / "mine" / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(RequestError, match="all of it from safetensors"):
        Backbone(spec.base, [spec], "cpu", None).load()


def test_the_shift_on_record_is_the_one_that_is_drawn_with(tmp_path):
    spec = copy_of_tiny(tmp_path / "one", shift=1.5)
    with pytest.raises(RequestError, match=r"one .*shift 1\.5.*scheduler of .* has 3"):
        Backbone(spec.base, [spec], "cpu", None)
    silent = copy_of_tiny(tmp_path / "two")
    path = tmp_path / "two" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shift": 2.0}))
    backbone = Backbone(silent.base, [silent], "cpu", "float32")
    assert backbone.generator(silent, silent.record).record.shift == 2.0


# --- files -----------------------------------------------------------------------------------------------------------
def test_two_that_write_one_file_at_once_both_succeed(tmp_path, monkeypatch):
    barrier, failed, sync = threading.Barrier(2, timeout=10), [], os.fsync

    def meet(number):
        sync(number)
        barrier.wait()

    def write(value):
        try:
            store.write_json(tmp_path / "summary.json", value)
        except Exception as error:
            failed.append(error)

    monkeypatch.setattr(os, "fsync", meet)
    threads = [threading.Thread(target=write, args=([n],)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert json.loads((tmp_path / "summary.json").read_text()) in ([0], [1])
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_folder_that_cannot_be_written_is_explained(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", "lock")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(WorkError, match="Permission denied"), store.changing_run(tmp_path):
        pass
    with pytest.raises(WorkError, match="Permission denied"), store.BenchFolder(tmp_path, "a/b").alone("samples"):
        pass


def test_what_is_no_terminal_takes_tables_of_any_width(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert table_console().width > 200
    monkeypatch.setenv("COLUMNS", "72")
    assert table_console().width == 72


def test_a_table_says_in_what_its_models_were_not_drawn_alike(command, mine):
    _, out = mine
    few = ("--bench", "quality", "--limit", 1, "--samples", 1, "--out", out)
    code, said, _ = command(*few, "--model", "tiny:base", "--model", "tiny", "--model", "tiny:ocr")
    assert code == 0, said
    line = "drawn differently: guidance 4.5 (tiny:base), 1.0 (tiny:student, tiny:ocr)"
    assert [one.partition(", ")[2] for one in said.splitlines() if "differently" in one] == [line]
    assert command("report", out, "--format", "md", "--format", "latex")[0] == 0
    for name in ("report.html", "export/table.md", "export/table.tex"):
        text = (out / name).read_text().replace("\\", "")
        assert (
            len(re.findall(r"guidance 4\.5 \(tiny:base\), 1\.0 \(tiny:(student, tiny:ocr|ocr, tiny:student)", text))
            == 1
        ), name


def test_only_what_differs_is_said_and_unknown_settings_are_called_so():
    def one(model, seed, **sampling):
        return {"model": model, "seed": seed, "generator": {"sampling": sampling or None}}

    assert drawn_differently([one("a", 0, steps=4), one("b", 0, steps=4)]) == []
    assert drawn_differently([one("a", 0), one("b", 1)]) == []  # both from elsewhere: nothing is known
    assert drawn_differently([one("a", 0, steps=4), one("b", 7, steps=5, sampler="sde")]) == [
        "seed 0 (a), 7 (b)",
        "steps 4 (a), 5 (b)",
        'sampler null (a), "sde" (b)',
    ]
    assert drawn_differently([one("a", 0, steps=4), one("b", 0)]) == [
        "settings of b are not known: the pictures come from elsewhere"
    ]
