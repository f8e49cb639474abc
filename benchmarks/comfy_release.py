"""Splits ``comfy_nodes/`` into a tree of its own: its registry and git installs want a pack at a root.

    python -m benchmarks.comfy_release ../flow-opd-nodes --publisher ID --repository https://github.com/OWNER/NAME

PublisherId, repository and icon address are the publisher's own and stand in no file here; they are filled in there. A
folder that holds an earlier release, or a git clone of one, is brought up to date: its ``.git`` stays, so that
``git diff`` there shows what changed. Publishing is the publisher's: ``comfy node publish`` in that folder.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tomllib
from pathlib import Path

PACK = Path(__file__).parent.parent / "comfy_nodes"
ICON = "icon.svg"


def release(out: Path, publisher: str, repository: str, pack: Path = PACK) -> None:
    """Write the pack to ``out`` with its publisher's data.

    Raises:
        ValueError: a publisher or repository that the registry would refuse, or a folder that holds something else.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", publisher):
        raise ValueError(
            f"Expected a publisher id as the registry gives it (a-z, 0-9, - and _), but got {publisher!r}."
        )
    address = re.fullmatch(r"https://github\.com/([\w.-]+)/([\w.-]+?)(?:\.git)?/?", repository)
    if address is None:
        raise ValueError(f"Expected a repository https://github.com/OWNER/NAME, but got {repository!r}.")
    _clear(out, _name(pack))
    shutil.copytree(
        pack, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*_cache", ".DS_Store")
    )
    owner, name = address.groups()
    _fill(
        out / "pyproject.toml",
        {
            "PublisherId": publisher,
            "Repository": f"https://github.com/{owner}/{name}",
            "Icon": f"https://raw.githubusercontent.com/{owner}/{name}/HEAD/{ICON}",
        },
    )


def _name(pack: Path) -> str:
    return str(tomllib.loads((pack / "pyproject.toml").read_text())["project"]["name"])


def _clear(out: Path, name: str) -> None:
    """Empty a folder that holds an earlier release; refuse any other that is not empty."""
    there = [path for path in out.iterdir() if path.name != ".git"] if out.exists() else []
    if there and not ((out / "pyproject.toml").is_file() and _name(out) == name):
        raise ValueError(
            f"{out} holds something that is no release of {name}; name an empty folder or an earlier release."
        )
    for path in there:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _fill(path: Path, fields: dict[str, str]) -> None:
    """Give the empty fields of ``pyproject.toml`` their values; comments and order stay."""
    text = path.read_text()
    for field, value in fields.items():
        text, count = re.subn(rf'(?m)^{field} = ""$', f'{field} = "{value}"', text)
        if count != 1:
            raise ValueError(f'Expected one line `{field} = ""` in {path}, but found {count}.')
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comfy_release", description=__doc__)
    parser.add_argument("out", type=Path, help="an empty folder, or an earlier release")
    parser.add_argument("--publisher", required=True, help="your publisher id at registry.comfy.org")
    parser.add_argument("--repository", required=True, help="https://github.com/OWNER/NAME of the pack")
    given = parser.parse_args()
    try:
        release(given.out, given.publisher, given.repository)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{given.out}: check it with `comfy node validate`, commit and push it, then `comfy node publish` there.")


if __name__ == "__main__":
    main()
