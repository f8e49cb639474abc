"""GenEval's verdict against an independent, literal re-implementation, and case by case."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowopd_eval.benches import find_bench
from flowopd_eval.errors import RequestError
from flowopd_eval.prompts import GENEVAL_RELATIONS
from flowopd_eval.records import Box, Detection, Prompt, Score
from flowopd_eval.scorers.geneval import (
    FLOW_GRPO,
    OFFICIAL,
    GenEvalProtocol,
    GenEvalScorer,
    PartialCreditScorer,
    box_iou,
    check_record,
    colour_queries,
    flow_grpo_verdict,
    keep,
    partial_credit,
    relative_position,
    verdict,
    with_colours,
)

CLASSES = ("circle", "square", "star")
COLOURS = ("red", "blue", "orange")


def found(label: str, box: Box = (0, 0, 10, 10), score: float = 0.95, colour: str | None = None) -> Detection:
    return Detection(label, box, score, colour)


def judge(record: Mapping[str, Any], detections: Sequence[Detection], task: str = "two_object") -> Score:
    return verdict(record, keep(detections, task))


def reason(include: list[dict], *detections: Detection, exclude: Sequence[dict] = (), task: str = "two_object") -> str:
    score = judge({"include": include, "exclude": exclude}, detections, task)
    assert score.value == (0.0 if score.reason else 1.0)
    return score.reason


# --- parity ----------------------------------------------------------------------------------------------------------
def slow_relations(a: Box, b: Box) -> set[str]:
    """djghosh13/geneval's ``relative_position``, in numpy as there."""
    boxes = np.array([a, b], float).reshape(2, 2, 2)
    centre_a, centre_b = boxes.mean(axis=1)
    size_a, size_b = np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centre_a - centre_b
    revised = np.maximum(np.abs(offset) - 0.1 * (size_a + size_b), 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    tests = [("left of", dx < -0.5), ("right of", dx > 0.5), ("above", dy < -0.5), ("below", dy > 0.5)]
    return {name for name, holds in tests if holds}


def slow_verdict(record: Mapping[str, Any], task: str, detections: Sequence[Detection]) -> bool:
    """The protocol read aloud, one step after another, without a thought for speed or for reasons."""
    threshold = 0.9 if task == "counting" else 0.3
    objects: dict[str, list[Detection]] = {}
    for label in CLASSES:
        of_class = [d for d in detections if d.label == label]
        of_class.sort(key=lambda d: d.score, reverse=True)
        objects[label] = [d for d in of_class if d.score > threshold][:16]
    correct = True
    groups: list[list[Detection] | None] = []
    for clause in record["include"]:
        matched, taken = True, objects[clause["class"]][: clause["count"]]
        if len(taken) < clause["count"]:
            matched = False
        if "color" in clause and [d.colour for d in taken].count(clause["color"]) < clause["count"]:
            matched = False
        if matched and "position" in clause:
            relation, index = clause["position"]
            if groups[index] is None:
                matched = False
            else:
                for mine in taken:
                    for other in groups[index] or []:
                        if relation not in slow_relations(mine.box, other.box):
                            matched = False
        groups.append(taken if matched else None)
        correct = correct and matched
    for clause in record.get("exclude", []):
        if len(objects[clause["class"]]) >= clause["count"]:
            correct = False
    return correct


def random_case(rng: random.Random) -> tuple[dict[str, Any], str, list[Detection]]:
    include: list[dict[str, Any]] = []
    for index in range(rng.choice((1, 2, 2, 3))):
        clause: dict[str, Any] = {"class": rng.choice(CLASSES), "count": rng.choice((1, 1, 2, 3))}
        if rng.random() < 0.3:
            clause["color"] = rng.choice(COLOURS)
        if index and rng.random() < 0.5:
            clause["position"] = [rng.choice(GENEVAL_RELATIONS), rng.randrange(index)]
        include.append(clause)
    record: dict[str, Any] = {"include": include}
    if rng.random() < 0.4:
        record["exclude"] = [{"class": rng.choice(CLASSES), "count": rng.randint(1, 4)}]
    detections = []
    for _ in range(rng.choice((0, 1, 2, 3, 4, 6, 20))):
        x, y, w, h = rng.randrange(50), rng.randrange(50), rng.randrange(20), rng.randrange(20)
        score = rng.choice((0.3, 0.9, rng.random(), rng.uniform(0.9, 1), rng.uniform(0.9, 1)))
        box = (float(x), float(y), float(x + w), float(y + h))
        detections.append(found(rng.choice(CLASSES), box, score, rng.choice((*COLOURS[:2], COLOURS[0]))))
    return record, rng.choice(("counting", "position")), detections


def test_verdict_agrees_with_the_literal_protocol_on_random_cases() -> None:
    rng = random.Random(1)
    verdicts = []
    for _ in range(15_000):
        record, task, detections = random_case(rng)
        score = judge(record, detections, task)
        assert score.value == float(slow_verdict(record, task, detections)), (record, task, detections, score)
        assert bool(score.reason) == (score.value == 0.0)
        verdicts.append(score.value)
    assert 0.05 < np.mean(verdicts) < 0.95


def slow_server(record: Mapping[str, Any], task: str, detections: Sequence[Detection]) -> tuple[bool, float]:
    """What reward-server's ``evaluate_reward`` is said to do, as a list of events: (strictly right, its score)."""
    least = {"counting": 0.9}.get(task, 0.3)
    events: list[float] = []
    holds: list[list[Detection]] = []  # of each clause: its objects, or nothing where it failed
    for clause in record["include"]:
        there = sorted(
            (d for d in detections if d.label == clause["class"] and d.score > least), key=lambda d: -d.score
        )
        there, wanted = there[:16], clause["count"]
        events.append(1 - abs(wanted - len(there)) / wanted)
        if len(there) != wanted:
            if {"color", "position"} & set(clause):
                events.append(0.0)
            holds.append([])
            continue
        if "color" in clause:
            right = [d.colour for d in there].count(clause["color"])
            events.append(1 - abs(wanted - right) / wanted)
            if right != wanted:
                holds.append([])
                continue
        if "position" in clause:
            relation, index = clause["position"]
            if not holds[index]:
                events.append(0.0)
                holds.append([])
                continue
            missed = any(relation not in slow_relations(d.box, o.box) for d in there for o in holds[index])
            if missed:
                events.append(0.0)
            events.append(1.0)  # in either case
            if missed:
                holds.append([])
                continue
        holds.append(there)
    return all(holds), sum(events) / len(events)


def test_flow_grpo_s_other_numbers_agree_with_a_literal_reading_of_its_server() -> None:
    rng = random.Random(3)
    seen = []
    for _ in range(10_000):
        record, task, detections = random_case(rng)
        also = flow_grpo_verdict(record, keep(detections, task, FLOW_GRPO), FLOW_GRPO).detail["also"]
        strict, score = slow_server(record, task, detections)
        assert also == {"strict_accuracy": float(strict), "score": pytest.approx(score)}, (record, task, detections)
        seen.append((also["strict_accuracy"], also["score"]))
    assert 0.01 < np.mean([strict for strict, _ in seen]) < 0.95
    assert min(score for _, score in seen) < -5  # an excess of objects has no floor there


def test_a_wrong_position_is_worth_three_quarters_to_flow_grpo_s_server() -> None:
    record = {"include": [{"class": "circle", "count": 1}, {"class": "star", "count": 1, "position": ["above", 0]}]}
    objects = keep([found("circle", (0, 0, 5, 5)), found("star", (0, 50, 5, 55))], "position")
    assert flow_grpo_verdict(record, objects, FLOW_GRPO).detail["also"] == {"strict_accuracy": 0.0, "score": 0.75}


def test_the_flow_grpo_protocol_shows_the_detector_blue_for_red_and_the_colours_as_they_are() -> None:
    """A detector of plain pixels: it calls what it sees red a circle, and tells colours from what it is then given."""

    class Pixels:
        def __init__(self) -> None:
            self.asked: list[tuple[int, int, int]] = []

        def identity(self) -> Mapping[str, Any]:
            return {"name": "pixels"}

        def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
            colours = [np.asarray(image)[4, 4] for image in images]
            return [[found("circle" if c[0] > c[2] else "square", colour="as detected")] for c in colours]

        def classify_colours(self, images: Any, queries: Any) -> list[list[str]]:
            self.asked += [tuple(int(v) for v in np.asarray(image)[4, 4]) for image in images]
            return [["red"] * len(asked) for asked in queries]

    red = Image.new("RGB", (16, 16), (200, 30, 20))
    prompts = [Prompt("p", "a red square", "colors", {"include": [{"class": "square", "count": 1, "color": "red"}]})]
    detector = Pixels()
    assert [s.value for s in GenEvalScorer(detector, "official").score([red], prompts)] == [0.0]
    (score,) = GenEvalScorer(detector, "flow-grpo").score([red], prompts)
    assert score.value == 1.0
    assert score.detail["colours"] == {"square": ["red"]}
    (asked,) = detector.asked
    assert asked != (200, 30, 20)  # through JPEG …
    assert asked == pytest.approx((200, 30, 20), abs=6)  # … and not exchanged


def test_relations_agree_with_the_official_formula() -> None:
    rng = random.Random(2)
    for _ in range(5_000):
        x, y, u, v = (float(rng.randrange(60)) for _ in range(4))
        w, h, s, t = (float(rng.randrange(30)) for _ in range(4))
        a, b = (x, y, x + w, y + h), (u, v, u + s, v + t)
        assert relative_position(a, b) == slow_relations(a, b)


# --- which detections count ------------------------------------------------------------------------------------------
def test_scores_at_the_threshold_do_not_count() -> None:
    above, at = math.nextafter(0.3, 1), 0.3
    assert keep([found("circle", score=at)], "colors") == {}
    assert len(keep([found("circle", score=above)], "colors")["circle"]) == 1
    assert keep([found("circle", score=0.9)], "counting") == {}
    assert len(keep([found("circle", score=math.nextafter(0.9, 1))], "counting")["circle"]) == 1


def test_best_sixteen_of_each_class_count_best_first() -> None:
    many = [found("circle", score=0.91 + i / 1000) for i in range(20)]
    kept = keep([*many, found("star")], "counting")
    assert kept == {"circle": many[:3:-1], "star": [found("star")]}


def test_equal_scores_keep_the_detectors_order() -> None:
    a, b = found("circle", (0, 0, 1, 1)), found("circle", (5, 5, 6, 6))
    assert keep([a, b], "colors")["circle"] == [a, b]
    assert keep([b, a], "colors")["circle"] == [b, a]


def test_boxes_are_a_pixel_larger_in_iou() -> None:
    assert box_iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1.0
    assert box_iou((0, 0, 9, 9), (10, 0, 19, 9)) == 0.0
    assert box_iou((0, 0, 9, 9), (9, 0, 18, 9)) == pytest.approx(10 / 190)  # one shared column of ten pixels
    assert box_iou((0, 0, 9, 9), (20, 20, 29, 29)) == 0.0


def test_suppression_keeps_the_better_of_two_and_is_off_by_default() -> None:
    best, same = found("circle", score=0.99), found("circle", (0, 0, 10, 11), 0.98)
    other, star = found("circle", (30, 30, 40, 40), 0.97), found("star", score=0.96)
    assert len(keep([best, same, other, star], "colors")["circle"]) == 3
    protocol = GenEvalProtocol("test", nms_iou=0.5)
    assert keep([same, other, star, best], "colors", protocol) == {"circle": [best, other], "star": [star]}


def test_suppression_comes_after_the_limit_of_sixteen() -> None:
    same = [found("circle", score=0.99 - i / 1000) for i in range(16)]
    apart = found("circle", (50, 50, 60, 60), 0.5)
    assert keep([*same, apart], "colors", GenEvalProtocol("test", nms_iou=0.5)) == {"circle": same[:1]}


# --- positions -------------------------------------------------------------------------------------------------------
def test_offset_must_exceed_a_fifth_of_the_summed_extents() -> None:
    """evaluation of 100-pixel boxes: more than 40 pixels, since 0.1 * 200 / 40 leaves exactly one half."""
    b = (0.0, 0.0, 100.0, 100.0)
    assert relative_position((40, 0, 140, 100), b) == set()
    assert relative_position((41, 0, 141, 100), b) == {"right of"}
    assert relative_position((-41, 0, 59, 100), b) == {"left of"}
    assert relative_position((0, 41, 100, 141), b) == {"below"}
    assert relative_position((0, -41, 100, 59), b) == {"above"}


def test_diagonal_has_two_relations_and_coinciding_centres_none() -> None:
    assert relative_position((100, 100, 110, 110), (0, 0, 10, 10)) == {"right of", "below"}
    assert relative_position((0, 0, 10, 10), (2, 2, 8, 8)) == set()
    assert relative_position((5, 5, 5, 5), (5, 5, 5, 5)) == set()  # empty boxes


# --- verdicts and their words ----------------------------------------------------------------------------------------
def test_reasons_of_counts() -> None:
    three = {"include": [{"class": "star", "count": 3}], "exclude": [{"class": "star", "count": 4}]}
    stars = [found("star", score=0.99)] * 5
    assert judge(three, stars[:3], "counting").value == 1.0
    assert judge(three, stars[:2], "counting").reason == "expected 3 stars, found 2"
    assert judge(three, stars[:4], "counting").reason == "expected at most 3 stars, found 4"
    assert judge(three, [], "counting").reason == "expected 3 stars, found 0"
    assert reason([{"class": "circle", "count": 1}], found("square")) == "no circle found"
    assert reason([{"class": "bus", "count": 2}], found("bus")) == "expected 2 buses, found 1"


def test_reasons_of_colours() -> None:
    one = [{"class": "circle", "count": 1, "color": "blue"}]
    assert reason(one, found("circle", colour="blue")) == ""
    assert reason(one, found("circle", colour="red")) == "the circle is red, not blue"
    two = [{"class": "circle", "count": 2, "color": "blue"}]
    mixed = found("circle", colour="blue"), found("circle", colour="red")
    assert reason(two, *mixed) == "1 of 2 circles is red, not blue"
    assert reason(two, mixed[1], mixed[1]) == "2 of 2 circles are red, not blue"


def test_only_the_best_object_of_a_class_is_asked_its_colour() -> None:
    clause = [{"class": "circle", "count": 1, "color": "blue"}]
    assert reason(clause, found("circle", score=0.8, colour="blue"), found("circle", score=0.9, colour="red"))


def test_reasons_of_positions() -> None:
    include = [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}]
    square, right, left = found("square", (30, 30, 40, 40)), (50.0, 30.0, 60.0, 40.0), (5.0, 30.0, 15.0, 40.0)
    assert reason(include, square, found("circle", left)) == ""
    wrong = "the circle is right of the square, not left of it"
    assert reason(include, square, found("circle", right)) == wrong
    diagonal = reason(include, square, found("circle", (50, 50, 60, 60)))
    assert diagonal == "the circle is right of and below the square, not left of it"
    assert reason(include, square, found("circle", square.box)) == "the circle is not clearly left of the square"


