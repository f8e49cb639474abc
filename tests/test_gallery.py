"""Models side by side: rows that agree with the files, addresses that lead to the pictures, text that stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from painting import PROMPTS, RUN, Judge, Painter
from PIL import Image

from flowopd_eval import store
from flowopd_eval.compare import compare_runs
from flowopd_eval.errors import RequestError
from flowopd_eval.gallery import write_gallery
from flowopd_eval.harness import claim, plan, request_of, run_bench
from flowopd_eval.records import Prompt, Sample, Score
from flowopd_eval.store import BenchFolder

# What each model gets right: both pictures of prompts p0 to p9. Even prompts are counting, odd ones colors.
BASE = ["00", "10", "11", "11", "00", "01", "10", "00", "11", "00"]
MIXED = ["11", "11", "00", "10", "00", "01", "01", "00", "11", "00"]
LATER = ["01", "10", "11", "11", "00", "11", "10", "00", "11", "10"]
RIGHTS = {"base": BASE, "mixed": MIXED, "later": LATER}
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    '"><script>alert(2)</script>',
    "<!-- <script> ]]> {{ 7*7 }} {% raw %}",
    "'; alert(4) //  \u2028 \u2029 \u202e &lt;b&gt; \\u003c",
)
QUOTED = """model "one" o'clock <b>"""


class Model(Painter):
    """Draws red (right) or blue pictures as told."""

    def __init__(self, name: str, right: list[str]):
        super().__init__()
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


class Echo(Judge):
    """Says the prompt back as the reason, and as the error on one of its two pictures."""

    def one(self, pixels, prompt):
        if pixels[0, 0, 0] > 100:
            raise ValueError(prompt.prompt)
        return Score(0.0, prompt.prompt)


AESTHETIC = replace(RUN, bench="beauty", key="beauty", scorer=Aesthete(), correct_at=None)


def draw(out: Path, name: str, run=RUN, right: list[str] | None = None) -> Path:
    run_bench(run, Model(name, right or RIGHTS[name.removeprefix("model:")]), out)
    return out


