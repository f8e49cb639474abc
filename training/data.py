"""Prompts of the tasks, in which order they come, and their text embeddings.

Which prompts make up step n, and with which noise, is a function of the recipe, its seed and n alone: a resumed run
goes on with the prompts it would have had, and two processes share the batch that one would have drawn.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowopd_eval.drawbench import refuse_unscreened
from flowopd_eval.errors import RequestError
from flowopd_eval.prompts import read_prompts
from flowopd_eval.records import Prompt
from flowopd_eval.tiny.suite import quality_training_prompts, shapes_training_prompts, sign_training_prompts
from training.config import Task

BUILTIN: Mapping[str, Callable[[], tuple[list[Prompt], list[Prompt]]]] = {
    "builtin:shapes": shapes_training_prompts,
    "builtin:signs": sign_training_prompts,
    "builtin:all": quality_training_prompts,
}


KEPT = 512  # texts whose embeddings stay in memory


@dataclass(frozen=True)
class Sample:
    """One trajectory to draw: its prompt, the task that decides teacher and reward, and the seed of its noise."""

    prompt: Prompt
    task: Task
    seed: int


@dataclass(frozen=True)
class Prompts:
    """A task's prompts: those to train on and those held out to judge by."""

    training: list[Prompt]
    held_out: list[Prompt]


def task_prompts(task: Task) -> Prompts:
    """Read a task's prompts; ``task.held_out`` of a file's, chosen by the hash of their ids, are held out.

    Raises:
        RequestError: unknown builtin prompts, a file that cannot be read, or one with nothing left to train on.
    """
    if task.prompts.startswith("builtin:"):
        if task.prompts not in BUILTIN:
            raise RequestError(f"Task {task.name!r}: {task.prompts!r} is none of {', '.join(BUILTIN)}.")
        return Prompts(*BUILTIN[task.prompts]())
    refuse_unscreened(task.prompts)
    prompts = read_prompts(task.prompts, task=task.name)
    if len(prompts) <= task.held_out:
        raise RequestError(
            f"Task {task.name!r}: {task.prompts} has {len(prompts)} prompts, and held_out = {task.held_out} of them "
            "are kept from training; lower held_out or give more prompts."
        )
    order = sorted(prompts, key=lambda p: hashlib.sha256(p.id.encode()).digest())
    held = {p.id for p in order[: task.held_out]}
    return Prompts([p for p in prompts if p.id not in held], [p for p in prompts if p.id in held])


