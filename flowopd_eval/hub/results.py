"""What runs say of one adapter: summaries that a card may show, and every picture with its hash and score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowopd_eval import store
from flowopd_eval.benches import BENCHES, bench_by_key
from flowopd_eval.errors import RequestError
from flowopd_eval.export import claimed
from flowopd_eval.hub.licences import open_prompts
from flowopd_eval.hub.subject import Subject
from flowopd_eval.models import FAMILIES, fetch_base, folder_sha256
from flowopd_eval.records import Prompt, Sample, SamplingRecord
from flowopd_eval.report import Entry, load_run, metrics_of

if TYPE_CHECKING:
    from PIL import Image

SHOWN = 24  # pictures of a card, shared evenly by its benches


def pixels_sha256(picture: Image.Image) -> str:
    """Hash of size and RGB values: the same for one picture in any file."""
    digest = hashlib.sha256(f"{picture.width}x{picture.height} ".encode())
    digest.update(picture.convert("RGB").tobytes())
    return digest.hexdigest()


def text_sha256(text: str) -> str:
    """Hash of a prompt's text, by which it is recognised where the text itself is not published."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Claim:
    """One line of ``samples.jsonl``: a picture of the card, drawn from ``seed``, and the score it claims.

    ``prompt`` is None where its licence keeps the text back; ``file`` where the picture itself is published.
    """

    key: str
    id: str
    k: int
    task: str
    prompt: str | None
    prompt_sha256: str
    seed: int
    pixels_sha256: str
    score: float | None
    file: str | None = None


@dataclass(frozen=True)
class Results:
    """The results of one adapter, by metric key."""

    summaries: Mapping[str, Mapping[str, Any]]
    claims: Sequence[Claim]
    pictures: Mapping[str, Path]  # file in the repository -> where it lies
    record: SamplingRecord | None = None


