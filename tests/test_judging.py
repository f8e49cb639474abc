"""Who judges, as a user says it on the command line; and benches whose judge lacks something."""

import json
import socket

import huggingface_hub.constants
import numpy as np
import pytest
from loopback_hub import hub
from PIL import Image

from flowopd_eval import benches, download

OWN = """
import numpy as np
class Bright:
    def score(self, images, prompts):
        return [float(np.asarray(image).mean()) / 255 for image in images]
"""
DRAWN = ("--model", "tiny:base", "--limit", 2, "--steps", 1)


@pytest.fixture
def nothing_to_fetch(monkeypatch, tmp_path):
    """No network that answers, and empty caches."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("FLOWOPD_CACHE", str(tmp_path / "cache"))
    benches._preference_judge.cache_clear()
    yield
    benches._preference_judge.cache_clear()


@pytest.fixture
def bright(tmp_path):
    (tmp_path / "bright.py").write_text(OWN)
    return f"{tmp_path / 'bright.py'}:Bright"


def samples(out, bench):
    (path,) = out.glob(f"*/{bench}/samples.jsonl")
    return path.parent, [json.loads(line) for line in path.read_text().splitlines()]


def test_a_bench_without_a_judge_is_named_with_the_remedy_and_the_others_go_on(command, tmp_path, nothing_to_fetch):
    out = tmp_path / "run"
    code, shown, _ = command("--bench", "geneval", "--bench", "preference", *DRAWN, "--out", out)
    assert code == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["models"]["tiny:base"]) == {"geneval"}
    why = summary["unavailable"]["shapes_preference"]
    assert "hf download yuvalkirstain/PickScore_v1 --revision" in why
    row = next(line for line in shown.splitlines() if line.startswith("shapes_preference "))
    assert row.split() == ["shapes_preference", "unavailable"]
    assert "hf download yuvalkirstain/PickScore_v1" in " ".join(shown.split())
    page = (out / "report.html").read_text()
    assert "Unavailable:" in page
    assert "yuvalkirstain/PickScore_v1" in page


def test_what_has_become_available_is_no_longer_said_to_lack(command, tmp_path, nothing_to_fetch, bright):
    out = tmp_path / "run"
    asked = ("--bench", "geneval", "--bench", "preference", *DRAWN, "--out", out)
    command(*asked)
    code, shown, _ = command(*asked, "--scorer", f"preference={bright}")
    assert code == 0
    assert json.loads((out / "summary.json").read_text())["unavailable"] == {}
    assert "unavailable" not in shown


def test_pictures_without_a_judge_stay_unscored_and_the_others_are_scored(command, tmp_path, nothing_to_fetch, bright):
    out = tmp_path / "run"
    command("generate", "--bench", "quality", "--bench", "preference", *DRAWN, "--out", out)
    assert command("score", out)[0] == 0
    summary = json.loads((out / "summary.json").read_text())
    models = summary["models"]["tiny:base"]
    assert (models["quality"]["unscored"], models["preference"]["n"]) == (0, 0)
    assert list(summary["unavailable"]) == ["shapes_preference"]
    assert command("score", out, "--scorer", f"preference={bright}")[0] == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["models"]["tiny:base"]["preference"]["unscored"] == 0
    assert summary["unavailable"] == {}


def test_without_any_judge_nothing_is_drawn(command, tmp_path, nothing_to_fetch):
    code, _, errors = command("--bench", "preference", *DRAWN, "--out", tmp_path / "run")
    assert code == 2
    assert "hf download" in errors
    assert not (tmp_path / "run").exists()


def test_a_judge_of_ones_own_takes_the_bench_s_place(command, tmp_path, bright):
    out = tmp_path / "run"
    code, _, _ = command("--bench", "quality", *DRAWN, "--out", out, "--scorer", bright)
    assert code == 0
    folder, found = samples(out, "quality")
    assert len(found) > 0
    for sample in found:
        assert sample["score"] == pytest.approx(np.asarray(Image.open(folder / sample["file"])).mean() / 255)
    request = next(iter(json.loads((out / "run.json").read_text())["runs"].values()))["request"]
    assert (request["scorer"]["scorer"], request["scorer"]["name"]) == ("own", "bright.py:Bright")


def test_prompts_and_judge_of_ones_own(command, tmp_path, bright):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a photo of a red circle\na photo of a blue star\n")
    out = tmp_path / "run"
    asked = ("--bench", "own", "--model", "tiny:base", "--steps", 1, "--prompts", prompts, "--out", out)
    assert command(*asked)[0] == 2  # nobody judges
    assert command(*asked, "--scorer", bright)[0] == 0
    assert len(samples(out, "own")[1]) == 2
    assert json.loads((out / "summary.json").read_text())["models"]["tiny:base"]["own"]["key"] == "own"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--bench", "geneval", "--scorer", "OWN"), "--scorer cannot take this bench's judge's place"),
        (("--bench", "ocr", "--bench", "quality", "--scorer", "OWN"), "say which bench it judges"),
        (("--bench", "ocr", "--scorer", "OWN", "--scorer-command", "cat"), "--scorer and --scorer-command cannot"),
        (("--bench", "quality", "--scorer", "OWN", "--scorer", "OWN"), "was given two judges"),
        (("--bench", "ocr", "--ocr-engine", "tesseract"), "Unknown OCR engine 'tesseract'; known: rapidocr, paddle3"),
        (("--bench", "preference", "--metric", "beauty"), "Expected metrics of pickscore"),
        (("--bench", "own", "--scorer", "OWN"), "give --prompts FILE"),
        (("--bench", "quality", "--judge-model", "x"), "give --judge-url"),
    ],
)
def test_what_cannot_be_judged_so_is_refused_before_anything_is_drawn(asked, said, command, tmp_path, bright):
    words = [bright if word == "OWN" else word for word in asked]
    code, _, errors = command(*words, *DRAWN, "--out", tmp_path / "run")
    assert code == 2
    assert said in errors
    assert not (tmp_path / "run").exists()


def test_the_paper_s_table_of_the_miniature_gives_no_verdict(command, tmp_path):
    out = tmp_path / "run"
    code, shown, _ = command("--bench", "paper", *DRAWN, "--out", out)
    assert code == 0
    assert set(json.loads((out / "summary.json").read_text())["models"]["tiny:base"]) == {"geneval", "ocr", "quality"}
    (model,) = json.loads((out / "paper.json").read_text())["models"]
    assert [cell["verdict"] for cell in model["cells"]] == [None] * 4
    assert "not comparable" in shown
    protocol = json.loads((out / "run.json").read_text())["runs"]["tiny-base/geneval"]["request"]["scorer"]["protocol"]
    assert protocol["name"] == "flow-grpo"  # as the paper's


def test_one_short_try_says_whether_the_hub_answers(monkeypatch, nothing_to_fetch):
    assert not download.hub_answers()
    with hub({}, "0" * 40) as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        assert download.hub_answers()  # whatever it says
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert not download.hub_answers()


def test_a_kill_between_new_scores_and_the_judges_name_leaves_no_score_under_another_name(tmp_path, monkeypatch):
    """The two stand in two files: whichever the kill falls between, nobody reads scores of one judge as another's."""
    from painting import RUN, Judge, Painter

    from flowopd_eval import rescore as rescoring
    from flowopd_eval import store
    from flowopd_eval.harness import run_bench
    from flowopd_eval.rescore import rescore

    run_bench(RUN, Painter(), tmp_path)
    (folder,) = store.bench_folders(tmp_path)
    old, new = folder.request()["scorer"], Judge(version=2)
    write = store.write_atomic

    def killed(path, data):
        write(path, data)
        if path == folder.samples:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(rescoring.store, "write_atomic", killed)
        with pytest.raises(SystemExit):
            rescore(folder, new)
    assert folder.request()["scorer"] is None
    summary = rescore(folder, new)
    assert summary["scorer"] == json.loads(json.dumps(dict(new.identity()))) != old