class Mixture:
    """Which samples make up which step.

    Tasks alternate so that their shares hold in every stretch of samples, not only on average. Within a task its
    prompts' own tags (GenEval's six, say) take turns, and of each tag every prompt comes once before any comes again.

    Args:
        tasks: the recipe's tasks.
        prompts: each task's prompts to train on, by its name.
        batch: samples a step.
        group: samples a prompt, side by side in the batch.
        seed: of orders and noise.
    """

    def __init__(
        self, tasks: Sequence[Task], prompts: Mapping[str, Sequence[Prompt]], batch: int, group: int, seed: int
    ) -> None:
        self.tasks, self.batch, self.group, self.seed = list(tasks), batch, group, seed
        self._tags = [_by_tag(prompts[t.name]) if t.balance == "tags" else [list(prompts[t.name])] for t in tasks]
        total = sum(task.share for task in tasks)
        self._shares = [task.share / total for task in tasks]
        self._order = lru_cache(maxsize=256)(self._shuffled)  # one for all samples of a round

    def samples(self, step: int) -> list[Sample]:
        """The samples of ``step``, the same however often and wherever it is asked."""
        groups = self.batch // self.group
        chosen = []
        for position in range(step * groups, (step + 1) * groups):
            task, occurrence = self._place(position)
            prompt = self._prompt(task, occurrence)
            chosen += [
                Sample(prompt, self.tasks[task], prompt.seed(self.seed, position * self.group + k))
                for k in range(self.group)
            ]
        return chosen

    def between(self, first: int, last: int) -> Iterator[Sample]:
        """The samples of the steps from ``first`` up to but not with ``last``."""
        return (sample for step in range(first, last) for sample in self.samples(step))

    def _place(self, position: int) -> tuple[int, int]:
        """Task at ``position`` of the endless sequence, and how often it came before.

        The k-th prompt of a task falls due at time (k + 1/2) / share; the sequence is all of them in order of time.
        """
        # All tasks together have one prompt due a unit of time: what is due well before `position` has surely come.
        start = max(0, position - 2 * len(self.tasks))
        done = [max(0, int(np.floor(start * share + 0.5))) for share in self._shares]
        passed = sum(done)
        while True:
            due = [((k + 0.5) / share, task) for task, (k, share) in enumerate(zip(done, self._shares, strict=True))]
            task = min(due)[1]
            if passed == position:
                return task, done[task]
            done[task] += 1
            passed += 1

    def _prompt(self, task: int, occurrence: int) -> Prompt:
        tags = self._tags[task]
        prompts = tags[occurrence % len(tags)]
        round_, place = divmod(occurrence // len(tags), len(prompts))
        return prompts[self._order(task, occurrence % len(tags), round_, len(prompts))[place]]

    def _shuffled(self, task: int, tag: int, round_: int, count: int) -> np.ndarray:
        return np.random.default_rng([self.seed, task, tag, round_]).permutation(count)


def _by_tag(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    tags: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        tags.setdefault(prompt.task, []).append(prompt)
    return list(tags.values())


@dataclass(frozen=True)
class Text:
    """Text embeddings of a batch: ``states`` (B, L, W) and ``pooled`` (B, P)."""

    states: Tensor
    pooled: Tensor

    def __getitem__(self, rows: Sequence[int] | slice) -> Text:
        return Text(self.states[rows], self.pooled[rows])

    @classmethod
    def stack(cls, texts: Sequence[Text], device: torch.device | str, dtype: torch.dtype) -> Text:
        """One batch of single texts, on ``device``."""
        states, pooled = (torch.stack([getattr(t, name) for t in texts]) for name in ("states", "pooled"))
        return cls(states.to(device, dtype), pooled.to(device, dtype))


class Embeddings:
    """Text embeddings, each computed once and kept on disk by encoder hash, length and text.

    Args:
        folder: the cache.
        encoders: hash of the text encoders' and tokenizers' files.
        encode: ``encode(texts, length)``, called for what is not there yet; returns states and pooled vectors.
    """

    def __init__(self, folder: Path, encoders: str, encode: Callable[[list[str], int], tuple[Tensor, Tensor]]) -> None:
        self.folder, self.encode = folder / encoders[:16], encode
        # T5's states of one prompt are 1.7 MB in bf16: the disk holds them all, memory those of the last batches.
        self._read = lru_cache(maxsize=KEPT)(self._load)

    def prepare(self, texts: Sequence[str], length: int, batch: int = 32) -> int:
        """Make sure that ``texts`` are there; returns how many had to be encoded."""
        missing = [text for text in dict.fromkeys(texts) if not self._path(text, length).is_file()]
        for start in range(0, len(missing), batch):
            chunk = missing[start : start + batch]
            for text, states, pooled in zip(chunk, *(part.cpu() for part in self.encode(chunk, length)), strict=True):
                self._write(self._path(text, length), {"states": states.contiguous(), "pooled": pooled.contiguous()})
        return len(missing)

    def __call__(self, texts: Sequence[str], length: int, device: torch.device | str, dtype: torch.dtype) -> Text:
        """The batch of ``texts`` at T5 length ``length``; they must have been prepared."""
        return Text.stack([self._read(text, length) for text in texts], device, dtype)

    def _path(self, text: str, length: int) -> Path:
        return self.folder / f"{hashlib.sha256(f'{length}|{text}'.encode()).hexdigest()[:32]}.safetensors"

    def _load(self, text: str, length: int) -> Text:
        return Text(**load_file(self._path(text, length)))

    @staticmethod
    def _write(path: Path, tensors: dict[str, Tensor]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")  # two processes may encode the same prompt
        save_file(tensors, part)
        part.replace(path)
