"""Finished runs under one folder: tables, comparisons, and pictures by what their judges say."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flowopd_eval import store
from flowopd_eval.benches import BENCHES
from flowopd_eval.compare import Result, compare_runs
from flowopd_eval.errors import RequestError
from flowopd_eval.export import Results, comma_separated
from flowopd_eval.gallery import change
from flowopd_eval.harness import OWN_PROMPTS
from flowopd_eval.quiet import printable
from flowopd_eval.records import Sample
from flowopd_eval.report import Entry, Run, boxes, load_run, metrics_of, verdict
from flowopd_eval.store import BenchFolder

if TYPE_CHECKING:
    from PIL import Image

_DEEPEST = 5  # folders below the root in which runs are looked for
_METRICS = {bench.key: metrics_of(bench) for bench in BENCHES}
VERDICTS = ("right", "wrong", "scored", "unscored")


@dataclass(frozen=True)
class Shown:
    """One picture of a run: where it stands and what was said of it. ``disagree``: the run's models do."""

    model: str
    key: str
    sample: Sample
    verdict: str
    disagree: bool

    @property
    def address(self) -> dict[str, Any]:
        """What names it within its run."""
        return {"model": self.model, "key": self.key, "id": self.sample.id, "k": self.sample.k}


class Full(NamedTuple):
    """A picture as it lies there, what was said of the one drawn, its provenance, and whether it is that one."""

    picture: Image.Image
    shown: Shown
    facts: dict[str, Any]
    intact: bool


class Runs:
    """The runs in ``root``, which is one itself or holds some, at most five folders down; links are not followed.

    The folder is looked at anew each time: it may come, and runs in it, after the server's start.

    A client names a run by one of :meth:`names`, and a picture by model, metric, prompt id and number: no path that a
    client gives is ever opened.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def names(self) -> list[str]:
        """The runs by their path below the root, newest first."""
        found = []
        for folder, folders, files in os.walk(self.root, followlinks=False):
            place = Path(folder)
            depth = len(place.relative_to(self.root).parts)
            if "run.json" in files and not (place / "run.json").is_symlink() and not _of_training(place):
                found.append((-(place / "run.json").stat().st_mtime, place.relative_to(self.root).as_posix()))
                folders.clear()
            if depth >= _DEEPEST:
                folders.clear()
            folders[:] = [name for name in folders if not name.startswith(".")]
        return [name for _, name in sorted(found)]

    def load(self, name: str) -> Run:
        """A run by its name. Raises ``RequestError`` for one that is not there, or damaged."""
        if name not in self.names():
            raise RequestError(f"There is no run {name!r} here.")
        out = self.root / name
        files = (out / "run.json", *(path for folder in store.bench_folders(out) for path in folder.journals()))
        return _loaded(out, tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in files))

    def compare(self, name: str) -> Result:
        """Every model of a run beside its first, each drawn by its own record: what differs in it is a warning.

        Raises as :func:`flowopd_eval.compare.compare_runs`; of a run drawn in part, every part is named at once.
        """
        if name not in self.names():
            raise RequestError(f"There is no run {name!r} here.")
        asked = [folder.request() for folder in store.bench_folders(self.root / name)]
        cut = [one for one in asked if one["partial"] not in (None, OWN_PROMPTS)]
        parts = [printable(f"{one['model']} on {one['key']} ({one['partial']})") for one in cut]
        if parts:
            raise RequestError(
                f"a part of a bench says nothing of the whole, and only a part was drawn of {', '.join(parts)}. "
                "Evaluate again without --limit and --tasks into another --out."
            )
        return compare_runs([self.root / name], across="record")

    def csv(self, name: str) -> str:
        """A run's tables as ``flowopd-eval report --format csv`` writes them."""
        summaries: dict[str, dict[str, Any]] = {}
        for entry in self.load(name).entries:
            summaries.setdefault(entry.summary["model"], {})[entry.summary["bench"]] = entry.summary
        return "\n".join(text for _, text in comma_separated(Results(summaries)))

    def picture(self, name: str, address: Mapping[str, Any]) -> Full:
        """A picture with its provenance. Of bytes that were changed after they were judged, no verdict is told.

        Raises:
            RequestError: there is none of that address, or it cannot be read.
        """
        run = self.load(name)
        one = next((shown for shown in pictures(run) if shown.address == dict(address)), None)
        if one is None:
            raise RequestError("There is no such picture in this run.")
        entry = _entry(run, one)
        path = entry.folder.picture(one.sample.file)
        try:
            found, picture = store.file_sha256(path), store.read_picture(path)
        except (OSError, ValueError, SyntaxError) as error:
            raise RequestError(f"The picture {path.name} is gone or cannot be read.") from error
        intact = found == one.sample.sha256
        judged = {"score": one.sample.score, "said": one.sample.reason or one.sample.error or ""}
        facts = {
            "prompt": one.sample.prompt,
            "prompt id": one.sample.id,
            "task": one.sample.task,
            "which": one.sample.which,
            **(judged if intact else {}),
            "sha256": found if intact else f"{found}, not the {one.sample.sha256} drawn",
            **dict(store.flat({"generator": entry.summary["generator"], "judge": entry.summary["scorer"] or {}})),
        }
        return Full(picture, one, facts, intact)

    def thumbnail(self, folder: BenchFolder, sample: Sample) -> Image.Image | None:
        """A picture of a list; None for one that is gone, broken, or outside the run."""
        try:
            return store.read_picture(folder.picture(sample.file))
        except (OSError, ValueError, SyntaxError):
            return None

    def intact(self, folder: BenchFolder, sample: Sample) -> bool:
        """Whether a picture's bytes are those that were drawn."""
        try:
            return store.file_sha256(folder.picture(sample.file)) == sample.sha256
        except (OSError, ValueError):
            return False


