"""The mathematics of flow-matching sampling and distillation, each formula once.

Convention (diffusers): ``x_sigma = (1 - sigma) * x0 + sigma * eps``, velocity ``v = eps - x0``, and sigma falls from
1 (noise) to 0 (data) over the steps ``sigma_0 = 1 > sigma_1 > ... > sigma_T = 0`` with ``D = sigma - sigma_next > 0``.

Shapes: latents and velocities are ``(B, C, H, W)``; ``sigma``, ``sigma_next`` and ``sigma_max`` are tensors of shape
``()`` or ``(B,)``; what is said of a whole sample (a KL, a log-probability) has shape ``(B,)``. Squared norms and
log-probabilities are means over C, H, W, as in the code of Flow-GRPO and Flow-OPD. Everything is computed in float32
whatever comes in, except that float64 stays float64; no function waits for the device.

Sources: Fang et al., *Flow-OPD* (arXiv 2605.08063); Liu et al., *Flow-GRPO* (arXiv 2505.05470) and its code
(github.com/yifan123/flow_grpo, ``sd3_sde_with_logprob.py``); diffusers' ``FlowMatchEulerDiscreteScheduler``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from flowopd_eval.errors import RequestError

TRAIN_TIMESTEPS = 1000  # SD3's scheduler: its smallest sigma before the shift is 1 / 1000


@dataclass(frozen=True)
class Transition:
    """A Gaussian step ``x' ~ N(mean, std^2)``: ``mean`` (B, C, H, W), ``std`` (B, 1, 1, 1) or (1, 1, 1, 1).

    ``std`` is 0 where the step is deterministic; no density and no KL exist there.
    """

    mean: Tensor
    std: Tensor


def guided_velocity(uncond: Tensor, cond: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance ``uncond + guidance * (cond - uncond)``, (B, C, H, W) (Ho & Salimans, 2207.12598).

    Args:
        uncond: velocity for the negative prompt, (B, C, H, W).
        cond: velocity for the prompt, (B, C, H, W).
        guidance: one scale, or one a sample (B,). 1 is no guidance; SD3.5-Medium is used with 4.5.
    """
    uncond, cond = _wide(uncond), _wide(cond)
    scale = _column(guidance) if isinstance(guidance, Tensor) else guidance
    return uncond + scale * (cond - uncond)


