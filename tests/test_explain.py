"""How much of a number is its protocol: on real scenes, against judging the run under each protocol by itself."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from flowopd_eval.benches import GENEVAL_STEPS, bench_by_key
from flowopd_eval.errors import RequestError
from flowopd_eval.explain import explain
from flowopd_eval.harness import BenchRun
from flowopd_eval.rescore import import_geneval, rescore
from flowopd_eval.tiny.scenes import TASKS, draw_scene, sample_scene

BENCH = bench_by_key("shapes_geneval")
SCORERS = [(name, BENCH.scorer(protocol)) for name, protocol in GENEVAL_STEPS]


@pytest.fixture
def folder(tmp_path):
    """A run of scenes of every task, two of three with another scene's picture, judged by the official protocol."""
    rng = np.random.default_rng(5)
    scenes = [scene for scene in (sample_scene(rng) for _ in range(90)) if scene.task in TASKS]
    for number, scene in enumerate(scenes):
        place = tmp_path / "pictures" / f"{number:05d}"
        (place / "samples").mkdir(parents=True)
        record = {"tag": scene.task, "include": scene.include, "prompt": scene.caption}
        (place / "metadata.jsonl").write_text(json.dumps(record))
        shown = scene if number % 3 else scenes[number - 1]
        Image.fromarray(draw_scene(shown)).save(place / "samples" / "00000.png")
    run = BenchRun("geneval", BENCH.key, BENCH.version, tuple(BENCH.prompts()[:1]), None)
    found = import_geneval(tmp_path / "pictures", tmp_path / "run", run, model="scenes")
    rescore(found, SCORERS[0][1])
    return found


def test_each_step_is_the_run_judged_by_that_protocol_and_the_changes_add_up(folder):
    before = folder.samples.read_bytes()
    stopped = folder.path / "rescore-of-another.jsonl"
    stopped.write_bytes(b"")
    explanation = explain(folder, SCORERS)
    assert folder.samples.read_bytes() == before
    assert stopped.exists()  # a `score` by another judge can still be continued
    stopped.unlink()
    assert json.loads((folder.path / "explain.json").read_text()) == json.loads(json.dumps(explanation.to_json()))
    assert not list(folder.path.glob("rescore-*"))
    for (_, scorer), step in zip(SCORERS, explanation.steps, strict=True):
        summary = rescore(folder, scorer)
        assert step.overall.value == pytest.approx(summary["metrics"]["overall"]["value"])
        assert (step.overall.low, step.overall.high) == pytest.approx(
            [summary["metrics"]["overall"][end] for end in ("low", "high")]
        )
    assert sum(step.change for step in explanation.steps) == pytest.approx(explanation.apart)
    assert any(step.to_wrong for step in explanation.steps)
    assert explanation.steps[1].interval
    assert explanation.steps[3].interval is None  # only the averaging changed there
    assert f"{100 * explanation.apart:+.1f} points are protocol" in explanation.sentence


def test_flow_grpo_s_overall_is_the_mean_over_pictures_and_brings_its_other_numbers(folder):
    metrics = rescore(folder, SCORERS[-1][1])["metrics"]
    lines = [json.loads(line) for line in folder.samples.read_text().splitlines()]
    assert metrics["overall"]["value"] == pytest.approx(np.mean([line["score"] for line in lines]))
    by_task = defaultdict(list)
    for line in lines:
        by_task[line["task"]].append(line["score"])
    assert abs(np.mean([np.mean(scores) for scores in by_task.values()]) - metrics["overall"]["value"]) > 1e-6
    for name in ("strict_accuracy", "score"):
        expected = np.mean([line["detail"]["also"][name] for line in lines])
        assert metrics["also"][name]["value"] == pytest.approx(expected)


def test_an_incomplete_run_is_refused(folder):
    lines = folder.samples.read_bytes().splitlines(keepends=True)
    folder.samples.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(RequestError, match=r"1 of \d+ pictures are not drawn yet"):
        explain(folder, SCORERS)
