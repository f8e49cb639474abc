"""The objectives against closed forms, slow loops and NumPy, and their gradient against that of a trajectory's KL."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from flowopd_eval import flow
from training import objectives
from training.rollout import Schedule, generators, noise_like, rollout

A = 0.7
GROUP = 4


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(theta: Tensor, x: Tensor) -> Tensor:
    """A velocity that mixes the C channels of ``x`` (B, C, H, W) by ``theta`` (C, C + 1): slope, and offset last."""
    return torch.einsum("ij,bjhw->bihw", theta[:, :-1], x) + theta[:, -1, None, None]


@pytest.mark.parametrize("sampler", ["sde", "cps"])
def test_direct_is_the_kl_of_the_transitions_and_so_is_its_gradient(sampler: str) -> None:
    steps = Schedule(flow.shifted_sigmas(5, 3.0).double(), sampler, A)
    weights = steps.kl_weights("transition")
    student, teacher = normal(0, 3, 4).requires_grad_(), normal(1, 3, 4).requires_grad_()
    sources = generators(range(6))
    start = noise_like(torch.empty(6, 3, 4, 5), sources).double()
    direct, exact = torch.zeros(6), torch.zeros(6)
    for step in rollout(steps, lambda i, x: linear(student, x.tanh()), start, sources):
        ours, theirs = (linear(theta, step.x.tanh()) for theta in (student, teacher))
        direct = direct + objectives.distillation(ours, theirs, weights[step.i])
        if steps.stochastic[step.i]:
            s, t = (steps.transition(step.i, step.x, v) for v in (ours, theirs))
            exact = exact + flow.transition_kl(s.mean, t.mean, s.std)
    torch.testing.assert_close(direct, exact, rtol=1e-6, atol=0)
    found, expected = (torch.autograd.grad(kl.sum(), student, retain_graph=True)[0] for kl in (direct, exact))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert torch.autograd.grad(direct.sum(), teacher, allow_unused=True) == (None,)


# The gradient of the whole trajectory's KL where the velocity is linear: every state is Gaussian, with known moments.
D, TRAJECTORIES, CHUNKS = 4, 120_000, 40
STUDENT = 0.6 * normal(2, D, D + 1)
TEACHER = STUDENT + 0.5 * normal(3, D, D + 1)


def exact_gradient(steps: Schedule) -> Tensor:
    """Gradient of ``E[sum_i KL_i]``, the moments of the states carried from step to step."""
    theta = STUDENT.clone().requires_grad_()
    slope, offset = (theta - TEACHER)[:, :-1], (theta - TEACHER)[:, -1]
    mean, covariance, total = torch.zeros(D).double(), torch.eye(D).double(), torch.zeros(())
    zero, one = torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double()
    for i in range(steps.steps):
        keep, push = steps.transition(i, one, zero).mean.squeeze(), steps.transition(i, zero, one).mean.squeeze()
        variance = steps.transition(i, zero, zero).std.squeeze() ** 2
        if variance > 0:
            square = (slope @ mean + offset).square().sum() + torch.trace(slope @ covariance @ slope.T)
            total = total + push**2 / (2 * variance) * square / D
        step = keep * torch.eye(D) + push * theta[:, :-1]
        mean = step @ mean + push * theta[:, -1]
        covariance = step @ covariance @ step.T + variance * torch.eye(D)
    return torch.autograd.grad(total, theta)[0]


def estimates(steps: Schedule) -> dict[str, Tensor]:
    """The direct term, and the score-function term with each advantage, chunk by chunk: (CHUNKS, D, D + 1)."""
    # Only the channels are mixed, so one sample of shape (D, TRAJECTORIES, 1) holds independent trajectories.
    sources = generators([0])
    start = noise_like(torch.empty(1, D, TRAJECTORIES, 1), sources).double()
    drawn = rollout(steps, lambda i, x: linear(STUDENT, x), start, sources)
    pairs = [(s.x.permute(2, 1, 0, 3).chunk(CHUNKS), s.x_next.permute(2, 1, 0, 3).chunk(CHUNKS)) for s in drawn]
    chunks = [score_terms(steps, [(x[k], x_next[k]) for x, x_next in pairs]) for k in range(CHUNKS)]
    return {name: torch.stack([chunk[name] for chunk in chunks]) for name in chunks[0]}


def score_terms(steps: Schedule, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    theta = STUDENT.clone().requires_grad_()
    v = [linear(theta, x) for x, _ in pairs]
    weights = steps.kl_weights("transition")
    kl = torch.stack([objectives.distillation(v[i], linear(TEACHER, x), weights[i]) for i, (x, _) in enumerate(pairs)])
    noisy = [(i, x, x_next) for i, (x, x_next) in enumerate(pairs) if steps.stochastic[i]]
    log_prob = torch.stack([flow.log_prob(steps.transition(i, x, v[i]), x_next) for i, x, x_next in noisy])
    to_go = objectives.reward_to_go(kl, D)
    advantages = {
        "reward_to_go": objectives.leave_one_out(to_go, GROUP),
        "without_dimensions": objectives.leave_one_out(objectives.reward_to_go(kl, 1), GROUP),
        "normalised": objectives.group_advantage(to_go, GROUP, "group"),
        # With its graph: a surrogate that did not detach the advantage would learn from that.
        "as_printed": -kl * D,
    }
    losses = {name: objectives.surrogate(log_prob, log_prob, a[: len(noisy)]) for name, a in advantages.items()}
    means = {name: loss.sum(0).mean() for name, loss in {"direct": kl, **losses}.items()}
    return {name: torch.autograd.grad(mean, theta, retain_graph=True)[0] for name, mean in means.items()}


def deviation(gradients: Tensor, expected: Tensor | float) -> float:
    """Largest distance of the mean of (CHUNKS, D, D + 1) from ``expected``, in standard errors."""
    return float(((gradients.mean(0) - expected) / gradients.std(0)).abs().max()) * len(gradients) ** 0.5


@pytest.mark.parametrize("sampler", ["sde", "cps"])
def test_direct_and_reward_to_go_are_the_gradient_of_the_trajectorys_kl_and_nothing_less_is(sampler: str) -> None:
    # Even steps: with the shift, the last noisy step of CPS would outweigh all others by thousands.
    steps = Schedule(torch.linspace(1, 0, 6, dtype=torch.float64), sampler, A)
    exact, found = exact_gradient(steps), estimates(steps)
    direct = found["direct"]
    whole = direct + found["reward_to_go"]
    assert deviation(whole, exact) < 5
    assert (whole.mean(0) - exact).norm() < 0.03 * exact.norm()
    assert deviation(direct, exact) > 15
    assert deviation(direct + found["without_dimensions"], exact) > 15
    assert deviation(direct + found["normalised"], exact) > 15
    # The advantage of an action being the KL of the step it is drawn on, which it cannot change: nothing is learnt.
    assert deviation(found["as_printed"], 0.0) < 5
    assert found["as_printed"].mean(0).norm() < 0.05 * exact.norm()


def test_reward_to_go_is_minus_the_later_kl_of_the_whole_latent() -> None:
    kl = normal(4, 5, 8).abs()
    rewards = objectives.reward_to_go(kl.requires_grad_(), 48)
    expected = torch.stack([-48 * kl[i + 1 :].sum(0) for i in range(5)]).detach()
    torch.testing.assert_close(rewards, expected)
    assert (rewards[-1] == 0).all()
    assert not rewards.requires_grad


@pytest.mark.parametrize("group", [2, 3, 6])
def test_leave_one_out_compares_with_the_others_of_the_group(group: int) -> None:
    rewards = normal(5, 3, 12)
    expected = torch.empty_like(rewards)
    for i, b in product(range(3), range(12)):
        first = b // group * group
        expected[i, b] = rewards[i, b] - np.mean([float(rewards[i, k]) for k in range(first, first + group) if k != b])
    torch.testing.assert_close(objectives.leave_one_out(rewards, group), expected)
    # A mean that includes the sample shrinks it.
    shrunk = expected * (group - 1) / group
    torch.testing.assert_close(objectives.group_advantage(rewards, group, "none"), shrunk)


@pytest.mark.parametrize("std", ["batch", "group", "none"])
def test_group_advantage_is_numpys_with_failed_judgements_left_out(std: str) -> None:
    rewards = normal(6, 2, 12)
    rewards[0, [1, 2, 9]] = torch.nan
    rewards[:, 4:8] *= 3
    values = rewards.numpy().reshape(2, 3, GROUP)
    centred = values - np.nanmean(values, 2, keepdims=True)
    axes = {"batch": (1, 2), "group": 2}
    spread = np.nanstd(values, axes[std], keepdims=True) + 1e-4 if std in axes else 1.0
    advantage = objectives.group_advantage(rewards, GROUP, std)
    torch.testing.assert_close(advantage, torch.from_numpy(np.nan_to_num(centred / spread)).flatten(1))
    assert (advantage[0, [1, 2, 9]] == 0).all()
    assert advantage.unflatten(1, (3, GROUP)).sum(2).abs().max() < 1e-12


@pytest.mark.parametrize("std", ["batch", "group", "none"])
@pytest.mark.parametrize("group", [3, 16, 24])
def test_groups_without_variance_have_no_advantage(group: int, std: str) -> None:
    """Exactly none, whatever the rounding of their mean: GRPO leaves such groups out, and counts them."""
    unscored = torch.full((group,), torch.nan)
    for value in (0.0, 0.07, 0.9, 1.0):
        alike = torch.full((group,), value)
        rewards = torch.cat([torch.linspace(0, 1, group), alike, alike[:1], unscored[1:], unscored])
        varied, *flat = objectives.group_advantage(rewards, group, std).split(group)
        assert varied.std() > 0
        assert not torch.cat(flat).any(), value


@pytest.mark.parametrize(
    "advantage",
    [objectives.leave_one_out, *(partial(objectives.group_advantage, std=s) for s in ("batch", "group", "none"))],
)
def test_permuting_groups_permutes_advantages(advantage) -> None:
    rewards = normal(8, 12)
    order = torch.arange(12).reshape(3, GROUP)[[2, 0, 1]].flatten()
    torch.testing.assert_close(advantage(rewards[order], GROUP), advantage(rewards, GROUP)[order])


SURROGATES = {
    "plain": objectives.surrogate,
    "clipped": partial(objectives.clipped_surrogate, clip=0.2),
    "trusted": lambda new, old, a: objectives.trusted_surrogate(new, old, a, (new - old) ** 2, tau=0.3),
}


@pytest.mark.parametrize("name", SURROGATES)
def test_a_samples_loss_is_its_own_and_trains_the_policy_only(name: str) -> None:
    surrogate = SURROGATES[name]
    new, advantage = normal(9, 8).requires_grad_(), normal(11, 8).requires_grad_()
    old = (new.detach() + 0.3 * normal(10, 8)).requires_grad_()
    losses = surrogate(new, old, advantage)
    assert losses.shape == (8,)
    for j, argument in product(range(8), range(3)):
        changed = [t.detach().clone() for t in (new, old, advantage)]
        changed[argument][j] = -changed[argument][j] - 1
        differs = surrogate(*changed) != losses
        assert not differs[torch.arange(8) != j].any()
        assert differs[j] or argument < 2  # beyond the clip, the ratio no longer matters
    jacobian = torch.stack([torch.autograd.grad(loss, new, retain_graph=True)[0] for loss in losses])
    assert torch.equal(jacobian, jacobian.diag().diag())
    assert torch.autograd.grad(losses.sum(), (old, advantage), allow_unused=True) == (None, None)
    assert torch.equal(surrogate(new.flip(0), old.flip(0), advantage.flip(0)), losses.flip(0))
    (on_policy,) = torch.autograd.grad(surrogate(new, new.detach(), advantage).sum(), new)
    torch.testing.assert_close(on_policy, -advantage.detach())


def at(ratio: float, advantage: float, surrogate) -> tuple[float, float]:
    """Loss of one sample and its derivative by the log-probability."""
    new = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    loss = surrogate(new, torch.zeros(1).double(), torch.tensor([advantage]).double())
    return loss.item(), torch.autograd.grad(loss, new)[0].item()


@pytest.mark.parametrize(("ratio", "advantage"), [*product([0.5, 0.85, 1.1, 2.0], [1.5, -1.5])])
def test_the_clip_stops_the_winning_side_only(ratio: float, advantage: float) -> None:
    won = ratio > 1.2 if advantage > 0 else ratio < 0.8
    stopped = (-advantage * (1.2 if advantage > 0 else 0.8), 0.0)
    free = (-advantage * ratio, -advantage * ratio)
    assert at(ratio, advantage, SURROGATES["clipped"]) == pytest.approx(stopped if won else free)


@pytest.mark.parametrize(("kl", "ratio"), [*product([0.5e-5, 1e-5, 2e-5], [0.999, 1.0, 1.001])])
@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_the_trust_rule_drops_what_has_left_and_would_go_on(kl: float, ratio: float, advantage: float) -> None:
    trusted = partial(objectives.trusted_surrogate, kl_to_old=torch.tensor([kl], dtype=torch.float64), tau=1e-5)
    dropped = kl >= 1e-5 and (ratio - 1) * advantage > 0
    assert at(ratio, advantage, trusted) == ((0.0, 0.0) if dropped else at(ratio, advantage, objectives.surrogate))


# --- DiffusionNFT ----------------------------------------------------------------------------------------------------
def test_the_contrast_is_least_where_good_and_bad_pictures_put_it() -> None:
    v_old, target = normal(0, 5, 2, 3, 3), normal(1, 5, 2, 3, 3)
    r, beta = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).double(), 0.5
    # Stationary at v_old + (2 r - 1) / beta (v* - v_old), by setting the gradient to zero by hand.
    best = v_old + ((2 * r - 1) / beta)[:, None, None, None] * (target - v_old)
    v = best.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objectives.contrast(v, v_old, target, r, beta).sum(), v)
    torch.testing.assert_close(gradient, torch.zeros_like(v), atol=1e-12, rtol=0)
    least = objectives.contrast(best, v_old, target, r, beta)
    assert (objectives.contrast(best + 0.1 * normal(2, *best.shape), v_old, target, r, beta) > least).all()


def test_what_a_group_has_in_common_cancels_from_the_contrast() -> None:
    theta = normal(3, 2, 3).requires_grad_()
    x, target, common = normal(4, 6, 2, 3, 3), normal(5, 6, 2, 3, 3), normal(6, 2, 3, 3)
    x = x[:1].expand_as(x)  # one state: what is asked of it differs
    advantage = objectives.group_advantage(torch.tensor([0.0, 0.2, 0.4, 0.9, 0.1, 0.5]).double(), 6, "none")
    r = objectives.optimality(advantage, 2.0)

    def gradient(target: Tensor, beta: float = 1.0) -> Tensor:
        v = linear(theta, x)
        return torch.autograd.grad(objectives.contrast(v, v.detach(), target, r, beta).sum(), theta)[0]

    torch.testing.assert_close(gradient(target), gradient(target + common))
    torch.testing.assert_close(gradient(target), gradient(target, 0.25))  # beta decides how far, not where to
    better = torch.autograd.grad((linear(theta, x) - target).square().mean((1, 2, 3)) @ (2 * r - 1), theta)[0]
    torch.testing.assert_close(gradient(target), better)  # the weighted flow-matching loss, good ones above zero


def test_optimality_is_a_share_and_halves_at_the_mean() -> None:
    found = objectives.optimality(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]), 2.0)
    assert found.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_the_contrast_moves_a_gaussian_to_where_the_reward_is() -> None:
    """The velocity of data N(mean, 0.5^2) in closed form, its mean learned: up with the reward, nowhere without one."""

    def velocity(mean: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        kept = 1 - sigma
        clean = mean + kept * 0.25 / (kept**2 * 0.25 + sigma**2) * (x - kept * mean)
        return (x - kept * clean) / sigma - clean

    ends = []
    for rewarded in (True, False):
        mean, source = torch.zeros(1, dtype=torch.float64, requires_grad=True), torch.Generator().manual_seed(0)
        for _ in range(40):
            noise = torch.randn(3, 64, 1, 1, 1, generator=source, dtype=torch.float64)
            clean, sigma = mean.detach() + 0.5 * noise[0], torch.sigmoid(noise[2])
            rewards = (clean if rewarded else torch.ones_like(clean)).flatten()
            r = objectives.optimality(objectives.group_advantage(rewards, 64, "batch"), 2.0)
            x = (1 - sigma) * clean + sigma * noise[1]
            old = velocity(mean.detach(), x, sigma)
            loss = objectives.contrast(velocity(mean, x, sigma), old, noise[1] - clean, r, 1.0).mean()
            mean.data -= 0.1 * torch.autograd.grad(loss, mean)[0]
        ends.append(mean.item())
    assert ends[0] > 0.5
    assert ends[1] == 0.0
