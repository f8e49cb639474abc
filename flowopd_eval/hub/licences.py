"""What licences ask of whoever publishes: of works derived from a backbone, of adapters built upon, of prompts."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flowopd_eval.benches import bench_by_key
from flowopd_eval.download import fetch_files
from flowopd_eval.errors import RequestError
from flowopd_eval.hub.metadata import front_matter
from flowopd_eval.models import FAMILIES
from flowopd_eval.records import Prompt

_SD35 = FAMILIES["flow-opd"].base
_SD35_LICENCE = f"https://huggingface.co/{_SD35.removeprefix('hub:')}/blob/main/LICENSE.md"
POWERED_BY = "Powered by Stability AI"
# Wording that the licence itself asks for (Stability AI Community License, General Terms, a).
_ATTRIBUTION = (
    "This Stability AI Model is licensed under the Stability AI Community License, Copyright © Stability AI Ltd. All "
    "Rights Reserved"
)
# What only that licence says, from its title to its end. Its copies differ in quotes, numbering and line breaks, so
# letters are compared and not a hash.
_AGREEMENT = (
    "Stability AI Community License Agreement",
    "Research & Non-Commercial Use License",
    "Subject to the terms of this Agreement (including the remainder of this Section III)",
    "Distribution & Attribution",
    "prominently display “Powered by Stability AI”",
    "Limitation Of Liability",
    "Governing Law",
    "“Trade Control Laws” means",
)


@dataclass(frozen=True)
class Licence:
    """A backbone's licence as a card names it.

    ``asks`` are the files and lines it asks of a derivative work, each with its source, in words.
    """

    identifier: str
    name: str | None
    link: str | None
    asks: tuple[tuple[str, str], ...] = ()


_TERMS = f"Stability AI Community License, General Terms, a. Distribution & Attribution ({_SD35_LICENCE})"
LICENCES = {
    "tiny": Licence("apache-2.0", None, None, (("LICENSE", "Apache License 2.0, section 4 (a)"),)),
    "flow-opd": Licence(
        "other",
        "stabilityai-ai-community",
        _SD35_LICENCE,
        (
            ("LICENSE.md", f"a copy of the agreement: {_TERMS}, (i)"),
            ("NOTICE", f"the attribution, and how the model was changed: {_TERMS}, (ii)"),
            ("README.md", f"the words “{POWERED_BY}”: {_TERMS}, (iii)"),
        ),
    ),
}


def licence_files(family: str, change: str, beside: Path | None) -> dict[str, bytes]:
    """The files that the licence of ``family``'s backbone asks of a work derived from it; ``change`` says what it is.

    SD3.5's licence comes from its own repository, or from a ``LICENSE.md`` in the folder ``beside``.

    Raises:
        RequestError: SD3.5's licence is to be had from neither, or another text lies there by its name.
    """
    if family == "tiny":
        return {"LICENSE": _own_licence()}
    return {"LICENSE.md": _stability_licence(beside), "NOTICE": _notice(change).encode()}


def _own_licence() -> bytes:
    """The licence that this package was installed with."""
    for file in importlib.metadata.files("flowopd-eval") or ():
        if file.name == "LICENSE":
            return file.read_binary()
    raise RequestError("The installed flowopd-eval lacks its LICENSE, which goes with the miniature: reinstall it.")


def _stability_licence(beside: Path | None) -> bytes:
    mine = beside / "LICENSE.md" if beside else None
    if mine and mine.is_file():
        return _agreement(mine)
    try:
        folder, _ = fetch_files(_SD35, ["LICENSE.md"])
        return (folder / "LICENSE.md").read_bytes()
    except (RequestError, OSError) as error:
        place = mine or "LICENSE.md beside the adapter"
        raise RequestError(
            f"A copy of SD3.5's licence has to go along ({_TERMS}), and it could not be fetched: {error} Or save "
            f"{_SD35_LICENCE} as {place}."
        ) from error


def _agreement(file: Path) -> bytes:
    """What somebody saved as Stability's agreement, once it is that, and whole: its title, its sections, its end."""
    content = file.read_bytes()
    text = _letters(content.decode("utf-8", errors="replace"))
    if lacking := [words for words in _AGREEMENT if _letters(words) not in text]:
        raise RequestError(
            f"{file} is not the Stability AI Community License Agreement, or not all of it: it lacks {lacking[0]!r}. "
            f"Save {_SD35_LICENCE} there, or move the file away, and it is fetched with your token."
        )
    return content


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text).casefold()


def _notice(change: str) -> str:
    return (
        f"{_ATTRIBUTION}\n\n"
        "The line above is Stability AI's and applies to Stable Diffusion 3.5 Medium. This repository holds a\n"
        f"Derivative Work of it and was changed as follows: {change}\n"
        "The weights of Stable Diffusion 3.5 Medium are neither included nor altered.\n\n"
        f"{POWERED_BY}\n"
    )


def licence_of_repository(source: str) -> str:
    """The licence that the card of ``hub:REPO[@REVISION]`` states.

    Raises:
        RequestError: it states none, or cannot be asked.
    """
    folder, resolved = fetch_files(source, ["README.md"])
    data = front_matter(folder / "README.md")
    stated = (data.get("license"), data.get("license_name"))
    found = stated[1] if stated[0] in (None, "other") else stated[0]
    if not isinstance(found, str) or found == "unknown":
        raise RequestError(
            f"{resolved} states no licence, so nobody knows whether it, or what was made with it, may be published: "
            "ask its author to state one on its card. Nothing was sent."
        )
    return found


# ------------------------------------------------------------------------------------------------------------ prompts

# Metric key -> licence of its prompts. Of the others the licence is unknown or forbids commercial use (GenEval 2:
# CC BY-NC 4.0), and their texts are published by nobody here.
OPEN_PROMPTS = {
    "geneval": "MIT (github.com/djghosh13/geneval)",
    "shapes_geneval": "Apache-2.0 (this project)",
    "sign_ocr": "Apache-2.0 (this project)",
    "shapes_quality": "Apache-2.0 (this project)",
    "shapes_preference": "Apache-2.0 (this project)",
}


def open_prompts(key: str, prompts: Sequence[Prompt]) -> frozenset[str]:
    """Ids of those of ``prompts`` whose text may be published: they are the bench's own, and its licence allows it."""
    if key not in OPEN_PROMPTS:
        return frozenset()
    own = {prompt.id: prompt.prompt for prompt in bench_by_key(key).prompts()}
    return frozenset(prompt.id for prompt in prompts if own.get(prompt.id) == prompt.prompt)
