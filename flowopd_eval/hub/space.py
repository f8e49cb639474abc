"""The app as a Space: what belongs to it of its folder, the card on top, and this package's source with its needs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from importlib.metadata import distribution, requires
from importlib.resources import files as package_files
from pathlib import Path, PurePosixPath

from flowopd_eval.errors import RequestError
from flowopd_eval.hub.metadata import front_matter
from flowopd_eval.hub.repository import Content, Repository

REQUIREMENTS = "requirements.txt"
_NAME = "flowopd-eval"
_PACKAGE = re.compile(r"flowopd[-_]eval(?![\w-])", re.IGNORECASE)
_TOP = {"README.md", REQUIREMENTS, "packages.txt", "pre-requirements.txt"}  # what a Space reads, beside the code
_CODE = {".py", ".css", ".js"}
_ASSETS = ("assets", "static", "templates")
_ASSET = {*_CODE, ".html", ".j2", ".json", ".svg", ".png", ".jpg", ".webp", ".ico"}
_PACKAGED = {*_ASSET, ".md", ".txt", ".toml", ".safetensors", ".ttf"}  # with the miniature's weights and the font
_NEEDS = ("sdk", "app_file")


def space_repository(folder: Path) -> Repository:
    """Everything to be published of the app in ``folder``. Nothing is sent.

    What belongs to an app, and nothing else that lies there, such as runs, votes or weights: the files that a Space
    reads, the code of the folder and of the packages in it, and what its folders ``assets``, ``static`` and
    ``templates`` hold. The README goes on top; the rest does too, unless the README's ``app_file`` lies in a folder of
    this one's name, as in ``app/__main__.py``.

    Where the folder's ``requirements.txt`` says from where flowopd-eval is installed (``flowopd-eval @ ADDRESS``), it
    stays as it is. Otherwise, as the package is on no index, its source goes along, beside the app file where it is
    imported from, and ``requirements.txt`` names what it needs instead, with the extras that were named.

    Raises:
        RequestError: the README lacks ``sdk`` or ``app_file``, or names an app that is not there.
    """
    facts = front_matter(folder / "README.md")
    if lacking := [name for name in _NEEDS if not facts.get(name)]:
        raise RequestError(f"{folder / 'README.md'} does not say {' nor '.join(lacking)}, which a Space needs.")
    root, app_file = folder.resolve(), str(facts["app_file"])
    below = f"{root.name}/" if app_file.startswith(f"{root.name}/") else ""
    files: dict[str, Content] = {}
    for path in sorted(_belonging(root)):
        relative = path.relative_to(root).as_posix()
        files[f"{'' if relative in _TOP else below}{relative}"] = path
    if app_file not in files:
        raise RequestError(f"{folder / 'README.md'} names app_file {app_file!r}, which is not in {folder}.")
    lines = (root / REQUIREMENTS).read_text().splitlines() if (root / REQUIREMENTS).is_file() else []
    ours = [line for line in lines if _PACKAGE.match(line.strip())]
    if not any("@" in line for line in ours):
        extras = {extra.strip() for line in ours for extra in "".join(re.findall(r"\[(.*?)\]", line)).split(",")}
        needed = dict.fromkeys([*(line for line in lines if line not in ours), *_needed(extras)])
        files |= {str(PurePosixPath(app_file).parent / name): path for name, path in _package()}
        files[REQUIREMENTS] = ("\n".join(needed) + "\n").encode()
    return Repository("space", files, sdk=str(facts["sdk"]))


def _belonging(folder: Path) -> Iterator[Path]:
    """The files of the app in ``folder``; links are not followed, as they lead elsewhere."""
    there = [path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_symlink()]
    for path in there:
        if path.is_file():
            if path.name in _TOP or path.suffix in _CODE:
                yield path
        elif path.name in _ASSETS:
            yield from _below(path, _ASSET)
        elif (path / "__init__.py").is_file():
            yield from _belonging(path)


def _below(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """All files below ``folder`` of such names; no hidden ones, caches or links."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith((".", "__pycache__")) for part in parts)
        linked = any((folder / Path(*parts[:end])).is_symlink() for end in range(1, len(parts) + 1))
        if path.is_file() and path.suffix in suffixes and not hidden and not linked:
            yield path


def _package() -> Iterator[tuple[PurePosixPath, Content]]:
    """This package's source, and of its installation what says its version, its needs and its licences."""
    root = Path(str(package_files("flowopd_eval")))
    for path in _below(root, _PACKAGED):
        yield PurePosixPath(root.name, path.relative_to(root).as_posix()), path
    # Without the version in the folder's name, so that a later push replaces it.
    facts, installed = PurePosixPath(f"{root.name}.dist-info"), distribution(_NAME)
    # In a checkout that is installed, setuptools' own folder may be found first, which names things otherwise.
    yield facts / "METADATA", (installed.read_text("METADATA") or installed.read_text("PKG-INFO") or "").encode()
    for file in installed.files or ():
        if "licenses" in file.parts or file.parts == ("LICENSE",):
            yield facts / "licenses" / file.name, Path(str(file.locate()))


def _needed(extras: Collection[str]) -> Iterator[str]:
    """What this package needs with such extras of it, a line each."""
    from packaging.requirements import Requirement

    for one in map(Requirement, requires(_NAME) or ()):
        marker, one.marker = one.marker, None
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        yield from _needed(one.extras) if _PACKAGE.fullmatch(one.name) else (str(one),)
