"""All weights trained, sharded over two gloo processes: one launch, of which the tests look at what it left."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from diffusers import SD3Transformer2DModel
from torch.distributed.tensor import DTensor

from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.pipeline import draw_noise
from training.data import Mixture, task_prompts
from training.distill import Distillation
from training.loop import Parallel
from training.policies import STUDENT, Expert, Policies
from training.sharded import FullPolicies, check_full, mesh_of, price, train_full

pytest_plugins = ["tiny_training"]
CPU = torch.device("cpu")
STEPS = 3
AS_EXPERT = Expert(STUDENT, STUDENT, None, 3.0, 0, None)  # how strips ask for the student
# eps: no division by rounding errors; clipping and decay take part
OPTIMIZER = {"learning_rate": 1e-2, "ema_every": 2, "eps": 1e-4, "max_grad_norm": 0.1, "weight_decay": 1e-2}
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used CUDA cannot be forked"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),  # checkpoints read by one process
]


def recipe(tiny, out, **changes):
    anchor = {"source": tiny.teacher("anchor"), "weight": 0.1}
    settings = {"batch_size": 8, "micro_batch": 2, "optimizer": OPTIMIZER, "anchor": anchor, "steps": STEPS}
    return tiny.recipe("distill", out, **(settings | {"start": tiny.teacher("one")} | changes))


def frozen_weights(policies):
    found = policies.transformer.state_dict() | {f"bank.{k}": v for k, v in policies.bank.state_dict().items()}
    return {name: value.detach().clone() for name, value in found.items()}


def velocities(policies, prompts):
    """Guided velocities of student and base, at a noise level whose timestep bf16 cannot hold."""
    x, sigma = draw_noise(range(len(prompts)), (4, 8, 8)), torch.tensor(0.9413)
    conditions = policies.conditions(prompts)
    student = policies.student(x, sigma, conditions, policies.base.guidance)
    return student, policies.frozen([policies.base] * len(prompts), x, sigma, conditions)


@torch.no_grad()
def follows_its_weights(policies, prompts):
    """What a student without weights says, and with biases of 1, each after a forward by the weights before."""
    names, parameters = zip(*policies.model.named_parameters(), strict=True)
    x = draw_noise(range(len(prompts)), (4, 8, 8))
    sigma, conditions = torch.tensor(0.5), policies.conditions(prompts)
    policies.frozen([AS_EXPERT] * len(prompts), x, sigma, conditions)
    said = []
    for value in (0.0, 1.0):
        bias = parameters[names.index("proj_out.bias")]
        for parameter in parameters:
            parameter.zero_()
        bias.fill_(value)
        said.append(sorted(set(policies.student(x, sigma, conditions, 3.0).flatten().tolist())))
    return said


# --- what the two processes do ---------------------------------------------------------------------------------------
class Interrupted(Distillation):
    """One of the processes alone is asked to stop during the first step."""

    def updates(self, step):
        if step == 0 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield from super().updates(step)


def process(tiny, folder):
    AcceleratorState._reset_state(True)  # the parent's, which was alone
    made = []

    def make(config, policies, mixture, parallel):
        made.append((policies, frozen_weights(policies)))
        return Distillation(config, policies, mixture, parallel)

    # Forwards without gradients and checkpoints in between: they are no part of what decides the weights.
    extras = {"strip_every": 1, "strip_prompts": 2, "save_minutes": 0.0, "keep": 1, "snapshot_every": 1}
    train_full(recipe(tiny, folder / "whole", **extras), make, folder / "whole")
    with pytest.raises(WorkError, match=f"Stopped at step 1 of {STEPS}; the same command goes on from there"):
        train_full(recipe(tiny, folder / "parts"), Interrupted, folder / "parts")
    train_full(recipe(tiny, folder / "parts"), make, folder / "parts", resume=True)
    train_full(recipe(tiny, folder / "other", steps=2, gradient_checkpointing=True), make, folder / "other")
    policies, before = made[0]
    after = frozen_weights(policies)
    local = sum(p.to_local().numel() for p in policies.model.parameters())
    found = {
        "frozen_moved": [name for name, value in before.items() if not torch.equal(value, after[name])],
        "without_grad": not any(
            p.requires_grad for p in [*policies.transformer.parameters(), *policies.bank.parameters()]
        ),
        "sharded": all(isinstance(p, DTensor) for p in policies.model.parameters()),
        "share": local / sum(p.numel() for p in policies.model.parameters()),
    }
    half = FullPolicies(recipe(tiny, folder / "half", dtype="bfloat16", start="none"), CPU)
    half.prepare_text(prompts := ["two stars", "red circle"])
    half.shard(mesh_of(CPU))
    student, base = velocities(half, prompts)
    student.square().mean().backward()
    found |= {
        "half_is_base": torch.equal(student, base),
        "half_dtypes": sorted({str(t.dtype) for p in half.model.parameters() for t in (p, p.grad)}),
    }
    found["follows"] = follows_its_weights(half, prompts)
    (folder / f"process-{dist.get_rank()}.json").write_text(json.dumps(found))


@dataclass(frozen=True)
class Launched:
    """Folder of the runs ``whole``, ``parts`` and ``other``, and what the processes saw."""

    folder: Path
    seen: list[dict]


@pytest.fixture(scope="module")
def launched(tiny, tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("sharded"), torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("OMP_NUM_THREADS", "1")
        debug_launcher(process, (tiny, folder), num_processes=2)
        yield Launched(folder, [json.loads((folder / f"process-{rank}.json").read_text()) for rank in range(2)])
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)


def kept(out, step):
    """Every tensor of a sharded checkpoint, put together by this one process."""
    path = out / "checkpoints" / f"step-{step:08d}"
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(found, checkpoint_id=path, no_dist=True)
    return found


def part(tensors, prefix):
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def apart(one, two):
    """Relative distance of two sets of tensors."""
    a, b = (torch.cat([value[name].flatten() for name in sorted(one)]) for value in (one, two))
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def alone(tiny, launched, tmp_path_factory):
    """The same steps in one process with nothing sharded: policies, weights before, and after every step."""
    config = recipe(tiny, tmp_path_factory.mktemp("alone"))
    policies = FullPolicies(config, CPU)
    prompts = {task.name: task_prompts(task).training for task in config.tasks}
    policies.prepare_text([p.prompt for found in prompts.values() for p in found])
    mixture = Mixture(config.tasks, prompts, config.batch_size, config.group, config.seed)
    stage = Distillation(config, policies, mixture, Parallel(Accelerator()))
    o = config.optimizer
    before = {name: p.detach().clone() for name, p in policies.model.named_parameters()}
    optimizer = torch.optim.AdamW(
        policies.model.parameters(), lr=o.learning_rate, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
    )
    steps = []
    for step in range(STEPS):
        list(stage.updates(step))
        torch.nn.utils.clip_grad_norm_(policies.model.parameters(), o.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        steps.append({name: p.detach().clone() for name, p in policies.model.named_parameters()})
    return policies, before, steps


# --- tests -----------------------------------------------------------------------------------------------------------
def test_two_processes_each_with_half_of_the_weights_make_the_steps_of_one_with_all(launched, alone):
    _, before, (_, second, third) = alone
    tensors = kept(launched.folder / "whole", STEPS)
    assert min(apart(before, second), apart(second, third)) > 1e-2  # far beyond what is asked for below
    assert apart(third, part(tensors, "weights.")) <= 1e-5
    assert apart(second, part(tensors, "average.")) <= 1e-5  # of every other step; the first is the weights
    for seen in launched.seen:
        assert seen["sharded"]
        assert 0.4 < seen["share"] < 0.6


def test_base_and_teachers_stay_bit_for_bit(launched):
    for seen in launched.seen:
        assert seen["frozen_moved"] == []
        assert seen["without_grad"]


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(launched):
    whole, parts = launched.folder / "whole", launched.folder / "parts"
    one, two = kept(whole, STEPS), kept(parts, STEPS)
    assert {name.partition(".")[0] for name in one} == {"weights", "optimizer", "average"}
    assert one.keys() == two.keys()
    assert [name for name, value in one.items() if not torch.equal(value, two[name])] == []
    values = [json.loads((p / "checkpoints" / f"step-{STEPS:08d}" / "values.json").read_text()) for p in (whole, parts)]
    assert all(v["step"] == v["scheduler"]["last_epoch"] == STEPS and v["averaged"] == 1 for v in values)
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert (whole / file).read_bytes() == (parts / file).read_bytes()
    assert [path.name for path in (whole / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]  # the last alone is kept


def test_another_number_of_processes_goes_on_from_the_same_checkpoint(tiny, launched, alone):
    out = launched.folder / "other"
    try:
        train_full(recipe(tiny, out, gradient_checkpointing=True), Distillation, out)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    tensors = kept(out, STEPS)
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert apart(alone[2][-1], part(tensors, "weights.")) <= 1e-5
    assert apart(kept(launched.folder / "whole", STEPS), tensors) <= 1e-5
    folders = (launched.folder / "whole" / "transformer", out / "transformer")  # how often was averaged is known, too
    whole, other = (dict(SD3Transformer2DModel.from_pretrained(folder).named_parameters()) for folder in folders)
    assert apart(whole, other) <= 1e-5


def test_pictures_and_snapshots_are_written_once_in_a_while(launched):
    whole = launched.folder / "whole"
    assert {path.name for path in whole.glob("strip_*.png")} == {f"strip_00000{n}.png" for n in (1, 2, 3)}
    first, last = (SD3Transformer2DModel.from_pretrained(whole / "snapshots" / f"step-00000{n}") for n in (1, 3))
    final = SD3Transformer2DModel.from_pretrained(whole / "transformer")
    assert torch.equal(last.proj_out.weight, final.proj_out.weight)
    assert not torch.equal(first.proj_out.weight, final.proj_out.weight)


def test_the_gathered_average_is_the_same_student_in_stock_diffusers(launched, alone):
    policies, _, (_, second, third) = alone
    average = {name: 2 / 11 * second[name] + 9 / 11 * third[name] for name in third}  # as if an update came now
    folder = launched.folder / "whole" / "transformer"
    stock = SD3Transformer2DModel.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "SD3Transformer2DModel"
    assert apart(average, dict(stock.named_parameters())) <= 1e-5
    policies.model.load_state_dict(average, strict=False)
    text, _ = policies.conditions(["two stars"]).at(0)

    @torch.no_grad()
    def velocity(transformer):
        x, sigma = draw_noise([0], (4, 8, 8)), torch.tensor([600.0])
        return transformer(x, text.states, text.pooled, sigma, return_dict=False)[0]

    with policies.bank.use(None):
        base = velocity(policies.transformer)
    assert (velocity(stock) - velocity(policies.model)).norm() <= 1e-5 * velocity(stock).norm()
    assert (velocity(stock) - base).norm() > 1e-2 * base.norm()


def test_in_bf16_a_student_that_is_the_base_speaks_like_it_and_keeps_fp32_weights(launched):
    for seen in launched.seen:
        assert seen["half_is_base"]
        assert seen["half_dtypes"] == ["torch.float32"]


def test_a_student_whose_weights_have_changed_since_its_last_forward_speaks_by_the_new_ones(launched):
    assert all(seen["follows"] == [[0.0], [1.0]] for seen in launched.seen)


def test_the_student_starts_from_the_adapter(tiny, tmp_path):
    prompts = ["two stars", "red circle"]
    full, lora = (kind(recipe(tiny, tmp_path), CPU) for kind in (FullPolicies, Policies))
    for policies in (full, lora):
        policies.prepare_text(prompts)
    with torch.no_grad():
        (ours, base), (theirs, _) = velocities(full, prompts), velocities(lora, prompts)
        x, sigma = draw_noise(range(2), (4, 8, 8)), torch.tensor(0.9413)
        asked = full.frozen([AS_EXPERT] * 2, x, sigma, full.conditions(prompts))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert (ours - base).norm() > 1e-2 * base.norm()
    assert torch.equal(asked, ours)


def test_what_sharding_cannot_do_is_refused_and_its_price_is_told(tiny, tmp_path):
    check_full(recipe(tiny, tmp_path))
    with pytest.raises(RequestError, match=r"Remove rollout\.window"):
        check_full(recipe(tiny, tmp_path, rollout={"steps": 2, "window": 1}))
    with pytest.raises(RequestError, match="policy_gradient trains an adapter"):
        check_full(recipe(tiny, tmp_path, objective="policy_gradient", group_size=2))
    policies = FullPolicies(recipe(tiny, tmp_path), CPU)
    policies.model.proj_out.weight = torch.nn.Parameter(torch.empty(10**9, device="meta"))  # what is left is rounding
    assert "4.00 frozen backbone, 10.00 1/2 of the student's" in price(policies, 2)