def _of_training(folder: Path) -> bool:
    """Whether `python -m training` wrote this folder. A damaged run is none: it is named, not hidden."""
    try:
        found = json.loads((folder / "run.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "identity" in found and "schema" not in found


@lru_cache(maxsize=4)
def _loaded(out: Path, stamps: tuple[tuple[Path, int, int], ...]) -> Run:
    """A run as its files stand (``stamps``); summing one up takes a second."""
    return load_run(out, _METRICS)


def _entry(run: Run, one: Shown) -> Entry:
    return next(e for e in run.entries if (e.summary["model"], e.summary["key"]) == (one.model, one.key))


def pictures(run: Run) -> list[Shown]:
    """Every picture of a run, prompt by prompt, those of one prompt and number beside one another."""
    at: dict[str, dict[tuple[str, int], list[tuple[str, Sample, float | None]]]] = {}
    for entry in run.entries:
        places = at.setdefault(entry.summary["key"], {})
        for sample in entry.samples:
            one = (entry.summary["model"], sample, entry.summary["correct_at"])
            places.setdefault((sample.id, sample.k), []).append(one)
    return [
        Shown(model, key, sample, verdict(sample, correct_at), _disagree(row))
        for key, places in at.items()
        for row in places.values()
        for model, sample, correct_at in row
    ]


def _disagree(row: Sequence[tuple[str, Sample, float | None]]) -> bool:
    return any(change(x[1], y[1], x[2]) for x, y in combinations(row, 2))


def chosen(
    found: Sequence[Shown],
    *,
    model: str | None = None,
    key: str | None = None,
    task: str | None = None,
    said: str | None = None,
    disagree: bool = False,
) -> list[Shown]:
    """The pictures of a model, metric, task and verdict (None: any), or only those on which the models disagree."""
    return [
        one
        for one in found
        if model in (None, one.model)
        and key in (None, one.key)
        and task in (None, one.sample.task)
        and said in (None, one.verdict)
        and (one.disagree or not disagree)
    ]


def marks(one: Shown) -> list[dict[str, Any]]:
    """The boxes that the judge saw in a picture."""
    return boxes(one.sample.detail)
