"""The page's second tab: two pictures without names, a vote, and who drew them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import gradio as gr

from app import cards
from app.examples import EXAMPLES
from app.session import Drawn, Session, Step, weights
from app.told import DRAWING, in_words, on_a_shared_gpu, saved_file
from app.vote import Ballot, Standing, titles
from app.wanted import SEED, Wanted, wanted
from flowopd_eval.errors import RequestError, WorkError

_IDLE = cards.empty(
    "Which is better?",
    "Two models draw the same prompt from the same noise. You see the pictures without names and say which is better; "
    "then you learn who drew them.",
)
_LABELS = {"left": "Left is better", "tie": "Equally good", "right": "Right is better"}


@dataclass(frozen=True)
class Pair:
    """Two pictures to vote on; ``ticket`` tells the ballot which."""

    ticket: str
    prompt: str
    seed: int
    left: Drawn
    right: Drawn


class Polling:
    """Draws pairs and issues their tickets."""

    def __init__(self, session: Session, ballot: Ballot) -> None:
        self.session, self.ballot = session, ballot

    def request(self, prompt: str | None, seed: int | None) -> Wanted:
        """Two models drawn by lot, in an order drawn by lot. Raises ``RequestError`` where there are no two."""
        ready = [arm.name for arm in self.session.ready]
        if len(ready) < 2:
            raise RequestError(f"A vote takes two models, and here there is only {' '.join(ready)}.")
        prompts = [one for each in EXAMPLES[self.session.family.objects].values() for one in each]
        return wanted(
            {
                "prompt": random.choice(prompts)
                if isinstance(prompt, str | None) and not (prompt or "").strip()
                else prompt,
                "seed": random.randrange(SEED + 1) if seed is None else seed,
                "arms": random.sample(ready, 2),
            }
        )

    def pair(self, request: Wanted) -> Iterator[tuple[int, int] | Pair]:
        """Steps done of all, and at last the pair.

        Raises:
            WorkError: one of the two could not be drawn; its name is not told.
        """
        drawn: dict[str, Drawn] = {}
        for event in self.session.draw(request):
            if isinstance(event, Step):
                yield len(drawn) * event.steps + event.done, 2 * event.steps
            else:
                drawn[event.arm] = event
        left, right = (drawn.get(name) for name in request.arms)
        if not left or not right or left.picture is None or right.picture is None:
            raise WorkError("One of the two pictures could not be drawn. Ask for another pair.")
        drew = [weights(one.identity) for one in (left, right)]
        ticket = self.ballot.issue(self.session.family.name, request, drew)
        yield Pair(ticket, request.prompt, request.seed, left, right)

    def standings(self) -> list[Standing]:
        """Every model's wins, ties, losses and rate."""
        return self.ballot.standings(self.session.family.name)


