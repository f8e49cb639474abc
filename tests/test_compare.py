"""Comparing runs: real ones, drawn and judged, whose numbers are computed again by hand."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from painting import PROMPTS, RUN, Judge, Painter
from PIL import Image
from rich.console import Console

from flowopd_eval import statistics
from flowopd_eval.compare import compare_runs, find_sides, prompts_for, terminal_report
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import OWN_PROMPTS, run_bench
from flowopd_eval.records import Score
from flowopd_eval.store import Shard

# What each model gets right: both pictures of prompts p0 to p9. Even prompts are counting, odd ones colors.
BASE = ["00", "10", "11", "11", "00", "01", "10", "00", "11", "00"]
MIXED = ["11", "11", "00", "10", "00", "01", "01", "00", "11", "00"]  # p0, p1 up; p2, p3 down; p6 swaps its pictures
LUCKY = ["11", "11", "11", "10", "00", "01", "10", "00", "11", "00"]  # p0, p1 up; p3 down: 10 points on average
ALL = ["11"] * 10


class Model(Painter):
    """Draws red (right) or blue pictures as told."""

    def __init__(self, name: str, right: list[str], **sampling):
        super().__init__(**sampling)
        self.name = name
        pairs = zip(PROMPTS, right, strict=True)
        self.red = {prompt.seed(RUN.seed, k) for prompt, digits in pairs for k in range(2) if digits[k] == "1"}

    def identity(self):
        return {**super().identity(), "model": self.name}

    def generate(self, prompts, seeds):
        return [Image.new("RGB", (12, 12), (200, 0, 0) if seed in self.red else (0, 0, 200)) for seed in seeds]


class Blind(Judge):
    """The same judge by name, which fails on some prompts."""

    def __init__(self, *blind: str):
        super().__init__()
        self.blind = blind

    def one(self, pixels, prompt):
        return Score(None, error="too dark") if prompt.id in self.blind else super().one(pixels, prompt)


class Aesthete(Judge):
    """A metric beyond 0..1 without right and wrong."""

    def one(self, pixels, prompt):
        return Score(20 + pixels[0, 0, 0] / 100)


class Protocol(Judge):
    def identity(self):
        return {**super().identity(), "protocol": "mine"}


def draw(out: Path, model: Painter, run=RUN, **options) -> Path:
    run_bench(run, model, out, **options)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs by name."""
    home = tmp_path_factory.mktemp("runs")
    rights = {"base": BASE, "mixed": MIXED, "lucky": LUCKY, "all": ALL}
    return {name: draw(home / name, Model(f"model:{name}", right)) for name, right in rights.items()}


@pytest.fixture
def copy(runs, tmp_path):
    """A copy of a run, to be tampered with."""
    return lambda name: Path(shutil.copytree(runs[name], tmp_path / name))


def scored_pairs(a: Path, b: Path) -> dict[tuple[str, int], tuple[dict, dict]]:
    """The pairs of pictures with both scores, straight from the files."""
    sides = []
    for out in (a, b):
        (path,) = out.glob("*/*/samples.jsonl")
        sides.append({(s["id"], s["k"]): s for s in map(json.loads, path.read_text().splitlines())})
    pairs = {key: (sides[0][key], sides[1][key]) for key in sides[0]}
    return {key: pair for key, pair in pairs.items() if None not in (pair[0]["score"], pair[1]["score"])}


def prompt_differences(pairs) -> dict[str, np.ndarray]:
    """Mean difference of each prompt, by task."""
    tasks: dict[str, dict[str, list[float]]] = {}
    for (key, _), (x, y) in pairs.items():
        tasks.setdefault(x["task"], {}).setdefault(key, []).append(y["score"] - x["score"])
    return {task: np.array([np.mean(values) for values in prompts.values()]) for task, prompts in tasks.items()}


