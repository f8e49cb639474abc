"""The app as a Space: its folder as it is, the card on top, and requirements that name this package."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from flowopd_eval.errors import RequestError
from flowopd_eval.hub.metadata import front_matter
from flowopd_eval.hub.repository import Content, Repository

REQUIREMENTS = "requirements.txt"
_PACKAGE = re.compile(r"flowopd[-_]eval(?![\w-])", re.IGNORECASE)
_SUFFIXES = {".py", ".md", ".txt", ".css", ".js", ".html", ".j2", ".json", ".toml", ".svg", ".png", ".jpg", ".ico"}
_NEEDS = ("sdk", "app_file")


def space_repository(folder: Path) -> Repository:
    """Everything to be published of the app in ``folder``. Nothing is sent.

    Its source files and pictures, no hidden ones and no caches. The README goes on top; the rest does too, unless the
    README's ``app_file`` lies in a folder of this one's name, as in ``app/__main__.py``. ``requirements.txt`` is the
    folder's own with a line for flowopd-eval, in the version that is installed, where it has none.

    Raises:
        RequestError: the README lacks ``sdk`` or ``app_file``, or names an app that is not there.
    """
    facts = front_matter(folder / "README.md")
    if lacking := [name for name in _NEEDS if not facts.get(name)]:
        raise RequestError(f"{folder / 'README.md'} does not say {' nor '.join(lacking)}, which a Space needs.")
    root = folder.resolve()
    below = f"{root.name}/" if str(facts["app_file"]).startswith(f"{root.name}/") else ""
    files: dict[str, Content] = {}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if any(part.startswith((".", "__pycache__")) for part in relative.parts) or path.is_symlink():
            continue
        if path.is_file() and path.suffix in _SUFFIXES:
            top = relative.as_posix() in ("README.md", REQUIREMENTS)
            files[f"{'' if top else below}{relative.as_posix()}"] = path
    if facts["app_file"] not in files:
        raise RequestError(f"{folder / 'README.md'} names app_file {facts['app_file']!r}, which is not in {folder}.")
    files[REQUIREMENTS] = _requirements(root / REQUIREMENTS)
    return Repository("space", files, sdk=str(facts["sdk"]))


def _requirements(path: Path) -> bytes:
    lines = path.read_text().splitlines() if path.is_file() else []
    if not any(_PACKAGE.match(line.strip()) for line in lines):
        lines.append(f"flowopd-eval=={version('flowopd-eval')}")
    return ("\n".join(lines) + "\n").encode()
