"""Interruption, an arm that fails, prompts in a queue, progress and previews, memory."""

import json
import time
import urllib.error

import numpy as np
import pytest

from .graphs import Drawing, example

SEED = 5


def comparing(how, at_step, name, experts="base\nstudent", steps=4, **settings):
    """A comparison whose model misbehaves when its steps, over all arms, are counted up to ``at_step``."""
    drawing = Drawing()
    drawing.spoil(how, at_step, name)
    compare = drawing.compare(experts, SEED, steps=steps, **settings)
    return drawing, compare


def wait_for_the_first_step(server, name):
    """Loading comes before: ComfyUI's loaders cannot be interrupted."""
    for _ in range(600):
        try:
            server.view({"filename": f"{name}.started", "subfolder": "flow-opd-tests", "type": "output"})
            return
        except urllib.error.HTTPError:
            time.sleep(0.2)
    raise TimeoutError(f"No step of {name} within two minutes.")


@pytest.mark.parametrize("kind", ["compare", "best"])
def test_an_interruption_is_obeyed_within_a_second(server, kind):
    if kind == "best" and not server.about()["packages"]["flowopd_eval"]:
        pytest.skip("the server's Python has no flowopd-eval")
    drawing = Drawing()
    name = f"long-{kind}-{time.time_ns()}"
    drawing.spoil("count", 1, name)
    node = (
        drawing.compare("base\nstudent", SEED, steps=5000)
        if kind == "compare"
        else drawing.best(4, SEED, "a photo of a red circle", steps=5000)
    )
    drawing.show(node, 3 if kind == "compare" else 4)
    prompt_id = server.queue(drawing.graph)
    wait_for_the_first_step(server, name)
    asked = time.monotonic()
    server.post("/interrupt", {})
    ran = server.wait(prompt_id, 60)
    took = time.monotonic() - asked
    assert ran.interrupted
    assert took < 1, f"{took:.2f} s"
    assert 0 < server.about()["calls"][name] < 5000


@pytest.mark.parametrize("at_step", [2, 4, 5, 8], ids=["within", "between two arms", "first of an arm", "last of all"])
def test_no_step_is_drawn_after_an_interruption(server, at_step):
    name = f"stop {at_step} {time.time_ns()}"
    drawing, compare = comparing("interrupt", at_step, name)
    drawing.show(compare, 3)
    ran = server.run(drawing.graph)
    assert ran.interrupted
    assert server.about()["calls"][name] == at_step


@pytest.mark.parametrize(("how", "reason"), [("fail", "RuntimeError: failed on purpose"), ("nan", "NaN or infinity")])
def test_an_arm_that_fails_does_not_lose_the_others(server, how, reason):
    drawing, compare = comparing(how, 5, f"one arm {how}", experts="base\nstudent\nocr")
    named, raw, shown = drawing.save(compare, 0), drawing.save(compare, 1), drawing.show(compare, 3)
    ran = server.done(drawing.graph)
    lines = ran.text(shown).splitlines()
    assert lines[0] == "base: drawn"
    assert lines[1].startswith("student: not drawn: ")
    assert reason in lines[1]
    assert lines[2] == "ocr: drawn"
    whole = Drawing()
    whole_raw = whole.save(whole.compare("base\nstudent\nocr", SEED, steps=4), 1)
    expected = server.pictures(server.done(whole.graph), whole_raw)
    drawn = server.pictures(ran, raw)
    assert len(drawn) == 2
    assert np.array_equal(drawn[0], expected[0])
    assert np.array_equal(drawn[1], expected[2])
    cards = server.pictures(ran, named)
    assert len(cards) == 3
    assert (cards[1] >= 240).mean() > 0.5, "paper, in the place of the picture"


def test_a_comparison_of_which_nothing_is_drawn_is_an_error(server):
    drawing, compare = comparing("fail", 1, "all arms", experts="base")
    drawing.show(compare, 3)
    ran = server.run(drawing.graph)
    assert ran.status == "error"
    assert "No model could be drawn with" in ran.error
    assert "failed on purpose" in ran.error


def test_a_node_that_fails_does_not_lose_the_prompts_other_branch(server):
    """ComfyUI stops a prompt at its first error; what another prompt needs stands."""
    bad = Drawing()
    bad.show(bad.lora("wrong/partial/adapter_model.safetensors"), 1)
    good = Drawing()
    saved = good.decode(good.sample(SEED))
    first, second = server.queue(bad.graph), server.queue(good.graph)
    assert server.wait(first).status == "error"
    assert len(server.pictures(server.wait(second), saved)) == 1


def test_prompts_that_wait_in_the_queue_draw_what_they_draw_alone(server):
    def graph(seed):
        drawing = Drawing()
        saved = drawing.save(drawing.compare("base\nstudent", seed), 1)
        return drawing.graph, saved

    queued = [(server.queue(g), saved) for g, saved in (graph(11), graph(12))]
    together = [server.pictures(server.wait(i), saved) for i, saved in queued]
    server.free()
    for seed, pictures in zip((12, 11), reversed(together), strict=True):
        again, saved = graph(seed)
        alone = server.pictures(server.done(again), saved)
        assert all(np.array_equal(a, b) for a, b in zip(alone, pictures, strict=True))
    assert not np.array_equal(together[0][0], together[1][0])


def test_progress_counts_all_arms_and_brings_previews(server):
    websocket = pytest.importorskip("websocket", reason="needs the package websocket-client")
    socket = websocket.WebSocket()
    socket.connect(server.url.replace("http", "ws") + f"/ws?clientId={server.client}", timeout=60)
    drawing, compare = comparing("count", 1, f"watched {time.time_ns()}", steps=6)
    drawing.show(compare, 3)
    prompt_id = server.queue(drawing.graph)
    values, previews = [], 0
    while True:
        message = socket.recv()
        if isinstance(message, bytes):
            previews += 1
            continue
        event = json.loads(message)
        if event["type"] == "progress" and event["data"].get("node") == compare:
            values.append((event["data"]["value"], event["data"]["max"]))
        if event["type"] in ("execution_success", "execution_error") and event["data"]["prompt_id"] == prompt_id:
            break
    socket.close()
    assert {top for _, top in values} == {12}
    assert [value for value, _ in values] == list(range(1, 13))
    assert previews >= 2


def test_memory_is_given_back(server):
    """Bytes of live tensors: what is kept after many runs with many LoRAs is what was kept after one."""
    name = "flow_opd_compare"

    def run(seed):
        graph = example(name)
        for node in graph.values():
            if node["class_type"] == "FlowOPDCompare":
                node["inputs"].update(seed=seed, steps=2)
        server.done(graph)
        server.free()
        return server.about()["tensor_bytes"]

    first = run(100)
    after = [run(101 + k) for k in range(3)]
    assert max(after) <= first + 100_000, (first, after)


def test_the_loras_kept_are_few(server):
    """The reader keeps the last four files; going through eight layouts holds no more than that."""
    from .files import factors, layouts

    sizes, one = [], sum(t.nbytes for t in factors(1).values())
    for layout in sorted(layouts(factors(1))):
        drawing = Drawing()
        drawing.show(drawing.lora(f"layouts/{layout}/adapter_model.safetensors"), 1)
        server.done(drawing.graph)
        server.free()
        sizes.append(server.about()["tensor_bytes"])
    assert max(sizes[3:]) - min(sizes[3:]) < one / 2
