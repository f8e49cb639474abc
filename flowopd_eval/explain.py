"""How much of a number is its protocol: the same pictures judged under one protocol after the other.

Two published numbers of one bench can differ because the pictures do or because the protocols do. Here the pictures
stay: each step changes one thing about the protocol, so what moves is the protocol's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flowopd_eval import store
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import Progress, collect, identity_of, mean_over
from flowopd_eval.records import Interval, Sample, Scorer
from flowopd_eval.rescore import journal_aside, judge_aside
from flowopd_eval.statistics import paired_difference, task_mean_interval
from flowopd_eval.store import WHOLE, BenchFolder

if TYPE_CHECKING:
    from rich.console import Group

Judged = Mapping[tuple[str, int], Sample]


@dataclass(frozen=True)
class Step:
    """The pictures under one protocol.

    ``change`` is the overall score less the step before's, over the pictures that both could judge; it is an estimate
    with an interval where the verdicts changed, and a bare number where only the averaging did. ``to_right`` and
    ``to_wrong`` count pictures whose score rose and fell.
    """

    name: str
    overall: Interval
    change: float
    interval: Interval | None
    to_right: int
    to_wrong: int
    unscored: int


@dataclass(frozen=True)
class Explanation:
    """A run's bench under each protocol, in order; ``apart`` is the last overall score less the first."""

    entry: str
    steps: tuple[Step, ...]

    @property
    def apart(self) -> float:
        return self.steps[-1].overall.value - self.steps[0].overall.value

    @property
    def sentence(self) -> str:
        """In plain words."""
        first, last = self.steps[0], self.steps[-1]
        most = max(self.steps[1:], key=lambda step: abs(step.change))
        return (
            f"{self.entry}: {100 * first.overall.value:.1f} by the first protocol, {100 * last.overall.value:.1f} by "
            f"the last, on the same pictures: {100 * self.apart:+.1f} points are protocol. Of these, most comes from: "
            f"{most.name} ({100 * most.change:+.1f})."
        )

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return {"entry": self.entry, "apart": self.apart, "steps": [asdict(step) for step in self.steps]}


def explain(
    folder: BenchFolder,
    scorers: Sequence[tuple[str, Scorer]],
    *,
    batch_size: int = 8,
    progress: Progress = lambda done, total, text: None,
) -> Explanation:
    """Judge a run's pictures by each of ``scorers`` (name, scorer) in turn; writes ``explain.json`` beside them.

    The run's own scores stay as they are, and are used where they are by one of the scorers. An interrupted call
    continues. Raises ``RequestError`` for a run that is not complete.
    """
    request = folder.request()
    with folder.alone(WHOLE.journal):
        samples, missing = collect(folder)
        if missing:
            raise RequestError(f"{folder.path} is not complete ({'; '.join(missing)}): draw the rest first.")
        own = {(sample.id, sample.k): sample for sample in samples}
        steps: list[Step] = []
        done: list[tuple[Judged, str]] = []
        for name, scorer in scorers:
            identity = identity_of(scorer)
            judged: Judged = own
            if identity != request["scorer"]:
                judged = judge_aside(folder, scorer, samples, samples, batch_size, progress)
            done.append((judged, mean_over({"scorer": identity})))
            steps.append(_step(name, done))
        explanation = Explanation(folder.entry, tuple(steps))
        store.write_json(folder.path / "explain.json", explanation.to_json())
        for _, scorer in scorers:  # others may be of a `score` that is to be continued
            journal_aside(folder, identity_of(scorer)).unlink(missing_ok=True)
    return explanation


def _step(name: str, done: Sequence[tuple[Judged, str]]) -> Step:
    judged, over = done[-1]
    before, over_before = done[-2] if len(done) > 1 else done[-1]
    both = {key: (before[key].score, one.score) for key, one in judged.items()}
    pairs = {key: (x, y) for key, (x, y) in both.items() if x is not None and y is not None}
    if not pairs:
        raise RequestError(f"No picture could be judged under {name!r} and the protocol before it.")
    scores: tuple[dict[str, list[float]], ...] = ({}, {})
    for (prompt, _), pair in pairs.items():
        for side, score in zip(scores, pair, strict=True):
            side.setdefault(prompt, []).append(score)
    tasks = {prompt: judged[prompt, k].task for prompt, k in pairs}
    first, last = (_overall(side, tasks, o) for side, o in zip(scores, (over_before, over), strict=True))
    strata = tasks if over == "tasks" else dict.fromkeys(tasks, "all")
    return Step(
        name,
        last,
        last.value - first.value,
        paired_difference(scores[0], scores[1], strata) if over == over_before and len(done) > 1 else None,
        sum(y > x for x, y in pairs.values()),
        sum(y < x for x, y in pairs.values()),
        sum(sample.score is None for sample in judged.values()),
    )


def _overall(scores: Mapping[str, Sequence[float]], tasks: Mapping[str, str], over: str) -> Interval:
    groups: dict[str, list[Sequence[float]]] = defaultdict(list)
    for prompt, values in scores.items():
        groups[tasks[prompt] if over == "tasks" else "all"].append(values)
    return task_mean_interval(groups)


def terminal_report(explanation: Explanation) -> Group:
    """A row a step, and the sentence."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title=explanation.entry, title_justify="left")
    for heading in ("protocol, one change after the other", "overall", "change", "95 %", "up", "down", "unscored"):
        table.add_column(heading, justify="left" if heading.startswith("protocol") else "right")
    for number, step in enumerate(explanation.steps):
        between = f"[{100 * step.interval.low:+.1f}, {100 * step.interval.high:+.1f}]" if step.interval else ""
        change = (f"{100 * step.change:+.1f}", between, str(step.to_right), str(step.to_wrong)) if number else ("",) * 4
        cells = (step.name, f"{100 * step.overall.value:.1f}", *change, str(step.unscored))
        table.add_row(*(Text(cell) for cell in cells))
    return Group(table, Text(explanation.sentence, style="bold"))