def shown(result, show=5, width=100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(terminal_report(result, show), crop=False)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("name", ["mixed", "lucky", "all"])
def test_the_numbers_are_those_of_the_statistics_and_of_a_computation_by_hand(runs, name):
    (found,) = compare_runs([runs["base"], runs[name]]).comparisons
    pairs = scored_pairs(runs["base"], runs[name])
    scores = [{p.id: [pairs[p.id, k][side]["score"] for k in range(2)] for p in PROMPTS} for side in (0, 1)]
    tasks = {p.id: p.task for p in PROMPTS}
    assert found.overall.difference == statistics.paired_difference(*scores, tasks)
    differences = prompt_differences(pairs)
    assert found.overall.difference.value == pytest.approx(np.mean([d.mean() for d in differences.values()]))
    assert found.overall.b.value - found.overall.a.value == pytest.approx(found.overall.difference.value)
    rng = np.random.default_rng(5)
    drawn = [rng.choice(d, (20_000, len(d))).mean(axis=1) for d in differences.values()]
    ends = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    step = 0.5 / 5 / 2  # by which one picture of one prompt moves the mean of two tasks of five prompts
    assert (found.overall.difference.low, found.overall.difference.high) == pytest.approx(ends, abs=1.01 * step)
    assert [row.name for row in found.tasks] == ["counting", "colors"]
    for row in found.tasks:
        own = [{key: side[key] for key in side if tasks[key] == row.name} for side in scores]
        assert row.difference == statistics.paired_difference(*own)
        assert row.difference.value == pytest.approx(differences[row.name].mean())
        for estimate, side in zip((row.a, row.b), own, strict=True):
            assert estimate.value == pytest.approx(np.mean(list(side.values())))
        assert (row.prompts, row.difference.n) == (5, 10)
    assert (found.overall.prompts, found.pairs, found.left_out["pairs"]) == (10, 20, 0)


def test_pictures_without_a_score_on_either_side_are_left_out_of_both_and_counted(tmp_path):
    a = draw(tmp_path / "a", Model("model:a", BASE), replace(RUN, scorer=Blind("p3", "p4")))
    b = draw(tmp_path / "b", Model("model:b", ALL), replace(RUN, scorer=Blind("p3", "p5")))
    result = compare_runs([a, b])
    (found,) = result.comparisons
    assert found.left_out == {"a_unscored": 4, "b_unscored": 4, "pairs": 6}
    assert (found.overall.prompts, found.pairs) == (7, 14)
    differences = prompt_differences(scored_pairs(a, b))
    assert found.overall.difference.value == pytest.approx(np.mean([d.mean() for d in differences.values()]))
    assert found.overall.a.value == pytest.approx(np.mean([(0 + 1 + 0.5 + 1) / 4, (0.5 + 0 + 0) / 3]))
    assert "Left out: 6 pairs, as 4 pictures of A and 4 of B have no score." in shown(result)


def test_a_task_without_any_pair_is_refused(tmp_path):
    counting, colors = [p.id for p in PROMPTS[::2]], [p.id for p in PROMPTS[1::2]]
    a = draw(tmp_path / "a", Model("model:a", BASE), replace(RUN, scorer=Blind(*counting[:2])))
    b = draw(tmp_path / "b", Model("model:b", BASE), replace(RUN, scorer=Blind(*counting[2:], *colors[:2])))
    with pytest.raises(RequestError, match="No picture of 'counting' is scored in both"):
        compare_runs([a, b])


def test_a_metric_of_its_own_scale_keeps_its_units(tmp_path):
    run = replace(RUN, scorer=Aesthete(), correct_at=None)
    a, b = (draw(tmp_path / name, Model(f"model:{name}", right), run) for name, right in (("a", BASE), ("b", ALL)))
    result = compare_runs([a, b])
    (found,) = result.comparisons
    assert not found.points
    assert found.overall.difference.value == pytest.approx(0.55 * 2)  # red 200 is 2.0 above red 0
    assert (found.right_to_wrong, found.wrong_to_right) == (None, None)
    text = shown(result)
    assert "Prompts: 7 better in B, 0 worse, 3 the same" in text
    assert "model:b scores 1.100 higher than model:a on red_squares (95 % interval" in text
    assert "in the metric's own units): the difference is real." in text
    assert "from right to wrong" not in text


# --------------------------------------------------------------------------------------------------- flips and words


def test_flips_are_counted_and_listed_with_both_pictures(runs):
    result = compare_runs([runs["base"], runs["mixed"]])
    (found,) = result.comparisons
    assert [(c.id, c.a, c.b) for c in found.better] == [("p0", 0, 1), ("p1", 0.5, 1)]
    assert [(c.id, c.a, c.b) for c in found.worse] == [("p2", 1, 0), ("p3", 1, 0.5)]
    assert (found.same, found.wrong_to_right, found.right_to_wrong) == (6, 1, 1)
    assert [picture.k for picture in found.worse[1].pictures] == [0, 1]
    telling = found.worse[1].telling  # of p3 only the second picture turned
    assert (telling.k, telling.a_score, telling.b_score, telling.seed) == (1, 1, 0, PROMPTS[3].seed(RUN.seed, 1))
    for path, red in ((telling.a_file, True), (telling.b_file, False)):
        pixel = Image.open(path).getpixel((0, 0))
        assert (pixel[0] > pixel[2]) == red
    text = shown(result)
    assert "1 went from wrong to right, 1 from right to wrong" in text
    assert "2 better in B, 2 worse, 6 the same" in text
    assert f"  100.0 -> 50.0  {PROMPTS[3].prompt} (colors)\n    A {telling.a_file}\n    B {telling.b_file}\n" in text
    one_each = shown(result, show=1)
    assert "Worse in B (1 of 2):\n  100.0 -> 0.0  a photo of 2 cats" in one_each
    assert "Better in B (1 of 2):\n  0.0 -> 100.0  a photo of 0 cats" in one_each
    assert "a photo of 3 cats" not in one_each
    assert "of 2):" not in shown(result, show=0)


def test_a_real_difference_is_called_real_in_both_directions(runs):
    up = compare_runs([runs["base"], runs["all"]]).comparisons[0]
    down = compare_runs([runs["all"], runs["base"]]).comparisons[0]
    ends = [f"{100 * end:.1f}" for end in (up.overall.difference.low, up.overall.difference.high)]
    assert up.sentence == (
        f"model:all scores 55.0 points higher than model:base on red_squares (95 % interval {ends[0]} to {ends[1]}): "
        "the difference is real."
    )
    assert down.sentence == (
        f"model:base scores 55.0 points lower than model:all on red_squares (95 % interval -{ends[1]} to -{ends[0]}): "
        "the difference is real."
    )
    assert up.real
    assert up.needed is None
    assert "There are only 10 prompts." in up.warnings[0]


def sd_by_hand(a: Path, b: Path) -> float:
    """Spread of the paired mean of task means, a prompt at a time."""
    differences = prompt_differences(scored_pairs(a, b)).values()
    error = math.sqrt(sum(d.var(ddof=1) / len(d) for d in differences)) / len(differences)
    return error * math.sqrt(sum(map(len, differences)))


def test_a_difference_that_may_be_none_comes_with_the_prompts_it_would_take(runs):
    found = compare_runs([runs["base"], runs["lucky"]]).comparisons[0]
    needed = math.ceil(((1.959964 + 0.841621) * sd_by_hand(runs["base"], runs["lucky"]) / 0.1) ** 2)
    assert needed > 10
    assert found.needed == needed
    assert not found.real
    assert found.sentence.startswith("model:lucky scores 10.0 points higher than model:base on red_squares (95 %")
    assert found.sentence.endswith(
        "The interval contains 0: these prompts do not tell them apart; about "
        f"{needed} prompts would be needed to see a difference of this size (power 0.8)."
    )


def test_no_difference_at_all_asks_for_no_prompts(runs):
    found = compare_runs([runs["base"], runs["mixed"]]).comparisons[0]
    assert found.overall.difference.value == 0
    assert "scores the same as model:base" in found.sentence
    assert found.sentence.endswith("these prompts do not tell them apart.")
    assert found.needed is None


def test_names_and_prompts_can_steer_neither_terminal_nor_table(tmp_path):
    prompts = tuple(replace(p, prompt=f"[red]\x1b[31m {p.id}", task=f"[bold]\x1b]0;{p.task}\x07") for p in PROMPTS)
    run = replace(RUN, prompts=prompts)
    a, b = (draw(tmp_path / n, Model(f"model:{n}\x1b[2J", r), run) for n, r in (("a", BASE), ("b", ALL)))
    text = shown(compare_runs([a, b]))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]\N{REPLACEMENT CHARACTER}[31m p0" in text
    assert "[bold]" in text


# ------------------------------------------------------------------------------------------------- what is compared


def test_the_models_of_one_run_are_compared_with_its_first(tmp_path):
    out = tmp_path / "out"
    for name, right in (("base", BASE), ("mixed", MIXED), ("all", ALL)):
        draw(out, Model(f"model:{name}", right))
    result = compare_runs([out])
    assert [(c.a["label"], c.b["label"]) for c in result.comparisons] == [
        ("model:base", "model:mixed"),
        ("model:base", "model:all"),
    ]
    assert "2 comparisons are shown; their intervals are not corrected" in result.notes[0]
    chosen = compare_runs([out / "model-all", out / "model-base"])
    assert [(c.a["label"], c.b["label"]) for c in chosen.comparisons] == [("model:all", "model:base")]
    assert chosen.notes == ()
    with pytest.raises(RequestError, match=r"several models.*out/model-base, .*out/model-mixed"):
        compare_runs([out, out / "model-all"])
    with pytest.raises(RequestError, match="no model 'model-none'; it holds: model-base, model-mixed"):
        compare_runs([out / "model-none", out / "model-all"])


def test_a_model_s_folder_may_be_where_one_stands(runs, monkeypatch):
    monkeypatch.chdir(runs["base"] / "model-base")
    assert [side.label for side in find_sides([Path(), runs["all"]])] == ["model:base", "model:all"]


def test_two_models_are_needed_each_once(runs):
    with pytest.raises(RequestError, match="only model:base"):
        compare_runs([runs["base"]])
    with pytest.raises(RequestError, match="given twice"):
        compare_runs([runs["base"], runs["base"] / "model-base"])


def test_metrics_of_one_side_only_are_named_and_one_must_be_shared(tmp_path):
    other = replace(RUN, bench="circles", key="red_circles")
    a = draw(draw(tmp_path / "a", Model("model:a", BASE)), Model("model:a", BASE), other)
    b = draw(tmp_path / "b", Model("model:b", ALL))
    c = draw(tmp_path / "c", Model("model:c", ALL), other)
    result = compare_runs([a, b])
    assert [comparison.key for comparison in result.comparisons] == ["red_squares"]
    assert result.notes == ("Only model:a has red_circles: not compared.",)
    with pytest.raises(RequestError, match=r"share no metric\. Only model:b has red_squares.*Only model:c has"):
        compare_runs([b, c])


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "model", "message"),
    [
        ({"prompts": PROMPTS[:4], "partial": "--limit 4"}, {}, r"partial \(--limit 4\).*without --limit and --tasks"),
        ({"version": 2}, {}, "version: 1 in model:base, 2 in model:b\n.*one version of flowopd-eval"),
        ({"prompts": PROMPTS[::-1]}, {}, 'prompts_sha256: "[0-9a-f]{64}" in .*\n.*same prompts'),
        ({"samples": 1}, {}, "samples: 2 in model:base, 1 in model:b\n.*same --samples"),
        ({"seed": 8}, {}, "seed: 7 in model:base, 8 in model:b\n.*same --seed"),
        ({"correct_at": 0.5}, {}, "correct_at: 1.0 in model:base, 0.5 in model:b\n"),
        ({"scorer": Judge(2)}, {}, "scorer.version: 1 in model:base, 2 in model:b\n.*flowopd-eval score DIR"),
        ({"scorer": Protocol()}, {}, 'scorer.protocol: null in model:base, "mine" in model:b\n.*--protocol'),
        ({"scorer": None}, {}, "has no scores yet: flowopd-eval score "),
        ({}, {"steps": 30}, "sampling.steps: 20 in model:base, 30 in model:b\n.*--across record"),
    ],
)
def test_what_differs_besides_the_model_is_refused_with_both_values_and_the_remedy(
    runs, tmp_path, change, model, message
):
    b = draw(tmp_path / "b", Model("model:b", ALL, **model), replace(RUN, **change))
    with pytest.raises(RequestError, match=message):
        compare_runs([runs["base"], b])
    if "scorer" in change or "seed" in change:
        with pytest.raises(RequestError, match=message):
            compare_runs([runs["base"], b], across="record")