def test_position_beside_a_failed_clause_fails() -> None:
    include = [
        {"class": "square", "count": 1, "color": "blue"},
        {"class": "circle", "count": 1, "position": ["left of", 0]},
    ]
    square, circle = found("square", (30, 0, 40, 10), colour="red"), found("circle")
    expected = "the square is red, not blue; no right square for the circle to be left of"
    assert reason(include, square, circle) == expected


def test_every_pair_must_have_the_relation() -> None:
    include = [{"class": "square", "count": 2}, {"class": "circle", "count": 1, "position": ["left of", 0]}]
    near, far = found("square", (30, 0, 40, 10)), found("square", (60, 0, 70, 10))
    assert reason(include, near, far, found("circle")) == ""
    assert reason(include, near, far, found("circle", (45, 0, 55, 10)))


def test_the_same_class_twice_takes_the_same_object_twice() -> None:
    clauses = [{"class": "circle", "count": 1, "color": "red"}, {"class": "circle", "count": 1, "color": "blue"}]
    objects = found("circle", score=0.9, colour="red"), found("circle", score=0.8, colour="blue")
    assert reason(clauses, *objects) == "the circle is red, not blue"


def test_class_named_like_a_colour() -> None:
    assert reason([{"class": "orange", "count": 1, "color": "orange"}], found("orange", colour="orange")) == ""


