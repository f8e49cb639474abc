"""GenEval's own files: a run written as its folder comes back with the same verdicts; results are replayed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from flowopd_eval.benches import bench_by_key
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import BenchRun
from flowopd_eval.official import RESULTS, read_results, terminal_report, write_folder
from flowopd_eval.rescore import import_geneval, rescore
from flowopd_eval.tiny.scenes import TASKS, draw_scene, sample_scene

BENCH = bench_by_key("shapes_geneval")
SCORER = BENCH.scorer("official")
RUN = BenchRun("geneval", BENCH.key, BENCH.version, tuple(BENCH.prompts()), None)


def draw_folder(path, count=40):
    """A folder as GenEval's generation leaves it, by nothing but the layout: two pictures a prompt, some wrong."""
    rng = np.random.default_rng(8)
    scenes = [scene for scene in (sample_scene(rng) for _ in range(count)) if scene.task in TASKS]
    for number, scene in enumerate(scenes):
        place = path / f"{number:05d}" / "samples"
        place.mkdir(parents=True)
        record = {"tag": scene.task, "include": list(scene.include)}
        record |= {"exclude": list(scene.exclude)} if scene.exclude else {}
        (place.parent / "metadata.jsonl").write_text(json.dumps(record | {"prompt": scene.caption}))
        for k, shown in enumerate((scene, scenes[number - number % 2])):
            Image.fromarray(draw_scene(shown)).save(place / f"{k:05d}.png")
    return path


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    base = tmp_path_factory.mktemp("official")
    folder = import_geneval(draw_folder(base / "theirs"), base / "run", RUN, model="scenes")
    rescore(folder, SCORER)
    return folder


def scores(folder):
    return [json.loads(line)["score"] for line in folder.samples.read_text().splitlines()]


def test_a_run_written_as_geneval_s_folder_comes_back_with_the_same_verdicts(judged, tmp_path):
    out = write_folder(judged, tmp_path / "written")
    again = import_geneval(out, tmp_path / "run", RUN, model="scenes")
    rescore(again, SCORER)
    assert scores(again) == scores(judged)
    assert {0.0, 1.0} == set(scores(judged))
    for ours, theirs in zip(sorted(out.glob("*/metadata.jsonl")), sorted(judged.out.parent.glob("theirs/*/*.jsonl"))):
        assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
        keys = list(json.loads(ours.read_text()))
        assert (keys[0], keys[-1]) == ("tag", "prompt")


def test_its_results_are_replayed_to_the_same_verdicts(judged, tmp_path):
    replays = read_results(write_folder(judged, tmp_path) / RESULTS)
    assert [replay.sample.score for replay in replays] == scores(judged)
    replayed = [replay for replay in replays if replay.replayed is not None]
    assert 20 < len(replayed) < len(replays)  # not those that ask for a colour
    assert not any(replay.differs for replay in replays)
    assert {replay.sample.task for replay in replays} - {r.sample.task for r in replayed} == {"colors", "color_attr"}


def test_a_verdict_that_does_not_follow_from_its_boxes_is_told(judged, tmp_path):
    file = write_folder(judged, tmp_path) / RESULTS
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    plain = [replay.replayed is not None for replay in read_results(file)]
    place = next(n for n, line in enumerate(lines) if plain[n] and line["correct"])
    lines[place]["correct"] = False
    lines[place]["filename"] = "theirs\x1b[31m.png"
    file.write_text("\n".join(map(json.dumps, lines)))
    replays = read_results(file)
    assert [n for n, replay in enumerate(replays) if replay.differs] == [place]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_report(replays))
    said = console.export_text()
    assert "theirs?[31m.png: recorded wrong, by its boxes right" in said
    assert "differ from ours on 1 pictures" in said


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"filename": "a", "tag": "counting", "prompt": "p", "correct": 1.5, "metadata": "{}", "details": "{}"}',
        '{"filename": "a", "tag": "counting", "prompt": "p", "correct": true, "metadata": "[1]", "details": "{}"}',
        '{"filename": "a", "tag": "counting", "prompt": "p", "correct": true, "metadata": "{}", '
        '"details": "{\\"cat\\": [[1, 2, 3, 4, NaN]]}"}',
    ],
)
def test_a_line_that_is_none_is_refused_with_its_place(line, tmp_path):
    good = '{"filename": "a", "tag": "counting", "prompt": "p", "correct": true, "metadata": "{\\"include\\": '
    good += '[{\\"class\\": \\"cat\\", \\"count\\": 1}]}", "details": "{\\"cat\\": [[1, 2, 3, 4, 0.95]]}"}'
    file = tmp_path / "results.jsonl"
    file.write_text(f"{good}\n{line}\n")
    with pytest.raises(RequestError, match="line 2 is no line"):
        read_results(file)
    file.write_text(good)
    assert [replay.replayed for replay in read_results(file)] == [True]


def test_from_the_command_line(judged, tmp_path, command):
    code, said, errors = command("report", judged.out, "--format", "geneval", "--format", "csv")
    assert code == 0, errors
    folder = judged.out / "export" / "scenes" / "geneval"
    assert str(folder) in said.replace("\n", "")
    code, said, errors = command("score", folder / RESULTS)
    assert code == 0, errors
    assert "all follow from its boxes" in " ".join(said.split())
    code, _, errors = command("score", tmp_path / "nothing")
    assert (code, "is not a folder" in errors) == (2, True)


def test_a_folder_that_is_not_the_whole_bench_is_partial(judged, tmp_path):
    """The official script averages over the tasks that are there without a word."""
    partial = judged.request()["partial"]
    assert "lacks" in partial
    assert "of the bench's 576 prompts" in partial


def test_scoring_a_run_again_keeps_its_protocol(tmp_path, command):
    out = tmp_path / "run"
    source = draw_folder(tmp_path / "theirs", 12)
    words = ("--bench", "shapes_geneval", "--out", out)
    assert command("score", source, *words, "--protocol", "flow-grpo")[0] == 0
    assert command("score", out, "--again")[0] == 0
    (entry,) = json.loads((out / "run.json").read_text())["runs"].values()
    assert entry["request"]["scorer"]["protocol"]["name"] == "flow-grpo"
