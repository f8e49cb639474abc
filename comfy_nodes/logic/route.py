"""Which expert a prompt is for, by rules that stand in the node and can be edited there.

One rule a line, ``CONDITIONS -> EXPERT``; the first that holds decides. Conditions stand between commas, and one of
them is enough: ``quoted text``, ``count``, ``colour``, ``position``, ``otherwise``, ``words a|b c`` (whole words), or a
regular expression between slashes, ``/\\bposter\\b/``. Upper and lower case are one. ``#`` starts a comment line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .errors import PackError, check_choice
from .experts import NAMES

DEFAULT_RULES = "quoted text -> ocr\ncount, colour, position -> geneval\notherwise -> student"
_COLOURS = (
    "red|orange|yellow|green|blue|purple|pink|brown|black|white|gr[ae]y|violet|turquoise|gold|golden|silver|beige"
)
_NUMBERS = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|a dozen|a pair of|a couple of|[2-9]|[1-9][0-9]"
_POSITIONS = (
    "(?:to the |on the )?(?:left|right) of|above|below|under|underneath|beneath|on top of|in front of|behind|beside|"
    "next to|between|inside"
)
_NAMED = {
    "quoted text": r"\"\s*[^\"\s][^\"]*\"|“\s*[^”\s][^”]*”",
    "count": rf"(?<![\w.,])(?:{_NUMBERS})(?![\w]|[.,]\d)",
    "colour": rf"\b(?:{_COLOURS})\b",
    "position": rf"\b(?:{_POSITIONS})\b",
    "otherwise": r"",
}


@dataclass(frozen=True)
class Routed:
    """The expert, and why: the rule's line and the words that made it hold."""

    expert: str
    reason: str


def route(prompt: str, rules: str = DEFAULT_RULES) -> Routed:
    """The expert that ``rules`` name for ``prompt``.

    Raises:
        PackError: a rule that cannot be read, an unknown expert, or no rule that holds.
    """
    for number, conditions, expert in read_rules(rules):
        for condition, search in conditions:
            found = search(prompt)
            if found is not None:
                words = f": {found[0].strip()!r}" if found[0].strip() else ""
                return Routed(expert, f"{expert}, by line {number} ({condition}{words})")
    raise PackError(f"No rule holds for {prompt!r}; end the rules with a line `otherwise -> student`.")


Condition = tuple[str, Callable[[str], "re.Match[str] | None"]]


def read_rules(text: str) -> list[tuple[int, list[Condition], str]]:
    """The rules with the numbers of their lines.

    Raises:
        PackError: names the line that cannot be read and what was expected.
    """
    rules = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        conditions, arrow, expert = line.rpartition("->")
        if not arrow or not conditions.strip():
            raise PackError(f"Line {number} of the rules, {line!r}: expected `CONDITIONS -> EXPERT`.")
        check_choice(f"expert in line {number} of the rules,", expert.strip(), NAMES)
        rules.append((number, [_condition(part, number) for part in _parts(conditions)], expert.strip()))
    if not rules:
        raise PackError(f"There are no rules; these are the usual ones:\n{DEFAULT_RULES}")
    return rules


def _parts(conditions: str) -> list[str]:
    """Conditions between commas; a comma between slashes is the expression's own."""
    return [part.strip() for part in re.findall(r"(?:/(?:\\.|[^/])*/|[^,])+", conditions) if part.strip()]


def _condition(text: str, number: int) -> Condition:
    if len(text) > 1 and text.startswith("/") and text.endswith("/"):
        pattern = text[1:-1]
    elif text.lower().startswith("words "):
        words = [re.escape(word.strip()) for word in text[len("words ") :].split("|") if word.strip()]
        pattern = rf"(?<!\w)(?:{'|'.join(words)})(?!\w)"
    else:
        check_choice(f"condition in line {number} of the rules,", text.lower(), [*_NAMED, "words …", "/…/"])
        pattern = _NAMED[text.lower()]
    try:
        return text, re.compile(pattern, re.IGNORECASE).search
    except re.error as error:
        raise PackError(f"Line {number} of the rules: {text!r} is no regular expression ({error}).") from error
