"""What licences ask of whoever publishes: of works derived from a backbone, of adapters built upon, of prompts."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowopd_eval.benches import bench_by_key
from flowopd_eval.download import fetch_files
from flowopd_eval.errors import RequestError
from flowopd_eval.hub.metadata import card_metadata, front_matter
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


# --------------------------------------------------------------------------------------------------- adapters of others

# Licences under which what somebody else made may be changed and passed on, as a push does: by the Hub's identifier
# (huggingface.co/docs/hub/repositories-licenses), or by `license_name` where that is `other`; where each allows it; and
# whether it binds what was only learned from such a work, too. All others are refused.
_PASSED_ON: dict[str, tuple[str, bool]] = {
    "apache-2.0": ("Apache License 2.0, section 4", False),
    "mit": ("opensource.org/license/mit, first paragraph", False),
    "bsd": ("opensource.org/license/bsd-3-clause, conditions 1 and 2", False),
    "bsd-2-clause": ("opensource.org/license/bsd-2-clause, conditions 1 and 2", False),
    "bsd-3-clause": ("opensource.org/license/bsd-3-clause, conditions 1 and 2", False),
    "cc0-1.0": ("CC0 1.0, section 2", False),
    "cc-by-4.0": ("CC BY 4.0, section 2 (a) (1)", False),
    "cc-by-sa-4.0": ("CC BY-SA 4.0, section 2 (a) (1); 3 (b): under the same", True),
    "cc-by-nc-4.0": ("CC BY-NC 4.0, section 2 (a) (1): for NonCommercial purposes", True),
    "cc-by-nc-sa-4.0": ("CC BY-NC-SA 4.0, section 2 (a) (1), 3 (b): so, and under the same", True),
    # The RAIL licences: use restrictions go along (huggingface.co/spaces/CompVis/stable-diffusion-license)
    "openrail": ("section III, 4", True),
    "openrail++": ("section III, 4", True),
    "creativeml-openrail-m": ("section III, 4", True),
    "bigscience-openrail-m": ("section III, 4", True),
    "bigcode-openrail-m": ("paragraphs 4 and 5 (bigcode-project.org/docs/pages/bigcode-openrail)", True),
    "stabilityai-ai-community": ("General Terms, a. Distribution & Attribution", True),
}
_AND = "-and-"  # between the names of several licences on one card
_TEXTS = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")
UPSTREAM = "upstream"  # the folder of a repository in which the licences of others lie
_PLAIN = re.compile(r"[\w.+-]+(?:/[\w.+-]+)*", re.ASCII)


def binding(licence: str) -> bool:
    """Whether a licence, as :func:`licence_of_repository` names it, binds also what only learned from such a work."""
    return any(_PASSED_ON[name][1] for name in licence.split(_AND) if name in _PASSED_ON)


def card_licence(family: str, carried: Sequence[str]) -> Licence:
    """The licence of a card: that of its backbone's family, and those of the works of others that are in the adapter.

    The miniature's own (Apache-2.0) asks for no more than its text, so there the others' stand alone; SD3.5's holds for
    whatever is derived from it, so there they stand beside it.

    Raises:
        RequestError: a licence that says SD3.5's on another backbone's adapter.
    """
    own, stable = LICENCES[family], LICENCES["flow-opd"].name
    names = [name for one in carried for name in one.split(_AND)]
    if family != "flow-opd" and stable in names:
        raise RequestError(
            f"What the adapter was made from is under {stable}, which is the licence of SD3.5's works, and this is an "
            f"adapter of {family}:base: name its own licence on its card. Nothing was sent."
        )
    names = list(dict.fromkeys([*([own.name] if own.name else []), *names]))
    if not names or names == [own.name or own.identifier]:
        return own
    if len(names) == 1:
        return Licence(names[0], None, None, own.asks)
    return Licence("other", _AND.join(names), own.link or "LICENSE", own.asks)


def licence_of_repository(source: str) -> str:
    """The licence that the card of ``hub:REPO[@REVISION]`` states, one that lets it be passed on.

    Raises:
        RequestError: it states none, or one that does not, or that is not known here; or it cannot be asked.
    """
    folder, resolved = fetch_files(source, ["README.md"])
    return _licence(front_matter(folder / "README.md"), resolved)


def licence_of_folder(folder: Path) -> str | None:
    """The licence that the card in a local folder states; None where it states none, and it is taken for one's own.

    Raises:
        RequestError: as :func:`licence_of_repository`; or its metadata cannot be read.
    """
    card = folder / "README.md"
    if not card.is_file() or not card.read_bytes().lstrip().startswith(b"---"):
        return None
    data = card_metadata(card, str(folder)).to_dict()
    return _licence(data, str(card)) if data.get("license") or data.get("license_name") else None


def _licence(data: Mapping[str, Any], where: str) -> str:
    stated = data.get("license_name") if data.get("license") in (None, "other") else data.get("license")
    names = stated if isinstance(stated, list) else str(stated or "unknown").split(_AND)
    if not names or "unknown" in names:
        raise RequestError(
            f"{where} states no licence, so nobody knows whether it, or what was made with it, may be published: "
            "ask its author to state one on its card. Nothing was sent."
        )
    for name in names:
        if name in _PASSED_ON:
            continue
        why = "is not known here to let it be passed on"
        if re.search(r"(^|-)nd(-|$)", str(name)):
            why = "lets nothing that was changed be passed on (no derivatives), and a push writes it anew"
        raise RequestError(
            f"{where} is under {str(name)!r}, which {why}: ask its author to put it under one of "
            f"{', '.join(_PASSED_ON)}. Nothing was sent."
        )
    return _AND.join(map(str, names))


def licence_texts(source: str, folder: Path | None) -> dict[str, Path]:
    """The licences and notices that lie with an adapter of somebody's, by their paths in a repository of ours.

    Args:
        source: ``hub:REPO[@REVISION]``, or the name of a local one.
        folder: where a local one lies.
    """
    label = source.removeprefix("hub:").partition("@")[0].replace("/", ".")
    root = folder or fetch_files(source, [*_TEXTS, f"{UPSTREAM}/*"])[0]
    mine = [path for pattern in _TEXTS for path in sorted(root.glob(pattern))]
    theirs = sorted((root / UPSTREAM).rglob("*"))
    named = {f"{UPSTREAM}/{label}/{path.name}": path for path in mine}
    named |= {path.relative_to(root).as_posix(): path for path in theirs}
    # A link leads elsewhere, but in the Hub's cache, which is made of them.
    found = {name: path for name, path in named.items() if path.is_file() and _PLAIN.fullmatch(name)}
    return {name: path for name, path in found.items() if not (folder and path.is_symlink())}


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
