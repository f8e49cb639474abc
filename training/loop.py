"""What every stage that trains an adapter shares: the optimiser's loop, checkpoints, several processes, alarms.

A stage accumulates the gradients of an update and yields its means (:class:`Stage`); the loop does the rest. What a
step contains is a function of the recipe and the step's number, so that a run that was stopped and gone on with ends
with the weights of one that was not: bit for bit on one device.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from pydantic import ValidationError
from torch import Tensor

from flowopd_eval.adapters import Adapter, write_adapter
from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.models import FAMILIES, adapter_settings
from flowopd_eval.prompts import prompts_sha256
from flowopd_eval.records import write_settings
from flowopd_eval.store import differences, provenance
from training.config import GRPOConfig, Trained
from training.data import Mixture, Prompts, Sample, task_prompts
from training.policies import STUDENT, Policies
from training.state import Checkpoints
from training.watch import Alarms, Log, draw_strip, memory_gb

# What may differ when a run is gone on with: it decides where things lie and what is shown, not the weights.
FREE = {
    "out",
    "steps",
    "log_every",
    "strip_every",
    "strip_prompts",
    "save_minutes",
    "keep",
    "snapshot_every",
    "trackers",
    "cache",
    "patience",
    "parameters",  # runs of adapters and of all weights have checkpoints of different kinds
}
# Grows when the same recipe would make other weights: 2 with the warm-up of the average, and SFT's noise by sample.
SCHEMA = 2
T = TypeVar("T")


class Means:
    """Means over whatever was added by name, on one process and over all of them."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, name: str, *values: Tensor | float) -> None:
        """Add numbers; NaN are left out of the mean. Nothing waits for the device here."""
        self._values.setdefault(name, []).extend(torch.as_tensor(value).detach() for value in values)

    def reduce(self) -> dict[str, float]:
        """Means over all processes, by name."""
        local = {}
        numbers = _numbers([value for values in self._values.values() for value in values])
        for name, values in self._values.items():
            known = [number for number in islice(numbers, len(values)) if not math.isnan(number)]
            local[name] = (math.fsum(known), len(known))
        parts = gather_object([local])
        names = sorted({name for part in parts for name in part})
        sums = {name: [part[name] for part in parts if name in part] for name in names}
        return {
            name: math.fsum(s for s, _ in found) / total if (total := sum(n for _, n in found)) else math.nan
            for name, found in sums.items()
        }


def _numbers(values: Sequence[Tensor]) -> Iterator[float]:
    """The values of scalars, in order; the host waits once for each device and dtype, not for each number."""
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault((value.device, value.dtype), []).append(place)
    found = [0.0] * len(values)
    for chosen in places.values():
        numbers = torch.stack([values[place].reshape(()) for place in chosen]).tolist()
        for place, number in zip(chosen, numbers, strict=True):
            found[place] = float(number)
    return iter(found)


class Stopped(Exception):
    """SIGTERM or Ctrl-C in the middle of a step that has changed nothing yet."""


class Parallel:
    """One process's part of a batch, and how gradients become the whole batch's."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.model: torch.nn.Module | None = None
        self.stopped: Sequence[int] = []
        self._local = 1

    def part(self, samples: Sequence[T]) -> Sequence[T]:
        """This process's samples: the processes cut a batch into equal, contiguous parts."""
        size = len(samples) // self.accelerator.num_processes
        rank = self.accelerator.process_index
        return samples[rank * size : (rank + 1) * size]

    def check_stopped(self) -> None:
        """Raises ``Stopped`` where this process has been asked to stop and no other waits for it."""
        if self.stopped and self.accelerator.num_processes == 1:
            raise Stopped

    def micro_batches(self, samples: Sequence[T], size: int) -> Iterator[tuple[Sequence[T], bool]]:
        """This process's samples of a batch, ``size`` at a time, and whether it is the last time."""
        mine = self.part(samples)
        self._local = len(mine)
        for start in range(0, len(mine), size):
            self.check_stopped()
            yield mine[start : start + size], start + size >= len(mine)

    def sync(self, now: bool) -> AbstractContextManager:
        """Context of a forward and its backward: gradients are averaged over processes only where ``now``."""
        return nullcontext() if now or self.model is None else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, samples: int | None = None) -> None:
        """Backward of a sum over samples, as its share of the mean over ``samples`` (default: this process's batch)."""
        (loss / (samples or self._local)).backward()


