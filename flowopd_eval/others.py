"""Models that are not ours: any text-to-image pipeline of diffusers, and any Python function.

Their pictures keep the seed rule: picture ``k`` of a prompt has a generator of its own on the CPU, whatever batch it is
drawn in. What a pipeline does with it (precision of the noise, steps that draw more) is the pipeline's affair.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flowopd_eval.download import fetch_files
from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.models import OURS, Backbone, ModelSpec, folder_sha256, pipeline_class
from flowopd_eval.records import Generator, Prompt, SamplingRecord
from flowopd_eval.userfile import is_userfile, load_attribute

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger(__name__)
_FILES = ["*.json", "*.txt", "*.model", "*/*.safetensors"]  # nothing that would have to be unpickled


class Models(Protocol):
    """Models that share what is loaded once."""

    @property
    def notice(self) -> str:
        """What nobody would guess of how they are drawn, or empty."""

    def load(self) -> None:
        """Have everything in memory."""

    def record(self, spec: ModelSpec) -> SamplingRecord:
        """The record ``spec`` is drawn with unless told otherwise."""

    def cut(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Those of ``prompts`` whose end no text encoder sees, as far as that is known."""

    def generator(self, spec: ModelSpec, record: SamplingRecord) -> Generator:
        """What draws with ``spec`` by ``record``."""


def open_models(base: str, specs: Sequence[ModelSpec], device: str, dtype: str | None) -> Models:
    """What draws with models of one base: our pipeline for SD3, diffusers' own for others, or a function.

    Raises:
        RequestError: the base is none of these, or cannot be had.
    """
    if is_userfile(base):
        return PythonModel(base, specs, dtype)
    if base != "builtin:tiny" and pipeline_class(base) not in OURS:
        return DiffusersModel(base, specs, device, dtype)
    return Backbone(base, specs, device, dtype)


