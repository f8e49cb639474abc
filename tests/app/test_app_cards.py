"""The page's own HTML without a page: boxes' numbers, earlier pictures, parts of a run, commands in a reason."""

import re
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest
from painting import PROMPTS, RUN, Painter
from PIL import Image

from app import cards
from app.judging import Seat
from app.session import Arm, Drawn
from flowopd_eval.harness import run_bench

WIDE = 7.0  # percent of a picture that a number is wide


def numbers(*boxes):
    """Where the numbers of boxes stand in a picture 100 pixels wide: left and top in percent."""
    marks = [{"box": list(box), "label": "red star 0.9"} for box in boxes]
    html = cards.framed(Image.new("RGB", (100, 100)), "a star", marks)
    found = re.findall(r'<i class="number c\d" style="left:([\d.-]+)%;top:([\d.-]+)%">(\d+)</i>', html)
    assert [int(number) for *_, number in found] == list(range(1, len(boxes) + 1))
    return [(float(left), float(top)) for left, top, _ in found]


def apart(one, other):
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) >= WIDE


def test_a_box_alone_has_its_number_at_its_corner():
    assert numbers((20, 30, 60, 70)) == [(20, 30)]


@pytest.mark.parametrize(
    ("box", "corner"), [((97, 98, 100, 100), (93, 93)), ((-5, -9, 40, 40), (0, 0)), ((50, 60, 500, 600), (50, 60))]
)
def test_a_number_stays_within_the_picture(box, corner):
    assert numbers(box) == [corner]


def test_numbers_of_one_place_take_the_corners_then_the_edges_and_cover_none():
    box = (20, 30, 60, 70)
    found = numbers(*[box] * 8)
    assert found[:4] == [(20, 30), (53, 30), (20, 63), (53, 63)]
    assert all(apart(*pair) for pair in combinations(found, 2))
    assert all(top == 30 or left in (20, 53) for left, top in found)


def test_where_the_corners_are_taken_numbers_go_along_the_edges():
    assert numbers(*[(10, 90, 80, 97)] * 4) == [(10, 90), (73, 90), (17, 90), (24, 90)]
    assert numbers(*[(90, 10, 97, 80)] * 4) == [(90, 10), (90, 73), (90, 17), (90, 24)]


def test_a_number_makes_way_for_another_boxs_alone():
    assert numbers((20, 30, 60, 70), (26, 36, 60, 70)) == [(20, 30), (53, 36)]  # they would overlap
    assert numbers((20, 30, 60, 70), (27, 30, 60, 70)) == [(20, 30), (27, 30)]  # side by side
    assert numbers((20, 30, 60, 70), (20, 37, 60, 70)) == [(20, 30), (20, 37)]  # one below the other


def test_where_no_place_is_left_the_number_is_at_its_corner():
    assert numbers(*[(20, 30, 60, 70)] * 60)[-1] == (20, 30)


def test_boxes_of_one_name_have_one_colour_however_sure_the_judge_is():
    marks = [{"box": [0, 0, 9, 9], "label": label} for label in ("red star 0.9", "red star 0.4", "blue star 0.9")]
    html = cards.framed(Image.new("RGB", (64, 64)), "stars", marks)
    assert re.findall(r'class="box (c\d)"', html) == ["c0", "c0", "c1"]


ARM = Arm("base", None, "the base")
ONE = Drawn("base", Image.new("RGB", (8, 8)), identity={"sampling": {"steps": 3, "guidance": 1.0}}, seed=5, seconds=1.0)


def test_earlier_pictures_are_told_from_those_of_now():
    now = cards.comparison("a star", [ARM], [ONE], [], drawing=False)
    before = cards.comparison("a star", [ARM], [ONE], [], drawing=False, earlier="Drawn earlier: <a star>, seed 5")
    assert '<section class="results"' in now
    assert "Drawn earlier" not in now
    assert '<section class="results earlier"' in before
    assert before.index("Drawn earlier: &lt;a star&gt;, seed 5") < before.index("<img")


def test_what_is_refused_leaves_the_earlier_pictures_named_as_such(session, tmp_path):
    gradio = pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'flowopd-eval[app]'")
    from app.compare_tab import CompareTab
    from app.wanted import wanted

    request = wanted({"prompt": "a red star", "seed": 5, "arms": ["base"]})
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    with gradio.Blocks():
        tab = CompareTab(session)
    refused = [values for values in tab.compare("", 5, ["base"], True, 1, True, 1.0, 64, (request, [ONE]))]
    assert len(refused) == 1
    for status, grid in (
        refused[0][:2],
        [tab.restore(str(tmp_path / "foreign.png"), (request, [ONE]))[place] for place in (0, -1)],
    ):
        assert 'class="notice bad"' in status
        assert '"results earlier"' in grid
        assert "Drawn earlier: a red star, seed 5" in grid
    nothing = tab.restore(str(tmp_path / "foreign.png"), None)
    assert nothing[-1] == gradio.skip()


@pytest.fixture
def part(tmp_path):
    """A folder with a run of which one of two models drew a part of the bench."""

    class Student(Painter):
        def identity(self):
            return {**super().identity(), "model": "painter:student"}

    run_bench(RUN, Painter(), tmp_path / "run")
    run_bench(replace(RUN, prompts=PROMPTS[:4], partial="--limit 4"), Student(), tmp_path / "run")
    return tmp_path


def test_a_run_drawn_in_part_says_so_and_shows_no_difference(part):
    gradio = pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'flowopd-eval[app]'")
    from app.runs import Runs
    from app.runs_tab import RunsTab

    with gradio.Blocks():
        page = RunsTab(Runs(part)).open("run")[0]
    words = re.sub(r"<[^>]+>", "\n", page)
    assert "Partial. painter:student: --limit 4\n" in words
    assert "only a part was drawn of painter:student on red_squares (--limit 4)." in words
    assert "Evaluate again without --limit and --tasks into another --out." in words
    assert 'class="differences"' not in page


@pytest.mark.parametrize(
    ("reason", "html"),
    [
        (
            "To have it: `hf download a/b --quiet`, <then> again.",
            "To have it: <code><span>hf</span> <span>download</span> <span>a/b</span> <span>--quiet</span></code>, "
            "&lt;then&gt; again.",
        ),
        ("`one` or `two`", "<code><span>one</span></code> or <code><span>two</span></code>"),
        ("`<script>`", "<code><span>&lt;script&gt;</span></code>"),
        ("an unpaired ` stays", "an unpaired ` stays"),
        ("`a` and ` stay", "`a` and ` stay"),
        ("no command", "no command"),
    ],
)
def test_a_reasons_commands_are_code_whose_options_are_whole(reason, html):
    seats = [Seat("preference", None, None, reason), Seat("geneval", None, SimpleNamespace())]
    shown = cards.comparison("a star", [ARM], [ONE], seats, drawing=False)
    assert f"<summary>Not judged: PickScore</summary><ul><li><b>PickScore</b>: {html}</li></ul>" in shown


def test_an_interval_is_one_piece_of_its_cell_and_a_name_is_none():
    html = cards.table(["", "tiny:base"], [["overall", "0.495 [0.455, 0.535]"], ["n", "<7>"]], "A table")
    assert "<td>0.495 <span>[0.455, 0.535]</span></td>" in html
    assert "<td>&lt;7&gt;</td>" in html
    assert '<th scope="col">tiny:<wbr>base</th>' in html
