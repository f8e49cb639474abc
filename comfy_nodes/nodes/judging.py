"""Detectors in ComfyUI's memory: room is made for them before, and given back after."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
from comfy_api.latest import io

from ..logic.judges import BENCHES, Judge, open_judge

ROOM = 3 * 1024**3  # bytes for GenEval's detector, its CLIP and their activations on a few pictures


def judging_inputs() -> list[io.Input]:
    """The inputs of a node that judges."""
    return [
        io.String.Input("prompt", multiline=True),
        io.Combo.Input("bench", options=list(BENCHES), default=BENCHES[0]),
        io.String.Input(
            "clauses",
            multiline=True,
            default="",
            tooltip='GenEval\'s clauses as JSON, for other words: {"include": [{"class": "dog", "count": 2}]}',
        ),
    ]


def ready_judge(bench: str, prompt: str, clauses: str) -> Judge:
    """A judge on ComfyUI's device."""
    device = comfy.model_management.get_torch_device()
    if bench == "geneval":
        comfy.model_management.free_memory(ROOM, device)
    return open_judge(bench, prompt, clauses, str(device))


@contextmanager
def memory_given_back() -> Iterator[None]:
    """When the work inside is done, or failed, what a judge held is ComfyUI's again.

    After an interruption ComfyUI's own collection between two prompts does it: a collection can take longer than the
    user should wait.
    """
    try:
        yield
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception:
        _collect()
        raise
    _collect()


def _collect() -> None:
    gc.collect()
    comfy.model_management.soft_empty_cache()
