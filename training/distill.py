"""Flow-OPD: the student draws, each sample's own teacher says what it would have done at every state the student meets.

Fang et al., arXiv 2605.08063. One update: trajectories of a batch of prompts; at each trained step the student's guided
velocity (with gradient), those of the routed teacher and of the anchor (one pass, without), the loss of
:mod:`training.objectives`, its backward at once, and on to the next state, which carries no gradient. So the forward
that draws is the forward that is trained, and the gradient is exactly on-policy. No reward, no log-probability.

:class:`PolicyGradient` adds what the direct objective leaves out: that an action decides the states that follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from flowopd_eval import flow
from training import objectives
from training.config import DistillConfig
from training.data import Mixture, Sample
from training.loop import Means, Parallel
from training.policies import ANCHOR, Conditions, Policies
from training.rollout import Schedule, Step, generators, inclusion, noise_like, rollout, windows


class Distillation:
    """The direct objective, on states of the SDE, of CPS or of the ODE."""

    def __init__(self, config: DistillConfig, policies: Policies, mixture: Mixture, parallel: Parallel) -> None:
        self.config, self.policies, self.mixture, self.parallel = config, policies, mixture, parallel
        r, record = config.rollout, policies.record
        self.guidance = policies.guidance
        self.schedule = Schedule.of(r.steps, record.shift, r.sampler, r.a, policies.device)
        self.weights = self.schedule.kl_weights(config.kl_weight)
        reached = inclusion(r.trainable, r.window, r.bounds)
        # Plain numbers: what is asked of a tensor on the device at every step makes the host wait for it.
        weights = self.weights.tolist()
        self.defined = [i < len(reached) and reached[i] > 0 and weight > 0 for i, weight in enumerate(weights)]
        # A sample's loss is the mean over the steps that can be trained on; of a window, an unbiased estimate of it.
        defined = torch.tensor(sum(self.defined))  # in fp32, as the weights are
        self.share = [float(1 / (defined * reached[i])) if ok else 0.0 for i, ok in enumerate(self.defined)]
        self.anchor = config.pull

    def identity(self) -> dict:
        """Nothing beyond the recipe."""
        return {}

    def needed(self, first: int) -> Iterator[Sample]:
        """The samples of all steps from ``first`` on."""
        return self.mixture.between(first, self.config.steps)

    def updates(self, step: int) -> Iterator[Means]:
        """Accumulate the gradients of one update and yield its means."""
        means = Means()
        for samples, last in self.parallel.micro_batches(self.mixture.samples(step), self.config.micro_batch):
            self.accumulate(samples, last, means)
        yield means

    def accumulate(self, samples: Sequence[Sample], last: bool, means: Means) -> None:
        """Gradients of one micro batch; they are shared between processes on its last backward if it is the last."""
        trained = self._trained_steps(samples)
        final = max(steps[-1] for steps in trained)
        conditions = self.policies.conditions([sample.prompt.prompt for sample in samples])

        def velocity(i: int, x: Tensor) -> Tensor:
            rows = [row for row, steps in enumerate(trained) if i in steps]
            whole = len(rows) == len(x)  # nothing to pick: to send the rows, the host waits for the device
            v = torch.empty(x.shape, device=x.device)
            if rows:
                states = x if whole else x[rows]
                with self.parallel.sync(last and i == final):
                    ours = self.policies.student(states, self.schedule.sigmas[i], conditions[rows], self.guidance)
                    loss = self._loss(i, states, ours, conditions[rows], [samples[row] for row in rows], means)
                    self.parallel.backward(self.share[i] * loss.sum())
                means.add("loss", *loss)
                if whole:
                    return ours.detach().float()
                v[rows] = ours.detach()
            if others := [row for row in range(len(x)) if row not in rows]:
                with torch.no_grad():
                    rest = self.policies.student(x[others], self.schedule.sigmas[i], conditions[others], self.guidance)
                v[others] = rest
            return v

        self._follow(samples, conditions, list(self._draw(samples, velocity)))

    def _draw(self, samples: Sequence[Sample], velocity) -> Iterator[Step]:  # noqa: ANN001
        sources = generators([sample.seed for sample in samples])
        start = torch.empty(len(samples), *self.policies.latent_shape, device=self.policies.device)
        return rollout(self.schedule, velocity, noise_like(start, sources), sources)

    def _trained_steps(self, samples: Sequence[Sample]) -> list[list[int]]:
        r = self.config.rollout
        drawn = windows([sample.seed for sample in samples], r.trainable, r.window, r.bounds)
        return [[i for i in steps if self.defined[i]] for steps in drawn]

    def _loss(
        self, i: int, x: Tensor, ours: Tensor, conditions: Conditions, samples: Sequence[Sample], means: Means
    ) -> Tensor:
        """The KL to each row's teacher and, weighted, to the anchor at step ``i``: (B,)."""
        rows = list(range(len(samples)))
        pulled = self._pulled(i, samples)
        experts = [self.policies.experts[str(sample.task.teacher)] for sample in samples]
        experts += [self.policies.experts[ANCHOR] for _ in pulled]
        states = torch.cat([x, x if pulled == rows else x[pulled]])
        frozen = self.policies.frozen(experts, states, self.schedule.sigmas[i], conditions[[*rows, *pulled]])
        kl = objectives.distillation(ours, frozen[: len(rows)], self.weights[i])
        for sample, value in zip(samples, kl.detach(), strict=True):
            means.add(f"kl/{sample.task.name}", value)
        if not (self.anchor and pulled):
            return kl
        chosen = ours if pulled == rows else ours[pulled]
        pull = objectives.distillation(chosen, frozen[len(rows) :], self.weights[i])
        means.add("kl/anchor", *pull.detach())
        weighted = self.anchor.weight * self.anchor.every * pull
        return kl + (weighted if pulled == rows else torch.zeros_like(kl).index_put((torch.tensor(pulled),), weighted))

    def _pulled(self, i: int, samples: Sequence[Sample]) -> list[int]:
        """The rows that are held to the anchor at step ``i``.

        With ``every`` above 1 each sample has its own steps, evenly spaced from a place that its seed decides: over the
        seeds the mean is the whole sum, whatever micro batch or process a sample is in.
        """
        if not self.anchor:
            return []
        return [row for row, sample in enumerate(samples) if (i + sample.seed) % self.anchor.every == 0]

    def _follow(self, samples: Sequence[Sample], conditions: Conditions, steps: list[Step]) -> None:
        """What comes after the trajectories; nothing for the direct objective."""