class Page(HTMLParser):
    """What a browser would make of the page: its tags with attributes, its text, and its scripts."""

    def __init__(self, file: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def galleries(self) -> list[dict]:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs by name; ``mixed`` could not be judged on p8, ``later`` not on p8 and p9."""
    home = tmp_path_factory.mktemp("runs #1 %41")
    blind = {"base": (), "mixed": ("p8",), "later": ("p8", "p9")}
    return {name: draw(home / f"{name}?", f"model:{name}", replace(RUN, scorer=Blind(*blind[name]))) for name in RIGHTS}


@pytest.fixture(scope="module")
def file(runs, tmp_path_factory):
    """The page of all three, far from the runs."""
    return write_gallery(list(runs.values()), tmp_path_factory.mktemp("pages") / "a b" / "c#d" / "side.html")


def lines(out: Path) -> dict[tuple[str, int], dict]:
    """The samples straight from the file, by prompt id and ``k``."""
    (path,) = out.glob("*/squares/samples.jsonl")
    return {(s["id"], s["k"]): s for s in map(json.loads, path.read_text().splitlines())}


def picture_of(file: Path, model: dict, cell: dict) -> Path:
    """Where a browser that shows ``file`` looks for a picture."""
    return Path(unquote(urlsplit(urljoin(file.as_uri(), model["folder"] + cell["file"])).path))


# -------------------------------------------------------------------------------------------------------------- rows


def test_rows_and_disagreements_are_those_of_the_files(runs, file):
    (gallery,) = Page(file).galleries
    assert [(m["letter"], m["label"]) for m in gallery["models"]] == [
        ("A", "model:base"),
        ("B", "model:mixed"),
        ("C", "model:later"),
    ]
    read = [lines(out) for out in runs.values()]
    told = {None: "unscored", 0.0: "wrong", 1.0: "right"}
    expected = {}
    for key, sample in read[0].items():
        scores = [own[key]["score"] for own in read]
        moves = {("right", "wrong"): "fell", ("wrong", "right"): "rose"}
        verdicts = [told[score] for score in scores]
        changes = [moves.get((verdicts[0], verdict), "") for verdict in verdicts]
        place = f"{sample['id']}, picture {key[1]}, seed {sample['seed']}"
        expected[place] = (sample["prompt"], sample["task"], verdicts, changes, {0.0, 1.0} <= set(scores))
    found = {
        f"{row['id']}, {row['picture']}": (
            row["prompt"],
            row["task"],
            [cell["verdict"] for cell in row["cells"]],
            [cell["change"] for cell in row["cells"]],
            row["disagree"],
        )
        for row in gallery["rows"]
    }
    assert len(gallery["rows"]) == 20
    assert found == expected
    differing = [row["disagree"] for row in gallery["rows"]]
    assert differing == [True] * sum(differing) + [False] * (20 - sum(differing)), "disagreements come first"
    text = Page(file).text
    for place, letter in ((1, "B"), (2, "C")):
        fell, rose = (sum(row[3][place] == change for row in expected.values()) for change in ("fell", "rose"))
        assert (
            f"Pictures: {fell} right in A and wrong in {letter}, {rose} wrong in A and right in {letter}, of 20" in text
        )


def test_a_disagreement_needs_not_the_baseline(tmp_path):
    prompts = [p.id for p in PROMPTS]
    scorers = {"base": Blind(*prompts[:2]), "mixed": Judge(), "later": Judge()}
    outs = [draw(tmp_path / n, f"model:{n}", replace(RUN, scorer=scorer)) for n, scorer in scorers.items()]
    (gallery,) = Page(write_gallery(outs, tmp_path / "page.html")).galleries
    rows = {(row["id"], row["picture"].split(",")[0]): row for row in gallery["rows"]}
    row = rows["p0", "picture 0"]
    assert [cell["verdict"] for cell in row["cells"]] == ["unscored", "right", "wrong"]
    assert [cell["change"] for cell in row["cells"]] == ["", "", ""]
    assert row["disagree"]
    assert not rows["p0", "picture 1"]["disagree"], "right by B and C"


def test_pictures_without_a_score_are_shown_with_the_reason_and_counted_as_neither(file):
    rows = [row for row in Page(file).galleries[0]["rows"] if row["id"] == "p8"]
    assert len(rows) == 2
    for row in rows:
        assert [cell["verdict"] for cell in row["cells"]] == ["right", "unscored", "unscored"]
        assert [cell["score"] for cell in row["cells"]] == [1.0, None, None]
        assert [cell["reason"] for cell in row["cells"]] == ["", "too dark", "too dark"]
        assert [cell["change"] for cell in row["cells"]] == ["", "", ""]
    assert "Left out: 4 pairs, as 0 pictures of A and 4 of C have no score." in Page(file).text


def test_a_metric_of_its_own_scale_is_told_by_higher_and_lower(tmp_path):
    outs = [draw(tmp_path / name, f"model:{name}", AESTHETIC) for name in ("base", "mixed")]
    page = Page(write_gallery(outs, tmp_path / "page.html"))
    (gallery,) = page.galleries
    assert not gallery["marked"]
    right = {f"p{i}, picture {k}": [side[i][k] for side in (BASE, MIXED)] for i in range(10) for k in range(2)}
    named = {("1", "0"): "fell", ("0", "1"): "rose", ("0", "0"): "", ("1", "1"): ""}
    for row in gallery["rows"]:
        digits = right[f"{row['id']}, {row['picture'].split(',')[0]}"]
        assert [cell["verdict"] for cell in row["cells"]] == ["scored", "scored"]
        assert [cell["score"] for cell in row["cells"]] == [22.0 if digit == "1" else 20.0 for digit in digits]
        assert row["cells"][1]["change"] == named[tuple(digits)]
    assert "Pictures: 4 lower in B, 4 higher, of 20." in page.text


def test_models_keep_their_letter_where_they_do_not_share_every_metric(tmp_path):
    a = draw(draw(tmp_path / "a", "model:base"), "model:base", AESTHETIC)
    b = draw(tmp_path / "b", "model:mixed")
    c = draw(tmp_path / "c", "model:later", AESTHETIC)
    page = Page(write_gallery([a, b, c], tmp_path / "page.html"))
    letters = {one["key"]: [model["letter"] for model in one["models"]] for one in page.galleries}
    assert letters == {"red_squares": ["A", "B"], "beauty": ["A", "C"]}
    assert "red_squares: B against A" in page.text
    assert "beauty: C against A" in page.text
    assert "Pictures: 0 lower in C, 3 higher, of 20." in page.text
    assert "Only model:base has beauty: not compared." in page.text


# ---------------------------------------------------------------------------------------------------------- pictures


def test_addresses_lead_from_the_page_to_the_pictures_of_each_model(runs, file):
    (gallery,) = Page(file).galleries
    read = [lines(out) for out in runs.values()]
    for row in gallery["rows"]:
        k = int(re.match(r"picture (\d+)", row["picture"])[1])
        for model, cell, own in zip(gallery["models"], row["cells"], read, strict=True):
            path = picture_of(file, model, cell)
            assert hashlib.sha256(path.read_bytes()).hexdigest() == own[row["id"], k]["sha256"]
    assert [model["folder"].count("../") for model in gallery["models"]] == [3, 3, 3]


def test_a_page_beside_the_run_and_one_named_from_where_one_stands(tmp_path, monkeypatch):
    for name in ("base", "mixed"):
        draw(tmp_path / "run", f"model:{name}")
    monkeypatch.chdir(tmp_path / "run")
    for given in (Path("page.html"), tmp_path / "run" / "page.html"):
        (gallery,) = Page(write_gallery([Path()], given)).galleries
        assert [model["folder"] for model in gallery["models"]] == ["./model-base/squares/", "./model-mixed/squares/"]


# -------------------------------------------------------------------------------------------------------------- page


def test_the_page_tells_every_difference_with_its_interval(runs, file):
    text = Page(file).text
    for comparison in compare_runs(list(runs.values())).comparisons:
        assert comparison.sentence in text
        assert all(warning in text for warning in comparison.warnings)
        for row in (comparison.overall, *comparison.tasks):
            a, b, low, high = (100 * x for x in (row.a.value, row.b.value, row.difference.low, row.difference.high))
            sign = "+" if row.difference.value > 0 else ""
            shown = f"{row.name} {a:.1f} {b:.1f} {sign}{100 * row.difference.value:.1f} {low:.1f} to {high:.1f}"
            assert f"{shown} {row.prompts}" in text.replace("-0.0", "0.0")
    assert "their intervals are not corrected" in text


def test_marks_and_whiskers_stand_where_the_numbers_are(runs, file):
    comparison = compare_runs(list(runs.values())).comparisons[0]
    ends = [end for row in (comparison.overall, *comparison.tasks) for end in (row.difference.low, row.difference.high)]
    difference, reach = comparison.overall.difference, max(map(abs, ends))
    styles = [(a["class"], a["style"]) for _, a in Page(file).tags if a.get("class") in ("mark", "whisker")]
    assert styles[0] == ("mark", f"left:{50 + 50 * difference.value / reach:.2f}%;background:var(--m1)")
    width = 50 * (difference.high - difference.low) / reach
    assert styles[1] == ("whisker", f"left:{50 + 50 * difference.low / reach:.2f}%;width:{width:.2f}%")


def test_the_page_needs_no_network_and_runs_its_own_script_only(file):
    page = Page(file)
    policy = next(attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src 'self' file:;")
    own = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{own}'" in policy
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "base", "img")
        assert "src" not in attrs
        assert not any(name.startswith("on") for name in attrs)
    assert not re.findall(r"https?://", file.read_text())


def test_hostile_text_stays_text(tmp_path):
    prompts = tuple(Prompt(f"{text}{i}", text, text) for i, text in enumerate(HOSTILE))
    run = replace(RUN, key=HOSTILE[1], prompts=prompts, scorer=Echo())
    red = {prompt.seed(run.seed, 0) for prompt in prompts}
    for name in (QUOTED, HOSTILE[0]):
        model = Model(name, BASE)
        model.red = red
        run_bench(run, model, tmp_path / "run", note=HOSTILE[2])
    file = write_gallery([tmp_path / "run"], tmp_path / "page.html")
    page = Page(file)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert [tag for tag, _ in page.tags].count("img") == 0
    shown = " ".join(page.words)
    for text in (*HOSTILE, QUOTED):
        assert text in shown, "tasks, names and notes stand on the page as they are"
    (gallery,) = page.galleries
    assert [model["label"] for model in gallery["models"]] == [QUOTED, HOSTILE[0]]
    assert len(gallery["rows"]) == 2 * len(HOSTILE)
    for row in gallery["rows"]:
        assert row["prompt"] == row["task"] == row["id"][:-1]
        reason = f"ValueError: {row['prompt']}" if row["picture"].startswith("picture 0") else row["prompt"]
        assert [cell["reason"] for cell in row["cells"]] == [reason, reason]
    assert not set("<>&'\u2028\u2029") & set(page.scripts[0])
    assert "innerHTML" not in page.scripts[1]


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["../../../secret.png", "/etc/passwd", "samples/../../x.png", "c:\\x.png"])
def test_pictures_outside_the_run_are_refused(tmp_path, name):
    a, b = (draw(tmp_path / side, f"model:{side}") for side in ("base", "mixed"))
    path = b / "model-mixed/squares/samples.jsonl"
    found = path.read_text().splitlines()
    path.write_text("\n".join([found[0], json.dumps({**json.loads(found[1]), "file": name}), *found[2:], ""]))
    with pytest.raises(RequestError, match=r"line 2 names the picture .* does not lie inside the run"):
        write_gallery([a, b], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_what_compare_refuses_is_not_shown(runs, tmp_path):
    b = draw(tmp_path / "b", "model:mixed", replace(RUN, seed=8))
    with pytest.raises(RequestError, match="seed: 7 in model:base, 8 in model:mixed"):
        write_gallery([runs["base"], b], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


# -------------------------------------------------------------------------------------------------------------- size


def large_run(out: Path, name: str, rights: list[bool]) -> Path:
    """A run of as many pictures, two a prompt; all are links to one."""
    prompts = tuple(Prompt(f"p{i}", f"a photo of {i} cats", "counting") for i in range(len(rights) // 2))
    run = replace(RUN, prompts=prompts)
    request = request_of(run, Model(name, BASE).identity(), Judge().identity())
    folder = BenchFolder.of(out, name, run.bench)
    claim(folder, request, prompts, "")
    (folder.path / "samples").mkdir()
    sha256 = store.write_picture(out / "one.png", Image.new("RGB", (8, 8)))
    items = [item for batch in plan(prompts, 2, run.seed, run.batch_size) for item in batch]
    for item in items:
        os.link(out / "one.png", folder.path / item.file)
    samples = [
        Sample(i.prompt.id, i.k, i.prompt.task, i.prompt.prompt, i.seed, i.file, sha256, float(right), "as told")
        for i, right in zip(items, rights, strict=True)
    ]
    store.write_atomic(folder.samples, b"".join(store.json_line(sample.to_json()) for sample in samples))
    return out


def test_two_thousand_rows_make_a_small_page_without_pictures_in_it(tmp_path):
    rights = [[i % 3 == 0 for i in range(2000)], [i % 5 == 0 for i in range(2000)]]
    outs = [large_run(tmp_path / name, f"model:{name}", own) for name, own in zip("ab", rights, strict=True)]
    begin = time.process_time()
    file = write_gallery(outs, tmp_path / "page.html")
    assert time.process_time() - begin < 15
    page = Page(file)
    assert len(page.galleries[0]["rows"]) == 2000
    counts = [sum(row["cells"][1]["change"] == kind for row in page.galleries[0]["rows"]) for kind in ("fell", "rose")]
    assert counts == [sum(a and not b for a, b in zip(*rights)), sum(b and not a for a, b in zip(*rights))]
    assert f"Pictures: {counts[0]} right in A and wrong in B" in page.text
    assert "data:" not in file.read_text()
    assert [tag for tag, _ in page.tags].count("img") == 0
    assert file.stat().st_size < 1_500_000
