"""The command as a user gives it: exit codes, what is said where, and what is on the disk."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from random_adapters import random_adapter


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """One finished run of twelve pictures, two steps each."""
    out = tmp_path_factory.mktemp("run") / "out"
    arguments = ["--bench", "geneval", "--limit", "2", "--steps", "2", "--out", str(out)]
    program = "import sys; from flowopd_eval.cli import run; sys.argv[0] = 'flowopd-eval'; run()"
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    return out, result


def test_the_main_job_says_what_it_did(small_run):
    out, result = small_run
    assert result.returncode == 0, result.stderr
    assert "the built-in miniature, not SD3.5" in result.stdout
    assert "--model flow-opd" in result.stdout
    assert "licence" in result.stdout
    for task in ("single_object", "two_object", "counting", "colors", "position", "color_attr"):
        assert task in result.stdout
    for place in ("samples", "samples.jsonl", "report.html"):
        assert str(out / place) in result.stdout or f"/{place}" in result.stdout
    assert (out / "report.html").stat().st_size > 5000
    assert "num_inference_steps is 2 here, but 20" in result.stderr


def test_a_run_prints_no_foreign_warnings(small_run):
    lines = [line for line in small_run[1].stderr.replace("\r", "\n").splitlines() if line.strip()]
    ours = ("flowopd-eval:", "tiny:student on geneval", "starting")
    assert [line for line in lines if not line.strip().startswith(ours)] == []


def test_the_run_folder_keeps_to_the_contract(small_run):
    out, _ = small_run
    bench = out / "tiny-student" / "geneval"
    samples = [json.loads(line) for line in (bench / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12
    assert {"id", "k", "seed", "file", "sha256", "score", "reason", "detail", "error"} <= samples[0].keys()
    assert all((bench / sample["file"]).is_file() for sample in samples)
    summary = json.loads((bench / "summary.json").read_text())
    assert summary["key"] == "shapes_geneval"
    assert "--limit 2" in summary["partial"]
    assert summary["generator"]["sampling"]["steps"] == 2
    assert json.loads((out / "run.json").read_text())["runs"]
    assert json.loads((out / "summary.json").read_text())["models"]


def test_the_same_command_again_draws_nothing_and_changes_nothing(small_run, command):
    out, _ = small_run
    before = {path: path.read_bytes() for path in (out / "tiny-student").rglob("*") if path.is_file()}
    code, stdout, _ = command("--bench", "geneval", "--limit", 2, "--steps", 2, "--out", out)
    assert code == 0
    assert "shapes_geneval" in stdout
    assert before
    assert before == {path: path.read_bytes() for path in (out / "tiny-student").rglob("*") if path.is_file()}


def test_a_changed_request_is_refused_with_the_difference(small_run, command):
    code, _, stderr = command("--bench", "geneval", "--limit", 2, "--steps", 2, "--seed", 5, "--out", small_run[0])
    assert code == 2
    assert "seed: 0 there, 5 asked for" in stderr


def test_report_and_score_take_a_finished_run(small_run, command):
    for words in (["report", small_run[0]], ["score", small_run[0]]):
        code, stdout, _ = command(*words)
        assert code == 0
        assert "report.html" in stdout


def test_shards_join_to_the_same_bytes(small_run, command, tmp_path):
    words = ["generate", "--bench", "geneval", "--limit", 1, "--steps", 1, "--batch-size", 2]
    assert command(*words, "--out", tmp_path / "whole")[0] == 0
    for index in range(3):
        assert command(*words, "--shard", f"{index}/3", "--out", tmp_path / "parts")[0] == 0
    assert command("report", tmp_path / "parts")[0] == 0
    whole, parts = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name / "tiny-student").rglob("*.*")
         if p.is_file() and not p.name.endswith(".lock")}
        for name in ("whole", "parts")
    )  # fmt: skip
    assert whole
    assert whole == parts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Usage"),
        (["--model", "tiny"], "name a bench"),
        (["--bench", "nonsense"], "Unknown bench 'nonsense'.*geneval"),
        (["--bench", "geneval", "--model", "tiny:nobody"], "no member 'nobody'.*base"),
        (["--bench", "geneval", "--model", "nowhere/at/all"], "Unknown model 'nowhere/at/all'"),
        (["--bench", "geneval", "--tasks", "flying"], "no task 'flying'.*counting"),
        (["--bench", "geneval", "--shard", "3/3"], "--shard i/n"),
        (["--bench", "geneval", "--device", "cuda"], "no CUDA device"),
        (["--bench", "geneval", "--device", "abacus"], "'abacus'"),
        (["--bench", "geneval", "--protocol", "mine"], "no protocol 'mine'"),
        (["--bench", "geneval", "--prompts", "missing.jsonl"], "missing.jsonl"),
        (["--bench", "quality", "--model", "flow-opd"], "'quality' is not there"),
        (["--bench", "geneval", "--dtype", "float64x"], "--dtype .float64x.*bfloat16"),
        (["--bench", "geneval", "--steps", "0"], "--steps"),
        (["--seed", "7", "--limit", "2", "generate", "--bench", "ocr"], "options of `generate` after.*--seed, --limit"),
        (["score", "nowhere"], "nowhere is not a folder"),
        (["report", "nowhere"], "nowhere holds no run"),
        (["merge", "A", "--out", "x"], "SOURCE=WEIGHT.*'A'"),
        (["merge", "tiny:base=1", "--out", "x"], "no adapter to merge"),
        (["convert", "nothing.bin", "--out", "x"], "nothing.bin"),
    ],
)
def test_wrong_requests_exit_2_and_name_the_value(command, words, message, monkeypatch, tmp_path):
    import re

    import torch

    if "no CUDA device" in message and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = command(*words)
    if not words:
        assert "Usage" in stdout + stderr
        return
    assert code == 2
    text = re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", "", stderr))
    assert re.search(message, text), stderr
    assert not list(tmp_path.iterdir())


def test_lists(command):
    code, stdout, _ = command("models")
    assert code == 0
    for name in ("flow-opd:student", "flow-opd:deqa", "tiny:base"):
        assert name in stdout
    code, stdout, _ = command("benches")
    assert code == 0
    assert "shapes_geneval" in stdout
    assert "sign_ocr" in stdout


def test_convert_and_merge(command, tmp_path):
    from flowopd_eval.adapters import read_adapter, write_adapter
    from flowopd_eval.models import Backbone, adapter_settings, resolve
    from flowopd_eval.records import write_settings

    transformer = Backbone("builtin:tiny", [resolve("tiny")], "cpu", None).pipeline.transformer
    for index, name in enumerate(["a", "b"]):
        write_adapter(random_adapter(transformer, index), tmp_path / name)
    write_settings(tmp_path / "a", adapter_settings("tiny:base", resolve("tiny:student").record))
    assert "Drawn with guidance 1 and 20 steps" in command("convert", tmp_path / "a", "--out", tmp_path / "own")[1]
    assert resolve(str(tmp_path / "own")).record == resolve("tiny:student").record
    code, stdout, stderr = command(
        "convert", tmp_path / "a" / "pytorch_lora_weights.safetensors", "--out", tmp_path / "c"
    )
    assert code == 0, stderr
    assert "rank 4" in stdout
    assert read_adapter(tmp_path / "c").sha256 == read_adapter(tmp_path / "a").sha256
    code, stdout, _ = command(
        "merge", f"{tmp_path / 'a'}=0.5", f"{tmp_path / 'b'}=0.5", "--rank", 8, "--out", tmp_path / "m"
    )
    assert code == 0
    assert "0.00% of the energy discarded" in stdout
    assert "Nothing says how it is drawn" in stdout  # b does not
    code, _, stderr = command("convert", tmp_path / "a", "--out", tmp_path / "m")
    assert code == 2
    assert "another adapter, whose recipe.json" in stderr  # on a card it would be a merge
    assert command("convert", tmp_path / "m", "--out", tmp_path / "m", "--base", "tiny:base")[0] == 0  # in its place
    assert resolve(str(tmp_path / "m")).record == resolve("tiny:base").record
    assert "no backbone of known name" in command("convert", tmp_path / "m", "--out", tmp_path / "n", "--base", "x")[2]
    assert "convert" in command("--bench", "geneval", "--model", tmp_path / "b", "--out", tmp_path / "run")[2]
    a, b, m = (read_adapter(tmp_path / name).factors for name in "abm")
    name = next(iter(m))
    import torch

    mean = (a[name].B @ a[name].A + b[name].B @ b[name].A) / 2
    torch.testing.assert_close(m[name].B @ m[name].A, mean, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_killed_five_times_the_miniature_ends_with_the_same_bytes(tmp_path):
    """``kill -9`` at five random moments of a real run, resumed each time."""
    rng = random.Random(0)

    def start(out):
        words = ["--bench", "geneval", "--limit", "12", "--steps", "6", "--batch-size", "4", "--out", str(out)]
        return subprocess.Popen([sys.executable, "-m", "flowopd_eval", *words], stderr=subprocess.DEVNULL)

    begun = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    duration = time.monotonic() - begun
    for _ in range(5):
        process = start(tmp_path / "killed")
        time.sleep(rng.uniform(0.3, 0.9) * duration)
        process.kill()
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    whole, killed = (
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".png", ".json", ".jsonl")}
        for folder in (tmp_path / "whole" / "tiny-student", tmp_path / "killed" / "tiny-student")
    )
    assert len(whole) > 70
    assert whole == killed


def test_two_processes_of_a_launch_make_one_run(tmp_path):
    words = ["-m", "flowopd_eval", "--bench", "geneval", "--limit", "2", "--steps", "2", "--batch-size", "4"]
    alone = [sys.executable, *words, "--out", str(tmp_path / "alone")]
    # the launcher gives each process one thread; two would sum up in another order
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(alone, check=True, stderr=subprocess.DEVNULL, env=one_thread)
    # what `accelerate launch` starts where there are several cards; without any it would start one process
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *words]
    result = subprocess.run([*launch, "--out", str(tmp_path / "both")], capture_output=True, text=True, env=one_thread)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Report:") == 1
    for name in ("samples.jsonl", "summary.json"):
        files = [tmp_path / run / "tiny-student" / "geneval" / name for run in ("alone", "both")]
        assert files[0].read_bytes() == files[1].read_bytes()
    sessions = json.loads((tmp_path / "both" / "run.json").read_text())["runs"]["tiny-student/geneval"]["sessions"]
    assert sorted(session["work"] for session in sessions) == ["draw 0/2", "draw 1/2"]


def test_ctrl_c_says_how_to_go_on(tmp_path):
    words = ["--bench", "geneval", "--steps", "1", "--batch-size", "1", "--out", str(tmp_path / "out")]
    run = subprocess.Popen([sys.executable, "-m", "flowopd_eval", *words], stderr=subprocess.PIPE, text=True)
    lines = tmp_path / "out" / "tiny-student" / "geneval" / "samples.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.is_file() and lines.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Stopped after" in said
    assert "the same command" in said
