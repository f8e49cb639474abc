"""Two models on the same prompts and seeds: what differs, whether that is real, and how many prompts it takes.

Pictures are paired by prompt and ``k``; they must share their seed. A pair counts when both of its pictures have a
score. Differences are ``b - a``, with intervals clustered by prompt (:mod:`flowopd_eval.statistics`). Runs are
compared only when everything but the model is the same: bench version, prompts, judge, seeds and sampling record. What
is read may come from elsewhere: whatever is missing or ill-formed in it is a ``RequestError``.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import fsum, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowopd_eval import store
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import OWN_PROMPTS, collect, mean_over
from flowopd_eval.quiet import printable
from flowopd_eval.records import Interval, Prompt, Sample
from flowopd_eval.statistics import mean_interval, paired_difference, paired_sd, prompts_needed, task_mean_interval
from flowopd_eval.store import BenchFolder

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

Pair = tuple[Sample, Sample]

POWER = 0.8
ACROSS = ("record",)
_ROUNDING = 1e-9  # a difference below this is rounding
_LARGEST = 1e12  # sums of the squares of larger "scores" would overflow
_FEW = 20  # of fewer prompts, percentile intervals are noticeably too narrow (statistics' notes)

_REMEDIES = {
    "version": "The bench changed in between: draw and judge both with one version of flowopd-eval.",
    "prompts_sha256": "They answer different prompts: draw both with the same prompts (--prompts, --tasks, --limit).",
    "samples": "Draw both with the same --samples.",
    "seed": "Draw both with the same --seed.",
    "correct_at": "What counts as right changed in between: draw and judge both with one version of flowopd-eval.",
    "scorer": "Judge both with the same judge and protocol: flowopd-eval score DIR --protocol NAME.",
    "sampling": "Draw both with the same settings, or say --across record if the settings are what you compare.",
}
_TYPES: dict[str, tuple[type, ...]] = {
    "scorer": (dict, type(None)),
    "partial": (str, type(None)),
    "correct_at": (int, float, type(None)),
}


# ------------------------------------------------------------------------------------------------------------ results


@dataclass(frozen=True)
class Row:
    """A task, or ``overall``: both estimates over the paired pictures and ``b - a``, in the metric's own units."""

    name: str
    prompts: int
    a: Interval
    b: Interval
    difference: Interval


@dataclass(frozen=True)
class PicturePair:
    """Picture ``k`` of a prompt by both models, from the same seed."""

    k: int
    seed: int
    a_file: str
    b_file: str
    a_score: float
    b_score: float


@dataclass(frozen=True)
class Change:
    """A prompt whose mean score differs: ``a`` and ``b`` are the means over its pairs."""

    id: str
    task: str
    prompt: str
    a: float
    b: float
    pictures: tuple[PicturePair, ...]

    @property
    def telling(self) -> PicturePair:
        """The pair that changed most in the direction of the prompt."""
        sign = 1 if self.b > self.a else -1
        return max(self.pictures, key=lambda pair: sign * (pair.b_score - pair.a_score))


@dataclass(frozen=True)
class Comparison:
    """Model ``b`` against the baseline ``a`` on one metric.

    ``points``: all scores lie within 0..1 and are shown times 100. ``right_to_wrong`` and ``wrong_to_right`` count
    prompts of a metric of 0 and 1 (a prompt is right when any of its pictures is, as in GenEval's "correct prompts");
    None for others. ``better`` and ``worse`` hold the prompts whose mean score rose and fell, largest change first.
    ``needed``: prompts at which a difference of this size would be seen with power 0.8; None where it is seen already
    or the spread does not tell. ``a`` and ``b`` hold labels, paths, requests (with all hashes) and sessions.
    """

    key: str
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    points: bool
    overall: Row
    tasks: tuple[Row, ...]
    pairs: int
    left_out: Mapping[str, int]
    better: tuple[Change, ...]
    worse: tuple[Change, ...]
    same: int
    right_to_wrong: int | None
    wrong_to_right: int | None
    real: bool
    needed: int | None
    sentence: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """Every comparison with the baseline, and what holds for all of them."""

    across: str | None
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON: numbers in the metrics' own units, hashes, versions, paths."""
        return {
            "schema": store.SCHEMA,
            "compared_with": store.provenance(),
            "across": self.across,
            "power": POWER,
            "notes": list(self.notes),
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
        }


