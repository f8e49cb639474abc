"""Schedules and their weights; trajectories: whose transition, whose noise, where; windows."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flowopd_eval import flow
from flowopd_eval.errors import RequestError
from training.rollout import Schedule, generators, inclusion, noise_like, rollout, solve, windows

A, STEPS = 0.7, 6
SHAPE = (2, 3, 5)
SEEDS = [14, 11, 13, 12]


def schedule(sampler: str) -> Schedule:
    return Schedule.of(STEPS, 3.0, sampler, A)


@pytest.mark.parametrize("steps", [1, 10])
def test_the_sigmas_are_the_schedulers(steps: int) -> None:
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    assert torch.equal(Schedule.of(steps, 3.0, "sde", A).sigmas, scheduler.sigmas)
    assert Schedule.of(steps, 3.0, "sde", A).steps == steps


def by_hand(name: str, sampler: str) -> list[float]:
    """The weights from the formulas of the papers, step by step in Python's floats."""
    sigmas, weights = schedule(sampler).sigmas.tolist(), []
    for sigma, following in pairwise(sigmas):
        step = sigma - following
        s = A * math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
        exact = step / 2 * (1 / s + s * (1 - sigma) / (2 * sigma)) ** 2
        if sampler == "cps":
            s = following * math.sin(A * math.pi / 2)
            gap = (1 - sigma) * math.sqrt(following**2 - s**2) - sigma * (1 - following)
            exact = gap**2 / (2 * s**2) if s else 0.0  # no noise, no density, no KL: the last step
        weights.append({"transition": exact, "flow-opd-code": step * exact, "velocity": 1, "euler": step**2 / 2}[name])
    return weights


@pytest.mark.parametrize(
    ("sampler", "names"),
    [
        ("sde", ["transition", "flow-opd-code", "velocity", "euler"]),
        ("cps", ["transition", "velocity", "euler"]),
        ("ode", ["velocity", "euler"]),
    ],
)
def test_weights_are_their_formulas(sampler: str, names: list[str]) -> None:
    for name in names:
        assert schedule(sampler).kl_weights(name).tolist() == pytest.approx(by_hand(name, sampler), rel=2e-5), name


@pytest.mark.parametrize("a", [0.0, A])
def test_the_ode_has_no_transition_to_weigh(a: float) -> None:
    with pytest.raises(RequestError, match="'transition' is defined on no step of the sampler 'ode'"):
        Schedule.of(STEPS, 3.0, "ode", a).kl_weights("transition")


@pytest.mark.parametrize(("sampler", "last"), [("sde", True), ("cps", False)])
def test_a_step_has_density_and_weight_where_it_has_noise(sampler: str, last: bool) -> None:
    steps, x = schedule(sampler), torch.ones(1, *SHAPE)
    assert steps.stochastic == [True] * (STEPS - 1) + [last]
    assert [bool(steps.transition(i, x, x).std > 0) for i in range(STEPS)] == steps.stochastic
    assert (steps.kl_weights("transition") > 0).tolist() == steps.stochastic


def velocity(i: int, x: Tensor) -> Tensor:
    """Elementwise, so that its rounding does not depend on the batch."""
    return 0.3 * x * x - 0.4 * x + 0.1 * (i + 1)


def replay(steps: Schedule, noisy: list[bool], seed: int) -> list[Tensor]:
    """The states of one trajectory, straight from the formulas."""
    source = torch.Generator().manual_seed(seed)
    states = [torch.randn(1, *SHAPE, generator=source)]
    for i, (sigma, following) in enumerate(pairwise(steps.sigmas)):
        x, v = states[-1], velocity(i, states[-1])
        if not noisy[i]:
            states.append(flow.ode_step(x, v, sigma, following))
            continue
        if steps.sampler == "sde":
            step = flow.sde_transition(x, v, sigma, following, A, steps.sigmas[1])
        else:
            step = flow.cps_transition(x, v, sigma, following, A)
        states.append(step.mean + step.std * torch.randn(1, *SHAPE, generator=source))
    return states


