"""The page in a real Chromium, used as a person would: everything once; what cheaper tests cover, too, is slow."""

import csv
import json
import shutil
import threading
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'flowopd-eval[app]'")
SECOND = 1000
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture
def page(server, browser, request):
    """A fresh visitor's page; anything it asks of another host, or any error of its scripts, fails the test."""
    settings = getattr(request, "param", {})
    context = browser.new_context(viewport=WIDE, accept_downloads=True, **settings)
    visited = context.new_page()
    outward, errors = [], []
    visited.on("request", lambda one: outward.append(one.url) if "127.0.0.1" not in one.url else None)
    visited.on("pageerror", lambda one: errors.append(str(one)))
    visited.set_default_timeout(60 * SECOND)
    visited.goto(server)
    visited.wait_for_selector("#draw")
    yield visited
    context.close()
    assert [url for url in outward if not url.startswith(("data:", "blob:"))] == []
    assert errors == []


def choose(page, *names):
    for name in ("base", "student", "geneval", "ocr"):
        page.locator("#arms label", has_text=name).locator("input").set_checked(name in names)


def few_steps(page, steps=2):
    page.get_by_role("button", name="Settings").first.click()
    page.get_by_label("Each model's own number of steps").uncheck()
    page.get_by_label("number input for Steps for all").fill(str(steps))
    page.get_by_label("number input for Steps for all").press("Tab")


def drawn(page, count):
    page.wait_for_function(f"document.querySelectorAll('#grid .frame img').length == {count}")
    page.wait_for_selector("#save:visible")


def pick(page, where, name):
    page.locator(f"{where} input").click()
    page.get_by_role("option", name=name, exact=True).click()


def second(page, server):
    """Another visitor, in the same browser."""
    other = page.context.browser.new_context(viewport=WIDE)
    visitor = other.new_page()
    visitor.set_default_timeout(60 * SECOND)
    visitor.goto(server)
    visitor.wait_for_selector("#draw")
    return visitor


def assert_evenly_spaced(page):
    """The pictures of the gallery's full rows: the same columns, the same gaps, as much left as right."""
    page.wait_for_function("document.querySelectorAll('#gallery button img').length == 24")
    grid, *boxes = page.evaluate("""() => [document.querySelector('#gallery .grid-container'),
      ...document.querySelectorAll('#gallery .grid-container button')].map(e => e.getBoundingClientRect().toJSON())""")
    rows = [[box for box in boxes if box["top"] == top] for top in sorted({box["top"] for box in boxes})]
    full = [row for row in rows if len(row) == len(rows[0])]
    assert len(rows[0]) >= 4
    assert len(full) >= 2
    for row in full:
        gaps = [b["left"] - a["right"] for a, b in pairwise(row)]
        edges = [row[0]["left"] - grid["left"], grid["right"] - row[-1]["right"]]
        assert max(gaps) - min(gaps) <= 1
        assert abs(edges[0] - edges[1]) <= 1
        assert min(gaps) > 0
        assert [box["left"] for box in row] == [box["left"] for box in full[0]]


def drawing():
    return [thread for thread in threading.enumerate() if thread.name == "drawing"]


def test_the_first_page_says_what_it_is_and_what_to_do(page):
    assert "Toy model: the same code at 1/550 of the size" in page.inner_text("header")
    assert "No pictures yet" in page.inner_text("#grid")
    assert page.title().startswith("Flow-OPD")


def test_pictures_come_one_by_one_with_scores_and_the_best_marked(page):
    choose(page, "base", "ocr")
    page.click("#draw")
    page.wait_for_selector("#status progress")
    page.wait_for_selector("#grid .frame.now")
    page.wait_for_function("document.querySelectorAll('#grid .frame img').length == 1")
    assert "Drawing" in page.inner_text("#grid")  # the second is still on its way
    drawn(page, 2)
    assert page.locator("#grid .arm h3").all_inner_texts() == ["base", "ocr"]
    for card in page.locator("#grid .arm").all():
        assert "GenEval" in card.inner_text()
        assert "20 steps · guidance 4.5" in card.inner_text()
    assert page.locator("#grid .badge").count() >= 1
    assert "Not judged: Text, PickScore" in page.inner_text("#grid")


