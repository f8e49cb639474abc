"""The rules by which settings are chosen, and what the table in miniature makes of finished arms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from painting import RUN, Painter
from PIL import Image

from benchmarks import settings, table2
from flowopd_eval.compare import compare_runs
from flowopd_eval.harness import run_bench
from training.config import load_recipe

KEYS = table2.BENCHES


class Model(Painter):
    """Right (red) in the given share of pictures, chosen by the seed alone: a higher share is right wherever a lower
    one is."""

    def __init__(self, name: str, share: float):
        super().__init__()
        self.name, self.share = name, share

    def identity(self):
        return {**super().identity(), "model": self.name}

    def generate(self, prompts, seeds):
        right = [np.random.default_rng(seed).random() < self.share for seed in seeds]
        return [Image.new("RGB", (64, 64), (200, 0, 0) if red else (0, 0, 200)) for red in right]


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Finished evaluations of arms, where the table looks for them; what the table holds of each."""
    monkeypatch.setattr(table2, "RUNS", tmp_path)

    def finished(name, shares):
        for (flag, key), share in zip(KEYS.items(), shares, strict=True):
            run_bench(replace(RUN, bench=flag, key=key), Model(name, share), tmp_path / "evaluation" / name)
        return row(*shares)

    return finished


def row(*scores, title="an arm"):
    metrics = {flag: {"value": s, "low": s - 0.1, "high": s + 0.1} for flag, s in zip(KEYS, scores, strict=True)}
    return {"title": title, "scores": metrics, "average": sum(scores) / 3, "samples": 1920}


# --- rules -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("scores", "taken"),
    [({1.0: 0.5, 2.0: 0.6}, 2.0), ({1.0: 0.595, 2.0: 0.6}, 1.0), ({3.0: 0.6, 1.0: 0.55, 2.0: 0.592}, 2.0)],
)
def test_the_best_candidate_is_chosen_and_within_a_point_the_smallest(scores, taken):
    assert settings.chosen(scores) == taken


def test_each_weight_has_its_own_rate_and_the_chosen_one_reaches_the_arms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert table2.weight_settings() == ()
    assert table2.weight_settings("velocity") == ("kl_weight=velocity",)
    stored = {"weight": {"chosen": "velocity", "rates": {"transition": 0.125, "velocity": 0.5}}}
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "settings.json").write_text(json.dumps(stored))
    assert table2.weight_settings() == ("kl_weight=velocity", "optimizer.learning_rate=0.5")
    assert table2.weight_settings("transition") == ("kl_weight=transition", "optimizer.learning_rate=0.125")


def trials(scores, monkeypatch):
    """The choice of a weight by these scores of its candidates, by name; trained and evaluated: nothing."""
    monkeypatch.setattr(settings, "_candidate", lambda name, *_: dict.fromkeys(KEYS, scores.get(name, 0.1)))
    return settings.choose_weight()


def test_the_weight_is_chosen_by_its_best_rate(monkeypatch):
    found = trials({"opd-velocity-0.001": 0.6, "opd-velocity-0.0005": 0.58, "opd-0.0002": 0.55}, monkeypatch)
    assert found["chosen"] == "velocity"
    assert found["rates"] == {"transition": 2e-4, "flow-opd-code": 2e-4, "velocity": 1e-3}
    assert found["candidates"]["velocity"]["0.0005"] == dict.fromkeys(KEYS, 0.58)


def test_of_close_weights_the_first_is_taken(monkeypatch):
    assert trials({"opd-velocity-0.001": 0.6, "opd-0.0005": 0.592}, monkeypatch)["chosen"] == "transition"
    assert trials({"opd-velocity-0.001": 0.6, "opd-0.0005": 0.585}, monkeypatch)["chosen"] == "velocity"


def test_every_arm_asks_for_settings_that_its_recipe_knows():
    arms = (*table2.ARMS, *table2.MODES, *table2.LONG)
    for arm in arms:
        if arm.recipe:
            recipe, *sets = (word for word in arm.command[3:] if word != "--set")
            load_recipe(Path(recipe), sets)
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names)
    assert all(arm.name == "base" or arm.start in names[: names.index(arm.name)] for arm in table2.ARMS)


# --- hopes -----------------------------------------------------------------------------------------------------------
HOPE = ("what", "b", "a", ("geneval",))


