"""The app as a Space: what belongs to it of its folder, the card on top, and requirements that name this package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from flowopd_eval.errors import RequestError
from flowopd_eval.hub.metadata import front_matter
from flowopd_eval.hub.repository import Content, Repository

REQUIREMENTS = "requirements.txt"
_PACKAGE = re.compile(r"flowopd[-_]eval(?![\w-])", re.IGNORECASE)
_TOP = {"README.md", REQUIREMENTS, "packages.txt", "pre-requirements.txt"}  # what a Space reads, beside the code
_CODE = {".py", ".css", ".js"}
_ASSETS = ("assets", "static", "templates")
_ASSET = {*_CODE, ".html", ".j2", ".json", ".svg", ".png", ".jpg", ".webp", ".ico"}
_NEEDS = ("sdk", "app_file")


def space_repository(folder: Path) -> Repository:
    """Everything to be published of the app in ``folder``. Nothing is sent.

    What belongs to an app, and nothing else that lies there, such as runs, votes or weights: the files that a Space
    reads, the code of the folder and of the packages in it, and what its folders ``assets``, ``static`` and
    ``templates`` hold. The README goes on top; the rest does too, unless the README's ``app_file`` lies in a folder of
    this one's name, as in ``app/__main__.py``. ``requirements.txt`` is the folder's own with a line for flowopd-eval,
    in the version that is installed, where it has none.

    Raises:
        RequestError: the README lacks ``sdk`` or ``app_file``, or names an app that is not there.
    """
    facts = front_matter(folder / "README.md")
    if lacking := [name for name in _NEEDS if not facts.get(name)]:
        raise RequestError(f"{folder / 'README.md'} does not say {' nor '.join(lacking)}, which a Space needs.")
    root = folder.resolve()
    below = f"{root.name}/" if str(facts["app_file"]).startswith(f"{root.name}/") else ""
    files: dict[str, Content] = {}
    for path in sorted(_belonging(root)):
        relative = path.relative_to(root).as_posix()
        files[f"{'' if relative in _TOP else below}{relative}"] = path
    if facts["app_file"] not in files:
        raise RequestError(f"{folder / 'README.md'} names app_file {facts['app_file']!r}, which is not in {folder}.")
    files[REQUIREMENTS] = _requirements(root / REQUIREMENTS)
    return Repository("space", files, sdk=str(facts["sdk"]))


def _belonging(folder: Path) -> Iterator[Path]:
    """The files of the app in ``folder``; links are not followed, as they lead elsewhere."""
    there = [path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_symlink()]
    for path in there:
        if path.is_file():
            if path.name in _TOP or path.suffix in _CODE:
                yield path
        elif path.name in _ASSETS:
            yield from _assets(path)
        elif (path / "__init__.py").is_file():
            yield from _belonging(path)


def _assets(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith((".", "__pycache__")) for part in parts)
        linked = any((folder / Path(*parts[:end])).is_symlink() for end in range(1, len(parts) + 1))
        if path.is_file() and path.suffix in _ASSET and not hidden and not linked:
            yield path


def _requirements(path: Path) -> bytes:
    lines = path.read_text().splitlines() if path.is_file() else []
    if not any(_PACKAGE.match(line.strip()) for line in lines):
        lines.append(f"flowopd-eval=={version('flowopd-eval')}")
    return ("\n".join(lines) + "\n").encode()
