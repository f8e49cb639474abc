"""Draw until a picture passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from .errors import PackError
from .judges import Verdict

P = TypeVar("P")


@dataclass(frozen=True)
class Best(Generic[P]):
    """The picture that was kept: of draw ``draw``, number ``k`` there; ``drawn`` pictures were judged in all."""

    picture: P
    verdict: Verdict
    draw: int
    k: int
    drawn: int
    passed: bool


def keep_best(
    draw: Callable[[int], Sequence[P]], judge: Callable[[Sequence[P]], Sequence[Verdict]], most: int, pass_at: float
) -> Best[P]:
    """Draw 0, 1, … until a picture's value reaches ``pass_at`` or ``most`` draws are done; the best of all is kept.

    Between equal values the earlier stands; a picture that could not be judged is worse than any. Only the best is
    held.

    Raises:
        PackError: ``most`` below 1, or no picture could be judged: the last reason is told.
    """
    if most < 1:
        raise PackError(f"Expected at least 1 draw, but got {most}.")
    best: Best[P] | None = None
    drawn, failure = 0, ""
    for index in range(most):
        pictures = draw(index)
        for k, (picture, verdict) in enumerate(zip(pictures, judge(pictures), strict=True)):
            drawn += 1
            if verdict.value is None:
                failure = verdict.text
            elif best is None or best.verdict.value is None or verdict.value > best.verdict.value:
                best = Best(picture, verdict, index, k, drawn, verdict.value >= pass_at)
        if best is not None and best.passed:
            break
    if best is None:
        raise PackError(f"None of {drawn} pictures could be judged; the last: {failure}")
    return Best(best.picture, best.verdict, best.draw, best.k, drawn, best.passed)
