"""Work done for each arm of a comparison: one that fails does not lose the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from .errors import PackError

T = TypeVar("T")
U = TypeVar("U")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What the arm ``label`` made; without a ``value``, ``reason`` says why."""

    label: str
    value: T | None
    reason: str = ""

    def about(self) -> str:
        """One line: drawn, or why not."""
        return f"{self.label}: {'drawn' if self.value is not None else f'not drawn: {self.reason}'}"


def each_arm(work: Callable[[int, T], U], arms: Sequence[Outcome[T]], stops: type[BaseException]) -> list[Outcome[U]]:
    """``work(number, value)`` for each arm that has a value; what it raises becomes the arm's reason.

    Args:
        work: what is done with an arm.
        arms: arms with the values of the step before.
        stops: what is let through: the user's interruption.

    Raises:
        PackError: no arm is left; the message holds every reason.
    """
    outcomes: list[Outcome[U]] = []
    for number, arm in enumerate(arms):
        if arm.value is None:
            outcomes.append(Outcome(arm.label, None, arm.reason))
            continue
        try:
            outcomes.append(Outcome(arm.label, work(number, arm.value)))
        except stops:
            raise
        except Exception as error:
            _log.exception("Flow-OPD: %s was not drawn", arm.label)
            outcomes.append(Outcome(arm.label, None, f"{type(error).__name__}: {error}"))
    if all(outcome.value is None for outcome in outcomes):
        raise PackError("No model could be drawn with.\n" + "\n".join(outcome.about() for outcome in outcomes))
    return outcomes
