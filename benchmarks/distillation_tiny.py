"""The miniature's recipe, ours against the public loop: ``python -m benchmarks.distillation --miniature``.

First an update's time on both sides, after their gradients were found to be the same; then, with ``--updates``, both
learn from the same start and are scored on held-out prompts now and then, for the time to the same average score. In
that part ours follows its recipe, the public loop its own objective and its own noise.

``--teacher NAME=SOURCE`` names teachers other than the recipe's; ``--random`` gives random ones, for times alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import SD3Transformer2DModel

from benchmarks import measure
from benchmarks.full_size import random_adapters
from benchmarks.loops import SAME, Ours, public_gradient, public_update
from benchmarks.public_loop import PublicLoop
from flowopd_eval.adapters import Adapter, write_adapter
from flowopd_eval.benches import find_bench
from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.harness import judge
from flowopd_eval.models import Backbone, resolve
from training.config import DistillConfig, load_recipe
from training.data import Mixture, task_prompts
from training.policies import ANCHOR, STUDENT, Policies

RECIPE = Path(__file__).parent.parent / "training" / "recipes" / "tiny_opd.toml"
NAMES = ("geneval", "ocr", "quality")
CPU = torch.device("cpu")


def settings_of(teachers: Sequence[str], out: Path, more: Sequence[str] = ()) -> DistillConfig:
    """The recipe with teachers of ``NAME=SOURCE``; the anchor is the teacher of quality, as there.

    Raises:
        RequestError: a name that is none of the recipe's.
    """
    named = dict(item.partition("=")[::2] for item in teachers)
    if unknown := set(named) - set(NAMES):
        raise RequestError(f"--teacher {', '.join(sorted(unknown))}: the recipe has {', '.join(NAMES)}.")
    changes = [f"teachers.{name}.{key}" for name, s in named.items() for key in (f"source={s}", "guidance=1.0")]
    if "quality" in named:
        changes += [f"anchor.source={named['quality']}", "anchor.guidance=1.0"]
    config = load_recipe(RECIPE, [*changes, f"out={out}", f"cache={out / 'cache'}", "strip_every=0", *more])
    assert isinstance(config, DistillConfig)
    return config


def write_random_teachers(folder: Path) -> list[str]:
    """Random adapters for the miniature, as ``NAME=SOURCE``."""
    backbone = SD3Transformer2DModel.from_pretrained(_base(), subfolder="transformer")
    for name, adapter in random_adapters(backbone, NAMES, 16).items():
        write_adapter(adapter, folder / name)
    return [f"{name}={folder / name}" for name in NAMES]


def _base() -> Path:
    return Backbone(resolve("tiny:base").base, [resolve("tiny:base")], "cpu", None).folder


@cache
def _prompts(config_json: str) -> Mapping[str, Any]:
    config = DistillConfig.model_validate_json(config_json)
    return {task.name: task_prompts(task) for task in config.tasks}


def ours_of(config: DistillConfig) -> Ours:
    """Training's own stage, with every prompt of the run encoded."""
    policies = Policies(config, CPU)
    pools = {name: found.training for name, found in _prompts(config.model_dump_json()).items()}
    made = Ours.of(config, policies, Mixture(config.tasks, pools, config.batch_size, config.group, config.seed))
    policies.prepare_text([sample.prompt.prompt for sample in made.stage.needed(0)])
    return made


