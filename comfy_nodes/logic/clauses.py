"""What a prompt of GenEval's kind says, as the clauses by which GenEval judges it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_RELATIONS = ("left of", "right of", "above", "below")
_OPENING = r"(?:(?:a|an|the) )?(?:photo|picture|drawing|image|painting) of "


def read_clauses(prompt: str, classes: Sequence[str], colours: Sequence[str]) -> tuple[str, dict[str, Any]] | None:
    """GenEval's task and its ``include`` and ``exclude`` clauses for ``prompt``; None where it says anything else.

    Read are ``[a photo of] THING [and THING …]`` and ``[a photo of] THING RELATION THING``, a THING being ``a``/``an``
    or ``two`` … ``ten``, perhaps a colour, and a class in the singular or in GenEval's plural (``sheeps``).
    """
    text = re.sub(r"\s+", " ", prompt.strip().rstrip(".").lower())
    text = re.sub(f"^{_OPENING}", "", text)
    thing = _thing(classes, colours)
    relation = "|".join(_RELATIONS)
    pair = re.fullmatch(rf"(.+?) (?:to the |on the )?({relation}) (.+)", text)
    things = [pair[3], pair[1]] if pair else re.split(r",? and |, ", text)
    matches = [thing.fullmatch(part) for part in things]
    read = [_clause(match, classes) for match in matches if match is not None]
    if len(read) < len(things):
        return None
    if pair:
        read[1]["position"] = [pair[2], 0]
    exclude = [{"class": c["class"], "count": c["count"] + 1} for c in read if c["count"] > 1]
    return _task(read), {"include": read} | ({"exclude": exclude} if exclude else {})


def _thing(classes: Sequence[str], colours: Sequence[str]) -> re.Pattern[str]:
    nouns = sorted({*classes, *map(_plural, classes)}, key=len, reverse=True)
    return re.compile(
        rf"(?P<number>an?|the|one|{'|'.join(_NUMBERS)}) (?:(?P<colour>{'|'.join(map(re.escape, colours))}) )?"
        rf"(?P<noun>{'|'.join(map(re.escape, nouns))})"
    )


def _plural(noun: str) -> str:
    """GenEval's plural: ``es`` after an ``s``, else ``s``."""
    return noun + ("es" if noun.endswith("s") else "s")


def _clause(match: re.Match[str], classes: Sequence[str]) -> dict[str, Any]:
    singular = {_plural(name): name for name in classes} | {name: name for name in classes}
    clause: dict[str, Any] = {"class": singular[match["noun"]], "count": _NUMBERS.get(match["number"], 1)}
    return clause | ({"color": match["colour"]} if match["colour"] else {})


def _task(include: Sequence[dict[str, Any]]) -> str:
    """The task decides the detector's threshold: 0.9 in counting, else 0.3."""
    if any("position" in clause for clause in include):
        return "position"
    if any(clause["count"] > 1 for clause in include):
        return "counting"
    if any("color" in clause for clause in include):
        return "colors" if len(include) == 1 else "color_attr"
    return "single_object" if len(include) == 1 else "two_object"
