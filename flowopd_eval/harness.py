"""Generate -> score -> store: pictures of a bench drawn, judged and kept, resumable at any moment.

The request fixes the batch plan: prompts in order, each with its ``samples`` pictures, cut into batches. A batch is
done when its lines are in the journal and its pictures still match them; everything else is drawn again, whole. So a
run that was killed, continued or cut into shards ends with the same bytes as one that was left alone.

A worker thread saves and judges batch i while batch i + 1 is drawn.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import signal
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowopd_eval import store
from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.records import Generator, Prompt, Sample, Score, Scorer
from flowopd_eval.statistics import any_correct, mean_interval, task_mean_interval
from flowopd_eval.store import WHOLE, BenchFolder, Shard

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger(__name__)

NOT_SCORED = "not scored yet"
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")

Progress = Callable[[int, int, str], None]
Metrics = Callable[[Sequence[Sample], float | None], dict[str, Any]]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; what was finished is on the disk. The message says how far it got and how to go on."""


# ----------------------------------------------------------------------------------------------------------- metrics


def standard_metrics(samples: Sequence[Sample], correct_at: float | None) -> dict[str, Any]:
    """GenEval's numbers over the pictures that have a score (official ``summary_scores.py``), with 95 % intervals.

    ``overall`` is the unweighted mean of the task means; ``tasks`` holds each task's mean with ``n`` and ``unscored``;
    ``images`` is the mean over all pictures. With ``correct_at``, ``prompts_any`` is the share of prompts of which any
    picture scores at least that; ``also`` holds the means of what the judge measures besides. Prompts are the clusters
    of the intervals.
    """
    by_task: dict[str, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        by_task[sample.task][sample.id].append(sample)
    clusters = {
        task: [scores for prompt in prompts.values() if (scores := [s.score for s in prompt if s.score is not None])]
        for task, prompts in by_task.items()
    }
    judged = {task: prompts for task, prompts in clusters.items() if prompts}
    everyone = [scores for prompts in judged.values() for scores in prompts]
    metrics: dict[str, Any] = {
        "overall": asdict(task_mean_interval(judged)) if judged else None,
        "tasks": {
            task: {
                **(asdict(mean_interval(prompts)) if prompts else {"value": None, "low": None, "high": None, "n": 0}),
                "unscored": sum(s.score is None for prompt in by_task[task].values() for s in prompt),
                "prompts": len(by_task[task]),
            }
            for task, prompts in clusters.items()
        },
        "images": asdict(mean_interval(everyone)) if everyone else None,
    }
    if correct_at is not None and everyone:
        right = [[float(score >= correct_at) for score in scores] for scores in everyone]
        metrics["prompts_any"] = asdict(any_correct(right))
    if also := _further_measures(samples):
        metrics["also"] = also
    return metrics


def _further_measures(samples: Sequence[Sample]) -> dict[str, Any]:
    """Means over pictures of the numbers that a judge gives ``also``, in its detail."""
    clusters: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        also = sample.detail.get("also")
        for name, value in also.items() if isinstance(also, Mapping) else ():
            if isinstance(value, int | float) and isfinite(value):
                clusters[name][sample.id].append(value)
    return {name: asdict(mean_interval(list(prompts.values()))) for name, prompts in clusters.items()}


def mean_over(request: Mapping[str, Any]) -> str:
    """What the overall score is the mean of, by the judge's protocol: ``tasks`` (their means) or ``images``."""
    protocol = (request["scorer"] or {}).get("protocol")
    return protocol.get("mean_over", "tasks") if isinstance(protocol, Mapping) else "tasks"


def drawn_differently(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """In which settings the models of one table were not drawn alike: ``guidance 4.5 (tiny:base), 1.0 (tiny:ocr)``."""
    known = {
        one["model"]: {"seed": one["seed"], **one["generator"]["sampling"]}
        for one in summaries
        if one["generator"].get("sampling")
    }
    lines = []
    for name in dict.fromkeys(name for settings in known.values() for name in settings):
        models: dict[str, list[str]] = defaultdict(list)
        for model, settings in known.items():
            models[json.dumps(settings.get(name))].append(model)
        if len(models) > 1:
            lines.append(f"{name} " + ", ".join(f"{value} ({', '.join(of)})" for value, of in models.items()))
    elsewhere = [one["model"] for one in summaries if one["model"] not in known]
    if known and elsewhere:
        lines.append(f"settings of {', '.join(elsewhere)} are not known: the pictures come from elsewhere")
    return lines


def protocol_and_engine(summary: Mapping[str, Any]) -> tuple[str, str]:
    """By which rule the pictures were judged and what read them, as far as the scorer's identity tells."""
    scorer = summary["scorer"] if isinstance(summary["scorer"], Mapping) else {"rule": "none", "engine": "none"}

    def named(*fields: str) -> str:
        found = next((scorer[name] for name in fields if scorer.get(name)), "own")
        return str(found.get("name", "own") if isinstance(found, Mapping) else found)

    return named("protocol", "rule"), named("detector", "engine", "name", "scorer")


# -------------------------------------------------------------------------------------------------- request and plan

OWN_PROMPTS = "other prompts than the bench's (--prompts)"  # all of them: no result of the bench, but whole in itself


@dataclass(frozen=True)
class BenchRun:
    """One bench as asked for: prompts, judge, and the fixed batch plan.

    ``key`` is the metric's name in results, ``partial`` says why the prompts are not the whole bench (``--limit 20``)
    or is None. A picture counts as right from ``correct_at`` on; None for a metric that knows no right and wrong.
    ``scorer`` is None when pictures are only drawn.
    """

    bench: str
    key: str
    version: int
    prompts: tuple[Prompt, ...]
    scorer: Scorer | None
    samples: int = 4
    seed: int = 0
    batch_size: int = 4
    partial: str | None = None
    correct_at: float | None = 1.0
    metrics: Metrics = standard_metrics

    def __post_init__(self) -> None:
        """Raises ``RequestError`` for a plan that cannot be drawn."""
        if self.samples < 1 or self.batch_size < 1:
            raise RequestError(
                f"Expected at least one picture a prompt and one a batch, but got --samples {self.samples} and "
                f"--batch-size {self.batch_size}."
            )
        if not self.prompts:
            raise RequestError(f"{self.bench} has no prompts left to draw: widen --tasks or --limit.")
        seen: set[str] = set()
        for prompt in self.prompts:
            if prompt.id in seen:
                raise RequestError(f"The prompt id {prompt.id!r} occurs twice in {self.bench}: ids must be unique.")
            seen.add(prompt.id)


@dataclass(frozen=True)
class Item:
    """One picture of the plan: ``k`` of ``prompt``, its seed and its file below the bench's folder."""

    prompt: Prompt
    k: int
    seed: int
    file: str


def plan(prompts: Sequence[Prompt], samples: int, seed: int, batch_size: int) -> list[list[Item]]:
    """The batches of a request: ``(prompt, k)`` in order, ``k`` fastest, ``batch_size`` at a time."""
    items = [
        Item(prompt, k, prompt.seed(seed, k), f"samples/{position:05d}-{k:02d}.png")
        for position, prompt in enumerate(prompts)
        for k in range(samples)
    ]
    return [items[start : start + batch_size] for start in range(0, len(items), batch_size)]


def identity_of(scorer: Scorer) -> dict[str, Any]:
    """A scorer's identity as it will be read back. It may raise, where the scorer lacks a dependency."""
    return json.loads(json.dumps(dict(scorer.identity())))


def request_of(run: BenchRun, generator: Mapping[str, Any], scorer: Mapping[str, Any] | None) -> dict[str, Any]:
    request = {
        "model": generator["model"],
        "bench": run.bench,
        "key": run.key,
        "version": run.version,
        "prompts": len(run.prompts),
        "prompts_sha256": hashlib.sha256(store.prompt_lines(run.prompts)).hexdigest(),
        "samples": run.samples,
        "seed": run.seed,
        "batch_size": run.batch_size,
        "partial": run.partial,
        "correct_at": run.correct_at,
        "generator": generator,
        "scorer": scorer,
    }
    return json.loads(json.dumps(request))  # as it will be read back


def claim(folder: BenchFolder, request: dict[str, Any], prompts: Sequence[Prompt], note: str) -> None:
    """Enter the request in ``run.json``, or find it there. Raises ``RequestError`` when another one is there."""
    with store.changing_run(folder.out) as run:
        entry = run["runs"].get(folder.entry)
        if entry is None:
            store.write_atomic(folder.path / "prompts.jsonl", store.prompt_lines(prompts))
            run["runs"][folder.entry] = {"request": request, "sessions": []}
            run["note"] = "\n".join(dict.fromkeys([*run["note"].splitlines(), *note.splitlines()]))
        elif changed := store.differences(entry["request"], request):
            raise RequestError(
                f"{folder.path} already answers another request:\n  "
                + "\n  ".join(changed)
                + "\nGive another --out, or repeat the first request to continue it. To judge the pictures that are "
                "there with another judge: flowopd-eval score."
            )


# --------------------------------------------------------------------------------------------------- draw and judge


def run_bench(
    run: BenchRun,
    generator: Generator,
    out: Path,
    *,
    shard: Shard = WHOLE,
    note: str = "",
    progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """Draw and judge what is still missing of ``run`` in ``out``; returns the summary (of all shards that are there).

    ``note`` says in plain words what is evaluated, a model a line; the lines of all runs into ``out`` head the report.
    ``progress(done, total, text)`` counts pictures
    of this shard; it is called after each batch, from the worker thread. Call again with the same request to continue;
    a finished run draws nothing.

    Raises ``RequestError`` when ``out`` answers another request or another process is at work on this shard,
    ``WorkError`` when the disk is full, ``Interrupted`` at Ctrl-C and SIGTERM.
    """
    scorer_identity = identity_of(run.scorer) if run.scorer else None  # first: it may lack a dependency
    request = request_of(run, generator.identity(), scorer_identity)
    folder = BenchFolder.of(out, request["model"], run.bench)
    title = f"{request['model']} on {run.bench}"
    with folder.alone(shard.journal):
        claim(folder, request, run.prompts, note)
        batches = plan(run.prompts, run.samples, run.seed, run.batch_size)[shard.index :: shard.count]
        done = _finished_batches(folder, batches)
        total = sum(map(len, batches))
        progress(sum(map(len, done.values())), total, title)
        if len(done) < len(batches):
            with recorded_session(folder, f"draw {shard}") as session:
                _draw(run, generator, folder, shard, batches, done, session, lambda n: progress(n, total, title))
    return finish(folder, run.metrics)


def _finished_batches(folder: BenchFolder, batches: Sequence[Sequence[Item]]) -> dict[int, list[Sample]]:
    """The batches that need not be drawn: position -> their samples. A damaged picture or line is warned of."""
    known = by_picture(_salvage(folder))
    done = {}
    for position, batch in enumerate(batches):
        samples = [known.get((item.prompt.id, item.k)) for item in batch]
        kept = [s for item, s in zip(batch, samples, strict=True) if s and (s.file, s.seed) == (item.file, item.seed)]
        damaged = [s.file for s in kept if store.file_sha256(folder.path / s.file) != s.sha256]
        if damaged:
            _log.warning("%s: %s missing or changed since it was drawn; drawn again.", folder.path, ", ".join(damaged))
        elif len(kept) == len(batch):
            done[position] = kept
    return done


def by_picture(samples: Sequence[Sample]) -> dict[tuple[str, int], Sample]:
    """Samples by prompt id and ``k``; the first of several counts."""
    return {(sample.id, sample.k): sample for sample in reversed(samples)}


def _salvage(folder: BenchFolder) -> list[Sample]:
    """Every sample that can be read from the folder's journals."""
    samples = []
    for path in folder.journals():
        for number, line in enumerate(store.whole_lines(path), 1):
            try:
                samples.append(store.parse_sample(line, f"{path}, line {number}"))
            except RequestError as error:
                _log.warning("%s Drawn again.", error)
    return samples


def _draw(
    run: BenchRun,
    generator: Generator,
    folder: BenchFolder,
    shard: Shard,
    batches: Sequence[Sequence[Item]],
    done: Mapping[int, Sequence[Sample]],
    session: dict[str, Any],
    progress: Callable[[int], None],
) -> None:
    """Draw the batches that are not in ``done``; their lines go to the shard's journal as they are judged."""
    jobs: deque[Future[None]] = deque()
    kept = [sample for position in sorted(done) for sample in done[position]]

    def keep(batch: Sequence[Item], images: Sequence[Image.Image]) -> None:
        """In the worker thread, which no signal reaches."""
        journal.append(_store_and_judge(folder, run.scorer, batch, images))
        session["pictures"] += len(batch)
        progress(len(kept) + session["pictures"])

    def settle(waiting: int) -> None:
        """Wait until at most ``waiting`` batches are not kept yet; raises what went wrong with them."""
        while len(jobs) > waiting:
            jobs[0].result()
            jobs.popleft()

    with (
        closing(store.Journal(folder.path / shard.journal, kept)) as journal,
        ThreadPoolExecutor(1, "score") as pool,
        termination_as_interrupt(),
    ):
        try:
            for position, batch in enumerate(batches):
                if position not in done:
                    images = generator.generate([item.prompt for item in batch], [item.seed for item in batch])
                    if len(images) != len(batch):
                        raise WorkError(f"The generator drew {len(images)} pictures for a batch of {len(batch)}.")
                    jobs.append(pool.submit(keep, batch, images))
                    settle(waiting=1)
            settle(waiting=0)
        except KeyboardInterrupt as interrupt:
            settle(waiting=0)
            finished, total = len(kept) + session["pictures"], sum(map(len, batches))
            raise Interrupted(
                f"Stopped after {finished} of {total} pictures of {folder.entry}. They are kept in {folder.out}: give "
                f"the same command with --out {folder.out} to continue."
            ) from interrupt
        except Exception:
            with suppress(Exception):  # the first error is the one to show
                settle(waiting=0)
            raise


def _store_and_judge(
    folder: BenchFolder, scorer: Scorer | None, batch: Sequence[Item], images: Sequence[Image.Image]
) -> list[Sample]:
    pictures = [image.convert("RGB") for image in images]
    hashes = [store.write_picture(folder.path / item.file, image) for item, image in zip(batch, pictures, strict=True)]
    samples = [
        Sample(i.prompt.id, i.k, i.prompt.task, i.prompt.prompt, i.seed, i.file, sha256, error=NOT_SCORED)
        for i, sha256 in zip(batch, hashes, strict=True)
    ]
    if scorer is None:
        return samples
    scores = judge(scorer, pictures, [item.prompt for item in batch])
    return [scored(sample, score) for sample, score in zip(samples, scores, strict=True)]


def judge(scorer: Scorer, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
    """Scores of pictures. When the scorer raises, each picture is tried alone: one bad one does not take the others.

    A picture on which it raises again, or whose score is not a finite number, is unscored with the error's text.
    """
    try:
        scores = scorer.score(images, prompts)
        if len(scores) != len(images):
            raise ValueError(f"the scorer gave {len(scores)} scores for {len(images)} pictures")
        return [_plain(score) for score in scores]
    except Exception as error:  # a scorer may raise anything, and the run goes on
        if len(images) == 1:
            traced = _log.isEnabledFor(logging.DEBUG)
            _log.warning("A picture of prompt %r could not be judged: %r", prompts[0].id, error, exc_info=traced)
            # addresses of objects differ between two runs of the same request
            return [Score(None, error=_ADDRESS.sub("0x…", f"{type(error).__name__}: {error}"))]
        return [judge(scorer, [image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]


def _plain(score: Score) -> Score:
    """The score as it will be read back from its line. Raises when it cannot be written."""
    if score.value is not None and not isfinite(score.value):
        raise ValueError(f"the score is {score.value}")
    return Score(
        None if score.value is None else float(score.value),
        str(score.reason),
        json.loads(json.dumps(score.detail, allow_nan=False)),
        score.error,
    )


def scored(sample: Sample, score: Score) -> Sample:
    return replace(sample, score=score.value, reason=score.reason, detail=score.detail, error=score.error)


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM (a scheduler's way of stopping a job) ends the work as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def recorded_session(folder: BenchFolder, work: str) -> Iterator[dict[str, Any]]:
    """One sitting, entered in ``run.json`` at its start and again at its end, however it ends."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    session = {"work": work, "status": "running", "pictures": 0, "started": started, "wall_s": None}
    session |= store.provenance()
    with store.changing_run(folder.out) as run:
        sessions = run["runs"][folder.entry]["sessions"]
        place = len(sessions)
        sessions.append(session)
    start = time.monotonic()
    status = "failed"
    try:
        yield session
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        session.update(status=status, wall_s=round(time.monotonic() - start, 3))
        with suppress(WorkError), store.changing_run(folder.out) as run:
            run["runs"][folder.entry]["sessions"][place] = session


# ------------------------------------------------------------------------------------------------ merge and summary


def finish(folder: BenchFolder, metrics: Metrics = standard_metrics) -> dict[str, Any]:
    """Summarise what is there and write ``summary.json``; once nothing is missing, merge the shards and drop them.

    The merged ``samples.jsonl`` has the bytes of an unsharded run. Missing pictures make the summary partial, by name.
    Raises ``RequestError`` for a damaged journal.
    """
    with store.changing_run(folder.out):  # the last shards may end at the same time
        samples, missing = collect(folder)
        summary = summarise(folder.request(), samples, missing, metrics)
        if not missing:
            lines = b"".join(store.json_line(sample.to_json()) for sample in samples)
            if not folder.samples.exists() or folder.samples.read_bytes() != lines:
                store.write_atomic(folder.samples, lines)
            for _, path in folder.shards():
                path.unlink(missing_ok=True)
            for left in (*folder.path.glob(".*.tmp"), *folder.path.glob("samples/.*.tmp")):
                left.unlink(missing_ok=True)  # of a process that was killed
        store.write_json(folder.summary, summary)
    return summary


def collect(folder: BenchFolder) -> tuple[list[Sample], list[str]]:
    """The samples that are there, in the plan's order, and what is missing, in words. Raises ``RequestError``."""
    request = folder.request()
    known = by_picture([sample for path in folder.journals() for sample in store.read_samples(path)])
    batches = plan(folder.prompts(), request["samples"], request["seed"], request["batch_size"])
    absent = [sum((i.prompt.id, i.k) not in known for i in batch) for batch in batches]
    samples = [known[i.prompt.id, i.k] for batch in batches for i in batch if (i.prompt.id, i.k) in known]
    missing = []
    if any(absent):
        missing.append(f"{sum(absent)} of {sum(map(len, batches))} pictures are not drawn yet")
        counts = {shard.count for shard, _ in folder.shards()}
        for count in sorted(counts):
            for index in range(count):
                if lacking := sum(absent[index::count]):
                    missing.append(f"shard {index}/{count} lacks {lacking} pictures")
    if gone := sum(not folder.picture(s.file).exists() for s in samples):
        missing.append(f"{gone} pictures are gone from the folder")
    return samples, missing


def summarise(
    request: Mapping[str, Any],
    samples: Sequence[Sample],
    missing: Sequence[str] = (),
    metrics: Metrics = standard_metrics,
) -> dict[str, Any]:
    """``summary.json``: metrics, counts, why it is partial (or null), and all that makes it comparable."""
    computed = metrics(samples, request["correct_at"])
    without = sum(sample.score is None for sample in samples)
    # What is for other tools to judge is no failure of this one.
    unscored = without - sum(one["pictures"] for one in computed.get("not_computed", {}).values())
    if mean_over(request) == "images":
        computed["overall"] = computed["images"]
    reasons = [request["partial"]] if request["partial"] else []
    reasons += missing
    reasons += [
        f"no picture of {task} has a score" for task, one in computed.get("tasks", {}).items() if one["value"] is None
    ]
    same = ("bench", "key", "version", "model")
    return {
        "schema": store.SCHEMA,
        **{field: request[field] for field in same},
        "metrics": computed,
        "n": len(samples) - without,
        "unscored": unscored,
        "expected": request["prompts"] * request["samples"],
        "partial": "; ".join(reasons) or None,
        **{field: value for field, value in request.items() if field not in (*same, "partial")},
    }
