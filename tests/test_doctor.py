"""The doctor tries what it says: judges against stored scores, a Hub on loopback, evidence drawn by the miniature."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flowopd_eval import doctor
from flowopd_eval.benches import BENCHES, bench_by_key
from flowopd_eval.errors import WorkError
from flowopd_eval.scorers.preference import AESTHETIC, WEIGHTS, preference_metrics

ROOT = Path(__file__).parent.parent


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_judges_give_the_stored_scores(offline):
    found = {finding.name: finding for finding in doctor.examine() if finding.part == "judges"}
    for name in ("geneval (shapes_geneval)", "ocr (sign_ocr)", "quality (shapes_quality)"):
        assert found[name].state == "ok", found[name].text
    assert found["geneval (geneval)"].state == "absent"
    stored = doctor.self_test_values()
    assert len(stored["shapes_geneval"]) + len(stored["sign_ocr"]) == len(stored["shapes_quality"]) == 24
    assert min(stored["shapes_geneval"]) == 1.0  # clean scenes


def test_each_judge_says_what_it_lacks(offline, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("FLOWOPD_CACHE", str(tmp_path))
    found = {finding.name: finding for finding in doctor.examine() if finding.part == "judges"}
    assert len(found) == len(BENCHES)
    assert found["ocr (ocr)"].state == "ok"  # the miniature's signs are read by the same engine
    said = {
        "preference (preference)": "hf download yuvalkirstain/PickScore_v1",
        "preference (shapes_preference)": "hf download openai/clip-vit-large-patch14",
        "compbench (compbench)": "hf download openai/clip-vit-base-patch32",
        "deqa (deqa)": "--scorer-command",
        "own (own)": "--scorer FILE.py:CLASS",
        "geneval2 (geneval2)": "--judge-url",
        "unifiedreward (unified_reward)": "--judge-url",
        "qwenvl (qwenvl)": "--judge-url",
    }
    for name, words in said.items():
        everything = "\n".join((found[name].text, *found[name].commands))
        assert (found[name].state, words in everything) == ("absent", True), found[name]
    assert "aesthetic_v2" in found["preference (shapes_preference)"].text
    console = Console(width=80, file=StringIO(), record=True)
    console.print(doctor.terminal_report(list(found.values())), crop=False)
    lines = console.export_text().splitlines()
    for command in found["preference (preference)"].commands:
        assert lines.count(command) == 1  # whole, to be copied, and once though two benches lack it
    (tmp_path / AESTHETIC.name).touch()
    head = preference_metrics(WEIGHTS)["aesthetic_v2"].head
    assert doctor._not_cached([head]) == []


def test_a_judge_that_has_changed_is_told(offline, monkeypatch, command):
    monkeypatch.setattr("flowopd_eval.tiny.quality._SCALE", 0.5)
    monkeypatch.setattr("flowopd_eval.tiny.quality._TIDY", 0.0)
    (found,) = [finding for finding in doctor.examine() if finding.name == "quality (shapes_quality)"]
    assert found.state == "wrong"
    assert "their numbers do not compare" in found.text or "numbers do not compare" in found.text
    with pytest.raises(WorkError, match=r"quality \(shapes_quality\)"):
        doctor.refuse_wrong([found])
    code, said, errors = command("doctor")
    assert code == 1
    assert "wrong" in said
    assert "does not work" in errors


def test_a_broken_torchvision_is_found_and_the_remedy_named(tmp_path):
    """A package that raises RuntimeError at import, as a torchvision of another torch does."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    info = tmp_path / "torchvision-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    code = "from flowopd_eval.doctor import _packages; print([f.text for f in _packages() if f.name == 'torchvision'])"
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path, check=True).stdout
    assert "operator torchvision::nms does not exist" in said
    assert "pip uninstall torchvision" in said


def test_a_hub_that_does_not_answer_is_out_of_reach(tmp_path):
    """In a process of its own, as the Hub's address is read at import: a port on which nobody listens."""
    code = "from flowopd_eval.doctor import _hub; print([(f.name, f.state) for f in _hub()])"
    path = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "[('token', 'absent'), ('network', 'absent')]" in run.stdout


def test_without_a_network_the_hub_is_out_of_reach_and_nothing_is_wrong(offline, command):
    code, said, _ = command("doctor")
    assert code == 0
    assert "out of reach" in said


def test_evidence_has_the_hashes_and_scores_of_what_was_drawn(offline, command, tmp_path):
    file = tmp_path / "evidence.json"
    code, said, errors = command("doctor", "--real", "--model", "tiny", "--steps", 2, "--save", file)
    assert code == 0, errors
    assert str(file) in said
    written = json.loads(file.read_text())
    base = written["evidence"]["models"]["tiny:base"]
    assert len(base["pictures"]) == 6
    assert len({picture["pixels_sha256"] for picture in base["pictures"]}) == 6
    assert base["sampling"]["steps"] == 2
    assert len(base["base_sha256"]) == 64
    assert written["evidence"]["scorer"] == json.loads(
        json.dumps(dict(bench_by_key("shapes_geneval").scorer("official").identity()))
    )
    assert "torch" in written["versions"]
    assert str(Path.home()) not in file.read_text()


def test_an_unknown_family_is_refused(command):
    code, _, errors = command("doctor", "--model", "sdxl")
    assert code == 2
    assert "Unknown family 'sdxl'" in errors
