"""Both sides of the distillation benchmarks: training's own stage, and the public loop, on the same samples.

Ours is :class:`training.distill.Distillation` itself; the other side is :mod:`benchmarks.public_loop`. Both get the
same backbone, adapters, prompts and optimiser, and train the same samples on the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.full_size import RandomPolicies, Scale, random_adapters, random_transformer
from benchmarks.public_loop import PublicLoop
from flowopd_eval.errors import RequestError
from flowopd_eval.records import Prompt
from training.config import DistillConfig
from training.data import Mixture
from training.distill import Distillation
from training.loop import Parallel
from training.policies import ANCHOR, STUDENT, Policies
from training.rollout import Step, generators, noise_like

TEACHERS = ("geneval", "ocr", "pickscore", "deqa")
LAMBDA = 0.02
# Cosines that end a benchmark: between the two loops in fp32, and of ours in its own precision at the same states, or
# of a mode. The goal for the latter is 0.999, and what it is, is a figure like the others: rounding to bf16 moves the
# guided velocity of 24 random layers by 6 %, about as much as teacher and student are apart, and the cosine is then
# near 0.9. What is below CLOSE is no rounding any more.
SAME = 0.9999
CLOSE = {"float32": 0.99, "bfloat16": 0.5}


# --- ours ------------------------------------------------------------------------------------------------------------
class Recorded(Distillation):
    """The stage, on its own trajectories (kept in ``states``) or on those given."""

    states: list[Tensor] | None = None
    kept: list[Tensor]

    def _draw(self, samples, velocity) -> Iterator[Step]:  # noqa: ANN001
        if self.states is None:
            self.kept = []
            for step in super()._draw(samples, velocity):
                self.kept.append(step.x)
                yield step
            return
        for i, x in enumerate(self.states):
            v = velocity(i, x)
            yield Step(i, x, v, self.schedule.transition(i, x, v), x)


@dataclass
class Ours:
    """A stage of training's own with its optimiser, updated as :func:`training.loop.train` does."""

    stage: Distillation
    optimizer: torch.optim.Optimizer
    ema: EMAModel

    @classmethod
    def of(cls, config: DistillConfig, policies: Policies, mixture: Mixture, kind: type = Distillation) -> Ours:
        """The stage of a recipe on policies at hand."""
        accelerator = Accelerator(mixed_precision="no", cpu=policies.device.type == "cpu")
        parameters = [p for p in policies.bank.parameters() if p.requires_grad]
        o = config.optimizer
        optimizer = torch.optim.AdamW(
            parameters, lr=o.learning_rate, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
        )
        ema = EMAModel(parameters, decay=o.ema)
        return cls(kind(config, policies, mixture, Parallel(accelerator)), optimizer, ema)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The student's factors."""
        return self.optimizer.param_groups[0]["params"]

    def update(self, step: int = 0) -> None:
        """One update on the samples of ``step``."""
        for means in self.stage.updates(step):
            means.add("grad_norm", nn.utils.clip_grad_norm_(self.parameters, self.stage.config.optimizer.max_grad_norm))
            means.reduce()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.parameters)  # at every update, where recipes have it at every eighth: nothing is timed short

    def gradient(self) -> Tensor:
        """The gradients of all A, then all B, of the bank's modules in their order; they are gone afterwards."""
        for _ in self.stage.updates(0):
            pass
        slots = self.stage.policies.bank.slots
        sides = ([s.trainable_A[0].grad for s in slots], [s.trainable_B[0].grad for s in slots])
        found = torch.cat([grad.flatten() for side in sides for grad in side])  # type: ignore[union-attr]
        self.optimizer.zero_grad(set_to_none=True)
        return found

    @property
    def weights(self) -> list[Tensor]:
        """All that lies on the device before the first step."""
        policies = self.stage.policies
        return [t for m in (policies.transformer, policies.bank) for t in (*m.parameters(), *m.buffers())]