def test_small_pictures_are_enlarged_by_whole_numbers(page):
    choose(page, "base")
    few_steps(page)
    for viewport in (WIDE, PHONE):
        page.set_viewport_size(viewport)
        if viewport is WIDE:
            page.click("#draw")
            drawn(page, 1)
        size = page.eval_on_selector("#grid .frame img", "e => [e.clientWidth, e.clientHeight]")
        assert size[0] == size[1] > 64
        assert size[0] % 64 == 0
    assert page.eval_on_selector("#grid .frame img", "e => getComputedStyle(e).imageRendering") == "pixelated"


def test_boxes_are_drawn_and_can_be_hidden(page):
    choose(page, "base")
    page.click("#draw")
    drawn(page, 1)
    boxes = page.locator("#grid .box")
    assert boxes.count() == 2
    assert boxes.first.is_visible()
    frame, box = page.locator("#grid .frame").bounding_box(), boxes.first.bounding_box()
    assert frame["x"] <= box["x"]
    assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 1
    page.get_by_label("Show what the judge saw").uncheck()
    assert not boxes.first.is_visible()


def test_any_two_lie_under_the_slider(page):
    choose(page, "base", "student", "ocr")
    few_steps(page, 1)
    page.click("#draw")
    drawn(page, 3)
    page.wait_for_function("document.querySelectorAll('#slider img').length == 2")
    before = [image.get_attribute("src") for image in page.locator("#slider img").all()]
    page.get_by_label("Right", exact=True).click()
    page.get_by_role("option", name="ocr").click()
    page.wait_for_function(
        f"![...document.querySelectorAll('#slider img')].some(e => e.src == {json.dumps(before[1])})"
    )
    after = [image.get_attribute("src") for image in page.locator("#slider img").all()]
    assert len(set(before + after)) == 3
    line = "parseFloat(document.querySelector('#slider img.fixed').style.clipPath.split(' ').at(-1))"
    page.wait_for_function(f"{line} == 50")
    page.locator("#line input[type=range]").press("End")  # the line itself cannot be reached by keyboard
    page.wait_for_function(f"{line} > 60")


def test_a_comparison_is_saved_and_its_png_restores_every_setting(page, tmp_path, server):
    page.locator("#prompt textarea").fill("a photo of a blue cross")
    page.get_by_label("Seed", exact=True).fill("1234")
    choose(page, "base", "geneval")
    few_steps(page, 3)
    page.click("#draw")
    drawn(page, 2)
    with page.expect_download() as download:
        page.locator("#save").click()
    file = tmp_path / "saved.png"
    download.value.save_as(file)
    assert np.asarray(Image.open(file)).shape[2] == 3
    page.goto(server)
    page.get_by_role("button", name="Restore a saved comparison").click()
    page.locator("#dropped input[type=file]").set_input_files(file)
    page.wait_for_selector("#status .good")
    assert page.locator("#prompt textarea").input_value() == "a photo of a blue cross"
    assert page.get_by_label("Seed", exact=True).input_value() == "1234"
    chosen = [label.inner_text().split(" ")[0] for label in page.locator("#arms label:has(input:checked)").all()]
    assert chosen == ["base", "geneval"]
    page.get_by_role("button", name="Settings").first.click()
    assert not page.get_by_label("Each model's own number of steps").is_checked()
    assert page.get_by_label("Each model's own guidance scale").is_checked()
    assert page.get_by_label("number input for Steps for all").input_value() == "3"


@pytest.mark.slow
def test_a_restored_comparison_says_which_model_is_another_here(page, tmp_path, monkeypatch, session):
    choose(page, "base", "geneval")
    few_steps(page, 1)
    page.click("#draw")
    drawn(page, 2)
    with page.expect_download() as download:
        page.locator("#save").click()
    download.value.save_as(tmp_path / "saved.png")
    other = replace(session.arms["geneval"], spec=session.arms["ocr"].spec)
    monkeypatch.setitem(session.arms, "geneval", other)
    page.get_by_role("button", name="Restore a saved comparison").click()
    page.locator("#dropped input[type=file]").set_input_files(tmp_path / "saved.png")
    page.wait_for_selector("#status .bad")
    assert page.inner_text("#status") == (
        "Settings restored. Here geneval is another model than the one that drew then: its picture will be another. "
        "Draw to see the others again."
    )