@dataclass(frozen=True)
class Requirement:
    """How many prompts a difference of ``delta`` takes; None when the runs differ alike on every prompt.

    ``delta`` and ``sd`` in points where ``points``, else in the metric's own units.
    """

    key: str
    points: bool
    delta: float
    sd: float
    prompts: int
    needed: int | None
    sentence: str
    warnings: tuple[str, ...]


# ------------------------------------------------------------------------------------------------- finding the models


@dataclass(frozen=True)
class Side:
    """One model of a run, with its benches by metric key. ``path`` is what names it on the command line."""

    label: str
    path: Path
    folders: Mapping[str, BenchFolder]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns an operating system's refusal to read into a ``RequestError``."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from error


def find_sides(paths: Sequence[Path]) -> list[Side]:
    """The models that ``paths`` name, the baseline first.

    A path is ``OUT``, or ``OUT/<model>`` where a run holds several; of a single ``OUT`` all models are taken.
    Raises ``RequestError`` when that is not two models or more, each once.
    """
    sides: list[Side] = []
    for path in paths:
        with _reading(path):
            found = _models_of(path)
        if len(found) > 1 and len(paths) > 1:
            choice = ", ".join(str(side.path) for side in found)
            raise RequestError(f"{path} holds several models. Name the one to compare: {choice}.")
        sides += found
    places = [side.path.resolve() for side in sides]
    if again := next((side for n, side in enumerate(sides) if places[n] in places[:n]), None):
        raise RequestError(f"{again.path} is given twice: a run differs from itself in nothing. Name another run.")
    if len(sides) < 2:
        only = f"only {sides[0].label}" if sides else "none"
        raise RequestError(f"Expected two models or more, but got {only}. Give two runs, or one that holds several.")
    labels = [side.label for side in sides]
    return [
        side if labels.count(side.label) == 1 else replace(side, label=f"{side.label} ({printable(str(side.path))})")
        for side in sides
    ]


def _models_of(path: Path) -> list[Side]:
    out, chosen = _run_and_model(path)
    folders = store.bench_folders(out)
    by_model: dict[str, dict[str, BenchFolder]] = defaultdict(dict)
    labels: dict[str, str] = {}
    for folder in folders:
        model = folder.entry.partition("/")[0]
        if chosen not in (None, model):
            continue
        request = folder.request()
        key = request["key"]
        if not key.isprintable():
            raise RequestError(f"{folder.path} has the metric key {key!r}: expected printable text.")
        if other := by_model[model].get(key):
            raise RequestError(f"{other.path} and {folder.path} both hold {key}: compare takes one of each metric.")
        by_model[model][key] = folder
        labels.setdefault(model, printable(request["model"]))
    if not by_model:
        has = ", ".join(dict.fromkeys(folder.entry.partition("/")[0] for folder in folders)) or "none"
        raise RequestError(f"The run in {out} holds no model {chosen!r}; it holds: {has}.")
    return [Side(labels[model], out / model, keys) for model, keys in by_model.items()]


def _run_and_model(path: Path) -> tuple[Path, str | None]:
    """``OUT`` and the model's folder in it, None for all."""
    if (path / "run.json").exists():
        return path, None
    whole = path if path.name not in ("", "..") else Path(os.path.abspath(path))
    if (whole.parent / "run.json").exists():
        return whole.parent, whole.name
    raise RequestError(f"{path} is no run: there is no run.json in it. Give the --out folder of a run, or OUT/<model>.")


# ------------------------------------------------------------------------------------------------ what is comparable


@dataclass(frozen=True)
class Entry:
    """One model on one bench: what ``run.json`` says of it, its types checked."""

    label: str
    folder: BenchFolder
    request: Mapping[str, Any]
    sessions: Sequence[Any]

    @property
    def sampling(self) -> Mapping[str, Any] | None:
        """The sampling record; None for pictures that were drawn elsewhere."""
        return self.request["generator"].get("sampling")

    def to_json(self) -> dict[str, Any]:
        """What was compared, with all hashes."""
        return {
            "label": self.label,
            "path": str(self.folder.path),
            "request": self.request,
            "sessions": self.sessions,
            "samples_sha256": {path.name: store.file_sha256(path) for path in self.folder.journals()},
        }