class PolicyGradient(Distillation):
    """The gradient of the whole trajectory's KL: the direct term, and a score-function term with the reward-to-go.

    ``config.advantage`` is ``leave_one_out`` (unbiased) or ``normalised`` (by group mean and std, as GRPO does);
    ``config.clip`` clips the ratio, which is 1 as long as a batch is used for one update.
    """

    def accumulate(self, samples: Sequence[Sample], last: bool, means: Means) -> None:
        """As the parent's, but gradients are shared at the end of the second pass."""
        super().accumulate(samples, False, means)
        self._second_pass(samples, last)

    def _follow(self, samples: Sequence[Sample], conditions: Conditions, steps: list[Step]) -> None:
        # Kept in no graph: what an action is worth is a number.
        kl = [self._loss(step.i, step.x, step.velocity, conditions, samples, Means()) for step in steps]
        self._steps, self._conditions, self._kl = steps, conditions, kl

    def _second_pass(self, samples: Sequence[Sample], last: bool) -> None:
        group, advantage = self.config.group, self.config.advantage
        to_go = objectives.reward_to_go(torch.stack(self._kl), self._steps[0].x[0].numel())  # (T, B)
        baseline = (
            partial(objectives.group_advantage, std="group") if advantage == "normalised" else objectives.leave_one_out
        )
        advantages = baseline(to_go, group)
        trained = self._trained_steps(samples)
        stochastic = [step for step in self._steps if self.schedule.stochastic[step.i]]
        for step in stochastic:
            asked = torch.tensor([step.i in steps for steps in trained], device=step.x.device)
            with self.parallel.sync(last and step is stochastic[-1]):
                v = self.policies.student(step.x, self.schedule.sigmas[step.i], self._conditions, self.guidance)
                log_prob = flow.log_prob(self.schedule.transition(step.i, step.x, v), step.x_next)
                old = flow.log_prob(step.transition, step.x_next)
                loss = (
                    objectives.surrogate(log_prob, old, advantages[step.i])
                    if self.config.clip is None
                    else objectives.clipped_surrogate(log_prob, old, advantages[step.i], self.config.clip)
                )
                self.parallel.backward(self.share[step.i] * (loss * asked).sum())
