"""Models side by side on one page: a row is a prompt and seed, in it a picture a model; on top stands what differs.

The page needs no network and no server. It refers to the pictures where they lie, by paths relative to its own: moved
together with the runs it stays whole. Everything read from a run may be hostile: it is checked, and shown escaped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flowopd_eval import store
from flowopd_eval.compare import Comparison, Row, Side, compare_runs, find_sides, number, signed
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import collect
from flowopd_eval.records import Prompt, Sample
from flowopd_eval.report import render_page, verdict


def write_gallery(paths: Sequence[Path], file: Path, across: str | None = None) -> Path:
    """Write the page that shows every model beside the first, on each metric they share; returns its path.

    Args:
        paths: runs as :func:`flowopd_eval.compare.find_sides` takes them, the baseline first.
        file: the page; pictures are referred to by paths relative to its folder.
        across: as in :func:`flowopd_eval.compare.compare_runs`.

    Raises:
        RequestError: as ``compare_runs``, or no relative path leads from the page to a run.
        WorkError: the page could not be written.
    """
    result = compare_runs(paths, across)
    sides = find_sides(paths)
    places = {str(folder.path): n for n, side in enumerate(sides) for folder in side.folders.values()}
    galleries = [_gallery(key, sides, file) for key in sides[0].folders if sum(key in s.folders for s in sides) > 1]
    page = render_page(
        "gallery.html.j2",
        {"number": number, "signed": signed},
        models=[{"letter": _letter(n), "label": side.label} for n, side in enumerate(sides)],
        notes=_run_notes(sides),
        comparisons=[_difference(one, places[one.b["path"]], galleries) for one in result.comparisons],
        remarks=result.notes,
        provenance=[_provenance(side, key, _letter(n)) for n, side in enumerate(sides) for key in side.folders],
        galleries=galleries,
    )
    store.write_atomic(file, page)
    return file


def _letter(place: int) -> str:
    """What stands for a model on the page: A is the baseline."""
    return chr(ord("A") + place) if place < 26 else f"M{place + 1}"


def _run_notes(sides: Sequence[Side]) -> list[str]:
    """What the runs say was evaluated, each text once."""
    outs = dict.fromkeys(folder.out for side in sides for folder in side.folders.values())
    return [note for note in dict.fromkeys(str(store.read_run(out).get("note", "")) for out in outs) if note]


def _provenance(side: Side, key: str, letter: str) -> dict[str, Any]:
    """What makes the scores comparable, as a flat table."""
    return {"title": f"{letter}, {side.label} on {key}", "facts": list(store.flat(side.folders[key].request()))}


# -------------------------------------------------------------------------------------------------------- differences


def _difference(comparison: Comparison, place: int, galleries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One comparison's sentence and table, and how many of its pictures changed."""
    rows = (comparison.overall, *comparison.tasks)
    reach = max(abs(end) for row in rows for end in (row.difference.low, row.difference.high)) or 1.0
    gallery = next(one for one in galleries if one["key"] == comparison.key)
    column = [model["place"] for model in gallery["models"]].index(place)
    changes = [row["cells"][column]["change"] for row in gallery["rows"]]
    return {
        "of": comparison,
        "place": place,
        "letter": _letter(place),
        "marked": gallery["marked"],
        "rows": [(row, _span(row, reach)) for row in rows],
        "pictures": len(changes),
        "fell": changes.count("fell"),
        "rose": changes.count("rose"),
    }


def _span(row: Row, reach: float) -> dict[str, float]:
    """Where difference and interval stand on an axis from ``-reach`` to ``reach``, in percent."""
    ends = (row.difference.value, row.difference.low, row.difference.high)
    value, low, high = (50 + 50 * end / reach for end in ends)
    return {"value": value, "low": low, "width": high - low}


# ----------------------------------------------------------------------------------------------------------- pictures


def _gallery(key: str, sides: Sequence[Side], file: Path) -> dict[str, Any]:
    """The pictures of all models on one metric as JSON for the page, the largest difference in score first."""
    shown = [(n, side) for n, side in enumerate(sides) if key in side.folders]
    folders = [side.folders[key] for _, side in shown]
    correct_at = folders[0].request()["correct_at"]
    prompts = {prompt.id: prompt for prompt in folders[0].prompts()}
    pictures = [{(sample.id, sample.k): sample for sample in collect(folder)[0]} for folder in folders]
    rows = [_row(prompts[place[0]], [own[place] for own in pictures], correct_at) for place in pictures[0]]
    rows.sort(key=lambda row: -_spread(row))  # stable: else plan order
    return {
        "key": key,
        "marked": correct_at is not None,
        "models": [
            {
                "place": n,
                "letter": _letter(n),
                "label": side.label,
                "folder": relative_url(side.folders[key].path, file),
            }
            for n, side in shown
        ],
        "rows": rows,
    }


def relative_url(folder: Path, file: Path) -> str:
    """URL of ``folder`` as seen from the page ``file``, quoted, with a slash at its end.

    Links in either path are left alone: a browser, too, takes ``..`` off the text of an address.
    Raises ``RequestError`` when there is no such path, as between two drives.
    """
    try:
        path = Path(os.path.relpath(folder, file.parent))
    except ValueError as error:
        raise RequestError(f"No path leads from {file} to {folder}: write the page to the runs' drive.") from error
    return f"./{quote(os.fsencode(path.as_posix()))}/"


def _row(prompt: Prompt, samples: Sequence[Sample], correct_at: float | None) -> dict[str, Any]:
    """Picture ``k`` of a prompt by every model, the baseline first; text as in the prompts, whose hash is checked."""
    return {
        "id": prompt.id,
        "prompt": prompt.prompt,
        "task": prompt.task,
        "picture": samples[0].which,
        "disagree": any(change(x, y, correct_at) for x, y in combinations(samples, 2)),
        "cells": [
            {
                "file": quote(sample.file),
                "verdict": verdict(sample, correct_at),
                "score": sample.score,
                "reason": sample.reason or sample.error or "",
                "change": change(samples[0], sample, correct_at),
            }
            for sample in samples
        ],
    }


def change(a: Sample, b: Sample, correct_at: float | None) -> str:
    """``fell`` from right to wrong, ``rose`` from wrong to right, or empty, as when either has no score.

    Without ``correct_at`` a score that is lower or higher at all fell or rose.
    """
    if a.score is None or b.score is None:
        return ""
    x, y = (score if correct_at is None else float(score >= correct_at) for score in (a.score, b.score))
    return "fell" if y < x else "rose" if y > x else ""


def _spread(row: Mapping[str, Any]) -> float:
    scores = [cell["score"] for cell in row["cells"] if cell["score"] is not None]
    return max(scores) - min(scores) if scores else 0.0
