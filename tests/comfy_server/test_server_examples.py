"""Every example as an API prompt, with the miniature's files in the places of SD3.5's."""

import json

import numpy as np
import pytest

from .files import PROMPTS
from .graphs import EXAMPLES, as_miniature, example

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_only_what_says_sd35_is_replaced(name, record_property):
    """The substitution in words: it stands in the report of the tests (``--junit-xml``) and with ``-s`` on screen."""
    given = json.loads((EXAMPLES / "api" / f"{name}.json").read_text())
    replaced, changes = as_miniature(given)
    record_property("replaced", changes)
    print(f"\n{name}", *changes, sep="\n  ")
    loaders = [n for n, node in given.items() if node["class_type"] == "CheckpointLoaderSimple"]
    assert {n for n in given if replaced[n]["class_type"] != given[n]["class_type"]} == set(loaders)
    kinds = {
        change.split(": ")[1].split(".")[-1] for change in changes if "->" in change and "Checkpoint" not in change
    }
    assert kinds <= {"width", "height", "steps", "value", "bench"}
    ours = {"sampler_name": "euler", "scheduler": "normal", "shift": 3.0, "cfg": 4.5, "denoise": 1.0, "steps": 40}
    for node in given.values():
        for field, value in ours.items():
            assert node["inputs"].get(field, value) == value, "the settings of the paper, which diffusers draws with"
    t5 = next(node for node in given.values() if node["class_type"] == "T5TokenizerOptions")
    assert t5["inputs"]["min_length"] == 128
    encoders = [node for node in given.values() if node["class_type"] == "CLIPTextEncode"]
    assert all(given[node["inputs"]["clip"][0]] is t5 for node in encoders)


def picture_of(expert: str | None, prompt: str, experts, seed: int = 0) -> np.ndarray:
    return np.asarray(experts(prompt, expert=expert, seed=seed).images[0], int)


@pytest.mark.parametrize(
    ("name", "node", "expert", "asked"),
    [
        ("flow_opd_student", "10", "student", "a photo of a red car and a blue bench"),
        ("flow_opd_route", "10", "geneval", "a photo of three dogs left of a red bench"),
    ],
)
def test_an_example_draws_the_pipelines_picture(server, experts, name, node, expert, asked):
    ran = server.done(example(name))
    (picture,) = server.pictures(ran, node)
    assert abs(picture - picture_of(expert, PROMPTS[asked], experts)).max() <= 2
    shown = [output["text"][0] for output in ran.outputs.values() if "text" in output]
    assert any(text.startswith(f"{expert}, ") for text in shown)


def test_the_comparison_shows_every_arm_under_its_name(server, experts):
    ran = server.done(example("flow_opd_compare"))
    named = server.pictures(ran, "8")
    assert len(named) == 4
    asked = PROMPTS['a cat that holds a sign that says "hello"']
    for arm, picture in zip([None, "student", "geneval", "ocr"], named, strict=True):
        assert abs(picture[-64:] - picture_of(arm, asked, experts)).max() <= 2
        assert picture[:-64].min() < 100, "the label"
    (grid,) = server.pictures(ran, "7")
    assert np.array_equal(grid, np.concatenate(named, axis=1))
    report = next(output["text"][0] for output in ran.outputs.values() if "text" in output)
    assert report == "base: drawn\nstudent: drawn\ngeneval: drawn\nocr: drawn"


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize(("name", "pictures"), [("flow_opd_score", 4), ("flow_opd_best_of_n", 1)])
def test_an_example_that_judges_runs(server, experts, name, pictures):
    graph = example(name)
    ran = server.done(graph)
    saved = next(n for n, node in graph.items() if node["class_type"] == "SaveImage")
    drawn = server.pictures(ran, saved)
    assert len(drawn) == pictures
    judged = next(n for n, node in graph.items() if node["class_type"] in ("FlowOPDScore", "FlowOPDKeepBest"))
    assert ran.text(judged)
    if name == "flow_opd_score":
        first = picture_of("geneval", PROMPTS["a photo of three dogs"], experts)
        assert abs(drawn[0] - first).max() <= 2


def test_every_example_is_covered_here():
    assert set(NAMES) == {
        "flow_opd_student",
        "flow_opd_route",
        "flow_opd_compare",
        "flow_opd_score",
        "flow_opd_best_of_n",
    }