class DiffusersModel:
    """Any text-to-image pipeline of diffusers, through ``AutoPipelineForText2Image``, with at most one LoRA.

    Args:
        base: folder, or ``hub:REPO@REVISION``; its weights must be safetensors.
        specs: models on it: one, as a LoRA of a foreign layout is loaded into the pipeline itself.
        device: where it runs.
        dtype: name of a torch dtype; float32 unless told otherwise.
    """

    notice = ""

    def __init__(self, base: str, specs: Sequence[ModelSpec], device: str, dtype: str | None) -> None:
        if len(specs) > 1:
            names = ", ".join(spec.name for spec in specs)
            raise RequestError(f"{base} is drawn with one LoRA at a time; run {names} one after the other.")
        self.folder = fetch_files(base, _FILES)[0] if base.startswith("hub:") else Path(base)
        self.base, self.spec, self.device, self.dtype = base, specs[0], device, dtype or "float32"

    def load(self) -> None:
        self.pipeline  # noqa: B018  (loads)

    @cached_property
    def sha256(self) -> str:
        """Hash of the pipeline's files."""
        return folder_sha256(self.folder)

    @cached_property
    def lora(self) -> tuple[Path, str] | None:
        """The LoRA's file and sha256."""
        import hashlib

        if self.spec.adapter is None:
            return None
        path = _lora_file(self.spec.adapter)
        return path, hashlib.sha256(path.read_bytes()).hexdigest()

    @cached_property
    def pipeline(self) -> Any:
        """The pipeline, loaded when first asked for."""
        from flowopd_eval.quiet import quiet_libraries

        with quiet_libraries():
            import torch
            from diffusers import AutoPipelineForText2Image

            try:
                pipeline = AutoPipelineForText2Image.from_pretrained(
                    self.folder, torch_dtype=getattr(torch, self.dtype), use_safetensors=True
                )
            except (OSError, ValueError) as error:
                raise RequestError(f"diffusers cannot load {self.base} as a text-to-image pipeline: {error}") from error
            if self.lora:
                _load_lora(pipeline, self.lora[0])
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    def cut(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Those of ``prompts`` that have more tokens than each of the pipeline's tokenizers says that it takes."""
        from flowopd_eval.pipeline import longer_than_all

        parts = self.pipeline.components.items()
        found = [part for name, part in parts if name.startswith("tokenizer") and hasattr(part, "model_max_length")]
        limits = [(tokenizer, tokenizer.model_max_length) for tokenizer in found]
        return [prompt for prompt in prompts if longer_than_all(prompt.prompt, limits)]

    def record(self, spec: ModelSpec) -> SamplingRecord:
        """The pipeline's own defaults; ``sampler`` is its scheduler's class.

        A guidance scale of 1 stands for a pipeline that has none; a side of 0 for one that does not tell its size.
        """
        parameters = inspect.signature(type(self.pipeline).__call__).parameters

        def default(name: str, otherwise: Any) -> Any:
            value = parameters[name].default if name in parameters else None
            return otherwise if value is None or value is inspect.Parameter.empty else value

        scheduler = self.pipeline.scheduler
        side = _side(self.pipeline)
        return SamplingRecord(
            steps=int(default("num_inference_steps", 50)),
            guidance=float(default("guidance_scale", 1.0)),
            shift=float(scheduler.config.get("shift") or 1.0),
            width=int(default("width", side)),
            height=int(default("height", side)),
            text_length=int(default("max_sequence_length", 0)),
            sampler=type(scheduler).__name__,
            dtype=self.dtype,
        )

    def generator(self, spec: ModelSpec, record: SamplingRecord) -> DiffusersGenerator:
        return DiffusersGenerator(self, spec, record)


class DiffusersGenerator:
    """Draws with a pipeline of diffusers."""

    def __init__(self, model: DiffusersModel, spec: ModelSpec, record: SamplingRecord) -> None:
        self.model, self.spec, self.record = model, spec, record

    def identity(self) -> dict[str, Any]:
        """Name, class, hashes and sampling record, as plain JSON."""
        return {
            "model": self.spec.name,
            "pipeline": type(self.model.pipeline).__name__,
            "base_sha256": self.model.sha256,
            "adapter_sha256": self.model.lora[1] if self.model.lora else None,
            "sampling": asdict(self.record),
        }

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        """One RGB picture for each prompt and seed.

        Raises:
            WorkError: the model drew NaN.
        """
        import numpy as np
        import torch
        from PIL import Image

        r = self.record
        wanted = {
            "num_inference_steps": r.steps,
            "guidance_scale": r.guidance,
            "height": r.height or None,
            "width": r.width or None,
            "max_sequence_length": r.text_length or None,
            "negative_prompt": [r.negative_prompt] * len(prompts) if r.guidance > 1 else None,
        }
        known = inspect.signature(type(self.model.pipeline).__call__).parameters
        output = self.model.pipeline(
            [prompt.prompt for prompt in prompts],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
            **{name: value for name, value in wanted.items() if name in known and value is not None},
        )
        pictures = np.asarray(output.images)
        if not np.isfinite(pictures).all():
            raise WorkError(f"{self.spec.name} drew NaN in {r.dtype}; try --dtype float32.")
        for prompt, flagged in zip(prompts, getattr(output, "nsfw_content_detected", None) or [], strict=False):
            if flagged:
                _log.warning("%s: the model's own safety checker blackened a picture.", prompt.id)
        return [Image.fromarray((picture * 255).round().astype("uint8")) for picture in pictures]


def _side(pipeline: Any) -> int:
    """Side of a pipeline's own pictures in pixels; 0 where it does not tell."""
    network = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    sample = getattr(pipeline, "default_sample_size", None) or getattr(network and network.config, "sample_size", None)
    scale = getattr(pipeline, "vae_scale_factor", None)
    return int(sample * scale) if isinstance(sample, int) and isinstance(scale, int) else 0


def _lora_file(source: str) -> Path:
    """The one safetensors file of a LoRA: itself, in a folder, or in a repository of the Hub."""
    folder = fetch_files(source, ["*.safetensors"])[0] if source.startswith("hub:") else Path(source)
    found = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    if len(found) != 1 or found[0].suffix != ".safetensors":
        names = ", ".join(path.name for path in found) or "none"
        raise RequestError(f"Expected one LoRA file (.safetensors) in {source}, but found {names}; name the file.")
    return found[0]


def _load_lora(pipeline: Any, path: Path) -> None:
    """Put a LoRA on a pipeline. Raises ``RequestError`` unless every module of the file has arrived."""
    from safetensors import SafetensorError, safe_open

    if not hasattr(pipeline, "load_lora_weights"):
        raise RequestError(f"{type(pipeline).__name__} takes no LoRA; leave --lora out.")
    downward = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight")
    try:
        with safe_open(path, "pt") as file:
            wanted = sum(key.endswith(downward) for key in file.keys())  # noqa: SIM118 - it is no dictionary
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="lora")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RequestError(f"{path} does not load into {type(pipeline).__name__}: {error}") from error
    arrived = sum(
        ".lora_A.lora." in name
        for part in pipeline.components.values()
        if hasattr(part, "named_parameters")
        for name, _ in part.named_parameters()
    )
    if not wanted or arrived != wanted:
        raise RequestError(
            f"{path} has {wanted} LoRA modules, of which {arrived} fit {type(pipeline).__name__}: it belongs to "
            "another model, or its layout is not diffusers' or kohya's."
        )


