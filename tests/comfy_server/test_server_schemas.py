"""What the server says of the nodes against what their sources say."""

import pytest

from .schemas import SCHEMAS, STOCK


@pytest.fixture(scope="module")
def described(server):
    return server.json("/object_info")


def test_the_server_has_the_packs_nodes_and_no_others(described):
    ours = {name for name, node in described.items() if node["category"] == "Flow-OPD"}
    assert ours == SCHEMAS.keys()
    assert not any(described[name]["deprecated"] or described[name]["experimental"] for name in ours)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_node_is_described_as_its_schema_says(described, name):
    node, schema = described[name], SCHEMAS[name]
    assert [(n, t) for n, t in zip(node["output_name"], node["output"], strict=True)] == schema.outputs
    wanted = {
        o: [n for n, i in schema.inputs.items() if i["optional"] == (o == "optional")] for o in ("required", "optional")
    }
    assert {o: names for o, names in node["input_order"].items() if names} == {o: n for o, n in wanted.items() if n}
    for group, inputs in node["input"].items():
        for field, (kind, options) in inputs.items():
            assert kind == schema.inputs[field]["type"], (group, field)
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= options["default"] <= options["max"], field
            assert bool(options.get("control_after_generate")) == schema.inputs[field]["seed"]
    assert node["description"]


@pytest.mark.parametrize("name", [name for name in STOCK if name != "PreviewAny"])
def test_the_stock_nodes_of_the_examples_are_as_we_take_them(described, name):
    inputs, outputs = STOCK[name]
    node = described[name]
    assert node["input_order"]["required"] == list(inputs)
    kinds = [kind if isinstance(kind, str) else "COMBO" for kind in node["output"]]
    assert kinds[: len(outputs)] == outputs  # SaveImage and PreviewImage of newer versions pass the picture on
    for field, kind in inputs.items():
        if kind is not None:
            assert node["input"]["required"][field][0] == kind


def options(node, field):
    """A combo's options, in the old form or the new."""
    kind, *more = node["input"]["required"][field]
    return kind if isinstance(kind, list) else more[0]["options"]


def test_loras_and_samplers_are_those_of_the_server(described):
    loras = options(described["FlowOPDLora"], "lora")
    assert loras == options(described["LoraLoaderModelOnly"], "lora_name")
    assert "Flow-OPD/adapter_model.safetensors" in loras
    for field in ("sampler_name", "scheduler"):
        assert options(described["FlowOPDCompare"], field) == options(described["KSampler"], field)


def test_the_examples_appear_as_templates(server):
    templates = server.json("/workflow_templates")
    found = next(names for pack, names in templates.items() if "flow_opd_student" in names)
    assert sorted(found) == [
        "flow_opd_best_of_n",
        "flow_opd_compare",
        "flow_opd_route",
        "flow_opd_score",
        "flow_opd_student",
    ]
