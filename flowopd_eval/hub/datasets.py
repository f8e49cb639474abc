"""A run as a dataset repository: pictures, scores, settings; prompts as text only where their licence allows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowopd_eval import store
from flowopd_eval.benches import BENCHES
from flowopd_eval.errors import RequestError
from flowopd_eval.export import Results, markdown
from flowopd_eval.hub.card import render
from flowopd_eval.hub.licences import LICENCES, OPEN_PROMPTS, POWERED_BY, open_prompts
from flowopd_eval.hub.repository import CARD, Content, Repository, json_bytes, without_addresses, without_paths
from flowopd_eval.hub.results import text_sha256
from flowopd_eval.models import fetch_base, folder_sha256
from flowopd_eval.report import Entry, load_run, metrics_of


def run_repository(out: Path, name: str) -> Repository:
    """Everything to be published of the run ``out``. Nothing is sent.

    ``run.json``, ``summary.json``; of each model and bench ``metadata.jsonl`` (a line a picture, in the form of
    datasets' image folders) and the pictures that its lines name. Whatever else lies in the folder stays there.

    Raises:
        RequestError: no run, a damaged one, or no pictures in it.
    """
    run = load_run(out, {bench.key: metrics_of(bench) for bench in BENCHES})
    if not any(entry.samples for entry in run.entries):
        raise RequestError(f"{out} holds no pictures to publish.")
    files: dict[str, Content] = {}
    summaries: dict[str, dict[str, Any]] = {}
    for entry in run.entries:
        files |= _entry_files(entry)
        summaries.setdefault(entry.summary["model"], {})[entry.summary["bench"]] = entry.summary
    recorded = store.read_run(out)
    files["run.json"] = json_bytes(
        without_addresses(without_paths({key: recorded[key] for key in ("schema", "note", "runs")}))
    )
    files["summary.json"] = json_bytes(without_addresses(without_paths({"schema": store.SCHEMA, "models": summaries})))
    files[CARD] = _card(run.note, summaries, name, list(files)).encode()
    return Repository("dataset", files)


def _entry_files(entry: Entry) -> dict[str, Content]:
    folder, key = entry.folder, entry.summary["key"]
    may_show = open_prompts(key, folder.prompts())
    files: dict[str, Content] = {}
    lines = []
    for sample in entry.samples:
        path = folder.picture(sample.file)
        if store.file_sha256(path) != sample.sha256:
            raise RequestError(f"{path} is missing or was changed since it was drawn: draw it again before publishing.")
        files[f"{folder.entry}/{sample.file}"] = path
        shown = sample.id in may_show
        line = {
            "file_name": sample.file,
            "id": sample.id,
            "k": sample.k,
            "task": sample.task,
            "prompt": sample.prompt if shown else None,
            "prompt_sha256": text_sha256(sample.prompt),
            "seed": sample.seed,
            "sha256": sample.sha256,
            "score": sample.score,
            "unscored": sample.score is None,
        }
        # A judge's words and detail quote the prompt.
        lines.append(line | ({"reason": sample.reason} if shown else {}))
    files[f"{folder.entry}/metadata.jsonl"] = b"".join(map(store.json_line, lines))
    return files


def _card(note: str, summaries: Mapping[str, Mapping[str, Mapping[str, Any]]], name: str, files: list[str]) -> str:
    from huggingface_hub import DatasetCardData

    every = [one for benches in summaries.values() for one in benches.values()]
    keys = {one["key"] for one in every}
    licence, powered_by = _licence(every)
    ((_, tables),) = markdown(Results(summaries))
    entries = [file.removesuffix("/metadata.jsonl") for file in files if file.endswith("/metadata.jsonl")]
    configs = [{"config_name": entry.replace("/", "."), "data_dir": entry} for entry in entries]
    data = DatasetCardData(
        task_categories=["text-to-image"],
        pretty_name=name.rpartition("/")[2],
        tags=["flow-opd", "evaluation"],
        configs=configs,
        license=licence,
    )
    return render(
        "dataset.md.j2",
        metadata=data.to_yaml(),
        title=name.rpartition("/")[2],
        note=note,
        tables=tables,
        entries=entries,
        withheld=sorted(keys - set(OPEN_PROMPTS)),
        open_prompts={key: OPEN_PROMPTS[key] for key in sorted(keys & set(OPEN_PROMPTS))},
        powered_by=powered_by,
    )


def _licence(every: list[Mapping[str, Any]]) -> tuple[str | None, str | None]:
    """The licence of the pictures where it is known here: the miniature's. Other models have terms of their own."""
    tiny = folder_sha256(fetch_base("builtin:tiny"))
    if all(one["generator"].get("base_sha256") == tiny for one in every):
        return LICENCES["tiny"].identifier, None
    stable = any(str(one["model"]).startswith("flow-opd") for one in every)
    return None, POWERED_BY if stable else None
