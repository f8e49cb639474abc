"""What cannot be done is a message on the node that names the value, the place and the remedy."""

import json

import pytest

from .client import Refused
from .graphs import Drawing


def said(server, graph):
    """What the server says of a prompt that fails, when it is queued or when it runs."""
    try:
        ran = server.run(graph)
    except Refused as refusal:
        return json.dumps(refusal.errors)
    assert ran.status == "error"
    return ran.error


def with_lora(file):
    drawing = Drawing()
    drawing.show(drawing.lora(file), 1)
    return drawing.graph


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("wrong/no-scale/adapter_model.safetensors", ["bare PEFT file", "adapter_config.json", "flowopd-eval convert"]),
        ("wrong/other-alpha/adapter_model.safetensors", ["another rank than its config's r = 16", "another file's"]),
        ("wrong/no-match/adapter_model.safetensors", ["23 of 23 modules match nothing", "transformer_blocks.90"]),
        ("wrong/partial/adapter_model.safetensors", ["7 of 23 modules match nothing", "transformer_blocks.92.attn"]),
        ("wrong/other-size/adapter_model.safetensors", ["have another shape", "LoRA 192x384, model 192x192"]),
        ("wrong/original-names/adapter_model.safetensors", ["original SD3 naming", "not supported here"]),
        ("wrong/nothing/adapter_model.safetensors", ["1 of 1 keys match no LoRA layout"]),
        ("wrong/pickled.pt", ["no .safetensors file"]),
        ("wrong/truncated.safetensors", ["truncated"]),
        ("not/there.safetensors", ["not/there.safetensors"]),
    ],
    ids=lambda value: value.split("/")[1] if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_put_on_is_refused_with_the_reason(server, file, words):
    message = said(server, with_lora(file))
    assert all(word in message for word in words), message


def test_a_missing_expert_is_named_with_its_address_and_its_place(server):
    drawing = Drawing()
    node = drawing.add("FlowOPDExpert", model=drawing.model, expert="pickscore", strength=1.0)
    drawing.show(node, 1)
    message = said(server, drawing.graph)
    for word in ("jieliu/SD3.5M-FlowGRPO-PickScore", "adapter_model.safetensors", "loras/SD3.5M-FlowGRPO-PickScore"):
        assert word in message.replace("\\", "/"), message


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("FlowOPDExpert", "expert", "nobody"),
        ("FlowOPDLora", "lora", "nowhere.safetensors"),
        ("compare", "sampler_name", "eular"),
        ("compare", "scheduler", "usual"),
        ("best", "bench", "beauty"),
    ],
)
@pytest.mark.parametrize("linked", [False, True])
def test_a_value_out_of_its_list_is_refused_by_name(server, kind, field, value, linked):
    """Also where it comes over a link: servers do not hold linked values to the list."""
    drawing = Drawing()
    given = [drawing.add("PrimitiveString", value=value), 0] if linked else value
    if kind == "compare":
        drawing.show(drawing.compare("base", 1, **{field: given}), 3)
    elif kind == "best":
        drawing.show(drawing.best(1, 1, "a photo of a red circle", **{field: given}), 4)
    else:
        drawing.show(drawing.add(kind, model=drawing.model, strength=1.0, **{field: given}), 1)
    message = said(server, drawing.graph)
    assert (value in message) or (linked and "mismatch" in message), message


def test_a_routed_name_that_is_none_is_refused(server):
    drawing = Drawing()
    routed = [drawing.add("PrimitiveString", value="nobody"), 0]
    node = drawing.add("FlowOPDExpert", model=drawing.model, expert="student", strength=1.0, routed=routed)
    drawing.show(node, 1)
    message = said(server, drawing.graph)
    assert "Unknown model 'nobody'" in message
    assert "student, geneval, ocr, pickscore, deqa, base" in message


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ("base\nstudent\nbase", ["stands twice"]),
        ("base\npickscore\ndeqa", ["pickscore", "SD3.5M-FlowGRPO-Deqa-Mix"]),
        ("\n# nothing\n", ["No model is named"]),
        ("base\nwrong/partial/adapter_model.safetensors", ["7 of 23 modules match nothing"]),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_before_anything_is_drawn(server, experts, words):
    drawing = Drawing()
    drawing.spoil("count", 1, "refused")
    drawing.show(drawing.compare(experts, 1), 3)
    message = said(server, drawing.graph)
    assert all(word in message for word in words), message
    assert server.about()["calls"]["refused"] == 0


def test_a_file_written_over_is_read_again(server, base):
    """The cache goes by content: the same name with other weights draws another picture."""
    place = base / "models" / "loras" / "changing"
    place.mkdir(exist_ok=True)
    shown = []
    for source in ("Flow-OPD", "SD3.5M-FlowGRPO-GenEval", "Flow-OPD"):
        for file in (base / "models" / "loras" / source).iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        drawing = Drawing()
        drawing.lora("changing/adapter_model.safetensors")
        saved = drawing.decode(drawing.sample(3))
        shown.append(server.pictures(server.done(drawing.graph), saved)[0])
    assert (shown[0] == shown[2]).all()
    assert abs(shown[0] - shown[1]).max() > 20
