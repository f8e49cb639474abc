"""Judges that write: a vision-language model looks at a picture and gives it 1 to 5 points, in words.

Two that are often reported, both behind any OpenAI-compatible server:

- ``unified-reward``: alignment and quality in one number after "Final Score:" (Wang et al., arXiv 2503.05236). The
  model is ``CodeGoat24/UnifiedReward-7b-v1.5``; picture 512 x 512, temperature 0 and ``/ 5`` are Flow-GRPO's
  (``rewards.py`` of yifan123/flow_grpo: ``unifiedreward_score_sglang``).
- ``qwenvl``: three numbers in tags, of which ``<OverallScore>`` counts; ``qwenvl-quality``: the picture alone,
  ``<Score>``. Settings of Flow-OPD's ``qwenvl.py``; any instruction-tuned model will do, Qwen2.5-VL-7B-Instruct there.

The questions here are our own words. UnifiedReward was trained on others, which are in CodeGoat24/UnifiedReward,
``inference_llava/image_generation/point_score_image_generation.py``; Flow-GRPO's are a little different. For numbers
beside published ones give the judge those: ``replace(UNIFIED_REWARD, question=…)``. A question's sha256 stands in the
identity.

An answer without exactly one number from 1 to 5 leaves its picture unscored. The official code makes it 0, reads "10"
as 1, takes the first of several, and knows whole numbers only for ``qwenvl``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flowopd_eval.errors import RequestError
from flowopd_eval.records import Prompt, Score
from flowopd_eval.scorers.vlm import Answer, VLMClient, picture_url

if TYPE_CHECKING:
    from PIL import Image

NUMBER = r"([+-]?\d+(?:\.\d+)?)"
MOST_POINTS = 5


def _tag(name: str) -> str:
    return rf"<{name}>\s*{NUMBER}\s*</{name}>"


@dataclass(frozen=True)
class Rubric:
    """What a judge is asked, and where its points stand in the answer.

    ``question`` has ``{prompt}`` where the prompt goes; ``points`` and ``also`` (by name) are regular expressions with
    the number as their group; ``side`` is the square the picture is resized to, in pixels, or None.
    """

    name: str
    question: str
    points: str
    also: Mapping[str, str] = field(default_factory=dict)
    side: int | None = None
    max_tokens: int = 2048


_LEVELS = "1 is bad, 2 poor, 3 fair, 4 good, 5 excellent."
_QUALITY = f"How good is the picture as a picture: sharpness, light, colours, composition? {_LEVELS}"

UNIFIED_REWARD = Rubric(
    "unified-reward",
    "This picture was generated from a caption. Judge it by two things.\n"
    "1. Alignment: does it show the objects, attributes and relations of the caption?\n"
    "2. Quality: is it clear, detailed, true in its colours and pleasing?\n"
    "Say in a few words what you find. Then weigh both in one number from 1 (worst) to 5 (best) and write it on a line "
    "of its own after 'Final Score:'.\n"
    "Caption: [{prompt}]",
    rf"Final Score:\s*{NUMBER}",
    side=512,
    max_tokens=4096,
)
QWENVL = Rubric(
    "qwenvl",
    f"Judge this generated picture three times.\nQuality. {_QUALITY}\n"
    f"Instruction. How well does it show what was asked for: [{{prompt}}]? {_LEVELS}\n"
    f"Overall. What was asked for weighs more than beauty. {_LEVELS}\n"
    "First think it through inside <Thought></Thought>. Then give a number from 1 to 5 inside each of the tags "
    "<QualityScore></QualityScore>, <InstructionScore></InstructionScore> and <OverallScore></OverallScore>.",
    _tag("OverallScore"),
    {"quality": _tag("QualityScore"), "instruction": _tag("InstructionScore")},
)
QWENVL_QUALITY = Rubric(
    "qwenvl-quality",
    f"{_QUALITY}\nFirst think it through inside <Thought></Thought>. Then give a number from 1 to 5 inside "
    "<Score></Score>.",
    _tag("Score"),
)
RUBRICS = {rubric.name: rubric for rubric in (UNIFIED_REWARD, QWENVL, QWENVL_QUALITY)}


def read_points(text: str, pattern: str) -> float:
    """The number from 1 to 5 that ``pattern`` finds in ``text``, once or with one value.

    Raises:
        ValueError: none, several that differ, or one out of range; the message quotes the text.
    """
    found = list(dict.fromkeys(float(number) for number in re.findall(pattern, text)))
    if len(found) != 1:
        which = f"the scores {' and '.join(f'{number:g}' for number in found)}" if found else "no score"
        raise ValueError(f"the answer has {which}: {_shortened(text)}")
    if not 1 <= found[0] <= MOST_POINTS:
        raise ValueError(f"the score {found[0]:g} is not between 1 and {MOST_POINTS}: {_shortened(text)}")
    return found[0]


class JudgeScorer:
    """Asks ``client`` the ``rubric``'s question about each picture, ``workers`` at a time (:class:`records.Scorer`)."""

    def __init__(self, client: VLMClient, rubric: Rubric, workers: int = 8) -> None:
        self.client, self.rubric, self.workers = client, rubric, workers

    @cached_property
    def judge(self) -> str:
        """The judge's name as the server gives it. Raises ``RequestError`` for one that gives a white picture no score.

        So an unfit judge shows before anything is drawn.
        """
        from PIL import Image

        answer = self._ask(Image.new("RGB", (64, 64), "white"), "a plain white picture")
        try:
            self._points(answer)
        except ValueError as error:
            raise RequestError(
                f"{self.client.url}: {answer.model} is no judge for {self.rubric.name}; {error}"
            ) from error
        return answer.model

    def identity(self) -> Mapping[str, Any]:
        """The rubric, its question, the judge and where it is."""
        question = hashlib.sha256(self.rubric.question.encode()).hexdigest()
        where = {"judge": self.judge, "url": self.client.url, "side": self.rubric.side}
        return {"scorer": self.rubric.name, "rule": "points-1", "question_sha256": question, **where}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
        """Points / 5 for each picture, 0.2..1; ``also`` has the points. Raises as :attr:`judge`."""
        self.judge  # noqa: B018  (an unfit judge shows once, not once a picture)
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._score, list(zip(images, prompts, strict=True))))

    def _score(self, pair: tuple[Image.Image, Prompt]) -> Score:
        detail: dict[str, Any] = {}
        try:
            answer = self._ask(pair[0], pair[1].prompt)
            if answer.model != self.judge:
                raise RequestError(f"{self.client.url}: {answer.model} answered in place of {self.judge}.")
            detail["answer"] = answer.text
            points = self._points(answer)
        except ValueError as error:  # RequestError, too
            return Score(None, detail=detail, error=str(error))
        also = {"points": points}
        for name, pattern in self.rubric.also.items():
            with suppress(ValueError):
                also[name] = read_points(answer.text, pattern)
        return Score(points / MOST_POINTS, f"{points:g} of {MOST_POINTS}", {**detail, "also": also})

    def _ask(self, image: Image.Image, prompt: str) -> Answer:
        image = image.convert("RGB")
        if self.rubric.side:
            image = image.resize((self.rubric.side, self.rubric.side))  # bicubic
        question = self.rubric.question.replace("{prompt}", prompt)
        return self.client.answer(picture_url(image), question, self.rubric.max_tokens)

    def _points(self, answer: Answer) -> float:
        if answer.cut:  # in the middle of a number, perhaps
            raise ValueError(f"the answer is longer than {self.rubric.max_tokens} tokens: {_shortened(answer.text)}")
        return read_points(answer.text, self.rubric.points)


def _shortened(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= 200 else f"{words[:100]} … {words[-100:]}")
