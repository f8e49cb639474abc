"""Score and Keep best of N against the toolkit's own scorers; and both without the toolkit."""

import numpy as np
import pytest
from PIL import Image

from flowopd_eval.records import Prompt
from flowopd_eval.scorers.geneval import GenEvalScorer
from flowopd_eval.tiny.detector import ShapesDetector
from flowopd_eval.tiny.scenes import draw_scene, sample_scene

from .graphs import Draft, Drawing

WORDS = {"shapes_geneval": "a photo of a red circle", "ocr": 'a sign that says "CAT"'}


def scenes(task, count=3):
    """Scenes of one task, drawn: picture, caption, clauses."""
    rng = np.random.default_rng(4)
    drawn = [sample_scene(rng, task) for _ in range(count)]
    return [(Image.fromarray(draw_scene(scene)), scene) for scene in drawn]


def judged(server, picture, prompt, bench, clauses="", name="scene.png"):
    """Score's annotated picture, number and text for an uploaded picture."""
    draft = Draft()
    image = draft.add("LoadImage", image=server.upload(picture, name))
    score = draft.add("FlowOPDScore", images=[image, 0], prompt=prompt, bench=bench, clauses=clauses)
    saved = draft.add("SaveImage", images=[score, 0], filename_prefix="flow-opd-tests/annotated")
    number, text = (draft.add("PreviewAny", source=[score, output]) for output in (1, 2))
    ran = server.done(draft.graph)
    return server.pictures(ran, saved)[0], float(ran.text(number)), ran.text(text)


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("task", ["single_object", "two_object", "counting", "colors", "position", "color_attr"])
def test_a_verdict_is_the_toolkits(server, task):
    """Each scene under its own caption and under another's: right and wrong verdicts."""
    found = scenes(task)
    scorer = GenEvalScorer(ShapesDetector())
    for k, (picture, _) in enumerate(found):
        for _, scene in (found[k], found[k - 1]):
            prompt = Prompt("x", scene.caption, task, {"include": scene.include, "exclude": scene.exclude})
            (ours,) = scorer.score([picture], [prompt])
            annotated, value, text = judged(
                server, picture, scene.caption.split(" on ")[0], "shapes_geneval", name=f"{task}{k}.png"
            )
            assert value == ours.value, (scene.caption, text, ours.reason)
            assert (ours.reason or "correct") in text
            assert annotated.shape[0] > 64, "the verdict's strip"
            boxes = [box for rows in ours.detail["boxes"].values() for box in rows]
            assert (abs(annotated[:64] - np.asarray(picture, int)).max() > 0) == bool(boxes)


@pytest.mark.usefixtures("scores")
def test_a_read_out_is_the_toolkits(server):
    if not server.about()["packages"]["rapidocr"]:
        pytest.skip("the server's Python has no rapidocr")
    from flowopd_eval.scorers.ocr import OCRScorer
    from flowopd_eval.scorers.ocr_engines import RapidOCREngine

    picture, scene = scenes("ocr", 1)[0]
    for word in (scene.sign.word, "HOTEL"):
        prompt = f'a sign that says "{word}"'
        (ours,) = OCRScorer(RapidOCREngine(160)).score([picture], [Prompt("x", prompt, "ocr")])
        _, value, text = judged(server, picture, prompt, "ocr")
        assert value == pytest.approx(ours.value)
        assert ours.detail["recognised"] in text


@pytest.mark.usefixtures("scores")
def test_clauses_of_ones_own_and_prompts_that_cannot_be_judged(server):
    picture, scene = scenes("counting", 1)[0]
    (clause,) = scene.include
    clauses = f'{{"include": [{{"class": "{clause["class"]}", "count": {clause["count"]}}}]}}'
    assert judged(server, picture, "anything at all", "shapes_geneval", clauses)[1] == 1.0
    draft = Draft()
    image = draft.add("LoadImage", image=server.upload(picture, "scene.png"))
    draft.add("PreviewAny", source=[
        draft.add("FlowOPDScore", images=[image, 0], prompt="a feeling", bench="shapes_geneval", clauses=""), 2
    ])  # fmt: skip
    ran = server.run(draft.graph)
    assert "GenEval cannot judge 'a feeling'" in ran.error


@pytest.mark.usefixtures("scores")
def test_the_best_of_n_is_the_best_of_n_single_runs(server):
    prompt, first, n = "a photo of two circles", 25, 4
    values, pictures = [], []
    for seed in range(first, first + n):
        single = Drawing(prompt)
        image = single.add("VAEDecode", samples=[single.sample(seed), 0], vae=single.vae)
        score = single.add("FlowOPDScore", images=[image, 0], prompt=prompt, bench="shapes_geneval", clauses="")
        saved, number = single.save(image, 0), single.show(score, 1)
        ran = server.done(single.graph)
        values.append(float(ran.text(number)))
        pictures.append(server.pictures(ran, saved)[0])
    assert values[0] < 1.0 <= max(values), "seeds of which the first does not pass"
    for pass_at in (1.0, 0.0):
        drawing = Drawing(prompt)
        best = drawing.best(n, first, prompt, pass_at=pass_at)
        saved, number, seed, text = drawing.save(best, 0), *(drawing.show(best, output) for output in (2, 3, 4))
        ran = server.done(drawing.graph)
        passing = [k for k, value in enumerate(values) if value >= pass_at]
        kept = passing[0] if passing else values.index(max(values))
        assert int(ran.text(seed)) == first + kept
        assert float(ran.text(number)) == values[kept]
        assert np.array_equal(server.pictures(ran, saved)[0], pictures[kept])
        drawn = kept + 1 if passing else n
        assert f"{drawn} drawn" in ran.text(text)
        assert ("passed" in ran.text(text).split(":")[0].split()[:1]) == bool(passing)


@pytest.mark.usefixtures("scores")
def test_no_judge_stays_in_memory(server):
    picture, scene = scenes("single_object", 1)[0]
    judged(server, picture, scene.caption.split(" on ")[0], "shapes_geneval")
    server.free()
    judges = {"GenEvalScorer", "ShapesDetector", "OCRScorer", "RapidOCREngine"}
    assert not judges & set(server.about()["scorers"])


@pytest.mark.parametrize("bench", WORDS)
@pytest.mark.parametrize("node", ["FlowOPDScore", "FlowOPDKeepBest"])
def test_without_the_package_the_node_says_what_is_missing_and_the_others_work(server, bench, node):
    if server.about()["packages"]["flowopd_eval"]:
        pytest.skip("the server's Python has flowopd-eval; start one without it")
    drawing = Drawing()
    drawing.spoil("count", 1, f"missing {bench}")
    if node == "FlowOPDKeepBest":
        drawing.show(drawing.best(2, 1, WORDS[bench], bench=bench), 4)
    else:
        image = drawing.add("EmptyImage", width=64, height=64, batch_size=1, color=0)
        score = drawing.add("FlowOPDScore", images=[image, 0], prompt=WORDS[bench], bench=bench, clauses="")
        drawing.show(score, 2)
    ran = server.run(drawing.graph)
    assert "Scoring needs the package flowopd-eval in ComfyUI's own Python" in ran.error
    assert "python -m pip install 'flowopd-eval[ocr] @ file:///PATH/TO/CHECKOUT'" in ran.error
    if node == "FlowOPDKeepBest":
        assert server.about()["calls"][f"missing {bench}"] == 0, "nothing is drawn that cannot be judged"
    works = Drawing()
    works.lora("Flow-OPD/adapter_model.safetensors")
    works.decode(works.sample(1))
    server.done(works.graph)
