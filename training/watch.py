"""Watching a run: its log, its strips of pictures, and the alarms that stop it with a reason."""

from __future__ import annotations

import itertools
import json
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flowopd_eval.errors import WorkError
from flowopd_eval.flow import ode_step, shifted_sigmas
from flowopd_eval.pipeline import draw_noise
from flowopd_eval.store import flat
from training.config import Trained
from training.policies import STUDENT, Expert, Policies

_SHOWN = ("loss", "kl", "reward", "grad_norm")  # first parts of the names on the progress line


def memory_gb() -> float:
    """Peak memory so far in GB (10^9 bytes): the device's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Log:
    """A progress line on stderr, a JSON line a step in ``log.jsonl``, and the recipe's trackers."""

    def __init__(self, out: Path, accelerator: Accelerator, config: Trained, first: int) -> None:
        self.path, self.accelerator, self.every, self.total = (
            out / "log.jsonl",
            accelerator,
            config.log_every,
            config.steps,
        )
        self._forget_after(first)
        if config.trackers:
            accelerator.init_trackers(
                f"flow-opd-{config.stage}", config={k: str(v) for k, v in flat(config.model_dump(mode="json"))}
            )
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(
            *columns, console=Console(stderr=True), disable=not (accelerator.is_main_process and sys.stderr.isatty())
        )
        self.task = self.progress.add_task(config.stage, total=config.steps, completed=first)

    def _forget_after(self, first: int) -> None:
        """Steps that a killed run had logged beyond its checkpoint will come again."""
        if self.accelerator.is_main_process and self.path.is_file():
            lines = self.path.read_text().splitlines(keepends=True)
            self.path.write_text(
                "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first)
            )

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Log what ``step`` (counted from 1) showed."""
        if not self.accelerator.is_main_process:
            return
        words = [f"{name} {value:.3g}" for name, value in values.items() if name.partition("/")[0] in _SHOWN]
        self.progress.update(self.task, completed=step, description=" · ".join(words))
        if step % self.every == 0 or step == self.total:
            rounded = {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in values.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **rounded}) + "\n")
            self.accelerator.log(dict(values), step=step)
            if not sys.stderr.isatty():
                print(f"step {step}/{self.total}: {' · '.join(words)}", file=sys.stderr, flush=True)


class Alarms:
    """Stops a run that has gone wrong: each raises a WorkError that says what was seen and what to try."""

    def __init__(self, patience: int, out: Path) -> None:
        self.patience, self.out = patience, out
        self._still, self._flat = 0, 0

    def finite(self, step: int, means: Mapping[str, float]) -> None:
        """Stop before an update whose gradients are not finite."""
        norm = means["grad_norm"]
        if not math.isfinite(norm):
            self._stop(step, f"the gradient norm is {norm}", "lower the learning rate, or train in float32")

    def moving(self, step: int, means: Mapping[str, float]) -> None:
        """Stop when all gradients have been zero for ``patience`` steps."""
        self._still = self._still + 1 if means["grad_norm"] == 0 else 0
        if self._still >= self.patience:
            remedy = (
                "no picture was kept: rewards could judge none (what they said stands above), or least_reward is high"
                if means.get("kept") == 0
                else "the student may equal its teachers"
            )
            self._stop(step, f"all gradients have been zero for {self._still} steps", remedy)

    def rewards(self, step: int, means: Mapping[str, float]) -> None:
        """Stop when in no group the rewards have differed for ``patience`` steps."""
        self._flat = self._flat + 1 if means.get("groups_without_variance") == 1.0 else 0
        if self._flat >= self.patience:
            remedy = (
                "no picture could be judged; what the reward said stands above"
                if means.get("unscored") == 1.0
                else "the task is too hard or too easy for this student; use other prompts or a finer reward"
            )
            self._stop(step, f"in no group of {self._flat} steps did the rewards differ", remedy)

    def noise(self, step: int, pictures: Image.Image) -> None:
        """The student draws noise: neighbouring pixels of its pictures have nothing to do with each other."""
        likeness = neighbour_correlation(np.asarray(pictures.convert("L"), np.float32))
        if likeness < 0.2:
            self._stop(
                step, f"the student draws noise (neighbouring pixels correlate at {likeness:.2f})", "resume earlier"
            )

    def _stop(self, step: int, seen: str, remedy: str) -> None:
        raise WorkError(f"Stopped at step {step + 1}: {seen}; {remedy}. The log is {self.out / 'log.jsonl'}.")


def neighbour_correlation(picture: np.ndarray) -> float:
    """Correlation of horizontally neighbouring pixels of a grey picture (H, W), -1..1; 1 for one without contrast."""
    left, right = picture[:, :-1].ravel(), picture[:, 1:].ravel()
    if left.std() == 0 or right.std() == 0:
        return 1.0
    return float(np.corrcoef(left, right)[0, 1])


@torch.no_grad()
def draw_ode(
    policies: Policies, experts: Sequence[Expert | None], prompts: Sequence[str], seeds: Sequence[int]
) -> list[Image.Image]:
    """One picture a prompt and seed by the ODE of the sampling record, row i by ``experts[i]``; None is the student."""
    sigmas = shifted_sigmas(policies.record.steps, policies.record.shift).to(policies.device)
    x = draw_noise(seeds, policies.latent_shape).to(policies.device)
    record = policies.record
    student = Expert(STUDENT, STUDENT, None, policies.guidance, record.text_length, None)
    rows = [student if expert is None else expert for expert in experts]
    conditions = policies.conditions(prompts)
    for sigma, following in itertools.pairwise(sigmas):
        x = ode_step(x, policies.frozen(rows, x, sigma, conditions), sigma, following)
    return policies.decode(x)


def draw_strip(policies: Policies, shown: Mapping[str, str | None], seed: int) -> tuple[Image.Image, Image.Image]:
    """Fixed prompts from fixed noise, a row each for base, teachers and student; and the last row alone.

    ``shown`` has prompt -> the teacher it is routed to (None for all: no row of teachers).
    """
    prompts, teachers = list(shown), list(shown.values())
    seeds = [(seed * 1_000_003 + n) % 2**63 for n in range(len(prompts))]
    arms: list[Sequence[Expert | None]] = [[policies.base] * len(prompts), [None] * len(prompts)]
    if all(teachers):
        arms.insert(1, [policies.experts[str(name)] for name in teachers])
    drawn = [draw_ode(policies, arm, prompts, seeds) for arm in arms]
    rows = [np.concatenate([np.asarray(picture) for picture in row], axis=1) for row in drawn]
    return Image.fromarray(np.concatenate(rows, axis=0)), Image.fromarray(rows[-1])
