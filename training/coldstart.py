"""Cold starts: fine-tuning on the teachers' own pictures, and the merge of their adapters (Flow-OPD, section 3)."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowopd_eval.adapters import merge_adapters, write_adapter
from flowopd_eval.errors import RequestError
from flowopd_eval.flow import ode_step, shifted_sigmas
from flowopd_eval.models import pass_on_settings
from flowopd_eval.pipeline import draw_noise
from training.config import MergeConfig, SFTConfig
from training.data import Mixture, Sample, Text
from training.loop import Means, Parallel
from training.policies import Policies, adapter_of
from training.rewards import Rewards
from training.rollout import forward_noise


class SFT:
    """Flow matching on pictures that the routed teachers drew, once and kept as latents.

    Picture n is drawn for sample n of the recipe's sequence of samples; step by step, the batches go through the
    pictures in an order drawn anew for every pass. With ``best_of`` each picture is the one of so many that the task's
    rewards like best, and with ``least_reward`` those they do not like well enough are left out: with the base as
    teacher this is best-of-N (rejection sampling) fine-tuning on its own pictures.
    """

    def __init__(self, config: SFTConfig, policies: Policies, mixture: Mixture, parallel: Parallel) -> None:
        self.config, self.policies, self.parallel = config, policies, parallel
        drawn = config.pictures * config.best_of
        batches = range(-(-drawn // config.batch_size))
        self.candidates = [s for n in batches for s in mixture.samples(n)][:drawn]
        self.samples = self.candidates[:: config.best_of]
        self.rewards = Rewards(config.tasks) if config.judged else None
        self.folder = Path(config.out) / "pictures"
        self._pictures: dict[int, tuple[Tensor, Tensor]] = {}

    def identity(self) -> dict:
        """The rewards, where they choose."""
        return self.rewards.identity() if self.rewards else {}

    def needed(self, first: int) -> list[Sample]:
        """All of the pictures' samples: their order is drawn anew for every pass."""
        return self.samples

    def updates(self, step: int) -> Iterator[Means]:
        """Accumulate the gradients of one update and yield its means."""
        means = Means()
        batch = [self._index(step * self.config.batch_size + n) for n in range(self.config.batch_size)]
        for rows, last in self.parallel.micro_batches(batch, self.config.micro_batch):
            latents, rewards = zip(*map(self._picture, rows), strict=True)
            clean = torch.stack(latents).to(self.policies.device)
            wanted = self._wanted(torch.stack(rewards)).to(clean.device)
            samples = [self.samples[index] for index in rows]
            noise, sigma, keep = self._noise(step, samples, clean)
            text, empty = self.policies.conditions([s.prompt.prompt for s in samples]).at(
                self.policies.record.text_length
            )
            text = Text(
                torch.where(keep[:, None, None], text.states, empty.states),
                torch.where(keep[:, None], text.pooled, empty.pooled),
            )
            level = sigma[:, None, None, None]
            with self.parallel.sync(last):
                v = self.policies.student_velocity((1 - level) * clean + level * noise, sigma, text)
                loss = (v.float() - (noise - clean)).square().mean((1, 2, 3))
                self.parallel.backward((loss * wanted).sum())
            means.add("loss", *loss)
            if self.rewards:
                means.add("kept", *wanted)
        yield means

    def _index(self, position: int) -> int:
        """Which picture stands at ``position`` of the endless sequence of passes."""
        epoch, place = divmod(position, len(self.samples))
        source = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        return int(torch.randperm(len(self.samples), generator=source)[place])

    def _noise(self, step: int, samples: list[Sample], clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (B, C, H, W), noise levels (B,), whether the prompt is shown (B,): each sample's from its own seed."""
        names = [f"sft|{sample.seed}|{step}" for sample in samples]
        noise, sigma, sources = forward_noise(clean, names, self.config.sigma_mean, self.config.sigma_std)
        shown = torch.stack([torch.rand((), generator=source) for source in sources]) >= self.config.text_dropout
        return noise, sigma, shown.to(clean.device)

    def _wanted(self, rewards: Tensor) -> Tensor:
        """1.0 for pictures (B,) to train on, 0.0 for those whose reward is too low or unknown."""
        if self.rewards is None:
            return torch.ones_like(rewards)
        least = self.config.least_reward
        return (rewards >= (-torch.inf if least is None else least)).float()  # NaN is not

    def _picture(self, index: int) -> tuple[Tensor, Tensor]:
        """Latent (C, H, W) and reward () of a picture; the reward is NaN where none is asked for or known."""
        if index not in self._pictures:
            size = self.config.micro_batch
            first = index // size * size
            self._pictures.update(enumerate(zip(*self._block(first, size), strict=True), start=first))
        return self._pictures[index]

    def _block(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        """Latents and rewards of ``size`` pictures from the kept file, drawn where it is not there yet."""
        path = self.folder / f"{first:06d}.safetensors"
        samples = self.candidates[first * self.config.best_of : (first + size) * self.config.best_of]
        how = [self.policies.sha256, self.config.picture_steps, self.policies.record, self.policies.dtype]
        how += [self.config.best_of, json.dumps(self.identity())]
        for s in samples:
            e = self.policies.experts[str(s.task.teacher)]
            how += [s.prompt.prompt, s.seed, e.sha256, e.guidance, e.text_length]
        key = hashlib.sha256("|".join(map(str, how)).encode()).hexdigest()[:16]
        if path.is_file() and (kept := load_file(path)).keys() == {key, f"{key}.reward"}:
            return kept[key], kept[f"{key}.reward"]
        self.parallel.check_stopped()  # a first micro batch may ask for nearly all blocks
        drawn = [self._draw(samples[n : n + size]) for n in range(0, len(samples), size)]  # judged in the background
        latents = torch.cat([x for x, _ in drawn])
        rewards = torch.tensor([reward for _, rewards in drawn for reward in rewards()])
        best = rewards.nan_to_num(-torch.inf).unflatten(0, (-1, self.config.best_of)).argmax(1)
        chosen = torch.arange(len(best)) * self.config.best_of + best
        kept = {key: latents[chosen].contiguous(), f"{key}.reward": rewards[chosen]}
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{self.parallel.accelerator.process_index}.part")
        save_file(kept, part)
        part.replace(path)
        there = min(len(list(self.folder.glob("*.safetensors"))) * size, self.config.pictures)
        print(f"{there} of {self.config.pictures} pictures are drawn and kept in {self.folder}.", file=sys.stderr)
        return kept[key], kept[f"{key}.reward"]

    def _draw(self, samples: list[Sample]) -> tuple[Tensor, Callable[[], list[float]]]:
        """Latents (B, C, H, W) of the routed teachers' pictures, and what gives their rewards once it is asked."""
        policies, record = self.policies, self.policies.record
        sigmas = shifted_sigmas(self.config.picture_steps, record.shift).to(policies.device)
        x = draw_noise([s.seed for s in samples], policies.latent_shape).to(policies.device)
        conditions = policies.conditions([s.prompt.prompt for s in samples])
        teachers = [policies.experts[str(s.task.teacher)] for s in samples]
        for sigma, following in itertools.pairwise(sigmas):
            x = ode_step(x, policies.frozen(teachers, x, sigma, conditions), sigma, following)
        if self.rewards is None:
            return x.cpu(), lambda: [math.nan] * len(samples)
        judged = self.rewards.submit(policies.decode(x), samples)
        return x.cpu(), lambda: [values["total"] for values in judged.result()]


def merge(config: MergeConfig, out: Path) -> Path:
    """Write one adapter made of several, with its report beside it; returns the adapter's folder.

    Raises:
        RequestError: a teacher that is no adapter.
    """
    weighted = []
    for source, weight in config.teachers.items():
        adapter = adapter_of(source)
        if adapter is None:
            raise RequestError(f"{source} is no adapter; only adapters can be merged.")
        weighted.append((adapter, weight))
    merged, report = merge_adapters(weighted, config.rank, config.method)
    write_adapter(merged, out / "adapter", base_model=config.base)
    pass_on_settings(list(config.teachers), out / "adapter")
    found = {"sources": [a.source for a, _ in weighted], "sha256": [a.sha256 for a, _ in weighted], **asdict(report)}
    (out / "merge.json").write_text(json.dumps({"recipe": config.model_dump(), **found}, indent=2) + "\n")
    print(f"Cut off: {report.discarded_energy:.2%} of the mean's energy. Cosines between the teachers' changes:")
    for source, row in zip(config.teachers, report.cosines, strict=True):
        print("  " + " ".join(f"{value:6.3f}" for value in row) + f"  {source}")
    return out / "adapter"
