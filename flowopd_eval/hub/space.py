"""The app as a Space: its folder as it is, the card on top, and this package's source with what it needs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from importlib.metadata import distribution, requires
from importlib.resources import files as package_files
from pathlib import Path, PurePosixPath
from typing import Any

from flowopd_eval.errors import RequestError
from flowopd_eval.hub.repository import Content, Repository

REQUIREMENTS = "requirements.txt"
_NAME = "flowopd-eval"
_PACKAGE = re.compile(r"flowopd[-_]eval(?![\w-])", re.IGNORECASE)
_SUFFIXES = {".py", ".md", ".txt", ".css", ".js", ".html", ".j2", ".json", ".toml", ".svg", ".png", ".jpg", ".ico"}
_PACKAGED = {".safetensors", ".ttf"}  # besides those, of the package: the miniature's weights and its font
_NEEDS = ("sdk", "app_file")


def front_matter(readme: Path) -> dict[str, Any]:
    """The metadata on top of a README; empty where there is none that can be read."""
    from huggingface_hub import RepoCard
    from yaml import YAMLError

    try:
        return RepoCard(readme.read_text(), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError, YAMLError):
        return {}


def space_repository(folder: Path) -> Repository:
    """Everything to be published of the app in ``folder``. Nothing is sent.

    Its source files and pictures, no hidden ones and no caches. The README goes on top; the rest does too, unless the
    README's ``app_file`` lies in a folder of this one's name, as in ``app/__main__.py``. Where the folder's
    ``requirements.txt`` says from where flowopd-eval is installed (``flowopd-eval @ ADDRESS``), it stays as it is.
    Otherwise, as the package is on no index, its source goes along, beside the app file where it is imported from,
    and ``requirements.txt`` names what it needs instead, with the extras that were named.

    Raises:
        RequestError: the README lacks ``sdk`` or ``app_file``, or names an app that is not there.
    """
    facts = front_matter(folder / "README.md")
    if lacking := [name for name in _NEEDS if not facts.get(name)]:
        raise RequestError(f"{folder / 'README.md'} does not say {' nor '.join(lacking)}, which a Space needs.")
    root, app_file = folder.resolve(), str(facts["app_file"])
    below = f"{root.name}/" if app_file.startswith(f"{root.name}/") else ""
    files: dict[str, Content] = {}
    for relative, path in _sources(root, _SUFFIXES):
        top = relative in ("README.md", REQUIREMENTS)
        files[f"{'' if top else below}{relative}"] = path
    if app_file not in files:
        raise RequestError(f"{folder / 'README.md'} names app_file {app_file!r}, which is not in {folder}.")
    lines = (root / REQUIREMENTS).read_text().splitlines() if (root / REQUIREMENTS).is_file() else []
    ours = [line for line in lines if _PACKAGE.match(line.strip())]
    if any("@" in line for line in ours):
        return Repository("space", files, sdk=str(facts["sdk"]))
    beside = PurePosixPath(app_file).parent
    packaged = {str(beside / name): path for name, path in _package()}
    extras = {extra.strip() for line in ours for extra in "".join(re.findall(r"\[(.*?)\]", line)).split(",")}
    needed = dict.fromkeys([*(line for line in lines if line not in ours), *_needed(extras)])
    files |= packaged | {REQUIREMENTS: ("\n".join(needed) + "\n").encode()}
    owned = sorted({f"{beside / name.parts[0]}/" for name, _ in _package()})
    return Repository("space", files, tuple(owned), sdk=str(facts["sdk"]))


def _sources(root: Path, suffixes: Collection[str]) -> Iterator[tuple[str, Path]]:
    """The files below ``root`` of such names, each with its path from there; no hidden ones, caches or links."""
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
        if path.is_file() and not path.is_symlink() and not hidden and path.suffix in suffixes:
            yield relative.as_posix(), path


def _package() -> Iterator[tuple[PurePosixPath, Path]]:
    """This package's source, and of its installation what says its version, its needs and its licences."""
    root = Path(str(package_files("flowopd_eval")))
    for relative, path in _sources(root, _SUFFIXES | _PACKAGED):
        yield PurePosixPath(root.name, relative), path
    for file in distribution(_NAME).files or ():
        if file.parts[0].endswith(".dist-info") and (file.name == "METADATA" or "licenses" in file.parts):
            # Without the version in the folder's name, so that a later push replaces it.
            yield PurePosixPath(f"{root.name}.dist-info", *file.parts[1:]), Path(str(file.locate()))


def _needed(extras: Collection[str]) -> Iterator[str]:
    """What this package needs with such extras of it, a line each."""
    from packaging.requirements import Requirement

    for one in map(Requirement, requires(_NAME) or ()):
        marker, one.marker = one.marker, None
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        yield from _needed(one.extras) if _PACKAGE.fullmatch(one.name) else (str(one),)
