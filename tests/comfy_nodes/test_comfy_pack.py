"""What holds of the pack as a whole, read from its sources: imports, schemas, example workflows, metadata."""

from __future__ import annotations

import ast
import asyncio
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from comfy_server.schemas import NODES, PACK, SCHEMAS, STOCK

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))
COMFY = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "latent_preview", "nodes", "server"}
COMFY_HAS = {"torch", "numpy", "PIL", "safetensors"}  # of ComfyUI's own requirements


def imports(path: Path, *, only_at_import: bool = False) -> set[str]:
    """Top-level names imported by a file; with ``only_at_import`` those that run when it is imported."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if only_at_import:
        lazy = [
            child
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
            for child in ast.walk(node)
        ]
        nodes = [node for node in nodes if node not in lazy]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found - set(sys.stdlib_module_names) - {"__future__"}


@pytest.mark.parametrize("path", sorted(PACK.rglob("*.py")), ids=lambda p: str(p.relative_to(PACK)))
def test_imports_stay_where_they_belong(path: Path) -> None:
    room = path.relative_to(PACK).parts[0]
    assert "flowopd_eval" not in imports(path, only_at_import=True)
    if room == "logic":
        allowed = COMFY_HAS | ({"flowopd_eval"} if path.name == "judges.py" else set())
    else:
        allowed = COMFY_HAS | COMFY
        assert "flowopd_eval" not in imports(path)
    assert imports(path) <= allowed
    text = path.read_text()
    assert not any(word in text for word in ("eval(", "exec(", "setattr(", "subprocess", "urlopen", "requests"))


def test_the_logic_comes_without_comfyui_and_the_pack_does_nothing_when_imported() -> None:
    code = (
        "import sys, comfy_nodes;"
        "assert not [m for m in sys.modules if m.startswith(('comfy_nodes.', 'torch'))], 'work at import';"
        "import comfy_nodes.logic.route, comfy_nodes.logic.judges, comfy_nodes.logic.best, comfy_nodes.logic.experts;"
        "print([m for m in ('comfy', 'flowopd_eval', 'diffusers', 'peft', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_the_entry_point_is_the_only_one_and_asks_for_comfyui_itself() -> None:
    import comfy_nodes

    assert not hasattr(comfy_nodes, "NODE_CLASS_MAPPINGS"), "the V3 entry point would be ignored"
    with pytest.raises(ModuleNotFoundError, match="comfy_api"):
        asyncio.run(comfy_nodes.comfy_entrypoint())


def test_the_pack_has_its_nodes_each_under_one_category_and_executes_what_it_declares() -> None:
    assert sorted(SCHEMAS) == sorted(
        f"FlowOPD{name}" for name in ("Lora", "Expert", "Route", "Merge", "Compare", "Score", "KeepBest")
    )
    assert {schema.category for schema in SCHEMAS.values()} == {"CATEGORY"}
    listed = ast.parse((PACK / "extension.py").read_text())
    modules = next(n for n in listed.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "MODULES")
    with_node = {path.stem for path in NODES if "\nNODE = " in path.read_text()}
    assert set(ast.literal_eval(modules.value)) == with_node
    assert len(with_node) == len(SCHEMAS)


@pytest.mark.parametrize("path", [p for p in NODES if "\nNODE = " in p.read_text()], ids=lambda p: p.stem)
def test_execute_takes_the_inputs_and_returns_the_outputs_of_the_schema(path: Path) -> None:
    tree = ast.parse(path.read_text())
    node = next(n for n in tree.body if isinstance(n, ast.ClassDef))
    execute = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "execute")
    (node_id,) = (
        ast.literal_eval(k.value)
        for n in ast.walk(node)
        if isinstance(n, ast.keyword) and n.arg == "node_id"
        for k in [n]
    )
    schema = SCHEMAS[node_id]
    taken = {argument.arg for argument in execute.args.args} - {"cls"}
    assert taken <= schema.inputs.keys()
    assert execute.args.kwarg is not None or taken == schema.inputs.keys()
    optional = {a.arg for a in execute.args.args[len(execute.args.args) - len(execute.args.defaults) :]}
    assert optional == {name for name, i in schema.inputs.items() if i["optional"]} & taken
    for returned in (
        n for n in ast.walk(execute) if isinstance(n, ast.Call) and ast.unparse(n.func) == "io.NodeOutput"
    ):
        assert len(returned.args) == len(schema.outputs)


def test_the_settings_of_a_node_that_draws_are_the_fields_of_its_sampling() -> None:
    tree = ast.parse((PACK / "nodes" / "sampling.py").read_text())
    sampling = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Sampling")
    fields = {n.target.id for n in sampling.body if isinstance(n, ast.AnnAssign)}  # type: ignore[attr-defined]
    for node_id, own in (
        ("FlowOPDCompare", {"model", "experts", "strength", "seed"}),
        ("FlowOPDKeepBest", {"model", "prompt", "bench", "clauses", "n", "pass_at", "seed"}),
    ):
        assert SCHEMAS[node_id].inputs.keys() - own == fields


def ports(kind: str) -> tuple[dict[str, str | None], list[str], set[str]]:
    """Inputs (None: a widget), outputs and optional inputs of a node."""
    if kind in STOCK:
        return (*STOCK[kind], set())
    schema = SCHEMAS[kind]
    inputs = {name: None if i["widget"] else i["type"] for name, i in schema.inputs.items()}
    return inputs, [t for _, t in schema.outputs], {name for name, i in schema.inputs.items() if i["optional"]}


@pytest.mark.parametrize("path", sorted((PACK / "example_workflows" / "api").glob("*.json")), ids=lambda p: p.stem)
def test_an_example_names_nodes_that_are_there_and_fills_every_input(path: Path) -> None:
    graph = json.loads(path.read_text())
    used = set()
    for node in graph.values():
        inputs, _, optional = ports(node["class_type"])
        assert node["inputs"].keys() - optional == inputs.keys() - optional
        assert node["inputs"].keys() <= inputs.keys()
        used.add(node["class_type"])
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                source, slot = value
                given = ports(graph[source]["class_type"])[1][slot]
                wanted = inputs[name] or "STRING"  # of the widgets only texts are linked here
                assert wanted in (given, "*"), (name, given)
            else:
                assert inputs[name] is None, f"{name} wants a link"
    assert used & SCHEMAS.keys()
    assert used & {"SaveImage", "PreviewImage"}, "nothing would run"


def as_api(document: dict) -> dict:
    """A UI-format workflow as the API format says it: widgets by the order of the schema."""
    links = {link[0]: link for link in document["links"]}
    graph = {}
    for node in document["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        inputs, outputs, _ = ports(node["type"])
        assert [o["type"] for o in node["outputs"]] == outputs
        values, filled = list(node["widgets_values"]), {}
        for name, kind in inputs.items():
            if kind is None:
                filled[name] = values.pop(0)
                if name == "seed":
                    assert values.pop(0) in ("fixed", "randomize")
        assert not values
        for slot, port in enumerate(node["inputs"]):
            if port["link"] is not None:
                _, source, source_slot, target, target_slot, _ = links[port["link"]]
                assert (target, target_slot) == (node["id"], slot)
                filled[port["name"]] = [str(source), source_slot]
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": filled}
    for link, source, slot, *_ in links.values():
        assert link in next(n for n in document["nodes"] if n["id"] == source)["outputs"][slot]["links"]
    return graph


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_both_formats_of_an_example_are_one_graph(path: Path) -> None:
    api = json.loads((path.parent / "api" / path.name).read_text())
    plain = {i: {"class_type": n["class_type"], "inputs": n["inputs"]} for i, n in api.items()}
    assert as_api(json.loads(path.read_text())) == plain


def test_the_examples_show_the_student_comparing_routing_and_scoring() -> None:
    shown = {
        n["class_type"]
        for path in WORKFLOWS
        for n in json.loads((path.parent / "api" / path.name).read_text()).values()
    }
    assert {"FlowOPDExpert", "FlowOPDCompare", "FlowOPDRoute", "FlowOPDScore", "FlowOPDKeepBest"} <= shown
    assert {p.name for p in WORKFLOWS} == {p.name for p in (PACK / "example_workflows" / "api").glob("*.json")}


def test_the_metadata_promises_nothing_but_what_comfyui_has() -> None:
    meta = tomllib.loads((PACK / "pyproject.toml").read_text())
    project, comfy = meta["project"], meta["tool"]["comfy"]
    assert project["dependencies"] == []
    assert not (PACK / "requirements.txt").exists()
    assert not (PACK / "install.py").exists()
    assert "comfyui" not in project["name"].lower()
    assert len(project["version"].split(".")) == 3
    assert (PACK / project["license"]["file"]).read_text() == (ROOT / "LICENSE").read_text()
    assert comfy.keys() >= {"PublisherId", "DisplayName", "Icon", "requires-comfyui"}
    assert "build-system" not in meta
