"""GenEval 2 by Soft-TIFA: how likely a vision-language model finds each of a prompt's claims in the picture.

Kamath, Chang, Krishna, Zettlemoyer, Hu, Ghazvininejad: "GenEval 2: Addressing Benchmark Drift in Text-to-Image
Evaluation", arXiv 2512.16853; code facebookresearch/GenEval2. A claim (*atom*) is a question with its answer; its
probability is that of the answer's first token when the model is asked greedily (``evaluation.py``: ``soft_tifa`` and
``send_message_with_image``). AM and GM are the means over pictures of the atoms' arithmetic and geometric mean
(``main``); skills pool atoms, atomicities average GM (``soft_tifa_analysis.py``). The official judge is
Qwen3-VL-8B-Instruct: another one gives other numbers. The scale is 0..1; the official print-out's is 0..100.

A server gives only the likeliest tokens, the official script has all: an answer among none of them counts 0 here and
a little more there, which AM hardly notices and GM may. ``gm_at_most`` is GM with each unlisted token at its bound.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flowopd_eval.errors import RequestError
from flowopd_eval.records import Prompt, Sample, Score
from flowopd_eval.scorers.vlm import TOP_LOGPROBS, VLMClient, picture_url
from flowopd_eval.statistics import mean_interval

if TYPE_CHECKING:
    from PIL import Image

QUESTION = "{} Answer in one word."
# First token of the number in figures: Qwen's tokenizer writes figure by figure, so that of "10" is "1".
FIGURES = dict(zip("one two three four five six seven eight nine ten".split(), "1234567891"))

Tokens = Sequence[tuple[str, float]]  # the likeliest first tokens and their natural log-probs


def accepted_tokens(answer: str) -> frozenset[str]:
    """The first tokens that count as ``answer``: the word in lower case and capitalised, each also after a space.

    For a number also its figure and a lone space: the official list has " 4" too, whose first token in Qwen's tokenizer
    is " ". All official answers ("Yes", "one" … "seven") are one token in each form. "other", which the official list
    has for numbers above ten, is not inherited.
    """
    word = answer.strip().lower()
    forms = {start + form for start in ("", " ") for form in (word, word.capitalize())}
    return frozenset(forms | ({FIGURES[word], " "} if word in FIGURES else set()))


def answer_probability(top_logprobs: Tokens, answer: str) -> float:
    """Probability of ``answer``, 0..1: the sum over its accepted tokens that are listed.

    Raises ``RequestError`` for numbers that are no log-probabilities, which sum to more than 1.
    """
    if not sum(math.exp(min(logprob, 1.0)) for _, logprob in top_logprobs) < 1.01:  # true of NaN, too
        raise RequestError("The server's numbers are no log-probabilities (vLLM: --logprobs-mode raw_logprobs).")
    accepted = accepted_tokens(answer)
    return min(1.0, math.fsum(math.exp(logprob) for token, logprob in top_logprobs if token in accepted))


def probability_at_most(top_logprobs: Tokens, answer: str) -> float:
    """Upper bound of ``answer``'s probability: what is not listed is at most as likely as the last that is."""
    lacking = len(accepted_tokens(answer) - {token for token, _ in top_logprobs})
    listed = [math.exp(logprob) for _, logprob in top_logprobs]
    rest = min(lacking * min(listed), max(0.0, 1 - math.fsum(listed)))
    return min(1.0, answer_probability(top_logprobs, answer) + rest)


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of numbers of 0 and more; 0 when one of them is (as ``scipy.stats.gmean``)."""
    return 0.0 if min(values) == 0 else math.exp(math.fsum(map(math.log, values)) / len(values))


def picture_score(answers: Sequence[Mapping[str, Any]], atom_count: int) -> Score:
    """One picture's score (AM) from its atoms: ``question``, ``answer``, ``skill``, ``probability``, ``at_most``.

    ``atom_count`` is the prompt's atomicity, not their number: "a" is asked about and does not count.
    """
    likely = [answer["probability"] for answer in answers]
    doubted = [f"{a['question']} {a['answer']}: {a['probability']:.2f}" for a in answers if a["probability"] < 0.5]
    means = {"gm": geometric_mean(likely), "gm_at_most": geometric_mean([answer["at_most"] for answer in answers])}
    detail = {"atom_count": atom_count, **means, "answers": list(answers)}
    return Score(math.fsum(likely) / len(likely), "; ".join(doubted), detail)


class GenEval2Scorer:
    """Scores pictures by asking ``client`` a prompt's questions, ``workers`` at a time (:class:`records.Scorer`).

    A prompt's ``fields`` hold ``vqa_list`` ([question, answer] each), ``skills`` (one each) and ``atom_count``.
    """

    def __init__(self, client: VLMClient, workers: int = 8) -> None:
        self.client, self.workers = client, workers

    @cached_property
    def judge(self) -> str:
        """The judge's name as the server gives it. Raises ``RequestError`` for an unfit one, before anything is drawn.

        It is asked about a white picture: a model that thinks aloud first begins with neither yes nor no.
        """
        from PIL import Image

        white = picture_url(Image.new("RGB", (64, 64), "white"))
        reply = self.client.ask(white, QUESTION.format("Is the image white?"))
        if sum(answer_probability(reply.tokens, word) for word in ("yes", "no")) < 0.5:
            first = f"{self.client.url}: {reply.model} begins with {reply.tokens[0][0]!r}, not with yes or no."
            raise RequestError(f"{first} Take a model that answers at once, as Qwen/Qwen3-VL-8B-Instruct.")
        return reply.model

    def identity(self) -> Mapping[str, Any]:
        """The rule, the judge and where it is."""
        where = {"judge": self.judge, "url": self.client.url, "top_logprobs": TOP_LOGPROBS}
        return {"scorer": "geneval2", "rule": "soft-tifa-1", **where}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
        """AM in 0..1 for each picture; one with a question that failed is unscored. Raises as :attr:`judge`."""
        self.judge  # noqa: B018  (an unfit judge shows once, not once a question)
        with ThreadPoolExecutor(self.workers) as pool:
            pictures = zip(map(picture_url, images), prompts, strict=True)
            asked = [(p, [pool.submit(self._ask, url, **atom) for atom in _atoms(p)]) for url, p in pictures]
            return [_picture(prompt, answers) for prompt, answers in asked]

    def _ask(self, picture: str, question: str, answer: str, skill: str) -> dict[str, Any]:
        reply = self.client.ask(picture, QUESTION.format(question))
        if reply.model != self.judge:
            raise RequestError(f"{self.client.url}: {reply.model} answered in place of {self.judge}.")
        bounds = (answer_probability(reply.tokens, answer), probability_at_most(reply.tokens, answer))
        return {"question": question, "answer": answer, "skill": skill} | dict(zip(("probability", "at_most"), bounds))


def _atoms(prompt: Prompt) -> list[dict[str, str]]:
    pairs = zip(prompt.fields["vqa_list"], prompt.fields["skills"], strict=True)
    return [{"question": question, "answer": answer, "skill": skill} for (question, answer), skill in pairs]


def _picture(prompt: Prompt, answers: Sequence[Future[dict[str, Any]]]) -> Score:
    atom_count = prompt.fields["atom_count"]
    try:
        return picture_score([answer.result() for answer in answers], atom_count)
    except RequestError as error:
        return Score(None, detail={"atom_count": atom_count, "answers": _atoms(prompt)}, error=str(error))


def geneval2_metrics(samples: Sequence[Sample], correct_at: float | None) -> dict[str, Any]:
    """Soft-TIFA over the pictures that have a score, with 95 % intervals clustered by prompt.

    ``overall`` and ``images`` are AM; ``also`` holds ``gm`` and ``gm_at_most``, ``tasks`` each skill (``n`` and
    ``unscored`` count atoms), ``atomicity`` the GM of each ``atom_count``.
    There is no right and wrong: ``correct_at`` is not used.
    """
    skills, counts = defaultdict(list), defaultdict(list)
    for s in samples:
        for answer in s.detail.get("answers", ()):
            skills[answer["skill"]].append((s.id, None if s.score is None else answer["probability"]))
        if "atom_count" in s.detail:
            counts[s.detail["atom_count"]].append((s.id, None if s.score is None else s.detail["gm"]))
    scored = [sample for sample in samples if sample.score is not None]
    am = _interval((s.id, s.score) for s in scored)
    also = {name: _interval((s.id, s.detail[name]) for s in scored) for name in ("gm", "gm_at_most")} if scored else {}
    tasks = {skill: _group(values) for skill, values in skills.items()}
    atomicity = {str(count): _group(counts[count]) for count in sorted(counts)}
    return {"overall": am, "tasks": tasks, "images": am, "also": also, "atomicity": atomicity}


def _group(values: Sequence[tuple[str, float | None]]) -> dict[str, Any]:
    known = [(prompt, value) for prompt, value in values if value is not None]
    interval = _interval(known) or {"value": None, "low": None, "high": None, "n": 0}
    return {**interval, "unscored": len(values) - len(known), "prompts": len({prompt for prompt, _ in values})}


def _interval(values: Iterable[tuple[str, Any]]) -> dict[str, Any] | None:
    clusters = defaultdict(list)
    for prompt, value in values:
        clusters[prompt].append(value)
    return asdict(mean_interval(list(clusters.values()))) if clusters else None