@pytest.mark.parametrize(
    ("least", "verdict"),
    [(0.2, "yes"), (0.9, "no"), (0.71, "no, within the interval"), (0.69, "yes, within the interval")],
)
def test_a_hope_comes_true_where_the_paired_difference_exceeds_it(evaluate, monkeypatch, least, verdict):
    results = {"a": evaluate("a", (0.2, 0.5, 0.5)), "b": evaluate("b", (0.8, 0.5, 0.5))}
    monkeypatch.setattr(table2, "HOPES", ((*HOPE, 0.0),))
    (first,) = table2.hopes(results, table2.HOPES)
    (compared,) = (
        c for c in compare_runs([table2.RUNS / "evaluation" / n for n in "ab"]).comparisons if "gen" in c.key
    )
    assert (first["low"], first["high"]) == (compared.overall.difference.low, compared.overall.difference.high)
    assert 0.3 < first["low"] < first["difference"] < first["high"]
    monkeypatch.setattr(table2, "HOPES", ((*HOPE, least - 0.7 + first["difference"]),))
    assert table2.hopes(results, table2.HOPES)[0]["seen"] == verdict


def test_a_hope_on_all_benches_is_about_their_mean(evaluate, monkeypatch):
    results = {"a": evaluate("a", (0.2, 0.5, 0.5)), "b": evaluate("b", (0.8, 0.5, 0.5))}
    monkeypatch.setattr(table2, "HOPES", ((*HOPE, 0.0), ("all", "b", "a", tuple(KEYS), 0.0)))
    one, all_three = table2.hopes(results, table2.HOPES)
    assert all_three["difference"] == pytest.approx(one["difference"] / 3)  # the other two benches are equal
    assert all_three["high"] - all_three["low"] == pytest.approx((one["high"] - one["low"]) / 3)


def test_a_hope_waits_for_both_of_its_arms(evaluate, monkeypatch):
    monkeypatch.setattr(table2, "HOPES", ((*HOPE, 0.0),))
    assert table2.hopes({"a": row(0.1, 0.1, 0.1)}, table2.HOPES) == []


# --- what is written -------------------------------------------------------------------------------------------------
def test_beside_the_paper_stand_the_rows_that_both_have():
    results = {"base": row(0.35, 0.44, 0.58, title="ours"), "opd-merge-code": row(0.5, 0.5, 0.5)}
    lines = table2.beside_paper(results).splitlines()
    assert lines[2:] == ["| ours | 0.35 | 0.44 | 0.58 | 0.457 | SD3.5-M | 0.63 | 0.59 | 4.07 | 21.64 | 0.7165 |"]
    assert {line.count("|") for line in lines} == {12}


def test_the_table_has_intervals_and_samples():
    head, rule, line = table2.markdown({"x": row(0.5, 0.25, 0.75, title="arm")}).splitlines()
    assert line == "| arm | 0.500 [0.400, 0.600] | 0.250 [0.150, 0.350] | 0.750 [0.650, 0.850] | 0.500 | 1,920 |"
    assert head.count("|") == rule.count("|") == line.count("|")


def test_the_readme_s_table_is_exchanged_and_nothing_else(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{table2.START}old\n{table2.END}after\n")
    for _ in range(2):
        table2.write_readme("| new |\n", path)
    assert path.read_text() == f"before\n{table2.START}\n| new |\n\n{table2.END}after\n"


@pytest.mark.parametrize("text", ["nothing", table2.START, table2.END + table2.START])
def test_a_readme_without_a_place_for_the_table_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="no place for the table"):
        table2.write_readme("| new |\n", path)
    assert path.read_text() == text


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty checkout in which arms train and are evaluated in no time; the names of those that did."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(table2.START + table2.END)
    monkeypatch.setattr(table2, "RESULTS", tmp_path / "table2.json")
    ran = []
    monkeypatch.setattr(table2, "train", lambda arm: ran.append(arm.name))
    monkeypatch.setattr(table2, "row", lambda arm: row(0.5, 0.5, 0.5, title=arm.title if arm else "guided"))
    monkeypatch.setattr(table2, "hopes", lambda results, of: [])
    monkeypatch.setattr(table2, "plot", lambda *_: None)  # needs matplotlib
    monkeypatch.setattr(table2, "page", lambda results: Image.new("RGB", (8, 8)))
    return ran


