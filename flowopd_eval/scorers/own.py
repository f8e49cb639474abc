"""A user's own scorer: a class with one method, ``score(images, prompts)``, in a file or in an installed package.

Its answers, one a picture: a number, None where it cannot judge, or a :class:`flowopd_eval.records.Score`.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowopd_eval.errors import RequestError
from flowopd_eval.records import Prompt, Score, Scorer
from flowopd_eval.userfile import is_userfile, load_attribute

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger(__name__)

GROUP = "flowopd_eval.scorers"  # of entry points
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")  # of an object: differs between two runs of the same request


def own_scorer(name: str) -> Scorer:
    """The scorer ``FILE.py:Class``, or the one that an installed package offers by that name.

    The file or package is run. Give it only names from the user's own command line or recipe, never one that was read
    from a run, a model or anything else that others wrote. Each call makes a scorer of its own.

    Raises:
        RequestError: no such file, class or entry point; a class that cannot be made without arguments, or has no
            method ``score``.
    """
    found, origin = _from_file(name) if is_userfile(name) else _from_entry_point(name)
    if not callable(found):
        raise RequestError(f"Scorer {name!r}: expected a class, but it is a {type(found).__name__}.")
    try:
        scorer = found()
    except RequestError:
        raise
    except Exception as error:  # a user's class may raise anything
        raise RequestError(f"Scorer {name!r} cannot be made without arguments: {_words(error)}") from error
    if not callable(getattr(scorer, "score", None)):
        raise RequestError(f"Scorer {name!r} has no method `score(images, prompts)`.")
    return _Own(name, origin, scorer)


def _from_file(name: str) -> tuple[Any, dict[str, str]]:
    file, _, attribute = name.rpartition(":")
    try:
        found, sha256 = load_attribute(name)
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"Scorer {name!r}: {file} cannot be run: {_words(error)}") from error
    return found, {
        "name": f"{Path(file).name}:{attribute}",
        "sha256": sha256,
    }  # no path: it may lie elsewhere next time


def _from_entry_point(name: str) -> tuple[Any, dict[str, str]]:
    from importlib.metadata import entry_points

    there = entry_points(group=GROUP)
    fitting = [point for point in there if point.name == name]
    if not fitting:
        names = ", ".join(sorted({point.name for point in there})) or "none"
        raise RequestError(
            f"Unknown scorer {name!r}: expected FILE.py:Class, or an entry point of the group {GROUP}; installed: "
            f"{names}."
        )
    if len(fitting) > 1:
        packages = ", ".join(sorted(point.dist.name if point.dist else "?" for point in fitting))
        raise RequestError(f"Scorer {name!r} is offered by several packages: {packages}. Uninstall all but one.")
    (point,) = fitting
    try:
        found = point.load()
    except Exception as error:
        raise RequestError(f"Scorer {name!r}: {point.value} cannot be loaded: {_words(error)}") from error
    origin = {"name": name, "class": point.value}
    return found, {**origin, "distribution": point.dist.name, "version": point.dist.version} if point.dist else origin


class _Own:
    """A user's object as a :class:`flowopd_eval.records.Scorer`, whatever it answers."""

    def __init__(self, name: str, origin: Mapping[str, str], scorer: Any) -> None:
        self.name, self._origin, self._scorer = name, origin, scorer

    def identity(self) -> Mapping[str, Any]:
        """``scorer: own``, its name, what it comes from, and under ``identity`` what its own method of that name says.

        ``RequestError`` where that method fails, or says what is no JSON.
        """
        said = getattr(self._scorer, "identity", None)
        if not callable(said):
            return {"scorer": "own", **self._origin}
        try:
            own = json.loads(json.dumps(said(), allow_nan=False))
        except RequestError:
            raise
        except Exception as error:
            raise RequestError(f"Scorer {self.name!r}: its identity() is no plain JSON: {_words(error)}") from error
        return {"scorer": "own", **self._origin, "identity": own}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
        """The scorer's answers in order. One that is no finite number is unscored; all are, where it fails."""
        try:
            answers = list(self._scorer.score(images, prompts))
        except Exception as error:  # a user's class may raise anything, and the run goes on
            traced = _log.isEnabledFor(logging.DEBUG)
            _log.warning("Scorer %s failed on %d pictures: %r", self.name, len(images), error, exc_info=traced)
            return [Score(None, error=_words(error))] * len(images)
        if len(answers) != len(images):
            wrong = f"the scorer gave {len(answers)} answers for {len(images)} pictures"
            return [Score(None, error=wrong)] * len(images)
        return [_score_of(answer) for answer in answers]


def _score_of(answer: Any) -> Score:
    score = answer if isinstance(answer, Score) else Score(answer)
    value = score.value
    if value is None:
        return score if score.error else replace(score, error="the scorer gave no score")
    try:
        return replace(score, value=_number(value))
    except Exception as error:  # also whatever a foreign number's conversion raises
        return replace(score, value=None, error=f"the scorer gave no score: {_ADDRESS.sub('0x…', str(error))}")


def _number(value: Any) -> float:
    """A finite number, also from an array or tensor of one element."""
    kind = type(value).__name__
    if not isinstance(value, Real) and callable(getattr(value, "item", None)):
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"expected a number, None or a Score, but got a {kind}")
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, but got {float(value)}")
    return float(value)


def _words(error: Exception) -> str:
    return _ADDRESS.sub("0x…", f"{type(error).__name__}: {error}")
