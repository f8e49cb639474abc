"""Training a tiny student: what moves and what must not, resuming, several processes, alarms."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from PIL import Image

from flowopd_eval.adapters import read_adapter, write_adapter
from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.flow import shifted_sigmas
from flowopd_eval.models import TINY_RECORD, resolve
from flowopd_eval.pipeline import FlowOPDPipeline, draw_noise
from training.__main__ import main
from training.coldstart import SFT
from training.data import task_prompts
from training.distill import Distillation, PolicyGradient
from training.grpo import GRPO
from training.loop import Means, Stopped, averaged_weights, check_processes, strip_prompts, student_with, train
from training.nft import NFT
from training.policies import STUDENT, Policies
from training.state import Checkpoints
from training.watch import Alarms

pytest_plugins = ["tiny_training"]
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
STAGES = {
    "direct": ("distill", Distillation, {}),
    "policy_gradient": ("distill", PolicyGradient, {"objective": "policy_gradient", "group_size": 2}),
    "grpo": ("grpo", GRPO, {}),
    "nft": ("nft", NFT, {}),
    "sft": ("sft", SFT, {}),
}
pytestmark = pytest.mark.usefixtures("one_thread_of_the_processor")
forked = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used CUDA cannot be forked")


def run(tiny, kind, out, *, make=None, **changes):
    """Train by a recipe of ``kind``; returns the adapter's folder."""
    stage, usual, settings = STAGES[kind]
    return train(tiny.recipe(stage, out, **(settings | changes)), make or usual, out)


def kept(out):
    return Checkpoints(out / "checkpoints", 1).latest()


def log(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("pictures_per_second", "memory_gb")} for line in lines]


