"""GenEval's own files: its folder of pictures and its results, written from a run, and results read back and replayed.

Layouts of djghosh13/geneval: ``NNNNN/metadata.jsonl`` with ``NNNNN/samples/KKKKK.png`` (``generation``), and a line of
JSON a picture (``evaluation/evaluate_images.py``), in which ``metadata`` and ``details`` are JSON in a string.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowopd_eval import store
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import collect, standard_metrics
from flowopd_eval.records import UNKNOWN_SEED, Detection, Prompt, Sample
from flowopd_eval.scorers.geneval import check_record, verdict
from flowopd_eval.store import BenchFolder

if TYPE_CHECKING:
    from rich.console import Group

RESULTS = "results.jsonl"


# ------------------------------------------------------------------------------------------------------------- write


def write_folder(folder: BenchFolder, out: Path) -> Path:
    """Write a run's pictures as GenEval's folder, and the verdicts of those that have one as its results.

    ``out/NNNNN`` are the prompts in the run's order. Returns ``out``. Raises ``RequestError`` for prompts without
    GenEval's clauses or a run that is not complete, ``WorkError`` when the disk is full.
    """
    prompts = folder.prompts()
    samples, missing = collect(folder)
    if missing:
        raise RequestError(f"{folder.path} is not complete ({'; '.join(missing)}): draw the rest first.")
    places = {prompt.id: f"{number:05d}" for number, prompt in enumerate(prompts)}
    records = {prompt.id: _record(prompt) for prompt in prompts}
    for prompt in prompts:
        store.write_atomic(out / places[prompt.id] / "metadata.jsonl", store.json_line(records[prompt.id]))
    lines = []
    for sample in samples:
        picture = out / places[sample.id] / "samples" / f"{sample.k:05d}.png"
        store.write_atomic(picture, folder.picture(sample.file).read_bytes())
        if sample.score is not None:
            lines.append(store.json_line(_line(sample, records[sample.id], picture)))
    store.write_atomic(out / RESULTS, b"".join(lines))
    return out


def _record(prompt: Prompt) -> dict[str, Any]:
    """The prompt's line of ``evaluation_metadata.jsonl``, keys in the official order."""
    check_record(prompt)
    clauses = {name: prompt.fields[name] for name in ("include", "exclude") if prompt.fields.get(name)}
    return {"tag": prompt.task, **clauses, "prompt": prompt.prompt}


def _line(sample: Sample, record: Mapping[str, Any], picture: Path) -> dict[str, Any]:
    return {
        "filename": str(picture),
        "tag": sample.task,
        "prompt": sample.prompt,
        "correct": sample.score == 1,
        "reason": sample.reason,
        "metadata": json.dumps(record),
        "details": json.dumps(sample.detail.get("boxes", {})),
    }


# ------------------------------------------------------------------------------------------------- read and replay


@dataclass(frozen=True)
class Replay:
    """One line of an official results file: what it says, and what our verdict says of the same boxes.

    ``replayed`` is None where a colour is asked for: the file does not tell the colours that were seen.
    """

    sample: Sample
    replayed: bool | None
    reason: str

    @property
    def differs(self) -> bool:
        return self.replayed is not None and self.replayed != (self.sample.score == 1)


@lru_cache(maxsize=1)
def _reader() -> Any:
    from pydantic import BaseModel, ConfigDict, FiniteFloat, Json, TypeAdapter, create_model

    class Line(BaseModel):
        model_config = ConfigDict(extra="ignore")

    fields: dict[str, Any] = {
        **dict.fromkeys(("filename", "tag", "prompt"), (str, ...)),
        "correct": (bool, ...),
        "reason": (str, ""),
        "metadata": (Json[dict[str, Any]], ...),
        "details": (Json[dict[str, list[tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]]]], ...),
    }
    return TypeAdapter(create_model("ResultsLine", __base__=Line, **fields)).validate_json


def read_results(path: Path) -> list[Replay]:
    """Every line of an official results file, its verdict replayed. Raises ``RequestError`` naming file and line."""
    pictures: Counter[str] = Counter()
    found = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            read = _reader()(line)
        except ValueError as error:
            why = " ".join(str(error).split()[:30])
            raise RequestError(f"{path}, line {number} is no line of GenEval's results: {why}") from error
        key = json.dumps(read.metadata, sort_keys=True)  # the official script groups by it
        prompt = Prompt(key, read.prompt, read.tag, read.metadata)
        check_record(prompt)
        k, pictures[key] = pictures[key], pictures[key] + 1
        sample = Sample(
            key, k, read.tag, read.prompt, UNKNOWN_SEED, read.filename, "", float(read.correct), read.reason
        )
        found.append(_replay(sample, prompt, read.details))
    if not found:
        raise RequestError(f"{path} has no results.")
    return found


def _replay(sample: Sample, prompt: Prompt, details: Mapping[str, Sequence[tuple[float, ...]]]) -> Replay:
    if any("color" in clause for clause in prompt.fields["include"]):
        return Replay(sample, None, "")
    objects = {
        label: [Detection(label, (x1, y1, x2, y2), score) for x1, y1, x2, y2, score in boxes]
        for label, boxes in details.items()
    }
    score = verdict(prompt.fields, objects)
    return Replay(sample, score.value == 1, score.reason)


def terminal_report(replays: Sequence[Replay], show: int = 10) -> Group:
    """The file's numbers with intervals, and where our verdict on the same boxes is another one."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    metrics = standard_metrics([replay.sample for replay in replays], 1.0)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("", "recorded", "pictures", "replayed", "differ"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, one in [("overall", metrics["overall"]), *metrics["tasks"].items()]:
        mine = [replay for replay in replays if name in ("overall", replay.sample.task)]
        replayed = sum(replay.replayed is not None for replay in mine)
        value = f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
        cells = (name, value, f"{len(mine):,}", f"{replayed:,}", str(sum(replay.differs for replay in mine)))
        table.add_row(*map(Text, cells))
    different = [replay for replay in replays if replay.differs]
    lines = [
        f"{replay.sample.file}: recorded {'right' if replay.sample.score == 1 else 'wrong'}, by its boxes "
        f"{'right' if replay.replayed else 'wrong'} ({replay.reason or 'all clauses hold'})"
        for replay in different[:show]
    ]
    rest = "Colours cannot be replayed: the file does not tell them. Its other verdicts "
    rest += "all follow from its boxes." if not different else f"differ from ours on {len(different)} pictures."
    return Group(table, *(Text(_printable(line)) for line in lines), Text(rest, style="bold"))


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