def test_detail_replays_the_verdict() -> None:
    """Boxes and scores in the log suffice to judge again."""
    record = {"include": [{"class": "circle", "count": 1, "color": "red"}, {"class": "star", "count": 2}]}
    score = judge(record, [found("star"), found("circle", colour="red"), found("star", score=0.2)])
    detail = score.detail
    assert detail["boxes"] == {"circle": [[0, 0, 10, 10, 0.95]], "star": [[0, 0, 10, 10, 0.95]]}
    again = [
        Detection(label, tuple(row[:4]), row[4], detail["colours"].get(label, [None] * len(rows))[i])
        for label, rows in detail["boxes"].items()
        for i, row in enumerate(rows)
    ]
    assert judge(record, again) == score


# --- colours asked of a classifier -----------------------------------------------------------------------------------
def test_queries_name_each_needed_detection_once() -> None:
    record = {
        "include": [
            {"class": "circle", "count": 1, "color": "red"},
            {"class": "circle", "count": 2, "color": "red"},
            {"class": "star", "count": 2, "color": "red"},
            {"class": "square", "count": 1},
        ]
    }
    a, b, c = (found("circle", (i, 0, 9, 9), 0.9 - i / 10) for i in range(3))
    objects = keep([b, found("star"), found("square"), c, a], "color_attr")
    assert colour_queries(record, objects) == [a, b]  # too few stars, nothing asked of squares, c is third
    told = with_colours(objects, {a: "red"})
    assert [d.colour for d in told["circle"]] == ["red", None, None]
    assert colour_queries(record, told) == [b]