def _entry(side: Side, key: str) -> Entry:
    """Raises ``RequestError`` for a ``run.json`` that lacks what a comparison rests on."""
    folder = side.folders[key]
    request, place = folder.request(), folder.out / "run.json"
    for field, types in _TYPES.items():
        if field not in request or not isinstance(request[field], types):
            raise RequestError(f"{folder.entry} in {place} lacks a valid {field}: draw and judge it again.")
    if not isinstance(request["generator"].get("sampling", {}), dict | None):
        raise RequestError(f"{folder.entry} in {place} has a sampling record that is not one: draw it again.")
    sessions = store.read_run(folder.out)["runs"][folder.entry].get("sessions", [])
    try:
        json.dumps([request, sessions], allow_nan=False)
    except ValueError as error:
        raise RequestError(f"{folder.entry} in {place} holds numbers that are not finite: {error}.") from error
    return Entry(side.label, folder, request, sessions)


def _check_contract(a: Entry, b: Entry, across: str | None) -> list[str]:
    """Warnings about what differs and may. Raises ``RequestError`` naming every field that may not, and the remedy."""
    differing = dict(_differing(_contract(a), _contract(b)))
    named = {
        field: f"{printable(field)}: {json.dumps(x)} in {a.label}, {json.dumps(y)} in {b.label}"
        for field, (x, y) in differing.items()
    }
    unknown = [entry.label for entry in (a, b) if entry.sampling is None]
    if across != "record" and unknown:
        raise RequestError(
            f"{' and '.join(unknown)}: seeds and sampling record are not known, as the pictures were drawn elsewhere. "
            "Draw them with flowopd-eval, or say --across record to compare them all the same."
        )
    refused = [field for field in named if across != "record" or field.partition(".")[0] != "sampling"]
    if refused:
        remedies = dict.fromkeys(_REMEDIES[field.partition(".")[0]] for field in refused)
        raise RequestError(
            f"{a.label} and {b.label} cannot be compared on {a.request['key']}:\n  "
            + "\n  ".join([*(named[field] for field in refused), *remedies])
        )
    warnings = [f"Not the same: {text}" for text in named.values()]
    if a.request["partial"] == OWN_PROMPTS:
        warnings.append(f"Drawn from {OWN_PROMPTS}: what differs here differs on these prompts.")
    if unknown:
        warnings.append(f"Seeds and sampling record of {' and '.join(unknown)} are not known.")
    if a.request["batch_size"] != b.request["batch_size"]:
        warnings.append(
            f"Not the same: batch_size: {a.request['batch_size']} in {a.label}, {b.request['batch_size']} in "
            f"{b.label}. That changes pictures by rounding only, most in half precision."
        )
    return warnings