@pytest.mark.slow
def test_a_foreign_png_is_a_message_and_changes_nothing(page, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    page.locator("#prompt textarea").fill("kept")
    page.get_by_role("button", name="Restore a saved comparison").click()
    page.locator("#dropped input[type=file]").set_input_files(tmp_path / "foreign.png")
    page.wait_for_selector("#status .bad")
    assert "carries no settings" in page.inner_text("#status")
    assert page.locator("#prompt textarea").input_value() == "kept"


@pytest.mark.slow
def test_an_empty_prompt_and_no_model_are_messages(page):
    page.locator("#prompt textarea").fill("   ")
    choose(page)
    page.click("#draw")
    page.wait_for_selector("#status .bad")
    assert page.inner_text("#status").startswith("Prompt: write something. Models: choose at least one.")


def test_hostile_prompts_are_shown_as_text(page):
    hostile = '<img src=x onerror="document.title=1"><script>document.title=1</script>'
    page.locator("#prompt textarea").fill(hostile)
    choose(page, "base")
    few_steps(page, 1)
    page.click("#draw")
    drawn(page, 1)
    assert page.get_attribute("#grid .frame img", "alt") == f"base: {hostile}"
    assert "The miniature never saw" in page.inner_text("#status")
    assert page.title() != "1"


def test_stop_ends_the_computation_and_keeps_what_was_drawn(page):
    choose(page, "base", "student", "ocr")
    few_steps(page, 60)
    page.click("#draw")
    page.wait_for_function("document.querySelectorAll('#grid .frame img').length == 1")
    assert drawing()
    page.click("#stop")
    page.wait_for_function("document.querySelector('#status').innerText.includes('Stopped with')")
    until = time.monotonic() + 10
    while drawing() and time.monotonic() < until:
        time.sleep(0.05)
    assert not drawing()
    assert "Stopped with 1 of 3" in page.inner_text("#status")
    assert page.locator("#grid .frame img").count() == 1
    assert page.locator("#save").is_visible()
    assert page.locator("#grid .frame.waiting").all_inner_texts() == ["Not drawn: stopped"] * 2
    page.wait_for_timeout(700)  # no late step of the drawing comes back
    assert page.locator("#status progress").count() == 0
    assert "Stopped with 1 of 3" in page.inner_text("#status")


@pytest.mark.slow
def test_stop_is_heard_at_any_moment_and_drawing_can_begin_again(page):
    choose(page, "base", "student")
    few_steps(page, 60)
    for moment in (0, 40, 150, 300):
        page.click("#draw")
        page.wait_for_selector("#status progress")
        page.wait_for_timeout(moment)
        page.click("#stop")
        page.wait_for_function("document.querySelector('#status').innerText.startsWith('Stopped with 0 of 2')")
        page.wait_for_selector("#draw:enabled")
        page.wait_for_timeout(300)
        assert page.locator("#status progress").count() == 0
        assert page.locator("#grid .frame.now").count() == 0
        assert not page.get_by_text("Error", exact=True).is_visible()


def test_draw_is_off_while_drawing_and_stop_while_not(page):
    assert page.locator("#draw").is_enabled()
    assert page.locator("#stop").is_disabled()
    choose(page, "base")
    few_steps(page, 40)
    page.click("#draw")
    page.wait_for_selector("#draw:disabled")
    page.wait_for_selector("#stop:enabled")
    drawn(page, 1)
    page.wait_for_selector("#draw:enabled")
    assert page.locator("#stop").is_disabled()
    choose(page)
    page.click("#draw")
    page.wait_for_selector("#status .bad")
    page.wait_for_selector("#draw:enabled")
    assert page.locator("#stop").is_disabled()
    assert page.inner_text("#grid .asked").startswith("Drawn earlier: a photo of a star above a square")
    assert float(page.eval_on_selector("#grid .cards", "e => getComputedStyle(e).opacity")) < 1


@pytest.mark.parametrize(
    ("seed", "said"),
    [
        ("1.5", "Seed: expected a whole number (got 1.5)."),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in (
                ("-1", "Seed: expected 0 or more (got -1)."),
                ("100000000000000000000", "Seed: expected 4294967295 or less (got 100000000000000000000)."),
                ("", "Seed: expected a whole number."),
            )
        ),
    ],
)
def test_a_wrong_seed_is_a_message_of_ours(page, seed, said):
    page.get_by_label("Seed", exact=True).fill(seed)
    page.click("#draw")
    page.wait_for_selector("#status .bad")
    assert page.inner_text("#status") == said
    assert page.locator(".toast-wrap .toast-body").count() == 0