class PythonModel:
    """A function ``FILE.py:NAME``: ``draw(prompts: list[str], seeds: list[int]) -> list[PIL.Image]``.

    A class is made without arguments first, so that it can load its weights. An attribute ``sampling`` (a dictionary)
    stands in the results as the sampling record: a function knows best what decides its pictures.
    """

    notice = ""

    def __init__(self, base: str, specs: Sequence[ModelSpec], dtype: str | None) -> None:
        if specs[0].adapter or dtype:
            raise RequestError(f"{base} is a function: it takes no {'--lora' if specs[0].adapter else '--dtype'}.")
        self.base = base

    def load(self) -> None:
        self.loaded  # noqa: B018  (loads)

    @cached_property
    def loaded(self) -> tuple[Callable[[list[str], list[int]], Sequence[Image.Image]], str]:
        """The function and the sha256 of its file."""
        found, sha256 = load_attribute(self.base)
        draw = found() if inspect.isclass(found) else found
        if not callable(draw):
            raise RequestError(f"{self.base} cannot be called; expected draw(prompts, seeds) -> pictures.")
        return draw, sha256

    def record(self, spec: ModelSpec) -> SamplingRecord:
        """Nothing is known of it, and nothing is passed on."""
        return SamplingRecord(0, 0, 0, 0, 0, 0, sampler="own", dtype="own")

    def cut(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """None: nothing is known of it."""
        return []

    def generator(self, spec: ModelSpec, record: SamplingRecord) -> PythonGenerator:
        """Raises ``RequestError`` for settings that would not reach it."""
        if record != replace(self.record(spec), negative_prompt=record.negative_prompt):
            raise RequestError(f"{self.base} takes no --steps and no --guidance: set them in the function.")
        return PythonGenerator(self, spec)


class PythonGenerator:
    """Draws with a user's function."""

    def __init__(self, model: PythonModel, spec: ModelSpec) -> None:
        self.model, self.spec = model, spec

    def identity(self) -> dict[str, Any]:
        """Name, the file's hash, and what the function says of its sampling."""
        draw, sha256 = self.model.loaded
        sampling = dict(getattr(draw, "sampling", {}))
        return {"model": self.spec.name, "base_sha256": sha256, "adapter_sha256": None, "sampling": sampling}

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        """One RGB picture for each prompt and seed.

        Raises:
            WorkError: the function failed, or what it gave are not that many pictures.
        """
        from PIL import Image

        try:
            pictures = list(self.model.loaded[0]([prompt.prompt for prompt in prompts], list(seeds)))
        except Exception as error:  # whatever a user's function raises
            raise WorkError(f"{self.model.base} failed: {type(error).__name__}: {error}") from error
        wrong = next((type(one).__name__ for one in pictures if not isinstance(one, Image.Image)), None)
        if wrong or len(pictures) != len(prompts):
            raise WorkError(
                f"{self.model.base}: expected {len(prompts)} pictures (PIL.Image), but got "
                f"{f'a {wrong}' if wrong else len(pictures)}."
            )
        return [picture.convert("RGB") for picture in pictures]