def public_of(ours: Ours) -> PublicLoop:
    """The public loop from the same start, with the same teachers."""
    policies, config, schedule = ours.stage.policies, ours.stage.config, ours.stage.schedule
    length = policies.record.text_length

    def texts(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        text = policies.embeddings(prompts, length, CPU, torch.float32)
        return text.states, text.pooled

    return PublicLoop(
        lambda: SD3Transformer2DModel.from_pretrained(policies.folder, subfolder="transformer"),
        policies.bank.adapter(STUDENT),
        {name: policies.bank.adapter(str(expert.adapter)) for name, expert in policies.experts.items()},
        texts,
        scale=config.lora.scale,
        sigmas=schedule.sigmas,
        a=schedule.a,
        guidance=policies.guidance,
        anchor=ANCHOR,
        anchor_weight=config.pull.weight if config.pull else 0.0,
        learning_rate=config.optimizer.learning_rate,
    )


def check_gradients(config: DistillConfig) -> float:
    """Cosine of both sides' gradients on one micro batch, with the public loop's KL weight.

    Raises:
        WorkError: they differ.
    """
    size = min(4, config.micro_batch)
    ours = ours_of(config.model_copy(update={"batch_size": size, "micro_batch": size, "kl_weight": "flow-opd-code"}))
    theirs = public_gradient(public_of(ours), ours)
    return measure.alike("Gradients of ours and of the public loop", theirs, ours.gradient(), SAME)


def timing(config: DistillConfig, repetitions: int) -> dict[str, Any]:
    """An update's time on both sides."""
    ours = ours_of(config)
    work: dict[str, Callable[[], object]] = {"public": partial(public_update, public_of(ours), ours)}
    timings = measure.take_turns(work | {"ours": ours.update}, repetitions)
    amount = config.batch_size * config.rollout.steps
    measure.show("An update", measure.rows_of(timings, amount, "samples·steps", "public"))
    return {
        "variants": {name: found.to_json(amount, "samples_steps") for name, found in timings.items()},
        "times_public": measure.ratio(timings["public"], timings["ours"]),
    }


# --- learning --------------------------------------------------------------------------------------------------------
class Exam:
    """The average score of a student on held-out prompts: the mean over the benches, as evaluation draws and judges."""

    def __init__(self, config: DistillConfig, pictures: int) -> None:
        spec = resolve("tiny:base")
        self.pipeline = Backbone(spec.base, [spec], "cpu", None).pipeline
        held = {name: found.held_out for name, found in _prompts(config.model_dump_json()).items()}
        self.prompts = {n: [pool[i * len(pool) // pictures] for i in range(pictures)] for n, pool in held.items()}
        self.scorers = {name: (bench := find_bench(name, "shapes")).scorer(bench.protocols[0]) for name in held}

    def __call__(self, adapter: Adapter) -> float:
        self.pipeline.add_experts({STUDENT: adapter}, {STUDENT: 1.0})
        means = []
        for name, prompts in self.prompts.items():
            seeds = [prompt.seed(0, 0) for prompt in prompts]
            pictures = self.pipeline([p.prompt for p in prompts], expert=STUDENT, seed=seeds).images  # type: ignore[union-attr]
            scores = [s.value for s in judge(self.scorers[name], pictures, prompts) if s.value is not None]
            means.append(float(np.mean(scores)))
        return float(np.mean(means))


def learn(update: Callable[[int], None], student: Callable[[], Adapter], exam: Exam, updates: int, every: int) -> list:
    """Points of (updates, seconds spent on them, average score); the exam's own time is not counted."""
    spent, points = 0.0, [(0, 0.0, exam(student()))]
    for step in range(updates):
        start = time.perf_counter()
        update(step)
        spent += time.perf_counter() - start
        if (step + 1) % every == 0 or step + 1 == updates:
            points.append((step + 1, spent, exam(student())))
    return points


def seconds_to(points: Sequence[tuple[int, float, float]], score: float) -> float | None:
    """When a score was first reached, on the straight line between two points; None if it never was."""
    for (_, t0, s0), (_, t1, s1) in pairwise(points):
        if s0 >= score:
            return t0
        if s1 >= score:
            return t0 + (t1 - t0) * (score - s0) / (s1 - s0)
    return None


def learning(config: DistillConfig, updates: int, every: int, pictures: int) -> dict[str, Any]:
    """Both sides learn; the score that both reach, and when."""
    config = config.model_copy(update={"steps": updates})
    exam, ours, theirs = Exam(config, pictures), ours_of(config), ours_of(config)
    public, bank = public_of(theirs), ours.stage.policies.bank
    points = {
        "ours": learn(ours.update, lambda: bank.adapter(STUDENT), exam, updates, every),
        "public": learn(
            lambda step: public_update(public, theirs, step), lambda: public.adapter(bank.modules_covered),
            exam, updates, every,
        ),
    }  # fmt: skip
    common = min(max(score for _, _, score in found) for found in points.values())
    when = {name: seconds_to(found, common) for name, found in points.items()}
    rows = [
        {"side": n, "updates": u, "seconds": t, "average score": s} for n, found in points.items() for u, t, s in found
    ]
    measure.show(f"Average score, {pictures} held-out prompts a bench; both reach {common:.3f}", rows)
    return {"points": points, "score_both_reach": common, "seconds_to_it": when}


def main(arguments: Sequence[str]) -> int:
    options = measure.parser("benchmarks.distillation --miniature", str(__doc__), repetitions=3)
    options.add_argument("--teacher", action="append", default=[], metavar="NAME=SOURCE", help="geneval, ocr, quality")
    options.add_argument("--random", action="store_true", help="random teachers; nothing is learned from them")
    options.add_argument("--updates", type=int, default=0, help="learn for so many updates on both sides (default: 0)")
    options.add_argument("--every", type=int, default=10, help="updates between two exams (default: %(default)s)")
    options.add_argument("--pictures", type=int, default=64, help="of a bench in an exam (default: %(default)s)")
    asked = options.parse_args(arguments)
    small = ["batch_size=4", "micro_batch=2", "rollout.steps=2"] if asked.smoke else []
    try:
        with TemporaryDirectory() as folder:
            teachers = write_random_teachers(Path(folder)) if asked.random else asked.teacher
            config = settings_of(teachers, Path(folder), small)
            results: dict[str, Any] = {"teachers": "random" if asked.random else {
                name: teacher.source for name, teacher in config.teachers.items()
            }}  # fmt: skip
            results |= {"batch": config.batch_size, "steps": config.rollout.steps, "cosine": check_gradients(config)}
            results |= timing(config, asked.repetitions)
            if asked.updates:
                results["learning"] = learning(config, asked.updates, asked.every, asked.pictures)
            measure.keep("distillation-miniature", results, asked.smoke)
    except (RequestError, WorkError) as error:
        print(f"benchmarks.distillation: {error}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1
    return 0
