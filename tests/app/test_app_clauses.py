"""GenEval's clauses out of free prompts: the suites' own, read back from their text alone."""

import pytest

from app.clauses import read_clauses
from app.examples import EXAMPLES, example
from flowopd_eval.prompts import official_geneval
from flowopd_eval.tiny.suite import shapes_geneval_prompts
from flowopd_eval.tiny.vocabulary import words

SUITES = [(prompt, "shapes") for prompt in shapes_geneval_prompts()] + [(p, "coco") for p in official_geneval()]


def test_every_prompt_of_both_suites_gives_its_own_clauses():
    for prompt, objects in SUITES:
        expected = {
            name: [dict(c) for c in prompt.fields[name]] for name in ("include", "exclude") if name in prompt.fields
        }
        assert read_clauses(prompt.prompt, objects) == (prompt.task, expected), prompt


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "two",
        "a photo of",
        "a photo of two dragons",
        "a photo of a crimson star",
        'a sign that says "STAR"',
        "a photo of a star and",
        "a photo of a star left of a circle left of a cross",
        "star",
        "a photo of a dog",
    ],
)
def test_what_says_anything_else_is_not_guessed_at(prompt):
    assert read_clauses(prompt, "shapes") is None


def test_spelling_and_wording_do_not_matter_where_they_say_the_same():
    plain = read_clauses("a photo of two red circles", "shapes")
    assert (
        plain
        == read_clauses("  Two RED  circles. ", "shapes")
        == read_clauses("a drawing of two red circles on clay", "shapes")
    )
    assert plain[1] == {
        "include": [{"class": "circle", "count": 2, "color": "red"}],
        "exclude": [{"class": "circle", "count": 3}],
    }


def test_examples_are_prompts_their_judges_can_judge_and_the_miniature_knows():
    known = set(words())
    for objects, tasks in EXAMPLES.items():
        for task, prompts in tasks.items():
            for prompt in prompts:
                judged = read_clauses(prompt, objects)
                assert (judged is None) == (task in ("Sign", "Written text", "Preference")), prompt
                if objects == "shapes":
                    assert set(prompt.split('"')[0].split()) <= known, prompt


def test_examples_of_a_task_follow_one_another_round_and_round():
    first = example("shapes", "Sign", "something else")
    seen = [first]
    while (following := example("shapes", "Sign", seen[-1])) != first:
        seen.append(following)
    assert tuple(seen) == EXAMPLES["shapes"]["Sign"]
