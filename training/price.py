"""What a recipe would cost, before anything is loaded: memory by part and moment, forwards, FLOPs, device time.

Backbone, adapters, encoders and autoencoder are built on torch's meta device, from their configurations alone: shapes
without values. One micro batch then goes forward and backward through the code that trains
(:class:`training.policies.Policies`), while :class:`Meter` counts the bytes of every storage alive and the FLOPs of
every operation.

What is assumed: one process on one device; attention by a kernel that never stores the scores (flash, or memory
efficient where the head is too wide for flash); an expert that is not on this machine is an adapter of the student's
rank, on the student's layers. What is not counted: the device's context (about half a GB on CUDA), workspaces of its
libraries, the allocator's fragmentation, a second process's gradient buckets; and, of the work, text encoding, rewards
and the optimiser.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from flowopd_eval.adapters import AdapterBank, fresh_adapter
from flowopd_eval.errors import RequestError
from flowopd_eval.models import FAMILIES, resolve
from flowopd_eval.quiet import quiet_libraries
from flowopd_eval.records import Prompt, SamplingRecord
from training import objectives
from training.architecture import Architecture, architecture, build, text_encoder
from training.config import Config, DistillConfig, GRPOConfig, NFTConfig, Rollout, SFTConfig, Task, Teacher, Trained
from training.data import Embeddings, Mixture, Sample, Text, task_prompts
from training.meter import Meter, device_attention
from training.policies import (
    ANCHOR,
    STUDENT,
    Expert,
    Policies,
    guidance_of,
    store,
    teacher_record,
)
from training.rollout import Schedule, inclusion

# Effective TFLOP/s of a training step, by the recipe's precision. Assumed, not measured.
SPEEDS: Mapping[str, Mapping[str, float]] = {
    "bfloat16": {"RTX 4090": 80, "A100": 150, "H100/H200": 350},
    "float32": {"two CPU cores": 0.08},
}
ENCODED_AT_ONCE = 32  # the default of Embeddings.prepare


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _tensors(*modules: nn.Module) -> list[Tensor]:
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]


# --- measuring -------------------------------------------------------------------------------------------------------
class _NoEmbeddings(Embeddings):
    """Embeddings of the right shape for any text."""

    def __init__(self, base: Architecture) -> None:
        self.base = base

    def __call__(self, texts: Sequence[str], length: int, device: torch.device | str, dtype: torch.dtype) -> Text:
        shape = self.base.transformer
        return Text(
            torch.empty(len(texts), self.base.tokens(length), shape["joint_attention_dim"], device=device, dtype=dtype),
            torch.empty(len(texts), shape["pooled_projection_dim"], device=device, dtype=dtype),
        )


class Weightless(Policies):
    """The policies of a recipe without their values: what :class:`Policies` says at a state, for its cost alone."""

    def __init__(self, config: Trained, base: Architecture) -> None:
        self.record, self.device = base.record, torch.device("meta")
        self.guidance = guidance_of(config, base.record)
        self.dtype = getattr(torch, config.dtype or base.record.dtype)
        self.shape = base.latent_shape
        self.transformer = self._transformer(base)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        wanted: dict[str, Teacher] = dict(config.teachers)
        if isinstance(config, DistillConfig) and config.pull is not None:
            wanted[ANCHOR] = config.pull
        ranks = {
            name: adapter_rank(t.source, config.lora.rank, resolve(config.base).base) for name, t in wanted.items()
        }
        own = None if config.start in ("none", "merge") else adapter_rank(config.start, config.lora.rank)
        ranks[STUDENT] = own or config.lora.rank
        with torch.device("meta"):
            of_rank = {
                rank: fresh_adapter(self.transformer, config.lora.target_modules, rank)
                for rank in set(ranks.values())
                if rank
            }
        adapters = {name: of_rank[rank] for name, rank in ranks.items() if rank}
        self.bank = AdapterBank(self.transformer, adapters, trainable={STUDENT: config.lora.scale})
        store(self.transformer, config, self.dtype)
        self.model = self.bank
        self.experts = {name: self._weightless(name, teacher, ranks[name], base) for name, teacher in wanted.items()}
        self.base = Expert("base", None, None, base.record.guidance, base.record.text_length, None)
        self.embeddings = _NoEmbeddings(base)

    def _weightless(self, name: str, teacher: Teacher, rank: int | None, base: Architecture) -> Expert:
        own, whole = teacher_record(teacher, base.record), self._transformer(base) if rank == 0 else None
        return Expert(name, name if rank else None, whole, own.guidance, own.text_length, None)

    def _transformer(self, base: Architecture) -> SD3Transformer2DModel:
        return build(SD3Transformer2DModel.from_config, base.transformer, self.dtype)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.shape

    @property
    def wholes(self) -> dict[str, nn.Module]:
        """Experts that are a transformer of their own."""
        return {name: expert.transformer for name, expert in self.experts.items() if expert.transformer is not None}


def adapter_rank(source: str, unknown: int, base: str = "") -> int | None:
    """Rank of the adapter that ``source`` is, 0 for a whole model, ``unknown`` for what is not here.

    None stands for the backbone itself, whose own source is ``base``.

    As :func:`training.policies.adapter_of` decides, but from names and configurations alone.
    """
    if source == "base":
        return None
    if source.partition(":")[0] in FAMILIES:
        spec = resolve(source)
        if spec.adapter:
            return adapter_rank(spec.adapter, unknown)
        return None if spec.base == base else 0
    if (Path(source) / "transformer").is_dir():
        return 0
    described = Path(source) / "adapter_config.json"
    return int(json.loads(described.read_text())["r"]) if described.is_file() else unknown


@dataclass(frozen=True)
class MicroBatch:
    """One trained micro batch: bytes its forward leaves for the backward, bytes at most, FLOPs of a row either way."""

    activations: int
    peak: int
    forward_flops: float
    backward_flops: float


def measure(config: Trained, policies: Weightless) -> MicroBatch:
    """Send one trained micro batch through the policies, as the stage would; guidance doubles its rows.

    With a window, a micro batch's samples are trained on different steps; here, for the most it can take, on one.
    """
    parameters = list(policies.bank.parameters())
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)  # there since the first micro batch
    resident = [*_tensors(policies.transformer, policies.bank, *policies.wholes.values())]
    meter = Meter([*resident, *(p.grad for p in parameters if p.grad is not None)])
    samples = _mixed_samples(config)
    with device_attention(), meter:
        conditions = policies.conditions([sample.prompt.prompt for sample in samples])
        x = torch.empty(len(samples), *policies.latent_shape, device="meta")
        ours, rows = _trained_forward(config, policies, x, conditions)
        activations, forward = meter.live, meter.flops
        loss = _loss(config, policies, x, ours, conditions, samples)
        before = meter.flops
        torch.autograd.backward(loss)
    again = forward if config.gradient_checkpointing else 0
    return MicroBatch(activations, meter.peak, forward / rows, (meter.flops - before - again) / rows)


def _trained_forward(config: Trained, policies: Policies, x: Tensor, conditions: Any) -> tuple[Tensor, int]:
    """The student's forward with gradients, and how many rows it has."""
    if isinstance(config, SFTConfig):
        text, _ = conditions.at(policies.record.text_length)
        return policies.student_velocity(x, torch.empty(len(x), device=x.device), text), len(x)
    guidance = policies.guidance
    sigma = torch.empty((), device=x.device)
    return policies.student(x, sigma, conditions, guidance), len(x) * _rows(guidance)


