"""Flow-GRPO: the student draws groups of pictures of one prompt; what scores above its group becomes likelier.

Liu et al., arXiv 2505.05470, with two small variants: a *window* (Flow-GRPO-Fast: noise, and training, on a few
neighbouring steps only, the same for the whole batch) and the trust rule of Flow-DPPO in place of the clip. With
several rewards in a task, or tasks with different rewards, this is GRPO-Mix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from accelerate.utils import gather_object
from torch import Tensor

from flowopd_eval import flow
from training import objectives
from training.config import GRPOConfig, NFTConfig
from training.data import Mixture, Sample
from training.loop import Means, Parallel
from training.policies import Conditions, Policies
from training.rewards import Rewards
from training.rollout import Schedule, Step, generators, noise_like, rollout, windows


@dataclass
class Drawn:
    """A micro batch of finished trajectories: the steps to train on, and the judgement under way."""

    samples: Sequence[Sample]
    conditions: Conditions
    steps: list[Step]
    judged: Future[list[dict[str, float]]]


def judged_advantages(
    config: GRPOConfig | NFTConfig,
    drawn: Sequence[tuple[Sequence[Sample], Future[list[dict[str, float]]]]],
    parallel: Parallel,
    device: torch.device,
    means: Means,
) -> list[Tensor]:
    """Each micro batch's advantages (B,), from the rewards of the whole batch over all processes."""
    mine = [values for _, judged in drawn for values in judged.result()]
    samples = [sample for batch, _ in drawn for sample in batch]
    for sample, values in zip(samples, mine, strict=True):
        for name, value in values.items():
            means.add(f"reward/{sample.task.name}" if name == "total" else f"{name}/{sample.task.name}", value)
        means.add("unscored", float(values["total"] != values["total"]))
    rewards = torch.tensor([values["total"] for values in gather_object(mine)])
    advantages = objectives.group_advantage(rewards, config.group, config.std)
    flat = ~advantages.unflatten(0, (-1, config.group)).any(-1)
    means.add("groups_without_variance", flat.float().mean())
    part = torch.tensor(parallel.part(advantages.tolist()), device=device)
    return list(part.split(config.micro_batch))


class GRPO:
    """Groups, rewards, advantages; then the clipped (or trusted) policy gradient on the steps that were noisy."""

    def __init__(self, config: GRPOConfig, policies: Policies, mixture: Mixture, parallel: Parallel) -> None:
        self.config, self.policies, self.mixture, self.parallel = config, policies, mixture, parallel
        r, record = config.rollout, policies.record
        self.guidance = policies.guidance
        self.base = replace(policies.base, guidance=self.guidance)
        self.schedule = Schedule.of(r.steps, record.shift, r.sampler, r.a, policies.device)
        self.rewards = Rewards(config.tasks)

    def identity(self) -> dict:
        """The rewards."""
        return self.rewards.identity()

    def needed(self, first: int) -> Iterator[Sample]:
        """The samples of all steps from ``first`` on."""
        return self.mixture.between(first, self.config.steps)

    def updates(self, step: int) -> Iterator[Means]:
        """Draw and judge a batch, then accumulate the gradients of each of its updates and yield its means."""
        noisy = self._noisy_steps(step)
        samples = self.mixture.samples(step)
        # Updates cut the batch before processes do: which samples make up an update does not depend on their number.
        size = len(samples) // self.config.updates
        drawn = [
            self._draw(micro, noisy)
            for start in range(0, len(samples), size)
            for micro, _ in self.parallel.micro_batches(samples[start : start + size], self.config.micro_batch)
        ]
        means = Means()
        judged = [(batch.samples, batch.judged) for batch in drawn]
        advantages = judged_advantages(self.config, judged, self.parallel, self.policies.device, means)
        size = len(drawn) // self.config.updates
        for start in range(0, len(drawn), size):
            chunk = list(zip(drawn, advantages, strict=True))[start : start + size]
            # Groups that all scored alike teach nothing; without a pull to the base their forwards can be saved.
            live = [pair for pair in chunk if self.config.beta or pair[1].any()] or chunk[-1:]
            for batch, advantage in live:
                self._accumulate(batch, advantage, batch is live[-1][0], len(chunk) * self.config.micro_batch, means)
            yield means
            means = Means()

    def _noisy_steps(self, step: int) -> list[bool]:
        """On which steps this batch has noise and is trained."""
        r = self.config.rollout
        seed = int(hashlib.sha256(f"window|{self.config.seed}|{step}".encode()).hexdigest()[:8], 16)
        chosen = windows([seed], r.trainable, r.window, r.bounds)[0]
        return [i in chosen and self.schedule.stochastic[i] for i in range(r.steps)]

    @torch.no_grad()
    def _draw(self, samples: Sequence[Sample], noisy: Sequence[bool]) -> Drawn:
        conditions = self.policies.conditions([sample.prompt.prompt for sample in samples])
        sources = generators([sample.seed for sample in samples])
        start = noise_like(torch.empty(len(samples), *self.policies.latent_shape, device=self.policies.device), sources)
        if self.config.shared_noise:
            start = (
                start.unflatten(0, (-1, self.config.group))[:, :1]
                .expand(-1, self.config.group, -1, -1, -1)
                .flatten(0, 1)
            )

        def velocity(i: int, x: Tensor) -> Tensor:
            return self.policies.student(x, self.schedule.sigmas[i], conditions, self.guidance)

        steps = list(rollout(self.schedule, velocity, start, sources, noisy))
        pictures = self.policies.decode(steps[-1].x_next)
        return Drawn(samples, conditions, [s for s in steps if noisy[s.i]], self.rewards.submit(pictures, samples))

    def _accumulate(self, batch: Drawn, advantage: Tensor, last: bool, samples: int, means: Means) -> None:
        for step in batch.steps:
            with self.parallel.sync(last and step is batch.steps[-1]):
                v = self.policies.student(step.x, self.schedule.sigmas[step.i], batch.conditions, self.guidance)
                transition = self.schedule.transition(step.i, step.x, v)
                loss = self._surrogate(step, transition, advantage, means)
                if self.config.beta:
                    loss = loss + self.config.beta * self._kl_to_base(step, transition, batch.conditions, means)
                means.add("loss", *loss)
                self.parallel.backward(loss.sum() / len(batch.steps), samples)

    def _surrogate(self, step: Step, transition: flow.Transition, advantage: Tensor, means: Means) -> Tensor:
        log_prob, old = flow.log_prob(transition, step.x_next), flow.log_prob(step.transition, step.x_next)
        means.add("ratio_deviation", *(log_prob - old).exp().sub(1).abs())
        if self.config.trust == "clip":
            return objectives.clipped_surrogate(log_prob, old, advantage, self.config.clip)
        moved = flow.transition_kl(transition.mean, step.transition.mean, transition.std)
        return objectives.trusted_surrogate(log_prob, old, advantage, moved, self.config.tau)

    def _kl_to_base(self, step: Step, transition: flow.Transition, conditions: Conditions, means: Means) -> Tensor:
        base = [self.base] * len(step.x)
        theirs = self.policies.frozen(base, step.x, self.schedule.sigmas[step.i], conditions)
        kl = flow.transition_kl(transition.mean, self.schedule.transition(step.i, step.x, theirs).mean, transition.std)
        means.add("kl/base", *kl)
        return kl
