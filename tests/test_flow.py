"""Identities of the flow mathematics in float64, and parity with diffusers and torch.distributions."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from flowopd_eval import flow
from flowopd_eval.errors import RequestError

SHAPE = (3, 2, 4, 5)
A = 0.7


def normal(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sigmas(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


X, V, V2, NOISE = normal(0), normal(1), normal(2), normal(3)
SIGMA, SIGMA_NEXT, SIGMA_MAX = sigmas(1.0, 0.6, 0.2), sigmas(0.9, 0.4, 0.0), sigmas(0.9)[0]
INSIDE = sigmas(0.9, 0.5, 0.1)


@pytest.fixture(scope="module")
def euler():
    """diffusers' scheduler, already set to a number of steps."""
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler

    def build(steps: int, shift: float):
        built = scheduler(shift=shift)
        built.set_timesteps(steps)
        return built

    return build


# Guidance and conversions


def test_guidance_is_linear_between_and_beyond_the_two_velocities() -> None:
    torch.testing.assert_close(flow.guided_velocity(V, V2, 0.0), V)
    torch.testing.assert_close(flow.guided_velocity(V, V2, 1.0), V2)
    torch.testing.assert_close(flow.guided_velocity(V, V2, 4.5), 4.5 * V2 - 3.5 * V)


def test_guidance_per_sample_is_guidance_of_each_sample() -> None:
    scales = sigmas(1.0, 4.5, 7.0)
    rows = [flow.guided_velocity(V[i : i + 1], V2[i : i + 1], float(g)) for i, g in enumerate(scales)]
    torch.testing.assert_close(flow.guided_velocity(V, V2, scales), torch.cat(rows))


def test_conversions_recover_what_the_state_was_made_of() -> None:
    x0, eps = normal(4), normal(5)
    column = INSIDE.reshape(-1, 1, 1, 1)
    x, v = (1 - column) * x0 + column * eps, eps - x0
    torch.testing.assert_close(flow.x0_from_velocity(x, v, INSIDE), x0)
    torch.testing.assert_close(flow.eps_from_velocity(x, v, INSIDE), eps)
    torch.testing.assert_close(flow.velocity_from_x0(x, x0, INSIDE), v)
    torch.testing.assert_close(flow.velocity_from_eps(x, eps, INSIDE), v)


@given(sigma=st.floats(0.01, 0.99))
@settings(max_examples=30, deadline=None)
def test_conversions_are_inverse_at_every_sigma(sigma: float) -> None:
    at = torch.tensor(sigma, dtype=torch.float64)
    torch.testing.assert_close(flow.velocity_from_x0(X, flow.x0_from_velocity(X, V, at), at), V)
    torch.testing.assert_close(flow.velocity_from_eps(X, flow.eps_from_velocity(X, V, at), at), V)


# The schedule and the ODE


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 10, 20, 28, 40])
def test_schedule_is_the_schedulers_bit_for_bit(euler, steps: int, shift: float) -> None:
    ours = flow.shifted_sigmas(steps, shift)
    torch.testing.assert_close(ours, euler(steps, shift).sigmas, rtol=0, atol=0)
    assert (ours[0], ours[-1]) == (1, 0)
    assert (ours.diff() < 0).all()


def test_ode_steps_follow_the_scheduler_over_a_whole_rollout(euler) -> None:
    scheduler = euler(10, 3.0)
    schedule = flow.shifted_sigmas(10, 3.0)
    ours = theirs = normal(0, torch.float32)
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(torch.tanh(theirs), t, theirs).prev_sample
        ours = flow.ode_step(ours, torch.tanh(ours), schedule[i], schedule[i + 1])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_sde_without_noise_is_the_ode() -> None:
    still = flow.sde_transition(X, V, SIGMA, SIGMA_NEXT, 0.0, SIGMA_MAX)
    torch.testing.assert_close(still.mean, flow.ode_step(X, V, SIGMA, SIGMA_NEXT))
    assert (still.std == 0).all()


def test_cps_without_noise_is_the_ode() -> None:
    still = flow.cps_transition(X, V, SIGMA, SIGMA_NEXT, 0.0)
    torch.testing.assert_close(still.mean, flow.ode_step(X, V, SIGMA, SIGMA_NEXT))
    assert (still.std == 0).all()


# Transitions


