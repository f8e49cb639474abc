"""What the nodes share: LoRA files through ``folder_paths``, and a LoRA on a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import comfy.lora
import folder_paths

from ..logic.errors import PackError
from ..logic.fit import check_fit
from ..logic.lora import Lora, file_sha256, read_lora, state_dict
from ..logic.scales import CONFIG

CATEGORY = "Flow-OPD"


def installed() -> list[str]:
    """LoRA files as ComfyUI lists them."""
    return folder_paths.get_filename_list("loras")


def loras_folder() -> str:
    """Where a user puts LoRAs."""
    return folder_paths.get_folder_paths("loras")[0]


def _path(file: str) -> Path:
    path = folder_paths.get_full_path("loras", file)
    if path is None:
        raise PackError(f"There is no LoRA {file!r} in {', '.join(folder_paths.get_folder_paths('loras'))}.")
    return Path(path)


def open_lora(file: str) -> Lora:
    """The LoRA ``file`` at its true scale."""
    return read_lora(_path(file), file)


def fingerprint(files: Iterable[str | None]) -> list[str]:
    """Hashes of LoRA files and of what stands beside them: a node runs again when one of them changed."""
    found = []
    for file in files:
        path = folder_paths.get_full_path("loras", file) if file else None
        both = [Path(path), Path(path).parent / CONFIG] if path else []
        found += [file_sha256(each) for each in both if each.is_file()]
    return found


def patched(model: Any, lora: Lora, strength: float) -> Any:
    """A clone of ``model`` with ``lora`` on it: native patches, which stock nodes know how to treat.

    Raises:
        PackError: not every module of the LoRA lands on a weight of the model.
    """
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = model.model_state_dict()
    shapes = {key: tuple(getattr(w, "tensor_shape", w.shape)) for key, w in weights.items()}  # GGUF keeps it apart
    check_fit(lora, key_map, shapes)
    patches = comfy.lora.load_lora(state_dict(lora), key_map)
    clone = model.clone()
    taken = clone.add_patches(patches, strength)
    if len(taken) != len(lora.pairs):
        raise PackError(
            f"{lora.name}: ComfyUI took {len(taken)} of {len(lora.pairs)} modules; the model is left as it was."
        )
    return clone


def report(lora: Lora, strength: float) -> str:
    """What a node says of the LoRA it put on a model: every module, or it would have failed."""
    return f"{lora.about()}; all {len(lora.pairs)} matched, strength {strength:g}"
