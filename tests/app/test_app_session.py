"""Drawing without a page: the same noise for all, arm by arm, judged; stopped, failing and refused."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from app.judging import Panel, best
from app.picture import Saved
from app.session import Drawn, Lora, Session, Step
from app.wanted import wanted
from flowopd_eval.errors import RequestError, Unavailable
from flowopd_eval.models import FAMILIES, Backbone, resolve
from flowopd_eval.records import Score

CIRCLE = "a photo of a red circle"


def drawn(session, **changes):
    request = wanted({"prompt": CIRCLE, "seed": 5, "arms": ["base"], "steps": 3, **changes})
    return {event.arm: event for event in session.draw(request) if isinstance(event, Drawn)}


def drawing_threads():
    return [thread for thread in threading.enumerate() if thread.name == "drawing"]


def test_an_arm_draws_what_its_pipeline_draws_from_that_seed(session, adapters):
    ours = drawn(session, arms=["base", "ocr"])
    pipeline = Backbone("builtin:tiny", [resolve("tiny:base")], "cpu", None).pipeline
    pipeline.add_experts({"ocr": adapters["ocr"]})
    for arm, expert in (("base", None), ("ocr", "ocr")):
        theirs = pipeline(CIRCLE, expert=expert, seed=5, num_inference_steps=3).images[0]
        assert np.array_equal(np.asarray(ours[arm].picture), np.asarray(theirs))
    assert not np.array_equal(np.asarray(ours["base"].picture), np.asarray(ours["ocr"].picture))


def test_every_arm_starts_from_the_same_noise(session, monkeypatch):
    import flowopd_eval.pipeline as pipeline

    noises = []
    real = pipeline.draw_noise
    monkeypatch.setattr(pipeline, "draw_noise", lambda *given: noises.append(real(*given)) or noises[-1])
    drawn(session, arms=["base", "student", "ocr"], steps=1)
    assert len(noises) == 3
    assert all(bool((noise == noises[0]).all()) for noise in noises)


def test_steps_are_told_one_by_one_and_pictures_as_they_come(session):
    request = wanted({"prompt": CIRCLE, "seed": 1, "arms": ["ocr", "base"], "steps": 2})
    events = [(event.arm, event.done if isinstance(event, Step) else "drawn") for event in session.draw(request)]
    assert events == [(arm, what) for arm in ("base", "ocr") for what in (0, 1, 2, "drawn")]


def test_provenance_says_what_decided_the_picture(session):
    one = drawn(session, arms=["student"], steps=2, guidance=2.0)["student"]
    assert one.identity["model"] == "tiny:student"
    assert one.identity["sampling"]["steps"] == 2
    assert one.identity["sampling"]["guidance"] == 2.0
    assert len(one.identity["base_sha256"]) == len(one.identity["adapter_sha256"]) == 64


def saved_of(session, pictures):
    return Saved(
        family="tiny",
        settings=wanted({"prompt": CIRCLE, "seed": 5, "arms": list(pictures)}),
        drawn={name: dict(one.identity) for name, one in pictures.items()},
        scores={},
        sha256="",
    )


def test_a_saved_comparison_is_told_apart_from_what_draws_here_now(session, monkeypatch):
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'flowopd-eval[app]'")
    from app.compare_tab import restorable

    saved = saved_of(session, drawn(session, arms=["base", "student", "ocr"], steps=1))
    words, arms, changed = restorable(session, saved)
    assert (arms, changed) == (["base", "student", "ocr"], [])
    assert "Draw to see the pictures again." in words
    for name, other in (("student", "geneval"), ("ocr", "base")):
        monkeypatch.setitem(session.arms, name, replace(session.arms[name], spec=session.arms[other].spec))
    words, arms, changed = restorable(session, saved)
    assert (arms, changed) == (["base", "student", "ocr"], ["student", "ocr"])
    assert "Here student, ocr are other models than those that drew then" in words
    monkeypatch.setitem(session._backbone.__dict__, "sha256", "0" * 64)
    assert restorable(session, saved).changed == ["base", "student", "ocr"]


def test_a_cards_provenance_has_the_seed_and_no_empty_field(session):
    from app import cards

    one = drawn(session, steps=1)["base"]
    html = cards.comparison(CIRCLE, [session.arms["base"]], [one], [], drawing=False)
    assert "<dt>seed</dt><dd>5</dd>" in html
    assert "None" not in html
    assert '<p class="by">1 step · guidance' in html
    assert "How clean the lines are" in html


def test_an_arm_has_its_own_guidance_and_steps_unless_told_otherwise(session, monkeypatch):
    own = replace(session.arms["ocr"].spec.record, guidance=1.0, steps=2)
    arm = replace(session.arms["ocr"], spec=replace(session.arms["ocr"].spec, record=own))
    monkeypatch.setitem(session.arms, "ocr", arm)
    request = wanted({"prompt": CIRCLE, "seed": 5, "arms": ["ocr"]})
    assert (session.record("ocr", request).guidance, session.record("ocr", request).steps) == (1.0, 2)
    told = wanted({"prompt": CIRCLE, "seed": 5, "arms": ["ocr"], "guidance": 0.0, "steps": 7})
    assert (session.record("ocr", told).guidance, session.record("ocr", told).steps) == (0.0, 7)
    assert drawn(session, arms=["ocr"], steps=None)["ocr"].identity["sampling"]["guidance"] == 1.0


def test_pictures_are_judged_by_those_who_can(session):
    shapes = drawn(session, steps=8)["base"].scores
    assert set(shapes) == {"geneval", "quality"}
    assert shapes["geneval"].value in (0.0, 1.0)
    sign = drawn(session, prompt='a sign that says "TEA"')["base"].scores
    assert set(sign) == {"ocr", "quality"}
    assert sign["ocr"].detail["target"] == "TEA"


def test_who_does_not_judge_says_why(session):
    absent = {seat.flag: seat.absent for seat in session.panel.seats("three cats in a boat") if seat.scorer is None}
    assert "not of GenEval's kind" in absent["geneval"]
    assert "quotes no text" in absent["ocr"]
    assert absent["preference"].startswith("unavailable: ")
    assert "hf download" in absent["preference"]


def test_looking_for_preference_fetches_nothing(monkeypatch):
    import socket

    def refuse(*given, **named):
        raise AssertionError("a request left the machine")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert Panel("shapes").seats("a star")[-1].absent.startswith("unavailable")


def test_what_judges_need_is_fetched_when_the_panel_is_made_and_never_for_a_prompt(monkeypatch):
    asked = []

    def out_of_reach():
        asked.append("detector")
        raise Unavailable("Cannot fetch GenEval's detector.")

    monkeypatch.setattr("flowopd_eval.benches._coco_detector", out_of_reach)
    panel = Panel("coco")
    assert asked == ["detector"]
    assert panel.seats("a photo of two dogs")[0].absent == "unavailable: Cannot fetch GenEval's detector."
    assert asked == ["detector"]


def test_typographic_quotes_are_quotes(session):
    assert session.panel.seats("a sign that says “TEA”")[1].scorer is not None


def test_stopping_ends_the_drawing_thread_within_a_step(session):
    events = session.draw(wanted({"prompt": CIRCLE, "seed": 1, "arms": ["base", "ocr"], "steps": 100}))
    while not (isinstance(event := next(events), Step) and event.done == 1):
        pass
    assert len(drawing_threads()) == 1
    began = time.perf_counter()
    events.close()
    assert not drawing_threads()
    assert time.perf_counter() - began < 5
    assert drawn(session, steps=1)["base"].picture is not None  # nothing stays locked


def test_who_waits_for_a_turn_can_be_stopped_too(session, monkeypatch):
    begun = []
    monkeypatch.setattr(session, "_picture", lambda name, *rest: begun.append(name))
    stop, told = threading.Event(), []
    request = wanted({"prompt": CIRCLE, "seed": 1, "arms": ["base"], "steps": 1})
    with session._turn:  # another's picture is being drawn
        waiting = threading.Thread(target=session._work, args=(request, told.append, stop))
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive()
        stop.set()
        waiting.join(10)
        assert not waiting.is_alive()  # though the turn is still another's
    assert begun == []
    assert told == [None]
    assert not session._turn.locked()


def test_who_was_stopped_at_the_moment_of_the_turn_leaves_it_to_others(session, monkeypatch):
    begun = []
    monkeypatch.setattr(session, "_picture", lambda name, *rest: begun.append(name))
    stop = threading.Event()
    stop.set()
    session._work(wanted({"prompt": CIRCLE, "seed": 1, "arms": ["base"], "steps": 1}), lambda event: None, stop)
    assert begun == []
    assert not session._turn.locked()


def test_one_arm_that_fails_leaves_the_others_theirs(session, monkeypatch, caplog):
    real = session._picture

    def failing(name, *rest):
        if name == "student":
            raise RuntimeError("/home/joe/secret: kernel hf_abcdefghijklmnopqrstuv failed")
        return real(name, *rest)

    monkeypatch.setattr(session, "_picture", failing)
    found = drawn(session, arms=["base", "student", "ocr"], steps=1)
    assert [name for name, one in found.items() if one.picture is not None] == ["base", "ocr"]
    assert found["student"].error == "student could not draw: it failed; the server's log says why."
    assert "kernel" in caplog.text


def test_a_picture_of_nan_is_no_picture(session, monkeypatch):
    class Output:
        images = np.full((1, 64, 64, 3), np.nan, np.float32)

    monkeypatch.setitem(session._backbone.__dict__, "pipeline", lambda *given, **named: Output())
    found = drawn(session)["base"]
    assert found.picture is None
    assert "NaN" in found.error


def test_a_judge_that_fails_leaves_the_picture_unscored(session, monkeypatch):
    class Broken:
        def identity(self):
            return {}

        def score(self, images, prompts):
            raise OSError("broken: /home/joe/models/judge.bin")

    monkeypatch.setitem(session.panel._scorers, "quality", Broken())
    one = drawn(session, arms=["base"], steps=1)["base"]
    assert one.picture is not None
    assert one.scores["quality"].value is None
    assert "broken" in one.scores["quality"].error
    assert "joe" not in one.scores["quality"].error


def test_a_judge_that_cannot_be_loaded_takes_no_picture(session, monkeypatch, caplog):
    def full():
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("app.judging._check_cached", full)
    monkeypatch.setattr(session, "panel", Panel("shapes"))
    one = drawn(session, arms=["base"], steps=1)["base"]
    assert one.picture is not None
    assert one.scores["quality"].value is not None
    assert "could not be loaded" in session.panel.seats(CIRCLE)[-1].absent
    assert "CUDA out of memory" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [({"arms": ["nobody"]}, "no model 'nobody' here; there are: base, student"), ({"side": 512}, "draws 64 pixels")],
)
def test_what_cannot_be_drawn_here_is_refused_before_anything_is(session, change, said):
    with pytest.raises(RequestError, match=said):
        drawn(session, **change)


def test_a_member_that_cannot_be_had_is_offered_by_nobody(session, monkeypatch):
    arm = replace(session.arms["ocr"], problem="its file is gone")
    monkeypatch.setitem(session.arms, "ocr", arm)
    assert "ocr" not in [one.name for one in session.ready]
    with pytest.raises(RequestError, match="ocr is not available: its file is gone"):
        drawn(session, arms=["ocr"])


def test_an_adapter_that_was_asked_for_and_cannot_be_had_is_an_error(tmp_path):
    with pytest.raises(RequestError, match="--lora mine="):
        Session("tiny", {"mine": Lora(str(tmp_path))})


def test_a_name_that_is_taken_and_an_unknown_family_are_errors(adapters):
    with pytest.raises(RequestError, match="has a member of that name"):
        Session("tiny", {"base": Lora(adapters["ocr"])})
    with pytest.raises(RequestError, match=r"--model huge: .*tiny"):
        Session("huge")


def test_an_adapter_may_have_a_guidance_of_its_own(adapters, monkeypatch):
    family = FAMILIES["tiny"]
    monkeypatch.setitem(FAMILIES, "tiny", replace(family, members={"base": family.members["base"]}))
    own = Session("tiny", dict(Lora.named(f"{name}={adapters['ocr']}{at}") for name, at in (("own", "@1"), ("as", ""))))
    assert own.arms["own"].spec.record.guidance == 1.0
    assert own.arms["as"].spec.record.guidance == own.arms["base"].spec.record.guidance == 4.5
    pictures = drawn(own, arms=["own", "as"])
    assert pictures["own"].identity["sampling"]["guidance"] == 1.0
    assert not np.array_equal(np.asarray(pictures["own"].picture), np.asarray(pictures["as"].picture))


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("mine=runs/x/adapter", Lora("runs/x/adapter")),
        ("mine=runs/x/adapter@1", Lora("runs/x/adapter", 1.0)),
        ("mine=runs/x@y/adapter@2.5", Lora("runs/x@y/adapter", 2.5)),
        ("mine=hub:me/it@v1", Lora("hub:me/it@v1")),
        ("mine=hub:me/it@v1@0", Lora("hub:me/it@v1", 0.0)),
    ],
)
def test_an_adapters_guidance_stands_behind_its_place(text, lora):
    assert Lora.named(text) == ("mine", lora)


def test_a_folder_with_an_at_sign_in_its_name_is_that_folder(tmp_path):
    (tmp_path / "run@3").mkdir()
    assert Lora.named(f"mine={tmp_path}/run@3")[1] == Lora(f"{tmp_path}/run@3")
    assert Lora.named(f"mine={tmp_path}/run@3@1")[1] == Lora(f"{tmp_path}/run@3", 1.0)


@pytest.mark.parametrize("text", ["mine=x@", "mine=x@high", "mine=x@-1", "mine=x@21", "mine=x@nan", "mine=@1"])
def test_a_guidance_that_is_none_is_refused_in_words(text):
    with pytest.raises(RequestError, match="expected a guidance scale from 0 to 20 after the @"):
        Lora.named(text)


def test_words_the_miniature_never_saw_are_named(session):
    assert session.unknown_words('a photo of two dogs, "XYLO" and a star!') == ["dogs"]
    assert session.unknown_words("a photo of a red circle on sand") == []


def scores(**values):
    return {arm: {"geneval": Score(value)} for arm, value in values.items()}


@pytest.mark.parametrize(
    ("values", "top"),
    [
        ({"a": 1.0, "b": 0.0}, {"a"}),
        ({"a": 1.0, "b": 1.0, "c": 0.0}, {"a", "b"}),
        ({"a": 1.0, "b": 1.0}, None),
        ({"a": 1.0, "b": None}, None),
        ({"a": None, "b": None}, None),
        ({"a": 0.0, "b": None, "c": -1.0}, {"a"}),
    ],
)
def test_the_best_is_marked_among_the_scored_alone(values, top):
    assert best(scores(**values)).get("geneval") == top


def test_scores_that_are_shown_as_equal_are_equally_good():
    near = {"a": {"quality": Score(0.74312)}, "b": {"quality": Score(0.74349)}, "c": {"quality": Score(0.2)}}
    assert best(near)["quality"] == {"a", "b"}
    assert best({arm: near[arm] for arm in "ab"}) == {}