def test_sde_mean_and_std_at_hand_computed_numbers() -> None:
    # sigma 0.5 -> 0.3, a = 0.6: s = 0.6, D = 0.2, s^2/(2 sigma) = 0.36;
    # mean = 2 (1 - 0.072) - 3 (1 + 0.18) 0.2 = 1.148, variance = 0.36 * 0.2
    x, v = torch.full(SHAPE, 2.0, dtype=torch.float64), torch.full(SHAPE, 3.0, dtype=torch.float64)
    now, then = sigmas(0.5, 0.3)
    step = flow.sde_transition(x, v, now, then, 0.6, SIGMA_MAX)
    torch.testing.assert_close(step.mean, torch.full_like(x, 1.148))
    torch.testing.assert_close(step.std, torch.full((1, 1, 1, 1), math.sqrt(0.072), dtype=torch.float64))


@given(first=st.floats(0.05, 0.999), a=st.floats(0.01, 1.5))
@settings(max_examples=30, deadline=None)
def test_sde_variance_of_the_first_step_is_a_squared_whatever_the_step(first: float, a: float) -> None:
    sigma, sigma_1 = sigmas(1.0, first)
    std = flow.sde_transition(X, V, sigma, sigma_1, a, sigma_1).std
    torch.testing.assert_close(std, torch.full_like(std, a))


def test_cps_is_its_published_update() -> None:
    # Written from the update of flow_grpo's sde_type="cps", with loops over samples and Python floats.
    step = flow.cps_transition(X, V, SIGMA, SIGMA_NEXT, A)
    for i in range(SHAPE[0]):
        now, then = float(SIGMA[i]), float(SIGMA_NEXT[i])
        std = then * math.sin(A * math.pi / 2)
        x0, eps = X[i] - now * V[i], X[i] + V[i] * (1 - now)
        torch.testing.assert_close(step.mean[i], x0 * (1 - then) + eps * math.sqrt(then**2 - std**2))
        assert float(step.std[i]) == pytest.approx(std, abs=1e-15)