def x0_from_velocity(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The data a velocity points to: ``x - sigma * v``, (B, C, H, W)."""
    return _wide(x) - _column(sigma) * _wide(v)


def eps_from_velocity(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The noise a velocity comes from: ``x + (1 - sigma) * v``, (B, C, H, W)."""
    return _wide(x) + (1 - _column(sigma)) * _wide(v)


def velocity_from_x0(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Velocity at ``x`` of a prediction of the data: ``(x - x0) / sigma``, (B, C, H, W); sigma in (0, 1]."""
    return (_wide(x) - _wide(x0)) / _column(sigma)


def velocity_from_eps(x: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """Velocity at ``x`` of a prediction of the noise: ``(eps - x) / (1 - sigma)``, (B, C, H, W); sigma in [0, 1)."""
    return (_wide(eps) - _wide(x)) / (1 - _column(sigma))


def shifted_sigmas(steps: int, shift: float) -> Tensor:
    """The sigmas of ``FlowMatchEulerDiscreteScheduler(shift=shift).set_timesteps(steps)``, bit for bit.

    Shape (steps + 1,), float32, falling from 1 to 0. As in diffusers, ``steps`` values are spaced evenly from 1 to the
    smallest *shifted* training sigma, shifted again by ``shift * t / (1 + (shift - 1) * t)``, and a 0 is appended.
    ``steps`` is at least 1; ``shift`` is positive, 3 for SD3.
    """
    ends = _shift(torch.tensor([1.0, 1 / TRAIN_TIMESTEPS]), shift).double() * TRAIN_TIMESTEPS
    even = torch.linspace(ends[0], ends[1], steps, dtype=torch.float64) / TRAIN_TIMESTEPS
    return torch.cat([_shift(even, shift).float(), torch.zeros(1)])


def ode_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One Euler step of the probability-flow ODE: ``x + (sigma_next - sigma) * v``, (B, C, H, W)."""
    return _wide(x) + (_column(sigma_next) - _column(sigma)) * _wide(v)


def sde_transition(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, a: float, sigma_max: Tensor) -> Transition:
    """One Euler-Maruyama step of the SDE with the ODE's marginals (Flow-GRPO; its ``sde_step_with_logprob``).

    With ``s = a * sqrt(sigma / (1 - sigma))``::

        mean = x * (1 - s^2 / (2 sigma) * D) - v * (1 + s^2 * (1 - sigma) / (2 sigma)) * D
        std  = s * sqrt(D)

    Args:
        x: state, (B, C, H, W).
        v: guided velocity there, (B, C, H, W).
        sigma: in (0, 1], () or (B,).
        sigma_next: in [0, sigma), () or (B,).
        a: noise level, >= 0; 0.7 in the published runs; 0 gives :func:`ode_step` with ``std`` 0.
        sigma_max: the schedule's second value ``sigma_1``, () or (B,). It stands for sigma in ``1 - sigma`` where
            sigma is 1 and the fraction would be infinite; elsewhere it is not used.
    """
    x, v, sigma = _wide(x), _wide(v), _column(sigma)
    step = sigma - _column(sigma_next)
    s = _diffusion(sigma, a, _column(sigma_max))
    drift = s**2 / (2 * sigma)
    mean = x * (1 - drift * step) - v * (1 + drift * (1 - sigma)) * step
    return Transition(mean, s * step.sqrt())


def cps_transition(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, a: float) -> Transition:
    """One coefficients-preserving step (Flow-CPS, arXiv 2509.05952; ``sde_type="cps"`` in flow_grpo).

    With ``s = sigma_next * sin(a pi / 2)``, so that ``sqrt(sigma_next^2 - s^2) = sigma_next * cos(a pi / 2)``::

        mean = (1 - sigma_next) * x0_hat + sqrt(sigma_next^2 - s^2) * eps_hat
        std  = s

    Arguments as in :func:`sde_transition`, with ``a`` in [0, 1]. The last step, to ``sigma_next = 0``, has ``std`` 0.
    """
    signal, noise, std = _cps_coefficients(_column(sigma_next), a)
    return Transition(signal * x0_from_velocity(x, v, sigma) + noise * eps_from_velocity(x, v, sigma), std)


def sample(transition: Transition, noise: Tensor) -> Tensor:
    """The next state ``mean + std * noise``, (B, C, H, W), for standard normal ``noise`` of that shape."""
    return transition.mean + transition.std * _wide(noise)


def log_prob(transition: Transition, x_next: Tensor) -> Tensor:
    """Log-density of ``x_next`` (B, C, H, W), in nats per latent dimension: the mean over C, H, W, shape (B,).

    Defined where ``std > 0`` only.
    """
    z = (_wide(x_next) - transition.mean) / transition.std
    return _per_sample(-(z**2) / 2 - transition.std.log() - math.log(2 * math.pi) / 2)


def transition_kl(mean_s: Tensor, mean_t: Tensor, std: Tensor) -> Tensor:
    """KL of two Gaussian steps that share ``std``: ``|mean_s - mean_t|^2 / (2 std^2)``, mean over C, H, W, shape (B,).

    ``mean_s`` and ``mean_t`` are (B, C, H, W); ``std`` is a :class:`Transition`'s, > 0.
    """
    return _per_sample((_wide(mean_s) - _wide(mean_t)) ** 2 / (2 * _wide(std) ** 2))


def velocity_kl(v_s: Tensor, v_t: Tensor, weight: Tensor) -> Tensor:
    """The dense KL in velocities: ``weight * |v_s - v_t|^2``, mean over C, H, W, shape (B,).

    ``v_s`` and ``v_t`` are guided velocities at one state, (B, C, H, W); ``weight`` is () or (B,), from
    :func:`kl_weight` or :func:`cps_kl_weight`.
    """
    return _wide(weight) * _per_sample((_wide(v_s) - _wide(v_t)) ** 2)


def sde_kl_weight(sigma: Tensor, sigma_next: Tensor, a: float, sigma_max: Tensor) -> Tensor:
    """``w`` with ``KL = w * |v_s - v_t|^2`` for :func:`sde_transition`, () or (B,) (Flow-OPD, the equation for w(t)).

    ``w = D / 2 * (1 / s + s * (1 - sigma) / (2 sigma))^2``. Arguments as in :func:`sde_transition`; infinite for
    ``a = 0``, where the steps have no density.
    """
    sigma, sigma_next = _wide(sigma), _wide(sigma_next)
    s = _diffusion(sigma, a, _wide(sigma_max))
    return (sigma - sigma_next) / 2 * (1 / s + s * (1 - sigma) / (2 * sigma)) ** 2


def cps_kl_weight(sigma: Tensor, sigma_next: Tensor, a: float) -> Tensor:
    """``w`` with ``KL = w * |v_s - v_t|^2`` for :func:`cps_transition`, () or (B,).

    ``w = ((1 - sigma) * sqrt(sigma_next^2 - s^2) - sigma * (1 - sigma_next))^2 / (2 s^2)``. Arguments as in
    :func:`cps_transition`; infinite on the last step and for ``a = 0``, where the steps have no density.
    """
    sigma = _wide(sigma)
    signal, noise, std = _cps_coefficients(_wide(sigma_next), a)
    return ((1 - sigma) * noise - sigma * signal) ** 2 / (2 * std**2)


def _code_weight(sigma: Tensor, sigma_next: Tensor, a: float, sigma_max: Tensor) -> Tensor:
    return (_wide(sigma) - _wide(sigma_next)) * sde_kl_weight(sigma, sigma_next, a, sigma_max)


def _unit_weight(sigma: Tensor, sigma_next: Tensor, a: float, sigma_max: Tensor) -> Tensor:
    return torch.ones_like(_wide(sigma))


KL_WEIGHTS: Mapping[str, Callable[[Tensor, Tensor, float, Tensor], Tensor]] = MappingProxyType(
    {
        "transition": sde_kl_weight,
        "flow-opd-code": _code_weight,
        "velocity": _unit_weight,
    }
)


def kl_weight(name: str, sigma: Tensor, sigma_next: Tensor, a: float, sigma_max: Tensor) -> Tensor:
    """Weight of ``|v_s - v_t|^2`` on one step of the SDE, () or (B,); arguments as in :func:`sde_transition`.

    Args:
        name: ``transition``, the exact KL (:func:`sde_kl_weight`); ``flow-opd-code``, ``D`` times that, because the
            public code (github.com/CostaliyA/Flow-OPD) divides by ``2 s^2`` where the variance is ``s^2 D``;
            ``velocity``, 1 on every step.

    Raises:
        RequestError: there is no weighting of that name.
    """
    if name not in KL_WEIGHTS:
        raise RequestError(f"Expected the KL weight to be one of {', '.join(KL_WEIGHTS)}, but got {name!r}.")
    return KL_WEIGHTS[name](sigma, sigma_next, a, sigma_max)


def _diffusion(sigma: Tensor, a: float, sigma_max: Tensor) -> Tensor:
    """The SDE's diffusion coefficient ``s`` (its variance over a step is ``s^2 D``), in the shape of ``sigma``."""
    return a * (sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))).sqrt()


def _cps_coefficients(sigma_next: Tensor, a: float) -> tuple[Tensor, Tensor, Tensor]:
    """What a CPS step makes of ``x0_hat``, of ``eps_hat`` and of fresh noise, each in the shape of ``sigma_next``."""
    angle = a * math.pi / 2
    return 1 - sigma_next, sigma_next * math.cos(angle), sigma_next * math.sin(angle)


def _shift(t: Tensor, shift: float) -> Tensor:
    return shift * t / (1 + (shift - 1) * t)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _column(t: Tensor) -> Tensor:
    return _wide(t).reshape(-1, 1, 1, 1)  # () or (B,) -> (1 or B, 1, 1, 1)


def _per_sample(t: Tensor) -> Tensor:
    return t.mean(dim=(1, 2, 3))  # (B, C, H, W) -> (B,)