def test_different_models_by_hash_are_what_is_compared(runs, copy):
    b = copy("all")
    run = json.loads((b / "run.json").read_text())
    run["runs"]["model-all/squares"]["request"]["generator"] |= {"base_sha256": "cd" * 32, "adapter_sha256": "ef" * 32}
    (b / "run.json").write_text(json.dumps(run))
    (found,) = compare_runs([runs["base"], b]).comparisons
    assert found.b["request"]["generator"]["adapter_sha256"] == "ef" * 32


def test_records_are_compared_when_that_is_said(runs, tmp_path):
    b = draw(tmp_path / "b", Model("model:base", ALL, steps=30, shift=2.0))
    result = compare_runs([runs["base"], b], across="record")
    (found,) = result.comparisons
    labels = [f"model:base ({out / 'model-base'})" for out in (runs["base"], b)]
    assert [found.a["label"], found.b["label"]] == labels
    assert found.warnings[:2] == (
        f"Not the same: sampling.steps: 20 in {labels[0]}, 30 in {labels[1]}",
        f"Not the same: sampling.shift: null in {labels[0]}, 2.0 in {labels[1]}",
    )
    assert found.warnings[0] in shown(result)
    with pytest.raises(RequestError, match="Expected --across record, but got --across 'seeds'"):
        compare_runs([runs["base"], b], across="seeds")


