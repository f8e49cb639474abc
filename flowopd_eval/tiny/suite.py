"""The prompts of the miniature's own benches: shapes in GenEval's six tasks, and signs to read."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations, product
from typing import Any

from flowopd_eval.records import Prompt
from flowopd_eval.tiny.scenes import (
    COLOURS,
    NEW_WORDS,
    NUMBERS,
    PLACES,
    PREFIXES,
    RELATIONS,
    SHAPES,
    SIGN_TASK,
    WORDS,
    describe,
)

PROMPTS_A_TASK = 96  # of single_object there are 105 in all, so no more than that for balance
SIGN_PROMPTS = 120
TRAINING_A_TASK, DEVELOPMENT_A_TASK, DEVELOPMENT_SIGNS = 320, 16, 48
_WHERE = ("", *(f" on {place}" for place in PLACES))

# A phrase: its text and its GenEval fields.
_Phrase = tuple[str, dict[str, Any]]


def shapes_geneval_prompts() -> list[Prompt]:
    """576 prompts, 96 a task, distinct, with ``include`` and ``exclude`` clauses; ids ``shapes-00000`` …

    The tasks that GenEval asks without colours (single_object, two_object, counting, position) name none here either.
    In the other two every combination of colours, in these four every noun phrase, comes as often as any other, give or
    take one where the number does not divide.
    """
    drawn = [(task, text, fields) for task, phrases in _phrases().items() for text, fields in _draw_shapes(phrases)]
    return _numbered(drawn, "shapes")


def sign_prompts() -> list[Prompt]:
    """120 distinct prompts ``a sign that says "WORD"``, with or without a place; ids ``signs-00000`` …

    Half of the words are those of the base's pre-training, half are new to it.
    """
    return _numbered([(SIGN_TASK, text, {}) for text in _balanced(_sign_texts(), SIGN_PROMPTS)], "signs")


def quality_prompts() -> list[Prompt]:
    """144 prompts, every sixth of the shapes and 48 signs out of the two suites."""
    shapes, signs = shapes_geneval_prompts(), sign_prompts()
    return [shapes[n * 6] for n in range(96)] + [signs[n * 5 // 2] for n in range(48)]


def shapes_training_prompts() -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on (up to 320 a task), and 16 a task to choose settings by; none of them is the suite's.

    Both come from the suite's grammar and carry its clauses. Of single objects the suite leaves nine prompts, so that
    there those of development are among those of training.
    """
    training, development = [], []
    taken = {prompt.prompt for prompt in shapes_geneval_prompts()}
    for task, phrases in _phrases().items():
        texts = {text: phrase for text, phrase in _texts(phrases).items() if text not in taken}
        groups = {text: _colours(fields) or phrase for text, (phrase, fields) in texts.items()}
        order = _balanced(groups, len(groups))
        kept = order[:DEVELOPMENT_A_TASK]
        rest = [text for text in order if text not in kept][:TRAINING_A_TASK] or order
        development += [(task, text, texts[text][1]) for text in kept]
        training += [(task, text, texts[text][1]) for text in rest]
    return _numbered(training, "shapes-train"), _numbered(development, "shapes-dev")


def sign_training_prompts() -> tuple[list[Prompt], list[Prompt]]:
    """Signs to train on, and 48 to choose settings by; neither holds a prompt of the suite."""
    taken = {prompt.prompt for prompt in sign_prompts()}
    words = {text: word for text, word in _sign_texts().items() if text not in taken}
    order: list[tuple[str, str, dict[str, Any]]] = [(SIGN_TASK, text, {}) for text in _balanced(words, len(words))]
    return _numbered(order[DEVELOPMENT_SIGNS:], "signs-train"), _numbered(order[:DEVELOPMENT_SIGNS], "signs-dev")


def quality_training_prompts() -> tuple[list[Prompt], list[Prompt]]:
    """The shapes and the signs to train on, and those to choose settings by."""
    shapes, signs = shapes_training_prompts(), sign_training_prompts()
    return shapes[0] + signs[0], shapes[1] + signs[1]


def _numbered(drawn: Iterable[tuple[str, str, dict[str, Any]]], name: str) -> list[Prompt]:
    return [Prompt(f"{name}-{n:05d}", text, task, fields) for n, (task, text, fields) in enumerate(drawn)]


def _sign_texts() -> dict[str, str]:
    return {f'a sign that says "{word}"{where}': word for word, where in product(WORDS + NEW_WORDS, _WHERE)}


def _phrases() -> dict[str, list[_Phrase]]:
    """Every phrase that the caption grammar of the scenes can make for each task, without prefix and place."""
    pairs = list(permutations(SHAPES, 2))
    none = (None, None)
    return {
        "single_object": [_phrase("single_object", [shape], none) for shape in SHAPES],
        "two_object": [_phrase("two_object", pair, none) for pair in pairs],
        "counting": [_phrase("counting", [shape], none, count) for shape, count in product(SHAPES, NUMBERS)],
        "colors": [_phrase("colors", [shape], [colour]) for shape, colour in product(SHAPES, COLOURS)],
        "position": [_phrase("position", pair, none, 2, relation) for pair, relation in product(pairs, RELATIONS)],
        "color_attr": [
            _phrase("color_attr", pair, colours) for pair, colours in product(pairs, permutations(COLOURS, 2))
        ],
    }


def _phrase(
    task: str, shapes: Sequence[str], colours: Sequence[str | None], count: int = 1, relation: str = ""
) -> _Phrase:
    text, include, exclude = describe(task, shapes, colours, count, relation)
    fields: dict[str, Any] = {"include": list(include)}
    return text, fields | ({"exclude": list(exclude)} if exclude else {})


def _texts(phrases: Iterable[_Phrase]) -> dict[str, _Phrase]:
    """Every caption of the phrases -> the phrase it is of and its fields."""
    return {
        f"{prefix} {text}{where}": (text, fields)
        for (text, fields), prefix, where in product(phrases, PREFIXES, _WHERE)
    }


def _draw_shapes(phrases: Iterable[_Phrase]) -> list[_Phrase]:
    full = _texts(phrases)
    groups = {text: _colours(fields) or phrase for text, (phrase, fields) in full.items()}
    return [(text, full[text][1]) for text in _balanced(groups, PROMPTS_A_TASK)]


def _colours(fields: Mapping[str, Any]) -> str:
    return " ".join(clause["color"] for clause in fields["include"] if "color" in clause)


def _balanced(groups: Mapping[str, str], count: int) -> list[str]:
    """``count`` of the texts (the keys), as many of each group (the values) as of any other, give or take one.

    The choice follows the texts' SHA-256, so that it depends on no library's random numbers.
    """
    seen: Counter[str] = Counter()
    ranked = []
    for digest, text in sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in groups):
        ranked.append((seen[groups[text]], digest, text))
        seen[groups[text]] += 1
    return [text for _, _, text in sorted(ranked)[:count]]