@pytest.mark.parametrize("window", [None, (2, 3)])
@pytest.mark.parametrize("sampler", ["sde", "cps", "ode"])
def test_a_trajectory_is_its_seeds_and_its_samplers_whatever_else_is_in_the_batch(sampler: str, window) -> None:
    """Steps outside the window, and all of the ODE's, are Euler steps, and draw no noise."""
    steps = schedule(sampler)
    noisy = steps.stochastic if window is None else [i in window and sampler != "ode" for i in range(STEPS)]
    for seeds in (SEEDS, sorted(SEEDS), SEEDS[1:2]):
        sources = generators(seeds)
        start = noise_like(torch.empty(len(seeds), *SHAPE), sources)
        drawn = list(rollout(steps, velocity, start, sources, None if window is None else noisy))
        states = torch.stack([start, *(step.x_next for step in drawn)])
        assert torch.equal(states, torch.stack([torch.cat(replay(steps, noisy, seed)) for seed in seeds], 1))
        assert len(states[-1].unique(dim=0)) == len(seeds)
        for step in drawn:
            assert torch.equal(step.x, states[step.i])
            assert torch.equal(step.velocity, velocity(step.i, step.x))
            assert bool(step.transition.std > 0) == noisy[step.i]


@pytest.mark.parametrize("sampler", ["sde", "cps", "ode"])
def test_no_gradient_passes_from_step_to_step(sampler: str) -> None:
    theta, asked = torch.tensor(0.5, requires_grad=True), []

    def trained(i: int, x: Tensor) -> Tensor:
        asked.append((i, x))
        return theta * x

    for step in rollout(schedule(sampler), trained, torch.ones(4, *SHAPE), generators(SEEDS)):
        # Asked once a step, and for the next step only when this one has been used.
        assert [i for i, _ in asked] == list(range(step.i + 1))
        assert asked[-1][1] is step.x
        parts = (step.x, step.velocity, step.transition.mean, step.transition.std, step.x_next)
        assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize(("window", "allowed"), [(1, None), (2, None), (2, (1, 5)), (3, (2, 5)), (STEPS, None)])
def test_windows_lie_in_their_range_reach_all_of_it_and_are_their_seeds(window: int, allowed) -> None:
    low, high = allowed or (0, STEPS)
    chosen = windows(range(200), STEPS, window, allowed)
    assert all(steps == list(range(steps[0], steps[0] + window)) for steps in chosen)
    assert {steps[0] for steps in chosen} == set(range(low, high - window + 1))
    assert chosen == [windows([seed], STEPS, window, allowed)[0] for seed in range(200)]


@pytest.mark.parametrize(("window", "allowed"), [(None, None), (1, (1, 4)), (2, None), (2, (1, 5)), (STEPS, None)])
def test_the_share_of_samples_that_train_a_step_is_that_of_drawn_windows(window, allowed) -> None:
    drawn = windows(range(4000), STEPS, window, allowed)
    for i, share in enumerate(inclusion(STEPS, window, allowed)):
        assert share == pytest.approx(sum(i in steps for steps in drawn) / len(drawn), abs=0.03)


def test_without_a_window_every_step_is_trained() -> None:
    assert windows([1, 2**32 - 1], 4, None, None) == [[0, 1, 2, 3]] * 2


def test_the_two_step_solver_is_of_second_order() -> None:
    # dx/dsigma = x * sigma has the solution x_1 exp((sigma^2 - 1) / 2).
    x = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    errors = []
    for steps in (20, 40, 80):
        schedule = Schedule(flow.shifted_sigmas(steps, 3.0).double(), "ode", 0.0)
        end = solve(schedule, lambda i, x, s=schedule.sigmas: x * s[i], x)
        errors.append(abs(float(end) - 2.0 * math.exp(-0.5)))
    assert errors[0] < 0.01
    for coarse, fine in pairwise(errors):
        assert 3.3 < coarse / fine < 4.7


def test_the_solver_of_first_order_is_the_ode_s_rollout() -> None:
    x, schedule = torch.randn(2, 1, 3, 3), Schedule.of(5, 3.0, "ode", 0.0)

    def velocity(i: int, x: Tensor) -> Tensor:
        return x * schedule.sigmas[i] + x.roll(1, -1)

    *_, last = rollout(schedule, velocity, x, generators([0, 1]))
    torch.testing.assert_close(solve(schedule, velocity, x, order=1), last.x_next)


def test_the_two_step_solver_begins_as_euler_and_is_exact_for_a_velocity_that_does_not_change() -> None:
    x = torch.randn(2, 1, 3, 3)
    one = Schedule.of(1, 3.0, "ode", 0.0)
    torch.testing.assert_close(solve(one, lambda i, x: 3 * x, x), x - 3 * x)
    constant = torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(solve(Schedule.of(7, 3.0, "ode", 0.0), lambda i, x: constant, x), x - constant)