def test_another_batch_size_is_a_warning(runs, tmp_path):
    b = draw(tmp_path / "b", Model("model:b", ALL), replace(RUN, batch_size=5))
    assert "batch_size: 3 in model:base, 5 in model:b" in compare_runs([runs["base"], b]).comparisons[0].warnings[0]


def test_runs_that_are_not_finished_are_refused(runs, tmp_path, copy):
    b = draw(tmp_path / "b", Model("model:b", ALL), shard=Shard(0, 2))
    with pytest.raises(RequestError, match=r"not finished \(9 of 20 pictures.*shard 1/2 lacks 9.*it continues"):
        compare_runs([runs["base"], b])
    c = copy("all")
    (c / "model-all/squares/samples/00004-01.png").unlink()
    with pytest.raises(RequestError, match="1 pictures are gone"):
        compare_runs([c, runs["base"]])


def change_request(**fields):
    def tamper(out: Path) -> None:
        run = json.loads((out / "run.json").read_text())
        request = run["runs"]["model-all/squares"]["request"]
        request |= fields
        for field in [field for field, value in request.items() if value is ...]:
            del request[field]
        (out / "run.json").write_text(json.dumps(run))

    return tamper


def change_line(**fields):
    def tamper(out: Path) -> None:
        path = out / "model-all/squares/samples.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        lines[2] = json.dumps({**json.loads(lines[2]), **fields}) + "\n"
        path.write_text("".join(lines))

    return tamper


