"""Distillation into all of the student's weights, sharded over the processes with torch's ``fully_shard``.

The student is a second transformer beside the frozen backbone on which base, teachers and anchor stay. Its weights are
kept in fp32; forwards are computed in the recipe's precision. Each process holds its part of weights, gradients,
moments and average, and gathers one block at a time. What a step contains, its loss and the trajectories are those of
:mod:`training.distill`; only who answers to "student" differs.

Every forward of a sharded student is a collective: all processes must make the same ones in the same order. Hence no
``rollout.window``, whose trained steps differ from sample to sample, and strips that all processes draw together.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from diffusers import SD3Transformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.store import provenance
from training.config import DistillConfig
from training.data import Mixture, Text, task_prompts
from training.loop import (
    MakeStage,
    Parallel,
    averaged_weights,
    catch_signals,
    check_identity,
    check_processes,
    join,
    learning_rates,
    run_identity,
    strip_prompts,
)
from training.policies import STUDENT, Conditions, Expert, Policies, guided, transformer_inputs
from training.watch import Alarms, Log, draw_strip, memory_gb

_FP32 = 4  # bytes
_COPIES = 5  # weights, gradients, two moments, average


# --- sharding --------------------------------------------------------------------------------------------------------
def precision(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Forwards in ``dtype`` from fp32 weights, gradients summed over processes in fp32.

    Inputs come in their right precision and are not cast: bf16 has no room for a timestep such as 941.
    """
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def shard(transformer: SD3Transformer2DModel, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> SD3Transformer2DModel:
    """Shard a transformer over ``mesh`` (1-D) in place: each block gathered by itself, what is left with the root."""
    for block in transformer.transformer_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(transformer, mesh=mesh, mp_policy=policy)
    return transformer


def mesh_of(device: torch.device) -> DeviceMesh:
    """All processes in one row; a process without others gets a group of its own."""
    if not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (dist.get_world_size(),))


