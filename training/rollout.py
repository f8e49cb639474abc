"""Trajectories: which sigmas, which transition, whose noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flowopd_eval import flow
from flowopd_eval.errors import RequestError


@dataclass(frozen=True)
class Schedule:
    """The steps of a trajectory: ``sigmas`` (T + 1,) from 1 to 0, drawn by ``sampler`` with noise level ``a``."""

    sigmas: Tensor
    sampler: str
    a: float

    @classmethod
    def of(cls, steps: int, shift: float, sampler: str, a: float, device: str | torch.device = "cpu") -> Schedule:
        """The scheduler's sigmas for ``steps`` steps."""
        return cls(flow.shifted_sigmas(steps, shift).to(device), sampler, a)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    def transition(self, i: int, x: Tensor, v: Tensor) -> flow.Transition:
        """The Gaussian of step ``i`` from ``x`` (B, C, H, W) with guided velocity ``v``; ``std`` 0 for the ODE."""
        sigma, following = self.sigmas[i], self.sigmas[i + 1]
        if self.sampler == "sde":
            return flow.sde_transition(x, v, sigma, following, self.a, self.sigmas[1])
        if self.sampler == "cps":
            return flow.cps_transition(x, v, sigma, following, self.a)
        return flow.Transition(flow.ode_step(x, v, sigma, following), torch.zeros(1, 1, 1, 1, device=x.device))

    @cached_property
    def stochastic(self) -> list[bool]:
        """Whether step i has a density: not on an ODE, nor on the last step of CPS."""
        return [self.sampler != "ode" and (self.sampler == "sde" or i < self.steps - 1) for i in range(self.steps)]

    def kl_weights(self, name: str) -> Tensor:
        """Weight of ``|v_s - v_t|^2`` on each step, (T,).

        ``transition``: the KL of the sampler's own transition; ``flow-opd-code`` and ``velocity`` as in
        :func:`flowopd_eval.flow.kl_weight`; ``euler``: ``D^2 / 2``, the squared distance of two Euler steps, halved
        (DiffusionOPD, arXiv 2605.15055). Steps on which the named weight is not defined have 0: they are not trained.

        Raises:
            RequestError: a weight that is defined on no step of this sampler.
        """
        sigma, following = self.sigmas[:-1], self.sigmas[1:]
        if name == "euler":
            return (sigma - following) ** 2 / 2
        if name == "transition" and self.sampler == "cps":
            weights = flow.cps_kl_weight(sigma, following, self.a)
        else:
            # These are the SDE's weights; the ODE is the SDE without noise.
            a = self.a if self.sampler == "sde" else 0.0
            weights = flow.kl_weight(name, sigma, following, a, self.sigmas[1])
        weights = torch.where(weights.isfinite(), weights, 0.0)
        if not weights.any():
            raise RequestError(f"The weight {name!r} is defined on no step of the sampler {self.sampler!r}.")
        return weights


@dataclass(frozen=True)
class Step:
    """Step ``i`` of a batch of trajectories: state, guided velocity, the Gaussian, and the state drawn from it."""

    i: int
    x: Tensor
    velocity: Tensor
    transition: flow.Transition
    x_next: Tensor


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One source of noise a sample, on the CPU: a trajectory does not depend on what else is in the batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise_like(x: Tensor, sources: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise in the shape of ``x`` (B, C, H, W), row i from ``sources[i]``, on x's device in fp32."""
    noise = torch.stack([torch.randn(x.shape[1:], generator=source) for source in sources])
    # from pinned memory the host need not wait until the device has done all that it was given
    return noise.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else noise.to(x.device)


def forward_noise(
    clean: Tensor, names: Sequence[str], mean: float, std: float
) -> tuple[Tensor, Tensor, list[torch.Generator]]:
    """Noise (B, C, H, W) and logit-normal noise levels (B,) for latents ``clean``, each row from its own name's source.

    Returns the sources, too, for whatever else a row needs to draw.
    """
    sources = generators([int(hashlib.sha256(name.encode()).hexdigest()[:15], 16) for name in names])
    levels = torch.stack([torch.randn((), generator=source) for source in sources]) * std + mean
    return noise_like(clean, sources), levels.sigmoid().to(clean.device), sources


def rollout(
    schedule: Schedule,
    velocity: Callable[[int, Tensor], Tensor],
    x: Tensor,
    sources: Sequence[torch.Generator],
    noisy: Sequence[bool] | None = None,
) -> Iterator[Step]:
    """Draw a batch of trajectories from noise ``x`` (B, C, H, W), step by step.

    Args:
        schedule: sigmas and sampler.
        velocity: ``velocity(i, x)``, the guided velocity (B, C, H, W) at step i; the trajectory goes on from its
            values, gradients do not pass from step to step.
        x: the starting noise.
        sources: each sample's own noise.
        noisy: whether step i is stochastic (default: where the schedule is); elsewhere the step is the ODE's. Flow-GRPO
            calls a window of noisy steps "Fast".
    """
    noisy = schedule.stochastic if noisy is None else noisy
    quiet = Schedule(schedule.sigmas, "ode", 0.0)
    for i in range(schedule.steps):
        v = velocity(i, x).detach()
        transition = (schedule if noisy[i] else quiet).transition(i, x, v)
        x_next = flow.sample(transition, noise_like(x, sources)) if noisy[i] else transition.mean
        yield Step(i, x, v, transition, x_next)
        x = x_next


def solve(schedule: Schedule, velocity: Callable[[int, Tensor], Tensor], x: Tensor, order: int = 2) -> Tensor:
    """Follow the probability-flow ODE from noise ``x`` (B, C, H, W) to its end, by Adams-Bashforth of one or two steps.

    One velocity a step. ``order`` 1 is Euler; 2 has an error of second order in the steps: as many of them give a
    picture as Euler's with about twice as many. The other arguments are :func:`rollout`'s.
    """
    before: Tensor | None = None
    for i in range(schedule.steps):
        v = velocity(i, x)
        slope = v if before is None or order == 1 else v + _lean(schedule.sigmas, i) * (v - before)
        x = flow.ode_step(x, slope, schedule.sigmas[i], schedule.sigmas[i + 1])
        before = v
    return x


def _lean(sigmas: Tensor, i: int) -> Tensor:
    """Half the ratio of this step's length and the last one's: how far the velocity is carried on along its change."""
    return (sigmas[i] - sigmas[i + 1]) / (2 * (sigmas[i - 1] - sigmas[i]))


def windows(
    seeds: Sequence[int], steps: int, window: int | None, window_range: tuple[int, int] | None
) -> list[list[int]]:
    """The steps each sample is trained on, a run of ``window`` steps within ``window_range`` drawn from its seed."""
    if window is None:
        return [list(range(steps)) for _ in seeds]
    low, high = window_range or (0, steps)
    chosen = []
    for seed in seeds:
        # Another stream than the sample's noise, which starts from the seed itself.
        source = torch.Generator().manual_seed((seed + 0x9E3779B9) % 2**63)
        first = low + int(torch.randint(high - low - window + 1, (1,), generator=source))
        chosen.append(list(range(first, first + window)))
    return chosen


def inclusion(steps: int, window: int | None, window_range: tuple[int, int] | None) -> list[float]:
    """The share of samples that :func:`windows` trains on each step: the steps at the ends of the range have fewer.

    A step's loss divided by it has the loss over all steps of the range as its mean.
    """
    low, high = window_range or (0, steps)
    length = high - low if window is None else window
    starts = range(low, high - length + 1)
    return [sum(first <= i < first + length for first in starts) / len(starts) for i in range(steps)]
