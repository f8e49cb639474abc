"""A run of T2I-CompBench++ written as the folders that its official scripts read.

``<out>/<category>/samples/<prompt>_<six digits>.png`` (Readme.md and ``inference_eval.py`` of Karine-Huang/
T2I-CompBench). The digits count a category's pictures, ten a prompt in the prompts' order. The scripts take every file
of ``samples`` for a picture and its name up to the first ``_`` for its prompt; each is given ``<out>/<category>``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from flowopd_eval import store
from flowopd_eval.compbench import CATEGORIES, PICTURES, check_category
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import collect
from flowopd_eval.records import Prompt
from flowopd_eval.store import BenchFolder

_NO_NAME_HOLDS = "/\0"
_ON_WINDOWS = '<>:"\\|?*'
_CUTS = ("_", ".png")  # where the official scripts end the prompt, and (numeracy) the name
_LONGEST = 250  # bytes of a name; file systems take 255, and a file is first written under a name of five more


def write_layout(folder: BenchFolder, out: Path) -> list[Path]:
    """Write a run's pictures as the official scripts want them: hard links where the disk allows, else copies.

    Returns ``<out>/<category>`` of each category that was drawn, in the benchmark's order. A second call into the same
    folder is the same as one.

    Raises:
        RequestError: a run that is not complete, or has not ten pictures a prompt; prompts of other categories, or
            that no file name can hold; or a ``samples`` folder with other files in it, which would be judged, too.
        WorkError: the disk is full.
    """
    request = folder.request()
    if request["samples"] != PICTURES:
        raise RequestError(
            f"{folder.path} has {request['samples']} pictures a prompt, and the official scripts of T2I-CompBench++ "
            f"count on {PICTURES}: draw with --samples {PICTURES}."
        )
    files = {prompt.id: file_name(prompt) for prompt in folder.prompts()}
    samples, missing = collect(folder)
    if missing:
        raise RequestError(f"{folder.path} is not complete ({'; '.join(missing)}): draw the rest first.")
    drawn: Counter[str] = Counter()
    pictures: dict[Path, Path] = {}
    for sample in samples:  # in the plan's order: prompt by prompt
        name = f"{files[sample.id]}_{drawn[sample.task]:06d}.png"
        pictures[out / sample.task / "samples" / name] = folder.picture(sample.file)
        drawn[sample.task] += 1
    folders = [out / category for category in CATEGORIES if drawn[category]]
    for place in folders:
        _refuse_others(place / "samples", pictures)
    for target, picture in pictures.items():
        _link(picture, target)
    return folders


def file_name(prompt: Prompt, forbidden: str = _NO_NAME_HOLDS + (_ON_WINDOWS if os.name == "nt" else "")) -> str:
    """The prompt as the beginning of a file name: as it is, since the official scripts read it from there.

    Raises:
        RequestError: it is of no category of the benchmark, or would not come back whole from a file name.
    """
    check_category(prompt)
    text = prompt.prompt
    if found := [part for part in (*_CUTS, *forbidden) if part in text]:
        raise RequestError(
            f"The prompt {prompt.id!r} has {found[0]!r} in it ({text[:80]!r}): the official scripts of T2I-CompBench++ "
            "read the prompt from the picture's file name and would get another one. Leave it out, or reword it."
        )
    if not text.isprintable():
        raise RequestError(f"The prompt {prompt.id!r} has a character that is not printable: {text[:80]!r}. Remove it.")
    if (size := len(f"{text}_000000.png".encode())) > _LONGEST:
        raise RequestError(
            f"The prompt {prompt.id!r} makes a file name of {size} bytes, of which a disk takes {_LONGEST}: shorten it."
        )
    return text


def _refuse_others(place: Path, pictures: Iterable[Path]) -> None:
    """Raises ``RequestError`` if ``place`` holds anything that is not to be written there."""
    ours = {path.name for path in pictures if path.parent == place}
    others = sorted(path.name for path in place.glob("*") if path.name not in ours and not _is_left(path))
    if others:
        raise RequestError(
            f"{place} holds {len(others)} other files ({others[0]!r}), which the official scripts would judge, too: "
            "remove them, or name an empty folder."
        )


def _is_left(path: Path) -> bool:
    """Whether it is what a process left that was killed while it wrote; removed."""
    left = path.name.startswith(".") and path.name.endswith(".tmp")
    if left:
        path.unlink(missing_ok=True)
    return left


def _link(picture: Path, target: Path) -> None:
    if target.exists() and target.samefile(picture):
        return
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        os.link(picture.resolve(), temporary)
        os.replace(temporary, target)
    except OSError:  # another disk, or one without hard links
        store.write_atomic(target, picture.read_bytes())
