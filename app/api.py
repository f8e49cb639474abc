"""What programs may ask: everything on the page, as plain JSON, under names that stay.

Pictures travel as ``data:`` addresses; ``compare`` tells each step and returns everything at its end. The docstrings
are what the API page and ``Client.view_api`` show; gradio has no place for words on a single parameter, so that each
is named there.
"""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from app import cards
from app.compare_tab import restorable
from app.examples import EXAMPLES
from app.judging import best
from app.picture import read_comparison, write_comparison
from app.runs import VERDICTS, Runs, chosen, marks, pictures
from app.session import Drawn, Session, Step
from app.told import DRAWING, in_words, on_a_shared_gpu
from app.vote_tab import Pair, Polling
from app.wanted import ARMS, GUIDANCE, PROMPT, SEED, STEPS, shown, wanted
from flowopd_eval.errors import RequestError

_PAGE = 100  # pictures listed at once
_LARGEST = 48 * 2**20  # characters of a PNG as text
_PNG = "data:image/png;base64,"


def _polite(function: Callable[..., Any]) -> Callable[..., Any]:
    """Errors as gradio hands them to a client, in words and without a trace."""

    @wraps(function)
    def answer(*values: Any) -> Any:
        try:
            return function(*values)
        except Exception as error:
            raise gr.Error(in_words(error), print_exception=False) from None

    return answer


