"""The cost of the public training loop of Flow-OPD, made anew: what it holds, what it computes and when it waits.

From github.com/CostaliyA/Flow-OPD (commit 434ab16), ``scripts/train_sd3_opd_mix.py`` with ``reward_mode = "gkd"``:

- one transformer in fp32 for the student and one for every teacher and the anchor, each with its own PEFT adapter;
- the student under fp16 autocast with a gradient scaler, teachers and anchor in fp32 with TF32 products allowed;
- trajectories of the whole batch first, without gradients, every state kept; then a second pass over all steps;
- of every step, the host asks the device which step it is, sample by sample, and for the largest sigma.

In its favour: its pictures are neither decoded nor judged (its loop waits for rewards that this objective does not
use), text embeddings are given, and T5 lies nowhere. Against it, for equal work: the last step, which it leaves out, is
trained as well. Its objective is ``|mean - mean_k|^2 / (2 s^2)`` on each step, the anchor's times lambda, as it stands
there; in this toolkit's terms the KL weight ``flow-opd-code``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from flowopd_eval.adapters import Adapter, Factors
from flowopd_eval.errors import RequestError

Texts = Callable[[Sequence[str]], tuple[Tensor, Tensor]]  # (rows, tokens, width), (rows, pooled)
Noise = Callable[[Tensor], Tensor]


def with_peft(transformer: SD3Transformer2DModel, adapter: Adapter, scale: float, trainable: bool) -> nn.Module:
    """The transformer with one adapter on PEFT's layers; its change is ``scale * B @ A``, as in PEFT's alpha / r."""
    ranks = {factors.rank for factors in adapter.factors.values()}
    if len(ranks) > 1:
        raise RequestError(f"The re-created loop takes adapters of one rank, but got {sorted(ranks)}.")
    config = LoraConfig(
        r=adapter.rank, lora_alpha=scale * adapter.rank, target_modules=sorted(adapter.factors), init_lora_weights=False
    )
    transformer.requires_grad_(False)
    model = get_peft_model(transformer, config)
    state = {}
    for name, factors in adapter.factors.items():
        state[f"base_model.model.{name}.lora_A.weight"] = factors.A
        state[f"base_model.model.{name}.lora_B.weight"] = factors.B / scale
    set_peft_model_state_dict(model, state)
    if not trainable:
        model.requires_grad_(False)
    return model.eval()


@dataclass
class Trajectories:
    """Of one micro batch: states (T + 1) and the conditions they were drawn with."""

    states: list[Tensor]
    text: tuple[Tensor, Tensor]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Products of fp32 matrices in TF32, as the public configuration allows them."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class PublicLoop:
    """Student, teachers and anchor on a backbone each, and updates as the public loop makes them.

    Args:
        make: a new copy of the backbone in fp32 on the device.
        student: its adapter at the start; ``scale`` is alpha / r.
        frozen: the teachers by name, and ``anchor``.
        texts: embeddings of prompts; an empty string is the negative prompt.
        sigmas: (T + 1,) on the device; ``a`` is the noise level.
        guidance: of student, teachers and anchor; 1 is none.
        anchor_weight: lambda; 0 leaves the anchor's forwards out.
    """

    def __init__(
        self,
        make: Callable[[], SD3Transformer2DModel],
        student: Adapter,
        frozen: Mapping[str, Adapter],
        texts: Texts,
        *,
        scale: float,
        sigmas: Tensor,
        a: float,
        guidance: float,
        anchor_weight: float,
        anchor: str = "anchor",
        learning_rate: float = 1e-4,
        max_grad_norm: float = 1.0,
    ) -> None:
        self.student = with_peft(make(), student, scale, trainable=True)
        self.frozen = {name: with_peft(make(), adapter, 1.0, trainable=False) for name, adapter in frozen.items()}
        self.texts, self.scale, self.sigmas, self.a = texts, scale, sigmas, a
        self.timesteps = sigmas[:-1] * 1000
        self.guidance, self.anchor_weight, self.anchor, self.max_grad_norm = (
            guidance,
            anchor_weight,
            anchor,
            max_grad_norm,
        )
        self.device = sigmas.device
        self.half = self.device.type == "cuda"  # the public precisions; otherwise fp32 throughout
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=1e-4)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half)

    # --- what it computes --------------------------------------------------------------------------------------------
    def _autocast(self) -> AbstractContextManager:
        return torch.autocast("cuda", torch.float16) if self.half else nullcontext()

    def _velocity(self, model: nn.Module, x: Tensor, t: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        copies = len(text[0]) // len(x)
        out = model(
            hidden_states=torch.cat([x] * copies),
            timestep=torch.cat([t] * copies),
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            return_dict=False,
        )[0].float()
        if copies == 1:
            return out
        uncond, cond = out.chunk(2)
        return uncond + self.guidance * (cond - uncond)

    def _mean(self, x: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, diffusion coefficient s and step length of the SDE; the host waits for the device, row by row."""
        places = [int((self.timesteps == value).nonzero()[0]) for value in t]
        largest = self.sigmas[1].item()
        sigma = self.sigmas[places].view(-1, 1, 1, 1)
        step = sigma - self.sigmas[[place + 1 for place in places]].view(-1, 1, 1, 1)
        s = self.a * torch.sqrt(sigma / (1 - torch.where(sigma == 1, largest, sigma)))
        mean = x * (1 - s**2 / (2 * sigma) * step) - v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * step
        return mean, s, step

    def _text(self, prompts: Sequence[str], half: bool) -> tuple[Tensor, Tensor]:
        guided = self.guidance != 1
        states, pooled = self.texts([*([""] * len(prompts) if guided else []), *prompts])
        dtype = torch.float16 if half else torch.float32
        return states.to(self.device, dtype), pooled.to(self.device, dtype)

    @torch.no_grad()
    def rollout(self, prompts: Sequence[str], shape: tuple[int, ...], noise: Noise) -> Trajectories:
        """Trajectories of one micro batch; ``shape`` is (C, h, w)."""
        text = self._text(prompts, self.half)
        x = noise(torch.empty(len(prompts), *shape, device=self.device))
        states = [x]
        for t in self.timesteps:
            with self._autocast():
                v = self._velocity(self.student, x, t.expand(len(x)), text)
            mean, s, step = self._mean(x, v, t[None])
            x = mean + s * torch.sqrt(step) * noise(x)
            states.append(x)
        return Trajectories(states, text)

    def backward(self, drawn: Trajectories, teachers: Sequence[str], share: float) -> None:
        """Gradients of one micro batch, a step after the other; the mean over its samples and steps times ``share``."""
        steps = len(self.timesteps)
        full = tuple(part.float() for part in drawn.text)
        for j in range(steps):
            x, t = drawn.states[j], self.timesteps[j].expand(len(drawn.states[j]))
            with self._autocast():
                v = self._velocity(self.student, x, t, drawn.text)
            mean, s, _ = self._mean(x, v, t)
            with torch.no_grad(), tf32(self.half):
                taught = self._mean(x, self._taught(x, t, full, teachers), t)[0]
                pulled = None
                if self.anchor_weight:
                    pulled = self._mean(x, self._velocity(self.frozen[self.anchor], x, t, full), t)[0]
            loss = ((mean - taught) ** 2).mean((1, 2, 3)) / (2 * s.flatten() ** 2)
            if pulled is not None:
                loss = loss + self.anchor_weight * ((mean - pulled) ** 2).mean((1, 2, 3)) / (2 * s.flatten() ** 2)
            self.scaler.scale(loss.mean() * share / steps).backward()

    def _taught(self, x: Tensor, t: Tensor, text: tuple[Tensor, Tensor], teachers: Sequence[str]) -> Tensor:
        """Each row by its own teacher: one forward of another backbone for every teacher that the rows name."""
        v = torch.empty_like(x)
        copies = len(text[0]) // len(x)
        for name in dict.fromkeys(teachers):
            rows = [row for row, teacher in enumerate(teachers) if teacher == name]
            both = [row + copy * len(x) for copy in range(copies) for row in rows]
            v[rows] = self._velocity(self.frozen[name], x[rows], t[rows], (text[0][both], text[1][both]))
        return v

    # --- an update ---------------------------------------------------------------------------------------------------
    def gradients(
        self, prompts: Sequence[str], teachers: Sequence[str], shape: tuple[int, ...], micro: int, noise: Noise
    ) -> None:
        """All trajectories of a batch, then all its gradients, ``micro`` samples at a time."""
        parts = [slice(start, start + micro) for start in range(0, len(prompts), micro)]
        drawn = [self.rollout(prompts[part], shape, noise) for part in parts]
        for part, trajectories in zip(parts, drawn, strict=True):
            self.backward(trajectories, teachers[part], len(prompts[part]) / len(prompts))

    def update(
        self, prompts: Sequence[str], teachers: Sequence[str], shape: tuple[int, ...], micro: int, noise: Noise
    ) -> None:
        """One optimiser step on a batch."""
        self.gradients(prompts, teachers, shape, micro, noise)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    # --- what it holds -----------------------------------------------------------------------------------------------
    @property
    def weights(self) -> list[Tensor]:
        """All that lies on the device before the first step."""
        return [t for model in (self.student, *self.frozen.values()) for t in (*model.parameters(), *model.buffers())]

    def gradient(self, modules: Sequence[str]) -> Tensor:
        """The gradients of all A, then all B, of ``modules`` in their order, as one vector."""
        layers = [self.student.base_model.model.get_submodule(name) for name in modules]
        sides = [[getattr(layer, side)["default"].weight.grad for layer in layers] for side in ("lora_A", "lora_B")]
        return torch.cat([grad.flatten() for side in sides for grad in side])

    def adapter(self, modules: Sequence[str]) -> Adapter:
        """The student's adapter as it is now, scale inside B."""
        factors = {}
        for name in modules:
            layer = self.student.base_model.model.get_submodule(name)
            a, b = (getattr(layer, side)["default"].weight.detach().float().cpu() for side in ("lora_A", "lora_B"))
            factors[name] = Factors(a.clone(), b * self.scale)
        return Adapter(factors, source="public loop", declared={"target_modules": list(modules)})