# --- the scorer ------------------------------------------------------------------------------------------------------
class ByWidth:
    """A detector whose findings hang on the picture's width: a stand-in for a network, colours told on demand."""

    def __init__(self, findings: Mapping[int, list[Detection]]) -> None:
        self.findings = findings
        self.seen: list[Image.Image] = []
        self.asked: list[list[Detection]] = []

    def identity(self) -> Mapping[str, Any]:
        return {"name": "by-width"}

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        self.seen += images
        if any(image.width not in self.findings for image in images):
            raise RuntimeError("out of order")
        return [self.findings[image.width] for image in images]

    def classify_colours(
        self, images: Sequence[Image.Image], queries: Sequence[Sequence[Detection]]
    ) -> list[list[str]]:
        self.asked += [list(query) for query in queries]
        return [["blue"] * len(query) for query in queries]


def picture(width: int) -> Image.Image:
    return Image.new("RGB", (width, 8))


BLUE = Prompt("blue", "a blue circle", "colors", {"include": [{"class": "circle", "count": 1, "color": "blue"}]})
STAR = Prompt("star", "a star", "single_object", {"include": [{"class": "star", "count": 1}]})


def test_scorer_asks_the_needed_colours_of_a_batch_at_once() -> None:
    detector = ByWidth({8: [found("circle"), found("star")], 9: [found("star"), found("circle", colour="red")]})
    scores = GenEvalScorer(detector).score([picture(8), picture(8), picture(9)], [BLUE, STAR, BLUE])
    assert [s.value for s in scores] == [1.0, 1.0, 0.0]
    assert scores[2].reason == "the circle is red, not blue"
    assert detector.asked == [[found("circle")], [], []]