def _polite_stream(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    @wraps(function)
    def answer(*values: Any) -> Iterator[Any]:
        try:
            yield from function(*values)
        except Exception as error:
            raise gr.Error(in_words(error), print_exception=False) from None

    return answer


def offer(session: Session, polling: Polling, runs: Runs | None) -> None:
    """Add every name to the page that is being built."""

    def models() -> list[dict[str, Any]]:
        """The models here: name, about, sampling record, and why one is not available."""
        return [
            {
                "name": arm.name,
                "about": arm.about,
                "record": asdict(arm.spec.record),
                "problem": shown(arm.problem),
            }
            for arm in session.arms.values()
        ]

    def limits() -> dict[str, Any]:
        """The largest values that are taken."""
        return {
            "prompt": PROMPT,
            "arms": ARMS,
            "steps": STEPS,
            "guidance": GUIDANCE,
            "seed": SEED,
            "sides": session.sides,
        }

    def examples() -> dict[str, list[str]]:
        """Prompts by task."""
        return {task: list(prompts) for task, prompts in EXAMPLES[session.family.objects].items()}

    def compare(
        prompt: str,
        seed: int = 0,
        arms: list[str] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        side: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Draw a prompt with several models from the same noise: steps on the way, everything at the end.

        ``arms`` are names out of /models; null: all of them. ``seed`` decides the noise. ``steps``, ``guidance`` (the
        scale) and ``side`` (height and width in pixels) hold for all models; null: each model's own. /limits says how
        large they may be.
        """
        session.check_side(side)  # first: what this family draws, not what any family might
        names = [arm.name for arm in session.ready] if arms is None else arms
        request = session.check(
            wanted({"prompt": prompt, "seed": seed, "arms": names, "steps": steps, "guidance": guidance, "side": side})
        )
        drawn: list[Drawn] = []
        for event in session.draw(request):
            if isinstance(event, Step):
                yield {"model": event.arm, "step": event.done, "of": event.steps}
            else:
                drawn.append(event)
        good = {one.arm: one for one in drawn if one.picture is not None}
        top = best({one.arm: one.scores for one in drawn})
        png = (
            write_comparison(
                session.family.name,
                request,
                {name: one.picture for name, one in good.items() if one.picture is not None},
                {name: one.identity for name, one in good.items()},
                {name: one.scores for name, one in good.items()},
                cards.lines(drawn),
            )
            if good
            else b""
        )
        yield {
            "pictures": [_drawn(one) for one in drawn],
            "best": {judge: sorted(names) for judge, names in top.items()},
            "not_judged": {seat.flag: shown(seat.absent) for seat in session.panel.seats(prompt) if seat.absent},
            "comparison": _PNG + base64.b64encode(png).decode() if png else None,
        }

    def restore(png: str) -> dict[str, Any]:
        """The settings that a saved comparison carries; its models as far as they are here.

        ``png`` is the ``comparison`` of /compare, or a file saved on the page as a ``data:`` address. ``changed`` are
        those of them that are other models here than those that drew then.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "comparison.png"
            file.write_bytes(_bytes(png))
            saved = read_comparison(file)
        found = restorable(session, saved)
        told = {"arms": found.arms, "changed": found.changed, "said": found.words, "scores": saved.scores}
        return {**saved.settings.model_dump(), **told}

    def vote_pair(prompt: str | None = None, seed: int | None = None) -> Iterator[dict[str, Any]]:
        """Two pictures without names, and the ticket by which to vote on them.

        No ``prompt``, or an empty one: one of the examples. No ``seed``: any.
        """
        for event in polling.pair(polling.request(prompt, seed)):
            if isinstance(event, Pair):
                both = {side: getattr(event, side).picture for side in ("left", "right")}
                urls = {side: cards.data_url(picture, exact=True) for side, picture in both.items()}
                yield {"ticket": event.ticket, "prompt": event.prompt, "seed": event.seed, **urls}
            else:
                yield {"step": event[0], "of": event[1]}

    def vote(ticket: str, choice: str) -> dict[str, Any]:
        """Vote on a pair of /vote_pair by its ``ticket``, once; returns who drew what.

        ``choice`` is left, tie or right.
        """
        return asdict(polling.ballot.cast(ticket, choice))

    def standings() -> list[dict[str, Any]]:
        """Win rates with intervals, apart for each model that bore a name: ``weights`` are the hashes of what drew."""
        return [asdict(one) for one in polling.standings()]

    def votes_csv() -> str:
        """Every vote, a line each."""
        return polling.ballot.csv()

    for function in (models, limits, examples, restore, vote, standings, votes_csv):
        gr.api(_polite(function), api_name=function.__name__, queue=False)
    for stream in (compare, vote_pair):
        gr.api(on_a_shared_gpu(_polite_stream(stream)), api_name=stream.__name__, **DRAWING)
    _offer_runs(runs)


def _offer_runs(given: Runs | None) -> None:
    def here() -> Runs:
        if given is None:
            raise RequestError("This server shows no runs; it was started without --runs.")
        return given

    def runs() -> list[str]:
        """The finished runs, newest first."""
        return given.names() if given else []

    def run(name: str) -> dict[str, Any]:
        """A run's summaries, and what could not be judged. ``name`` is one of /runs."""
        loaded = here().load(name)
        return {
            "note": loaded.note,
            "summaries": [entry.summary for entry in loaded.entries],
            "unavailable": {key: shown(why) for key, why in loaded.unavailable.items()},
        }

    def run_csv(name: str) -> str:
        """A run's tables as CSV. ``name`` is one of /runs."""
        return here().csv(name)

    def run_comparison(name: str) -> list[dict[str, Any]]:
        """Every model of a run beside its first: a sentence, what to mind, and the rows with intervals.

        ``name`` is one of /runs.
        """
        return [
            {
                "key": one.key,
                "sentence": one.sentence,
                "warnings": one.warnings,
                "rows": [asdict(row) for row in (one.overall, *one.tasks)],
            }
            for one in here().compare(name).comparisons
        ]

    def run_pictures(
        name: str,
        model: str | None = None,
        key: str | None = None,
        task: str | None = None,
        verdict: str | None = None,
        disagree: bool = False,
        page: int = 0,
    ) -> dict[str, Any]:
        """The addresses of a run's pictures, a hundred a ``page``, counted from 0; ``name`` is one of /runs.

        Only those of a ``model``, of a metric by its ``key``, of a ``task``, and of a ``verdict`` (right, wrong,
        scored or unscored); null: any. ``disagree``: only where the run's models do.
        """
        if verdict not in (None, *VERDICTS):
            raise RequestError(f"Verdict: expected {', '.join(VERDICTS)}, or null for any, but got {verdict!r}.")
        found = pictures(here().load(name))
        _check_there("Model", model, [one.model for one in found])
        _check_there("Key", key, [one.key for one in found])
        _check_there("Task", task, [one.sample.task for one in found])
        left = chosen(found, model=model, key=key, task=task, said=verdict, disagree=disagree)
        pages = max(1, -(-len(left) // _PAGE))
        if not isinstance(page, int) or not 0 <= page < pages:
            raise RequestError(f"Page: expected a whole number from 0 to {pages - 1}, but got {shown(repr(page), 60)}.")
        start = page * _PAGE
        listed = [
            {
                **one.address,
                "prompt": one.sample.prompt,
                "task": one.sample.task,
                "verdict": one.verdict,
                "score": one.sample.score,
            }
            for one in left[start : start + _PAGE]
        ]
        return {"count": len(left), "pictures": listed}

    def run_picture(name: str, model: str, key: str, id: str, k: int) -> dict[str, Any]:
        """One picture at full size with its boxes and its provenance; no boxes and no score where it is not intact.

        ``name`` is one of /runs; ``model``, ``key``, ``id`` and ``k`` are as /run_pictures lists them.
        """
        full = here().picture(name, {"model": model, "key": key, "id": id, "k": k})
        return {
            "picture": cards.data_url(full.picture, exact=True),
            "intact": full.intact,
            "boxes": marks(full.shown) if full.intact else [],
            "provenance": full.facts,
        }

    for function in (runs, run, run_csv, run_comparison, run_pictures, run_picture):
        gr.api(_polite(function), api_name=function.__name__)


def _check_there(field: str, value: Any, there: list[str]) -> None:
    """Raises ``RequestError`` for a name that no picture of the run bears."""
    names = list(dict.fromkeys(there))
    if value not in (None, *names):
        raise RequestError(f"{field}: expected {', '.join(names)}, or null for any, but got {shown(repr(value), 60)}.")


def _drawn(one: Drawn) -> dict[str, Any]:
    return {
        "model": one.arm,
        "picture": cards.data_url(one.picture, exact=True) if one.picture else None,
        "error": one.error,
        "seconds": round(one.seconds, 3),
        "scores": {flag: _score(score) for flag, score in one.scores.items()},
        "provenance": dict(one.identity),
    }


def _score(score: Any) -> Mapping[str, Any]:
    said = {"value": score.value, "reason": score.reason, "error": score.error and shown(score.error)}
    return {**said, "boxes": cards.boxes(score.detail)}


def _bytes(png: str) -> bytes:
    if not isinstance(png, str) or not png.startswith(_PNG) or len(png) > _LARGEST:
        raise RequestError(f"Expected a saved comparison as text that begins with {_PNG!r}.")
    try:
        return base64.b64decode(png.removeprefix(_PNG), validate=True)
    except binascii.Error:
        raise RequestError("The PNG is not written in base64.") from None