def _contract(entry: Entry) -> dict[str, Any]:
    return {field: entry.sampling if field == "sampling" else entry.request[field] for field in _REMEDIES}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The fields, nested ones dotted, that are not equal, with both values; None where there is none."""
    ours, theirs = dict(store.flat(a)), dict(store.flat(b))
    for field in {**ours, **theirs}:
        if ours.get(field) != theirs.get(field):
            yield field, (ours.get(field), theirs.get(field))


def _check_whole(entry: Entry, *, pilot: bool) -> None:
    """Raises ``RequestError`` for a run without scores, and one of part of a bench unless it serves as a pilot."""
    folder, request = entry.folder, entry.request
    if request["scorer"] is None:
        raise RequestError(f"{folder.path} has no scores yet: flowopd-eval score {folder.out}.")
    if request["partial"] not in (None, OWN_PROMPTS) and not pilot:
        raise RequestError(
            f"{folder.path} is partial ({printable(request['partial'])}): a part of a bench says nothing of the whole. "
            "Draw it without --limit and --tasks."
        )


def _samples(entry: Entry) -> dict[tuple[str, int], Sample]:
    """Every picture of the plan by prompt id and ``k``. Raises ``RequestError`` when one is missing."""
    with _reading(entry.folder.path):
        samples, missing = collect(entry.folder)
    if missing:
        raise RequestError(
            f"{entry.folder.path} is not finished ({'; '.join(missing)}). Give the command that drew it again, with "
            f"--out {entry.folder.out}: it continues."
        )
    wild = next((s for s in samples if s.score is not None and abs(s.score) > _LARGEST), None)
    if wild:
        raise RequestError(f"{entry.folder.path} has the score {wild.score:g} for {wild.file!r}: no judge gives that.")
    return {(sample.id, sample.k): sample for sample in samples}


# --------------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class _Paired:
    """Two entries picture by picture; ``pairs`` holds the scored pairs by prompt id, in the order of the prompts."""

    a: Entry
    b: Entry
    prompts: Mapping[str, Prompt]
    pairs: Mapping[str, Sequence[Pair]]
    left_out: Mapping[str, int]
    warnings: Sequence[str]

    @property
    def tasks(self) -> dict[str, str]:
        return {key: self.prompts[key].task for key in self.pairs}

    @property
    def strata(self) -> dict[str, str]:
        """Within what the prompts of the overall score are averaged: their tasks, or all of them together."""
        return self.tasks if mean_over(self.a.request) == "tasks" else dict.fromkeys(self.pairs, "all")

    def scores(self, side: int, task: str | None = None) -> dict[str, list[float]]:
        """Scores by prompt id of the first (0) or second (1) model, of one task or of all."""
        return {
            key: [_score(pair[side]) for pair in pairs]
            for key, pairs in self.pairs.items()
            if task in (None, self.prompts[key].task)
        }

    @property
    def points(self) -> bool:
        return all(0 <= score <= 1 for side in (0, 1) for scores in self.scores(side).values() for score in scores)


def _score(sample: Sample) -> float:
    assert sample.score is not None, "only scored pictures are paired"
    return sample.score


def _pair_entries(a: Entry, b: Entry, across: str | None, *, pilot: bool = False) -> _Paired:
    """Raises ``RequestError`` when the two do not answer the same request, or either not all of it."""
    for entry in (a, b):
        _check_whole(entry, pilot=pilot)
    warnings = _check_contract(a, b, across)
    ours, theirs = _samples(a), _samples(b)
    with _reading(a.folder.path):
        prompts = {prompt.id: prompt for prompt in a.folder.prompts()}
    pairs: dict[str, list[Pair]] = defaultdict(list)
    left_out = {"a_unscored": 0, "b_unscored": 0, "pairs": 0}
    for (key, k), first in ours.items():
        second = theirs[key, k]
        if first.seed != second.seed:
            raise RequestError(
                f"Picture {k} of prompt {key!r} has seed {first.seed} in {a.label} and {second.seed} in {b.label}: "
                "their differences would be the noise's. Draw both with the same --seed."
            )
        left_out["a_unscored"] += first.score is None
        left_out["b_unscored"] += second.score is None
        if first.score is None or second.score is None:
            left_out["pairs"] += 1
        else:
            pairs[key].append((first, second))
    lost = {prompt.task for prompt in prompts.values()} - {prompts[key].task for key in pairs}
    if lost:
        raise RequestError(
            f"No picture of {', '.join(map(repr, sorted(lost)))} is scored in both {a.label} and {b.label}: see the "
            f"errors in {a.folder.samples} and {b.folder.samples}, then flowopd-eval score both again."
        )
    in_order = {key: pairs[key] for key in prompts if key in pairs}
    return _Paired(a, b, prompts, in_order, left_out, warnings)


def compare_runs(paths: Sequence[Path], across: str | None = None) -> Result:
    """Compare every model with the first, on each metric they share.

    Args:
        paths: runs as :func:`find_sides` takes them.
        across: ``record`` when the sampling record is what is compared: its differences become warnings.

    Raises:
        RequestError: runs that are partial, unfinished or damaged, that share no metric, or that differ in anything
            but the model; the message names both values and the remedy.
    """
    first, *others = find_sides(paths)
    comparisons, notes = [], []
    for other in others:
        shared, lone = _shared(first, other)
        comparisons += [_compare(_pair_sides(first, other, key, across)) for key in shared]
        notes += lone
    if len(comparisons) > 1:
        notes.append(
            f"{len(comparisons)} comparisons are shown; their intervals are not corrected for the number of "
            "comparisons: of twenty between equal models, about one looks real by chance."
        )
    return Result(across, tuple(comparisons), tuple(notes))


def _shared(a: Side, b: Side) -> tuple[list[str], list[str]]:
    """The metrics of both, and in words those of one only. Raises ``RequestError`` when they share none."""
    shared = [key for key in a.folders if key in b.folders]
    lone = {side.label: [key for key in side.folders if key not in shared] for side in (a, b)}
    words = [f"Only {label} has {', '.join(keys)}: not compared." for label, keys in lone.items() if keys]
    if not shared:
        raise RequestError(f"{a.label} and {b.label} share no metric. {' '.join(words)} Run the same --bench for both.")
    return shared, words


def _pair_sides(a: Side, b: Side, key: str, across: str | None, *, pilot: bool = False) -> _Paired:
    if across not in (None, *ACROSS):
        raise RequestError(f"Expected --across record, but got --across {across!r}.")
    with _reading(a.path):
        first = _entry(a, key)
    with _reading(b.path):
        second = _entry(b, key)
    return _pair_entries(first, second, across, pilot=pilot)


def _compare(paired: _Paired) -> Comparison:
    a, b, tasks = paired.scores(0), paired.scores(1), paired.tasks
    names = list(dict.fromkeys(tasks.values()))
    overall = Row("overall", len(tasks), *_estimates(paired), paired_difference(a, b, paired.strata))
    changes = [_change(paired, key) for key in paired.pairs]
    changes.sort(key=lambda change: -abs(change.b - change.a))  # stable: else in the order of the prompts
    better = tuple(change for change in changes if change.b > change.a)
    worse = tuple(change for change in changes if change.b < change.a)
    real = overall.difference.low > _ROUNDING or overall.difference.high < -_ROUNDING
    needed = None if real else _needed(paired, abs(overall.difference.value))
    flips = _flips(changes, paired.a.request["correct_at"])
    return Comparison(
        key=paired.a.request["key"],
        a=paired.a.to_json(),
        b=paired.b.to_json(),
        points=paired.points,
        overall=overall,
        tasks=tuple(_task_row(paired, task) for task in names),
        pairs=sum(map(len, paired.pairs.values())),
        left_out=paired.left_out,
        better=better,
        worse=worse,
        same=len(changes) - len(better) - len(worse),
        right_to_wrong=flips[0] if flips else None,
        wrong_to_right=flips[1] if flips else None,
        real=real,
        needed=needed,
        sentence=_sentence(paired, overall.difference, real, needed),
        warnings=(*paired.warnings, *_few(len(tasks), "Intervals of so few are too narrow.")),
    )


def _estimates(paired: _Paired) -> tuple[Interval, Interval]:
    """The overall scores of both models."""
    first, second = (paired.scores(side) for side in (0, 1))
    groups: dict[str, list[str]] = defaultdict(list)
    for key, stratum in paired.strata.items():
        groups[stratum].append(key)
    a, b = (
        task_mean_interval({stratum: [scores[key] for key in keys] for stratum, keys in groups.items()})
        for scores in (first, second)
    )
    return a, b


def _task_row(paired: _Paired, task: str) -> Row:
    a, b = paired.scores(0, task), paired.scores(1, task)
    return Row(task, len(a), mean_interval(list(a.values())), mean_interval(list(b.values())), paired_difference(a, b))


def _change(paired: _Paired, key: str) -> Change:
    pairs, prompt = paired.pairs[key], paired.prompts[key]
    a, b = (fsum(_score(pair[side]) for pair in pairs) / len(pairs) for side in (0, 1))
    files = (paired.a.folder.path, paired.b.folder.path)
    pictures = tuple(
        PicturePair(x.k, x.seed, str(files[0] / x.file), str(files[1] / y.file), _score(x), _score(y)) for x, y in pairs
    )
    return Change(key, prompt.task, prompt.prompt, a, b, pictures)


def _flips(changes: Sequence[Change], correct_at: float | None) -> tuple[int, int] | None:
    """Prompts that went from right to wrong, and from wrong to right; None for scores that are not all 0 or 1."""
    scores = [score for change in changes for pair in change.pictures for score in (pair.a_score, pair.b_score)]
    if correct_at is None or not set(scores) <= {0.0, 1.0}:
        return None
    right = [
        (any(p.a_score >= correct_at for p in change.pictures), any(p.b_score >= correct_at for p in change.pictures))
        for change in changes
    ]
    return right.count((True, False)), right.count((False, True))


def _needed(paired: _Paired, difference: float) -> int | None:
    """Prompts at which ``difference`` would be seen; None where the spread of these prompts does not tell."""
    try:
        sd = paired_sd(paired.scores(0), paired.scores(1), paired.strata)
    except ValueError:  # a task of one prompt has no spread
        return None
    if min(difference, sd) <= _ROUNDING:
        return None
    needed = prompts_needed(difference, sd, POWER)
    return needed if needed > len(paired.pairs) else None  # these did not do


def _sentence(paired: _Paired, difference: Interval, real: bool, needed: int | None) -> str:
    """What the difference comes to, in plain words."""
    points = paired.points
    size = number(abs(difference.value), points) + (" points" if points else "")
    how = f"{size} {'higher than' if difference.value > 0 else 'lower than'}"
    if abs(difference.value) <= _ROUNDING:
        how = "the same as"
    low, high = (number(end, points) for end in (difference.low, difference.high))
    units = "" if points else ", in the metric's own units"
    key = paired.a.request["key"]
    begin = f"{paired.b.label} scores {how} {paired.a.label} on {key} (95 % interval {low} to {high}{units})"
    if real:
        return f"{begin}: the difference is real."
    end = ""
    if needed:
        end = f"; about {needed:,} prompts would be needed to see a difference of this size (power {POWER:g})"
    return f"{begin}. The interval contains 0: these prompts do not tell them apart{end}."


def _few(prompts: int, consequence: str) -> list[str]:
    return [f"There are only {prompts} prompts. {consequence}"] if prompts < _FEW else []


# -------------------------------------------------------------------------------------------------------------- power


def prompts_for(
    paths: Sequence[Path], delta: float, power: float = POWER, across: str | None = None
) -> list[Requirement]:
    """For each metric two models share: how many prompts a difference of ``delta`` takes, by their paired spread.

    Runs of the same part of a bench (``--limit``) serve as a pilot. Other refusals as :func:`compare_runs`.

    Args:
        paths: two models, as :func:`find_sides` takes them.
        delta: smallest difference worth finding, > 0: in points of 100 for scores within 0..1, else in the metric's
            own units.
        power: probability of finding it, in (0, 1).
        across: as in :func:`compare_runs`.

    Raises:
        RequestError: as said, or a task has fewer than two prompts.
    """
    if not (isfinite(delta) and delta > 0):
        raise RequestError(f"Expected --delta to be positive, such as 2 for two points, but got {delta:g}.")
    if not 0 < power < 1:
        raise RequestError(f"Expected --power between 0 and 1, such as 0.8, but got {power:g}.")
    sides = find_sides(paths)
    if len(sides) > 2:
        names = ", ".join(str(side.path) for side in sides)
        raise RequestError(f"Expected two models, but got {len(sides)}. Name two of: {names}.")
    first, second = sides
    shared, _ = _shared(first, second)
    return [_requirement(_pair_sides(first, second, key, across, pilot=True), delta, power) for key in shared]


def _requirement(paired: _Paired, delta: float, power: float) -> Requirement:
    key, points, prompts = paired.a.request["key"], paired.points, len(paired.pairs)
    try:
        sd = paired_sd(paired.scores(0), paired.scores(1), paired.strata) * (100 if points else 1)
    except ValueError as error:
        raise RequestError(f"{key}: the spread cannot be told. {error} Draw more prompts (--limit).") from error
    needed = prompts_needed(delta, sd, power) if sd > _ROUNDING else None
    unit = " points" if points else " (in the metric's own units, as its scores are not within 0..1)"
    sentence = f"{key}: both models differ alike on all {prompts:,} prompts, which does not tell how many it takes."
    if needed:
        sentence = (
            f"{key}: a difference of {delta:g}{unit} takes about {needed:,} prompts to be seen with power {power:g} "
            f"(95 % interval): the paired differences of these {prompts:,} prompts have a spread of {sd:.3g}"
            f"{' points' if points else ''}."
        )
    warnings = [*paired.warnings, *_few(prompts, "Their spread is a rough guide.")]
    if partial := paired.a.request["partial"]:
        warnings.append(f"A pilot ({printable(partial)}): further prompts are taken to be like these, task by task.")
    return Requirement(key, points, delta, sd, prompts, needed, sentence, tuple(warnings))


# ------------------------------------------------------------------------------------------------------------ terminal


def terminal_report(result: Result, show: int = 5) -> Group:
    """Tables, changed prompts (``show`` of each direction) and the sentences. Print it with ``crop=False``."""
    from rich.console import Group

    parts: list[RenderableType] = []
    for comparison in result.comparisons:
        parts += [_table(comparison), _line("")]
        parts += [_line(text) for text in _change_lines(comparison, show)]
        parts += [_line(f"! {warning}", "yellow") for warning in comparison.warnings]
        parts += [_line(comparison.sentence, "bold"), _line("")]
    return Group(*parts, *(_line(note, "dim italic") for note in result.notes))


def _table(comparison: Comparison) -> Table:
    from rich.table import Table
    from rich.text import Text

    a, b, points = comparison.a["label"], comparison.b["label"], comparison.points
    scale = "points of 100" if points else "the metric's own units"
    title = Text(f"{comparison.key}, in {scale}\nA = {a}\nB = {b}", style="bold")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for column in ("A", "B", "B - A", "95 % interval", "prompts"):
        table.add_column(column, justify="right")
    for row in (comparison.overall, *comparison.tasks):
        name = "overall" if row is comparison.overall else f"  {printable(row.name)}"
        low, high = (number(end, points) for end in (row.difference.low, row.difference.high))
        cells = [number(row.a.value, points), number(row.b.value, points), signed(row.difference.value, points)]
        style = "bold" if row is comparison.overall else ""
        table.add_row(Text(name), *cells, f"{low} to {high}", f"{row.prompts:,}", style=style)
    return table


def _change_lines(comparison: Comparison, show: int) -> list[str]:
    better, worse = comparison.better, comparison.worse
    counted = f"{len(better):,} better in B, {len(worse):,} worse, {comparison.same:,} the same"
    if comparison.wrong_to_right is not None:
        rule = ""
        if comparison.pairs > comparison.overall.prompts:
            rule = f" (a prompt is right when any of its pictures is; by its share of right pictures: {counted})"
        lines = [
            f"Prompts: {comparison.wrong_to_right:,} went from wrong to right, "
            f"{comparison.right_to_wrong:,} from right to wrong{rule}."
        ]
    else:
        lines = [f"Prompts: {counted} (by the mean of a prompt's pictures)."]
    if comparison.left_out["pairs"]:
        a, b, pairs = (comparison.left_out[side] for side in ("a_unscored", "b_unscored", "pairs"))
        lines.append(f"Left out: {pairs:,} pairs, as {a:,} pictures of A and {b:,} of B have no score.")
    for name, changes in (("Worse", worse), ("Better", better)):
        if changes[:show]:
            lines.append(f"{name} in B ({min(show, len(changes)):,} of {len(changes):,}):")
        for change in changes[:show]:
            pair = change.telling
            scores = f"{number(change.a, comparison.points)} -> {number(change.b, comparison.points)}"
            lines += [f"  {scores}  {change.prompt} ({change.task})", f"    A {pair.a_file}", f"    B {pair.b_file}"]
    return lines


def number(value: float, points: bool) -> str:
    """In points with one decimal, else with three; more where a difference would otherwise look like none."""
    scaled, decimals = (100 * value, 1) if points else (value, 3)
    if abs(scaled) <= _ROUNDING:
        return f"{0:.{decimals}f}"
    return f"{scaled:.{decimals}f}" if abs(scaled) >= 10**-decimals else f"{scaled:.2g}"


def signed(value: float, points: bool) -> str:
    """As :func:`number`, with a plus sign above zero."""
    return ("+" if value > _ROUNDING else "") + number(value, points)


def _line(text: str, style: str = "") -> Text:
    """One line as it is: no markup, and never broken, so that paths can be copied."""
    from rich.text import Text

    return Text(printable(text), style=style, no_wrap=True, overflow="ignore")