@pytest.mark.slow
def test_a_prompt_that_is_too_long_is_not_cut_but_refused(page):
    page.locator("#prompt textarea").fill("star " * 100)
    assert len(page.locator("#prompt textarea").input_value()) == 500
    page.click("#draw")
    page.wait_for_selector("#status .bad")
    assert "too long: at most 400 characters" in page.inner_text("#status")


def test_who_waits_sees_the_place_in_the_queue_and_can_leave_it(page, server, session):
    waiting = """place => { const e = document.querySelector(place);
      return /queue/.test(e.innerText) && e.getBoundingClientRect().height >= 20; }"""
    choose(page, "base", "student")
    with session._turn:  # the first is not done before the test is, however fast the machine
        page.click("#draw")
        page.wait_for_selector("#stop:enabled")
        other = second(page, server)
        other.click("#draw")
        other.wait_for_function(waiting, arg="#status")
        other.click("#stop")
        other.wait_for_function("document.querySelector('#status').innerText == 'Stopped before anything was drawn.'")
        other.get_by_role("tab", name="Blind vote").click()
        other.click("#ask")
        other.wait_for_function(waiting, arg="#vote-status")
        other.context.close()
        page.click("#stop")
    page.wait_for_function("document.querySelector('#status').innerText.startsWith('Stopped')")


@pytest.mark.slow
def test_leaving_the_page_ends_the_computation(page):
    choose(page, "base", "student")
    few_steps(page, 100)
    page.click("#draw")
    page.wait_for_selector("#status progress")
    page.goto("about:blank")
    until = time.monotonic() + 20
    while drawing() and time.monotonic() < until:
        time.sleep(0.1)
    assert not drawing()


def test_examples_of_every_task_fill_the_prompt(page):
    seen = set()
    for task in ("One object", "Counting", "Position", "Sign"):
        for _ in range(2):
            before = page.locator("#prompt textarea").input_value()
            page.get_by_role("button", name=task, exact=True).click()
            page.wait_for_function("old => document.querySelector('#prompt textarea').value != old", arg=before)
            seen.add(page.locator("#prompt textarea").input_value())
    assert len(seen) == 8
    assert any('says "' in prompt for prompt in seen)


def test_a_blind_vote_names_nobody_before_it_is_cast(page, tmp_path):
    page.get_by_role("tab", name="Blind vote").click()
    assert not page.locator("#vote-left").is_enabled()
    page.get_by_label("Prompt (empty: one of the examples)").fill("a photo of a star")
    page.click("#ask")
    page.wait_for_function("document.querySelectorAll('#vote-pictures img').length == 2")
    page.wait_for_function("!document.querySelector('#vote-left').disabled")
    before = page.inner_html("#vote-pictures")
    assert not [
        name
        for name in ("student", "geneval", "ocr")
        if name in before.split("base64")[0] + page.inner_text("#vote-pictures")
    ]
    page.click("#vote-right")
    page.wait_for_selector("#vote-pictures .badge")
    left, right = page.locator("#vote-pictures h3").all_inner_texts()
    assert left.startswith("Left: ")
    assert "your choice" in right
    assert not page.locator("#vote-left").is_enabled()
    winner = right.removeprefix("Right: ").split()[0]
    assert page.locator("#standings tbody tr th").first.inner_text() == winner
    with page.expect_download() as download:
        page.click("#votes-csv")
    download.value.save_as(tmp_path / "votes.csv")
    rows = list(csv.DictReader((tmp_path / "votes.csv").open()))
    assert rows[-1]["right_model"] == winner
    assert rows[-1]["choice"] == "right"