def test_the_table_has_all_arms_in_order_and_is_written_everywhere(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["table2"])
    assert table2.main() == 0
    names = [arm.name for arm in table2.ARMS]
    assert sorted(checkout) == sorted(names)
    assert list(json.loads((tmp_path / "table2.json").read_text())["arms"]) == ["base-guided", *names]
    assert (tmp_path / "docs" / "table2.md").read_text().count("0.500 [0.400, 0.600]") == 3 * (len(names) + 1)
    assert "| Flow-OPD (merge) | 0.50 | 0.50" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "docs" / "table2-pictures.jpg").is_file()


def test_modes_are_trained_beside_the_same_without_and_leave_the_table_alone(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["table2", "modes"])
    assert table2.main() == 0
    assert sorted(checkout) == ["merge", "opd-merge", "opd-merge-fp8", "opd-merge-sparse", "opd-merge-window"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "docs", "table2-modes.json"]
    assert (tmp_path / "README.md").read_text() == table2.START + table2.END
    assert not list((tmp_path / "docs").iterdir())


def test_each_part_makes_all_that_its_arms_start_from_and_are_held_against():
    for again, beside, hoped in table2.PARTS.values():
        made = [*again, *(arm.name for arm in beside)]
        starts = {arm.name: arm.start for arm in (*table2.ARMS, *beside)}
        assert all(starts[name] in ("base", *made[: made.index(name)]) for name in made)
        assert {name for _, *pair, _, _ in hoped for name in pair} <= set(made)
        assert all(starts[name] in made for name in made if name in table2.CURVES)


def test_each_mode_is_held_against_the_same_without(evaluate):
    results = {name: evaluate(name, (share,) * 3) for name, share in (("opd-merge", 0.8), ("opd-merge-fp8", 0.5))}
    (seen,) = table2.hopes(results, table2.MODE_HOPES)
    assert "fp8" in seen["hope"]
    assert seen["high"] < -0.03
    assert seen["seen"] == "no"


# --- what is drawn ---------------------------------------------------------------------------------------------------
def test_a_curve_goes_from_its_start_to_its_own_row_on_the_same_prompts(evaluate, monkeypatch, tmp_path):
    arm = table2.Arm("arm", "an arm", "tiny_opd", start="merge")
    for snapshot in ("step-000020", "step-000060"):
        (arm.out / "snapshots" / snapshot).mkdir(parents=True)
    (arm.out / "recipe.json").write_text(json.dumps({"steps": 60, "batch_size": 32}))
    evaluate("merge", (0.0, 0.5, 1.0))
    evaluate("arm", (1.0, 1.0, 1.0))
    drawn = []
    monkeypatch.setattr(table2, "evaluate", lambda name, *_: drawn.append(name) or evaluate(name, (0.5, 0.5, 0.5)))
    whole = table2.curve(arm)
    assert drawn == ["arm-step-000020"]
    assert [p["samples"] for p in whole] == [0, 640, 1920]
    assert [p["geneval"] for p in whole][::2] == [0.0, 1.0]
    assert whole[0]["ocr"] == table2.on_first_prompts("merge")["ocr"]
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib, which the tests do not install")
    table2.plot({"arm": row(1, 1, 1) | {"curve": whole}}, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 1000


def test_the_first_prompts_are_the_first_of_every_task(evaluate, monkeypatch):
    evaluate("merge", (0.5, 0.5, 0.5))
    (log,) = (table2.RUNS / "evaluation" / "merge").glob("*/geneval/samples.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    tasks = {sample["task"]: [s["score"] for s in samples if s["task"] == sample["task"]] for sample in samples}
    assert len(tasks) > 1
    monkeypatch.setattr(table2, "CURVE", 2)
    expected = np.mean([np.mean(scores[:2]) for scores in tasks.values()])
    assert table2.on_first_prompts("merge")["geneval"] == pytest.approx(expected)


def test_the_page_has_a_row_of_pictures_an_arm_with_its_name(evaluate):
    results = {"a": evaluate("a", (1.0, 1.0, 1.0)), "b": evaluate("b", (0.0, 0.0, 0.0))}
    sheet = np.asarray(table2.page(results))
    assert sheet.shape[0] == 2 * 68
    assert (sheet[:, :330].min((1, 2))[:68].min(), sheet[:, :330].min((1, 2))[68:].min()) == (
        0,
        0,
    )  # two names in black
    assert tuple(sheet[30, 360]) == (200, 0, 0)
    assert tuple(sheet[98, 360]) == (0, 0, 200)