def test_a_run_of_which_nothing_could_be_judged_ends_with_an_error_and_its_pictures(command, tmp_path):
    judge = tmp_path / "blind.py"
    judge.write_text("class Blind:\n    def score(self, images, prompts):\n        raise ValueError('no eyes')\n")
    out = tmp_path / "run"
    code, _, errors = command("--bench", "quality", *DRAWN, "--out", out, "--scorer", f"{judge}:Blind")
    assert code == 1
    assert "no eyes" in errors
    assert f"flowopd-eval score {out}" in errors.replace("\n", " ")
    folder, found = samples(out, "quality")
    assert found
    assert all((folder / sample["file"]).is_file() for sample in found)
    assert command("score", out)[0] == 0  # by the bench's own judge


@pytest.mark.parametrize("option", ["--out", "--bench", "--model"])
def test_what_is_for_a_foreign_folder_is_refused_of_a_run(option, command, tmp_path):
    out = tmp_path / "run"
    assert command("generate", "--bench", "quality", *DRAWN, "--out", out)[0] == 0
    before = (out / "run.json").read_bytes()
    code, _, errors = command("score", out, option, "elsewhere")
    assert code == 2
    assert f"Leave out {option}" in errors.replace("\n", " ")
    assert (out / "run.json").read_bytes() == before
