"""Judging pictures that exist: those of a run, or a folder in GenEval's layout."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowopd_eval import store
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import (
    NOT_SCORED,
    BenchRun,
    Interrupted,
    Metrics,
    Progress,
    by_picture,
    claim,
    collect,
    finish,
    identity_of,
    judge,
    plan,
    recorded_session,
    request_of,
    scored,
    standard_metrics,
    termination_as_interrupt,
)
from flowopd_eval.records import UNKNOWN_SEED, Prompt, Sample, Score, Scorer
from flowopd_eval.store import WHOLE, BenchFolder


def rescore(
    folder: BenchFolder,
    scorer: Scorer,
    *,
    again: bool = False,
    batch_size: int = 8,
    metrics: Metrics = standard_metrics,
    progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """Judge the pictures of a run and replace their scores; returns the new summary.

    With the judge that is on record only the pictures without a score are judged; with another judge (or ``again``)
    all of them. The old scores stay in place until the last picture is judged; an interrupted call continues.
    Raises ``RequestError`` while shards are missing.
    """
    identity = identity_of(scorer)
    everything = again or folder.request()["scorer"] != identity
    with folder.alone(WHOLE.journal):
        samples, missing = collect(folder)
        if folder.shards():
            raise RequestError(f"{folder.path} is not complete ({'; '.join(missing)}): run the missing shards first.")
        todo = [sample for sample in samples if everything or sample.score is None]
        known = judge_aside(folder, scorer, samples, todo, batch_size, progress)
        lines = [store.json_line(known.get((s.id, s.k), s).to_json()) for s in samples]
        if folder.request()["scorer"] != identity:
            _name_judge(folder, None)  # a kill between the files must not leave scores under another judge's name
        store.write_atomic(folder.samples, b"".join(lines))
        _name_judge(folder, identity)
        journal_aside(folder, identity).unlink()
    return finish(folder, metrics)


def refuse_another(folder: BenchFolder, scorer: Scorer) -> None:
    """Raises ``RequestError`` where the run has scores of another: they would be replaced unasked."""
    recorded, identity = folder.request()["scorer"], identity_of(scorer)
    if recorded not in (None, identity) and any(sample.score is not None for sample in collect(folder)[0]):
        was, now = (str(one.get("name") or one.get("scorer")) for one in (recorded, identity))
        differing = "; ".join(store.differences(recorded, identity)[:3])
        raise RequestError(
            f"{folder.entry} was judged by {was}, and would be judged by {now} now ({differing}). Name its judge by "
            "the options with which it was judged, or give --again to replace all of its scores."
        )


def _name_judge(folder: BenchFolder, identity: dict[str, Any] | None) -> None:
    with store.changing_run(folder.out) as run:
        run["runs"][folder.entry]["request"]["scorer"] = identity


def judge_aside(
    folder: BenchFolder,
    scorer: Scorer,
    samples: Sequence[Sample],
    todo: Sequence[Sample],
    batch_size: int,
    progress: Progress,
) -> dict[tuple[str, int], Sample]:
    """``todo`` of a run's ``samples`` with the scores of ``scorer``, by prompt and k; the run's own stay as they are.

    They grow in :func:`journal_aside`, which is the caller's to remove; an interrupted call continues there.
    """
    path = journal_aside(folder, identity_of(scorer))
    drawn = {(s.id, s.k): s.sha256 for s in samples}
    judged = [s for s in store.read_samples(path) if drawn.get((s.id, s.k)) == s.sha256]
    with closing(store.Journal(path, judged)) as journal, recorded_session(folder, "judge") as session:
        judged += _judge_rest(folder, scorer, todo, judged, batch_size, journal, session, progress)
    return by_picture(judged)


def journal_aside(folder: BenchFolder, identity: dict[str, Any]) -> Path:
    """Where the scores of a judge grow that is not the run's."""
    return folder.path / f"rescore-{hashlib.sha256(store.json_line(identity)).hexdigest()[:12]}.jsonl"


def _judge_rest(
    folder: BenchFolder,
    scorer: Scorer,
    todo: Sequence[Sample],
    judged: Sequence[Sample],
    batch_size: int,
    journal: store.Journal,
    session: dict[str, Any],
    progress: Progress,
) -> list[Sample]:
    """Judge what of ``todo`` is not in ``judged``, each batch straight into the journal."""
    known = by_picture(judged)
    prompts = {prompt.id: prompt for prompt in folder.prompts()}
    left = [sample for sample in todo if (sample.id, sample.k) not in known]
    result: list[Sample] = []
    try:
        with termination_as_interrupt():
            for start in range(0, len(left), batch_size):
                batch = left[start : start + batch_size]
                scored = _judge_files(folder, scorer, batch, [prompts[sample.id] for sample in batch])
                journal.append(scored)
                result += scored
                session["pictures"] += len(scored)
                progress(len(todo) - len(left) + len(result), len(todo), f"judging {folder.entry}")
    except KeyboardInterrupt as interrupt:
        raise Interrupted(
            f"Stopped after judging {len(todo) - len(left) + len(result)} of {len(todo)} pictures of {folder.entry}. "
            f"The scores in {folder.path} are as they were: give the same command to continue."
        ) from interrupt
    return result