def test_one_failing_picture_is_unscored_and_the_others_are_not_lost() -> None:
    detector = ByWidth(
        {8: [found("star")], 9: [found("star", score=math.nan)], 10: [found("star", (0, 0, math.inf, 1))]}
    )
    widths = [8, 7, 9, 8, 10]
    scores = GenEvalScorer(detector).score([picture(w) for w in widths], [STAR] * 5)
    assert [s.value for s in scores] == [1.0, None, None, 1.0, None]
    assert scores[1].error == "RuntimeError: out of order"
    assert all("not finite" in str(scores[i].error) for i in (2, 4))
    assert scores[0].error is None


def test_unreadable_picture_is_unscored(tmp_path) -> None:
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    detector = ByWidth({8: [found("star")]})
    scores = GenEvalScorer(detector).score([picture(8), Image.open(path)], [STAR, STAR])
    assert scores[0].value == 1.0
    assert scores[1].value is None
    assert "OSError" in str(scores[1].error)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "1"])
def test_detector_sees_rgb(mode: str) -> None:
    detector = ByWidth({8: [found("star")]})
    assert GenEvalScorer(detector).score([picture(8).convert(mode)], [STAR])[0].value == 1.0
    assert detector.seen[0].mode == "RGB"


def test_detector_sees_pictures_upright() -> None:
    turned = Image.new("RGB", (6, 8))
    turned.getexif()[0x0112] = 6  # to be turned by 90 degrees
    detector = ByWidth({8: [found("star")]})
    GenEvalScorer(detector).score([turned], [STAR])
    assert detector.seen[0].size == (8, 6)


