"""What the pack's nodes and the stock nodes of its examples take and give, read from sources: nothing is imported."""

from __future__ import annotations

import ast
from pathlib import Path

PACK = Path(__file__).parents[2] / "comfy_nodes"
NODES = sorted((PACK / "nodes").glob("*.py"))


class Schema:
    """A node's schema as its source says it: id, inputs (id -> type, optional, options), outputs."""

    def __init__(self, call: ast.Call, functions: dict[str, ast.FunctionDef]):
        fields = {keyword.arg: keyword.value for keyword in call.keywords}
        self.node_id = ast.literal_eval(fields["node_id"])
        self.category = ast.unparse(fields["category"])
        self.inputs: dict[str, dict] = {}
        for call_ in self._calls(fields["inputs"], functions):
            options = {keyword.arg: keyword.value for keyword in call_.keywords}
            kind = ast.unparse(call_.func).split(".")[1].upper()
            optional = "optional" in options and ast.literal_eval(options["optional"])
            name = ast.literal_eval(call_.args[0])
            assert name not in self.inputs
            widget = kind in ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN") and "force_input" not in options
            self.inputs[name] = {
                "type": kind,
                "optional": optional,
                "widget": widget,
                "seed": "control_after_generate" in options,
            }
        self.outputs = []
        for call_ in fields["outputs"].elts:  # type: ignore[attr-defined]
            kind = ast.unparse(call_.func).split(".")[1].upper()
            self.outputs.append((ast.literal_eval(call_.keywords[0].value), kind))

    def _calls(self, node: ast.expr, functions: dict[str, ast.FunctionDef]) -> list[ast.Call]:
        found = []
        for element in node.elts:  # type: ignore[attr-defined]
            if isinstance(element, ast.Starred):
                shared = functions[element.value.func.id]  # type: ignore[attr-defined]
                returned = next(n for n in ast.walk(shared) if isinstance(n, ast.Return))
                found += self._calls(returned.value, functions)  # type: ignore[arg-type]
            else:
                found.append(element)
        return found


def schemas() -> dict[str, Schema]:
    trees = {path: ast.parse(path.read_text()) for path in NODES}
    functions = {n.name: n for tree in trees.values() for n in tree.body if isinstance(n, ast.FunctionDef)}
    calls = [n for tree in trees.values() for n in ast.walk(tree) if isinstance(n, ast.Call)]
    found = [Schema(call, functions) for call in calls if ast.unparse(call.func) == "io.Schema"]
    return {schema.node_id: schema for schema in found}


SCHEMAS = schemas()
# Stock nodes of ComfyUI that the examples use (nodes.py, comfy_extras): input -> type, None for a widget.
STOCK: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "CheckpointLoaderSimple": ({"ckpt_name": None}, ["MODEL", "CLIP", "VAE"]),
    "CLIPTextEncode": ({"text": None, "clip": "CLIP"}, ["CONDITIONING"]),
    "PrimitiveStringMultiline": ({"value": None}, ["STRING"]),
    "T5TokenizerOptions": ({"clip": "CLIP", "min_padding": None, "min_length": None}, ["CLIP"]),
    "EmptySD3LatentImage": ({"width": None, "height": None, "batch_size": None}, ["LATENT"]),
    "ModelSamplingSD3": ({"model": "MODEL", "shift": None}, ["MODEL"]),
    "KSampler": (
        {"model": "MODEL", "seed": None, "steps": None, "cfg": None, "sampler_name": None, "scheduler": None,
         "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT", "denoise": None},
        ["LATENT"],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": None}, []),
    "PreviewImage": ({"images": "IMAGE"}, []),
    "PreviewAny": ({"source": "*"}, []),
}  # fmt: skip
