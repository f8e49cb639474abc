"""Files that are fetched from their source once: checked against their sha256, kept in the toolkit's cache."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from flowopd_eval.errors import RequestError


def cache_folder() -> Path:
    """Where fetched and converted files lie: ``FLOWOPD_CACHE``, or ``~/.cache/flowopd-eval``."""
    return Path(os.environ.get("FLOWOPD_CACHE", Path.home() / ".cache" / "flowopd-eval"))


@dataclass(frozen=True)
class Source:
    """A file by its address at a pinned commit and its sha256; ``name`` is what it is called in the cache."""

    name: str
    url: str
    sha256: str

    def path(self, folder: Path | None = None) -> Path:
        """The file, fetched unless it is there.

        Args:
            folder: where it lies (default: :func:`cache_folder`).

        Raises:
            RequestError: it is neither there nor to be had, or it is another file.
        """
        path = (folder or cache_folder()) / self.name
        if path.is_file():
            self._check(path.read_bytes(), str(path))
            return path
        try:
            with urlopen(self.url, timeout=60) as response:
                data = response.read()
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise RequestError(
                f"Cannot fetch {self.url}: {reason}. With the file at hand, put it at {path}."
            ) from error
        self._check(data, self.url)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(data)
        part.replace(path)
        return path

    def _check(self, data: bytes, place: str) -> None:
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            raise RequestError(
                f"{place} is not the file that was meant: its sha256 is {found}, expected {self.sha256}. Remove it, or "
                f"get it from {self.url}."
            )