def change_prompts(out: Path) -> None:
    (out / "model-all/squares/prompts.jsonl").write_text("{}\n")


def folder_for_run_json(out: Path) -> None:
    (out / "run.json").unlink()
    (out / "run.json").mkdir()


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (change_request(correct_at=...), "lacks a valid correct_at"),
        (change_request(correct_at="1"), "lacks a valid correct_at"),
        (change_request(correct_at=math.nan), "not finite"),
        (change_request(scorer="red"), "lacks a valid scorer"),
        (change_request(partial=...), "lacks a valid partial"),
        (change_request(partial=3), "lacks a valid partial"),
        (change_request(prompts_sha256=...), "Expected str as prompts_sha256"),
        (change_request(generator={"model": "x", "sampling": 7}), "sampling record that is not one"),
        (change_request(generator={"model": "x"}), "drawn elsewhere"),
        (change_request(generator={"model": "x", "sampling": {"guidance": math.inf}}), "not finite"),
        (change_request(key="red\x1b[2Jsquares"), "printable"),
        (change_line(seed=4), r"Picture 0 of prompt 'p1' has seed \d+ in model:base and 4 in model:all"),
        (change_line(score=1e300), "has the score 1e\\+300"),
        (change_line(file="../../../x.png"), "does not lie inside the run"),
        (change_line(k="0"), "is not a sample"),
        (change_prompts, "is missing or not the file of this run's request"),
        (folder_for_run_json, "cannot be read"),
        (lambda out: (out / "run.json").write_text("[]"), "Expected schema"),
        (lambda out: shutil.rmtree(out), "is no run"),
    ],
)
def test_a_run_that_was_tampered_with_is_refused_in_words(runs, copy, tamper, message):
    b = copy("all")
    tamper(b)
    with pytest.raises(RequestError, match=message):
        compare_runs([runs["base"], b])


