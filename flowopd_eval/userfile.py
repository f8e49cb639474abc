"""Python that a user names on the command line or in a recipe of their own: ``FILE.py:NAME``. Its file is run."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from flowopd_eval.errors import RequestError


def is_userfile(name: str) -> bool:
    """Whether ``name`` has the form ``FILE.py:NAME``."""
    return name.rpartition(":")[0].endswith(".py")


def load_attribute(name: str) -> tuple[Any, str]:
    """What ``FILE.py:NAME`` names, and the sha256 of the file. Name only files of your own: it is run.

    Raises:
        RequestError: no such file, or nothing of that name in it.
    """
    file, _, attribute = name.rpartition(":")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(f"user_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise RequestError(f"{name!r}: there is no file {file}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    spec.loader.exec_module(module)
    found = getattr(module, attribute, None)
    if found is None:
        raise RequestError(f"{name!r}: {file} has no {attribute}.")
    return found, hashlib.sha256(path.read_bytes()).hexdigest()