def recipe(scale: Scale, steps: int, batch: int, micro: int, **changes: Any) -> DistillConfig:
    """Four teachers and an anchor at the settings of record, with the public loop's KL weight."""
    rollout = {"steps": steps, "guidance": 4.5, **changes.pop("rollout", {})}
    return DistillConfig.model_validate(
        {
            "stage": "distill", "out": "unused", "base": "flow-opd:base", "steps": 1, "kl_weight": "flow-opd-code",
            "batch_size": batch, "micro_batch": micro, "strip_every": 0, "dtype": scale.dtype,
            "lora": {"rank": scale.rank, "alpha": 2 * scale.rank}, "rollout": rollout,
            "teachers": {name: {"source": f"flow-opd:{name}"} for name in TEACHERS},
            "anchor": {"source": "flow-opd:deqa", "weight": LAMBDA},
            "tasks": [{"name": name, "prompts": "given", "teacher": name} for name in TEACHERS],
            **changes,
        }
    )  # fmt: skip


def mixture_of(config: DistillConfig) -> Mixture:
    """Prompts that stand for the tasks', one a sample."""
    pools = {t.name: [Prompt(f"{t.name}-{n}", f"{t.name} {n}", t.name) for n in range(64)] for t in config.tasks}
    return Mixture(config.tasks, pools, config.batch_size, config.group, config.seed)