def test_identity_names_protocol_and_detector() -> None:
    identity = GenEvalScorer(ByWidth({})).identity()
    assert identity["detector"] == {"name": "by-width"}
    assert identity["protocol"]["name"] == OFFICIAL.name
    assert identity["protocol"]["counting_threshold"] == 0.9
    with pytest.raises(RequestError, match=r"Unknown GenEval protocol 'strict'; expected one of official"):
        GenEvalScorer(ByWidth({}), "strict")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, 'no "include"'),
        ({"include": []}, 'no "include"'),
        ({"include": [{"class": "star"}]}, '"count" of at least 1'),
        ({"include": [{"class": "star", "count": 0}]}, '"count" of at least 1'),
        ({"include": [{"count": 1}]}, '"class"'),
        ({"include": ["star"]}, '"class"'),
        ({"include": [{"class": "star", "count": 1}], "exclude": [{"class": "star"}]}, '"count" of at least 1'),
        ({"include": [{"class": "star", "count": 1, "position": ["left of", 0]}]}, "earlier clause"),
        (
            {"include": [{"class": "a", "count": 1}, {"class": "b", "count": 1, "position": ["near", 0]}]},
            "relation among left of",
        ),
    ],
)
def test_ill_formed_records_are_refused(fields: dict[str, Any], message: str) -> None:
    prompt = Prompt("p7", "a star", "single_object", fields)
    with pytest.raises(RequestError, match=rf"'p7'.*{message}"):
        check_record(prompt)
    with pytest.raises(RequestError, match="'p7'"):
        GenEvalScorer(ByWidth({8: []})).score([picture(8)], [prompt])


# --- partial credit --------------------------------------------------------------------------------------------------
def credit(include: list[dict], *detections: Detection, task: str = "two_object") -> float | None:
    return partial_credit({"include": include}, keep(detections, task)).value