def whole(value: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part; every process must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


# --- who answers to "student" ----------------------------------------------------------------------------------------
class FullPolicies(Policies):
    """:class:`~training.policies.Policies` whose student is a transformer of its own, ``model``, trained in full.

    The adapter that ``start`` names is added to its weights. In the bank its row stays, frozen and unused.
    """

    model: SD3Transformer2DModel

    def __init__(self, config: DistillConfig, device: torch.device) -> None:
        """As the parent's. The copy lies in fp32 on the CPU until :meth:`shard` moves it block by block."""
        super().__init__(config, device)
        self.bank.requires_grad_(False)
        self.model = SD3Transformer2DModel.from_pretrained(
            self.folder, subfolder="transformer", torch_dtype=torch.float32
        ).requires_grad_(True)
        with torch.no_grad():
            for module, factors in self.bank.adapter(STUDENT).factors.items():
                self.model.get_submodule(module).weight += factors.B @ factors.A
        for name, buffer in self.model.named_buffers():  # the position table, as the backbone has it
            buffer.data = self.transformer.get_buffer(name).cpu().clone()
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()

    def shard(self, mesh: DeviceMesh) -> None:
        """Distribute the student over ``mesh``."""
        shard(self.model, mesh, precision(self.dtype))

    def student(self, x: Tensor, sigma: Tensor, conditions: Conditions, guidance: float) -> Tensor:
        """The student's guided velocity (B, C, H, W), with gradients where they are enabled. A collective."""

        def forward(x: Tensor, sigma: Tensor, text: Text) -> Tensor:
            return self.student_velocity(x, sigma, text)

        return guided(forward, x, sigma, *conditions.at(self.record.text_length), guidance)

    def student_velocity(self, x: Tensor, sigma: Tensor, text: Text) -> Tensor:
        """The student's velocity without guidance, for embeddings at hand; ``sigma`` () or (B,). A collective."""
        velocity = self.model(**transformer_inputs(x, sigma, text))[0]
        self._reshard()
        return velocity

    def frozen(self, experts: Sequence[Expert], x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """As the parent's; a row may ask for the student as it is now, which makes it a collective."""
        own = [replace(e, adapter=None, transformer=self.model) if e.adapter == STUDENT else e for e in experts]
        velocity = super().frozen(own, x, sigma, conditions)
        if any(expert.transformer is self.model for expert in own):
            with torch.no_grad():
                self._reshard()
        return velocity

    def _reshard(self) -> None:
        # The root stays gathered for the backward that follows. Where none follows, the next forward would not see
        # what the optimiser has done in between.
        if isinstance(self.model, FSDPModule) and not torch.is_grad_enabled():
            self.model.reshard()


def price(policies: FullPolicies, processes: int) -> str:
    """One line: what training all weights takes on each process beyond the activations, in GB (10^9 bytes)."""
    count = sum(p.numel() for p in policies.model.parameters())
    block = max(sum(p.numel() for p in block.parameters()) for block in policies.model.transformer_blocks)
    wide, kept = policies.dtype.itemsize, count * _FP32 * _COPIES / processes
    parts = {
        "frozen backbone": count * wide,
        f"1/{processes} of the student's fp32 weights, gradients, moments and average": kept,
        "a gathered block and its gradients": 2 * block * wide,
    }
    listed = ", ".join(f"{size / 1e9:.2f} {name}" for name, size in parts.items())
    return (
        f"All {count / 1e6:,.1f} M weights are trained; GB a process: {listed}; in all {sum(parts.values()) / 1e9:.2f}."
    )


# --- on the disk -----------------------------------------------------------------------------------------------------
def export(student: SD3Transformer2DModel, weights: Iterable[Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Write ``weights``, in the order of the student's parameters, as a stock diffusers transformer in ``dtype``.

    Every process must call it; the first gathers and writes. Either the old folder is there or the new one.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    state = {}
    for (name, _), weight in zip(student.named_parameters(), weights, strict=True):
        gathered = whole(weight.detach())
        if first:
            state[name] = gathered.to("cpu", dtype)
    if not first:
        return
    state |= {name: buffer.to("cpu", dtype) for name, buffer in student.named_buffers()}
    with torch.device("meta"):  # not `student.save_pretrained`: the sharded class has another name in its config
        stock = SD3Transformer2DModel.from_config(student.config)
    stock.load_state_dict(state, assign=True)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    stock.save_pretrained(part)
    _replace(part, folder)


def _replace(part: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


class Trainee:
    """The student's parameters with optimiser, schedule and average, and their checkpoints.

    A checkpoint is a folder in torch's distributed format, to which each process writes its part (so all machines must
    share the disk); another number of processes can go on from it. Its index is a pickle: use none but your own.
    """

    def __init__(self, model: SD3Transformer2DModel, config: DistillConfig, folder: Path) -> None:
        self.model, self.folder, self.keep = model, folder, config.keep
        named = dict(model.named_parameters())
        self.names, self.parameters = list(named), list(named.values())
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=o.learning_rate, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
        )
        self.scheduler = learning_rates(config, self.optimizer)
        self.ema = EMAModel(self.parameters, decay=o.ema)

    def update(self) -> None:
        """One step of the optimiser with the gradients at hand, which are then gone."""
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def averaged(self, step: int, every: int) -> list[Tensor]:
        """The averaged weights after ``step`` steps, as they are distributed."""
        return averaged_weights(self.ema, self.parameters, step, every)

    def _tensors(self) -> dict[str, Any]:
        weights, moments = get_state_dict(self.model, self.optimizer)
        average = dict(zip(self.names, self.ema.shadow_params, strict=True))
        return {"weights": weights, "optimizer": moments, "average": average}

    def save(self, step: int, identity: Mapping[str, Any]) -> None:
        """Write the checkpoint of ``step``, whole or absent, and remove the oldest beyond ``keep``. A collective."""
        path = self.folder / f"step-{step:08d}"
        part = path.with_suffix(".part")
        dcp.save(self._tensors(), checkpoint_id=part)
        if dist.get_rank() == 0:
            values = {"step": step, "identity": identity, "averaged": self.ema.optimization_step}
            (part / "values.json").write_text(json.dumps(values | {"scheduler": self.scheduler.state_dict()}))
            _replace(part, path)
            for old in self._saved()[: -self.keep]:
                shutil.rmtree(old)
        dist.barrier()

    def _saved(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("step-????????/values.json"))

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint and its plain values, or None where there is none."""
        saved = self._saved()
        return (saved[-1], json.loads((saved[-1] / "values.json").read_text())) if saved else None

    def load(self, path: Path, values: Mapping[str, Any]) -> None:
        """Go back to what :meth:`latest` found. A collective."""
        state = self._tensors()
        dcp.load(state, checkpoint_id=path)  # into the tensors that are there
        weights, moments = state["weights"], state["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=weights, optim_state_dict=moments)
        self.ema.optimization_step = values["averaged"]
        self.scheduler.load_state_dict(values["scheduler"])


# --- the loop --------------------------------------------------------------------------------------------------------
def check_full(config: DistillConfig) -> None:
    """Raises a RequestError for what a sharded student cannot be trained with."""
    if config.objective == "policy_gradient":
        raise RequestError(
            "parameters = 'full' knows the objectives direct and ode; policy_gradient trains an adapter."
        )
    if config.rollout.window is not None:
        raise RequestError(
            "parameters = 'full' trains on every step: with rollout.window the processes would gather weights at "
            "different moments. Remove rollout.window, or train an adapter."
        )


def train_full(config: DistillConfig, make: MakeStage, out: Path, *, resume: bool = False) -> Path:
    """Train all weights by ``config``; goes on from the last checkpoint in ``out``. Returns the transformer's folder.

    Everything is a function of the recipe and the step's number, so a run that was stopped ends like one that was not.

    Raises:
        RequestError: what :func:`check_full` and :func:`training.loop.train` refuse.
        WorkError: an alarm went off, or the run was stopped; what was finished is on the disk.
    """
    check_full(config)
    accelerator = join(config, out)
    check_processes(config, accelerator.num_processes)
    out.mkdir(parents=True, exist_ok=True)
    policies = FullPolicies(config, accelerator.device)
    policies.shard(mesh_of(accelerator.device))
    prompts = {task.name: task_prompts(task) for task in config.tasks}
    pools = {name: p.training for name, p in prompts.items()}
    mixture = Mixture(config.tasks, pools, config.batch_size, config.group, config.seed)
    # `Parallel.model` stays None: gradients are summed after every backward, or each process would hold all of them.
    stage = make(config, policies, mixture, Parallel(accelerator))
    identity = run_identity(config, policies, prompts, stage) | {"parameters": "full"}
    if accelerator.is_main_process:
        print(price(policies, accelerator.num_processes), file=sys.stderr)

    trainee = Trainee(policies.model, config, out / "checkpoints")
    found, first = trainee.latest(), 0
    if found is None and resume:
        raise RequestError(f"--resume: {out} holds no checkpoint to go on from.")
    if found is not None:
        path, kept = found
        check_identity(kept["identity"], identity, config, out)
        first = kept["step"]
        if first > config.steps:
            raise RequestError(
                f"{out} has done {first} steps, and steps = {config.steps}; give another `out`, or more."
            )
        trainee.load(path, kept)
    shown = strip_prompts(config, prompts)
    texts = list(dict.fromkeys([*(sample.prompt.prompt for sample in stage.needed(first)), *shown]))
    policies.prepare_text(texts[accelerator.process_index :: accelerator.num_processes])
    accelerator.wait_for_everyone()
    policies.prepare_text(texts)

    log, alarms = Log(out, accelerator, config, first), Alarms(config.patience, out)
    last_save, every = time.monotonic(), config.optimizer.ema_every
    if accelerator.is_main_process:
        (out / "recipe.json").write_text(json.dumps(config.model_dump(), indent=2) + "\n")
    with catch_signals() as stopped, log:
        for step in range(first, config.steps):
            began = time.monotonic()
            (means,) = stage.updates(step)
            norm = torch.nn.utils.clip_grad_norm_(trainee.parameters, config.optimizer.max_grad_norm)
            means.add("grad_norm", whole(norm))
            # Clocks and signals differ between processes; what they decide is decided together.
            means.add("stopped", float(bool(stopped)))
            means.add("due", float(began - last_save > config.save_minutes * 60))
            seen = means.reduce()
            stop, due = bool(seen.pop("stopped")), bool(seen.pop("due"))
            alarms.finite(step, seen)
            rate = float(trainee.scheduler.get_last_lr()[0])
            trainee.update()
            if (step + 1) % every == 0:
                trainee.ema.step(trainee.parameters)
            alarms.moving(step, seen)
            pace = {"pictures_per_second": config.batch_size / (time.monotonic() - began), "memory_gb": memory_gb()}
            log.step(step + 1, seen | pace | {"learning_rate": rate})
            done = step + 1 == config.steps
            if config.strip_every and ((step + 1) % config.strip_every == 0 or done):
                strip, students = draw_strip(policies, shown, config.seed)
                if accelerator.is_main_process:
                    strip.save(out / f"strip_{step + 1:06d}.png")
                alarms.noise(step, students)
            if config.snapshot_every and (step + 1) % config.snapshot_every == 0:
                folder = out / "snapshots" / f"step-{step + 1:06d}"
                export(policies.model, trainee.averaged(step + 1, every), folder, policies.dtype)
            if done or stop or due:
                trainee.save(step + 1, identity)
                last_save = time.monotonic()
            if stop and not done:
                raise WorkError(f"Stopped at step {step + 1} of {config.steps}; the same command goes on from there.")
    export(policies.model, trainee.averaged(config.steps, every), out / "transformer", policies.dtype)
    if accelerator.is_main_process:
        run = {"identity": identity, "steps": config.steps, "samples": config.steps * config.batch_size}
        (out / "run.json").write_text(json.dumps(run | {"first_step": first, **provenance()}, indent=2) + "\n")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return out / "transformer"
