"""DiffusionNFT: good pictures of one's own against bad ones, on the forward process (Zheng et al., arXiv 2509.16117).

The student draws groups of pictures of one prompt with any solver; only the finished pictures are kept. They are noised
anew, and the velocity is moved towards what the good ones ask for and away from what the bad ones do
(:func:`training.objectives.contrast`). No trajectory, no density and no guidance are needed: the usual choice is
guidance 1, for drawing, training and use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowopd_eval.pipeline import draw_noise
from training import objectives
from training.config import NFTConfig
from training.data import Mixture, Sample
from training.grpo import judged_advantages
from training.loop import Means, Parallel
from training.policies import Conditions, Policies
from training.rewards import Rewards
from training.rollout import Schedule, forward_noise, solve


@dataclass
class Drawn:
    """A micro batch of finished pictures: their latents (B, C, H, W), and the judgement under way."""

    samples: Sequence[Sample]
    conditions: Conditions
    clean: Tensor
    judged: Future[list[dict[str, float]]]


@dataclass(frozen=True)
class Noised:
    """A micro batch under one noise: states, noise levels (B,), the pictures' own velocity, the old policy's.

    ``base`` is the base's velocity; None where nothing pulls to it.
    """

    x: Tensor
    sigma: Tensor
    target: Tensor
    old: Tensor
    base: Tensor | None


class NFT:
    """Groups, rewards, advantages as in GRPO; then the contrast, ``updates`` times with noise drawn anew."""

    def __init__(self, config: NFTConfig, policies: Policies, mixture: Mixture, parallel: Parallel) -> None:
        self.config, self.policies, self.mixture, self.parallel = config, policies, mixture, parallel
        self.schedule = Schedule.of(config.picture_steps, policies.record.shift, "ode", 0.0, policies.device)
        self.rewards = Rewards(config.tasks)
        self.base = replace(policies.base, guidance=config.guidance)

    def identity(self) -> dict:
        """The rewards."""
        return self.rewards.identity()

    def needed(self, first: int) -> Iterator[Sample]:
        """The samples of all steps from ``first`` on."""
        return self.mixture.between(first, self.config.steps)

    def updates(self, step: int) -> Iterator[Means]:
        """Draw and judge a batch, then accumulate the gradients of each of its updates and yield its means."""
        means = Means()
        samples = self.mixture.samples(step)
        drawn = [self._draw(micro) for micro, _ in self.parallel.micro_batches(samples, self.config.micro_batch)]
        judged = [(batch.samples, batch.judged) for batch in drawn]
        advantages = judged_advantages(self.config, judged, self.parallel, self.policies.device, means)
        pairs = list(zip(drawn, advantages, strict=True))
        # The old policy is the one that drew: it has to be asked before the first update. Groups that all scored alike
        # are trained on, too: the old policy and the base pull there as elsewhere.
        noised = [[self._noise(step, n, batch) for batch in drawn] for n in range(self.config.updates)]
        for of_update in noised:
            for (batch, advantage), states in zip(pairs, of_update, strict=True):
                last = batch is drawn[-1]
                self._accumulate(batch, states, advantage, last, len(pairs) * self.config.micro_batch, means)
            yield means
            means = Means()

    @torch.no_grad()
    def _draw(self, samples: Sequence[Sample]) -> Drawn:
        conditions = self.policies.conditions([sample.prompt.prompt for sample in samples])
        start = draw_noise([sample.seed for sample in samples], self.policies.latent_shape).to(self.policies.device)

        def velocity(i: int, x: Tensor) -> Tensor:
            return self.policies.student(x, self.schedule.sigmas[i], conditions, self.config.guidance)

        clean = solve(self.schedule, velocity, start, order=1 if self.config.solver == "euler" else 2)
        return Drawn(samples, conditions, clean, self.rewards.submit(self.policies.decode(clean), samples))

    @torch.no_grad()
    def _noise(self, step: int, update: int, batch: Drawn) -> Noised:
        """Noise the pictures, each from a seed of its own."""
        names = [f"nft|{sample.seed}|{step}|{update}" for sample in batch.samples]
        noise, sigma, _ = forward_noise(batch.clean, names, self.config.sigma_mean, self.config.sigma_std)
        share = sigma[:, None, None, None]
        x = (1 - share) * batch.clean + share * noise
        old = self.policies.student(x, sigma, batch.conditions, self.config.guidance)
        base = None
        if self.config.base_weight:
            base = self.policies.frozen([self.base] * len(x), x, sigma, batch.conditions)
        return Noised(x, sigma, noise - batch.clean, old, base)

    def _accumulate(
        self, batch: Drawn, states: Noised, advantage: Tensor, last: bool, samples: int, means: Means
    ) -> None:
        with self.parallel.sync(last):
            v = self.policies.student(states.x, states.sigma, batch.conditions, self.config.guidance)
            optimality = objectives.optimality(advantage, self.config.advantage_clip)
            loss = objectives.contrast(v, states.old, states.target, optimality, self.config.beta)
            if states.base is not None:
                from_base = (v - states.base).square().mean((1, 2, 3))
                means.add("from_base", *from_base.detach())
                loss = loss + self.config.base_weight * from_base
            means.add("loss", *loss)
            # Rises where the velocities stop being those of the student's own pictures: a run that drifts away.
            means.add("own_error", *(states.old - states.target).square().mean((1, 2, 3)))
            means.add("moved", *(v.detach() - states.old).square().mean((1, 2, 3)))
            self.parallel.backward(loss.sum(), samples)
