"""Rewards: the scorers of ``flowopd_eval``, or a user's own class, judging while the device works on."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from PIL import Image

from flowopd_eval.benches import OCR_SIDE, bench_by_key
from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.records import Prompt, Scorer
from flowopd_eval.scorers.own import own_scorer
from training.config import Task
from training.data import Sample


def _partial_credit() -> Scorer:
    from flowopd_eval.scorers.geneval import PartialCreditScorer
    from flowopd_eval.tiny.detector import ShapesDetector

    return PartialCreditScorer(ShapesDetector())


def _ocr() -> Scorer:
    from flowopd_eval.scorers.ocr import OCRScorer
    from flowopd_eval.scorers.ocr_engines import RapidOCREngine

    return OCRScorer(RapidOCREngine(OCR_SIDE))


REWARDS: Mapping[str, Callable[[], Scorer]] = {
    "partial_credit": _partial_credit,
    "shapes_geneval": lambda: bench_by_key("shapes_geneval").scorer("official"),
    "ocr": _ocr,
    "quality": lambda: bench_by_key("shapes_quality").scorer("official"),
}


def load_reward(name: str) -> Scorer:
    """The reward ``name``: one of :data:`REWARDS`, or a scorer of the user's, ``my_reward.py:Smile`` or an entry point.

    A user's class is made without arguments; see :mod:`flowopd_eval.scorers.own`. Its file is run: name only your own.

    Raises:
        RequestError: an unknown name, a missing file or class, or a class that is no scorer.
    """
    if name in REWARDS:
        return REWARDS[name]()
    try:
        return own_scorer(name)
    except RequestError as error:
        raise RequestError(f"Reward {name!r}: {error} Built in: {', '.join(REWARDS)}.") from error


class Rewards:
    """The rewards of a recipe's tasks, judged in the background.

    A judgement that fails is NaN: the sample takes no part in its group, and is counted.
    """

    def __init__(self, tasks: Sequence[Task], workers: int = 1) -> None:
        names = dict.fromkeys(name for task in tasks for name in task.rewards)
        self.scorers = {name: load_reward(name) for name in names}
        self._told: set[str] = set()  # rewards whose first failed judgement was shown
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="reward")

    def identity(self) -> dict[str, Any]:
        """Each reward's identity."""
        return {name: dict(scorer.identity()) for name, scorer in self.scorers.items()}

    def submit(self, pictures: Sequence[Image.Image], samples: Sequence[Sample]) -> Future[list[dict[str, float]]]:
        """Start judging; the result has, for each picture, every reward of its task and their weighted ``total``."""
        return self._pool.submit(self.judge, pictures, [s.prompt for s in samples], [s.task for s in samples])

    def judge(
        self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt], tasks: Sequence[Task]
    ) -> list[dict[str, float]]:
        """As :meth:`submit`, at once."""
        found: list[dict[str, float]] = [{} for _ in pictures]
        for name, scorer in self.scorers.items():
            rows = [row for row, task in enumerate(tasks) if name in task.rewards]
            if not rows:
                continue
            try:
                scores = scorer.score([pictures[row] for row in rows], [prompts[row] for row in rows])
            except Exception as error:  # whatever a user's class raises
                raise WorkError(f"Reward {name!r} failed: {type(error).__name__}: {error}") from error
            for row, score in zip(rows, scores, strict=True):
                if score.value is None and name not in self._told:
                    self._told.add(name)
                    why = score.error or score.reason or "it gave no reason"
                    print(f"Reward {name!r} could not judge a picture, and perhaps others: {why}.", file=sys.stderr)
                found[row][name] = math.nan if score.value is None else float(score.value)
        for values, task in zip(found, tasks, strict=True):
            values["total"] = math.fsum(task.rewards[name] * value for name, value in values.items())
        return found