def _loss(
    config: Trained, policies: Policies, x: Tensor, ours: Tensor, conditions: Any, samples: Sequence[Sample]
) -> Tensor:
    """A loss with the frozen passes of the stage, made while the student's activations are held."""
    experts: list[Expert] = []
    if isinstance(config, DistillConfig):  # with the anchor on every row, which is the most there is
        experts = [policies.experts[str(sample.task.teacher)] for sample in samples]
        experts += [policies.experts[ANCHOR]] * len(samples) if config.pull else []
    elif isinstance(config, GRPOConfig) and config.beta:
        experts = [replace(policies.base, guidance=policies.guidance)] * len(samples)
    if not experts:
        return ours.float().square().mean()
    copies = len(experts) // len(x)
    rows = list(range(len(x))) * copies
    frozen = policies.frozen(experts, x.repeat(copies, 1, 1, 1), torch.empty((), device=x.device), conditions[rows])
    weight = torch.empty((), device=x.device)
    kls = [objectives.distillation(ours, part, weight) for part in frozen.chunk(copies)]
    return torch.stack(kls).sum()


def _mixed_samples(config: Trained) -> Sequence[Sample]:
    """That micro batch of the first batch whose samples have the most different teachers."""
    blank = {task.name: [Prompt("", "", task.name)] for task in config.tasks}
    samples = Mixture(config.tasks, blank, config.batch_size, config.group, config.seed).samples(0)
    size = config.micro_batch
    micros = [samples[start : start + size] for start in range(0, len(samples), size)]
    return max(micros, key=lambda micro: len({sample.task.teacher for sample in micro}))


