"""The report: numbers that agree with the run, pages that hold hostile text, and runs that are refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from painting import PROMPTS, RUN, Judge, Painter
from rich.console import Console

from flowopd_eval import store
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import run_bench
from flowopd_eval.records import Prompt, Sample, Score
from flowopd_eval.report import boxes, by_judge, load_run, summarise_run, terminal_table, verdict, write_report
from flowopd_eval.store import Shard

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</script><script>alert(3)</script>",
    "<!-- <script> ]]> {{ 7*7 }} {% raw %}",
    "'; alert(4) //  \u2028 \u2029 \u202e &lt;b&gt; \\u003c",
)


class Named(Painter):
    def __init__(self, name: str, shift: int = 0):
        super().__init__()
        self.name, self.shift = name, shift

    def identity(self):
        return {**super().identity(), "model": self.name}

    def generate(self, prompts, seeds):
        return super().generate(prompts, [seed + self.shift for seed in seeds])


class Aesthete(Judge):
    """A metric beyond 0..1 without right and wrong."""

    def one(self, pixels, prompt):
        return Score(20 + pixels.mean() / 100)


class Echo(Judge):
    """Says the prompt back wherever text can be said."""

    def one(self, pixels, prompt):
        if prompt.id.endswith("4"):
            raise ValueError(prompt.prompt)
        detection = {"label": prompt.prompt, "box": [1, 2, 5, 6], "score": 0.5, "colour": prompt.prompt}
        return Score(0.0, prompt.prompt, {"detections": [detection]})


class Page(HTMLParser):
    """What a browser would make of the page: its tags with attributes, and its text."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        (self.scripts if self.tags and self.tags[-1][0] == "script" else self.text).append(data)

    @property
    def gallery(self) -> list[dict]:
        return json.loads(self.scripts[0])