# --- both sides ------------------------------------------------------------------------------------------------------
@dataclass
class Sides:
    """Ours and the public loop on the same backbone, adapters and samples."""

    scale: Scale
    device: torch.device
    adapters: dict[str, Any]

    @classmethod
    def random(cls, scale: Scale, device: torch.device) -> Sides:
        """Random weights, drawn on ``device``."""
        shapes = random_transformer(scale.base, torch.device("meta"), torch.float32, seed=0)
        return cls(scale, device, random_adapters(shapes, (STUDENT, *TEACHERS, ANCHOR), scale.rank))

    def copy(self, dtype: torch.dtype) -> nn.Module:
        """The backbone once more: drawn anew, which gives the same weights and spares ten gigabytes' way to a GPU."""
        return random_transformer(self.scale.base, self.device, dtype, seed=0)

    def ours(self, config: DistillConfig, dtype: torch.dtype, kind: type = Distillation) -> Ours:
        """Ours in ``dtype``."""
        policies = RandomPolicies(config, self.scale.base, self.copy(dtype), self.adapters)
        return Ours.of(config, policies, mixture_of(config), kind)

    def public(self, config: DistillConfig, ours: Ours) -> PublicLoop:
        """The public loop with six backbones in fp32, on the schedule of ours."""
        policies, schedule, length = ours.stage.policies, ours.stage.schedule, self.scale.text_length

        def texts(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
            text = policies.embeddings(prompts, length, policies.device, torch.float32)
            return text.states, text.pooled

        return PublicLoop(
            lambda: self.copy(torch.float32),  # type: ignore[arg-type, return-value]
            self.adapters[STUDENT],
            {name: adapter for name, adapter in self.adapters.items() if name != STUDENT},
            texts,
            scale=config.lora.scale,
            sigmas=schedule.sigmas,
            a=schedule.a,
            guidance=policies.guidance,
            anchor_weight=LAMBDA,
            learning_rate=config.optimizer.learning_rate,
        )


def public_update(loop: PublicLoop, ours: Ours, step: int = 0, noise: Any = torch.randn_like) -> None:
    """One update of the public loop on the samples that ours has at ``step``, those of a teacher side by side.

    Its epochs have one task each, so that a micro batch of its own has one teacher.
    """
    samples = sorted(ours.stage.mixture.samples(step), key=lambda sample: str(sample.task.teacher))
    prompts, teachers = [s.prompt.prompt for s in samples], [str(s.task.teacher) for s in samples]
    loop.update(prompts, teachers, ours.stage.policies.latent_shape, ours.stage.config.micro_batch, noise)


def public_gradient(loop: PublicLoop, ours: Ours) -> Tensor:
    """The public loop's gradient, in fp32 throughout, on the samples and the noise that ours has."""
    samples = ours.stage.mixture.samples(0)
    sources = generators([sample.seed for sample in samples])
    half, loop.half = loop.half, False
    scaler, loop.scaler = loop.scaler, torch.amp.GradScaler(enabled=False)
    loop.gradients(
        [s.prompt.prompt for s in samples],
        [str(s.task.teacher) for s in samples],
        ours.stage.policies.latent_shape,
        len(samples),
        lambda x: noise_like(x, sources),
    )
    loop.half, loop.scaler = half, scaler
    found = loop.gradient(ours.stage.policies.bank.modules_covered)
    loop.optimizer.zero_grad(set_to_none=True)
    return found


def parity(sides: Sides, config: DistillConfig, public: PublicLoop) -> dict[str, float]:
    """What must hold before a figure counts: cosines of gradients on one micro batch.

    Raises:
        WorkError: the two loops have other gradients in fp32, or ours in its precision is too far from that.
    """
    small = config.model_copy(update={"batch_size": 2, "micro_batch": 2})
    convolutions, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    reference = sides.ours(small, torch.float32, Recorded)
    exact = reference.gradient()
    theirs = public_gradient(public, reference)
    found = {
        "public loop in fp32": measure.alike("Gradients of ours and of the public loop", theirs, exact, SAME),
        "norm, public / ours": float(theirs.norm() / exact.norm()),
    }
    measure.same("Norms of the gradients", [found["norm, public / ours"]], [1.0], 1e-2)
    kept = reference.stage.kept
    del reference, theirs
    measure.free()
    own = sides.ours(small, getattr(torch, sides.scale.dtype), Recorded)
    own.stage.states = kept
    found[f"ours in {sides.scale.dtype}"] = measure.alike(
        f"Gradient of ours in {sides.scale.dtype} at the same states", own.gradient(), exact, CLOSE[sides.scale.dtype]
    )
    own.stage.states = None
    drifted = torch.nn.functional.cosine_similarity(own.gradient().double(), exact.double(), dim=0)
    found[f"ours in {sides.scale.dtype}, on its own trajectory"] = float(drifted)
    torch.backends.cudnn.allow_tf32 = convolutions
    return found


# --- modes of ours ---------------------------------------------------------------------------------------------------
def _compiled(sides: Sides, config: DistillConfig, dtype: torch.dtype) -> Ours:
    torch._dynamo.config.recompile_limit = 64  # three kinds of blocks, student and mixed rows, with and without grad
    made = sides.ours(config, dtype)
    for block in made.stage.policies.transformer.transformer_blocks:  # type: ignore[union-attr]
        block.compile(dynamic=False)
    return made


def _window(sides: Sides, config: DistillConfig, dtype: torch.dtype) -> Ours:
    window = config.rollout.model_copy(update={"window": max(1, config.rollout.steps // 5)})
    return sides.ours(config.model_copy(update={"rollout": window}), dtype)


def _changed(change: dict[str, Any], sides: Sides, config: DistillConfig, dtype: torch.dtype) -> Ours:
    return sides.ours(config.model_copy(update=change), dtype)


def _sparse_anchor(sides: Sides, config: DistillConfig, dtype: torch.dtype) -> Ours:
    if config.anchor is None:
        raise RequestError("A recipe without an anchor has no sparse one.")
    return _changed({"anchor": config.anchor.model_copy(update={"every": 2})}, sides, config, dtype)


MODES: dict[str, Callable[[Sides, DistillConfig, torch.dtype], Ours]] = {
    "blocks compiled": _compiled,
    "step window": _window,
    "sparse anchor": _sparse_anchor,
    "gradient checkpointing": partial(_changed, {"gradient_checkpointing": True}),
    "fp8 backbone, checkpointing": partial(_changed, {"storage": "float8", "gradient_checkpointing": True}),
}
# Modes with another gradient than ours: of another objective, or on another backbone.
OTHER = ("step window", "sparse anchor", "fp8 backbone, checkpointing")


def trained(config: DistillConfig) -> int:
    """Samples·steps of an update that are trained."""
    return config.batch_size * (config.rollout.window or config.rollout.steps)