def test_pictures_drawn_elsewhere_are_compared_only_on_demand(runs, copy):
    b = copy("all")
    change_request(generator={"model": "model:all"})(b)
    (found,) = compare_runs([runs["base"], b], across="record").comparisons
    assert "Seeds and sampling record of model:all are not known." in found.warnings


# ------------------------------------------------------------------------------------------------------------- power


def test_power_says_how_many_prompts_a_difference_takes(runs):
    sd = 100 * sd_by_hand(runs["base"], runs["lucky"])
    for delta, power, z in ((2, 0.8, 0.841621), (5, 0.9, 1.281552)):
        (found,) = prompts_for([runs["base"], runs["lucky"]], delta, power)
        assert found.needed == math.ceil(((1.959964 + z) * sd / delta) ** 2)
        assert found.sd == pytest.approx(sd)
        assert f"a difference of {delta} points takes about {found.needed:,} prompts" in found.sentence
        assert f"power {power:g}" in found.sentence


def test_power_in_the_units_of_a_metric_of_its_own_scale(tmp_path):
    run = replace(RUN, scorer=Aesthete(), correct_at=None)
    a, b = (draw(tmp_path / name, Model(f"model:{name}", right), run) for name, right in (("a", BASE), ("b", LUCKY)))
    (found,) = prompts_for([a, b], 0.2)
    assert found.needed == math.ceil(((1.959964 + 0.841621) * sd_by_hand(a, b) / 0.2) ** 2)
    assert "a difference of 0.2 (in the metric's own units, as its scores are not within 0..1)" in found.sentence


def test_runs_on_the_same_prompts_of_ones_own_are_compared_and_it_is_said(tmp_path):
    run = replace(RUN, prompts=PROMPTS[:6], partial=OWN_PROMPTS)
    a, b = (draw(tmp_path / name, Model(f"model:{name}", right), run) for name, right in (("a", BASE), ("b", ALL)))
    (comparison,) = compare_runs([a, b]).comparisons
    differences = np.concatenate([*prompt_differences(scored_pairs(a, b)).values()])
    assert comparison.overall.difference.value == pytest.approx(differences.mean())
    assert comparison.warnings[0].startswith("Drawn from other prompts than the bench's (--prompts)")
    other = draw(tmp_path / "c", Model("model:c", ALL), replace(run, prompts=PROMPTS[:4]))
    with pytest.raises(RequestError, match="prompts_sha256"):
        compare_runs([a, other])
    part = replace(run, prompts=PROMPTS[:4], partial=f"{OWN_PROMPTS} --limit 4")
    c, d = (draw(tmp_path / name, Model(f"model:{name}", ALL), part) for name in ("d", "e"))
    with pytest.raises(RequestError, match=r"--limit 4\)"):
        compare_runs([c, d])