def two_clauses(rng: random.Random) -> tuple[dict[str, Any], list[Detection]]:
    labels = rng.sample(CLASSES, 2)
    include = [{"class": label, "count": rng.choice([1, 1, 2])} for label in labels]
    for clause in include:
        if rng.random() < 0.5:
            clause["color"] = rng.choice(COLOURS)
    if rng.random() < 0.5:
        include[1]["position"] = [rng.choice(GENEVAL_RELATIONS), 0]
    corners = [(rng.randrange(50), rng.randrange(50)) for _ in range(rng.randrange(7))]
    detections = [found(rng.choice(CLASSES), (x, y, x + 9, y + 9), colour=rng.choice(COLOURS)) for x, y in corners]
    return {"include": include}, detections


def test_partial_credit_is_full_only_for_pictures_that_pass_and_lies_within_one() -> None:
    rng = random.Random(3)
    passed = 0
    for _ in range(4000):
        record, detections = two_clauses(rng)
        value = partial_credit(record, keep(detections, "two_object")).value
        assert value is not None
        assert 0 <= value <= 1
        if value == 1:
            passed += 1
            assert judge(record, detections).value == 1
    assert passed > 20


def test_partial_credit_grows_with_what_is_right() -> None:
    two = [{"class": "circle", "count": 1, "color": "red"}, {"class": "star", "count": 1, "color": "blue"}]
    red, blue = found("circle", colour="red"), found("star", (30, 0, 40, 10), colour="blue")
    assert credit(two) == 0
    assert credit(two, red) == 0.5
    assert credit(two, red, found("star", colour="red")) == 0.75
    assert credit(two, red, blue) == 1
    three = [{"class": "circle", "count": 3}]
    values = [credit(three, *[found("circle", (9 * n, 0, 9 * n + 8, 8)) for n in range(count)]) for count in range(8)]
    assert values == pytest.approx(
        [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0, 0]
    )  # too many are as wrong as too few, no less


def test_a_wrong_position_is_worth_nothing() -> None:
    beside = [{"class": "circle", "count": 1}, {"class": "star", "count": 1, "position": ["left of", 0]}]
    circle, star = found("circle", (30, 0, 40, 10)), found("star", (0, 0, 10, 10))
    assert credit(beside, circle, star) == 1
    assert credit(beside, circle, found("star", (60, 0, 70, 10))) == pytest.approx(2 / 3)
    assert credit(beside, star) == pytest.approx(1 / 3)


def test_partial_credit_has_a_name_of_its_own() -> None:
    assert PartialCreditScorer(ByWidth({})).identity()["metric"] == "partial_credit"


@pytest.mark.parametrize(
    ("bench", "fields", "said"),
    [
        ("coco", {"include": [{"class": "bycicle", "count": 1}]}, "class 'bycicle'.*did you mean 'bicycle'"),
        ("coco", {"include": [{"class": "cat", "count": 1, "color": "rde"}]}, "color 'rde'.*did you mean 'red'"),
        ("coco", {"include": [{"class": "cat", "count": 1}], "exclude": [{"class": "qqq", "count": 1}]}, "person, bic"),
        ("shapes", {"include": [{"class": "dog", "count": 1}]}, "class 'dog'"),
        ("coco", {"include": 5}, 'a list of clauses as "include", but got 5'),
        ("coco", {"include": [{"class": "cat", "count": 1}], "exclude": None}, '"exclude", but got None'),
    ],
)
def test_a_word_that_no_detection_has_is_refused_before_anything_is_drawn(bench, fields, said):
    with pytest.raises(RequestError, match=rf"'mine'.*{said}"):
        find_bench("geneval", bench).check(Prompt("mine", "a picture", "single_object", fields))


@pytest.mark.parametrize("objects", ["coco", "shapes"])
def test_every_prompt_of_the_benches_is_in_its_judge_s_words(objects):
    bench = find_bench("geneval", objects)
    for prompt in bench.prompts():
        bench.check(prompt)
