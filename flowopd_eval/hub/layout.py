"""The repository of an adapter: weights at full strength wherever they are dropped, results, sources, licences, card.

::

    pytorch_lora_weights.safetensors                  diffusers, ComfyUI: the scale is inside B
    adapter_model.safetensors, adapter_config.json    PEFT: the same, with alpha = r
    flow_opd.json                                     backbone and sampling record, which `--model hub:REPO` draws with
    metrics.json                                      the summaries of the runs
    samples.jsonl, samples/, samples.png              every picture's seed, hash and score; some pictures; a sheet
    recipe.json, provenance.json                      how it was made, from what, with which versions
    LICENSE* and NOTICE                               what the backbone's licence asks for
    upstream/                                         licences and notices of the adapters of others that are in it
    README.md                                         the card
    pushed.json                                       what the push wrote, for the next one (hub/there.py)
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from flowopd_eval import store
from flowopd_eval.hub.card import render_card
from flowopd_eval.hub.licences import licence_files, licence_texts
from flowopd_eval.hub.repository import CARD, Content, Repository, json_bytes, without_addresses, without_paths
from flowopd_eval.hub.results import Results, claims_jsonl, read_results
from flowopd_eval.hub.subject import RECIPE, Subject, Upstream
from flowopd_eval.models import adapter_settings
from flowopd_eval.records import SETTINGS_FILE, SamplingRecord

METRICS, CLAIMS, SHEET, PROVENANCE = "metrics.json", "samples.jsonl", "samples.png", "provenance.json"
WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")
_COLUMNS, _SIDE, _GAP = 6, 256, 4  # of the sheet: pictures in a row, pixels of one at most, pixels between two


def adapter_repository(subject: Subject, runs: Sequence[Path], name: str, scratch: Path) -> Repository:
    """Everything to be published of an adapter, its weights written below ``scratch``. Nothing is sent.

    Args:
        subject: the adapter.
        runs: runs whose scores go onto the card.
        name: ``OWNER/NAME`` of the repository.
        scratch: an empty folder that lives until the upload is over.

    Raises:
        RequestError: what :func:`flowopd_eval.hub.results.read_results` refuses, or a licence that is not to be had.
    """
    from flowopd_eval.adapters import write_adapter

    results = read_results(runs, subject, name)
    record, record_from = (results.record, "the runs") if results.record else (subject.record, subject.record_from)
    hub_base = subject.family.base.removeprefix("hub:") if subject.family.base.startswith("hub:") else None
    write_adapter(subject.adapter, scratch, base_model=hub_base)
    files: dict[str, Content] = {file: scratch / file for file in WEIGHTS}
    files[SETTINGS_FILE] = json_bytes(adapter_settings(subject.base, record))
    if results.summaries:
        metrics = {"schema": store.SCHEMA, "adapter_sha256": subject.adapter.sha256}
        files[METRICS] = json_bytes(metrics | {"metrics": without_addresses(without_paths(results.summaries))})
        files[CLAIMS] = claims_jsonl(results.claims)
        files |= results.pictures
        files[SHEET] = sheet(list(results.pictures.values()))
    if subject.recipe:
        files[RECIPE] = json_bytes(subject.recipe)
    provenance = provenance_of(subject, results, runs)
    files[PROVENANCE] = json_bytes(provenance)
    files |= licence_files(subject.family.name, subject.change, subject.folder)
    texts = _texts_of_others(subject, files)
    files |= {path: content for found in texts.values() for path, content in found.items()}
    files[CARD] = render_card(subject, results, record, name, provenance, texts).encode()
    notes = [f"Drawn with {_told(record)}: from {record_from}.", *_said_of_others(texts)]
    return Repository("model", files, notes=tuple(notes))


def _texts_of_others(subject: Subject, files: Mapping[str, Content]) -> dict[Upstream, dict[str, bytes]]:
    """Of every adapter of somebody's whose licence this one carries, the licences and notices that lie with it.

    What lies in ``files`` already, such as SD3.5's own, is not taken twice.
    """
    seen = {content for content in files.values() if isinstance(content, bytes)}
    found: dict[Upstream, dict[str, bytes]] = {}
    for one in subject.upstream:
        if one.carried:
            texts = {path: file.read_bytes() for path, file in licence_texts(one.source, one.folder).items()}
            found[one] = {path: content for path, content in texts.items() if content not in seen}
            seen |= set(texts.values())
    return found


def _said_of_others(texts: Mapping[Upstream, Mapping[str, bytes]]) -> list[str]:
    """What is said of their licences before the upload."""
    return [
        f"{one.source} ({one.role}) is under {one.licence}: the card says so"
        + (f", and {', '.join(files)} {'goes' if len(files) == 1 else 'go'} along." if files else ".")
        for one, files in texts.items()
    ]


def _told(record: SamplingRecord) -> str:
    size = f"{record.width}x{record.height}, text length {record.text_length}, {record.dtype}"
    return f"{record.steps} steps, guidance {record.guidance:g}, shift {record.shift:g}, {size}"


def provenance_of(subject: Subject, results: Results, runs: Sequence[Path]) -> dict[str, Any]:
    """Hashes and versions: of the adapter, of what it was made from, of the programs at work. No paths."""
    adapter = subject.adapter
    drawn = next(iter(results.summaries.values()))["generator"] if results.summaries else {}
    return {
        "pushed_with": f"flowopd-eval {version('flowopd-eval')}",
        "adapter": {
            "sha256": adapter.sha256,
            "file_sha256": adapter.file_sha256,
            "alpha": adapter.alpha,
            "alpha_from": without_paths(adapter.alpha_from),
            "rank": adapter.rank,
            "modules": len(adapter.factors),
        },
        "backbone": {"name": subject.base, "source": subject.family.base, "sha256": drawn.get("base_sha256")},
        "upstream": [{"source": o.source, "role": o.role, "licence": o.licence} for o in subject.upstream],
        "training": _training(subject),
        "drawn_with": _versions(runs),
    }


def _training(subject: Subject) -> dict[str, Any]:
    """What the training run wrote down at its end, without the recipe, which has a file of its own."""
    found = {key: value for key, value in subject.training.items() if key != "per_module"}
    if "identity" in found:
        found["identity"] = {key: value for key, value in found["identity"].items() if key != "recipe"}
    return found


def _versions(runs: Sequence[Path]) -> list[Mapping[str, Any]]:
    """Versions and platforms of the runs' sessions, each once."""
    found: list[Mapping[str, Any]] = []
    for run in runs:
        for entry in store.read_run(run)["runs"].values():
            for session in entry.get("sessions", []):
                what = {key: without_paths(session.get(key)) for key in ("versions", "platform")}
                if what not in found:
                    found.append(what)
    return found


def sheet(pictures: Sequence[Path]) -> bytes:
    """The pictures on one sheet, row by row, small ones enlarged without smoothing; as PNG."""
    shown = [_scaled(store.read_picture(path)) for path in pictures]
    width, height = (max(size) + _GAP for size in zip(*(one.size for one in shown), strict=True))
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    page = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    for place, one in enumerate(shown):
        page.paste(one, (_GAP + place % columns * width, _GAP + place // columns * height))
    buffer = io.BytesIO()
    page.save(buffer, format="PNG")
    return buffer.getvalue()


def _scaled(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    if side > _SIDE:
        picture.thumbnail((_SIDE, _SIDE))
        return picture
    times = max(1, _SIDE // 2 // side)
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
