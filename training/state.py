"""Checkpoints that are whole or absent. Only tensors and plain values are read back, never code."""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from flowopd_eval.errors import WorkError

CHECKPOINT = "checkpoint.pt"


def _write(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` so that a crash leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise WorkError(
            f"{path} is damaged ({str(error).splitlines()[0]}): remove it, and the run goes on from the one before."
        ) from error


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` as the one checkpoint of ``folder``."""
    _write(folder / CHECKPOINT, state)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state in ``folder``, or None where there is none."""
    path = folder / CHECKPOINT
    return _read(path) if path.exists() else None


class Checkpoints:
    """The last ``keep`` checkpoints of a run, one file each, named by their step."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of ``step``, then remove the oldest beyond ``keep``."""
        path = self.folder / f"step-{step:08d}.pt"
        _write(path, state)
        for old in self._files()[: -self.keep]:
            old.unlink()
        return path

    def latest(self) -> dict[str, Any] | None:
        """The newest state, or None where there is none."""
        files = self._files()
        return _read(files[-1]) if files else None
