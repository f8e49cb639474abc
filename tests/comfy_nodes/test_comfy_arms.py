"""An arm that fails: its reason is kept, the others go on, an interruption is let through."""

from __future__ import annotations

import pytest
import torch

from comfy_nodes.logic.arms import Outcome, each_arm
from comfy_nodes.logic.errors import PackError
from comfy_nodes.logic.pictures import PAPER, card


class Stop(Exception):
    """In the place of ComfyUI's interruption, which is an Exception as well."""


def halves(number: int, value: int) -> float:
    if value == 2:
        raise Stop
    return (number + 12) / value


def test_an_arm_that_fails_has_its_reason_and_the_others_their_values() -> None:
    done = each_arm(
        halves, [Outcome("a", 3), Outcome("b", 0), Outcome("c", None, "lost before"), Outcome("d", 5)], Stop
    )
    assert [arm.value for arm in done] == [4.0, None, None, 3.0]
    assert [arm.about() for arm in done] == [
        "a: drawn",
        "b: not drawn: ZeroDivisionError: division by zero",
        "c: not drawn: lost before",
        "d: drawn",
    ]


def test_an_interruption_is_let_through() -> None:
    with pytest.raises(Stop):
        each_arm(halves, [Outcome("a", 1), Outcome("b", 2), Outcome("c", 0)], Stop)


def test_no_arm_left_is_an_error_with_every_reason() -> None:
    with pytest.raises(PackError, match=r"a: not drawn: ZeroDivisionError[^\n]*\nb: not drawn: lost before"):
        each_arm(halves, [Outcome("a", 0), Outcome("b", None, "lost before")], Stop)


def test_a_card_is_paper_with_words_of_the_size_of_the_pictures() -> None:
    shown = card("student: not drawn: RuntimeError: failed on purpose", torch.zeros(2, 64, 96, 3))
    assert shown.shape == (2, 64, 96, 3)
    assert torch.equal(shown[0], shown[1])
    paper = (shown[0] == PAPER[0] / 255).all(-1)
    assert 0.5 < paper.float().mean() < 0.99
