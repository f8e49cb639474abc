"""GenEval's clauses out of a prompt, in the words of what a model draws."""

from __future__ import annotations

from functools import cache
from typing import Any

from flowopd_eval.scorers import clauses


@cache
def vocabulary(objects: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Classes, colours and places that prompts name, by what the models draw: ``coco`` or ``shapes``."""
    if objects == "shapes":
        from flowopd_eval.tiny.scenes import COLOURS, PLACES, SHAPES

        return tuple(SHAPES), tuple(COLOURS), tuple(PLACES)
    from flowopd_eval.prompts import COCO_CLASSES, GENEVAL_COLOURS

    return tuple(COCO_CLASSES), tuple(GENEVAL_COLOURS), ()


def read_clauses(prompt: str, objects: str) -> tuple[str, dict[str, Any]] | None:
    """:func:`flowopd_eval.scorers.clauses.read_clauses` for ``coco`` or ``shapes``."""
    return clauses.read_clauses(prompt, *vocabulary(objects))