def test_power_takes_a_pilot_that_compare_refuses(tmp_path):
    run = replace(RUN, prompts=PROMPTS[:4], partial="--limit 2")
    a, b = (draw(tmp_path / name, Model(f"model:{name}", right), run) for name, right in (("a", BASE), ("b", LUCKY)))
    with pytest.raises(RequestError, match="partial"):
        compare_runs([a, b])
    (found,) = prompts_for([a, b], 2)
    assert found.prompts == 4
    assert any("A pilot (--limit 2)" in warning for warning in found.warnings)
    assert any("only 4 prompts" in warning for warning in found.warnings)


def test_power_does_not_guess_from_models_that_differ_alike_everywhere(runs, copy):
    b = copy("base")
    (found,) = prompts_for([runs["base"], b], 2)
    assert found.needed is None
    assert "does not tell" in found.sentence


@pytest.mark.parametrize(
    ("delta", "power", "message"), [(0, 0.8, "--delta"), (math.nan, 0.8, "--delta"), (2, 1, "--power"), (2, 0, "--pow")]
)
def test_power_refuses_what_cannot_be_asked(runs, delta, power, message):
    with pytest.raises(RequestError, match=message):
        prompts_for([runs["base"], runs["all"]], delta, power)


def test_power_takes_two_models_and_more_than_one_prompt_a_task(runs, tmp_path):
    with pytest.raises(RequestError, match=r"Expected two models, but got 3\. Name two of"):
        prompts_for([runs["base"], runs["all"], runs["mixed"]], 2)
    run = replace(RUN, prompts=PROMPTS[:3], partial="--limit 2")
    a, b = (draw(tmp_path / name, Model(f"model:{name}", right), run) for name, right in (("a", BASE), ("b", ALL)))
    with pytest.raises(RequestError, match="at least two prompts in task 'colors'"):
        prompts_for([a, b], 2)


# ------------------------------------------------------------------------------------------------------ command line


def test_the_commands_say_it_and_write_it(runs, command, tmp_path):
    file = tmp_path / "new" / "comparison.json"
    code, stdout, stderr = command("compare", runs["base"], runs["mixed"], runs["all"], "--show", 1, "--json", file)
    assert (code, stderr) == (0, "")
    result = compare_runs([runs["base"], runs["mixed"], runs["all"]])
    for comparison in result.comparisons:
        assert f"{comparison.sentence}\n" in stdout
        assert comparison.worse[:1] == () or f"    A {comparison.worse[0].telling.a_file}\n" in stdout
    assert f"{result.notes[0]}\n" in stdout
    written = json.loads(file.read_text())
    assert {"flowopd-eval", "numpy"} <= written["compared_with"]["versions"].keys()
    assert len(written["comparisons"]) == 2
    for comparison, expected, name in zip(written["comparisons"], result.comparisons, ("mixed", "all"), strict=True):
        for side, run in (("a", "base"), ("b", name)):
            assert comparison[side]["path"] == str(runs[run] / f"model-{run}" / "squares")
            assert comparison[side]["request"]["generator"]["base_sha256"] == "ab" * 32
            assert comparison[side]["request"]["prompts_sha256"]
            assert comparison[side]["sessions"][0]["versions"]["numpy"] == np.__version__
            assert len(comparison[side]["samples_sha256"]["samples.jsonl"]) == 64
        assert comparison["overall"]["difference"]["low"] == expected.overall.difference.low
        assert [change["id"] for change in comparison["better"]] == [change.id for change in expected.better]
        assert all(Path(change["pictures"][0]["b_file"]).is_file() for change in comparison["better"])
    code, stdout, _ = command("power", runs["base"], runs["lucky"], "--delta", 2)
    assert code == 0
    assert prompts_for([runs["base"], runs["lucky"]], 2)[0].sentence in stdout


def test_a_refused_request_exits_2_in_words(runs, command, tmp_path):
    b = draw(tmp_path / "b", Model("model:b", ALL), replace(RUN, prompts=PROMPTS[:4], partial="--limit 4"))
    for words in (["compare", runs["base"], b], ["power", runs["base"], b, "--delta", 2], ["compare", "nowhere", b]):
        code, stdout, stderr = command(*words)
        assert (code, stdout) == (2, "")
        assert stderr.startswith("flowopd-eval: ")
        assert "Traceback" not in stderr
    assert not (tmp_path / "nowhere").exists()
