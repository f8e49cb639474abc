"""GenEval's clauses out of a prompt of GenEval's kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from flowopd_eval.prompts import GENEVAL_RELATIONS, plural

_COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_COUNTS |= dict.fromkeys(("a", "an", "the", "one"), 1)
_OPENING = re.compile(r"(?:(?:an?|the) )?(?:photo|picture|drawing|image|painting) of ")
_RELATION = re.compile(rf" (?:to the |on the )?({'|'.join(GENEVAL_RELATIONS)}) ")


def read_clauses(
    prompt: str, classes: Sequence[str], colours: Sequence[str], places: Sequence[str] = ()
) -> tuple[str, dict[str, Any]] | None:
    """GenEval's task and its ``include`` and ``exclude`` clauses; None for a prompt that says anything else.

    Understood are ``[a photo of] THING [and THING]`` and ``[a photo of] THING left of THING``, perhaps with
    ``on PLACE`` at the end. A THING is ``a``, ``the`` or a number up to ``ten``, perhaps a colour, and a class in the
    singular or in GenEval's plural.
    """
    text = _OPENING.sub("", " ".join(prompt.lower().split()).rstrip("."), count=1)
    if places:
        text = re.sub(rf" on (?:{'|'.join(places)})$", "", text)
    first, *related = _RELATION.split(text)
    things = [related[1], first] if len(related) == 2 else re.split(r",? and |, ", text)
    read = [_clause(thing, classes, colours) for thing in things]
    include = [clause for clause in read if clause]
    if len(include) < len(read) or len(related) > 2:
        return None
    if related:
        include[1]["position"] = [related[0], 0]
    exclude = [{"class": one["class"], "count": one["count"] + 1} for one in include if one["count"] > 1]
    return _task(include), {"include": include} | ({"exclude": exclude} if exclude else {})


def _clause(thing: str, classes: Sequence[str], colours: Sequence[str]) -> dict[str, Any] | None:
    number, _, rest = thing.partition(" ")
    colour = next((name for name in colours if rest.startswith(f"{name} ")), None)
    noun = rest.removeprefix(f"{colour} ") if colour else rest
    name = next((one for one in classes if noun in (one, plural(one))), None)
    if number not in _COUNTS or name is None:
        return None
    return {"class": name, "count": _COUNTS[number]} | ({"color": colour} if colour else {})


def _task(include: Sequence[dict[str, Any]]) -> str:
    """Which of GenEval's tasks; counting has a threshold of its own."""
    if any("position" in clause for clause in include):
        return "position"
    if any(clause["count"] > 1 for clause in include):
        return "counting"
    coloured = any("color" in clause for clause in include)
    if len(include) == 1:
        return "colors" if coloured else "single_object"
    return "color_attr" if coloured else "two_object"
