"""What one push uploads: a list of files that names each of them, and what none of them may hold."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flowopd_eval.errors import RequestError

Kind = Literal["model", "dataset", "space"]
Content = bytes | Path
CARD = "README.md"

# A path with a root: after the beginning, a blank or a mark that opens something; not the slashes of an address.
_ROOTED = re.compile(r"""(?:(?<=[\s='"(,])|^)(?:~|/|[A-Za-z]:[\\/])[^\s'",]*[\\/]([^\s'",\\/]+)[\\/]?""")
# A path without one: below ./ or ../, two folders deep or more, or a file in a folder. OWNER/NAME and "and/or" stay.
_FOLDER = r"""[\w.@+~-]+[\\/]"""
_FILE = r"""[^\s'",\\/]*\.(?:csv|jsonl?|md|npy|npz|onnx|png|pth?|py|safetensors|toml|txt|ya?ml)\b"""
_RELATIVE = re.compile(
    rf"""(?:(?<=[\s='"(,])|^)(?:\.{{1,2}}[\\/](?:{_FOLDER})*|(?:{_FOLDER}){{2,}}|{_FOLDER}(?={_FILE}))([^\s'",\\/]+)[\\/]?"""
)
_PLACE = re.compile(r"^[^\s:]*[\\/](?=[^\s\\/]+[\\/]?$)")
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_CHUNK = 1 << 24  # bytes looked through at a time
_OVERLAP = 4096


@dataclass(frozen=True)
class Repository:
    """Every file of a push by its path there: its bytes, or the file they are read from. Nothing else is uploaded.

    ``notes`` are said with the list, before anything is sent.
    """

    kind: Kind
    files: Mapping[str, Content]
    sdk: str | None = None
    notes: tuple[str, ...] = ()

    def size(self, path: str) -> int:
        """Bytes of a file."""
        content = self.files[path]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def write_files(repository: Repository, folder: Path) -> None:
    """Write every file below ``folder``, to be looked at as it will be on the Hub.

    Raises:
        RequestError: ``folder`` holds something already, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder} cannot be a folder ({error.strerror}): name a new one to write into.") from error
    if any(folder.iterdir()):
        raise RequestError(f"{folder} is not empty: name a new folder, in which nothing but the push will be.")
    for path, content in repository.files.items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            place.write_bytes(content)
        else:
            shutil.copyfile(content, place)


def without_paths(value: Any) -> Any:
    """JSON ``value`` in which of every path the last part is left: the others name people, machines and projects.

    Words with a single slash stay, as they may be a repository's OWNER/NAME.
    """
    return _mapped(value, lambda text: _RELATIVE.sub(r"\1", _ROOTED.sub(r"\1", text)))


def without_places(recipe: Any) -> Any:
    """A recipe in which of every path the last part is left.

    What lies on the Hub says ``hub:`` there: all else of one word with a slash, such as ``runs/mine``, is a path.
    """
    return _mapped(recipe, lambda text: _PLACE.sub("", without_paths(text)))


def without_addresses(value: Any) -> Any:
    """JSON ``value`` without what lies under ``url``: where a judge was served is nobody else's business."""
    if isinstance(value, Mapping):
        return {key: without_addresses(item) for key, item in value.items() if key != "url"}
    return [without_addresses(item) for item in value] if isinstance(value, list | tuple) else value


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """JSON ``value`` with ``change`` done to every text in it, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        short = [_mapped(key, change) for key in value]
        seen: Counter[Any] = Counter()
        found = {}
        for key, item in zip(short, value.values(), strict=True):  # two paths may end alike, and none is to be lost
            seen[key] += 1
            found[f"{key} ({seen[key]})" if short.count(key) > 1 else key] = _mapped(item, change)
        return found
    return [_mapped(item, change) for item in value] if isinstance(value, list | tuple) else value


def json_bytes(value: Any) -> bytes:
    """``value`` as an indented JSON file."""
    return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"


def refuse_secrets(repository: Repository) -> None:
    """Look through every file for what nobody means to publish.

    Raises:
        RequestError: one holds a Hub token or the home folder's path.
    """
    from huggingface_hub import get_token

    token, home = get_token(), f"{Path.home()}/"
    hidden = {"this machine's Hub token": token.encode() if token else b""}
    hidden |= {"the path of your home folder": home.encode() if len(home) > 2 else b""}
    for path, content in repository.files.items():
        for part in _parts(content):
            found = next((what for what, text in hidden.items() if text and text in part), None)
            if found is None and _TOKEN.search(part):
                found = "a Hub token"
            if found:
                raise RequestError(f"{path} holds {found}; nothing was sent. Remove it there, and push again.")


def _parts(content: Content) -> Iterable[bytes]:
    """The content in pieces that overlap, so that nothing hides on a border."""
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        tail = b""
        while chunk := file.read(_CHUNK):
            yield tail + chunk
            tail = chunk[-_OVERLAP:]