def test_runs_are_shown_filtered_and_opened(page):
    page.get_by_role("tab", name="Finished runs").click()
    page.wait_for_selector("#gallery button img")
    assert "painter:student" in page.inner_text("#run-tables thead")
    assert "tell them apart" in page.inner_text("#run-tables")
    assert page.locator("#run-tables .bar").count() == 6
    assert page.inner_text("#count .count") == "40 pictures · page 1 of 2"
    assert_evenly_spaced(page)
    for width in (375, 768, 1000, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        hidden = "[...document.querySelectorAll('#run-tables .scroll')].map(e => e.scrollWidth - e.clientWidth)"
        assert page.evaluate(hidden) == [0, 0], width
    page.set_viewport_size(WIDE)
    page.locator("#filter-key input").focus()
    for _ in range(4):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#disagree') != null")
    page.wait_for_function("!document.querySelector('.option-list')")  # no list is left open behind
    page.click("#on")
    page.wait_for_function("document.querySelector('#count .count').innerText == '40 pictures · page 2 of 2'")
    assert not page.locator("#on").is_enabled()
    pick(page, "#filter-said", "wrong")
    page.wait_for_function("!document.querySelector('#count .count').innerText.startsWith('40')")
    wrong = int(page.inner_text("#count .count").split()[0])
    page.get_by_label("Only where the models disagree").check()
    page.wait_for_function(f"!document.querySelector('#count .count').innerText.startsWith('{wrong} ')")
    assert int(page.inner_text("#count .count").split()[0]) < wrong
    pick(page, "#filter-model", "painter:base")
    page.wait_for_timeout(800)
    page.locator("#gallery button:has(img)").first.click()
    page.wait_for_selector("#detail img")
    assert page.eval_on_selector("#detail img", "e => e.naturalWidth") == 16
    detail = page.inner_text("#detail")
    page.wait_for_function("""() => { const at = document.querySelector('#detail').getBoundingClientRect();
      return at.top > -5 && at.top < innerHeight / 2; }""")
    assert "painter:base · wrong" in detail
    assert "generator.sampling.steps" in detail
    page.set_viewport_size({"width": 768, "height": 900})
    assert page.eval_on_selector("#detail dd", "e => e.clientWidth") > 300


@pytest.mark.slow
def test_runs_that_come_after_the_start_are_there_after_a_reload(session, browser, runs_folder, tmp_path):
    from app import ui
    from app.runs import Runs
    from app.vote import Ballot

    folder = tmp_path / "runs"
    blocks = ui.page(session, Ballot(tmp_path / "votes.sqlite"), Runs(folder))
    _, url, _ = ui.serve(blocks, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    context = browser.new_context(viewport=WIDE)
    page = context.new_page()
    page.set_default_timeout(60 * SECOND)
    try:
        page.goto(url)
        page.get_by_role("tab", name="Finished runs").click()
        page.wait_for_selector("#no-runs:visible")
        assert "Reloading this page shows new runs" in page.inner_text("#no-runs")
        for name in ("first", "second"):
            shutil.copytree(runs_folder / "deep" / "two", folder / name)
            page.reload()
            page.get_by_role("tab", name="Finished runs").click()
            page.wait_for_selector("#gallery button img")
            assert not page.locator("#no-runs").is_visible()
        page.locator("#run input").click()
        page.wait_for_selector("[role=option]")
        offered = [text.split()[-1] for text in page.get_by_role("option").all_inner_texts()]
        assert sorted(offered) == ["first", "second"]
        page.get_by_role("option", name="second").click()
        page.wait_for_timeout(SECOND)
        assert page.locator("#run input").input_value() == "second"
        assert page.locator("#run-tables .notice.bad").count() == 0
    finally:
        context.close()
        blocks.close()


def test_the_keyboard_alone_draws(page):
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("a photo of a star")
    choose(page, "base")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "draw":
            break
    assert page.evaluate("document.activeElement.id") == "draw"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Enter")
    drawn(page, 1)


@pytest.mark.parametrize("page", [{"color_scheme": "dark"}, {"color_scheme": "light"}], indirect=True)
def test_text_stands_out_from_its_ground_in_both_modes(page):
    ratio = """selector => {
      const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
      const e = document.querySelector(selector);
      let ground = e;
      while (getComputedStyle(ground).backgroundColor.match(/, 0\\)$/)) ground = ground.parentElement;
      const [a, b] = [light(getComputedStyle(e).color), light(getComputedStyle(ground).backgroundColor)];
      return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); }"""
    for selector in (
        ".head h1",
        ".head .lead",
        ".head .toy",
        "#grid .empty p",
        "#draw",
        "#stop",
        ".chip",
        "[role=tab].selected",
    ):
        assert page.evaluate(ratio, selector) >= 4.5, selector


def test_nothing_is_wider_than_a_phone(page):
    page.set_viewport_size(PHONE)
    choose(page, "base", "ocr")
    few_steps(page, 1)
    page.click("#draw")
    drawn(page, 2)
    wider = """() => [...document.querySelectorAll('main *')].filter(e => { const r = e.getBoundingClientRect();
      return r.width && r.right > 391 && !e.closest('.scroll'); }).map(e => e.id + '.' + e.className)"""
    for tab in ("Compare", "Blind vote", "Finished runs"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(400)
        assert page.evaluate(wider) == [], tab
