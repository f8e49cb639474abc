"""``FlowOPDPipeline``: Stable Diffusion 3 with a student and any number of experts on one backbone."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput

from flowopd_eval.adapters import Adapter, AdapterBank, check_adapter, read_adapter, write_adapter
from flowopd_eval.errors import RequestError
from flowopd_eval.records import SD35_RECORD, SamplingRecord, read_settings, record_of, write_settings

logger = logging.getLogger(__name__)

EXPERTS_FOLDER = "experts"
TextLimit: TypeAlias = tuple[Any, int]  # a tokenizer, and how many of its tokens the text encoder takes


def draw_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Starting noise (B, C, h, w): fp32, on the CPU, each picture from its own generator.

    A picture's noise depends on its seed alone, whatever the batch, the order, the device or the dtype.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class FlowOPDPipeline(StableDiffusion3Pipeline):
    """A :class:`diffusers.StableDiffusion3Pipeline` whose pictures may each be drawn by another expert.

    Everything a diffusers user knows holds: components, callbacks, ``output_type``, ``num_images_per_prompt``, negative
    prompts, offloading. What is added: ``expert=`` and ``seed=`` of a call, :meth:`compare`, and a sampling record that
    supplies the defaults of steps, guidance, size and text length.
    """

    _bank: AdapterBank | None = None
    _record: SamplingRecord | None = None
    _experts: dict[str, Adapter]
    _guidance: dict[str, float]
    _fused: str | None = None

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        base: str | Path,
        *,
        experts: Mapping[str, str | Path | Adapter] | None = None,
        guidance: Mapping[str, float] | None = None,
        record: SamplingRecord | None = None,
        **kwargs: Any,
    ) -> FlowOPDPipeline:
        """Load a backbone and put experts on it.

        Args:
            base: an SD3 repository on the Hub or a folder, as for diffusers; also what :meth:`save_pretrained` wrote.
            experts: name -> LoRA in any layout :func:`flowopd_eval.adapters.read_adapter` knows. A saved pipeline's own
                experts are loaded too; a name given here replaces one of theirs.
            guidance: name -> the guidance scale an expert was made for, where that is not the record's.
            record: the sampling record; None takes the saved pipeline's, or SD3.5-Medium's.
            **kwargs: passed on to diffusers (``dtype``, ``revision``, ``token``, ``text_encoder_3=None``, ...). Without
                ``dtype`` all parts are fp32; left to themselves, text encoders would come as they are stored.

        Raises:
            RequestError: an adapter that does not fit the backbone, or a broken settings file of a saved pipeline.
        """
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = torch.float32
        settings = read_settings(Path(base), str(base))
        stored = record_of(settings, str(base)) if "record" in settings else None
        pipeline = super().from_pretrained(str(base), **{**_absent_encoders(Path(base)), **kwargs})
        saved = {name: Path(base) / EXPERTS_FOLDER / name for name in settings.get("experts", [])}
        pipeline._record = record or stored
        pipeline.add_experts({**saved, **(experts or {})}, {**settings.get("guidance", {}), **(guidance or {})})
        return pipeline

    @property
    def record(self) -> SamplingRecord:
        """The sampling record of this pipeline; its dtype is the transformer's."""
        return replace(self._record or SD35_RECORD, dtype=str(self.transformer.dtype).removeprefix("torch."))

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts on the backbone, in the order in which they were added."""
        return tuple(self._adapters)

    @property
    def _adapters(self) -> dict[str, Adapter]:
        return self.__dict__.setdefault("_experts", {})

    @property
    def _scales(self) -> dict[str, float]:
        return self.__dict__.setdefault("_guidance", {})

    def guidance(self, expert: str | None) -> float:
        """The guidance scale that an expert is drawn with unless a call says otherwise; None is the base."""
        return self.record.guidance if expert is None else self._scales.get(expert, self.record.guidance)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether any picture of the call at hand is guided: their scales may differ."""
        return isinstance(self._guidance_scale, torch.Tensor) or self._guidance_scale > 1

    def add_experts(
        self, experts: Mapping[str, str | Path | Adapter], guidance: Mapping[str, float] | None = None
    ) -> None:
        """Put more experts on the backbone; a name that is there already is replaced.

        ``guidance`` gives the scale that an expert was made for, where that is not the record's.

        Raises:
            RequestError: an adapter that does not fit, or one is fused at the moment.
        """
        if self._fused:
            raise RequestError(f"Expert {self._fused!r} is fused; call `unfuse_expert()` before adding others.")
        if not experts:
            return
        loaded = {name: a if isinstance(a, Adapter) else read_adapter(a) for name, a in experts.items()}
        for adapter in loaded.values():
            check_adapter(adapter, self.transformer)
        self._adapters.update(loaded)
        for name in loaded:
            self._scales.pop(name, None)
        self._scales.update({name: float(scale) for name, scale in (guidance or {}).items() if name in loaded})
        if self._bank is not None:
            self._bank.detach()
        self._bank = AdapterBank(self.transformer, self._adapters)

    def adapter(self, expert: str) -> Adapter:
        """The adapter of an expert, scale baked in."""
        self._check_expert(expert)
        return self._adapters[expert]

    @property
    def text_limits(self) -> list[TextLimit]:
        """Each text encoder's tokenizer, and how many tokens it takes."""
        limits = [(t, t.model_max_length) for t in (self.tokenizer, self.tokenizer_2) if t is not None]
        if self.tokenizer_3 is not None and self.record.text_length:
            limits.append((self.tokenizer_3, self.record.text_length))
        return limits

    def _check_expert(self, expert: str | None) -> None:
        if expert is not None and expert not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise RequestError(f"Unknown expert {expert!r}; this pipeline has: {known} (None draws with the base).")
        if self._fused is not None and expert != self._fused:
            wanted = "the base" if expert is None else repr(expert)
            raise RequestError(f"Expert {self._fused!r} is fused into the backbone; `unfuse_expert()` before {wanted}.")

    def fuse_expert(self, expert: str) -> None:
        """Add an expert to the backbone's weights: no cost a step, and no other expert until :meth:`unfuse_expert`."""
        self._check_expert(expert)
        if self._bank is not None and self._fused is None:
            self._bank.fuse(expert)
            self._fused = expert

    def unfuse_expert(self) -> None:
        """Give the backbone its own weights back, bit for bit."""
        if self._bank is not None and self._fused is not None:
            self._bank.unfuse()
            self._fused = None

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.transformer.config.in_channels)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a picture of ``height`` x ``width`` pixels."""
        factor = int(self.vae_scale_factor)
        return (self.latent_channels, height // factor, width // factor)

    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        expert: str | Sequence[str | None] | None = None,
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> StableDiffusion3PipelineOutput | tuple:
        """Draw pictures.

        Args:
            prompt: as in diffusers, and so are all other arguments; ``num_inference_steps``, ``guidance_scale``,
                ``height``, ``width``, ``max_sequence_length`` and ``negative_prompt`` default to the sampling record.
                A value that differs from the record is drawn as asked, with a warning that names both. Experts made for
                another guidance scale than the record's have theirs as default.
            expert: the expert that draws; None is the base. A sequence gives one for each prompt.
            seed: one seed for each picture (prompts times ``num_images_per_prompt``, in diffusers' order), or the first
                picture's, the following pictures taking the next integers. Excludes ``latents`` and ``generator``.

        Raises:
            RequestError: unknown expert, another expert than the fused one, wrong number of experts or seeds.
        """
        bound = inspect.signature(StableDiffusion3Pipeline.__call__).bind(self, prompt, *args, **kwargs)
        call: dict[str, Any] = {name: value for name, value in bound.arguments.items() if name != "self"}
        prompts = _batch_size(call)
        images = call.get("num_images_per_prompt") or 1
        names = [expert] * prompts if expert is None or isinstance(expert, str) else list(expert)
        if len(names) != prompts:
            raise RequestError(f"Got {len(names)} experts for {prompts} prompts; give one for each, or one for all.")
        for name in set(names):
            self._check_expert(name)
        self._apply_record(call, [self.guidance(name) for name in names for _ in range(images)])
        if seed is not None:
            call["latents"] = self._seeded_latents(seed, prompts * images, call)
        if self._bank is None or self._fused is not None:
            return super().__call__(**call)
        with self._bank.use([name for name in names for _ in range(images)]):
            return super().__call__(**call)

    def compare(
        self,
        prompt: str,
        experts: Sequence[str | None] | None = None,
        *,
        seed: int | Sequence[int] = 0,
        **kwargs: Any,
    ) -> StableDiffusion3PipelineOutput:
        """Draw one prompt with several experts from the same noise, in one batched call.

        Args:
            prompt: the prompt.
            experts: which arms, None being the base; None for all arms, the base first.
            seed: the seed all arms share.
            **kwargs: as for a call.

        Returns: diffusers' output; ``images[i]`` was drawn by ``experts[i]``.
        """
        arms = [None, *self.experts] if experts is None else list(experts)
        if not isinstance(seed, int):
            raise RequestError(f"compare draws one picture an arm and takes one seed, but got {seed!r}.")
        return self([prompt] * len(arms), expert=arms, seed=[seed] * len(arms), **kwargs)

    def _apply_record(self, call: dict[str, Any], scales: Sequence[float]) -> None:
        """Fill in what a call leaves open; ``scales`` are its pictures' own guidance scales."""
        record = self.record
        own, given = sorted(set(scales)), call.get("guidance_scale")
        if given is None:
            call["guidance_scale"] = own[0] if len(own) == 1 else self._column(scales)
        elif own != [given]:
            known = " and ".join(map(str, own))
            _warn_once(f"guidance_scale is {given} here, but {known} in the model's sampling record.")
        defaults = {
            "num_inference_steps": record.steps,
            "height": record.height,
            "width": record.width,
            "max_sequence_length": record.text_length,
            "negative_prompt": record.negative_prompt,
        }
        for name, value in defaults.items():
            if call.get(name) is None:
                if name != "negative_prompt" or call.get("negative_prompt_embeds") is None:
                    call[name] = value
            elif call[name] != value and name != "negative_prompt":
                _warn_once(f"{name} is {call[name]} here, but {value} in the model's sampling record.")
        shift = self.scheduler.config.get("shift")
        if shift != record.shift:
            _warn_once(f"The scheduler's shift is {shift} here, but {record.shift} in the sampling record.")

    def _column(self, scales: Sequence[float]) -> torch.Tensor:
        """One scale a picture, in a form that diffusers multiplies velocities (B, C, h, w) by."""
        place = {"dtype": self.transformer.dtype, "device": self._execution_device}
        return torch.tensor(scales, **place)[:, None, None, None]

    def _seeded_latents(self, seed: int | Sequence[int], pictures: int, call: Mapping[str, Any]) -> torch.Tensor:
        if call.get("latents") is not None or call.get("generator") is not None:
            raise RequestError("`seed` excludes `latents` and `generator`: each of them alone decides the noise.")
        seeds = [seed + i for i in range(pictures)] if isinstance(seed, int) else list(seed)
        if len(seeds) != pictures:
            raise RequestError(f"Got {len(seeds)} seeds for {pictures} pictures; give one for each, or one in all.")
        noise = draw_noise(seeds, self.latent_shape(call["height"], call["width"]))
        return noise.to(device=self._execution_device, dtype=self.transformer.dtype)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the backbone as stock diffusers loads it, each expert (baked) under ``experts/``, and the record.

        Raises:
            RequestError: an expert is fused; the saved base would not be the base.
        """
        if self._fused:
            raise RequestError(f"Expert {self._fused!r} is fused; call `unfuse_expert()` before saving.")
        folder = Path(save_directory)
        super().save_pretrained(str(folder), *args, **kwargs)
        index = folder / "model_index.json"
        content = json.loads(index.read_text())
        content["_class_name"] = StableDiffusion3Pipeline.__name__
        index.write_text(json.dumps(content, indent=2) + "\n")
        for name, adapter in self._adapters.items():
            write_adapter(adapter, folder / EXPERTS_FOLDER / name)
        settings = {"record": asdict(self.record), "experts": list(self.experts), "guidance": self._scales}
        write_settings(folder, settings)


def longer_than_all(text: str, limits: Sequence[TextLimit]) -> bool:
    """Whether ``text`` has more tokens than each tokenizer's number, so that its end is not drawn."""
    size = len(text.encode()) + 2  # no text has more tokens: most need not be split into them
    return bool(limits) and all(
        size > most and len(tokenizer(text, truncation=False, verbose=False).input_ids) > most
        for tokenizer, most in limits
    )


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    logger.warning(message)


def _absent_encoders(folder: Path) -> dict[str, None]:
    """Text encoders a saved pipeline was made without; diffusers wants to be told of each."""
    index = folder / "model_index.json"
    content = json.loads(index.read_text()) if index.is_file() else {}
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    return {name: None for name in names if content.get(name) == [None, None]}


def _batch_size(call: Mapping[str, Any]) -> int:
    prompt = call.get("prompt")
    if prompt is not None:
        return 1 if isinstance(prompt, str) else len(prompt)
    embeds = call.get("prompt_embeds")
    if embeds is None:
        raise RequestError("Give a prompt, or `prompt_embeds` with their pooled counterparts.")
    return int(embeds.shape[0])
