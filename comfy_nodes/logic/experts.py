"""The published student and experts by name, and where their files are among the installed LoRAs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import PackError
from .scales import CONFIG

WEIGHTS = "adapter_model.safetensors"
_WEIGHT_FILES = (WEIGHTS, "pytorch_lora_weights.safetensors")
BASE = "base"


@dataclass(frozen=True)
class Expert:
    """A published adapter of Stable Diffusion 3.5 Medium."""

    repository: str
    about: str

    @property
    def folder(self) -> str:
        """The repository's name without its owner: what its folder is called among the LoRAs."""
        return self.repository.rpartition("/")[2]


EXPERTS = {
    "student": Expert("CostaliyA/Flow-OPD", "the student of the paper"),
    "geneval": Expert("jieliu/SD3.5M-FlowGRPO-GenEval", "expert of composition"),
    "ocr": Expert("jieliu/SD3.5M-FlowGRPO-Text", "expert of written text"),
    "pickscore": Expert("jieliu/SD3.5M-FlowGRPO-PickScore", "expert of human preference"),
    "deqa": Expert("CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix", "expert of picture quality, and the anchor"),
}
NAMES = (*EXPERTS, BASE)


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: its label, and the LoRA file that makes it (None: the model as it is)."""

    label: str
    file: str | None


def installed_expert(name: str, installed: Iterable[str]) -> str | None:
    """The file of expert ``name`` among the ``installed`` LoRAs (names as ComfyUI lists them); None: it is not there.

    It is ``…/FOLDER/adapter_model.safetensors`` (or diffusers' file there), or ``…/FOLDER.safetensors``, with the
    repository's name for FOLDER, in whatever case.
    """
    folder = EXPERTS[name].folder.lower()
    wanted = [f"{folder}/{file}" for file in _WEIGHT_FILES] + [f"{folder}.safetensors"]
    paths = {"/" + file.replace("\\", "/").lower(): file for file in installed}
    return next((paths[path] for end in wanted for path in sorted(paths) if path.endswith(f"/{end}")), None)


def find_expert(name: str, installed: Sequence[str], loras: str) -> str | None:
    """The file of the model ``name``; None for the base.

    Raises:
        PackError: no such name, or its file is not installed; the message says which file from where belongs where.
    """
    return find_arms(name, installed, loras, published_only=True)[0].file


def find_arms(text: str, installed: Sequence[str], loras: str, *, published_only: bool = False) -> list[Arm]:
    """The arms of a comparison: in each line a published name or an installed LoRA's file name.

    Args:
        text: the lines; empty ones and those that start with ``#`` are passed over.
        installed: LoRA files as ComfyUI lists them.
        loras: the folder where LoRAs belong, for the message.
        published_only: file names are not taken.

    Raises:
        PackError: no line, a name twice, an unknown name, or files that are not there: all of them at once.
    """
    lines = [line.strip() for line in text.splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise PackError(f"No model is named; expected one of {', '.join(NAMES)}.")
    if len(set(names)) < len(names):
        raise PackError(f"A name stands twice among {', '.join(names)}.")
    files = {file.replace("\\", "/"): file for file in ([] if published_only else installed)}
    unknown = [name for name in names if name not in NAMES and name.replace("\\", "/") not in files]
    if unknown:
        also = "" if published_only else ", or the name of a file in the LoRA folder"
        raise PackError(f"Unknown model {', '.join(map(repr, unknown))}; expected one of {', '.join(NAMES)}{also}.")
    found = {name: installed_expert(name, installed) for name in names if name in EXPERTS}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        raise PackError("\n".join(_missing(name, loras) for name in missing))
    return [Arm(name, found.get(name) or files.get(name.replace("\\", "/"))) for name in names]


def _missing(name: str, loras: str) -> str:
    expert = EXPERTS[name]
    return (
        f"{name} ({expert.about}) is not installed. Download {WEIGHTS} and {CONFIG} (its strength stands there) from "
        f"https://huggingface.co/{expert.repository} into {loras}/{expert.folder}/ and refresh the page."
    )
