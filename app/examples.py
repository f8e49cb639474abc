"""Prompts to begin with, by what the models draw and by task."""

from __future__ import annotations

EXAMPLES: dict[str, dict[str, tuple[str, ...]]] = {
    "shapes": {
        "One object": ("a photo of a star on dusk", "a picture of a cross", "a drawing of a circle on sand"),
        "Two objects": ("a photo of a star and a circle", "a picture of a cross and a triangle on mist"),
        "Counting": ("a photo of three squares on clay", "a drawing of four stars", "a picture of two circles on moss"),
        "Colours": ("a photo of a red triangle", "a picture of a purple star on sand", "a drawing of a black cross"),
        "Position": ("a photo of a star above a square", "a picture of a circle left of a cross on slate"),
        "Coloured pair": ("a photo of a red star and a blue circle", "a drawing of a green cross and a white square"),
        "Sign": ('a sign that says "OPEN"', 'a sign that says "WOLF" on mist', 'a sign that says "TEA" on clay'),
    },
    "coco": {
        "One object": ("a photo of a bench", "a photo of a giraffe"),
        "Two objects": ("a photo of a clock and a bicycle", "a photo of a toothbrush and a carrot"),
        "Counting": ("a photo of four handbags", "a photo of three zebras"),
        "Colours": ("a photo of a purple elephant", "a photo of a green bus"),
        "Position": ("a photo of a dog right of a teddy bear", "a photo of a train above a potted plant"),
        "Coloured pair": (
            "a photo of a brown giraffe and a white stop sign",
            "a photo of a red cake and a purple chair",
        ),
        "Written text": (
            'a chalkboard outside a café that says "Fresh bread today"',
            'a neon sign that says "OPEN LATE"',
        ),
        "Preference": (
            "a lighthouse on a cliff in a storm, oil painting",
            "a paper boat on a puddle, city lights behind",
        ),
    },
}


def example(objects: str, task: str, after: str) -> str:
    """The task's prompt that follows ``after``, round and round."""
    prompts = EXAMPLES[objects][task]
    return prompts[(prompts.index(after) + 1) % len(prompts)] if after in prompts else prompts[0]