def leaves(value, path=""):
    """Every tensor and plain value of a nested structure by its place."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    return {place: leaf for key, item in value.items() for place, leaf in leaves(item, f"{path}.{key}").items()}


def assert_same_bits(one, two):
    """Two runs: checkpoints, adapters, and what was logged but for time and memory."""
    a, b = (leaves({k: v for k, v in kept(out).items() if k != "rng"}) for out in (one, two))
    assert a.keys() == b.keys()
    assert not [k for k, v in a.items() if not (torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k])]
    for file in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        assert (one / "adapter" / file).read_bytes() == (two / "adapter" / file).read_bytes()
    assert log(one) == log(two)


# --- what training does, and what it leaves alone --------------------------------------------------------------------
def test_a_student_that_is_its_teacher_has_nothing_to_learn_and_is_told_so(tiny, tmp_path):
    tasks = [task | {"teacher": "one"} for task in tiny.values("distill", tmp_path)["tasks"]]
    changes = {"tasks": tasks, "teachers": {"one": {"source": tiny.teacher("one")}}, "start": tiny.teacher("one")}
    changes |= {"optimizer": {"learning_rate": 1e-4}, "steps": 9, "patience": 3}
    with pytest.raises(WorkError, match=r"Stopped at step 3: all gradients have been zero for 3 steps; .*log\.jsonl"):
        run(tiny, "direct", tmp_path, **changes)
    assert len(log(tmp_path)) == 2
    assert all(line["grad_norm"] == line["kl/shapes"] == line["kl/signs"] == 0 for line in log(tmp_path))


def test_steps_toward_the_teachers_lower_the_kl_of_each_task(tiny, tmp_path):
    optimizer = {"learning_rate": 2e-2, "ema": 0.0, "ema_every": 1}
    adapter = run(tiny, "direct", tmp_path, steps=15, optimizer=optimizer, micro_batch=4)
    prompts = [(task.teacher, task_prompts(task).training[:3]) for task in tiny.recipe("distill", tmp_path).tasks]
    x, sigmas = draw_noise(range(3), (4, 8, 8)), shifted_sigmas(2, 3.0)[:2]

    @torch.no_grad()
    def distances(start):
        policies, found = Policies(tiny.recipe("distill", tmp_path / "other", start=str(start)), CPU), []
        for teacher, shown in prompts:
            policies.prepare_text(texts := [prompt.prompt for prompt in shown])
            conditions, experts = policies.conditions(texts), [policies.experts[teacher]] * 3
            apart = [
                policies.student(x, s, conditions, 3.0) - policies.frozen(experts, x, s, conditions) for s in sigmas
            ]
            found.append(float(torch.stack(apart).square().mean()))
        return found

    for before, after in zip(distances("none"), distances(adapter), strict=True):
        assert after < 0.8 * before


def test_training_moves_the_student_alone_and_its_average_is_what_is_exported(tiny, tmp_path):
    def weights(policies):
        return policies.transformer.state_dict() | {f"bank.{k}": v for k, v in policies.bank.state_dict().items()}

    def make(config, policies, mixture, parallel):
        seen.extend([policies, {k: v.clone() for k, v in weights(policies).items()}])
        return Distillation(config, policies, mixture, parallel)

    seen, anchor = [], {"source": tiny.teacher("anchor"), "weight": 0.1}
    adapter = run(tiny, "direct", tmp_path, make=make, steps=3, anchor=anchor)
    policies, before = seen
    after, modules, state = weights(policies), policies.bank.modules_covered, kept(tmp_path)
    trained = {f"bank.{name}" for name, p in policies.bank.named_parameters() if p.requires_grad}
    idle = modules.index("transformer_blocks.1.attn.add_q_proj")  # the last block has no use for text queries
    assert {k for k, v in before.items() if not torch.equal(v, after[k])} == trained - {
        f"bank.slots.{idle}.trainable_B.0"
    }
    assert all(torch.equal(v, after[f"bank.{k}"]) for k, v in state["bank"].items())  # exporting put them back
    average = dict(zip(state["bank"], state["ema"]["shadow_params"], strict=True))
    exported = read_adapter(adapter).factors
    for n, module in enumerate(modules):
        assert torch.equal(exported[module].A, average[f"slots.{n}.trainable_A.0"])
        assert torch.equal(exported[module].B, 2 * average[f"slots.{n}.trainable_B.0"])  # alpha / rank
    assert not all(torch.equal(average[k], v) for k, v in state["bank"].items())


def test_the_average_is_a_copy_and_asking_for_it_changes_nothing(tiny, tmp_path):
    policies = Policies(tiny.recipe("distill", tmp_path, start=tiny.teacher("one")), CPU)
    parameters = list(policies.bank.parameters())
    ema = EMAModel(parameters, decay=0.9)
    ema.step(parameters)
    first = policies.bank.adapter(STUDENT).sha256
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(2)
    raw = policies.bank.adapter(STUDENT).sha256
    weights = averaged_weights(ema, parameters, step=2, every=2)
    assert student_with(policies, weights, parameters).sha256 == first != raw
    assert policies.bank.adapter(STUDENT).sha256 == raw


def test_a_run_killed_between_its_last_checkpoint_and_its_adapter_writes_it_when_asked_again(tiny, tmp_path):
    adapter = run(tiny, "direct", tmp_path, steps=1)
    whole = read_adapter(adapter).sha256
    shutil.rmtree(adapter)
    assert read_adapter(run(tiny, "direct", tmp_path, steps=1)).sha256 == whole


class Given:
    """Two updates a step with random gradients, some long and some short."""

    def __init__(self, config, policies, mixture, parallel):
        self.parameters = [p for p in policies.bank.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.parameters]

    def identity(self):
        return {}

    def needed(self, first):
        return []

    def gradients(self, step, update):
        source = torch.Generator().manual_seed(2 * step + update)
        return [(0.001, 1.0)[update] * torch.randn(p.shape, generator=source) for p in self.parameters]

    def updates(self, step):
        for update in range(2):
            pairs = zip(self.parameters, self.gradients(step, update), strict=True)
            sum((parameter * given).sum() for parameter, given in pairs).backward()
            yield Means()


def test_the_weights_are_adamw_s_on_clipped_gradients_and_the_average_is_theirs_every_other_step(tiny, tmp_path):
    """The average's first update takes the weights, the n-th after it keeps (1 + n) / (10 + n), at most the decay.

    Steps since the last update are part of what is exported, as an update then would have taken them in.
    """
    optimizer = {"learning_rate": 0.02, "betas": [0.5, 0.8], "weight_decay": 2.0, "eps": 1e-3, "warmup_steps": 2}
    optimizer |= {"max_grad_norm": 0.3, "ema": 0.22, "ema_every": 2}
    made, steps = [], 5
    changes = {"make": lambda *a: made.append(Given(*a)) or made[0], "snapshot_every": steps, "optimizer": optimizer}
    adapter = run(tiny, "direct", tmp_path, steps=steps, **changes)
    (stage,) = made
    norms = []
    weights = [start.clone().requires_grad_() for start in stage.start]
    plain = torch.optim.AdamW(weights, lr=0.02, betas=(0.5, 0.8), weight_decay=2.0, eps=1e-3)
    decays, average = [0.0, 2 / 11, 0.22], [torch.zeros(())] * len(weights)
    for step in range(steps):
        for update in range(2):
            given = stage.gradients(step, update)
            norms.append(float(torch.cat([g.flatten() for g in given]).norm()))
            for weight, gradient in zip(weights, given, strict=True):
                weight.grad = gradient * min(1.0, 0.3 / norms[-1])
            plain.param_groups[0]["lr"] = 0.02 * min(1.0, (2 * step + update) / 2)
            plain.step()
        if step % 2 or step == steps - 1:
            before, decay = average, decays.pop(0)
            average = [decay * old + (1 - decay) * new.detach() for old, new in zip(average, weights, strict=True)]
    assert min(norms) < 0.3 < max(norms)
    state = kept(tmp_path)
    torch.testing.assert_close(list(state["bank"].values()), [weight.detach() for weight in weights])
    torch.testing.assert_close(state["ema"]["shadow_params"], before)
    found = dict(zip(state["bank"], average, strict=True))
    modules = Policies(tiny.recipe("distill", tmp_path), CPU).bank.modules_covered
    for folder in (adapter, tmp_path / "snapshots" / f"step-{steps:06d}"):
        exported = read_adapter(folder).factors
        for n, module in enumerate(modules):
            torch.testing.assert_close(exported[module].A, found[f"slots.{n}.trainable_A.0"])
            torch.testing.assert_close(exported[module].B, 2 * found[f"slots.{n}.trainable_B.0"])  # alpha / rank


def test_the_exported_adapter_is_the_same_student_in_stock_diffusers(tiny, tmp_path):
    adapter = run(tiny, "direct", tmp_path)
    stock = StableDiffusion3Pipeline.from_pretrained(tiny.folder / "base", text_encoder_3=None, tokenizer_3=None)
    policies = Policies(tiny.recipe("distill", tmp_path / "other", start=str(adapter)), CPU)

    @torch.no_grad()
    def velocity(transformer):
        states, _, pooled, _ = stock.encode_prompt("two stars", None, None, False, max_sequence_length=0)
        return transformer(draw_noise([0], (4, 8, 8)), states, pooled, torch.tensor([600.0]), return_dict=False)[0]

    base = velocity(stock.transformer.eval())
    stock.load_lora_weights(adapter)
    with policies.bank.use(STUDENT):
        ours = velocity(policies.transformer)
    torch.testing.assert_close(velocity(stock.transformer), ours, atol=1e-6, rtol=1e-5)
    assert (ours - base).abs().max() > 1e-3


# --- resuming --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "changes"), [("direct", {}), ("grpo", {"updates": 2}), ("nft", {}), ("sft", {})])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, changes, tiny, tmp_path):
    changes = changes | {"optimizer": {"learning_rate": 1e-2, "ema_every": 1, "warmup_steps": 4}}
    for folder, steps in (("whole", 3), ("parts", 2), ("parts", 3)):
        run(tiny, kind, tmp_path / folder, steps=steps, **changes)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("constant", [0.5, 1, 1]), ("linear", [0.5, 0.75, 0.25]), ("cosine", [0.5, 0.853553, 0.146447])],
)
def test_the_rate_of_each_step_s_last_update_is_logged_and_falls_towards_the_end(schedule, shares, tiny, tmp_path):
    optimizer = {"learning_rate": 1e-2, "warmup_steps": 2, "schedule": schedule}  # two updates a step: one step
    run(tiny, "nft", tmp_path, steps=3, updates=2, optimizer=optimizer)
    assert [line["learning_rate"] for line in log(tmp_path)] == pytest.approx([1e-2 * share for share in shares])


@pytest.mark.parametrize(("schedule", "longer"), [("constant", True), ("linear", False)])
def test_a_run_is_made_longer_unless_its_rate_falls_towards_its_end(schedule, longer, tiny, tmp_path):
    optimizer = {"learning_rate": 1e-2, "schedule": schedule}
    run(tiny, "nft", tmp_path, steps=1, optimizer=optimizer)
    with nullcontext() if longer else pytest.raises(RequestError, match="optimizer_steps"):
        run(tiny, "nft", tmp_path, steps=2, optimizer=optimizer)
    assert len(log(tmp_path)) == 1 + longer


def test_pictures_drawn_with_other_settings_are_not_trained_on(tiny, tmp_path):
    run(tiny, "sft", tmp_path / "again", picture_steps=2)
    shutil.rmtree(tmp_path / "again" / "checkpoints")
    for folder in ("again", "fresh"):
        run(tiny, "sft", tmp_path / folder, picture_steps=1)
    assert log(tmp_path / "again")[-2:] == log(tmp_path / "fresh")


def judged_tasks(tiny, tmp_path):
    return [task | {"rewards": {tiny.reward("Bright"): 1.0}} for task in tiny.values("sft", tmp_path)["tasks"]]


def test_of_so_many_candidates_the_one_with_the_highest_reward_is_kept(tiny, tmp_path):
    changes = {"tasks": judged_tasks(tiny, tmp_path), "best_of": 2}
    stage = tiny.stage(SFT, "sft", tmp_path, **changes)
    assert len(stage.candidates) == 12
    assert [a.prompt for a in stage.candidates[::2]] == [b.prompt for b in stage.candidates[1::2]]
    better = 0
    for index in range(6):
        latent, reward = stage._picture(index)
        one, two = (stage._draw([candidate]) for candidate in stage.candidates[2 * index : 2 * index + 2])
        (first,), (second,) = one[1](), two[1]()
        if math.isnan(first):  # the reward says nothing of such prompts: the first candidate stays
            assert reward.isnan()
            assert torch.allclose(latent, one[0][0], atol=1e-5)
            continue
        assert torch.allclose(latent, (one if first >= second else two)[0][0], atol=1e-5)
        assert reward == pytest.approx(max(first, second))
        better += int(second > first)
    assert better  # not always the first


def test_pictures_whose_reward_is_too_low_or_unknown_are_not_trained_on(tiny, tmp_path):
    changes = {"tasks": judged_tasks(tiny, tmp_path), "batch_size": 12, "micro_batch": 12, "pictures": 12}
    stage = tiny.stage(SFT, "sft", tmp_path, **changes, least_reward=0.0)
    rewards = torch.stack([stage._picture(n)[1] for n in range(12)])
    known = rewards[~rewards.isnan()]
    assert 0 < len(known) < 12
    least = float(known.median())
    (means,) = tiny.stage(SFT, "sft", tmp_path, **changes, least_reward=least).updates(0)
    assert means.reduce()["kept"] == pytest.approx(float((rewards >= least).float().mean()))
    none = tiny.stage(SFT, "sft", tmp_path, **changes, least_reward=2.0)
    list(none.updates(0))
    assert not any(p.grad.any() for p in none.policies.bank.parameters() if p.grad is not None)


def test_candidates_that_no_reward_could_judge_are_not_trained_on(tiny, tmp_path, capfd):
    changes = {"tasks": judged_tasks(tiny, tmp_path), "batch_size": 12, "micro_batch": 12, "pictures": 12}
    stage = tiny.stage(SFT, "sft", tmp_path, **changes, best_of=2)
    rewards = torch.stack([stage._picture(n)[1] for n in range(12)])
    (means,) = stage.updates(0)
    assert 0 < means.reduce()["kept"] < 1
    assert torch.equal(stage._wanted(rewards), (~rewards.isnan()).float())
    assert capfd.readouterr().err.count("could not judge a picture") == 1  # each reward says so once


def test_a_stop_does_not_wait_for_all_of_the_teachers_pictures(tiny, tmp_path, monkeypatch):
    stage = tiny.stage(SFT, "sft", tmp_path, batch_size=12, micro_batch=12, pictures=48)
    draw = stage._draw

    def asked_to_stop_meanwhile(samples):
        stage.parallel.stopped = [signal.SIGTERM]
        return draw(samples)

    monkeypatch.setattr(stage, "_draw", asked_to_stop_meanwhile)
    with pytest.raises(Stopped):
        list(stage.updates(0))
    assert len(list(stage.folder.iterdir())) == 1  # the block at hand, kept


def began(out):
    """Whether a run has finished two steps."""
    return (out / "log.jsonl").is_file() and (out / "log.jsonl").read_text().count("\n") > 1


def test_a_run_that_is_asked_to_stop_says_so_and_goes_on_bit_for_bit(tiny, tmp_path, monkeypatch):
    out, recipe = tmp_path / "parts", tmp_path / "recipe.toml"
    tiny.write(recipe, "distill", out, steps=1000)
    command = [sys.executable, "-m", "training", str(recipe)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not began(out):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.terminate()
        errors = process.communicate(timeout=60)[1]
    step = kept(out)["step"]
    assert process.returncode == 1
    assert f"Stopped at step {step} of 1000; the same command goes on from there" in errors
    monkeypatch.setattr(sys, "argv", ["training", str(recipe), "--resume", "--set", f"steps={step + 1}"])
    assert main() == 0
    run(tiny, "direct", tmp_path / "whole", steps=step + 1)
    assert_same_bits(tmp_path / "whole", out)


@forked
def test_a_killed_run_goes_on_bit_for_bit(tiny, tmp_path):
    changes = {"save_minutes": 0.0, "keep": 2}
    arguments = {"target": run, "args": (tiny, "direct", tmp_path / "parts"), "kwargs": {"steps": 1000, **changes}}
    process = multiprocessing.get_context("fork").Process(**arguments)
    process.start()
    while not began(tmp_path / "parts"):
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    step = kept(tmp_path / "parts")["step"] + 1
    with (tmp_path / "parts" / "log.jsonl").open("a") as file:  # what it may have logged beyond its checkpoint
        file.write(f'{{"step": {step}, "kl/shapes": 0}}\n{{"st')
    run(tiny, "direct", tmp_path / "parts", steps=step, **changes)
    run(tiny, "direct", tmp_path / "whole", steps=step)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    saved = sorted(path.name for path in (tmp_path / "parts" / "checkpoints").glob("*.pt"))
    assert saved == [f"step-{n:08d}.pt" for n in (step - 1, step)]


def test_only_the_same_run_is_gone_on_with(tiny, tmp_path, capsys, monkeypatch):
    out, recipe, teacher = tmp_path / "out", tmp_path / "recipe.toml", tmp_path / "teacher"
    one, two = (read_adapter(tiny.teacher(name)) for name in ("one", "two"))
    teachers = {"one": {"source": str(teacher)}, "two": {"source": tiny.teacher("two")}}
    write_adapter(one, teacher)
    tiny.write(recipe, "distill", out, teachers=teachers, steps=1)

    def said(*arguments):
        monkeypatch.setattr(sys, "argv", ["training", str(recipe), *arguments])
        return main(), capsys.readouterr().err

    code, refusal = said("--resume")
    assert code == 2
    assert f"--resume: {out} holds no checkpoint to go on from" in refusal
    assert said()[0] == 0
    code, refusal = said("--set", "optimizer.learning_rate=0.02", "--set", "steps=2")
    assert code == 2
    assert "recipe.optimizer.learning_rate: 0.01 there, 0.02 asked for" in refusal
    write_adapter(two, teacher)
    code, refusal = said("--set", "steps=2")
    assert code == 2
    assert f'experts.one: "{one.sha256}" there, "{two.sha256}" asked for' in refusal
    assert kept(out)["step"] == 1


def test_a_run_that_began_before_a_setting_existed_is_gone_on_with(tiny, tmp_path):
    anchor = {"source": tiny.teacher("anchor"), "weight": 0.1}
    run(tiny, "direct", tmp_path, steps=1, anchor=anchor)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    state = checkpoints.latest()
    recipe = state["identity"]["recipe"]
    assert (recipe.pop("storage"), recipe["anchor"].pop("every")) == (None, 1)
    checkpoints.save(1, state)
    with pytest.raises(RequestError, match=r"recipe.anchor.every: 1 there, 2 asked for"):
        run(tiny, "direct", tmp_path, steps=2, anchor=anchor | {"every": 2})
    run(tiny, "direct", tmp_path, steps=2, anchor=anchor)
    assert checkpoints.latest()["step"] == 2


def test_a_run_of_an_earlier_version_that_makes_other_weights_is_not_gone_on_with(tiny, tmp_path):
    run(tiny, "direct", tmp_path, steps=1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    state = checkpoints.latest()
    state["identity"]["schema"] -= 1
    checkpoints.save(1, state)
    with pytest.raises(RequestError, match=r"begun by an earlier version .* another `out`"):
        run(tiny, "direct", tmp_path, steps=2)


def test_processes_that_do_not_know_each_other_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("training.loop.Accelerator", lambda **_: Accelerator())
    with pytest.raises(RequestError, match=r"one of 2 processes.*accelerate found 1"):
        run(tiny, "direct", tmp_path)


def test_a_teacher_that_teaches_otherwise_is_another(tiny, tmp_path):
    run(tiny, "direct", tmp_path, steps=1)
    state = kept(tmp_path)
    assert state["identity"]["teaches"] == {"one": [3.0, 0], "two": [3.0, 0]}
    state["identity"]["teaches"]["one"] = [1.0, 0]  # as its own record may have said
    Checkpoints(tmp_path / "checkpoints", 1).save(1, state)
    with pytest.raises(RequestError, match=r"teaches\.one"):
        run(tiny, "direct", tmp_path, steps=2)
    del state["identity"]["teaches"]  # of a run that began before it was noted
    Checkpoints(tmp_path / "checkpoints", 1).save(1, state)
    run(tiny, "direct", tmp_path, steps=2)


def test_a_damaged_checkpoint_is_named(tiny, tmp_path):
    run(tiny, "direct", tmp_path, steps=1)
    (file,) = (tmp_path / "checkpoints").glob("step-*.pt")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(WorkError, match=rf"{file.name} is damaged.*remove it"):
        run(tiny, "direct", tmp_path, steps=2)


# --- several processes -----------------------------------------------------------------------------------------------
def in_one_of_two(tiny, kind, out, changes):
    AcceleratorState._reset_state(True)  # the parent's, which was alone
    run(tiny, kind, out, **changes)


def by_fork(tiny, kind, out, changes):
    debug_launcher(in_one_of_two, (tiny, kind, out, changes), num_processes=2)


def by_command(tiny, kind, out, changes):
    recipe = tiny.write(out / "recipe.toml", STAGES[kind][0], out, **(STAGES[kind][2] | changes))
    # what `accelerate launch` starts where there are several cards; without any it would start one process
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "training", str(recipe)]
    # what the fixture says to accelerate no user says
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    subprocess.run(launch, cwd=ROOT, check=True, timeout=120, env=environment)


@pytest.mark.parametrize(
    ("kind", "launch", "changes"),
    [
        pytest.param("direct", by_fork, {"rollout": {"steps": 2, "window": 1}}, marks=forked),
        pytest.param("grpo", by_fork, {}, marks=forked),
        pytest.param("grpo", by_fork, {"updates": 2}, marks=forked),
        pytest.param("nft", by_fork, {"guidance": 3.0}, marks=forked),
        pytest.param("policy_gradient", by_fork, {}, marks=forked),
        pytest.param("sft", by_fork, {}, marks=forked),
        pytest.param("direct", by_command, {}),
        *(pytest.param(kind, by_command, {}, marks=pytest.mark.slow) for kind in STAGES if kind != "direct"),
    ],
)
def test_two_processes_make_the_update_of_one(kind, launch, changes, tiny, tmp_path):
    # eps: no division by rounding errors
    changes = changes | {"batch_size": 8, "optimizer": {"learning_rate": 1e-2, "ema_every": 1, "eps": 1e-4}}
    launch(tiny, kind, tmp_path / "two", changes)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    run(tiny, kind, tmp_path / "one", **changes)
    one, two = (read_adapter(tmp_path / n / "adapter").factors for n in ("one", "two"))
    one, two = (torch.cat([(f[name].B @ f[name].A).flatten() for name in sorted(f)]) for f in (one, two))
    assert one.norm() > 0.01
    assert (one - two).norm() <= 1e-5 * one.norm()
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)


def test_a_batch_that_processes_cannot_share_is_refused(tiny, tmp_path):
    check_processes(tiny.recipe("distill", tmp_path), 2)
    with pytest.raises(RequestError, match=r"batch_size 4 cannot be shared by 3 processes .*multiple of 6"):
        check_processes(tiny.recipe("distill", tmp_path), 3)


# --- watching --------------------------------------------------------------------------------------------------------
def test_a_loss_that_is_not_a_number_stops_the_run(tiny, tmp_path):
    with pytest.raises(WorkError, match="Stopped at step 2: the gradient norm is nan; lower the learning rate"):
        run(tiny, "direct", tmp_path, steps=5, optimizer={"learning_rate": 1e30})
    assert kept(tmp_path) is None  # nothing broken is kept


def test_rewards_that_never_differ_stop_the_run(tiny, tmp_path):
    tasks = [task | {"rewards": {tiny.reward("Flat"): 1.0}} for task in tiny.values("grpo", tmp_path)["tasks"]]
    # The pull to the base keeps gradients from being zero.
    changes = {"tasks": tasks, "beta": 0.1, "start": tiny.teacher("one"), "patience": 2, "steps": 9}
    with pytest.raises(WorkError, match=r"Stopped at step 2: in no group of 2 steps did the rewards differ; .*prompts"):
        run(tiny, "grpo", tmp_path, **changes)


def test_a_picture_without_a_judgement_is_counted_and_left_out(tiny, tmp_path):
    (tmp_path / "x.txt").write_text("a red star\na green star\n")
    task = {"name": "x", "prompts": str(tmp_path / "x.txt"), "held_out": 0, "rewards": {tiny.reward("Bright"): 1.0}}
    run(tiny, "grpo", tmp_path, tasks=[task], steps=1, updates=1)
    (line,) = log(tmp_path)
    assert line["unscored"] == line["groups_without_variance"] == 0.5
    assert 0 < line["reward/x"] < 1
    assert line["grad_norm"] > 0


def test_nft_contrasts_the_groups_that_differ_and_counts_what_is_not_judged(tiny, tmp_path):
    (tmp_path / "x.txt").write_text("a red star\na green star\n")
    task = {"name": "x", "prompts": str(tmp_path / "x.txt"), "held_out": 0, "rewards": {tiny.reward("Bright"): 1.0}}
    run(tiny, "nft", tmp_path, tasks=[task], steps=1, updates=2)
    (line,) = log(tmp_path)
    assert line["unscored"] == line["groups_without_variance"] == 0.5
    assert line["grad_norm"] > 0
    assert line["moved"] > 0  # of the second update: the first starts where the pictures were drawn


def test_nft_is_pulled_towards_the_base_as_strongly_as_asked(tiny, tmp_path):
    def distance(weight):
        changes = {"start": tiny.teacher("one"), "steps": 9, "base_weight": weight}
        run(tiny, "nft", tmp_path / str(weight), optimizer={"learning_rate": 1e-3, "ema": 0.0}, **changes)
        return [line["from_base"] for line in log(tmp_path / str(weight))]

    weak, strong = distance(1e-9), distance(1e3)
    assert strong[-1] < 0.5 * strong[0]
    assert weak[-1] > 2 * strong[-1]


def test_noise_stops_the_run_and_pictures_do_not(tmp_path):
    random, alarms = np.random.default_rng(0), Alarms(3, tmp_path)
    with pytest.raises(WorkError, match="Stopped at step 8: the student draws noise"):
        alarms.noise(7, Image.fromarray(random.integers(0, 256, (32, 96, 3), np.uint8)))
    slope = np.linspace(0, 200, 96)[None, :, None] + random.normal(0, 20, (32, 96, 3))
    alarms.noise(7, Image.fromarray(slope.clip(0, 255).astype(np.uint8)))
    alarms.noise(7, Image.new("RGB", (96, 32), "white"))


def test_a_strip_s_prompt_belongs_to_the_task_it_was_taken_for(tiny, tmp_path):
    tasks = tiny.values("distill", tmp_path)["tasks"]
    both = tmp_path / "both.jsonl"
    both.write_text("".join(Path(task["prompts"]).read_text() for task in tasks))
    tasks.append(tasks[1] | {"name": "all", "prompts": str(both), "held_out": 20})
    config = tiny.recipe("distill", tmp_path, tasks=tasks, strip_prompts=3)
    prompts = {task.name: task_prompts(task) for task in config.tasks}
    shown = list(strip_prompts(config, prompts).items())
    for (text, teacher), task in zip(shown, config.tasks, strict=True):
        assert teacher == task.teacher
        assert text in {prompt.prompt for prompt in prompts[task.name].held_out}
    assert shown[0][0] in {prompt.prompt for prompt in prompts["all"].held_out}


def test_a_prompt_of_two_tasks_is_shown_with_the_first_ones_teacher(tiny, tmp_path):
    first = tiny.values("distill", tmp_path)["tasks"][0]
    tasks = [first, first | {"name": "again", "teacher": "two" if first["teacher"] == "one" else "one"}]
    config = tiny.recipe("distill", tmp_path, tasks=tasks, strip_prompts=2)
    shown = strip_prompts(config, {task.name: task_prompts(task) for task in config.tasks})
    assert list(shown.values()) == [first["teacher"]] * 2


@pytest.mark.parametrize("guidance", [1.5, None])
def test_a_student_of_a_known_base_says_how_it_is_drawn(tiny, tmp_path, guidance):
    teachers = {"one": {"source": "tiny:geneval"}, "two": {"source": "tiny:ocr"}}
    changes = {"base": "tiny:base", "teachers": teachers, "lora": {"rank": 4, "alpha": 8}, "steps": 1, "batch_size": 2}
    rollout = {"steps": 1} | ({"guidance": guidance} if guidance else {})
    adapter = str(run(tiny, "direct", tmp_path, rollout=rollout, snapshot_every=1, **changes))
    record = replace(TINY_RECORD, guidance=guidance or TINY_RECORD.guidance)
    assert resolve(adapter).record == record
    assert (resolve(adapter).base, resolve(adapter).adapter) == (resolve("tiny:base").base, adapter)
    assert resolve("tiny:base", adapter).record == record
    assert resolve(str(tmp_path / "snapshots" / "step-000001")).record == record


def test_a_strip_shows_base_teacher_and_student(tiny, tmp_path):
    changes = {"optimizer": {"learning_rate": 0.05, "ema": 0.0, "ema_every": 1}, "strip_every": 2, "strip_prompts": 2}
    adapter = run(tiny, "direct", tmp_path, steps=2, **changes)
    strip = np.asarray(Image.open(tmp_path / "strip_000002.png")).astype(int)
    assert strip.shape == (3 * 16, 2 * 16, 3)
    experts = {"one": tiny.teacher("one"), "two": tiny.teacher("two"), "student": adapter}
    pipeline = FlowOPDPipeline.from_pretrained(tiny.folder / "base", experts=experts)
    for column, task in enumerate(tiny.recipe("distill", tmp_path).tasks):
        for row, expert in enumerate((None, task.teacher, "student")):
            picture = pipeline(task_prompts(task).held_out[0].prompt, expert=expert, seed=column).images[0]
            tile = strip[16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)]
            assert abs(tile - np.asarray(picture)).max() <= 2
    assert len({strip[16 * row : 16 * (row + 1)].tobytes() for row in range(3)}) == 3
