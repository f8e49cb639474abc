"""Student, teachers and anchor on one backbone, and what they say at a state: guided velocities.

The backbone is loaded once. Student, teachers and anchor are rows of one :class:`~flowopd_eval.adapters.AdapterBank`;
only a teacher that is a whole model has a transformer of its own. Text encoders are loaded for as long as embeddings
are missing, and freed.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from torch import Tensor, nn

from flowopd_eval.adapters import Adapter, AdapterBank, fresh_adapter, merge_adapters, read_adapter
from flowopd_eval.download import list_files
from flowopd_eval.errors import RequestError
from flowopd_eval.flow import guided_velocity
from flowopd_eval.models import FAMILIES, fetch_base, folder_sha256, load_adapter, own_record, resolve
from flowopd_eval.pipeline import FlowOPDPipeline
from flowopd_eval.quiet import quiet_libraries
from flowopd_eval.records import SamplingRecord
from training.config import DistillConfig, Lora, NFTConfig, SFTConfig, Teacher, Trained
from training.data import Embeddings, Text

STUDENT, ANCHOR = "student", "anchor"
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass(frozen=True)
class Expert:
    """A frozen policy: a row of the bank (``adapter``; None is the base), or a transformer of its own."""

    name: str
    adapter: str | None
    transformer: nn.Module | None
    guidance: float
    text_length: int
    sha256: str | None


def guided(
    forward: Callable[[Tensor, Tensor, Text], Tensor], x: Tensor, sigma: Tensor, text: Text, empty: Text, scale: float
) -> Tensor:
    """Guided velocity (B, C, H, W) at state ``x`` (B, C, H, W) and noise level ``sigma`` of any model.

    ``sigma`` is () or (B,). ``forward(x, sigma, text)`` is called once, on 2 B rows, the unconditional ones first; on B
    rows where ``scale`` is 1. ``text`` and ``empty`` are the embeddings of the prompts and of the negative prompt, B
    rows each.
    """
    if scale == 1:
        return forward(x, sigma, text).float()
    both = Text(torch.cat([empty.states, text.states]), torch.cat([empty.pooled, text.pooled]))
    levels = torch.cat([sigma, sigma]) if sigma.ndim else sigma
    uncond, cond = forward(torch.cat([x, x]), levels, both).chunk(2)
    return guided_velocity(uncond, cond, scale)


def transformer_inputs(x: Tensor, sigma: Tensor, text: Text) -> dict[str, Any]:
    """The arguments of an SD3 transformer's forward; ``sigma`` () or (B,)."""
    return {
        "hidden_states": x.to(text.states.dtype),
        "timestep": (sigma * 1000).expand(len(x)),
        "encoder_hidden_states": text.states,
        "pooled_projections": text.pooled,
        "return_dict": False,
    }


class Conditions:
    """A batch's prompts, with the embeddings on the device once they have been asked for.

    ``conditions[rows]`` are those of some rows, in any order, also several times.
    """

    def __init__(self, policies: Policies, prompts: list[str]) -> None:
        self.policies, self.prompts = policies, prompts
        self._pairs: dict[int, tuple[Text, Text]] = {}
        self._parts: dict[tuple[int, ...], Conditions] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Sequence[int]) -> Conditions:
        if list(rows) == list(range(len(self))):
            return self
        key = tuple(rows)
        if key not in self._parts:
            if len(self._parts) > 1:  # not one for each step of a window
                self._parts.clear()
            chosen = Conditions(self.policies, [self.prompts[row] for row in rows])
            chosen._pairs = {length: (text[rows], empty[rows]) for length, (text, empty) in self._pairs.items()}
            self._parts[key] = chosen
        return self._parts[key]

    def at(self, length: int) -> tuple[Text, Text]:
        """Embeddings of the prompts and, as many times, of the negative prompt, at T5 length ``length``."""
        if length not in self._pairs:
            p = self.policies
            negative = [p.record.negative_prompt] * len(self)
            text, empty = (p.embeddings(texts, length, p.device, p.dtype) for texts in (self.prompts, negative))
            self._pairs[length] = (text, empty)
        return self._pairs[length]