class Stage(Protocol):
    """What the loop needs of a stage."""

    def identity(self) -> Mapping[str, Any]:
        """What decides the weights beyond recipe, base, experts and prompts. Plain JSON."""

    def needed(self, first: int) -> Iterable[Sample]:
        """Every sample that the steps from ``first`` on will ask for: their prompts are encoded beforehand."""

    def updates(self, step: int) -> Iterator[Means]:
        """Accumulate the gradients of one optimiser update and yield its means, for each update of ``step``."""


MakeStage = Callable[[Any, Policies, Mixture, Parallel], Stage]


def train(config: Trained, make: MakeStage, out: Path, *, resume: bool = False) -> Path:
    """Train a student by ``config``; goes on from the last checkpoint in ``out``. Returns the adapter's folder.

    Raises:
        RequestError: a checkpoint of another recipe, other teachers or other prompts lies there, or, with ``resume``,
            none; batches that the processes cannot share.
        WorkError: an alarm went off, or the run was stopped; what was finished is on the disk.
    """
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    accelerator = join(config, out, kwargs_handlers=[ddp])
    check_processes(config, accelerator.num_processes)
    out.mkdir(parents=True, exist_ok=True)
    policies = Policies(config, accelerator.device)
    prompts = {task.name: task_prompts(task) for task in config.tasks}
    mixture = Mixture(
        config.tasks, {n: p.training for n, p in prompts.items()}, config.batch_size, config.group, config.seed
    )
    parallel = Parallel(accelerator)
    stage = make(config, policies, mixture, parallel)
    identity = run_identity(config, policies, prompts, stage)

    parameters = [p for p in policies.bank.parameters() if p.requires_grad]
    o = config.optimizer
    optimizer = torch.optim.AdamW(parameters, lr=o.learning_rate, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    scheduler = learning_rates(config, optimizer)
    # Its decay rises to the recipe's as (1 + n) / (10 + n), or a short run would export its start. n counts updates of
    # the average; the public code counts steps, and so holds short runs back more (60 steps: by 30 instead of 5).
    ema = EMAModel(parameters, decay=o.ema)
    checkpoints = Checkpoints(out / "checkpoints", config.keep)
    state = checkpoints.latest()
    if state is None and resume:
        raise RequestError(f"--resume: {out} holds no checkpoint to go on from.")
    first = 0
    if state is not None:
        check_identity(state["identity"], identity, config, out)
        policies.bank.load_state_dict(state["bank"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        ema.load_state_dict(state["ema"])
        ema.to(accelerator.device)  # the optimiser moves its own state, this one stays where it was read
        torch.set_rng_state(state["rng"])
        first = state["step"]
        if first > config.steps:
            raise RequestError(
                f"{out} has done {first} steps, and steps = {config.steps}; give another `out`, or more."
            )
    shown = strip_prompts(config, prompts)
    texts = list(dict.fromkeys([*(sample.prompt.prompt for sample in stage.needed(first)), *shown]))
    policies.prepare_text(texts[accelerator.process_index :: accelerator.num_processes])
    accelerator.wait_for_everyone()
    policies.prepare_text(texts)
    policies.model = parallel.model = accelerator.prepare_model(policies.bank)

    def export(step: int, folder: Path) -> None:
        weights = averaged_weights(ema, parameters, step, o.ema_every)
        write_adapter(student_with(policies, weights, parameters), folder, base_model=config.base)
        if policies.name.partition(":")[0] in FAMILIES:  # else nothing would find the backbone by its name
            record = replace(policies.record, guidance=policies.guidance)
            write_settings(folder, adapter_settings(policies.name, record))

    def save(step: int) -> None:
        if accelerator.is_main_process:
            bank = {n: p.detach() for n, p in policies.bank.named_parameters() if p.requires_grad}
            kept = {"step": step, "identity": identity, "bank": bank, "rng": torch.get_rng_state()}
            parts = {"optimizer": optimizer, "scheduler": scheduler, "ema": ema}
            checkpoints.save(step, kept | {name: part.state_dict() for name, part in parts.items()})
            export(step, out / "adapter")

    log = Log(out, accelerator, config, first)
    alarms = Alarms(config.patience, out)
    started = last_save = time.monotonic()
    if accelerator.is_main_process:
        (out / "recipe.json").write_text(json.dumps(config.model_dump(), indent=2) + "\n")
    with catch_signals() as stopped, log:
        for step in range(first, config.steps):
            began = time.monotonic()
            shown_means: dict[str, float] = {}
            parallel.stopped = stopped
            for means in interruptible(stage.updates(step), partial(save, step), step, config.steps):
                norm = torch.nn.utils.clip_grad_norm_(parameters, o.max_grad_norm)
                means.add("grad_norm", norm)
                means.add("stopped", float(bool(stopped)))
                shown_means |= means.reduce()
                alarms.finite(step, shown_means)
                rate = float(scheduler.get_last_lr()[0])
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                parallel.stopped = []  # from here on, the step is finished first
            if (step + 1) % o.ema_every == 0:
                ema.step(parameters)
            alarms.rewards(step, shown_means)
            alarms.moving(step, shown_means)
            stop = bool(shown_means.pop("stopped", 0.0))
            pace = {"pictures_per_second": config.batch_size / (time.monotonic() - began), "memory_gb": memory_gb()}
            log.step(step + 1, shown_means | pace | {"learning_rate": rate})
            done = step + 1 == config.steps
            if config.strip_every and accelerator.is_main_process and ((step + 1) % config.strip_every == 0 or done):
                strip, students = draw_strip(policies, shown, config.seed)
                strip.save(out / f"strip_{step + 1:06d}.png")
                alarms.noise(step, students)
            if config.snapshot_every and accelerator.is_main_process and (step + 1) % config.snapshot_every == 0:
                export(step + 1, out / "snapshots" / f"step-{step + 1:06d}")
            if done or stop or time.monotonic() - last_save > config.save_minutes * 60:
                save(step + 1)
                last_save = time.monotonic()
            if stop and not done:
                raise WorkError(f"Stopped at step {step + 1} of {config.steps}; the same command goes on from there.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if first == config.steps:  # it may have been killed between its last checkpoint and its adapter
            export(config.steps, out / "adapter")
        seconds = time.monotonic() - started
        run = {"identity": identity, "steps": config.steps, "samples": config.steps * config.batch_size}
        run |= {"processes": accelerator.num_processes, "seconds_of_this_process": round(seconds, 1)}
        run |= {"first_step": first, **provenance()}
        (out / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    accelerator.end_training()
    return out / "adapter"


def join(config: Trained, out: Path, **options: Any) -> Accelerator:
    """This process among those of its launch; ``options`` are accelerate's.

    Raises:
        RequestError: it was launched with others, and accelerate knows nothing of them.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Without cards, accelerate takes the processes of a launch for strangers unless told that they are on processors.
    cpu = launched > 1 and not torch.cuda.is_available()
    # Precision is the recipe's: what `accelerate config` says of it would reach the student and not the teachers.
    found = Accelerator(cpu=cpu, mixed_precision="no", log_with=trackers(config), project_dir=out, **options)
    if found.num_processes != launched:
        raise RequestError(
            f"This is one of {launched} processes of a launch, but accelerate found {found.num_processes}: they would "
            f"overwrite each other's work in {out}. Launch with `accelerate launch` or `torchrun`."
        )
    return found


def learning_rates(config: Trained, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """The recipe's warm-up and schedule."""
    o = config.optimizer
    name = "constant_with_warmup" if o.schedule == "constant" else o.schedule
    steps = config.optimizer_steps
    return get_scheduler(name, optimizer, num_warmup_steps=o.warmup_steps, num_training_steps=steps)


def interruptible(updates: Iterator[Means], save: Callable[[], None], step: int, steps: int) -> Iterator[Means]:
    """The updates of a step; one that is stopped before it has changed a weight is left out and will come again."""
    try:
        yield from updates
    except Stopped:
        save()
        raise WorkError(f"Stopped at step {step} of {steps}; the same command goes on from there.") from None


def trackers(config: Trained) -> list[str] | None:
    """The recipe's trackers for accelerate, which leaves out without a word those whose package is missing.

    Raises:
        RequestError: a tracker that is not installed.
    """
    there = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in config.trackers:
        if name not in there:
            raise RequestError(f"trackers: {name} is not installed; `pip install {name}`, or take it out.")
    return list(config.trackers) or None


def averaged_weights(
    ema: EMAModel, parameters: Sequence[torch.nn.Parameter], step: int, every: int
) -> list[torch.Tensor]:
    """The average after ``step`` steps as it is exported: with the steps since its last update, as if one came now."""
    if step % every == 0:
        return list(ema.shadow_params)
    decay = ema.get_decay(ema.optimization_step + 1)
    pairs = zip(ema.shadow_params, parameters, strict=True)
    return [decay * average + (1 - decay) * parameter.detach() for average, parameter in pairs]


def student_with(policies: Policies, weights: Sequence[Tensor], parameters: Sequence[torch.nn.Parameter]) -> Adapter:
    """The student's adapter with ``weights`` in the place of its own."""
    own = [parameter.detach().clone() for parameter in parameters]
    _fill(parameters, weights)
    adapter = policies.bank.adapter(STUDENT)
    _fill(parameters, own)
    return adapter


@torch.no_grad()
def _fill(parameters: Sequence[torch.nn.Parameter], weights: Sequence[Tensor]) -> None:
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)


def check_processes(config: Trained, processes: int) -> None:
    """Raises a RequestError if the batch cannot be shared by that many processes."""
    unit = config.micro_batch * processes * (config.updates if isinstance(config, GRPOConfig) else 1)
    if config.batch_size % unit:
        raise RequestError(
            f"batch_size {config.batch_size} cannot be shared by {processes} processes in micro batches of "
            f"{config.micro_batch}; make it a multiple of {unit}."
        )


def run_identity(config: Trained, policies: Policies, prompts: Mapping[str, Prompts], stage: Stage) -> dict[str, Any]:
    """Everything that decides the weights, as plain JSON."""
    identity: dict[str, Any] = {
        "schema": SCHEMA,
        "recipe": config.model_dump(mode="json", exclude=FREE),
        "base_sha256": policies.sha256,
        "experts": {name: expert.sha256 for name, expert in policies.experts.items()},
        "teaches": {name: [expert.guidance, expert.text_length] for name, expert in policies.experts.items()},
        "prompts": {name: prompts_sha256(p.training) for name, p in prompts.items()},
        "stage": stage.identity(),
    }
    if config.optimizer.schedule != "constant":  # a rate that falls to zero at the end fixes the end
        identity["optimizer_steps"] = config.optimizer_steps
    return json.loads(json.dumps(identity))


def check_identity(there: Mapping[str, Any], now: Mapping[str, Any], config: Trained, out: Path) -> None:
    if there.get("schema") != SCHEMA:
        raise RequestError(
            f"{out} was begun by an earlier version of this training, which makes other weights of the same recipe; "
            "give another `out`."
        )
    # A run that began before it was noted how its teachers teach goes on as they do now.
    before = {"teaches": now["teaches"], **there, "recipe": _with_defaults(there["recipe"], config)}
    found = differences(before, now)
    if found:
        raise RequestError(
            f"{out} holds a run of something else; it cannot be gone on with:\n  "
            + "\n  ".join(found)
            + "\nGive another `out`, or undo the change."
        )


def _with_defaults(recipe: Mapping[str, Any], config: Trained) -> Mapping[str, Any]:
    """A recipe with the settings that there were none of when its run began: their defaults are how it was run."""
    try:
        whole = type(config).model_validate({**config.model_dump(include=FREE), **recipe})
    except ValidationError:  # it has settings that there are none of now
        return recipe
    return whole.model_dump(mode="json", exclude=FREE)


def strip_prompts(config: Trained, prompts: Mapping[str, Prompts]) -> dict[str, str | None]:
    """The strips' prompts, of each task in turn and held-out where there are any; text -> its task's teacher."""
    shown: dict[str, str | None] = {}
    for n in range(config.strip_prompts):
        for task in config.tasks:
            pool = prompts[task.name].held_out or prompts[task.name].training
            shown.setdefault(pool[n * len(pool) // config.strip_prompts].prompt, task.teacher)
    return dict(islice(shown.items(), config.strip_prompts))


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C end the run after the step at hand; a second Ctrl-C at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        print("Stopping after this step …", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