@given(a=st.floats(0.0, 1.0), sigma_next=st.floats(0.0, 0.99))
@settings(max_examples=30, deadline=None)
def test_cps_keeps_the_size_of_the_noise(a: float, sigma_next: float) -> None:
    """Its name: the noise left in x' has coefficient sigma_next, whatever share of it is fresh."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    now, then = sigmas(1.0, sigma_next)
    step = flow.cps_transition(one, one, now, then, a)  # x = eps = 1, x0 = 0
    assert float(step.mean**2 + step.std**2) == pytest.approx(sigma_next**2, abs=1e-12)


def test_last_step_of_cps_is_deterministic() -> None:
    now, then = sigmas(0.2, 0.0)
    step = flow.cps_transition(X, V, now, then, A)
    torch.testing.assert_close(step.mean, flow.x0_from_velocity(X, V, now))
    assert (step.std == 0).all()


@pytest.mark.parametrize("steps", [1, 2, 10, 40])
def test_every_step_of_a_schedule_is_finite(steps: int) -> None:
    schedule = flow.shifted_sigmas(steps, 3.0)
    x, v = normal(0, torch.float32), normal(1, torch.float32)
    for now, then in pairwise(schedule):
        sde = flow.sde_transition(x, v, now, then, A, schedule[1])
        cps = flow.cps_transition(x, v, now, then, A)
        weight = flow.sde_kl_weight(now, then, A, schedule[1])
        for value in (sde.mean, sde.std, cps.mean, cps.std, weight, flow.log_prob(sde, v)):
            assert value.isfinite().all()
        assert (sde.std > 0).all()
        assert weight > 0


def test_sample_is_mean_plus_scaled_noise_and_has_its_log_prob() -> None:
    step = flow.sde_transition(X, V, SIGMA, SIGMA_NEXT, A, SIGMA_MAX)
    x_next = flow.sample(step, NOISE)
    torch.testing.assert_close((x_next - step.mean) / step.std, NOISE)
    expected = Normal(step.mean, step.std.expand(SHAPE)).log_prob(x_next).mean((1, 2, 3))
    torch.testing.assert_close(flow.log_prob(step, x_next), expected)


# The marginals of the SDE


def gaussian_velocity(x: torch.Tensor, sigma: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """E[eps - x0 | x] where the data are N(mean, std^2): the exact velocity field of that flow."""
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    off_centre = x - (1 - sigma) * mean
    return sigma / variance * off_centre - (mean + (1 - sigma) * std**2 / variance * off_centre)


def sde_end(steps: int, mean: float, std: float) -> tuple[float, float]:
    """Mean and variance at sigma 0.1 after ``steps`` SDE steps from the exact marginal at 0.8.

    A step is affine in x, so two probes give its slope and offset, and the moments follow without sampling.
    """
    path = torch.linspace(0.8, 0.1, steps + 1, dtype=torch.float64)
    centre, variance = 0.2 * mean, (0.2 * std) ** 2 + 0.8**2
    probes = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    for now, then in pairwise(path):
        step = flow.sde_transition(probes, gaussian_velocity(probes, now, mean, std), now, then, A, path[0])
        offset, top = step.mean.flatten().tolist()
        centre = offset + (top - offset) * centre
        variance = (top - offset) ** 2 * variance + float(step.std) ** 2
    return centre, variance


def test_sde_keeps_the_marginals_of_the_flow_to_first_order() -> None:
    mean, std = 1.5, 0.5
    exact = (0.9 * std) ** 2 + 0.1**2
    ends = [sde_end(steps, mean, std) for steps in (50, 100, 200, 400)]
    errors = [abs(variance - exact) for _, variance in ends]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders[-1] == pytest.approx(1.0, abs=0.05), (errors, orders)
    assert errors[-1] < 0.02 * exact
    # The path of the mean is straight, so every step size keeps it.
    assert [centre for centre, _ in ends] == pytest.approx([0.9 * mean] * 4, abs=1e-12)


# KL


@pytest.mark.parametrize("sampler", ["sde", "cps"])
def test_weighted_velocities_are_the_kl_of_the_two_normals(sampler: str) -> None:
    if sampler == "sde":
        now, then = SIGMA, SIGMA_NEXT
        student, teacher = (flow.sde_transition(X, v, now, then, A, SIGMA_MAX) for v in (V, V2))
        weight = flow.sde_kl_weight(now, then, A, SIGMA_MAX)
    else:
        now, then = sigmas(1.0, 0.6, 0.2), sigmas(0.9, 0.4, 0.1)  # no KL on the last step
        student, teacher = (flow.cps_transition(X, v, now, then, A) for v in (V, V2))
        weight = flow.cps_kl_weight(now, then, A)
    std = student.std.expand(SHAPE)
    exact = kl_divergence(Normal(student.mean, std), Normal(teacher.mean, std)).mean((1, 2, 3))
    torch.testing.assert_close(flow.velocity_kl(V, V2, weight), exact)
    torch.testing.assert_close(flow.transition_kl(student.mean, teacher.mean, student.std), exact)


def test_named_weights() -> None:
    arguments = (SIGMA, SIGMA_NEXT, A, SIGMA_MAX)
    exact = flow.kl_weight("transition", *arguments)
    torch.testing.assert_close(exact, flow.sde_kl_weight(*arguments))
    torch.testing.assert_close(flow.kl_weight("velocity", *arguments), torch.ones(3, dtype=torch.float64))
    # The public code's KL: the difference of the means over 2 s^2, s without the step size.
    student, teacher = (flow.sde_transition(X, v, *arguments) for v in (V, V2))
    s = A * (SIGMA / (1 - torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64))).sqrt()
    public = ((student.mean - teacher.mean) ** 2).mean((1, 2, 3)) / (2 * s**2)
    torch.testing.assert_close(flow.velocity_kl(V, V2, flow.kl_weight("flow-opd-code", *arguments)), public)


def test_unknown_weight_names_the_value_and_the_choices() -> None:
    with pytest.raises(RequestError, match="transition, flow-opd-code, velocity, but got 'exact'"):
        flow.kl_weight("exact", SIGMA, SIGMA_NEXT, A, SIGMA_MAX)


def test_exact_weight_of_ten_steps_sits_on_the_last_two() -> None:
    # 48 % and 34 % at T = 10, shift 3, a = 0.7: evaluated by hand from w = D/2 (1/s + s (1 - sigma)/(2 sigma))^2.
    schedule = flow.shifted_sigmas(10, 3.0).double()
    weights = flow.kl_weight("transition", schedule[:-1], schedule[1:], A, schedule[1])
    share = weights / weights.sum()
    assert float(share[-1]) == pytest.approx(0.48, abs=0.01)
    assert float(share[-2]) == pytest.approx(0.34, abs=0.01)


@given(seed=st.integers(0, 100), scale=st.floats(0.0, 10.0))
@settings(max_examples=20, deadline=None)
def test_kl_is_symmetric_quadratic_and_zero_only_at_equality(seed: int, scale: float) -> None:
    std = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64)
    other = X + scale * normal(seed + 10)
    kl = flow.transition_kl(X, other, std)
    torch.testing.assert_close(kl, flow.transition_kl(other, X, std))
    torch.testing.assert_close(4 * kl, flow.transition_kl(X, X + 2 * (other - X), std))
    assert ((kl > 0) == bool((other != X).any())).all()


# Shapes and dtypes


def per_sample_results(order: torch.Tensor) -> list[torch.Tensor]:
    x, v, v2, noise, now, then = (t[order] for t in (X, V, V2, NOISE, SIGMA, SIGMA_NEXT))
    step = flow.sde_transition(x, v, now, then, A, SIGMA_MAX)
    cps = flow.cps_transition(x, v, now, then, A)
    weight = flow.kl_weight("transition", now, then, A, SIGMA_MAX)
    x_next = flow.sample(step, noise)
    kl = flow.velocity_kl(v, v2, weight)
    return [step.mean, step.std, cps.mean, cps.std, x_next, flow.log_prob(step, x_next), weight, kl]


def test_permuting_the_batch_permutes_every_result() -> None:
    order = torch.tensor([2, 0, 1])
    for plain, permuted in zip(per_sample_results(torch.arange(3)), per_sample_results(order), strict=True):
        torch.testing.assert_close(permuted, plain[order], rtol=0, atol=0)


def test_one_sigma_for_all_equals_the_same_sigma_for_each() -> None:
    now, then = sigmas(0.6, 0.4)
    shared = flow.sde_transition(X, V, now, then, A, SIGMA_MAX)
    each = flow.sde_transition(X, V, now.expand(3), then.expand(3), A, SIGMA_MAX)
    torch.testing.assert_close(shared.mean, each.mean)
    assert (shared.std.shape, each.std.shape) == ((1, 1, 1, 1), (3, 1, 1, 1))
    assert flow.log_prob(shared, X).shape == flow.log_prob(each, X).shape == (3,)
    assert flow.velocity_kl(V, V2, flow.sde_kl_weight(now, then, A, SIGMA_MAX)).shape == (3,)


@pytest.mark.parametrize("given_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_is_computed_and_returned_in_float32(given_dtype: torch.dtype) -> None:
    x, v, v2 = (t.to(given_dtype) for t in (X, V, V2))
    now, then, top = (t.float() for t in (SIGMA, SIGMA_NEXT, SIGMA_MAX))
    step = flow.sde_transition(x, v, now, then, A, top)
    wide = flow.sde_transition(x.float(), v.float(), now, then, A, top)
    torch.testing.assert_close(step.mean, wide.mean, rtol=0, atol=0)
    kl = flow.velocity_kl(v, v2, flow.sde_kl_weight(now, then, A, top))
    guided = flow.guided_velocity(v, v2, 4.5)
    torch.testing.assert_close(guided, flow.guided_velocity(v.float(), v2.float(), 4.5), rtol=0, atol=0)
    for result in (step.mean, step.std, kl, guided, flow.ode_step(x, v, now, then), flow.sample(step, v)):
        assert result.dtype == torch.float32


def test_gradient_of_the_weighted_kl_is_that_of_the_kl_of_the_means() -> None:
    v = V.clone().requires_grad_()
    step = flow.sde_transition(X, v, SIGMA, SIGMA_NEXT, A, SIGMA_MAX)
    teacher = flow.sde_transition(X, V2, SIGMA, SIGMA_NEXT, A, SIGMA_MAX)
    (through_means,) = torch.autograd.grad(flow.transition_kl(step.mean, teacher.mean, step.std).sum(), v)
    weight = flow.sde_kl_weight(SIGMA, SIGMA_NEXT, A, SIGMA_MAX)
    (through_velocities,) = torch.autograd.grad(flow.velocity_kl(v, V2, weight).sum(), v)
    torch.testing.assert_close(through_means, through_velocities)


def test_no_function_waits_for_the_device() -> None:
    """On the meta device there are no values, so reading one on the host, or branching on one, would raise."""
    x, v, now, then, top = (t.to("meta") for t in (X, V, SIGMA, SIGMA_NEXT, SIGMA_MAX))
    step = flow.sde_transition(x, v, now, then, A, top)
    cps = flow.cps_transition(x, v, now, then, A)
    flow.log_prob(step, flow.sample(step, x))
    flow.transition_kl(step.mean, cps.mean, step.std)
    flow.guided_velocity(x, v, now)
    flow.ode_step(x, v, now, then)
    flow.cps_kl_weight(now, then, A)
    for name in flow.KL_WEIGHTS:
        assert flow.velocity_kl(x, v, flow.kl_weight(name, now, then, A, top)).shape == (3,)
