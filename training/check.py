"""``python -m training check RECIPE``: is every teacher better than the base at what it is to teach?

Before a long run: each task's held-out prompts (64 at most) are drawn by the base and by the task's teacher from the
same noise, and judged by the task's rewards. The base is drawn with the guidance that the student will have, who is the
base before the first step; a teacher with its own. A teacher whose paired difference is not clearly above zero is a
dud: a file that was saved empty, an adapter of another model, a scale that was lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from flowopd_eval.errors import RequestError
from flowopd_eval.records import Interval, Prompt
from flowopd_eval.statistics import paired_difference
from training.config import Config, DistillConfig, SFTConfig, Task
from training.data import task_prompts
from training.policies import Expert, Policies
from training.rewards import Rewards
from training.watch import draw_ode

PROMPTS = 64


@dataclass(frozen=True)
class Finding:
    """What a task's prompts say of its teacher: mean rewards, and the paired difference with its interval."""

    task: str
    teacher: str
    base_score: float
    teacher_score: float
    difference: Interval
    unscored: int

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``no difference``, by the 95 % interval."""
        if self.difference.low > 0:
            return "better"
        return "worse" if self.difference.high < 0 else "no difference"


def check_task(policies: Policies, task: Task, rewards: Rewards, seed: int, batch: int) -> Finding:
    """Judge one task's teacher on its held-out prompts."""
    prompts = task_prompts(task).held_out
    if not prompts:
        raise RequestError(f"Task {task.name!r} holds no prompts out (held_out = 0); there is nothing to check it on.")
    chosen = [prompts[n * len(prompts) // min(PROMPTS, len(prompts))] for n in range(min(PROMPTS, len(prompts)))]
    policies.prepare_text([prompt.prompt for prompt in chosen])
    teacher, base = policies.experts[str(task.teacher)], replace(policies.base, guidance=policies.guidance)
    scores = {
        name: _scores(policies, expert, chosen, task, rewards, seed, batch)
        for name, expert in (("base", base), ("teacher", teacher))
    }
    judged = [p.id for p in chosen if not any(math.isnan(side[p.id]) for side in scores.values())]
    if len(judged) < 2:
        raise RequestError(
            f"Task {task.name!r}: {len(judged)} of {len(chosen)} prompts could be judged; see its rewards."
        )
    ours, theirs = ({key: [side[key]] for key in judged} for side in scores.values())
    return Finding(
        task.name,
        teacher.name,
        math.fsum(side[0] for side in ours.values()) / len(judged),
        math.fsum(side[0] for side in theirs.values()) / len(judged),
        paired_difference(ours, theirs),
        len(chosen) - len(judged),
    )


def _scores(
    policies: Policies, expert: Expert, prompts: Sequence[Prompt], task: Task, rewards: Rewards, seed: int, batch: int
) -> dict[str, float]:
    found = {}
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        texts, seeds = [p.prompt for p in part], [p.seed(seed, 0) for p in part]
        pictures = draw_ode(policies, [expert] * len(part), texts, seeds)
        judged = rewards.judge(pictures, part, [task] * len(part))
        found.update({p.id: values["total"] for p, values in zip(part, judged, strict=True)})
    return found


def check_teachers(config: Config) -> int:
    """Print a table of all tasks; returns 1 if there is a dud, else 0.

    Raises:
        RequestError: a stage without teachers, or a task without rewards to judge by.
    """
    if not isinstance(config, DistillConfig | SFTConfig):
        raise RequestError(f"A recipe of stage {config.stage!r} has no teachers to check.")
    judged = [task for task in config.tasks if task.rewards]
    if not judged:
        raise RequestError("No task has rewards to judge its teacher by; add `rewards = {…}` to the tasks.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policies, rewards = Policies(config, device), Rewards(judged)
    console = Console(stderr=True)
    findings = []
    for task in judged:
        with console.status(f"{task.teacher} on {task.name}"):
            findings.append(check_task(policies, task, rewards, config.seed, config.micro_batch))
    Console().print(_table(findings))
    scales = ", ".join(f"{f.teacher} {policies.experts[f.teacher].guidance:g}" for f in findings)
    print(f"Guidance: the base {policies.guidance:g}, as the student; {scales}.")
    if len(judged) < len(config.tasks):
        left = ", ".join(f"{task.teacher} on {task.name}" for task in config.tasks if not task.rewards)
        print(f"Not checked, for want of `rewards`: {left}.")
    duds = [f"{f.teacher} on {f.task} ({f.verdict})" for f in findings if f.verdict != "better"]
    if duds:
        print(f"Not better than the base: {', '.join(duds)}. Look at file, rank and scale before you distil from them.")
    return int(bool(duds))


def _table(findings: Sequence[Finding]) -> Any:
    table = Table("task", "teacher", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("base", "its score", "difference [95 %]", "n", "verdict"):
        table.add_column(name, no_wrap=True)
    for f in findings:
        d = f.difference
        numbers = [f"{f.base_score:.3f}", f"{f.teacher_score:.3f}", f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"]
        judged = f"{d.n}, {f.unscored} unscored" if f.unscored else str(d.n)
        table.add_row(f.task, f.teacher, *numbers, judged, f.verdict)
    return table
