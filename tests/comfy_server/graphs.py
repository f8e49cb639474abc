"""Prompts in ComfyUI's API format: the examples with the miniature in SD3.5's place, and small ones for the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from flowopd_eval.models import TINY_RECORD

from .client import Graph
from .files import PROMPTS

EXAMPLES = Path(__file__).parents[2] / "comfy_nodes" / "example_workflows"
LATENT_SIDE = 128  # EmptySD3LatentImage divides by 8; the miniature's 16 x 16 latents are pictures of 64 pixels
# Inputs of an example that say "SD3.5", and what says "the miniature" in their place.
REPLACED: dict[str, Callable[[Any], Any]] = {
    "width": lambda _: LATENT_SIDE,
    "height": lambda _: LATENT_SIDE,
    "steps": lambda _: TINY_RECORD.steps,
    "text": PROMPTS.__getitem__,
    "value": PROMPTS.__getitem__,
    "bench": lambda _: "shapes_geneval",
}


def as_miniature(graph: Graph) -> tuple[Graph, list[str]]:
    """An example with the miniature in the place of SD3.5, and every change in words: nothing else is touched."""
    graph, changes = deepcopy(graph), []
    for number, node in graph.items():
        if node["class_type"] == "CheckpointLoaderSimple":
            changes.append(f"{number}: CheckpointLoaderSimple -> FlowOPDTestLoadMiniature")
            node.update(class_type="FlowOPDTestLoadMiniature", inputs={})
        for name, value in node["inputs"].items():
            new = REPLACED[name](value) if name in REPLACED and not isinstance(value, list) else value
            if new != value:
                changes.append(f"{number}: {node['class_type']}.{name}: {value!r} -> {new!r}")
                node["inputs"][name] = new
    return graph, changes


def example(name: str) -> Graph:
    """The example ``name`` for the miniature."""
    return as_miniature(json.loads((EXAMPLES / "api" / f"{name}.json").read_text()))[0]


class Draft:
    """A prompt put together node by node; ``add`` gives the node's number."""

    def __init__(self) -> None:
        self.graph: Graph = {}

    def add(self, kind: str, **inputs: Any) -> str:
        number = str(len(self.graph) + 1)
        self.graph[number] = {"class_type": kind, "inputs": {k: v for k, v in inputs.items()}}
        return number


PROMPT = PROMPTS["a photo of a red car and a blue bench"]
SAMPLING = {"steps": TINY_RECORD.steps, "cfg": TINY_RECORD.guidance, "sampler_name": "euler", "scheduler": "normal"}


class Drawing(Draft):
    """Loader, conditioning and an empty latent of the miniature; what draws comes from the tests."""

    def __init__(self, prompt: str = PROMPT, batch: int = 1) -> None:
        super().__init__()
        loader = self.add("FlowOPDTestLoadMiniature")
        self.model: list[Any] = [loader, 0]
        self.vae = [loader, 2]
        self.positive = [self.add("CLIPTextEncode", clip=[loader, 1], text=prompt), 0]
        self.negative = [self.add("CLIPTextEncode", clip=[loader, 1], text=""), 0]
        size = {"width": LATENT_SIDE, "height": LATENT_SIDE, "batch_size": batch}
        self.latent = [self.add("EmptySD3LatentImage", **size), 0]

    @property
    def conditions(self) -> dict[str, Any]:
        """The linked inputs of whatever samples."""
        return {"positive": self.positive, "negative": self.negative, "latent_image": self.latent}

    def lora(self, file: str, strength: float = 1.0) -> str:
        """The model with a LoRA on it."""
        node = self.add("FlowOPDLora", model=self.model, lora=file, strength=strength)
        self.model = [node, 0]
        return node

    def spoil(self, how: str, at_step: int, name: str) -> None:
        """The model made to misbehave at a step."""
        self.model = [self.add("FlowOPDTestSpoil", model=self.model, how=how, at_step=at_step, name=name), 0]

    def sample(self, seed: int, **settings: Any) -> str:
        """Stock nodes that draw: ModelSamplingSD3 and KSampler."""
        shifted = self.add("ModelSamplingSD3", model=self.model, shift=TINY_RECORD.shift)
        chosen = {**SAMPLING, "denoise": 1.0, **settings}
        return self.add("KSampler", model=[shifted, 0], seed=seed, **self.conditions, **chosen)

    def decode(self, latent: str) -> str:
        """Stock nodes that make a picture of it and save it."""
        image = self.add("VAEDecode", samples=[latent, 0], vae=self.vae)
        return self.add("SaveImage", images=[image, 0], filename_prefix="flow-opd-tests/picture")

    def keep(self, latent: str) -> str:
        """Stock node that saves the latent."""
        return self.add("SaveLatent", samples=[latent, 0], filename_prefix="flow-opd-tests/latent")

    def compare(self, experts: str, seed: int, **settings: Any) -> str:
        """Compare experts."""
        chosen = {**SAMPLING, "shift": TINY_RECORD.shift, "strength": 1.0, **settings}
        inputs = {"model": self.model, "vae": self.vae, **self.conditions}
        return self.add("FlowOPDCompare", experts=experts, seed=seed, **inputs, **chosen)

    def best(self, n: int, seed: int, prompt: str, **settings: Any) -> str:
        """Keep best of N."""
        chosen = {**SAMPLING, "shift": TINY_RECORD.shift, "bench": "shapes_geneval", "clauses": "", "pass_at": 1.0}
        inputs = {"model": self.model, "vae": self.vae, **self.conditions}
        return self.add("FlowOPDKeepBest", n=n, seed=seed, prompt=prompt, **inputs, **(chosen | settings))

    def save(self, node: str, output: int) -> str:
        """Save an IMAGE."""
        return self.add("SaveImage", images=[node, output], filename_prefix="flow-opd-tests/picture")

    def show(self, node: str, output: int) -> str:
        """Show any value as text."""
        return self.add("PreviewAny", source=[node, output])
