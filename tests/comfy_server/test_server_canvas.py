"""The examples in ComfyUI's own front end."""

import io
import json

import pytest
from PIL import Image

from .canvas import browser, exchange_model, open_example, press_run
from .graphs import EXAMPLES, as_miniature

pytest.importorskip("playwright", reason="needs playwright and Debian's chromium")
SHOWN = """kinds => app.graph._nodes.filter(n => n.imgs && n.imgs.length && kinds.includes(n.type)).map(n => n.type)
  .sort().join() === kinds.join()"""
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))


@pytest.fixture(scope="module")
def page(server):
    with browser(server.url) as page:
        yield page


def api(name):
    graph = json.loads((EXAMPLES / "api" / f"{name}.json").read_text())
    return {number: {k: node[k] for k in ("class_type", "inputs")} for number, node in graph.items()}


def as_queued(page):
    """What the front end would queue; PreviewAny has widgets of the front end's own, which the server does not know."""
    graph = page.evaluate("async () => (await app.graphToPrompt()).output")
    for node in graph.values():
        if node["class_type"] == "PreviewAny":
            node["inputs"] = {"source": node["inputs"]["source"]}
    return {number: {k: node[k] for k in ("class_type", "inputs")} for number, node in graph.items()}


@pytest.mark.parametrize("name", NAMES)
def test_an_example_opens_and_queues_what_its_api_form_says(page, name):
    open_example(page, name)
    assert page.evaluate("() => app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]).length") == 0
    faulty = page.evaluate("() => app.graph._nodes.filter(n => n.has_errors).map(n => n.type)")
    assert set(faulty) <= {"CheckpointLoaderSimple"}  # newer front ends mark it, as SD3.5's file is not there
    assert as_queued(page) == api(name)
    boxes = page.evaluate("() => app.graph._nodes.map(n => [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30])")
    for i, (x, y, w, h) in enumerate(boxes):
        for u, v, s, t in boxes[:i]:
            assert x + w <= u or u + s <= x or y + h <= v or v + t <= y, "two nodes overlap"


@pytest.mark.parametrize("name", NAMES)
def test_run_in_the_canvas_draws(page, server, name):
    if name in ("flow_opd_score", "flow_opd_best_of_n") and not server.about()["packages"]["flowopd_eval"]:
        pytest.skip("the server's Python has no flowopd-eval")
    open_example(page, name)
    exchange_model(page)
    replaced, _ = as_miniature(api(name))
    kinds = sorted(node["class_type"] for node in replaced.values())
    assert sorted(node["class_type"] for node in as_queued(page).values()) == kinds
    assert press_run(page, server) == "success"
    wanted = [kind for kind in kinds if kind in ("SaveImage", "PreviewImage")]  # samplers show their previews besides
    page.wait_for_function(SHOWN, arg=wanted, timeout=60_000)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_a_picture_beside_it(name):
    file = EXAMPLES / f"{name}.jpg"
    assert file.stat().st_size < 150_000
    assert min(Image.open(io.BytesIO(file.read_bytes())).size) > 300
