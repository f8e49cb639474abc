"""What may be asked of the demo, and what an error may show."""

from pathlib import Path

import pytest

from app.wanted import ARMS, PROMPT, SEED, STEPS, shown, wanted
from flowopd_eval.errors import RequestError

RIGHT = {"prompt": "a star", "seed": 3, "arms": ["base"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": ""}, "Prompt: write something"),
        ({"prompt": " \n "}, "Prompt: write something"),
        ({"prompt": "x" * (PROMPT + 1)}, f"at most {PROMPT}"),
        ({"prompt": 7}, "expected text"),
        ({"prompt": "a\u200b\u200bstar\u202e"}, "remove the characters that cannot be seen: U+200B, U+202E."),
        ({"seed": -1}, "Seed: expected 0 or more"),
        ({"seed": SEED + 1}, f"expected {SEED} or less"),
        ({"seed": 1.5}, "whole number"),
        ({"seed": 10**20}, f"expected {SEED} or less"),
        ({"seed": 1e21}, "whole number"),
        ({"seed": None}, "Seed: expected a whole number."),
        ({"seed": True}, "Seed"),
        ({"arms": []}, "Models: choose at least one."),
        ({"arms": "base"}, "list of names"),
        ({"arms": ["base", "base"]}, "name each model once"),
        ({"arms": [str(n) for n in range(ARMS + 1)]}, f"at most {ARMS}"),
        ({"steps": 0}, "Steps: expected 1 or more"),
        ({"steps": STEPS + 1}, f"expected {STEPS} or less"),
        ({"guidance": float("nan")}, "Guidance"),
        ({"guidance": 1e9}, "Guidance"),
        ({"side": 65536}, "Side"),
        ({"device": "cuda:3"}, "there is no such setting"),
    ],
)
def test_each_wrong_value_is_named_with_its_remedy(change, said):
    with pytest.raises(RequestError) as error:
        wanted({**RIGHT, **change})
    assert said in str(error.value)
    assert len(str(error.value)) < 250
    assert "pydantic" not in str(error.value)


def test_several_wrong_values_are_all_said():
    with pytest.raises(RequestError, match=r"Prompt: .* Seed: .* Models: "):
        wanted({"prompt": "", "seed": -4, "arms": []})


def test_white_space_is_one_space():
    assert wanted({**RIGHT, "prompt": " a\n\tstar "}).prompt == "a star"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/joe/secret/x.json is damaged", "…/x.json is damaged"),
        ("read 'C:\\Users\\joe\\x.txt'", "read '…/x.txt'"),
        (f"look into {Path.home()}/a/b.", "look into …/b."),
        (f"no {Path.home()} here", "no ~ here"),
        ("ghp_abcdefghijklmnopqrst1234", "[token]"),
        ("hf_short", "hf_short"),
        ("see https://huggingface.co/a/b", "see https://huggingface.co/a/b"),
        ("token hf_abcdefghijklmnopqrstuv refused", "token [token] refused"),
        ("either/or stays", "either/or stays"),
    ],
)
def test_neither_paths_nor_tokens_are_shown(text, expected):
    assert shown(text) == expected


@pytest.mark.parametrize("joined", ["\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\U0001f468\u200d\U0001f467"])
def test_characters_that_join_others_are_kept(joined):
    """Persian spells with one of them, emoji of several people with the other."""
    assert wanted({"prompt": joined, "seed": 1, "arms": ["base"]}).prompt == joined


@pytest.mark.parametrize("unseen", ["\0", "\x1b", "\u202e"])
def test_characters_that_cannot_be_seen_are_refused_by_their_code_points(unseen):
    with pytest.raises(RequestError, match=rf"Prompt: remove the characters .*: U\+{ord(unseen):04X}\.$"):
        wanted({"prompt": f"a star{unseen}", "seed": 1, "arms": ["base"]})