def decoding(vae: nn.Module, pictures: int, latent_shape: Sequence[int], dtype: torch.dtype) -> Meter:
    """What decoding so many pictures at once needs beyond the VAE's weights."""
    with device_attention(), torch.no_grad(), Meter(_tensors(vae)) as meter:
        vae.decode(torch.empty(pictures, *latent_shape, device="meta", dtype=dtype), return_dict=False)  # type: ignore[operator]
    return meter


def encoding(encoder: nn.Module, tokens: int) -> int:
    """Bytes that encoding one batch of prompts of so many tokens needs beyond the encoder's weights."""
    with device_attention(), torch.no_grad(), Meter(_tensors(encoder)) as meter:
        ids = torch.empty(ENCODED_AT_ONCE, tokens, device="meta", dtype=torch.long)
        encoder(ids, output_hidden_states=hasattr(encoder, "text_projection"))  # of CLIP, a hidden layer is used
    return meter.peak


# --- work ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Work:
    """Rows through the transformer a sample: forward, backward, and forward once more for gradient checkpointing."""

    name: str
    forward: float
    backward: float = 0.0
    recomputed: float = 0.0

    @property
    def equivalents(self) -> float:
        """Forward-equivalents: the backward of a LoRA costs about one forward, since no base weight has a gradient."""
        return self.forward + self.backward + self.recomputed


def _rows(guidance: float) -> int:
    """Rows of one guided velocity."""
    return 1 if guidance == 1 else 2


def trained_steps(rollout: Rollout, possible: Sequence[bool]) -> float:
    """Expected number of trained steps a sample: those of its window that are ``possible``."""
    reached = inclusion(rollout.trainable, rollout.window, rollout.bounds)
    return sum(share for share, ok in zip(reached, possible, strict=False) if ok)


def work(config: Trained, record: SamplingRecord) -> tuple[Work, ...]:
    """The transformer's work for one sample of ``config``, on average."""
    shares = sum(task.share for task in config.tasks)
    guidances = {name: teacher_record(t, record).guidance for name, t in config.teachers.items()}
    # Without a teacher (GRPO may have none) nothing is taught.
    taught = sum(t.share / shares * _rows(guidances[t.teacher]) for t in config.tasks if t.teacher in guidances)
    if isinstance(config, DistillConfig):
        parts = _distillation_work(config, record, taught)
    elif isinstance(config, GRPOConfig):
        parts = _grpo_work(config, record)
    elif isinstance(config, NFTConfig):
        parts = _nft_work(config)
    else:
        parts = [_with_backward("student, trained", 1, config), _sft_pictures(config, taught)]
    return (*parts, *_strips(config, record, taught))


def _with_backward(name: str, rows: float, config: Trained, drawn: float | None = None) -> Work:
    """``rows`` with forward and backward; ``drawn`` forwards where there are more of those."""
    return Work(name, rows if drawn is None else drawn, rows, rows if config.gradient_checkpointing else 0.0)