def _judge_files(
    folder: BenchFolder, scorer: Scorer, samples: Sequence[Sample], prompts: Sequence[Prompt]
) -> list[Sample]:
    """Judge pictures from their files; one that cannot be read, or is another than on record, is unscored."""
    result = list(samples)
    readable, images = [], []
    for position, sample in enumerate(samples):
        path = folder.picture(sample.file)
        try:
            if store.file_sha256(path) not in (None, sample.sha256):
                result[position] = scored(sample, Score(None, error="the picture is not the one on record"))
                continue
            images.append(store.read_picture(path))
            readable.append(position)
        except (OSError, ValueError, SyntaxError) as error:
            unreadable = Score(None, error=f"the picture cannot be read ({type(error).__name__})")
            result[position] = scored(sample, unreadable)
    scores = judge(scorer, images, [prompts[position] for position in readable]) if images else []
    for position, score in zip(readable, scores, strict=True):
        result[position] = scored(samples[position], score)
    return result


def import_geneval(source: Path, out: Path, run: BenchRun, *, model: str, note: str = "") -> BenchFolder:
    """Copy pictures that lie in GenEval's layout into a run, unscored: ``rescore`` then judges them.

    ``source`` holds ``NNNNN/metadata.jsonl`` (one GenEval record) and ``NNNNN/samples/<digits>.png``, as the official
    evaluation reads them. ``run`` says which bench they belong to, with all of its prompts: a folder that answers
    others, or not all, is partial. Prompts and number of pictures are the folder's.
    The same pictures again are left as they are, with their scores. Raises ``RequestError`` when there are none.
    """
    found = _geneval_folders(source)
    if not any(files for _, files in found):
        raise RequestError(f"{source} has no pictures in GenEval's layout (NNNNN/metadata.jsonl, NNNNN/samples/*.png).")
    run = replace(
        run,
        partial=_partial(run.prompts, [prompt for prompt, _ in found]),
        prompts=tuple(prompt for prompt, _ in found),
        samples=max(len(files) for _, files in found),
        seed=UNKNOWN_SEED,
    )
    digest = hashlib.sha256()
    copies: dict[Path, Sample] = {}
    items = {(i.prompt.id, i.k): i for batch in plan(run.prompts, run.samples, run.seed, run.batch_size) for i in batch}
    for prompt, files in found:
        for k, path in enumerate(files):
            sha256, file = hashlib.sha256(path.read_bytes()).hexdigest(), items[prompt.id, k].file
            digest.update(sha256.encode())
            copies[path] = Sample(
                prompt.id, k, prompt.task, prompt.prompt, UNKNOWN_SEED, file, sha256, error=NOT_SCORED
            )
    request = request_of(run, {"model": model, "pictures_sha256": digest.hexdigest()}, None)
    folder = BenchFolder.of(out, model, run.bench)
    with folder.alone(WHOLE.journal):
        if folder.samples.exists():
            request["scorer"] = folder.request()["scorer"]
        claim(folder, request, run.prompts, note)
        if not folder.samples.exists():
            for path, sample in copies.items():
                store.write_atomic(folder.path / sample.file, path.read_bytes())
            lines = [store.json_line(sample.to_json()) for sample in copies.values()]
            store.write_atomic(folder.samples, b"".join(lines))
    return folder


def _partial(bench: Sequence[Prompt], found: Sequence[Prompt]) -> str | None:
    """Why the folder is not the whole bench, or None."""
    wanted, there = (Counter((prompt.task, prompt.prompt) for prompt in prompts) for prompts in (bench, found))
    lacking, other = (wanted - there).total(), (there - wanted).total()
    if lacking or other:
        return f"the folder lacks {lacking} of the bench's {len(bench)} prompts and has {other} others"
    return None


def _geneval_folders(source: Path) -> list[tuple[Prompt, list[Path]]]:
    """Prompt and pictures of each numbered folder, by number. Raises ``RequestError`` for a bad record."""
    found = []
    for folder in sorted(path for path in source.glob("*/") if path.name.isdigit()):
        metadata = folder / "metadata.jsonl"
        try:
            record = json.loads(metadata.read_text())
            prompt = Prompt(folder.name, record.pop("prompt"), record.pop("tag"), record)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(f"{metadata} is not a GenEval record with tag and prompt: {error}") from error
        files = [path for path in (folder / "samples").glob("*.png") if path.stem.isdigit()]
        found.append((prompt, sorted(files, key=lambda path: int(path.stem))))
    return found
