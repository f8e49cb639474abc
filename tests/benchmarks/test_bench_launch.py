"""The parts of ``benchmarks.gpu``, and the launch files: what they start is what the real programs understand."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from benchmarks import gpu
from flowopd_eval.store import Shard

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "training" / "launch"


# --- benchmarks.gpu --------------------------------------------------------------------------------------------------
def test_every_part_is_a_module_that_is_there():
    for part in gpu.PARTS:
        assert importlib.util.find_spec(gpu.command(part)[2]), part


def test_every_test_that_needs_a_device_is_in_a_part():
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^(@|pytestmark = )pytest\.mark\.gpu\b", path.read_text(), re.MULTILINE)
    }
    assert marked == {word for words in gpu.PARTS.values() for word in words if word.startswith("tests/")}


def test_a_part_passes_fails_or_is_stopped(monkeypatch, capfd):
    programs = {"good": "print('a table')", "bad": "raise SystemExit(3)", "slow": "import time; time.sleep(60)"}
    monkeypatch.setattr(gpu, "PARTS", programs)
    monkeypatch.setattr(gpu, "command", lambda part: [sys.executable, "-c", programs[part]])
    assert gpu.run(["good", "bad"])["bad"]["ended"] == "failed"
    assert gpu.run(["good"])["good"]["ended"] == "passed"
    assert gpu.run(["slow"], seconds=0.5)["slow"]["ended"] == "stopped"
    assert "a table" in capfd.readouterr().out


def test_an_unknown_part_is_refused_with_the_known_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "nothing"])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2
    assert "no part nothing; there are: tests, tests-recipes, distillation" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "tests"])
    assert gpu.main() == 2
    assert "finds no CUDA device" in capsys.readouterr().err


# --- launch files ----------------------------------------------------------------------------------------------------
def started(tmp_path: Path, script: str, *words: str, **env: str) -> list[list[str]]:
    """What a script starts: stand-ins for Slurm's commands and for the programs, which write down their arguments."""
    programs = tmp_path / "bin"
    programs.mkdir()
    said = tmp_path / "said"
    stands = {
        "accelerate": f'printf "%s\\0" accelerate "$@" >> {said}; printf "\\n" >> {said}',
        "flowopd-eval": f'printf "%s\\0" flowopd-eval "$@" >> {said}; printf "\\n" >> {said}',
        "scontrol": "printf 'node-7\\nnode-8\\n'",
        "srun": 'shift; for n in 0 1; do SLURM_NODEID=$n "$@"; done',
    }
    for name, body in stands.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", str(LAUNCH / script), *words], check=True, cwd=ROOT, env={"PATH": path, **env}, capture_output=True
    )
    return [[word for word in line.split("\0") if word] for line in said.read_text().splitlines()]


def launched(words: list[str]) -> tuple[dict, list[str]]:
    """The options as accelerate itself reads them, with its config file's, and what it would run."""
    assert words[:2] == ["accelerate", "launch"]
    options = launch_command_parser().parse_args(words[2:])
    config = load_config_from_file(str(ROOT / options.config_file))
    assert config.distributed_type == "MULTI_GPU"
    assert config.mixed_precision == "no"
    assert options.module
    return vars(options) | {"file": config}, [options.training_script, *options.training_script_args]


def test_one_node_starts_a_process_a_card(tmp_path):
    (words,) = started(
        tmp_path, "one_node.sbatch", "--set", "steps=2", RECIPE="training/recipes/tiny_opd.toml", SLURM_GPUS_ON_NODE="4"
    )
    options, run = launched(words)
    assert options["num_processes"] == 4
    assert run == ["training", "training/recipes/tiny_opd.toml", "--set", "steps=2"]


def test_several_nodes_meet_at_the_first_each_with_its_rank(tmp_path):
    both = started(
        tmp_path, "nodes.sbatch", "--set", "out=a b",
        RECIPE="r.toml", SLURM_GPUS_ON_NODE="8", SLURM_NNODES="2", SLURM_JOB_NODELIST="node-[7-8]",
    )  # fmt: skip
    found = [launched(words) for words in both]
    assert [options["machine_rank"] for options, _ in found] == [0, 1]
    for options, run in found:
        assert (options["num_machines"], options["num_processes"]) == (2, 16)
        assert (options["main_process_ip"], options["main_process_port"]) == ("node-7", 29500)
        assert run == ["training", "r.toml", "--set", "out=a b"]


def test_an_array_divides_a_run_into_all_its_shards(tmp_path):
    shards = []
    for number, again in (("0", {}), ("1", {}), ("2", {}), ("1", {"SHARDS": "3", "SLURM_ARRAY_TASK_COUNT": "1"})):
        place = tmp_path / f"{number}{len(again)}"
        place.mkdir()
        array = {"SLURM_ARRAY_TASK_ID": number, "SLURM_ARRAY_TASK_COUNT": "3"} | again
        (words,) = started(place, "evaluate.sbatch", "--bench", "geneval", OUT="runs/x", **array)
        assert words[:5] == ["flowopd-eval", "--bench", "geneval", "--out", "runs/x"]
        shards.append(Shard.parse(words[words.index("--shard") + 1]))
    assert [(s.index, s.count) for s in shards] == [(0, 3), (1, 3), (2, 3), (1, 3)]


@pytest.mark.parametrize("script", ["one_node.sbatch", "nodes.sbatch", "evaluate.sbatch"])
def test_a_script_without_what_it_needs_says_what_to_give(script):
    done = subprocess.run(
        ["bash", str(LAUNCH / script)], cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert done.returncode
    assert "sbatch" in done.stderr