class VoteTab:
    """The components of the tab and what they do. ``temporary``: votes are lost when the server restarts."""

    def __init__(self, polling: Polling, *, temporary: bool) -> None:
        self.polling = polling
        if len(polling.session.ready) < 2:
            only = polling.session.ready[0].name
            gr.HTML(
                cards.empty(
                    "A vote takes two models",
                    f"Here there is only {only}. Start the demo with adapters of your own to have more.",
                    f"python -m app --model {polling.session.family.name} --lora NAME=FOLDER",
                )
            )
            return
        if temporary:
            gr.HTML(
                cards.notice("This is a Space: votes are temporary, and gone when it restarts. Save the CSV in time.")
            )
        self._build()
        self._connect()

    def _build(self) -> None:
        with gr.Row(elem_classes="beside"):
            self.prompt = gr.Textbox(
                label="Prompt (empty: one of the examples)",
                max_lines=3,
                scale=4,
                elem_id="vote-prompt",
            )
            self.ask = gr.Button("Show a pair", variant="primary", min_width=140, elem_id="ask")
        self.status = gr.HTML("", elem_id="vote-status")
        self.pictures = gr.HTML(_IDLE, elem_id="vote-pictures")
        with gr.Row(equal_height=True, elem_classes="votes"):
            self.buttons = {
                choice: gr.Button(label, interactive=False, min_width=100, elem_id=f"vote-{choice}")
                for choice, label in _LABELS.items()
            }
        self.table = gr.HTML("", elem_id="standings")
        self.csv = gr.DownloadButton("Save all votes as CSV", size="sm", elem_id="votes-csv")
        self.at = gr.State(None)

    def _connect(self) -> None:
        buttons = list(self.buttons.values())
        private: dict[str, Any] = {"api_visibility": "private"}
        self.ask.click(
            on_a_shared_gpu(self.show),
            self.prompt,
            [self.status, self.pictures, *buttons, self.at],
            show_progress="minimal",
            show_progress_on=[self.status],
            **DRAWING,
            **private,
        )
        for choice, button in self.buttons.items():
            button.click(
                lambda at, choice=choice: self.vote(at, choice),
                self.at,
                [self.status, self.pictures, *buttons, self.table, self.csv],
                show_progress="hidden",
                queue=False,
                **private,
            )

    def begin(self, page: gr.Blocks) -> None:
        """Show the standings as they are when the page is loaded."""
        if len(self.polling.session.ready) > 1:
            page.load(lambda: (self._table(), self._csv()), None, [self.table, self.csv], api_visibility="private")

    def show(self, prompt: str) -> Iterator[tuple[Any, ...]]:
        """Draw a pair, and show it when both are there: who comes first would tell."""
        off = [gr.update(interactive=False)] * 3
        try:
            request = self.polling.request(prompt, None)
            yield cards.notice("Starting…"), _side_by_side(request.prompt, None, None), *off, None
            for event in self.polling.pair(request):
                if isinstance(event, Pair):
                    yield "", _side_by_side(event.prompt, event, None), *[gr.update(interactive=True)] * 3, event
                else:
                    yield cards.progress("Drawing two pictures", *event), *[gr.skip()] * 5
        except Exception as error:
            yield cards.notice(in_words(error), "bad"), _IDLE, *off, None

    def vote(self, pair: Pair | None, choice: str) -> tuple[Any, ...]:
        """Count the vote and say who drew what."""
        off = [gr.update(interactive=False)] * 3
        try:
            if pair is None:
                raise RequestError("Ask for a pair first.")
            self.polling.ballot.cast(pair.ticket, choice)
        except Exception as error:
            return cards.notice(in_words(error), "bad"), gr.skip(), *off, gr.skip(), gr.skip()
        words = f"Your vote is counted: {_LABELS[choice].lower()}."
        return cards.notice(words, "good"), _side_by_side(pair.prompt, pair, choice), *off, self._table(), self._csv()

    def _csv(self) -> str:
        return saved_file(self.polling.ballot.csv().encode(), "votes.csv")

    def _table(self) -> str:
        found = self.polling.standings()
        if not found:
            return cards.empty("No votes yet", "With the first one, the win rates stand here.")
        names = titles(found)
        rows = [
            [name, cards.interval(asdict(one.rate)), str(one.wins), str(one.ties), str(one.losses)]
            for name, one in zip(names, found, strict=True)
        ]
        caption = "Win rate with its 95 % interval, resampled by prompt; a tie is half a win. 0.5: as often as not."
        bars = [(name, [("win rate", asdict(one.rate))]) for name, one in zip(names, found, strict=True)]
        return cards.table(["Model", "Win rate", "Won", "Tied", "Lost"], rows, caption) + cards.chart(bars)


def _side_by_side(prompt: str, pair: Pair | None, choice: str | None) -> str:
    """The two pictures, without names before the ``choice``, with them after it."""
    sides = []
    for side in ("left", "right"):
        one: Drawn | None = getattr(pair, side) if pair else None
        if one is None or one.picture is None:
            picture = '<div class="frame waiting now"><span>Drawing…</span></div>'
        else:
            picture = cards.framed(one.picture, f"{side} picture: {prompt}")
        name = f"{side.capitalize()}: {one.arm}" if one and choice else side.capitalize()
        preferred = ' <span class="badge">your choice</span>' if choice == side else ""
        sides.append(f'<article class="arm">{picture}<h3>{cards.escape(name)}{preferred}</h3></article>')
    asked = f'<p class="asked">{cards.escape(prompt)}</p>'
    return f'<section class="results">{asked}<div class="cards two">{"".join(sides)}</div></section>'