def _distillation_work(config: DistillConfig, record: SamplingRecord, taught: float) -> list[Work]:
    r = config.rollout
    schedule = Schedule.of(r.steps, record.shift, r.sampler, r.a)
    trained = trained_steps(r, (schedule.kl_weights(config.kl_weight) > 0).tolist())
    rows = _rows(guidance_of(config, record))
    parts = [_with_backward("student, drawing and trained", trained * rows, config, r.steps * rows)]
    parts.append(Work("teachers", trained * taught))
    anchored = _rows(teacher_record(config.pull, record).guidance) / config.pull.every if config.pull else 0.0
    if config.pull:
        parts.append(Work("anchor", trained * anchored))
    if config.objective == "policy_gradient":
        parts.append(Work("teachers and anchor, for the reward-to-go", r.steps * (taught + anchored)))
        parts.append(_with_backward("student, trained on its actions", sum(schedule.stochastic) * rows, config))
    return parts


def _grpo_work(config: GRPOConfig, record: SamplingRecord) -> list[Work]:
    r = config.rollout
    rows = _rows(guidance_of(config, record))
    trained = trained_steps(r, Schedule.of(r.steps, record.shift, r.sampler, r.a).stochastic)
    parts = [Work("student, drawing", r.steps * rows), _with_backward("student, trained", trained * rows, config)]
    return [*parts, Work("base", trained * rows)] if config.beta else parts


def _nft_work(config: NFTConfig) -> list[Work]:
    rows = _rows(config.guidance)
    parts = [
        Work("student, drawing", config.picture_steps * rows),
        Work("student, before the updates", config.updates * rows),
        _with_backward("student, trained", config.updates * rows, config),
    ]
    return [*parts, Work("base", config.updates * rows)] if config.base_weight else parts


def _sft_pictures(config: SFTConfig, taught: float) -> Work:
    samples = config.steps * config.batch_size
    # A picture is drawn when first asked for, together with its block.
    drawn = min(config.pictures, samples * config.micro_batch)
    return Work("teachers, drawing the pictures", drawn * config.best_of * config.picture_steps * taught / samples)


def _strips(config: Trained, record: SamplingRecord, taught: float) -> list[Work]:
    if not config.strip_every:
        return []
    strips = math.ceil(config.steps / config.strip_every)
    arms = (
        _rows(record.guidance)
        + _rows(guidance_of(config, record))
        + (taught if all(task.teacher for task in config.tasks) else 0)
    )
    rows = strips * config.strip_prompts * record.steps * arms
    return [Work("strips of pictures", rows / (config.steps * config.batch_size))]


# --- the price -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Moment:
    """What is on the device at one moment of a run, in bytes by part."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Price:
    """What a recipe costs on one device.

    ``moments`` are in bytes; ``works`` in rows a sample; ``micro_batch`` has the FLOPs of a row, ``decoding_flops`` is
    of one picture (0 where none is drawn in training); ``embeddings`` are the host's bytes for ``prompts`` prompts.
    """

    config: Trained
    dtype: str
    moments: tuple[Moment, ...]
    works: tuple[Work, ...]
    micro_batch: MicroBatch
    decoding_flops: float
    prompts: int
    embeddings: int

    @property
    def peak(self) -> Moment:
        """The moment at which most is on the device."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def samples(self) -> int:
        """Samples of all batches: trajectories, or for SFT noised pictures."""
        return self.config.steps * self.config.batch_size

    @property
    def optimiser_steps(self) -> int:
        """Updates of the weights."""
        return self.config.optimizer_steps

    @property
    def forward_rows(self) -> float:
        """Rows that the transformer's own forward sees, of one sample."""
        return sum(part.forward for part in self.works)

    @property
    def equivalents(self) -> float:
        """Forward-equivalents of one sample."""
        return sum(part.equivalents for part in self.works)

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        m = self.micro_batch
        rows = sum((w.forward + w.recomputed) * m.forward_flops + w.backward * m.backward_flops for w in self.works)
        return self.samples * (rows + self.decoding_flops)

    def seconds(self, tflops: float) -> float:
        """Device time at an effective speed of ``tflops`` TFLOP/s."""
        return self.flops / (tflops * 1e12)


