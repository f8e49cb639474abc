"""The explorer of runs: what it finds, shows and filters, and the paths it never opens."""

import csv
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from painting import RUN, Painter

from app.runs import Runs, chosen, pictures
from flowopd_eval import store
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import run_bench
from flowopd_eval.report import load_run

NAME = "deep/two"


@pytest.fixture
def own(runs_folder, tmp_path):
    """A copy of the runs that a test may damage."""
    shutil.copytree(runs_folder, tmp_path / "runs")
    return Runs(tmp_path / "runs")


def first(runs):
    return pictures(runs.load(NAME))[0]


def test_runs_are_found_by_their_place_below_the_root(runs_folder):
    assert Runs(runs_folder).names() == [NAME]
    assert Runs(runs_folder / "deep" / "two").names() == ["."]


def test_numbers_are_those_of_the_report(runs_folder):
    shown = Runs(runs_folder).load(NAME)
    assert [entry.summary for entry in shown.entries] == [
        entry.summary for entry in load_run(runs_folder / NAME).entries
    ]
    row = next(csv.DictReader(io.StringIO(Runs(runs_folder).csv(NAME))))
    assert float(row["overall"]) == shown.entries[0].summary["metrics"]["overall"]["value"]


def test_a_run_that_grows_is_read_again(own):
    before = own.load(NAME).entries[0].summary["n"]
    journal = own.root / NAME / "painter-base" / "squares" / "samples.jsonl"
    journal.write_bytes(b"".join(line + b"\n" for line in journal.read_bytes().splitlines()[:5]))
    assert (before, own.load(NAME).entries[0].summary["n"]) == (20, 5)


def test_filters_leave_exactly_what_they_name(runs_folder):
    found = pictures(Runs(runs_folder).load(NAME))
    assert len(found) == 40
    for field, value, get in (
        ("model", "painter:student", lambda one: one.model),
        ("key", "red_squares", lambda one: one.key),
        ("task", "colors", lambda one: one.sample.task),
        ("said", "wrong", lambda one: one.verdict),
    ):
        left = chosen(found, **{field: value})
        assert left == [one for one in found if get(one) == value]
        assert 0 < len(left) <= 40
    both = chosen(found, task="colors", said="right")
    assert both == [one for one in found if one.sample.task == "colors" and one.sample.score == 1]
    assert chosen(found, task="no such") == []


def test_disagreement_is_one_right_and_one_wrong(runs_folder):
    found = pictures(Runs(runs_folder).load(NAME))
    scores = {}
    for one in found:
        scores.setdefault((one.sample.id, one.sample.k), set()).add(one.sample.score)
    expected = [one for one in found if len(scores[one.sample.id, one.sample.k]) == 2]
    assert chosen(found, disagree=True) == expected
    assert 0 < len(expected) < 40


def test_a_picture_comes_at_full_size_with_what_decided_it(runs_folder):
    runs = Runs(runs_folder)
    one = first(runs)
    picture, shown, facts, intact = runs.picture(NAME, one.address)
    file = runs_folder / NAME / "painter-base" / "squares" / one.sample.file
    assert np.array_equal(np.asarray(picture), np.asarray(store.read_picture(file)))
    assert shown == one
    assert intact
    assert facts["sha256"] == one.sample.sha256
    assert facts["which"] == f"picture {one.sample.k}, seed {one.sample.seed}"
    assert facts["generator.model"] == "painter:base"
    assert facts["judge.name"] == "red"


def test_the_models_are_compared_as_the_command_compares_them(runs_folder):
    (comparison,) = Runs(runs_folder).compare(NAME).comparisons
    assert comparison.key == RUN.key
    assert comparison.a["label"] == "painter:base"


def test_models_of_guidances_of_their_own_are_compared_and_what_differs_is_told(tmp_path):
    gradio = pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'flowopd-eval[app]'")
    from app.runs_tab import RunsTab

    class Student(Painter):
        def identity(self):
            return {**super().identity(), "model": "painter:student"}

    for painter in (Painter(16), Student(16, guidance=1.0)):
        run_bench(RUN, painter, tmp_path / "run")
    runs = Runs(tmp_path)
    (comparison,) = runs.compare("run").comparisons
    told = "Not the same: sampling.guidance: 4.5 in painter:base, 1.0 in painter:student"
    assert told in comparison.warnings
    with gradio.Blocks():
        page = RunsTab(runs).open("run")[0]
    assert "Differences" in page
    assert told in page
    assert "Drawn differently: guidance 4.5 (painter:base), 1.0 (painter:student)" in page


OTHERS = ["", ".", "..", "../runs", "/etc", "deep", "deep/two/..", "deep/../deep/two", "deep/two/", "deep\\two", "x\0"]


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_name_opens_anything(runs_folder, name):
    runs = Runs(runs_folder)
    for ask in (runs.load, runs.csv, runs.compare):
        with pytest.raises(RequestError, match="There is no run"):
            ask(name)