def page(out: Path) -> Page:
    return Page(write_report(out).read_text())


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two models on one bench and one of them on a second bench."""
    path = tmp_path_factory.mktemp("run")
    run_bench(RUN, Named("tiny:base"), path, note="the built-in miniature, not SD3.5")
    run_bench(replace(RUN, partial="--limit 10"), Named("tiny:student", 1), path)
    run_bench(replace(RUN, bench="beauty", key="beauty", scorer=Aesthete(), correct_at=None), Named("tiny:base"), path)
    return path


# --------------------------------------------------------------------------------------------------------- reading


def test_a_run_reads_back_as_its_summaries_say(out):
    run = load_run(out)
    assert run.note == "the built-in miniature, not SD3.5"
    found = [(entry.summary["model"], entry.summary["bench"], len(entry.samples)) for entry in run.entries]
    assert found == [("tiny:base", "squares", 20), ("tiny:student", "squares", 20), ("tiny:base", "beauty", 20)]
    for entry in run.entries:
        assert entry.summary == json.loads(entry.folder.summary.read_text())


def test_the_overview_holds_every_model_and_bench(out):
    summaries = summarise_run(out)
    written = json.loads((out / "summary.json").read_text())
    assert written == {"schema": 1, "models": summaries, "unavailable": {}}
    assert {model: set(benches) for model, benches in summaries.items()} == {
        "tiny:base": {"squares", "beauty"},
        "tiny:student": {"squares"},
    }


def test_the_report_merges_shards(tmp_path):
    run_bench(RUN, Painter(), tmp_path / "whole")
    whole = load_run(tmp_path / "whole").entries[0]
    run_bench(RUN, Painter(), tmp_path / "parts", shard=Shard(1, 2))
    assert "shard 0/2 lacks" in load_run(tmp_path / "parts").entries[0].summary["partial"]
    assert "shard 0/2 lacks" in " ".join(page(tmp_path / "parts").text)
    run_bench(RUN, Painter(), tmp_path / "parts", shard=Shard(0, 2))
    summarise_run(tmp_path / "parts")
    for name in ("samples.jsonl", "summary.json"):
        parts = load_run(tmp_path / "parts").entries[0].folder.path / name
        assert parts.read_bytes() == (whole.folder.path / name).read_bytes()


def test_a_bench_may_have_metrics_of_its_own(out):
    def images_only(samples, correct_at):
        return {"overall": None, "tasks": {}, "images": None, "pictures": len(samples)}

    metrics = {
        entry.summary["key"]: entry.summary["metrics"] for entry in load_run(out, {"beauty": images_only}).entries
    }
    assert metrics["beauty"]["pictures"] == 20
    assert metrics["red_squares"]["overall"]["n"] == 20


def test_reading_writes_nothing(out):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    load_run(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


# ---------------------------------------------------------------------------------------------------------- terminal


def render(summaries, width=80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(summaries))
    return console.export_text()


def test_three_models_fit_into_eighty_columns(out):
    one = summarise_run(out)["tiny:base"]
    models = ("flow-opd:student", "flow-opd:geneval", "flow-opd:pickscore")
    text = render({model: {bench: {**of, "model": model} for bench, of in one.items()} for model in models})
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for summary in one.values():
        for task in ("overall", *summary["metrics"]["tasks"]):
            cell = summary["metrics"]["overall"] if task == "overall" else summary["metrics"]["tasks"][task]
            digits = 2 if summary["key"] == "beauty" else 3
            value, low, high = (f"{cell[end]:.{digits}f}" for end in ("value", "low", "high"))
            shown = f"{value} [{low}, {high}]"
            name = summary["key"] if task == "overall" else task
            assert any(line.split()[0] == name and line.count(shown) == 3 for line in text.splitlines() if line.strip())


def test_the_table_marks_partial_and_missing_results(out):
    text = render(summarise_run(out))
    assert re.search(r"red_squares .*\] +\d\.\d{3}\* \[\d\.\d{3}, \d\.\d{3}\]", text)
    assert "* tiny:student, red_squares: --limit 10" in text
    assert re.search(r"beauty +2\d\.\d\d \[2\d\.\d\d, 2\d\.\d\d\] +–", text)


def test_numbers_of_different_judges_do_not_share_a_row_or_a_table(tmp_path):
    """A picture may be judged by another rule later, and a second model by another one than the first."""
    prompts = tuple(PROMPTS[:4])
    for model, judge in (("a", Judge()), ("b", Judge(version=2)), ("c", Judge())):
        run_bench(replace(RUN, prompts=prompts, scorer=judge), Named(model), tmp_path)
    summaries = summarise_run(tmp_path)
    groups = by_judge([benches["squares"] for benches in summaries.values()])
    assert [[s["model"] for s in shown] for shown in groups.values()] == [["a", "c"], ["b"]]
    rows = [line for line in render(summaries, width=120).splitlines() if line.startswith("red_squares")]
    assert len(rows) == len(set(rows)) == 2
    assert [row.count("[") for row in rows] == [2, 1]
    text = " ".join(page(tmp_path).text)
    assert all(label in text for label in groups)


def test_an_interval_at_the_end_of_the_scale_is_shown_as_it_is(tmp_path):
    class Never(Judge):
        def one(self, pixels, prompt):
            return Score(0.0)

    run_bench(replace(RUN, prompts=tuple(PROMPTS[:1]), scorer=Never()), Painter(), tmp_path)
    summaries = summarise_run(tmp_path)
    high = next(iter(summaries.values()))["squares"]["metrics"]["overall"]["high"]
    assert 0 < high < 1
    assert f"0.000 [0.000, {high:.3f}]" in render(summaries)


def test_the_terminal_gets_no_control_characters(tmp_path):
    prompts = (Prompt("a", "a", "\x1b[2Jcolors"),)
    run_bench(replace(RUN, key="\x1b]0;x\x07", prompts=prompts), Named("\x9b31m"), tmp_path)
    text = render(summarise_run(tmp_path))
    assert "[2Jcolors" in text
    assert all(character.isprintable() or character == "\n" for character in text)


def test_unscored_pictures_have_a_row(tmp_path):
    run_bench(replace(RUN, prompts=hostile_prompts(), scorer=Echo()), Painter(), tmp_path)
    assert re.search(r"unscored +2", render(summarise_run(tmp_path)))


# -------------------------------------------------------------------------------------------------------------- page


def test_the_page_says_what_was_evaluated_and_how_sure_it_is(out):
    text = re.sub(r"\s+", " ", " ".join(page(out).text))
    assert "the built-in miniature, not SD3.5" in text
    assert "Partial: tiny:student on red_squares: --limit 10" in re.sub(r"\s+:", ":", text)
    for entry in load_run(out).entries:
        for cell in (entry.summary["metrics"]["overall"], *entry.summary["metrics"]["tasks"].values()):
            assert f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}] {cell['n']}" in text
        assert entry.summary["prompts_sha256"] in text


def test_bars_and_whiskers_stand_where_the_numbers_are(out):
    found = page(out)
    styles = [(attrs["class"], attrs["style"]) for tag, attrs in found.tags if attrs.get("class") in ("bar", "whisker")]
    overall = load_run(out).entries[0].summary["metrics"]["overall"]
    assert styles[0] == ("bar", f"width:{100 * overall['value']:.2f}%;background:var(--m0)")
    width = 100 * (overall["high"] - overall["low"])
    assert styles[1] == ("whisker", f"left:{100 * overall['low']:.2f}%;width:{width:.2f}%")


def test_a_metric_beyond_shares_is_shown_by_points_within_its_range(out):
    places = [
        float(re.match(r"left:(-?[\d.]+)%", attrs["style"])[1])
        for _, attrs in page(out).tags
        if attrs.get("class") == "mark"
    ]
    assert len(places) == 3
    assert all(0 < place < 100 for place in places)


def test_the_gallery_shows_failures_first_beside_their_pictures(out):
    gallery = page(out).gallery
    assert [one["title"] for one in gallery] == [
        "tiny:base on red_squares",
        "tiny:student on red_squares",
        "tiny:base on beauty",
    ]
    for one, entry in zip(gallery, load_run(out).entries, strict=True):
        assert len(one["cards"]) == 20
        for card in one["cards"]:
            assert (out / unquote(one["folder"]) / unquote(card["file"])).is_file()
        if entry.summary["key"] == "red_squares":
            verdicts = [card["verdict"] for card in one["cards"]]
            assert verdicts == ["wrong"] * verdicts.count("wrong") + ["right"] * verdicts.count("right")
            assert 0 < verdicts.count("wrong") < 20
        else:
            scores = [card["score"] for card in one["cards"]]
            assert scores == sorted(scores)


def test_unscored_pictures_stand_between_wrong_and_right(tmp_path):
    class Blinking(Judge):
        def one(self, pixels, prompt):
            return super().one(pixels, prompt) if prompt.task == "colors" else Score(None, error="blinked")

    run_bench(replace(RUN, scorer=Blinking()), Painter(), tmp_path)
    order = [card["verdict"] for card in page(tmp_path).gallery[0]["cards"]]
    assert list(dict.fromkeys(order)) == ["wrong", "unscored", "right"]
    assert order == sorted(order, key=("wrong", "unscored", "right").index)


def test_the_page_needs_no_network(out):
    found = page(out)
    policy = next(attrs["content"] for tag, attrs in found.tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")
    for tag, attrs in found.tags:
        assert tag not in ("link", "iframe", "object", "base")
        assert "src" not in attrs
        assert not any(name.startswith("on") for name in attrs)
    urls = re.findall(r"https?://[^\s\"']+", write_report(out).read_text())
    assert set(urls) <= {"http://www.w3.org/2000/svg"}  # the name of a namespace


def hostile_prompts() -> tuple[Prompt, ...]:
    return tuple(Prompt(f"{text}{i}", text, text) for i, text in enumerate(HOSTILE))


def test_hostile_text_stays_text(tmp_path):
    run = replace(RUN, key=HOSTILE[0], prompts=hostile_prompts(), scorer=Echo(), partial=HOSTILE[1])
    run_bench(run, Named(HOSTILE[2]), tmp_path, note=HOSTILE[1])
    found = page(tmp_path)
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert [tag for tag, _ in found.tags].count("img") == 0
    shown = " ".join(found.text)
    for text in HOSTILE:
        assert text in shown, "tasks stand in the table as they are"
    cards = {card["id"]: card for card in found.gallery[0]["cards"] if card["picture"].startswith("picture 0")}
    for i, text in enumerate(HOSTILE):
        card = cards[f"{text}{i}"]
        assert (card["prompt"], card["task"]) == (text, text)
        assert card["reason"] == (f"ValueError: {text}" if i == 4 else text)
        assert card["boxes"] == ([] if i == 4 else [{"box": [1, 2, 5, 6], "label": f"{text} {text} 0.50"}])
    source = found.scripts[0]
    assert not set("<>&\u2028\u2029") & set(source)
    assert "innerHTML" not in found.scripts[1]


# -------------------------------------------------------------------------------------------------------- small parts


@pytest.mark.parametrize(
    ("score", "correct_at", "expected"),
    [(None, 1.0, "unscored"), (1.0, 1.0, "right"), (0.99, 1.0, "wrong"), (0.0, 1.0, "wrong"), (21.0, None, "scored")],
)
def test_verdicts(score, correct_at, expected):
    assert verdict(Sample("a", 0, "t", "p", 1, "samples/a.png", "", score), correct_at) == expected


def test_boxes_of_both_kinds_of_detail():
    detections = [{"label": "star", "box": [1, 2, 3.5, 4], "score": 0.876, "colour": "red"}]
    assert boxes({"detections": detections}) == [{"box": [1.0, 2.0, 3.5, 4.0], "label": "red star 0.88"}]
    geneval = {"boxes": {"cat": [[1, 2, 3, 4, 0.9], [5, 6, 7, 8, 0.8]]}, "colours": {"cat": ["black"]}}
    assert [box["label"] for box in boxes(geneval)] == ["black cat 0.90", "cat 0.80"]


@pytest.mark.parametrize(
    "detail",
    [
        {"detections": "star"},
        {
            "detections": [
                None,
                {"label": "star"},
                {"box": [1, 2, 3]},
                {"box": ["1", 2, 3, 4]},
                {"box": [1, 2, 3, 1e999]},
            ]
        },
        {"boxes": [1, 2]},
        {"boxes": {"cat": [[1, 2, 3, "<", 0.5], None, [1, 2]], "dog": 3}, "colours": 7},
    ],
)
def test_ill_formed_boxes_are_left_out(detail):
    assert boxes(detail) == []


# ------------------------------------------------------------------------------------------------------ hostile runs


@pytest.fixture
def small(tmp_path):
    run_bench(replace(RUN, prompts=PROMPTS[:1]), Painter(), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"file": "../../../secret.png"}, "does not lie inside the run"),
        ({"file": "/etc/passwd"}, "does not lie inside the run"),
        ({"score": "1"}, "line 1 is not a sample"),
        ({"k": None}, "line 1 is not a sample"),
        ({"detail": [1]}, "line 1 is not a sample"),
    ],
)
def test_samples_that_lie_are_refused_with_file_and_line(small, change, match):
    path = small / "painter-base/squares/samples.jsonl"
    found = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(found[0]), **change}), *found[1:], ""]))
    with pytest.raises(RequestError, match=match) as refusal:
        write_report(small)
    assert f"{path}, line 1" in str(refusal.value)
    assert not (small / "report.html").exists()


def test_prompts_that_were_exchanged_are_refused(small):
    path = small / "painter-base/squares/prompts.jsonl"
    path.write_text(path.read_text().replace("cats", "dogs"))
    with pytest.raises(RequestError, match=r"prompts\.jsonl is missing or not the file of this run"):
        load_run(small)


@pytest.mark.parametrize("change", [{"samples": "2"}, {"batch_size": None}, {"generator": []}, {"seed": {}}])
def test_a_request_of_the_wrong_types_is_refused(small, change):
    run = store.read_run(small)
    run["runs"]["painter-base/squares"]["request"].update(change)
    (small / "run.json").write_text(json.dumps(run))
    with pytest.raises(RequestError, match=f"as {next(iter(change))} of painter-base/squares"):
        load_run(small)


def test_a_link_out_of_the_run_is_refused(small):
    (small / "secret.png").write_bytes(b"secret")
    path = small / "painter-base/squares/samples/00000-00.png"
    path.unlink()
    path.symlink_to(small / "secret.png")
    with pytest.raises(RequestError, match="leads outside the run"):
        write_report(small)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(RequestError, match="holds no run"):
        write_report(tmp_path)