class Policies:
    """The student being trained and the frozen experts it is compared with.

    ``model`` is what is trained, the bank or what accelerate made of it; it is called for forwards with gradients.
    """

    def __init__(self, config: Trained, device: torch.device) -> None:
        """Load the backbone and every expert of a recipe.

        Raises:
            RequestError: a base that is an adapted model, an adapter that is incomplete or does not fit.
        """
        spec = resolve(config.base)
        if spec.adapter:
            raise RequestError(
                f"base = {config.base!r} has an adapter; the backbone is {spec.name.split(':')[0]}:base."
            )
        self.folder = fetch_base(spec.base)
        self.sha256 = folder_sha256(self.folder)
        self.name, self.record, self.base_source = spec.name, spec.record, spec.base
        self.guidance = guidance_of(config, spec.record)
        dtype = config.dtype or spec.record.dtype
        if dtype == "float16":
            raise RequestError(f"The record of {config.base} says float16, which nothing is trained in; set `dtype`.")
        self.device, self.dtype = device, getattr(torch, dtype)
        self.pipeline = _load(self.folder, self.record, self.dtype, dict.fromkeys(_ENCODERS)).to(device)
        self.transformer: SD3Transformer2DModel = self.pipeline.transformer
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.transformer.eval()
        wanted: dict[str, Teacher] = dict(config.teachers)
        if isinstance(config, DistillConfig) and config.pull is not None:
            wanted[ANCHOR] = config.pull
        adapters = {name: adapter for name, t in wanted.items() if (adapter := adapter_of(t.source)) is not None}
        student = start_adapter(config.start, self.transformer, config.lora, config.seed, adapters)
        self.bank = AdapterBank(
            self.transformer, {STUDENT: student, **adapters}, trainable={STUDENT: config.lora.scale}
        ).to(device)
        store(self.transformer, config, self.dtype)
        self.model: nn.Module = self.bank
        self.experts = {name: self._expert(name, teacher, adapters.get(name)) for name, teacher in wanted.items()}
        self.base = Expert("base", None, None, self.record.guidance, self.record.text_length, None)
        self.embeddings = Embeddings(Path(config.cache), self._encoders_sha256(), self._encode)

    def _expert(self, name: str, teacher: Teacher, adapter: Adapter | None) -> Expert:
        own = teacher_record(teacher, self.record)
        guidance, length = own.guidance, own.text_length
        if adapter is not None:
            return Expert(name, name, None, guidance, length, adapter.sha256)
        source = "" if teacher.source == "base" else resolve(teacher.source).base
        if source in ("", self.base_source):
            return Expert(name, None, None, guidance, length, self.sha256)
        folder = fetch_base(source)
        whole = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=self.dtype)
        whole = whole.to(self.device).eval().requires_grad_(False)
        size = sum(p.numel() * p.element_size() for p in whole.parameters()) / 1e9
        print(f"Teacher {name!r} is a whole model: {size:.2f} GB beside the backbone.", file=sys.stderr)
        return Expert(name, None, whole, guidance, length, folder_sha256(folder / "transformer"))

    # --- text --------------------------------------------------------------------------------------------------------
    def _encoders_sha256(self) -> str:
        import hashlib

        parts = [f"{name} {folder_sha256(self.folder / name)}" for name in _ENCODERS if (self.folder / name).is_dir()]
        return hashlib.sha256("\n".join([*parts, str(self.dtype)]).encode()).hexdigest()

    def prepare_text(self, prompts: Sequence[str]) -> None:
        """Have the embeddings of ``prompts`` and of the negative prompt ready at every length an expert needs."""
        self._encoders: FlowOPDPipeline | None = None
        for length in {self.record.text_length, *(e.text_length for e in self.experts.values())}:
            self.embeddings.prepare([self.record.negative_prompt, *prompts], length)
        if self._encoders is None:
            return
        self._encoders = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _encode(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        if self._encoders is None:
            # Diffusers asks the transformer for the width of T5's states, even where there is no T5.
            given = {"transformer": self.transformer, "vae": None}
            self._encoders = _load(self.folder, self.record, self.dtype, given).to(self.device)
        with torch.no_grad():
            states, _, pooled, _ = self._encoders.encode_prompt(
                texts, None, None, do_classifier_free_guidance=False, max_sequence_length=length, device=self.device
            )
        return states, pooled

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """A batch's prompts as the policies take them."""
        return Conditions(self, list(prompts))

    # --- velocities --------------------------------------------------------------------------------------------------
    def student(self, x: Tensor, sigma: Tensor, conditions: Conditions, guidance: float) -> Tensor:
        """The student's guided velocity (B, C, H, W), with gradients where they are enabled.

        A forward that no gradient follows goes past the wrapper that would synchronise it with other processes.
        """
        model = self.model if torch.is_grad_enabled() else self.bank

        def forward(x: Tensor, sigma: Tensor, text: Text) -> Tensor:
            return model(STUDENT, **transformer_inputs(x, sigma, text))[0]

        return guided(forward, x, sigma, *conditions.at(self.record.text_length), guidance)

    def student_velocity(self, x: Tensor, sigma: Tensor, text: Text) -> Tensor:
        """The student's velocity without guidance, for embeddings at hand; ``sigma`` () or (B,)."""
        return self.model(STUDENT, **transformer_inputs(x, sigma, text))[0]

    @torch.no_grad()
    def frozen(self, experts: Sequence[Expert], x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Guided velocities of frozen policies, (n, C, H, W): row i is ``experts[i]`` at ``x[i]`` and row i's prompt.

        One pass for all rows that share transformer, text length and guidance, whoever their expert is.
        """
        passes: dict[tuple[int, int, float], list[int]] = {}
        for row, expert in enumerate(experts):
            passes.setdefault((id(expert.transformer), expert.text_length, expert.guidance), []).append(row)
        if len(passes) == 1:  # all rows, in order: nothing to pick
            return self._pass(experts, x, sigma, conditions)
        velocity = torch.empty(x.shape, device=x.device)
        for rows in passes.values():
            velocity[rows] = self._pass([experts[row] for row in rows], x[rows], sigma, conditions[rows])
        return velocity

    def _pass(self, experts: Sequence[Expert], x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        text, empty = conditions.at(experts[0].text_length)
        return guided(self._forward(experts), x, sigma, text, empty, experts[0].guidance)

    def _forward(self, experts: Sequence[Expert]) -> Callable[[Tensor, Tensor, Text], Tensor]:
        whole = experts[0].transformer
        if whole is not None:
            return lambda x, sigma, text: whole(**transformer_inputs(x, sigma, text))[0]

        def forward(x: Tensor, sigma: Tensor, text: Text) -> Tensor:
            with self.bank.use([expert.adapter for expert in experts]):
                return self.transformer(**transformer_inputs(x, sigma, text))[0]

        return forward

    # --- pictures ----------------------------------------------------------------------------------------------------
    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.pipeline.latent_shape(self.record.height, self.record.width)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents (B, C, H, W)."""
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return self.pipeline.image_processor.postprocess(vae.decode(latents, return_dict=False)[0], output_type="pil")


def store(transformer: SD3Transformer2DModel, config: Trained, dtype: torch.dtype) -> None:
    """Store the backbone as the recipe says; to be called once its adapters are on it."""
    if config.storage == "float8":
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)


def guidance_of(config: Trained, record: SamplingRecord) -> float:
    """The scale the student is drawn and trained with: the recipe's, else the record's."""
    if isinstance(config, NFTConfig):
        return config.guidance
    return record.guidance if isinstance(config, SFTConfig) else config.rollout.guidance or record.guidance


def teacher_record(teacher: Teacher, record: SamplingRecord) -> SamplingRecord:
    """What a teacher teaches with (guidance, T5 tokens): the recipe's, else its own record's, else the base's record's.

    A published teacher is asked for its record only where the recipe leaves one of the two open.
    """
    said = {name: value for name in ("guidance", "text_length") if (value := getattr(teacher, name)) is not None}
    own = record if len(said) == 2 else own_record(teacher.source) or record
    return replace(own, **said)


def _load(folder: Path, record: SamplingRecord, dtype: torch.dtype, parts: Mapping[str, Any]) -> FlowOPDPipeline:
    with quiet_libraries():
        pipeline = FlowOPDPipeline.from_pretrained(folder, record=record, dtype=dtype, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def adapter_of(source: str) -> Adapter | None:
    """The adapter a teacher is; None for the base and for a whole model."""
    if source == "base":
        return None
    if source.partition(":")[0] in FAMILIES:
        named = resolve(source).adapter
        return load_adapter(named) if named else None
    if source.startswith("hub:"):
        whole = any(name.startswith("transformer/") for name in list_files(source))
    else:
        whole = (Path(source) / "transformer").is_dir()
    return None if whole else read_adapter(source)


def start_adapter(start: str, transformer: nn.Module, lora: Lora, seed: int, teachers: dict[str, Adapter]) -> Adapter:
    """What the student is before its first step: fresh, the exact mean of the teachers, or an adapter from disk.

    Raises:
        RequestError: a merge without adapters to merge, or an adapter that cannot be read.
    """
    if start == "none":
        return fresh_adapter(transformer, lora.target_modules, lora.rank, torch.Generator().manual_seed(seed))
    if start != "merge":
        adapter = adapter_of(start)
        if adapter is None:
            raise RequestError(f"start = {start!r} is no adapter; use none, merge, or an adapter's folder.")
        if adapter.rank != lora.rank:
            raise RequestError(
                f"start = {start!r} has rank {adapter.rank}; set lora.rank = {adapter.rank} (now {lora.rank})."
            )
        return adapter
    experts = {name: adapter for name, adapter in teachers.items() if name != ANCHOR}
    if not experts:
        raise RequestError("start = 'merge' merges the teachers' adapters, but none of the teachers is an adapter.")
    merged, report = merge_adapters([(a, 1 / len(experts)) for a in experts.values()], lora.rank)
    print(f"Start: mean of {', '.join(experts)}, {report.discarded_energy:.1%} of it cut off.", file=sys.stderr)
    return merged