def read_results(runs: Sequence[Path], subject: Subject, name: str) -> Results:
    """What ``runs`` hold of the adapter, for the card of the repository ``name``.

    Raises:
        RequestError: a run without pictures of this adapter on this backbone, another family's benches, one metric
            twice, settings that differ, or results that are partial (see :func:`flowopd_eval.export.claimed`).
    """
    entries = [entry for run in runs for entry in _entries(run, subject)]
    _check_backbone(entries, subject)
    records = {json.dumps(entry.summary["generator"]["sampling"]): entry for entry in entries}
    if len(records) > 1:
        one, other = list(records.values())[:2]
        changed = store.differences(one.summary["generator"]["sampling"], other.summary["generator"]["sampling"])
        raise RequestError(f"The runs were drawn by different settings ({'; '.join(changed)}): give those of one.")
    summaries: dict[str, Mapping[str, Any]] = {}
    claims: list[Claim] = []
    pictures: dict[str, Path] = {}
    for entry in entries:
        key = entry.summary["key"]
        if key in summaries:
            raise RequestError(f"{key} is in two of the runs: give the one whose result is to be published.")
        _check_whole(entry)
        summaries[key] = _renamed(entry.summary, f"{subject.base}+{name}")
        claimed(summaries[key])
        claims += _claims(entry, pictures, max(1, SHOWN // len(entries)))
    record = SamplingRecord(**json.loads(next(iter(records)))) if records else None
    return Results(summaries, claims, pictures, record)


def _check_whole(entry: Entry) -> None:
    """Raises ``RequestError`` for a part of a bench, with what completes it."""
    summary = entry.summary
    lacking = max(summary["expected"] - summary["n"], summary["unscored"])
    if not summary["partial"] and not lacking:
        return
    why, remedy = f"{lacking} of {summary['expected']} pictures have no score", "Give its command again for the rest."
    if summary["partial"]:  # which is part of what was asked for, so that this folder can never be whole
        bench = bench_by_key(summary["key"]).flag
        why, remedy = summary["partial"], f"Evaluate all of --bench {bench} into another --out, and give that."
    raise RequestError(
        f"{entry.folder.path} ({summary['model']} on {summary['key']}) is partial, which a model card would not tell: "
        f"{why}. {remedy}"
    )


def _renamed(summary: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The summary with the name that the model has in its repository, wherever the run's own name stood."""
    return {**summary, "model": model, "generator": {**summary["generator"], "model": model}}


def _entries(run: Path, subject: Subject) -> list[Entry]:
    """Those of a run's entries that this adapter drew."""
    own = {bench.key: metrics_of(bench) for bench in BENCHES}
    entries = load_run(run, own).entries
    mine = [e for e in entries if e.summary["generator"].get("adapter_sha256") == subject.adapter.sha256]
    if not mine:
        drawn = ", ".join(
            f"{e.summary['model']} ({str(e.summary['generator'].get('adapter_sha256'))[:12]})" for e in entries
        )
        raise RequestError(
            f"{run} holds no pictures of this adapter ({subject.adapter.sha256[:12]}), but of {drawn or 'nothing'}: "
            f"draw them with `flowopd-eval --bench NAME --model {subject.base} --lora ADAPTER`."
        )
    return mine


def _check_backbone(entries: Sequence[Entry], subject: Subject) -> None:
    """Raises ``RequestError`` unless all were drawn on one backbone, the miniature's own where it is the miniature."""
    bases = {e.summary["generator"].get("base_sha256") for e in entries}
    known = folder_sha256(fetch_base(subject.family.base)) if subject.family.base.startswith("builtin:") else None
    # Of SD3.5 no hash is known here; the names that mean it, and an adapter that was published for it, do.
    of_it = ("hub:", *(f"{name}:" for name in FAMILIES))  # another family's are refused below, in words of their own
    others = [
        m for e in entries if not (m := e.summary["model"]).startswith(of_it) or (m.startswith("hub:") and "+" in m)
    ]
    if len(bases) > 1 or (known and bases - {known}) or (not known and others):
        raise RequestError(
            f"What was given was drawn on another backbone than {subject.base}, or on several (sha256 "
            f"{', '.join(str(base)[:12] for base in bases)}): those scores are of another model."
        )


def _claims(entry: Entry, pictures: dict[str, Path], shown: int) -> list[Claim]:
    """Every picture of an entry; ``shown`` of them, evenly spaced, go into ``pictures``."""
    key, samples = entry.summary["key"], entry.samples
    may_show = open_prompts(key, entry.folder.prompts())
    chosen = {n * len(samples) // shown for n in range(min(shown, len(samples)))}
    found = []
    for place, sample in enumerate(samples):
        path = entry.folder.picture(sample.file)
        name = f"samples/{key}-{Path(sample.file).name}" if place in chosen else None
        if name:
            pictures[name] = path
        found.append(
            Claim(
                key=key,
                id=sample.id,
                k=sample.k,
                task=sample.task,
                prompt=sample.prompt if sample.id in may_show else None,
                prompt_sha256=text_sha256(sample.prompt),
                seed=sample.seed,
                pixels_sha256=pixels_sha256(_picture(path, sample)),
                score=sample.score,
                file=name,
            )
        )
    return found


def _picture(path: Path, sample: Sample) -> Image.Image:
    if store.file_sha256(path) != sample.sha256:
        raise RequestError(f"{path} was changed since it was drawn: give the same command again to draw it anew.")
    return store.read_picture(path)


def claims_jsonl(claims: Sequence[Claim]) -> bytes:
    """``samples.jsonl``."""
    return b"".join(store.json_line(asdict(claim)) for claim in claims)


def prompt_of(claim: Claim, known: Mapping[str, Prompt]) -> Prompt:
    """The prompt of a claim, with what its scorer needs, from the bench's own prompts ``known`` by id.

    Raises:
        RequestError: the bench has no such prompt, or another text by that id.
    """
    prompt = known.get(claim.id)
    if prompt is None or text_sha256(prompt.prompt) != claim.prompt_sha256:
        raise RequestError(f"The card names {claim.id!r} of {claim.key}, which is not that bench's prompt here.")
    return prompt