def price(config: Trained) -> Price:
    """The price of a recipe that trains an adapter.

    Raises:
        RequestError: a base whose shapes are not known here, or target modules that it does not have.
    """
    base = architecture(config.base)
    with quiet_libraries():
        policies = Weightless(config, base)
        vae = build(AutoencoderKL.from_config, base.vae, policies.dtype)
        encoders = {name: build(text_encoder, values, policies.dtype) for name, values in base.encoders.items()}
        micro = measure(config, policies)
        judged = config.micro_batch if isinstance(config, GRPOConfig | NFTConfig) else 0
        pictures = max(judged, config.strip_prompts if config.strip_every else 0)  # decoded at once
        decoded = decoding(vae, pictures, base.latent_shape, policies.dtype) if pictures else Meter()
        lengths = {base.record.text_length, *(expert.text_length for expert in policies.experts.values())}
        encoded = max(encoding(model, base.tokens_of(name, max(lengths))) for name, model in encoders.items())
    master = _bytes(policies.bank.parameters())
    resident = _resident(policies, vae)
    training = resident | {"AdamW's two averages": 2 * master}
    kept = _trajectories(config, policies)
    of_step = {"gradients": master, "trajectories": kept, "activations": micro.activations}
    of_encoding = {f"{name}, freed afterwards": _bytes(_tensors(model)) for name, model in encoders.items()}
    moments = [
        Moment("prompts", resident | of_encoding | {"transient": encoded}),
        Moment("training", training | of_step | {"transient": micro.peak - micro.activations}),
    ]
    if pictures:
        of_drawing = {"trajectories": kept} if judged else {}
        moments.append(Moment("pictures", training | of_drawing | {"transient": decoded.peak}))
    prompts = _distinct_prompts(config)
    return Price(
        config=config,
        dtype=str(policies.dtype).removeprefix("torch."),
        moments=tuple(moments),
        works=work(config, base.record),
        micro_batch=micro,
        decoding_flops=decoded.flops / pictures if judged else 0.0,
        prompts=prompts,
        embeddings=(prompts + 1) * sum(_text_bytes(policies, length) for length in lengths),
    )


def _resident(policies: Weightless, vae: nn.Module) -> dict[str, int]:
    """Bytes of what stays on the device from the start to the end."""
    bank = policies.bank
    stack = _bytes(bank.buffers())
    frozen = [name for name in bank.names if name != STUDENT]
    row = stack // (len(frozen) + 1)  # ranks are padded to the largest; the last row is the base's, zero
    return {
        "transformer": _bytes(_tensors(policies.transformer)),
        **{f"teacher {name}, a whole model": _bytes(_tensors(model)) for name, model in policies.wholes.items()},
        "VAE": _bytes(_tensors(vae)),
        **{f"adapter {name}": row for name in frozen},
        "zero adapter, for the base": stack - row * len(frozen),
        "student, fp32": _bytes(bank.parameters()),
        "student's average (EMA)": _bytes(bank.parameters()),
    }


def _text_bytes(policies: Policies, length: int) -> int:
    """Bytes of one prompt's embeddings."""
    text = policies.embeddings([""], length, policies.device, policies.dtype)
    return _bytes([text.states, text.pooled])


def _trajectories(config: Trained, policies: Policies) -> int:
    """Bytes of the trajectories kept until their batch is done: state, velocity and mean of each step, in fp32.

    GRPO keeps those of a whole batch, with the embeddings of prompt and negative prompt, until it is judged.
    """
    if isinstance(config, SFTConfig):
        return 0
    latent = 4 * math.prod(policies.latent_shape)
    texts = 2 * _text_bytes(policies, policies.record.text_length)
    if isinstance(config, NFTConfig):  # the picture, and of every update state, target, the old and the base's velocity
        return config.batch_size * (latent * (1 + (3 + bool(config.base_weight)) * config.updates) + texts)
    steps = config.rollout.steps
    if isinstance(config, DistillConfig):
        return config.micro_batch * latent * (3 * steps + 1)
    kept = config.rollout.window or steps
    return config.batch_size * (latent * (3 * kept + 1) + texts)


def _distinct_prompts(config: Trained) -> int:
    """Prompts to encode, at most: those that are drawn, and no more than there are."""
    samples = config.pictures if isinstance(config, SFTConfig) else config.steps * config.batch_size
    drawn = samples / config.group
    shares = sum(task.share for task in config.tasks)
    return sum(min(math.ceil(drawn * task.share / shares), _available(task)) for task in config.tasks)