@pytest.mark.parametrize(
    "address",
    [
        {"model": "../..", "key": "red_squares", "id": "p0", "k": 0},
        {"model": "painter:base", "key": "red_squares", "id": "../../secret", "k": 0},
        {"model": "painter:base", "key": "red_squares", "id": "p0", "k": "0/../../x"},
        {"model": "painter:base", "key": "red_squares", "id": "p0", "k": 0, "file": "/etc/passwd"},
        {},
    ],
)
def test_no_other_address_opens_a_picture(runs_folder, address):
    with pytest.raises(RequestError, match="no such picture"):
        Runs(runs_folder).picture(NAME, address)


def test_a_picture_that_is_a_link_out_of_the_run_is_refused(own, tmp_path):
    secret = tmp_path / "secret.png"
    one = first(own)
    file = own.root / NAME / "painter-base" / "squares" / one.sample.file
    file.rename(secret)
    file.symlink_to(secret)
    with pytest.raises(RequestError, match="outside the run"):
        own.picture(NAME, one.address)
    entry = own.load(NAME).entries[0]
    assert own.thumbnail(entry.folder, one.sample) is None


def test_a_training_is_no_run_here(own):
    names = own.names()
    (own.root / "trained").mkdir()
    (own.root / "trained" / "run.json").write_text(json.dumps({"identity": {"schema": 2}, "steps": 3}))
    (own.root / "damaged").mkdir()
    (own.root / "damaged" / "run.json").write_text("{")
    assert own.names() == ["damaged", *names]


def test_links_to_runs_elsewhere_are_no_runs_here(own, tmp_path):
    shutil.move(own.root / "deep", tmp_path / "elsewhere")
    (own.root / "linked").symlink_to(tmp_path / "elsewhere" / "two", target_is_directory=True)
    (own.root / "half").mkdir()
    (own.root / "half" / "run.json").symlink_to(tmp_path / "elsewhere" / "two" / "run.json")
    assert own.names() == []


@pytest.mark.parametrize("file", ["../../../../secret.png", "/etc/hostname", "samples/../../../x.png"])
def test_a_run_that_names_files_outside_itself_is_refused(own, file):
    journal = own.root / NAME / "painter-base" / "squares" / "samples.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[0]["file"] = file
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RequestError, match="does not lie inside the run"):
        own.load(NAME)


def test_a_picture_exchanged_afterwards_is_shown_as_such(own):
    one = first(own)
    file = own.root / NAME / "painter-base" / "squares" / one.sample.file
    store.write_picture(file, store.read_picture(file).rotate(90))
    entry = own.load(NAME).entries[0]
    full = own.picture(NAME, one.address)
    assert not full.intact
    assert "drawn" in full.facts["sha256"]
    assert not {"score", "said"} & set(full.facts)
    assert not own.intact(entry.folder, one.sample)
    assert own.intact(entry.folder, entry.samples[1])


def test_of_a_picture_exchanged_afterwards_neither_verdict_nor_boxes_are_shown(own):
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'flowopd-eval[app]'")
    from app.runs_tab import detail

    one = first(own)
    box = {"box": [1, 1, 9, 9], "label": "square", "score": 0.9, "colour": "red"}
    full = own.picture(NAME, one.address)
    seen = full._replace(shown=replace(one, sample=replace(one.sample, detail={"detections": [box]})))
    before = detail(seen)
    assert f"· {one.verdict}" in before
    assert 'class="box' in before
    after = detail(seen._replace(intact=False))
    assert after.index("These are not the bytes that were drawn.") < after.index("<img")
    for told in (f"· {one.verdict}", 'class="box', "Show what the judge saw"):
        assert told not in after


def test_a_picture_that_is_gone_or_broken_is_named(own):
    one = first(own)
    file = own.root / NAME / "painter-base" / "squares" / one.sample.file
    file.write_bytes(b"no picture")
    with pytest.raises(RequestError, match="gone or cannot be read"):
        own.picture(NAME, one.address)
    file.unlink()
    with pytest.raises(RequestError, match="gone or cannot be read"):
        own.picture(NAME, one.address)


def test_a_damaged_run_takes_no_other_with_it(own):
    shutil.copytree(own.root / "deep", own.root / "other")
    (own.root / NAME / "run.json").write_text("{")
    assert set(own.names()) == {NAME, "other/two"}
    with pytest.raises(RequestError, match="not JSON"):
        own.load(NAME)
    assert len(own.load("other/two").entries) == 2


def test_a_folder_that_comes_later_is_found(runs_folder, tmp_path):
    later = Runs(tmp_path / "later")
    assert later.names() == []
    shutil.copytree(runs_folder, tmp_path / "later")
    assert later.names() == [NAME]
