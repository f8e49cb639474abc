"""Who judges a picture of a free prompt, what they say, and who cannot and why."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from app.clauses import read_clauses
from app.wanted import shown
from flowopd_eval.benches import Bench, Judge, find_bench
from flowopd_eval.errors import RequestError, Unavailable
from flowopd_eval.harness import judge
from flowopd_eval.records import Prompt, Score, Scorer

if TYPE_CHECKING:
    from PIL import Image

FLAGS = {"coco": ("geneval", "ocr", "preference"), "shapes": ("geneval", "ocr", "quality", "preference")}
_log = logging.getLogger(__name__)
DIGITS = {"geneval": 0, "ocr": 2, "quality": 3, "preference": 3}  # after the point, as a score is shown
MEANING = {
    "geneval": "Whether the picture holds the objects, counts, colours and places that the prompt names.",
    "ocr": "How much of the quoted text can be read in the picture: 1 is all of it.",
    "quality": "How clean the lines are: 1 is flat colours with sharp edges, 0 where nothing is drawn.",
    "preference": "How people would like the picture as an answer to the prompt, as PickScore predicts it.",
}
TITLES = {"geneval": "GenEval", "ocr": "Text", "quality": "Clean lines", "preference": "PickScore"}


@dataclass(frozen=True)
class Seat:
    """One judge's place for a prompt: who sits there, or in words why nobody does."""

    flag: str
    prompt: Prompt | None
    scorer: Scorer | None
    absent: str = ""

    @property
    def title(self) -> str:
        """What it is called on the page."""
        return TITLES[self.flag]


class Panel:
    """The judges of pictures of ``objects``.

    Their weights are fetched here, before a page is open: GenEval's detector and its CLIP are 2 GB, for which neither
    a click nor those who wait behind it should stand still. PickScore's 4 GB are not fetched at all.
    """

    def __init__(self, objects: str) -> None:
        self.objects = objects
        self._benches = [find_bench(flag, objects) for flag in FLAGS[objects]]
        self._scorers = {bench.flag: _scorer(bench) for bench in self._benches}

    def seats(self, text: str) -> list[Seat]:
        """Every judge's place for a prompt, in the order in which they are shown."""
        return [self._seat(bench, text.replace("“", '"').replace("”", '"')) for bench in self._benches]

    def _seat(self, bench: Bench, text: str) -> Seat:
        try:
            prompt = self._record(bench, text)
        except RequestError as error:
            return Seat(bench.flag, None, None, str(error))
        scorer = self._scorers[bench.flag]
        if isinstance(scorer, str):
            return Seat(bench.flag, prompt, None, shown(scorer))
        return Seat(bench.flag, prompt, scorer)

    def _record(self, bench: Bench, text: str) -> Prompt:
        """The prompt as this bench judges it. Raises ``RequestError`` where it cannot."""
        if bench.flag == "ocr" and '"' not in text:
            raise RequestError("the prompt quotes no text to be read")
        if bench.flag != "geneval":
            prompt = Prompt("free", text, bench.flag)
        elif (read := read_clauses(text, self.objects)) is None:
            example = "two dogs" if self.objects == "coco" else "two red circles"
            raise RequestError(f"the prompt is not of GenEval's kind, such as “a photo of {example}”")
        else:
            prompt = Prompt("free", text, *read)
        bench.check(prompt)
        return prompt


def _scorer(bench: Bench) -> Scorer | str:
    """The bench's judge with its weights on this machine; or why it is unavailable."""
    try:
        if bench.flag == "preference":
            _check_cached()
        scorer = bench.scorer(bench.protocols[0], Judge(metrics=("pickscore",), ocr_workers=1))
        scorer.identity()
    except RequestError as error:
        return f"unavailable: {error}"
    except ImportError as error:
        return f"unavailable: the package {error.name} is not installed"
    except Exception:  # memory that is full, damaged weights: pictures stay, unscored
        _log.exception("The judge of %s could not be loaded", bench.flag)
        return "unavailable: it could not be loaded; the server's log says why"
    return scorer


def _check_cached() -> None:
    """Raises ``Unavailable`` unless PickScore lies in the Hub's cache: 4 GB are not fetched because a page is open."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from flowopd_eval.scorers.clip_model import Files
    from flowopd_eval.scorers.preference import WEIGHTS, preference_metrics

    for need in preference_metrics(WEIGHTS)["pickscore"].needs:
        repo, _, revision = str(need.source).removeprefix("hub:").partition("@")
        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            complete = isinstance(need, Files) and all(any(folder.glob(name)) for name in need.least)
        except LocalEntryNotFoundError:
            complete = False
        if not complete:
            raise Unavailable(f"its weights (4 GB) are not on this machine. To provide them: `{need.command}`")


def scores(seats: Sequence[Seat], picture: Image.Image) -> dict[str, Score]:
    """What each judge that is there says of a picture, by flag. One that fails leaves it unscored, with the error."""
    found = {s.flag: judge(s.scorer, [picture], [s.prompt])[0] for s in seats if s.scorer and s.prompt}
    return {flag: replace(score, error=score.error and shown(score.error)) for flag, score in found.items()}


def best(by_arm: Mapping[str, Mapping[str, Score]]) -> dict[str, set[str]]:
    """By judge, the arms with the highest score as shown: none where fewer than two are scored or all are equal."""
    found: dict[str, set[str]] = {}
    for flag in TITLES:
        scored = {arm: s[flag].value for arm, s in by_arm.items() if flag in s}
        values = {arm: round(value, DIGITS[flag]) for arm, value in scored.items() if value is not None}
        if len(set(values.values())) > 1:
            top = max(values.values())
            found[flag] = {arm for arm, value in values.items() if value == top}
    return found