def _available(task: Task) -> int:
    try:
        return len(task_prompts(task).training)
    except (RequestError, OSError):
        return sys.maxsize  # the file is not here yet


# --- printing --------------------------------------------------------------------------------------------------------
def print_price(config: Config, speed: float | None = None) -> None:
    """Print what a recipe would cost: memory, then work; ``speed`` in effective TFLOP/s replaces the assumed ones.

    Raises:
        RequestError: as :func:`price`.
    """
    if not isinstance(config, Trained):
        print(f"Stage {config.stage!r} trains no adapter on a frozen backbone: there is nothing to price.")
        return
    if isinstance(config, DistillConfig) and config.parameters == "full":
        print("parameters = 'full': the memory of weights and optimiser is said when the run starts; no price before.")
        return
    found = price(config)
    console = Console()
    for part in (_memory_table(found), _memory_words(found), _work_table(found), _work_words(found, speed)):
        console.print(part, markup=False, highlight=False)


def _memory_table(found: Price) -> Table:
    table = Table(title=f"Memory in GB, micro batch {found.config.micro_batch}, {found.dtype}", title_justify="left")
    table.add_column("part")
    for moment in found.moments:
        table.add_column(moment.name, justify="right")
    for part in dict.fromkeys(part for moment in found.moments for part in moment.parts):
        values = [moment.parts.get(part, 0) for moment in found.moments]
        if any(values):
            table.add_row(part, *(_gb(value) if value else "" for value in values))
    table.add_section()
    table.add_row("in all", *(_gb(moment.total) for moment in found.moments), style="bold")
    return table


def _gb(count: float) -> str:
    return f"{count / 1e9:.3f}" if count < 1e9 else f"{count / 1e9:.2f}"


def _memory_words(found: Price) -> str:
    checkpointing = found.config.gradient_checkpointing
    return (
        f"Peak: {_gb(found.peak.total)} GB ({found.peak.name}), {'with' if checkpointing else 'without'} gradient "
        f"checkpointing; --set gradient_checkpointing={str(not checkpointing).lower()} prices the other.\n"
        "Text encoders are loaded only where embeddings are missing, and freed before training.\n"
        f"Embeddings of up to {found.prompts} prompts: {_gb(found.embeddings)} GB on the disk.\n"
        "Assumed: one process, attention without stored scores, experts not on this machine like the student.\n"
        "Not counted: the device's context (about 0.5 GB on CUDA), workspaces, fragmentation.\n"
    )


def _work_table(found: Price) -> Table:
    table = Table(title="Work, in rows through the transformer a sample", title_justify="left")
    table.add_column("part")
    for name in ("forward", "backward", "recomputed", "in all"):
        table.add_column(name, justify="right")
    for part in found.works:
        values = (part.forward, part.backward, part.recomputed, part.equivalents)
        table.add_row(part.name, *(f"{value:.4g}" if value else "" for value in values))
    table.add_section()
    table.add_row("forward-equivalents", "", "", "", f"{found.equivalents:.4g}", style="bold")
    return table


def _work_words(found: Price, speed: float | None) -> str:
    m = found.micro_batch
    speeds = {"at the given speed": speed} if speed else SPEEDS[found.dtype]
    assumed = "" if speed else ", assumed"
    times = [f"  {name:18} {duration(found.seconds(s)):>13}  ({s:g} TFLOP/s{assumed})" for name, s in speeds.items()]
    return (
        f"A forward is {flop_count(m.forward_flops)} a row, the backward {m.backward_flops / m.forward_flops:.2f} "
        "of it; guidance doubles the rows.\n"
        f"{found.samples} samples, {found.optimiser_steps} optimiser steps, {found.samples * found.equivalents:.4g} "
        f"forward-equivalents, {flop_count(found.flops)}.\nOn one device, without text encoding and rewards:\n"
        + "\n".join(times)
    )


def flop_count(count: float) -> str:
    """Readable: ``2.25 TFLOP``."""
    units = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
    size, unit = next((u for u in units if count >= u[0]), units[-1])
    return f"{count / size:.3g} {unit}"


def duration(seconds: float) -> str:
    """Readable: ``35 seconds``, ``12.0 minutes``, ``7.3 hours``."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
