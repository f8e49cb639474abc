"""The objectives, each formula once: what the student is asked for on the states it reaches.

Every function works on one step of B samples, or on all T steps of them, and returns one number a sample; means over
samples and steps are taken by the loops. Norms and log-probabilities are means over C, H, W.

Sources: Flow-OPD (arXiv 2605.08063); Flow-GRPO (arXiv 2505.05470); Flow-DPPO's trust rule; PPO (arXiv 1707.06347);
DiffusionNFT (arXiv 2509.16117).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowopd_eval import flow


def distillation(v_student: Tensor, v_teacher: Tensor, weight: Tensor) -> Tensor:
    """The dense KL to the teacher, ``w * |v_S - sg(v_k)|^2``, (B,): Flow-OPD's *direct* objective on one step.

    ``v_student`` and ``v_teacher`` are guided velocities at one detached state, (B, C, H, W); ``weight`` is () or (B,).
    """
    return flow.velocity_kl(v_student, v_teacher.detach(), weight)


def reward_to_go(kl: Tensor, dimensions: int) -> Tensor:
    """Minus the KL of the steps that an action can still change: ``R_i = -sum_{j>i} KL_j``, (T, B) from (T, B).

    The KL at step i depends on the state x_i, not on the action drawn there, so it is no part of that action's reward
    (the paper's "clipped surrogate" of v1-v4 puts it there; the expectation of that estimator is zero).

    ``kl`` holds means over C, H, W. The reward is in nats of the whole latent (times ``dimensions`` = C * H * W): then
    its product with the gradient of a *mean* log-probability is the score-function term of the gradient of the mean KL.
    """
    later = kl.flip(0).cumsum(0).flip(0) - kl
    return -later.detach() * dimensions


def leave_one_out(rewards: Tensor, group: int) -> Tensor:
    """Each reward less the mean of the others of its group: an unbiased baseline. (..., B), groups side by side."""
    grouped = rewards.unflatten(-1, (-1, group))
    others = (grouped.sum(-1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).flatten(-2)


def group_advantage(rewards: Tensor, group: int, std: str) -> Tensor:
    """``(r - mean of the group) / std``, (..., B), groups side by side (Flow-GRPO, eq. for the advantage).

    ``std`` is ``batch`` (over all rewards of the last axis: Flow-GRPO's ``global_std``), ``group``, or ``none``.
    Rewards that are NaN (a failed judgement) take no part and have advantage 0. With this mean, which includes the
    sample itself, and with a std the estimator is biased; it is what GRPO is.
    """
    grouped = rewards.unflatten(-1, (-1, group))
    # Equal rewards differ from their mean by rounding; they are no signal.
    varied = grouped.nan_to_num(-torch.inf).amax(-1, keepdim=True) > grouped.nan_to_num(torch.inf).amin(
        -1, keepdim=True
    )
    centred = torch.where(varied, grouped - grouped.nanmean(-1, keepdim=True), 0.0)
    if std != "none":
        known = ~rewards.isnan()
        spread = _std(rewards, known, -1)[..., None] if std == "batch" else _std(grouped, ~grouped.isnan(), -1)
        centred = centred / (spread + 1e-4)
    return centred.nan_to_num(0.0).flatten(-2)


def _std(values: Tensor, known: Tensor, axis: int) -> Tensor:
    count = known.sum(axis, keepdim=True).clamp(min=1)
    mean = values.nan_to_num(0.0).sum(axis, keepdim=True) / count
    return (((values.nan_to_num(0.0) - mean) * known) ** 2).sum(axis, keepdim=True).div(count).sqrt()


def surrogate(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> Tensor:
    """``-A * ratio``, (B,): the policy gradient with importance ratio; all arguments (B,), the last two constants."""
    return -advantage.detach() * (log_prob - old_log_prob.detach()).exp()


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective, (B,): no gain from moving the ratio out of ``1 ± clip``."""
    ratio = (log_prob - old_log_prob.detach()).exp()
    advantage = advantage.detach()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def trusted_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, kl_to_old: Tensor, tau: float
) -> Tensor:
    """Flow-DPPO's objective, (B,): a sample is dropped where its transition has left the trust region and would go on.

    ``kl_to_old`` (B,) is ``mean |mu - mu_old|^2 / (2 s^2 D)``. A sample counts unless that is ``tau`` or more and the
    ratio lies on the side to which the advantage pushes it.
    """
    ratio = (log_prob - old_log_prob.detach()).exp()
    advantage = advantage.detach()
    leaving = torch.where(advantage > 0, ratio > 1, ratio < 1)
    dropped = (kl_to_old.detach() >= tau) & leaving
    return torch.where(dropped, torch.zeros_like(ratio), -advantage * ratio)


def optimality(advantage: Tensor, clip: float) -> Tensor:
    """How good a picture is among its group, in 0..1, (B,): ``1/2 + clip(A / clip, -1, 1) / 2`` (DiffusionNFT)."""
    return 0.5 + 0.5 * (advantage.detach() / clip).clamp(-1, 1)


def contrast(v: Tensor, v_old: Tensor, target: Tensor, optimality: Tensor, beta: float) -> Tensor:
    """DiffusionNFT's loss, (B,): ``r |v+ - v*|^2 + (1 - r) |v- - v*|^2``, divided by beta.

    ``v+ = v_old + beta (v - v_old)`` and ``v- = v_old - beta (v - v_old)``: what moves v towards a good picture's own
    velocity ``v* = eps - x_0`` moves it away from a bad one's. At ``v = v_old`` the gradient is that of
    ``(2 r - 1) |v - v*|^2``, so what all pictures of a group have in common cancels; away from there
    ``beta |v - v_old|^2`` pulls back to the old policy.

    Args:
        v: the student's velocity, (B, C, H, W).
        v_old: that of the policy that drew, (B, C, H, W); constant.
        target: v*, (B, C, H, W); constant.
        optimality: r in 0..1, (B,).
        beta: > 0; the smaller, the further v goes before it is pulled back.
    """
    step = beta * (v - v_old.detach())
    towards, away = ((v_old + sign * step - target).square().mean((1, 2, 3)) for sign in (1, -1))
    return (optimality * towards + (1 - optimality) * away) / beta
